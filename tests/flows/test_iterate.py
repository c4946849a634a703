"""Rounds of the chain, and on-policy training, as flows under Prefect."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from storage.lake import Lake
from tasks.settings import AlignConfig, IngestConfig, PipelineConfig
from tests.flows.test_pipeline import config

__all__ = ["config"]  # fixture


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("method", ["best_of_n", "online_preferences"])
def test_every_round_starts_from_the_last_ones_model_and_a_second_run_is_all_cache_hits(
    method: str, prefect_server: None, config: PipelineConfig, tmp_path: Path
) -> None:
    from flows.iterate import iterate

    root = str(tmp_path / "lake")
    rounds = PipelineConfig.model_validate(config.model_dump() | {"iterate": {"rounds": 2, "method": method}})
    found = iterate(rounds, root)
    lake = Lake.open(root)
    made = {manifest.label: manifest for manifest in lake.manifests()}
    first, second = (made[str(found[f"round {number}: model"])] for number in (1, 2))
    assert first.config["method"] == second.config["method"] == ("sft" if method == "best_of_n" else "dpo")
    assert first.config["model"] == config.generate.model
    assert second.config["model"] == str(found["round 1: model"])
    drawn = made[made[second.inputs["preferences"]].inputs["candidates"]]
    drawn = made[drawn.inputs["candidates"]]
    assert drawn.config["model"] == str(found["round 1: model"])
    assert any(
        row["finish_reason"] == "cut" for row in lake.read_table(lake.resolve(drawn.label), "candidates").to_pylist()
    )
    compared = made[str(found["evaluate"])]
    assert (compared.config["before"], compared.config["after"]) == (config.generate.model, second.label)
    assert iterate(rounds, root) == found
    assert {manifest.label for manifest in lake.manifests()} == set(made)


def test_rounds_are_spread_out_as_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import iterate as rounds

    given: dict[str, list[object]] = {}

    def stage(name: str) -> Callable[..., str]:
        return lambda config, lake, *execution: given.setdefault(name, []).extend(execution) or f"x/{name}"

    for name in ("ingest", "generate", "score", "assemble", "finetune", "evaluate"):
        monkeypatch.setattr(rounds, name, stage(name))
    config = PipelineConfig.model_validate({"name": "x", "execution": {"workers": 2}, "iterate": {"rounds": 2}})
    rounds.iterate.fn(config, "lake")
    assert {name: values for name, values in given.items() if values} == {
        name: [config.execution] * 2 for name in ("generate", "score")
    }


@pytest.mark.timeout(300)
def test_on_policy_training_shows_its_progress_and_its_figures(
    prefect_server: None, config: PipelineConfig, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client

    from flows.align import align
    from flows.ingest import ingest

    root = str(tmp_path / "lake")
    ingest(IngestConfig.model_validate(config.ingest.model_dump() | {"name": "online"}), root)
    settings = {"steps": 2, "prompts_per_step": 2, "samples": 2, "max_new_tokens": 8, "eval_steps": 1, "threads": 1}
    reward = {"reward_model": config.score.reward_model}
    values = {"name": "online", "model": config.generate.model, **settings, **reward}
    ref = align(AlignConfig.model_validate(values), root)
    assert Lake.open(root).manifest(ref).stats["answers"] == 8
    with get_client(sync_client=True) as client:
        artifacts = [one for one in client.read_artifacts(limit=200) if "online" in f"{one.key} {one.description}"]
    progress = [one.data for one in artifacts if one.type == "progress"]
    assert progress == [100.0]
    assert {"models-online-summary", "models-online-table"} <= {one.key for one in artifacts}
    tables = [json.loads(str(one.data)) for one in artifacts if one.key == "models-online-answers"]
    assert sorted(rows[0]["step"] for rows in tables) == [0, 1, 2]
    assert all(set(row) == {"step", "group", "prompt", "answer", "reward", "truth"} for rows in tables for row in rows)
    images = [one.key for one in artifacts if one.type == "image"]
    assert ("models-online-answer-curves" in images) == (find_spec("matplotlib") is not None)
