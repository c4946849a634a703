"""Training an S3D adapter on a policy's own answers; the result is a folder of two small files in the lake."""

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa
from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.manifest import Manifest
from tasks.artifacts import Cell, progress, show_stage
from tasks.drafting import timed_prompt
from tasks.errors import ConfigError
from tasks.generate import drawn, heldin_prompts
from tasks.models import model_identity, model_path, use_threads
from tasks.rows import prompts_of, rows_of
from tasks.settings import STARTER, AdaptConfig
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.alignment.s3d_training import S3DTraining, Sample
    from runtime.decoding.s3d.adapter import S3DAdapter
    from runtime.decoding.s3d.rounds import Clock
    from runtime.models import LoadedModel

FOLDER = "s3d"  # of the adapter in its version
TIMED_ROWS = (1, 8)
Figures = dict[str, float | str]
# Sampling that training does not know, by what turns it off.
NOT_LEARNT: Mapping[str, JsonValue] = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "server_extra": []}
HELD_OUT = 10  # the answers to one prompt in so many are measured on, not trained on


def prepare(config: AdaptConfig, lake: Lake) -> Step:
    """The step, with its answers or prompts and its policy pinned."""
    identity = model_identity(config.model, "policy", lake)
    if config.candidates:
        pinned = pin(lake, config.candidates, "candidates/x")
        drawn = _drawn_by(lake, pinned)
        if drawn.inputs.get("model") != identity:
            raise ConfigError(
                f'{pinned} was drawn from {drawn.inputs.get("model", "")[:60]}, not from model = "{config.model}" '
                f"({identity[:60]}); S3D learns from the policy's own answers"
            )
        changes: dict[str, object] = {"candidates": pinned, **_drawing(drawn)}
        inputs = {"candidates": pinned}
    else:
        inputs = {"prompts": pin(lake, config.prompts, f"prompts/{config.name}")}
        changes = dict(inputs)
    settings = config.model_copy(update=changes)
    return Step("adapt", "models", f"{config.name}-s3d", settings, inputs, {"model": identity})


@task(name="adapt", persist_result=False)
def adapt(step: Step, lake_root: str) -> DatasetRef:
    """Train and measure every choice of layers; publish the adapter with the highest E / (1 + beta).

    Times are measured and reported, but do not choose: the same settings shall publish the same adapter anywhere.
    """
    from runtime.alignment.s3d_acceptance import figures, measure
    from runtime.alignment.s3d_training import train_s3d
    from runtime.hardware import pick_device
    from runtime.models import load_policy

    config, lake = _config(step), Lake.open(lake_root)
    use_threads(config.threads)
    policy = load_policy(model_path(config.model, "policy", lake), "float32", pick_device(config.device))
    choices = [_training(config, n_first, n_last) for n_first, n_last in config.choices()]
    for choice in choices:  # before anything is drawn or trained
        choice.adapter_config(policy.content_hash).check(policy.model)
    train, held_out = _samples(step, lake, policy)
    times = [_round_times(policy, choice, config, time.perf_counter) for choice in choices]
    found: list[tuple[S3DAdapter, list[Figures]]] = []
    for kept, choice, seconds in zip(config.kept, choices, times, strict=True):
        adapter = train_s3d(policy, train, choice, progress(f"{step.name} {kept}", "steps"))
        acceptance = measure(policy, adapter, held_out, choice)
        adapter.knows(acceptance.coupled.rates)
        found.append((adapter, _with_times(figures(acceptance, adapter, policy.model), seconds)))
    best, rows = max(found, key=lambda each: max(float(row["speedup"]) for row in each[1]))
    table = [row for _, each in found for row in each]
    with tempfile.TemporaryDirectory(prefix="winnow-adapt-") as folder:
        best.save(Path(folder))
        writer = step.writer(lake)
        writer.add_tree(Path(folder), FOLDER)
        stats = _stats(best, rows, (len(train), len(held_out)), config)
        ref = writer.commit(step.provenance(stats | {"choices": cast(JsonValue, table)}))
    show_stage(ref, stats, cast(list[dict[str, Cell]], table))
    return ref


