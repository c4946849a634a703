"""On-policy training; the result is a plain Hugging Face folder in the lake."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.scratch import scratch
from storage.writer import Shard
from tasks.align_trl import check_trl, train_by_trl
from tasks.artifacts import Cell, progress, show_stage, show_table
from tasks.drafting import adapter_identity, open_s3d
from tasks.errors import ConfigError
from tasks.evaluate import truth_rule
from tasks.launch import Heard, revived, train_together
from tasks.logs import log_event
from tasks.models import import_torch, model_identity, model_path, open_reward, reward_identity, use_threads
from tasks.pictures import show_pictures
from tasks.rows import prompts_of, training_table
from tasks.settings import AlignConfig
from tasks.training import add_events, reporter_of
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.alignment.online.loop import Task
    from runtime.alignment.online.training import Look, OnlineConfig, OnlineReport
    from runtime.decoding.s3d.rounds import S3DDecoding
    from runtime.records import Progress, Prompt

    Asked = tuple[list[Prompt], list[Prompt]]  # to train on, and held out

SHOWN_FILE = "answers.jsonl"
SHOWN_CHARACTERS = 4000  # of a prompt or an answer in the table; the file has all
METHOD_FIELDS = (
    "samples",
    "kl_coef",
    "kl_target",
    "clip_low",
    "clip_high",
    "epochs",
    "minibatches",
    "gamma",
    "lam",
    "whiten",
    "value_coef",
    "value_clip",
    "value_learning_rate",
    "scale_rewards",
    "aggregation",
    "skip_equal",
    "jeffreys",
    "anchor_rate",
    "anchor_weight",
    "bond_n",
    "bond_samples",
)


def prepare(config: AlignConfig, lake: Lake) -> Step:
    """The step, with its prompts, policy and reward pinned."""
    inputs = {"prompts": pin(lake, config.prompts, f"prompts/{config.name}")}
    models = {"model": model_identity(config.model, "policy", lake), "reward": reward_identity(config, lake)}
    if config.s3d != "off":
        models["s3d_adapter"] = adapter_identity(config, lake)
    step = Step("align", "models", config.name, config.model_copy(update=inputs), inputs, models)
    if step.published(lake) is None:  # else it did work, and torch need not be imported, which takes seconds
        check_trl(config)
        online_config(config)  # what cannot work is said now
    return step


@task(name="align", persist_result=False)
def align(step: Step, lake_root: str) -> DatasetRef:
    """Train and publish the model with its log and some of its answers."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, AlignConfig)
    use_threads(config.threads)
    asked, shown = read_prompts(step, lake), progress(f"{step.name} align")
    output = lake.ref(step.kind, step.name, step.version)
    on_look = _telling(output, asked[1])
    with scratch(lake, output) as work:
        started = time.monotonic()
        if config.processes > 1:
            heard: Heard = {"progress": shown, "look": lambda at: on_look(_read_look(work, at))}
            report = _report(train_together(step, lake_root, work, heard))
        else:
            report = train(step, task_of(step, lake, asked, on_look), lake, work, shown)
        _write_shown(report, work / "answers")
        writer = step.writer(lake)
        writer.add_tree(work / "model", "model")
        add_events(writer, work / "logs", config.report_to)
        writer.add_tree(work / "answers", "answers")
        writer.write(Shard("training", "train", 0, 1), training_table(report.points))
        stats = _stats(config, report) | {"seconds": round(time.monotonic() - started, 1)}
        ref = writer.commit(step.provenance(stats))
    show_stage(ref, stats, _group_rows(report))
    show_pictures(lake, ref)
    return ref


def train(step: Step, task: "Task", lake: Lake, work: Path, on_progress: "Progress") -> "OnlineReport":
    """Train into `work`, in this process or as one of several."""
    from runtime.alignment.config import Places
    from runtime.alignment.online.loop import train_online
    from runtime.hardware import pick_device
    from runtime.models import load_policy

    config = step.config
    assert isinstance(config, AlignConfig)
    # Loaded anew, not from the process's cache: training changes the weights.
    policy = load_policy(model_path(config.model, "policy", lake), "float32", pick_device(config.device))
    places = Places(work / "model", work / "checkpoints", work / "logs")
    online = with_drafts(online_config(config), open_s3d(config, policy, lake))
    train = train_by_trl if config.backend == "trl" else train_online
    return train(policy, task, online, places, on_progress)


def online_config(config: AlignConfig) -> "OnlineConfig":
    """The runtime's settings; ConfigError for values that cannot work, or that nothing would read."""
    import_torch()
    from runtime.alignment.config import LoraSettings
    from runtime.alignment.groups import GroupSettings
    from runtime.alignment.online.rollout import Drawing
    from runtime.alignment.online.settings import OnlineSettings
    from runtime.alignment.online.training import OnlineConfig

    if config.dtype != "float32":
        raise ConfigError(f'dtype = "{config.dtype}": on-policy training computes in float32; leave it out')
    weights = GroupSettings(config.reducer, config.step_size, config.chi)
    method = OnlineSettings(
        method=config.method, group_weights=weights, **config.model_dump(include=set(METHOD_FIELDS))
    )
    drawing = Drawing(**config.model_dump(include=set(Drawing.__dataclass_fields__) - {"s3d"}))
    lora = LoraSettings(config.lora_rank, config.lora_alpha) if config.lora else None
    own = set(OnlineConfig.__dataclass_fields__) - {"method", "drawing", "lora", "report_to"}
    report_to, same = reporter_of(config.report_to), config.model_dump(include=own)
    return OnlineConfig(method=method, drawing=drawing, lora=lora, report_to=report_to, **same)


