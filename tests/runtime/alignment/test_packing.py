"""Packed rows give the losses and gradients of unpacked ones, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel

from runtime.alignment.collate import EncodedPair, collate
from runtime.alignment.logps import answer_logps
from runtime.alignment.losses import sft
from runtime.alignment.packing import check_packing, collate_packed, packs
from runtime.errors import ModelError
from tests.runtime.alignment.tiny_models import assert_equal, gradients, tiny_model


def _pairs() -> list[EncodedPair]:
    generator = torch.Generator().manual_seed(7)
    pairs = []
    for n_prompt, n_answer in ((3, 5), (1, 1), (4, 3), (2, 6), (6, 2)):
        ids = torch.randint(3, 67, (n_prompt + n_answer,), generator=generator).tolist()
        pairs.append(EncodedPair("g", ids, ids, n_prompt))
    return pairs


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "phi"])
def test_packed_losses_and_gradients_are_those_of_unpacked_rows(kind: str) -> None:
    model, pairs = tiny_model(kind), _pairs()
    check_packing(model)
    rows = packs([len(pair.chosen) for pair in pairs], 18)
    assert len(rows) == 2
    batch = collate_packed([[pairs[place] for place in row] for row in rows], pad_id=0)
    order = [place for row in rows for place in row]
    packed = sft(answer_logps(model, batch, chunk_tokens=4)).per_sample
    alone = sft(answer_logps(model, collate(pairs, 0, False), chunk_tokens=4)).per_sample[order]
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    assert_equal(gradients(model, packed), gradients(model, alone))


def test_no_sample_feels_its_neighbours() -> None:
    model, pairs = tiny_model(), _pairs()
    other = EncodedPair("g", [9, 9, 9, 9, 9], [], 2)
    first = answer_logps(model, collate_packed([[pairs[0], pairs[1]]], 0)).logps[1]
    second = answer_logps(model, collate_packed([[other, pairs[1]]], 0)).logps[1]
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_spans_of_an_answer_are_kept_in_a_pack() -> None:
    pair = EncodedPair("g", [5, 6, 7, 8, 9], [], 1, chosen_spans=((1, 2), (4, 5)))
    batch = collate_packed([[_pairs()[1], pair]], 0)
    assert batch.is_answer.tolist() == [[False, True, False, True, False, False, True]]
    assert batch.positions is not None and batch.samples is not None
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4]]
    assert batch.samples.tolist() == [[0, 0, 1, 1, 1, 1, 1]]


def _recurrent() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MambaConfig(vocab_size=67, hidden_size=16, num_hidden_layers=2)).eval()


def test_a_model_that_mixes_packed_samples_is_refused() -> None:
    with pytest.raises(ModelError, match="MambaForCausalLM mixes samples .* without packing"):
        check_packing(_recurrent())


def test_the_check_leaves_the_model_in_its_mode() -> None:
    model = tiny_model().train()
    check_packing(model)
    assert model.training


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 40))
def test_every_sample_is_in_one_row_and_rows_fit(lengths: list[int], capacity: int) -> None:
    rows = packs(lengths, capacity)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[place] for place in row) <= capacity for row in rows)
    assert packs(lengths, capacity) == rows


def test_packing_wastes_little() -> None:
    lengths = torch.randint(5, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(packs(lengths, 128)) <= 1.05 * sum(lengths) / 128 + 1
