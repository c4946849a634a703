"""The whole chain. From the command line: `winnow run CONFIG`."""

from prefect import flow, tags

from flows.assemble import assemble
from flows.evaluate import evaluate
from flows.export import export
from flows.finetune import finetune
from flows.generate import generate
from flows.ingest import ingest
from flows.score import score
from storage.lake import DatasetRef, Lake
from tasks.approval import wait_for_approval
from tasks.cache import published_chain
from tasks.plan import export_inputs, steps
from tasks.settings import ChainConfig
from tasks.settings_execution import PIPELINE_HERE, PipelineExecutionConfig


@flow(name="pipeline", flow_run_name="pipeline-{config.name}", persist_result=False)
def pipeline(
    config: ChainConfig, lake: str, execution: PipelineExecutionConfig = PIPELINE_HERE
) -> dict[str, DatasetRef]:
    """Prompts to a fine-tuned, evaluated and exported model; stages that are in the lake already are not run.

    Args:
        config: all stages
        lake: the lake, a folder or s3://BUCKET/PREFIX
        execution: on how many workers; changes no result
    """
    opened = Lake.open(lake)
    if found := published_chain(config.name, steps(config, opened), opened):
        return found
    with tags("winnow-stage"):  # infra/automations/zombie-runs.yaml
        prompts = ingest(config.stage(config.ingest), lake)
        candidates = generate(config.stage(config.generate, prompts=str(prompts)), lake, execution)
        scored = score(config.stage(config.score, candidates=str(candidates)), lake, execution)
        pairs = assemble(config.stage(config.assemble, candidates=str(scored)), lake)
        training = config.stage(config.finetune, preferences=str(pairs))
        if execution.approve_training:
            wait_for_approval(training, lake)
        model = finetune(training, lake)
        models = {"before": config.finetune.model, "after": str(model)}
        evaluation = evaluate(config.stage(config.evaluate, prompts=str(prompts), **models), lake)
        bundle = export(config.stage(config.export, **export_inputs(config, str(model), str(scored))), lake)
    return {
        "ingest": prompts,
        "generate": candidates,
        "score": scored,
        "assemble": pairs,
        "finetune": model,
        "evaluate": evaluation,
        "export": bundle,
    }
