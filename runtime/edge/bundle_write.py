"""Writing a bundle: neurons into one aligned file, everything else into safetensors, the manifest last."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from runtime.edge.budget import RunSettings, needs
from runtime.edge.bundle import Bundle
from runtime.edge.layout import ALIGN, RecordLayout, aligned
from runtime.edge.manifest import MANIFEST, NEURONS, RESIDENT, FileEntry, LayerEntry, Manifest, check_places
from runtime.edge.network import shape_of
from runtime.edge.plans import plans
from runtime.edge.quantise import DEFAULT_GROUP, FLOATS, quantise
from runtime.edge.records import LayerPlacement, LayerPredictor, Matrix, Profile, WeightFormat
from runtime.edge.skeleton import config_of
from runtime.errors import ConfigError, ModelError

TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("*.model", "*.jinja", "config.json"),
)
MOST_BLOCK, BLOCKS_PER_LAYER = 256, 16


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle; the model's weights may be of any number format."""

    model: PreTrainedModel
    profile: Profile
    predictors: Sequence[LayerPredictor]
    placements: Sequence[LayerPlacement]
    tokenizer: Path | None = None  # a folder with its files
    weight_format: WeightFormat = "bfloat16"
    group: int = DEFAULT_GROUP
    block: int | None = None  # neurons that are computed together
    quality: Mapping[str, object] = field(default_factory=dict)


def write_bundle(folder: Path, contents: Contents) -> Manifest:
    """Write a bundle into `folder`, which must be new or empty; nothing is left of one that fails."""
    _check(contents)
    config, n_neurons = config_of(contents.model), contents.profile.shape.intermediate
    with _new(folder):
        files = _copy_tokenizer(contents.tokenizer, folder)
        files[RESIDENT] = _write_resident(folder / RESIDENT, contents)
        layers, files[NEURONS] = _write_neurons(folder / NEURONS, contents)
        manifest = Manifest(
            config=config,
            shape=contents.profile.shape,
            weight_format=contents.weight_format,
            group=contents.group,
            dtype=_dtype(contents),
            block=contents.block or min(_block(n_neurons), n_neurons),
            layers=tuple(layers),
            files=files,
            quality=contents.quality,
        )
        check_places(manifest)
        manifest = replace(manifest, plan=_plan(Bundle(folder, manifest), contents.model))
        (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


def _check(contents: Contents) -> None:
    shape = shape_of(contents.model)
    if contents.profile.shape != shape:
        raise ConfigError(f"the profile is of a model of {contents.profile.shape}, not of {shape}; profile this one")
    for name in ("predictors", "placements"):
        if len(getattr(contents, name)) != shape.n_layers:
            raise ConfigError(f"{len(getattr(contents, name))} {name} for {shape.n_layers} layers; give one each")
    if len({predictor.kind == "gate" for predictor in contents.predictors}) > 1:
        raise ConfigError("either every layer's gate is resident (kind gate) or none's")
    for placement in contents.placements:
        if not np.array_equal(np.sort(placement.order), np.arange(shape.intermediate)):
            raise ConfigError(f"a placement does not name each of the {shape.intermediate} neurons once")


@contextmanager
def _new(folder: Path) -> Iterator[None]:
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f'"{folder}" is not empty; give a new folder for the bundle')
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f'the bundle cannot be written to "{folder}": {getattr(error, "strerror", None) or error}; '
            "give a folder on a writable disk with room for it"
        ) from error


def _block(n_neurons: int) -> int:
    """Few operations per layer, and small caches for small models: a layer's cache holds a block at least."""
    return max(8, min(MOST_BLOCK, n_neurons // BLOCKS_PER_LAYER // 8 * 8))


def _plan(bundle: Bundle, model: PreTrainedModel) -> dict[str, object]:
    """What memory buys, by what was written."""
    found = needs(bundle.manifest, bundle.resident(), model.config)
    return {"max_tokens": RunSettings().max_tokens, "shares": plans(found)}


def _dtype(contents: Contents) -> str:
    """Of resident weights: the neurons' own, or bfloat16 beside integers."""
    return contents.weight_format if contents.weight_format in FLOATS else "bfloat16"


def _copy_tokenizer(source: Path | None, folder: Path) -> dict[str, FileEntry]:
    if source is None:
        return {}
    found = sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()})
    if not found:
        raise ModelError(f'"{source}" has no tokenizer files; give the folder of the model')
    (folder / "tokenizer").mkdir()
    for path in found:
        shutil.copyfile(path, folder / "tokenizer" / path.name)
    return {f"tokenizer/{path.name}": entry(path) for path in found}


