"""A published version as one of Prefect's assets: an event that says what it was made from, to hang triggers on.

The open-source server shows these in its event feed, for a week; lineage that stays is in the manifests.
"""

from collections.abc import Iterable, Iterator

from prefect.events import emit_event

from storage.errors import RefError
from storage.lake import DatasetRef, Lake
from storage.refs import parse_ref

MADE = "prefect.asset.materialization.succeeded"


def announce(ref: DatasetRef) -> None:
    """Emit the event of a version; its inputs in the lake are related assets."""
    lake = Lake.open(ref.uri.removesuffix(f"/{ref.prefix}"))
    manifest = lake.manifest(ref)
    made_from = [
        {"prefect.resource.id": _address(one), "prefect.resource.name": str(one), "prefect.resource.role": "asset"}
        for one in _versions(manifest.inputs.values(), lake)
    ]
    emit_event(
        MADE,
        resource={"prefect.resource.id": _address(ref), "prefect.resource.name": str(ref)},
        related=[*made_from, {"prefect.resource.id": "winnow", "prefect.resource.role": "asset-materialized-by"}],
        payload={"stage": manifest.stage, "command": manifest.command},
    )


def _versions(inputs: Iterable[str], lake: Lake) -> Iterator[DatasetRef]:
    """Those inputs that are versions; others are models' hashes."""
    for text in inputs:
        try:
            kind, name, version = parse_ref(text)
        except RefError:
            continue
        if version is not None:
            yield lake.ref(kind, name, version)


def _address(ref: DatasetRef) -> str:
    """Assets are named by an address with a scheme."""
    return ref.uri if "://" in ref.uri else f"file://{ref.uri}"
