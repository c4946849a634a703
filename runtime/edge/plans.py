"""What a written bundle needs of memory at several budgets, and how often its cache will serve, on any machine."""

from collections.abc import Mapping
from pathlib import Path

from runtime.edge.budget import RunSettings, budget_of, divide
from runtime.edge.bundle import open_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.planner import hit_rate
from runtime.errors import ConfigError

SHARES = (0.25, 0.5, 0.75, 1.0)


def plans(folder: Path) -> list[Mapping[str, float | int]]:
    """One row per share of the neurons that is in memory at a time; those below what the bundle needs are left out."""
    settings, rows = RunSettings(), list[Mapping[str, float | int]]()
    with EdgeModel(open_bundle(folder, verify=False), None, settings) as engine:
        for share in SHARES:
            try:
                budget = budget_of(engine.needs, settings, engine.dtype, share)
                memory = divide(engine.needs, settings, engine.dtype, budget)
            except ConfigError:
                continue
            uses = [float(one.sum()) for one in engine.needs.frequency]
            parts = zip(engine.needs.frequency, memory.slots, uses, strict=True)
            hits = sum(hit_rate(one, slots) * n for one, slots, n in parts) / sum(uses) if sum(uses) else 1.0
            missing = sum(uses) * (1 - hits)
            row = {"neurons_in_memory": share, "budget_bytes": budget, "cached_neurons": sum(memory.slots)}
            rows.append(row | {"hit_rate": round(hits, 4), "neurons_read_per_token": round(missing, 2)})
    return rows
