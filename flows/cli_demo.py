"""`winnow demo`: the whole chain on the embedded starter, and what came out of it."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from textwrap import indent
from typing import cast

import typer

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, VerboseOption, emit, output, table
from flows.cli_run import run_pipeline
from flows.config import validate
from storage.lake import DatasetRef, Lake

QUERY = (
    'SELECT "group", COUNT(*) AS pairs, ROUND(AVG(score_margin), 2) AS mean_margin '
    "FROM preferences WHERE dataset = 'demo' GROUP BY 1 ORDER BY 2 DESC"
)
# A second thread gains 4 % on a model this small, and loses a factor of four where anything else runs.
DEMO: dict[str, object] = {
    "name": "demo",
    "ingest": {"source": "starter", "max_prompts": 400, "max_heldout": 160},
    "generate": {"n": 16, "s3d": "auto", "threads": 1},
    "score": {"threads": 1},
    "evaluate": {"threads": 1},
    "finetune": {"learning_rate": 4e-4, "epochs": 3, "beta": 0.05, "nll_weight": 20.0, "threads": 1},
}


def add_commands(app: typer.Typer) -> None:
    """Put the command of this module into `app`."""
    app.command("demo")(demo)


def demo(lake: LakeOption = DEFAULT_LAKE, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Run the whole chain on the embedded starter: offline, in minutes, on two CPU cores."""
    started = time.monotonic()
    refs, cached = run_pipeline(validate(DEMO), lake, verbose)
    report = _report(refs, cached, Lake.open(lake)) | {"seconds": round(time.monotonic() - started, 1)}
    if as_json:
        emit(report)
    else:
        _print(report)


def _report(refs: Mapping[str, DatasetRef], cached: Mapping[str, bool], lake: Lake) -> dict[str, object]:
    from storage.catalog import query
    from tasks.edge_answer import edge_answer

    stats = {stage: lake.manifest(ref).stats for stage, ref in refs.items()}
    result = query(lake, QUERY)
    return {
        "stages": {stage: {"ref": str(ref), "uri": ref.uri, "cached": cached[stage]} for stage, ref in refs.items()},
        "rejection": {key: stats["generate"][key] for key in stats["generate"]},
        "pairs_per_group": stats["assemble"]["pairs_per_group"],
        "groups": stats["evaluate"]["groups"],
        "worst_group": stats["evaluate"]["worst_group"],
        "edge": asdict(edge_answer(lake, refs["export"], refs["ingest"])),
        "export_seconds": stats["export"]["seconds"],
        "query": {"sql": QUERY, "columns": result.columns, "rows": [list(row) for row in result.rows]},
    }


def _print(report: Mapping[str, object]) -> None:
    console = output()
    stages = cast(dict[str, dict[str, object]], report["stages"])
    rows = [(name, s["ref"], "in the lake" if s["cached"] else "made", s["uri"]) for name, s in stages.items()]
    console.print(table(["stage", "version", "", "folder"], rows))

    r = cast(dict[str, float], report["rejection"])
    console.print(
        f"\nSpeculative rejection: {r['cut']:.0f} of {r['candidates']:.0f} candidates cut early; "
        f"{r['tokens_decoded']:.0f} tokens decoded, about {r['tokens_saved_estimate']:.0f} "
        f"({r['share_saved_estimate']:.0%}) saved (estimate)."
    )
    pairs = cast(dict[str, int], report["pairs_per_group"])
    console.print(f"Pairs: {', '.join(f'{group} {count}' for group, count in pairs.items())}.\n")

    groups = cast(list[dict[str, float]], report["groups"])
    changes = [
        (g["group"], g["truth_before"], g["truth_after"], f"{g['truth_after'] - g['truth_before']:+.3f}")
        for g in groups
    ]
    console.print("Right answers on held-out prompts (right number, in the style the group wants), pass@1:")
    console.print(table(["group", "before", "after", "change"], changes))
    worst = cast(dict[str, object], report["worst_group"])
    console.print(
        f"Worst group: {worst['group_before']} {worst['before']} before, "
        f"{worst['group_after']} {worst['after']} after.\n"
    )
    found = cast(dict[str, list[list[object]]], report["query"])
    console.print(f"winnow query {json.dumps(found['sql'])}", soft_wrap=True)
    console.print(table(cast(list[str], found["columns"]), found["rows"]))
    e = cast(dict[str, float], report["edge"])
    console.print(
        f"\nThe edge bundle with half of its neurons in memory ({e['budget_bytes'] / 1e6:.2f} MB instead of "
        f"{e['whole_bytes'] / 1e6:.2f}, {e['hit_rate']:.0%} of the cold ones it wanted were there), asked:\n"
        f"  {e['question']}\n{indent(str(e['answer']), '  ')}",
        markup=False,
    )
    console.print(f"Token by token {'the same' if e['is_same'] else 'NOT the same'} answer as with all in memory.")
    n_cached = sum(bool(s["cached"]) for s in stages.values())
    console.print(
        f"\n{n_cached} of {len(stages)} stages were in the lake already; {report['seconds']} s in all. "
        f"Making the bundle took {report['export_seconds']} s."
    )
