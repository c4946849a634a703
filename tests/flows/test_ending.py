"""How a process that has imported the flows ends."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # registered first, it runs last
import flows
{more}
"""


@pytest.mark.parametrize(("more", "is_frozen"), [("", True), ("import duckdb", False)])
def test_what_is_in_memory_at_the_end_is_not_searched_for_garbage(more: str, is_frozen: bool) -> None:
    command = [sys.executable, "-c", PROGRAM.format(more=more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == (f"{is_frozen}\n", "")


@pytest.mark.parametrize("flow", ["ingest", "generate", "score", "adapt", "align", "finetune", "export"])
def test_a_flow_does_not_load_what_only_queries_need(flow: str) -> None:
    program = f"import sys, flows.{flow}; print(*{{'_duckdb', 'torch'}}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n"


def test_imports_without_a_search_for_garbage_leave_the_collector_as_it_was() -> None:
    program = (
        "import gc\nfrom tasks import garbage\n"
        "with garbage.large_imports():\n    print(gc.isenabled())\n    import json.tool\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "gc.disable()\nwith garbage.large_imports(): pass\nprint(gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True", "True", "False"]
