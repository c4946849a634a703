"""Shards that are readable but not under the schema of their table."""

import pyarrow as pa
import pyarrow.dataset as pads

from storage.errors import LakeError


def check_shards(dataset: pads.Dataset, schema: pa.Schema) -> None:
    """LakeError for the first shard under another schema; PyArrow would read a column that it lacks as NULL.

    Only footers are read, and PyArrow keeps them for the scan. One that cannot be read is left to the scan to report.
    """
    if not isinstance(dataset, pads.FileSystemDataset):
        return
    for fragment in dataset.get_fragments():
        try:
            found = fragment.physical_schema
        except (pa.ArrowException, OSError):
            continue
        if not found.equals(schema):
            kind, name, version, *path = fragment.path.split("/")[-5:]
            fix = "remove that version and run again"
            raise LakeError(f"{kind}/{name}@{version}: {'/'.join(path)} has another schema; {fix}")
