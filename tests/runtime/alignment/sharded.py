"""Gradients of a model that FSDP2 shards over CPU processes, against those of the whole model; run by torchrun."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from runtime.alignment.encode import encode_pairs
from runtime.alignment.items import Item, Objective
from runtime.alignment.losses import LossSettings
from runtime.alignment.objective import PolicyObjective
from runtime.alignment.reference import not_stored
from runtime.alignment.reward import RewardObjective, RewardSettings
from runtime.models import load_policy, load_reward_start
from tests.runtime.alignment.trained import rows


def main(policy: str, output: str) -> None:
    """Write the largest difference of any gradient, per method."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank, lines = dist.get_rank(), []
    for name in ("dpo", "tdpo2", "orpo", "reward"):
        load = load_reward_start if name == "reward" else load_policy
        whole, sharded, frozen = (load(policy) for _ in range(3))
        objective: Objective = PolicyObjective(LossSettings(name), 0, frozen.model) if name != "reward" else (  # type: ignore[arg-type]
            RewardObjective(RewardSettings(), 0)
        )  # fmt: skip
        pairs, _ = encode_pairs(rows(4), whole.tokenizer, "chat", 128)
        items = objective.prepare(whole.model, [Item(pair, 0) for pair in pairs], 4, partial(not_stored, "train"))
        for layer in sharded.model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded.model, mesh=mesh)
        for model, part in ((whole.model, items), (sharded.model, items[2 * rank : 2 * rank + 2])):
            objective.losses(model, objective.collate(part)).per_sample.mean().backward()
        full = {key: value.grad.full_tensor() for key, value in sharded.model.named_parameters()}
        worst = max((full[key] - value.grad).abs().max().item() for key, value in whole.model.named_parameters())
        lines.append(f"{name} {worst} {max(value.abs().max().item() for value in full.values())}")
    if rank == 0:
        Path(output).write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
