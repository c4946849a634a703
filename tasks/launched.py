"""One of several processes that train together; torchrun starts it, tasks/launch.py gives the order."""

import json
import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from storage.lake import Lake
from tasks import align, finetune
from tasks.errors import USER_ERRORS
from tasks.launch import MISTAKE, REPORT, TOLD, read_order
from tasks.settings import AlignConfig, FinetuneConfig
from tasks.versions import Step

if TYPE_CHECKING:
    from runtime.alignment.online.training import Look, OnlineReport
    from runtime.alignment.report import TrainingReport


def main(folder: str) -> int:
    """Train; the first process reports progress and the result, whichever meets it the user's mistake."""
    import torch

    work = Path(folder)
    step, root = read_order(work)
    try:
        report = _train(step, Lake.open(root), work)
    except USER_ERRORS as error:
        # Most are met by all, such as settings that do not fit the data; an answer of one alone may be one too.
        with suppress(FileExistsError), (work / MISTAKE).open("x") as file:
            file.write(str(error))
        return 2
    if _is_first():
        (work / REPORT).write_text(json.dumps(asdict(report)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # whose threads would outlive the interpreter
    return 0


def end_with_parent() -> None:
    """End when the process that holds the other end of our standard input has; torchrun ends after us."""
    threading.Thread(target=_end_at_end_of_input, name="end-with-parent", daemon=True).start()


def _train(step: Step, lake: Lake, work: Path) -> "TrainingReport | OnlineReport":
    def on_progress(done: int, total: int) -> None:
        _tell("progress", done, total)

    config = step.config
    if isinstance(config, AlignConfig):

        def on_look(look: "Look") -> None:
            align.look_file(work, look.step).write_text(json.dumps(asdict(look)))
            _tell("look", look.step)

        _join(config.device)
        task = align.task_of(step, lake, align.read_prompts(step, lake), on_look)
        return align.train(step, task, lake, work, on_progress)
    assert isinstance(config, FinetuneConfig)
    share = config.model_copy(update={"batch_size": config.batch_size // config.processes})
    step = replace(step, config=share)
    return finetune.train(step, finetune.read_rows(step, lake), lake, work, on_progress)


def _join(device: str) -> None:
    """The other processes; each that uses a GPU takes its own. (transformers' Trainer does it by itself.)"""
    import torch

    from runtime.hardware import pick_device

    is_cpu = pick_device(device) == "cpu"
    if not is_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if is_cpu else "nccl")


def _is_first() -> bool:
    return os.environ["RANK"] == "0"


def _tell(word: str, *numbers: int) -> None:
    if _is_first():
        print(f"{TOLD}{word}", *numbers, flush=True)


def _end_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    end_with_parent()
    code = main(sys.argv[1])
    sys.stdout.flush()
    # All is written. Threads of the process group and of the data libraries have aborted an interpreter that ended.
    os._exit(code)