def _write_resident(path: Path, contents: Contents) -> FileEntry:
    dtype = FLOATS[_dtype(contents)]
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in contents.model.state_dict().items()
        if ".mlp." not in name and not (name == "lm_head.weight" and contents.model.config.tie_word_embeddings)
    }
    for index, (predictor, placement) in enumerate(zip(contents.predictors, contents.placements, strict=True)):
        order = torch.from_numpy(placement.order)
        layer = contents.profile.layers[index]
        tensors[f"edge.{index}.order"] = order.to(torch.int32)
        tensors[f"edge.{index}.frequency"] = torch.from_numpy(layer.frequency)[order].to(torch.float32)
        if predictor.kind == "gate":
            gate = quantise(_weights(contents, index, "gate")[order], contents.weight_format, contents.group)
            tensors[f"edge.{index}.gate"] = gate.values
            if gate.scales is not None:
                tensors[f"edge.{index}.gate_scales"] = gate.scales
        else:
            tensors[f"edge.{index}.fc1"] = predictor.fc1.to(dtype).contiguous()
            # What is hot is always computed: nothing needs to predict it.
            tensors[f"edge.{index}.fc2"] = predictor.fc2[order[placement.n_hot :]].to(dtype).contiguous()
    save_file(tensors, path)
    return entry(path)


def _weights(contents: Contents, index: int, matrix: str) -> Tensor:
    """(I, H): one row per neuron."""
    mlp = contents.model.model.layers[index].mlp
    if matrix == "down":
        return cast(Tensor, mlp.down_proj.weight).detach().T
    return cast(Tensor, getattr(mlp, f"{matrix}_proj").weight).detach()


def _write_neurons(path: Path, contents: Contents) -> tuple[list[LayerEntry], FileEntry]:
    digest, layers = hashlib.sha256(), []
    has_gate = contents.predictors[0].kind != "gate"
    record = RecordLayout(contents.profile.shape.hidden, contents.weight_format, contents.group, has_gate)
    with path.open("xb") as file:
        for index, (predictor, placement) in enumerate(zip(contents.predictors, contents.placements, strict=True)):
            order = torch.from_numpy(placement.order)
            matrices = [
                quantise(_weights(contents, index, name)[order], contents.weight_format, contents.group)
                for name in record.matrices
            ]
            hot_offset = file.tell()
            _append(file, digest, _hot_block(matrices, placement.n_hot))
            cold_offset = file.tell()
            _append(file, digest, _cold_records(matrices, placement.n_hot, record))
            is_gate = predictor.kind == "gate"
            threshold = contents.profile.layers[index].threshold if is_gate else predictor.threshold
            layers.append(
                LayerEntry(
                    n_hot=placement.n_hot,
                    hot_offset=hot_offset,
                    cold_offset=cold_offset,
                    predictor=predictor.kind,
                    threshold=float(threshold),
                    recall=float(predictor.recall),
                    predicted_active=float(predictor.predicted_active),
                )
            )
        size = file.tell()
    return layers, FileEntry(size, digest.hexdigest())


def _append(file: BinaryIO, digest: "hashlib._Hash", block: NDArray[np.uint8]) -> None:
    padded = aligned(block.size) - block.size
    for part in (block.reshape(-1).data, bytes(padded)):
        file.write(part)
        digest.update(part)
    assert file.tell() % ALIGN == 0


def _hot_block(matrices: Sequence[Matrix], n_hot: int) -> NDArray[np.uint8]:
    """Matrix by matrix, so that each is one contiguous operand."""
    parts = [part[:n_hot].reshape(-1) for matrix in matrices for part in _bytes_of(matrix)]
    return np.ascontiguousarray(np.concatenate(parts))


def _cold_records(matrices: Sequence[Matrix], n_hot: int, record: RecordLayout) -> NDArray[np.uint8]:
    """Neuron by neuron."""
    parts = [part[n_hot:] for matrix in matrices for part in _bytes_of(matrix)]
    padding = np.zeros((len(parts[0]), record.stride - record.record_bytes), dtype=np.uint8)
    return np.ascontiguousarray(np.concatenate([*parts, padding], axis=1))


def _bytes_of(matrix: Matrix) -> list[NDArray[np.uint8]]:
    """(rows, bytes) of values, then of scales."""
    tensors = [matrix.values] if matrix.scales is None else [matrix.values, matrix.scales]
    return [tensor.contiguous().view(torch.uint8).numpy() for tensor in tensors]


def entry(path: Path) -> FileEntry:
    """Size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileEntry(path.stat().st_size, digest.hexdigest())
