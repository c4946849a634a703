"""The engine against transformers and against the bare matrix products, on a random Llama.

    .venv/bin/python tests/benchmarks/bench_engine.py [--n 64 256] [--model 15m | 1b] [--device cuda]

Arms: this engine; `generate(num_return_sequences=N)`; `generate_batch` (continuous batching, the prompt's blocks
shared); and the floor, the products alone: every linear layer, and queries and weights times cached keys and values,
with operands of the same shapes and nothing in between. All sample at temperature 1 with top_k 50, and nobody ends
early. Each side runs in the number format that is faster for it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from harness import medians, options, show
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel
from runtime.records import Message, Prompt

MODELS = {
    "15m": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
KV_HEADS = {"15m": 6, "1b": 8}
TOP_K = 50


def main() -> None:
    settings = options(__doc__, n=[64], prompt=256, new=128, model="15m", skip=[""], generate_batch_repeats=1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    rows: list[dict[str, object]] = []
    for n in settings.n:
        arms: dict[str, Callable[[], object]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            bench = Bench(settings, n, dtype)
            name = str(dtype).removeprefix("torch.")
            for arm, run in (
                ("engine", bench.engine),
                ("generate", bench.generate),
                ("generate_batch", bench.generate_batch),
                ("floor", bench.floor),
            ):
                if arm not in settings.skip:
                    arms[f"{arm} {name}"] = run
        found = medians(arms, settings.repeats, settings.device)
        best = {arm: min(v for k, v in found.items() if k.split()[0] == arm) for arm in {k.split()[0] for k in found}}
        for name, seconds in found.items():
            arm = name.split()[0]
            is_best = seconds == best[arm]
            rows.append(
                {
                    "n": n,
                    "arm": name,
                    "seconds": seconds,
                    "tokens/s": n * settings.new / seconds,
                    "x engine": seconds / best["engine"] if is_best else None,
                }
            )
    show("engine", settings, rows)


class Bench:
    """One model and the ways to decode with it."""

    def __init__(self, settings: argparse.Namespace, n: int, dtype: torch.dtype) -> None:
        self.n, self.n_new, self.device, self.dtype = n, settings.new, settings.device, dtype
        torch.manual_seed(0)
        config = LlamaConfig(
            **MODELS[settings.model],
            num_key_value_heads=KV_HEADS[settings.model],
            vocab_size=32_000,
            max_position_embeddings=settings.prompt + settings.new,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.model = LlamaForCausalLM(config).eval().to(dtype=dtype, device=settings.device)
        self.plain = LlamaForCausalLM(copy.deepcopy(config)).eval().to(dtype=dtype, device=settings.device)
        self.plain.load_state_dict(self.model.state_dict())
        self.prompt_ids = torch.randint(5, 32_000, (settings.prompt,)).tolist()

    def engine(self) -> None:
        loaded = LoadedModel(self.model, _Tokenizer(self.prompt_ids), "random", "")  # type: ignore[arg-type]
        sampling = SamplingConfig(n=self.n, top_k=TOP_K, max_new_tokens=self.n_new)
        engine = Engine(loaded, sampling, CutSchedule(), None, self.n, "text")
        (found,) = engine.generate([Prompt("p", (Message("user", "p"),), "g")])
        assert all(candidate.n_tokens == self.n_new for candidate in found)

    @torch.inference_mode()
    def generate(self) -> None:
        ids = torch.tensor([self.prompt_ids], device=self.device)
        self.plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=TOP_K,
            num_return_sequences=self.n,
            max_new_tokens=self.n_new,
        )

    def generate_batch(self) -> None:
        config = GenerationConfig(
            do_sample=True,
            top_k=TOP_K,
            max_new_tokens=self.n_new,
            num_return_sequences=self.n,
            eos_token_id=-1,
            pad_token_id=0,
        )
        batching = ContinuousBatchingConfig(max_memory_percent=0.2)
        found = self.plain.generate_batch([self.prompt_ids], config, batching)
        assert sum(len(one.generated_tokens) for one in found.values()) == self.n * self.n_new

    @torch.inference_mode()
    def floor(self) -> None:
        config, model = self.model.config, self.model.model
        n, n_kv, head_dim = self.n, config.num_key_value_heads, model.layers[0].self_attn.head_dim
        n_groups = config.num_attention_heads // n_kv

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=self.dtype, device=self.device)

        hidden, wide = random(n, config.hidden_size), random(n, config.intermediate_size)
        attended = random(n, config.num_attention_heads * head_dim)
        n_prompt = len(self.prompt_ids)
        prompt_keys, prompt_query = random(n_kv, n_prompt, head_dim), random(n_kv, n * n_groups, head_dim)
        prompt_weights, row_query = random(n_kv, n * n_groups, n_prompt), random(n * n_kv, n_groups, head_dim)
        n_keys, n_weights = n * n_kv * head_dim, n * n_kv * n_groups
        all_keys, all_weights = random(n_keys * self.n_new), random(n_weights * self.n_new)
        for step in range(1, self.n_new):
            keys = all_keys[: n_keys * step].view(n * n_kv, step, head_dim)
            weights = all_weights[: n_weights * step].view(n * n_kv, n_groups, step)
            for layer in model.layers:
                attention, mlp = layer.self_attn, layer.mlp
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                    linear(hidden)
                torch.bmm(prompt_query, prompt_keys.transpose(1, 2))
                torch.bmm(prompt_weights, prompt_keys)
                torch.bmm(row_query, keys.transpose(1, 2))
                torch.bmm(weights, keys)
                attention.o_proj(attended)
                mlp.down_proj(wide)
            self.model.lm_head(hidden)


class _Tokenizer:
    """As much of a tokenizer as the engine asks for: one prompt, and texts that nobody reads."""

    eos_token_id = None

    def __init__(self, prompt_ids: list[int]) -> None:
        self.prompt_ids = prompt_ids

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.prompt_ids

    def batch_decode(self, rows: list[list[int]], **options: bool) -> list[str]:
        return [""] * len(rows)


if __name__ == "__main__":
    main()
