"""Counter-based random numbers: each is a pure hash of (seed, prompt_id, candidate_index, position, token id).

Nothing here has state, so a number does not depend on batch shape, row order, refills, cuts or restarts.
"""

import hashlib

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_BITS = 40  # resolution of the uniform numbers, see gumbel


def _signed(value: int) -> int:
    """The same 64 bits as a torch int64."""
    value &= _MASK_64
    return value - (1 << 64) if value >= 1 << 63 else value


# Odd constants of splitmix64; products wrap around in int64, which is what the hash wants.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)


def row_key(seed: int, prompt_id: str, candidate_index: int) -> int:
    """64-bit key of one candidate, as a signed integer that fits a torch int64."""
    text = f"{seed}\0{candidate_index}\0{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def gumbel(keys: Tensor, position: Tensor, token_ids: Tensor | int) -> Tensor:
    """Standard Gumbel noise, float32 of shape (rows, k).

    keys and position are int64 of shape (rows,). token_ids is int64 of shape (rows, k), or a vocabulary size, which
    means every id below it. argmax(logits + noise) then samples from softmax(logits).
    """
    # Large noise comes from small uniform numbers, where float32 is dense: the tail stays exact for rare tokens.
    return uniform(keys, position, token_ids).neg_().log1p_().neg_().log_().neg_()


def uniform(keys: Tensor, position: Tensor, token_ids: Tensor | int) -> Tensor:
    """Numbers between 0 and 1, both excluded, float32 of shape (rows, k); see gumbel."""
    vocabulary = torch.arange(token_ids, device=keys.device)[None] if isinstance(token_ids, int) else token_ids
    per_row = _mix(keys + _mix((position + 1) * _GOLDEN))[:, None]  # (rows, 1)
    bits = _mix(per_row + _mix((vocabulary + 1) * _GOLDEN))  # (rows, k)
    bits.bitwise_right_shift_(64 - _BITS).bitwise_and_((1 << _BITS) - 1)
    return bits.to(torch.float32).add_(0.5).mul_(2.0**-_BITS).clamp_(max=1 - 2.0**-24)


def _mix(values: Tensor) -> Tensor:
    """The splitmix64 finaliser; `values` is overwritten (every caller passes a temporary)."""
    values = _xor_shift(values, 30).mul_(_MULTIPLY_1)
    values = _xor_shift(values, 27).mul_(_MULTIPLY_2)
    return _xor_shift(values, 31)


def _xor_shift(values: Tensor, by: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it the logical shift of the published hash.
    return values.bitwise_xor_(torch.bitwise_right_shift(values, by).bitwise_and_((1 << (64 - by)) - 1))
