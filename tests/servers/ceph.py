"""A Ceph RADOS gateway on 127.0.0.1: one monitor, one storage daemon in memory, one gateway; for tests only."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.servers.buckets import KEYS
from tests.servers.processes import free_port, running, wait_for_http

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "radosgw", "radosgw-admin")
INSTALL = "make ceph"
ATTEMPTS = 3
CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
# These two tell the monitor things before the daemon knows its fsid: one start in ten ended in "wrong fsid".
osd class update on start = false
osd crush update on start = false
mon allow pool size one = true
mon osd full ratio = 1
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
keyring = {folder}/keyring
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
run dir = {folder}
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def ceph(folder: Path) -> Iterator[str]:
    """The gateway's address; its one user has `buckets.KEYS`."""
    with ExitStack() as stack:
        yield _started(stack, folder)


def _started(stack: ExitStack, folder: Path) -> str:
    """Address of a cluster that ends with the stack.

    A monitor has refused a command in the middle of this, with no reason in its answer (once; 45 starts, three at a
    time, did not repeat it), so a cluster that does not come up is made again.
    """
    for attempt in range(1, ATTEMPTS):
        with ExitStack() as daemons:
            try:
                address = _start(daemons, folder / str(attempt))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"made again: {error}", file=sys.stderr)
                continue
            stack.push(daemons.pop_all())
            return address
    return _start(stack, folder / str(ATTEMPTS))


def _start(stack: ExitStack, folder: Path) -> str:
    fsid, port, mon_port = str(uuid.uuid4()), free_port(), free_port()
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    config = folder / "ceph.conf"
    config.write_text(CONFIG.format(fsid=fsid, port=port, mon_port=mon_port, folder=folder))
    _make_monitor(folder, config, fsid, mon_port)

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        return stack.enter_context(running([*command, "-c", str(config), "-f"], folder / f"{name}.out"))

    start("mon", "ceph-mon", "-i", "a")
    osd = str(uuid.uuid4())
    number = _run(config, "ceph", "osd", "create", osd).strip()
    _run(config, "ceph-osd", "-i", number, "--mkfs", "--osd-uuid", osd)
    start("osd", "ceph-osd", "-i", number)
    _run(config, "ceph", "osd", "crush", "add", f"osd.{number}", "1", "root=default")
    gateway = start("rgw", "radosgw", "-n", "client.rgw")
    wait_for_http(port, gateway, folder / "rgw.out", seconds=60)
    keys = ("--access-key", KEYS[0], "--secret-key", KEYS[1])
    _run(config, "radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test", *keys)
    return f"http://127.0.0.1:{port}"


def _make_monitor(folder: Path, config: Path, fsid: str, port: int) -> None:
    keyring, monmap = folder / "keyring", folder / "monmap"
    for name in ("mon.", "client.admin"):
        caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"]
        create = [] if keyring.exists() else ["--create-keyring"]
        _run(config, "ceph-authtool", *create, str(keyring), "--gen-key", "-n", name, *caps)
    _run(config, "monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}]", "--fsid", fsid, str(monmap))
    _run(config, "ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap), "--keyring", str(keyring))


def _run(config: Path, *command: str) -> str:
    """Output of a tool that takes `-c` (the two that make files do not need it)."""
    given = [] if command[0] in ("ceph-authtool", "monmaptool") else ["-c", str(config)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        logs = "".join(f"\n{log}: {log.read_text(errors='replace')[-2000:]}" for log in config.parent.glob("*.log"))
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}{logs}")
    return done.stdout


if __name__ == "__main__":
    # A gateway to try things on: PYTHONPATH=. python -m tests.servers.ceph FOLDER
    with ceph(Path(sys.argv[1]).absolute()) as address:
        variables = {"AWS_ENDPOINT_URL_S3": address, "AWS_ACCESS_KEY_ID": KEYS[0], "AWS_SECRET_ACCESS_KEY": KEYS[1]}
        print(*(f"export {name}={value}" for name, value in variables.items()), sep="\n", flush=True)
        while os.getppid() > 1:
            time.sleep(1)
