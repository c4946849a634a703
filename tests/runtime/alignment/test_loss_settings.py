import math
import re
from pathlib import Path

import pytest

from runtime.alignment.losses import LossSettings, Needs, needs
from runtime.alignment.losses.settings import READS
from runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0 must be above 0"),
        ({"beta": -0.1}, "beta = -0.1 must be above 0"),
        ({"beta": math.nan}, "beta = nan must be above 0"),
        ({"beta": math.inf}, "beta = inf must be above 0"),
        ({"method": "ipo"}, 'ipo without length_norm; set "sum" (the paper) or "mean" (per token, as TRL)'),
        ({"method": "ipo", "length_norm": "none"}, 'length_norm = "none"; choose one of sum, mean'),
        ({"method": "ppo"}, 'method = "ppo"; choose one of sft, dpo, ipo, dpop, tdpo1, tdpo2, orpo, simpo, kto'),
        ({"preset": "mine"}, 'preset = "mine"; choose one of paper, trl'),
        ({"method": "orpo", "sft_term": "prompt"}, 'sft_term = "prompt"; choose one of answer, sequence'),
        ({"label_smoothing": 0.5}, "label_smoothing = 0.5 must be 0 or above, and below 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing = -0.1 must be 0 or above, and below 0.5"),
        ({"method": "dpop", "dpop_lambda": -1.0}, "dpop_lambda = -1.0 must be 0 or above"),
        ({"method": "tdpo2", "tdpo_alpha": math.nan}, "tdpo_alpha = nan must be 0 or above"),
        ({"method": "orpo", "orpo_lambda": 0.0}, "orpo_lambda = 0.0 must be above 0"),
        ({"method": "simpo", "simpo_gamma": -1.0}, "simpo_gamma = -1.0 must be 0 or above"),
        ({"method": "kto", "desirable_weight": 0.0}, "desirable_weight = 0.0 must be above 0"),
        ({"nll_weight": -1.0}, "nll_weight = -1.0 must be 0 or above"),
        ({"method": "orpo", "beta": 0.3}, "beta = 0.3 does nothing in orpo; leave it out"),
        ({"method": "orpo", "nll_weight": 1.0}, "nll_weight = 1.0 does nothing in orpo; leave it out"),
        ({"length_norm": "mean"}, "length_norm = mean does nothing in dpo; leave it out"),
        ({"method": "ipo", "length_norm": "sum", "label_smoothing": 0.1}, "label_smoothing = 0.1 does nothing in ipo"),
        ({"preset": "trl", "label_smoothing": 0.1}, "TRL's dpo ignores label_smoothing = 0.1"),
        ({"preset": "trl", "method": "dpop"}, "TRL has no dpop"),
    ],
)
def test_settings_that_cannot_work_are_named_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LossSettings(**settings)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "beta"), [("dpo", 0.1), ("ipo", 0.1), ("dpop", 0.3), ("tdpo2", 0.1), ("simpo", 2.0), ("kto", 0.1)]
)
def test_a_beta_left_out_is_the_papers(method: str, beta: float) -> None:
    length_norm = "sum" if method == "ipo" else None
    assert LossSettings(method, length_norm=length_norm).beta == beta
    assert LossSettings(method, beta=0.7, length_norm=length_norm).beta == 0.7


def test_preset_trl_fills_in_what_trl_does() -> None:
    assert LossSettings("ipo", preset="trl").length_norm == "mean"
    assert LossSettings("orpo", preset="trl").sft_term == "sequence"
    assert LossSettings("orpo").sft_term == "answer"
    simpo = LossSettings("simpo", preset="trl")
    assert (simpo.beta, simpo.simpo_gamma) == (0.1, 0.5)
    assert LossSettings("simpo").simpo_gamma == 1.0


@pytest.mark.parametrize("method", READS)
def test_naming_every_default_is_the_same_as_leaving_it_out(method: str) -> None:
    """A config that spells out all defaults, for whatever method, is accepted."""
    length_norm = "sum" if method == "ipo" else None
    spelled = LossSettings(
        method, LossSettings(method, length_norm=length_norm).beta if method != "dpop" else None, 0.0, length_norm,
        50.0, 0.5, 0.1, None, None, 1.0, 1.0, 0.0, "paper",
    )  # fmt: skip
    assert spelled == LossSettings(method, length_norm=length_norm)


def test_needs_by_method() -> None:
    found = {method: needs(LossSettings(method, length_norm="sum" if method == "ipo" else None)) for method in READS}
    assert {method for method, asked in found.items() if asked.reference == "none"} == {"sft", "orpo", "simpo"}
    assert {method for method, asked in found.items() if asked.reference == "logits"} == {"tdpo1", "tdpo2"}
    assert {method for method, asked in found.items() if not asked.rejected} == {"sft"}
    assert {method for method, asked in found.items() if asked.mismatched} == {"kto"}
    assert not any(asked.whole_sequence for asked in found.values())
    assert needs(LossSettings("orpo", sft_term="sequence")) == Needs("none", True, True, False)


def test_every_section_on_a_method_has_formula_use_defaults_and_warnings() -> None:
    page = (Path(__file__).parents[3] / "docs" / "alignment.md").read_text()
    sections = {part.splitlines()[0]: part for part in page.split("\n## ")[1:]}
    for method in (*READS, "reward", "Groups"):
        (title,) = (title for title in sections if re.match(rf"(\w+, )*{method}\b", title))
        assert re.search(r"^    .+(=|<-).+$", sections[title], re.M), f"{title}: no formula"
        for word in ("**When**", "**Defaults**", "**Watch**"):
            assert word in sections[title], f"{title}: {word}"
    for word in ("lora_adapter", "lora_4bit", "Packing", "truncation", "Resume", "Early stopping", "Divergence"):
        assert word in sections["The trainer"]


def test_the_page_on_methods_has_every_method_with_its_defaults() -> None:
    page = (Path(__file__).parents[3] / "docs" / "alignment.md").read_text()
    titles = {
        name for line in page.splitlines() if line.startswith("## ") for name in re.findall(r"\b[a-z]+\d?\b", line)
    }
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:none|stored|at every step) \| ([-.\d]+) \|", page, re.M))
    assert set(rows) == set(READS) and set(READS) <= titles
    for method, beta in rows.items():
        settings = LossSettings(method, length_norm="sum" if method == "ipo" else None)
        assert beta == (str(settings.beta) if "beta" in READS[method] else "-")
