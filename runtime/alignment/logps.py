"""Log-probabilities of answers without a tensor of (rows, T, vocabulary): the output layer sees a few tokens at a time.

The model runs once up to its last hidden states. Those of the wanted places alone then go through the model's own way
from hidden states to logits, chunk by chunk; a chunk's logits are thrown away and made again in the backward pass.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from runtime.alignment.collate import Batch
from runtime.alignment.losses.records import AnswerLogps
from runtime.errors import ConfigError, ModelError

CHUNK_TOKENS = 512
# A frozen model of its own, or what turns the policy into its reference for a while, such as peft's disable_adapter.
Reference = nn.Module | Callable[[], AbstractContextManager[object]]


def answer_logps(
    model: nn.Module, batch: Batch, chunk_tokens: int = CHUNK_TOKENS, whole_sequence: bool = False
) -> AnswerLogps:
    """S of every answer in the batch, in its order (packed rows: of every sample); `model` may be wrapped.

    `whole_sequence` adds the sums over prompt and answer. Sums are in float32 at least.
    """
    wanted = (batch.mask.bool() if whole_sequence else batch.is_answer)[:, 1:]
    states = _last_states(model, batch)

    def logps(hidden: Tensor, ids: Tensor) -> Tensor:
        return -cross_entropy(_float(states.logits(hidden)), ids, reduction="none")

    found = _in_chunks(logps, (states.at(wanted), batch.token_ids[:, 1:][wanted]), chunk_tokens)
    is_answer = batch.is_answer[:, 1:]
    answers = AnswerLogps(_sums(batch, wanted, found, is_answer), _sums(batch, wanted, None, is_answer))
    if not whole_sequence:
        return answers
    return replace(answers, all_logps=_sums(batch, wanted, found, wanted), n_all=_sums(batch, wanted, None, wanted))


def answer_logps_and_kl(
    model: nn.Module, reference: Reference, batch: Batch, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[AnswerLogps, AnswerLogps]:
    """The policy's S and D = sum of KL(reference || policy) over the answer's places; the reference's S.

    The reference costs one more pass without gradient; its last hidden states are kept, its logits are not.
    """
    wanted = batch.is_answer[:, 1:]
    fixed = _reference_states(model, reference, batch)
    states = _last_states(model, batch)

    def both(hidden: Tensor, fixed_hidden: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            of_fixed = _float(fixed.logits(fixed_hidden)).log_softmax(-1)
        of_policy = _float(states.logits(hidden)).log_softmax(-1)
        kl = (of_fixed.exp() * (of_fixed - of_policy)).sum(-1)
        chosen = ids[:, None]
        return torch.stack([of_policy.gather(-1, chosen)[:, 0], kl, of_fixed.gather(-1, chosen)[:, 0]], dim=-1)

    places = (states.at(wanted), fixed.at(wanted), batch.token_ids[:, 1:][wanted])
    logps, kl, fixed_logps = _in_chunks(both, places, chunk_tokens).unbind(-1)
    n_tokens = _sums(batch, wanted, None, wanted)
    policy = AnswerLogps(_sums(batch, wanted, logps, wanted), n_tokens, kl=_sums(batch, wanted, kl, wanted))
    return policy, AnswerLogps(_sums(batch, wanted, fixed_logps.detach(), wanted), n_tokens)


@dataclass(frozen=True, slots=True)
class _States:
    """The last hidden states of a batch, and how their model goes on from there."""

    model: PreTrainedModel
    output_type: type[ModelOutput]  # of the backbone
    hidden: Tensor  # (rows, T, width)

    def at(self, wanted: Tensor) -> Tensor:
        """Of the places that predict the wanted ones; wanted is (rows, T - 1)."""
        return self.hidden[:, :-1][wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (places, vocabulary) of hidden states (places, width), as the model itself makes them.

        Its own forward runs with a backbone that hands these states out, so that whatever it does beside the output
        layer (soft-capping, scaling, a bias, an adapter) is done here too.
        """
        output = self.output_type(last_hidden_state=hidden[None])
        places = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with _forward_is(self.model.base_model, lambda *_, **__: output):
            return cast(Tensor, self.model(input_ids=places, use_cache=False, return_dict=True).logits[0])


def _last_states(model: nn.Module, batch: Batch) -> _States:
    """Run the model, through its wrappers, without logits.

    No place is masked: padding is on the right, where a causal model does not look, and attention without a mask is
    faster. Packed samples are kept apart by their positions.
    """
    inner = unwrapped(model)
    found: list[ModelOutput] = []
    kwargs: dict[str, object] = {"use_cache": False, "return_dict": True}
    if batch.positions is None:
        kwargs["attention_mask"] = torch.ones_like(batch.token_ids)
    else:
        kwargs["position_ids"] = batch.positions
    if "logits_to_keep" in inspect.signature(type(inner).forward).parameters:
        kwargs["logits_to_keep"] = 1
    hook = inner.base_model.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        model(input_ids=batch.token_ids, **kwargs)
    finally:
        hook.remove()
    return _States(inner, type(found[0]), cast(Tensor, found[0]["last_hidden_state"]))


def _reference_states(model: nn.Module, reference: Reference, batch: Batch) -> _States:
    with torch.no_grad():
        if isinstance(reference, nn.Module):
            return _last_states(reference, batch)
        inner = unwrapped(model)
        if type(_head(inner)).__module__.startswith("peft"):
            raise ConfigError("the adapter changes the output layer, which tdpo needs as it was; adapt other layers")
        with reference():
            return _last_states(inner, batch)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside data parallelism, compilation and adapters; ModelError for another model."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        elif hasattr(model, "get_base_model"):
            model = cast(Any, model).get_base_model()
        else:
            break
    if not isinstance(model, PreTrainedModel) or model.base_model is model or _head(model) is None:
        raise ModelError(f"{type(model).__name__} is no causal language model of transformers; load one with a head")
    return model


def _head(model: PreTrainedModel) -> nn.Module | None:
    return cast(nn.Module | None, cast(Any, model).get_output_embeddings())


@contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., ModelOutput]) -> Iterator[None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _in_chunks(function: Callable[..., Tensor], places: tuple[Tensor, ...], chunk_tokens: int) -> Tensor:
    """`function` of some places at a time, its inner tensors made again in the backward pass."""
    chunks = zip(*(torch.split(tensor, chunk_tokens) for tensor in places), strict=True)
    return torch.cat([cast(Tensor, checkpoint(function, *chunk, use_reentrant=False)) for chunk in chunks])


def _sums(batch: Batch, wanted: Tensor, values: Tensor | None, counted: Tensor) -> Tensor:
    """Sums over the counted places of a row (of a sample, where rows are packed); without values their number."""
    if values is None:
        spread = counted.long()
    else:
        zeros = values.new_zeros(wanted.shape)
        spread = torch.where(counted, zeros.masked_scatter(wanted, values), zeros)
    if batch.samples is None:
        return spread.sum(-1)
    samples = batch.samples[:, 1:]
    return spread.new_zeros(batch.n_samples).index_add(0, samples[counted], spread[counted])


def _float(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
