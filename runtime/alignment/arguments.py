"""What transformers is told of a training."""

import math
from importlib.util import find_spec

import torch
from transformers import TrainingArguments

from runtime.alignment.config import OfflineConfig, Places, ReportTo
from runtime.errors import ConfigError

WORST_LOSS = "eval_worst_loss"


def training_arguments(config: OfflineConfig, n_pairs: int, places: Places, device: torch.device) -> TrainingArguments:
    """Order, accumulation, schedule; precision is our own business, and so is which checkpoints are kept.

    A process uses one device, however many it sees.
    """
    watch = config.watch
    need_reporter(watch.report_to)
    is_stopping = watch.early_stopping > 0
    found = TrainingArguments(
        output_dir=str(places.work),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        use_cpu=device.type == "cpu",
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if watch.eval_steps else "no",
        eval_steps=watch.eval_steps or None,
        save_strategy="steps" if watch.save_steps else "no",
        save_steps=watch.save_steps or 500,
        load_best_model_at_end=is_stopping,
        metric_for_best_model=WORST_LOSS if is_stopping else None,
        greater_is_better=False if is_stopping else None,
        restore_callback_states_from_checkpoint=True,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        # The events of TensorBoard go where we say: the trainer brings its own writer.
        report_to="none" if watch.report_to == "tensorboard" else watch.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )
    found.warmup_steps = _warmup_steps(config, n_pairs, found.world_size)
    if found.n_gpu > 1:  # or the trainer would share the model's copies out among them (nn.DataParallel)
        found._n_gpu = 1
    return found


def need_reporter(name: ReportTo) -> None:
    """ConfigError when the package that shall be reported to is not there."""
    if name != "none" and find_spec(name) is None:
        fix = "pip install winnow[tensorboard]" if name == "tensorboard" else f"pip install {name}"
        raise ConfigError(f'report_to = "{name}" needs that package: {fix}, or set report_to = "none"')


def _warmup_steps(config: OfflineConfig, n_pairs: int, n_processes: int) -> int:
    n_batches = math.ceil(n_pairs / (config.batch_size * n_processes))
    n_steps = math.ceil(n_batches / config.gradient_accumulation) * config.epochs
    # A step at learning rate 0 must not be the only one.
    return min(math.ceil(config.warmup_ratio * n_steps), n_steps - 1)
