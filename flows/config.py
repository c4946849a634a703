"""The configuration of a pipeline: a TOML file, then WINNOW_* environment variables, then `--set key=value`."""

import os
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tasks.errors import ConfigError
from tasks.settings import PipelineConfig

ENVIRONMENT_PREFIX = "WINNOW_"
# What people write for a section whose name is a word of Python's.
SECTIONS = {"import": "import_preferences"}
NOT_CONFIG = ("WINNOW_LAKE", "WINNOW_FUNCTIONS", "WINNOW_FOLDER", "WINNOW_VERSION")  # read elsewhere


def load_config(
    path: Path | None, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> PipelineConfig:
    """Read and check a configuration; ConfigError names the first wrong key or value and the fix."""
    values: dict[str, object] = {}
    for key, value in (_read_toml(path) if path else {}).items():
        values[SECTIONS.get(key, key)] = value
    for key, text in environment.items():
        if key.startswith(ENVIRONMENT_PREFIX) and key not in NOT_CONFIG:
            _assign(values, key.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"), text, key)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f'--set "{override}": write key=value, such as generate.n=8')
        _assign(values, key.strip().split("."), text.strip(), key)
    return validate(values)


def validate(values: Mapping[str, object]) -> PipelineConfig:
    """Check plain values; ConfigError for the first problem."""
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, PipelineConfig)) from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error in one line: key, value and fix; further problems are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = ".".join(map(str, first["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_beside(model, [str(part) for part in first["loc"]])
        near = get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"
        return f'config: unknown key "{place}"; {hint}{more}'
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "value_error" else f" = {first['input']!r}"
    return f"config: {place}{shown}: {message}{more}" if place else f"config: {message}{more}"


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f'config file "{path}" does not exist; give the path of a TOML file') from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f'config file "{path}" cannot be read: {str(error).splitlines()[0]}') from error


def _assign(values: dict[str, object], keys: list[str], text: str, shown: str) -> None:
    table = values
    keys = [SECTIONS.get(keys[0], keys[0]), *keys[1:]]
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f'"{shown}": {key} is a value, not a section')
        table = inner
    table[keys[-1]] = _parse(text)


def _parse(text: str) -> object:
    """A TOML value; anything that is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _keys_beside(model: type[BaseModel], path: list[str]) -> list[str]:
    for key in path[:-1]:
        field = model.model_fields.get(key)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        model = field.annotation
    return sorted(model.model_fields)
