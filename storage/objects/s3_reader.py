"""Reading an object of S3: whole, or in pieces through a seekable reader."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from storage.errors import LakeError
from storage.objects.s3_client import attempts
from storage.objects.s3_errors import code_of, explained

BUFFER_BYTES = 8 << 20
ABSENT = ("NoSuchKey", "404")


def fetch(client: Any, **request: object) -> bytes:
    """The bytes of one GetObject. botocore repeats requests, but not bodies that end too early: this does."""
    from botocore import exceptions as aws

    tries = attempts(client)
    for attempt in range(tries):
        try:
            return cast(bytes, client.get_object(**request)["Body"].read())
        except (aws.HTTPClientError, aws.IncompleteReadError):
            if attempt == tries - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("there is at least one attempt")


@contextmanager
def there(root: str, shown: str) -> Iterator[None]:
    """`explained`, with a line of its own for an object that is missing or was replaced meanwhile."""
    from botocore import exceptions as aws

    with explained(root):
        try:
            yield
        except aws.ClientError as error:
            if code_of(error) in ABSENT:
                raise LakeError(f'"{shown}" cannot be read (it is not there); the lake is damaged there') from error
            if code_of(error) in ("PreconditionFailed", "412"):
                raise LakeError(f'"{shown}" was replaced while it was read; run again') from error
            raise


class RangedReader(io.RawIOBase):
    """One object, read by ranges of the content it had when it was opened."""

    def __init__(self, client: Any, place: dict[str, str], root: str) -> None:
        super().__init__()
        self._client, self._place, self._root = client, place, root
        self._shown = f"s3://{place['Bucket']}/{place['Key']}"
        with there(root, self._shown):
            head = client.head_object(**place)
        self._size, self._etag, self._position = int(head["ContentLength"]), head["ETag"], 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is asked for."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def readall(self) -> bytes:
        """The rest, in one request (the base class would ask for 8 KiB at a time)."""
        return self._read(self._size - self._position)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, by one request."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, n_bytes: int) -> bytes:
        end = min(self._position + n_bytes, self._size)
        if end <= self._position:
            return b""
        span = f"bytes={self._position}-{end - 1}"
        with there(self._root, self._shown):
            data = fetch(self._client, **self._place, Range=span, IfMatch=self._etag)
        self._position += len(data)
        return data


def open_reader(client: Any, place: dict[str, str], root: str) -> BinaryIO:
    """A buffered, seekable reader."""
    return cast(BinaryIO, io.BufferedReader(RangedReader(client, place, root), BUFFER_BYTES))
