"""Parameters of the fine-tuning stage. docs/alignment.md explains the methods and their constants."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.settings_base import REPORT_TO, STARTER, Device, Dtype, PromptFormat, ReportTo, StageConfig

Method = Literal[
    "dpo", "gr_dpo", "ipo", "gr_ipo", "dpop", "tdpo1", "tdpo2", "orpo", "simpo", "kto", "sft", "reward"
]  # fmt: skip


class FinetuneConfig(StageConfig):
    """How the policy, or a reward model, is trained on the pairs."""

    preferences: str = Field("", title="Preferences", description="REF; empty: preferences/NAME, latest")
    model: str = Field(
        STARTER,
        title="Model",
        description="Folder, hub name, models/NAME or starter; for a reward model a classifier, or a policy that gets "
        "a new head",
    )
    method: Method = Field(
        "dpo",
        title="Method",
        description="gr_dpo, gr_ipo: dpo, ipo for the worst group (reducer = robust); sft: on the chosen answers "
        "alone; reward: a reward model (Bradley-Terry)",
    )
    preset: Literal["paper", "trl"] = Field(
        "paper", title="Preset", description="Whose conventions and defaults: the papers', or TRL's"
    )
    beta: float | None = Field(
        None,
        title="Beta",
        description="Strength of the pull to the reference; default 0.1, but 0.3 for dpop and 2 for simpo",
        gt=0,
    )
    label_smoothing: float = Field(
        0.0, title="Label smoothing", description="Assumed share of flipped pairs (dpo, simpo)", ge=0, lt=0.5
    )
    reference: Literal["auto", "stored", "anew"] = Field(
        "auto",
        title="Reference",
        description="stored: its log-probabilities are computed once per model and pairs and kept in the lake; anew: "
        "by every training; auto: stored where the method asks for no more than that",
    )
    length_norm: Literal["sum", "mean"] | None = Field(
        None,
        title="Length norm",
        description="Must be said for ipo: log-probabilities of an answer as a sum (the paper) or per token (TRL)",
    )
    dpop_lambda: float = Field(50.0, title="DPOP lambda", description="Penalty of a less likely chosen answer", ge=0)
    tdpo_alpha: float = Field(0.5, title="TDPO alpha", description="Weight of the divergences (tdpo2)", ge=0)
    orpo_lambda: float = Field(0.1, title="ORPO lambda", description="Weight of the odds ratio", gt=0)
    sft_term: Literal["answer", "sequence"] | None = Field(
        None, title="SFT term", description="Of orpo: likelihood of the answer (default) or of prompt and answer (TRL)"
    )
    simpo_gamma: float | None = Field(None, title="SimPO gamma", description="Target margin; default 1", ge=0)
    desirable_weight: float = Field(1.0, title="Desirable weight", description="Of chosen answers (kto)", gt=0)
    undesirable_weight: float = Field(1.0, title="Undesirable weight", description="Of rejected answers (kto)", gt=0)
    nll_weight: float = Field(
        0.0,
        title="NLL weight",
        description="Of the chosen answers' likelihood beside the loss (all methods but sft, orpo and reward)",
        ge=0,
    )
    reward_margin: float = Field(
        0.0, title="Reward margin", description="Share of a pair's score margin that rewards must differ by", ge=0
    )
    reward_prefixes: int = Field(
        1,
        title="Reward prefixes",
        description="Copies of each pair, cut at random tokens, so that partial answers can be scored (reward)",
        ge=0,
    )
    reducer: Literal["mean", "importance", "robust"] = Field(
        "mean",
        title="Groups",
        description="mean: every pair alike; importance: every group alike; robust: the worst group first",
    )
    step_size: float = Field(
        0.01, title="Step size", description="Eta of the group weights, by the scale of the loss (robust)", ge=0
    )
    chi: float = Field(1.0, title="Chi", description="0: every group alike, 1: fully robust", ge=0, le=1)
    adjustment: float = Field(
        0.0, title="Adjustment", description="C of C / sqrt(pairs), by which small groups weigh more (robust)", ge=0
    )
    learning_rate: float = Field(
        2e-4,
        title="Learning rate",
        description="Peak; linear warm-up, cosine decay. For small models and LoRA; full weights of billions: 1e-6",
        gt=0,
    )
    epochs: int = Field(3, title="Epochs", description="Passes over the pairs", ge=1)
    batch_size: int = Field(16, title="Batch size", description="Pairs per step, of all processes", ge=1)
    processes: int = Field(
        1,
        title="Processes",
        description="That train together on this machine (torchrun), each on its part of every batch; one GPU each",
        ge=1,
        le=64,
    )
    gradient_accumulation: int = Field(1, title="Accumulation", description="Batches per optimizer step", ge=1)
    gradient_checkpointing: bool = Field(
        False, title="Gradient checkpointing", description="Less memory, for about a third more time"
    )
    max_length: int = Field(256, title="Length", description="Tokens of prompt and answer together", ge=2)
    truncation: Literal["drop", "keep_end", "keep_start"] = Field(
        "drop",
        title="Truncation",
        description="Of longer pairs: drop them, cut the prompt's start (keep_end) or the answers' ends (keep_start)",
    )
    packing: bool = Field(False, title="Packing", description="Short samples of a batch share rows (sft)")
    warmup_ratio: float = Field(0.1, title="Warm-up", description="Share of the steps", ge=0, le=1)
    lora: bool = Field(False, title="LoRA", description="Train low-rank adapters and merge them at the end")
    lora_rank: int = Field(16, title="LoRA rank", description="Width of the adapters", ge=1)
    lora_alpha: int = Field(32, title="LoRA alpha", description="Adapters are scaled by alpha / rank", ge=1)
    lora_targets: list[str] = Field(
        [], title="LoRA targets", description="Names of layers, such as q_proj; empty: all linear layers"
    )
    lora_adapter: str = Field(
        "",
        title="LoRA adapter",
        description="An adapter of the same model to go on with: its folder, or models/NAME that has one",
    )
    lora_4bit: bool = Field(
        False, title="4 bit", description="Load the model in 4 bit (QLoRA); needs a GPU and bitsandbytes"
    )
    relufy: bool = Field(
        False, title="ReLU", description="Exchange silu for relu first, so that neurons can be left out (sft)"
    )
    sparsity_weight: float = Field(
        0.0, title="Sparsity", description="Weight of neurons' mean output, which makes fewer of them active", ge=0
    )
    eval_steps: int = Field(
        0, title="Evaluation", description="Steps between looks at the held-out pairs; 0: at the end only", ge=0
    )
    early_stopping: int = Field(
        0,
        title="Early stopping",
        description="Evaluations without a better worst group that end the training; the best weights stay; 0: off",
        ge=0,
    )
    save_steps: int = Field(
        100, title="Checkpoints", description="Steps between them; a killed run goes on from the last; 0: none", ge=0
    )
    divergence: float = Field(
        20.0, title="Divergence", description="Stop at a loss so many times the first one; 0: only at no number", ge=0
    )
    report_to: ReportTo = REPORT_TO
    prompt_format: PromptFormat = Field(
        "chat", title="Prompt format", description="chat: the tokenizer's chat template; text: one message, as it is"
    )
    dtype: Dtype = Field("float32", title="Number format", description="bfloat16 trains with autocast")
    device: Device = Field("cpu", title="Device", description="auto takes a GPU where there is one")
    threads: int = Field(2, title="Threads", description="Threads torch may use on the CPU", ge=1, le=256)
    seed: int = Field(0, title="Seed", description="Of the order of the pairs", ge=0, lt=2**31)

    @model_validator(mode="after")
    def _is_shared_evenly(self) -> Self:
        if self.batch_size % self.processes:
            raise ValueError(
                f"processes = {self.processes} cannot share batch_size = {self.batch_size} evenly; "
                f"make it a multiple of {self.processes}"
            )
        return self
