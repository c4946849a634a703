"""What the lint of a PowerInfer file finds: in each file one thing is other than it should be."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from runtime.edge.gguf import write_powerinfer
from runtime.edge.gguf_lint import problems
from runtime.models import LoadedModel
from tests.runtime.edge.models import exact, starter_policy, wide_model


@pytest.fixture(scope="module")
def wide() -> LoadedModel:
    return wide_model(starter_policy())


def broken(path: Path, wide: LoadedModel, skip: str = "", **changes: object) -> list[str]:
    """What is found in a PowerInfer file of which one key or tensor is other, or left out."""
    whole = path.with_name("whole.gguf")
    write_powerinfer(whole, wide, exact(wide.model))
    whole.write_bytes(b"GGUF" + whole.read_bytes()[4:])
    reader = GGUFReader(whole)
    architecture = str(changes.pop("architecture", "llama"))
    writer = GGUFWriter(path, architecture)
    for key, field in reader.fields.items():
        name = key.replace("llama.", f"{architecture}.", 1) if key.startswith("llama.") else key
        if key.startswith("GGUF.") or key == "general.architecture" or key == skip:
            continue
        value = changes.pop(key) if key in changes else field.contents()
        kinds = field.types
        writer.add_key_value(name, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name != skip:
            array = changes.pop(tensor.name) if tensor.name in changes else tensor.data
            writer.add_tensor(tensor.name, array)
    for name, array in changes.items():
        writer.add_tensor(name, array)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    path.write_bytes(b"PWRI" + path.read_bytes()[4:])
    return problems(path)


DOWN = np.zeros((1024, 64), dtype=np.float32)
BROKEN = {
    "F32 down_t": ({"blk.0.ffn_down_t.weight": DOWN}, "blk.0.ffn_down_t.weight is F32; PowerInfer computes nan"),
    "another tensor": ({"rope_freqs.weight": DOWN[0]}, "tensor rope_freqs.weight is one too many"),
    "architecture": ({"architecture": "qwen2"}, 'architecture is "qwen2"; PowerInfer knows llama, bamboo'),
    "head": ({"llama.rope.dimension_count": 32}, "attn_q.weight has shape"),
    "rope": ({"skip": "llama.rope.freq_base"}, "llama.rope.freq_base is None"),
    "threshold": ({"skip": "powerinfer.sparse_threshold"}, "powerinfer.sparse_threshold is None"),
    "output": ({"skip": "output.weight"}, "tensor output.weight is missing"),
    "predictor": ({"skip": "blk.1.fc2.weight"}, "tensor blk.1.fc2.weight is missing"),
    "neurons": ({"llama.feed_forward_length": 1000}, "feed_forward_length is 1000; PowerInfer computes"),
    "tokens": ({"tokenizer.ggml.tokens": ["a"] * 640}, "has a token twice"),
    "byte tokens": ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(640)]}, "no byte token <0x0A>"),
    "vocabulary": ({"tokenizer.ggml.tokens": ["<0x0A>"]}, "token_embd.weight has shape (640, 64), not (1, 64)"),
    "scores": ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores is not as long"),
    "norm": ({"blk.0.ffn_norm.weight": DOWN[0, :64].astype(np.float16)}, "blk.0.ffn_norm.weight is F16; vectors"),
    "nan": ({"blk.0.ffn_up.weight": DOWN.astype(np.float16) + np.nan}, "has numbers that are not finite"),
    "integers": ({"blk.0.ffn_up.weight": DOWN.astype(np.int32)}, "blk.0.ffn_up.weight is I32, which PowerInfer"),
    "file type": ({"general.file_type": 2}, "general.file_type is 2, but matrices are F16 (1)"),
    "rank": ({"blk.0.fc2.weight": np.zeros((1024, 8), np.float16)}, "blk.0.fc1.weight and fc2 differ in their rank"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_lint_finds(wide: LoadedModel, tmp_path: Path, case: str) -> None:
    changes, message = BROKEN[case]
    found = broken(tmp_path / "m.gguf", wide, **changes)
    assert any(message in one for one in found), found


def test_keys_that_do_not_follow_from_the_model_are_found(wide: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "m.powerinfer.gguf"
    write_powerinfer(path, wide, exact(wide.model))
    assert problems(path, {"general.file_type": 1, "llama.rope.freq_base": 10000.0}) == []
    found = problems(path, {"general.file_type": 2, "llama.rope.freq_base": 5000.0})
    assert found == [
        "general.file_type is 1, where the model has 2",
        "llama.rope.freq_base is 10000.0, where the model has 5000.0",
    ]


def test_lint_finds_nothing_in_a_file_that_was_copied_unchanged(wide: LoadedModel, tmp_path: Path) -> None:
    assert broken(tmp_path / "m.gguf", wide) == []


def test_lint_finds_a_wrong_magic_and_a_cut_file(wide: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_powerinfer(path, wide, exact(wide.model))
    whole = path.read_bytes()
    path.write_bytes(b"GGML" + whole[4:])
    assert problems(path)[0].startswith("magic is b'GGML'")
    path.write_bytes(b"GGUF" + whole[4:])
    assert "tensor blk.0.ffn_down.weight is missing" in problems(path)  # a plain file has no sparse tensors
    path.write_bytes(whole)
    for size in (3, 20, 5000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        assert problems(path)
