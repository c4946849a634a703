"""What happens: one file per flow, the pipeline that chains them, and the command line."""

import atexit
import gc
import sys


def _end_quickly() -> None:
    """Keep Python from looking for garbage once more as it ends: with torch loaded that takes one to three seconds.

    DuckDB complains on standard error when its own garbage is not collected.
    """
    if "_duckdb" not in sys.modules:
        gc.freeze()


atexit.register(_end_quickly)
