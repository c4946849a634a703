"""A published version as one of Prefect's assets: an event that says what it was made from, to hang triggers on.

The open-source server shows these in its event feed, for a week; lineage that stays is in the manifests.
"""

from prefect.events import emit_event

from storage.lake import DatasetRef, Lake
from storage.refs import parse_version

MADE = "prefect.asset.materialization.succeeded"


def announce(ref: DatasetRef) -> None:
    """Emit the event of a version; its inputs in the lake are related assets."""
    lake = Lake.open(ref.root)
    manifest = lake.manifest(ref)
    inputs = [lake.ref(*found) for text in manifest.inputs.values() if (found := parse_version(text))]
    made_from = [
        {"prefect.resource.id": _address(one), "prefect.resource.name": str(one), "prefect.resource.role": "asset"}
        for one in inputs
    ]
    emit_event(
        MADE,
        resource={"prefect.resource.id": _address(ref), "prefect.resource.name": str(ref)},
        related=[*made_from, {"prefect.resource.id": "winnow", "prefect.resource.role": "asset-materialized-by"}],
        payload={"stage": manifest.stage, "command": manifest.command},
    )


def _address(ref: DatasetRef) -> str:
    """Assets are named by an address with a scheme."""
    return ref.uri if "://" in ref.uri else f"file://{ref.uri}"
