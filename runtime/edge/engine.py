"""A bundle that runs: attention in memory, neurons from cache and disk, all within a budget of bytes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.decoding.sampling import SamplingConfig, sample
from runtime.edge.attention import use_attention
from runtime.edge.budget import DTYPES, Memory, RunSettings, budget_of, divide, needs
from runtime.edge.bundle import Bundle, check_resident
from runtime.edge.decoding import Decoding
from runtime.edge.feedforward import Layers
from runtime.edge.kv import FixedKV
from runtime.edge.linear import replace_linear
from runtime.edge.native import kernels
from runtime.edge.skeleton import build
from runtime.edge.streaming import Streaming
from runtime.errors import BundleError, ConfigError, InputError, ModelError, PromptTooLong
from runtime.randomness import row_key


@dataclass(frozen=True, slots=True)
class Report:
    """What a bundle did since it was opened."""

    n_tokens: int  # decoded one by one
    seconds: float  # for those
    hit_rate: float  # share of active cold neurons that were in memory when they were needed
    read_bytes: int
    n_reads: int
    wait_s: float  # spent waiting for reads
    is_direct: bool  # reads went past the page cache
    is_compiled: bool  # one token's products by compiled loops (the extra `native`)
    memory: Memory


class EdgeModel:
    """One conversation at a time with a bundle, on one thread and those that read."""

    def __init__(
        self,
        bundle: Bundle,
        budget_bytes: int | None = None,
        settings: RunSettings | None = None,
        share: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`budget_bytes` are for everything; instead, `share` of all neurons may be in memory beside the rest."""
        self.bundle, self.settings = bundle, settings or RunSettings()
        resident = bundle.resident()
        check_resident(bundle, resident)
        name = self.settings.dtype or bundle.manifest.dtype
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[name]
        self.kernels = kernels(self.dtype) if self.settings.native else None
        for key in [key for key in resident if not key.startswith("edge.") or key.endswith((".fc1", ".fc2"))]:
            resident[key] = resident[key].to(self.dtype)  # one by one: never all of them twice
            if self.kernels is not None and key.endswith(".fc2"):
                resident[key] = resident[key].T.contiguous().T  # they take columns of it
        self.model = build(bundle.manifest, resident, self.dtype)
        self.needs = needs(bundle.manifest, resident, self.model.config)
        if share is not None:
            budget_bytes = budget_of(self.needs, self.settings, self.dtype, share)
        self.memory = divide(self.needs, self.settings, self.dtype, budget_bytes)
        self.ffn = Layers(bundle, resident, self.memory, self.settings, clock, self.kernels)
        self.decoding, self.streaming = Decoding(self.ffn), Streaming(self.ffn)
        replace_linear(self.model, self.kernels, self.ffn.workspace.free_operand())
        if self.kernels is not None:
            use_attention(self.model)
        self.kv = FixedKV(self.model.config, self.settings.max_tokens, self.dtype)
        self.ids: list[int] = []
        self.clock, self.is_broken = clock, False
        self.seconds = 0.0

    def close(self) -> None:
        """End the reading threads."""
        self.ffn.close()

    def __enter__(self) -> "EdgeModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(self, ids: Sequence[int], is_sparse: bool = True) -> Tensor:
        """Logits (tokens, vocabulary) of a text, float32; `is_sparse` computes what decoding would compute."""
        self.reset()
        return torch.cat([logits.float() for logits in self._feed(ids, is_sparse, every=True)])

    def step(self, token: int) -> Tensor:
        """Logits (vocabulary,) behind one more token, its neurons computed by prediction."""
        if self.kv.n_tokens == self.kv.n_most:
            raise PromptTooLong(f"{self.kv.n_most} tokens are all there is memory for; raise max_tokens")
        started = self.clock()
        logits = self._pass([token], self._decode, begin=self.decoding.prefetch)
        self.seconds += self.clock() - started
        self.ffn.activity.n_tokens += 1
        return logits[-1]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: Callable[[int], object] | None = None,
    ) -> list[int]:
        """The tokens after `ids`, up to an end token (included) or `max_new_tokens`.

        A start of `ids` that is still in memory from the call before is not computed again.
        """
        sampling = SamplingConfig(n=1, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        if len(ids) + max_new_tokens > self.settings.max_tokens:
            raise PromptTooLong(
                f"{len(ids)} tokens and {max_new_tokens} new ones are more than max_tokens = "
                f"{self.settings.max_tokens}; ask for fewer or raise it"
            )
        self._rewind(ids)
        logits = self._feed(ids[len(self.ids) :], is_sparse=False)[-1][-1]
        key, found = torch.tensor([row_key(seed, "", 0)]), list[int]()
        ends = self.ends()
        while True:
            token = int(sample(logits[None].float(), key, torch.tensor([len(found)]), sampling))
            if token < 0:
                raise ModelError("the bundle computes logits that are not finite; export it in float32 or bfloat16")
            found.append(token)
            if on_token is not None:
                on_token(token)
            if token in ends or len(found) == max_new_tokens:
                return found
            logits = self.step(token)

    def ends(self) -> frozenset[int]:
        """Token ids that end an answer."""
        found = self.model.config.eos_token_id
        return frozenset(found if isinstance(found, list) else [] if found is None else [found])

    def reset(self) -> None:
        """Forget the conversation, not the neurons."""
        self.kv.n_tokens, self.ids = 0, []

    def report(self) -> Report:
        """What was done and read so far."""
        activity, counters = self.ffn.activity, self.ffn.reader.counters
        hit_rate = 1 - activity.n_missing / activity.n_active if activity.n_active else 1.0
        return Report(
            n_tokens=activity.n_tokens,
            seconds=self.seconds,
            hit_rate=hit_rate,
            read_bytes=counters.read_bytes,
            n_reads=counters.n_reads,
            wait_s=counters.wait_s,
            is_direct=self.ffn.reader.is_direct,
            is_compiled=self.kernels is not None,
            memory=self.memory,
        )

    def _rewind(self, ids: Sequence[int]) -> None:
        """Keep what `ids` and the conversation so far have in common, but not the last token: its logits are wanted."""
        if not ids:
            raise InputError("an empty prompt has nothing to go on from; give at least one token")
        n_same = 0
        for one, other in zip(ids[:-1], self.ids, strict=False):
            if one != other:
                break
            n_same += 1
        self.kv.n_tokens, self.ids = n_same, self.ids[:n_same]

    def _feed(self, ids: Sequence[int], is_sparse: bool, every: bool = False) -> list[Tensor]:
        """Logits of `ids`, segment by segment; of the last token of each unless `every`."""
        vocabulary = self.model.config.vocab_size
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise InputError(f"token ids must be 0 to {vocabulary - 1}, one at least; use the bundle's own tokenizer")

        def compute(index: int, residual: Tensor, x: Tensor) -> Tensor:
            return self.streaming.stream(index, residual, x, is_sparse)

        if self.kv.n_tokens + len(ids) > self.kv.n_most:
            raise PromptTooLong(
                f"{self.kv.n_tokens + len(ids)} tokens are above max_tokens = {self.kv.n_most}; give fewer or raise it"
            )
        size = self.settings.prefill_tokens
        return [self._pass(ids[start : start + size], compute, every) for start in range(0, len(ids), size)]

    def _decode(self, index: int, residual: Tensor, x: Tensor) -> Tensor:
        found = self.decoding.decode(index, residual, x)
        if index + 1 < len(self.ffn.layers):
            self.decoding.prefetch(index + 1, residual + found)
        return found

    @torch.inference_mode()
    def _pass(
        self,
        ids: Sequence[int],
        feed_forward: "FeedForwardStep",
        every: bool = False,
        begin: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Logits (tokens, vocabulary) behind new tokens; of the last one alone unless `every`."""
        if self.is_broken:
            raise BundleError("a read of the bundle failed or was interrupted before; open it again")
        # Slots may have owners whose rows never arrived: only a pass that ends makes the next one right.
        self.is_broken = True
        body, start = self.model.model, self.kv.n_tokens
        hidden = body.embed_tokens(torch.tensor([list(ids)]))
        if begin is not None:
            begin(0, hidden[0])
        positions = torch.arange(start, start + len(ids))[None]
        rotation = body.rotary_emb(hidden, positions)
        mask = _mask(start, len(ids)) if start and len(ids) > 1 else None
        for index, layer in enumerate(body.layers):
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=rotation,
                attention_mask=mask,
                past_key_values=self.kv,
            )
            hidden = hidden + attended
            normed = layer.post_attention_layernorm(hidden)
            hidden = hidden + feed_forward(index, hidden[0], normed[0])[None]
        self.kv.n_tokens += len(ids)
        self.ids += list(ids)
        self.is_broken = False
        logits: Tensor = self.model.lm_head(body.norm(hidden if every else hidden[:, -1:]))
        return logits[0]


FeedForwardStep = Callable[[int, Tensor, Tensor], Tensor]


def _mask(n_before: int, n_new: int) -> Tensor:
    """(1, 1, new, all), True where a new token sees one."""
    return (torch.arange(n_before + n_new)[None] <= torch.arange(n_before, n_before + n_new)[:, None])[None, None]
