"""What each round of an iterated chain is told."""

from tasks.errors import ConfigError
from tasks.plan import check_connections
from tasks.settings import PipelineConfig


def check_rounds(config: PipelineConfig) -> None:
    """ConfigError for what would hold in the first round only."""
    check_connections(config)
    if config.generate.model != config.finetune.model:
        raise ConfigError(
            f'generate.model = "{config.generate.model}", but finetune.model = "{config.finetune.model}"; '
            "rounds train the policy that answered: set both alike"
        )
    if config.generate.s3d != "off":
        raise ConfigError(
            f'generate.s3d = "{config.generate.s3d}": an adapter fits one policy, every round makes another; use off'
        )
    if config.generate.server:
        raise ConfigError(
            f'generate.server = "{config.generate.server}" serves one policy, and every round makes another'
        )
    if config.generate.cut_policy in ("calibrated", "adaptive") and not config.generate.calibration:
        raise ConfigError(
            f'generate.cut_policy = "{config.generate.cut_policy}": rounds have names of their own; '
            "set generate.calibration"
        )
    if config.execution.approve_training:
        raise ConfigError(
            "execution.approve_training = true: rounds train without asking; set false, or run a pipeline"
        )


def round_config(config: PipelineConfig, number: int, model: str) -> PipelineConfig:
    """Of round 1, 2, ...: its own name and noise, the last round's model, and the method that is asked for."""
    method = {"method": "sft"} if config.iterate.method == "best_of_n" else {}
    generate = {"model": model, "seed": config.generate.seed + number - 1}
    finetune = {"model": model, "seed": config.finetune.seed + number - 1, **method}
    changes = {"name": f"{config.name}-r{number}"}
    stages = {"generate": config.generate.model_dump() | generate, "finetune": config.finetune.model_dump() | finetune}
    return PipelineConfig.model_validate(config.model_dump() | changes | stages)
