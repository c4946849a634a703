"""Building and measuring the starter."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from tasks.errors import ConfigError
from tasks.models import use_threads

# What `winnow starter check` holds the starter to.
PROMISES: Mapping[str, tuple[float, float]] = {
    "pass_at_1": (0.30, 0.60),
    "best_of_64": (0.90, 1.0),
    "reward_pair_accuracy": (0.90, 1.0),
    "partial_pearson": (0.40, 1.0),
    "s3d_tokens_per_round": (2.2, 5.0),
}


def build_starter(folder: Path, threads: int) -> dict[str, object]:
    """Train the starter into `folder`; returns its settings."""
    from runtime.starter.build import build
    from runtime.starter.examples import StarterSettings
    from tasks.artifacts import progress

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f'"{folder}" is not empty; give a new folder')
    use_threads(threads)
    settings = StarterSettings()
    totals = {"policy": settings.policy_tokens, "reward": settings.reward_tokens, "s3d": settings.s3d_steps}
    bars = {name: progress(f"starter {name}") for name in totals}
    build(folder, settings, lambda name, tokens, loss: bars[name](tokens, totals[name]))
    return dataclasses.asdict(settings)


def check_starter(folder: Path | None, n_prompts: int, n_samples: int, threads: int) -> dict[str, float]:
    """Figures of the shipped starter, or of one in `folder`."""
    from runtime.starter import FOLDER
    from runtime.starter.check import CheckSettings, check
    from tasks.artifacts import progress

    use_threads(threads)
    settings = CheckSettings(n_prompts=n_prompts, n_samples=n_samples)
    return check(folder or FOLDER, settings, progress("starter check"))
