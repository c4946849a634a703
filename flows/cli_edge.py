"""`winnow chat`, `winnow plan-edge` and `winnow probe`: bundles, and the machines they run on."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, emit, messages, output, table
from storage.lake import Lake

if TYPE_CHECKING:
    from tasks.edge import Answering, Talker

BudgetOption = Annotated[
    str | None,
    typer.Option(help="50%: of the neurons, beside what is always in memory; 700M: bytes of everything."),
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into `app`."""
    app.command("chat")(chat)
    app.command("plan-edge")(plan_edge)
    app.command("probe")(probe)


def chat(
    source: Annotated[str, typer.Argument(help="bundles/NAME, a bundle's folder, starter, models/NAME or a folder.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and stop.")] = None,
    budget: BudgetOption = None,
    hardware: Annotated[Path | None, typer.Option(help="TOML file of this machine: run as plan-edge plans.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    verify: Annotated[bool, typer.Option(help="Compare every file with its hash first.")] = True,
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """Talk to a bundle under a memory budget, or to a model; one line per turn, an empty one ends it."""
    from tasks.edge import Answering, open_talker, parse_budget
    from tasks.errors import ConfigError

    if as_json and prompt is None:
        raise ConfigError("--json answers one prompt; give it with --prompt")
    talker = open_talker(source, Lake.open(lake), parse_budget(budget), verify, hardware)
    how = Answering(max_new_tokens, temperature, seed)
    if prompt is not None:
        _one(talker, prompt, how, as_json)
    else:
        _many(talker, how)


def plan_edge(
    bundle: Annotated[str, typer.Argument(help="bundles/NAME or a bundle's folder.")],
    hardware: Annotated[Path | None, typer.Option(help="TOML file of a machine; default: measure this one.")] = None,
    budget: BudgetOption = None,
    speed: Annotated[float | None, typer.Option(min=0.001, help="Tokens per second to reach.")] = None,
    disk: Annotated[Path, typer.Option(help="Folder on the disk to measure.")] = Path(),
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """How a bundle should run on a machine, and how fast that will be; for a budget, or for a speed."""
    from tasks.edge import parse_budget, plan_bundle, probe_or_load
    from tasks.errors import ConfigError

    if budget is not None and speed is not None:
        raise ConfigError("--budget and --speed are two targets; give one")
    found = plan_bundle(bundle, Lake.open(lake), probe_or_load(hardware, disk), parse_budget(budget), speed).to_json()
    if as_json:
        emit(found)
        return
    output().print(table(["plan", ""], [(key, _shown(value)) for key, value in found.items()]))


def probe(
    folder: Annotated[Path, typer.Argument(help="Folder on the disk to measure; needs 256 MiB.")] = Path(),
    output_file: Annotated[Path | None, typer.Option("--output", help="Write a TOML file for plan-edge.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine for plan-edge: memory, disk rates by block size, compute rates of one thread."""
    from tasks.edge import probe_or_load
    from tasks.errors import ConfigError

    found = probe_or_load(None, folder)
    if output_file is not None:
        try:
            output_file.write_text(found.to_toml(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f'"{output_file}" cannot be written: {error.strerror}; give another file') from error
    if as_json:
        emit(dataclasses.asdict(found))
    elif output_file is None:
        print(found.to_toml(), end="")


def _one(talker: "Talker", prompt: str, how: "Answering", as_json: bool) -> None:
    text = _answer(talker, [("user", prompt)], how, echo=not as_json)
    report, plan = talker.report(), talker.plan
    if as_json:
        speed = report.n_tokens / report.seconds if report and report.seconds else None
        found = {"answer": text, "report": report and dataclasses.asdict(report), "tokens_per_s": speed}
        emit(found | {"plan": plan and plan.to_json()})


def _many(talker: "Talker", how: "Answering") -> None:
    console, turns = messages(), list[tuple[str, str]]()
    while True:
        if sys.stdin.isatty():
            console.print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        turns.append(("user", line))
        turns.append(("assistant", _answer(talker, turns, how, echo=True)))


def _answer(talker: "Talker", turns: list[tuple[str, str]], how: "Answering", echo: bool) -> str:
    from tasks.edge import reply

    def show(text: str) -> None:
        if echo:
            print(text, end="", flush=True)

    text = reply(talker, turns, how, show)
    if echo:
        print()
    report = talker.report()
    if echo and report is not None:
        memory, share = report.memory, f"{report.hit_rate:.1%} of neurons were in memory"
        planned = f" ({talker.plan.tokens_per_s:.1f} predicted)" if talker.plan else ""
        speed = f"{report.n_tokens / report.seconds:.1f} tokens/s{planned}, " if report.seconds else ""
        slower = "" if report.is_compiled else "; pip install 'winnow[native]' makes answers faster"
        messages().print(
            f"{speed}{share}, {report.read_bytes >> 20} MiB read, {memory.total >> 20} MiB in memory{slower}",
            markup=False,
        )
    return text


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
