"""The part of a model that is always in memory: attention, embeddings, norms and head, without feed-forward layers."""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from runtime.edge.architectures import ARCHITECTURES
from runtime.edge.architectures import check_architecture as check_feed_forward
from runtime.edge.manifest import Manifest
from runtime.edge.network import shape_of
from runtime.edge.quantise import FLOATS
from runtime.errors import BundleError, ModelError
from runtime.kv.attention import check_supported

MOST_NUMBER = 1 << 24
CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def config_of(model: PreTrainedModel) -> dict[str, object]:
    """What a bundle keeps of the model's configuration; ModelError when it cannot run as a bundle."""
    shape = shape_of(model)
    check_architecture(model.config)
    found = model.config.to_dict() | {"hidden_act": shape.activation}
    kept = {key: found[key] for key in CONFIG_KEYS if found.get(key) is not None}
    ends = getattr(model.generation_config, "eos_token_id", None)
    return kept | ({} if ends is None else {"eos_token_id": ends})


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise ModelError for a model whose layers the engine would compute wrongly."""
    check_feed_forward(config.model_type, config.hidden_act)
    kinds = getattr(config, "layer_types", None) or []
    is_windowed = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if is_windowed:
        raise ModelError("sliding window attention cannot run as a bundle; use a model with full attention")
    check_supported(config)


def build(manifest: Manifest, resident: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model of a bundle with its resident weights and no feed-forward layers."""
    config, model = _empty(manifest)
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    weights = {name: tensor.to(dtype) for name, tensor in resident.items() if not name.startswith("edge.")}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for name, shape in wanted.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            raise BundleError(f"the bundle's weight {name} is missing or not {list(shape)}; export it again")
    if extra := set(weights) - set(wanted):
        raise BundleError(f"the bundle has a weight {min(extra)!r} that its model has not; export it again")
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model


def _empty(manifest: Manifest) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The model without weights."""
    try:
        config = _config(manifest)
        with torch.device("meta"):
            model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
        # Its tables are no weights: they were made on the meta device like everything else.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    except ModelError:
        raise
    except Exception as error:  # whatever a configuration from anywhere makes transformers do
        reason = " ".join(f"{type(error).__name__} {error}".split())[:100]
        raise BundleError(f"the bundle's model configuration is refused: {reason}") from error
    return config, model


def _config(manifest: Manifest) -> PreTrainedConfig:
    found = dict(copy.deepcopy(dict(manifest.config)))
    if unknown := set(found) - set(CONFIG_KEYS):
        raise BundleError(f"the bundle's model configuration has {min(unknown)!r}, which is not known")
    kind = found.pop("model_type", None)
    if kind not in ARCHITECTURES:
        raise BundleError(f"the bundle's model type {str(kind)[:40]!r} is none of {', '.join(ARCHITECTURES)}")
    sizes = (found.get("num_hidden_layers"), found.get("hidden_size"), found.get("intermediate_size"))
    shape = manifest.shape
    if sizes != (shape.n_layers, shape.hidden, shape.intermediate) or found.get("hidden_act") != shape.activation:
        raise BundleError("the bundle's shape and its model configuration differ; export it again")
    for key, value in found.items():
        if isinstance(value, int) and abs(value) > MOST_NUMBER:  # tables are made from some before weights are compared
            raise BundleError(f"the bundle's model configuration has {key} = {value}, above {MOST_NUMBER}")
    if kind == "mistral":
        found["sliding_window"] = None  # others than this were refused when it was written
    config: PreTrainedConfig = AutoConfig.for_model(str(kind), **found)
    check_architecture(config)
    config.dtype = FLOATS[manifest.dtype]
    config._attn_implementation = "sdpa"
    return config
