"""A training's state as files: tensors in safetensors, numbers in JSON, which comes last and makes them whole."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.alignment.checkpoints import last_checkpoint, read_state, write_state
from runtime.alignment.online.players import Players, load_tensors
from runtime.errors import ModelError

TENSORS_FILE = "online.safetensors"


def save_state(work: Path, step: int, players: Players, optimizer: torch.optim.Optimizer, own: dict[str, Any]) -> None:
    """Write checkpoint-STEP; the one before the last is removed once this one is whole."""
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: one.detach().to("cpu").contiguous().clone() for name, one in _tensors(players, optimizer).items()}
    save_file(kept, folder / TENSORS_FILE)
    write_state(folder, {"step": step, **own})
    older = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[:-2]
    for path in older:
        shutil.rmtree(path)


def load_state(work: Path, players: Players, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Go on from the newest whole checkpoint; its numbers, or None where there is none.

    ModelError for tensors of other names or shapes: they are of another training.
    """
    folder = last_checkpoint(work)
    if folder is None:
        return None
    state = read_state(folder)
    try:
        found = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} is no whole checkpoint ({str(error).splitlines()[0]}); remove it") from error
    if state["step"]:
        _begin(optimizer)
    expected = _tensors(players, optimizer)
    for name in sorted(set(expected) | set(found)):
        here, there = _shape(expected, name), _shape(found, name)
        if here != there:
            raise ModelError(f"{folder}: {name} is {there}, but this training has {here}; remove it to start anew")
    load_tensors(expected, found)
    return state


def _tensors(players: Players, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a step changes, the optimizer's moments included."""
    trained = players.trained()
    found: dict[str, Tensor] = {f"weight.{name}": one.data for name, one in trained.items()}
    for name, one in trained.items():
        for key, value in optimizer.state.get(one, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    if players.anchor is not None:
        found |= {f"anchor.{name}": one.data for name, one in players.anchored().items()}
    return found


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Give an AdamW that has not stepped yet the tensors that the first step would."""
    for group in optimizer.param_groups:
        for one in group["params"]:
            zeros = {
                key: torch.zeros_like(one, memory_format=torch.preserve_format) for key in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[one] = {"step": torch.tensor(0.0), **zeros}


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "not there"
