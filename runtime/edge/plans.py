"""What a bundle needs of memory at several budgets, and how often its cache will serve, on any machine."""

from runtime.edge.budget import Needs, RunSettings, budget_of, divide
from runtime.edge.planner import hit_rate
from runtime.edge.quantise import FLOATS
from runtime.errors import ConfigError

SHARES = (0.25, 0.5, 0.75, 1.0)


def plans(needs: Needs) -> list[dict[str, float | int]]:
    """One row per share of the neurons that is in memory at a time; those below what the bundle needs are left out.

    With the settings that a bundle runs with where no machine is described. Seconds depend on the machine: they are
    `planner.plan`'s.
    """
    settings, dtype, rows = RunSettings(), FLOATS[needs.manifest.dtype], list[dict[str, float | int]]()
    uses = [float(one.sum()) for one in needs.frequency]
    for share in SHARES:
        try:
            budget = budget_of(needs, settings, dtype, share)
            memory = divide(needs, settings, dtype, budget)
        except ConfigError:
            continue
        parts = zip(needs.frequency, memory.slots, uses, strict=True)
        hits = sum(hit_rate(one, slots) * n for one, slots, n in parts) / sum(uses) if sum(uses) else 1.0
        missing = sum(uses) * (1 - hits)
        row = {"neurons_in_memory": share, "budget_bytes": budget, "cached_neurons": sum(memory.slots)}
        rows.append(row | {"hit_rate": round(hits, 4), "neurons_read_per_token": round(missing, 2)})
    return rows
