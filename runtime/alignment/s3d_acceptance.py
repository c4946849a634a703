"""How often drafts are accepted on text that the policy drew, and what speed-up that promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.alignment.s3d_training import Drafts, S3DTraining, Sample, TextBatch, draft, usable
from runtime.decoding.s3d.adapter import Drafter, S3DAdapter
from runtime.errors import InputError
from runtime.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Rule:
    """What a decoder meets under one rule of acceptance.

    rates: per offset P(accepted | all before it accepted); emitted: per k in 1..K the tokens per round, E.
    """

    rates: tuple[float, ...]
    emitted: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Measured on texts; overlap: sum min(p, q) per offset, over all places of the answers.

    classic: a draft x stays with probability min(1, p(x) / q(x)), else one is drawn anew (arXiv 2211.17192).
    coupled: draft and target are chosen with the same Gumbel noise and must agree (arXiv 2408.07978).
    """

    overlap: tuple[float, ...]
    classic: Rule
    coupled: Rule
    n_texts: int


@torch.no_grad()
def measure(
    loaded: LoadedModel, adapter: S3DAdapter, samples: Sequence[Sample], settings: S3DTraining, batch_size: int = 16
) -> Acceptance:
    """Decode the texts again in thought: from every start that a round has, how many drafts are accepted.

    The texts are the policy's at settings.temperature. Given such a text, its token x was the draft with probability
    min(1, q(x) / p(x)) under the classic rule, and the noise that led to it can be drawn from its posterior.
    """
    drafter, generator = Drafter(loaded, adapter), torch.Generator().manual_seed(settings.seed)
    texts = usable(samples)
    if not texts:
        raise InputError(f"none of {len(samples)} answers has two tokens; S3D is measured on longer ones")
    overlap, n_real = torch.zeros(settings.k, dtype=torch.float64), torch.zeros(settings.k, dtype=torch.float64)
    classic, coupled = _Tally(settings.k), _Tally(settings.k)
    for at in range(0, len(texts), batch_size):
        batch = TextBatch.of(texts[at : at + batch_size], loaded.model.device)
        starts = torch.arange(batch.ids.shape[1] - 1, device=batch.ids.device).expand(len(batch.ids), -1)
        drafts = draft(drafter, batch, starts, settings)
        is_start = batch.is_start[:, :-1]
        counted = drafts.is_real & is_start.flatten()[:, None]
        overlap += (drafts.overlap * counted).sum(dim=0).cpu()
        n_real += counted.sum(dim=0).cpu()
        n_ahead = drafts.is_real.sum(dim=-1).view(starts.shape).tolist()
        for tally, accepted in ((classic, _classic(drafts, generator)), (coupled, _coupled(drafts, generator))):
            chains = accepted.long().cumprod(dim=-1).sum(dim=-1).view(starts.shape).tolist()
            for chain, ahead, begins in zip(chains, n_ahead, is_start.tolist(), strict=True):
                tally.add(chain, ahead, begins)
    mean = tuple((overlap / n_real.clamp(min=1)).tolist())
    return Acceptance(mean, classic.rule, coupled.rule, len(texts))


def draft_share(model: PreTrainedModel, adapter: S3DAdapter) -> float:
    """Beta: weights that a draft pass reads over those that a full pass reads, the output layer in both.

    With a sampler head, masks after the first go through it and the output layer one by one.
    """
    layers = [_size(layer) for layer in model.base_model.layers]  # type: ignore[union-attr]
    head = _size(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    kept = sum(layers[index] for index in adapter.config.kept(len(layers)))
    n_told = 0 if adapter.sampler is None else adapter.config.k - 1
    again = 0 if adapter.sampler is None else n_told * head + (n_told - 1) * _size(adapter.sampler)
    return (kept + head + _size(adapter) + again) / (sum(layers) + head)


def figures(acceptance: Acceptance, adapter: S3DAdapter, model: PreTrainedModel) -> list[dict[str, float | str]]:
    """One row per k up to the trained one; speedup: E / (1 + beta), what a memory-limited device would gain."""
    config, beta = adapter.config, draft_share(model, adapter)
    return [
        {
            "kept": f"{config.n_first}+{config.n_last}",
            "kind": config.kind,
            "k": k,
            "overlap": round(acceptance.overlap[k - 1], 4),
            "rate": round(acceptance.coupled.rates[k - 1], 4),
            "E": round(acceptance.coupled.emitted[k - 1], 4),
            "E classic": round(acceptance.classic.emitted[k - 1], 4),
            "beta": round(beta, 4),
            "speedup": round(acceptance.coupled.emitted[k - 1] / (1 + beta), 4),
        }
        for k in range(1, config.k + 1)
    ]


class _Tally:
    """Rounds of decoding known texts; where a round starts follows from what was accepted in the one before."""

    def __init__(self, k: int) -> None:
        self.tried, self.accepted = [0] * k, [0] * k
        self.n_rounds, self.n_tokens = [0] * k, 0

    def add(self, chains: list[int], n_ahead: list[int], is_start: list[bool]) -> None:
        """Of one text, per place: how many drafts would be accepted there, how many tokens follow, is it answer."""
        first, end = is_start.index(True), sum(is_start) + is_start.index(True)
        self.n_tokens += end - first
        for k in range(1, len(self.tried) + 1):
            place = first
            while place < end:
                n_accepted = min(chains[place], k)
                if k == len(self.tried):
                    self._count(n_accepted, n_ahead[place])
                self.n_rounds[k - 1] += 1
                place += n_accepted + 1

    def _count(self, n_accepted: int, n_ahead: int) -> None:
        for offset in range(min(n_accepted + 1, n_ahead, len(self.tried))):
            self.tried[offset] += 1
            self.accepted[offset] += offset < n_accepted

    @property
    def rule(self) -> Rule:
        """What was counted."""
        rates = tuple(hits / max(tries, 1) for hits, tries in zip(self.accepted, self.tried, strict=True))
        return Rule(rates, tuple(self.n_tokens / n_rounds for n_rounds in self.n_rounds))


def _classic(drafts: Drafts, generator: torch.Generator) -> Tensor:
    kept = drafts.kept.cpu()
    return torch.rand(kept.shape, generator=generator, dtype=torch.float64) < kept


def _coupled(drafts: Drafts, generator: torch.Generator) -> Tensor:
    """Whether argmax(log q + g) is the text's token, with g from its posterior given argmax(log p + g) is that token.

    The largest of log p + g is a standard Gumbel number; the others are such numbers cut off at it.
    """
    p, q, tokens = drafts.p.cpu().double(), drafts.q.cpu().double(), drafts.tokens.cpu()[..., None]
    top = _gumbel(tokens.shape, generator)
    free = p + _gumbel(p.shape, generator)
    perturbed = -torch.logaddexp(-top, -free)
    noise = perturbed.scatter(-1, tokens, top) - p
    return (noise + q).argmax(dim=-1, keepdim=True).eq(tokens).squeeze(-1) & drafts.is_real.cpu()


def _gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    return -torch.log(-torch.log(uniform))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
