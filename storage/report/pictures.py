"""Which pictures there are of a version's tables, and the one that says most about a stage."""

from collections.abc import Callable

import duckdb

from storage.histogram import histogram_of
from storage.lake import DatasetRef, Lake
from storage.report import plots, queries
from storage.report.comparison import comparison
from storage.report.edge import edge
from storage.report.group_curves import answer_curves, group_curves
from storage.report.plots import Picture
from storage.report.style import need_matplotlib
from storage.report.tables import open_tables, subject

Connection = duckdb.DuckDBPyConnection


def margins(connection: Connection) -> Picture | None:
    """Of the pairs."""
    found = histogram_of(connection, queries.MARGINS)
    return plots.distribution("margins", "Score margins per group", "score margin", found)


def scores(connection: Connection) -> Picture | None:
    """Of the answers, per group."""
    found = histogram_of(connection, queries.SCORES)
    return plots.distribution("scores", "Scores of finished answers per group", "score", found)


def scores_before_after(connection: Connection) -> Picture | None:
    """Of the answers of an evaluation, per model."""
    found = histogram_of(connection, queries.SCORES_BY_SPLIT)
    return plots.distribution("scores", "Scores of finished answers, before and after", "score", found)


def partial_scores(connection: Connection) -> Picture | None:
    """Against final ones, at the cuts that most answers passed."""
    facets = {f"at {n} tokens": points for n, points in queries.partial_scores(connection).items()}
    names = ("partial score", "final score")
    return plots.scatter("partial", "Partial against final scores of survivors", facets, names)


def lengths(connection: Connection) -> Picture | None:
    """Against scores."""
    return plots.scatter("lengths", "Length against score", {"": queries.lengths(connection)}, ("tokens", "score"))


def tokens(connection: Connection) -> Picture | None:
    """What was decoded, and what cuts saved."""
    return plots.tokens(queries.tokens(connection))


def prompt_lengths(connection: Connection) -> Picture | None:
    """Of the prompts, per group."""
    found = histogram_of(connection, queries.PROMPT_LENGTHS)
    return plots.distribution("prompt-lengths", "Length of prompts per group", "characters", found)


def before_after(connection: Connection) -> Picture | None:
    """The metrics of an evaluation."""
    return plots.before_after(queries.metrics(connection))


def training(connection: Connection) -> list[Picture]:
    """Curves of a training: of all pairs first, then of the groups; of an on-policy one those of its answers first."""
    curves = plots.curves(queries.training_curves(connection))
    answers = answer_curves(connection)
    if answers:
        return [answers, *curves]
    groups = group_curves(connection)
    return [*curves[:1], *([groups] if groups else []), *curves[1:]]


# What is drawn of a stage, and the one table that it is drawn from.
_OF_STAGE: dict[str, tuple[Callable[[Connection], Picture | list[Picture] | None], str]] = {
    "ingest": (prompt_lengths, "prompts"),
    "generate": (tokens, "candidates"),
    "score": (scores, "candidates"),
    "assemble": (margins, "preferences"),
    "finetune": (training, "training"),
    "align": (training, "training"),
    "evaluate": (before_after, "metrics"),
    "compare": (comparison, "comparison"),
    "export": (edge, "edge"),
}


def main_picture(lake: Lake, ref: DatasetRef) -> Picture | None:
    """The first picture of a published version; None where there is nothing to draw."""
    return next(iter(stage_pictures(lake, ref)), None)


def stage_pictures(lake: Lake, ref: DatasetRef) -> list[Picture]:
    """What there is to see of a published version, most telling first. ExtraError without matplotlib."""
    need_matplotlib()
    about = subject(lake, ref)
    if about.manifest.stage not in _OF_STAGE:
        return []
    draw, table = _OF_STAGE[about.manifest.stage]
    with open_tables(lake, about, (table,)) as connection:
        found = draw(connection)
    return found if isinstance(found, list) else [found] if found else []
