"""Connections to S3. Endpoint, region, credentials and retries come from where every AWS tool looks for them."""

from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from pyarrow.fs import S3FileSystem

AWS_HOSTS = (".amazonaws.com", ".amazonaws.com.cn")
THREADS = 16
CONNECT_TIMEOUT_S = 10


def new_session() -> Any:
    """A session that looks at the environment and the AWS files as they are now."""
    from botocore.session import Session

    session = Session()
    # Reading botocore's description of S3 takes 0.1 s, every task opens the lake.
    session.register_component("data_loader", _loader())
    return session


@lru_cache(maxsize=1)
def _loader() -> Any:
    from botocore.loaders import create_loader

    return create_loader()


def connect(session: Any) -> Any:
    """A client of this session. Settings come from botocore's own chain, such as AWS_ENDPOINT_URL_S3 or AWS_PROFILE."""
    from botocore.config import Config

    common = Config(max_pool_connections=THREADS, connect_timeout=CONNECT_TIMEOUT_S)
    client = session.create_client("s3", config=common)
    if is_aws(client.meta.endpoint_url):
        return client
    # Older servers refuse the checksum trailers that botocore sends by default (aws-chunked: 411, 501), and few
    # resolve a bucket as host name. A signed payload is understood by all: the server checks its sha256 instead.
    other = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path", "payload_signing_enabled": True},
    )
    return session.create_client("s3", config=common.merge(other))


def is_aws(endpoint: str) -> bool:
    """Whether an endpoint is Amazon's own."""
    return (urlsplit(endpoint).hostname or "").endswith(AWS_HOSTS)


def attempts(client: Any) -> int:
    """How often botocore tries a request, by its configuration."""
    return int((client.meta.config.retries or {}).get("total_max_attempts", 3))


def arrow_filesystem(client: Any, credentials: Any, bucket: str) -> S3FileSystem:
    """PyArrow's own client with the same credentials, region and endpoint, to read with."""
    endpoint = urlsplit(client.meta.endpoint_url)
    if is_aws(client.meta.endpoint_url):
        region = client.head_bucket(Bucket=bucket).get("BucketRegion")
        place: dict[str, object] = {"region": region or client.meta.region_name}
    else:
        place = {"region": client.meta.region_name or "us-east-1", "scheme": endpoint.scheme}
        place["endpoint_override"] = endpoint.netloc + endpoint.path.rstrip("/")
    return S3FileSystem(
        access_key=credentials.access_key,
        secret_key=credentials.secret_key,
        session_token=credentials.token,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=60,
        **place,
    )
