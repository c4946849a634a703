"""Chunked log-probabilities against the simple way (all logits, log-softmax, gather), in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from runtime.alignment.collate import Batch, EncodedPair, collate
from runtime.alignment.logps import answer_logps, answer_logps_and_kl, unwrapped
from runtime.errors import ConfigError, ModelError
from tests.runtime.alignment.tiny_models import MODELS, assert_equal, gradients, tiny_model


def _batch(with_rejected: bool = True) -> Batch:
    """Three pairs of unlike lengths; prompts of one to four tokens."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 67, (count,), generator=generator).tolist()

    pairs = []
    for n_prompt, n_chosen, n_rejected in ((3, 5, 2), (1, 1, 7), (4, 3, 3)):
        prompt = draw(n_prompt)
        pairs.append(EncodedPair("g", prompt + draw(n_chosen), prompt + draw(n_rejected), n_prompt))
    return collate(pairs, 0, with_rejected)


def _all_logps(model: nn.Module, batch: Batch) -> Tensor:
    """The vocabulary's log-probabilities at every place but the last (rows, T - 1, V)."""
    return model(input_ids=batch.token_ids, attention_mask=batch.mask).logits[:, :-1].log_softmax(-1)


def _simple(model: nn.Module, batch: Batch, places: Tensor) -> Tensor:
    logps = _all_logps(model, batch).gather(-1, batch.token_ids[:, 1:, None])[..., 0]
    return torch.where(places[:, 1:].bool(), logps, 0.0).sum(-1)


@pytest.mark.parametrize("kind", MODELS)
def test_values_and_gradients_are_those_of_the_full_logits(kind: str) -> None:
    model, batch = tiny_model(kind), _batch()
    found = answer_logps(model, batch, chunk_tokens=4)
    wanted = _simple(model, batch, batch.is_answer)
    torch.testing.assert_close(found.logps, wanted, rtol=1e-9, atol=1e-9)
    assert found.n_tokens.tolist() == [5, 1, 3, 2, 7, 3]
    assert_equal(gradients(model, found.logps), gradients(model, wanted))


def test_the_chunk_changes_nothing_but_rounding() -> None:
    model, batch = tiny_model(), _batch()
    found = [answer_logps(model, batch, chunk_tokens=size).logps for size in (1, 3, 1000)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=0)


def test_sums_over_prompt_and_answer_come_with_those_of_the_answer() -> None:
    model, batch = tiny_model(), _batch(with_rejected=False)
    found = answer_logps(model, batch, chunk_tokens=4, whole_sequence=True)
    assert found.all_logps is not None and found.n_all is not None
    torch.testing.assert_close(found.logps, _simple(model, batch, batch.is_answer), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.all_logps, _simple(model, batch, batch.mask), rtol=1e-9, atol=1e-9)
    assert found.n_all.tolist() == [7, 1, 6]  # the first token is predicted by nothing
    assert found.n_tokens.tolist() == [5, 1, 3]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "granite"])
def test_kl_to_a_second_model_is_that_of_the_full_vocabulary(kind: str) -> None:
    policy, reference, batch = tiny_model(kind), tiny_model(kind, seed=1), _batch()
    found, fixed = answer_logps_and_kl(policy, reference, batch, chunk_tokens=4)
    with torch.no_grad():
        of_reference = _all_logps(reference, batch)
    of_policy = _all_logps(policy, batch)
    kl = (of_reference.exp() * (of_reference - of_policy)).sum(-1)
    wanted = (kl * batch.is_answer[:, 1:]).sum(-1)
    assert found.kl is not None
    assert (found.kl > 0).all()
    torch.testing.assert_close(found.kl, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.logps, _simple(policy, batch, batch.is_answer), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fixed.logps, _simple(reference, batch, batch.is_answer), rtol=1e-9, atol=1e-9)
    simple = torch.stack([_simple(policy, batch, batch.is_answer), wanted])
    assert_equal(gradients(policy, torch.stack([found.logps, found.kl])), gradients(policy, simple))
    assert not fixed.logps.requires_grad
    assert all(parameter.grad is None for parameter in reference.parameters())


