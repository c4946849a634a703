"""The same held-out prompts answered by the model before and after: truth, reward and length, per group."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Shard
from tasks.artifacts import Cell, progress, show_stage
from tasks.errors import ConfigError
from tasks.generate import drawn
from tasks.groups import ALL, shown_groups
from tasks.models import (
    load_function,
    load_policy_model,
    model_identity,
    model_path,
    reward_identity,
    use_threads,
)
from tasks.pictures import show_picture
from tasks.retries import RETRIES
from tasks.rows import add_score, candidates_table, prompts_of, rows_of, scores_of
from tasks.score import scored_table
from tasks.settings import EvaluateConfig
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.records import Prompt

Which = Literal["before", "after"]
MODELS: tuple[Which, Which] = ("before", "after")


def prepare(config: EvaluateConfig, lake: Lake) -> Step:
    """The step, with its prompts and both models pinned."""
    after = config.after or f"models/{config.name}"
    inputs = {"prompts": pin(lake, config.prompts, f"prompts/{config.name}")}
    models = {
        "before": model_identity(config.before, "policy", lake),
        "after": model_identity(after, "policy", lake),
        "reward": reward_identity(config, lake),
    }
    after_pinned = models["after"] if after.startswith("models/") else after
    pinned = config.model_copy(update={**inputs, "after": after_pinned})
    return Step("evaluate", "candidates", f"{config.name}-evaluation", pinned, inputs, models)


@task(name="answer-heldout", persist_result=False, **RETRIES)
def answer(step: Step, lake_root: str, which: Which) -> int:
    """Answers of one model, scored and judged; the number of answers."""
    from runtime.decoding.engine import Engine
    from runtime.decoding.rejection import CutSchedule
    from runtime.decoding.sampling import SamplingConfig

    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, EvaluateConfig)
    writer, shard = step.writer(lake), Shard("candidates", which, 0, 1)
    if writer.has(shard):
        return cast(int, writer.files[shard.path].rows)
    use_threads(config.threads)
    prompts = _heldout(step, lake)
    source = config.before if which == "before" else config.after
    policy = load_policy_model(model_path(source, "policy", lake), config.dtype, config.device)
    sampling = SamplingConfig(
        n=config.samples, temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=config.seed
    )
    engine = Engine(policy, sampling, CutSchedule(), None, config.max_rows, config.prompt_format)
    answers = drawn(engine, prompts_of(prompts), progress(f"{step.name} {which}", "prompts"))
    table = candidates_table(prompts_of(prompts), answers, f"{source}@{policy.content_hash[:12]}", config.seed)
    scored = scored_table(table, prompts, config, lake)
    writer.write(shard, _judged(scored, prompts, config))
    return int(table.num_rows)


@task(name="compare", persist_result=False, **RETRIES)
def compare(step: Step, lake_root: str) -> DatasetRef:
    """Publish both models' answers with the metrics of every group."""
    lake = Lake.open(lake_root)
    writer = step.writer(lake)
    metrics: list[dict[str, object]] = []
    counted: Counter[str] = Counter()
    for which in MODELS:
        answers = writer.find(Shard("candidates", which, 0, 1))
        assert answers is not None, which
        metrics += measure(which, answers)
        counted["tokens_decoded"] += int(pc.sum(answers["n_tokens"]).as_py() or 0)
        counted["reward_calls"] += answers.num_rows - int(pc.sum(pc.equal(answers["status"], "error")).as_py() or 0)
        counted["prompts"] = int(pc.count_distinct(answers["prompt_id"]).as_py())
    writer.write(Shard("metrics", "test", 0, 1), to_table("metrics", metrics))
    table = comparison(metrics)
    stats: dict[str, JsonValue] = {"groups": cast(JsonValue, table), "worst_group": cast(JsonValue, worst(table))}
    stats |= counted
    ref = writer.commit(step.provenance(stats))
    show_stage(ref, {"worst group": stats["worst_group"]}, table)
    show_picture(lake, ref)
    return ref


