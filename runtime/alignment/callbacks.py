"""What happens between the Trainer's steps: progress, group weights, the next epoch's order, our checkpoint file."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runtime.alignment.checkpoints import keep_only, path_of, write_state
from runtime.records import Progress

if TYPE_CHECKING:
    from runtime.alignment.trainer import OfflineTrainer


class ReportProgress(TrainerCallback):
    """Passes the step count on."""

    def __init__(self, on_progress: Progress) -> None:
        self.on_progress = on_progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """After every optimizer step."""
        self.on_progress(state.global_step, state.max_steps)


class EventFiles(TrainerCallback):
    """Figures as TensorBoard's event files, and nothing else: they are published, so no paths and no host names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """What a killed training wrote behind its last checkpoint is written again, and holds no more."""
        from torch.utils.tensorboard import SummaryWriter

        purged_from = state.global_step + 1 if state.global_step else 0  # 0 is that of a look before the first step
        self.writer = SummaryWriter(str(self.folder), purge_step=purged_from)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Of every optimizer step and evaluation."""
        if state.is_world_process_zero:
            for name, value in (logs or {}).items():
                shown = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self.writer.add_scalar(shown, value, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Files are named by host and process; ours by their number."""
        self.writer.close()
        for number, path in enumerate(sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
            path.rename(self.folder / f"part-{number:05d}.tfevents")


class OwnState(TrainerCallback):
    """Moves and saves the state that transformers does not know of."""

    def __init__(self, trainer: "OfflineTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The order is a function of the epoch, in a resumed training too."""
        self.trainer.sampler.epoch = int(state.epoch or 0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Group weights move once per optimizer step, by the losses of all its batches on all processes."""
        reducer = self.trainer.reducer
        reducer.step(self.trainer.summed(reducer.sums))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Every process has written its part by now."""
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.saved_step = state.global_step
        if state.is_world_process_zero:
            work = Path(str(args.output_dir))
            write_state(path_of(work, state.global_step), self.trainer.own_state())
            keep_only(work, (state.global_step, state.best_global_step, self.trainer.good_step))
