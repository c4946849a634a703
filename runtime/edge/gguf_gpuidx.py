"""PowerInfer's second file: which neurons a CUDA build keeps on the GPU. A CPU build never reads it.

Written here because its own solver sorts the layers' files by name, so from eleven layers on it gives layer 2 the
activity of layer 10. pip's gguf numbers the type of these tensors by today's list; PowerInfer's I32 is 18.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.edge.gguf_lint import PWRI
from runtime.edge.records import LayerPlacement

OLD_I32 = 18


def write_gpuidx(path: Path, placements: Sequence[LayerPlacement], vram_bytes: int) -> None:
    """For a file whose neurons are in the placements' order: there the hot ones are the first."""
    from gguf import GGUFReader, GGUFWriter

    writer = GGUFWriter(str(path), "generic.gpu_index")
    writer.add_uint64("split.vram_capacity", vram_bytes)
    for index, placement in enumerate(placements):
        n_hot = max(placement.n_hot, 1)  # a tensor cannot be empty
        is_hot = (np.arange(len(placement.order)) < n_hot).astype(np.int32)
        writer.add_tensor(f"blk.{index}.gpu_idx", is_hot)
        writer.add_tensor(f"blk.{index}.gpu_bucket", np.arange(n_hot, dtype=np.int32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    for tensor in GGUFReader(path, "r+").tensors:
        tensor.field.parts[4][0] = OLD_I32
    with path.open("r+b") as file:
        file.write(PWRI)
