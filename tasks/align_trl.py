"""The same training by TRL's GRPOTrainer, for machines on which its engine is the faster one. Needs the extra `trl`."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.errors import ConfigError
from tasks.settings import AlignConfig

if TYPE_CHECKING:
    from runtime.alignment.config import Places
    from runtime.alignment.online.loop import Task
    from runtime.alignment.online.training import OnlineConfig, OnlineReport
    from runtime.models import LoadedModel
    from runtime.records import Progress, Prompt

LOSSES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}
# What TRL has no counterpart for, at the values that say so, or at the defaults where those do not touch the result.
OURS_ALONE: dict[str, object] = {
    "skip_equal": False,
    "reducer": "mean",
    "s3d": "off",
    "lora": False,
    "minibatches": 1,
    "eval_steps": 0,
    "eos_penalty": 0.0,
    "processes": 1,
}
UNHEARD = ("save_steps", "kl_limit", "max_rows", "rows")
CURVES = {"reward": "reward", "kl": "kl", "entropy": "entropy", "completions/mean_length": "tokens"} | {
    name: name for name in ("loss", "grad_norm", "learning_rate")
}


def check_trl(config: AlignConfig) -> None:
    """ConfigError for what the backend cannot do."""
    if config.backend != "trl":
        return
    if config.method != "grpo":
        raise ConfigError(f'backend = "trl" trains grpo, not {config.method}; use the backend winnow')
    for name, needed in OURS_ALONE.items():
        if getattr(config, name) != needed:
            raise ConfigError(f'{name} = {getattr(config, name)} is not known to backend = "trl"; set {needed}')
    for name in UNHEARD:
        if getattr(config, name) != AlignConfig.model_fields[name].default:
            raise ConfigError(f'{name} = {getattr(config, name)} does nothing in backend = "trl"; leave it out')


def train_by_trl(
    loaded: "LoadedModel", task: "Task", config: "OnlineConfig", places: "Places", on_progress: "Progress | None" = None
) -> "OnlineReport":
    """`train_online` by TRL; its figures under our names, and no checkpoint to go on from."""
    try:
        from trl import GRPOTrainer
    except ImportError as error:
        raise ConfigError('backend = "trl" needs TRL; run: pip install "winnow[trl]"') from error
    from datasets import Dataset

    from runtime.alignment.online.training import OnlineReport
    from runtime.models import quiet

    report, unscored = OnlineReport(steps=config.steps), Counter[str]()
    trainer = GRPOTrainer(
        model=loaded.model,
        reward_funcs=_rewards(task, report, unscored),
        args=_arguments(loaded, config, places),
        train_dataset=Dataset.from_list([_row(prompt, config.drawing.prompt_format) for prompt in task.prompts]),
        processing_class=loaded.tokenizer,
        callbacks=_callbacks(config, places, on_progress),
    )
    trainer.train()
    with quiet():
        loaded.model.save_pretrained(places.output)
        loaded.tokenizer.save_pretrained(places.output)
    report.unscored = dict(unscored)
    _note(trainer.state.log_history, report)
    return report


def _row(prompt: "Prompt", prompt_format: str) -> dict[str, object]:
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    return {"prompt": messages if prompt_format == "chat" else messages[0]["content"], "prompt_id": prompt.prompt_id}


def _rewards(task: "Task", report: "OnlineReport", unscored: Counter[str]) -> Callable[..., list[float | None]]:
    """The reward as TRL calls it; it counts what it is asked. An answer without one teaches nothing there either."""
    asked = {prompt.prompt_id: prompt for prompt in task.prompts}

    def rewards(completions: Sequence[Any], prompt_id: Sequence[str], **_: object) -> list[float | None]:
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        scores = task.reward.score([asked[name] for name in prompt_id], texts)
        report.n_answers += len(scores)
        unscored.update(score.error for score in scores if score.error)
        return [score.value for score in scores]

    return rewards


def _arguments(loaded: "LoadedModel", config: "OnlineConfig", places: "Places") -> Any:
    from trl import GRPOConfig

    method, drawing = config.method, config.drawing
    per_step = method.n_samples * config.prompts_per_step
    return GRPOConfig(
        output_dir=str(places.work),
        max_steps=config.steps,
        per_device_train_batch_size=per_step,
        generation_batch_size=per_step,
        num_generations=method.n_samples,
        num_iterations=method.epochs,
        temperature=drawing.temperature,
        max_completion_length=drawing.max_new_tokens,
        beta=method.kl_weight,
        use_bias_correction_kl=False,  # on by default; it multiplies k3 by the ratio
        epsilon=method.clip_low,
        epsilon_high=method.clip_high,
        loss_type=LOSSES[method.aggregation],
        scale_rewards="group" if method.scale_rewards else "none",
        learning_rate=config.learning_rate,
        warmup_steps=round(config.warmup_ratio * config.steps),
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=loaded.model.device.type == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none" if config.report_to == "tensorboard" else config.report_to,  # whose files we write
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )


def _callbacks(config: "OnlineConfig", places: "Places", on_progress: "Progress | None") -> list[Any]:
    from runtime.alignment.callbacks import EventFiles, ReportProgress

    found: list[Any] = [ReportProgress(on_progress)] if on_progress else []
    if config.report_to == "tensorboard" and places.logs is not None:
        found.append(EventFiles(places.logs))
    return found


def _note(history: Sequence[dict[str, float]], report: "OnlineReport") -> None:
    """Its log under our names."""
    from runtime.alignment.report import Point

    for line in history:
        known = ((ours, line[theirs]) for theirs, ours in CURVES.items() if theirs in line)
        report.points += [Point(int(line["step"]), "train", None, ours, float(value)) for ours, value in known]
    lengths = report.curve("tokens")
    report.n_tokens = round(sum(lengths) / max(len(lengths), 1) * report.n_answers)
