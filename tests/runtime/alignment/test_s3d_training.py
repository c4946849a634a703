"""Packed training passes against single ones, what training reaches, and how acceptance is counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from runtime.alignment.s3d_acceptance import _classic, _coupled, _Tally, draft_share, figures, measure
from runtime.alignment.s3d_training import Drafts, S3DTraining, Sample, TextBatch, choose, draft, loss_of, train_s3d
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d.adapter import Drafter, S3DAdapter
from runtime.decoding.sampling import SamplingConfig
from runtime.errors import InputError
from runtime.models import LoadedModel, encode_prompt, load_policy
from runtime.records import Message, Prompt
from tests.conftest import tiny_config
from tests.runtime.decoding.test_s3d_adapter import KINDS_OF_MODEL, _adapter, _policy, plain_draft

SHORT = S3DTraining(n_first=1, n_last=1, k=3, rank=4, steps=40, batch_size=4, groups=8)


@pytest.fixture(scope="module")
def samples(tiny_policy: LoadedModel, tiny_prompts: tuple[Prompt, ...]) -> list[Sample]:
    """Answers of the tiny policy, in the order of prompts."""
    engine = Engine(tiny_policy, SamplingConfig(n=8, max_new_tokens=40), CutSchedule(), None, 16)
    found = []
    for prompt, answers in zip(tiny_prompts, engine.generate(tiny_prompts), strict=True):
        ids = encode_prompt(tiny_policy.tokenizer, prompt.messages, "chat")
        found += [Sample((*ids, *answer.token_ids), len(ids)) for answer in answers]
    return found


def _texts() -> list[Sample]:
    generator = torch.Generator().manual_seed(6)
    shapes = ((3, 12), (7, 9), (1, 17))
    return [Sample(tuple(torch.randint(2, 64, (n,), generator=generator).tolist()), start) for start, n in shapes]


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
@torch.inference_mode()
def test_packed_groups_are_those_of_a_plain_forward_at_each_place(kind: str) -> None:
    policy = _policy(kind)
    adapter = _adapter(policy)
    drafter, settings = Drafter(policy, adapter), S3DTraining(k=4)
    batch = TextBatch.of(_texts(), torch.device("cpu"))
    starts = torch.tensor([[3, 10, 5, 4], [7, 7, 8, 8], [15, 1, 9, 2]])
    packed = draft(drafter, batch, starts, settings)
    logits = policy.model(batch.ids, use_cache=False).logits.log_softmax(-1)
    for row, (sequence, start) in enumerate((i, s) for i, line in enumerate(starts.tolist()) for s in line):
        text = torch.tensor(_texts()[sequence].ids)
        hidden = plain_draft(policy, adapter, text[: start + 1], 4)
        expected = policy.model.lm_head(hidden[1:]).log_softmax(-1)  # type: ignore[operator]
        torch.testing.assert_close(packed.q[row], expected, rtol=0, atol=1e-11)
        n_real = min(4, len(text) - 1 - start)
        assert packed.is_real[row].tolist() == [True] * n_real + [False] * (4 - n_real)
        assert packed.tokens[row, :n_real].tolist() == text[start + 1 : start + 1 + n_real].tolist()
        torch.testing.assert_close(packed.p[row, :n_real], logits[sequence, start : start + n_real], rtol=0, atol=1e-11)


def test_groups_start_at_distinct_places_of_the_answer() -> None:
    batch = TextBatch.of(_texts(), torch.device("cpu"))
    for seed in range(20):
        starts = choose(batch, 6, torch.Generator().manual_seed(seed))
        for sample, places in zip(_texts(), starts.tolist(), strict=True):
            inside = [place for place in places if place < len(sample.ids) - 1]
            assert len(inside) == len(set(inside)) == min(6, len(sample.ids) - 1 - sample.n_prompt)
            assert all(sample.n_prompt <= place for place in inside)
            assert {place for place in places if place not in inside} <= {len(sample.ids) - 1}


def _drafts(p: list[list[float]], q: list[list[float]], tokens: list[int], is_real: list[bool]) -> Drafts:
    one, other = (torch.tensor([rows], dtype=torch.float64).log() for rows in (p, q))
    return Drafts(one, other, torch.tensor([tokens]), torch.tensor([is_real]))


def test_losses_by_hand() -> None:
    p, q = [[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]], [[0.25, 0.75], [0.8, 0.2], [0.5, 0.5]]
    drafts = _drafts(p, q, [0, 1, 0], [True, True, False])
    assert drafts.overlap.flatten().tolist() == pytest.approx([0.75, 0.4, 0.6])
    assert drafts.kept.flatten().tolist() == pytest.approx([0.5, 0.25, 0.0])
    # The second mask is asked half of the time, the third stands behind the end.
    assert loss_of(drafts, "overlap").item() == pytest.approx(-(0.75 + 0.5 * 0.4) / 1.5)
    logs = torch.tensor([0.75, 0.4]).log()
    assert loss_of(drafts, "acceptance").item() == pytest.approx(-(logs[0] + 0.5 * logs[1]).item() / 1.5, rel=1e-6)
    kl = [
        sum(a * torch.tensor(a / b).log().item() for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)
    ]
    assert loss_of(drafts, "kl").item() == pytest.approx((kl[0] + 0.5 * kl[1]) / 1.5, rel=1e-6)


def _learned(tokenizer: PreTrainedTokenizerFast, write: Callable[[int], Tensor]) -> tuple[LoadedModel, list[Sample]]:
    """A tiny policy that has learned texts (rows, tokens), and more of them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        ids = write(16)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    texts = [Sample(tuple(row), 3) for row in write(72).tolist()]
    return LoadedModel(model.eval(), tokenizer, "learned", "ef" * 32), texts


