"""What lets a policy draft for itself: embeddings of mask tokens and low-rank weights, and the pass that uses them.

A draft pass runs the last committed token and k masks through the first and last layers only. The policy's modules
are never changed: the pass runs a shallow copy of the model, which shares every weight and adds low-rank terms at the
masks' positions alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from runtime.errors import ModelError
from runtime.kv.attention import ArenaPass, install, logits_of
from runtime.models import LoadedModel

Kind = Literal["lora", "embeddings", "skip"]
KINDS: tuple[Kind, ...] = ("lora", "embeddings", "skip")
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi3")
MAX_MASKS = 16
MAX_SAMPLER_WIDTH = 4096


@dataclass(frozen=True, slots=True)
class S3DConfig:
    """The draft's shape: it keeps the first `n_first` and the last `n_last` layers and was trained for `k` masks.

    lora: mask embeddings and low-rank weights; embeddings: those alone; skip: nothing was trained. Low-rank terms are
    scaled by alpha / rank. base_hash: content hash of the policy that it drafts for. rates: chance that the draft at
    each place stays when all before it did, measured when it was trained; empty where nobody measured. sampler_width:
    of the layer between, in the head that tells masks what was drafted before them; 0 without one.
    """

    n_first: int
    n_last: int
    k: int
    rank: int
    alpha: float
    kind: Kind
    base_hash: str
    rates: tuple[float, ...] = ()
    sampler_width: int = 0

    def kept(self, n_layers: int) -> list[int]:
        """Indices of the kept layers."""
        return [*range(self.n_first), *range(n_layers - self.n_last, n_layers)]

    def check(self, model: PreTrainedModel) -> None:
        """Raise ModelError where `model` cannot be drafted for like this."""
        kind, n_layers = model.config.model_type, int(model.config.num_hidden_layers)
        if kind not in SUPPORTED:
            raise ModelError(f"model type {kind!r} has no S3D; use one of {', '.join(SUPPORTED)} or decode without S3D")
        if self.n_first < 0 or self.n_last < 0 or self.n_first + self.n_last < 1:
            raise ModelError(f"S3D keeps first {self.n_first} and last {self.n_last} layers; keep at least one")
        if self.n_first + self.n_last > n_layers:
            raise ModelError(
                f"S3D's kept layers overlap: first {self.n_first} and last {self.n_last} of {n_layers}; keep fewer"
            )
        if not 1 <= self.k <= MAX_MASKS:
            raise ModelError(f"S3D with k = {self.k} masks; use 1 to {MAX_MASKS}")
        self._check_widths(model)

    def _check_widths(self, model: PreTrainedModel) -> None:
        embedding = _embedding(model)
        head = cast(nn.Linear, model.get_output_embeddings())  # type: ignore[no-untyped-call]
        if embedding.weight.shape != head.weight.shape:
            shapes = f"{tuple(embedding.weight.shape)} and {tuple(head.weight.shape)}"
            raise ModelError(f"S3D needs input and output embeddings of one size, not {shapes}; decode without S3D")
        if self.kind == "lora" and not 1 <= self.rank <= embedding.weight.shape[1]:
            raise ModelError(f"S3D with rank {self.rank}; use 1 to the model's width of {embedding.weight.shape[1]}")
        if not 0 <= self.sampler_width <= MAX_SAMPLER_WIDTH:
            raise ModelError(f"S3D with sampler_width {self.sampler_width}; use 0 (none) to {MAX_SAMPLER_WIDTH}")


class LowRank(nn.Module):
    """What is added to a linear layer: up(down(x)); zero until trained."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.normal_(self.down, std=base.in_features**-0.5)


class SamplerHead(nn.Module):
    """Masks are foreseen together; this changes a mask's hidden state by the token that was drafted before it.

    hidden + up(silu(down(hidden) + before(token's embedding))), as in arXiv 2507.11851; no change until trained.
    """

    def __init__(self, width: int, between: int, token_scale: float) -> None:
        """token_scale: root mean square of the embeddings, which are as small as their model likes."""
        super().__init__()
        self.down = nn.Parameter(torch.empty(between, width))
        self.before = nn.Parameter(torch.empty(between, width))
        self.up = nn.Parameter(torch.zeros(width, between))
        nn.init.normal_(self.down, std=width**-0.5)
        nn.init.normal_(self.before, std=width**-0.5 / token_scale)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """(..., width) each -> (..., width)."""
        return hidden + linear(silu(linear(hidden, self.down) + linear(embedded, self.before)), self.up)


