"""Parameters of every stage: read from TOML, shown in Prefect's run form and stored with each version.

Every field goes into the fingerprint of its stage: changing one makes a new version.
"""

import re
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tasks.settings_adapt import AdaptConfig as AdaptConfig
from tasks.settings_align import AlignConfig as AlignConfig
from tasks.settings_assemble import AssembleConfig as AssembleConfig
from tasks.settings_base import NAME_PATTERN as NAME_PATTERN
from tasks.settings_base import STARTER as STARTER
from tasks.settings_base import STRICT
from tasks.settings_base import Device as Device
from tasks.settings_base import Dtype as Dtype
from tasks.settings_base import PromptFormat as PromptFormat
from tasks.settings_base import SourceConfig as SourceConfig
from tasks.settings_base import StageConfig as StageConfig
from tasks.settings_compare import MethodsConfig as MethodsConfig
from tasks.settings_drafting import S3D, S3D_ADAPTER, S3DChoice
from tasks.settings_execution import PIPELINE_HERE, PipelineExecutionConfig
from tasks.settings_execution import ExecutionConfig as ExecutionConfig
from tasks.settings_export import ExportConfig as ExportConfig
from tasks.settings_finetune import FinetuneConfig as FinetuneConfig
from tasks.settings_import import ImportConfig as ImportConfig
from tasks.settings_iterate import IterateConfig as IterateConfig
from tasks.settings_reward import RewardConfig as RewardConfig

CutPolicyName = Literal["none", "schedule", "calibrated", "adaptive", "memory"]

LANGUAGE_PATTERN = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
Stage = TypeVar("Stage", bound="StageConfig")
# Inputs that a pipeline connects itself.
CONNECTED = {
    "generate": ("prompts",),
    "score": ("candidates",),
    "assemble": ("candidates",),
    "finetune": ("preferences",),
    "evaluate": ("prompts", "before", "after"),
    "export": ("model", "candidates"),
}


class IngestConfig(SourceConfig):
    """Where prompts come from and which group each belongs to."""

    messages_column: str | None = Field(
        None, title="Messages column", description="Column with lists of {role, content}; the default is messages"
    )
    prompt_column: str | None = Field(
        None, title="Prompt column", description="Column with plain text, each taken as one user message"
    )
    system_prompt: str | None = Field(
        None, title="System prompt", description="Put in front of every conversation that has none"
    )
    reference_column: str | None = Field(
        None, title="Reference column", description="Column with reference answers; reference is taken where present"
    )
    group_column: str | None = Field(
        None, title="Group column", description="Column that says who is asking; group is taken where present"
    )
    group_constant: str | None = Field(None, title="Group", description="One group for all prompts", min_length=1)
    group_rules: list[str] = Field(
        [], title="Group rules", description="regular-expression=group, searched in the prompt's text; first match wins"
    )
    license: str | None = Field(None, title="License", description="Of the source; stored with every row")
    language: str | None = Field(
        None, title="Language", description="Of the source: a code such as en or pt-BR, or several with commas"
    )
    heldout_fraction: float = Field(
        0.2, title="Held-out fraction", description="Share of prompts, by hash, kept for evaluation", ge=0, lt=1
    )
    max_prompts: int | None = Field(None, title="Prompts", description="At most so many training prompts", ge=1)
    max_heldout: int | None = Field(None, title="Held-out prompts", description="At most so many of them", ge=0)

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.messages_column and self.prompt_column:
            raise ValueError("messages_column and prompt_column are both set; keep one")
        chosen = [self.group_column, self.group_constant, self.group_rules or None]
        if sum(choice is not None for choice in chosen) > 1:
            raise ValueError("group_column, group_constant and group_rules exclude each other; keep one")
        for code in (self.language or "en").split(","):
            if not LANGUAGE_PATTERN.fullmatch(code.strip()):
                raise ValueError(f'language = "{self.language}": write codes such as en or pt-BR, with commas between')
        return self


