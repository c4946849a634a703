"""How a bundle should run on a machine: what to pin and cache, how to read, and how fast that will be.

The hit rate is Che's approximation of a least-recently-used cache, from the calibrated frequencies alone. Neighbouring
tokens share neurons, which it does not know: what is measured is usually better.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.edge.budget import Memory, Needs, RunSettings, divide, fixed_bytes
from runtime.edge.hardware import Hardware
from runtime.edge.layout import ALIGN, aligned
from runtime.edge.quantise import FLOATS
from runtime.edge.reader import ReadSettings
from runtime.errors import ConfigError

THREADS = (1, 2, 4, 8)
OVERHEAD_S = 0.0011  # of Python and small operations, per layer and token
CALL_S = 0.000015  # per read, on the core that computes: starting it, and copying what it brought
NOT_EXECUTED = "modelled, not executed here"


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes and seconds are per token while decoding; predictions, to be compared with what `winnow chat` reports."""

    hardware: str
    budget_bytes: int
    pinned_bytes: int  # weights, predictors, hot neurons, keys and values, buffers
    cached_bytes: int
    slots: tuple[int, ...]  # per layer
    block: int  # neurons that are computed together
    compute_threads: int
    io_threads: int
    prefetch_depth: int  # layers
    two_phase: bool
    hit_rate: float
    read_bytes: float
    n_reads: float
    compute_s: float
    read_s: float
    tokens_per_s: float
    prefill_tokens_per_s: float
    modelled: dict[str, object]  # NPU and core clusters, which nothing here executes

    def to_json(self) -> dict[str, object]:
        """For a manifest and for `--json`."""
        return asdict(self) | {"slots": list(self.slots)}

    def settings(self, max_tokens: int) -> RunSettings:
        """What the engine is run with."""
        return RunSettings(
            max_tokens=max_tokens,
            read=ReadSettings(threads=self.io_threads),
            prefetch=self.prefetch_depth > 0,
            two_phase=self.two_phase,
        )


def plan(needs: Needs, hardware: Hardware, budget: int | None = None, max_tokens: int = 1024) -> Plan:
    """The plan for a budget of bytes; None is all that is needed, but not more than the machine has."""
    settings, dtype = settings_for(hardware, max_tokens), FLOATS[needs.manifest.dtype]
    everything = divide(needs, settings, dtype, None).total
    given = everything if budget is None else min(budget, everything)
    if given > hardware.memory_bytes:
        if budget is not None:
            raise ConfigError(f"a budget of {budget} bytes is above the {hardware.memory_bytes} of {hardware.name}")
        given = hardware.memory_bytes
    memory = divide(needs, settings, dtype, given)
    return _predicted(needs, hardware, memory, settings, given)


def settings_for(hardware: Hardware, max_tokens: int) -> RunSettings:
    """What memory is divided for: each reading thread has buffers, and there are as many as were measured."""
    threads = max(n for n in THREADS if n <= max(1, hardware.io_threads))
    return RunSettings(max_tokens=max_tokens, read=ReadSettings(threads=threads))


def plan_for_speed(needs: Needs, hardware: Hardware, tokens_per_s: float, max_tokens: int = 1024) -> Plan:
    """The smallest budget that is predicted to reach a speed; ConfigError when none does."""
    best = plan(needs, hardware, None, max_tokens)
    if best.tokens_per_s < tokens_per_s:
        raise ConfigError(
            f"{tokens_per_s:g} tokens/s are above the {best.tokens_per_s:.3g} that {hardware.name} is predicted to "
            f"reach with {best.budget_bytes} bytes; ask for less"
        )
    settings = settings_for(hardware, max_tokens)
    fixed = sum(fixed_bytes(needs, settings, FLOATS[needs.manifest.dtype]).values())
    slot = divide(needs, settings, FLOATS[needs.manifest.dtype], None).slot_bytes
    low = fixed + slot * sum(min(len(one), needs.manifest.block) for one in needs.frequency)
    high = best.budget_bytes
    while high - low > max(slot, (high - low) // 1000):
        middle = (low + high) // 2
        if plan(needs, hardware, middle, max_tokens).tokens_per_s >= tokens_per_s:
            high = middle
        else:
            low = middle
    return plan(needs, hardware, high, max_tokens)


def hit_rate(frequency: NDArray[np.float32], n_slots: int) -> float:
    """Share of uses that a least-recently-used cache of `n_slots` serves, every use drawn by itself (Che 2002)."""
    p = np.clip(frequency.astype(np.float64), 0, 1)
    uses = p.sum()
    if uses == 0 or n_slots >= len(p):
        return 1.0
    low, high = 0.0, 1.0

    def filled(tokens: float) -> float:
        return float((1 - (1 - p) ** tokens).sum())

    if n_slots >= (p > 0).sum():
        return 1.0
    while filled(high) < n_slots and high < 1e12:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle) < n_slots else (low, middle)
    return float((p * (1 - (1 - p) ** high)).sum() / uses)


