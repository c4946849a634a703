"""What happens: one file per flow, the pipeline that chains them, and the command line."""

import atexit

from tasks import garbage

# Python looks for garbage once more as it ends: with torch loaded that takes one to three seconds.
atexit.register(garbage.freeze)
