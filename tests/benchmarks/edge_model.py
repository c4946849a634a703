"""A ReLU Llama of about 1 GiB with random weights, shaped so that about a tenth of its neurons is active.

Gates are A @ B of rank 64: neuron i is active where w_i . z > theta_i, z being 63 directions of the residual and
theta_i a 64th, constant one, chosen so that frequencies follow a beta(0.25, 2.25) law (mean 0.1, a few neurons
nearly always, most hardly ever). 90 % of z's variance belong to a topic that changes every 64 tokens: about 0.7 of a
token's neurons were active in the token before, as in a trained ReLU model. The predictor [B; -B], [A, -A] is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.edge.bundle_write import Contents, write_bundle
from runtime.edge.placement import place
from runtime.edge.records import FfnShape, LayerPlacement, LayerPredictor, LayerProfile, Profile

RANK, N_TOPICS, TOPIC_TOKENS = 64, 64, 64
SIZES = {
    "1g": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "vocab_size": 8192},
    "small": {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 1024},
}
SHARE = 0.9  # of the variance, that is the topic's


@dataclass(frozen=True)
class Synthetic:
    """The model, and what would predict it exactly."""

    model: LlamaForCausalLM
    predictors: tuple[LayerPredictor, ...]

    def profile(self, ids: Sequence[int]) -> Profile:
        """Which neurons are active in a text."""
        config, layers = self.model.config, []
        hooks = []
        for layer in self.model.model.layers:
            hooks.append(layer.mlp.gate_proj.register_forward_hook(lambda _m, _i, out: layers.append(_layer(out[0]))))
        with torch.inference_mode():
            self.model.model(torch.tensor([list(ids)]))
        for hook in hooks:
            hook.remove()
        shape = FfnShape(config.num_hidden_layers, config.hidden_size, config.intermediate_size, "relu")
        return Profile(shape, tuple(layers), len(ids))


def text(size: str, n: int, seed: int, topic_tokens: int = TOPIC_TOKENS) -> list[int]:
    """Runs of tokens of one topic each, every topic once before one comes again."""
    rng = np.random.default_rng(seed)
    n_runs = -(-n // topic_tokens)
    order = np.concatenate([rng.permutation(N_TOPICS) for _ in range(-(-n_runs // N_TOPICS))])[:n_runs]
    own = rng.integers(0, SIZES[size]["vocab_size"] // N_TOPICS, n)
    return (own * N_TOPICS + np.repeat(order, topic_tokens)[:n]).tolist()


def reuse(layer: LayerProfile, n_neurons: int) -> float:
    """Share of a token's neurons that were active in the token before."""
    active = np.unpackbits(layer.active, axis=1, count=n_neurons).astype(bool)
    return float((active[1:] & active[:-1]).sum() / active[1:].sum())


def build(size: str, seed: int = 0) -> Synthetic:
    """The model of a size, in bfloat16."""
    sizes = SIZES[size]
    config = LlamaConfig(
        **sizes,
        num_attention_heads=sizes["hidden_size"] // 128,
        num_key_value_heads=max(1, sizes["hidden_size"] // 512),
        head_dim=128,
        hidden_act="relu",
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16).eval().requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    hidden = config.hidden_size
    latent = torch.linalg.qr(torch.randn(hidden, RANK, generator=generator))[0].T.contiguous()  # (RANK, H)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.fill_(1.0)
        elif "mlp.gate" not in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5)
    model.model.embed_tokens.weight.copy_(_embeddings(config, latent, generator))
    predictors = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.mul_(0.1)  # or their noise would soon outweigh what the gates read
        read = _read(config, generator)
        layer.mlp.gate_proj.weight.copy_(read @ latent)
        fc1, fc2 = torch.cat([latent, -latent]), torch.cat([read, -read], dim=1)
        predictors.append(LayerPredictor("low_rank", fc1, fc2, 0.0, 1.0, 0.1))
    return Synthetic(model, tuple(predictors))


def write(folder: Path, found: Synthetic, profile: Profile, hot: bool, by_activity: bool) -> tuple[LayerPlacement, ...]:
    """A bundle of it; with hot neurons apart or without, cold ones placed by co-activation or in the model's order."""
    placements = place(profile, hot_share=0.25 if hot else 0.0, by_activity=by_activity)
    write_bundle(folder, Contents(found.model, profile, found.predictors, placements))
    return placements


def _embeddings(config: LlamaConfig, latent: Tensor, generator: torch.Generator) -> Tensor:
    """(V, H): a constant, a topic and a token in the latent directions, and noise of the same norm elsewhere."""
    n_vocabulary, hidden = config.vocab_size, config.hidden_size
    topics = torch.randn(N_TOPICS, RANK - 1, generator=generator)[torch.arange(n_vocabulary) % N_TOPICS]
    own = torch.randn(n_vocabulary, RANK - 1, generator=generator)
    z = torch.cat([torch.ones(n_vocabulary, 1), SHARE**0.5 * topics + (1 - SHARE) ** 0.5 * own], dim=1)
    noise = torch.randn(n_vocabulary, hidden, generator=generator) * 8 / hidden**0.5
    return z @ latent + noise


def _read(config: LlamaConfig, generator: torch.Generator) -> Tensor:
    """(I, RANK): how each neuron reads the latent directions."""
    frequency = np.random.default_rng(int(torch.randint(1 << 30, (1,), generator=generator))).beta(
        0.25, 2.25, config.intermediate_size
    )
    level = torch.special.ndtri(1 - torch.from_numpy(frequency).clamp(1e-4, 0.999)).float()
    direction = torch.randn(config.intermediate_size, RANK - 1, generator=generator)
    direction /= direction.norm(dim=1, keepdim=True)
    return torch.cat([-level[:, None], direction], dim=1)


def _layer(gates: Tensor) -> LayerProfile:
    active = (gates > 0).numpy()
    return LayerProfile(active.mean(axis=0).astype(np.float32), 0.0, np.packbits(active, axis=1))
