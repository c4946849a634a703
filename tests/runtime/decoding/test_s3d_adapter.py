"""The draft pass against a plain forward without arena or cache, and adapters that are not what they say."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from runtime.decoding.s3d.adapter import Drafter, S3DAdapter, S3DConfig, load_adapter
from runtime.decoding.s3d.files import CONFIG_NAME, WEIGHTS_NAME
from runtime.errors import ModelError
from runtime.kv.arena import Arena, ArenaSize, KVShape
from runtime.kv.attention import install, run
from runtime.kv.passes import PrefillPass, RowsPass
from runtime.models import LoadedModel

SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHARED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHARED, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHARED, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHARED)),
}
KINDS_OF_MODEL = tuple(BUILDERS)
PROMPTS, ANSWERS = (7, 3), (4, 1, 6)  # tokens; rows 0 and 1 answer the first prompt, row 2 the second


def _policy(kind: str, tokenizer: object = None) -> LoadedModel:
    torch.manual_seed(3)
    return LoadedModel(BUILDERS[kind]().double().eval(), tokenizer, "test", "ab" * 32)  # type: ignore[arg-type]


def _adapter(policy: LoadedModel, n_first: int = 2, n_last: int = 1, k: int = 4, sampler_width: int = 0) -> S3DAdapter:
    """One with random weights."""
    torch.manual_seed(4)
    config = S3DConfig(n_first, n_last, k, 3, 6.0, "lora", policy.content_hash, sampler_width=sampler_width)
    adapter = S3DAdapter(policy, config).to(policy.model.dtype)
    with torch.no_grad():
        for weights in adapter.parameters():
            weights.normal_(std=0.3)
    return adapter


class _PlainLinear(nn.Module):
    """A linear layer whose merged weights act on the last k tokens."""

    def __init__(self, base: nn.Linear, merged: Tensor, k: int) -> None:
        super().__init__()
        self.base, self.merged, self.k = base, merged, k

    def forward(self, inputs: Tensor) -> Tensor:
        split = inputs.shape[1] - self.k
        adapted = linear(inputs[:, split:], self.merged, self.base.bias)
        return torch.cat((self.base(inputs[:, :split]), adapted), dim=1)


@torch.no_grad()
def plain_draft(policy: LoadedModel, adapter: S3DAdapter, text: Tensor, k: int) -> Tensor:
    """Hidden states (1 + k, width) behind `text` (tokens,): whole sequences, no cache, no arena."""
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("sdpa")  # eager computes weights in float32
    body = model.base_model
    stored = body(text[None, :-1], output_hidden_states=True, use_cache=False).hidden_states
    found = torch.cat((body.embed_tokens(text[None, -1:]), adapter.mask_embeddings[None, :k]), dim=1)
    positions = torch.arange(len(text) + k)[None]
    rotation = body.rotary_emb(found, position_ids=positions)
    config = adapter.config
    for index in [*range(config.n_first), *range(len(body.layers) - config.n_last, len(body.layers))]:
        layer = body.layers[index]
        _merge(layer, adapter, index, k)
        window = getattr(layer.self_attn, "sliding_window", None) or getattr(model.config, "sliding_window", None)
        if model.config.model_type == "qwen2" and layer.self_attn.sliding_window is None:
            window = None
        found = layer(
            torch.cat((stored[index], found), dim=1),
            attention_mask=_causal(len(text) + k, window),
            position_embeddings=rotation,
            position_ids=positions,
            use_cache=False,
        )[:, len(text) - 1 :]
    return body.norm(found)[0]  # type: ignore[no-any-return]


def _merge(layer: nn.Module, adapter: S3DAdapter, index: int, k: int) -> None:
    for part in (layer.self_attn, layer.mlp):
        for name, base in list(part.named_children()):
            if isinstance(base, nn.Linear):
                term = adapter.layers[str(index)][name]
                scale = adapter.config.alpha / adapter.config.rank
                setattr(part, name, _PlainLinear(base, base.weight + scale * term.up @ term.down, k))


def _causal(n_tokens: int, window: int | None) -> Tensor:
    distance = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)
    hidden = (distance < 0) | (distance >= (window or n_tokens))
    return torch.zeros(n_tokens, n_tokens, dtype=torch.float64).masked_fill_(hidden, -torch.inf)[None, None]


def _filled_arena(policy: LoadedModel) -> tuple[Arena, list[Tensor]]:
    """An arena that holds the prompts and all answers' tokens but the last, and the text of every row."""
    install(policy.model)
    model, generator = policy.model, torch.Generator().manual_seed(5)
    prompts = [torch.randint(2, 64, (n,), generator=generator) for n in PROMPTS]
    answers = [torch.randint(2, 64, (n,), generator=generator) for n in ANSWERS]
    arena = Arena(KVShape.of(model), ArenaSize(2, 8, 4, 32), torch.float64, torch.device("cpu"))
    arena.add(len(prompts[0]), 2)
    arena.add(len(prompts[1]), 1)
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    run(model, ids, torch.arange(ids.shape[1]).expand_as(ids), PrefillPass(arena, slice(0, 2)))
    known = [answer[:-1] for answer in answers]
    counts = torch.tensor([len(one) for one in known])
    for place in range(int(counts.max())):  # token by token, as decoding does
        tokens = torch.stack([one[min(place, len(one) - 1)] if len(one) else one.new_tensor(2) for one in known])
        step = RowsPass(arena, 1, place + 1)
        run(model, tokens[:, None], step.positions, step)
        arena.row_tokens[:3] += (place < counts).long()
    return arena, [torch.cat((prompts[owner], answer)) for owner, answer in zip(arena.owners, answers, strict=True)]


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
@pytest.mark.parametrize(("n_first", "n_last"), [(2, 1), (1, 2), (0, 1), (3, 2)])
@torch.inference_mode()
def test_drafts_through_the_arena_are_those_of_a_plain_forward(kind: str, n_first: int, n_last: int) -> None:
    policy = _policy(kind)
    adapter = _adapter(policy, n_first, n_last)
    arena, texts = _filled_arena(policy)
    drafter = Drafter(policy, adapter)
    for k in (4, 1):
        step = RowsPass(arena, 1 + k, max(ANSWERS) + k)
        last = torch.stack([text[-1] for text in texts])
        found = drafter.hidden(last, k, step.positions, step)
        for row, text in enumerate(texts):
            torch.testing.assert_close(found[row], plain_draft(policy, adapter, text, k), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
@torch.inference_mode()
def test_the_policy_computes_the_same_bits_with_an_adapter_attached(kind: str) -> None:
    policy = _policy(kind)
    install(policy.model)
    ids = torch.randint(2, 64, (2, 9))
    before, names = policy.model(ids).logits, [name for name, _ in policy.model.named_modules()]
    drafter = Drafter(policy, _adapter(policy))
    arena, texts = _filled_arena(policy)
    step = RowsPass(arena, 3, max(ANSWERS) + 2)
    hidden = drafter.hidden(torch.stack([text[-1] for text in texts]), 2, step.positions, step)
    assert drafter.logits(hidden).shape == (3, 2, 64)
    assert torch.equal(policy.model(ids).logits, before)
    assert [name for name, _ in policy.model.named_modules()] == names
    assert policy.model.config.num_hidden_layers == 5


@torch.inference_mode()
def test_the_real_token_runs_unadapted() -> None:
    policy = _policy("llama")
    trained, plain = _adapter(policy), S3DAdapter.skip_only(policy, 2, 1, 4)
    states = []
    for adapter in (trained, plain):
        arena, texts = _filled_arena(policy)
        step = RowsPass(arena, 3, max(ANSWERS) + 2)
        last = torch.stack([text[-1] for text in texts])
        states.append(Drafter(policy, adapter).hidden(last, 2, step.positions, step))
    assert torch.equal(states[0][:, 0], states[1][:, 0])
    assert not torch.isclose(states[0][:, 1:], states[1][:, 1:]).all(dim=-1).any()


@torch.inference_mode()
def test_a_sampler_head_hears_of_the_draft_before() -> None:
    policy = _policy("llama")
    adapter = _adapter(policy, sampler_width=5)
    drafter, head = Drafter(policy, adapter), adapter.sampler
    assert head is not None
    hidden, tokens = torch.randn(3, 5, 32, dtype=torch.float64), torch.randint(2, 64, (3, 4))
    whole = drafter.logits(hidden, tokens)
    torch.testing.assert_close(whole[:, 0], drafter.logits(hidden)[:, 0], rtol=0, atol=1e-12)
    for place in range(4):
        alone = drafter.logits_after(hidden, place, tokens[:, place - 1] if place else None)
        torch.testing.assert_close(alone, whole[:, place], rtol=0, atol=1e-12)
    embedded = policy.model.get_input_embeddings()(tokens[:, 1])  # type: ignore[no-untyped-call]
    between = nn.functional.silu(torch.cat((head.down, head.before), 1) @ torch.cat((hidden[:, 3], embedded), 1).T)
    expected = (hidden[:, 3] + (head.up @ between).T) @ policy.model.lm_head.weight.T  # type: ignore[operator, union-attr]
    torch.testing.assert_close(whole[:, 2], expected, rtol=0, atol=1e-12)
    assert not torch.isclose(whole[:, 1:], drafter.logits(hidden)[:, 1:]).all(dim=-1).any()
    head.up.zero_()
    assert torch.equal(drafter.logits(hidden, tokens), drafter.logits(hidden))


def test_adapters_older_than_sampler_heads_still_load(tmp_path: Path) -> None:
    policy = _policy("llama")
    adapter = _adapter(policy)
    adapter.save(tmp_path)
    path = tmp_path / CONFIG_NAME
    values = json.loads(path.read_text())
    del values["sampler_width"]
    path.write_text(json.dumps(values))
    found = load_adapter(tmp_path, policy)
    assert found.config == adapter.config
    assert found.sampler is None


@pytest.mark.parametrize("sampler_width", [0, 5])
def test_an_adapter_survives_saving(tmp_path: Path, sampler_width: int) -> None:
    policy = _policy("llama")
    adapter = _adapter(policy, sampler_width=sampler_width)
    adapter.save(tmp_path)
    n_head = 3 * 32 * sampler_width
    assert adapter.n_bytes - _adapter(policy).n_bytes == n_head * 8
    assert sum(one.numel() for one in load_file(tmp_path / WEIGHTS_NAME).values()) * 8 == adapter.n_bytes
    found = load_adapter(tmp_path, policy)
    assert found.config == adapter.config
    assert found.mask_embeddings.dtype == torch.float64
    for name, weights in adapter.state_dict().items():
        assert torch.equal(found.state_dict()[name], weights.bfloat16().double()), name


@pytest.mark.parametrize("kind", ["skip", "embeddings"])
def test_baselines_are_saved_like_adapters(kind: str, tmp_path: Path) -> None:
    policy = _policy("phi3")
    config = S3DConfig(1, 1, 3, 0, 0.0, kind, policy.content_hash)  # type: ignore[arg-type]
    S3DAdapter(policy, config).save(tmp_path)
    assert load_adapter(tmp_path, policy).config == config


def test_an_adapter_of_another_policy_is_refused(tmp_path: Path) -> None:
    policy = _policy("llama")
    adapter = _adapter(policy)
    adapter.save(tmp_path)
    other = LoadedModel(policy.model, policy.tokenizer, "other", "cd" * 32)
    with pytest.raises(ModelError, match=r"another model than 'other' \(abababababab, not cdcdcdcdcdcd\)"):
        load_adapter(tmp_path, other)
    with pytest.raises(ModelError, match="another model"):
        Drafter(other, adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_first": 4, "n_last": 2}, "layers overlap: first 4 and last 2 of 5"),
        ({"n_first": 0, "n_last": 0}, "keep at least one"),
        ({"n_first": -1}, "n_first = -1"),
        ({"n_first": "a\nb"}, r"n_first = 'a\\nb'"),
        ({"alpha": "a\nb"}, r"alpha = 'a\\nb'"),
        ({"kind": "a\nb"}, r"kind = 'a\\nb'"),
        ({"rates": "a\nb"}, r"rates = 'a\\nb'"),
        ({"sampler_width": -1}, "sampler_width = -1"),
        ({"sampler_width": 5000}, "sampler_width 5000; use 0"),
        ({"sampler_width": 2}, r"other weights .*sampler\.before"),
        ({"k": 0}, "k = 0 masks"),
        ({"k": 10**9}, "k = 1000000000"),
        ({"k": 7}, r"mask_embeddings is BF16 \(4, 32\)"),
        ({"rank": 33}, "rank 33"),
        ({"rank": 2}, "fits another model"),
        ({"rank": 3.0}, r"rank = 3.0"),
        ({"rank": True}, "rank = True"),
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"alpha": "6"}, "alpha = '6'"),
        ({"kind": "pickle"}, "kind = 'pickle'"),
        ({"kind": ["lora"]}, "kind = "),
        ({"kind": "skip"}, "other weights"),
        ({"base_hash": "../x"}, "no sha256"),
        ({"extra": 1}, "must hold exactly"),
        ({"rates": [0.5]}, "are not 4 shares"),
        ({"rates": [0.5, 0.5, 0.5, 1.5]}, "are not 4 shares"),
        ({"rates": [0.5, 0.5, 0.5, float("nan")]}, "are not 4 shares"),
        ({"rates": "0.5"}, "are not 4 shares"),
    ],
)
def test_a_config_that_cannot_be_true_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    policy = _policy("llama")
    _adapter(policy).save(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(tmp_path, policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[" * 4000, "[]", '{"k": 4}', " " * 5000, "\x00\xff", "null"])
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    policy = _policy("llama")
    _adapter(policy).save(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=CONFIG_NAME):
        load_adapter(tmp_path, policy)


@pytest.mark.parametrize("n_kept", [0, 4, 200, 5000, -1])
def test_truncated_weights_are_refused(n_kept: int, tmp_path: Path) -> None:
    policy = _policy("llama")
    _adapter(policy).save(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:n_kept])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_adapter(tmp_path, policy)


def test_weights_of_other_names_sizes_kinds_or_values_are_refused(tmp_path: Path) -> None:
    policy = _policy("llama")
    _adapter(policy, sampler_width=5).save(tmp_path)
    path, name = tmp_path / WEIGHTS_NAME, "layers.0.q_proj.up"
    good = load_file(path)
    whole = torch.ones(32, 3, dtype=torch.int64)
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({name: good[name].T.contiguous()}, "fits another model"),
        ({name: whole}, "I64"),
        ({"sampler.down": good["sampler.down"][:4].clone()}, r"sampler.down is BF16 \(4, 32\)"),
        ({"sampler.up": good["sampler.up"] * torch.inf}, "sampler.up has numbers that are not finite"),
        ({name: good[name] * torch.nan}, "not finite"),
        ({"surprise": good[name].clone()}, "surprise"),
    ]
    for changes, message in cases:
        save_file(good | changes, path)
        with pytest.raises(ModelError, match=message):
            load_adapter(tmp_path, policy)
    save_file({key: value for key, value in good.items() if key != name}, path)
    with pytest.raises(ModelError, match=name):
        load_adapter(tmp_path, policy)


def test_measured_acceptance_is_kept_with_the_adapter(tmp_path: Path) -> None:
    policy = _policy("llama")
    adapter = _adapter(policy)
    adapter.knows([0.9, 0.51239, 0.5, 0.25])
    adapter.save(tmp_path)
    assert load_adapter(tmp_path, policy).config.rates == (0.9, 0.5124, 0.5, 0.25)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    policy = _policy("llama")
    with pytest.raises(ModelError, match=f"has no {CONFIG_NAME}"):
        load_adapter(tmp_path, policy)
    _adapter(policy).save(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(ModelError, match="does not exist"):
        load_adapter(tmp_path, policy)


def test_more_masks_than_trained_are_refused() -> None:
    policy = _policy("llama")
    adapter = _adapter(policy, k=2)
    adapter.check_k(2)
    with pytest.raises(ModelError, match="k = 3, but the adapter was trained for k = 2"):
        adapter.check_k(3)


def test_models_without_s3d_are_refused() -> None:
    config = Gemma2Config(**SHARED, head_dim=8)
    gemma = LoadedModel(Gemma2ForCausalLM(config), None, "gemma", "ab" * 32)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'gemma2' has no S3D"):
        S3DAdapter.skip_only(gemma, 1, 1, 4)
    odd = _policy("llama")
    odd.model.lm_head = nn.Linear(32, 65, bias=False)
    with pytest.raises(ModelError, match=r"\(64, 32\) and \(65, 32\)"):
        S3DAdapter.skip_only(odd, 1, 1, 4)
