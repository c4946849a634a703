"""How often a run is started again before it gives up."""

from types import SimpleNamespace

import pytest

from tasks import cache
from tasks.errors import ConfigError


def _started(n_times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(flow_run=SimpleNamespace(run_count=n_times))
    monkeypatch.setattr(cache, "FlowRunContext", SimpleNamespace(get=lambda: context))


@pytest.mark.parametrize("n_times", [1, 5])
def test_a_run_may_be_started_five_times(n_times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _started(n_times, monkeypatch)
    cache.check_starts()


def test_the_sixth_start_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _started(6, monkeypatch)
    with pytest.raises(ConfigError, match="crashed 5 times, the worker with it; give the worker more memory"):
        cache.check_starts()


def test_what_is_no_run_of_prefect_may_always_start() -> None:
    cache.check_starts()
