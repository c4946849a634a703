"""From settings to a loss."""

from torch import Tensor

from runtime.alignment.losses.against_reference import dpo, dpop, ipo, tdpo1, tdpo2
from runtime.alignment.losses.kto import kto, reference_point
from runtime.alignment.losses.records import Losses, PairLogps
from runtime.alignment.losses.reference_free import orpo, sft, simpo, with_nll
from runtime.alignment.losses.settings import LossSettings, needs


def pair_losses(
    settings: LossSettings,
    policy: PairLogps,
    reference: PairLogps | None,
    mismatched: tuple[Tensor, Tensor] | None = None,
) -> Losses:
    """The settings' loss of each pair. `needs(settings)` says what must be given.

    mismatched: S of answers under other prompts than their own, by policy and reference (kto).
    """
    is_token_mean = settings.preset == "trl"
    if needs(settings).reference == "none":
        found = _alone(settings, policy, is_token_mean)
    else:
        assert reference is not None, f"{settings.method} needs a reference"
        found = _against(settings, policy, reference, mismatched)
    if settings.nll_weight:
        return with_nll(found, policy.chosen, settings.nll_weight, is_token_mean)
    return found


def _alone(settings: LossSettings, policy: PairLogps, is_token_mean: bool) -> Losses:
    if settings.method == "sft":
        return sft(policy.chosen, is_token_mean)
    if settings.method == "orpo":
        assert settings.sft_term is not None
        return orpo(policy, settings.orpo_lambda, settings.sft_term, is_token_mean)
    assert settings.simpo_gamma is not None
    return simpo(policy, settings.scale, settings.simpo_gamma, settings.label_smoothing)


def _against(
    settings: LossSettings, policy: PairLogps, reference: PairLogps, mismatched: tuple[Tensor, Tensor] | None
) -> Losses:
    beta = settings.scale
    match settings.method:
        case "dpo":
            return dpo(policy, reference, beta, settings.label_smoothing)
        case "ipo":
            assert settings.length_norm is not None
            return ipo(policy, reference, beta, settings.length_norm)
        case "dpop":
            return dpop(policy, reference, beta, settings.dpop_lambda)
        case "tdpo1":
            return tdpo1(policy, reference, beta)
        case "tdpo2":
            return tdpo2(policy, reference, beta, settings.tdpo_alpha)
        case _:
            assert mismatched is not None, "needs(settings).mismatched says so"
            weights = settings.desirable_weight, settings.undesirable_weight
            return kto(policy, reference, beta, weights, reference_point(*mismatched))
