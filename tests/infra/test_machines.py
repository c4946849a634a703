"""Two machines at once on a lake that they share: everything else, from home to working folder, each has for itself."""

from pathlib import Path

import pytest
import yaml

from storage.lake import Lake
from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.prefect import ROOT, Server, winnow, worker
from tests.servers.processes import moto

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GENERATE = {"name": "shared", "n": 4, "shard_prompts": 2, "threads": 1, "max_new_tokens": 48, "max_rows": 16}
N_PROMPTS = 12
RUNS = (GENERATE, GENERATE | {"seed": 1}, GENERATE | {"seed": 2})


def _machine(server: Server, name: str, folder: Path, lake: str) -> dict[str, str]:
    """A pool and a deployment of `generate` that runs in a folder of this machine; the environment of its worker."""
    for part in ("work", "tmp", "home"):
        (folder / part).mkdir(parents=True)
    found = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    (one,) = (one for one in found["deployments"] if one["entrypoint"] == "flows.generate.generate")
    found["deployments"] = [one | {"name": name, "work_pool": one["work_pool"] | {"name": name}}]
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump(found))
    done = winnow(server, "deploy", "--file", str(file), "--folder", str(folder / "work"), "--lake", lake)
    assert done.returncode == 0, done.stderr
    return {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}


def _ingest(root: str) -> None:
    from tasks import ingest
    from tasks.settings import IngestConfig

    ingest.ingest.fn(ingest.prepare(IngestConfig(name="shared", max_prompts=N_PROMPTS, max_heldout=2)), root)


def _alone(root: str) -> dict[str, dict[str, str]]:
    """Digests of all shards of all runs when one process makes them in a folder, by version."""
    from tasks import generate
    from tasks.settings import GenerateConfig

    _ingest(root)
    for config in RUNS:
        step = generate.prepare(GenerateConfig.model_validate(config), Lake.open(root))
        count = generate.count_shards(step, root)
        for index in range(count):
            generate.generate_shard.fn(step, root, index, count)
        generate.publish.fn(step, root, count)
    return _shards(root)


def _shards(root: str) -> dict[str, dict[str, str]]:
    made = Lake.open(root).manifests("candidates", "shared")
    return {one.version: {file.path: file.sha256 for file in one.files if file.table == "candidates"} for one in made}


def test_two_machines_make_the_same_and_different_datasets_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto(tmp_path) as url:
        use_endpoint(monkeypatch, url)
        root = new_lake(tmp_path / "cache", monkeypatch)
        _ingest(root)
        one, two = (_machine(server, name, tmp_path / name, root) for name in ("one", "two"))
        with worker(server, "one", pool="one", **one), worker(server, "two", pool="two", **two):
            same, first, second = RUNS
            asked = (("one", same), ("two", same), ("one", first), ("two", second))
            runs = [server.run(f"generate/{name}", config=config) for name, config in asked]
            for run_id in runs:
                assert server.wait(run_id, seconds=400)["state"]["type"] == "COMPLETED", server.logs(run_id)
        shards = _shards(root)
    assert shards == _alone(str(tmp_path / "lake"))
    assert [len(files) for files in shards.values()] == [N_PROMPTS // 2] * 3
