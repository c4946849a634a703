"""From the parameters of the fine-tuning stage to what `runtime/` is told, each value in use or refused."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from storage.lake import Lake
from storage.writer import VersionWriter
from tasks.errors import ConfigError
from tasks.logs import log_event
from tasks.models import import_torch, model_path
from tasks.settings import FinetuneConfig
from tasks.settings_base import ReportTo
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.alignment.config import LoraSettings, OfflineConfig, RewardSettings, Watch
    from runtime.alignment.config import ReportTo as Reporter
    from runtime.alignment.groups import GroupSettings
    from runtime.alignment.losses import LossSettings, Method
    from runtime.models import LoadedModel
    from tasks.references import StoredReferences

ADAPTER = "adapter"
ROBUST = {"gr_dpo": "dpo", "gr_ipo": "ipo"}
LOSS_FIELDS = (
    "beta",
    "label_smoothing",
    "length_norm",
    "dpop_lambda",
    "tdpo_alpha",
    "orpo_lambda",
    "sft_term",
    "simpo_gamma",
    "desirable_weight",
    "undesirable_weight",
    "nll_weight",
    "preset",
)
# Fields that both sides name alike.
SAME = (
    "learning_rate",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
    "max_length",
    "truncation",
    "packing",
    "warmup_ratio",
    "seed",
    "dtype",
    "prompt_format",
)
REWARD_FIELDS = ("reward_margin", "reward_prefixes")
ROBUST_FIELDS = ("step_size", "chi", "adjustment")
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_targets", "lora_adapter", "lora_4bit")


def offline_config(config: FinetuneConfig, lake: Lake) -> "OfflineConfig":
    """The runtime's settings; ConfigError for values that cannot work, or that nothing would read."""
    import_torch()
    from runtime.alignment.config import OfflineConfig
    from runtime.alignment.sparsity import SparsitySettings

    shared = config.model_dump(include=set(SAME))
    stores_reference(config, loss := _loss(config))
    sparsity = SparsitySettings(config.relufy, config.sparsity_weight)
    groups, lora, watch = _groups(config), _lora(config, lake), _watch(config)
    return OfflineConfig(loss=loss, groups=groups, lora=lora, watch=watch, sparsity=sparsity, **shared)


def load_trained(config: FinetuneConfig, lake: Lake) -> "LoadedModel":
    """The model that will be trained. Loaded anew, not from the process's cache: training changes the weights."""
    from runtime.hardware import pick_device
    from runtime.models import load_policy, load_policy_4bit, load_reward_start

    if config.lora_4bit and not _has_4bit(config.device):
        raise ConfigError("lora_4bit needs a CUDA device and the package bitsandbytes; train plain LoRA without it")
    path, device = model_path(config.model, model_role(config), lake), pick_device(config.device)
    if config.method == "reward":
        return load_reward_start(path, device, config.seed)
    return load_policy_4bit(path) if config.lora_4bit else load_policy(path, "float32", device)


def model_role(config: FinetuneConfig) -> Literal["policy", "reward"]:
    """Which of the starter's models is meant."""
    return "reward" if config.method == "reward" else "policy"


def reporter_of(choice: ReportTo) -> "Reporter":
    """What `report_to` means here; ConfigError where that package is missing."""
    from runtime.alignment.arguments import need_reporter

    found: Reporter = choice if choice != "auto" else "tensorboard" if find_spec("tensorboard") else "none"
    need_reporter(found)
    return found


def add_events(writer: VersionWriter, logs: Path, report_to: ReportTo) -> None:
    """Publish TensorBoard's event files; the log says so when it is only the package that is missing."""
    if logs.is_dir():
        writer.add_tree(logs, "tensorboard")
    if report_to == "auto" and not find_spec("tensorboard"):
        log_event("no-event-files", why="tensorboard is not installed", fix="pip install winnow[tensorboard]")


