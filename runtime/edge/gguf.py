"""A model as one GGUF file: for PowerInfer (`PWRI`, with predictors), or folded for llama.cpp and its family.

Refuses what those clients would get wrong without a word; every file is read again and checked by `gguf_lint`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from runtime.edge.gguf_lint import FILE_TYPES, PWRI, check, whole_file, write_out
from runtime.edge.gguf_vocab import Vocabulary, vocabulary
from runtime.edge.gguf_weights import Sparsity, tensors
from runtime.edge.network import shape_of
from runtime.errors import ConfigError, ModelError
from runtime.models import LoadedModel

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GgufType = Literal["F32", "F16", "Q8_0", "Q4_0"]
POWERINFER_TYPES = ("F16", "Q4_0")
NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
BLOCK = 32  # columns that share a scale in Q8_0 and Q4_0


@dataclass(frozen=True, slots=True)
class GgufSettings:
    """type: of all matrices but predictors, which are F16. name: what clients show.

    is_drelu: for PowerInfer alone, the weights are of a model with relu on gate and up (its architecture bamboo), which
    transformers cannot compute: the caller vouches for that, and nothing is measured of it.
    """

    type: GgufType = "F16"
    name: str = "winnow"
    alignment: int = 32
    is_drelu: bool = False


def write_gguf(path: Path, loaded: LoadedModel, settings: GgufSettings = GgufSettings()) -> None:
    """For llama.cpp, transformers and whoever reads GGUF; a ReLU gate is folded into the SiLU that they have."""
    _check_model(loaded.model)
    if settings.is_drelu:
        raise ConfigError("is_drelu: a gate with relu on up as well cannot be folded into silu; use write_powerinfer")
    _write(path, loaded, settings, None)


def write_powerinfer(
    path: Path, loaded: LoadedModel, sparsity: Sparsity, settings: GgufSettings = GgufSettings()
) -> None:
    """For PowerInfer's sparse engine. Its order of neurons is the placement's."""
    check_powerinfer(loaded, settings.type)
    if {predictor.kind for predictor in sparsity.predictors} & {"gate"}:
        raise ConfigError('predictor = "gate": PowerInfer needs a predictor per layer; use low_rank, mlp or oracle')
    _write(path, loaded, settings, sparsity)


def check_powerinfer(loaded: LoadedModel, type: GgufType) -> None:
    """ModelError or ConfigError for what PowerInfer cannot run, or runs wrongly without saying so."""
    model = loaded.model
    _check_model(model)
    vocabulary(loaded.tokenizer, cast(Any, model.config).vocab_size)
    shape, kind = shape_of(model), str(cast(Any, model.config).model_type)
    if NAMES[kind] != "llama":
        raise ModelError(f'architecture "{kind}" is unknown to PowerInfer; use format = gguf or bundle')
    if shape.activation != "relu":
        raise ModelError(
            "PowerInfer computes relu where this model has silu; fine-tune with relufy = true, or use format = gguf"
        )
    if shape.intermediate <= 1000:
        raise ModelError(
            f"intermediate_size = {shape.intermediate}: PowerInfer takes layers of 1000 neurons or less for attention "
            "heads and computes them wrongly; use format = bundle or gguf"
        )
    if type not in POWERINFER_TYPES:
        raise ConfigError(f'gguf_type = "{type}": PowerInfer reads down as F16 or Q4_0 alone; use one of them')
    step = 64 if type == "Q4_0" else 8
    if shape.hidden % step:
        raise ModelError(f"hidden_size = {shape.hidden} is no multiple of {step}, which PowerInfer's {type} needs")


def _check_model(model: PreTrainedModel) -> None:
    config = cast(Any, model.config)
    shape_of(model)
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f'rope_type = "{rope.get("rope_type")}" cannot be exported to GGUF without loss; use format = bundle or hf'
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise ModelError(f"sliding_window = {window}: GGUF clients would attend to all; use format = bundle or hf")
    if config.model_type in ("llama", "mistral") and getattr(config, "attention_bias", False):
        raise ModelError("attention_bias = true: GGUF clients of llama models have none; use format = bundle or hf")


def _write(path: Path, loaded: LoadedModel, settings: GgufSettings, sparsity: Sparsity | None) -> None:
    config = cast(Any, loaded.model.config)
    expected = {
        "general.file_type": FILE_TYPES[settings.type],
        f"{_architecture(config, settings)}.rope.freq_base": float(np.float32(config.rope_parameters["rope_theta"])),
    }
    with whole_file(path) as part:
        _write_part(part, loaded, settings, sparsity)
        if sparsity is not None:
            with part.open("r+b") as file:
                file.write(PWRI)
        check(part, expected)


def _write_part(part: Path, loaded: LoadedModel, settings: GgufSettings, sparsity: Sparsity | None) -> None:
    from gguf import GGUFWriter

    config = cast(Any, loaded.model.config)
    writer = GGUFWriter(str(part), _architecture(config, settings))
    _add_keys(writer, config, settings, is_sparse=sparsity is not None)
    _add_vocabulary(writer, vocabulary(loaded.tokenizer, config.vocab_size), loaded)
    for name, values in tensors(loaded.model, sparsity):
        _add_tensor(writer, name, values, settings.type)
    write_out(writer)


def _architecture(config: Any, settings: GgufSettings) -> str:
    return "bamboo" if settings.is_drelu else NAMES[config.model_type]


def _add_keys(writer: "GGUFWriter", config: Any, settings: GgufSettings, is_sparse: bool) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_custom_alignment(settings.alignment)
    writer.add_name(settings.name)
    writer.add_file_type(FILE_TYPES[settings.type])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    # transformers 5 keeps it in rope_parameters; PowerInfer's own converter looks elsewhere and takes 10000.
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if is_sparse:
        writer.add_float32("powerinfer.sparse_threshold", 0.0)


def _add_vocabulary(writer: "GGUFWriter", found: Vocabulary, loaded: LoadedModel) -> None:
    writer.add_tokenizer_model(found.model)
    writer.add_token_list(found.tokens)
    writer.add_token_scores(found.scores)
    writer.add_token_types(found.types)
    if found.model == "gpt2":
        writer.add_tokenizer_pre(found.pre)
        writer.add_token_merges(found.merges)
    else:
        writer.add_add_space_prefix(found.add_prefix)
    tokenizer = cast(Any, loaded.tokenizer)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(found.add_start)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensor(writer: "GGUFWriter", name: str, values: NDArray[np.float32], type: GgufType) -> None:
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    is_predictor = name.endswith(("fc1.weight", "fc2.weight"))
    wanted: GGMLQuantizationType = Type[type]
    if is_predictor and type != "F32":
        wanted = Type.F16
    if values.ndim == 1:
        wanted = Type.F32
    elif wanted not in (Type.F32, Type.F16) and values.shape[-1] % BLOCK:
        raise ConfigError(f'gguf_type = "{type}": {name} has {values.shape[-1]} columns, no multiple of {BLOCK}; '
                          "use F16")  # fmt: skip
    with np.errstate(over="ignore"):
        packed = values if wanted is Type.F32 else quants.quantize(values, wanted)
    if wanted is Type.F16 and not np.isfinite(packed).all():
        raise ModelError(f"{name} has a weight of {float(np.abs(values).max()):.3g}, above F16; use gguf_type = F32")
    writer.add_tensor(name, packed, raw_dtype=wanted)
