"""Offline training on preference pairs: one transformers.Trainer subclass for every loss that needs no new samples."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from runtime.alignment import losses
from runtime.alignment.collate import Batch, EncodedPair, PreferenceRow, collate, encode_pairs
from runtime.errors import InputError, ModelError
from runtime.models import LoadedModel, PromptFormat, quiet
from runtime.records import Progress

Method = Literal["dpo", "sft"]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters on all linear layers; their output is scaled by alpha / rank."""

    rank: int = 16
    alpha: int = 32


@dataclass(frozen=True, slots=True)
class OfflineConfig:
    """Training settings; batch_size counts pairs, max_length tokens of prompt and answer."""

    method: Method = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    learning_rate: float = 1e-6
    epochs: int = 1
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 1024
    warmup_ratio: float = 0.1
    lora: LoraSettings | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(slots=True)
class TrainingReport:
    """What happened: optimizer steps, one log entry per step, pairs used and dropped, final figures per group."""

    steps: int
    n_rows: int
    dropped: Mapping[str, int]
    log: list[dict[str, float]] = field(default_factory=list)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Item:
    """A pair with the reference's log-probabilities (0 where the method needs none)."""

    pair: EncodedPair
    reference_chosen: float = 0.0
    reference_rejected: float = 0.0


def train_offline(
    loaded: LoadedModel,
    rows: Sequence[PreferenceRow],
    config: OfflineConfig,
    prompt_format: PromptFormat,
    output_dir: Path,
    on_progress: Progress | None = None,
) -> TrainingReport:
    """Train `loaded.model` in place and write a plain Hugging Face folder (LoRA: merged, with `adapter/` beside it).

    The reference's log-probabilities are computed once, before the first step, so no second model is kept. Raises
    InputError when no row is left and ModelError when the loss is no finite number.
    """
    pairs, dropped = encode_pairs(rows, loaded.tokenizer, prompt_format, config.max_length)
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there are none"
        raise InputError(f"no pair is left to train on ({reasons}); raise max_length or check the pairs")
    _without_dropout(loaded.model)
    items = _with_reference(loaded, pairs, config)
    model = _with_adapters(loaded.model, config)
    trainer = _OfflineTrainer(model, items, loaded.tokenizer.pad_token_id, config, output_dir, on_progress)
    trainer.train()
    report = TrainingReport(trainer.state.global_step, len(pairs), dict(dropped), trainer.entries)
    trained = cast(PreTrainedModel, trainer.model)
    if config.method == "dpo":
        report.groups = _group_figures(trained, loaded, items, config)
    else:
        report.groups = {group: {"pairs": count} for group, count in Counter(p.group for p in pairs).items()}
    with quiet():
        if config.lora is not None:
            trained.save_pretrained(output_dir / "adapter")
            trained = cast(PreTrainedModel, cast(Any, trained).merge_and_unload())
        trained.save_pretrained(output_dir)
        loaded.tokenizer.save_pretrained(output_dir)
    return report


class _OfflineTrainer(Trainer):
    """Feeds the loss functions; order, accumulation, schedule and precision are the Trainer's."""

    # Our loss is the mean over a micro-batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        items: list[_Item],
        pad_id: int,
        config: OfflineConfig,
        output_dir: Path,
        on_progress: Progress | None,
    ) -> None:
        self.config, self.items, self.pad_id = config, items, pad_id
        self.entries: list[dict[str, float]] = []
        self._pending: list[dict[str, float]] = []
        super().__init__(
            model=model,
            args=_arguments(config, len(items), output_dir, model.device),
            train_dataset=cast("Dataset[_Item]", items),
            data_collator=self._collate,
            callbacks=[_ReportProgress(on_progress)],
        )
        self.remove_callback(PrinterCallback)

    def _collate(self, items: list[_Item]) -> dict[str, Tensor]:
        batch = collate([item.pair for item in items], self.pad_id, with_rejected=self.config.method == "dpo")
        return {
            "token_ids": batch.token_ids,
            "mask": batch.mask,
            "is_answer": batch.is_answer,
            "reference_chosen": torch.tensor([item.reference_chosen for item in items]),
            "reference_rejected": torch.tensor([item.reference_rejected for item in items]),
        }

    def _get_train_sampler(self, train_dataset: Any = None) -> "Sampler[int]":
        lengths = [item.pair.length for item in self.items]
        return _LengthGrouped(lengths, self.config.batch_size, self.config.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean of the method's per-sample losses."""
        batch = Batch(inputs["token_ids"], inputs["mask"], inputs["is_answer"])
        answers = _answers(model, batch)
        if self.config.method == "dpo":
            policy = _halves(answers)
            reference = _reference_of(policy, inputs["reference_chosen"], inputs["reference_rejected"])
            found = losses.dpo(policy, reference, self.config.beta, self.config.label_smoothing)
            if self.config.nll_weight:
                found = losses.with_nll(found, policy.chosen, self.config.nll_weight)
        else:
            found = losses.sft(answers)
        loss = found.per_sample.mean()
        if not math.isfinite(loss.item()):
            raise ModelError(f"the loss is {loss.item()} at step {self.state.global_step}; lower learning_rate")
        self._pending.append({"loss": loss.item()} | {k: v.mean().item() for k, v in found.metrics.items()})
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep one entry per optimizer step, averaged over its micro-batches."""
        if not self._pending:
            return
        entry = {key: sum(p[key] for p in self._pending) / len(self._pending) for key in self._pending[0]}
        extra = {key: float(logs[key]) for key in ("learning_rate", "grad_norm") if key in logs}
        self.entries.append({"step": self.state.global_step} | entry | extra)
        self._pending.clear()


class _LengthGrouped(Sampler[int]):
    """Every epoch another order, pairs of like length in one batch: little padding, and the same for every run."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        window = 16 * self.batch_size
        ordered: list[int] = []
        for start in range(0, len(order), window):
            ordered += sorted(order[start : start + window], key=lambda index: -self.lengths[index])
        batches = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        turns = torch.randperm(len(batches), generator=self.generator).tolist()
        # A short last batch stays last, or every later batch would be torn apart.
        turns.sort(key=lambda turn: len(batches[turn]) < self.batch_size)
        return iter([index for turn in turns for index in batches[turn]])


class _ReportProgress(TrainerCallback):
    def __init__(self, on_progress: Progress | None) -> None:
        self.on_progress = on_progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Pass the step count on."""
        if self.on_progress is not None:
            self.on_progress(state.global_step, state.max_steps)


def _arguments(config: OfflineConfig, n_pairs: int, output_dir: Path, device: torch.device) -> TrainingArguments:
    n_batches = math.ceil(n_pairs / config.batch_size)
    n_steps = math.ceil(n_batches / config.gradient_accumulation) * config.epochs
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_ratio * n_steps),
        bf16=config.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )


def _with_adapters(model: PreTrainedModel, config: OfflineConfig) -> PreTrainedModel:
    if config.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return cast(PreTrainedModel, get_peft_model(model, adapters))


def _without_dropout(model: nn.Module) -> None:
    """The policy is trained as it decodes and as the reference saw it: without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast(Any, module).attention_dropout = 0.0


def _with_reference(loaded: LoadedModel, pairs: Sequence[EncodedPair], config: OfflineConfig) -> list[_Item]:
    if config.method != "dpo":
        return [_Item(pair) for pair in pairs]
    chosen, rejected = _all_logps(loaded.model, loaded, pairs, config)
    return [_Item(pair, *logps) for pair, *logps in zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)]