def _loss(config: FinetuneConfig) -> "LossSettings | RewardSettings":
    from runtime.alignment.config import RewardSettings
    from runtime.alignment.losses import LossSettings

    if config.method == "reward":
        _refuse(config, LOSS_FIELDS, "method = reward")
        return RewardSettings(config.reward_margin, config.reward_prefixes)
    _refuse(config, REWARD_FIELDS, f"method = {config.method}")
    method = cast("Method", ROBUST.get(config.method, config.method))
    return LossSettings(method=method, **config.model_dump(include=set(LOSS_FIELDS)))


def stores_reference(config: FinetuneConfig, loss: "LossSettings | RewardSettings") -> bool:
    """Whether the reference's log-probabilities are taken from the lake, and put there; ConfigError if they cannot."""
    from runtime.alignment.losses import LossSettings, needs

    needed = needs(loss).reference if isinstance(loss, LossSettings) else "none"
    if config.reference == "stored" and needed != "logps":
        why = "needs the logits of the reference at every step" if needed == "logits" else "has no reference"
        raise ConfigError(f'reference = "stored": {config.method} {why}; use auto')
    return needed == "logps" and config.reference != "anew"


def stored_references(step: Step, config: FinetuneConfig, lake: Lake) -> "StoredReferences":
    """Where they are kept: by the models that the reference is made of, the pairs, and how they are encoded."""
    from tasks.references import ReferenceConfig, StoredReferences

    shared = config.model_dump(include={"prompt_format", "truncation", "max_length", "dtype"})
    settings = ReferenceConfig(is_4bit=config.lora_4bit, **shared)
    return StoredReferences(lake, step.inputs["preferences"], step.models, settings)


def _groups(config: FinetuneConfig) -> "GroupSettings":
    from runtime.alignment.groups import GroupSettings

    reducer = config.reducer
    if config.method in ROBUST:
        if reducer == "importance":
            raise ConfigError(f'reducer = "importance": {config.method} is for the worst group; leave it out, or use '
                              f'method = "{ROBUST[config.method]}"')  # fmt: skip
        reducer = "robust"
    if reducer != "robust":
        _refuse(config, ROBUST_FIELDS, f"reducer = {reducer}")
    return GroupSettings(reducer, config.step_size, config.chi, config.adjustment)


def _lora(config: FinetuneConfig, lake: Lake) -> "LoraSettings | None":
    from runtime.alignment.config import LoraSettings

    if not config.lora:
        _refuse(config, LORA_FIELDS, "lora = false")
        return None
    if not config.lora_adapter:
        return LoraSettings(config.lora_rank, config.lora_alpha, tuple(config.lora_targets))
    _refuse(config, LORA_FIELDS[:3], f"lora_adapter = {config.lora_adapter}, which brings its own")
    return LoraSettings(adapter=adapter_folder(config.lora_adapter, lake))


def adapter_folder(source: str, lake: Lake) -> Path:
    """The adapter behind models/NAME[@version] or a folder."""
    if source.startswith("models/"):
        return lake.folder(lake.resolve(pin(lake, source, "models/x")), f"model/{ADAPTER}")
    return Path(source)


def _watch(config: FinetuneConfig) -> "Watch":
    from runtime.alignment.config import Watch

    report_to = reporter_of(config.report_to)
    return Watch(config.eval_steps, config.early_stopping, config.save_steps, config.divergence, report_to)


def _has_4bit(device: str) -> bool:
    from runtime.hardware import pick_device

    return device != "cpu" and pick_device("auto") == "cuda" and find_spec("bitsandbytes") is not None


def _refuse(config: FinetuneConfig, names: Sequence[str], why: str) -> None:
    """ConfigError when a value that nothing reads was set."""
    for name in names:
        value = getattr(config, name)
        if value != FinetuneConfig.model_fields[name].default:
            raise ConfigError(f"finetune.{name} = {value} does nothing with {why}; leave it out")
