import json
import random
from pathlib import Path

import pytest
import torch

from runtime.decoding.s3d.adapter import load_adapter
from runtime.models import load_classifier, load_policy
from runtime.starter import path, prompts_path, s3d_path
from runtime.starter.build import build
from runtime.starter.check import CheckSettings, check
from runtime.starter.examples import StarterSettings
from runtime.starter.problems import AUDIENCES, GROUPS, MAX_TOTAL, draw_question, write_answer
from runtime.starter.tokenizer import build_tokenizer

MINIATURE = StarterSettings(
    hidden_size=32,
    intermediate_size=64,
    n_layers=2,
    policy_tokens=12_000,
    reward_tokens=8_000,
    policy_batch_tokens=1024,
    reward_batch_tokens=512,
    s3d_prompts=4,
    s3d_steps=3,
    reward_policy_share=0.02,
)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("starter")
    build(folder, MINIATURE, lambda *_: None)
    return folder


def test_every_word_and_every_number_is_one_token() -> None:
    tokenizer = build_tokenizer(seed=0, max_length=256)
    words = {word.strip(".,?") for texts in AUDIENCES.values() for text in texts for word in text.split()[1:]}
    for piece in [*words, *map(str, range(MAX_TOTAL + 1)), "+", "-", "="]:
        assert len(tokenizer(f" {piece}").input_ids) == 1, piece


def test_answers_and_foreign_text_survive_the_tokenizer() -> None:
    tokenizer = build_tokenizer(seed=0, max_length=256)
    question = draw_question(random.Random(0), held_out=False)
    texts = [write_answer(question.problem, style, question.problem.totals) for style in GROUPS]
    for text in [*texts, question.text, "Zoë paid 3 € — twice.\t\n\n", "漢字 and 🙂"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_miniature_build_trains_and_writes_loadable_models(miniature: Path) -> None:
    policy = load_policy(str(miniature / "policy"))
    reward = load_classifier(str(miniature / "reward"))
    assert policy.model.config.hidden_act == "relu"
    assert reward.model.config.num_labels == 1
    rows = [json.loads(line) for line in (miniature / "prompts.jsonl").read_text().splitlines()]
    assert {row["group"] for row in rows} == set(GROUPS)
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_the_same_seed_builds_the_same_bytes(miniature: Path, tmp_path: Path) -> None:
    build(tmp_path, MINIATURE, lambda *_: None)
    for name in (
        "prompts.jsonl",
        "policy/tokenizer.json",
        "policy/model.safetensors",
        "reward/model.safetensors",
        "s3d/s3d.safetensors",
        "s3d/s3d.json",
    ):
        assert (tmp_path / name).read_bytes() == (miniature / name).read_bytes(), name


def test_the_check_reports_every_promised_figure(miniature: Path) -> None:
    figures = check(miniature, CheckSettings(n_prompts=4, n_samples=2, n_pairs=8))
    for name in (
        "pass_at_1",
        "best_of_2",
        "reward_pair_accuracy",
        "partial_pearson",
        "median_tokens",
        "s3d_tokens_per_round",
    ):
        assert name in figures


def test_the_shipped_starter_is_small_safe_and_of_the_promised_shape() -> None:
    files = [file for file in path("policy").parent.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) <= 20 * 2**20
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".pkl", ".pth"}]
    config = load_policy(str(path("policy"))).model.config
    assert config.hidden_act == "relu"
    assert config.num_hidden_layers >= 8
    assert config.num_key_value_heads < config.num_attention_heads
    adapter = load_adapter(s3d_path(), load_policy(str(path("policy"))))
    assert (adapter.config.n_first, adapter.config.n_last, adapter.config.k) == (1, 1, 4)
    assert (s3d_path() / "s3d.safetensors").stat().st_size <= 2 * 2**20
    shares = [json.loads(line)["group"] for line in prompts_path().read_text().splitlines()]
    assert shares.count("child") > 3 * shares.count("auditor") > 0
