"""What a version was made from: the manifests of its inputs, of theirs, and so on back to the prompts."""

from collections.abc import Mapping
from dataclasses import dataclass

from storage.errors import LakeError
from storage.manifest import FILE_NAME, Manifest, parse_manifest
from storage.objects import ObjectStore
from storage.refs import DatasetRef, parse_version

# Roles whose rows go into a version; a calibration or a model only steers how they are made.
CONTENT_ROLES = ("preferences", "candidates", "prompts")


@dataclass(frozen=True, slots=True)
class Input:
    """One line of the family tree; `stage` is None for what is no version or cannot be read in this lake."""

    depth: int
    role: str
    text: str
    stage: str | None
    is_repeated: bool

    @property
    def note(self) -> str:
        """What to know about it beside its name."""
        if self.is_repeated:
            return "as above"
        if self.stage is None:
            return "not in this lake" if _ref(self.text) else "from outside"
        return f"made by {self.stage}"


def ancestors(store: ObjectStore, inputs: Mapping[str, str]) -> dict[str, Manifest]:
    """kind/name@version -> manifest of every version up the line that can be read in this lake."""
    found: dict[str, Manifest] = {}
    waiting = [text for _, text in sorted(inputs.items())]
    while waiting:
        text = waiting.pop()
        manifest = None if text in found else _manifest(store, text)
        if manifest is not None:
            found[text] = manifest
            waiting += [other for _, other in sorted(manifest.inputs.items())]
    return dict(sorted(found.items()))


def family_tree(manifest: Manifest, known: Mapping[str, Manifest]) -> list[Input]:
    """The inputs of a version, each followed by its own; a version that comes again is not opened again."""
    lines: list[Input] = []
    seen: set[str] = set()
    waiting = [(0, role, text) for role, text in _nearest_first(manifest.inputs)]
    while waiting:
        depth, role, text = waiting.pop()
        found = known.get(text)
        lines.append(Input(depth, role, text, found.stage if found else None, found is not None and text in seen))
        if found is not None and text not in seen:
            seen.add(text)
            waiting += [(depth + 1, *each) for each in _nearest_first(found.inputs)]
    return lines


def content_line(manifest: Manifest, known: Mapping[str, Manifest]) -> list[Manifest]:
    """The version itself and, nearest first, those whose rows went into it."""
    line, waiting = [], [manifest]
    while waiting:
        one = waiting.pop(0)
        line.append(one)
        parents = [known[one.inputs[role]] for role in CONTENT_ROLES if one.inputs.get(role) in known]
        waiting += [parent for parent in parents if parent not in line and parent not in waiting]
    return line


def _nearest_first(inputs: Mapping[str, str]) -> list[tuple[str, str]]:
    """In the reverse of the order in which they are shown, as a stack wants them."""
    order = {role: place for place, role in enumerate(CONTENT_ROLES)}
    return sorted(inputs.items(), key=lambda item: (order.get(item[0], len(order)), item[0]), reverse=True)


def _ref(text: str) -> DatasetRef | None:
    found = parse_version(text)
    return DatasetRef(*found, "") if found else None


def _manifest(store: ObjectStore, text: str) -> Manifest | None:
    ref = _ref(text)
    if ref is None or not store.exists(f"{ref.prefix}/{FILE_NAME}"):
        return None
    try:
        return parse_manifest(store.read(f"{ref.prefix}/{FILE_NAME}"), ref)
    # Hours of work must not be lost over a damaged manifest far up the line; the tree says that it is not there.
    except LakeError:
        return None