def _adapted(targets: str | list[str] = "all-linear") -> nn.Module:
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted.double()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_adapters_take_part_wherever_they_are(targets: str | list[str]) -> None:
    adapted, batch = _adapted(targets), _batch()
    found = answer_logps(adapted, batch, chunk_tokens=4).logps
    wanted = _simple(adapted, batch, batch.is_answer)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert_equal(gradients(adapted, found), gradients(adapted, wanted))


def test_the_reference_of_an_adapted_model_is_the_model_without_its_adapter() -> None:
    adapted, batch = _adapted(), _batch()
    found, fixed = answer_logps_and_kl(adapted, adapted.disable_adapter, batch, chunk_tokens=4)
    torch.testing.assert_close(fixed.logps, _simple(tiny_model(), batch, batch.is_answer), rtol=1e-9, atol=1e-9)
    apart, _ = answer_logps_and_kl(adapted, tiny_model(), batch)
    assert found.kl is not None and apart.kl is not None
    torch.testing.assert_close(found.kl, apart.kl, rtol=1e-9, atol=1e-9)
    assert gradients(adapted, found.kl)


def test_an_adapter_on_the_output_layer_has_no_kl_to_the_model_without_it() -> None:
    adapted = _adapted(["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="adapt other layers"):
        answer_logps_and_kl(adapted, adapted.disable_adapter, _batch())


def test_a_model_is_its_own_reference_with_no_divergence() -> None:
    model, batch = tiny_model(), _batch()
    found, fixed = answer_logps_and_kl(model, copy.deepcopy(model), batch)
    assert found.kl is not None
    assert found.kl.abs().max() < 1e-12
    assert torch.equal(found.logps, fixed.logps)


def test_half_precision_is_summed_in_float32() -> None:
    model, batch = tiny_model().bfloat16(), _batch()
    found = answer_logps(model, batch).logps
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, answer_logps(copy.deepcopy(model).float(), batch).logps, rtol=0.05, atol=1.0)


def test_gradient_checkpointing_of_the_layers_changes_nothing() -> None:
    model, batch = tiny_model(), _batch()
    wanted = gradients(model, answer_logps(model, batch).logps)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # since 5.23
    enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert_equal(gradients(model, answer_logps(model, batch).logps), wanted)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return found


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("with_kl", [False, True])
def test_no_tensor_holds_the_vocabulary_of_all_places(kind: str, with_kl: bool) -> None:
    model, reference = tiny_model(kind, vocab_size=2000), tiny_model(kind, 1, 2000)
    ids = torch.arange(3, 63)[None].expand(8, -1).contiguous()
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    with _Largest() as largest:
        found = answer_logps_and_kl(model, reference, batch, 16)[0] if with_kl else answer_logps(model, batch, 16)
        found.logps.sum().backward()
    assert 16 * 2000 <= largest.elements < 59 * 8 * 2000 / 2


def test_the_model_computes_as_before_afterwards() -> None:
    model, batch = tiny_model(), _batch()
    before = model(input_ids=batch.token_ids).logits
    answer_logps(model, batch).logps.sum().backward()
    assert torch.equal(model(input_ids=batch.token_ids).logits, before)
    assert "forward" not in vars(model.model)


def test_what_stands_to_the_right_of_an_answer_does_not_matter() -> None:
    model, batch = tiny_model(), _batch()
    other = Batch(torch.where(batch.mask.bool(), batch.token_ids, 9), batch.mask, batch.is_answer)
    torch.testing.assert_close(answer_logps(model, other).logps, answer_logps(model, batch).logps, rtol=1e-12, atol=0)


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaModel is no causal language model"):
        answer_logps(tiny_model().model, _batch())


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: get_peft_model(m, LoraConfig())])
def test_wrappers_are_seen_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model()
    assert unwrapped(wrap(model)) is model
