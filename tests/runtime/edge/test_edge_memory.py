"""A bundle larger than its budget runs inside it: memory of a process of its own, as the kernel counts it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.edge.budget import fixed_bytes
from runtime.edge.bundle import open_bundle
from runtime.edge.bundle_write import Contents, write_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.placement import place
from runtime.edge.records import LayerPredictor, WeightFormat
from tests.runtime.edge.bundles import gate_predictor, profile, written
from tests.runtime.edge.models import gated_model

ROOT = Path(__file__).parents[3]
SIZES = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2, "max_position_embeddings": 256}
LIBRARIES = 8 << 20  # what kernels and the allocator take beside tensors; docs/bundle.md
SHARE = 0.6
CHILD = """
import json, sys, threading, time, torch
from pathlib import Path
from runtime.edge.budget import RunSettings
from runtime.edge.bundle import open_bundle
from runtime.edge.engine import EdgeModel

def taken():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))

torch.set_num_threads(1)
small, large, share = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
settings = RunSettings(max_tokens=256, prefill_tokens=64)
with EdgeModel(open_bundle(small), None, settings) as model:  # what libraries take at first use is no bundle's
    model.generate([5, 6, 7] * 30, 4)
before, peak, n_looks, is_done = taken(), 0, 0, False

def watch():
    global peak, n_looks
    while not is_done:
        peak, n_looks = max(peak, taken() - before), n_looks + 1
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
with EdgeModel(open_bundle(large), None, settings, share=share) as model:
    for start in range(2):
        model.generate([5 + start, 6, 7] * 40, 12, 1.0, start)
    report = model.report()
is_done = True
watcher.join()
found = {"peak": peak, "n_looks": n_looks, "budget": model.memory.total, "read_bytes": report.read_bytes}
print(json.dumps(found | {"ffn_bytes": model.bundle.manifest.ffn_bytes}))
"""


def test_buffers_are_no_larger_than_a_layer_whatever_a_manifest_says(tmp_path: Path) -> None:
    with EdgeModel(open_bundle(written(tmp_path / "b", "int4"))) as model:
        found, settings, n_neurons = model.needs, model.settings, model.bundle.manifest.shape.intermediate
    fixed = [
        fixed_bytes(replace(found, manifest=replace(found.manifest, block=block)), settings, torch.bfloat16)
        for block in (n_neurons, 1 << 20)
    ]
    assert fixed[0] == fixed[1]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("activation", "weight_format"),
    [("relu", "bfloat16"), ("relu", "int8"), ("relu", "int4"), ("silu", "bfloat16"), ("silu", "int8")],
)
def test_memory_stays_within_the_budget(tmp_path: Path, activation: str, weight_format: WeightFormat) -> None:
    for name, sizes in (("small", {}), ("large", SIZES)):
        torch.manual_seed(0)
        model = gated_model(activation=activation, **sizes).to(torch.bfloat16)
        found = profile(model, threshold=0.05)
        n_neurons, hidden = found.shape.intermediate, found.shape.hidden
        predictor = LayerPredictor("low_rank", torch.randn(16, hidden), torch.randn(n_neurons, 16), 16.0)
        chosen = predictor if activation == "relu" else gate_predictor(model)
        placed = place(found, 0.6)  # two fifths are hot
        write_bundle(
            tmp_path / name, Contents(model, found, [chosen] * found.shape.n_layers, placed, None, weight_format, 32)
        )
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large"), str(SHARE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(activation, weight_format, {key: round(value / 2**20, 1) for key, value in result.items()})
    assert result["n_looks"] > 100
    assert result["peak"] <= 1.1 * result["budget"] + LIBRARIES
    assert result["read_bytes"] > result["ffn_bytes"] * (1 - SHARE)
