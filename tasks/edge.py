"""Bundles from the command line: which one is meant, a plan for it, a talk with it; and what this machine can do."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from storage.lake import Lake
from tasks.errors import ConfigError, ModelError
from tasks.models import load_policy_model, model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runtime.edge.bundle import Bundle
    from runtime.edge.engine import Report
    from runtime.edge.hardware import Hardware
    from runtime.edge.planner import Plan
    from runtime.models import LoadedModel

MOST_TOKENS = 2048
FOLDER = "bundle"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMG]i?B?|B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes for everything, or a share of all neurons beside the rest; neither is as much as is needed."""

    n_bytes: int | None = None
    share: float | None = None


def parse_budget(text: str | None) -> Budget:
    """`50%` is a share of the neurons, `700M`, `1.5G` or `700000000` are bytes of everything."""
    if text is None:
        return Budget()
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f'budget "{text}" is neither a share nor bytes; write 50%, 700M or 1.5G')
    number, unit = float(match[1]), (match[2] or "B").upper()
    if unit == "%":
        if not 0 < number <= 100:
            raise ConfigError(f"a budget of {text} must be above 0% and at most 100%")
        return Budget(share=number / 100)
    factor = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit[0]]
    return Budget(n_bytes=int(number * factor))


def bundle_folder(source: str, lake: Lake) -> Path | None:
    """The folder of the bundle behind bundles/NAME[@version] or a folder; None when it is no bundle."""
    if source.startswith("bundles/"):
        return lake.folder(lake.resolve(source), FOLDER)
    for folder in (Path(source), Path(source) / FOLDER):
        if (folder / "manifest.json").is_file() and (folder / "neurons.bin").exists():
            return folder
    return None


def open_bundle(source: str, lake: Lake, verify: bool = True) -> "Bundle":
    """The bundle behind a name; ModelError says how to make one."""
    from runtime.edge import bundle

    folder = bundle_folder(source, lake)
    if folder is None:
        raise ModelError(f'"{source}" is no bundle; make one with `winnow export`, or give bundles/NAME or its folder')
    return bundle.open_bundle(folder, verify)


def plan_bundle(source: str, lake: Lake, hardware: "Hardware", budget: Budget, tokens_per_s: float | None) -> "Plan":
    """The plan for a budget, or for a speed."""
    return plan_of(open_bundle(source, lake, verify=False), hardware, budget, tokens_per_s)


def plan_of(bundle: "Bundle", hardware: "Hardware", budget: Budget, tokens_per_s: float | None = None) -> "Plan":
    """The same for an opened bundle."""
    from runtime.edge.budget import DTYPES, budget_of, needs
    from runtime.edge.bundle import check_resident
    from runtime.edge.planner import plan, plan_for_speed, settings_for
    from runtime.edge.skeleton import build

    resident = bundle.resident()
    check_resident(bundle, resident)
    dtype = DTYPES[bundle.manifest.dtype]
    found = needs(bundle.manifest, resident, build(bundle.manifest, resident, dtype).config)
    max_tokens = context_of(bundle)
    if tokens_per_s is not None:
        return plan_for_speed(found, hardware, tokens_per_s, max_tokens)
    n_bytes = budget.n_bytes
    if budget.share is not None:
        n_bytes = budget_of(found, settings_for(hardware, max_tokens), dtype, budget.share)
    return plan(found, hardware, n_bytes, max_tokens)


def probe_or_load(file: Path | None, folder: Path) -> "Hardware":
    """The hardware that a file describes, or this one, measured."""
    from runtime.edge.hardware import load, probe

    return probe(folder) if file is None else load(file)


def context_of(bundle: "Bundle") -> int:
    """For how many tokens a bundle reserves keys and values."""
    longest = bundle.manifest.config.get("max_position_embeddings")
    return min(longest, MOST_TOKENS) if isinstance(longest, int) and longest > 0 else MOST_TOKENS


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    seed: int


