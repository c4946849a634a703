"""What an export costs in perplexity: predictors and weight formats on the starter, thresholds on a SiLU model.

    python tests/benchmarks/bench_edge_quality.py --prompts 200
    python tests/benchmarks/bench_edge_quality.py --silu ../shared/models/stories3m --texts STORIES.jsonl.gz
    python tests/benchmarks/bench_edge_quality.py --relufy ../shared/models/stories3m --texts STORIES.jsonl.gz

The starter is calibrated on its own answers and measured on those to other prompts.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from runtime.alignment.collate import PreferenceRow
from runtime.alignment.config import OfflineConfig, Places
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import PairRows, train_offline
from runtime.alignment.sparsity import SparsitySettings, relufied
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.edge.gguf import FILE_TYPES, GgufSettings, write_gguf
from runtime.edge.gguf_read import dense_model
from runtime.edge.network import shape_of
from runtime.edge.predictor import PredictorSettings, fit_predictors, gate_predictor
from runtime.edge.profile import ProfileSettings, cats_thresholds, profile
from runtime.edge.quality import as_stored, sparse_perplexity
from runtime.edge.quantise import row_bytes
from runtime.edge.text import Text, TokenBatch, batches, logits_of, perplexity
from runtime.models import LoadedModel, encode_answer, load_policy
from runtime.records import FINISHED, Message, Prompt
from runtime.starter import path, prompts_path

N = 4


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--silu", default="")
    parser.add_argument("--relufy", default="")
    parser.add_argument("--stories", type=int, default=2400, help="to train on, with --relufy")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of --relufy")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 10.0], help="sparsity_weight of --relufy")
    parser.add_argument("--texts", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.silu:
        thresholds(load_policy(options.silu), Path(options.texts))
        return
    if options.relufy:
        relufy(options.relufy, Path(options.texts), options)
        return
    loaded = load_policy(str(path("policy")))
    fitted, held_out = own_answers(loaded, options.prompts)
    predictors(loaded, fitted, held_out)
    weights(loaded, held_out)


def own_answers(loaded: LoadedModel, n_prompts: int) -> tuple[list[TokenBatch], list[TokenBatch]]:
    """Finished answers of the policy; every fourth prompt is held out."""
    rows = [json.loads(line) for line in prompts_path().read_text().splitlines()[:n_prompts]]
    prompts = [
        Prompt(str(i), tuple(Message(m["role"], m["content"]) for m in row["messages"]), row["group"])
        for i, row in enumerate(rows)
    ]
    engine = Engine(loaded, SamplingConfig(n=N, max_new_tokens=128, seed=3), CutSchedule(), None, 128, "chat")
    split: tuple[list[Text], list[Text]] = ([], [])
    for place, (prompt, answers) in enumerate(zip(prompts, engine.generate(prompts), strict=True)):
        for one in answers:
            if one.finish_reason in FINISHED:
                ids, n_prompt = encode_answer(loaded.tokenizer, prompt.messages, one.response, "chat")
                split[place % 4 == 0].append(Text(ids, n_prompt))
    return batches(split[0]), batches(split[1])


def predictors(loaded: LoadedModel, fitted: Sequence[TokenBatch], held_out: Sequence[TokenBatch]) -> None:
    """Recall, share of neurons, size and perplexity of predictors."""
    found = profile(loaded.model, fitted)
    nothing, base = [0.0] * found.shape.n_layers, perplexity(logits_of(loaded.model), held_out)
    active = sum(float(layer.frequency.mean()) for layer in found.layers) / len(found.layers)
    print(f"\nperplexity {base:.5f}, {active:.1%} of the neurons active, {found.n_tokens} tokens fitted to")
    print("| predictor | recall | predicted | kB per layer (float16) | perplexity |\n|---|---|---|---|---|")
    rows = [("oracle", 0, 1.0)] + [("low_rank", r, q) for r in (8, 16, 32) for q in (0.9, 0.99, 0.999)]
    for kind, rank, recall in [*rows, ("mlp", 8, 0.99), ("mlp", 16, 0.99)]:
        parts = fit_predictors(loaded.model, fitted, nothing, PredictorSettings(kind, rank, recall))  # type: ignore[arg-type]
        cost = sparse_perplexity(loaded.model, (parts, nothing), held_out) / base - 1
        mean = [
            sum(values) / len(parts) for values in zip(*((p.recall, p.predicted_active) for p in parts), strict=True)
        ]
        size = 2 * (parts[0].fc1.numel() + parts[0].fc2.numel()) / 1000
        name = kind if kind == "oracle" else f"{kind}, rank {rank}, asked for {recall:g}"
        print(f"| {name} | {mean[0]:.4f} | {mean[1]:.1%} | {size:.0f} | {cost:+.4%} |")


def weights(loaded: LoadedModel, held_out: Sequence[TokenBatch]) -> None:
    """Formats of a bundle's neurons, and GGUF files as transformers reads them."""
    base, hidden = perplexity(logits_of(loaded.model), held_out), shape_of(loaded.model).hidden
    print("\n| weights | bits | perplexity |\n|---|---|---|")
    for format, group in (("bfloat16", 32), ("int8", 32), ("int4", 32), ("int4", 16)):
        cost = perplexity(logits_of(as_stored(loaded.model, format, group)), held_out) / base - 1  # type: ignore[arg-type]
        bits = 8 * sum(row_bytes(hidden, format, group)) / hidden  # type: ignore[arg-type]
        print(f"| {format}{f', groups of {group}' if 'int' in format else ''} | {bits:.2f} | {cost:+.3%} |")
    with tempfile.TemporaryDirectory() as folder:
        for kind in FILE_TYPES:
            file = Path(folder) / f"{kind}.gguf"
            write_gguf(file, loaded, GgufSettings(kind))
            cost = perplexity(logits_of(dense_model(file)), held_out) / base - 1
            bits = 8 * file.stat().st_size / loaded.model.num_parameters()
            print(f"| GGUF {kind}, ReLU folded | {bits:.2f} | {cost:+.3%} |")