def with_drafts(config: "OnlineConfig", s3d: "S3DDecoding | None") -> "OnlineConfig":
    """Answers are drafted by the policy's own layers; they are the same without."""
    return replace(config, drawing=replace(config.drawing, s3d=s3d))


def read_prompts(step: Step, lake: Lake) -> "Asked":
    """The prompts to train on, and the held-out ones; ConfigError where the settings need more than there are."""
    config = step.config
    assert isinstance(config, AlignConfig)
    source = lake.resolve(step.inputs["prompts"])
    prompts = prompts_of(lake.read_table(source, "prompts", "train"))
    if not prompts:
        raise ConfigError(f"{source} has no prompt to train on; lower heldout_fraction where it was made")
    held_out = prompts_of(lake.read_table(source, "prompts", "test"))[: config.eval_prompts]
    if config.eval_steps and not held_out:
        raise ConfigError(f"eval_steps = {config.eval_steps}: {source} has no held-out prompt; set 0 or hold some out")
    return prompts, held_out


def task_of(step: Step, lake: Lake, asked: "Asked", on_look: "Callable[[Look], None]") -> "Task":
    """With the models of its reward."""
    from runtime.alignment.online.loop import Task

    config, (prompts, held_out) = step.config, asked
    assert isinstance(config, AlignConfig)
    rule = cast("Callable[..., float] | None", truth_rule(config.truth))
    return Task(prompts, open_reward(config, lake), held_out, rule, on_look)


def look_file(work: Path, at: int) -> Path:
    """Where the first of several processes leaves a look for the one that waits."""
    return work / f"look-{at}.json"


def _read_look(work: Path, at: int) -> "Look":
    from runtime.alignment.online.training import Look, Shown
    from runtime.alignment.report import Warned

    found = json.loads(look_file(work, at).read_text())
    return Look(**revived(found, {"shown": Shown, "alarms": Warned}))


def _report(found: dict[str, Any]) -> "OnlineReport":
    from runtime.alignment.online.training import OnlineReport, Shown
    from runtime.alignment.report import Point, Warned

    return OnlineReport(**revived(found, {"points": Point, "shown": Shown, "warnings": Warned}))


def _telling(ref: DatasetRef, held_out: "Sequence[Prompt]") -> "Callable[[Look], None]":
    """Shows answers and logs alarms while the training goes on."""
    asked = {prompt.prompt_id: prompt.messages[-1].content for prompt in held_out}

    def tell(look: "Look") -> None:
        rows: list[dict[str, Cell]] = [
            {
                "step": one.step,
                "group": one.group,
                "prompt": asked[one.prompt_id][:SHOWN_CHARACTERS],
                "answer": one.response[:SHOWN_CHARACTERS],
                "reward": one.reward,
                "truth": one.truth,
            }
            for one in look.shown
        ]
        show_table(ref, "answers", rows)
        for alarm in look.alarms:
            log_event("reward-alarm", version=str(ref), step=look.step, alarm=alarm.warning)

    return tell


def _write_shown(report: "OnlineReport", folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(asdict(one), ensure_ascii=False) for one in report.shown)
    (folder / SHOWN_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _stats(config: AlignConfig, report: "OnlineReport") -> dict[str, JsonValue]:
    stats: dict[str, JsonValue] = {
        "method": config.method,
        "steps": report.steps,
        "answers": report.n_answers,
        "tokens": report.n_tokens,
        "truncated": report.truncated,
        "unscored": dict(report.unscored),
    }
    if report.held_out_unscored:
        stats["held_out_unscored"] = dict(report.held_out_unscored)
    if report.held_out:
        stats["held_out"] = {group or "all": _rounded(values) for group, values in report.held_out.items()}
    if report.warnings:
        stats["warnings"] = [one.warning for one in report.warnings]
    return stats


def _rounded(values: dict[str, float]) -> dict[str, JsonValue]:
    return {metric: round(value, 4) for metric, value in values.items()}


def _group_rows(report: "OnlineReport") -> list[dict[str, Cell]]:
    """Held-out figures of every group, before and after."""
    first: dict[str, dict[str, float]] = {}
    for point in report.points:
        if point.split == "test" and point.step == 0:
            first.setdefault(point.group or "", {})[point.metric] = point.value
    rows: list[dict[str, Cell]] = []
    for group, values in report.held_out.items():
        for moment, figures in (("before", first.get(group, {})), ("after", values)):
            shown = {metric: round(value, 4) for metric, value in figures.items() if "/" not in metric}
            rows.append({"group": group or "all", "": moment, **shown})
    return rows