class Talker(Protocol):
    """A bundle or a model that answers."""

    tokenizer: "PreTrainedTokenizerBase"
    plan: "Plan | None"

    def answer(self, ids: list[int], how: Answering, on_token: Callable[[int], object]) -> list[int]:
        """New token ids after `ids`."""
        ...

    def report(self) -> "Report | None":
        """What a bundle read so far."""
        ...


class BundleTalker:
    """A bundle under a budget, run as a plan for a described machine says."""

    def __init__(self, bundle: "Bundle", budget: Budget, hardware: "Hardware | None" = None) -> None:
        from runtime.edge.budget import RunSettings
        from runtime.edge.engine import EdgeModel
        from runtime.models import load_tokenizer

        if bundle.tokenizer is None:
            raise ModelError(f'"{bundle.folder}" has no tokenizer; export it again from a model that has one')
        self.tokenizer = load_tokenizer(str(bundle.tokenizer))
        self.plan = None if hardware is None else plan_of(bundle, hardware, budget)
        if self.plan is not None:
            settings = self.plan.settings(context_of(bundle))
            self.model: EdgeModel = EdgeModel(bundle, self.plan.budget_bytes, settings)
        else:
            settings = RunSettings(max_tokens=context_of(bundle))
            self.model = EdgeModel(bundle, budget.n_bytes, settings, budget.share)

    def answer(self, ids: list[int], how: Answering, on_token: Callable[[int], object]) -> list[int]:
        """See Talker."""
        room = self.model.settings.max_tokens - len(ids)
        if room <= 0:
            raise ConfigError(f"{len(ids)} tokens of prompt fill the bundle's context; ask something shorter")
        return self.model.generate(ids, min(how.max_new_tokens, room), how.temperature, how.seed, on_token)

    def report(self) -> "Report | None":
        """See Talker."""
        return self.model.report()


class ModelTalker:
    """A model that is in memory as a whole, run by transformers."""

    def __init__(self, loaded: "LoadedModel") -> None:
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.plan: Plan | None = None

    def answer(self, ids: list[int], how: Answering, on_token: Callable[[int], object]) -> list[int]:
        """See Talker."""
        import torch

        from runtime.models import stop_ids

        prompt = torch.tensor([ids])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            found = self.loaded.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=how.max_new_tokens,
                do_sample=how.temperature > 0,
                temperature=how.temperature or None,
                eos_token_id=sorted(stop_ids(self.loaded)) or None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new: list[int] = found[0, len(ids) :].tolist()
        for token in new:
            on_token(token)
        return new

    def report(self) -> "Report | None":
        """See Talker."""
        return None


def open_talker(source: str, lake: Lake, budget: Budget, verify: bool, hardware: Path | None = None) -> Talker:
    """A bundle where `source` is one, else a model. hardware: file of a machine that the bundle is planned for."""
    from runtime.edge.hardware import load
    from tasks.models import use_threads

    use_threads(1)
    if source.startswith("bundles/") or bundle_folder(source, lake) is not None:
        described = None if hardware is None else load(hardware)
        return BundleTalker(open_bundle(source, lake, verify), budget, described)
    for name, given in (("budget", budget != Budget()), ("plan for a machine", hardware is not None)):
        if given:
            raise ConfigError(f'a {name} needs a bundle, and "{source}" is none; make one with `winnow export`')
    return ModelTalker(load_policy_model(model_path(source, "policy", lake), "float32", "cpu"))


def reply(talker: Talker, turns: list[tuple[str, str]], how: Answering, on_text: Callable[[str], object]) -> str:
    """The answer to a conversation of (role, text); `on_text` gets it piece by piece."""
    from runtime.models import encode_prompt
    from runtime.records import Message

    tokenizer, messages = talker.tokenizer, [Message(role, text) for role, text in turns]
    ids = encode_prompt(tokenizer, messages, "chat" if tokenizer.chat_template else "text")
    found: list[int] = []
    shown = ""

    def decoded() -> str:
        text = tokenizer.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def show(token: int) -> None:
        nonlocal shown
        found.append(token)
        text = decoded()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
            on_text(text[len(shown) :])
            shown = text

    talker.answer(ids, how, show)
    return decoded()
