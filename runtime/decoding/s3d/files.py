"""An adapter's files: weights as safetensors beside a small JSON file. Both are hostile until validated."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.decoding.s3d.adapter import KINDS, S3DAdapter, S3DConfig
from runtime.errors import ModelError
from runtime.model_files import S3D_FILES
from runtime.models import LoadedModel

CONFIG_NAME, WEIGHTS_NAME = S3D_FILES
MAX_CONFIG_BYTES = 4096
_DTYPES = ("F64", "F32", "F16", "BF16")


def save(adapter: S3DAdapter, folder: Path) -> None:
    """Write both files, the weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: one.detach().to("cpu", torch.bfloat16).contiguous() for name, one in adapter.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(adapter.config), indent=2) + "\n", encoding="utf-8")


def load(folder: Path, loaded: LoadedModel) -> S3DAdapter:
    """Read both files; ModelError names what does not fit `loaded`."""
    config = read_config(folder)
    if config.base_hash != loaded.content_hash:
        raise ModelError(
            f'the S3D adapter "{folder}" was made for another model than {loaded.source!r} '
            f"({config.base_hash[:12]}, not {loaded.content_hash[:12]}); run `winnow adapt` for this one"
        )
    adapter = S3DAdapter(loaded, config)
    adapter.load_state_dict(_weights(folder / WEIGHTS_NAME, adapter.state_dict()))
    return adapter.to(loaded.model.dtype).requires_grad_(False)


def read_config(folder: Path) -> S3DConfig:
    """The validated content of the JSON file."""
    path = folder / CONFIG_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise ModelError(f'"{path}" is above {MAX_CONFIG_BYTES} bytes; it is no S3D adapter')
        values = json.loads(text)
    except FileNotFoundError as error:
        raise ModelError(f'"{folder}" has no {CONFIG_NAME}; give a folder that `winnow adapt` made') from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f'"{path}" is not readable as JSON ({str(error).splitlines()[0]}); adapt again') from error
    return _checked(path, values)


def _checked(path: Path, values: object) -> S3DConfig:
    names = {field.name for field in fields(S3DConfig)}
    if isinstance(values, dict):
        values = {"sampler_width": 0} | values  # adapters are older than sampler heads
    if not isinstance(values, dict) or set(values) != names:
        raise ModelError(f'"{path}" must hold exactly {", ".join(sorted(names))}; adapt again')
    for name in ("n_first", "n_last", "k", "rank", "sampler_width"):
        if type(values[name]) is not int or not 0 <= values[name] < 2**16:
            raise ModelError(f'"{path}": {name} = {_shown(values[name])} is no small number; adapt again')
    alpha = values["alpha"]
    if type(alpha) not in (int, float) or not 0 <= alpha <= 2**16:
        raise ModelError(f'"{path}": alpha = {_shown(alpha)} is no usable number; adapt again')
    if values["kind"] not in KINDS:
        raise ModelError(f'"{path}": kind = {_shown(values["kind"])} is none of {", ".join(KINDS)}; adapt again')
    if not isinstance(values["base_hash"], str) or not re.fullmatch(r"[0-9a-f]{64}", values["base_hash"]):
        raise ModelError(f'"{path}": base_hash is no sha256; adapt again')
    rates = values["rates"]
    if not isinstance(rates, list) or len(rates) not in (0, values["k"]) or not all(map(_is_share, rates)):
        raise ModelError(f'"{path}": rates = {_shown(rates)} are not {values["k"]} shares; adapt again')
    return S3DConfig(**values | {"rates": tuple(rates)})


def _shown(value: object) -> str:
    """On one line, whatever a string holds."""
    return repr(value)[:40]


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file: exactly the expected names, shapes and finite floating-point numbers."""
    try:
        with safe_open(path, "pt") as file:
            found = set(file.keys())
            if found != set(expected):
                first = sorted(found ^ set(expected))[0]
                raise ModelError(f'"{path}" has other weights than its {CONFIG_NAME} says ({first[:80]}); adapt again')
            for name, tensor in expected.items():
                part = file.get_slice(name)
                if list(part.get_shape()) != list(tensor.shape) or part.get_dtype() not in _DTYPES:
                    raise ModelError(
                        f'"{path}": {name} is {part.get_dtype()} {tuple(part.get_shape())}, not floating point '
                        f"{tuple(tensor.shape)}; it fits another model"
                    )
            weights = {name: file.get_tensor(name) for name in expected}
    except FileNotFoundError as error:
        raise ModelError(f'"{path}" does not exist; adapt again') from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f'"{path}" is not a whole safetensors file ({str(error).splitlines()[0]}); adapt again'
        ) from error
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f'"{path}": {name} has numbers that are not finite; adapt again')
    return weights
