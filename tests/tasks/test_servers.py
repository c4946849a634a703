"""A fleet of servers: every worker holds a place at one of them, and no server gets more than its share."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import ValidationError

from storage.lake import Lake
from tasks import generate, ingest
from tasks.rows import candidate_shards
from tasks.servers import a_server, open_server
from tasks.settings import GenerateConfig, IngestConfig
from tasks.settings_execution import ExecutionConfig
from tests.servers.completions import completions

FLEET = "http://one:8000/v1, http://two:8000/v1,http://one:8000/v1"


@pytest.fixture(autouse=True)
def own_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests on this machine have servers of the same name."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def _config(**values: object) -> GenerateConfig:
    return GenerateConfig.model_validate({"server": FLEET, "server_model": "m", "server_concurrency": 8} | values)


@pytest.mark.parametrize("workers, per_server, requests", [(1, 1, 8), (2, 1, 8), (4, 2, 4), (6, 3, 2)])
def test_workers_spread_over_the_servers_and_share_their_requests(workers: int, per_server: int, requests: int) -> None:
    execution = ExecutionConfig(workers=workers)
    with ExitStack() as stack:
        held = [stack.enter_context(a_server(_config(), execution)) for _ in range(workers)]
        at = Counter(config.server for config in held)
        assert set(at) <= {"http://one:8000/v1", "http://two:8000/v1"}
        assert max(at.values()) <= per_server
        assert {config.server_concurrency for config in held} == {requests}
        assert all(at[url] * requests <= 8 for url in at)


def test_a_place_is_free_again_for_the_next_shard() -> None:
    execution, waited = ExecutionConfig(workers=2), threading.Event()

    def third() -> None:
        with a_server(_config(), execution):
            waited.set()

    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(a_server(_config(), execution))
        thread = threading.Thread(target=third)
        thread.start()
        assert not waited.wait(1)
    thread.join(timeout=30)
    assert waited.is_set()


def test_more_workers_than_requests_wait_for_each_other() -> None:
    with a_server(_config(server="http://one/v1", server_concurrency=1), ExecutionConfig(workers=5)) as found:
        assert found.server_concurrency == 1


def test_without_a_server_nothing_is_held() -> None:
    config = GenerateConfig()
    with a_server(config, ExecutionConfig(workers=3)) as found:
        assert found is config


def test_a_password_in_an_address_is_refused_without_being_shown() -> None:
    with pytest.raises(ValidationError, match="set OPENAI_API_KEY") as refused:
        _config(server="http://me:secret-word@one/v1")
    assert "holds a user or password" in str(refused.value.errors()[0]["msg"])


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "planted")
    server = open_server(_config())
    assert server.key == "planted" and "planted" not in repr(server)


def _drawn(root: Path, urls: str, workers: int) -> dict[str, bytes]:
    """The shards that so many threads draw from the servers."""
    config = IngestConfig(name="fleet", max_prompts=12, max_heldout=2)
    ingest.ingest.fn(ingest.prepare(config), str(root))
    values = {"name": "fleet", "server": urls, "n": 8, "shard_prompts": 1, "cut_policy": "none", "max_new_tokens": 8}
    step = generate.prepare(_config(**values), Lake.open(str(root)))
    count = generate.count_shards(step, str(root))
    execution = ExecutionConfig(workers=workers)
    with ThreadPoolExecutor(workers) as threads:
        drawn = [
            threads.submit(generate.generate_shard.fn, step, str(root), index, count, execution)
            for index in range(count)
        ]
    tables = list(candidate_shards(step.writer(Lake.open(str(root))), count))
    assert [table.num_rows for table in tables] == [8] * 12
    assert [one.result() for one in drawn] == [sum(table["n_tokens"].to_pylist()) for table in tables]
    return {file.name: file.read_bytes() for file in root.rglob("candidates/train-*.parquet")}


def test_a_fleet_makes_the_shards_of_one_server_and_none_of_it_gets_more_than_its_share(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="needs the openai client: pip install 'winnow[dev]'")
    with completions(seconds=0.05) as one, completions(seconds=0.05) as two:
        spread = _drawn(tmp_path / "spread", f"{one.url},{two.url}", workers=4)
    assert one.n_requests > 8 and two.n_requests > 8 and one.n_requests + two.n_requests == 12 * 8
    # Two workers at each, with half of its eight requests.
    assert 1 < one.most_at_once <= 8 and 1 < two.most_at_once <= 8
    with completions(seconds=0.0) as alone:
        assert _drawn(tmp_path / "alone", alone.url, workers=1) == spread
    assert len(spread) == 12 and alone.most_at_once <= 8
