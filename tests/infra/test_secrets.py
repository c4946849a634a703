"""Keys that runs really use, planted in a worker: they reach the stores and servers they are for, and nothing else."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from tests.servers import postgres
from tests.servers.answering import Asked, answering
from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.prefect import Server, wait_until, worker
from tests.servers.processes import moto

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STORE_SECRET, MODEL_SECRET = "planted-store-7f3a9c", "planted-model-51be02"


@contextmanager
def _refusing(seen: list[str]) -> Iterator[str]:
    """An OpenAI-compatible server that knows nobody; its address. What it is shown is put into `seen`."""

    def refuse(asked: Asked) -> tuple[int, object]:
        seen.append(asked.headers.get("Authorization", ""))
        return 401, {"error": {"message": "Unauthorized", "code": 401}}

    with answering(refuse) as url:
        yield f"{url}/v1"


def _objects(root: str) -> Iterator[bytes]:
    client = boto3.client("s3")
    bucket = root.removeprefix("s3://").partition("/")[0]
    for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
        yield client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
    client.close()


def _rows(server: Server) -> str:
    """Everything in the server's database: parameters, logs, artifacts, events."""
    url = server.settings.get("PREFECT_API_DATABASE_CONNECTION_URL")
    if url is not None:
        return postgres.dump(url)
    database = server.folder / "server" / "prefect.db"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60) as connection:
        return "\n".join(connection.iterdump())


def test_no_key_that_runs_use_is_on_the_server_in_a_log_or_in_the_lake(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with moto(tmp_path) as url, _refusing(seen) as model_url:
        use_endpoint(monkeypatch, url, ("winnow-test", STORE_SECRET))
        root = new_lake(tmp_path / "cache", monkeypatch)
        with worker(server, "trusted-with-keys", OPENAI_API_KEY=MODEL_SECRET, WINNOW_NOT_A_SETTING=STORE_SECRET):
            small = {"name": "secret", "max_prompts": 2, "max_heldout": 1}
            made = server.run("ingest/default", config=small, lake=root)
            assert server.wait(made)["state"]["type"] == "COMPLETED", server.logs(made)
            no_store = server.run("ingest/default", config=small, lake="s3://winnow-nowhere/lake")
            refused = {"name": "secret", "server": model_url, "server_model": "starter", "cut_policy": "none", "n": 2}
            no_model = server.run("generate/default", config=refused, lake=root)
            for run in (no_store, no_model):
                assert server.wait(run)["state"]["type"] == "FAILED", server.logs(run)
            wait_until(lambda: "the bucket does not exist" in server.logs(no_store), "the log of the first failure")
            wait_until(lambda: model_url in server.logs(no_model), "the log of the second failure")
        assert f"Bearer {MODEL_SECRET}" in seen
        stored = b"".join(_objects(root))
    text = _rows(server)
    assert "secret" in text and model_url in text
    places = {"database": text.encode(), "lake": stored}
    places |= {file.name: file.read_bytes() for file in server.folder.glob("*.log")}
    assert {"database", "lake", "server.log", "trusted-with-keys.log"} <= set(places)
    for secret in (STORE_SECRET, MODEL_SECRET):
        assert [place for place, held in places.items() if secret.encode() in held] == []
