"""A reward for the fault tests that stops in the fourth shard until it is let through, so that a fault always comes
in the middle of a run, however fast or slow the machine is."""

import os
import time
from pathlib import Path

from runtime.records import Prompt

GATE = "GATE_OF_TEST"
N_BEFORE = 3
SHARD_PROMPTS = 2
_seen: set[str] = set()


def n_letters(prompt: Prompt, response: str) -> float:
    """Longer is better; without the variable it never waits."""
    _seen.add(prompt.prompt_id)
    gate = os.environ.get(GATE)
    while gate and len(_seen) > N_BEFORE * SHARD_PROMPTS and not Path(gate).exists():
        time.sleep(0.05)
    return float(len(response))
