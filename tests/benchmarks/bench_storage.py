"""What a version costs over its bare Parquet files, and what listing many versions costs; a folder and S3 (moto).

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_storage.py [--versions 10000] [--s3-versions 2000]

moto is a Python server on the same cores: its figures show the number of requests, not the speed of a real store.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import medians, options, seconds, show

from storage.lake import Lake
from storage.objects import ObjectStore
from storage.schema import to_table
from storage.shards import ROW_GROUP_ROWS
from storage.verify import verify
from storage.writer import Provenance, Shard
from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.processes import moto
from tests.storage.rows import candidate, publish_candidates


def main() -> None:
    settings = options(__doc__, shards=8, rows=20_000, versions=10_000, s3_versions=2_000)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        with moto(folder) as url:
            use_endpoint(patch, url)
            data = shard_rows(settings.rows)
            rows = []
            for place, root in (("folder", str(folder / "lake")), ("S3 (moto)", new_lake(folder / "cache", patch))):
                rows += publishing(place, root, data, settings)
                rows += listing(place, root, settings)
            show("storage", settings, rows)


def shard_rows(n: int) -> pa.Table:
    """Candidates with answers of 60 random words."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(997)]
    answers = (" ".join(rng.choices(words, k=60)) for _ in range(n))
    return to_table(
        "candidates", [candidate(f"p{i // 16}", i % 16, i * 0.1, response=text) for i, text in enumerate(answers)]
    )


def publishing(place: str, root: str, data: pa.Table, settings: object) -> list[dict[str, object]]:
    n_shards: int = settings.shards  # type: ignore[attr-defined]
    lake, scratch = Lake.open(root), Path(tempfile.mkdtemp())
    client = boto3.client("s3")

    def bare() -> None:
        for index in range(n_shards):
            path = scratch / f"{index}.parquet"
            pq.write_table(data, path, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_index=True)
            if root.startswith("s3://"):
                with path.open("rb") as file:
                    client.put_object(Bucket=root.split("/")[2], Key=f"bare/{index}", Body=file)

    def synced() -> None:
        """What a version is: on the disk when the call returns."""
        bare()
        for path in scratch.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    def publish() -> None:
        writer = lake.writer("candidates", "bench", uuid.uuid4().hex[:12])
        for index in range(n_shards):
            writer.write(Shard("candidates", "train", index, n_shards), data)
        writer.commit(Provenance("generate", {}, {}, {}, "bench"))

    def check() -> None:
        assert not [v for v in verify(lake, lake.resolve("candidates/bench")) if v.problem]

    arms: dict[str, Callable[[], object]] = {"bare files": bare, "publish": publish, "verify": check}
    if not root.startswith("s3://"):
        arms["bare files, synced"] = synced
    found = medians(arms, settings.repeats, "cpu")  # type: ignore[attr-defined]
    n_bytes = sum(path.stat().st_size for path in scratch.iterdir())
    shutil.rmtree(scratch)
    what = f"{n_shards} shards, {n_bytes / 1e6:.0f} MB"
    return [row(place, what, name, value, found["bare files"]) for name, value in found.items()]


def listing(place: str, root: str, settings: object) -> list[dict[str, object]]:
    is_remote = root.startswith("s3://")
    n: int = settings.s3_versions if is_remote else settings.versions  # type: ignore[attr-defined]
    lake = Lake.open(f"{root}/many")
    fill(lake, n)
    keys = [f"candidates/demo/{number:012x}/manifest.json" for number in range(n)]

    def one_by_one() -> None:
        for key in keys:
            json.loads(lake.store.read(key))

    def all_versions() -> None:
        assert len(lake.manifests()) == n + 1

    def other_name() -> None:
        assert lake.find("candidates", "other") is not None

    arms = {"read one by one": one_by_one, "list all": all_versions, "latest of another name": other_name}
    found = {name: seconds(run, "cpu") for name, run in arms.items()}
    return [row(place, f"{n} versions", name, value, found["read one by one"]) for name, value in found.items()]


def fill(lake: Lake, n: int) -> None:
    """n published versions of one name, and one of another."""
    ref = publish_candidates(lake, "0" * 12)
    shard = lake.store.read(f"{ref.prefix}/{lake.manifest(ref).files[0].path}")
    text = lake.manifest(ref).model_dump(mode="json")

    def add(store: ObjectStore, number: int) -> None:
        version = f"{number:012x}"
        store.create(f"candidates/demo/{version}/candidates/train-00000-of-00001.parquet", shard)
        store.create(f"candidates/demo/{version}/manifest.json", json.dumps(text | {"version": version}).encode())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add(lake.store, number), range(1, n)))
    add_other = json.dumps(text | {"name": "other", "version": "0" * 12})
    lake.store.create(f"candidates/other/{'0' * 12}/manifest.json", add_other.encode())
    lake.store.create(f"candidates/other/{'0' * 12}/candidates/train-00000-of-00001.parquet", shard)


def row(place: str, what: str, name: str, value: float, base: float) -> dict[str, object]:
    return {"place": place, "what": what, "arm": name, "seconds": value, "ratio": value / base}


if __name__ == "__main__":
    main()
