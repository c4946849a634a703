"""Tokenizers on their way into GGUF, and PowerInfer's file of hot neurons."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runtime.edge.gguf_gpuidx import problems, write_gpuidx
from runtime.edge.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, vocabulary
from runtime.edge.records import LayerPlacement
from runtime.errors import ModelError
from runtime.models import load_tokenizer
from runtime.starter import path as starter


def _tokenizer(model: models.Model, use_regex: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _bytes() -> dict[str, int]:
    return {letter: number for number, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}


def test_a_vocabulary_with_bytes_becomes_sentencepiece_with_a_score_by_merge() -> None:
    found = vocabulary(load_tokenizer(str(starter("policy"))), 640)
    assert found.model == "llama"
    assert len(found.tokens) == len(found.scores) == len(found.types) == 640 == len(set(found.tokens))
    assert [found.types[number] for number in (0, 1, 2, 7, 600, 639)] == [
        UNKNOWN, CONTROL, CONTROL, BYTE, NORMAL, UNUSED
    ]  # fmt: skip
    first, second = (found.tokens.index(token) for token in ("▁=", "▁1"))  # the first two merges
    assert found.scores[first] > found.scores[second] > found.scores[found.tokens.index("a")]
    assert not found.add_prefix


def test_a_byte_level_vocabulary_keeps_its_merges_and_names_its_splitting() -> None:
    found = vocabulary(_tokenizer(models.BPE(vocab=_bytes(), merges=[("a", "b")])), 300)
    assert (found.model, found.merges, found.pre) == ("gpt2", ["a b"], "gpt-2")
    assert found.tokens[299] == "[PAD299]"


def test_a_vocabulary_without_byte_tokens_is_refused() -> None:
    letters = {letter: number for number, letter in enumerate("abc")}
    with pytest.raises(ModelError, match="the vocabulary has no byte tokens"):
        vocabulary(_tokenizer(models.BPE(vocab=letters, merges=[])), 10)


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    words = models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    with pytest.raises(ModelError, match="a WordLevel vocabulary cannot be exported to GGUF"):
        vocabulary(_tokenizer(words), 10)


def test_a_way_of_splitting_that_clients_have_no_name_for_is_refused() -> None:
    with pytest.raises(ModelError, match="splits text in a way that GGUF clients have no name for"):
        vocabulary(_tokenizer(models.BPE(vocab=_bytes(), merges=[]), use_regex=False), 300)


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer has token 630, but the model only 600 embeddings"):
        vocabulary(load_tokenizer(str(starter("policy"))), 600)


def test_hot_neurons_of_more_than_ten_layers_stay_with_their_layers(tmp_path: Path) -> None:
    placements = [LayerPlacement(np.arange(64), n_hot) for n_hot in range(0, 24, 2)]
    path = tmp_path / "m.gguf.generated.gpuidx"
    write_gpuidx(path, placements, 12345)
    written = path.read_bytes()
    assert written[:4] == b"PWRI"
    assert written.count((18).to_bytes(4, "little")) >= 24  # the type of every tensor, by PowerInfer's numbers
    plain = tmp_path / "plain"
    plain.write_bytes(b"GGUF" + written[4:])
    types = plain.read_bytes()
    assert types.count(b"gpu_bucket") == 12
    with pytest.raises(ValueError, match="IQ3_XXS"):  # today's list takes 18 for another type
        GGUFReader(plain)
    patched = _with_todays_type(plain)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(patched).tensors}
    for index, placement in enumerate(placements):
        n_hot = max(placement.n_hot, 1)
        assert tensors[f"blk.{index}.gpu_bucket"].tolist() == list(range(n_hot))
        assert tensors[f"blk.{index}.gpu_idx"].tolist() == [1] * n_hot + [0] * (64 - n_hot)


def _gpuidx(path: Path, **changed: bytes) -> list[str]:
    """What is found in a file of two layers with some bytes replaced by others, by name."""
    path.unlink(missing_ok=True)
    write_gpuidx(path, [LayerPlacement(np.arange(64), n_hot) for n_hot in (3, 5)], 12345)
    data = path.read_bytes()
    for old, new in changed.items():
        assert data.count(old.encode()) == 1 or old == "PWRI"
        data = data.replace(old.encode(), new)
    path.write_bytes(data)
    return problems(path, 2, 64)


def test_the_file_of_hot_neurons_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "m.generated.gpuidx"
    assert _gpuidx(path) == []
    assert problems(path, 3, 64) == ["4 tensors, not gpu_idx and gpu_bucket of each of 3 layers in order"]
    assert problems(path, 2, 65)[0] == "blk.0.gpu_idx is not a 0 or 1 for each of 65 neurons"
    assert _gpuidx(path, PWRI=b"GGUF") == ["magic is b'GGUF', not b'PWRI'"]
    assert 'architecture is "generic.gpu_inde_"' in _gpuidx(path, **{"generic.gpu_index": b"generic.gpu_inde_"})[0]
    assert _gpuidx(path, **{"split.vram_capacity": b"split.vram_capacitx"}) == ["split.vram_capacity is None"]
    assert "in order" in _gpuidx(path, **{"blk.1.gpu_idx": b"blk.9.gpu_idx"})[0]
    _gpuidx(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace((18).to_bytes(4, "little"), (26).to_bytes(4, "little")))
    assert "blk.0.gpu_idx has type 26, not 18" in problems(path, 2, 64)[0]
    ids = np.arange(3, dtype=np.int32).tobytes()
    path.write_bytes(whole.replace(ids, ids[::-1], 1))
    assert problems(path, 2, 64) == ["blk.0.gpu_bucket does not list the neurons that blk.0.gpu_idx marks"]
    for size in (3, 20, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        assert problems(path, 2, 64)


def _with_todays_type(path: Path) -> Path:
    """Every type field of a file of vectors set from 18 to 26."""
    data = bytearray(path.read_bytes())
    start = 0
    for name in [f"blk.{index}.gpu_{kind}".encode() for index in range(12) for kind in ("idx", "bucket")]:
        start = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 8  # length, name, dims, size
        assert data[start : start + 4] == (18).to_bytes(4, "little")
        data[start : start + 4] = (26).to_bytes(4, "little")
    patched = path.with_suffix(".today")
    patched.write_bytes(bytes(data))
    return patched
