"""README's way from a checkout to a scheduled pipeline, command by command as it is written there."""

import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from storage.lake import Lake
from tests.servers.prefect import PATIENCE_S, ROOT, own_environment, start, stop
from tests.servers.processes import free_port, wait_for_http

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(2400)]
SECTION = re.compile(r"^## From zero to a scheduled run\n\n((?:    .+\n)+)", re.M)


def _commands() -> list[tuple[str, str]]:
    """Each with its comment."""
    block = SECTION.search((ROOT / "README.md").read_text())
    assert block is not None
    lines = (line.strip().partition(" #") for line in block[1].splitlines())
    return [(command.strip(), comment) for command, _, comment in lines]


def _checkout(folder: Path) -> Path:
    """What is versioned, and what `make setup` made before this test could run."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


@pytest.mark.skipif(not (ROOT / ".venv" / ".ready").is_file(), reason="needs this checkout's environment: make setup")
def test_the_commands_from_zero_to_a_scheduled_run_do_what_they_say(tmp_path: Path) -> None:
    commands, port, folder = _commands(), free_port(), _checkout(tmp_path / "winnow")
    assert 0 < len(commands) < 10
    variables = own_environment() | {"HOME": str(tmp_path), "PREFECT_PORT": str(port), "PYTHONPATH": str(folder)}
    printed = ""
    with ExitStack() as ended:
        for written, comment in commands:
            command, log = written.replace("4200", str(port)), tmp_path / f"{written[:12].replace('/', '-')}.log"
            if command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                variables[name] = value
            elif "terminal" in comment:
                process = start(["bash", "-c", command], variables, log, folder)
                ended.callback(stop, process)
                if "server" in command:
                    wait_for_http(port, process, log, PATIENCE_S)
            else:
                done = subprocess.run(
                    ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, timeout=1800
                )
                assert done.returncode == 0, (written, done.stdout, done.stderr)
                printed += done.stdout
    assert "Completed" in printed
    assert Lake.open(str(folder / "lake")).manifests("bundles") != []
