"""Progress as it is shown, and the events of the log."""

import logging

import httpx
import pytest
from prefect.states import Failed

from storage.errors import DiskFullError, LakeUnreachableError
from storage.lake import DatasetRef
from tasks import artifacts
from tasks.artifacts import MOST_BYTES, MOST_ROWS, _bounded, progress, subscribe
from tasks.errors import ConfigError, UnreachableError
from tasks.logs import log_event
from tasks.retries import RETRIES, is_worth_retrying


def test_progress_says_how_much_how_fast_and_how_long_still() -> None:
    now = iter([0.0, 10.0, 10.0, 40.0, 40.0])
    shown = progress("demo generate 1 of 2", "prompts", clock=lambda: next(now))
    shown.count(500)
    shown(8, 32)
    assert shown.text(8, 32, 10.0) == (
        "demo generate 1 of 2: 8 of 32 prompts; 500 tokens, 50 per second; about 30 s left"
    )
    assert shown.text(32, 32, 40.0).endswith("took 40 s")
    assert shown.text(1, 1000, 20.0).endswith("about 5.5 h left")
    assert shown.text(0, 10, 5.0) == "demo generate 1 of 2: 0 of 10 prompts; 500 tokens, 100 per second"


def test_progress_reaches_a_display_once_per_percent() -> None:
    told: list[tuple[str, int, int]] = []
    subscribe(lambda *each: told.append(each))
    shown = progress("a label nobody else has")
    for done in range(1, 1001):
        shown(done, 1000)
    mine = [each for each in told if each[0] == "a label nobody else has"]
    assert len(mine) == 100 and mine[-1][1:] == (1000, 1000)


def test_a_summary_above_what_the_page_takes_is_cut_and_says_so() -> None:
    text = _bounded("x" * (MOST_BYTES + 1))
    assert len(text) < MOST_BYTES + 200 and "1,000,001 characters" in text
    assert _bounded("short") == "short"


def test_a_long_table_is_its_first_rows_and_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, tuple[int, str]] = {}

    def create(table: list[object], key: str, description: str) -> None:
        made[key] = (len(table), description)

    monkeypatch.setattr(artifacts, "in_run", lambda: True)
    monkeypatch.setattr(artifacts, "create_table_artifact", create)
    ref = DatasetRef("bundles", "long", "0123456789ab", "/lake")
    artifacts.show_table(ref, "layers", [{"layer": i} for i in range(MOST_ROWS + 234)])
    artifacts.show_table(ref, "plans", [{"plan": 1}])
    artifacts.show_table(ref, "nothing", [])
    assert made == {
        "bundles-long-layers": (MOST_ROWS, f"layers, first 1,000 of 1,234 rows: {ref}"),
        "bundles-long-plans": (1, f"plans: {ref}"),
    }


def test_a_picture_that_the_page_would_choke_on_is_named_in_the_log_instead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []
    monkeypatch.setattr(artifacts, "in_run", lambda: True)
    monkeypatch.setattr(artifacts, "create_image_artifact", lambda url, key, description: made.append(key))
    ref = DatasetRef("models", "seen", "0123456789ab", "/lake")
    with caplog.at_level(logging.INFO):
        artifacts.show_image(ref, "x" * (MOST_BYTES + 1), "Loss", "loss")
        artifacts.show_image(ref, "x" * MOST_BYTES, "Truth", "truth")
    assert made == ["models-seen-truth"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"picture-left-out ref={ref} picture=loss bytes={MOST_BYTES + 1} most={MOST_BYTES}"


def test_an_event_is_text_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_event("shard-done", stage="generate", tokens=3, note=None)
    (record,) = caplog.records
    assert record.getMessage() == "shard-done stage=generate tokens=3"
    assert record.winnow == {"event": "shard-done", "stage": "generate", "tokens": 3}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error, is_retried",
    [
        (LakeUnreachableError("the store does not answer"), True),
        (UnreachableError("server does not answer"), True),
        (httpx.ConnectError("refused"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ConfigError("n = 0"), False),
        (DiskFullError("no space left"), False),
        (MemoryError(), False),
        (ZeroDivisionError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, is_retried: bool) -> None:
    assert is_worth_retrying(None, None, Failed(data=error)) is is_retried  # type: ignore[arg-type]


def test_attempts_wait_longer_each_time() -> None:
    assert RETRIES["retry_delay_seconds"](RETRIES["retries"]) == [4, 8, 16]
