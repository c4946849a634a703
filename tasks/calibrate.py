"""How far partial scores can be trusted on these prompts, policy and reward; and the schedule that follows."""

import base64
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.writer import Shard
from tasks.artifacts import Cell, progress, show_image, show_stage
from tasks.calibration import KEY, Calibration, StoredFit
from tasks.errors import ConfigError
from tasks.generate import heldin_prompts, model_label, open_engine
from tasks.models import model_identity, model_path, open_reward, reward_identity, use_threads
from tasks.retries import RETRIES
from tasks.rows import candidates_table, prompts_of, rows_of
from tasks.score import scored_table
from tasks.settings import CalibrateConfig
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.decoding.calibration import Point, Trace

SHARD = Shard("candidates", "train", 0, 1)


def prepare(config: CalibrateConfig, lake: Lake) -> Step:
    """The step, with its prompts and models pinned."""
    generate = config.generate
    models = {"model": model_identity(generate.model, "policy", lake), "reward": reward_identity(generate, lake)}
    inputs = {"prompts": pin(lake, generate.prompts, f"prompts/{config.name}")}
    # What the cuts are set to makes no difference here.
    pinned = generate.model_copy(
        update={"name": config.name, "prompts": inputs["prompts"], "cut_policy": "none", "calibration": ""}
    )
    return Step(
        "calibrate",
        "candidates",
        f"{config.name}-calibration",
        config.model_copy(update={"generate": pinned}),
        inputs,
        models,
    )


@task(name="calibrate-answers", persist_result=False, **RETRIES)
def answer(step: Step, lake_root: str) -> int:
    """Finished, scored candidates with their partial scores; the number of candidates."""
    from runtime.decoding.rejection import CutSchedule

    config, lake = _config(step), Lake.open(lake_root)
    writer = step.writer(lake)
    found = writer.find(SHARD)
    if found is not None:
        return int(found.num_rows)
    use_threads(config.generate.threads)
    rows = heldin_prompts(step.inputs["prompts"], lake).slice(0, config.max_prompts)
    if rows.num_rows == 0:
        raise ConfigError(f"{step.inputs['prompts']} has no training prompts; lower ingest.heldout_fraction")
    prompts = prompts_of(rows)
    generate = config.generate
    path = model_path(generate.model, "policy", lake)
    tokens = [n for n in config.tokens if n < generate.max_new_tokens]
    # Cuts that keep everyone only score everyone.
    cuts = CutSchedule(tuple(tokens), (1.0,) * len(tokens))
    engine = open_engine(generate, path, cuts, open_reward(generate, lake), lake)
    answers = list(engine.generate(prompts, progress(f"{step.name} answers", "prompts")))
    table = candidates_table(prompts, answers, model_label(generate.model, path), generate.seed)
    writer.write(SHARD, scored_table(table, rows, generate, lake))
    return int(table.num_rows)


@task(name="publish-calibration", persist_result=False, **RETRIES)
def publish(step: Step, lake_root: str) -> DatasetRef:
    """Measure, propose a schedule, draw partial against final scores, and publish all of it."""
    from runtime.decoding.calibration import measure, propose

    config, lake = _config(step), Lake.open(lake_root)
    writer = step.writer(lake)
    rows = writer.find(SHARD)
    assert rows is not None
    traces = traces_of(rows_of(rows))
    points = measure(traces, config.tokens)
    proposal = propose(traces, [point.n_tokens for point in points], config.retained)
    calibration = Calibration(
        tokens=list(proposal.tokens),
        keep=list(proposal.keep),
        token_share=round(proposal.token_share, 4),
        gain_retained=round(proposal.gain_retained, 4),
        fits=[
            StoredFit(n_tokens=fit.n_tokens, intercept=fit.intercept, slope=fit.slope, residual=fit.residual)
            for point in points
            # Where most prompts have nobody running any more, a fit rests on their slowest answers.
            if (fit := point.fit) is not None and 2 * point.n_prompts >= len(traces)
        ],
    )
    table = [_shown(point) for point in points]
    stats: dict[str, JsonValue] = {
        "prompts": len(traces),
        "answers": sum(map(len, traces)),
        "schedule": f"cut_tokens = {calibration.tokens}, cut_keep = {calibration.keep}",
        "token_share": calibration.token_share,
        "gain_retained": calibration.gain_retained,
        "points": [dict(row) for row in table],
        KEY: calibration.model_dump(),
    }
    with tempfile.TemporaryDirectory(prefix="winnow-calibrate-") as folder:
        image = _draw(traces, points, Path(folder))
        if image is None:
            stats["plot"] = "none; it needs matplotlib: pip install 'winnow[report]'"
        else:
            writer.add_tree(Path(folder), "plots")
        ref = writer.commit(step.provenance(stats))
        show_stage(ref, {key: value for key, value in stats.items() if key not in ("points", KEY)}, table)
        if image is not None:
            encoded = base64.b64encode(image.read_bytes()).decode()
            show_image(ref, f"data:image/png;base64,{encoded}", "Partial against final scores")
    return ref


def traces_of(rows: Sequence[dict[str, object]]) -> "list[list[Trace]]":
    """The finished, scored answers of each prompt."""
    from runtime.decoding.calibration import Trace

    found: dict[str, list[Trace]] = {}
    for row in rows:
        score, cuts, n_tokens = row["score"], row["cuts"], row["n_tokens"]
        if row["status"] == "ok" and isinstance(score, float) and isinstance(n_tokens, int):
            assert isinstance(cuts, list)
            partial = {cut["n_tokens"]: cut["score"] for cut in cuts}
            found.setdefault(str(row["prompt_id"]), []).append(Trace(n_tokens, score, partial))
    return list(found.values())


def _shown(point: "Point") -> dict[str, Cell]:
    survives = {f"winner in {keep:.0%}": round(share, 3) for keep, share in point.winner_survives.items()}
    return {
        "tokens": point.n_tokens,
        "prompts": point.n_prompts,
        "pearson": round(point.pearson, 3),
        "kendall": round(point.kendall, 3),
        **survives,
    }


def _draw(traces: "Sequence[Sequence[Trace]]", points: "Sequence[Point]", folder: Path) -> Path | None:
    """A scatter of partial against final scores per token count; None without matplotlib."""
    if find_spec("matplotlib") is None or not points:
        return None
    from matplotlib.figure import Figure

    shown = points[:: max(1, -(-len(points) // 4))][:4]
    figure = Figure(figsize=(3.2 * len(shown), 3.2), layout="constrained")
    for place, point in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), place)
        pairs = [(t.partial[point.n_tokens], t.score) for ts in traces for t in ts if point.n_tokens in t.partial]
        axes.scatter([x for x, _ in pairs], [y for _, y in pairs], s=4, alpha=0.3)
        axes.set(title=f"{point.n_tokens} tokens, r = {point.pearson:.2f}", xlabel="partial score")
    figure.axes[0].set_ylabel("final score")
    path = folder / "partial-vs-final.png"
    figure.savefig(path, dpi=90)
    return path


def _config(step: Step) -> CalibrateConfig:
    assert isinstance(step.config, CalibrateConfig)
    return step.config
