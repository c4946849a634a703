"""Reads that the kernel does while the caller goes on."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime.edge import batched
from runtime.edge.batched import MOST, Batch

PAGE = 4096


def _opened(file: int, memory: mmap.mmap) -> Batch:
    try:
        return Batch(file, memory)
    except OSError as error:
        pytest.skip(f"this system has no asynchronous I/O: {error}")


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Of the file."""
    found = np.random.default_rng(0).integers(0, 256, 64 * PAGE, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(found)
    return found


@pytest.fixture
def memory() -> mmap.mmap:
    """Of the reads."""
    return mmap.mmap(-1, 4 * MOST * PAGE)


@pytest.fixture
def batch(content: bytes, memory: mmap.mmap, tmp_path: Path) -> Iterator[Batch]:
    """On the file."""
    file = os.open(tmp_path / "file", os.O_RDONLY)
    found = _opened(file, memory)
    try:
        yield found
    finally:
        found.close()
        os.close(file)


@pytest.mark.parametrize("n", [1, 7, MOST, 2 * MOST + 3])
def test_every_read_brings_its_bytes(n: int, batch: Batch, memory: mmap.mmap, content: bytes) -> None:
    rng = np.random.default_rng(n)
    pages = rng.integers(0, 60, n).tolist()
    reads = np.array([(page * PAGE, i * PAGE, PAGE) for i, page in enumerate(pages)])
    flights = [batch.start(part) for part in np.array_split(reads, -(-n // MOST))]
    assert all(flight.wait() for flight in flights) and all(flight.done() for flight in flights)
    for offset, at, length in reads.tolist():
        assert memory[at : at + length] == content[offset : offset + length]


def test_reads_of_any_length_do_not_touch_what_lies_beside(batch: Batch, memory: mmap.mmap, content: bytes) -> None:
    assert batch.start(np.array([(5, 100, 1), (PAGE, 300, 700), (9, 2000, 3)])).wait()
    assert memory[100:101] == content[5:6] and memory[300:1000] == content[PAGE : PAGE + 700]
    assert memory[:100] == bytes(100) and memory[101:300] == bytes(199) and memory[1000:2000] == bytes(1000)


def test_a_read_past_the_end_is_not_whole(batch: Batch, content: bytes) -> None:
    short = batch.start(np.array([(0, 0, PAGE), (len(content) - 10, PAGE, PAGE), (0, 2 * PAGE, PAGE)]))
    whole = batch.start(np.array([(0, 3 * PAGE, PAGE)]))
    assert whole.wait() and not short.wait()


def test_a_file_that_cannot_be_read_is_an_error_and_nothing_is_left_under_way(
    memory: mmap.mmap, tmp_path: Path, content: bytes
) -> None:
    file = os.open(tmp_path / "file", os.O_WRONLY)
    batch = _opened(file, memory)
    with pytest.raises(OSError, match="Bad file descriptor"):
        batch.start(np.array([(0, 0, PAGE)]))
    assert batch.start(np.empty((0, 3), dtype=np.int64)).done()
    batch.close()
    os.close(file)


def test_elsewhere_there_is_none(memory: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "_CALLS", {})
    with pytest.raises(OSError, match="no asynchronous I/O here"):
        Batch(0, memory)
