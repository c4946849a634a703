"""Loading, hashing and the border between text and token ids."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from runtime.errors import InputError, ModelError
from runtime.model_files import content_hash
from runtime.models import (
    LoadedModel,
    encode_answer,
    encode_prompt,
    load_classifier,
    load_policy,
    stop_ids,
)
from runtime.records import Message

QUESTION = (Message("user", "2 + 3 = ?"),)


def test_prompt_ids_are_a_prefix_of_answer_ids(tiny_policy: LoadedModel) -> None:
    for style, closing in (("chat", 1), ("text", 1)):
        prompt_ids = encode_prompt(tiny_policy.tokenizer, QUESTION, style)
        answer_ids, n_prompt = encode_answer(tiny_policy.tokenizer, QUESTION, "5", style)
        assert n_prompt == len(prompt_ids)
        assert answer_ids[:n_prompt] == prompt_ids
        assert len(answer_ids) == n_prompt + 1 + closing
        assert answer_ids[-1] == tiny_policy.tokenizer.eos_token_id


def test_chat_prompt_ends_where_the_assistant_speaks(tiny_policy: LoadedModel) -> None:
    ids = encode_prompt(tiny_policy.tokenizer, QUESTION, "chat")
    assert tiny_policy.tokenizer.decode(ids) == "<|user|>2 + 3 = ?<end><|assistant|>"


def test_chat_without_template_names_the_fix(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    with pytest.raises(ModelError, match='set prompt_format = "text"'):
        encode_prompt(make_tokenizer(None), QUESTION, "chat")


def test_text_format_needs_one_message(tiny_policy: LoadedModel) -> None:
    with pytest.raises(InputError, match="prompt of 2 messages"):
        encode_prompt(tiny_policy.tokenizer, QUESTION * 2, "text")


def test_template_error_is_an_input_error(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        encode_prompt(tokenizer, QUESTION, "chat")


def test_stop_ids_join_all_sources(tiny_policy_dir: Path) -> None:
    loaded = load_policy(str(tiny_policy_dir))
    assert stop_ids(loaded) == {1}
    loaded.model.generation_config.eos_token_id = [1, 7]
    loaded.model.config.eos_token_id = 9
    assert stop_ids(loaded) == {1, 7, 9}


def test_a_process_reads_a_model_once_for_its_hash_and_again_when_it_changes(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_policy_dir, tmp_path / "copy"))
    first = content_hash(str(copy))
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", None)  # to read would fail
        assert content_hash(str(copy)) == first
    replaced = tmp_path / "other"
    replaced.write_bytes(changed)
    replaced.rename(weights)  # of the same size
    assert content_hash(str(copy)) != first


def test_content_hash_follows_bytes_and_ignores_the_card(tiny_policy_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_policy_dir, tmp_path / "copy"))
    assert content_hash(str(copy)) == content_hash(str(tiny_policy_dir))
    (copy / "README.md").write_text("card")
    assert content_hash(str(copy)) == content_hash(str(tiny_policy_dir))
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert content_hash(str(copy)) != content_hash(str(tiny_policy_dir))


def test_classifier_with_two_labels_is_refused(tiny_reward_dir: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_reward_dir, num_labels=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="2 labels"):
        load_classifier(str(tmp_path / "two"))


def test_wrong_kind_of_model_is_refused(tiny_reward_dir: Path) -> None:
    with pytest.raises(ModelError, match="lm_head"):
        load_policy(str(tiny_reward_dir))


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c"])
def test_missing_folder_is_named(source: str) -> None:
    with pytest.raises(ModelError, match=source) as caught:
        load_policy(source)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tiny_policy_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_policy_dir, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_policy(str(copy))


def test_dtype_is_applied_and_checked(tiny_policy_dir: Path) -> None:
    assert load_policy(str(tiny_policy_dir), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="int3"):
        load_policy(str(tiny_policy_dir), dtype="int3")


def test_answer_that_merges_with_the_prompt_is_encoded_apart(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    """A merge across the border would change the prompt's last token; sampling never sees that."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"]["ab"] = len(data["model"]["vocab"])
    data["model"]["merges"] = [["a", "b"]]
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    merging.chat_template = tokenizer.chat_template
    prompt = (Message("user", "xa"),)
    prompt_ids = encode_prompt(merging, prompt, "chat")
    answer_ids, n_prompt = encode_answer(merging, prompt, "b", "chat")
    assert answer_ids[:n_prompt] == prompt_ids
    assert merging.decode(answer_ids) == "xab"


def test_template_that_rewrites_the_prompt_is_refused(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer("{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(ModelError, match="generation prompt"):
        encode_answer(tokenizer, QUESTION, "5", "chat")


def test_loading_prints_nothing(tiny_policy_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_policy(str(tiny_policy_dir))
    assert capfd.readouterr() == ("", "")
