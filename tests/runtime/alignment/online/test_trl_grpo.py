"""GRPO and its relatives against TRL's loss: the same log-probabilities, advantages and masks go through both."""

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
SHAPE, MAX_TOKENS = (6, 5), 9
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
    how, clip, kl_coef, options = CASES[name]
    old, reference, rewards = (_random(seed) for seed in (0, 1, 2))
    logps = (old + 0.3 * _random(3)).requires_grad_()
    mask = torch.arange(SHAPE[1]) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    advantages = group_advantages(rewards[:, 0].view(2, 3), torch.ones(2, 3, dtype=torch.bool)).flatten()
    losses, _ = clipped_losses(logps, old, advantages[:, None].expand(SHAPE), clip)
    losses = losses + kl_coef * k3(logps, reference)
    ours = per_answer(losses, mask, divisor_of(how, mask, MAX_TOKENS)).mean()
    our_gradient = torch.autograd.grad(ours, logps)[0]
    trainer = _trainer(options, make_tokenizer(), tmp_path, logps)
    theirs = trainer._compute_loss(trainer.model, _inputs(mask, advantages, old, reference))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(our_gradient, torch.autograd.grad(theirs, logps)[0], rtol=1e-6, atol=1e-9)


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


def _inputs(mask: Tensor, advantages: Tensor, old: Tensor, reference: Tensor) -> dict[str, Tensor]:
    ids = torch.ones(SHAPE, dtype=torch.long)
    return {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }


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
