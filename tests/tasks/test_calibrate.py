"""Calibration of a tiny chain, and the generate stage that follows it."""

from pathlib import Path

import pytest

from storage.catalog import query
from storage.lake import DatasetRef, Lake
from tasks import calibrate, generate, ingest
from tasks.calibration import read_calibration
from tasks.errors import ConfigError
from tasks.settings import CalibrateConfig, GenerateConfig, PipelineConfig
from tests.tasks.test_chain import config

__all__ = ["config"]  # fixture


@pytest.fixture(scope="module")
def calibrated(config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, DatasetRef]:
    """A lake with prompts and their calibration."""
    root = str(tmp_path_factory.mktemp("lake"))
    lake = Lake.open(root)
    ingest.ingest.fn(ingest.prepare(config.stage(config.ingest)), root)
    step = calibrate.prepare(_settings(config), lake)
    calibrate.answer.fn(step, root)
    return lake, calibrate.publish.fn(step, root)


def _settings(config: PipelineConfig) -> CalibrateConfig:
    settings = CalibrateConfig(generate=config.generate, max_prompts=6, tokens=[2, 6, 12, 999])
    return config.stage(settings)


def _generate(config: PipelineConfig, lake: Lake, **changes: object) -> DatasetRef:
    settings = GenerateConfig.model_validate(config.stage(config.generate).model_dump() | changes)
    step = generate.prepare(settings, lake)
    count = generate.count_shards(step, lake.root)
    for index in range(count):
        generate.generate_shard.fn(step, lake.root, index, count)
    return generate.publish.fn(step, lake.root, count)


def test_every_answer_is_whole_and_scored_along_the_way(calibrated: tuple[Lake, DatasetRef]) -> None:
    lake, ref = calibrated
    rows = lake.read_table(ref, "candidates").to_pylist()
    assert len(rows) == 6 * 6
    for row in rows:
        assert row["finish_reason"] in ("eos", "length") and row["score"] is not None
        assert [cut["n_tokens"] for cut in row["cuts"]] == [n for n in (2, 6, 12) if n < row["n_tokens"]]
        assert all(cut["kept"] for cut in row["cuts"])


def test_what_was_measured_is_stored_and_drawn(calibrated: tuple[Lake, DatasetRef]) -> None:
    lake, ref = calibrated
    stats = lake.manifest(ref).stats
    assert isinstance(stats["points"], list)
    assert [point["tokens"] for point in stats["points"] if isinstance(point, dict)] == [2, 6, 12]
    (tokens, keep), fits = read_calibration(str(ref), lake)
    assert len(tokens) == len(keep) <= 3 and set(tokens) <= {2, 6, 12}
    assert all(fit.slope > 0 and fit.residual > 0 for fit in fits)
    assert (Path(ref.uri) / "plots" / "partial-vs-final.png").read_bytes().startswith(b"\x89PNG")


def test_cuts_are_not_part_of_what_is_calibrated(config: PipelineConfig, calibrated: tuple[Lake, DatasetRef]) -> None:
    lake, ref = calibrated
    settings = _settings(config)
    other = settings.generate.model_copy(update={"cut_policy": "none"})
    assert calibrate.prepare(settings.model_copy(update={"generate": other}), lake).version == ref.version
    other = settings.generate.model_copy(update={"temperature": 0.5})
    assert calibrate.prepare(settings.model_copy(update={"generate": other}), lake).version != ref.version


@pytest.mark.parametrize("policy", ["calibrated", "adaptive"])
def test_generate_follows_a_calibration(
    config: PipelineConfig, calibrated: tuple[Lake, DatasetRef], policy: str
) -> None:
    lake, ref = calibrated
    if policy == "adaptive" and not read_calibration(str(ref), lake)[1]:
        pytest.fail("the tiny reward predicts nothing; choose another seed")
    found = _generate(config, lake, cut_policy=policy)
    assert lake.manifest(found).inputs["calibration"] == str(ref)
    at = {row["cut_at_token"] for row in lake.read_table(found, "candidates").to_pylist()} - {None}
    assert at <= {2, 6, 12}


def test_the_rejected_candidates_that_were_ahead_can_be_asked_for(
    config: PipelineConfig, calibrated: tuple[Lake, DatasetRef]
) -> None:
    """The question of the README: which of them led the later winner when both had few tokens?"""
    lake, _ = calibrated
    _generate(config, lake, cut_policy="schedule", cut_tokens=[2, 6], cut_keep=[0.9, 0.5], contrast=0)
    sql = """
        SELECT count(*) AS n, count(*) FILTER (WHERE r.score > w.score) AS ahead
        FROM cuts AS r JOIN cuts AS w USING (dataset, version, prompt_id, n_tokens)
        WHERE r.dataset = 'tiny' AND n_tokens = 2 AND r.finish_reason = 'cut' AND w.finish_reason <> 'cut'
    """
    ((n, ahead),) = query(lake, sql).rows
    assert n > ahead >= 0


def test_a_version_without_calibration_is_refused(config: PipelineConfig, calibrated: tuple[Lake, DatasetRef]) -> None:
    lake, _ = calibrated
    plain = _generate(config, lake, cut_policy="none")
    with pytest.raises(ConfigError, match="run `winnow calibrate`"):
        _generate(config, lake, cut_policy="adaptive", calibration=str(plain))
