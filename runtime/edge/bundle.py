"""Opening a bundle. It may come from anywhere: nothing is read past its listed size or used before it is checked."""

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.edge.manifest import MANIFEST, MOST_MANIFEST_BYTES, NEURONS, RESIDENT, FileEntry, Manifest, parse
from runtime.edge.quantise import FLOATS
from runtime.edge.records import LayerPredictor
from runtime.errors import BundleError

MOST_HEADER_BYTES = 16 << 20
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are those of its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def neurons(self) -> Path:
        """The file of the neurons."""
        return self.folder / NEURONS

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer, where there is one."""
        has_one = any(name.startswith("tokenizer/") for name in self.manifest.files)
        return self.folder / "tokenizer" if has_one else None

    def resident(self) -> dict[str, Tensor]:
        """Every resident tensor, in memory of its own."""
        try:
            with safe_open(self.folder / RESIDENT, framework="pt") as file:
                # A tensor of the library's own may be mapped from the file, and so outside every budget.
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise BundleError(f"{RESIDENT} cannot be read: {str(error)[:100]}; export the bundle again") from error

    def predictor(self, layer: int, resident: Mapping[str, Tensor]) -> LayerPredictor:
        """The predictor of a layer; rows of fc2 are the cold neurons in their order on disk."""
        found = self.manifest.layers[layer]
        fc1, fc2 = (resident.get(f"edge.{layer}.{name}", torch.empty(0)) for name in ("fc1", "fc2"))
        return LayerPredictor(found.predictor, fc1, fc2, found.threshold, found.recall, found.predicted_active)


def open_bundle(folder: Path, verify: bool = True) -> Bundle:
    """A bundle, every file of it read once and compared with its hash unless `verify` is False."""
    if not folder.is_dir():
        raise BundleError(f'"{folder}" is not a folder; give the folder of a bundle')
    manifest = parse(_read_manifest(folder / MANIFEST))
    for name, wanted in manifest.files.items():
        _check_file(folder, name, wanted, verify)
    _check_header(folder / RESIDENT, manifest.files[RESIDENT].size_bytes)
    return Bundle(folder, manifest)


def check_resident(bundle: Bundle, resident: Mapping[str, Tensor]) -> None:
    """The tensors of the edge part have the shapes that the manifest asks for; the model checks its own."""
    manifest, shape = bundle.manifest, bundle.manifest.shape
    for index in range(shape.n_layers):
        wanted: dict[str, tuple[int, ...]] = {"order": (shape.intermediate,), "frequency": (shape.intermediate,)}
        rank = next(iter(resident.get(f"edge.{index}.fc1", torch.empty(0)).shape), 0)
        if manifest.record.has_gate:
            wanted |= {"fc1": (rank, shape.hidden), "fc2": (manifest.n_cold(index), rank)}
        else:
            values = manifest.record.row[0] // _value_bytes(manifest)
            wanted |= {"gate": (shape.intermediate, values)}
            if manifest.record.row[1]:
                wanted |= {"gate_scales": (shape.intermediate, shape.hidden // manifest.group)}
        for name, expected in wanted.items():
            found = resident.get(f"edge.{index}.{name}")
            if found is None or tuple(found.shape) != expected or found.dtype != _edge_dtype(manifest, name):
                raise BundleError(f"{RESIDENT} lacks edge.{index}.{name} {list(expected)}; export the bundle again")
        frequency = resident[f"edge.{index}.frequency"]
        if not ((frequency >= 0) & (frequency <= 1)).all():
            raise BundleError(f"edge.{index}.frequency has values that are no shares; export the bundle again")


def _edge_dtype(manifest: Manifest, name: str) -> torch.dtype:
    if name in ("order", "frequency"):
        return torch.int32 if name == "order" else torch.float32
    if name == "gate_scales":
        return torch.float16
    return value_dtype(manifest) if name == "gate" else FLOATS[manifest.dtype]


def value_dtype(manifest: Manifest) -> torch.dtype:
    """In what the values of neurons are stored."""
    integers = {"int8": torch.int8, "int4": torch.uint8}
    return integers.get(manifest.weight_format) or FLOATS[manifest.weight_format]


def _value_bytes(manifest: Manifest) -> int:
    return value_dtype(manifest).itemsize


def _read_manifest(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f'"{path}" cannot be read: {error.strerror}; give the folder of a bundle') from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleError(f'"{path}" is not a plain file')
        found = file.read(MOST_MANIFEST_BYTES + 1)
    if len(found) > MOST_MANIFEST_BYTES:
        raise BundleError(f'"{path}" is larger than {MOST_MANIFEST_BYTES} bytes; it is no manifest of a bundle')
    return found


def _check_file(folder: Path, name: str, wanted: FileEntry, verify: bool) -> None:
    try:
        if (folder / name).parent.is_symlink():
            raise BundleError(f"{name} lies behind a link; a bundle has plain files only")
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{name} cannot be read: {error.strerror}; export or copy the bundle again") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != wanted.size_bytes:
            raise BundleError(f"{name} has {found.st_size} bytes, not {wanted.size_bytes}; copy the bundle again")
        if verify and _sha256(descriptor, wanted.size_bytes) != wanted.sha256:
            raise BundleError(f"{name} has another sha256 than the manifest; copy the bundle again")
    finally:
        os.close(descriptor)


def _sha256(descriptor: int, size: int) -> str:
    """Of the first `size` bytes; what was read does not stay in the page cache."""
    digest, buffer = hashlib.sha256(), bytearray(_PIECE)
    for start in range(0, size, _PIECE):
        wanted = min(_PIECE, size - start)
        if os.preadv(descriptor, [memoryview(buffer)[:wanted]], start) != wanted:
            return "cut short"
        digest.update(memoryview(buffer)[:wanted])
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _check_header(path: Path, size: int) -> None:
    """A safetensors header that is as short as it must be and lies within the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
        raise BundleError(f"{RESIDENT} has a header of {length} bytes in a file of {size}; export the bundle again")
