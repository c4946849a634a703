"""Offline training on preference pairs, from rows to a plain Hugging Face folder."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from runtime.alignment.adapters import check_moved, merged, merged_anew, prints, reference_of, with_adapters
from runtime.alignment.arguments import training_arguments
from runtime.alignment.checkpoints import last_checkpoint, read_state
from runtime.alignment.collate import EncodedPair, PreferenceRow, encode_pairs
from runtime.alignment.config import OfflineConfig, Places, RewardSettings
from runtime.alignment.encode import cut_counts
from runtime.alignment.figures import Figures
from runtime.alignment.groups import suggest_step_size
from runtime.alignment.items import Item, Objective, Recall
from runtime.alignment.losses import needs
from runtime.alignment.objective import PolicyObjective, with_others
from runtime.alignment.packing import check_packing
from runtime.alignment.reference import Compute, Logps, References, not_stored
from runtime.alignment.report import TrainingReport, Warned
from runtime.alignment.reward import RewardObjective, closed, closing_ids, with_prefixes
from runtime.alignment.shared_reference import shared
from runtime.alignment.sparsity import SparseObjective, relufied
from runtime.alignment.trainer import DivergedError, OfflineTrainer, Split
from runtime.errors import ConfigError, InputError
from runtime.models import LoadedModel, quiet
from runtime.records import Progress

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class PairRows:
    """Pairs to train on, and held-out ones."""

    train: Sequence[PreferenceRow]
    test: Sequence[PreferenceRow] = ()


@dataclass(frozen=True, slots=True)
class Helpers:
    """What a training may use of the world around it."""

    on_progress: Progress | None = None
    references: References = not_stored


def train_offline(
    loaded: LoadedModel, rows: PairRows, config: OfflineConfig, places: Places, helpers: Helpers = Helpers()
) -> TrainingReport:
    """Train `loaded.model` in place and write a plain Hugging Face folder (LoRA: merged, with `adapter/` beside it).

    A training that finds a checkpoint of its own in `places.work` goes on from there. Raises InputError when no row
    is left, and DivergedError, which names the last checkpoint, when the loss leaves the numbers.
    """
    _check_positions(loaded, config)
    without_dropout(loaded.model)
    if config.sparsity.relufy:
        relufied(loaded.model)
    pairs, dropped = _encoded(rows.train, loaded, config)
    held_out, held_out_dropped = _encoded(rows.test, loaded, config)
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there are none"
        raise InputError(f"no pair is left to train on ({reasons}); raise max_length or check the pairs")
    if config.watch.eval_steps and not held_out:
        raise InputError(
            f"eval_steps = {config.watch.eval_steps}, but no held-out pair is left; set 0 or hold some out"
        )
    is_reward = isinstance(config.loss, RewardSettings)
    model = with_adapters(loaded.model, config.lora, "SEQ_CLS" if is_reward else "CAUSAL_LM", config.seed)
    split = _split(pairs, held_out, loaded, config)
    arguments = training_arguments(config, len(split.train), places, model.device)
    if arguments.world_size > 1 and not getattr(model, "is_quantized", False):
        cast(Any, model).to(arguments.device)  # each process has its own
    objective = _objective(model, loaded, config)
    if config.sparsity.is_on:
        objective = SparseObjective(objective, model, config.sparsity)
    split = _prepared(model, objective, split, config, shared(helpers.references))
    trainer = _trainer(model, objective, split, config, arguments)
    trainer.show(helpers.on_progress, places.logs)
    _run(trainer, places)
    report = TrainingReport(trainer.state.global_step, len(pairs), dropped, len(held_out), held_out_dropped)
    report.cut = cut_counts([*pairs, *held_out])
    _fill(report, trainer)
    # All processes take part in putting a sharded model together.
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.accelerator.is_main_process:
        _save(trainer, loaded, config, places.output, state)
    trainer.accelerator.wait_for_everyone()  # the files are there for all of them, and nobody leaves early
    return report


def _check_positions(loaded: LoadedModel, config: OfflineConfig) -> None:
    """Beyond its positions a model fails, or has never seen what it is shown."""
    known = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if known and config.max_length > known:
        raise ConfigError(
            f"max_length = {config.max_length} is more than the {known} positions of {loaded.source!r}; "
            f"set max_length = {known} or less"
        )


def _encoded(
    rows: Sequence[PreferenceRow], loaded: LoadedModel, config: OfflineConfig
) -> tuple[list[EncodedPair], Counter[str]]:
    return encode_pairs(rows, loaded.tokenizer, config.prompt_format, config.max_length, config.truncation)


def _objective(model: PreTrainedModel, loaded: LoadedModel, config: OfflineConfig) -> Objective:
    pad_id = cast(int, loaded.tokenizer.pad_token_id)
    if isinstance(config.loss, RewardSettings):
        return RewardObjective(config.loss, pad_id)
    keeps_reference = needs(config.loss).reference == "logits"
    if config.packing:
        check_packing(model)
    reference = reference_of(model) if keeps_reference else None
    return PolicyObjective(config.loss, pad_id, reference, config.max_length if config.packing else 0)


def _split(
    pairs: Sequence[EncodedPair], held_out: Sequence[EncodedPair], loaded: LoadedModel, config: OfflineConfig
) -> Split:
    """The names in the order that the group reducer has them, then those of held-out pairs alone."""
    trained = sorted({pair.group for pair in pairs})
    names = (*trained, *sorted({pair.group for pair in held_out} - set(trained)))
    places = {name: place for place, name in enumerate(names)}
    train, test = (
        [Item(pair, places[pair.group], margin=pair.score_margin or 0.0) for pair in part] for part in (pairs, held_out)
    )
    if isinstance(config.loss, RewardSettings):
        closing = closing_ids(loaded.tokenizer, config.prompt_format)
        train = with_prefixes(closed(train, closing), config.loss.prefixes, closing, config.seed)
        test = closed(test, closing)
    elif needs(config.loss).mismatched:
        # Held-out pairs may be few, or of one prompt: answers to the others come after their own.
        test = with_others(test, [*test, *train], config.max_length)
        train = with_others(train, train, config.max_length)
    return Split(train, test, names)


def _prepared(
    model: PreTrainedModel, objective: Objective, split: Split, config: OfflineConfig, references: References
) -> Split:
    def recall(split: str) -> Recall:
        def found(pairs: Sequence[EncodedPair], compute: Compute, of: str = "") -> list[Logps]:
            return references(f"{split}{of}", pairs, compute)

        return found

    model.train(False)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
        train, test = (
            objective.prepare(model, items, config.batch_size, recall(name))
            for name, items in (("train", split.train), ("test", split.test))
        )
    return Split(train, test, split.names)


def _trainer(
    model: PreTrainedModel, objective: Objective, split: Split, config: OfflineConfig, arguments: TrainingArguments
) -> OfflineTrainer:
    if config.gradient_checkpointing and config.lora is not None:
        cast(Any, model).enable_input_require_grads()
    trainer = OfflineTrainer(model, objective, split, config, arguments)
    if isinstance(objective, SparseObjective):
        objective.done = lambda: trainer.state.global_step / max(trainer.state.max_steps, 1)
        objective = objective.inner
    if isinstance(objective, PolicyObjective):
        objective.over_processes = trainer.summed
    return trainer


def _run(trainer: OfflineTrainer, places: Places) -> None:
    before = prints(cast(nn.Module, trainer.model))
    checkpoint = last_checkpoint(places.work)
    if checkpoint is not None:
        trainer.restore(read_state(checkpoint))
    try:
        with quiet():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except DivergedError as error:
        kept = trainer.good_checkpoint
        fate = f"the last good checkpoint is kept in {kept}" if kept else "there was no good checkpoint yet"
        raise DivergedError(f"{error} ({fate})") from error
    if not trainer.config.watch.early_stopping:  # whose best weights may be the first ones
        check_moved(before, prints(cast(nn.Module, trainer.model)))


def _fill(report: TrainingReport, trainer: OfflineTrainer) -> None:
    """Figures of the final weights, and what must be known about them."""
    split = trainer.split
    report.groups = trainer.figures_of(split.train)
    if split.test:
        report.held_out = trainer.figures_of(split.test)
        if not trainer.config.watch.early_stopping and not trainer.was_evaluated:
            trainer.keep("test", report.held_out)
    if trainer.config.groups.reducer == "robust":
        first = [point for point in trainer.points if (point.step, point.metric) == (1, "loss") and point.group]
        losses = {str(point.group): point.value for point in first}
        if all(loss > 0 for loss in losses.values()):  # of others there is none to suggest
            report.suggested_step_size = suggest_step_size(losses)
    report.points, report.n_tokens = trainer.points, trainer.n_tokens
    if trainer.config.watch.early_stopping:
        report.best_step = trainer.state.best_global_step
    report.warnings = _one_sided(report.groups, report.held_out) if split.test else []


def _one_sided(trained: Figures, held_out: Figures) -> list[Warned]:
    """Groups of which the figures say less than they seem to."""
    unseen = [Warned(name, "held out, but not trained on") for name in held_out if name not in trained]
    unchecked = [Warned(name, "trained on, but none held out") for name in trained if name not in held_out]
    return sorted(unseen + unchecked, key=lambda one: one.group)


def _save(
    trainer: OfflineTrainer, loaded: LoadedModel, config: OfflineConfig, output: Path, state: dict[str, Any] | None
) -> None:
    """state: of a sharded model, all its weights."""
    model = cast(PreTrainedModel, trainer.accelerator.unwrap_model(trainer.model))
    with quiet():
        if config.lora is not None:
            cast(Any, model).save_pretrained(output / ADAPTER, selected_adapters=["default"], state_dict=state)
            is_4bit = getattr(loaded.model, "is_loaded_in_4bit", False)
            if is_4bit or state is not None:
                model = merged_anew(loaded.source, output / ADAPTER, "bfloat16" if is_4bit else "float32")
                state = None
            else:
                model = merged(model)
        model.save_pretrained(output, state_dict=state)
        loaded.tokenizer.save_pretrained(output)


def without_dropout(model: nn.Module) -> None:
    """The policy is trained as it decodes and as the reference saw it: without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast(Any, module).attention_dropout = 0.0
