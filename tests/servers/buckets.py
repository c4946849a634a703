"""What the AWS tools find in their environment during a test, and new buckets."""

import uuid
from pathlib import Path

import boto3
import pytest

KEYS = ("winnow-test", "winnow-secret")


def use_endpoint(patch: pytest.MonkeyPatch, url: str, keys: tuple[str, str] = KEYS) -> None:
    """Let every client made from now on talk to this server, and see nothing of the user's own settings."""
    values = {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": keys[0],
        "AWS_SECRET_ACCESS_KEY": keys[1],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "4",
    }
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_RETRY_MODE"):
        patch.delenv(name, raising=False)
    for name, value in values.items():
        patch.setenv(name, value)


def new_lake(cache: Path, patch: pytest.MonkeyPatch) -> str:
    """A lake in a new bucket of the server that is in use; what is fetched from it goes into `cache`."""
    patch.setenv("XDG_CACHE_HOME", str(cache))
    bucket = f"winnow-{uuid.uuid4().hex[:12]}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    client.close()
    return f"s3://{bucket}/lake"
