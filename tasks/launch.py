"""Fine-tuning in several processes of this machine: started with torchrun, watched, and ended with us."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tasks.errors import ConfigError
from tasks.settings import FinetuneConfig
from tasks.versions import Step

if TYPE_CHECKING:
    from runtime.alignment.report import TrainingReport
    from runtime.records import Progress

ORDER, REPORT, MISTAKE, LOG = "launch.json", "report.json", "mistake.txt", "launch.log"
PROGRESS = "winnow-progress "


def train_together(step: Step, lake_root: str, work: Path, on_progress: "Progress") -> "TrainingReport":
    """Train in as many processes as configured, each on its part of every batch; the model ends in `work`.

    Up to rounding it is that of one process.
    """
    config = step.config
    assert isinstance(config, FinetuneConfig)
    for name in (REPORT, MISTAKE):
        (work / name).unlink(missing_ok=True)
    order = {"step": _plain(step), "lake": lake_root, "work": str(work)}
    (work / ORDER).write_text(json.dumps(order))
    code = _run(work, config.processes, on_progress, is_cpu=config.device == "cpu")
    if (work / MISTAKE).exists():
        raise ConfigError((work / MISTAKE).read_text())
    if code or not (work / REPORT).exists():
        raise RuntimeError(
            f"training in {config.processes} processes ended with code {code}: {_last_lines(work / LOG)}"
        )
    return read_report(work)


def write_report(report: "TrainingReport", work: Path) -> None:
    """For the process that waits."""
    (work / REPORT).write_text(json.dumps(asdict(report)))


def read_report(work: Path) -> "TrainingReport":
    """What the processes wrote."""
    from runtime.alignment.report import Point, TrainingReport, Warned

    found = json.loads((work / REPORT).read_text())
    found["points"] = [Point(**point) for point in found["points"]]
    found["warnings"] = [Warned(**warned) for warned in found["warnings"]]
    return TrainingReport(**found)


def read_order(work: Path) -> tuple[Step, str]:
    """What one process trains, with its share of every batch, and on which lake."""
    order = json.loads((work / ORDER).read_text())
    values = order["step"]
    config = FinetuneConfig.model_validate(values.pop("config"))
    share = config.model_copy(update={"batch_size": config.batch_size // config.processes})
    return Step(config=share, **values), order["lake"]


def _plain(step: Step) -> dict[str, object]:
    shared = {"stage": step.stage, "kind": step.kind, "name": step.name}
    return shared | {
        "config": step.config.model_dump(mode="json"),
        "inputs": dict(step.inputs),
        "models": dict(step.models),
    }


def _run(work: Path, processes: int, on_progress: "Progress", is_cpu: bool) -> int:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launch, "-m", "tasks.finetune_process", str(work)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    if is_cpu:
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    with (work / LOG).open("w") as log:
        # Nothing is written to it: its end tells the processes that this one is gone (tasks/finetune_process.py).
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        with process:
            try:
                _relay(process, on_progress, log)
                return process.wait()
            finally:
                if process.poll() is None:  # a cancelled run
                    process.terminate()


def _relay(process: "subprocess.Popen[str]", on_progress: "Progress", log: TextIO) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(PROGRESS):
            done, total = line.removeprefix(PROGRESS).split()
            on_progress(int(done), int(total))
        else:
            log.write(line)


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-600:]
