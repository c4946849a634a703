"""Self-speculative decoding against plain decoding by the same engine.

    .venv/bin/python tests/benchmarks/bench_s3d.py [--adapter FOLDER] [--rows 1 2 4 8 16 32 64] [--dtypes float32]

Parts, each on its own with --part: `rows`, tokens per second off, with each fixed k and auto, per rows and number
format, with E and acceptance by place; `cost`, seconds of a round, what they predict and the rows where it breaks
even; `rejection`, Best-of-N with cuts off, auto and always. Without a trained adapter, --kind oracle drafts what the
policy will say but for a share --wrong of all places, which measures the engine and not the adapter.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import medians, options, show
from starter_runs import prompts

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutPolicy, CutSchedule
from runtime.decoding.s3d import rounds
from runtime.decoding.s3d.adapter import S3DAdapter, load_adapter
from runtime.decoding.s3d.rounds import S3DDecoding, S3DRounds
from runtime.decoding.s3d.verify import Block, Drafts, RuleName, Verdict
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, load_classifier, load_policy
from runtime.randomness import row_key
from runtime.records import Candidate, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.rewards.protocol import Reward
from runtime.starter import FOLDER, path

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second where a machine is shared
SCHEDULE = CutSchedule((10, 24), (0.5, 0.5))


def main() -> None:
    settings = options(
        __doc__,
        rows=[1, 2, 4, 8, 16, 32, 64],
        dtypes=["float32", "bfloat16"],
        k=[4],
        adapter=str(FOLDER / "s3d"),
        kind="adapter",
        keep=[1, 1],
        wrong=0.3,
        new=64,
        prompts=8,
        n=64,
        clock="wall",
        part=["rows", "cost", "rejection"],
    )
    for part in settings.part:
        found = [row for dtype in settings.dtypes for row in PARTS[part](Bench(settings, dtype))]
        show(f"s3d_{part}", settings, found)


class Bench:
    """The policy in one number format, and what drafts for it."""

    def __init__(self, settings: argparse.Namespace, dtype: str) -> None:
        self.settings, self.dtype = settings, dtype
        self.policy: LoadedModel = load_policy(str(path("policy")), dtype, settings.device)
        k_most = max(settings.k)
        if settings.kind == "adapter":
            self.adapter = load_adapter(Path(settings.adapter), self.policy)
        else:
            self.adapter = S3DAdapter.skip_only(self.policy, *settings.keep, k_most)
        self.tally: list[torch.Tensor] = []
        self._watch()

    def arms(self) -> dict[str, S3DDecoding | None]:
        """Off, always, as many as pay."""
        always = {f"k={k}": S3DDecoding(self.adapter, k) for k in self.settings.k if k <= self.adapter.config.k}
        return {"off": None, **always, "auto": S3DDecoding(self.adapter, clock=CLOCKS[self.settings.clock])}

    def engine(
        self, n: int, s3d: S3DDecoding | None, cuts: CutPolicy | None = None, reward: Reward | None = None
    ) -> Engine:
        sampling = SamplingConfig(n=n, max_new_tokens=self.settings.new)
        return Engine(self.policy, sampling, cuts or CutSchedule(), reward, n, s3d=s3d)

    def _watch(self) -> None:
        original = _ORIGINAL_VERIFY

        def verify(block: Block, *args: Any) -> Verdict:
            verdict = original(block, *args)
            drafted = block.limits.clamp(max=verdict.tokens.shape[1]) - 1
            if verdict.tokens.shape[1] > 1:
                self.tally.append(torch.stack((verdict.accepted, drafted)))
            return verdict

        rounds.verify = verify

    def oracle(self, texts: Sequence[Candidate]) -> None:
        """Draft these texts, wrong at a share of all places."""
        known = {row_key(0, c.prompt_id, c.candidate_index): c.token_ids for c in texts}
        wrong, n_words = self.settings.wrong, int(self.policy.model.config.vocab_size)

        def draft(block: Block, logits: torch.Tensor, rule: RuleName) -> Drafts:
            k, found = logits.shape[1], []
            _ORIGINAL_DRAFT(block, logits, rule)  # whose time counts
            for key, start in zip(block.keys.tolist(), block.start.tolist(), strict=True):
                right = [*known[key][start : start + k], *[0] * k][:k]
                bad = [random.Random(key ^ (start + place)).random() < wrong for place in range(k)]
                found.append([(token + flip) % n_words for token, flip in zip(right, bad, strict=True)])
            return Drafts(torch.tensor(found, device=logits.device), logits)

        rounds.draft = draft


_ORIGINAL_VERIFY, _ORIGINAL_DRAFT = rounds.verify, rounds.draft


def by_rows(bench: Bench) -> list[dict[str, object]]:
    """Answers of the starter, `rows` at a time."""
    found: list[dict[str, object]] = []
    for n in bench.settings.rows:
        asked = prompts(0, max(2, min(bench.settings.prompts, 64 // n)))
        engines = {name: bench.engine(n, s3d) for name, s3d in bench.arms().items()}
        plain = [c for answers in engines["off"].generate(asked) for c in answers]
        if bench.settings.kind == "oracle":
            bench.oracle(plain)
        seconds = medians(
            _runs(engines, asked), bench.settings.repeats, bench.settings.device, CLOCKS[bench.settings.clock]
        )
        for name, engine in engines.items():
            bench.tally.clear()
            answers = [c for each in engine.generate(asked) for c in each]
            same = sum(c.token_ids == p.token_ids for c, p in zip(answers, plain, strict=True)) / len(plain)
            found.append(
                {
                    "dtype": bench.dtype,
                    "rows": n,
                    "arm": name,
                    "tokens/s": sum(c.n_tokens for c in answers) / seconds[name],
                    "x plain": seconds["off"] / seconds[name],
                    "same": same,
                    **_accepted(bench.tally),
                }
            )
    return found


def costs(bench: Bench) -> list[dict[str, object]]:
    """Measured seconds of rounds, and the E that each needs to break even; predicted is the best k at the E found."""
    found: list[dict[str, object]] = []
    for n in bench.settings.rows:
        engine = bench.engine(n, bench.arms()["auto"])
        asked = prompts(0, max(2, min(bench.settings.prompts, 64 // n)))
        if bench.settings.kind == "oracle":
            bench.oracle([c for answers in bench.engine(n, None).generate(asked) for c in answers])
        list(engine.generate(asked))
        assert isinstance(engine.steps, S3DRounds) and engine.steps.controller is not None
        controller = engine.steps.controller
        expected = controller.acceptance.tokens()
        seconds = next(iter(controller.seconds.values()))
        predicted = [e * seconds[0] / s for e, s in zip(expected, seconds, strict=True)]
        best = max(range(len(predicted)), key=predicted.__getitem__)
        row: dict[str, object] = {"dtype": bench.dtype, "rows": n, "plain ms": 1000 * seconds[0]}
        row |= {f"need E k={k}": one / seconds[0] for k, one in enumerate(seconds) if k}
        found.append(row | {"E": expected[-1], "best k": best, "predicted x": predicted[best]})
    return found


def with_rejection(bench: Bench) -> list[dict[str, object]]:
    """Best-of-N with cuts, the rewards' time included."""
    reward = ClassifierReward(load_classifier(str(path("reward")), bench.dtype, bench.settings.device))
    asked, n = prompts(0, bench.settings.prompts), bench.settings.n
    found: list[dict[str, object]] = []
    for title, cuts in (("best-of-n", CutSchedule()), ("with cuts", SCHEDULE)):
        scores = reward if cuts.is_cutting else None
        engines = {name: bench.engine(n, s3d, cuts, scores) for name, s3d in bench.arms().items()}
        plain = [c for answers in bench.engine(n, None).generate(asked) for c in answers]
        if bench.settings.kind == "oracle":
            bench.oracle(plain)
        seconds = medians(
            _runs(engines, asked), bench.settings.repeats, bench.settings.device, CLOCKS[bench.settings.clock]
        )
        tables = {name: [_short(c) for a in engine.generate(asked) for c in a] for name, engine in engines.items()}
        found += [
            {
                "dtype": bench.dtype,
                "n": n,
                "what": title,
                "arm": name,
                "seconds": seconds[name],
                "x plain": seconds["off"] / seconds[name],
                "same candidates": tables[name] == tables["off"],
            }
            for name in engines
        ]
    return found


def _runs(engines: Mapping[str, Engine], asked: Sequence[Prompt]) -> dict[str, Callable[[], object]]:
    return {name: (lambda engine=engine: list(engine.generate(asked))) for name, engine in engines.items()}


def _short(candidate: Candidate) -> tuple[object, ...]:
    return candidate.token_ids, candidate.finish_reason, candidate.cut_at_token


def _accepted(tally: Sequence[torch.Tensor]) -> dict[str, object]:
    """E over the rounds that drafted, and acceptance by place."""
    if not tally:
        return {}
    accepted, drafted = torch.cat(list(tally), dim=1)
    rates: dict[str, object] = {}
    for place in range(int(drafted.max())):
        reached = (drafted > place) & (accepted >= place)
        rates[f"a{place + 1}"] = float((accepted[reached] > place).float().mean())
    return {"E": float((accepted[drafted > 0] + 1).float().mean()), **rates}


PARTS: dict[str, Callable[[Bench], list[dict[str, object]]]] = {
    "rows": by_rows,
    "cost": costs,
    "rejection": with_rejection,
}


if __name__ == "__main__":
    main()
