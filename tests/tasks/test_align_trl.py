"""TRL's trainer behind the same configuration: what it cannot do is said, and what it trains is published alike."""

import math
from collections import Counter
from importlib.util import find_spec
from typing import Any

import pytest

from runtime.alignment.online.loop import Task
from runtime.alignment.online.training import OnlineReport
from runtime.models import load_policy
from runtime.records import Message, Prompt
from runtime.rewards.verifier import FunctionReward
from storage.lake import Lake
from tasks import align
from tasks.align_trl import _rewards, check_trl
from tasks.errors import ConfigError
from tasks.settings import AlignConfig, PipelineConfig
from tests.tasks.test_align import _run, _settings, lake
from tests.tasks.test_chain import config

__all__ = ["config", "lake"]  # fixtures
NEEDS_TRL = "needs TRL: pip install -c infra/constraints.txt 'trl==1.16.0'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rloo"}, 'backend = "trl" trains grpo, not rloo'),
        ({"reducer": "robust"}, 'reducer = robust is not known to backend = "trl"; set mean'),
        ({"eval_steps": 5}, 'eval_steps = 5 is not known to backend = "trl"; set 0'),
        ({"s3d": "auto"}, "s3d = auto is not known"),
        ({"processes": 2}, 'processes = 2 is not known to backend = "trl"; set 1'),
        ({"save_steps": 5}, 'save_steps = 5 does nothing in backend = "trl"; leave it out'),
        ({"kl_limit": 5}, "kl_limit = 5.0 does nothing"),
        ({"rows": 5}, "rows = 5 does nothing"),
        ({"max_rows": 50}, "max_rows = 50 does nothing"),
    ],
)
def test_what_the_backend_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_trl(AlignConfig.model_validate({"backend": "trl", **changes}))


def test_the_defaults_are_not_refused() -> None:
    check_trl(AlignConfig(backend="trl"))


def test_answers_are_counted_as_they_are_scored() -> None:
    def moody(prompt: Prompt, response: str) -> float:
        return 1.0 if response == "a" else math.nan

    prompts = [Prompt("p", (Message("user", "?"),), "a")]
    report, unscored = OnlineReport(), Counter[str]()
    rewards = _rewards(Task(prompts, FunctionReward(moody, "test")), report, unscored)
    assert rewards(["a", [{"role": "assistant", "content": "b"}]], ["p", "p"], other=1) == [1.0, None]
    assert (report.n_answers, unscored) == (2, {"reward is nan, not a finite number": 1})


def test_without_trl_the_fix_is_named(config: PipelineConfig, lake: Lake) -> None:
    try:
        import trl  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r'needs TRL; run: pip install "winnow\[trl\]"'):
            _run(_settings(config, backend="trl", eval_steps=0), lake)
        return
    pytest.skip("TRL is installed here")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trl_trains_on_our_prompts_and_rewards(config: PipelineConfig, lake: Lake) -> None:
    pytest.importorskip("trl", reason=NEEDS_TRL)
    ref = _run(_settings(config, backend="trl", eval_steps=0, steps=3, report_to="auto"), lake)
    if find_spec("tensorboard"):
        (file,) = lake.folder(ref, "tensorboard").iterdir()
        assert b"train/reward" in file.read_bytes()
    assert lake.manifest(ref).stats["answers"] == 27
    load_policy(str(lake.folder(ref, "model")))
    rows = lake.read_table(ref, "training").to_pylist()
    rewards = [row["value"] for row in rows if row["metric"] == "reward"]
    tokens = [row["value"] for row in rows if row["metric"] == "tokens"]
    assert len(rewards) == 3
    assert all(0 < length <= 8 for length in tokens)
    assert align.prepare(_settings(config), lake).version != ref.version
