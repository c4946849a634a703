"""Which prompts are held out: decided by the prompt alone, so that none is in both splits, whatever else is there."""

import hashlib
from typing import Literal

Split = Literal["train", "test"]


def split_of(prompt_id: str, test_share: float, seed: int) -> Split:
    """The split of a prompt; about `test_share` of all prompts are in the test split.

    Growing the share moves prompts from train to test and none back.
    """
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_share * 2**64 else "train"
