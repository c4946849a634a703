"""`winnow chat`, `plan-edge` and `probe` on a bundle of the starter."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from runtime.edge.bundle_write import Contents, write_bundle
from runtime.edge.network import ffn_layers
from runtime.edge.placement import place
from runtime.models import load_policy
from runtime.starter import path
from storage.lake import Lake
from tasks.edge import Budget, BundleTalker, open_talker, parse_budget
from tasks.errors import USER_ERRORS, ConfigError
from tests.runtime.edge.bundles import exact_predictor, profile

ASKED = "One line for the front desk, please. What is 23 + 9 + 8 - 12 ?"
PC = """name = "pc"
memory_bytes = 8000000000
cores = 2
sequential_mb_s = 1500.0
io_threads = 4
dense_gb_s = 10.0
gather_gb_s = 6.0

[disk_mb_s]
"4096" = 100.0
"524288" = 1500.0
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter with exact predictors, in bfloat16."""
    folder = tmp_path_factory.mktemp("edge") / "bundle"
    model = load_policy(str(path("policy"))).model
    made_up = profile(model)
    predictors = [exact_predictor(layer.weight("gate"), layer.norm_weight) for layer in ffn_layers(model)]
    write_bundle(folder, Contents(model, made_up, predictors, place(made_up, 0.9), path("policy")))
    return folder


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    (tmp_path / "pc.toml").write_text(PC)
    return tmp_path / "pc.toml"


def _invoke(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def _json(*arguments: object) -> dict[str, object]:
    result = _invoke(*arguments, "--json")
    assert result.exception is None, result.exception
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_half_of_the_neurons_in_memory_give_the_same_answer_as_all_and_as_the_model(bundle: Path) -> None:
    asked = ("--prompt", ASKED, "--max-new-tokens", 60)
    whole, half = _json("chat", bundle, *asked), _json("chat", bundle, *asked, "--budget", "50%")
    assert whole["answer"] == half["answer"] == _json("chat", "starter", *asked)["answer"]
    report = half["report"]
    assert isinstance(report, dict)
    assert report["read_bytes"] > 0 and 0 < report["hit_rate"] < 1


def test_a_described_machine_decides_how_a_bundle_runs_and_what_is_predicted(bundle: Path, hardware: Path) -> None:
    hardware.write_text(PC.replace("io_threads = 4", "io_threads = 1").replace("cores = 2", "cores = 1"))
    asked = ("--budget", "50%", "--hardware", hardware)
    found = _json("chat", bundle, "--prompt", ASKED, "--max-new-tokens", 60, *asked)
    assert found["answer"] == _json("chat", bundle, "--prompt", ASKED, "--max-new-tokens", 60)["answer"]
    planned, report = found["plan"], found["report"]
    assert isinstance(planned, dict) and isinstance(report, dict)
    assert planned == _json("plan-edge", bundle, *asked)
    assert planned["io_threads"] == 1 and planned["prefetch_depth"] == 0
    assert sum(report["memory"]["slots"]) == sum(planned["slots"])
    assert sum(report["memory"]["fixed"].values()) == planned["pinned_bytes"]
    assert found["tokens_per_s"] == pytest.approx(report["n_tokens"] / report["seconds"])
    shown = _invoke("chat", bundle, "--prompt", ASKED, "--max-new-tokens", 4, *asked)
    assert f"tokens/s ({planned['tokens_per_s']:.1f} predicted)" in shown.stderr


@pytest.mark.parametrize(("cores", "prefetches"), [(1, False), (2, True)])
def test_a_plan_sets_the_engine(bundle: Path, hardware: Path, tmp_path: Path, cores: int, prefetches: bool) -> None:
    hardware.write_text(PC.replace("io_threads = 4", "io_threads = 3").replace("cores = 2", f"cores = {cores}"))
    talker = open_talker(str(bundle), Lake.open(str(tmp_path / "lake")), Budget(share=0.5), True, hardware)
    assert isinstance(talker, BundleTalker) and talker.plan is not None
    with talker.model:
        settings = talker.model.settings
    assert (settings.read.threads, settings.prefetch, settings.two_phase) == (2, prefetches, talker.plan.two_phase)


def test_chat_says_what_would_make_it_faster(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("chat", bundle, "--prompt", ASKED, "--max-new-tokens", 2)
    hint = "pip install 'winnow[native]'"
    assert (hint in _invoke(*asked).stderr) == (find_spec("numba") is None)
    monkeypatch.setattr("runtime.edge.engine.kernels", lambda dtype: None)
    assert hint in " ".join(_invoke(*asked).stderr.split())


def test_a_conversation_is_read_line_by_line(bundle: Path) -> None:
    shown = _invoke("chat", bundle, "--max-new-tokens", 30, text=f"{ASKED}\nWhat is 5 + 6 ?\n\n")
    assert shown.exception is None
    assert len(shown.stdout.strip().splitlines()) >= 2
    assert shown.stderr.count("tokens/s") == 2


def test_a_plan_is_for_a_budget_or_for_a_speed(bundle: Path, hardware: Path) -> None:
    half = _json("plan-edge", bundle, "--hardware", hardware, "--budget", "50%")
    whole = _json("plan-edge", bundle, "--hardware", hardware)
    assert float(str(half["hit_rate"])) < float(str(whole["hit_rate"])) == 1
    assert int(str(half["budget_bytes"])) < int(str(whole["budget_bytes"]))
    reached = _json("plan-edge", bundle, "--hardware", hardware, "--speed", 5)
    assert float(str(reached["tokens_per_s"])) >= 5
    assert "two_phase" in _invoke("plan-edge", bundle, "--hardware", hardware).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "BUNDLE", "--budget", "lots"), "write 50%, 700M or 1.5G"),
        (("chat", "BUNDLE", "--budget", "0%"), "above 0%"),
        (("chat", "BUNDLE", "--budget", "1M"), "needs at least"),
        (("chat", "BUNDLE", "--json"), "give it with --prompt"),
        (("chat", "starter", "--budget", "50%"), "a budget needs a bundle"),
        (("chat", "starter", "--hardware", "pc.toml"), "a plan for a machine needs a bundle"),
        (("chat", "BUNDLE", "--hardware", "gone.toml"), "cannot be read"),
        (("chat", "bundles/none"), "is not in the lake"),
        (("plan-edge", "BUNDLE", "--hardware", "PC", "--budget", "0"), "needs at least"),
        (("plan-edge", "starter"), "is no bundle"),
        (("plan-edge", "BUNDLE", "--budget", "50%", "--speed", "3"), "two targets"),
        (("plan-edge", "BUNDLE", "--hardware", "gone.toml"), "cannot be read"),
        (("probe", "/proc"), "cannot be measured"),
    ],
)
def test_a_mistake_says_what_to_do(
    bundle: Path, hardware: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [{"BUNDLE": str(bundle), "PC": str(hardware)}.get(argument, argument) for argument in arguments]
    lake = [] if given[0] == "probe" else ["--lake", str(tmp_path / "lake")]
    result = _invoke(*given, *lake)
    assert isinstance(result.exception, USER_ERRORS)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Budget()),
        ("50%", Budget(share=0.5)),
        ("700M", Budget(n_bytes=700 << 20)),
        ("1.5GiB", Budget(n_bytes=3 << 29)),
        ("12345", Budget(n_bytes=12345)),
    ],
)
def test_a_budget_is_a_share_or_bytes(text: str | None, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "5 apples", "-1G", "101%", "1T"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_budget(text)
