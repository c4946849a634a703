"""What the statistics of a version say, in one form whatever the stage: groups, drops, histograms, cuts, licences."""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue, ValidationError

from storage.histogram import Histogram
from storage.lineage import content_line
from storage.manifest import Manifest

Row = dict[str, JsonValue]

HISTOGRAMS = {"score_histogram": "Scores", "margin_histogram": "Score margins"}
# Where rows were dropped, stage by stage: reason -> number.
_DROPS = ("rejected", "prompts_without_pair", "dropped")
_CUTS = "tokens_saved_estimate"
# Kinds whose rows are the prompts' own text or answers to it.
_TEXTS = ("prompts", "candidates", "preferences")


# What a run took, as a column of `runs` each, and where its stage counts it.
_COUNTED = {
    "prompts": ("prompts",),
    "tokens": ("tokens_decoded", "tokens"),
    "cuts": ("cut",),
    "reward_calls": ("reward_calls", "scored"),
}
COUNTERS = (*_COUNTED, "rows", "bytes")


def counters(manifest: Manifest) -> dict[str, int | None]:
    """Prompts, tokens, cuts and reward calls as the stage counted them (None: it counts none); rows, bytes written."""
    found: dict[str, int | None] = {name: _counted(manifest, keys) for name, keys in _COUNTED.items()}
    found["rows"] = sum(file.rows or 0 for file in manifest.files)
    found["bytes"] = sum(file.size_bytes for file in manifest.files)
    return found


def _counted(manifest: Manifest, keys: Sequence[str]) -> int | None:
    values = (manifest.stats.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def group_rows(manifest: Manifest) -> list[Row]:
    """One row per group, as the stage counted them; nested counts are left to `drops`."""
    stored = manifest.stats.get("groups")
    rows: list[Row]
    if isinstance(stored, list):
        rows = [dict(row) for row in stored if isinstance(row, dict)]
    elif isinstance(stored, dict):
        rows = [{"group": group, **values} for group, values in stored.items() if isinstance(values, dict)]
    else:
        pairs = manifest.stats.get("pairs_per_group")
        rows = [{"group": group, "pairs": n} for group, n in pairs.items()] if isinstance(pairs, dict) else []
    return [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]


def columns_of(rows: Sequence[Mapping[str, JsonValue]]) -> list[str]:
    """All columns, in the order in which they come."""
    return list(dict.fromkeys(key for row in rows for key in row))


def drops(manifest: Manifest) -> list[Row]:
    """{group, reason, rows}; the group is None where the stage counted over all of them."""
    stored = manifest.stats.get("groups")
    found: list[Row] = []
    for row in stored if isinstance(stored, list) else []:
        dropped = row.get("dropped") if isinstance(row, dict) else None
        if isinstance(row, dict) and isinstance(dropped, dict):
            found += [{"group": row.get("group"), "reason": why, "rows": n} for why, n in sorted(dropped.items())]
    if found:
        return found
    for key in _DROPS:
        counted = manifest.stats.get(key)
        if isinstance(counted, dict):
            found += [{"group": None, "reason": why, "rows": n} for why, n in sorted(counted.items())]
    return found


def histograms(line: Sequence[Manifest]) -> list[tuple[str, Manifest, Histogram]]:
    """(title, whose, histogram) of the nearest version in the line that has each."""
    found = []
    for key, title in HISTOGRAMS.items():
        owner = next((one for one in line if key in one.stats), None)
        histogram = _histogram(owner.stats[key]) if owner else None
        if owner is not None and histogram is not None:
            found.append((title, owner, histogram))
    return found


def cut_rows(line: Sequence[Manifest]) -> tuple[Manifest, list[Row]] | None:
    """What cuts did in the nearest version of the line that was decoded, in all and per group."""
    owner = next((one for one in line if _CUTS in one.stats), None)
    if owner is None:
        return None
    counted: list[Row] = [{"group": "all groups", **owner.stats}, *group_rows(owner)]
    return owner, [_cut_row(row) for row in counted if _CUTS in row]


def _cut_row(row: Mapping[str, JsonValue]) -> Row:
    candidates, cut = row.get("candidates"), row.get("cut")
    is_known = isinstance(candidates, int) and isinstance(cut, int) and candidates > 0
    return {
        "group": row.get("group"),
        "candidates": candidates,
        "cut": cut,
        "share cut": round(cut / candidates, 4) if is_known else None,  # type: ignore[operator]
        "tokens decoded": row.get("tokens_decoded"),
        "tokens saved (estimate)": row.get(_CUTS),
        "share saved": row.get("share_saved_estimate"),
    }


def stated(manifest: Manifest, known: Mapping[str, Manifest], key: str) -> list[str] | None:
    """What the prompts behind a version state as `license` or `language`; None unless every one of them does."""
    if manifest.kind not in _TEXTS:
        return None
    prompts = [one for one in content_line(manifest, known) if one.kind == "prompts"]
    values = [one.config.get(key) for one in prompts]
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    return sorted(set(texts)) if texts and len(texts) == len(values) else None


def _histogram(stored: JsonValue) -> Histogram | None:
    try:
        found = Histogram.model_validate(stored)
    except ValidationError:
        return None  # a stage without a single finite score stores null
    n_bins = len(found.edges) - 1
    return found if all(len(each) == n_bins for each in found.counts.values()) else None
