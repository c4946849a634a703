"""The chain run again on its own result. From the command line: `winnow iterate CONFIG`."""

from prefect import flow, tags

from flows.assemble import assemble
from flows.evaluate import evaluate
from flows.finetune import finetune
from flows.generate import generate
from flows.ingest import ingest
from flows.score import score
from storage.lake import DatasetRef
from tasks.rounds import check_rounds, round_config
from tasks.settings import PipelineConfig


@flow(name="iterate", flow_run_name="iterate-{config.name}", persist_result=False)
def iterate(config: PipelineConfig, lake: str) -> dict[str, DatasetRef]:
    """Rounds of candidates, pairs and a model, each from the last one's model; then the first against the last.

    Args:
        config: all stages; iterate says how many rounds, and what is learnt from the candidates
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    check_rounds(config)
    with tags("winnow-stage"):  # infra/automations/zombie-runs.yaml
        prompts = ingest(config.stage(config.ingest), lake)
        model, found = config.generate.model, {"ingest": prompts}
        for number in range(1, config.iterate.rounds + 1):
            now = round_config(config, number, model)
            candidates = generate(now.stage(now.generate, prompts=str(prompts)), lake, config.execution)
            scored = score(now.stage(now.score, candidates=str(candidates)), lake, config.execution)
            pairs = assemble(now.stage(now.assemble, candidates=str(scored)), lake)
            trained = finetune(now.stage(now.finetune, preferences=str(pairs)), lake)
            found |= {f"round {number}: pairs": pairs, f"round {number}: model": trained}
            model = str(trained)
        models = {"prompts": str(prompts), "before": config.generate.model, "after": model}
        compared = evaluate(config.stage(config.evaluate, **models), lake)
    return found | {"evaluate": compared}
