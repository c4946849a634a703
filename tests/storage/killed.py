"""A writer of one version that kills itself: python -m tests.storage.killed ROOT WHEN, before its WHEN-th step.

A step is a link or a rename in a folder, and any request to S3, those inside an upload in parts included.
"""

import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from storage.lake import Lake
from storage.objects import ObjectStore
from storage.objects.s3_upload import PART_BYTES
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import VERSION, candidate

N_SHARDS = 3


def write(lake: Lake) -> None:
    """Three shards and a plain file of two parts, published as models/demo."""
    writer = lake.writer("models", "demo", VERSION)
    for index in range(N_SHARDS):
        shard = Shard("candidates", "train", index, N_SHARDS)
        rows = [candidate(f"p{index}-{i}", 0, float(i)) for i in range(50)]
        if not writer.has(shard):
            writer.write(shard, to_table("candidates", rows))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "weights.bin").write_bytes(random.Random(0).randbytes(PART_BYTES + 1000))
        writer.add_tree(Path(folder), "model")
    writer.commit(Provenance("finetune", {}, {}, {}, "winnow"))


def kill_before_step(store: ObjectStore, when: int) -> None:
    """Let this process die, without a chance to tidy up, before its `when`-th step."""
    left = [when]

    def step(*_: object, **__: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if store.root.startswith("s3://"):
        store._client.meta.events.register("before-send.s3", step)  # type: ignore[attr-defined]
        return

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.link", "os.rename") and store.root in str(arguments[1]):
            step()

    sys.addaudithook(audit)


if __name__ == "__main__":
    opened = Lake.open(sys.argv[1])
    kill_before_step(opened.store, int(sys.argv[2]))
    write(opened)
