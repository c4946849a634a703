"""Rows of the lake's tables with everything filled in, for tests to change."""

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Provenance, Shard


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


def publish_candidates(lake: Lake, version: str = "0123456789ab", n_rows: int = 3) -> DatasetRef:
    """A version of candidates/demo with one shard of p0 to p<n_rows - 1>."""
    writer = lake.writer("candidates", "demo", version)
    rows = [candidate(f"p{i}", 0, float(i)) for i in range(n_rows)]
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", rows))
    return writer.commit(Provenance("generate", {"n": 1}, {}, {}, "winnow"))


def preference(prompt_id: str = "p0", group: str = "child", **changes: object) -> dict[str, object]:
    """A row of `preferences` with a system turn and several turns."""
    row: dict[str, object] = {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": f"And {prompt_id}?"},
        ],
        "chosen": [{"role": "assistant", "content": "6"}],
        "rejected": [{"role": "assistant", "content": "7"}],
        "prompt_id": prompt_id,
        "group": group,
        "score_chosen": 1.5,
        "score_rejected": -0.5,
        "score_margin": 2.0,
        "strategy": "best_vs_worst",
        "chosen_index": 1,
        "rejected_index": 0,
        "policy_logp_ref_chosen": None,
        "policy_logp_ref_rejected": None,
    }
    return row | changes


def publish(lake: Lake, table: str, *shards: list[dict[str, object]], **place: str) -> DatasetRef:
    """A version of TABLE/demo with these shards of its split."""
    split, version = place.get("split", "train"), place.get("version", "0123456789ab")
    writer = lake.writer(table, "demo", version)
    for index, rows in enumerate(shards):
        writer.write(Shard(table, split, index, len(shards)), to_table(table, rows))
    return writer.commit(Provenance("test", {}, {}, {}, "winnow"))
