"""Methods compared: every method with every seed is an ordinary fine-tuning, every model's answers an evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prefect import task

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Shard
from tasks import evaluate, finetune
from tasks.artifacts import show_stage
from tasks.comparison import START, answer_rows, overview, start_rows, summary, training_rows
from tasks.errors import USER_ERRORS, ConfigError
from tasks.pictures import show_picture
from tasks.retries import RETRIES
from tasks.settings import CompareConfig, EvaluateConfig, FinetuneConfig
from tasks.settings_compare import slug, variant
from tasks.versions import Step, pin


@dataclass(frozen=True, slots=True)
class Run:
    """One method with one seed; `evaluate` is None where no answers are wanted. The references are their results."""

    method: str
    seed: int
    finetune: FinetuneConfig
    evaluate: EvaluateConfig | None
    model: str
    answers: str | None

    @property
    def label(self) -> str:
        """As it is named among the inputs of the comparison."""
        return f"{self.method}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The step that publishes, and what runs before it."""

    step: Step
    runs: tuple[Run, ...]


def prepare(config: CompareConfig, lake: Lake) -> Comparison:
    """All runs with their inputs pinned, and all versions; ConfigError for what could not be compared."""
    preferences = pin(lake, config.finetune.preferences, f"preferences/{config.name}")
    prompts = _prompts(config, lake)
    if prompts is None and not lake.manifest(lake.resolve(preferences)).shards("preferences", "test"):
        raise ConfigError(
            f'{preferences} has no held-out pair and evaluate.truth = "none", so there is nothing to compare by; '
            "set test_share where it was made, or a truth rule"
        )
    shared = config.finetune.model_copy(update={"preferences": preferences})
    runs = tuple(_run(config, shared, prompts, method, lake) for method in _methods(config))
    inputs = {"preferences": preferences} | ({"prompts": prompts} if prompts else {})
    inputs |= {run.label: run.model for run in runs}
    inputs |= {f"{run.label}, answers": run.answers for run in runs if run.answers}
    pinned = config.model_copy(update={"finetune": shared})
    return Comparison(Step("compare", "models", f"{config.name}-compare", pinned, inputs), runs)


@contextmanager
def named(run: Run) -> Iterator[None]:
    """Say whose mistake it was; what other methods have finished stays in the lake."""
    try:
        yield
    except USER_ERRORS as error:
        raise ConfigError(f"compare: {run.label}: {error}") from error


@task(name="publish-comparison", persist_result=False, **RETRIES)
def publish(comparison: Comparison, lake_root: str) -> DatasetRef:
    """All figures of all runs in one table, their means and spreads, and a picture."""
    lake, step = Lake.open(lake_root), comparison.step
    config = step.config
    assert isinstance(config, CompareConfig)
    rows: list[dict[str, object]] = []
    for run in comparison.runs:
        known = {"method": run.method, "seed": run.seed, "model": run.model}
        rows += training_rows(lake.manifest(lake.resolve(run.model)).stats, known)
        if run.answers:
            metrics = lake.read_table(lake.resolve(run.answers), "metrics", "test")
            rows += answer_rows(metrics, known)
            if run.finetune.model == config.finetune.model and not any(row["method"] == START for row in rows):
                rows += start_rows(metrics, run.finetune.model)
    writer = step.writer(lake)
    writer.write(Shard("comparison", "test", 0, 1), to_table("comparison", rows))
    figures = summary(rows)
    ref = writer.commit(step.provenance({"runs": len(comparison.runs), "comparison": list(figures)}))
    show_stage(ref, {"methods": ", ".join(config.methods), "seeds": config.seeds}, overview(figures))
    show_picture(lake, ref)
    return ref


def _methods(config: CompareConfig) -> list[tuple[str, int]]:
    """Seeds outside: a comparison that is stopped half-way has every method with some seeds."""
    return [(" ".join(method.split()), seed) for seed in config.seeds for method in config.methods]


def _prompts(config: CompareConfig, lake: Lake) -> str | None:
    """The held-out prompts to answer; None without a truth rule."""
    if config.evaluate.truth == "none":
        return None
    if config.evaluate.after:
        raise ConfigError(f'evaluate.after = "{config.evaluate.after}": a comparison trains its models; leave it empty')
    if not config.evaluate.prompts and lake.find("prompts", config.name) is None:
        raise ConfigError(
            f"there are no prompts/{config.name} to answer; set evaluate.prompts, or evaluate.truth = "
            '"none" to compare on the held-out pairs alone'
        )
    return pin(lake, config.evaluate.prompts, f"prompts/{config.name}")


def _run(config: CompareConfig, shared: FinetuneConfig, prompts: str | None, of: tuple[str, int], lake: Lake) -> Run:
    method, seed = of
    name = f"{config.name}-{slug(method)}"
    trained = variant(shared, method).model_copy(update={"name": name, "seed": seed})
    if prompts and trained.method == "reward":
        raise ConfigError(f'methods has "{method}": a reward model answers nothing; set evaluate.truth = "none"')
    try:
        model = finetune.prepare(trained, lake).ref_text
    except ConfigError as error:
        raise ConfigError(f'methods has "{method}": {error} (FIELD= in that line stands for the default)') from error
    if prompts is None:
        return Run(method, seed, trained, None, model, None)
    given = {"name": name, "prompts": prompts, "before": trained.model, "after": model}
    evaluated = config.evaluate.model_copy(update=given)
    return Run(method, seed, trained, evaluated, model, evaluate.prepare(evaluated, lake).ref_text)
