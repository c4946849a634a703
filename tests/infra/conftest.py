"""One real Prefect server with all deployments, for the slow tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.prefect import Server, prefect_server, winnow


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Deployed to; its lake is the folder `lake` beside it."""
    folder = tmp_path_factory.mktemp("prefect")
    with prefect_server(folder) as found:
        deployed = winnow(found, "deploy", "--lake", str(folder / "lake"))
        assert deployed.returncode == 0, deployed.stderr
        yield found


@pytest.fixture(scope="session")
def server_lake(server: Server) -> Path:
    """The lake of its deployments."""
    return server.folder / "lake"
