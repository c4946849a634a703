"""The losses once more, in plain numbers and with gradients derived by hand, written from the papers' formulae.

Arguments of every oracle: S and n of both answers, S of the reference, D (divergence), A and N (sum and count over
prompt and chosen answer). Each gives the loss and its derivatives by name; a name left out has derivative 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Found = tuple[float, dict[str, float]]
Oracle = Callable[["Pair"], Found]


@dataclass(frozen=True)
class Pair:
    """One pair's numbers; w is the chosen answer, l the rejected one."""

    S_w: float
    S_l: float
    ref_w: float
    ref_l: float
    n_w: int
    n_l: int
    D_w: float
    D_l: float
    A_w: float
    N_w: int

    @property
    def h(self) -> float:
        """How much more the policy prefers w than the reference does."""
        return self.S_w - self.ref_w - self.S_l + self.ref_l


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def logistic(z: float, smoothing: float = 0.0) -> tuple[float, float]:
    """Value and derivative."""
    value = (1 - smoothing) * minus_log_sigmoid(z) + smoothing * minus_log_sigmoid(-z)
    return value, -(1 - smoothing) * sigmoid(-z) + smoothing * sigmoid(z)


def sft() -> Oracle:
    return lambda p: (-p.S_w / p.n_w, {"S_w": -1 / p.n_w})


def dpo(beta: float, smoothing: float = 0.0) -> Oracle:
    def oracle(p: Pair) -> Found:
        value, slope = logistic(beta * p.h, smoothing)
        return value, {"S_w": slope * beta, "S_l": -slope * beta}

    return oracle


def ipo(beta: float, is_mean: bool) -> Oracle:
    def oracle(p: Pair) -> Found:
        n_w, n_l = (p.n_w, p.n_l) if is_mean else (1, 1)
        distance = (p.S_w - p.ref_w) / n_w - (p.S_l - p.ref_l) / n_l - 1 / (2 * beta)
        return distance**2, {"S_w": 2 * distance / n_w, "S_l": -2 * distance / n_l}

    return oracle


def dpop(beta: float, weight: float) -> Oracle:
    def oracle(p: Pair) -> Found:
        fall = max(0.0, p.ref_w - p.S_w)
        value, slope = logistic(beta * (p.h - weight * fall))
        return value, {"S_w": slope * beta * (1 + weight * (fall > 0)), "S_l": -slope * beta}

    return oracle


def tdpo1(beta: float) -> Oracle:
    def oracle(p: Pair) -> Found:
        value, slope = logistic(beta * (p.h - (p.D_l - p.D_w)))
        by = slope * beta
        return value, {"S_w": by, "S_l": -by, "D_w": by, "D_l": -by}

    return oracle


def tdpo2(beta: float, alpha: float) -> Oracle:
    def oracle(p: Pair) -> Found:
        value, slope = logistic(beta * (p.h - alpha * (p.D_l - p.D_w)))
        by = slope * beta
        return value, {"S_w": by, "S_l": -by, "D_l": -by * alpha}

    return oracle


def orpo(weight: float, is_sequence: bool) -> Oracle:
    def log_odds(mean: float) -> tuple[float, float]:
        """m - log(1 - e^m); its derivative is 1 / (1 - e^m)."""
        rest = -math.expm1(mean)
        return mean - math.log(rest), 1 / rest

    def oracle(p: Pair) -> Found:
        (odds_w, slope_w), (odds_l, slope_l) = log_odds(p.S_w / p.n_w), log_odds(p.S_l / p.n_l)
        value, slope = logistic(odds_w - odds_l)
        slopes = {"S_w": weight * slope * slope_w / p.n_w, "S_l": -weight * slope * slope_l / p.n_l}
        if is_sequence:
            return weight * value - p.A_w / p.N_w, slopes | {"A_w": -1 / p.N_w}
        return weight * value - p.S_w / p.n_w, slopes | {"S_w": slopes["S_w"] - 1 / p.n_w}

    return oracle


def simpo(beta: float, gamma: float, smoothing: float = 0.0) -> Oracle:
    def oracle(p: Pair) -> Found:
        value, slope = logistic(beta * p.S_w / p.n_w - beta * p.S_l / p.n_l - gamma, smoothing)
        return value, {"S_w": slope * beta / p.n_w, "S_l": -slope * beta / p.n_l}

    return oracle


def kto(beta: float, weights: tuple[float, float], zero: float) -> Oracle:
    def oracle(p: Pair) -> Found:
        good, bad = sigmoid(beta * (p.S_w - p.ref_w - zero)), sigmoid(beta * (zero - p.S_l + p.ref_l))
        value = (weights[0] * (1 - good) + weights[1] * (1 - bad)) / 2
        # sigmoid' = sigmoid (1 - sigmoid); the second argument falls as S_l rises.
        slopes = {
            "S_w": -weights[0] * beta * good * (1 - good) / 2,
            "S_l": weights[1] * beta * bad * (1 - bad) / 2,
        }
        return value, slopes

    return oracle


def plus_nll(oracle: Oracle, weight: float) -> Oracle:
    def with_likelihood(p: Pair) -> Found:
        value, slopes = oracle(p)
        return value - weight * p.S_w / p.n_w, slopes | {"S_w": slopes["S_w"] - weight / p.n_w}

    return with_likelihood
