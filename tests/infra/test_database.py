"""A Prefect server on PostgreSQL whose database goes away in the middle of a run."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.lake import Lake
from tests.servers.postgres import INSTALL, Postgres, postgres, programs
from tests.servers.prefect import Server, prefect_server, wait_until, winnow, worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(programs() is None, reason=f"no PostgreSQL server here; {INSTALL}"),
]
GENERATE = {"name": "gone", "n": 8, "shard_prompts": 2, "threads": 1, "max_new_tokens": 96, "max_rows": 16}
N_SHARDS = 12


@pytest.fixture
def database() -> Iterator[Postgres]:
    """Empty."""
    where = programs()
    assert where is not None
    with postgres(where) as found:
        yield found


@pytest.fixture
def own_server(database: Postgres, tmp_path: Path) -> Iterator[Server]:
    """A Prefect server on that database, deployed to; its lake is the folder `lake`."""
    with prefect_server(tmp_path / "prefect", PREFECT_API_DATABASE_CONNECTION_URL=database.url) as server:
        deployed = winnow(server, "deploy", "--lake", str(tmp_path / "lake"))
        assert deployed.returncode == 0, deployed.stderr
        yield server


def test_a_run_outlives_a_database_that_is_gone_for_half_a_minute(
    own_server: Server, database: Postgres, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    with worker(own_server, "patient"):
        prompts = own_server.run(
            "ingest/default", config={"name": "gone", "max_prompts": 2 * N_SHARDS, "max_heldout": 2}
        )
        assert own_server.wait(prompts)["state"]["type"] == "COMPLETED", own_server.logs(prompts)
        run_id = own_server.run("generate/default", config=GENERATE)
        wait_until(lambda: 2 <= _n_shards(lake) < N_SHARDS - 3, "some shards")
        database.stop()
        time.sleep(30)
        database.start()
        assert own_server.wait(run_id)["state"]["type"] == "COMPLETED", own_server.logs(run_id)
        assert own_server.flow_run(run_id)["run_count"] == 1
    (made,) = Lake.open(str(lake)).manifests("candidates")
    assert sum(file.rows or 0 for file in made.files if file.table == "candidates") == 2 * N_SHARDS * 8


def _n_shards(lake: Path) -> int:
    return sum(".tmp" not in file.parts for file in lake.rglob("candidates/train-*.parquet"))
