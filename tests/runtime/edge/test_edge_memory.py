"""A bundle larger than its budget runs inside it: anonymous memory of a process of its own, as the kernel counts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.edge.bundle_write import Contents, write_bundle
from runtime.edge.placement import place
from runtime.edge.records import LayerPredictor
from tests.runtime.edge.bundles import profile
from tests.runtime.edge.models import gated_model

ROOT = Path(__file__).parents[3]
SIZES = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 6, "max_position_embeddings": 256}
FFN_BYTES = 6 * 8192 * 1024 * 3 * 2
CHILD = """
import json, sys, torch
from pathlib import Path
from runtime.edge.budget import RunSettings
from runtime.edge.bundle import open_bundle
from runtime.edge.engine import EdgeModel

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
small, large, share = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
settings = RunSettings(max_tokens=256, prefill_tokens=64)
with EdgeModel(open_bundle(small), None, settings) as model:  # what libraries take at first use is no bundle's
    model.generate([5, 6, 7], 4)
before, peak = anonymous(), 0
def watch(token):
    global peak
    peak = max(peak, anonymous() - before)

with EdgeModel(open_bundle(large), None, settings, share=share) as model:
    for start in range(2):
        model.generate([5 + start, 6, 7] * 20, 20, 1.0, start, watch)
    report = model.report()
print(json.dumps({"peak": peak, "budget": model.memory.total, "read_bytes": report.read_bytes}))
"""


@pytest.mark.slow
def test_memory_stays_within_the_budget_and_a_tenth(tmp_path: Path) -> None:
    for name, sizes in (("small", {}), ("large", SIZES)):
        torch.manual_seed(0)
        model = gated_model(**sizes).to(torch.bfloat16)
        found = profile(model)
        n_neurons, hidden = found.shape.intermediate, found.shape.hidden
        predictor = LayerPredictor("low_rank", torch.randn(16, hidden), torch.randn(n_neurons, 16), 16.0)
        write_bundle(tmp_path / name, Contents(model, found, [predictor] * found.shape.n_layers, place(found, 0.95)))
    for share in (0.25, 0.5):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large"), str(share)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["peak"] <= 1.1 * result["budget"]
        assert result["budget"] < share * FFN_BYTES + 80e6  # attention, keys, predictors and buffers
        assert result["read_bytes"] > FFN_BYTES
