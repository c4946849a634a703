"""A small lake with every kind of dataset, named as the documentation names them."""

from collections.abc import Mapping, Sequence

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import candidate, preference, prompt

Rows = Sequence[Mapping[str, object]]
GROUPS = ("auditor", "child", "clerk")
N_PROMPTS, N_CANDIDATES = 12, 6


def fill(lake: Lake) -> None:
    """Two prompts datasets, generated and scored candidates, two versions of pairs, a model and its evaluation."""
    prompts = _publish(
        lake, "prompts/demo@000000000001", "ingest", {}, {"prompts": _prompts(), "prompts/test": [prompt("t0")]}
    )
    _publish(lake, "prompts/mail@000000000002", "ingest", {}, {"rejected": [_rejected("ingest", None, "empty_prompt")]})
    inputs = {"prompts": str(prompts), "model": "sha256:0"}
    raw = _publish(lake, "candidates/demo@000000000003", "generate", inputs, {"candidates": _answers(False)})
    inputs = {"prompts": str(prompts), "candidates": str(raw)}
    scored = _publish(lake, "candidates/demo@000000000004", "score", inputs, {"candidates": _answers(True)})
    inputs = {"prompts": str(prompts), "candidates": str(scored)}
    pairs = {"preferences": _pairs(N_PROMPTS)}
    first = _publish(lake, "preferences/demo@000000000005", "assemble", inputs, pairs)
    dropped = [_rejected("assemble", f"p{i}", "quota") for i in range(8, N_PROMPTS)]
    pairs = {"preferences": _pairs(8), "rejected": dropped}
    _publish(lake, "preferences/demo@000000000006", "assemble", inputs, pairs)
    losses = [{"step": 1, "metric": "loss", "value": 0.69, "group": None, "held_out": False}]
    inputs = {"preferences": str(first)}
    model = _publish(lake, "models/demo@000000000007", "finetune", inputs, {"training": losses})
    inputs = {"prompts": str(prompts), "after": str(model)}
    _publish(lake, "candidates/demo-evaluation@000000000008", "evaluate", inputs, {"metrics": _metrics()})


def _publish(lake: Lake, label: str, stage: str, inputs: Mapping[str, str], tables: Mapping[str, Rows]) -> DatasetRef:
    kind, _, rest = label.partition("/")
    writer = lake.writer(kind, *rest.split("@"))
    for place, rows in tables.items():
        table, _, split = place.partition("/")
        writer.write(Shard(table, split or "train", 0, 1), to_table(table, rows))
    return writer.commit(Provenance(stage, {}, inputs, {}, "winnow"))


def _group(number: int) -> str:
    return GROUPS[number % 3]


def _prompts() -> Rows:
    return [prompt(f"p{i}", _group(i)) for i in range(N_PROMPTS)]


def _answers(scored: bool) -> Rows:
    """Of every prompt's answers the last two are cut at ten tokens, one of them although it led."""
    rows = []
    for i in range(N_PROMPTS):
        for j in range(N_CANDIDATES):
            is_cut = j >= 4
            cuts = [{"n_tokens": 10, "score": (j + i) % 5 + 0.5 * j, "kept": not is_cut}]
            cuts += [] if is_cut else [{"n_tokens": 24, "score": float(j * i % 7), "kept": True}]
            shape = {"n_tokens": 10, "finish_reason": "cut", "cut_at_token": 10} if is_cut else {"n_tokens": 30 + i + j}
            score = float((j * 3 + i) % 4) if scored and not is_cut else None
            rows.append(candidate(f"p{i}", j, score, group=_group(i), cuts=cuts, **shape))
    return rows


def _pairs(n_pairs: int) -> Rows:
    prompts = _prompts()
    return [preference(f"p{i}", _group(i), score_margin=1.0 + i, prompt=prompts[i]["messages"]) for i in range(n_pairs)]


def _rejected(stage: str, prompt_id: str | None, reason: str) -> dict[str, object]:
    group = None if prompt_id is None else _group(int(prompt_id[1:]))
    return {"stage": stage, "row": 1, "prompt_id": prompt_id, "group": group, "reason": reason, "detail": "why"}


def _metrics() -> Rows:
    return [
        {"model": model, "group": group, "metric": "truth", "value": value + i / 10, "n": 4}
        for model, value in (("before", 0.2), ("after", 0.5))
        for i, group in enumerate(("all", *GROUPS))
    ]
