"""Deployments and automations on a Prefect server, from prefect.yaml and infra/automations: put there, or served here.

Everything is found again by its name, so that doing it twice is doing it once.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from tasks.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.deployments.runner import RunnerDeployment

POOL = "winnow"
NOTIFY_BLOCK = "{{ $WINNOW_NOTIFY_BLOCK }}"
AUTOMATIONS = Path("infra", "automations")


@dataclass(frozen=True, slots=True)
class Place:
    """Where deployed flows run: in which folder, on which lake; and the file that lists them."""

    file: Path
    folder: str
    lake: str

    def variables(self) -> dict[str, str]:
        """What the file's placeholders stand for."""
        return {"WINNOW_LAKE": self.lake, "WINNOW_FOLDER": self.folder, "WINNOW_VERSION": code_version()}


@dataclass(frozen=True, slots=True)
class Deployed:
    """What is on the server now."""

    deployments: list[str]
    schedules: list[str]
    automations: list[str]


def deploy(place: Place, notify: str | None) -> Deployed:
    """Create or update the work pool, every deployment of the file, and the automations beside it."""
    from prefect.client.orchestration import get_client

    wanted = read_file(place)
    with get_client(sync_client=True) as client:
        automations = _read_automations(place, _block_id(client, notify))
        for pool in sorted({str(one["work_pool"]["name"]) for one in wanted}):
            _make_pool(client, pool)
        _prefect_deploy(place)
        for automation in automations:
            _put_automation(client, automation)
    names = [f"{_flow_name(one)}/{one['name']}" for one in wanted]
    schedules = [
        f"{_flow_name(one)}/{one['name']}: {when['slug']} ({when['cron']} {when['timezone']})"
        for one in wanted
        for when in one.get("schedules", [])
    ]
    return Deployed(names, schedules, [str(one["name"]) for one in automations])


def put_automations(place: Place) -> list[str]:
    """The automations beside the file, on the server; their names.

    Those for a run whose process is gone are needed wherever runs may be killed, so also where they are served.
    """
    from prefect.client.orchestration import get_client

    found = _read_automations(place, None)
    with get_client(sync_client=True) as client:
        for automation in found:
            _put_automation(client, automation)
    return [str(one["name"]) for one in found]


def served(place: Place) -> "list[RunnerDeployment]":
    """The file's deployments as Prefect serves them from this process."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron
    from prefect.utilities.templating import apply_values

    os.environ.update(place.variables())
    os.environ.update(_job_environment(read_file(place)))
    found = []
    for one in read_file(place):
        one = cast(dict[str, Any], apply_values(one, {}))
        limit = one.get("concurrency_limit")
        when = [
            Cron(each["cron"], timezone=each["timezone"], active=each["active"], slug=each["slug"])
            for each in one.get("schedules", [])
        ]
        found.append(
            RunnerDeployment.from_entrypoint(
                one["entrypoint"],
                one["name"],
                description=one.get("description"),
                parameters=one["parameters"],
                tags=one["tags"],
                version=one["version"],
                schedules=when,
                concurrency_limit=ConcurrencyLimitConfig.model_validate(limit) if limit else None,
            )
        )
    return found


def read_file(place: Place) -> list[dict[str, Any]]:
    """The deployments that the file lists, placeholders as they are; ConfigError for a file that lists none."""
    try:
        found = yaml.safe_load(place.file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f'"{place.file}" does not exist; run this in a checkout of Winnow, or give --file') from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f'"{place.file}" cannot be read: {" ".join(str(error).split())}') from error
    listed = found.get("deployments") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f'"{place.file}" lists no deployments; start from the prefect.yaml of Winnow')
    return listed


def code_version() -> str:
    """Of the package, and of the commit where there is one."""
    try:
        packaged = version("winnow")
    except PackageNotFoundError:
        packaged = "checkout"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except OSError:
        return packaged
    return f"{packaged}+{done.stdout.strip()}" if done.returncode == 0 else packaged


def _flow_name(deployment: Mapping[str, Any]) -> str:
    from prefect.flows import load_flow_from_entrypoint

    return load_flow_from_entrypoint(str(deployment["entrypoint"])).name


def _job_environment(deployments: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a worker would set for the runs: all of them set the same."""
    found: dict[str, str] = {}
    for one in deployments:
        found |= one["work_pool"].get("job_variables", {}).get("env", {})
    return found


def _make_pool(client: "SyncPrefectClient", name: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    # One that is there may be of another type: a pool on Kubernetes has a template of its own (docs/operations.md).
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def _prefect_deploy(place: Place) -> None:
    """`prefect deploy --all`: templating, schemas and schedules are Prefect's own."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(place.file)]
    done = subprocess.run(command, env=os.environ | place.variables(), capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(f"prefect deploy failed: {' '.join((done.stderr or done.stdout).split())[-600:]}")


def _read_automations(place: Place, block_id: str | None) -> list[dict[str, Any]]:
    """All automations beside the file; one that notifies is left out where there is no block to notify through."""
    folder = place.file.absolute().parent / AUTOMATIONS
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))]
    wanted = [text for text in texts if block_id or NOTIFY_BLOCK not in text]
    return [yaml.safe_load(text.replace(NOTIFY_BLOCK, str(block_id))) for text in wanted]


def _block_id(client: "SyncPrefectClient", notify: str | None) -> str | None:
    if notify is None:
        return None
    from prefect.exceptions import ObjectNotFound

    kind, slash, name = notify.partition("/")
    try:
        if slash:
            return str(client.read_block_document_by_name(name, kind).id)
    except ObjectNotFound:
        pass
    raise ConfigError(
        f'--notify "{notify}" is no block; see `prefect block ls`, write TYPE/NAME such as slack-webhook/team'
    )


def _put_automation(client: "SyncPrefectClient", automation: Mapping[str, Any]) -> None:
    from prefect.events.schemas.automations import AutomationCore

    wanted = AutomationCore.model_validate(automation)
    known = client.read_automations_by_name(wanted.name)
    if known:
        client.update_automation(known[0].id, wanted)
    else:
        client.create_automation(wanted)
