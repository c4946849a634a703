"""The dataset card of a version: YAML that `datasets.load_dataset(DIRECTORY)` understands, and what is in it.

Rendered from manifests alone, so equal versions have equal cards.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from pydantic import JsonValue

from storage.histogram import Histogram
from storage.lineage import content_line, family_tree
from storage.manifest import Manifest
from storage.summary import HISTOGRAMS, columns_of, cut_rows, drops, group_rows, histograms, stated

NOT_STATED = "not stated"
MAIN_TABLE = {"prompts": "prompts", "candidates": "candidates", "preferences": "preferences", "models": "training"}
BAR_WIDTH = 24
MAX_HISTOGRAM_GROUPS = 6
_NOT_LISTED = {"rejected"}
_TAGS = {
    "prompts": ("prompts",),
    "candidates": ("best-of-n", "synthetic"),
    "preferences": ("preference", "dpo", "synthetic"),
}
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
_WHAT = {
    "ingest": "Prompts, each with the group of people who ask it. Rows that could not be used are in `rejected`.",
    "generate": "Best-of-N answers to prompts. Hopeless ones were cut while they were written; they are kept as rows.",
    "score": "Best-of-N answers to prompts, with the reward model's score of every finished one.",
    "calibrate": "Full answers scored along the way: how far partial scores say what the final ones will be.",
    "import": "Pairs of a better and a worse answer that were there before, with the groups of people they come from.",
    "assemble": "Pairs of a better and a worse answer to one prompt, in the layout that TRL reads.",
    "reference": "Log-probabilities of the answers of preference pairs under the model that training starts from.",
    "finetune": "A model trained on preference pairs, as a Hugging Face folder in `model/`.",
    "evaluate": "Held-out prompts answered by the model before and after fine-tuning, and metrics per group.",
    "compare": "Several methods trained on the same pairs with the same seeds, compared per group and worst group.",
    "export": "A model that left the lake.",
}


def render_card(manifest: Manifest, known: Mapping[str, Manifest] | None = None) -> str:
    """README.md of a version; `known` holds the manifests of its ancestors."""
    family = known or {}
    return f"---\n{_front_matter(manifest, family)}---\n\n" + "\n".join(_body(manifest, family))


def _front_matter(manifest: Manifest, known: Mapping[str, Manifest]) -> str:
    # A JSON text is a YAML one.
    lines = []
    for key in ("license", "language"):
        values = stated(manifest, known, key)
        if key == "language" and values:
            values = sorted({code.strip() for value in values for code in value.split(",")})
        if values:
            lines.append(f"{key}: {json.dumps(values[0] if len(values) == 1 else values)}")
    if manifest.kind in _TAGS:
        # Imported pairs were there before; whether people or models wrote them is the source's to say.
        tags = [tag for tag in _TAGS[manifest.kind] if tag != "synthetic" or manifest.stage != "import"]
        lines += ["tags:", *(f"- {tag}" for tag in (*tags, "winnow"))]
        lines += ["size_categories:", f"- {_size(manifest)}"]
    tables = sorted({file.table for file in manifest.files if file.table and file.rows} - _NOT_LISTED)
    if tables:
        lines.append("configs:")
    for table in tables:
        lines.append(f"- config_name: {table}")
        if table == MAIN_TABLE.get(manifest.kind):
            lines.append("  default: true")
        lines.append("  data_files:")
        for split in sorted({str(file.split) for file in manifest.shards(table) if file.rows}):
            lines += [f"  - split: {split}", f"    path: {table}/{split}-*.parquet"]
    return "".join(f"{line}\n" for line in lines)


def _size(manifest: Manifest) -> str:
    """The hub's category for the number of rows in the main table."""
    n_rows = sum(file.rows or 0 for file in manifest.shards(MAIN_TABLE[manifest.kind]))
    names = [f"{n // 1000}K" if n < 1_000_000 else f"{n // 1_000_000}M" for n in _SIZES[:-1]] + ["1B"]
    place = next((i for i, limit in enumerate(_SIZES) if n_rows < limit), len(_SIZES))
    if place == 0:
        return "n<1K"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else "n>1B"


