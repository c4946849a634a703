"""PowerInfer's second file: which neurons a CUDA build keeps on the GPU. A CPU build never reads it.

Written here because its own solver sorts the layers' files by name, so from eleven layers on it gives layer 2 the
activity of layer 10. pip's gguf numbers the type of these tensors by today's list; PowerInfer's I32 is 18.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.edge.gguf_lint import PWRI, UNREADABLE, open_gguf, raise_first, value_of, whole_file, write_out
from runtime.edge.records import LayerPlacement

if TYPE_CHECKING:
    from gguf import ReaderTensor

ARCHITECTURE, CAPACITY = "generic.gpu_index", "split.vram_capacity"
OLD_I32, I32 = 18, 26


def write_gpuidx(path: Path, placements: Sequence[LayerPlacement], vram_bytes: int) -> None:
    """For a file whose neurons are in the placements' order: there the hot ones are the first."""
    with whole_file(path) as part:
        _write(part, placements, vram_bytes)
        raise_first(part, problems(part, len(placements), len(placements[0].order)))


def problems(path: Path, n_layers: int, n_neurons: int) -> list[str]:
    """Everything that is wrong with a file for a model of this shape, in words."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != PWRI:
        return [f"magic is {magic!r}, not {PWRI!r}"]
    try:
        reader = open_gguf(path, {OLD_I32: I32})
    except UNREADABLE as error:
        return [f"cannot be read to its end: {error}"]
    found = []
    if value_of(reader, "general.architecture") != ARCHITECTURE:
        found.append(f'architecture is "{value_of(reader, "general.architecture")}", not "{ARCHITECTURE}"')
    if not isinstance(value_of(reader, CAPACITY), int):
        found.append(f"{CAPACITY} is {value_of(reader, CAPACITY)}")
    wanted = [f"blk.{index}.gpu_{kind}" for index in range(n_layers) for kind in ("idx", "bucket")]
    names = [tensor.name for tensor in reader.tensors]
    if names != wanted:
        return [*found, f"{len(names)} tensors, not gpu_idx and gpu_bucket of each of {n_layers} layers in order"]
    for layer, bucket in zip(reader.tensors[::2], reader.tensors[1::2], strict=True):
        found += _layer(layer, bucket, n_neurons)
    return found


def _layer(layer: "ReaderTensor", bucket: "ReaderTensor", n_neurons: int) -> list[str]:
    if layer.data.shape != (n_neurons,) or not np.isin(layer.data, (0, 1)).all():
        return [f"{layer.name} is not a 0 or 1 for each of {n_neurons} neurons"]
    if not np.array_equal(bucket.data, np.flatnonzero(layer.data)):
        return [f"{bucket.name} does not list the neurons that {layer.name} marks"]
    return []


def _write(path: Path, placements: Sequence[LayerPlacement], vram_bytes: int) -> None:
    from gguf import GGUFReader, GGUFWriter

    writer = GGUFWriter(str(path), ARCHITECTURE)
    writer.add_uint64(CAPACITY, vram_bytes)
    for index, placement in enumerate(placements):
        n_hot = max(placement.n_hot, 1)  # a tensor cannot be empty
        is_hot = (np.arange(len(placement.order)) < n_hot).astype(np.int32)
        writer.add_tensor(f"blk.{index}.gpu_idx", is_hot)
        writer.add_tensor(f"blk.{index}.gpu_bucket", np.arange(n_hot, dtype=np.int32))
    write_out(writer)
    for tensor in GGUFReader(path, "r+").tensors:
        tensor.field.parts[4][0] = OLD_I32
    with path.open("r+b") as file:
        file.write(PWRI)
