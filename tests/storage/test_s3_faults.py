"""S3 as it is on bad days: refusals, dropped connections, lost answers, truncated bodies, silence."""

import io
import os
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.catalog import query
from storage.errors import LakeError, LakeUnreachableError, QueryError
from storage.gc import collect
from storage.lake import DatasetRef, Lake
from storage.objects import open_store
from storage.objects.s3_upload import PART_BYTES
from storage.schema import to_table
from storage.verify import verify
from storage.writer import Provenance, Shard
from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.processes import free_port
from tests.servers.proxy import Fault, Proxy, proxy
from tests.storage.rows import candidate

VERSION = "0123456789ab"
N_SHARDS = 3


@pytest.fixture
def faulty(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the S3 server; everything in the test goes through it."""
    with proxy(s3_url) as found:
        use_endpoint(monkeypatch, found.url)
        yield found


@pytest.fixture
def faulty_root(faulty: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty lake behind the proxy."""
    return new_lake(tmp_path / "cache", monkeypatch)


def publish(root: str, folder: Path) -> DatasetRef:
    """A version with shards and a plain file of two parts."""
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(random.Random(0).randbytes(PART_BYTES + 1000))
    writer = Lake.open(root).writer("models", "demo", VERSION)
    for index in range(N_SHARDS):
        rows = [candidate(f"p{index}-{i}", 0, float(i)) for i in range(50)]
        writer.write(Shard("candidates", "train", index, N_SHARDS), to_table("candidates", rows))
    writer.add_tree(folder, "model")
    return writer.commit(Provenance("finetune", {}, {}, {}, "winnow"))


def listed(root: str) -> dict[str, str]:
    """Path and sha256 of every file of the version, after reading all of them."""
    lake = Lake.open(root)
    ref = lake.resolve("models/demo")
    assert [verdict for verdict in verify(lake, ref) if verdict.problem] == []
    return {file.path: file.sha256 for file in lake.manifest(ref).files}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "InvalidAccessKeyId", "the access key is not known there; check AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "the secret key does not belong to the access key"),
        (403, "AccessDenied", "access is denied; allow s3:ListBucket"),
        (403, "RequestTimeTooSkewed", "this machine's clock is wrong"),
        (400, "ExpiredToken", "the session token has expired"),
        (404, "NoSuchBucket", "the bucket does not exist; create it"),
        (503, "SlowDown", "the store answered 503 SlowDown after several attempts"),
        (500, "InternalError", "the store answered 500 InternalError after several attempts"),
        (400, "Surprise", "made by the proxy"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_fix(
    faulty: Proxy, faulty_root: str, status: int, code: str, message: str
) -> None:
    faulty.decide = lambda method, path: Fault("error", status, code)
    with pytest.raises(LakeError, match=message) as caught:
        Lake.open(faulty_root)
    assert "\n" not in str(caught.value)
    assert faulty_root in str(caught.value)


def test_a_missing_bucket_is_one_line(s3_root: str) -> None:
    with pytest.raises(LakeError, match=r'lake "s3://winnow-nowhere": the bucket does not exist'):
        Lake.open("s3://winnow-nowhere")


def test_missing_credentials_are_one_line(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(LakeError, match="there are no credentials; set AWS_ACCESS_KEY_ID"):
        Lake.open(s3_root)


def test_an_unknown_profile_and_a_senseless_endpoint_are_one_line(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(LakeError, match=r"profile \(nobody\) could not be found; check the AWS_ variables"):
        Lake.open(s3_root)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    with pytest.raises(LakeError, match="Invalid endpoint"):
        Lake.open(s3_root)


@pytest.mark.slow
def test_wrong_keys_are_one_line(ceph_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, ceph_url)
    root = new_lake(tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(LakeError, match="the secret key does not belong to the access key"):
        Lake.open(root)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(LakeError, match="the access key is not known there"):
        Lake.open(root)


def test_a_store_that_is_not_there_is_one_line(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(LakeUnreachableError, match="the store does not answer") as caught:
        Lake.open(s3_root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "root", ["s3://", "s3://UPPER/x", "s3://b/x", "s3://bucket/../x", "s3://bucket/a//b", "s3://bucket/a b"]
)
def test_a_malformed_address_is_refused_before_anything_is_asked(root: str) -> None:
    with pytest.raises(LakeError, match="write s3://BUCKET/PREFIX"):
        open_store(root)


SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("drop", "truncate", "slow")]


@pytest.mark.parametrize("kind", ["lose", "error", *SLOWER])
def test_a_version_published_through_faults_is_the_same(
    faulty: Proxy, faulty_root: str, s3_root: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(s3_root, tmp_path / "run")
    expected = listed(s3_root)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faulty.url)
    seen: set[tuple[str, str]] = set()

    def first_time(method: str, path: str) -> Fault | None:
        """Every request is hit once, its repetition passes."""
        if (method, path) in seen:
            return None
        seen.add((method, path))
        return Fault(kind, 500 if len(seen) % 2 else 503)  # type: ignore[arg-type]

    faulty.decide = first_time
    publish(faulty_root, tmp_path / "run")
    assert listed(faulty_root) == expected
    assert sum(fault is not None for _, _, fault in faulty.requests) > 10
    # Where the answer that named an upload was lost, gc finds it.
    lake = Lake.open(faulty_root)
    later = datetime.now(UTC) + timedelta(days=1)
    left = [found.reason for found in collect(lake, timedelta(hours=1), later, is_dry_run=False)]
    assert left == (["unfinished write"] if kind in ("lose", "truncate") else [])
    assert list(lake.store.unfinished()) == []
    assert listed(faulty_root) == expected


def test_a_reader_never_sees_a_version_half_written(
    faulty: Proxy, faulty_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs fail at their third to eleventh write; a reader looks all the time."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    is_over, seen, errors = threading.Event(), list[int](), list[BaseException]()
    quiet = Lake.open(faulty_root)

    def watch() -> None:
        try:
            is_last = False
            while not is_last:
                is_last = is_over.is_set()
                for ref in quiet.versions():
                    if quiet.find(ref.kind, ref.name, ref.version):
                        seen.append(len(quiet.manifest(ref).files))
                        assert [v for v in verify(quiet, ref) if v.problem] == []
        except BaseException as error:
            errors.append(error)

    rng = random.Random(0)
    left = [5]

    def now_and_then(method: str, path: str) -> Fault | None:
        if method not in ("PUT", "POST"):  # the reader's requests pass
            return None
        left[0] -= 1
        if left[0] > 0:
            return None
        left[0] = rng.randint(3, 11)
        return Fault(rng.choice(["drop", "lose", "error"]))

    faulty.decide = now_and_then
    watcher = threading.Thread(target=watch)
    watcher.start()
    n_failed = 0
    try:
        for _ in range(40):
            try:
                publish(faulty_root, tmp_path / "run")
                break
            except LakeError as error:
                assert "\n" not in str(error)
                n_failed += 1
    finally:
        is_over.set()
        watcher.join()
    assert errors == []
    assert n_failed > 2
    assert len(listed(faulty_root)) == N_SHARDS + 1
    assert set(seen) == {N_SHARDS + 1}


def test_a_store_that_is_gone_for_a_while_is_waited_for(faulty: Proxy, faulty_root: str, tmp_path: Path) -> None:
    store = open_store(faulty_root)
    left = [3]  # of four attempts

    def away(method: str, path: str) -> Fault | None:
        left[0] -= 1
        return Fault("drop") if left[0] >= 0 else None

    faulty.decide = away
    assert store.create("a/b", b"x") is True
    faulty.decide = lambda method, path: None
    assert store.read("a/b") == b"x"


def test_a_store_that_is_gone_for_good_is_one_line_and_a_new_run_goes_on(
    faulty: Proxy, faulty_root: str, tmp_path: Path
) -> None:
    n_written = [0]

    def gone(method: str, path: str) -> Fault | None:
        n_written[0] += method == "PUT"
        return Fault("drop") if n_written[0] > 2 else None

    faulty.decide = gone
    with pytest.raises(LakeUnreachableError, match="the store does not answer") as caught:
        publish(faulty_root, tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(LakeUnreachableError):
        publish(faulty_root, tmp_path / "run")
    faulty.decide = lambda method, path: None
    assert Lake.open(faulty_root).manifests() == []
    publish(faulty_root, tmp_path / "run")
    assert len(listed(faulty_root)) == N_SHARDS + 1


def test_a_body_that_is_always_cut_short_is_one_line(faulty: Proxy, faulty_root: str) -> None:
    store = open_store(faulty_root)
    store.create("a/b", b"x" * 1000)
    faulty.decide = lambda method, path: Fault("truncate") if method == "GET" else None
    with pytest.raises(LakeUnreachableError, match="the store does not answer"):
        store.read("a/b")
    with store.open("a/b") as file, pytest.raises(LakeUnreachableError):
        file.read()


def test_a_query_over_a_store_that_goes_away_is_one_line(faulty: Proxy, faulty_root: str, tmp_path: Path) -> None:
    publish(faulty_root, tmp_path / "run")
    assert query(Lake.open(faulty_root), "SELECT COUNT(*), SUM(score) FROM candidates").rows == [(150, 3675.0)]
    faulty.decide = lambda method, path: Fault("error", 403, "AccessDenied") if ".parquet" in path else None
    with pytest.raises(QueryError) as caught:
        query(Lake.open(faulty_root), "SELECT SUM(score) FROM candidates")
    assert "\n" not in str(caught.value)


def test_a_store_that_writes_over_objects_is_refused(faulty: Proxy, faulty_root: str) -> None:
    """Without create-only writes two runs could write one version."""
    store = open_store(faulty_root)
    original = store._client.put_object  # type: ignore[attr-defined]

    def ignorant(**request: object) -> object:
        return original(**{key: value for key, value in request.items() if key != "IfNoneMatch"})

    store._client.put_object = ignorant  # type: ignore[attr-defined]
    with pytest.raises(LakeError, match="writes over objects in spite of If-None-Match"):
        store.create("a/b", b"x")


def test_an_object_replaced_while_it_is_read_is_noticed(s3_root: str) -> None:
    store = open_store(s3_root)
    store.upload("a/b", io.BytesIO(os.urandom(9_000_000)))
    with store.open("a/b") as file:
        file.read(1)
        store.upload("a/b", io.BytesIO(os.urandom(9_000_000)))
        with pytest.raises(LakeError, match="was replaced while it was read; run again"):
            file.seek(8_900_000)
            file.read()
