"""DPO with precomputed reference log-probabilities: steps per second and peak memory, ours against TRL's DPOTrainer.

    .venv/bin/python tests/benchmarks/bench_offline.py [--steps 3] [--repeats 3] [--trl-python PATH]
    .venv/bin/python tests/benchmarks/bench_offline.py --arm start [--repeats 3]

A random Llama of 15M parameters with a vocabulary of 32,000; pairs of 2 x 512 tokens, half of them the prompt's, 8 per
step; AdamW, float32. Each arm trains in a process of its own, by turns. TRL may live in another environment.
memory: peak of the process; above start: without what it had before training. CPU: seconds of all threads per step.
start: from the start of a fresh process to the end of its first step, with HF_HUB_OFFLINE=1; imports, the starter's
weights and the reference's pass over 64 pairs are in it.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import options, show
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

VOCABULARY = 32_000
ARMS = ("winnow", "trl")


def main() -> None:
    settings = options(
        __doc__, steps=3, batch=8, tokens=512, prompt=256, trl_python=sys.executable, arm="", checkpointing=0
    )
    if settings.arm == "start":
        show("start", settings, [start_up(settings) for _ in range(settings.repeats)])
        return
    if settings.arm == "first step":
        first_step()
        return
    if settings.arm:
        print(json.dumps(train(settings)))
        return
    rows: list[dict[str, object]] = []
    for is_checkpointing in (False, True):
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(settings.repeats):
            for arm in ARMS:
                measured = run_apart(settings, arm, is_checkpointing)
                found[arm] += [measured] if measured else []
        rows += table(found, is_checkpointing)
    show("offline", settings, rows)


def run_apart(settings: Any, arm: str, is_checkpointing: bool) -> dict[str, float] | None:
    """One arm in a fresh process; None where TRL is not installed."""
    python = settings.trl_python if arm == "trl" else sys.executable
    if arm == "trl" and subprocess.run([python, "-c", "import trl"], capture_output=True).returncode:
        return None
    sizes = ("steps", "batch", "tokens", "prompt", "threads")
    given = [part for name in sizes for part in (f"--{name}", str(getattr(settings, name)))]
    command = [python, __file__, "--arm", arm, "--checkpointing", str(int(is_checkpointing)), *given]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(settings.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def start_up(settings: Any) -> dict[str, object]:
    """Seconds of wall time and of CPU of one fresh process up to its first step."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(settings.threads)
    started = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--arm", "first step"], capture_output=True, text=True, env=environment, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {"model": "starter", "s to first step": found["at"] - started, "CPU s": found["cpu"]}


