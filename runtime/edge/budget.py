"""What a bundle takes of memory, and how many cold neurons of each layer the rest of a budget holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from runtime.edge.kv import kv_shape
from runtime.edge.layout import ALIGN, aligned
from runtime.edge.manifest import Manifest
from runtime.edge.quantise import FLOATS
from runtime.edge.reader import ReadSettings
from runtime.edge.store import workspace_bytes
from runtime.errors import ConfigError

DTYPES = FLOATS | {"float64": torch.float64}
MOST_STAGING = 1 << 19
SLOT_TABLES = 8 + 8 + 4 + 1  # bytes of bookkeeping per slot: free list, last use, owner, flag


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a bundle runs. Nothing here changes what is computed, but `dtype`, and `native` how it is rounded."""

    max_tokens: int = 1024  # prompt and answer
    prefill_tokens: int = 256  # that share one pass over the bundle
    read: ReadSettings = ReadSettings()
    overlaps: bool = True  # compute what is there while the rest is read
    prefetch: bool = True  # read what the next layer probably needs during its attention
    two_phase: bool = False  # up and down only of neurons whose gate turns out to be active
    keeps: bool = True  # False: nothing cold stays in memory
    by_matrix: bool = False  # one read per matrix, as if they did not lie together
    native: bool = True  # one token's products in compiled loops, where the extra `native` is installed
    dtype: str | None = None  # None: that of the resident weights


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes of a running bundle by purpose, and the slots per layer."""

    fixed: Mapping[str, int]
    slot_bytes: int
    slots: tuple[int, ...]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.fixed.values()) + sum(self.slots) * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Needs:
    """What a bundle's memory depends on."""

    manifest: Manifest
    n_weights: int  # resident numbers, predictors aside
    n_predictors: int
    gate_bytes: int
    kv_per_token: int  # numbers
    attention_width: int  # of all heads together
    vocabulary: int
    rank: int  # of the widest predictor
    frequency: tuple[NDArray[np.float32], ...]  # of the cold neurons of each layer, in their order


def needs(manifest: Manifest, resident: Mapping[str, Tensor], config: PreTrainedConfig) -> Needs:
    """The needs of an opened bundle."""
    sizes = {"weights": 0, "fc": 0, "gate": 0}
    for name, tensor in resident.items():
        kind = name.rpartition(".")[2] if name.startswith("edge.") else "weights"
        if kind.startswith("gate"):
            sizes["gate"] += tensor.nbytes
        elif kind not in ("order", "frequency"):
            sizes["weights" if kind == "weights" else "fc"] += tensor.numel()
    frequency = tuple(
        resident[f"edge.{layer}.frequency"].numpy()[found.n_hot :] for layer, found in enumerate(manifest.layers)
    )
    rank = max((len(tensor) for name, tensor in resident.items() if name.endswith(".fc1")), default=0)
    return Needs(
        manifest=manifest,
        n_weights=sizes["weights"],
        n_predictors=sizes["fc"],
        gate_bytes=sizes["gate"],
        kv_per_token=math.prod(kv_shape(config, 1)),
        attention_width=config.num_attention_heads * kv_shape(config, 1)[-1],
        vocabulary=config.vocab_size,
        rank=rank,
        frequency=frequency,
    )


def divide(needs: Needs, settings: RunSettings, dtype: torch.dtype, budget: int | None) -> Memory:
    """How `budget` bytes are used; None is as much as everything takes. ConfigError says what the least is."""
    manifest, fixed = needs.manifest, fixed_bytes(needs, settings, dtype)
    slot_bytes = manifest.record.record_bytes + SLOT_TABLES
    n_cold = [len(frequency) for frequency in needs.frequency]
    if budget is None:
        return Memory(fixed, slot_bytes, tuple(n_cold))
    least = [min(n, block_of(manifest)) for n in n_cold]
    n_slots = (budget - sum(fixed.values())) // slot_bytes
    if n_slots < sum(least):
        minimum = sum(fixed.values()) + sum(least) * slot_bytes
        parts = ", ".join(f"{name} {size}" for name, size in fixed.items())
        raise ConfigError(
            f"a budget of {budget} bytes is below the {minimum} that this bundle needs at least ({parts}, "
            f"{sum(least)} neurons of {slot_bytes}); give {minimum} or more"
        )
    return Memory(fixed, slot_bytes, _share(n_slots, least, needs.frequency))


