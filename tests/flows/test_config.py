from pathlib import Path

import pytest

from flows.config import load_config, validate
from tasks.errors import ConfigError


def test_environment_beats_the_file_and_set_beats_both(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "a"\n[generate]\nn = 4\nseed = 1\n[ingest]\nsource = "x.jsonl"\n')
    environment = {"WINNOW_GENERATE__N": "5", "WINNOW_GENERATE__SEED": "2", "WINNOW_LAKE": "/x", "HOME": "/"}
    config = load_config(path, ["generate.seed=3", "generate.cut_tokens=[3, 7]"], environment)
    assert (config.name, config.ingest.source) == ("a", "x.jsonl")
    assert (config.generate.n, config.generate.seed, config.generate.cut_tokens) == (5, 3, [3, 7])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.nn=4", 'unknown key "generate.nn"; did you mean "n"'),
        ("nonsense=4", 'unknown key "nonsense"; known keys'),
        ("generate.n=0", "generate.n = 0: Input should be greater than or equal to 1"),
        ("generate.n=many", "generate.n = 'many'"),
        ("generate.n=200", "n = 200 is above max_rows = 128; raise max_rows"),
        ("generate.cut_keep=[0.5]", "cut_tokens has 2 entries, cut_keep 1"),
        ("generate.reward=function", "write package.module:name"),
        ("name=Bad Name", "name = 'Bad Name'"),
        ("generate.n", "write key=value"),
        ("name.x=1", "config: name"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override], {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "gone.toml", [], {})
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "bad.toml", [], {})


@pytest.mark.parametrize("language", ["en", "pt-BR", "en, de", "zh-Hans"])
def test_languages_are_codes(language: str) -> None:
    assert validate({"ingest": {"language": language}}).ingest.language == language
    with pytest.raises(ConfigError, match=r'language = "English": write codes such as en or pt-BR'):
        validate({"ingest": {"language": "English"}})
