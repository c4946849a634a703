"""Lakes on every kind of storage: a folder, an S3 server in memory, and (slow) a real Ceph gateway."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.lake import Lake
from tests.servers import ceph
from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.processes import moto

SERVERS = ["moto", pytest.param("ceph", marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One S3 server in memory for the whole session."""
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="session")
def ceph_url() -> Iterator[str]:
    """One Ceph gateway for the whole session."""
    if missing := ceph.missing():
        pytest.skip(f"{', '.join(missing)} not installed: {ceph.INSTALL}")
    # Not pytest's folder: the path of a Unix socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder, ceph.ceph(Path(folder)) as url:
        yield url


@pytest.fixture(params=SERVERS)
def s3_url(request: pytest.FixtureRequest) -> str:
    """The address of each S3 server."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
def s3_root(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty lake in a new bucket."""
    use_endpoint(monkeypatch, s3_url)
    return new_lake(tmp_path / "cache", monkeypatch)


@pytest.fixture(params=["local", *SERVERS])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty lake, in a folder and on each S3 server."""
    if request.param == "local":
        return str(tmp_path / "lake")
    use_endpoint(monkeypatch, request.getfixturevalue(f"{request.param}_url"))
    return new_lake(tmp_path / "cache", monkeypatch)


@pytest.fixture
def lake(root: str) -> Lake:
    """That lake, opened."""
    return Lake.open(root)
