"""What each round of an iterated chain is told, and what cannot be iterated."""

import pytest

from tasks.errors import ConfigError
from tasks.rounds import check_rounds, round_config
from tasks.settings import PipelineConfig


def _config(**changes: object) -> PipelineConfig:
    return PipelineConfig.model_validate({"name": "x", **changes})


def test_a_round_has_its_own_name_and_noise_and_the_last_rounds_model() -> None:
    config = _config(generate={"seed": 4, "n": 8}, finetune={"seed": 2})
    first, third = round_config(config, 1, "starter"), round_config(config, 3, "models/x-r2@0123456789ab")
    assert (first.name, first.generate.seed, first.finetune.seed) == ("x-r1", 4, 2)
    assert (third.name, third.generate.seed, third.finetune.seed) == ("x-r3", 6, 4)
    assert third.generate.model == third.finetune.model == "models/x-r2@0123456789ab"
    assert third.generate.n == 8


def test_best_of_n_imitates_and_online_preferences_compare() -> None:
    assert round_config(_config(), 1, "starter").finetune.method == "sft"
    online = _config(iterate={"method": "online_preferences"}, finetune={"method": "ipo", "length_norm": "sum"})
    assert round_config(online, 1, "starter").finetune.method == "ipo"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": {"model": "elsewhere"}}, 'generate.model = "elsewhere", but finetune.model = "starter"'),
        ({"generate": {"s3d": "auto"}}, "an adapter fits one policy"),
        ({"generate": {"server": "http://127.0.0.1:1/v1", "server_model": "m"}}, "serves one policy"),
        ({"generate": {"cut_policy": "calibrated"}}, "set generate.calibration"),
        ({"generate": {"prompts": "prompts/y"}}, "connects its stages itself"),
        ({"execution": {"approve_training": True}}, "rounds train without asking"),
    ],
)
def test_what_would_hold_in_the_first_round_only_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rounds(_config(**changes))