@pytest.fixture(scope="module")
def counter(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> tuple[LoadedModel, list[Sample]]:
    """A tiny policy that has learned to count from any token to the next, and its answers."""
    generator = torch.Generator().manual_seed(0)

    def count(n_rows: int) -> Tensor:
        return (torch.randint(0, 20, (n_rows, 1), generator=generator) + torch.arange(16)) % 20 + 40

    return _learned(make_tokenizer(), count)


@pytest.mark.parametrize("loss", ["acceptance", "overlap", "kl"])
def test_training_raises_acceptance_and_leaves_the_policy_alone(
    loss: str, counter: tuple[LoadedModel, list[Sample]]
) -> None:
    policy, samples = counter
    before = {name: weights.clone() for name, weights in policy.model.state_dict().items()}
    trains = [weights.requires_grad for weights in policy.model.parameters()]
    settings = S3DTraining(k=3, rank=8, steps=60, batch_size=4, groups=8, loss=loss)  # type: ignore[arg-type]
    untrained = measure(policy, S3DAdapter.skip_only(policy, 1, 1, 3), samples[64:], settings)
    trained = measure(policy, train_s3d(policy, samples[:64], settings), samples[64:], settings)
    assert trained.overlap[0] > untrained.overlap[0] + 0.2
    assert trained.classic.emitted[2] > untrained.classic.emitted[2] + 0.1
    assert trained.coupled.emitted[2] > untrained.coupled.emitted[2] + 0.1
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
    assert [weights.requires_grad for weights in policy.model.parameters()] == trains
    assert all(weights.grad is None for weights in policy.model.parameters())


@pytest.mark.slow
def test_a_sampler_head_foresees_what_follows_from_a_draw(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    """Texts `a x x a y y ...` with x, y at random: the second x is known only to whom the first is told."""
    generator = torch.Generator().manual_seed(0)

    def write(n_rows: int) -> Tensor:
        drawn = torch.randint(41, 61, (n_rows, 6, 1), generator=generator)
        return torch.cat((torch.full_like(drawn, 40), drawn, drawn), dim=-1).flatten(1)

    policy, samples = _learned(make_tokenizer(), write)
    plain = S3DTraining(k=2, rank=8, steps=200, batch_size=4, groups=8, learning_rate=1e-2)
    told = replace(plain, sampler_width=16)
    without, trained = (train_s3d(policy, samples[:64], one) for one in (plain, told))
    assert trained.sampler is not None and trained.sampler.up.abs().max() > 0
    before, after = measure(policy, without, samples[64:], plain), measure(policy, trained, samples[64:], told)
    assert after.overlap[1] > before.overlap[1] + 0.2
    assert after.coupled.rates[1] > before.coupled.rates[1] + 0.1
    again = train_s3d(policy, samples[:64], told).state_dict()
    assert all(torch.equal(again[name], weights) for name, weights in trained.state_dict().items())
    # Told masks pass the output layer by themselves.
    head = policy.model.lm_head.weight.numel()  # type: ignore[union-attr, operator]
    body = sum(one.numel() for one in policy.model.base_model.layers.parameters())  # type: ignore[union-attr]
    more = draft_share(policy.model, trained) - draft_share(policy.model, without)
    assert more == pytest.approx((sum(one.numel() for one in trained.sampler.parameters()) + head) / (body + head))


def test_the_same_seed_trains_the_same_bits(tiny_policy: LoadedModel, samples: list[Sample]) -> None:
    settings = S3DTraining(rank=4, steps=4, batch_size=4, groups=4, seed=3)
    first = train_s3d(tiny_policy, samples, settings).state_dict()
    torch.rand(7)  # whatever the global generator did meanwhile
    second = train_s3d(tiny_policy, samples, settings).state_dict()
    other = train_s3d(tiny_policy, samples, S3DTraining(rank=4, steps=4, batch_size=4, groups=4, seed=4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["mask_embeddings"], other["mask_embeddings"])


def test_baselines_train_less(tiny_policy: LoadedModel, samples: list[Sample]) -> None:
    embeddings = train_s3d(tiny_policy, samples, S3DTraining(kind="embeddings", steps=3))
    assert [name for name, _ in embeddings.named_parameters()] == ["mask_embeddings"]
    skip = train_s3d(tiny_policy, samples, S3DTraining(kind="skip", steps=3))
    assert torch.equal(skip.mask_embeddings, S3DAdapter.skip_only(tiny_policy, 1, 1, 4).mask_embeddings)
    assert draft_share(tiny_policy.model, skip) < draft_share(tiny_policy.model, embeddings) + 1e-9 < 1


def test_answers_without_a_second_token_are_refused(tiny_policy: LoadedModel) -> None:
    with pytest.raises(InputError, match="none of 2 answers has two tokens"):
        train_s3d(tiny_policy, [Sample((2, 3, 4), 2), Sample((2, 3), 2)], SHORT)


def test_masks_that_know_the_truth_are_always_accepted_and_wrong_ones_never() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, 2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    tokens = torch.multinomial(p.flatten(0, 1).exp(), 1, generator=generator).view(50, 2)
    wrong = torch.full_like(p, -torch.inf).scatter(-1, ((tokens + 1) % 6)[..., None], 0.0)
    is_real = torch.ones(50, 2, dtype=torch.bool)
    for rule in (_classic, _coupled):
        assert rule(Drafts(p, p, tokens, is_real), generator).all()
        assert not rule(Drafts(p, p, tokens, ~is_real), generator).any()
        assert not rule(Drafts(p, wrong, tokens, is_real), generator).any()


def test_counted_acceptance_is_that_of_both_rules() -> None:
    """On tokens drawn from p: sum min(p, q) for one rule, agreement under common noise for the other."""
    generator = torch.Generator().manual_seed(1)
    n = 60_000
    p = torch.tensor([0.5, 0.2, 0.2, 0.05, 0.05], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.1, 0.15, 0.05], dtype=torch.float64)
    tokens = torch.multinomial(p, n, replacement=True, generator=generator)[:, None]
    drafts = Drafts(p.log().expand(n, 1, -1), q.log().expand(n, 1, -1), tokens, torch.ones(n, 1, dtype=torch.bool))
    noise = -torch.log(-torch.log(torch.rand(n, 5, generator=generator, dtype=torch.float64)))
    agree = ((p.log() + noise).argmax(-1) == (q.log() + noise).argmax(-1)).double().mean().item()
    four_sigma = 4 * 0.5 * (2 / n) ** 0.5
    assert _classic(drafts, generator).double().mean().item() == pytest.approx(0.6, abs=four_sigma)
    assert _coupled(drafts, generator).double().mean().item() == pytest.approx(agree, abs=four_sigma)


def test_rounds_are_counted_by_hand() -> None:
    tally = _Tally(2)
    #        prompt | answer: the round at place 1 accepts two and ends at 4, whose round is refused, then 5 accepts one
    tally.add([0, 2, 0, 0, 0, 1, 0], [0, 2, 2, 2, 2, 2, 1], [False, True, True, True, True, True, True])
    assert tally.rule.emitted == (6 / 4, 6 / 3)  # with k = 1 the rounds are at 1, 3, 4, 5; with k = 2 at 1, 4, 5
    assert tally.rule.rates == (2 / 3, 1 / 2)


def test_figures_have_a_row_per_k(tiny_policy: LoadedModel, samples: list[Sample]) -> None:
    adapter = S3DAdapter.skip_only(tiny_policy, 1, 1, 3)
    rows = figures(measure(tiny_policy, adapter, samples[:8], SHORT), adapter, tiny_policy.model)
    assert [row["k"] for row in rows] == [1, 2, 3]
    beta = draft_share(tiny_policy.model, adapter)
    assert all(row["speedup"] == pytest.approx(float(row["E"]) / (1 + beta), abs=1e-3) for row in rows)
    assert all(1 <= float(row["E"]) <= int(row["k"]) + 1 for row in rows)


def test_temperature_reaches_both_sides(tiny_policy: LoadedModel, samples: list[Sample]) -> None:
    drafter = Drafter(tiny_policy, S3DAdapter.skip_only(tiny_policy, 1, 1, 2))
    batch = TextBatch.of(samples[:2], torch.device("cpu"))
    starts = batch.n_prompt[:, None]
    warm, cold = (draft(drafter, batch, starts, S3DTraining(k=2, temperature=t)) for t in (1.0, 0.5))

    def sharpened(logs: Tensor) -> Tensor:
        return (2 * logs).log_softmax(-1)

    torch.testing.assert_close(cold.p, sharpened(warm.p), rtol=0, atol=1e-4)
    torch.testing.assert_close(cold.q, sharpened(warm.q), rtol=0, atol=1e-4)


@pytest.mark.shared
def test_a_public_model_learns_to_draft(shared_models: Path) -> None:
    policy = load_policy(str(shared_models / "stories3m"))
    engine = Engine(policy, SamplingConfig(n=24, max_new_tokens=48), CutSchedule(), None, 24, "text")
    openings = ("Once upon a time", "One day, a girl named Lily", "The dog was")
    found = []
    for opening in openings:
        prompt = Prompt(opening, (Message("user", opening),), "all")
        ids = encode_prompt(policy.tokenizer, prompt.messages, "text")
        found += [Sample((*ids, *answer.token_ids), len(ids)) for answer in next(engine.generate([prompt]))]
    settings = S3DTraining(n_first=1, n_last=1, k=2, rank=8, steps=30, batch_size=4, groups=8)
    train, held_out = found[:48], found[48:]
    untrained = measure(policy, S3DAdapter.skip_only(policy, 1, 1, 2), held_out, settings, batch_size=4)
    trained = measure(policy, train_s3d(policy, train, settings), held_out, settings, batch_size=4)
    assert trained.overlap[0] > untrained.overlap[0] + 0.1
    assert trained.classic.emitted[1] > untrained.classic.emitted[1]
