import json
from pathlib import Path

import pytest

from storage.lake import Lake
from tasks.errors import InputError, ModelError
from tasks.plan import STAGES
from tasks.settings import GenerateConfig, IngestConfig, PipelineConfig


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path) -> PipelineConfig:
    """A pipeline on tiny models."""
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}?", "group": "ab"[i % 2]}) + "\n" for i in range(8)))
    policy, reward = str(tiny_policy_dir), {"reward_model": str(tiny_reward_dir), "threads": 1}
    return PipelineConfig.model_validate(
        {
            "name": "flow",
            "ingest": {"source": str(source), "heldout_fraction": 0.3},
            "generate": reward | {"model": policy, "n": 4, "max_new_tokens": 12, "cut_tokens": [4], "cut_keep": [0.5]},
            "score": reward,
            "finetune": {"model": policy, "epochs": 1, "threads": 1},
            "evaluate": reward | {"samples": 1, "max_new_tokens": 8, "truth": "none"},
        }
    )


@pytest.mark.timeout(300)
def test_the_pipeline_runs_under_prefect_and_a_second_run_is_all_cache_hits(
    prefect_server: None, config: PipelineConfig, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client

    from flows.pipeline import pipeline

    root = str(tmp_path / "lake")
    first = pipeline(config, root)
    assert list(first) == list(STAGES)
    manifests = {m.label: m.created_at for m in Lake.open(root).manifests()}
    assert pipeline(config, root) == first
    assert {m.label: m.created_at for m in Lake.open(root).manifests()} == manifests

    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(limit=200)
        mine = {run.id for run in client.read_flow_runs(limit=200) if run.parameters.get("lake") == root}
        task_runs = [run for run in client.read_task_runs(limit=200) if run.flow_run_id in mine]
    keys = {artifact.key for artifact in artifacts}
    for kind in ("prompts-flow", "candidates-flow", "preferences-flow", "models-flow", "candidates-flow-evaluation"):
        assert {f"{kind}-summary", f"{kind}-table"} <= keys, kind
    assert any(artifact.type == "progress" for artifact in artifacts)
    # One task run per shard or stage, none per prompt, and none at all in the second run. A subflow counts as one
    # task run of its parent.
    own = [run for run in task_runs if run.state is None or run.state.state_details.child_flow_run_id is None]
    assert len(own) == 11


@pytest.mark.timeout(300)
def test_a_failing_stage_fails_its_flow_with_the_users_mistake(prefect_server: None, tmp_path: Path) -> None:
    from flows.generate import generate
    from flows.ingest import ingest

    root = str(tmp_path / "lake")
    with pytest.raises(InputError, match="does not exist"):
        ingest(IngestConfig(source=str(tmp_path / "gone.jsonl")), root)
    assert not (tmp_path / "lake").exists()
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "x"}\n')
    ingest(IngestConfig(source=str(source), heldout_fraction=0.0), root)
    with pytest.raises(ModelError, match="is not a model folder"):
        generate(GenerateConfig(model=str(tmp_path / "nothing")), root)
