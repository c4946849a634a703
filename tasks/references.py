"""Log-probabilities of the reference, kept in the lake: computed once per model, pairs and way of encoding them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from storage.errors import LakeError
from storage.lake import DatasetRef, Lake
from storage.refs import parse_ref
from storage.schema import to_table
from storage.writer import Shard
from tasks.errors import ModelError
from tasks.settings_base import StageConfig
from tasks.versions import Step

if TYPE_CHECKING:
    from runtime.alignment.collate import EncodedPair
    from runtime.alignment.reference import Compute, Logps
    from runtime.records import Progress

TABLE = "reference_logps"
SHARD_PAIRS = 512  # what a killed run loses at most


class ReferenceConfig(StageConfig):
    """What determines the log-probabilities beside the model and the pairs."""

    split: str = Field("train", title="Split", pattern=r"^[a-z][a-z_]*$")
    prompt_format: Literal["chat", "text"] = Field("chat", title="Prompt format")
    truncation: Literal["drop", "keep_end", "keep_start"] = Field("drop", title="Truncation")
    max_length: int = Field(256, title="Length", ge=2)
    dtype: Literal["float32", "bfloat16"] = Field("float32", title="Number format")
    is_4bit: bool = Field(False, title="4 bit")


@dataclass(frozen=True, slots=True)
class StoredReferences:
    """References (runtime.alignment.reference) of one version of pairs: read from preferences/NAME-ref, or put there.

    preferences: kind/name@version. models: role -> content hash or models/NAME@version of all that the reference is
    made of. A version holds one split.
    """

    lake: Lake
    preferences: str
    models: Mapping[str, str]
    config: ReferenceConfig
    on_progress: "Progress | None" = None

    def __call__(self, split: str, pairs: "Sequence[EncodedPair]", compute: "Compute") -> "list[Logps]":
        """The stored log-probabilities of these pairs; `compute` runs only for what is not there yet."""
        step = self.step(split)
        ref = step.published(self.lake) or self._publish(step, pairs, compute)
        return self._read(ref, split, pairs)

    def step(self, split: str) -> Step:
        """What makes the version."""
        _, name, _ = parse_ref(self.preferences)
        config = self.config.model_copy(update={"name": name, "split": split})
        inputs = {"preferences": self.preferences}
        return Step("reference", "preferences", f"{name}-ref", config, inputs, dict(self.models))

    def _publish(self, step: Step, pairs: "Sequence[EncodedPair]", compute: "Compute") -> DatasetRef:
        writer = step.writer(self.lake)
        split = self._split(step)
        count = max(1, math.ceil(len(pairs) / SHARD_PAIRS))
        for index in range(count):
            shard = Shard(TABLE, split, index, count)
            part = pairs[index * SHARD_PAIRS : (index + 1) * SHARD_PAIRS]
            if not writer.has(shard):
                writer.write(shard, to_table(TABLE, [_row(*each) for each in zip(part, compute(part), strict=True)]))
            if self.on_progress is not None:
                self.on_progress(index + 1, count)
        return writer.commit(step.provenance({"split": split, "pairs": len(pairs)}))

    def _read(self, ref: DatasetRef, split: str, pairs: "Sequence[EncodedPair]") -> "list[Logps]":
        rows = self.lake.read_table(ref, TABLE, split).to_pylist()
        if len(rows) != len(pairs):
            raise LakeError(f"{ref} has {len(rows)} pairs, but there are {len(pairs)} to train on; remove that version")
        for row, pair in zip(rows, pairs, strict=True):
            if any(row[name] != value for name, value in _identity(pair).items()):
                raise LakeError(
                    f"{ref} has pair {row['row']} of prompt {row['prompt_id']} with {row['n_chosen']} + "
                    f"{row['n_rejected']} answer tokens where pair {pair.row} of prompt {pair.prompt_id} with "
                    f"{pair.n_answer[0]} + {pair.n_answer[1]} belongs; remove that version"
                )
        return [(row["chosen_logp"], row["rejected_logp"]) for row in rows]

    @staticmethod
    def _split(step: Step) -> str:
        assert isinstance(step.config, ReferenceConfig)
        return step.config.split


def _identity(pair: "EncodedPair") -> dict[str, object]:
    n_chosen, n_rejected = pair.n_answer
    return {"prompt_id": pair.prompt_id, "row": pair.row, "n_chosen": n_chosen, "n_rejected": n_rejected}


def _row(pair: "EncodedPair", logps: "Logps") -> dict[str, object]:
    if not all(map(math.isfinite, logps)):
        raise ModelError(
            f"the reference finds {logps[0]} and {logps[1]} for the answers of pair {pair.row} (prompt "
            f"{pair.prompt_id}); check the model's weights, or use dtype = float32"
        )
    chosen, rejected = logps
    return {**_identity(pair), "group": pair.group, "chosen_logp": chosen, "rejected_logp": rejected}
