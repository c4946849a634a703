"""What goes into a loss and what comes out of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AnswerLogps:
    """Log-probabilities of answers, one per row (rows,).

    logps: S, the sum over the answer's tokens: prompt and padding masked, the end token included. n_tokens: how many.
    kl: D, the sum over the answer's places of KL(reference || policy) on the full vocabulary (TDPO alone). all_logps
    and n_all: sum and count over prompt and answer, the first token excepted, which nothing predicts (ORPO alone).
    """

    logps: Tensor
    n_tokens: Tensor
    kl: Tensor | None = None
    all_logps: Tensor | None = None
    n_all: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """m = S / n."""
        return self.logps / self.n_tokens


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Chosen answers and, row by row, the rejected ones; None where a method looks at chosen answers alone."""

    chosen: AnswerLogps
    rejected: AnswerLogps | None


@dataclass(frozen=True, slots=True)
class Losses:
    """One loss per sample (pairs,), and detached metrics per sample."""

    per_sample: Tensor
    metrics: dict[str, Tensor]


def both(pairs: PairLogps) -> tuple[AnswerLogps, AnswerLogps]:
    """Chosen and rejected, where a method needs both."""
    assert pairs.rejected is not None, "this loss compares two answers"
    return pairs.chosen, pairs.rejected


def rewards(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The metrics that every pairwise method logs. An accuracy is strict: two equal rewards, as at first, are 0."""
    margins = (chosen - rejected).detach()
    return {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
    }
