"""`winnow starter`: rebuild the embedded starter from its seed, and measure it."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli_options import JsonOption, ThreadsOption, emit, output, table
from flows.cli_run import progress_bars

app = typer.Typer(no_args_is_help=True, help="The embedded starter: build it again from its seed, or measure it.")


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="New folder for policy, reward model and prompts.")] = Path("starter"),
    threads: ThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Train the starter's tokenizer, policy and reward model from the seed (40 minutes on one core)."""
    from tasks.starter import build_starter

    with progress_bars():
        settings = build_starter(folder, threads)
    if as_json:
        emit({"folder": str(folder), "settings": settings})
    else:
        output().print(f"built in {folder}; measure it with `winnow starter check --folder {folder}`")


@app.command()
def check(
    folder: Annotated[Path | None, typer.Option(help="A built starter; default: the shipped one.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Fresh held-out prompts.")] = 300,
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 64,
    threads: ThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Measure pass@1, best-of-N, and how far the reward model can be trusted; exit code 1 when a promise is broken."""
    from tasks.starter import PROMISES, check_starter

    with progress_bars():
        figures = check_starter(folder, prompts, samples, threads)
    broken = [name for name, (low, high) in PROMISES.items() if name in figures and not low <= figures[name] <= high]
    if as_json:
        emit({"figures": figures, "broken": broken})
    else:
        rows = [(name, round(value, 4), _promise(name, PROMISES)) for name, value in figures.items()]
        output().print(table(["figure", "value", "promised"], rows))
    raise typer.Exit(1 if broken else 0)


def _promise(name: str, promises: object) -> str:
    assert isinstance(promises, dict)
    if name not in promises:
        return ""
    low, high = promises[name]
    return f"{low:.2f} to {high:.2f}" if high < 1 else f"{low:.2f} or more"
