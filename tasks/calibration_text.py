"""Text to calibrate an export on: finished answers of the lake, the best of every prompt first."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from runtime.errors import InputError
from runtime.records import FINISHED
from storage.errors import RefError
from storage.lake import Lake
from tasks.errors import ConfigError
from tasks.rows import messages_of
from tasks.settings import ExportConfig
from tasks.versions import pin

if TYPE_CHECKING:
    from runtime.edge.text import Text, TokenBatch
    from runtime.models import LoadedModel

HELD_OUT = 4  # every so many prompts, one is measured on


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Batches to fit to, batches of other prompts to measure on, and how many texts there are and were left out."""

    fitted: "list[TokenBatch]"
    held_out: "list[TokenBatch]"
    n_texts: int
    n_dropped: int


def pin_text(config: ExportConfig, lake: Lake) -> dict[str, str]:
    """The answers that are read, as an input; ConfigError where there are none."""
    try:
        return {"candidates": pin(lake, config.candidates, f"candidates/{config.name}")}
    except RefError as error:
        raise ConfigError(
            f"no calibration text: {error}; set export.candidates to answers of the model, or format = hf"
        ) from error


def calibration_text(ref: str, config: ExportConfig, lake: Lake, loaded: "LoadedModel") -> CalibrationText:
    """From the candidates that `ref` names, and their prompts."""
    from runtime.edge.text import batches

    source = lake.resolve(ref)
    prompts = lake.read_table(lake.resolve(lake.manifest(source).inputs["prompts"]), "prompts")
    messages = {row["prompt_id"]: messages_of(row["messages"]) for row in prompts.to_pylist()}
    split: tuple[list[Text], list[Text]] = ([], [])
    n_dropped, places = 0, {prompt: place for place, prompt in enumerate(sorted(messages))}
    for row in _chosen(lake.read_table(source, "candidates"), config.texts):
        prompt = str(row["prompt_id"])
        text = _encoded(loaded, messages[prompt], str(row["response"]), config)
        if text is None:
            n_dropped += 1
        else:
            split[places[prompt] % HELD_OUT == 0].append(text)
    if not all(split):
        raise ConfigError(
            f"{ref} has too few finished answers to calibrate and measure on ({len(split[0])} and {len(split[1])}); "
            "generate for more prompts, or set export.candidates"
        )
    return CalibrationText(batches(split[0]), batches(split[1]), sum(map(len, split)), n_dropped)


def _chosen(candidates: pa.Table, n_texts: int) -> list[dict[str, object]]:
    """The best answer of every prompt, then the second best, and so on."""
    columns = ["prompt_id", "candidate_index", "response", "score", "status", "finish_reason"]
    rows = [
        row
        for row in candidates.select(columns).to_pylist()
        if row["status"] == "ok" and row["finish_reason"] in FINISHED
    ]
    rows.sort(key=lambda row: (row["prompt_id"], row["score"] is None, -(row["score"] or 0.0), row["candidate_index"]))
    ranks: dict[str, int] = {}
    ranked = []
    for row in rows:
        ranks[row["prompt_id"]] = rank = ranks.get(row["prompt_id"], -1) + 1
        ranked.append((rank, row))
    ranked.sort(key=lambda pair: pair[0])
    return [row for _, row in ranked[:n_texts]]


def _encoded(loaded: "LoadedModel", messages: tuple, response: str, config: ExportConfig) -> "Text | None":  # type: ignore[type-arg]
    """None for what the template refuses, what is empty, and what is longer than the model's context."""
    from runtime.edge.text import Text
    from runtime.models import encode_answer

    try:
        token_ids, n_prompt = encode_answer(loaded.tokenizer, messages, response, config.prompt_format)
    except InputError:
        return None
    limit = loaded.model.config.max_position_embeddings
    return Text(token_ids, n_prompt) if n_prompt < len(token_ids) <= limit else None