def _predicted(needs: Needs, hardware: Hardware, memory: Memory, settings: RunSettings, budget: int) -> Plan:
    manifest, record = needs.manifest, needs.manifest.record
    shape = manifest.shape
    uses = np.array([float(one.sum()) for one in needs.frequency])
    # What is predicted beyond what is active is fetched and computed as well.
    over = np.array(
        [
            max(1.0, one.predicted_active / max(_active(f, one.n_hot, shape.intermediate), 1e-6))
            for one, f in zip(manifest.layers, needs.frequency, strict=True)
        ]
    )
    over = (
        np.minimum(over, np.array([len(f) for f in needs.frequency]) / np.maximum(uses, 1e-6)) if uses.any() else over
    )
    hits = np.array([hit_rate(f, n) for f, n in zip(needs.frequency, memory.slots, strict=True)])
    missing = (uses * over * (1 - hits)).sum()
    read = aligned(record.stride) + (0 if record.stride % ALIGN == 0 else ALIGN)
    two_phase = record.has_gate and record.part_bytes >= ALIGN and float(over.mean()) > TWO_PHASE_FROM
    read_s = missing * read / (hardware.disk(read) * 1e6)
    item = FLOATS[manifest.dtype].itemsize
    dense = (needs.n_weights + needs.n_predictors) * item + needs.gate_bytes + memory.fixed["hot neurons"]
    compute_s = dense / hardware.dense_gb_s / 1e9
    compute_s += (uses * over).sum() * record.record_bytes / hardware.gather_gb_s / 1e9
    compute_s += shape.n_layers * OVERHEAD_S + missing * CALL_S
    # The disk works beside the processor; with one core, threads that read share it.
    token_s = max(compute_s, read_s) if hardware.cores > 1 else compute_s + read_s
    stream_s = manifest.ffn_bytes * (memory.slots != tuple(map(len, needs.frequency))) / hardware.sequential_mb_s / 1e6
    return Plan(
        hardware=hardware.name,
        budget_bytes=budget,
        pinned_bytes=sum(memory.fixed.values()),
        cached_bytes=sum(memory.slots) * memory.slot_bytes,
        slots=memory.slots,
        block=manifest.block,
        compute_threads=1,
        io_threads=settings.read.threads,
        prefetch_depth=int(missing > 0 and record.has_gate and hardware.cores > 1),
        two_phase=two_phase,
        hit_rate=float((uses * hits).sum() / uses.sum()) if uses.any() else 1.0,
        read_bytes=float(missing * read),
        n_reads=float(missing),
        compute_s=compute_s,
        read_s=read_s,
        tokens_per_s=1 / token_s,
        prefill_tokens_per_s=settings.prefill_tokens / max(stream_s, settings.prefill_tokens * compute_s / 8),
        modelled=_modelled(hardware, dense, token_s),
    )


TWO_PHASE_FROM = 2.0  # below it, reading gates apart costs more reads than it saves bytes


def _active(frequency: NDArray[np.float32], n_hot: int, n_neurons: int) -> float:
    return (float(frequency.sum()) + n_hot) / n_neurons


def _modelled(hardware: Hardware, dense_bytes: float, token_s: float) -> dict[str, object]:
    """What an NPU or other cores would make of the dense part; a calculation, nothing more."""
    found: dict[str, object] = {}
    if hardware.npu_gb_s > 0:
        saved = dense_bytes / hardware.dense_gb_s / 1e9 - dense_bytes / hardware.npu_gb_s / 1e9
        found["npu"] = {"tokens_per_s": 1 / max(token_s - saved, 1e-9), "note": NOT_EXECUTED}
    for cluster in hardware.clusters:
        seconds = token_s * hardware.dense_gb_s / cluster.dense_gb_s
        found[cluster.name] = {"cores": cluster.count, "tokens_per_s": 1 / seconds, "note": NOT_EXECUTED}
    return found
