"""Writing an object of S3: by one request while it is small, in parts otherwise; the object appears with the last."""

import io
import time
from contextlib import suppress
from typing import Any

from storage.errors import LakeError
from storage.objects.protocol import Readable
from storage.objects.s3_errors import code_of

PART_BYTES = 16 << 20
MAX_PARTS = 10_000  # S3's limit
CONFLICTS = 5


def put(client: Any, place: dict[str, str], source: bytes | Readable, is_new: bool) -> bool:
    """Write an object; with `is_new` never over one that is there: False then."""
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    first = _part(stream)
    condition = {"IfNoneMatch": "*"} if is_new else {}
    if len(first) < PART_BYTES:
        return _unless_there(lambda: client.put_object(**place, Body=first, **condition))
    upload = client.create_multipart_upload(**place)["UploadId"]
    try:
        parts = _upload_parts(client, place | {"UploadId": upload}, first, stream)
        done = {"UploadId": upload, "MultipartUpload": {"Parts": parts}, **condition}
        return _complete(client, place, done)
    except BaseException:
        # What cannot be aborted now, `winnow gc` finds later.
        with suppress(Exception):
            client.abort_multipart_upload(**place, UploadId=upload)
        raise


def _upload_parts(client: Any, place: dict[str, str], part: bytes, stream: Readable) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = []
    while part:
        if len(parts) == MAX_PARTS:
            raise LakeError(f'"{place["Key"]}" has more than {MAX_PARTS * PART_BYTES >> 30} GiB; write smaller files')
        number = len(parts) + 1
        answer = client.upload_part(**place, PartNumber=number, Body=part)
        checksums = {
            key: value for key, value in answer.items() if key.startswith("Checksum") and key != "ChecksumType"
        }
        parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})
        part = _part(stream)
    return parts


def _complete(client: Any, place: dict[str, str], done: dict[str, Any]) -> bool:
    from botocore.exceptions import ClientError

    # Servers that do not know conditional completions take this one in spite of another's object.
    is_taken = "IfNoneMatch" in done and _is_there(client, place)
    try:
        is_new = not is_taken and _unless_there(lambda: client.complete_multipart_upload(**place, **done))
    except ClientError as error:
        # The answer to an earlier attempt was lost on its way: the object is there, the upload is not any more.
        if code_of(error) != "NoSuchUpload" or not _is_there(client, place):
            raise
        return "IfNoneMatch" not in done
    if not is_new:
        with suppress(ClientError):
            client.abort_multipart_upload(**place, UploadId=done["UploadId"])
    return is_new


def _is_there(client: Any, place: dict[str, str]) -> bool:
    from botocore.exceptions import ClientError

    try:
        client.head_object(**place)
    except ClientError as error:
        if code_of(error) in ("404", "NoSuchKey"):
            return False
        raise
    return True


def _unless_there(write: Any) -> bool:
    """False when the object is there already. S3 answers 409 while it cannot tell yet: asked again then."""
    from botocore.exceptions import ClientError

    for attempt in range(CONFLICTS):
        try:
            write()
            return True
        except ClientError as error:
            if code_of(error) in ("PreconditionFailed", "412"):
                return False
            if code_of(error) != "ConditionalRequestConflict" or attempt == CONFLICTS - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("there is at least one attempt")


def _part(stream: Readable) -> bytes:
    """The next part, full unless it is the last; readers may give less than was asked for."""
    found = bytearray()
    while len(found) < PART_BYTES and (data := stream.read(PART_BYTES - len(found))):
        found += data
    return bytes(found)
