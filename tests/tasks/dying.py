"""One of two processes that torchrun starts: the second ends itself, the first would wait."""

import os
import sys
import time

if os.environ["RANK"] == "1":
    print("what it said last", file=sys.stderr, flush=True)
    os._exit(3)
time.sleep(60)
