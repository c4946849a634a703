"""KTO's answers under other prompts: where they come from, how long they are, and that they are computed once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.alignment.collate import EncodedPair, encode_pairs
from runtime.alignment.config import Places
from runtime.alignment.items import Item
from runtime.alignment.losses import LossSettings
from runtime.alignment.objective import with_others
from runtime.alignment.offline import Helpers, PairRows, train_offline
from runtime.alignment.reference import Compute, Logps
from runtime.errors import InputError
from runtime.models import LoadedModel, load_policy
from tests.runtime.alignment.trained import DPO, rows

KTO = replace(DPO, loss=LossSettings("kto"), epochs=1)


def _items(loaded: LoadedModel, count: int = 6) -> list[Item]:
    pairs, _ = encode_pairs(rows(count), loaded.tokenizer, "chat", 128)
    return [Item(pair, 0) for pair in pairs]


def test_every_prompt_gets_the_answer_of_the_next_pair_cut_at_max_length(tiny_policy: LoadedModel) -> None:
    items = _items(tiny_policy)
    whole, cut = with_others(items, items, 128), with_others(items, items, 20)
    for place, item in enumerate(items):
        pair, other, short = items[(place + 1) % len(items)].pair, whole[place].other, cut[place].other
        assert other is not None and short is not None
        assert other.chosen == [*item.pair.chosen[: item.pair.n_prompt], *pair.chosen[pair.n_prompt :]]
        assert short.chosen == other.chosen[:20] and sum(short.n_answer) > 0
        assert (other.prompt_id, other.row) == (item.pair.prompt_id, item.pair.row)
    assert any(len(item.other.chosen) > 20 for item in whole if item.other)


def test_spans_of_an_answer_of_several_messages_move_with_it(tiny_policy: LoadedModel) -> None:
    first, second = _items(tiny_policy, 2)
    n_prompt = second.pair.n_prompt
    spoken = replace(second.pair, chosen_spans=((n_prompt, n_prompt + 2), (n_prompt + 3, len(second.pair.chosen))))
    longer = replace(first.pair, chosen=[7, *first.pair.chosen], n_prompt=first.pair.n_prompt + 1)
    mixed, _ = with_others([Item(longer, 0), Item(spoken, 0)], [Item(longer, 0), Item(spoken, 0)], 128)
    assert mixed.other is not None
    start = longer.n_prompt
    assert mixed.other.chosen_spans == ((start, start + 2), (start + 3, len(mixed.other.chosen)))
    (short, _) = with_others([Item(longer, 0), Item(spoken, 0)], [Item(longer, 0), Item(spoken, 0)], start + 2)
    assert short.other is not None and short.other.chosen_spans == ((start, start + 2),)


@pytest.mark.parametrize("n_held_out", [1, 3])
def test_held_out_pairs_of_one_prompt_are_measured_by_answers_of_the_others(
    n_held_out: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    held_out = [replace(rows(1)[0], rejected=f"no {number}") for number in range(n_held_out)]
    data = PairRows(rows(8)[2:], held_out)
    report = train_offline(load_policy(str(tiny_policy_dir)), data, KTO, Places(tmp_path, tmp_path / "work"))
    assert report.held_out[""]["pairs"] == n_held_out
    with pytest.raises(
        InputError, match="kto measures its zero by answers under other prompts, but all pairs have one"
    ):
        train_offline(load_policy(str(tiny_policy_dir)), PairRows(held_out * 3), KTO, Places(tmp_path, tmp_path / "w"))


def test_a_store_is_asked_for_them_too(tiny_policy_dir: Path, tmp_path: Path) -> None:
    stored: dict[str, list[Logps]] = {}
    computed: list[str] = []

    def references(split: str, pairs: Sequence[EncodedPair], compute: Compute) -> list[Logps]:
        if split not in stored:
            computed.append(split)
            stored[split] = compute(pairs)
        return stored[split]

    losses = []
    for name in ("first", "second"):
        places = Places(tmp_path / name, tmp_path / name / "work")
        data = PairRows(rows(8), rows(4))
        report = train_offline(load_policy(str(tiny_policy_dir)), data, KTO, places, Helpers(references=references))
        losses.append(report.curve("loss"))
    assert computed == ["train", "train_other", "test", "test_other"]
    assert all(one == other for one, other in stored["train_other"])
    assert losses[0] == losses[1]
