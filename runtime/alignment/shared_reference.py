"""The reference's log-probabilities in several processes: each computes a part, the first alone asks the store."""

from collections.abc import Sequence
from typing import cast

import torch.distributed as dist

from runtime.alignment.encode import EncodedPair
from runtime.alignment.reference import Compute, Logps, References


def shared(references: References) -> References:
    """The same log-probabilities in every process; all of them must ask, in the same order."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return references

    def ask(split: str, pairs: Sequence[EncodedPair], compute: Compute) -> list[Logps]:
        if dist.get_rank() == 0:
            found = references(split, pairs, lambda wanted: _together(_told(list(wanted)), compute))
            _told(None)  # nothing more to compute
            return cast(list[Logps], _told(found))
        while (wanted := _told(None)) is not None:
            _together(wanted, compute)
        return cast(list[Logps], _told(None))

    return ask


def _told(value: object) -> "list[EncodedPair] | list[Logps] | None":
    """The first process's value, in all of them."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return cast("list[EncodedPair] | list[Logps] | None", box[0])


def _together(wanted: object, compute: Compute) -> list[Logps]:
    pairs, n_processes = cast(list[EncodedPair], wanted), dist.get_world_size()
    parts: list[list[Logps]] = [[] for _ in range(n_processes)]
    dist.all_gather_object(parts, compute(pairs[dist.get_rank() :: n_processes]))
    return [parts[place % n_processes][place // n_processes] for place in range(len(pairs))]