def measure(which: Which, answers: pa.Table) -> list[dict[str, object]]:
    """Rows of the metrics table for one model: means over answers, for all and for every group."""
    rows = rows_of(answers)
    found = []
    shown = shown_groups(str(row["group"]) for row in rows)
    for group, name in [(None, ALL), *shown.items()]:
        chosen = [row for row in rows if group in (None, row["group"])]
        values: dict[str, list[float]] = {
            "n_tokens": [float(cast(int, row["n_tokens"])) for row in chosen],
            "unfinished": [float(row["finish_reason"] == "length") for row in chosen],
            "errors": [float(row["status"] == "error") for row in chosen],
        }
        for row in chosen:
            for entry in scores_of(row):
                values.setdefault(str(entry["scorer"]), []).append(cast(float, entry["value"]))
        found += [
            {"model": which, "group": name, "metric": metric, "value": sum(each) / len(each), "n": len(each)}
            for metric, each in values.items()
        ]
    return found


def comparison(metrics: list[dict[str, object]]) -> list[dict[str, Cell]]:
    """One row per group: every metric before, after and its change."""
    cells = {(m["group"], m["metric"], m["model"]): cast(float, m["value"]) for m in metrics}
    names = [name for name in dict.fromkeys(m["metric"] for m in metrics) if name not in ("unfinished", "errors")]
    table: list[dict[str, Cell]] = []
    for group in dict.fromkeys(str(m["group"]) for m in metrics):
        row: dict[str, Cell] = {"group": group}
        for name in sorted(map(str, names), key=lambda name: (name != "truth", name)):
            before, after = cells.get((group, name, "before")), cells.get((group, name, "after"))
            row[f"{name}_before"] = None if before is None else round(before, 4)
            row[f"{name}_after"] = None if after is None else round(after, 4)
        table.append(row)
    return table


def worst(table: list[dict[str, Cell]]) -> dict[str, Cell]:
    """The lowest group by truth (by the first score where there is no truth), before and after."""
    groups = [row for row in table if row["group"] != ALL]
    names = [key.removesuffix("_before") for key in table[0] if key.endswith("_before")]
    name = next((name for name in names if name != "n_tokens"), names[0])
    found: dict[str, Cell] = {"metric": name}
    for which in MODELS:
        ranked = [row for row in groups if row[f"{name}_{which}"] is not None]
        lowest = min(ranked, key=lambda row: cast(float, row[f"{name}_{which}"]), default=None)
        found[f"group_{which}"] = lowest["group"] if lowest else None
        found[which] = lowest[f"{name}_{which}"] if lowest else None
    return found


def truth_rule(name: str) -> "Callable[[Prompt, str], float] | None":
    """The configured rule; None where there is none."""
    if name == "none":
        return None
    return load_function("runtime.starter.rule:truth" if name == "starter" else name)


def _judged(answers: pa.Table, prompts: pa.Table, config: EvaluateConfig) -> pa.Table:
    """`answers` with the truth rule's verdict among `scores`."""
    rule = truth_rule(config.truth)
    if rule is None:
        return answers
    by_id = {prompt.prompt_id: prompt for prompt in prompts_of(prompts)}
    rows = rows_of(answers)
    for row in rows:
        if row["status"] == "ok":
            verdict = float(rule(by_id[str(row["prompt_id"])], str(row["response"])))
            add_score(row, "truth", verdict)
    return to_table("candidates", rows)


def _heldout(step: Step, lake: Lake) -> pa.Table:
    prompts = lake.read_table(lake.resolve(step.inputs["prompts"]), "prompts", "test")
    if prompts.num_rows == 0:
        raise ConfigError(
            f"{step.inputs['prompts']} has no held-out prompts; raise ingest.heldout_fraction or max_heldout"
        )
    return prompts
