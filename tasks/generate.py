"""Best-of-N candidates, shard by shard: a shard that is there already is not computed again."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from pydantic import JsonValue

from runtime.model_files import content_hash
from runtime.records import FINISHED
from storage.lake import DatasetRef, Lake
from storage.writer import Shard
from tasks.artifacts import Cell, ShownProgress, progress, show_stage
from tasks.calibration import read_calibration
from tasks.drafting import adapter_identity, open_s3d
from tasks.errors import ConfigError
from tasks.leases import use_gpu
from tasks.logs import log_shard, shard_name
from tasks.models import load_policy_model, model_identity, model_path, open_reward, reward_identity, use_threads
from tasks.pictures import show_picture
from tasks.retries import RETRIES
from tasks.rows import candidate_shards, candidates_table, prompts_of
from tasks.servers import a_server, open_server
from tasks.settings import GenerateConfig
from tasks.settings_execution import HERE, ExecutionConfig
from tasks.stops import stop_if_told
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.decoding.engine import Engine
    from runtime.decoding.rejection import CutPolicy
    from runtime.decoding.server import ServerEngine
    from runtime.records import Candidate, Prompt
    from runtime.rewards.protocol import Reward

CALIBRATED = ("calibrated", "adaptive")
# Of more shards only the stage shows its progress: a page of a thousand would hide its summary.
MOST_SHOWN_SHARDS = 20


def prepare(config: GenerateConfig, lake: Lake) -> Step:
    """The step, with its prompts and models pinned."""
    models = {"model": model_identity(config.model, "policy", lake)}
    if config.cut_policy != "none":
        models["reward"] = reward_identity(config, lake)
    if config.s3d != "off":
        models["s3d_adapter"] = adapter_identity(config, lake)
    inputs = {"prompts": pin(lake, config.prompts, f"prompts/{config.name}")}
    if config.cut_policy in CALIBRATED:
        inputs["calibration"] = pin(lake, config.calibration, f"candidates/{config.name}-calibration")
    pinned = config.model_copy(update={role: inputs[role] for role in inputs})
    return Step("generate", "candidates", config.name, pinned, inputs, models)


def count_shards(step: Step, lake_root: str) -> int:
    """How many shards the step has."""
    config = _config(step)
    n_prompts = int(_prompts(step, Lake.open(lake_root)).num_rows)
    if n_prompts == 0:
        raise ConfigError(
            f"{config.prompts} has no training prompts; lower ingest.heldout_fraction or raise max_prompts"
        )
    return -(-n_prompts // config.shard_prompts)


@task(name="generate-shard", task_run_name=shard_name, persist_result=False, **RETRIES)
def generate_shard(step: Step, lake_root: str, index: int, count: int, execution: ExecutionConfig = HERE) -> int:
    """Decode the candidates of one shard of prompts and write them; the number of tokens it decoded."""
    config, lake = _config(step), Lake.open(lake_root)
    writer, shard = step.writer(lake), Shard("candidates", "train", index, count)
    if writer.has(shard):
        return 0
    use_gpu(execution.leased_gpus)
    use_threads(config.threads)
    start = index * config.shard_prompts
    prompts = prompts_of(_prompts(step, lake).slice(start, config.shard_prompts))
    path = model_path(config.model, "policy", lake)
    reward = None if config.cut_policy == "none" else open_reward(config, lake)
    with a_server(config, execution) as config:
        engine = open_engine(config, path, cut_policy(config, lake), reward, lake)
        label = f"{step.name} generate {index + 1} of {count}"
        answers = drawn(engine, prompts, progress(label, "prompts", has_artifact=count <= MOST_SHOWN_SHARDS))
    table = candidates_table(prompts, answers, model_label(config.model, path), config.seed)
    writer.write(shard, table)
    n_tokens = sum(c.n_tokens for candidates in answers for c in candidates)
    log_shard(step, shard, prompts=len(prompts), candidates=table.num_rows, tokens=n_tokens)
    return n_tokens


@task(name="publish-candidates", persist_result=False, **RETRIES)
def publish(step: Step, lake_root: str, count: int) -> DatasetRef:
    """Publish all shards as a version."""
    lake = Lake.open(lake_root)
    writer = step.writer(lake)
    stats, groups = summarise(candidate_shards(writer, count))
    ref = writer.commit(step.provenance(stats | {"groups": cast(JsonValue, groups)}))
    show_stage(ref, stats, groups)
    show_picture(lake, ref)
    return ref


def drawn(
    engine: "Engine | ServerEngine", prompts: "Sequence[Prompt]", shown: ShownProgress
) -> "list[list[Candidate]]":
    """All candidates of some prompts, their tokens counted on the way."""
    answers = []
    for candidates in engine.generate(prompts, shown):
        stop_if_told()
        shown.count(sum(candidate.n_tokens for candidate in candidates))
        answers.append(candidates)
    shown.show()
    return answers


def cut_policy(config: GenerateConfig, lake: Lake) -> "CutPolicy":
    """The configured cuts; those that come from a calibration are read from its manifest."""
    from runtime.decoding.adaptive import AdaptiveCuts
    from runtime.decoding.rejection import CutSchedule, MemoryCuts

    if config.cut_policy == "none":
        return CutSchedule()
    if config.cut_policy == "memory":
        return MemoryCuts(config.cut_alpha)
    if config.cut_policy == "schedule" and config.cut_target is not None:
        return CutSchedule.for_compute(config.cut_tokens, config.cut_target, config.max_new_tokens, config.contrast)
    if config.cut_policy == "schedule":
        return CutSchedule(tuple(config.cut_tokens), tuple(config.cut_keep), config.contrast)
    schedule, fits = read_calibration(config.calibration, lake)
    if config.cut_policy == "calibrated":
        return CutSchedule(*schedule, config.contrast)
    return AdaptiveCuts(fits, config.confidence, config.contrast, config.first_wave, config.min_gain)


def open_engine(
    config: GenerateConfig, path: str, cuts: "CutPolicy", reward: "Reward | None", lake: Lake
) -> "Engine | ServerEngine":
    """What decodes with the policy in `path`: the engine here, or a server that serves the same policy."""
    from runtime.decoding.engine import Engine
    from runtime.decoding.sampling import SamplingConfig
    from runtime.decoding.server import ServerEngine
    from runtime.models import load_tokenizer

    sampling = SamplingConfig(
        n=config.n,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        stop=tuple(config.stop),
    )
    if config.server:
        return ServerEngine(open_server(config), load_tokenizer(path), sampling, cuts, reward, config.prompt_format)
    policy = load_policy_model(path, config.dtype, config.device)
    budget = None if config.kv_budget_mb is None else config.kv_budget_mb * 1_000_000
    s3d = open_s3d(config, policy, lake)
    return Engine(policy, sampling, cuts, reward, config.max_rows, config.prompt_format, budget, s3d=s3d)


def model_label(model: str, path: str) -> str:
    """How a policy is named in the candidates table."""
    return f"{model}@{content_hash(path)[:12]}"


def heldin_prompts(ref: str, lake: Lake) -> pa.Table:
    """The training prompts of a version, read once per process."""
    return _heldin_prompts(str(lake.resolve(ref)), lake.root)


@lru_cache(maxsize=1)
def _heldin_prompts(ref: str, lake_root: str) -> pa.Table:
    lake = Lake.open(lake_root)
    return lake.read_table(lake.resolve(ref), "prompts", "train")


def summarise(shards: Iterable[pa.Table]) -> tuple[dict[str, JsonValue], list[dict[str, Cell]]]:
    """Totals, and one row per group: candidates, tokens, and the tokens that cuts saved.

    One shard is in memory at a time; each has all candidates of its prompts. What a cut answer would still have cost
    is unknown; it is estimated by the mean length of the finished answers to the same prompt, and so the saving is
    called an estimate.
    """
    counted: dict[str, Counter[str]] = {}
    for shard in shards:
        for group, counts in _counted(shard).items():
            counted.setdefault(group, Counter()).update(counts)
    groups = [{"group": group, **_totals(counted[group])} for group in sorted(counted)]
    return cast(dict[str, JsonValue], _totals(sum(counted.values(), Counter()))), groups


def _counted(shard: pa.Table) -> "dict[str, Counter[str]]":
    rows = shard.select(["prompt_id", "group", "n_tokens", "finish_reason", "status"]).to_pylist()
    lengths: dict[str, list[int]] = {}
    for row in rows:
        if row["finish_reason"] in FINISHED:
            lengths.setdefault(row["prompt_id"], []).append(row["n_tokens"])
    expected = {prompt_id: sum(each) / len(each) for prompt_id, each in lengths.items()}
    found: dict[str, Counter[str]] = {}
    for row, n_scored in zip(rows, pc.list_value_length(shard["cuts"]).to_pylist(), strict=True):
        counts = found.setdefault(row["group"], Counter())
        left = expected.get(row["prompt_id"], 0.0) - row["n_tokens"]
        is_cut = row["finish_reason"] == "cut"
        counts.update(candidates=1, tokens=row["n_tokens"], cut=is_cut, length=row["finish_reason"] == "length")
        counts.update(errors=row["status"] == "error", scored=n_scored or 0)
        counts["saved"] += max(0.0, left) if is_cut else 0.0  # type: ignore[assignment]
    for group, prompt_ids in _prompts_of_groups(rows).items():
        found[group]["prompts"] = len(prompt_ids)
    return found


def _prompts_of_groups(rows: Sequence[Mapping[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["group"], set()).add(row["prompt_id"])
    return found


def _totals(counts: "Counter[str]") -> dict[str, Cell]:
    decoded, saved = counts["tokens"], counts["saved"]
    return {
        "prompts": counts["prompts"],
        "candidates": counts["candidates"],
        "cut": counts["cut"],
        "length": counts["length"],
        "errors": counts["errors"],
        "reward_calls": counts["scored"],
        "tokens_decoded": decoded,
        "tokens_saved_estimate": round(saved),
        "share_saved_estimate": round(saved / (saved + decoded), 4) if decoded else 0.0,
    }


def _config(step: Step) -> GenerateConfig:
    assert isinstance(step.config, GenerateConfig)
    return step.config


def _prompts(step: Step, lake: Lake) -> pa.Table:
    return heldin_prompts(step.inputs["prompts"], lake)
