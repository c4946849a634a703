"""Which bytes are read for some neurons."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.edge.layout import ALIGN
from runtime.edge.reads import Limits, Ranges, read_starts


@given(
    wanted=st.sets(st.integers(0, 300), min_size=1, max_size=60),
    ranges=st.builds(
        Ranges,
        offset=st.integers(0, 3 * ALIGN),
        stride=st.sampled_from([64, 384, ALIGN, 3 * ALIGN]),
        n_bytes=st.integers(1, 64),
    ),
    limits=st.builds(
        Limits, gap=st.integers(0, 5), n_reads=st.integers(1, 9), n_bytes=st.integers(2, 9).map(lambda n: n * ALIGN)
    ),
)
def test_reads_are_aligned_bring_every_neuron_and_stay_within_the_limits(
    wanted: set[int], ranges: Ranges, limits: Limits
) -> None:
    positions = np.array(sorted(wanted), dtype=np.int64)
    found = read_starts(positions, ranges, limits)
    assert [(one.first, one.last + 1) for one in found] == list(
        zip([0] + [one.last + 1 for one in found[:-1]], [one.last + 1 for one in found], strict=True)
    )
    assert found[-1].last == len(positions) - 1
    for one in found:
        offset, at, length = one.reads.T
        assert 1 <= len(one.reads) <= limits.n_reads and length.sum() <= limits.n_bytes
        assert not (one.reads % ALIGN).any() and (at == np.cumsum(length) - length).all()
        for position, inside in zip(positions[one.first : one.last + 1], one.inside, strict=True):
            (here,) = np.flatnonzero((at <= inside) & (inside < at + length))
            assert offset[here] + inside - at[here] == ranges.offset + position * ranges.stride
            assert inside + ranges.n_bytes <= at[here] + length[here]


def test_neighbours_share_a_read_over_a_gap_and_no_further() -> None:
    positions, ranges = np.array([0, 1, 3, 6]), Ranges(0, ALIGN, ALIGN)
    for gap, n_reads in ((0, 3), (1, 2), (2, 1)):
        (found,) = read_starts(positions, ranges, Limits(gap, 9, 99 * ALIGN))
        assert len(found.reads) == n_reads
