"""The files of a source, and the group that a file's name stands for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import ConfigError, InputError
from tasks.ingest_readers import ENDINGS, Unreadable, ending_of, read_rows, source_format, source_identity
from tasks.settings_import import ImportConfig
from tasks.versions import digest_file

_SPLIT = r"(train|test|validation|valid|val|dev)(-\d+-of-\d+)?"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row, the file it is from (empty where there is one only), the file's group, and its number there."""

    file: str
    file_group: str | None
    number: int
    row: dict[str, object] | Unreadable


def read_source(config: ImportConfig) -> Iterator[SourceRow]:
    """All rows of the file, of the folder's files in order, or of the dataset."""
    if not _is_files(config):
        for number, row in read_rows(config):
            yield SourceRow("", None, number, row)
        return
    for file in source_files(config):
        for number, row in read_rows(config.model_copy(update={"source": str(file)})):
            yield SourceRow(_label(file, config), file_group(file), number, row)


def identity(config: ImportConfig) -> str:
    """What the source adds to the fingerprint: bytes and names, for a name may say the group."""
    if not config.source:
        raise ConfigError('import: source is empty; give a file, a folder or a dataset, such as "pairs.jsonl"')
    if not _is_files(config):
        return source_identity(config)
    lines = []
    for file in source_files(config):
        content = source_identity(config.model_copy(update={"source": str(file)}))
        lines.append(f"{file_group(file)}/{_label(file, config)} {content}\n")
    return digest_file("".join(lines).encode())


def source_files(config: ImportConfig) -> list[Path]:
    """The file, or the folder's files that match the pattern and have a known ending."""
    root = Path(config.source)
    if not root.is_dir():
        return [root]
    try:
        matching = [path for path in root.rglob(config.files) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f'files = "{config.files}" is not a pattern below the folder: {error}') from error
    found = sorted(path for path in matching if not _is_hidden(path, root) and ending_of(path) in ENDINGS)
    if not found:
        endings = ", ".join(ENDINGS)
        raise InputError(f'source "{root}" has no file like "{config.files}" with an ending out of {endings}')
    return found


def file_group(path: Path) -> str:
    """What the file is about: its name without split and endings, or its folder's name where nothing else is left.

    `helpful-base.test.jsonl.gz` and `helpful-base/test.jsonl.gz` are both about helpful-base.
    """
    stem = path.name.removesuffix(".gz").removesuffix(path.suffix if path.suffix != ".gz" else ending_of(path))
    if re.fullmatch(_SPLIT, stem):
        return path.resolve().parent.name
    return re.sub(rf"[._-]{_SPLIT}$", "", stem)


def _is_files(config: ImportConfig) -> bool:
    """Whether the source is read file by file rather than through `datasets`."""
    if config.format == "auto" and Path(config.source).is_dir():
        return True
    return source_format(config) != "dataset"


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _label(path: Path, config: ImportConfig) -> str:
    root = Path(config.source)
    return path.relative_to(root).as_posix() if root.is_dir() else ""
