"""The page: sections with tables, pictures and samples, put into one self-contained HTML file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from storage.lake import DatasetRef, Lake
from storage.lineage import family_tree
from storage.report import pictures, plots, queries, samples
from storage.report.comparison import comparison
from storage.report.plots import Picture
from storage.report.samples import Sample
from storage.report.style import DARK, need_matplotlib
from storage.report.svg import svg, variable
from storage.report.tables import Subject, open_tables, subject
from storage.summary import columns_of, group_rows, stated


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under column names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def is_number(self, place: int) -> bool:
        """Whether a column holds numbers."""
        return any(isinstance(row[place], int | float) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Section:
    """What stands under one heading; `whose` names the version where it is another one."""

    title: str
    whose: str = ""
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A version's page, and what is on it."""

    html: str
    sections: list[str]
    pictures: list[str]


def build_report(lake: Lake, ref: DatasetRef) -> Report:
    """The report of a published version; ExtraError without matplotlib."""
    need_matplotlib()
    about = subject(lake, ref)
    with open_tables(lake, about) as connection:
        sections = [section for section in _sections(connection, about) if section.title]
    drawn = [picture.key for section in sections for picture in section.pictures]
    return Report(_render(about, sections), [section.title for section in sections], drawn)


def _sections(connection: duckdb.DuckDBPyConnection, about: Subject) -> Iterator[Section]:
    for table, section in _BY_TABLE.items():
        if about.has(table):
            owner = about.owners[table].label
            made = section(connection, about)
            whose = "" if owner == about.manifest.label else owner
            yield Section(made.title, whose, made.notes, made.tables, made.pictures, made.samples)
    if about.manifest.kind == "models":
        tables = _counted("Training pairs per group", about, "group")
        yield Section("Groups in training" if tables else "", "", (), tables)


def _preferences(connection: duckdb.DuckDBPyConnection, about: Subject) -> Section:
    drawn = _drawn(pictures.margins(connection))
    notes = () if drawn else ("There are no pairs.",)
    tables = (*_per_group(connection, "preferences"), *_counted("From prompts to pairs", about, "prompts"))
    return Section("Pairs", "", notes, tables, drawn, tuple(samples.pairs(connection)))


def _candidates(connection: duckdb.DuckDBPyConnection, about: Subject) -> Section:
    is_evaluation = about.owners["candidates"].stage == "evaluate"
    scores = pictures.scores_before_after(connection) if is_evaluation else pictures.scores(connection)
    tokens = None if is_evaluation else pictures.tokens(connection)
    drawn = _drawn(scores, pictures.partial_scores(connection), tokens, pictures.lengths(connection))
    notes = () if scores else ("No answer has a finite score.",)
    # A report on pairs shows pairs.
    shown = () if about.manifest.kind == "preferences" else tuple(samples.answers(connection))
    return Section("Answers", "", notes, _per_group(connection, "candidates"), drawn, shown)


def _metrics(connection: duckdb.DuckDBPyConnection, about: Subject) -> Section:
    shown = [
        (group, metric, before, after, None if before is None or after is None else after - before, n)
        for group, metric, before, after, n in queries.metrics(connection)
    ]
    table = Table("Metrics", ["group", "metric", "before", "after", "change", "answers"], shown)
    return Section("Held-out metrics", "", (), (table,), _drawn(pictures.before_after(connection)))


def _training(connection: duckdb.DuckDBPyConnection, about: Subject) -> Section:
    drawn = pictures.training(connection)
    notes = () if drawn else ("The training log is empty.",)
    return Section("Training", "", notes, (), tuple(drawn))


def _comparison(connection: duckdb.DuckDBPyConnection, about: Subject) -> Section:
    found = queries.comparison(connection)
    table = Table("Comparison", ["metric", "group", "method", "mean", "lowest", "highest", "seeds"], found)
    return Section("Methods compared", "", (), (table,), _drawn(comparison(connection)))


def _rejected(connection: duckdb.DuckDBPyConnection, about: Subject) -> Section:
    rows = queries.drop_counts(connection)
    if not rows:
        return Section("Dropped rows", "", ("No row was dropped.",))
    table = Table("Dropped rows", ["group", "reason", "rows"], rows)
    return Section("Dropped rows", "", (), (table,), _drawn(plots.drops(rows)))


def _prompts(connection: duckdb.DuckDBPyConnection, about: Subject) -> Section:
    if about.manifest.kind != "prompts":
        return Section("")
    drawn = _drawn(pictures.prompt_lengths(connection))
    notes = () if drawn else ("There are no prompts.",)
    return Section("Prompts", "", notes, _per_group(connection, "prompts"), drawn, tuple(samples.prompts(connection)))


def _counted(title: str, about: Subject, needed: str) -> tuple[Table, ...]:
    """The stage's own rows per group, where they have the column."""
    rows = group_rows(about.manifest)
    columns = columns_of(rows)
    if needed not in columns:
        return ()
    return (Table(title, columns, [[row.get(column) for column in columns] for row in rows]),)


_BY_TABLE = {
    "preferences": _preferences,
    "metrics": _metrics,
    "comparison": _comparison,
    "training": _training,
    "candidates": _candidates,
    "rejected": _rejected,
    "prompts": _prompts,
}


def _per_group(connection: duckdb.DuckDBPyConnection, table: str) -> tuple[Table, ...]:
    found = queries.per_group(connection, table)
    return (Table("Per group", found.columns, found.rows),) if found.rows else ()


def _drawn(*pictures: Picture | None) -> tuple[Picture, ...]:
    return tuple(picture for picture in pictures if picture is not None)


def _render(about: Subject, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["svg"] = lambda picture: Markup(svg(picture))
    environment.filters["json"] = lambda value: json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    manifest = about.manifest
    return environment.get_template("page.html.j2").render(
        ref=str(about.ref),
        manifest=manifest,
        facts=_facts(about),
        lineage=family_tree(manifest, about.known),
        sections=sections,
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        light={variable(colour): colour for colour in DARK},
        dark={variable(colour): other for colour, other in DARK.items()},
    )


def _facts(about: Subject) -> Mapping[str, object]:
    manifest = about.manifest
    rows = {table: sum(file.rows or 0 for file in manifest.shards(table)) for table in _tables(about)}
    facts: dict[str, object] = {
        "stage": manifest.stage,
        "made": f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "rows": ", ".join(f"{count} {table}" for table, count in rows.items()) or "none",
        "files": f"{len(manifest.files)}, {sum(file.size_bytes for file in manifest.files)} bytes",
        "license": ", ".join(stated(manifest, about.known, "license") or ["not stated"]),
        "language": ", ".join(stated(manifest, about.known, "language") or ["not stated"]),
        "command": manifest.command,
    }
    plain = {key: value for key, value in manifest.stats.items() if not isinstance(value, dict | list)}
    return facts | plain


def _tables(about: Subject) -> list[str]:
    return sorted({file.table for file in about.manifest.files if file.table is not None})


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
