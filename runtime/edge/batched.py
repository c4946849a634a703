"""Many reads that are given to the kernel at once: Linux's asynchronous I/O, where the system has it.

One call starts all of them and one waits for them, so that a disk sees a whole batch and Python's lock is asked for
twice; a read of 16 KiB costs a third of the processor time of a `preadv`.
"""

import ctypes
import mmap
import os
import platform
import sys
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

# io_setup, io_destroy, io_getevents, io_submit
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
_REQUEST = np.dtype(  # struct iocb of linux/aio_abi.h, in little-endian order
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<u4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("file", "<u4"),
        ("memory", "<u8"),
        ("length", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_file", "<u4"),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("result2", "<i8")])
MOST = 256  # requests at once

Reads = NDArray[np.int64]  # (n, 3): offset in the file, start in memory, bytes


class Batch:
    """Reads of one file into one memory, by one thread at a time. OSError where the system has no such thing."""

    def __init__(self, file: int, memory: mmap.mmap) -> None:
        if sys.platform != "linux" or platform.machine() not in _CALLS:
            raise OSError("no asynchronous I/O here")
        self._setup, self._destroy, self._get, self._put = _CALLS[platform.machine()]
        self._library = ctypes.CDLL(None, use_errno=True)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._requests = np.zeros(MOST, dtype=_REQUEST)
        self._requests["file"] = file  # opcode 0 is pread
        self._pointers = self._requests.ctypes.data + np.arange(MOST, dtype=np.uint64) * _REQUEST.itemsize
        self._events = np.zeros(MOST, dtype=_EVENT)
        self._context = ctypes.c_ulong(0)
        self._call(self._setup, ctypes.c_long(MOST), ctypes.byref(self._context))

    def close(self) -> None:
        """Give it back to the system."""
        with suppress(OSError):
            self._call(self._destroy, self._context)

    def read(self, reads: Reads) -> bool:
        """Whether all of them were read whole."""
        return all([self._read(reads[start : start + MOST]) for start in range(0, len(reads), MOST)])

    def _read(self, reads: Reads) -> bool:
        n = len(reads)
        offset, at, length = reads.T
        requests = self._requests[:n]
        requests["offset"], requests["length"] = offset, length
        requests["memory"] = at + self._start
        requests["data"] = length
        n_started, failure = 0, None
        while n_started < n and failure is None:
            try:
                n_started += self._submit(n_started, n)
            except OSError as error:
                failure = error
        is_whole = self._wait(n_started)  # even then: nothing may arrive in this memory later
        if failure is not None:
            raise failure
        return is_whole

    def _submit(self, start: int, stop: int) -> int:
        pointers = ctypes.c_void_p(self._pointers[start:].ctypes.data)
        return self._call(self._put, self._context, ctypes.c_long(stop - start), pointers)

    def _wait(self, n: int) -> bool:
        n_done, is_whole = 0, True
        while n_done < n:
            left = ctypes.c_long(n - n_done)
            events = ctypes.c_void_p(self._events.ctypes.data)
            try:
                n_new = self._call(self._get, self._context, left, left, events, None)
            except InterruptedError:
                continue
            new = self._events[:n_new]
            is_whole &= bool((new["result"] == new["data"].astype(np.int64)).all())
            n_done += n_new
        return is_whole

    def _call(self, number: int, *arguments: object) -> int:
        found = int(self._library.syscall(ctypes.c_long(number), *arguments))
        if found < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return found