def budget_of(needs: Needs, settings: RunSettings, dtype: torch.dtype, share: float) -> int:
    """Bytes with which `share` of all neurons is in memory at a time, hot and cached, beside all that always is."""
    fixed = fixed_bytes(needs, settings, dtype)
    n_neurons = needs.manifest.shape.n_layers * needs.manifest.shape.intermediate
    n_slots = int(share * n_neurons) - sum(layer.n_hot for layer in needs.manifest.layers)
    return sum(fixed.values()) + n_slots * (needs.manifest.record.record_bytes + SLOT_TABLES)


def block_of(manifest: Manifest) -> int:
    """Neurons that are computed together, and that buffers are made for: never more than a layer has."""
    return min(manifest.block, manifest.shape.intermediate)


def staging_bytes(manifest: Manifest) -> int:
    """Memory of a reading thread: a block of records with the pages it begins and ends in, up to a bound."""
    stride = manifest.record.stride
    return max(min(MOST_STAGING, aligned(block_of(manifest) * stride)), aligned(stride)) + 2 * ALIGN


def stream_bytes(manifest: Manifest) -> int:
    """Memory for a block of consecutive records."""
    return aligned(block_of(manifest) * manifest.record.stride) + 2 * ALIGN


def fixed_bytes(needs: Needs, settings: RunSettings, dtype: torch.dtype) -> dict[str, int]:
    """What is always in memory, by purpose."""
    manifest, item = needs.manifest, dtype.itemsize
    shape, record, block = manifest.shape, manifest.record, block_of(manifest)
    return {
        "weights": needs.n_weights * item,
        "predictors": needs.n_predictors * item + needs.gate_bytes,
        "keys and values": needs.kv_per_token * settings.max_tokens * item,
        "hot neurons": sum(aligned(layer.n_hot * record.record_bytes) for layer in manifest.layers),
        # One matrix of a block is widened at a time, of hot and cold neurons and of resident gates alike.
        "operands": workspace_bytes(block, record, dtype),
        "activations": _activations(needs, settings, item),
        # What was read is copied to slots, a matrix at a time.
        "read buffers": settings.read.threads * 2 * staging_bytes(manifest) + 2 * stream_bytes(manifest),
        "tables": 12 * shape.n_layers * shape.intermediate,  # order, frequency, slots
    }


def _activations(needs: Needs, settings: RunSettings, item: int) -> int:
    """Of a pass over `prefill_tokens`: the larger of attention and feed-forward beside the residual stream."""
    hidden, width, block = needs.manifest.shape.hidden, needs.attention_width, block_of(needs.manifest)
    wide = max(item, 4)
    # Queries, keys and values, rotated; the norm in front of them in float32; the mask, as truth values and as numbers.
    attention = 6 * max(width, hidden) * item + 2 * hidden * wide + settings.max_tokens * (1 + item)
    # What is added up; gate, activation, up and their product, all as they are multiplied; what predictors put out.
    feed_forward = (hidden + 2 * needs.rank) * item + 4 * block * wide + 4 * hidden * wide + block
    # Keys and values are repeated for the heads that share them.
    repeated = 2 * settings.max_tokens * width * item
    # Scores or gates of all neurons for one token, and the logits of one, drawn from in float32.
    decoded = needs.manifest.shape.intermediate * (2 * wide + 1) + needs.vocabulary * (item + 12)
    return settings.prefill_tokens * (3 * hidden * item + max(attention, feed_forward)) + repeated + decoded


def _share(n_slots: int, least: list[int], frequency: Sequence[NDArray[np.float32]]) -> tuple[int, ...]:
    """Slots per layer: `least` for each, the others for the neurons most often active, wherever they are."""
    rank = np.concatenate([np.arange(len(one)) for one in frequency])  # within its layer, most frequent first
    falling = np.concatenate([-np.sort(-one.astype(np.float64)) for one in frequency])
    layer = np.repeat(np.arange(len(frequency)), [len(one) for one in frequency])
    is_first = rank < np.array(least)[layer]
    chosen = np.lexsort((rank, -falling, ~is_first))[:n_slots]
    return tuple(np.bincount(layer[chosen], minlength=len(frequency)).tolist())
