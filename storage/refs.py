"""How a dataset version is named: kind, name and the fingerprint of everything that determines its content."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from storage.errors import RefError

KINDS = ("prompts", "candidates", "preferences", "models", "bundles")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class DatasetRef:
    """A version in a lake; `str(ref)` is kind/name@version."""

    kind: str
    name: str
    version: str
    uri: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}"

    @property
    def prefix(self) -> str:
        """The version's folder inside the lake."""
        return f"{self.kind}/{self.name}/{self.version}"

    @property
    def root(self) -> str:
        """Address of the lake."""
        return self.uri.removesuffix(f"/{self.prefix}")


def parse_ref(text: str) -> tuple[str, str, str | None]:
    """(kind, name, version or None) of `kind/name` or `kind/name@version`; RefError otherwise."""
    head, _, version = text.partition("@")
    kind, _, name = head.partition("/")
    check_name(kind, name, text)
    if "@" in text:
        check_version(version, text)
    return kind, name, version or None


def parse_version(text: str) -> tuple[str, str, str] | None:
    """(kind, name, version) of an input that is a version; None for the hash of a file or a model from outside."""
    try:
        kind, name, version = parse_ref(text)
    except RefError:
        return None
    return (kind, name, version) if version else None


def check_name(kind: str, name: str, shown: str) -> None:
    """Raise RefError unless kind and name are allowed in a lake."""
    if kind not in KINDS:
        raise RefError(f'reference "{shown}": write kind/name, with a kind out of {", ".join(KINDS)}')
    if not _NAME.fullmatch(name):
        raise RefError(f'reference "{shown}": a name has 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit')


def check_version(version: str, shown: str) -> None:
    """Raise RefError unless the version has the form of one."""
    if not _VERSION.fullmatch(version):
        raise RefError(f'reference "{shown}": a version has 12 hexadecimal digits; see `winnow datasets`')


def is_place(kind: str, name: str, version: str) -> bool:
    """Whether a version may lie there; anything else in a lake is not ours."""
    return kind in KINDS and bool(_NAME.fullmatch(name)) and bool(_VERSION.fullmatch(version))


def fingerprint(payload: Mapping[str, object]) -> str:
    """12 hexadecimal digits of the sha256 over the payload as canonical JSON."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
