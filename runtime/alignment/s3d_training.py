"""Training a policy to draft for itself: masks learn to foresee what the whole policy will say, its weights stay.

Many groups of masks are packed on every sequence. The target of a mask is the policy's own distribution at its
position, given the true text before it; the text is the policy's own, drawn as in production.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from runtime.alignment.s3d_passes import GroupsPass, PrefixPass
from runtime.decoding.s3d.adapter import Drafter, Kind, S3DAdapter, S3DConfig
from runtime.errors import InputError, ModelError
from runtime.kv.attention import logits_of, run
from runtime.models import LoadedModel
from runtime.records import Progress

Loss = Literal["acceptance", "overlap", "kl"]
TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and the policy's answer to it as token ids; the first `n_prompt` are the prompt."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True, slots=True)
class S3DTraining:
    """Settings; `temperature` is the one that answers are drawn at. batch_size counts sequences, groups those of each.

    acceptance: -log sum min(p, q) (LK loss, arXiv 2602.23881); overlap: -sum min(p, q); kl: KL(p, q).
    """

    n_first: int = 1
    n_last: int = 1
    k: int = 4
    rank: int = 16
    alpha: float = 16.0
    kind: Kind = "lora"
    loss: Loss = "acceptance"
    temperature: float = 1.0
    steps: int = 1000
    batch_size: int = 8
    groups: int = 16
    learning_rate: float = 3e-3
    mask_learning_rate: float = 3e-2
    sampler_width: int = 0
    seed: int = 0

    def adapter_config(self, base_hash: str) -> S3DConfig:
        """What is trained."""
        rank = self.rank if self.kind == "lora" else 0
        shape = (self.n_first, self.n_last, self.k, rank, self.alpha)
        return S3DConfig(*shape, self.kind, base_hash, sampler_width=self.sampler_width)


@dataclass(frozen=True, slots=True)
class Drafts:
    """What the policy says (p) and what the masks foresee (q), as log-probabilities (groups, k, vocabulary).

    tokens: (groups, k), what the text has there; is_real: (groups, k), False behind the end of the text.
    """

    p: Tensor
    q: Tensor
    tokens: Tensor
    is_real: Tensor

    @property
    def overlap(self) -> Tensor:
        """sum min(p, q), (groups, k): how often a draft from q is accepted."""
        return torch.minimum(self.p.exp(), self.q.exp()).sum(dim=-1)

    @property
    def kept(self) -> Tensor:
        """min(1, q(x) / p(x)), (groups, k): how often x was the draft where the text has it."""
        p, q = (one.gather(-1, self.tokens[..., None]).squeeze(-1) for one in (self.p, self.q))
        return (q - p).clamp(max=0).exp() * self.is_real


def train_s3d(
    loaded: LoadedModel, samples: Sequence[Sample], settings: S3DTraining, on_progress: Progress | None = None
) -> S3DAdapter:
    """An adapter in float32, determined by its arguments. The policy, in float32 or float64, is not changed."""
    texts = usable(samples)
    if not texts:
        raise InputError(f"none of {len(samples)} answers has two tokens; S3D needs longer ones to train on")
    adapter = _new_adapter(loaded, settings)
    if settings.kind == "skip":
        return adapter
    drafter = Drafter(loaded, adapter)
    optimizer = _optimizer(adapter, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = _batches(texts, settings, generator, loaded.model.device)
    with _frozen(loaded.model):
        for step in range(settings.steps):
            factor = _schedule(step / settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            batch = next(batches)
            drafts = draft(drafter, batch, choose(batch, settings.groups, generator), settings)
            loss = loss_of(drafts, settings.loss)
            if not math.isfinite(loss.item()):
                raise ModelError(f"the S3D loss is {loss.item()} at step {step}; lower learning_rate")
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if on_progress is not None:
                on_progress(step + 1, settings.steps)
    return adapter.requires_grad_(False)


def usable(samples: Sequence[Sample]) -> list[Sample]:
    """Those with a token that can be foreseen from another one of the answer."""
    return [sample for sample in samples if len(sample.ids) >= sample.n_prompt + 2]


def loss_of(drafts: Drafts, kind: Loss) -> Tensor:
    """Mean loss of the masks, each weighed by the chance that its predecessors are accepted: else it is not asked."""
    before = drafts.kept.detach().cumprod(dim=-1)
    weights = torch.cat((drafts.is_real[:, :1].to(before.dtype), before[:, :-1]), dim=-1) * drafts.is_real
    if kind == "kl":
        each = (drafts.p.exp() * (drafts.p - drafts.q)).sum(dim=-1)
    else:
        each = -drafts.overlap if kind == "overlap" else -(drafts.overlap + TINY).log()
    return (each * weights).sum() / weights.sum().clamp(min=1)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Right-padded token ids (sequences, T) with the lengths of prompts and of whole texts (sequences,)."""

    ids: Tensor
    n_prompt: Tensor
    n_tokens: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device) -> TextBatch:
        """The batch of `samples`."""
        rows = [torch.tensor(sample.ids, device=device) for sample in samples]
        n_prompt = torch.tensor([sample.n_prompt for sample in samples], device=device)
        n_tokens = torch.tensor([len(sample.ids) for sample in samples], device=device)
        return cls(nn.utils.rnn.pad_sequence(rows, batch_first=True), n_prompt, n_tokens)

    @property
    def is_start(self) -> Tensor:
        """(sequences, T), tokens of the answer behind which another one follows."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (place >= self.n_prompt[:, None]) & (place < self.n_tokens[:, None] - 1)


def choose(batch: TextBatch, n_groups: int, generator: torch.Generator) -> Tensor:
    """Random distinct places (sequences, n_groups) to start a group at; too short answers have some of the last."""
    chance = torch.rand(batch.ids.shape, generator=generator).to(batch.ids.device)
    n_chosen = min(n_groups, batch.ids.shape[1])
    found = chance.masked_fill(~batch.is_start, -1).topk(n_chosen, dim=1)
    return torch.where(found.values >= 0, found.indices, batch.n_tokens[:, None] - 1)


def draft(drafter: Drafter, batch: TextBatch, starts: Tensor, settings: S3DTraining) -> Drafts:
    """One full pass and one draft pass with groups at `starts` (sequences, groups)."""
    k, n_last = settings.k, batch.ids.shape[1] - 1
    prefix = PrefixPass(drafter.kept)
    positions = torch.arange(n_last + 1, device=batch.ids.device).expand_as(batch.ids)
    with torch.no_grad():
        whole = run(drafter.base, batch.ids, positions, prefix)
    groups = GroupsPass(prefix, starts, k)
    last = batch.ids.gather(1, starts).flatten()
    hidden = drafter.hidden(last, k, groups.positions, groups)
    ahead = starts[..., None] + torch.arange(k, device=starts.device)  # what is said there is the next token
    sequence = torch.arange(len(batch.ids), device=starts.device)[:, None, None]
    with torch.no_grad():
        wanted = logits_of(drafter.base, whole[sequence, ahead.clamp(max=n_last)].flatten(0, 1))
    tokens = batch.ids[sequence, (ahead + 1).clamp(max=n_last)].flatten(0, 1)
    logits = drafter.logits(hidden, tokens)  # a draft is asked where those before it are the text's tokens
    is_real = (ahead + 1 < batch.n_tokens[:, None, None]).flatten(0, 1)
    p, q = (torch.log_softmax(one / settings.temperature, dim=-1) for one in (wanted, logits))
    return Drafts(p, q, tokens, is_real)


def _new_adapter(loaded: LoadedModel, settings: S3DTraining) -> S3DAdapter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return S3DAdapter(loaded, settings.adapter_config(loaded.content_hash)).to(loaded.model.dtype)


def _optimizer(adapter: S3DAdapter, settings: S3DTraining) -> torch.optim.Optimizer:
    terms = [one for one in adapter.parameters() if one is not adapter.mask_embeddings]
    groups = [
        {"params": [adapter.mask_embeddings], "initial_lr": settings.mask_learning_rate},
        *([{"params": terms, "initial_lr": settings.learning_rate}] if terms else []),
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)


def _batches(
    samples: Sequence[Sample], settings: S3DTraining, generator: torch.Generator, device: torch.device
) -> Iterator[TextBatch]:
    """Endless batches in random order, texts of like length together."""
    window = 16 * settings.batch_size
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda index: len(samples[index].ids))
            groups = [near[at : at + settings.batch_size] for at in range(0, len(near), settings.batch_size)]
            for turn in torch.randperm(len(groups), generator=generator).tolist():
                yield TextBatch.of([samples[index] for index in groups[turn]], device)


def _schedule(done: float) -> float:
    """Learning-rate factor: warm-up over 5 % of the steps, then cosine down to 2 %."""
    if done < 0.05:
        return max(done / 0.05, 0.02)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the policy's own weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
