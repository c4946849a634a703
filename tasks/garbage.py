"""Python's search for garbage, kept from where there is none: large imports, and the end of a process."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Nothing that is imported in the block is ever garbage; to look whether it is takes a third of torch's import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        freeze()
        if was_enabled:
            gc.enable()


def freeze() -> None:
    """Never look again at what is in memory now.

    Not with DuckDB: when the process ends it complains on standard error that its own was not collected.
    """
    if "_duckdb" not in sys.modules:
        gc.freeze()
