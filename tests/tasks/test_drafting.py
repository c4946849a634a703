"""S3D as a setting of the generate stage: the same candidates, and mistakes in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runtime.decoding.s3d.adapter import S3DAdapter
from runtime.decoding.s3d.rounds import S3DRounds
from runtime.errors import ModelError
from runtime.models import LoadedModel
from runtime.records import Candidate, Prompt
from storage.lake import Lake
from tasks.drafting import adapter_identity, plan_drafting
from tasks.errors import ConfigError
from tasks.generate import cut_policy, open_engine
from tasks.models import open_reward
from tasks.settings import GenerateConfig, PipelineConfig
from tests.tasks.test_chain import run_chain


@pytest.fixture(scope="module")
def adapter_dir(tiny_policy: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained adapter of the tiny policy."""
    folder = tmp_path_factory.mktemp("adapter")
    S3DAdapter.skip_only(tiny_policy, 2, 1, 3).save(folder)
    return folder


@pytest.mark.parametrize("s3d", ["auto", "0", "3"])
def test_candidates_are_the_same_with_s3d(
    tmp_path: Path,
    tiny_policy_dir: Path,
    tiny_reward_dir: Path,
    tiny_prompts: Sequence[Prompt],
    adapter_dir: Path,
    s3d: str,
) -> None:
    lake = Lake.open(str(tmp_path / "lake"))

    def draw(**settings: str) -> list[list[Candidate]]:
        config = GenerateConfig(
            n=8, max_new_tokens=30, s3d_adapter=str(adapter_dir), reward_model=str(tiny_reward_dir), **settings
        )
        engine = open_engine(config, str(tiny_policy_dir), cut_policy(config, lake), open_reward(config, lake), lake)
        assert isinstance(getattr(engine, "steps", None), S3DRounds) == (settings.get("s3d", "off") != "off")
        return list(engine.generate(tiny_prompts))

    for plain, found in zip(sum(draw(), []), sum(draw(s3d=s3d), []), strict=True):
        assert (found.token_ids, found.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert found.cuts == plain.cuts


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tables_and_winners_are_the_same_off_auto_and_always(tmp_path: Path) -> None:
    """The starter with its adapter through generate and score, cuts by default: every column of every candidate."""

    def table(s3d: str) -> list[dict[str, object]]:
        config = PipelineConfig.model_validate(
            {
                "name": "s3d",
                "ingest": {"source": "starter", "max_prompts": 6},
                "generate": {"n": 16, "s3d": s3d, "threads": 1, "shard_prompts": 4},
                "score": {"threads": 1},
            }
        )
        lake = run_chain(config, str(tmp_path / s3d), until="score")
        return lake.read_table(lake.resolve("candidates/s3d"), "candidates").to_pylist()

    def winners(rows: list[dict[str, Any]]) -> dict[str, int]:
        scored = [row for row in rows if row["score"] is not None]
        return {row["prompt_id"]: row["candidate_index"] for row in sorted(scored, key=lambda row: row["score"])}

    plain = table("off")
    assert len(plain) >= 4 * 16
    assert {"cut", "eos"} <= {row["finish_reason"] for row in plain}
    for s3d in ("auto", "4"):
        found = table(s3d)
        assert found == plain
        assert winners(found) == winners(plain)


@pytest.mark.parametrize("value", ["on", "-1", "17", "4.0", ""])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="s3d"):
        GenerateConfig(s3d=value)


def test_a_number_without_quotes_is_the_same_setting() -> None:
    assert GenerateConfig.model_validate({"s3d": 4}) == GenerateConfig(s3d="4")
    with pytest.raises(ValidationError, match="s3d"):
        GenerateConfig.model_validate({"s3d": True})


def test_a_server_drafts_by_itself() -> None:
    with pytest.raises(ValidationError, match='s3d = "auto" drafts with the policy'):
        GenerateConfig(s3d="auto", server="http://127.0.0.1:1/v1", server_model="m")


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    config = GenerateConfig(s3d="auto", s3d_adapter=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none.* has no s3d.json"):
        adapter_identity(config, Lake.open(str(tmp_path / "lake")))


def test_another_adapter_is_another_version(tmp_path: Path, tiny_policy: LoadedModel, adapter_dir: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    S3DAdapter.skip_only(tiny_policy, 1, 1, 3).save(tmp_path / "other")
    identities = {
        adapter_identity(GenerateConfig(s3d="auto", s3d_adapter=str(folder)), lake)
        for folder in (adapter_dir, tmp_path / "other", adapter_dir)
    }
    assert len(identities) == 2


def test_more_drafts_than_the_adapter_was_made_for_are_refused(
    tmp_path: Path, tiny_policy_dir: Path, adapter_dir: Path
) -> None:
    config = GenerateConfig(n=2, s3d="4", s3d_adapter=str(adapter_dir), cut_policy="none")
    lake = Lake.open(str(tmp_path / "lake"))
    with pytest.raises(ModelError, match="k = 4"):
        open_engine(config, str(tiny_policy_dir), cut_policy(config, lake), None, lake)


def test_a_plan_says_what_the_adapter_adds_and_what_it_is_worth(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    assert plan_drafting(GenerateConfig(), lake) is None
    found = plan_drafting(GenerateConfig(n=2, max_rows=2, s3d="auto", threads=1), lake)
    assert found is not None
    assert found.adapter_bytes == 78_336 * 4
    assert [f.rows for f in found.forecasts] == [1, 2]
    assert all(f.speedup >= 1 and 0 <= f.k <= 4 for f in found.forecasts)
