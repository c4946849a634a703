"""One step of every method, from drawn answers to moved weights, against formulae written out here, in float64.

The answers are made up; log-probabilities, anchors, baselines and the step itself are the training's own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from runtime.alignment.collate import Batch, padded
from runtime.alignment.config import LoraSettings, Places
from runtime.alignment.online.loop import Task, _Training
from runtime.alignment.online.players import ANCHOR
from runtime.alignment.online.ranks import Ranks
from runtime.alignment.online.rollout import Drawing, Rollout
from runtime.alignment.online.settings import OnlineSettings
from runtime.alignment.online.training import OnlineConfig
from runtime.models import LoadedModel
from runtime.records import Candidate, Message, Prompt
from runtime.rewards.verifier import FunctionReward
from tests.runtime.alignment.online.test_loop import config, train
from tests.runtime.alignment.tiny_models import tiny_model

PROMPTS = [Prompt(f"p{i}", (Message("user", str(i)),), "ab"[i % 2]) for i in range(4)]
TEMPERATURE, MAX_TOKENS, RATE = 0.7, 6, 0.05
Weights = dict[str, Tensor]


@dataclass(slots=True)
class MadeUp:
    """Stands for the Sampler: random tokens and rewards, one answer of which could not be scored."""

    drawing: Drawing = Drawing(temperature=TEMPERATURE, max_new_tokens=MAX_TOKENS)
    ranks: Ranks = field(default_factory=Ranks)
    drawn: dict[str, Rollout] = field(default_factory=dict)
    drawn_by: dict[str, LoadedModel] = field(default_factory=dict)

    def draw(self, policy: LoadedModel, prompts: Sequence[Prompt], n: int, turn: str, greedy: bool = False) -> Rollout:
        """Other ones for every turn."""
        key = f"{turn} greedy" if greedy else turn
        random = torch.Generator().manual_seed(sum(map(ord, key)))
        starts = [3 + place % 2 for place in range(len(prompts)) for _ in range(n)]
        ends = [start + int(torch.randint(1, MAX_TOKENS + 1, (), generator=random)) for start in starts]
        ids = [torch.randint(3, 67, (end,), generator=random).tolist() for end in ends]
        answers = [Candidate("p", 0, tuple(i[start:]), "", "eos") for i, start in zip(ids, starts, strict=True)]
        place = torch.arange(max(ends))
        mask = place < torch.tensor(ends)[:, None]
        is_scored = torch.ones(len(ids), dtype=torch.bool)
        is_scored[1] = False
        rewards = torch.randn(len(ids), dtype=torch.float64, generator=random) * is_scored
        batch = Batch(padded(ids, 0), mask.long(), mask & (place >= torch.tensor(starts)[:, None]))
        self.drawn[key] = Rollout(prompts, answers, batch, rewards, is_scored, {})
        self.drawn_by[key] = policy
        return self.drawn[key]


def _training(method: str, folder: Path, lora: LoraSettings | None = None, **constants: Any) -> _Training:
    """Whose reference, anchor and value head differ from the policy, and whose step is a plain gradient step."""
    settings = OnlineSettings(method=method, **constants)  # type: ignore[arg-type]
    drawing = Drawing(temperature=TEMPERATURE, max_new_tokens=MAX_TOKENS)
    whole = OnlineConfig(settings, drawing, prompts_per_step=4, rows=5, warmup_ratio=0.0, lora=lora)
    loaded = LoadedModel(tiny_model(), cast(Any, None), "", "")
    task = Task(PROMPTS, FunctionReward(lambda prompt, response: 0.0, "none"))
    places = Places(folder / "model", folder)
    training = _Training(loaded, task, replace(whole, max_grad_norm=1e9, kl_limit=1e9), places)
    training.gatherer.sampler = cast(Any, MadeUp())
    players = training.players
    if players.value_head is not None:
        players.value_head.double()
        torch.nn.init.normal_(players.value_head.weight, std=0.3)
    for other in (players.reference, players.anchor):
        for weight in other.own.parameters() if other is not None and other.own is not None else ():
            weight.add_(
                0.02 * torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))
            )
    groups = [{"params": list(players.trained().values()), "lr": RATE, "peak": RATE}]
    training.optimizer = torch.optim.SGD(groups)
    return training


def _logps(model: torch.nn.Module, rollout: Rollout) -> list[Tensor]:
    """Of every answer's tokens, one row at a time and with all logits."""
    found = []
    for ids, mask, is_answer in zip(rollout.batch.token_ids, rollout.batch.mask, rollout.batch.is_answer, strict=True):
        n = int(mask.sum())
        laws = (model(input_ids=ids[None, :n]).logits[0] / TEMPERATURE).log_softmax(-1)
        found.append(torch.stack([laws[place - 1, ids[place]] for place in range(1, n) if is_answer[place]]))
    return found


