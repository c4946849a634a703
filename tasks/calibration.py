"""Reading back what `winnow calibrate` stored."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from storage.lake import Lake
from tasks.errors import ConfigError

if TYPE_CHECKING:
    from runtime.decoding.adaptive import Fit

KEY = "calibration"  # in the statistics of the version


class StoredFit(BaseModel):
    """See runtime.decoding.adaptive.Fit."""

    n_tokens: int
    intercept: float
    slope: float
    residual: float


class Calibration(BaseModel):
    """A proposed schedule, and how final scores follow from partial ones."""

    tokens: list[int]
    keep: list[float]
    token_share: float
    gain_retained: float
    fits: list[StoredFit]


Schedule = tuple[tuple[int, ...], tuple[float, ...]]


def read_calibration(ref: str, lake: Lake) -> "tuple[Schedule, tuple[Fit, ...]]":
    """The proposed (token counts, keep fractions) and the fits of a version; ConfigError for one that is none."""
    from runtime.decoding.adaptive import Fit

    try:
        found = Calibration.model_validate(lake.manifest(lake.resolve(ref)).stats.get(KEY))
    except ValidationError as error:
        raise ConfigError(f'calibration "{ref}" holds none; run `winnow calibrate` and name its result') from error
    fits = tuple(Fit(fit.n_tokens, fit.intercept, fit.slope, fit.residual) for fit in found.fits)
    return (tuple(found.tokens), tuple(found.keep)), fits
