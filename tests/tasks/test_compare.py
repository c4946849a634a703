"""Methods compared on tiny random models: what runs, what is stored, and what is refused."""

import shutil
from pathlib import Path

import pytest

from runtime.records import Prompt
from storage.catalog import query
from storage.lake import Lake
from tasks import compare, evaluate, finetune
from tasks.compare import Comparison
from tasks.comparison import overview, summary, training_rows
from tasks.errors import ConfigError
from tasks.groups import group_shown_as, shown_group
from tasks.settings import CompareConfig, PipelineConfig
from tests.tasks.test_chain import config, run_chain

__all__ = ["config"]  # fixture

METHODS = ["dpo", "gr_dpo step_size=0.5", "ipo length_norm=mean"]


def is_short(prompt: Prompt, response: str) -> float:
    """A truth rule."""
    return float(len(response) < 12)


@pytest.fixture(scope="module")
def lake(config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with prompts and pairs, some of both held out."""
    held_out = config.model_copy(update={"assemble": config.assemble.model_copy(update={"test_share": 0.6})})
    return run_chain(held_out, str(tmp_path_factory.mktemp("compare") / "lake"), until="assemble")


def _config(config: PipelineConfig, **values: object) -> CompareConfig:
    evaluated = config.evaluate.model_dump() | {"truth": f"{__name__}:is_short"}
    given = {"name": "tiny", "methods": METHODS, "seeds": [0, 1], "finetune": config.finetune.model_dump()}
    return CompareConfig.model_validate(given | {"evaluate": evaluated} | values)


def _run(comparison: Comparison, lake: Lake) -> Lake:
    for run in comparison.runs:
        finetune.finetune.fn(finetune.prepare(run.finetune, lake), lake.root)
        if run.evaluate:
            step = evaluate.prepare(run.evaluate, lake)
            for which in evaluate.MODELS:
                evaluate.answer.fn(step, lake.root, which)
            evaluate.compare.fn(step, lake.root)
    compare.publish.fn(comparison, lake.root)
    return lake


@pytest.fixture(scope="module")
def compared(config: PipelineConfig, lake: Lake) -> Lake:
    """A lake with a comparison of three methods and two seeds."""
    return _run(compare.prepare(_config(config), lake), lake)


def test_every_method_and_seed_is_a_version_that_the_comparison_names(config: PipelineConfig, compared: Lake) -> None:
    manifest = compared.manifest(compared.resolve("models/tiny-compare"))
    for method in METHODS:
        for seed in (0, 1):
            trained = compared.manifest(compared.resolve(manifest.inputs[f"{method}, seed {seed}"]))
            assert trained.stage == "finetune"
            assert (trained.config["method"], trained.config["seed"]) == (method.split()[0], seed)
            assert trained.inputs["preferences"] == manifest.inputs["preferences"]
            answers = compared.manifest(compared.resolve(manifest.inputs[f"{method}, seed {seed}, answers"]))
            assert answers.inputs["after"] == trained.label
    again = compare.prepare(_config(config), compared)
    assert again.step.published(compared) == compared.resolve("models/tiny-compare")


def test_the_table_holds_what_the_stages_measured(compared: Lake) -> None:
    manifest = compared.manifest(compared.resolve("models/tiny-compare"))
    rows = query(
        compared,
        "SELECT method, seed, \"group\", metric, value, model FROM comparison WHERE dataset = 'tiny-compare'",
    ).rows
    found = {(method, seed, group, metric): value for method, seed, group, metric, value, _ in rows}
    assert len(found) == len(rows)
    trained = compared.manifest(compared.resolve(manifest.inputs["gr_dpo step_size=0.5, seed 1"])).stats
    held_out = trained["held_out"]
    assert isinstance(held_out, dict) and len(held_out) > 2
    for group, values in held_out.items():
        assert isinstance(values, dict)
        key = ("gr_dpo step_size=0.5", 1, None if group == "all" else group)
        assert found[*key, "loss"] == values["loss"]
        assert found[*key, "accuracy"] == values["accuracy"]
    assert found["gr_dpo step_size=0.5", 1, None, "tokens"] == trained["tokens"]
    truths = {key: value for key, value in found.items() if key[3] == "truth"}
    assert {key[0] for key in truths} == {"start", *METHODS}
    assert {key[1] for key in truths if key[0] == "start"} == {None}
    assert all(0 <= value <= 1 for value in truths.values())


def test_a_group_that_is_named_like_a_total_is_told_from_it() -> None:
    stats = {"held_out": {"all": {"loss": 1.0}, "group all": {"loss": 2.0}, "b": {"loss": 0.5}}}
    rows = training_rows(stats, {"method": "dpo", "seed": 0, "model": "m"})  # type: ignore[arg-type]
    assert {row["group"]: row["value"] for row in rows} == {None: 1.0, "all": 2.0, "b": 0.5}
    found = {f["group"]: f["mean"] for f in summary(rows)}
    assert found == {"all": 1.0, "group all": 2.0, "b": 0.5, "worst": 2.0, "gap": 1.5}
    for name in ("worst", "gap", "all", "b"):
        assert group_shown_as(shown_group(name)) == name
    assert group_shown_as(shown_group(None)) is None


def test_worst_and_gap_are_taken_per_seed_before_the_mean() -> None:
    values = {(0, "a"): 0.2, (0, "b"): 0.8, (1, "a"): 0.9, (1, "b"): 0.5}
    rows = [
        {"method": "dpo", "seed": seed, "group": group, "metric": metric, "value": value, "model": "m"}
        for (seed, group), value in values.items()
        for metric in ("accuracy", "loss")
    ]
    found = {(f["metric"], f["group"]): (f["mean"], f["spread"]) for f in summary(rows)}
    assert found["accuracy", "worst"] == pytest.approx((0.35, 0.2121), abs=1e-3)  # of 0.2 and 0.5
    assert found["accuracy", "gap"] == pytest.approx((0.5, 0.1414), abs=1e-3)  # of 0.6 and 0.4
    assert found["loss", "worst"] == pytest.approx((0.85, 0.0707), abs=1e-3)  # of 0.8 and 0.9
    assert found["accuracy", "a"] == pytest.approx((0.55, 0.495), abs=1e-3)
    shown = overview(summary(rows))
    assert shown[0] == {"figure": "accuracy", "group": "worst", "dpo": "0.35 ± 0.21"}


def test_the_comparison_is_drawn_and_reported(compared: Lake) -> None:
    pytest.importorskip("matplotlib")
    from storage.report.page import build_report
    from storage.report.pictures import main_picture

    ref = compared.resolve("models/tiny-compare")
    picture = main_picture(compared, ref)
    assert picture is not None
    assert "truth of the worst group with dpo" in picture.alt
    titles = [axes.get_title() for axes in picture.figure.axes]
    assert titles == ["truth of answers", "accuracy on held-out pairs", "wall time, s", "tokens"]
    assert "wall time, s with dpo: " in picture.alt and "tokens with dpo: " in picture.alt
    report = build_report(compared, ref)
    assert "Methods compared" in report.sections
    assert report.pictures == ["comparison"]


def test_without_a_truth_rule_only_the_pairs_are_compared(config: PipelineConfig, lake: Lake, tmp_path: Path) -> None:
    root = tmp_path / "lake"
    shutil.copytree(lake.root, root)
    only = _config(config, evaluate=config.evaluate.model_dump(), methods=["sft", "gr_dpo"], seeds=[3])
    copy = Lake.open(str(root))
    found = _run(compare.prepare(only, copy), copy)
    stats = found.manifest(found.resolve("models/tiny-compare")).stats["comparison"]
    assert isinstance(stats, list)
    figures = {(f["metric"], f["method"]) for f in stats if isinstance(f, dict)}
    assert ("accuracy", "gr_dpo") in figures
    assert ("loss", "sft") in figures and ("accuracy", "sft") not in figures
    assert not any(metric == "truth" for metric, _ in figures)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["dppo"]}, 'methods has "dppo": begin with one of dpo, gr_dpo'),
        ({"methods": [""]}, 'methods has "": begin with one of'),
        ({"methods": ["dpo beta"]}, '"beta" is no FIELD=VALUE of finetune'),
        ({"methods": ["dpo colour=red"]}, '"colour=red" is no FIELD=VALUE of finetune'),
        ({"methods": ["dpo seed=3"]}, "seed is not set here but by compare.seeds"),
        ({"methods": ["dpo beta=-1"]}, "beta = -1: Input should be greater than 0"),
        ({"methods": ["dpo", "dpo "]}, 'methods has "dpo" twice'),
        ({"methods": []}, "at least 1 item"),
        ({"seeds": [1, 1]}, 'seeds has "1" twice'),
        ({"seeds": [-1]}, "seeds has -1"),
        ({"name": "n" * 30}, "too long to put methods behind"),
    ],
)
def test_a_comparison_that_means_nothing_is_refused(
    config: PipelineConfig, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match="validation error") as caught:
        _config(config, **values)
    assert message in str(caught.value)


def test_what_a_method_does_not_read_is_refused_and_can_be_left_out_of_its_line(
    config: PipelineConfig, lake: Lake
) -> None:
    shared = config.finetune.model_dump() | {"beta": 0.3}
    with pytest.raises(ConfigError, match=r'methods has "orpo": beta = 0.3 does nothing in orpo; leave it out'):
        compare.prepare(_config(config, finetune=shared, methods=["dpo", "orpo"]), lake)
    runs = compare.prepare(_config(config, finetune=shared, methods=["dpo", "orpo beta="]), lake).runs
    assert [(run.method, run.finetune.beta) for run in runs[:2]] == [("dpo", 0.3), ("orpo beta=", None)]


def test_nothing_to_compare_by_is_refused(config: PipelineConfig, lake: Lake, tmp_path: Path) -> None:
    bare = run_chain(config, str(tmp_path / "lake"), until="assemble")
    with pytest.raises(ConfigError, match='no held-out pair and evaluate.truth = "none"'):
        compare.prepare(_config(config, evaluate=config.evaluate.model_dump()), bare)
    with pytest.raises(ConfigError, match="a reward model answers nothing"):
        compare.prepare(_config(config, methods=["reward"]), lake)
    pairs_alone = tmp_path / "pairs"
    shutil.copytree(Path(lake.root) / "preferences", pairs_alone / "preferences")
    with pytest.raises(ConfigError, match="there are no prompts/tiny to answer"):
        compare.prepare(_config(config), Lake.open(str(pairs_alone)))


def test_names_of_methods_differ_as_the_methods_do() -> None:
    from tasks.settings_compare import slug

    lines = ["dpo", "dpo beta=0.1", "dpo  beta=0.1", "dpo beta=0.10", "ipo length_norm=sum learning_rate=0.0001"]
    names = [slug(line) for line in lines]
    assert names[:3] == ["dpo", "dpo-beta-0.1", "dpo-beta-0.1"]
    assert len(set(names)) == 4
    assert all(len(name) <= 24 for name in names)
