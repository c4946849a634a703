"""The engines themselves, where the environment names their binaries: perplexity by their own tools, one thread.

WINNOW_POWERINFER_BIN and WINNOW_LLAMACPP_BIN are folders with `perplexity` (or `llama-perplexity`).
"""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.edge.gguf import write_gguf, write_powerinfer
from runtime.edge.gguf_read import sparse_model
from runtime.edge.sparse import sparse
from runtime.models import LoadedModel, load_policy
from runtime.starter import path as starter
from tests.runtime.edge.models import gated_model
from tests.runtime.edge.test_gguf import exact

TEXT = "Start with 14.\nAdd 9 and you have 23.\nTake away 4 and you have 19.\nSo the answer is 19.\n" * 12
CHUNK = 128


def _tool(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no folder of binaries")
    for name in ("perplexity", "llama-perplexity"):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    pytest.fail(f"{variable} = {folder} has neither perplexity nor llama-perplexity")


def _perplexity_of(tool: Path, model: Path, threshold: float | None = None) -> float:
    """PowerInfer adds up its down-projections without a lock, so one thread."""
    text = model.with_suffix(".txt")
    text.write_text(TEXT)
    command = [str(tool), "-m", str(model), "-f", str(text), "-c", str(CHUNK), "-t", "1"]
    more = {} if threshold is None else {"LLAMA_SPARSE_PRED_THRESHOLD": str(threshold)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100, env={**os.environ, **more})
    found = re.search(r"Final estimate: PPL = (\d+\.\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout[-500:]
    return float(found[1])


def _perplexities(model: torch.nn.Module, loaded: LoadedModel) -> list[float]:
    """As the tools count, by the second half of every chunk; some put a space or a start in front, some do not."""
    return [_perplexity(model, loaded, text, starts) for text in (TEXT, f" {TEXT}") for starts in (False, True)]


def _perplexity(model: torch.nn.Module, loaded: LoadedModel, text: str, starts: bool) -> float:
    ids = [1] * starts + loaded.tokenizer.encode(text, add_special_tokens=False)
    total, count = 0.0, 0
    for start in range(0, len(ids) - CHUNK + 1, CHUNK):
        chunk = torch.tensor([[1] * starts + ids[start + starts : start + CHUNK]])
        with torch.inference_mode():
            logps = model(chunk).logits.log_softmax(-1)[0]
        for place in range(CHUNK // 2, CHUNK - 1):
            total, count = total - float(logps[place, chunk[0, place + 1]]), count + 1
    return float(torch.tensor(total / count).exp())


def _is_among(found: float, own: list[float]) -> bool:
    return any(found == pytest.approx(one, rel=1e-3) for one in own)


@pytest.fixture(scope="module")
def wide() -> LoadedModel:
    policy = load_policy(str(starter("policy")))
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 640}
    return replace(policy, model=gated_model(**sizes, max_position_embeddings=256))


def test_powerinfer_computes_what_we_do(wide: LoadedModel, tmp_path: Path) -> None:
    tool, path = _tool("WINNOW_POWERINFER_BIN"), tmp_path / "m.powerinfer.gguf"
    write_powerinfer(path, wide, exact(wide.model))
    model, predictors = sparse_model(path, wide.model)
    with sparse(model, predictors, [0.0, 0.0]):
        own = _perplexities(model, wide)
    found = _perplexity_of(tool, path)
    assert _is_among(found, own), (found, own)
    assert _perplexity_of(tool, path, threshold=-1e9) == pytest.approx(found, rel=1e-3)  # all neurons computed
    assert _perplexity_of(tool, path, threshold=1e9) != pytest.approx(found, rel=1e-2)  # none


def test_llama_cpp_computes_what_we_do(tmp_path: Path) -> None:
    tool, path = _tool("WINNOW_LLAMACPP_BIN"), tmp_path / "m.gguf"
    loaded = load_policy(str(starter("policy")))
    write_gguf(path, loaded)
    found, own = _perplexity_of(tool, path), _perplexities(loaded.model, loaded)
    assert _is_among(found, own), (found, own)
