"""What a sampler head is worth on the starter: tokens per round after training, and CPU time of a draft.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_s3d_sampler.py [--steps 300] [--problems 1500] [--widths 0 32]

Answers are drawn once; every width trains on the same ones and is measured on answers to 100 held-out problems. Times
are the least of 60 runs of one draft (k = 4) and of the policy's own passes, context 45, sampling included.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from runtime.alignment.s3d_acceptance import draft_share, measure
from runtime.alignment.s3d_training import S3DTraining, train_s3d
from runtime.decoding.s3d.adapter import Drafter, S3DAdapter
from runtime.decoding.s3d.verify import Block, draft, draft_in_turn, verify
from runtime.decoding.sampling import SamplingConfig
from runtime.kv.arena import Arena, ArenaSize, KVShape
from runtime.kv.attention import install, logits_of, run
from runtime.kv.passes import PrefillPass, RowsPass
from runtime.models import LoadedModel, load_policy
from runtime.starter import path
from runtime.starter.s3d_recipe import draw_samples

K, CONTEXT, REPEATS = 4, 45, 60
ROWS = (1, 8)


def main() -> None:
    """Print a line per width, then times per number of rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--problems", type=int, default=1500)
    parser.add_argument("--widths", type=int, nargs="+", default=[0, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = load_policy(str(path("policy")))
    train = draw_samples(policy, options.problems, held_out=False, seed=7)
    held_out = draw_samples(policy, 100, held_out=True, seed=1)
    print("width | sum min(p, q) | rate, coupled | E, k = 1.. | E classic | beta")
    for width in options.widths:
        settings = S3DTraining(k=K, steps=options.steps, seed=7, sampler_width=width)
        adapter = train_s3d(policy, train, settings)
        found = measure(policy, adapter, held_out, settings)
        columns = [found.overlap, found.coupled.rates, found.coupled.emitted, found.classic.emitted[-1:]]
        share = draft_share(policy.model, adapter)
        print(width, *(" ".join(f"{one:.3f}" for one in column) for column in columns), f"{share:.3f}", sep=" | ")
    for rows in ROWS:
        print(f"{rows} rows, ms:", {name: round(1000 * one, 2) for name, one in times(policy, options.widths, rows)})


@torch.inference_mode()
def times(policy: LoadedModel, widths: Sequence[int], rows: int) -> list[tuple[str, float]]:
    """Least CPU seconds of drafts by the head's width, and of full passes over 1 and 1 + k tokens."""
    model = policy.model
    install(model)
    arena = Arena(KVShape.of(model), ArenaSize(1, 48, rows, 64), model.dtype, torch.device("cpu"))
    arena.add(CONTEXT, rows)
    run(model, torch.randint(4, 600, (1, CONTEXT)), torch.arange(CONTEXT)[None], PrefillPass(arena, slice(0, 1)))
    last, none = torch.randint(4, 600, (rows,)), torch.zeros(rows, dtype=torch.long)
    block = Block(torch.arange(rows), none, none + 1 + K, None, SamplingConfig())
    jobs: list[tuple[str, Callable[[], object]]] = []
    for width in widths:
        config = S3DTraining(k=K, sampler_width=width).adapter_config(policy.content_hash)
        drafter = Drafter(policy, S3DAdapter(policy, config).requires_grad_(False))
        jobs.append((f"draft, width {width}", partial(_draft, drafter, arena, last, block)))
    jobs += [(f"{n} tokens, all layers", partial(_full, policy, arena, last, block, n)) for n in (1, 1 + K)]
    best = [float("inf")] * len(jobs)
    for _ in range(REPEATS):
        for place, (_, job) in enumerate(jobs):
            started = time.thread_time()
            job()
            best[place] = min(best[place], time.thread_time() - started)
    return [(name, one) for (name, _), one in zip(jobs, best, strict=True)]


def _draft(drafter: Drafter, arena: Arena, last: Tensor, block: Block) -> object:
    step = RowsPass(arena, 1 + K, 1 + K)
    hidden = drafter.hidden(last, K, step.positions, step)
    if drafter.adapter.sampler is None:
        return draft(block, drafter.logits(hidden), "coupled")
    return draft_in_turn(block, K, partial(drafter.logits_after, hidden), "coupled")


def _full(policy: LoadedModel, arena: Arena, last: Tensor, block: Block, n_tokens: int) -> object:
    step = RowsPass(arena, n_tokens, n_tokens)
    hidden = run(policy.model, last[:, None].expand(-1, n_tokens), step.positions, step)
    return verify(block, None, logits_of(policy.model, hidden)[:, :1], "coupled")


if __name__ == "__main__":
    main()
