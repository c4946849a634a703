"""One of several processes that fine-tune together; torchrun starts it, tasks/launch.py gives the order."""

import os
import sys
import threading
from pathlib import Path

from storage.lake import Lake
from tasks.errors import USER_ERRORS
from tasks.finetune import read_rows, train
from tasks.launch import MISTAKE, PROGRESS, read_order, write_report


def main(folder: str) -> None:
    """Train; the first process reports progress, the result, or the user's mistake."""
    import torch

    work = Path(folder)
    step, root = read_order(work)
    lake = Lake.open(root)
    is_first = os.environ["RANK"] == "0"

    def on_progress(done: int, total: int) -> None:
        if is_first:
            print(f"{PROGRESS}{done} {total}", flush=True)

    try:
        report = train(step, read_rows(step, lake), lake, work, on_progress)
    except USER_ERRORS as error:
        if is_first:
            (work / MISTAKE).write_text(str(error))
        sys.exit(2)
    if is_first:
        write_report(report, work)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # whose threads would outlive the interpreter


def end_with_parent() -> None:
    """End when the process that holds the other end of our standard input has; torchrun ends after us."""
    threading.Thread(target=_end_at_end_of_input, name="end-with-parent", daemon=True).start()


def _end_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1])
    sys.stdout.flush()
    # All is written. Threads of the process group and of the data libraries have aborted an interpreter that ended.
    os._exit(0)
