"""The fine-tuning stage on tiny models: what it publishes, refuses, and keeps when it is killed."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from runtime.alignment import objective
from runtime.models import load_policy
from runtime.records import Message, Prompt
from storage.catalog import query
from storage.lake import DatasetRef, Lake
from storage.report.pictures import stage_pictures
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tasks import finetune, training
from tasks.artifacts import ShownProgress
from tasks.errors import ConfigError, ModelError
from tasks.models import open_reward
from tasks.plan import steps
from tasks.settings import FinetuneConfig, PipelineConfig, RewardConfig

BASE: dict[str, object] = {"name": "tiny", "epochs": 2, "batch_size": 4, "max_length": 128, "learning_rate": 1e-3}
BASE |= {"threads": 1, "report_to": "none", "save_steps": 2}


def _pair(number: int, group: str, margin: float | None) -> dict[str, object]:
    prompt, chosen, rejected = f"{number} + 1", f"yes {number}" * (1 + number % 3), f"no {number}"
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "prompt_id": f"p{number}",
        "group": group,
        **dict.fromkeys(("score_chosen", "score_rejected", "chosen_index", "rejected_index")),
        "score_margin": margin,
        "strategy": "best_vs_worst",
        **dict.fromkeys(("policy_logp_ref_chosen", "policy_logp_ref_rejected", "n_votes", "agreement", "annotator")),
    }


def _publish(lake: Lake, train: Sequence[str], test: Sequence[str], margin: float | None = 1.0) -> DatasetRef:
    """Pairs of these groups."""
    writer = lake.writer("preferences", "tiny", "0123456789ab")
    for split, groups, first in (("train", train, 0), ("test", test, len(train))):
        rows = [_pair(first + number, group, margin) for number, group in enumerate(groups)]
        writer.write(Shard("preferences", split, 0, 1), to_table("preferences", rows))
    return writer.commit(Provenance("assemble", {}, {}, {}, "winnow"))


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """A lake with twelve pairs to train on and six held out, of two groups."""
    lake = Lake.open(str(tmp_path / "lake"))
    _publish(lake, ("child", "clerk", "clerk") * 4, ("child", "clerk") * 3)
    return lake


def _run(lake: Lake, policy: Path, **changed: object) -> DatasetRef:
    config = FinetuneConfig.model_validate(BASE | {"model": str(policy)} | changed)
    return finetune.finetune.fn(finetune.prepare(config, lake), lake.root)


def _weights(lake: Lake, ref: DatasetRef) -> dict[str, torch.Tensor]:
    return dict(load_policy(str(lake.folder(ref, "model"))).model.state_dict())


def test_figures_of_both_splits_and_every_group_are_published(lake: Lake, tiny_policy_dir: Path) -> None:
    ref = _run(lake, tiny_policy_dir, method="gr_dpo", eval_steps=2, step_size=0.1)
    stats = lake.manifest(ref).stats
    assert stats["steps"] == 6 and stats["pairs"] == 12 and stats["held_out_pairs"] == 6
    groups, held_out = stats["groups"], stats["held_out"]
    assert isinstance(groups, dict) and isinstance(held_out, dict)
    assert {name: row["pairs"] for name, row in groups.items()} == {"child": 4, "clerk": 8}
    assert {name: row["pairs"] for name, row in held_out.items()} == {"all": 6, "child": 3, "clerk": 3}
    assert set(held_out["child"]) == {"pairs", "loss", "accuracy", "margin", "kl_per_token"}
    assert "warnings" not in stats and "tokens" in stats and "suggested_step_size" in stats
    sql = "SELECT step, value FROM training WHERE metric = 'loss' AND \"group\" = 'child' AND held_out ORDER BY step"
    rows = query(lake, sql).rows
    assert [step for step, _ in rows] == [2, 4, 6]
    assert rows[-1][1] == pytest.approx(held_out["child"]["loss"], abs=1e-6)
    (weights,) = query(lake, "SELECT COUNT(*) FROM training WHERE metric = 'weight'").rows
    assert weights == (12,)
    assert [picture.key for picture in stage_pictures(lake, ref)][:2] == ["training-0", "group-curves"]
    assert not (Path(lake.root) / ".tmp" / "work").exists() or not list((Path(lake.root) / ".tmp" / "work").iterdir())


def test_groups_on_one_side_alone_are_in_the_report(tmp_path: Path, tiny_policy_dir: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    _publish(lake, ("a", "b") * 4, ("b", "c") * 2)
    stats = lake.manifest(_run(lake, tiny_policy_dir)).stats
    assert stats["warnings"] == [
        {"group": "a", "warning": "trained on, but none held out"},
        {"group": "c", "warning": "held out, but not trained on"},
    ]


def test_a_run_killed_in_training_goes_on_from_its_checkpoint(
    lake: Lake, tmp_path: Path, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Lake.open(str(tmp_path / "other"))
    _publish(undisturbed, ("child", "clerk", "clerk") * 4, ("child", "clerk") * 3)
    expected = _run(undisturbed, tiny_policy_dir, method="gr_dpo")
    done: list[int] = []

    def update(shown: ShownProgress, step: int, total: int) -> None:
        done.append(step)
        if step == 5 and done.count(5) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShownProgress, "__call__", update)
    with pytest.raises(KeyboardInterrupt):
        _run(lake, tiny_policy_dir, method="gr_dpo")
    assert lake.find("models", "tiny") is None
    ref = _run(lake, tiny_policy_dir, method="gr_dpo")
    assert done == [1, 2, 3, 4, 5, 5, 6]
    first, second = _weights(lake, ref), _weights(undisturbed, expected)
    assert all(torch.equal(first[name], second[name]) for name in second)
    shards = [lake.read_table(ref, "training"), undisturbed.read_table(expected, "training")]
    assert shards[0].equals(shards[1])


def test_a_reward_model_scores_and_a_pipeline_refuses_to_end_in_one(lake: Lake, tiny_policy_dir: Path) -> None:
    ref = _run(lake, tiny_policy_dir, method="reward", epochs=12, learning_rate=3e-3, reward_margin=0.1)
    groups = lake.manifest(ref).stats["groups"]
    assert isinstance(groups, dict)
    assert {name: row["accuracy"] for name, row in groups.items()} == {"child": 1.0, "clerk": 1.0}
    reward = open_reward(RewardConfig(reward_model="models/tiny", threads=1), lake)
    prompt = Prompt("p", (Message("user", "3 + 1"),), "child")
    good, bad = (score.value for score in reward.score([prompt, prompt], ["yes 3", "no 3"]))
    assert good is not None and bad is not None and good > bad
    config = PipelineConfig.model_validate({"finetune": {"method": "reward"}})
    with pytest.raises(ConfigError, match='finetune.method = "reward": a pipeline trains a policy; run `winnow finet'):
        steps(config, lake)


def test_an_adapter_in_the_lake_goes_on(lake: Lake, tiny_policy_dir: Path) -> None:
    first = _run(lake, tiny_policy_dir, lora=True, lora_rank=4, learning_rate=1e-2)
    second = _run(lake, tiny_policy_dir, lora=True, lora_adapter="models/tiny", learning_rate=1e-3)
    assert lake.manifest(second).inputs["adapter"] == str(first)
    before, after = _weights(lake, first), _weights(lake, second)
    assert 0 < max((before[name] - after[name]).abs().max().item() for name in before) < 0.1
    with pytest.raises(ConfigError, match="finetune.lora_rank = 4 does nothing with lora_adapter = models/tiny"):
        _run(lake, tiny_policy_dir, lora=True, lora_adapter="models/tiny", lora_rank=4)


def test_an_adapter_in_a_folder_goes_on_and_its_bytes_are_part_of_the_version(
    lake: Lake, tmp_path: Path, tiny_policy_dir: Path
) -> None:
    first = _run(lake, tiny_policy_dir, lora=True, lora_rank=4, learning_rate=1e-2)
    folder = tmp_path / "adapter"
    shutil.copytree(lake.folder(first, "model/adapter"), folder)
    settings = {"lora": True, "lora_adapter": str(folder), "learning_rate": 1e-3}
    second = _run(lake, tiny_policy_dir, **settings)
    identity = lake.manifest(second).inputs["adapter"]
    assert identity.startswith("sha256:")
    before, after = _weights(lake, first), _weights(lake, second)
    assert 0 < max((before[name] - after[name]).abs().max().item() for name in before) < 0.1
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    changed = finetune.prepare(FinetuneConfig.model_validate(BASE | {"model": str(tiny_policy_dir)} | settings), lake)
    assert changed.models["adapter"] != identity and changed.version != second.version
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="has no adapter_config.json; give the folder of an adapter that peft wrote"):
        _run(lake, tiny_policy_dir, **settings)


def test_a_group_without_a_name_is_the_total_and_one_among_others_is_told_from_it(
    tmp_path: Path, tiny_policy_dir: Path
) -> None:
    for name, groups, shown in (("one", ("all",) * 4, ["all"]), ("two", ("all", "b") * 2, ["all", "group all", "b"])):
        lake = Lake.open(str(tmp_path / name))
        _publish(lake, groups, groups)
        held_out = lake.manifest(_run(lake, tiny_policy_dir, epochs=1)).stats["held_out"]
        assert isinstance(held_out, dict) and list(held_out) == shown
        assert held_out["all"]["pairs"] == 4


@pytest.mark.parametrize("extra", [True, False])
def test_event_files_that_cannot_be_written_are_named(
    extra: bool, lake: Lake, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(training, "log_event", lambda event, **values: said.append(event))
    for module in ("tasks.training", "runtime.alignment.arguments"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: object() if extra else None)
    if extra:
        pytest.importorskip("tensorboard")
    _run(lake, tiny_policy_dir, report_to="auto", epochs=1)
    assert said == ([] if extra else ["no-event-files"])


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"method": "ipo"}, "ipo without length_norm; set "),
        ({"method": "gr_ipo"}, "ipo without length_norm; set "),
        ({"reducer": "robust", "step_size": 0}, "step_size = 0.0 never moves the weights"),
        ({"method": "gr_dpo", "reducer": "importance"}, 'reducer = "importance": gr_dpo is for the worst group'),
        ({"step_size": 0.5}, "finetune.step_size = 0.5 does nothing with reducer = mean; leave it out"),
        ({"method": "sft", "beta": 0.2}, "beta = 0.2 does nothing in sft; leave it out"),
        ({"method": "reward", "beta": 0.2}, "finetune.beta = 0.2 does nothing with method = reward"),
        ({"reward_prefixes": 3}, "finetune.reward_prefixes = 3 does nothing with method = dpo"),
        ({"lora_targets": ["q_proj"]}, "does nothing with lora = false"),
        ({"packing": True}, "packing = true: dpo compares whole rows"),
        ({"early_stopping": 3}, "early_stopping = 3 needs evaluations; set eval_steps"),
        ({"report_to": "trackio"}, 'report_to = "trackio" needs that package'),
        ({"method": "tdpo2", "reference": "stored"}, 'reference = "stored": tdpo2 needs the logits of the reference'),
        ({"method": "orpo", "reference": "stored"}, 'reference = "stored": orpo has no reference'),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_runs(
    changed: dict[str, object], line: str, lake: Lake, tiny_policy_dir: Path
) -> None:
    config = FinetuneConfig.model_validate(BASE | {"model": str(tiny_policy_dir)} | changed)
    with pytest.raises(ConfigError, match=line) as caught:
        finetune.prepare(config, lake)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("beta", 0), ("beta", -1), ("label_smoothing", 0.5), ("label_smoothing", -0.1), ("chi", 2)]
)
def test_numbers_out_of_their_range_are_refused_by_the_form(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        FinetuneConfig.model_validate({field: value})


def test_pairs_that_do_not_fit_the_settings_are_one_line(tmp_path: Path, tiny_policy_dir: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    _publish(lake, ("child",) * 4, (), margin=None)
    with pytest.raises(ConfigError, match='all 4 pairs are of group "child", so reducer = robust does nothing'):
        _run(lake, tiny_policy_dir, method="gr_dpo")
    with pytest.raises(ConfigError, match="eval_steps = 2: .* has no held-out pair; set test_share there, or 0"):
        _run(lake, tiny_policy_dir, eval_steps=2)
    with pytest.raises(ConfigError, match="reward_margin = 1.0: .* has pairs without a score margin; set 0"):
        _run(lake, tiny_policy_dir, method="reward", reward_margin=1.0)
    with pytest.raises(ConfigError, match="lora_4bit needs a CUDA device and the package bitsandbytes"):
        _run(lake, tiny_policy_dir, lora=True, lora_4bit=True)


def test_the_reference_answers_once_for_all_trainings_on_the_same_pairs(
    lake: Lake, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = objective.reference_logps

    def counted(model: object, pairs: Sequence[object], *rest: object) -> object:
        asked.append(len(pairs))
        time.sleep(0.1)  # its seconds are kept with one digit, and so tiny a reference may take less
        return plain(model, pairs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(objective, "reference_logps", counted)
    first = _run(lake, tiny_policy_dir, method="dpo")
    assert asked == [12, 6]
    second = _run(lake, tiny_policy_dir, method="gr_dpo", learning_rate=2e-3)
    assert asked == [12, 6]
    assert first.version != second.version
    stored = lake.versions("preferences", "tiny-ref")
    assert len(stored) == 2
    again = _run(lake, tiny_policy_dir, method="dpo", reference="anew")
    assert asked == [12, 6, 12, 6]
    assert lake.versions("preferences", "tiny-ref") == stored
    weights, others = _weights(lake, first), _weights(lake, again)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    _run(lake, tiny_policy_dir, method="dpo", lora=True, lora_rank=4)
    assert asked == [12, 6, 12, 6]  # an adapter that is new says what the policy says
    assert lake.versions("preferences", "tiny-ref") == stored
    kto = _run(lake, tiny_policy_dir, method="kto")
    assert asked == [12, 6, 12, 6, 12, 6]  # answers under other prompts, of both splits
    _run(lake, tiny_policy_dir, method="kto", beta=0.2)
    assert asked == [12, 6, 12, 6, 12, 6]
    assert len(lake.versions("preferences", "tiny-ref")) == 4
    computed, read = lake.manifest(first).stats, lake.manifest(second).stats
    assert computed["reference_seconds"] != read.get("reference_seconds", 0)
    assert "reference_seconds" not in lake.manifest(again).stats and "seconds" in lake.manifest(kto).stats


def test_the_settings_of_a_reward_model_are_part_of_its_version(lake: Lake, tiny_policy_dir: Path) -> None:
    base = BASE | {"model": str(tiny_policy_dir), "method": "reward"}
    changed = ({}, {"reward_margin": 0.5}, {"reward_prefixes": 2})
    found = {finetune.prepare(FinetuneConfig.model_validate(base | one), lake).version for one in changed}
    assert len(found) == 3