def adapter_path(source: str, lake: Lake) -> Path:
    """The adapter's folder behind starter, models/NAME[@version] or a folder."""
    if source == STARTER:
        from runtime.starter import s3d_path

        return s3d_path()
    if source.startswith("models/"):
        return lake.folder(lake.resolve(pin(lake, source, "models/x")), FOLDER)
    return Path(source)


def samples_of(candidates: pa.Table, prompts: pa.Table, policy: "LoadedModel", config: AdaptConfig) -> "list[Sample]":
    """Answers that were drawn without an error, cut ones included, in the table's order."""
    from runtime.alignment.s3d_training import Sample
    from runtime.models import encode_prompt

    asked = {prompt.prompt_id: prompt for prompt in prompts_of(prompts)}
    encoded: dict[str, list[int]] = {}  # only of those that were answered: others may not be encodable
    n_vocabulary = int(policy.model.config.vocab_size)
    found = []
    for row in rows_of(candidates):
        ids = cast(Sequence[int], row["token_ids"])
        if row["status"] != "ok" or not ids:
            continue
        if min(ids) < 0 or max(ids) >= n_vocabulary:
            raise ConfigError(f"{config.candidates} has token {max(ids)}, the policy {n_vocabulary} tokens; check both")
        prompt_id = str(row["prompt_id"])
        if prompt_id not in encoded:
            encoded[prompt_id] = encode_prompt(policy.tokenizer, asked[prompt_id].messages, config.prompt_format)
        prompt = encoded[prompt_id]
        found.append(Sample((*prompt, *ids), len(prompt)))
    return found


def _samples(step: Step, lake: Lake, policy: "LoadedModel") -> "tuple[list[Sample], list[Sample]]":
    """What is trained on, and what is measured on: answers to other prompts."""
    config = _config(step)
    if "candidates" in step.inputs:
        source = lake.resolve(step.inputs["candidates"])
        candidates = lake.read_table(source, "candidates")
        prompts = lake.read_table(lake.resolve(lake.manifest(source).inputs["prompts"]), "prompts")
    else:
        prompts = heldin_prompts(step.inputs["prompts"], lake).slice(0, config.max_prompts)
        candidates = _draw(step, prompts, policy)
    ids = list(dict.fromkeys(candidates["prompt_id"].to_pylist()))[: config.max_prompts]
    measured = {one for one in ids if _is_measured(one)} or set(ids[:1])
    if len(ids) < 2:
        raise ConfigError(
            f"there are answers to {len(ids)} prompts; S3D trains on some and measures on others, give two or more"
        )
    if len(measured) == len(ids):
        measured.remove(ids[0])
    parts = []
    for chosen in (set(ids) - measured, measured):
        rows = candidates.filter(pa.compute.is_in(candidates["prompt_id"], pa.array(sorted(chosen), pa.string())))
        asked = prompts.filter(pa.compute.is_in(prompts["prompt_id"], pa.array(sorted(chosen), pa.string())))
        parts.append(samples_of(rows, asked, policy, config))
    return parts[0], parts[1]


def _is_measured(prompt_id: str) -> bool:
    return hashlib.sha256(f"s3d {prompt_id}".encode()).digest()[0] % HELD_OUT == 0


def _draw(step: Step, prompts: pa.Table, policy: "LoadedModel") -> pa.Table:
    from runtime.decoding.engine import Engine
    from runtime.decoding.rejection import CutSchedule
    from runtime.decoding.sampling import SamplingConfig
    from tasks.rows import candidates_table

    config = _config(step)
    sampling = SamplingConfig(
        n=config.samples, temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=config.seed
    )
    engine = Engine(policy, sampling, CutSchedule(), None, max(128, config.samples), config.prompt_format)
    asked = prompts_of(prompts)
    answers = drawn(engine, asked, progress(f"{step.name} answers", "prompts"))
    return candidates_table(asked, answers, config.model, config.seed)


