"""What S3 refuses, in one line that names the lake and the fix."""

from collections.abc import Iterator
from contextlib import contextmanager

from storage.errors import LakeError, LakeUnreachableError

_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_CLOCK = "this machine's clock is wrong by many minutes; set it and run again"
_REASONS = {
    "InvalidAccessKeyId": f"the access key is not known there; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key; {_CREDENTIALS}",
    "ExpiredToken": "the session token has expired; log in again",
    "InvalidToken": f"the session token is not valid; {_CREDENTIALS}, and AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "NoSuchBucket": "the bucket does not exist; create it, or correct its name or the endpoint",
    "AccessDenied": "access is denied; allow s3:ListBucket, s3:GetObject and s3:PutObject there",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION to it",
    "QuotaExceeded": "the store's quota is used up; free some space and run again",
    "403": f"access is denied; {_CREDENTIALS}",
}
_PASSING_STATUS = (429, 500, 502, 503, 504)


@contextmanager
def explained(root: str) -> Iterator[None]:
    """Everything that botocore raises inside, as a LakeError in one line."""
    from botocore import exceptions as aws

    try:
        yield
    except aws.ClientError as error:
        raise _refused(root, error) from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
        raise LakeError(
            f'lake "{root}": there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE'
        ) from error
    except aws.SSLError as error:
        raise LakeError(
            f'lake "{root}": the certificate of the store is not trusted; set AWS_CA_BUNDLE ({_line(error)})'
        ) from error
    except (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError) as error:
        raise LakeUnreachableError(
            f'lake "{root}": the store does not answer; check that it runs and AWS_ENDPOINT_URL_S3, then run again '
            f"({_line(error)})"
        ) from error
    # ValueError: an endpoint that is no address.
    except (aws.BotoCoreError, ValueError) as error:
        raise LakeError(f'lake "{root}": {_line(error)}; check the AWS_ variables and ~/.aws/config') from error


def code_of(error: Exception) -> str:
    """S3's name of a ClientError."""
    response: dict[str, dict[str, str]] = getattr(error, "response", {})
    return str(response.get("Error", {}).get("Code", ""))


def status_of(error: Exception) -> int:
    """The HTTP status of a ClientError."""
    response: dict[str, dict[str, int]] = getattr(error, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refused(root: str, error: Exception) -> LakeError:
    code, status = code_of(error), status_of(error)
    if status in _PASSING_STATUS:
        return LakeUnreachableError(
            f'lake "{root}": the store answered {status} {code} after several attempts; run again later'
        )
    return LakeError(f'lake "{root}": {_REASONS.get(code) or _line(error)}')


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
