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

from storage.lake import Lake
from storage.marks import Marks
from storage.objects import open_store
from tasks.errors import ConfigError
from tasks.logs import log_event
from tasks.retries import RETRIES
from tasks.settings_watch import WatchConfig


@task(name="start-new", persist_result=False, **RETRIES)
def start_new(config: WatchConfig, lake_root: str) -> list[str]:
    """Start the deployment for every file that is new or changed; addresses of those files.

    The lake remembers what was started, by the file's address, size and time; the server's runs go after their
    retention. Between the start and its mark the server remembers: asked for the same key again, it gives the run that
    is there. So nothing is lost or done twice when this task is killed or run twice.
    """
    marks = Marks(Lake.open(lake_root), f"watch/{config.name}")
    new = [(source, key) for source, key in _settled(config) if key not in marks]
    base = _deployed_config(config.deployment) if new else {}
    for source, key in new:
        values = {**base, "name": dataset_name(config.name, source)}
        values["ingest"] = {**_table(base.get("ingest")), "source": source}
        run = run_deployment(
            config.deployment,
            parameters={"config": values, "lake": lake_root},
            timeout=0,
            as_subflow=False,
            idempotency_key=key,
        )
        marks.add(key)
        log_event("pipeline-for", source=source, run=str(run.id), dataset=str(values["name"]))  # type: ignore[union-attr]
    return [source for source, _ in new]


def dataset_name(prefix: str, key: str) -> str:
    """A name for the datasets made from a file: the file's, as far as names allow."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", PurePosixPath(key).name.partition(".")[0].lower()).strip("-._")
    return f"{prefix}-{stem or 'prompts'}"[:51].rstrip("-._")


def _settled(config: WatchConfig) -> Iterator[tuple[str, str]]:
    """Address of every file that is whole, and what tells it from an earlier one of the same name."""
    before = datetime.now(UTC) - timedelta(seconds=config.settle_seconds)
    store = open_store(config.prefix)
    for item in store.entries(""):
        if fnmatchcase(PurePosixPath(item.key).name, config.pattern) and item.modified_at <= before:
            source = store.uri(item.key)
            yield source, f"{source} {item.size_bytes} {item.modified_at.timestamp()}"


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
