"""Checkpoints: transformers writes weights, optimizer, schedule and random states; what is ours lies beside them.

Our file comes last and at once, so a checkpoint that has it is whole.
"""

import json
from pathlib import Path
from typing import Any, cast

STATE_FILE = "winnow.json"


def last_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint of a training's work folder."""
    whole = [path.parent for path in work.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def write_state(checkpoint: Path, state: dict[str, object]) -> None:
    """Mark a checkpoint as whole, with our part of the state."""
    temporary = checkpoint / f".{STATE_FILE}"
    temporary.write_text(json.dumps(state))
    temporary.replace(checkpoint / STATE_FILE)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote."""
    return cast(dict[str, Any], json.loads((checkpoint / STATE_FILE).read_text()))