class GenerateConfig(RewardConfig):
    """Best-of-N decoding, with or without speculative rejection."""

    prompts: str = Field("", title="Prompts", description="REF of the prompts; empty: prompts/NAME, latest")
    model: str = Field(STARTER, title="Policy", description="Folder, hub name, models/NAME or starter")
    n: int = Field(16, title="Candidates", description="Candidates per prompt; at most as many as rows", ge=1, le=4096)
    temperature: float = Field(1.0, title="Temperature", description="0 is greedy", ge=0, le=10)
    top_k: int = Field(0, title="Top-k", description="0: off", ge=0)
    top_p: float = Field(1.0, title="Top-p", description="1: off", gt=0, le=1)
    min_p: float = Field(0.0, title="Min-p", description="0: off; relative to the likeliest token", ge=0, lt=1)
    repetition_penalty: float = Field(1.0, title="Repetition penalty", description="1: off", gt=0, le=10)
    stop: list[str] = Field([], title="Stop strings", description="An answer ends before the first of them")
    max_new_tokens: int = Field(128, title="New tokens", description="At most, per candidate", ge=1)
    seed: int = Field(0, title="Seed", description="Of the sampling noise", ge=0, lt=2**31)
    cut_policy: CutPolicyName = Field(
        "schedule",
        title="Cut policy",
        description="none: plain Best-of-N; schedule: the worst partial answers stop at given token counts; "
        "calibrated: the schedule that `winnow calibrate` proposed; adaptive: as many stay as the calibration leaves "
        "in doubt; memory: the worst stop whenever the KV budget is full",
    )
    cut_tokens: list[int] = Field(
        [10, 24], title="Cut tokens", description="Token counts at which partial answers are compared (schedule)"
    )
    cut_keep: list[float] = Field(
        [0.5, 0.5], title="Cut keep", description="Fraction of a prompt's answers kept at each cut (schedule)"
    )
    cut_target: float | None = Field(
        None,
        title="Cut target",
        description="Instead of cut_keep: the share of Best-of-N's tokens to spend, answers being max_new_tokens long",
        gt=0,
        le=1,
    )
    cut_alpha: float = Field(0.5, title="Cut alpha", description="Share that stops when memory is full", ge=0, lt=1)
    calibration: str = Field(
        "", title="Calibration", description="REF (calibrated, adaptive); empty: candidates/NAME-calibration, latest"
    )
    confidence: float = Field(
        0.95, title="Confidence", description="With which those kept hold the winner (adaptive)", gt=0, le=1
    )
    first_wave: int | None = Field(
        None,
        title="First wave",
        description="Candidates drawn before asking whether more are worth it (adaptive)",
        ge=2,
    )
    min_gain: float = Field(
        0.05,
        title="Least gain",
        description="Expected gain of a further wave, in standard deviations of the scores (adaptive)",
        ge=0,
    )
    contrast: int = Field(
        1, title="Contrast", description="Losers of the first cut that still run to completion, for pairs", ge=0
    )
    max_rows: int = Field(
        128, title="Rows", description="Candidates decoded together; at least those of one prompt", ge=1
    )
    kv_budget_mb: int | None = Field(
        None, title="KV budget", description="Megabytes for keys and values, the reward model's included", ge=1
    )
    server: str = Field(
        "",
        title="Server",
        description="URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1, that serves the policy, or "
        "several with commas; empty: decode here. The key is read from OPENAI_API_KEY",
    )
    server_model: str = Field("", title="Model on the server", description="The policy's name there (server)")
    server_concurrency: int = Field(16, title="Requests", description="In flight at once, per server", ge=1, le=4096)
    server_timeout: float = Field(120.0, title="Timeout", description="Seconds per request (server)", gt=0)
    server_extra: list[str] = Field(
        [], title="Further fields", description="Sent with every request: key=JSON, such as top_k=50 (server)"
    )
    s3d: S3DChoice = S3D
    s3d_adapter: str = S3D_ADAPTER
    shard_prompts: int = Field(32, title="Shard size", description="Prompts per shard, the unit of resuming", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.n > self.max_rows:
            raise ValueError(f"n = {self.n} is above max_rows = {self.max_rows}; raise max_rows")
        if bool(self.server) != bool(self.server_model):
            raise ValueError(f'server = "{self.server}" and server_model = "{self.server_model}": set both or none')
        for url in self.server_urls:
            if "@" in url.partition("//")[2].partition("/")[0]:
                raise ValueError("server holds a user or password, which every run would show; set OPENAI_API_KEY")
        for field in self.server_extra:
            if not re.fullmatch(r"\w+=.+", field, re.DOTALL):
                raise ValueError(f'server_extra has "{field}": write key=JSON, such as top_k=50')
        if self.server and self.s3d != "off":
            raise ValueError(f's3d = "{self.s3d}" drafts with the policy\'s own layers; use "off" with a server')
        if self.server and self.cut_policy == "memory":
            raise ValueError('cut_policy = "memory" needs the keys and values here; use "schedule" with a server')
        if self.cut_policy == "memory" and self.kv_budget_mb is None:
            raise ValueError('cut_policy = "memory" needs kv_budget_mb; set it or use "schedule"')
        if self.cut_target is None and len(self.cut_tokens) != len(self.cut_keep):
            raise ValueError(
                f"cut_tokens has {len(self.cut_tokens)} entries, cut_keep {len(self.cut_keep)}; give one each"
            )
        if self.cut_tokens != sorted(set(self.cut_tokens)) or any(n < 1 for n in self.cut_tokens):
            raise ValueError(f"cut_tokens = {self.cut_tokens} must be positive and rise")
        if not all(self.stop):
            raise ValueError("stop has an empty string; remove it")
        if any(not 0 < keep <= 1 for keep in self.cut_keep):
            raise ValueError(f"cut_keep = {self.cut_keep} must be above 0 and at most 1")
        return self

    @property
    def server_urls(self) -> list[str]:
        """Each server once."""
        return list(dict.fromkeys(filter(None, (url.strip() for url in self.server.split(",")))))


class CalibrateConfig(StageConfig):
    """How far partial scores are to be trusted: Best-of-N in full on some prompts, scored along the way."""

    generate: GenerateConfig = Field(
        GenerateConfig(), title="Generate", description="The decoding to calibrate; its cuts are ignored"
    )
    max_prompts: int = Field(32, title="Prompts", description="How many to measure on", ge=1)
    tokens: list[int] = Field(
        [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256],
        title="Token counts",
        description="At which answers are scored",
        min_length=1,
    )
    retained: float = Field(
        0.99,
        title="Gain retained",
        description="Of the best score over the mean one, by the proposed schedule",
        gt=0,
        le=1,
    )

    @model_validator(mode="after")
    def _rise(self) -> Self:
        if self.tokens != sorted(set(self.tokens)) or self.tokens[0] < 1:
            raise ValueError(f"tokens = {self.tokens} must be positive and rise")
        if self.generate.n < 2:
            raise ValueError(f"generate.n = {self.generate.n}: a calibration compares candidates; set at least 2")
        return self


class ScoreConfig(RewardConfig):
    """Final scores of all finished candidates."""

    candidates: str = Field("", title="Candidates", description="REF; empty: candidates/NAME, latest")
    batch_size: int = Field(32, title="Batch size", description="Answers scored together", ge=1)


class EvaluateConfig(RewardConfig):
    """The same held-out prompts, answered before and after."""

    prompts: str = Field("", title="Prompts", description="REF of prompts with held-out ones; empty: prompts/NAME")
    before: str = Field(STARTER, title="Before", description="Folder, hub name, models/NAME or starter")
    after: str = Field("", title="After", description="Likewise; empty: models/NAME, latest")
    samples: int = Field(4, title="Samples", description="Answers per prompt and model; at most as many as rows", ge=1)
    temperature: float = Field(1.0, title="Temperature", description="0 is greedy", ge=0, le=10)
    max_new_tokens: int = Field(128, title="New tokens", description="At most, per answer", ge=1)
    seed: int = Field(1, title="Seed", description="Of the sampling noise", ge=0, lt=2**31)
    truth: str = Field(
        "starter", title="Truth rule", description="starter, none, or package.module:name of (prompt, response) -> 0..1"
    )
    max_rows: int = Field(128, title="Rows", description="Answers decoded together; at least those of one prompt", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.samples > self.max_rows:
            raise ValueError(f"samples = {self.samples} is above max_rows = {self.max_rows}; raise max_rows")
        if self.truth not in ("starter", "none") and ":" not in self.truth:
            raise ValueError(f'truth = "{self.truth}": use starter, none or package.module:name')
        return self


class CompareConfig(MethodsConfig):
    """Methods of fine-tuning, compared on held-out pairs and by the answers to held-out prompts."""

    evaluate: EvaluateConfig = Field(
        EvaluateConfig(),
        title="Evaluate",
        description="Answers of every trained model; truth = none leaves them out, the held-out pairs remain",
    )


class ChainConfig(BaseModel):
    """The stages that a pipeline runs. It sets their names and connects their inputs itself."""

    model_config = STRICT

    name: str = Field("main", title="Name", description="Name of all its datasets", pattern=NAME_PATTERN)
    ingest: IngestConfig = Field(IngestConfig(), title="Ingest", description="Where prompts come from")
    generate: GenerateConfig = Field(GenerateConfig(), title="Generate", description="Best-of-N decoding")
    score: ScoreConfig = Field(ScoreConfig(), title="Score", description="Final scores")
    assemble: AssembleConfig = Field(AssembleConfig(), title="Assemble", description="Preference pairs")
    finetune: FinetuneConfig = Field(FinetuneConfig(), title="Fine-tune", description="Training on the pairs")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), title="Evaluate", description="Before and after")
    export: ExportConfig = Field(ExportConfig(), title="Export", description="What leaves the lake")

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The form of a pipeline leaves out what it sets itself."""
        shown = handler(core_schema)
        for stage, described in handler.resolve_ref_schema(shown)["properties"].items():
            if "$ref" in described and stage != "execution":
                fields = handler.resolve_ref_schema({"$ref": described["$ref"]})["properties"]
                for field in ("name", *CONNECTED.get(stage, ())):
                    fields.pop(field, None)
                    described["default"].pop(field, None)
        return shown

    def stage(self, stage: Stage, **inputs: str) -> Stage:
        """A stage's configuration under the pipeline's name and with its inputs set."""
        return type(stage).model_validate(stage.model_dump() | {"name": self.name} | inputs)


class PipelineConfig(ChainConfig):
    """A configuration file: the stages of a pipeline, those that have a command of their own, and how they run."""

    import_preferences: ImportConfig = Field(
        ImportConfig(), title="Import", description="Run by `winnow import` only: pairs that are there already"
    )
    calibrate: CalibrateConfig = Field(
        CalibrateConfig(), title="Calibrate", description="Run by `winnow calibrate` only; generate is taken from above"
    )
    adapt: AdaptConfig = Field(AdaptConfig(), title="Adapt", description="Run by `winnow adapt` only")
    iterate: IterateConfig = Field(
        IterateConfig(), title="Iterate", description="Read by `winnow iterate` only: rounds of the chain"
    )
    align: AlignConfig = Field(
        AlignConfig(), title="Align", description="Run by `winnow align` only: on-policy training"
    )
    compare: CompareConfig = Field(
        CompareConfig(),
        title="Compare",
        description="Run by `winnow compare` only; finetune and evaluate are taken from above",
    )
    execution: PipelineExecutionConfig = Field(
        PIPELINE_HERE, title="Execution", description="How a run is spread out; changes no result"
    )

    def chain(self) -> ChainConfig:
        """What the pipeline is told."""
        return ChainConfig(**{name: getattr(self, name) for name in ChainConfig.model_fields})
