"""Shards that are readable but not under the schema of their table."""

import pyarrow as pa
import pyarrow.dataset as pads

from storage.errors import LakeError
from storage.schema import grown


def check_shards(shards: pads.Dataset, table: str) -> None:
    """LakeError for the first shard under another schema; PyArrow would read a column that it lacks as NULL.

    Only footers are read, and PyArrow keeps them for the scan. One that cannot be read is left to the scan to report.
    """
    if not isinstance(shards, pads.FileSystemDataset):
        return
    for fragment in shards.get_fragments():
        try:
            found = fragment.physical_schema
        except (pa.ArrowException, OSError):
            continue
        if grown(table, found.empty_table()) is None:
            kind, name, version, *path = fragment.path.split("/")[-5:]
            fix = "remove that version and run again"
            raise LakeError(f"{kind}/{name}@{version}: {'/'.join(path)} has another schema; {fix}")