def first_step() -> None:
    """Print when the first step of a training is over, and end."""
    from runtime.alignment.collate import PreferenceRow
    from runtime.alignment.config import OfflineConfig, Places
    from runtime.alignment.offline import Helpers, PairRows, train_offline
    from runtime.models import load_policy
    from runtime.records import Message
    from runtime.starter import path

    def stop(done: int, total: int) -> None:
        print(json.dumps({"at": time.time(), "cpu": time.process_time()}), flush=True)
        raise SystemExit

    rows = [PreferenceRow(str(i), "all", (Message("user", f"{i} + 1"),), f"{i + 1}", f"{i + 2}") for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        config, places = OfflineConfig(batch_size=8, max_length=256), Places(Path(folder, "out"), Path(folder, "work"))
        train_offline(load_policy(str(path("policy"))), PairRows(rows), config, places, Helpers(stop))


def table(found: dict[str, list[dict[str, float]]], is_checkpointing: bool) -> list[dict[str, object]]:
    """Medians per arm, and what ours are of TRL's."""
    rows: list[dict[str, object]] = []
    for arm, runs in found.items():
        row: dict[str, object] = {"arm": arm, "checkpointing": is_checkpointing}
        row |= {key: statistics.median(run[key] for run in runs) for key in runs[0]} if runs else {"steps/s": "no TRL"}
        rows.append(row)
    ours, theirs = rows
    if found["trl"]:
        for key in ("steps/s", "CPU s", "MB", "MB above start"):
            ours[f"{key} / TRL's"] = float(ours[key]) / float(theirs[key])  # type: ignore[arg-type]
    return rows


class Clock(TrainerCallback):
    """Time of each optimizer step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The start of the first."""
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end of each."""
        self.marks.append((time.perf_counter(), time.process_time()))


def train(settings: Any) -> dict[str, float]:
    """Train one arm; the first step is not counted."""
    model, clock = small_llama(), Clock()
    if settings.arm == "trl":
        from trl import DPOTrainer  # noqa: F401  (what the code takes is no part of what training takes)
    else:
        import runtime.alignment.trainer  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        before = resident_mb()
        arm = train_trl if settings.arm == "trl" else train_winnow
        arm(settings, model, clock, Path(folder))
    steps = len(clock.marks) - 2
    wall, cpu = (clock.marks[-1][i] - clock.marks[1][i] for i in range(2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"steps/s": steps / wall, "CPU s": cpu / steps, "MB": peak, "MB above start": peak - before}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def token_rows(settings: Any) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of every pair; an answer ends with the end token."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()

    n_answer = settings.tokens - settings.prompt - 1
    count = settings.steps * settings.batch
    return [(draw(settings.prompt), [*draw(n_answer), 2], [*draw(n_answer), 2]) for _ in range(count)]


def train_winnow(settings: Any, model: LlamaForCausalLM, clock: Clock, folder: Path) -> None:
    from runtime.alignment.arguments import training_arguments
    from runtime.alignment.collate import EncodedPair
    from runtime.alignment.config import OfflineConfig, Places
    from runtime.alignment.items import Item
    from runtime.alignment.losses import LossSettings
    from runtime.alignment.objective import PolicyObjective
    from runtime.alignment.trainer import OfflineTrainer, Split

    config = OfflineConfig(
        LossSettings("dpo"), batch_size=settings.batch, gradient_checkpointing=bool(settings.checkpointing)
    )
    rows = token_rows(settings)
    pairs = [EncodedPair("all", prompt + chosen, prompt + rejected, len(prompt)) for prompt, chosen, rejected in rows]
    objective = PolicyObjective(config.loss, 0)
    items = [Item(pair, 0) for pair in pairs]
    items = objective.prepare(model.eval(), items, config.batch_size, lambda pairs, compute: compute(pairs))
    arguments = training_arguments(config, len(items), Places(folder / "out", folder / "work"), model.device)
    trainer = OfflineTrainer(model, objective, Split(items, [], ("all",)), config, arguments)
    trainer.add_callback(clock)
    trainer.train()


def train_trl(settings: Any, model: LlamaForCausalLM, clock: Clock, folder: Path) -> None:
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    special = dict(zip(("<pad>", "<start>", "<end>", "<unknown>"), range(4), strict=True))
    vocabulary = special | {f"t{i}": i for i in range(4, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    sides = ("prompt", "chosen", "rejected")
    texts = [
        # TRL puts the end token behind an answer itself.
        {side: " ".join(f"t{i}" for i in ids if i != 2) for side, ids in zip(sides, row, strict=True)}
        for row in token_rows(settings)
    ]
    config = DPOConfig(
        str(folder),
        per_device_train_batch_size=settings.batch,
        num_train_epochs=1,
        learning_rate=1e-6,
        max_length=settings.tokens,
        precompute_ref_log_probs=True,
        gradient_checkpointing=bool(settings.checkpointing),
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{**row, "prompt": row["prompt"] + " "} for row in texts])
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])
    lengths = {len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in trainer.train_dataset}
    assert lengths == {settings.tokens}, f"TRL trains on {lengths} tokens, not on {settings.tokens}"
    trainer.train()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
