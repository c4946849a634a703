"""Against a re-statement of the published procedure, at equal cuts.

    .venv/bin/python tests/benchmarks/bench_published.py [--n 64] [--prompts 8] [--model starter | 15m] [--device cuda]

As in the authors' code (arXiv 2410.20290; github.com/Zanette-Labs/SpeculativeRejection): one prompt at a time; each
round computes prompt and answer so far anew for every survivor, none sharing the prompt's keys, and the reward model
scores every whole text from scratch. Two arms, so that the engine's gain and the procedure's do not mix: rounds on
this project's engine, and rounds on `transformers.generate`. Cuts and rows are the same everywhere; the arm on our
engine also draws the same tokens. The starter has prompts of about 33 tokens; `--model 15m` takes random models of that
size and prompts of `--prompt` words, which is nearer to what people run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from bench_engine import MODELS
from harness import medians, options, show
from starter_runs import Starter, prompts

from runtime.decoding.rejection import CutSchedule, keep_count, rank
from runtime.decoding.sampling import SamplingConfig, sample
from runtime.kv.arena import Arena, ArenaSize, KVShape
from runtime.kv.attention import logits_of, run
from runtime.kv.passes import PrefillPass, RowsPass
from runtime.models import encode_prompt, stop_ids
from runtime.randomness import row_key
from runtime.records import Message, Prompt

MAX_NEW = 128
Grow = Callable[[Prompt, list[list[int]], list[int], int], list[list[int]]]


def main() -> None:
    settings = options(__doc__, n=64, prompts=8, cuts=[8, 16, 32, 48], keep=0.5, model="starter", prompt=256)
    asked = prompts(0, settings.prompts)
    if settings.model == "starter":
        starter = Starter.load(settings.device)
    else:
        starter = Starter.random(settings.device, MODELS[settings.model])
        words = " ".join(str(number % 100) for number in range(settings.prompt))
        asked = [replace(prompt, messages=(Message("user", words),)) for prompt in asked]
    cuts = CutSchedule(tuple(settings.cuts), (settings.keep,) * len(settings.cuts))
    published = Published(starter, cuts, settings.n)
    arms: dict[str, Callable[[], object]] = {
        "this engine": lambda: ours(starter, cuts, settings.n, asked),
        "published, this engine": lambda: [published.winner(prompt, published.grow_here) for prompt in asked],
        "published, transformers": lambda: [published.winner(prompt, published.grow_there) for prompt in asked],
    }
    same = [a == b for a, b in zip(arms["this engine"](), arms["published, this engine"](), strict=True)]  # type: ignore[call-overload]
    found = medians(arms, settings.repeats, settings.device)
    rows = [{"arm": arm, "seconds": s, "x this engine": s / found["this engine"]} for arm, s in found.items()]
    print(f"same winner on {sum(same)} of {len(same)} prompts")
    show("published", settings, rows)


def ours(starter: Starter, cuts: CutSchedule, n: int, asked: Sequence[Prompt]) -> list[str]:
    """The winners of speculative rejection here, one prompt at a time like the others."""
    winners = []
    for prompt in asked:
        ((candidates),) = starter.engine(n, cuts, n).generate([prompt])
        texts = [c.response for c in candidates if c.finish_reason != "cut"]
        winners.append(best(starter, prompt, texts))
    return winners


def best(starter: Starter, prompt: Prompt, texts: Sequence[str]) -> str:
    scores = starter.reward.score([prompt] * len(texts), texts)
    return texts[rank({i: float(score.value or 0.0) for i, score in enumerate(scores)})[0]]


class Published:
    """The procedure; how rows grow is given."""

    def __init__(self, starter: Starter, cuts: CutSchedule, n: int) -> None:
        self.starter, self.cuts, self.n = starter, cuts, n
        self.model = starter.policy.model
        self.plain = copy.deepcopy(self.model)
        self.ends = stop_ids(starter.policy)

    def winner(self, prompt: Prompt, grow: Grow) -> str:
        rows: list[list[int]] = [[] for _ in range(self.n)]
        alive = list(range(self.n))  # of those that compete, finished ones included
        for n_tokens, keep in zip([*self.cuts.tokens, MAX_NEW], [*self.cuts.keep, 1.0], strict=True):
            running = [i for i in alive if not rows[i] or rows[i][-1] not in self.ends]
            if running:
                grown = grow(prompt, [rows[i] for i in running], running, n_tokens)
                for i, tokens in zip(running, grown, strict=True):
                    rows[i] = tokens
            if len(alive) > 1 and any(rows[i][-1] not in self.ends for i in alive):
                texts = [self._text(rows[i]) for i in alive]
                scores = self.starter.reward.score([prompt] * len(alive), texts)
                ranked = rank({i: float(score.value or 0.0) for i, score in zip(alive, scores, strict=True)})
                alive = ranked[: keep_count(len(ranked), keep)]
        return best(self.starter, prompt, [self._text(rows[i]) for i in sorted(alive)])

    @torch.inference_mode()
    def grow_here(self, prompt: Prompt, rows: list[list[int]], indices: list[int], n_tokens: int) -> list[list[int]]:
        """On our arena, every row with a prompt of its own; finished rows go on to the end of the round."""
        prompt_ids = encode_prompt(self.starter.policy.tokenizer, prompt.messages, "chat")
        n_done, device = len(rows[0]), self.model.device
        tokens = torch.tensor([prompt_ids + row for row in rows], device=device)
        n_new = n_tokens - n_done
        size = ArenaSize(len(rows), tokens.shape[1], len(rows), n_new + 1)
        arena = Arena(KVShape.of(self.model), size, self.model.dtype, device)
        for _ in rows:
            arena.add(tokens.shape[1], 1)
        keys = torch.tensor([row_key(0, prompt.prompt_id, index) for index in indices], device=device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        hidden = run(self.model, tokens, positions, PrefillPass(arena, slice(0, len(rows))))[:, -1]
        config, drawn = SamplingConfig(n=self.n), []
        for step in range(n_new):
            position = torch.full((len(rows),), n_done + step, device=device)
            drawn.append(sample(logits_of(self.model, hidden), keys, position, config))
            if step + 1 < n_new:
                one = RowsPass(arena, 1, step + 1)
                hidden = run(self.model, drawn[-1][:, None], one.positions, one)[:, 0]
                arena.row_tokens += 1
        return [self._ended(row + new) for row, new in zip(rows, torch.stack(drawn, dim=1).tolist(), strict=True)]

    @torch.inference_mode()
    def grow_there(self, prompt: Prompt, rows: list[list[int]], indices: list[int], n_tokens: int) -> list[list[int]]:
        """With transformers: one padded batch from the start."""
        prompt_ids = encode_prompt(self.starter.policy.tokenizer, prompt.messages, "chat")
        tokens = torch.tensor([prompt_ids + row for row in rows], device=self.model.device)
        found = self.plain.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            top_k=0,
            max_new_tokens=n_tokens - len(rows[0]),
        )
        return [self._ended(row) for row in found[:, len(prompt_ids) :].tolist()]

    def _ended(self, row: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        return row if end is None else row[: end + 1]

    def _text(self, row: list[int]) -> str:
        text: str = self.starter.policy.tokenizer.decode(
            row, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


if __name__ == "__main__":
    main()
