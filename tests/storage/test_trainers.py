"""Views read back as the trainers read them: the few lines of each that touch the columns, and TRL itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from storage.lake import Lake
from storage.views import Selection, write_view
from tests.storage.rows import dialogue, prompt, publish

TURNS = "<|system|>Be brief.<end><|user|>2 + 2?<end><|assistant|>4<end><|user|>And p0?<end>"
NEEDS_TRL = "needs TRL: pip install -c infra/constraints.txt 'trl==1.16.0'"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Dataset]:
    """Write a view of two rows and load it as trainers do."""

    def loaded(layout: str, suffix: str = ".parquet") -> Dataset:
        lake = Lake.open(str(tmp_path / "lake"))
        ref = (
            publish(lake, "prompts", [prompt("p0"), prompt("p1")])
            if layout == "prompts"
            else publish(lake, "preferences", [dialogue("p0"), dialogue("p1")])
        )
        path = tmp_path / f"{layout}{suffix}"
        write_view(lake, ref, Selection(layout), path)
        kind = {".parquet": "parquet", ".jsonl": "json"}[suffix]
        return load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    return loaded


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_openrlhf_finds_the_answer_behind_the_rendered_prompt(
    load: Callable[..., Dataset], make_tokenizer: Callable[..., Any], suffix: str
) -> None:
    row, render = load("openrlhf", suffix)[0], make_tokenizer().apply_chat_template
    head = render(row["prompt"], tokenize=False, add_generation_prompt=True)
    assert head == f"{TURNS}<|assistant|>"
    for column, answer in (("chosen", "6"), ("rejected", "7")):
        whole = render(row["prompt"] + row[column], tokenize=False)
        assert (whole[: len(head)], whole[len(head) :]) == (head, f"{answer}<end>")


@pytest.mark.parametrize("layout", ["open_instruct", "ultrafeedback"])
def test_whole_conversations_differ_in_their_last_turn_only(
    load: Callable[..., Dataset], make_tokenizer: Callable[..., Any], layout: str
) -> None:
    row, render = load(layout)[0], make_tokenizer().apply_chat_template
    assert row["chosen"][:-1] == row["rejected"][:-1]
    assert render(row["chosen"], tokenize=False) == f"{TURNS}<|assistant|>6<end>"
    assert render(row["rejected"], tokenize=False) == f"{TURNS}<|assistant|>7<end>"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_nemo_rl_adds_its_task_name_and_takes_the_lower_rank(load: Callable[..., Dataset], suffix: str) -> None:
    data = load("nemo_rl", suffix)
    data = data.add_column("task_name", ["demo"] * len(data))
    row = data[0]
    best, worst = sorted(row["completions"], key=lambda completion: completion["rank"])
    assert row["context"] + best["completion"] == dialogue()["prompt"] + [{"role": "assistant", "content": "6"}]
    assert worst["completion"] == [{"role": "assistant", "content": "7"}]


def test_grpo_hands_the_columns_of_prompts_to_reward_functions(load: Callable[..., Dataset]) -> None:
    rows = list(load("prompts"))
    extra = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
    assert extra == {"prompt_id": ["p0", "p1"], "group": ["child", "child"], "reference": [None, None]}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls transformers by old names
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_trl_trains_on_its_views(
    load: Callable[..., Dataset], tiny_policy_dir: Path, tmp_path: Path, method: str
) -> None:
    trl = pytest.importorskip("trl", reason=NEEDS_TRL)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer_class, config_class = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    }[method]
    config = config_class(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy_dir),
        args=config,
        train_dataset=load("trl" if method == "dpo" else "trl_kto", ".jsonl"),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy_dir),
    )
    assert len(trainer.train_dataset) == (2 if method == "dpo" else 4)
    trainer.train()
    # Policy and reference are still equal: -log sigmoid(0) for DPO, 1 - sigmoid(0) for KTO.
    assert trainer.state.log_history[0]["loss"] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[method], abs=1e-3)
