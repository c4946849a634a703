"""One transformers.Trainer for every method that needs no new samples."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from runtime.alignment.arguments import WORST_LOSS
from runtime.alignment.callbacks import EventFiles, OwnState, ReportProgress
from runtime.alignment.checkpoints import path_of
from runtime.alignment.config import OfflineConfig
from runtime.alignment.figures import ALL, Figures, GroupSums, by_name, extremes
from runtime.alignment.groups import GroupReducer
from runtime.alignment.items import FILLER, Inputs, Item, Objective, collated
from runtime.alignment.report import Point, points_of
from runtime.alignment.sampler import LengthGrouped
from runtime.errors import ModelError
from runtime.records import Progress

MEMORY = 10  # steps whose mean loss tells whether a training diverges


def n_pairs_of(inputs: Inputs) -> int:
    """Pairs of a batch; none where it holds but a filler."""
    return 0 if FILLER in inputs else len(inputs["group_ids"])


class DivergedError(ModelError):
    """The loss left the numbers, or rose far above where it began."""


@dataclass(frozen=True, slots=True)
class Split:
    """Items to train on and held-out ones, and the names that their group_id counts: those of training first."""

    train: list[Item]
    test: list[Item]
    names: tuple[str, ...]


class OfflineTrainer(Trainer):
    """Feeds an objective, reduces its losses by group and keeps figures; order, accumulation and schedule are HF's."""

    # Our loss is the mean over a micro-batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    method: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        split: Split,
        config: OfflineConfig,
        arguments: TrainingArguments,
    ) -> None:
        self.method, self.split, self.config = objective, split, config
        counts = {name: sum(item.group_id == i for item in split.train) for i, name in enumerate(split.names)}
        self.reducer = GroupReducer(config.groups, {name: count for name, count in counts.items() if count})
        lengths, n_processes = [item.pair.length for item in split.train], arguments.world_size
        self.sampler = LengthGrouped(lengths, config.batch_size, config.seed, n_processes)
        # What stands behind the pairs holds the place of one that there is not.
        filler = replace(min(split.train, key=lambda item: item.pair.length), is_filler=True)
        self.sums = GroupSums(split.names)
        self.points: list[Point] = []
        self.losses: deque[float] = deque(maxlen=MEMORY)
        self.first_loss, self.n_tokens = math.nan, 0
        # The newest checkpoint, and the newest one whose weights were then seen to have a loss within the limit.
        self.saved_step: int | None = None
        self.good_step: int | None = None
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=cast("Dataset[Item]", [*split.train, filler]),
            eval_dataset=cast("Dataset[Item]", split.test) if split.test else None,
            data_collator=partial(collated, objective),
            callbacks=[OwnState(self)],
        )
        self.remove_callback(PrinterCallback)
        if config.watch.early_stopping:
            self.add_callback(EarlyStoppingCallback(config.watch.early_stopping))

    def show(self, on_progress: Progress | None, logs: Path | None) -> None:
        """Have steps reported, and figures written as TensorBoard's event files."""
        if on_progress is not None:
            self.add_callback(ReportProgress(on_progress))
        is_wanted = self.config.watch.report_to == "tensorboard" and self.accelerator.is_main_process
        if logs is not None and is_wanted:
            self.add_callback(EventFiles(logs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The reducer's mean of the losses of a micro-batch."""
        group_ids = inputs["group_ids"]
        with self.autocast_smart_context_manager():
            found = self.method.losses(model, inputs)
        is_counted = FILLER not in inputs
        self.sums.add(found, group_ids, is_counted)
        if is_counted:
            self.reducer.observe(found.per_sample, group_ids)
        loss = self.reducer.reduce(found.per_sample, group_ids)
        # Micro-batches may differ in size, the last of an epoch most of all: every pair weighs the same.
        assert num_items_in_batch is not None
        loss = loss * (n_pairs_of(inputs) * self.current_gradient_accumulation_steps / num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and the pairs they have, on the mean of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        n_pairs = torch.tensor(float(sum(map(n_pairs_of, batches))), device=device)
        n_tokens = torch.stack([batch["mask"].sum() * (FILLER not in batch) for batch in batches]).sum()
        self.n_tokens += int(self.summed(n_tokens))
        return batches, self.summed(n_pairs) / self.accelerator.num_processes

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """bfloat16 where it is asked for, whatever wraps the model's forward pass."""
        is_on = self.config.dtype == "bfloat16"
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=is_on, cache_enabled=cache_enabled)

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Figures of the held-out pairs; group weights play no part and stay."""
        figures = self.figures_of(self.split.test)
        shown = self.keep("test", figures)
        worst = extremes(figures)["worst/loss"]
        if not math.isfinite(worst):
            raise DivergedError(f"the held-out loss is {worst} at step {self.state.global_step}; lower learning_rate")
        metrics = {"eval_loss": figures[ALL]["loss"], WORST_LOSS: worst}
        self.log({f"eval_{name}": value for name, value in shown.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def figures_of(self, items: Sequence[Item]) -> Figures:
        """Per group, with the present weights; the processes share the work."""
        model = self.model_wrapped
        was_training = model.training
        model.train(False)
        sums, n_processes = GroupSums(self.split.names), self.accelerator.num_processes
        order = sorted(items, key=lambda item: item.pair.length)
        width = self.config.batch_size
        for start in range(0, len(order), width * n_processes):
            own = start + width * self.accelerator.process_index
            # Sharded models want every process in every pass, so one that has no pairs left takes the first again.
            batch = order[own : own + width] or [replace(order[0], is_filler=True)]
            inputs: Inputs = self._prepare_inputs(collated(self.method, batch))
            with self.autocast_smart_context_manager():
                sums.add(self.method.losses(model, inputs), inputs["group_ids"], FILLER not in inputs)
        model.train(was_training)
        return sums.figures(self.summed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep figures for every optimizer step, and pass them to whoever is reported to."""
        if "grad_norm" in logs and not self.sums.is_empty:
            figures = self.sums.figures(self.summed)
            extra = {name: float(logs[name]) for name in ("grad_norm", "learning_rate")}
            if self.config.groups.reducer != "mean":
                extra["objective"] = float(logs["loss"])
            figures[ALL] |= extra
            loss = figures[ALL]["loss"]
            logs = self.keep("train", figures)
            self._check_course(loss)
        super().log(logs, start_time)

    def keep(self, split: str, figures: Figures) -> dict[str, float]:
        """Put figures, extremes and group weights into the record; all of it again, by name, to be reported."""
        shown = {name: dict(values) for name, values in figures.items()}
        shown[ALL] |= extremes(figures)
        if self.config.groups.reducer != "mean" and split == "train":
            # All of them: one that has no pair in this step has a weight too.
            for name, weight in zip(self.reducer.names, self.reducer.weights.tolist(), strict=True):
                shown.setdefault(name, {})["weight"] = weight
        self.points += points_of(self.state.global_step, split, shown)
        return by_name(shown)

    @property
    def good_checkpoint(self) -> Path | None:
        """The newest checkpoint whose loss was seen to be within the limit of divergence."""
        return None if self.good_step is None else path_of(Path(str(self.args.output_dir)), self.good_step)

    @property
    def was_evaluated(self) -> bool:
        """Whether the record has held-out figures of the last step."""
        return any(point.split == "test" and point.step == self.state.global_step for point in self.points)

    def summed(self, values: Tensor) -> Tensor:
        """Over all processes."""
        on_device = values.to(self.args.device)
        return cast(Tensor, self.accelerator.reduce(on_device, "sum")) if self.accelerator.num_processes > 1 else values

    def own_state(self) -> dict[str, object]:
        """What a resumed training needs beside the Trainer's own state."""
        return {
            "reducer": self.reducer.state_dict(),
            "points": [list(asdict(point).values()) for point in self.points],
            "losses": list(self.losses),
            "first_loss": self.first_loss,
            "n_tokens": self.n_tokens,
            "saved_step": self.saved_step,
            "good_step": self.good_step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `own_state`."""
        self.reducer.load_state_dict(state["reducer"])
        self.points = [Point(*values) for values in state["points"]]
        self.losses.extend(state["losses"])
        self.first_loss, self.n_tokens = state["first_loss"], state["n_tokens"]
        self.saved_step, self.good_step = state.get("saved_step"), state.get("good_step")

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Before weights and optimizer are touched: a loss or gradient that is no number ends the training."""
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if not math.isfinite(norm):
            loss = self.sums.figures(self.summed)[ALL]["loss"]
            what = f"gradient is {float(norm)}" if math.isfinite(loss) else f"loss is {loss}"
            raise DivergedError(f"the {what} at step {self.state.global_step}; lower learning_rate")
        return norm

    def _check_course(self, loss: float) -> None:
        if math.isnan(self.first_loss):
            self.first_loss = loss
        self.losses.append(loss)
        limit, mean = self.config.watch.divergence * abs(self.first_loss), sum(self.losses) / len(self.losses)
        if not limit or loss <= limit:
            self.good_step = self.saved_step
        if limit and len(self.losses) == MEMORY and mean > limit:
            raise DivergedError(
                f"the loss was {self.first_loss:.4g} at the first step and {mean:.4g} over the last {MEMORY} "
                f"before step {self.state.global_step}; lower learning_rate, or raise divergence"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return self.sampler
