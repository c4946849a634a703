"""GRPO and its relatives against TRL's loss, and against what that gave (trl_golden.json): the same log-probabilities,
advantages and masks go through both. To write the golden values anew: WRITE_GOLDEN=1 pytest with this file's name.
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

from runtime.alignment.online.advantages import group_advantages
from runtime.alignment.online.surrogates import Aggregation, Clip, clipped_losses, divisor_of, k3, per_answer
from tests.conftest import tiny_config

NEEDS_TRL = "needs TRL: pip install -c infra/constraints.txt 'trl==1.16.0'"
GOLDEN = Path(__file__).parent / "trl_golden.json"
SHAPE, MAX_TOKENS = (6, 5), 9
MASK = torch.arange(SHAPE[1]) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
# How tokens become answers, sides of the clip, weight of the divergence; and TRL's names for them.
CASES: dict[str, tuple[Aggregation, Clip, float, dict[str, Any]]] = {
    "grpo": ("sequence", Clip(), 0.04, {"loss_type": "grpo", "beta": 0.04}),
    "grpo without divergence": ("sequence", Clip(), 0.0, {"loss_type": "grpo"}),
    "dr. grpo": ("constant", Clip(), 0.0, {"loss_type": "dr_grpo"}),
    "dapo": ("token", Clip(0.2, 0.28), 0.0, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo with divergence": (
        "token",
        Clip(0.1, 0.3),
        0.1,
        {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3, "beta": 0.1},
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(
    name: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    pytest.importorskip("trl", reason=NEEDS_TRL)
    inputs = _inputs()
    loss, gradient = _ours(name, inputs)
    logps = inputs["logps"].clone().requires_grad_()
    trainer = _trainer(CASES[name][3], make_tokenizer(), tmp_path, logps)
    theirs = trainer._compute_loss(trainer.model, _their_inputs(inputs))
    their_gradient = torch.autograd.grad(theirs, logps)[0]
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-9)
    if "WRITE_GOLDEN" in os.environ:
        _write_golden(name, inputs, theirs.item(), their_gradient)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_that_trl_gave(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    inputs = {key: torch.tensor(values, dtype=torch.float64) for key, values in golden["inputs"].items()}
    loss, gradient = _ours(name, inputs)
    assert loss == pytest.approx(golden[name]["loss"], rel=1e-6)
    theirs = torch.tensor(golden[name]["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, theirs, rtol=1e-6, atol=1e-9)


def test_every_case_has_its_golden_values() -> None:
    assert set(json.loads(GOLDEN.read_text())) == {"inputs", *CASES}


@pytest.mark.parametrize("is_scaled", [True, False])
def test_advantages_are_those_of_trl(is_scaled: bool) -> None:
    """Its lines, from `_generate_and_score_completions` of 1.16: the unbiased deviation and 1e-4."""
    rewards = _random(4)
    mean = rewards.mean(dim=1, keepdim=True)
    theirs = rewards - mean
    if is_scaled:
        theirs = theirs / (rewards.std(dim=1, keepdim=True) + 1e-4)
    ours = group_advantages(rewards, torch.ones(SHAPE, dtype=torch.bool), is_scaled)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def _random(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _inputs() -> dict[str, Tensor]:
    old, reference, rewards = (_random(seed) for seed in (0, 1, 2))
    advantages = group_advantages(rewards[:, 0].view(2, 3), torch.ones(2, 3, dtype=torch.bool)).flatten()
    return {"old": old, "reference": reference, "advantages": advantages, "logps": old + 0.3 * _random(3)}


def _ours(name: str, inputs: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Loss and gradient by our functions."""
    how, clip, kl_coef, _ = CASES[name]
    logps = inputs["logps"].clone().requires_grad_()
    losses, _ = clipped_losses(logps, inputs["old"], inputs["advantages"][:, None].expand(SHAPE), clip)
    losses = losses + kl_coef * k3(logps, inputs["reference"])
    ours = per_answer(losses, MASK, divisor_of(how, MASK, MAX_TOKENS)).mean()
    return ours.item(), torch.autograd.grad(ours, logps)[0]


def _their_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = torch.ones(SHAPE, dtype=torch.long)
    return {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": MASK.long(),
        "advantages": inputs["advantages"],
        "old_per_token_logps": inputs["old"],
        "ref_per_token_logps": inputs["reference"],
        "num_items_in_batch": MASK.sum(),
    }


def _write_golden(name: str, inputs: dict[str, Tensor], loss: float, gradient: Tensor) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden["inputs"] = {key: values.tolist() for key, values in inputs.items()}
    golden[name] = {"loss": loss, "gradient": gradient.tolist()}
    GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items()) + "\n}\n")


def _trainer(options: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path, logps: Tensor) -> Any:
    """TRL's trainer, whose model says the given log-probabilities."""
    import trl

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer))
    model.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")  # from which TRL loads the reference
    config = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=SHAPE[0],
        num_generations=3,
        max_completion_length=MAX_TOKENS,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_bias_correction_kl=False,
        **options,
    )
    rows = Dataset.from_list([{"prompt": "1"}, {"prompt": "2"}])
    trainer: Any = trl.GRPOTrainer(
        model=model, reward_funcs=_no_reward, args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros(SHAPE), None)
    return trainer


def _no_reward(completions: list[str], **kwargs: object) -> list[float]:
    return [0.0] * len(completions)