def _values(training: _Training, rollout: Rollout) -> list[Tensor]:
    """What the value head makes of the state before every token of an answer."""
    head, found = training.players.value_head, []
    assert head is not None
    for ids, mask, is_answer in zip(rollout.batch.token_ids, rollout.batch.mask, rollout.batch.is_answer, strict=True):
        n = int(mask.sum())
        states = training.players.model.base_model(input_ids=ids[None, :n]).last_hidden_state[0]
        found.append(torch.stack([head(states[place - 1])[0] for place in range(1, n) if is_answer[place]]))
    return found


@dataclass(frozen=True, slots=True)
class Known:
    """What a formula may use: of every answer, log-probabilities when it was drawn and under the reference."""

    training: _Training
    rollout: Rollout
    old: list[Tensor]
    reference: list[Tensor]
    old_values: list[Tensor] | None

    @property
    def settings(self) -> OnlineSettings:
        return self.training.config.method

    @property
    def scored(self) -> list[int]:
        return [row for row, known in enumerate(self.rollout.is_scored.tolist()) if known]

    def reward(self, row: int) -> float:
        return float(self.rollout.rewards[row])

    def others(self, row: int) -> list[int]:
        """Scored answers to the same prompt."""
        n = self.rollout.n_samples
        return [other for other in self.scored if other // n == row // n]

    def kl(self, row: int) -> Tensor:
        return self.old[row] - self.reference[row]


def _surrogate(now: Tensor, old: Tensor, worth: Tensor | float, settings: OnlineSettings) -> Tensor:
    ratio = (now - old).exp()
    held = torch.clamp(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    return -torch.minimum(ratio * worth, held * worth)


def _grpo(known: Known) -> Tensor:
    settings, now = known.settings, _logps(known.training.players.model, known.rollout)
    each = []
    for row in known.scored:
        rewards = [known.reward(other) for other in known.others(row)]
        mean = math.fsum(rewards) / len(rewards)
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1))
        worth = (known.reward(row) - mean) / (deviation + 1e-4 if settings.scale_rewards else 1.0)
        away = known.reference[row] - now[row]
        each.append(
            _surrogate(now[row], known.old[row], worth, settings) + settings.kl_weight * (away.exp() - away - 1)
        )
    if settings.aggregation == "sequence":
        return torch.stack([losses.mean() for losses in each]).mean()
    if settings.aggregation == "token":
        return torch.cat(each).mean()
    return torch.cat(each).sum() / (len(each) * MAX_TOKENS)


def _rloo(known: Known) -> Tensor:
    now = _logps(known.training.players.model, known.rollout)
    net = {row: known.reward(row) - known.settings.kl_weight * float(known.kl(row).sum()) for row in known.scored}
    each = []
    for row in known.scored:
        rest = [net[other] for other in known.others(row) if other != row]
        worth = net[row] - math.fsum(rest) / len(rest) if rest else 0.0
        each.append(_surrogate(now[row].sum(), known.old[row].sum(), worth, known.settings))
    return torch.stack(each).mean()


