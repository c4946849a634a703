"""On-policy training in several processes from the flow, and the figures that go elsewhere than into the lake."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from storage.lake import DatasetRef, Lake
from tasks import align, launch, launched
from tasks.artifacts import ShownProgress
from tasks.errors import ConfigError
from tasks.settings import PipelineConfig
from tests.runtime.alignment.trained import largest_difference
from tests.tasks.test_align import _run, _settings, lake
from tests.tasks.test_chain import config

__all__ = ["config", "lake"]  # fixtures

# At a higher rate Adam makes more than 1e-5 of how sums round, as passes of other sizes do in one process.
SEVERAL: dict[str, Any] = {
    "prompts_per_step": 5,
    "steps": 3,
    "save_steps": 1,
    "eval_steps": 1,
    "learning_rate": 1e-4,
}


def _assert_alike(one: DatasetRef, two: DatasetRef, lake: Lake) -> None:
    """The same answers; weights and figures but for rounding."""
    assert one.version != two.version
    assert largest_difference(lake.folder(one, "model"), lake.folder(two, "model")) < 1e-5
    first, second = (lake.manifest(ref).stats for ref in (one, two))
    assert first["answers"] == second["answers"]
    assert first["tokens"] == second["tokens"]
    shown, also = ((lake.folder(ref, "answers") / align.SHOWN_FILE).read_text() for ref in (one, two))
    assert shown == also
    rows, others = (lake.read_table(ref, "training").to_pylist() for ref in (one, two))
    for a, b in zip(rows, others, strict=True):
        assert a == b | {"value": pytest.approx(b["value"], abs=1e-4, rel=1e-3)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_align_as_one(config: PipelineConfig, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(align, "show_table", lambda ref, key, rows: told.append(rows))
    one, two = (_run(_settings(config, processes=n, **SEVERAL), lake) for n in (1, 2))
    _assert_alike(one, two, lake)
    assert len(told) == 8 and told[:4] == told[4:]  # steps 0 to 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_that_are_stopped_go_on_as_one_would(
    config: PipelineConfig, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    settings = SEVERAL | {"method": "ppo", "epochs": 2, "report_to": "tensorboard"}
    one = _run(_settings(config, **settings), lake)
    done: list[int] = []

    def update(shown: ShownProgress, step: int, total: int) -> None:
        done.append(step)
        if done == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShownProgress, "__call__", update)
    with pytest.raises(KeyboardInterrupt):
        _run(_settings(config, processes=2, **settings), lake)
    two = _run(_settings(config, processes=2, **settings), lake)
    assert done[-1] == 3 and len(done) < 5  # not from the start
    _assert_alike(one, two, lake)
    for ref in (one, two):
        _assert_events(lake, ref)


def test_tensorboard_gets_the_figures_of_every_step_and_group(config: PipelineConfig, lake: Lake) -> None:
    pytest.importorskip("tensorboard")
    ref = _run(_settings(config, report_to="auto"), lake)
    (file,) = lake.folder(ref, "tensorboard").iterdir()
    assert file.name == "part-00000.tfevents"
    assert lake.root.encode() not in file.read_bytes()
    tags = _assert_events(lake, ref)
    assert {f"train/{metric}" for metric in ("reward", "kl", "entropy", "tokens", "learning_rate")} <= tags
    assert {f"train/groups/a/{metric}" for metric in ("reward", "kl", "entropy", "tokens", "loss")} <= tags
    assert {"eval/groups/b/reward", "eval/worst/reward", "eval/gap/reward"} <= tags


def _assert_events(lake: Lake, ref: DatasetRef) -> set[str]:
    """Every figure of the table, once; the names."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(lake.folder(ref, "tensorboard")))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in lake.read_table(ref, "training").to_pylist():
        place = f"groups/{row['group']}/" if row["group"] else ""
        name = f"{'eval' if row['held_out'] else 'train'}/{place}{row['metric']}"
        expected.setdefault(name, []).append((row["step"], row["value"]))
    assert tags == set(expected)
    for name, values in expected.items():
        found = events.Scalars(name)
        assert [one.step for one in found] == [step for step, _ in values]
        assert [one.value for one in found] == pytest.approx([value for _, value in values])
    return tags


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_that_any_process_meets_is_the_one_line_it_would_be_here(
    rank: str, config: PipelineConfig, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(work: Path, processes: launch.Processes, heard: launch.Heard) -> int:
        monkeypatch.setenv("RANK", rank)
        return launched.main(str(work))

    monkeypatch.setattr(launch, "_run", here)
    monkeypatch.setattr(launched, "_join", lambda device: None)
    constant = {"reward_function": "tests.tasks.test_chain:constant", "steps": 9, "eval_steps": 0}
    with pytest.raises(ConfigError, match="^the reward was 1 for every answer of 5 steps") as caught:
        _run(_settings(config, processes=2, **constant), lake)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_process_that_dies_ends_all_with_its_code_and_last_words(
    config: PipelineConfig, lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MODULE", "tests.tasks.dying")
    with pytest.raises(RuntimeError) as caught:
        launch.train_together(align.prepare(_settings(config, processes=2), lake), lake.root, tmp_path, {})
    line = "training in 2 processes ended with code 1: process 1 failed with code 3 | what it said last"
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"prompts_per_step": 3, "processes": 4}, "processes = 4 cannot share prompts_per_step = 3 in minibatches = 1"),
        ({"method": "ppo", "prompts_per_step": 5, "minibatches": 3, "processes": 2}, "make it at least 6, or start f"),
    ],
)
def test_a_step_with_too_few_prompts_is_refused_before_anything_starts(
    changes: dict[str, Any], line: str, config: PipelineConfig
) -> None:
    with pytest.raises(ValidationError, match=line):
        _settings(config, **changes)


def test_more_processes_than_gpus_are_refused(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="processes = 2: each needs a GPU of its own, and there are 1; lower it, or"):
        launch._processes(_settings(config, processes=2, device="cuda"))


def test_threads_are_shared_by_the_processes(config: PipelineConfig) -> None:
    shared = (launch._processes(_settings(config, processes=2, threads=n)).threads for n in (1, 2, 8))
    assert list(shared) == [1, 1, 4]


def test_a_reporter_that_is_not_there_is_named_before_anything_runs(config: PipelineConfig, lake: Lake) -> None:
    from importlib.util import find_spec

    if find_spec("trackio"):
        pytest.skip("trackio is installed here")
    with pytest.raises(ConfigError, match='report_to = "trackio" needs that package: pip install trackio, or set'):
        align.prepare(_settings(config, report_to="trackio"), lake)
