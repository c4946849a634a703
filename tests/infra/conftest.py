"""One real Prefect server with all deployments, for the slow tests here."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.servers import postgres
from tests.servers.prefect import Server, deployed_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Deployed to; its lake is the folder `lake` beside it. Nothing starts by schedule, at whatever hour this runs.

    On PostgreSQL where it is installed (make postgres): a server on SQLite that has much to do gives up requests and
    events, which is not what these tests are about.
    """
    folder = tmp_path_factory.mktemp("prefect")
    settings = {"PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false"}
    with ExitStack() as stack:
        if postgres.programs() is not None:
            settings["PREFECT_API_DATABASE_CONNECTION_URL"] = stack.enter_context(postgres.postgres()).url
        yield stack.enter_context(deployed_server(folder, folder / "lake", **settings))


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
