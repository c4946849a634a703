"""The reference's log-probabilities in a real lake: computed once, read back, and never taken for other pairs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import datasets
import pytest

from runtime.alignment.collate import EncodedPair, PreferenceRow, encode_pairs
from runtime.alignment.logps import answer_logps
from runtime.alignment.reference import Logps, not_stored, reference_logps
from runtime.models import LoadedModel
from runtime.records import Message
from storage.catalog import query
from storage.errors import LakeError
from storage.lake import Lake
from storage.objects import Stored
from storage.schema import to_table
from storage.verify import verify
from tasks import references
from tasks.errors import ModelError
from tasks.finetune import preference_rows
from tasks.references import ReferenceConfig, StoredReferences
from tests.storage.rows import preference

PAIRS_VERSION = "preferences/main@0123456789ab"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake.open(str(tmp_path / "lake"))


@pytest.fixture
def pairs(tiny_policy: LoadedModel) -> list[EncodedPair]:
    rows = [
        PreferenceRow(f"p{i}", "ab"[i % 2], (Message("user", f"{i}?"),), "yes" * (i % 4 + 1), f"no {i}")
        for i in range(7)
    ]
    found, _ = encode_pairs(rows, tiny_policy.tokenizer, "chat", 64)
    assert len(found) == 7
    return found


class Counting:
    """Computes as the trainer does, and remembers of which pairs."""

    def __init__(self, loaded: LoadedModel, fail_at: int = -1) -> None:
        self.loaded, self.fail_at = loaded, fail_at
        self.rows: list[int] = []

    def __call__(self, pairs: Sequence[EncodedPair]) -> list[Logps]:
        if any(pair.row == self.fail_at for pair in pairs):
            raise KeyboardInterrupt
        self.rows += [pair.row for pair in pairs]
        return reference_logps(self.loaded.model, pairs, 0, batch_size=3)


def _store(lake: Lake, model: str = "sha256:1", **changes: object) -> StoredReferences:
    config = ReferenceConfig(max_length=64).model_copy(update=changes)
    return StoredReferences(lake, PAIRS_VERSION, {"model": model}, config)


def test_log_probabilities_are_those_of_the_model_in_the_order_of_the_pairs(
    tiny_policy: LoadedModel, pairs: list[EncodedPair]
) -> None:
    from runtime.alignment.collate import collate

    calls: list[tuple[int, int]] = []
    found = reference_logps(tiny_policy.model, pairs, 0, 3, lambda done, total: calls.append((done, total)))
    alone = [answer_logps(tiny_policy.model, collate([pair], 0, True)).logps.tolist() for pair in pairs]
    assert [value for both in found for value in both] == pytest.approx([v for both in alone for v in both], abs=1e-4)
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_they_are_computed_once_and_read_back(lake: Lake, tiny_policy: LoadedModel, pairs: list[EncodedPair]) -> None:
    first, second = Counting(tiny_policy), Counting(tiny_policy)
    found = _store(lake)("train", pairs, first)
    assert first.rows == list(range(7))
    assert _store(lake)("train", pairs, second) == found == not_stored("train", pairs, Counting(tiny_policy))
    assert second.rows == []


@pytest.mark.parametrize("changes", [{"max_length": 65}, {"dtype": "bfloat16"}, {"truncation": "keep_end"}])
def test_another_way_of_computing_them_is_another_version(lake: Lake, changes: dict[str, object]) -> None:
    versions = {_store(lake, **each).step("train").version for each in ({}, changes)}
    assert len(versions) == 2


def test_another_model_split_or_version_of_the_pairs_is_another_version(lake: Lake) -> None:
    store = _store(lake)
    others = [
        store.step("test"),
        _store(lake, model="sha256:2").step("train"),
        replace(store, preferences="preferences/main@ba9876543210").step("train"),
        replace(store, models={"model": "sha256:1", "adapter": "sha256:3"}).step("train"),
    ]
    assert len({step.version for step in (store.step("train"), *others)}) == 5
    assert {step.name for step in others} == {"main-ref"}


def test_a_killed_run_goes_on_behind_its_last_shard(
    lake: Lake, tiny_policy: LoadedModel, pairs: list[EncodedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "SHARD_PAIRS", 3)
    killed, after = Counting(tiny_policy, fail_at=4), Counting(tiny_policy)
    with pytest.raises(KeyboardInterrupt):
        _store(lake)("train", pairs, killed)
    assert lake.find("preferences", "main-ref") is None
    found = _store(lake)("train", pairs, after)
    assert (killed.rows, after.rows) == ([0, 1, 2], [3, 4, 5, 6])
    for stored, at_once in zip(found, reference_logps(tiny_policy.model, pairs, 0, 3), strict=True):
        assert stored == pytest.approx(at_once, abs=1e-4)


def test_a_version_with_other_pairs_is_an_error(lake: Lake, tiny_policy: LoadedModel, pairs: list[EncodedPair]) -> None:
    store = _store(lake)
    store("train", pairs, Counting(tiny_policy))
    with pytest.raises(LakeError, match="has 7 pairs, but there are 6 to train on; remove that version"):
        store("train", pairs[:6], Counting(tiny_policy))
    with pytest.raises(LakeError, match="has pair 0 of prompt p0 .* where pair 1 of prompt p1 .* belongs"):
        store("train", [pairs[1], pairs[0], *pairs[2:]], Counting(tiny_policy))
    shorter = replace(pairs[0], chosen=pairs[0].chosen[:-1])
    with pytest.raises(LakeError, match=r"with 4 \+ 5 answer tokens where .* with 3 \+ 5 belongs"):
        store("train", [shorter, *pairs[1:]], Counting(tiny_policy))


def test_a_damaged_version_is_an_error_and_not_computed_anew(
    lake: Lake, tiny_policy: LoadedModel, pairs: list[EncodedPair]
) -> None:
    _store(lake)("train", pairs, Counting(tiny_policy))
    ref = lake.resolve("preferences/main-ref")
    key = f"{ref.prefix}/{lake.manifest(ref).files[0].path}"
    lake.store.delete(Stored(key, 0, datetime.now(UTC)))
    assert lake.store.create(key, b"something else")
    again = Counting(tiny_policy)
    with pytest.raises(LakeError, match="is damaged"):
        _store(lake)("train", pairs, again)
    assert again.rows == []


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_number_is_not_stored(lake: Lake, pairs: list[EncodedPair], value: float) -> None:
    with pytest.raises(ModelError, match="answers of pair 0 .prompt p0.; check the model's weights"):
        _store(lake)("train", pairs, lambda part: [(value, -1.0)] * len(part))
    assert lake.find("preferences", "main-ref") is None


def test_no_pairs_are_a_version_too(lake: Lake, tiny_policy: LoadedModel) -> None:
    assert _store(lake)("test", [], Counting(tiny_policy)) == []


def test_the_version_names_what_it_is_made_of_and_loads_everywhere(
    lake: Lake, tiny_policy: LoadedModel, pairs: list[EncodedPair], tmp_path: Path
) -> None:
    _store(lake)("train", pairs, Counting(tiny_policy))
    ref = lake.resolve("preferences/main-ref")
    manifest = lake.manifest(ref)
    assert manifest.inputs == {"preferences": PAIRS_VERSION, "model": "sha256:1"}
    assert all(verdict.problem is None for verdict in verify(lake, ref))
    rows = query(lake, "SELECT prompt_id, n_chosen FROM reference_logps ORDER BY row").rows
    assert rows == [(pair.prompt_id, pair.n_answer[0]) for pair in pairs]
    loaded = datasets.load_dataset(ref.uri, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["row"][:] == list(range(7))


def test_every_message_of_an_answer_reaches_the_trainer() -> None:
    turns = [{"role": role, "content": role} for role in ("assistant", "tool", "assistant")]
    (row,) = preference_rows(to_table("preferences", [preference(chosen=turns)]))
    assert row.chosen == tuple(Message(turn["role"], turn["content"]) for turn in turns)
    assert row.rejected == (Message("assistant", "wrong"),)
