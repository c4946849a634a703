"""What S3D is worth is the tokens of a round over its time, both in units of plain decoding."""

from collections.abc import Callable, Sequence

import pytest

from runtime.decoding.s3d.adapter import S3DAdapter
from runtime.decoding.s3d.forecast import Forecast, InTurn, forecast
from runtime.errors import InputError, ModelError
from runtime.models import LoadedModel
from runtime.records import Message, Prompt

PROMPT = Prompt("p", (Message("user", "How many?"),), "all")


def _still() -> float:
    return 0.0


@pytest.fixture
def rounds_take(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let rounds take given seconds by drafted tokens."""

    def install(*seconds: float) -> None:
        def observe(self: InTurn, n_rows: int, n_slots: int, k: int, _seconds: float, n_rounds: int = 1) -> None:
            original(self, n_rows, n_slots, k, seconds[k] * n_rounds, n_rounds)

        original = InTurn.observe
        monkeypatch.setattr(InTurn, "observe", observe)

    return install


def _adapter(policy: LoadedModel, rates: Sequence[float]) -> S3DAdapter:
    adapter = S3DAdapter.skip_only(policy, 1, 1, 4)
    adapter.knows(rates)
    return adapter


def test_the_best_number_of_drafts_is_found_for_every_number_of_rows(
    tiny_policy: LoadedModel, rounds_take: Callable[..., None]
) -> None:
    rounds_take(1.0, 1.2, 0.0, 1.4, 2.4)
    adapter = _adapter(tiny_policy, (0.8, 0.5, 0.5, 0.5))
    found = forecast(tiny_policy, adapter, PROMPT, [1, 3], _still, "text")
    # E = 1, 1.8, 2.2, 2.4, 2.5 over 1, 1.2, 1.3, 1.4, 2.4
    assert [(f.rows, f.k) for f in found] == [(1, 3), (3, 3)]
    assert [f.tokens_per_round for f in found] == pytest.approx([2.4, 2.4])
    assert [f.break_even for f in found] == pytest.approx([1.4, 1.4])
    assert [f.speedup for f in found] == pytest.approx([2.4 / 1.4] * 2)


def test_where_no_number_pays_plain_decoding_is_foreseen(
    tiny_policy: LoadedModel, rounds_take: Callable[..., None]
) -> None:
    rounds_take(1.0, 3.0, 0.0, 4.0, 5.0)
    adapter = _adapter(tiny_policy, (0.5, 0.5, 0.5, 0.5))
    found = forecast(tiny_policy, adapter, PROMPT, [2], _still, "text")
    assert found == [Forecast(2, 0, 1.5, 3.0, 1.0)]


def test_an_adapter_of_unknown_acceptance_is_refused(tiny_policy: LoadedModel) -> None:
    adapter = S3DAdapter.skip_only(tiny_policy, 1, 1, 4)
    with pytest.raises(ModelError, match="does not say how often"):
        forecast(tiny_policy, adapter, PROMPT, [1], _still, "text")


def test_a_prompt_that_does_not_fit_is_named(tiny_policy: LoadedModel) -> None:
    long = Prompt("p", (Message("user", "x" * 2000),), "all")
    with pytest.raises(InputError, match="no round can be timed: prompt of 2000 tokens"):
        forecast(tiny_policy, _adapter(tiny_policy, (0.5,) * 4), long, [1], _still, "text")
