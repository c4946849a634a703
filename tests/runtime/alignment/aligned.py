"""On-policy trainings of a tiny policy, alone or as one of torchrun's processes."""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.alignment.groups import GroupSettings
from tests.runtime.alignment.online.test_loop import PROMPTS, config, train


def main(policy: str, output: str, *methods: str) -> None:
    """Two steps of each method, with everything that a report keeps; uneven: prompts that minibatches do not divide."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for method in methods:
        name, _, is_uneven = method.partition(" ")
        settings = config(name, steps=2, save_steps=1, eval_steps=1, learning_rate=1e-4)
        if is_uneven:
            thirds = replace(settings.method, minibatches=3)
            settings = replace(settings, method=thirds, prompts_per_step=7)
        if method == "grpo":
            robust = replace(settings.method, group_weights=GroupSettings("robust", 0.2))
            settings = replace(settings, method=robust)
        report = train(Path(output) / method, Path(policy), settings, prompts=PROMPTS[: 7 if is_uneven else None])
        if int(os.environ.get("RANK", 0)) == 0:
            (Path(output) / method / "report.json").write_text(json.dumps(asdict(report)))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
