"""Training an S3D adapter from the lake's candidates, or from answers drawn for it."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from runtime.decoding.s3d.adapter import load_adapter
from runtime.models import load_policy
from storage.lake import DatasetRef, Lake
from tasks import adapt, generate, ingest, score
from tasks.errors import ConfigError, ModelError
from tasks.settings import AdaptConfig, PipelineConfig
from tests.tasks.test_chain import config

__all__ = ["config"]  # fixture

FEW = {"steps": 3, "batch_size": 2, "groups": 4, "rank": 2, "k": 3, "threads": 1, "max_new_tokens": 16, "samples": 2}


@pytest.fixture(scope="module")
def lake(config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with prompts, candidates and scored candidates of the tiny policy."""
    lake = Lake.open(str(tmp_path_factory.mktemp("lake")))
    ingest.ingest.fn(ingest.prepare(config.stage(config.ingest)), lake.root)
    _generate(config, lake)
    step = score.prepare(config.stage(config.score), lake)
    count = score.count_shards(step, lake.root)
    for index in range(count):
        score.score_shard.fn(step, lake.root, index, count)
    score.publish.fn(step, lake.root, count)
    return lake


def _generate(config: PipelineConfig, lake: Lake, **changes: object) -> DatasetRef:
    settings = config.stage(config.generate).model_copy(update={"cut_policy": "none", **changes})
    step = generate.prepare(settings, lake)
    count = generate.count_shards(step, lake.root)
    for index in range(count):
        generate.generate_shard.fn(step, lake.root, index, count)
    return generate.publish.fn(step, lake.root, count)


def _settings(config: PipelineConfig, **changes: object) -> AdaptConfig:
    return AdaptConfig.model_validate({"name": "tiny", "model": config.generate.model, **FEW, **changes})


def test_the_best_choice_is_published_and_loads(config: PipelineConfig, lake: Lake) -> None:
    settings = _settings(config, kept=["1+0", "1+1"], candidates="candidates/tiny")
    step = adapt.prepare(settings, lake)
    ref = adapt.adapt.fn(step, lake.root)
    assert (ref.kind, ref.name) == ("models", "tiny-s3d")
    assert step.published(lake) == ref
    stats = lake.manifest(ref).stats
    choices = stats["choices"]
    assert isinstance(choices, list) and len(choices) == 2 * 3
    rows = [row for row in choices if isinstance(row, dict)]
    best = max(rows, key=lambda row: float(str(row["speedup"])))
    assert (stats["predicted_speedup"], stats["kept"]) == (best["speedup"], best["kept"])
    for n in (1, 8):
        assert all(float(str(row[f"t at {n}"])) > 0 for row in rows)
        assert stats[f"best_k_at_{n}"] in (0, 1, 2, 3)
    policy = load_policy(config.generate.model)
    found = load_adapter(adapt.adapter_path(str(ref), lake), policy)
    assert f"{found.config.n_first}+{found.config.n_last}" == stats["kept"]
    assert found.config.base_hash == policy.content_hash


def test_without_candidates_answers_are_drawn(config: PipelineConfig, lake: Lake) -> None:
    settings = _settings(config, kept=["1+0"])
    step = adapt.prepare(settings, lake)
    assert set(step.inputs) == {"prompts"}
    stats = lake.manifest(adapt.adapt.fn(step, lake.root)).stats
    prompts = lake.read_table(lake.resolve("prompts/tiny"), "prompts", "train").num_rows
    assert isinstance(stats["trained_on"], int) and isinstance(stats["measured_on"], int)
    assert stats["trained_on"] + stats["measured_on"] == 2 * prompts
    assert stats["measured_on"] > 0


def test_given_candidates_say_at_which_temperature_they_were_drawn(config: PipelineConfig, lake: Lake) -> None:
    warm = _generate(config, lake, temperature=0.7, seed=5)
    step = adapt.prepare(_settings(config, candidates=str(warm)), lake)
    assert isinstance(step.config, AdaptConfig) and step.config.temperature == 0.7
    greedy = _generate(config, lake, temperature=0.0, seed=6)
    with pytest.raises(ConfigError, match="temperature = 0.0; S3D needs sampled answers"):
        adapt.prepare(_settings(config, candidates=str(greedy)), lake)


def test_given_candidates_say_in_which_format_their_prompts_were(config: PipelineConfig, lake: Lake) -> None:
    text = _generate(config, lake, prompt_format="text", seed=8)
    step = adapt.prepare(_settings(config, candidates=str(text)), lake)
    assert isinstance(step.config, AdaptConfig) and step.config.prompt_format == "text"


