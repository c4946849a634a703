"""Parameters of a comparison: methods as lines of text, a list of which Prefect's form shows well."""

import re
import tomllib
from collections.abc import Sequence
from hashlib import sha256
from typing import Self, get_args

from pydantic import Field, ValidationError, model_validator

from tasks.settings_base import StageConfig
from tasks.settings_finetune import FinetuneConfig, Method

# Fields that a line cannot set, and where they are set instead.
ELSEWHERE = {
    "method": "the line's first word",
    "name": "name",
    "preferences": "finetune.preferences",
    "seed": "compare.seeds",
}
MAX_SLUG = 24
MAX_PREFIX = 25  # of NAME in models/NAME-SLUG


class MethodsConfig(StageConfig):
    """Methods of fine-tuning on the same pairs with the same seeds."""

    methods: list[str] = Field(
        ["dpo", "gr_dpo"],
        title="Methods",
        description="Each a method of fine-tuning, and FIELD=VALUE for what it does not share with the others: "
        '"ipo length_norm=sum beta=0.2"; "beta=" stands for the default',
        min_length=1,
    )
    seeds: list[int] = Field(
        [0, 1, 2], title="Seeds", description="Every method is trained once with each", min_length=1
    )
    finetune: FinetuneConfig = Field(FinetuneConfig(), title="Fine-tune", description="What the methods share")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _refuse_twice("methods", [slug(line) for line in self.methods], self.methods)
        _refuse_twice("seeds", self.seeds, self.seeds)
        for seed in self.seeds:
            if not 0 <= seed < 2**31:
                raise ValueError(f"seeds has {seed}: give numbers from 0 to {2**31 - 1}")
        if len(self.name) > MAX_PREFIX:
            raise ValueError(f'name = "{self.name}" is too long to put methods behind; give {MAX_PREFIX} characters')
        for line in self.methods:
            variant(self.finetune, line)
        return self


def variant(shared: FinetuneConfig, line: str) -> FinetuneConfig:
    """The fine-tuning that a line of `methods` stands for; ValueError for one that stands for none."""
    method, *settings = line.split() or [""]
    if method not in get_args(Method):
        raise ValueError(f'methods has "{line}": begin with one of {", ".join(get_args(Method))}')
    values: dict[str, object] = {"method": method}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if key in ELSEWHERE:
            raise ValueError(f'methods has "{line}": {key} is not set here but by {ELSEWHERE[key]}')
        if not equals or key not in FinetuneConfig.model_fields:
            raise ValueError(f'methods has "{line}": "{setting}" is no FIELD=VALUE of finetune, such as beta=0.2')
        values[key] = _parsed(text) if text else FinetuneConfig.model_fields[key].default
    try:
        return FinetuneConfig.model_validate(shared.model_dump() | values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f'methods has "{line}": {place} = {first["input"]!r}: {first["msg"]}') from error


def slug(line: str) -> str:
    """A line as the end of a dataset's name; equal for lines that differ in nothing but spaces."""
    text = " ".join(line.split())
    plain = re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")
    if len(plain) <= MAX_SLUG and plain.replace("-", " ") == text.replace("=", " "):
        return plain
    return f"{plain[: MAX_SLUG - 7]}-{sha256(text.encode()).hexdigest()[:6]}"


def _refuse_twice(name: str, keys: Sequence[object], values: Sequence[object]) -> None:
    for key, value in zip(keys, values, strict=True):
        if keys.count(key) > 1:
            raise ValueError(f'{name} has "{value}" twice; keep one')


def _parsed(text: str) -> object:
    """A TOML value; anything that is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
