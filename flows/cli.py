"""`winnow`: the command line, thin over the flows and the lake.

Every mistake of the user is one line on standard error with exit code 2; a traceback is a bug of ours.
"""

import sys
from typing import cast

import typer

from flows import (
    cli_compare,
    cli_demo,
    cli_deploy,
    cli_edge,
    cli_export,
    cli_lake,
    cli_query,
    cli_report,
    cli_run,
    cli_starter,
    cli_versions,
    cli_view,
)
from flows.cli_options import messages
from tasks.errors import USER_ERRORS

# Wrong usage, whatever typer builds on: its errors share this base with the public BadParameter.
USAGE_ERROR = cast(
    type[Exception], next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompts in; a scored, group-aware preference dataset and a measurably better model out.",
)
cli_demo.add_commands(app)
cli_run.add_commands(app)
cli_compare.add_commands(app)
cli_export.add_commands(app)
cli_query.add_commands(app)
cli_view.add_commands(app)
cli_lake.add_commands(app)
cli_report.add_commands(app)
cli_versions.add_commands(app)
cli_deploy.add_commands(app)
cli_edge.add_commands(app)
app.add_typer(cli_starter.app, name="starter")


def main() -> None:
    """Run the command line and exit."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except USAGE_ERROR as error:
        code = _fail(str(cast(typer.BadParameter, error).format_message()))
    except USER_ERRORS as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        messages().print("interrupted; finished shards are kept, run the same command to continue")
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    messages().print(f"error: {' '.join(message.split())}", markup=False, soft_wrap=True)
    return 2


if __name__ == "__main__":
    main()
