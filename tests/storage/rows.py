"""Rows of the lake's tables with everything filled in, and versions made of them, for tests to change."""

from datetime import UTC, datetime
from pathlib import Path

from storage.lake import DatasetRef, Lake
from storage.objects import Stored
from storage.schema import to_table
from storage.verify import verify
from storage.writer import Provenance, Shard

VERSION = "0123456789ab"


def prompt(prompt_id: str = "p0", group: str = "child") -> dict[str, object]:
    """A row of `prompts`."""
    messages = [{"role": "user", "content": f"question {prompt_id}"}]
    return {
        "prompt_id": prompt_id,
        "messages": messages,
        "group": group,
        "reference": None,
        "source": "test",
        "license": None,
    }


def candidate(prompt_id: str = "p0", index: int = 0, score: float | None = 0.0, **changes: object) -> dict[str, object]:
    """A row of `candidates`."""
    row: dict[str, object] = {
        "prompt_id": prompt_id,
        "group": "child",
        "candidate_index": index,
        "response": f"answer {index}",
        "token_ids": [1, 2],
        "n_tokens": 2,
        "finish_reason": "eos",
        "cut_at_token": None,
        "cuts": [{"n_tokens": 1, "score": 0.5, "kept": True}],
        "score": score,
        "scores": [] if score is None else [{"scorer": "classifier", "value": score}],
        "generator": "g",
        "seed": 0,
        "status": "ok",
        "error": None,
    }
    return row | changes


def preference(prompt_id: str = "p0", group: str = "child", **changes: object) -> dict[str, object]:
    """A row of `preferences`."""
    row: dict[str, object] = {
        "prompt": [{"role": "user", "content": f"question {prompt_id}"}],
        "chosen": [{"role": "assistant", "content": "right"}],
        "rejected": [{"role": "assistant", "content": "wrong"}],
        "prompt_id": prompt_id,
        "group": group,
        "score_chosen": 1.0,
        "score_rejected": 0.0,
        "score_margin": 1.0,
        "strategy": "best_vs_worst",
        "chosen_index": 0,
        "rejected_index": 1,
        "policy_logp_ref_chosen": None,
        "policy_logp_ref_rejected": None,
        "n_votes": None,
        "agreement": None,
        "annotator": None,
    }
    return row | changes


def rejected(prompt_id: str = "p9", group: str | None = "child", reason: str = "tie") -> dict[str, object]:
    """A row of `rejected`."""
    return {
        "stage": "assemble",
        "row": None,
        "prompt_id": prompt_id,
        "group": group,
        "reason": reason,
        "detail": "both score 1.0",
    }


def metric(model: str = "before", group: str = "all", name: str = "truth", value: float = 0.5) -> dict[str, object]:
    """A row of `metrics`."""
    return {"model": model, "group": group, "metric": name, "value": value, "n": 4}


def training(
    step: int = 1, name: str = "loss", value: float = 0.5, group: str | None = None, held_out: bool = False
) -> dict[str, object]:
    """A row of `training`."""
    return {"step": step, "metric": name, "value": value, "group": group, "held_out": held_out}


def publish_candidates(lake: Lake, version: str = VERSION, n_rows: int = 3) -> DatasetRef:
    """A version of candidates/demo with one shard of p0 to p<n_rows - 1>."""
    writer = lake.writer("candidates", "demo", version)
    rows = [candidate(f"p{i}", 0, float(i)) for i in range(n_rows)]
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", rows))
    return writer.commit(Provenance("generate", {"n": 1}, {}, {}, "winnow"))


def publish_model(lake: Lake, folder: Path, text: str = "weights") -> DatasetRef:
    """A version of models/demo with two plain files, made from candidates/demo."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_text(text)
    (folder / "sub" / "config.json").write_text("{}")
    writer = lake.writer("models", "demo", VERSION)
    writer.add_tree(folder, "model")
    inputs = {"preferences": f"candidates/demo@{VERSION}", "model": f"sha256:{'0' * 64}"}
    return writer.commit(Provenance("finetune", {}, inputs, {}, "winnow"))


def put(lake: Lake, key: str, data: bytes) -> None:
    """Whatever a test wants, in place of what is there."""
    lake.store.delete(Stored(key, 0, datetime.now(UTC)))
    assert lake.store.create(key, data)


def problems(lake: Lake, ref: DatasetRef) -> dict[str, str]:
    """What `winnow verify` finds, per file."""
    return {verdict.path: verdict.problem for verdict in verify(lake, ref) if verdict.problem is not None}


def dialogue(prompt_id: str = "p0", group: str = "child", **changes: object) -> dict[str, object]:
    """A row of `preferences` with a system turn and several turns."""
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": f"And {prompt_id}?"},
    ]
    scores: dict[str, object] = {"score_chosen": 1.5, "score_rejected": -0.5, "score_margin": 2.0}
    row = preference(prompt_id, group, prompt=turns, chosen_index=1, rejected_index=0) | scores
    row["chosen"] = [{"role": "assistant", "content": "6"}]
    row["rejected"] = [{"role": "assistant", "content": "7"}]
    return row | changes


def publish(lake: Lake, table: str, *shards: list[dict[str, object]], **place: str) -> DatasetRef:
    """A version of TABLE/demo with these shards of its split."""
    split, version = place.get("split", "train"), place.get("version", "0123456789ab")
    writer = lake.writer(table, "demo", version)
    for index, rows in enumerate(shards):
        writer.write(Shard(table, split, index, len(shards)), to_table(table, rows))
    return writer.commit(Provenance("test", {}, {}, {}, "winnow"))