@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 1.2)])
def test_answers_of_a_law_that_training_does_not_know_are_refused(
    config: PipelineConfig, lake: Lake, name: str, value: float
) -> None:
    ref = _generate(config, lake, seed=9, **{name: value})
    with pytest.raises(ConfigError, match=f"was drawn with {name} = {value}; S3D learns from answers of temperature"):
        adapt.prepare(_settings(config, candidates=str(ref)), lake)


def test_answers_to_one_prompt_are_too_few(config: PipelineConfig, lake: Lake) -> None:
    ref = _generate(config, lake, seed=10)
    step = adapt.prepare(_settings(config, candidates=str(ref), kept=["1+0"]), lake)
    assert isinstance(step.config, AdaptConfig)
    single = replace(step, config=step.config.model_copy(update={"max_prompts": 1}))
    with pytest.raises(ConfigError, match="answers to 1 prompts; S3D trains on some and measures on others, give two"):
        adapt.adapt.fn(single, lake.root)


def test_prompts_are_never_all_measured_on(config: PipelineConfig, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt, "_is_measured", lambda prompt_id: True)
    ref = _generate(config, lake, seed=10)
    step = adapt.prepare(_settings(config, candidates=str(ref), kept=["1+0"], max_prompts=2), lake)
    stats = lake.manifest(adapt.adapt.fn(step, lake.root)).stats
    assert (stats["trained_on"], stats["measured_on"]) == (config.generate.n, config.generate.n)


def test_times_are_reported_beside_the_figures() -> None:
    rows: list[dict[str, float | str]] = [{"k": 1, "E": 1.5, "speedup": 1.2}, {"k": 2, "E": 1.8, "speedup": 1.4}]
    timed = adapt._with_times(rows, {1: [2.0, 2.5, 4.0], 8: [1.0, 3.0, 4.0]})
    assert [row["t at 1"] for row in timed] == [1.25, 2.0]
    assert [row["speedup at 1"] for row in timed] == [1.2, 0.9]
    assert [row["speedup at 8"] for row in timed] == [0.5, 0.45]
    assert (adapt._best_k(timed, 1), adapt._best_k(timed, 8)) == (1, 0)


def test_round_times_come_from_the_clock_that_is_given(config: PipelineConfig) -> None:
    """One that ticks at each look: rounds of any number of drafts take equally long."""
    settings, policy, ticks = _settings(config), load_policy(config.generate.model), count()
    times = adapt._round_times(policy, adapt._training(settings, 1, 1), settings, lambda: float(next(ticks)))
    assert {rows: (len(seconds), len(set(seconds))) for rows, seconds in times.items()} == {1: (4, 1), 8: (4, 1)}
    assert all(seconds[0].is_integer() and seconds[0] >= 1 for seconds in times.values())


def test_a_sampler_head_is_trained_and_published(config: PipelineConfig, lake: Lake) -> None:
    ref = _generate(config, lake, seed=10)
    step = adapt.prepare(_settings(config, kept=["1+1"], sampler_width=4, candidates=str(ref)), lake)
    found = load_adapter(
        adapt.adapter_path(str(adapt.adapt.fn(step, lake.root)), lake), load_policy(config.generate.model)
    )
    assert found.config.sampler_width == 4
    assert found.sampler is not None and bool(found.sampler.up.abs().sum() > 0)
    with pytest.raises(ValueError, match="trains nothing; sampler_width = 4 must be 0"):
        _settings(config, kind="skip", sampler_width=4)


def test_answers_of_another_policy_are_refused(config: PipelineConfig, lake: Lake) -> None:
    ref = _generate(config, lake, seed=7)
    with pytest.raises(ConfigError, match='not from model = "starter"'):
        adapt.prepare(_settings(config, model="starter", candidates=str(ref)), lake)


def test_layers_that_overlap_are_refused_before_anything_is_drawn(config: PipelineConfig, lake: Lake) -> None:
    step = adapt.prepare(_settings(config, kept=["1+1", "3+2"]), lake)
    with pytest.raises(ModelError, match="layers overlap: first 3 and last 2 of 4"):
        adapt.adapt.fn(step, lake.root)
    with pytest.raises(ValueError, match='kept has "half": write FIRST'):
        _settings(config, kept=["half"])


def test_a_reference_of_another_kind_is_refused(config: PipelineConfig, lake: Lake) -> None:
    with pytest.raises(ConfigError, match="is of kind prompts; this stage needs candidates/NAME"):
        adapt.prepare(_settings(config, candidates="prompts/tiny"), lake)


def test_an_adapter_in_a_folder_is_taken_as_it_is(lake: Lake, tmp_path: Path) -> None:
    assert adapt.adapter_path(str(tmp_path), lake) == tmp_path
