"""Self-speculative decoding against plain decoding by the same engine.

    .venv/bin/python tests/benchmarks/bench_s3d.py [--adapter FOLDER] [--rows 1 2 4 8 16 32 64] [--dtypes float32]

Parts, each on its own with --part: `rows`, tokens per second off, with each fixed k and auto, per rows and number
format, with E, acceptance by place and tokens per second and GiB ("auto, cold" has measured nothing before each
call, "auto" keeps what it learnt); `cost`, seconds of a round against a plain step, the speed-up that these predict
and the one that is measured; `break-even`, the rows up to which it pays; `rejection`,
Best-of-N, whole and with cuts (--what, --cut-tokens, --cut-keep), off, auto and always;
`assisted`, one row of transformers' own generate, plain and with its early-exit drafts. Without a trained adapter,
--kind oracle drafts what the policy will say but for a share --wrong of all places, which measures the engine and not
the adapter; --kind random is a random policy of --width and --layers, for times alone.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import medians, options, show
from starter_runs import Starter, prompts

from runtime.alignment.s3d_acceptance import draft_share
from runtime.decoding.controller import Acceptance, Controller
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutPolicy, CutSchedule
from runtime.decoding.s3d import rounds
from runtime.decoding.s3d.adapter import S3DAdapter, load_adapter
from runtime.decoding.s3d.forecast import round_seconds
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.s3d.verify import Block, Drafts, RuleName, Verdict
from runtime.decoding.sampling import SamplingConfig
from runtime.kv.arena import KVShape
from runtime.models import LoadedModel, encode_prompt, load_classifier, load_policy, stop_ids
from runtime.randomness import row_key
from runtime.records import Candidate, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.rewards.protocol import Reward
from runtime.starter import FOLDER, path

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second where a machine is shared
COLD = "auto, cold"  # has measured nothing yet
EXITS = (1, 2, 4)  # layers of transformers' early-exit drafts


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
        width=2048,
        layers=16,
        clock="wall",
        cut_tokens=[10, 24],
        cut_keep=[0.5, 0.5],
        what=["best-of-n", "with cuts"],
        part=["rows", "cost", "rejection", "assisted"],
    )
    for part in settings.part:
        found = [row for dtype in settings.dtypes for row in PARTS[part](Bench(settings, dtype))]
        show(f"s3d_{part}", settings, found)


class Bench:
    """The policy in one number format, and what drafts for it."""

    def __init__(self, settings: argparse.Namespace, dtype: str) -> None:
        self.settings, self.dtype = settings, dtype
        self.policy = self._policy()
        if settings.kind == "adapter":
            self.adapter = load_adapter(Path(settings.adapter), self.policy)
        else:
            self.adapter = S3DAdapter.skip_only(self.policy, *settings.keep, max(settings.k))
            self.adapter.knows([1 - settings.wrong] * max(settings.k))
        self.tally: list[torch.Tensor] = []
        self._watch()

    def _policy(self) -> LoadedModel:
        settings, dtype = self.settings, self.dtype
        if settings.kind != "random":
            return load_policy(str(path("policy")), dtype, settings.device)
        sizes = {"hidden_size": settings.width, "num_hidden_layers": settings.layers}
        heads = {"num_attention_heads": settings.width // 64, "num_key_value_heads": max(1, settings.width // 256)}
        policy = Starter.random(settings.device, sizes | heads | {"intermediate_size": 4 * settings.width}).policy
        policy.model.to(getattr(torch, dtype))
        return policy

    def arms(self) -> dict[str, S3DDecoding | None]:
        """Off, always, as many as pay."""
        always = {f"k={k}": S3DDecoding(self.adapter, k) for k in self.settings.k if k <= self.adapter.config.k}
        clock = CLOCKS[self.settings.clock]
        return {"off": None, **always, **{name: S3DDecoding(self.adapter, clock=clock) for name in (COLD, "auto")}}

    def engine(
        self, n: int, s3d: S3DDecoding | None, cuts: CutPolicy | None = None, reward: Reward | None = None
    ) -> Engine:
        sampling = SamplingConfig(n=n, max_new_tokens=self.settings.new)
        return Engine(self.policy, sampling, cuts or CutSchedule(), reward, n, s3d=s3d)

    def gibibytes(self, n: int, asked: Sequence[Prompt], s3d: S3DDecoding | None) -> float:
        """Weights, keys and values, and what drafts."""
        engine, model = self.engine(n, None), self.policy.model
        size = engine._plan([engine._job(prompt) for prompt in asked])
        kept = size.n_tokens * KVShape.of(model).n_bytes(1, model.dtype)
        weights = sum(one.nbytes for one in model.parameters())
        return (weights + kept + (s3d.adapter.n_bytes if s3d else 0)) / 2**30

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
            speed = sum(c.n_tokens for c in answers) / seconds[name]
            found.append(
                {
                    "dtype": bench.dtype,
                    "rows": n,
                    "arm": name,
                    "tokens/s": speed,
                    "x plain": seconds["off"] / seconds[name],
                    "tokens/s/GiB": speed / bench.gibibytes(n, asked, bench.arms()[name]),
                    "same": same,
                    **_accepted(bench.tally),
                }
            )
    return found


def costs(bench: Bench) -> list[dict[str, object]]:
    """Seconds of rounds against a plain step: the E from which they pay, and what is predicted and measured."""
    found: list[dict[str, object]] = []
    expected = Acceptance(bench.adapter.config.k, bench.adapter.config.rates).tokens()
    clock = CLOCKS[bench.settings.clock]
    for n in bench.settings.rows:
        asked = prompts(0, max(2, min(bench.settings.prompts, 64 // n)))
        plain = bench.engine(n, None)
        if bench.settings.kind == "oracle":
            bench.oracle([c for answers in plain.generate(asked) for c in answers])
        rounds_of = round_seconds(bench.policy, S3DDecoding(bench.adapter, clock=clock), asked[0], n)
        for k in bench.settings.k:
            row: dict[str, object] = {"dtype": bench.dtype, "rows": n, "k": k, "plain ms": 1000 * rounds_of[0]}
            row |= {"needed E": rounds_of[k] / rounds_of[0], "E": expected[k]}
            row |= {"predicted x": expected[k] * rounds_of[0] / rounds_of[k]}
            if bench.settings.kind != "random":
                engines = {"off": plain, "s3d": bench.engine(n, S3DDecoding(bench.adapter, k))}
                seconds = medians(_runs(engines, asked), bench.settings.repeats, bench.settings.device, clock)
                row["measured x"] = seconds["off"] / seconds["s3d"]
            found.append(row)
    return found


def break_even(bench: Bench) -> list[dict[str, object]]:
    """Rows up to which drafting pays: by the formula of docs/s3d.md, by the rounds' times, by decoding; and the knee
    (tokens that cost as much as an empty pass) that would give 1.1 times plain decoding at --n rows."""
    table, found, beta = costs(bench), [], draft_share(bench.policy.model, bench.adapter)
    plain = {int(str(row["rows"])): float(str(row["plain ms"])) for row in table}
    # Least squares of F + c rows, each time counting by its share of error.
    matrix = torch.tensor([[1 / ms, rows / ms] for rows, ms in plain.items()], dtype=torch.float64)
    fixed, per_row = torch.linalg.lstsq(matrix, torch.ones(len(plain), 1, dtype=torch.float64)).solution[:, 0].tolist()
    for k in bench.settings.k:
        rows = [row for row in table if row["k"] == k]
        e, work = float(str(rows[0]["E"])), k + 1 + beta * k
        found.append(
            {
                "dtype": bench.dtype,
                "k": k,
                "E": e,
                "knee": fixed / per_row,
                "B* formula": fixed / per_row * (e - 1 - beta) / (work - e),
                "B* rounds": _crossing(rows, "predicted x"),
                "B* decoding": _crossing(rows, "measured x"),
                "knee for 1.1x": bench.settings.n * (1.1 * work - e) / (e - 1.1 * (1 + beta)),
            }
        )
    return found


def _crossing(rows: Sequence[Mapping[str, object]], column: str) -> float | None:
    """Number of rows at which a column falls below 1, between two powers of two."""
    known = [(float(str(row["rows"])), float(str(row[column]))) for row in rows if column in row]
    for (n, x), (n_next, x_next) in pairwise(known):
        if x >= 1 > x_next:
            return float(n * (n_next / n) ** ((x - 1) / (x - x_next)))
    return None


def assisted(bench: Bench) -> list[dict[str, object]]:
    """One greedy row: transformers' generate, plain and with drafts of its first layers, against this engine."""
    if bench.settings.kind != "adapter":
        return []
    asked = prompts(0, bench.settings.prompts)
    other = load_policy(str(path("policy")), bench.dtype, bench.settings.device)  # attends in its own way
    texts = [torch.tensor([encode_prompt(other.tokenizer, p.messages, "chat")]) for p in asked]
    model: Any = other.model

    def generate(early_exit: int) -> list[list[int]]:
        more = {"assistant_early_exit": early_exit} if early_exit else {}
        limits = {"max_new_tokens": bench.settings.new, "do_sample": False, "eos_token_id": sorted(stop_ids(other))}
        found = [model.generate(text.to(model.device), **limits, **more) for text in texts]
        return [ids[0, text.shape[1] :].tolist() for ids, text in zip(found, texts, strict=True)]

    def decode(s3d: S3DDecoding | None) -> list[list[int]]:
        sampling = SamplingConfig(n=1, temperature=0, max_new_tokens=bench.settings.new)
        engine = Engine(bench.policy, sampling, CutSchedule(), None, 1, s3d=s3d)
        return [list(c.token_ids) for answers in engine.generate(asked) for c in answers]

    arms: dict[str, Callable[[], list[list[int]]]] = {"generate": lambda: generate(0)}
    arms |= {f"generate, exit after {n}": lambda n=n: generate(n) for n in EXITS}
    arms |= {f"engine, {name}": lambda s3d=s3d: decode(s3d) for name, s3d in bench.arms().items()}
    seconds = medians(arms, bench.settings.repeats, bench.settings.device, CLOCKS[bench.settings.clock])
    plain = arms["generate"]()
    return [
        {
            "dtype": bench.dtype,
            "arm": name,
            "tokens/s": sum(map(len, texts_of := arms[name]())) / seconds[name],
            "x generate": seconds["generate"] / seconds[name],
            "same": sum(a == b for a, b in zip(texts_of, plain, strict=True)) / len(plain),
        }
        for name in arms
    ]


