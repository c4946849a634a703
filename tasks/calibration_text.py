"""Text to calibrate an export on: finished answers of the lake, the best of every prompt first."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import pyarrow.dataset as pads

from runtime.errors import InputError
from runtime.records import FINISHED, Message
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
BATCH_ROWS = 1000
_COLUMNS = ["prompt_id", "candidate_index", "response", "score", "status", "finish_reason"]
# One thread and no reading ahead: memory stays that of a row group.
_SMALL = {
    "batch_size": BATCH_ROWS,
    "batch_readahead": 0,
    "fragment_readahead": 0,
    "use_threads": False,
    "fragment_scan_options": pads.ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False),
}

Row = Mapping[str, object]


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
    chosen = _chosen(_batches(lake.dataset(source, "candidates"), _COLUMNS), config.texts)
    prompts = lake.dataset(lake.resolve(lake.manifest(source).inputs["prompts"]), "prompts")
    wanted = sorted({str(row["prompt_id"]) for row in chosen})
    asked = _asked(_batches(prompts, ["prompt_id", "messages"]), wanted)
    split: tuple[list[Text], list[Text]] = ([], [])
    n_dropped = 0
    for row in chosen:
        place, messages = asked[str(row["prompt_id"])]
        text = _encoded(loaded, messages, str(row["response"]), config)
        if text is None:
            n_dropped += 1
        else:
            split[place % HELD_OUT == 0].append(text)
    if not all(split):
        raise ConfigError(
            f"{ref} has too few finished answers to calibrate and measure on ({len(split[0])} and {len(split[1])}); "
            "generate for more prompts, or set export.candidates"
        )
    return CalibrationText(batches(split[0]), batches(split[1]), sum(map(len, split)), n_dropped)


def _batches(dataset: pads.Dataset, columns: list[str]) -> Iterator[list[Row]]:
    """The rows of some columns, a bounded number at a time."""
    return (batch.to_pylist() for batch in dataset.to_batches(columns=columns, **_SMALL))


def _chosen(batches: Iterable[list[Row]], n_texts: int) -> list[Row]:
    """The best answer of every prompt, then the second best, and so on; no more than these are ever held.

    A row is only pushed back by others, so that whoever is out of the first `n_texts` once stays out.
    """
    kept: list[Row] = []
    for rows in batches:
        finished = [row for row in rows if row["status"] == "ok" and row["finish_reason"] in FINISHED]
        kept = _best([*kept, *finished], n_texts)
    return kept


def _best(rows: list[Row], n_texts: int) -> list[Row]:
    rows = sorted(rows, key=_order)
    ranks: dict[object, int] = {}
    ranked = []
    for row in rows:
        ranks[row["prompt_id"]] = rank = ranks.get(row["prompt_id"], -1) + 1
        ranked.append((rank, row))
    ranked.sort(key=lambda pair: pair[0])
    return [row for _, row in ranked[:n_texts]]


def _order(row: Mapping[str, Any]) -> tuple[str, bool, float, int]:
    return row["prompt_id"], row["score"] is None, -(row["score"] or 0.0), row["candidate_index"]


def _asked(batches: Iterable[list[Row]], wanted: list[str]) -> dict[str, tuple[int, tuple[Message, ...]]]:
    """Of each of the sorted `wanted`, its place among all prompts in order, and its messages."""
    n_before, messages = [0] * (len(wanted) + 1), dict[str, tuple[Message, ...]]()
    sought = frozenset(wanted)
    for rows in batches:
        for row in rows:
            prompt = str(row["prompt_id"])
            n_before[bisect_right(wanted, prompt)] += 1
            if prompt in sought:
                messages[prompt] = messages_of(cast(Any, row["messages"]))
    return {prompt: (place, messages[prompt]) for prompt, place in zip(wanted, accumulate(n_before), strict=False)}


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
