"""Checkpoints: transformers writes weights, optimizer, schedule and random states; what is ours lies beside them.

Our file comes last and at once, so a checkpoint that has it is whole.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

STATE_FILE = "winnow.json"


def last_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint of a training's work folder."""
    whole = [path.parent for path in work.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def path_of(work: Path, step: int) -> Path:
    """Of the checkpoint behind a step."""
    return work / f"checkpoint-{step}"


def keep_only(work: Path, steps: Collection[int | None]) -> None:
    """Remove the checkpoints of other steps."""
    kept = {path_of(work, step) for step in steps if step is not None}
    for path in set(work.glob("checkpoint-*")) - kept:
        shutil.rmtree(path)


def write_state(checkpoint: Path, state: dict[str, object]) -> None:
    """Mark a checkpoint as whole, with our part of the state."""
    temporary = checkpoint / f".{STATE_FILE}"
    temporary.write_text(json.dumps(state))
    temporary.replace(checkpoint / STATE_FILE)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote."""
    return cast(dict[str, Any], json.loads((checkpoint / STATE_FILE).read_text()))
