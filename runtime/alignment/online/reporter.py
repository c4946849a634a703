"""Figures of a training that is no Trainer's, reported by the callbacks that a Trainer would call."""

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from runtime.alignment.arguments import need_reporter
from runtime.alignment.callbacks import EventFiles
from runtime.alignment.config import Places
from runtime.alignment.figures import Figures, by_name
from runtime.alignment.online.training import OnlineConfig


class Reporter:
    """Steps and evaluations under the names that offline training has; of several processes the first one's alone."""

    def __init__(self, config: OnlineConfig, places: Places, model: PreTrainedModel, is_first: bool) -> None:
        self.model, self.state, self.control = model, TrainerState(max_steps=config.steps), TrainerControl()
        self.callbacks: list[TrainerCallback] = []
        need_reporter(config.report_to)
        if not is_first or config.report_to == "none":
            return
        if config.report_to != "tensorboard":
            self.callbacks = [INTEGRATION_TO_CALLBACK[config.report_to]()]
        elif places.logs is not None:
            self.callbacks = [EventFiles(places.logs)]
        self.arguments = TrainingArguments(
            output_dir=str(places.work),
            max_steps=config.steps,
            learning_rate=config.learning_rate,
            warmup_steps=round(config.warmup_ratio * config.steps),
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            use_cpu=model.device.type == "cpu",
            report_to="none",
        )

    def begin(self, step: int) -> None:
        """With the step behind which the training goes on."""
        self.state.global_step = step
        for one in self.callbacks:
            one.on_train_begin(self.arguments, self.state, self.control, model=self.model)

    def log(self, step: int, split: str, figures: Figures) -> None:
        """Of a step ("train") or an evaluation ("test")."""
        self.state.global_step = step
        prefix = "eval_" if split == "test" else ""
        logs = {f"{prefix}{name}": value for name, value in by_name(figures).items()}
        for one in self.callbacks:
            one.on_log(self.arguments, self.state, self.control, logs=logs, model=self.model)

    def end(self) -> None:
        """Nothing more comes."""
        for one in self.callbacks:
            one.on_train_end(self.arguments, self.state, self.control, model=self.model)
