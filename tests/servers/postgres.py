"""A PostgreSQL server on 127.0.0.1, as production gives Prefect one; for tests only."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers.processes import free_port

INSTALL = "make postgres"
DEBIAN = Path("/usr/lib/postgresql")


@dataclass(slots=True)
class Postgres:
    """A server that can go away and come back on its port."""

    programs: Path
    data: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As Prefect takes it."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Until it takes connections."""
        command = [str(self.programs / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        with (self.data.parent / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, user=_user())
        ask = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        deadline = time.monotonic() + 60
        while subprocess.run(ask).returncode != 0:
            assert time.monotonic() < deadline, (self.data.parent / "postgres.log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, whoever is connected."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)  # its "immediate shutdown"
            self.process.wait(timeout=30)
            self.process = None


def programs() -> Path | None:
    """The folder of its programs, the newest; Debian keeps them outside PATH. None where it is not installed."""
    found = shutil.which("postgres")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(DEBIAN.glob("*/bin/postgres"), key=lambda file: int(file.parts[-3]))
    return versions[-1].parent if versions else None


def _user() -> str | None:
    """PostgreSQL refuses to run as root."""
    return "postgres" if os.getuid() == 0 else None


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A fresh database; AssertionError where it is not installed."""
    where, user = programs(), _user()
    assert where is not None, INSTALL
    # Not in pytest's folders, which are closed to the user that it has to run as.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if user is not None:
            shutil.chown(folder, user)
        data = Path(folder, "data")
        command = [str(where / "initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "--no-sync"]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)
        server = Postgres(where, data, free_port())
        try:
            server.start()
            yield server
        finally:
            server.stop()


def dump(url: str) -> str:
    """All rows of a database, as SQL; the address as Prefect takes it."""
    where = programs()
    assert where is not None, INSTALL
    command = [str(where / "pg_dump"), "--data-only", "--dbname", url.replace("+asyncpg", "")]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
