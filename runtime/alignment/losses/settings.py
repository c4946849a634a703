"""Which loss, with which constants. What is left out is the paper's or, with preset = "trl", TRL 1.16's."""

import math
from dataclasses import dataclass
from typing import Literal

from runtime.errors import ConfigError

Method = Literal["sft", "dpo", "ipo", "dpop", "tdpo1", "tdpo2", "orpo", "simpo", "kto"]
Preset = Literal["paper", "trl"]

# The constants that a method reads; one that it does not read must stay as it is, or a setting would do nothing.
READS: dict[Method, frozenset[str]] = {
    "sft": frozenset(),
    "dpo": frozenset({"beta", "label_smoothing", "nll_weight"}),
    "ipo": frozenset({"beta", "length_norm", "nll_weight"}),
    "dpop": frozenset({"beta", "dpop_lambda", "nll_weight"}),
    "tdpo1": frozenset({"beta", "nll_weight"}),
    "tdpo2": frozenset({"beta", "tdpo_alpha", "nll_weight"}),
    "orpo": frozenset({"orpo_lambda", "sft_term"}),
    "simpo": frozenset({"beta", "simpo_gamma", "label_smoothing", "nll_weight"}),
    "kto": frozenset({"beta", "desirable_weight", "undesirable_weight", "nll_weight"}),
}
PAPER_BETA: dict[Method, float] = {"dpop": 0.3, "simpo": 2.0}
COMMON_BETA = 0.1
SIMPO_GAMMA: dict[Preset, float] = {"paper": 1.0, "trl": 0.5}
UNREAD = {
    "beta": COMMON_BETA,
    "label_smoothing": 0.0,
    "length_norm": None,
    "dpop_lambda": 50.0,
    "tdpo_alpha": 0.5,
    "orpo_lambda": 0.1,
    "sft_term": None,
    "simpo_gamma": None,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "nll_weight": 0.0,
}


@dataclass(frozen=True, slots=True)
class LossSettings:
    """A method and its constants; see docs/alignment.md. ConfigError for those that cannot work.

    beta: 0.1, but 0.3 for dpop and 2 for simpo (preset trl: always 0.1). length_norm: ipo's h as the sum over the
    tokens (paper) or the mean per token (TRL); it must be said, preset trl says mean. sft_term: whether orpo's
    likelihood is of the answer (paper) or of prompt and answer (TRL). simpo_gamma: 1 (TRL: 0.5).
    """

    method: Method = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    length_norm: Literal["sum", "mean"] | None = None
    dpop_lambda: float = 50.0
    tdpo_alpha: float = 0.5
    orpo_lambda: float = 0.1
    sft_term: Literal["answer", "sequence"] | None = None
    simpo_gamma: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    nll_weight: float = 0.0
    preset: Preset = "paper"

    def __post_init__(self) -> None:
        """Refuse what cannot work, then fill in what was left out."""
        self._check_choices()
        self._check_unread()
        for name, value in self._defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_numbers()
        if self.method == "ipo" and self.length_norm is None:
            raise ConfigError('ipo without length_norm; set "sum" (the paper) or "mean" (per token, as TRL)')
        if self.preset == "trl":
            self._check_trl()

    @property
    def scale(self) -> float:
        """beta, filled in."""
        assert self.beta is not None
        return self.beta

    def _defaults(self) -> dict[str, object]:
        is_trl = self.preset == "trl"
        found: dict[str, object] = {"beta": COMMON_BETA if is_trl else PAPER_BETA.get(self.method, COMMON_BETA)}
        if self.method == "simpo":
            found["simpo_gamma"] = SIMPO_GAMMA[self.preset]
        if self.method == "orpo":
            found["sft_term"] = "sequence" if is_trl else "answer"
        if self.method == "ipo" and is_trl:
            found["length_norm"] = "mean"
        return found

    def _check_choices(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "method": tuple(READS),
            "preset": tuple(SIMPO_GAMMA),
            "length_norm": (None, "sum", "mean"),
            "sft_term": (None, "answer", "sequence"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(str(value) for value in allowed if value is not None)
                raise ConfigError(f'{name} = "{getattr(self, name)}"; choose one of {known}')

    def _check_trl(self) -> None:
        if self.method in ("dpop", "tdpo1", "tdpo2"):
            raise ConfigError(f'TRL has no {self.method}, so preset = "trl" means nothing; use "paper"')
        if self.method == "dpo" and self.label_smoothing:
            raise ConfigError(f'TRL\'s dpo ignores label_smoothing = {self.label_smoothing}; use preset = "paper" or 0')

    def _check_unread(self) -> None:
        for name, default in UNREAD.items():
            value = getattr(self, name)
            if name not in READS[self.method] and value is not None and value != default:
                raise ConfigError(f"{name} = {value} does nothing in {self.method}; leave it out")

    def _check_numbers(self) -> None:
        for name in ("beta", "orpo_lambda"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)} must be above 0")
        for name in ("dpop_lambda", "tdpo_alpha", "simpo_gamma", "nll_weight"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)} must be 0 or above")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing = {self.label_smoothing} must be 0 or above, and below 0.5")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)} must be above 0")


@dataclass(frozen=True, slots=True)
class Needs:
    """What a loss asks of the trainer.

    reference: nothing, its summed log-probabilities (which can be stored), or its logits at every step. rejected: the
    rejected answers. whole_sequence: log-probabilities of the prompt too. mismatched: answers under other prompts.
    """

    reference: Literal["none", "logps", "logits"]
    rejected: bool
    whole_sequence: bool
    mismatched: bool


def needs(settings: LossSettings) -> Needs:
    """What `pair_losses` wants to be given for these settings."""
    reference: Literal["none", "logps", "logits"] = "logps"
    if settings.method in ("sft", "orpo", "simpo"):
        reference = "none"
    elif settings.method in ("tdpo1", "tdpo2"):
        reference = "logits"
    return Needs(
        reference=reference,
        rejected=settings.method != "sft",
        whole_sequence=settings.sft_term == "sequence",
        mismatched=settings.method == "kto",
    )