def thresholds(loaded: LoadedModel, texts: Path) -> None:
    """CATS on a SiLU model."""
    fitted, held_out = stories(loaded, read_stories(texts, 200))
    base, shape = perplexity(logits_of(loaded.model), held_out), shape_of(loaded.model)
    gates = [gate_predictor(shape)] * shape.n_layers
    print(f"\nperplexity {base:.4f}\n| left out | perplexity |\n|---|---|")
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        limits = cats_thresholds(loaded.model, fitted, share)
        cost = sparse_perplexity(loaded.model, (gates, limits), held_out) / base - 1
        found = profile(loaded.model, held_out, ProfileSettings(share))
        left_out = 1 - sum(float(layer.frequency.mean()) for layer in found.layers) / shape.n_layers
        print(f"| {left_out:.1%} | {cost:+.2%} |")


def read_stories(texts: Path, n: int) -> list[str]:
    """The first of a file."""
    with gzip.open(texts, "rt") as file:
        return [json.loads(next(file))["text"] for _ in range(n)]


def stories(loaded: LoadedModel, rows: Sequence[str]) -> tuple[list[TokenBatch], list[TokenBatch]]:
    """150 to fit to, 50 to measure on."""
    start = [loaded.tokenizer.bos_token_id]
    ids = [(start + loaded.tokenizer.encode(row, add_special_tokens=False))[:400] for row in rows]
    return batches([Text(row) for row in ids[:150]]), batches([Text(row) for row in ids[150:200]])


def relufy(model: str, texts: Path, options: argparse.Namespace) -> None:
    """A SiLU model as it is, with ReLU untrained, and after one pass over other stories."""
    rows = read_stories(texts, 200 + options.stories)
    sft = replace(SFT, learning_rate=options.learning_rate)
    print(f"{options.stories} stories, one pass, learning rate {options.learning_rate:g}")
    print("| training | perplexity | active | predictor | recall | predicted | exported |")
    print("|---|---|---|---|---|---|---|")
    arms = {"none (SiLU)": None, "none, ReLU put in": None, "SiLU": SparsitySettings()}
    for weight in options.weights:
        arms[f"relufy, sparsity_weight {weight:g}"] = SparsitySettings(True, weight)
    for name, sparsity in arms.items():
        loaded = load_policy(model)
        if sparsity is not None:
            with tempfile.TemporaryDirectory() as folder:
                pairs = [pair for number, row in enumerate(rows[200:]) if (pair := _story(number, row))]
                places = Places(Path(folder) / "model", Path(folder) / "work")
                train_offline(loaded, PairRows(pairs), replace(sft, sparsity=sparsity), places)
        elif "ReLU" in name:
            relufied(loaded.model)
        loaded.model.eval()
        print(f"| {name} | {_exported(loaded, rows[:200])} |", flush=True)


SFT = OfflineConfig(LossSettings("sft"), batch_size=8, max_length=400, prompt_format="text")


def _story(number: int, text: str) -> PreferenceRow | None:
    """Its first word asks for the rest; None for what has no second."""
    first, gap, rest = text.partition(" ")
    return PreferenceRow(str(number), "stories", (Message("user", first),), gap + rest, "-", None) if rest else None


def _exported(loaded: LoadedModel, rows: Sequence[str]) -> str:
    """Perplexity, share of active neurons, and what a predictor costs on top where there is ReLU."""
    fitted, held_out = stories(loaded, rows)
    found, base = profile(loaded.model, fitted), perplexity(logits_of(loaded.model), held_out)
    if found.shape.activation == "silu":
        return f"{base:.4f} | | | | |"
    active = sum(float(layer.frequency.mean()) for layer in found.layers) / len(found.layers)
    nothing = [0.0] * found.shape.n_layers
    parts = fit_predictors(loaded.model, fitted, nothing, PredictorSettings("auto"))
    cost = sparse_perplexity(loaded.model, (parts, nothing), held_out) / base - 1
    recall, predicted = (
        sum(values) / len(parts) for values in zip(*((p.recall, p.predicted_active) for p in parts), strict=True)
    )
    kinds = ", ".join(sorted({f"{p.kind} {len(p.fc1)}" if p.kind == "low_rank" else p.kind for p in parts}))
    return f"{base:.4f} | {active:.1%} | {kinds} | {recall:.4f} | {predicted:.1%} | {cost:+.4%}"


if __name__ == "__main__":
    main()