@torch.no_grad()
def _all_logps(
    model: nn.Module, loaded: LoadedModel, pairs: Sequence[EncodedPair], config: OfflineConfig
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all chosen and all rejected answers, in the pairs' order."""
    model.eval()
    device = next(model.parameters()).device
    chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda index: pairs[index].length)
    for start in range(0, len(order), config.batch_size):
        indices = order[start : start + config.batch_size]
        batch = collate([pairs[index] for index in indices], loaded.tokenizer.pad_token_id, with_rejected=True)
        moved = Batch(batch.token_ids.to(device), batch.mask.to(device), batch.is_answer.to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logps = _answers(model, moved).logps.cpu()
        chosen[indices], rejected[indices] = logps.chunk(2)
    return chosen, rejected


def _group_figures(
    model: nn.Module, loaded: LoadedModel, items: Sequence[_Item], config: OfflineConfig
) -> dict[str, dict[str, float]]:
    """Reward accuracy and margin of every group over the training pairs, with the final weights."""
    logps = _all_logps(model, loaded, [item.pair for item in items], config)
    n_chosen = torch.tensor([len(item.pair.chosen) - item.pair.n_prompt for item in items])
    n_rejected = torch.tensor([len(item.pair.rejected) - item.pair.n_prompt for item in items])
    policy = losses.PairLogps(losses.AnswerLogps(logps[0], n_chosen), losses.AnswerLogps(logps[1], n_rejected))
    reference = _reference_of(
        policy,
        torch.tensor([item.reference_chosen for item in items]),
        torch.tensor([item.reference_rejected for item in items]),
    )
    metrics = losses.dpo(policy, reference, config.beta).metrics
    figures: dict[str, dict[str, float]] = {}
    for group in sorted({item.pair.group for item in items}):
        chosen = torch.tensor([item.pair.group == group for item in items])
        figures[group] = {
            "pairs": int(chosen.sum()),
            "accuracy": round(metrics["rewards/accuracies"][chosen].mean().item(), 6),
            "margin": round(metrics["rewards/margins"][chosen].mean().item(), 6),
        }
    return figures


def _answers(model: nn.Module, batch: Batch) -> losses.AnswerLogps:
    output = model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False)
    logps = losses.answer_logps(output.logits, batch.token_ids, batch.is_answer)
    return losses.AnswerLogps(logps, batch.is_answer.sum(dim=-1))


def _halves(answers: losses.AnswerLogps) -> losses.PairLogps:
    chosen, rejected = map(losses.AnswerLogps, answers.logps.chunk(2), answers.n_tokens.chunk(2))
    return losses.PairLogps(chosen, rejected)


def _reference_of(policy: losses.PairLogps, chosen: Tensor, rejected: Tensor) -> losses.PairLogps:
    """The stored log-probabilities of the same answers."""
    assert policy.rejected is not None
    return losses.PairLogps(
        losses.AnswerLogps(chosen, policy.chosen.n_tokens), losses.AnswerLogps(rejected, policy.rejected.n_tokens)
    )