def _body(manifest: Manifest, known: Mapping[str, Manifest]) -> Iterator[str]:
    yield f"# {manifest.kind}/{manifest.name}\n"
    yield f"{_WHAT.get(manifest.stage, '')}\n".lstrip("\n")
    yield f"Version `{manifest.version}`, made by the stage `{manifest.stage}` of Winnow.\n"
    for key in ("license", "language"):
        yield f"{key}: {', '.join(map(escape, stated(manifest, known, key) or [NOT_STATED]))}\n"
    rows: list[dict[str, JsonValue]] = [
        {"table": table, "split": split, "rows": sum(file.rows or 0 for file in manifest.shards(table, split))}
        for table, split in sorted({(str(file.table), str(file.split)) for file in manifest.files if file.table})
    ]
    yield from _section("Rows", rows)
    if rows:
        yield from _loading(manifest)
    yield from _section("Groups", group_rows(manifest))
    line = content_line(manifest, known)
    for title, owner, histogram in histograms(line):
        yield from _histogram(f"{title}{_of(owner, manifest)}", histogram)
    cuts = cut_rows(line)
    if cuts:
        yield from _section(f"Cuts{_of(cuts[0], manifest)}", cuts[1])
    yield from _section("Dropped", drops(manifest))
    yield "## Lineage\n"
    for each in family_tree(manifest, known):
        yield f"{'  ' * each.depth}- {escape(each.role)}: {_code(each.text)} ({each.note})"
    yield "" if manifest.inputs else "- none\n"
    yield f"## Command\n\n{_fenced(manifest.command)}"
    yield f"## Configuration\n\n{_fenced(_json(manifest.config), 'json')}"
    stats = {key: value for key, value in manifest.stats.items() if key != "groups" and key not in HISTOGRAMS}
    yield f"## Statistics\n\n{_fenced(_json(stats), 'json')}"


def _loading(manifest: Manifest) -> Iterator[str]:
    listed = {str(file.table) for file in manifest.files if file.table and file.rows} - _NOT_LISTED
    table = MAIN_TABLE.get(manifest.kind)
    if table not in listed:
        return
    split = min(
        {str(file.split) for file in manifest.shards(table) if file.rows}, key=lambda name: (name != "train", name)
    )
    load = f'rows = load_dataset("FOLDER", "{table}", split="{split}")'
    python = f"from datasets import load_dataset\n\n{load}\nprint(rows[0])"
    sql = f"SELECT * FROM read_parquet('FOLDER/{table}/*.parquet') LIMIT 5"
    yield f"## Load\n\nFOLDER is where this file lies.\n\n{_fenced(python, 'python')}"
    yield f"DuckDB:\n\n{_fenced(sql, 'sql')}"


def _of(owner: Manifest, manifest: Manifest) -> str:
    return "" if owner.label == manifest.label else f" of {owner.label}"


def _histogram(title: str, histogram: Histogram) -> Iterator[str]:
    """One row per bin: the range, the count of each group where they are few, the total and a bar."""
    groups = histogram.counts if len(histogram.counts) <= MAX_HISTOGRAM_GROUPS else {}
    totals = histogram.totals
    most = max(totals) or 1
    rows: list[list[JsonValue]] = [
        [
            histogram.edges[i],
            histogram.edges[i + 1],
            *(counts[i] for counts in groups.values()),
            total,
            _bar(total, most),
        ]
        for i, total in enumerate(totals)
    ]
    yield from _table(title, ["from", "below", *groups, "all groups", ""], rows)


def _bar(count: int, most: int) -> str:
    return "\u25a0" * round(BAR_WIDTH * count / most)


def _section(title: str, rows: Sequence[Mapping[str, JsonValue]]) -> Iterator[str]:
    columns = columns_of(rows)
    yield from _table(title, columns, [[row.get(column) for column in columns] for row in rows])


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[JsonValue]]) -> Iterator[str]:
    if rows:
        lines = [f"| {' | '.join(map(escape, columns))} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
        yield f"## {title}\n\n" + "\n".join(lines) + "\n"


def _cell(value: JsonValue) -> str:
    if value is None:
        return ""
    return _short(value) if isinstance(value, float) else escape(str(value))


def _short(value: float) -> str:
    return f"{value:.6g}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]|~#>])", r"\\\1", plain)


def _code(text: str) -> str:
    return f"`{text}`" if re.fullmatch(r"[\w@:/.-]+", text) else escape(text)


def _fenced(text: str, language: str = "") -> str:
    """A code block that no line of `text` can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"


def _json(value: Mapping[str, JsonValue]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