def _ppo(known: Known) -> Tensor:
    settings, scored = known.settings, known.scored
    assert known.old_values is not None
    gained, returns = {}, {}
    for row in scored:
        values, n = known.old_values[row], len(known.old[row])
        rewards = -settings.kl_weight * known.kl(row)
        rewards[-1] += known.reward(row)
        surprises = [rewards[t] + (settings.gamma * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
        gained[row] = torch.stack(
            [sum(((settings.gamma * settings.lam) ** (u - t)) * surprises[u] for u in range(t, n)) for t in range(n)]  # type: ignore[misc]
        )
        returns[row] = gained[row] + values
    every = torch.cat([gained[row] for row in scored])
    now, values_now = _logps(known.training.players.model, known.rollout), _values(known.training, known.rollout)
    each = []
    for row in scored:
        worth = (gained[row] - every.mean()) / (every.var() + 1e-8).sqrt()
        held = known.old_values[row] + (values_now[row] - known.old_values[row]).clamp(
            -settings.value_clip, settings.value_clip
        )
        errors = torch.maximum((values_now[row] - returns[row]) ** 2, (held - returns[row]) ** 2)
        each.append(_surrogate(now[row], known.old[row], worth, settings) + settings.value_coef * 0.5 * errors)
    return torch.cat(each).mean()


def _remax(known: Known) -> Tensor:
    settings, n = known.settings, known.rollout.n_samples
    greedy = cast(MadeUp, known.training.gatherer.sampler).drawn["step 0 greedy"]
    now, each = _logps(known.training.players.model, known.rollout), []
    for row in known.scored:
        if not greedy.is_scored[row // n]:
            continue
        gain = min(max(known.reward(row) - float(greedy.rewards[row // n]), -5.0), 5.0)
        length = len(now[row])
        discounts = torch.tensor([settings.gamma ** (length - t) for t in range(length)], dtype=torch.float64)
        each.append(-(gain * discounts - settings.kl_weight * known.kl(row)) * now[row])
    return torch.cat(each).mean()


def _jbond(known: Known) -> Tensor:
    training, settings = known.training, known.settings
    pairs = cast(MadeUp, training.gatherer.sampler).drawn["step 0 anchor"]
    assert training.players.anchor is not None and training.players.anchor.own is not None
    with torch.no_grad():
        anchored = [float(one.sum()) for one in _logps(training.players.anchor.own, known.rollout)]
    usable = [row for row in known.scored if bool(pairs.is_scored[2 * row : 2 * row + 2].all())]
    returns = {}
    for row in usable:
        below = known.reward(row) < min(float(pairs.rewards[2 * row]), float(pairs.rewards[2 * row + 1]))
        returns[row] = (-math.log(16) if below else 0.0) - (float(known.old[row].sum()) - anchored[row])
    now, of_pairs = (_logps(training.players.model, one) for one in (known.rollout, pairs))
    each = []
    for row in usable:
        rest = [returns[other] for other in usable if other != row]
        best = max((2 * row, 2 * row + 1), key=lambda one: float(pairs.rewards[one]))
        own, worth = now[row].sum(), returns[row] - math.fsum(rest) / len(rest)
        loss = (1 - settings.jeffreys) * -of_pairs[best].sum() - settings.jeffreys * worth * own
        each.append(loss + settings.anchor_weight * (own.detach() - anchored[row]) * own)
    return torch.stack(each).mean()


def _bond(known: Known) -> Tensor:
    training, settings, n = known.training, known.settings, known.rollout.n_samples
    drawn = cast(MadeUp, training.gatherer.sampler).drawn["bond reference"]
    k = settings.bond_samples
    usable = [row for row in known.scored if bool(drawn.is_scored[k * (row // n) : k * (row // n + 1)].all())]
    returns = {}
    for row in usable:
        scores = drawn.rewards[k * (row // n) : k * (row // n + 1)].tolist()
        share = max(sum(score <= known.reward(row) for score in scores), 0.5) / k
        returns[row] = math.log(share) - float(known.kl(row).sum()) / (settings.bond_n - 1)
    now, of_drawn = (_logps(training.players.model, one) for one in (known.rollout, drawn))
    each = []
    for row in usable:
        rest = [returns[other] for other in usable if other != row and other // n == row // n]
        first = range(k * (row // n), k * (row // n) + settings.bond_n)
        best = max(first, key=lambda one: float(drawn.rewards[one]))
        worth = returns[row] - math.fsum(rest) / len(rest)
        each.append((1 - settings.jeffreys) * -of_drawn[best].sum() - settings.jeffreys * worth * now[row].sum())
    return torch.stack(each).mean()


# Several passes over the answers make ratios other than 1.
CASES: dict[str, tuple[Callable[[Known], Tensor], dict[str, Any]]] = {
    "grpo": (_grpo, {"method": "grpo", "samples": 3, "kl_coef": 0.3, "epochs": 3, "clip_low": 0.05}),
    "dapo": (_grpo, {"method": "grpo", "samples": 3, "aggregation": "token", "clip_high": 0.28, "epochs": 2}),
    "dr. grpo": (_grpo, {"method": "grpo", "samples": 3, "aggregation": "constant", "scale_rewards": False}),
    "rloo": (_rloo, {"method": "rloo", "samples": 3, "kl_coef": 0.2, "epochs": 2}),
    "ppo": (_ppo, {"method": "ppo", "samples": 2, "kl_coef": 0.3, "epochs": 2, "gamma": 0.9, "value_clip": 0.01}),
    "remax": (_remax, {"method": "remax", "samples": 2, "kl_coef": 0.3, "gamma": 0.9}),
    "jbond": (_jbond, {"method": "jbond", "jeffreys": 0.3, "anchor_weight": 0.2, "anchor_rate": 0.1}),
    "bond": (_bond, {"method": "bond", "samples": 3, "jeffreys": 0.3, "bond_n": 3, "bond_samples": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_moves_the_weights_as_its_formula_says(name: str, tmp_path: Path) -> None:
    formula, constants = CASES[name]
    training, other = (_training(folder=tmp_path, **constants) for _ in range(2))
    assert training._step(0)
    sampler = cast(MadeUp, training.gatherer.sampler)
    rollout = sampler.drawn["step 0"]
    other.gatherer.sampler = cast(Any, sampler)  # the same answers, and weights as they were
    players = other.players
    assert players.reference.own is not None
    with torch.no_grad():
        values = None if players.value_head is None else _values(other, rollout)
        known = Known(other, rollout, _logps(players.model, rollout), _logps(players.reference.own, rollout), values)
    weights = players.trained()
    for _ in range(constants.get("epochs", 1)):
        slopes = torch.autograd.grad(formula(known), list(weights.values()), allow_unused=True)
        with torch.no_grad():
            for weight, slope in zip(weights.values(), slopes, strict=True):
                weight -= RATE * slope if slope is not None else 0.0
    moved = training.players.trained()
    assert moved.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(moved[key], weight, rtol=1e-9, atol=1e-11, msg=lambda text: f"{key}: {text}")  # noqa: B023
    before = tiny_model().state_dict()
    assert any(not torch.equal(before[key], weight) for key, weight in moved.items() if key in before)


def test_the_anchor_draws_its_own_answers_and_follows_behind_the_policy(tmp_path: Path) -> None:
    training = _training(folder=tmp_path, **CASES["jbond"][1])
    anchor = training.players.anchor
    assert anchor is not None and anchor.own is not None
    before = {name: weight.clone() for name, weight in training.players.anchored().items()}
    training._step(0)
    assert cast(MadeUp, training.gatherer.sampler).drawn_by["step 0 anchor"].model is anchor.own
    policy = dict(training.players.model.named_parameters())
    for name, weight in training.players.anchored().items():
        assert not weight.requires_grad
        torch.testing.assert_close(weight, 0.9 * before[name] + 0.1 * policy[name], rtol=1e-12, atol=1e-14)


def test_with_lora_the_anchor_is_a_second_adapter_that_follows(tmp_path: Path) -> None:
    training = _training(folder=tmp_path, lora=LoraSettings(rank=2), **CASES["jbond"][1])
    players = training.players
    assert players.anchor is not None and players.anchor.own is None  # no copy of the base weights
    names = {name.replace(f".{ANCHOR}.", ".default.") for name in players.anchored()}
    assert names == set(players.trained())

    def both() -> Iterator[tuple[Tensor, Tensor]]:
        known = dict(players.model.named_parameters())
        for name, weight in players.anchored().items():
            yield weight.detach().clone(), known[name.replace(f".{ANCHOR}.", ".default.")].detach().clone()

    assert all(torch.equal(behind, ahead) for behind, ahead in both())
    base = {name: one.clone() for name, one in players.model.named_parameters() if "lora" not in name}
    start = [behind for behind, _ in both()]
    training._step(0)
    assert not any(weight.requires_grad for weight in players.anchored().values())
    for first, (behind, ahead) in zip(start, both(), strict=True):
        torch.testing.assert_close(behind, 0.9 * first + 0.1 * ahead, rtol=1e-12, atol=1e-14)
    assert any(not torch.equal(behind, ahead) for behind, ahead in both())
    assert all(torch.equal(one, base[name]) for name, one in players.model.named_parameters() if name in base)
    middle = [behind for behind, _ in both()]
    with _active(players) as model:
        found = _logps(model, cast(MadeUp, training.gatherer.sampler).drawn["step 0"])
    assert all(torch.equal(behind, first) for first, (behind, _) in zip(middle, both(), strict=True))
    plain = _logps(players.model, cast(MadeUp, training.gatherer.sampler).drawn["step 0"])
    assert any(not torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@contextmanager
def _active(players: Any) -> Iterator[torch.nn.Module]:
    with players.anchor.active() as loaded:
        yield loaded.model


def test_the_published_adapter_has_no_anchor(tiny_policy_dir: Path, tmp_path: Path) -> None:
    train(tmp_path, tiny_policy_dir, config("jbond", steps=1, lora=LoraSettings(rank=2)))
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert names and not any(ANCHOR in name for name in names)
    assert [path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()] == []
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))