def _drawn_by(lake: Lake, candidates: str) -> Manifest:
    """The version in which candidates were drawn, whatever scored them since."""
    manifest = lake.manifest(lake.resolve(candidates))
    while manifest.stage == "score":
        manifest = lake.manifest(lake.resolve(manifest.inputs["candidates"]))
    return manifest


def _drawing(drawn: Manifest) -> dict[str, object]:
    """Temperature and prompt format of candidates; greedy ones say nothing about the odds of other tokens, and those
    of a law that training does not know would teach a wrong one."""
    config = cast(Mapping[str, JsonValue], drawn.config.get("generate") or drawn.config)
    temperature = config.get("temperature")
    if not isinstance(temperature, int | float) or temperature <= 0:
        raise ConfigError(f"{drawn.label} was drawn at temperature = {temperature}; S3D needs sampled answers")
    for name, off in NOT_LEARNT.items():
        value = config.get(name, off)
        if value != off:
            raise ConfigError(
                f"{drawn.label} was drawn with {name} = {value}; S3D learns from answers of temperature alone, "
                f"draw some with {name} = {off}"
            )
    return {"temperature": float(temperature), "prompt_format": config.get("prompt_format", "chat")}


def _round_times(
    policy: "LoadedModel", choice: "S3DTraining", config: AdaptConfig, clock: "Clock"
) -> dict[int, list[float]]:
    """Seconds of a round by drafted tokens, 0, 1, ... k, per number of rows; training does not change them."""
    from runtime.decoding.s3d.adapter import S3DAdapter
    from runtime.decoding.s3d.forecast import round_seconds
    from runtime.decoding.s3d.rounds import S3DDecoding

    adapter = S3DAdapter(policy, choice.adapter_config(policy.content_hash)).requires_grad_(False)
    return {
        rows: round_seconds(policy, S3DDecoding(adapter, clock=clock), timed_prompt(), rows, config.prompt_format)
        for rows in TIMED_ROWS
    }


def _with_times(rows: Sequence[Figures], times: Mapping[int, Sequence[float]]) -> list[Figures]:
    """Also t_k / t_0 and E(k) t_0 / t_k on this device, per number of rows."""
    found = []
    for row in rows:
        timed: Figures = {}
        for n, seconds in times.items():
            cost = seconds[int(row["k"])] / seconds[0]
            timed |= {f"t at {n}": round(cost, 3), f"speedup at {n}": round(float(row["E"]) / cost, 3)}
        found.append({**row, **timed})
    return found


def _best_k(rows: Sequence[Figures], n: int) -> int:
    """The number of drafts that is fastest with `n` rows here; 0 where plain decoding is."""
    best = max(rows, key=lambda row: row[f"speedup at {n}"])
    return int(best["k"]) if float(best[f"speedup at {n}"]) > 1 else 0


def _training(config: AdaptConfig, n_first: int, n_last: int) -> "S3DTraining":
    from runtime.alignment.s3d_training import S3DTraining

    shared = config.model_dump(include=set(S3DTraining.__dataclass_fields__) - {"n_first", "n_last"})
    return S3DTraining(n_first=n_first, n_last=n_last, **shared)


def _stats(
    adapter: "S3DAdapter", rows: Sequence[Figures], n_texts: tuple[int, int], config: AdaptConfig
) -> dict[str, JsonValue]:
    top = max(rows, key=lambda row: row["speedup"])
    return {
        "kept": top["kept"],
        "kind": config.kind,
        **{f"best_k_at_{n}": _best_k(rows, n) for n in TIMED_ROWS},
        "E": top["E"],
        "beta": top["beta"],
        "predicted_speedup": top["speedup"],
        "adapter_kib": round(sum(p.numel() for p in adapter.parameters()) * 2 / 1024, 1),
        "trained_on": n_texts[0],
        "measured_on": n_texts[1],
    }


def _config(step: Step) -> AdaptConfig:
    assert isinstance(step.config, AdaptConfig)
    return step.config
