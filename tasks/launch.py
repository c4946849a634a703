"""Training in several processes of this machine: started with torchrun, watched, and ended with us."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tasks.errors import ConfigError
from tasks.settings import AlignConfig, FinetuneConfig
from tasks.versions import Step

Trained = FinetuneConfig | AlignConfig
Heard = Mapping[str, Callable[..., None]]  # by the word that the first process tells; called with its numbers

ORDER, REPORT, MISTAKE, LOG = "launch.json", "report.json", "mistake.txt", "launch.log"
TOLD = "winnow-told "
MODULE = "tasks.launched"
OWN = "/torch/distributed/elastic/"  # lines of torchrun's log
FAILED = re.compile(rf"^.*{OWN}.* failed \(exitcode: (-?\d+)\) local_rank: (\d+)", re.MULTILINE)
CONFIGS: Mapping[str, type[Trained]] = {"finetune": FinetuneConfig, "align": AlignConfig}


@dataclass(frozen=True, slots=True)
class Processes:
    """How many, with how many threads each, and whether they meet on the CPU."""

    count: int
    threads: int
    is_cpu: bool


def train_together(step: Step, lake_root: str, work: Path, heard: Heard) -> dict[str, Any]:
    """Train in as many processes as configured, each on its part of every batch; what they report. The model ends in
    `work`.

    Up to rounding it is that of one process.
    """
    config = step.config
    assert isinstance(config, Trained)
    processes = _processes(config)
    for name in (REPORT, MISTAKE):
        (work / name).unlink(missing_ok=True)
    order = {"step": _plain(step), "lake": lake_root}
    (work / ORDER).write_text(json.dumps(order))
    code = _run(work, processes, heard)
    if (work / MISTAKE).exists():
        raise ConfigError((work / MISTAKE).read_text())
    if code or not (work / REPORT).exists():
        raise RuntimeError(
            f"training in {config.processes} processes ended with code {code}: {_last_lines(work / LOG)}"
        )
    found: dict[str, Any] = json.loads((work / REPORT).read_text())
    return found


def revived(found: dict[str, Any], parts: Mapping[str, type]) -> dict[str, Any]:
    """Fields of a dataclass that went through JSON, with the lists that hold dataclasses again."""
    return found | {name: [kind(**one) for one in found[name]] for name, kind in parts.items()}


def read_order(work: Path) -> tuple[Step, str]:
    """What the processes train, and on which lake."""
    order = json.loads((work / ORDER).read_text())
    values = order["step"]
    config = CONFIGS[values["stage"]].model_validate(values.pop("config"))
    return Step(config=config, **values), order["lake"]


def _plain(step: Step) -> dict[str, object]:
    shared = {"stage": step.stage, "kind": step.kind, "name": step.name}
    return shared | {
        "config": step.config.model_dump(mode="json"),
        "inputs": dict(step.inputs),
        "models": dict(step.models),
    }


def _processes(config: Trained) -> Processes:
    """ConfigError where there are fewer GPUs than processes."""
    import torch

    from runtime.hardware import pick_device

    is_cpu = pick_device(config.device) == "cpu"
    if not is_cpu and torch.cuda.device_count() < config.processes:
        raise ConfigError(
            f"processes = {config.processes}: each needs a GPU of its own, and there are {torch.cuda.device_count()}; "
            'lower it, or set device = "cpu"'
        )
    return Processes(config.processes, max(1, config.threads // config.processes), is_cpu)


def _run(work: Path, processes: Processes, heard: Heard) -> int:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes.count)]
    command = [sys.executable, *launch, "-m", MODULE, str(work)]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": str(processes.threads),
    }
    if processes.is_cpu:
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    with (work / LOG).open("w") as log:
        # Nothing is written to it: its end tells the processes that this one is gone (tasks/launched.py).
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        with process:
            try:
                _relay(process, heard, log)
                return process.wait()
            finally:
                if process.poll() is None:  # a cancelled run
                    process.terminate()
                    process.wait()  # `with` does not, after a Ctrl-C, and the next attempt uses the same files


def _relay(process: "subprocess.Popen[str]", heard: Heard, log: TextIO) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(TOLD):
            word, *numbers = line.removeprefix(TOLD).split()
            heard[word](*map(int, numbers))
        else:
            log.write(line)


def _last_lines(log: Path) -> str:
    """Which process failed and what was said before: torchrun tells the first at length and covers up the second."""
    text = log.read_text(errors="replace")
    failed = FAILED.search(text)
    said = [line for line in text[: failed.start() if failed else None].splitlines() if OWN not in line]
    which = f"process {failed[2]} failed with code {failed[1]} | " if failed else ""
    return which + " | ".join(line.strip() for line in said[-3:])[-600:]
