"""A store that goes away while a version is published: the run waits and goes on."""

from pathlib import Path

import pytest

from storage.lake import Lake
from tasks.settings import GenerateConfig, IngestConfig
from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.processes import moto
from tests.servers.proxy import Fault, proxy

MORE_THAN_ONE_ATTEMPT = 6  # of the client's own four


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_store_that_is_gone_while_a_version_is_published_does_not_fail_the_run(
    prefect_server: None, tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.generate import generate
    from flows.ingest import ingest

    drawing = {"model": str(tiny_policy_dir), "cut_policy": "none", "n": 2, "max_new_tokens": 8, "threads": 1}
    with moto(tmp_path) as url, proxy(url) as between:
        use_endpoint(monkeypatch, between.url)
        root = new_lake(tmp_path / "cache", monkeypatch)
        left = [MORE_THAN_ONE_ATTEMPT, MORE_THAN_ONE_ATTEMPT]

        def gone(method: str, path: str) -> Fault | None:
            """The last write of each of the two versions is lost until the outage is over."""
            which = 1 if "candidates" in path else 0
            if method != "PUT" or not path.partition("?")[0].endswith("/manifest.json") or not left[which]:
                return None
            left[which] -= 1
            return Fault("drop")

        between.decide = gone
        prompts = ingest(IngestConfig(name="gone", max_prompts=4, max_heldout=1), root)
        drawn = generate(GenerateConfig.model_validate(drawing | {"name": "gone"}), root)
        assert left == [0, 0]
        assert {manifest.label for manifest in Lake.open(root).manifests()} == {str(prompts), str(drawn)}
