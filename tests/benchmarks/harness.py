"""What the benchmarks share: options, arms measured in turn, medians, a table, a JSON file.

Every claim is a ratio of arms of one run. Arms alternate, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path("bench-results")


def options(description: str | None, **extra: object) -> argparse.Namespace:
    """--device, --threads, --repeats, and one option per keyword (a list default takes several values)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    for name, default in extra.items():
        one = default[0] if isinstance(default, list) else default
        many = {"nargs": "+"} if isinstance(default, list) else {}
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(one), default=default, **many)  # type: ignore[arg-type]
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found


def seconds(run: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, by the wall unless another clock is given."""
    _wait(device)
    started = clock()
    run()
    _wait(device)
    return clock() - started


def medians(
    arms: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each arm, after one call of each that is not counted."""
    for run in arms.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            found[name].append(seconds(run, device, clock))
    return {name: statistics.median(values) for name, values in found.items()}


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def show(name: str, settings: argparse.Namespace, rows: Sequence[Mapping[str, object]]) -> None:
    """Print the rows as a table and write them, with settings and machine, to bench-results/NAME.json."""
    print(f"{name}: {machine(settings)}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    record = {"settings": vars(settings), "machine": machine(settings), "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def machine(settings: argparse.Namespace) -> str:
    """Where it ran."""
    if settings.device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {settings.threads} thread(s), torch {torch.__version__}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
