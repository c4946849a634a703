"""Lakes on both kinds of storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.processes import moto


@pytest.fixture(scope="session")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One S3 server in memory for the whole session."""
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def s3_root(moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty lake in a new bucket."""
    use_endpoint(monkeypatch, moto_url)
    return new_lake(tmp_path / "cache", monkeypatch)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty lake, once in a folder and once in S3."""
    if request.param == "local":
        return str(tmp_path / "lake")
    found: str = request.getfixturevalue("s3_root")
    return found
