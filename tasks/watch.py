"""New prompts under a prefix: a pipeline for every file, once."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from prefect import task
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from storage.objects import Stored, open_store
from tasks.errors import ConfigError
from tasks.logs import log_event
from tasks.retries import RETRIES
from tasks.settings_watch import WatchConfig


@task(name="start-new", persist_result=False, **RETRIES)
def start_new(config: WatchConfig, lake_root: str) -> list[str]:
    """Start the deployment for every file that is new or changed; names of the files.

    The server remembers what was started: the key of a run is made of the file's address, size and time, and asking
    for it again gives the run that is there. Nothing is lost or done twice when this task is killed or run twice.
    """
    base = _deployed_config(config.deployment)
    started = []
    for item in _settled(config):
        source = open_store(config.prefix).uri(item.key)
        values = {**base, "name": dataset_name(config.name, item.key)}
        values["ingest"] = {**_table(base.get("ingest")), "source": source}
        run = run_deployment(
            config.deployment,
            parameters={"config": values, "lake": lake_root},
            timeout=0,
            as_subflow=False,
            idempotency_key=f"{source} {item.size_bytes} {item.modified_at.timestamp()}",
        )
        log_event("pipeline-for", source=source, run=str(run.id), dataset=str(values["name"]))  # type: ignore[union-attr]
        started.append(source)
    return started


def dataset_name(prefix: str, key: str) -> str:
    """A name for the datasets made from a file: the file's, as far as names allow."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", PurePosixPath(key).name.partition(".")[0].lower()).strip("-._")
    return f"{prefix}-{stem or 'prompts'}"[:51].rstrip("-._")


def _settled(config: WatchConfig) -> Iterator[Stored]:
    before = datetime.now(UTC) - timedelta(seconds=config.settle_seconds)
    for item in open_store(config.prefix).entries(""):
        if fnmatchcase(PurePosixPath(item.key).name, config.pattern) and item.modified_at <= before:
            yield item


def _deployed_config(deployment: str) -> dict[str, object]:
    """The parameters `config` that the deployment has."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(deployment)
        except ObjectNotFound as error:
            raise ConfigError(f'deployment "{deployment}" is not on the server; see `prefect deployment ls`') from error
    return _table(found.parameters.get("config"))


def _table(value: object) -> dict[str, object]:
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else {}
