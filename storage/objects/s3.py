"""Objects in S3, or in a store that speaks its protocol."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow.fs import FileSystem

from storage.errors import LakeError
from storage.objects.protocol import Readable, Stored, key_parts
from storage.objects.s3_client import THREADS, arrow_filesystem, connect, new_session
from storage.objects.s3_errors import code_of, explained
from storage.objects.s3_reader import ABSENT, fetch, open_reader, there
from storage.objects.s3_upload import put

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()=+@-]+")
# Up to here the first new object is written twice, to see that the store refuses the second.
PROBE_BYTES = 1 << 16


def open_s3(root: str) -> "S3Store":
    """The store at s3://BUCKET/PREFIX; LakeError when it cannot be listed, so that nothing runs in vain."""
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    parts = prefix.rstrip("/").split("/") if prefix.rstrip("/") else []
    if not _BUCKET.fullmatch(bucket) or any(not _PREFIX.fullmatch(part) or part in (".", "..") for part in parts):
        raise LakeError(f'lake "{root}": write s3://BUCKET/PREFIX, with letters, digits and - _ . in each part')
    store = S3Store(bucket, "/".join(parts))
    store.check()
    return store


class S3Store:
    """A prefix of a bucket. Writes carry `If-None-Match: *`, so that the server itself refuses a second one."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.root = f"s3://{bucket}/{prefix}".rstrip("/")
        with explained(self.root):
            self._session = new_session()
            self._client: Any = connect(self._session)
        self._is_probed = False
        self._arrow: tuple[object, FileSystem] | None = None

    def check(self) -> None:
        """LakeError unless the bucket is there and may be listed."""
        with explained(self.root):
            self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)

    def create(self, key: str, source: bytes | Readable) -> bool:
        """See ObjectStore."""
        place = self._place(key)
        with explained(self.root):
            is_new = put(self._client, place, source, is_new=True)
            if is_new and not self._is_probed and isinstance(source, bytes) and len(source) <= PROBE_BYTES:
                if put(self._client, place, source, is_new=True):
                    raise LakeError(
                        f'lake "{self.root}": this store writes over objects in spite of If-None-Match, so two runs '
                        "could write one version; switch bucket versioning off (Ceph), or use another store"
                    )
                self._is_probed = True
        return is_new

    def upload(self, key: str, source: Readable) -> None:
        """See ObjectStore."""
        with explained(self.root):
            put(self._client, self._place(key), source, is_new=False)

    def read(self, key: str) -> bytes:
        """See ObjectStore."""
        with there(self.root, self.uri(key)):
            return fetch(self._client, **self._place(key))

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """See ObjectStore."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self._read_if_there, keys))

    def open(self, key: str) -> BinaryIO:
        """See ObjectStore."""
        return open_reader(self._client, self._place(key), self.root)

    def exists(self, key: str) -> bool:
        """See ObjectStore."""
        from botocore.exceptions import ClientError

        with explained(self.root):
            try:
                self._client.head_object(**self._place(key))
            except ClientError as error:
                if code_of(error) in ABSENT:
                    return False
                raise
        return True

    def list(self, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        return (item.key for item in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Stored]:
        """See ObjectStore."""
        for page in self._pages("list_objects_v2", prefix):
            for item in page.get("Contents", ()):
                yield Stored(self._inside(item["Key"]), item["Size"], item["LastModified"])

    def folders(self, prefix: str) -> Sequence[str]:
        """See ObjectStore."""
        pages = self._pages("list_objects_v2", prefix, Delimiter="/")
        found = (item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ()))
        return sorted(folder.rstrip("/").rpartition("/")[2] for folder in found)

    def unfinished(self) -> Iterator[Stored]:
        """See ObjectStore."""
        for page in self._pages("list_multipart_uploads", ""):
            for item in page.get("Uploads", ()):
                yield Stored(self._inside(item["Key"]), 0, item["Initiated"], item["UploadId"])

    def delete(self, item: Stored) -> None:
        """See ObjectStore."""
        from botocore.exceptions import ClientError

        place = self._place(item.key)
        with explained(self.root):
            if item.upload_id is None:
                self._client.delete_object(**place)
                return
            try:
                self._client.abort_multipart_upload(**place, UploadId=item.upload_id)
            except ClientError as error:
                if code_of(error) != "NoSuchUpload":
                    raise

    def uri(self, key: str) -> str:
        """See ObjectStore."""
        return f"s3://{self.bucket}/{self._place(key)['Key']}"

    def local(self, key: str) -> Path | None:
        """See ObjectStore."""
        key_parts(key)
        return None

    def arrow(self, key: str) -> tuple[FileSystem, str]:
        """See ObjectStore. Credentials that expire are asked for again."""
        with explained(self.root):
            credentials = self._session.get_credentials().get_frozen_credentials()
            if self._arrow is None or self._arrow[0] != credentials:
                self._arrow = (credentials, arrow_filesystem(self._client, credentials, self.bucket))
        return self._arrow[1], f"{self.bucket}/{self._place(key)['Key']}"

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + "/".join(key_parts(key))}

    def _inside(self, key: str) -> str:
        return key.removeprefix(self.prefix)

    def _read_if_there(self, key: str) -> bytes | None:
        from botocore.exceptions import ClientError

        with explained(self.root):
            try:
                return fetch(self._client, **self._place(key))
            except ClientError as error:
                if code_of(error) in ABSENT:
                    return None
                raise

    def _pages(self, operation: str, prefix: str, **request: str) -> Iterator[Any]:
        below = f"{self._place(prefix)['Key']}/" if prefix else self.prefix
        with explained(self.root):
            yield from self._client.get_paginator(operation).paginate(Bucket=self.bucket, Prefix=below, **request)