def with_rejection(bench: Bench) -> list[dict[str, object]]:
    """Best-of-N with cuts, the rewards' time included."""
    reward = ClassifierReward(load_classifier(str(path("reward")), bench.dtype, bench.settings.device))
    settings = bench.settings
    asked, n = prompts(0, settings.prompts), settings.n
    found: list[dict[str, object]] = []
    for title, cuts in (
        ("best-of-n", CutSchedule()),
        ("with cuts", CutSchedule(tuple(settings.cut_tokens), tuple(settings.cut_keep))),
    ):
        if title not in settings.what:
            continue
        scores = reward if cuts.is_cutting else None
        engines = {name: bench.engine(n, s3d, cuts, scores) for name, s3d in bench.arms().items()}
        plain = [c for answers in bench.engine(n, None).generate(asked) for c in answers]
        if bench.settings.kind == "oracle":
            bench.oracle(plain)
        seconds = medians(_runs(engines, asked), settings.repeats, settings.device, CLOCKS[settings.clock])
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
    def run(name: str, engine: Engine) -> object:
        if name == COLD:
            assert isinstance(engine.steps, rounds.S3DRounds) and engine.steps.controller is not None
            config = engine.steps.s3d.adapter.config
            engine.steps.controller = Controller(config.k, config.rates)
        return list(engine.generate(asked))

    return {name: partial(run, name, engine) for name, engine in engines.items()}


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
    "break-even": break_even,
    "rejection": with_rejection,
    "assisted": assisted,
}


if __name__ == "__main__":
    main()
