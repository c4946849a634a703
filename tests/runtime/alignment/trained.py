"""Small trainings for the tests here, in this process or (`python -m tests.runtime.alignment.trained`) in others."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from runtime.alignment.collate import PreferenceRow
from runtime.alignment.config import LoraSettings, OfflineConfig, Places, RewardSettings, Watch
from runtime.alignment.groups import GroupSettings
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import Helpers, PairRows, train_offline
from runtime.alignment.report import TrainingReport
from runtime.models import LoadedModel, load_policy, load_reward_start
from runtime.records import Message

DPO = OfflineConfig(learning_rate=3e-3, epochs=4, batch_size=4, max_length=128)
ROBUST = replace(DPO, groups=GroupSettings("robust", step_size=0.5))
LORA = replace(DPO, lora=LoraSettings(4, 8), learning_rate=1e-2)
CONFIGS = {"full": ROBUST, "lora": replace(LORA, groups=ROBUST.groups)}
CONFIGS["token level"] = replace(ROBUST, loss=LossSettings("tdpo2"))
CONFIGS["accumulated"] = replace(ROBUST, batch_size=3, gradient_accumulation=2)
CONFIGS["early stopping"] = replace(ROBUST, watch=Watch(eval_steps=2, early_stopping=3, save_steps=2))
CONFIGS["kto"] = replace(ROBUST, loss=LossSettings("kto"))
# The processes of a data-parallel training share each batch.
PARALLEL = replace(ROBUST, learning_rate=1e-3, epochs=2, batch_size=4)
SHARED = {
    "dpo": PARALLEL,
    "accumulated": replace(PARALLEL, gradient_accumulation=2),
    "sft": replace(PARALLEL, loss=LossSettings("sft")),
    "kto": replace(PARALLEL, loss=LossSettings("kto")),
    "tdpo2": replace(PARALLEL, loss=LossSettings("tdpo2")),
    "lora": replace(PARALLEL, lora=LoraSettings(4, 8), learning_rate=1e-2),
    "reward": replace(PARALLEL, loss=RewardSettings()),
}
for name, config in SHARED.items():
    CONFIGS[f"{name} by one"], CONFIGS[f"{name} by two"] = config, replace(config, batch_size=config.batch_size // 2)
N_SHARED = 13  # pairs: of the last batch, the second process gets none


def rows(count: int = 10, groups: tuple[str, ...] = ("child", "clerk")) -> list[PreferenceRow]:
    """Pairs of different lengths, their groups in turn; some groups have harder ones."""
    return [
        PreferenceRow(
            f"p{i}",
            groups[i % len(groups)],
            (Message("user", f"{i} + 1"),),
            f"yes {i}" * (1 + i % 3),
            f"no {i}" + "!" * (i % len(groups)),
            float(1 + i % 2),
        )
        for i in range(count)
    ]


def train(loaded: LoadedModel, output: Path, config: OfflineConfig, data: PairRows | None = None) -> TrainingReport:
    """Train on `rows()`, with checkpoints beside the model."""
    return train_offline(loaded, data or PairRows(rows()), config, Places(output, output / "work"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a model that was written."""
    return load_file(folder / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    """Over all weights of two models."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def main(kind: str, model: str, output: str, save_steps: str, killed_at: str) -> None:
    """Train one of CONFIGS (`by one`, `by two`: all that are SHARED); die behind step `killed_at` (0: live)."""
    torch.set_num_threads(1)
    steps = int(save_steps), int(killed_at)
    if kind in CONFIGS:
        _train(kind, model, Path(output), steps)
    else:
        for name in SHARED:
            _train(f"{name} {kind}", model, Path(output, name), steps)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # whose threads would outlive the interpreter


def _train(kind: str, model: str, folder: Path, steps: tuple[int, int]) -> None:
    save_steps, killed_at = steps
    config = CONFIGS[kind]
    if not config.watch.save_steps:
        config = replace(config, watch=Watch(save_steps=save_steps))

    def on_progress(done: int, total: int) -> None:
        if done == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    places = Places(folder, folder / "work")
    data = PairRows(rows(N_SHARED if " by " in kind else 16), rows(6))
    load = load_reward_start if config.method == "reward" else load_policy
    report = train_offline(load(model), data, config, places, Helpers(on_progress))
    if os.environ.get("RANK", "0") == "0":
        points = [[p.step, p.split, p.group, p.metric, p.value] for p in report.points]
        (folder / "report.json").write_text(json.dumps({"points": points, "tokens": report.n_tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