class S3DAdapter(nn.Module):
    """Mask embeddings (k, width), for every linear layer in a kept layer a low-rank term, perhaps a sampler head."""

    def __init__(self, loaded: LoadedModel, config: S3DConfig) -> None:
        """An untrained adapter in float32: masks look like the average token; random numbers are torch's own."""
        super().__init__()
        config.check(loaded.model)
        self.config = config
        embedded = _embedding(loaded.model).weight.detach().float()
        mean, scale = embedded.mean(dim=0), float(embedded.square().mean().sqrt())
        self.mask_embeddings = nn.Parameter(mean.repeat(config.k, 1))
        self.layers = nn.ModuleDict()
        if config.kind == "lora":
            for index in config.kept(int(loaded.model.config.num_hidden_layers)):
                terms = {name: LowRank(base, config.rank) for name, base in _linears(_layer(loaded.model, index))}
                self.layers[str(index)] = nn.ModuleDict(terms)
        self.sampler = SamplerHead(len(mean), config.sampler_width, scale) if config.sampler_width else None
        self.to(loaded.model.device)

    @classmethod
    def skip_only(cls, loaded: LoadedModel, n_first: int, n_last: int, k: int) -> S3DAdapter:
        """The training-free baseline, in the model's number format."""
        config = S3DConfig(n_first, n_last, k, 0, 0.0, "skip", loaded.content_hash)
        return cls(loaded, config).to(loaded.model.dtype)

    @property
    def n_bytes(self) -> int:
        """Memory that it adds to the policy's."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def knows(self, rates: Sequence[float]) -> None:
        """Remember how often drafts are accepted, by place."""
        self.config = replace(self.config, rates=tuple(round(rate, 4) for rate in rates))

    def check_k(self, k: int) -> None:
        """Raise ModelError for more masks than there are embeddings of."""
        if k > self.config.k:
            raise ModelError(f"S3D with k = {k}, but the adapter was trained for k = {self.config.k}; use at most that")

    def term(self, layer: int, name: str) -> LowRank | None:
        """The low-rank term of a linear layer, where there is one."""
        if str(layer) not in self.layers:
            return None
        return cast(LowRank, cast(nn.ModuleDict, self.layers[str(layer)])[name])

    def save(self, folder: Path) -> None:
        """Write the adapter's two files into `folder`, in bfloat16."""
        from runtime.decoding.s3d.files import save

        save(self, folder)


def load_adapter(folder: Path, loaded: LoadedModel) -> S3DAdapter:
    """The adapter in `folder`, in the model's number format; ModelError where it is not one for `loaded`."""
    from runtime.decoding.s3d.files import load

    return load(folder, loaded)


