"""GGUF files in other people's hands: transformers' own loader here, binaries where the environment names them."""

import errno
import io
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from runtime.edge.bundle_write import write_bundle
from runtime.edge.gguf import GgufSettings, GgufType, write_gguf, write_powerinfer
from runtime.edge.gguf_gpuidx import write_gpuidx
from runtime.edge.gguf_lint import open_gguf, problems, value_of
from runtime.edge.gguf_read import sparse_model
from runtime.edge.network import FfnLayer, ffn_layers, shape_of
from runtime.edge.predictor import gate_predictor
from runtime.edge.sparse import sparse
from runtime.errors import ConfigError, ModelError
from runtime.models import LoadedModel, quiet
from tests.runtime.edge.bundles import contents
from tests.runtime.edge.models import exact, gated_model, starter_policy, wide_model


@pytest.fixture(scope="module")
def policy() -> LoadedModel:
    return starter_policy()


@pytest.fixture(scope="module")
def wide(policy: LoadedModel) -> LoadedModel:
    return wide_model(policy)


def loaded_by_transformers(folder: Path, file: str) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")


def difference(one: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
    """Largest difference of logits, and share of tokens with the same best one."""
    ids = torch.randint(3, 67, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = one(ids).logits, other(ids).logits
    return float((a - b).abs().max()), float((a.argmax(-1) == b.argmax(-1)).float().mean())


@pytest.mark.parametrize(("type", "most", "same"), [("F32", 2e-3, 1.0), ("F16", 2e-3, 1.0), ("Q8_0", 3.0, 0.9)])
def test_a_folded_relu_model_is_itself_in_transformers(
    policy: LoadedModel, tmp_path: Path, type: GgufType, most: float, same: float
) -> None:
    write_gguf(tmp_path / "m.gguf", policy, GgufSettings(type))
    found = loaded_by_transformers(tmp_path, "m.gguf")
    assert found.config.hidden_act == "silu"
    largest, agreement = difference(policy.model, found)
    assert largest < most
    assert agreement >= same


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_architecture_is_itself_in_transformers(
    policy: LoadedModel, tmp_path: Path, kind: str, is_tied: bool
) -> None:
    changes = {"sliding_window": None} if kind == "mistral" else {}
    parameters = {"rope_theta": 5000.0, "rope_type": "default"}
    sizes = {"vocab_size": 640, "tie_word_embeddings": is_tied, "rope_parameters": parameters}
    model = gated_model(kind, "silu", **sizes, **changes)
    write_gguf(tmp_path / "m.gguf", replace(policy, model=model), GgufSettings("F32"))
    found = loaded_by_transformers(tmp_path, "m.gguf")
    assert found.config.rope_parameters["rope_theta"] == 5000.0  # where transformers 5 has it
    assert difference(model, found) == (pytest.approx(0, abs=1e-4), 1.0)


def test_the_tokenizer_of_a_gguf_file_splits_text_as_before(policy: LoadedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", policy)
    with quiet():
        found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("What is 23 + 9 + 8 - 12 ?", "Start with 23.\nAdd 9 and you have 32.", "one line, please"):
        own = policy.tokenizer.encode(f" {text}", add_special_tokens=False)
        assert found.encode(text, add_special_tokens=False) == own
    assert GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"].contents() == (
        policy.tokenizer.chat_template
    )


@pytest.mark.parametrize("type", ["F16", "Q4_0"])
def test_a_powerinfer_file_has_what_its_loader_wants_and_nothing_else(
    wide: LoadedModel, tmp_path: Path, type: GgufType
) -> None:
    path = tmp_path / "m.powerinfer.gguf"
    write_powerinfer(path, wide, exact(wide.model), GgufSettings(type))
    assert path.read_bytes()[:4] == b"PWRI"
    assert problems(path) == []
    tensors = tensors_of(path)
    assert len(tensors) == 3 + 2 * 11
    assert tensors["blk.1.ffn_down_t.weight"].tensor_type.name == type
    assert tensors["blk.1.fc1.weight"].tensor_type.name == "F16"


def _by_layer(path: Path, wide: LoadedModel) -> Iterator[tuple[Tensor, FfnLayer, Tensor, Tensor, Tensor, Tensor]]:
    """Inputs, the model's own layer, which neurons the file's predictor computes of them, and the file's matrices."""
    tensors = {name: torch.from_numpy(t.data.astype(np.float32)) for name, t in tensors_of(path).items()}
    for index, layer in enumerate(ffn_layers(wide.model)):
        residual = torch.randn(20, 64, generator=torch.Generator().manual_seed(index))
        fc1, fc2, gate, up, down = (
            tensors[f"blk.{index}.{name}.weight"] for name in ("fc1", "fc2", "ffn_gate", "ffn_up", "ffn_down_t")
        )
        yield residual, layer, torch.relu(residual @ fc1.T) @ fc2.T >= 0, gate, up, down


def test_the_sparse_tensors_compute_what_the_model_does(wide: LoadedModel, tmp_path: Path) -> None:
    """fc2 relu(fc1 x) >= 0 chooses rows of gate, up and down_t: their sum is the layer's output."""
    path = tmp_path / "m.powerinfer.gguf"
    write_powerinfer(path, wide, exact(wide.model), GgufSettings("F16"))
    for residual, layer, is_computed, gate, up, down in _by_layer(path, wide):
        with torch.inference_mode():
            normed = layer.norm(residual)
            found = (is_computed * torch.relu(normed @ gate.T) * (normed @ up.T)) @ down
            wanted = layer.mlp(normed)
        assert (found - wanted).norm() / wanted.norm() < 2e-3
        assert 0.2 < is_computed.float().mean() < 0.8


def test_a_model_with_relu_on_gate_and_up_becomes_a_bamboo_file(wide: LoadedModel, tmp_path: Path) -> None:
    """The file's tensors against dReLU (arXiv 2406.05955) in plain torch, on the model's own weights."""
    path, settings = tmp_path / "m.powerinfer.gguf", GgufSettings("F16", is_drelu=True)
    write_powerinfer(path, wide, exact(wide.model), settings)
    reader = open_gguf(path)
    assert value_of(reader, "general.architecture") == "bamboo"
    assert value_of(reader, "bamboo.feed_forward_length") == 1024
    assert problems(path, {"bamboo.rope.freq_base": 10000.0}) == []
    for residual, layer, is_computed, gate, up, down in _by_layer(path, wide):
        with torch.inference_mode():
            normed, mlp = layer.norm(residual), layer.mlp
            wanted = mlp.down_proj(torch.relu(mlp.gate_proj(normed)) * torch.relu(mlp.up_proj(normed)))
            found = (is_computed * torch.relu(normed @ gate.T) * torch.relu(normed @ up.T)) @ down
        assert (found - wanted).norm() / wanted.norm() < 2e-3
    with pytest.raises(ConfigError, match="cannot be folded into silu"):
        write_gguf(tmp_path / "plain.gguf", wide, settings)


def test_more_than_ten_layers_and_a_rope_base_are_where_powerinfer_reads_them(
    wide: LoadedModel, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 640}
    parameters = {"rope_theta": 5000.0, "rope_type": "default"}  # where transformers 5 has it
    deep = replace(wide, model=gated_model(**sizes, initializer_range=0.1, rope_parameters=parameters))
    path = tmp_path / "m.powerinfer.gguf"
    write_powerinfer(path, deep, exact(deep.model))
    assert value_of(open_gguf(path), "llama.rope.freq_base") == 5000.0
    assert value_of(open_gguf(path), "llama.block_count") == 12
    found, predictors = sparse_model(path, deep.model)
    with sparse(found, predictors, [0.0] * 12):
        largest, agreement = difference(deep.model, found)
    assert largest < 0.02 and agreement == 1.0


def test_a_tied_model_gets_an_output_matrix_of_its_own_for_powerinfer(wide: LoadedModel, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 640}
    tied = replace(wide, model=gated_model(**sizes, tie_word_embeddings=True))
    path = tmp_path / "m.gguf"
    write_powerinfer(path, tied, exact(tied.model))
    tensors = tensors_of(path)
    assert np.array_equal(tensors["output.weight"].data, tensors["token_embd.weight"].data)


def tensors_of(path: Path) -> dict[str, object]:
    """Of a file with either magic."""
    plain = path.with_suffix(".plain")
    plain.write_bytes(b"GGUF" + path.read_bytes()[4:])
    return {tensor.name: tensor for tensor in GGUFReader(plain).tensors}


REFUSED = {
    "silu": ({"activation": "silu"}, "F16", "PowerInfer computes relu where this model has silu"),
    "few neurons": ({"intermediate_size": 1000}, "F16", "intermediate_size = 1000: PowerInfer takes layers of 1000"),
    "type": ({}, "Q8_0", 'gguf_type = "Q8_0": PowerInfer reads down as F16 or Q4_0 alone'),
    "width": ({"hidden_size": 36, "head_dim": 8}, "F16", "hidden_size = 36 is no multiple of 8"),
    "width of Q4_0": ({"hidden_size": 96}, "Q4_0", "hidden_size = 96 is no multiple of 64"),
    "architecture": ({"kind": "qwen2"}, "F16", 'architecture "qwen2" is unknown to PowerInfer'),
    "bias": ({"attention_bias": True}, "F16", "attention_bias = true"),
    "rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "F16", 'rope_type = "linear"'
    ),
    "window": ({"kind": "mistral", "sliding_window": 16}, "F16", "sliding_window = 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_powerinfer_would_get_wrong_is_refused(policy: LoadedModel, tmp_path: Path, case: str) -> None:
    changes, type, message = REFUSED[case]
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 640}
    loaded = replace(policy, model=gated_model(**{**sizes, **changes}))
    with pytest.raises((ConfigError, ModelError), match=message):
        write_powerinfer(tmp_path / "m.gguf", loaded, exact(loaded.model), GgufSettings(type))
    assert not list(tmp_path.iterdir())


def test_powerinfer_wants_predictors(wide: LoadedModel, tmp_path: Path) -> None:
    gates = replace(exact(wide.model), predictors=[gate_predictor(shape_of(wide.model))] * 2)
    with pytest.raises(ConfigError, match="PowerInfer needs a predictor per layer"):
        write_powerinfer(tmp_path / "m.gguf", wide, gates)


def test_a_full_disk_is_one_line_and_leaves_nothing(policy: LoadedModel, tmp_path: Path) -> None:
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(ConfigError, match=r'm.gguf" cannot be written: .*; give a writable disk with room'):
            write_gguf(tmp_path / "m.gguf", policy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


TARGETS: dict[str, Callable[[Path, LoadedModel], object]] = {
    "bundle": lambda path, wide: write_bundle(path, contents(wide.model)),
    "gguf": write_gguf,
    "powerinfer": lambda path, wide: write_powerinfer(path, wide, exact(wide.model)),
    "gpuidx": lambda path, wide: write_gpuidx(path, exact(wide.model).placements, 12345),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_read_only_or_full_disk_is_one_line_and_leaves_nothing(
    wide: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, number: int
) -> None:
    """The first of these systems has no file that can be written, the other opens them and takes 100 bytes."""
    disk, real = _Disk(tmp_path, number), io.open
    monkeypatch.setattr(io, "open", lambda *given, **named: disk.opened(real, *given, **named))
    monkeypatch.setattr("builtins.open", io.open)
    with pytest.raises(ConfigError, match=f"cannot be written.*{os.strerror(number)}; give") as refused:
        TARGETS[target](tmp_path / "new", wide)
    assert "\n" not in str(refused.value)
    assert disk.n_failed and not list(tmp_path.iterdir())


class _Disk:
    """Fails where files under a folder are written."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self.n_failed = folder, number, 0

    def opened(self, real: Callable[..., IO[bytes]], path: object, *given: Any, **named: Any) -> IO[bytes]:
        """The file, or what stands for one on a full disk."""
        mode = str(given[0] if given else named.get("mode", "r"))
        if not str(path).startswith(str(self.folder)) or mode in ("r", "rb"):
            return real(path, *given, **named)
        if self.number == errno.EROFS:
            self.fail()
        file = real(path, *given, **named)
        write, room = file.write, [100]

        def take(data: bytes) -> int:
            room[0] -= len(data)
            if room[0] < 0:
                self.fail()
            return write(data)

        return cast(IO[bytes], _Proxy(file, take))

    def fail(self) -> NoReturn:
        """As the system does."""
        self.n_failed += 1
        raise OSError(self.number, os.strerror(self.number))


class _Proxy:
    """A file with another way to write."""

    def __init__(self, file: IO[bytes], write: Callable[[bytes], int]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def test_a_file_that_is_there_is_not_written_over(policy: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(ConfigError, match='m.gguf" exists already'):
        write_gguf(path, policy)
    assert path.read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_one_line(policy: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        write_gguf(tmp_path / "nowhere" / "m.gguf", policy)


def test_weights_above_the_type_are_refused(wide: LoadedModel, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 640}
    model = gated_model(**sizes)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match="attn_output.weight has a weight of 1e[+]06, above F16"):
        write_gguf(tmp_path / "m.gguf", replace(wide, model=model))
