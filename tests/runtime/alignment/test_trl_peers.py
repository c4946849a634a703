"""Our losses with preset = "trl" against TRL's own trainers, and against what those gave (trl_golden.json).

The golden values hold the log-probabilities of two random models and TRL's losses on them; they need no TRL. To write
them anew: WRITE_GOLDEN=1 pytest tests/runtime/alignment/test_trl_peers.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from runtime.alignment.losses import AnswerLogps, LossSettings, PairLogps, answer_logps, pair_losses
from tests.conftest import tiny_config

GOLDEN = Path(__file__).parent / "trl_golden.json"
NEEDS_TRL = "needs TRL: pip install -c infra/constraints.txt 'trl==1.16.0'"
# TRL adds the end token itself.
ROWS = [
    {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " six, I think"},
    {"prompt": "7 minus 2?", "chosen": " five it is", "rejected": " 4"},
    {"prompt": "1", "chosen": " 1", "rejected": " 2"},
]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for side in ("chosen", "rejected")
    for row in ROWS
]
# TRL is told of a setting by its own names.
CASES: dict[str, tuple[LossSettings, dict[str, Any]]] = {
    "sft": (LossSettings("sft", preset="trl"), {}),
    "dpo": (LossSettings("dpo", preset="trl"), {}),
    "dpo, beta 0.5, likelihood": (
        LossSettings("dpo", beta=0.5, nll_weight=2.0, preset="trl"),
        {"beta": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]},
    ),
    "ipo": (LossSettings("ipo", preset="trl"), {"loss_type": "ipo"}),
    "orpo": (LossSettings("orpo", preset="trl"), {}),
    "simpo": (LossSettings("simpo", preset="trl"), {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "simpo, smoothed": (
        LossSettings("simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.1, preset="trl"),
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.1},
    ),
    "kto": (LossSettings("kto", preset="trl"), {}),
    "kto, weighed": (
        LossSettings("kto", beta=0.5, desirable_weight=1.3, undesirable_weight=0.7, preset="trl"),
        {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls transformers by old names
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(
    name: str,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO and SimPO are; it warns
    pytest.importorskip("trl", reason=NEEDS_TRL)
    settings, options = CASES[name]
    policy, reference = _model(make_tokenizer(), 0), _model(make_tokenizer(), 1)
    trainer = _trainer(settings, options, (policy, reference), make_tokenizer(), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    if hasattr(trainer, "get_batch_loss_metrics"):
        theirs = trainer.get_batch_loss_metrics(trainer.model, batch, "train")[0]
    else:
        theirs = trainer.compute_loss(trainer.model, batch)
    their_gradient = torch.autograd.grad(theirs, list(policy.parameters()))
    inputs = _inputs(settings, batch, policy, reference)
    ours = pair_losses(settings, *inputs).per_sample.mean()
    our_gradient = torch.autograd.grad(ours, list(policy.parameters()))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    # TRL's output layer computes logits, and gradients back through them, in float32 whatever the model is
    # (trl/kernels/chunked_logprob.py): entries in which terms nearly cancel keep fewer digits than the loss.
    for their, our in zip(their_gradient, our_gradient, strict=True):
        assert torch.allclose(our, their, rtol=1e-4, atol=1e-6 * max(1.0, theirs.item()))
    if "WRITE_GOLDEN" in os.environ:
        _write_golden(name, inputs, theirs.item())


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_that_trl_gave(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    found = pair_losses(CASES[name][0], *_of_golden(golden)).per_sample.mean()
    assert found.item() == pytest.approx(golden["loss"], rel=1e-6)


def test_every_case_has_its_golden_values() -> None:
    assert set(json.loads(GOLDEN.read_text())) == set(CASES)


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(tokenizer)).double().eval()


def _trainer(
    settings: LossSettings,
    options: dict[str, Any],
    models: tuple[LlamaForCausalLM, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> Any:
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer_class, config_class, rows = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, ROWS),
        "ipo": (trl.DPOTrainer, trl.DPOConfig, ROWS),
        "orpo": (ORPOTrainer, ORPOConfig, ROWS),
        "simpo": (CPOTrainer, CPOConfig, ROWS),
        "kto": (trl.KTOTrainer, trl.KTOConfig, UNPAIRED),
    }[settings.method]
    config = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_length=64,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        **options,
    )
    has_reference = settings.method in ("dpo", "ipo", "kto")
    return trainer_class(
        *models[: 1 + has_reference],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def _inputs(
    settings: LossSettings, batch: dict[str, Any], policy: LlamaForCausalLM, reference: LlamaForCausalLM
) -> tuple[PairLogps, PairLogps, tuple[Tensor, Tensor] | None]:
    """What pair_losses takes, from the batch that TRL is given."""
    chosen, rejected = _sides(settings, batch)
    pairs = []
    for model in (policy, reference):
        with torch.set_grad_enabled(model is policy):
            pairs.append(PairLogps(_answers(model, chosen), _answers(model, rejected) if rejected else None))
    mismatched = None
    if settings.method == "kto":
        other = batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"].bool()
        with torch.no_grad():
            mismatched = _answers(policy, other).logps, _answers(reference, other).logps
    return pairs[0], pairs[1], mismatched


Rows = tuple[Tensor, Tensor, Tensor]  # token ids, attention mask, whether a token is of the answer


def _sides(settings: LossSettings, batch: dict[str, Any]) -> tuple[Rows, Rows | None]:
    if settings.method == "sft":
        return (batch["input_ids"], batch["attention_mask"], batch["labels"] != -100), None
    if settings.method in ("orpo", "simpo"):
        chosen, rejected = (
            (batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
            for side in ("chosen", "rejected")
        )
        return chosen, rejected
    whole = batch["input_ids"], batch["attention_mask"], batch["completion_mask"].bool()
    is_chosen = batch["label"].bool() if settings.method == "kto" else torch.arange(6) < 3
    first, second = (tuple(part[chosen] for part in whole) for chosen in (is_chosen, ~is_chosen))
    return first, second  # type: ignore[return-value]


def _answers(model: LlamaForCausalLM, rows: Rows) -> AnswerLogps:
    token_ids, mask, is_answer = rows
    logits = model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits
    is_token = mask.bool()
    return AnswerLogps(
        answer_logps(logits, token_ids, is_answer),
        is_answer.sum(-1),
        all_logps=answer_logps(logits, token_ids, is_token),
        n_all=is_token.sum(-1) - 1,
    )


def _write_golden(name: str, inputs: tuple[PairLogps, PairLogps, tuple[Tensor, Tensor] | None], loss: float) -> None:
    policy, reference, mismatched = inputs
    record: dict[str, Any] = {"loss": loss}
    for title, pairs in (("policy", policy), ("reference", reference)):
        for side in ("chosen", "rejected"):
            answers = getattr(pairs, side)
            if answers is not None:
                fields = ("logps", "n_tokens", "all_logps", "n_all")
                record[f"{title} {side}"] = {field: getattr(answers, field).tolist() for field in fields}
    if mismatched is not None:
        record["mismatched"] = [values.tolist() for values in mismatched]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    lines = [f"{json.dumps(case)}: {json.dumps(values)}" for case, values in (golden | {name: record}).items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _of_golden(golden: dict[str, Any]) -> tuple[PairLogps, PairLogps, tuple[Tensor, Tensor] | None]:
    def answers(title: str) -> AnswerLogps | None:
        if title not in golden:
            return None
        return AnswerLogps(
            **{field: torch.tensor(values, dtype=torch.float64) for field, values in golden[title].items()}
        )

    pairs = []
    for title in ("policy", "reference"):
        chosen = answers(f"{title} chosen")
        assert chosen is not None
        pairs.append(PairLogps(chosen, answers(f"{title} rejected")))
    mismatched = None
    if "mismatched" in golden:
        first, second = (torch.tensor(values, dtype=torch.float64) for values in golden["mismatched"])
        mismatched = first, second
    return pairs[0], pairs[1], mismatched