class Drafter:
    """Runs draft passes of a policy with its adapter, whose number format must be the policy's."""

    def __init__(self, loaded: LoadedModel, adapter: S3DAdapter) -> None:
        adapter.config.check(loaded.model)
        if adapter.config.base_hash != loaded.content_hash:
            raise ModelError(
                f"the S3D adapter was made for another model than {loaded.source!r} "
                f"({adapter.config.base_hash[:12]}, not {loaded.content_hash[:12]}); run `winnow adapt` for this one"
            )
        install(loaded.model)
        self.base, self.adapter = loaded.model, adapter
        self.kept = adapter.config.kept(int(loaded.model.config.num_hidden_layers))
        self._model = _draft_model(loaded.model, adapter, self.kept)
        self._embedding = _embedding(loaded.model)

    def hidden(self, last: Tensor, n_masks: int, positions: Tensor, arena_pass: ArenaPass) -> Tensor:
        """Hidden states (rows, 1 + n_masks, width) of the last committed tokens (rows,) and the masks behind them.

        positions: (rows, 1 + n_masks). The mask at a position predicts the token at that position.
        """
        self.adapter.check_k(n_masks)
        masks = self.adapter.mask_embeddings[:n_masks].expand(len(last), -1, -1)
        inputs = torch.cat((self._embedding(last)[:, None], masks), dim=1)
        no_mask = torch.zeros(1, 1, 1, 1, dtype=inputs.dtype, device=inputs.device)  # see runtime.kv.attention.run
        output = self._model(
            inputs_embeds=inputs, position_ids=positions, attention_mask=no_mask, use_cache=False, arena_pass=arena_pass
        )
        return cast(Tensor, output.last_hidden_state)

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(rows, 1 + n_masks, width) -> (rows, n_masks, vocabulary).

        tokens: (rows, n_masks) of the masks' places, of which a sampler head looks at the one before.
        """
        states = hidden[:, 1:]
        if tokens is not None and self.adapter.sampler is not None:
            told = self.adapter.sampler(states[:, 1:], self._embedding(tokens[:, :-1]))
            states = torch.cat((states[:, :1], told), dim=1)
        return logits_of(self.base, states)

    def logits_after(self, hidden: Tensor, place: int, before: Tensor | None) -> Tensor:
        """Of one mask, (rows, vocabulary), for a sampler head that is told the drafts before it, (rows,)."""
        state = hidden[:, 1 + place]
        if before is not None and self.adapter.sampler is not None:
            state = self.adapter.sampler(state, self._embedding(before.clamp(min=0)))
        return logits_of(self.base, state)


class _MaskedLinear(nn.Module):
    """A linear layer of the policy with a low-rank term at every position of a row but the first."""

    def __init__(self, base: nn.Linear, term: LowRank, scale: float) -> None:
        super().__init__()
        # A plain tuple: looking weights up in modules takes as long as a small model's matrix products.
        self.weights, self.scale = (base.weight, base.bias, term.down, term.up), scale

    def forward(self, inputs: Tensor) -> Tensor:
        """(rows, 1 + masks, in) -> (rows, 1 + masks, out)."""
        weight, bias, down, up = self.weights
        output = linear(inputs, weight, bias)
        n_masks = inputs.shape[1] - 1
        change = linear(linear(inputs.narrow(1, 1, n_masks), down), up)
        output.narrow(1, 1, n_masks).add_(change, alpha=self.scale)
        return output


def _draft_model(base: PreTrainedModel, adapter: S3DAdapter, kept: list[int]) -> nn.Module:
    """The policy's body with the kept layers only; every layer keeps its index, and with it its place in the arena."""
    body = cast(PreTrainedModel, _shallow(base.base_model))
    config = copy.deepcopy(base.config)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
    body.config = config
    body.layers = nn.ModuleList(_adapted(_layer(base, index), adapter, index) for index in kept)
    return body


def _adapted(layer: nn.Module, adapter: S3DAdapter, index: int) -> nn.Module:
    if adapter.config.kind != "lora":
        return layer
    scale = adapter.config.alpha / adapter.config.rank
    copied = _shallow(layer)
    for part_name, part in layer.named_children():
        part_copy = _shallow(part)
        for name, child in part.named_children():
            term = adapter.term(index, name) if isinstance(child, nn.Linear) else None
            if term is not None:
                setattr(part_copy, name, _MaskedLinear(cast(nn.Linear, child), term, scale))
        setattr(copied, part_name, part_copy)
    return copied


def _layer(model: PreTrainedModel, index: int) -> nn.Module:
    return cast(nn.ModuleList, model.base_model.layers)[index]


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of attention and feed-forward part; their names differ."""
    parts = [part for _, part in layer.named_children()]
    return [(name, one) for part in parts for name, one in part.named_children() if isinstance(one, nn.Linear)]


def _shallow(module: nn.Module) -> nn.Module:
    """A module with the same children and weights, whose children can be exchanged without changing the original's."""
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # children, weights, hooks
            vars(copied)[name] = value.copy()
    return copied
