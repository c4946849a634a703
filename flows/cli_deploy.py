"""The commands that bring the flows to a Prefect server: `deploy` for a work pool, `serve` for this machine alone."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, emit, messages, output, table
from storage.lake import Lake

FileOption = Annotated[Path, typer.Option("--file", help="The file that lists the deployments.")]
FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="Folder on the workers in which flows run; default: this one.")
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into `app`."""
    app.command("deploy")(deploy)
    app.command("serve")(serve)


def deploy(
    lake: LakeOption = DEFAULT_LAKE,
    folder: FolderOption = None,
    file: FileOption = Path("prefect.yaml"),
    notify: Annotated[
        str | None, typer.Option(help="Block for messages about failed runs: TYPE/NAME, such as slack-webhook/team.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put all flows, their schedules and the automations on the Prefect server, for workers of the pool `winnow`."""
    from flows.prefect_settings import need_server

    url = need_server()
    from flows.deployments import POOL, Place
    from flows.deployments import deploy as put

    found = put(Place(file, str(folder or Path.cwd()), Lake.open(lake).root), notify)
    if as_json:
        emit({"deployments": found.deployments, "schedules": found.schedules, "automations": found.automations})
        return
    rows = [("deployment", name) for name in found.deployments]
    rows += [("schedule", text) for text in found.schedules]
    rows += [("automation", name) for name in found.automations]
    output().print(table(["", url], rows))
    output().print(f"Start a worker where they shall run: prefect worker start --pool {POOL} --limit 1")


def serve(
    lake: LakeOption = DEFAULT_LAKE,
    file: FileOption = Path("prefect.yaml"),
    limit: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
) -> None:
    """Run what the Prefect server asks for, here, without a work pool, until interrupted; schedules pause then.

    The automations are put on the server as by `deploy`.
    """
    from flows.prefect_settings import need_server

    url = need_server()
    from prefect import serve as serve_all

    from flows.deployments import Place, put_automations, served

    if limit > 1:
        messages().print(f"{limit} runs at once share this machine's memory and GPUs")
    place = Place(file, str(Path.cwd()), Lake.open(lake).root)
    deployments = served(place)
    put_automations(place)
    messages().print(f"serving {len(deployments)} deployments of {url}; stop with Ctrl-C")
    serve_all(*deployments, limit=limit, print_starting_message=False)
