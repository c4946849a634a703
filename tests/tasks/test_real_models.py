"""The chain on public models and stories next to the repository; skipped where they are absent."""

import gzip
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.records import Prompt
from storage.lake import Lake
from tasks.settings import PipelineConfig
from tests.tasks.test_chain import run_chain

SHARED = Path(__file__).resolve().parents[3] / "shared"
SENTIMENT = SHARED / "models" / "imdb-sentiment-avgwordvec"
STORIES = SHARED / "data" / "tinystories" / "tinystories_5k.jsonl.gz"
POLICY = SHARED / "models" / "stories3m"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared with models and data, which is absent"),
]


@lru_cache
def _sentiment_model() -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    pairs = (line.split() for line in (SENTIMENT / "vocab.txt").read_text().splitlines() if line.strip())
    return load_file(SENTIMENT / "model.safetensors"), {word: int(index) for word, index in pairs}


def positive_sentiment(prompt: Prompt, response: str) -> float:
    """Probability that a text is positive, by a small public classifier of film reviews."""
    weights, vocabulary = _sentiment_model()
    words = re.findall(r"[a-z0-9']+", response.lower())
    ids = [1, *(vocabulary.get(word, 2) for word in words)][:256]
    mean = weights["embedding.weight"][ids + [0] * (256 - len(ids))].mean(dim=0)
    hidden = torch.relu(weights["dense.weight"].reshape(16, 16) @ mean + weights["dense.bias"])
    logits = weights["dense_1.weight"].reshape(2, 16) @ hidden + weights["dense_1.bias"]
    return float(logits.softmax(dim=0)[1])


def _stories(path: Path, count: int) -> Path:
    with gzip.open(STORIES, "rt") as file:
        texts = [json.loads(next(file))["text"] for _ in range(count)]
    rows = [{"text": re.split(r"(?<=[.!?])\s", text.strip())[0], "group": "ab"[i % 2]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "reward",
    [
        {"reward": "likelihood", "reward_model": str(POLICY)},
        {"reward": "function", "reward_function": f"{__name__}:positive_sentiment"},
    ],
    ids=["likelihood", "sentiment"],
)
def test_the_chain_runs_on_a_public_story_model(reward: dict[str, str], tmp_path: Path) -> None:
    common = {**reward, "prompt_format": "text", "threads": 1}
    config = PipelineConfig.model_validate(
        {
            "name": "stories",
            "ingest": {"source": str(_stories(tmp_path / "p.jsonl", 12)), "heldout_fraction": 0.3},
            "generate": {
                **common,
                "model": str(POLICY),
                "n": 4,
                "max_new_tokens": 32,
                "cut_tokens": [8],
                "cut_keep": [0.5],
            },
            "score": common,
            "finetune": {
                "model": str(POLICY),
                "prompt_format": "text",
                "epochs": 1,
                "threads": 1,
                "learning_rate": 1e-4,
            },
            "evaluate": {**common, "samples": 2, "max_new_tokens": 32, "truth": "none"},
            "export": {"prompt_format": "text", "weight_format": "float32", "sparsity": 0.1, "max_perplexity_delta": 5},
        }
    )
    lake = run_chain(config, str(tmp_path / "lake"))
    candidates = lake.read_table(lake.resolve("candidates/stories"), "candidates").to_pylist()
    assert {row["status"] for row in candidates} == {"ok"}
    assert {"cut", "length"} <= {row["finish_reason"] for row in candidates}
    pairs = lake.read_table(lake.resolve("preferences/stories"), "preferences")
    assert pairs.num_rows > 0
    metrics = Lake.open(lake.root).read_table(lake.resolve("candidates/stories-evaluation"), "metrics").to_pylist()
    assert {row["model"] for row in metrics} == {"before", "after"}
    quality = lake.manifest(lake.resolve("bundles/stories")).stats
    assert quality["format"] == "bundle"


def test_the_sentiment_function_gives_its_published_examples() -> None:
    prompt = Prompt("p", (), "g")
    good = positive_sentiment(prompt, "This movie was wonderful, I loved every minute of it.")
    bad = positive_sentiment(prompt, "Terrible. A boring waste of time, the worst film I have seen.")
    assert (round(good, 3), round(bad, 3)) == (0.719, 0.037)
