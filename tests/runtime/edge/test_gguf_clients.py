"""The engines themselves, where they are at hand, on one thread.

WINNOW_POWERINFER_BIN and WINNOW_LLAMACPP_BIN are folders with `perplexity` (or `llama-perplexity`); xllamacpp is a
package that has llama.cpp as a library.
"""

import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.edge.gguf import GgufSettings, GgufType, write_gguf, write_powerinfer
from runtime.edge.gguf_read import sparse_model
from runtime.edge.sparse import sparse
from runtime.models import LoadedModel, encode_prompt, load_policy
from runtime.records import Message
from runtime.starter import path as starter
from tests.runtime.edge.models import exact, gated_model

TEXT = "Start with 14.\nAdd 9 and you have 23.\nTake away 4 and you have 19.\nSo the answer is 19.\n" * 12
CHUNK = 128
ASKED = "One line for the front desk, please. What is 23 + 9 + 8 - 12 ?"


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


@pytest.mark.parametrize(("type", "most", "rel"), [
    ("F32", 0.05, 1e-4), ("F16", 0.05, 1e-4), ("Q8_0", 0.5, 1e-3), ("Q4_0", 8.0, 5e-3)
])  # fmt: skip
def test_llama_cpp_as_a_library_gives_the_models_probabilities(
    tmp_path: Path, type: GgufType, most: float, rel: float
) -> None:
    """Of every token of the vocabulary that is not all but impossible, after each token of the starter's own answer."""
    llama_cpp: Any = pytest.importorskip("xllamacpp", reason="needs llama.cpp: .venv/bin/pip install xllamacpp")
    loaded = load_policy(str(starter("policy")))
    write_gguf(tmp_path / "m.gguf", loaded, GgufSettings(type))
    ids = encode_prompt(loaded.tokenizer, [Message("user", ASKED)], "chat")
    with torch.inference_mode():
        text = loaded.model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)
        own = loaded.model(text).logits[0].double().log_softmax(-1)
    server = _server(llama_cpp, tmp_path / "m.gguf")
    largest, found = 0.0, torch.full_like(own, torch.nan)
    for end in range(len(ids), text.shape[1]):
        asked = {"prompt": text[0, :end].tolist(), "max_tokens": 1, "logprobs": own.shape[1], "temperature": 1.0}
        answer = server.handle_completions(asked | {"cache_prompt": False})
        listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found[end - 1, [one["id"] for one in listed]] = torch.tensor([one["logprob"] for one in listed]).double()
        likely = own[end - 1] > math.log(1e-4)
        largest = max(largest, float((found[end - 1] - own[end - 1])[likely].abs().max()))
    assert largest < most
    places, wanted = torch.arange(len(ids) - 1, text.shape[1] - 1), text[0, len(ids) :]
    perplexities = [float((-logps[places, wanted].mean()).exp()) for logps in (found, own)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=rel)


def _server(llama_cpp: Any, path: Path) -> Any:
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 256, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup, settings.verbosity = False, 0
    return llama_cpp.Server(settings)


def test_llama_cpp_computes_what_we_do(tmp_path: Path) -> None:
    tool, path = _tool("WINNOW_LLAMACPP_BIN"), tmp_path / "m.gguf"
    loaded = load_policy(str(starter("policy")))
    write_gguf(path, loaded)
    found, own = _perplexity_of(tool, path), _perplexities(loaded.model, loaded)
    assert _is_among(found, own), (found, own)
