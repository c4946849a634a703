"""Parameters of the export stage. docs/edge.md explains them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.settings_base import PromptFormat, StageConfig

Format = Literal["bundle", "powerinfer", "gguf", "hf"]
# What a format does not read is refused when it is set.
_SPARSE = ("predictor", "rank", "recall", "sparsity", "hot_frequency", "hot_share", "calibration_tokens")
_MEASURED = ("texts", "seed", "max_perplexity_delta", "prompt_format", "threads")
_OF_BUNDLES = ("weight_format", "group")
UNREAD: dict[Format, tuple[str, ...]] = {
    "bundle": ("gguf_type",),
    "powerinfer": ("sparsity", *_OF_BUNDLES),
    "gguf": (*_SPARSE, *_OF_BUNDLES),
    "hf": (*_SPARSE, *_MEASURED, *_OF_BUNDLES, "gguf_type", "candidates"),
}


class ExportConfig(StageConfig):
    """What leaves the lake."""

    model: str = Field("", title="Model", description="models/NAME, folder or hub name; empty: models/NAME, latest")
    format: Format = Field(
        "bundle",
        title="Format",
        description="bundle: runs below the model's size (`winnow chat`); powerinfer: PowerInfer's GGUF with "
        "predictors; gguf: for llama.cpp and its family; hf: a plain Hugging Face folder",
    )
    candidates: str = Field(
        "", title="Candidates", description="REF of answers to calibrate and measure on; empty: candidates/NAME, latest"
    )
    texts: int = Field(400, title="Texts", description="Answers that are read, a quarter of them to measure on", ge=8)
    weight_format: Literal["float32", "float16", "bfloat16", "int8", "int4"] = Field(
        "bfloat16", title="Weight format", description="Of the bundle's neurons"
    )
    group: int = Field(32, title="Group", description="Columns that share a scale (int8, int4)", ge=2)
    gguf_type: Literal["F32", "F16", "Q8_0", "Q4_0"] = Field(
        "F16", title="GGUF type", description="Of the matrices; PowerInfer takes F16 and Q4_0"
    )
    predictor: Literal["auto", "low_rank", "mlp", "gate", "oracle"] = Field(
        "auto",
        title="Predictor",
        description="auto: low_rank where it is good enough, else gate; low_rank: without training; mlp: trained; "
        "gate: none, gates are computed; oracle: exact, as large as the gates",
    )
    rank: int = Field(0, title="Rank", description="Of low_rank and mlp; 0: the smallest good enough", ge=0)
    recall: float = Field(
        0.99, title="Recall", description="Share of a neuron's active tokens that are predicted", gt=0, le=1
    )
    calibration_tokens: int = Field(
        4096, title="Calibration tokens", description="That predictors are fitted to, at most", ge=32
    )
    sparsity: float | None = Field(
        None,
        title="Sparsity",
        description="Of silu models: share of neurons left out; empty: the most that keeps the promise",
        ge=0,
        lt=1,
    )
    hot_frequency: float = Field(
        0.4, title="Hot frequency", description="Neurons active in so many tokens are always computed", gt=0, le=1
    )
    hot_share: float = Field(0.25, title="Hot share", description="Of a layer's neurons, at most", ge=0, le=1)
    max_perplexity_delta: float = Field(
        0.5, title="Promised perplexity", description="Percent that it may rise by; more is not published", ge=0
    )
    prompt_format: PromptFormat = Field(
        "chat", title="Prompt format", description="chat applies the chat template; text encodes the message as it is"
    )
    seed: int = Field(0, title="Seed", description="Of the sampled tokens", ge=0, lt=2**31)
    threads: int = Field(
        1, title="Threads", description="Threads torch may use; our runtime has one, and others that read", ge=1, le=256
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        for name in UNREAD[self.format]:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"export.{name} = {value} does nothing with format = {self.format}; leave it out")
        return self
