"""One real Prefect server with all deployments, for the slow tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.prefect import Server, prefect_server, winnow


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Deployed to; its lake is the folder `lake` beside it. Nothing starts by schedule, at whatever hour this runs."""
    folder = tmp_path_factory.mktemp("prefect")
    with prefect_server(folder, PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED="false") as found:
        deployed = winnow(found, "deploy", "--lake", str(folder / "lake"))
        assert deployed.returncode == 0, deployed.stderr
        yield found


@pytest.fixture(scope="session")
def server_lake(server: Server) -> Path:
    """The lake of its deployments."""
    return server.folder / "lake"


@pytest.fixture(autouse=True)
def no_run_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test that failed has left is not handed to the worker of the next one."""
    found = request.getfixturevalue("server") if "server" in request.fixturenames else None
    yield
    if found is not None:
        found.cancel_open_runs()
