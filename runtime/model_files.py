"""Where the files of a model are, and their hash. Without torch, whose import takes seconds."""

import hashlib
from functools import lru_cache
from pathlib import Path

from runtime.errors import ModelError

# What loading reads; cards, logs and optimizer states next to a model do not change its identity.
ADAPTER_FILE = "adapter_config.json"
S3D_FILES = ("s3d.json", "s3d.safetensors")
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def content_hash(source: str) -> str:
    """sha256 hex over the names and bytes of the files that loading reads; a process reads files once."""
    return _hash_of(model_folder(source))


def adapter_hash(folder: Path) -> str:
    """Likewise of an adapter that peft wrote."""
    for name in (ADAPTER_FILE, "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{str(folder)!r} has no {name}; give the folder of an adapter that peft wrote")
    return _hash_of(folder)


def _hash_of(folder: Path) -> str:
    stats = [(path, path.stat()) for path in _model_files(folder)]
    return _hashed(tuple((path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats))


@lru_cache(maxsize=64)
def _hashed(files: tuple[tuple[Path, int, int, int, int], ...]) -> str:
    """The times and the inode are only there to notice a file that was changed."""
    digest = hashlib.sha256()
    for path, size, *_ in files:
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def model_folder(source: str) -> Path:
    """The folder of a local model, or of the downloaded snapshot of a hub model."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{source!r} has no config.json; give a folder written by save_pretrained")
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"{source!r} is not a model folder; give a folder with config.json or a hub name")
    from huggingface_hub import snapshot_download  # a dependency of transformers, needed only for hub names
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=list(MODEL_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"{source!r} is neither a folder nor a reachable hub model: {first_line(error)}") from error


def _model_files(folder: Path) -> list[Path]:
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: path.name)


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
