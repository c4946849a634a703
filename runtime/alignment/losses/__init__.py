"""Losses as pure functions of log-probabilities: one per sample, with its metrics. docs/alignment.md explains them."""

from runtime.alignment.losses.against_reference import dpo, dpop, ipo, tdpo1, tdpo2
from runtime.alignment.losses.kto import kto, reference_point
from runtime.alignment.losses.logits import answer_logps
from runtime.alignment.losses.methods import pair_losses
from runtime.alignment.losses.records import AnswerLogps, Losses, PairLogps
from runtime.alignment.losses.reference_free import orpo, sft, simpo, with_nll
from runtime.alignment.losses.settings import LossSettings, Method, Needs, Preset, needs

__all__ = [
    "AnswerLogps",
    "LossSettings",
    "Losses",
    "Method",
    "Needs",
    "PairLogps",
    "Preset",
    "answer_logps",
    "dpo",
    "dpop",
    "ipo",
    "kto",
    "needs",
    "orpo",
    "pair_losses",
    "reference_point",
    "sft",
    "simpo",
    "tdpo1",
    "tdpo2",
    "with_nll",
]
