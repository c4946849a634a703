"""One answer out of a published bundle, with a part of its neurons in memory: what the demo ends with."""

from dataclasses import dataclass

from storage.lake import DatasetRef, Lake
from tasks.rows import messages_of

SHARE = 0.5
MAX_NEW_TOKENS = 96


@dataclass(frozen=True, slots=True)
class EdgeAnswer:
    """is_same: whether it is the answer that the bundle gives with everything in memory, token by token."""

    question: str
    answer: str
    n_tokens: int
    budget_bytes: int
    whole_bytes: int
    hit_rate: float
    read_bytes: int
    is_same: bool


def edge_answer(lake: Lake, bundle: DatasetRef, prompts: DatasetRef) -> EdgeAnswer:
    """The greedy answer to the first held-out prompt."""
    import torch

    from runtime.edge.budget import RunSettings, budget_of
    from runtime.edge.bundle import open_bundle
    from runtime.edge.engine import EdgeModel
    from runtime.models import encode_prompt, load_tokenizer

    torch.set_num_threads(1)
    opened = open_bundle(lake.folder(bundle, "bundle"))
    assert opened.tokenizer is not None, "exported bundles have their tokenizer"
    tokenizer = load_tokenizer(str(opened.tokenizer))
    messages = messages_of(lake.read_table(prompts, "prompts", "test")["messages"][0].as_py())
    ids = encode_prompt(tokenizer, messages, "chat")
    settings = RunSettings(max_tokens=len(ids) + MAX_NEW_TOKENS)
    with EdgeModel(opened, None, settings) as engine:
        wanted = engine.generate(ids, MAX_NEW_TOKENS)
        budget, whole = budget_of(engine.needs, settings, engine.dtype, SHARE), engine.memory.total
    with EdgeModel(opened, budget, settings) as engine:
        found = engine.generate(ids, MAX_NEW_TOKENS)
        report = engine.report()
    text = str(tokenizer.decode(found, skip_special_tokens=True))
    asked = messages[-1].content
    return EdgeAnswer(
        asked, text, len(found), budget, whole, report.hit_rate, report.read_bytes, is_same=found == wanted
    )
