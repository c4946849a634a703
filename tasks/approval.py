"""The gate before training: a person looks at the pairs, then resumes the run or cancels it."""

from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from storage.lake import Lake
from tasks import finetune
from tasks.errors import ConfigError
from tasks.settings import FinetuneConfig

WAIT_SECONDS = 7 * 24 * 3600


class Approval(RunInput):
    """What the form of the resume dialog asks."""

    approved: bool = Field(False, title="Train on these pairs", description="Unticked, the run ends here and fails")
    note: str = Field("", title="Note", description="Kept in the run's log")


def wait_for_approval(config: FinetuneConfig, lake_root: str) -> None:
    """Suspend the run until someone resumes it, unless the model is in the lake; ConfigError when it is refused.

    A suspended run holds no worker. Resumed, it starts from the top and finds every stage before this one in the lake.
    """
    lake = Lake.open(lake_root)
    if finetune.prepare(config, lake).published(lake):
        return
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        raise ConfigError(
            "execution.approve_training = true needs a run of a deployment, which can be resumed: `winnow deploy`, "
            "then start it in the UI"
        )
    form = Approval.with_initial_data(description=_question(config, lake))
    answer = suspend_flow_run(wait_for_input=form, timeout=WAIT_SECONDS, key="approve-training")
    if not answer.approved:
        raise ConfigError(f"training was not approved: {answer.note or 'no reason was given'}")


def _question(config: FinetuneConfig, lake: Lake) -> str:
    stats = lake.manifest(lake.resolve(config.preferences)).stats
    lines = [f"- {group}: {count}" for group, count in (stats.get("pairs_per_group") or {}).items()]  # type: ignore[union-attr]
    return "\n".join([f"# Train on {config.preferences}?", "", f"Method {config.method}, pairs per group:", "", *lines])
