"""The policies against a real server process: `transformers serve` with the starter's policy, on 127.0.0.1."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from runtime.decoding.adaptive import AdaptiveCuts, Fit
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutPolicy, CutSchedule, MemoryCuts
from runtime.decoding.sampling import SamplingConfig
from runtime.decoding.server import Server, ServerEngine
from runtime.errors import ConfigError
from runtime.models import LoadedModel, load_classifier, load_policy
from runtime.records import Candidate, Message, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.starter import path

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("openai") is None, reason="needs the openai client: pip install 'winnow[dev]'"
    ),
    pytest.mark.timeout(300),  # the first test waits for the server
]
PROMPTS = tuple(
    Prompt(f"p{i}", (Message("user", f"I work at the till. What is {40 + i} + 7 - 5 + 3 ?"),), "clerk")
    for i in range(3)
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(path("policy")), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output, env=environment
        )
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except (urllib.error.URLError, TimeoutError):
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.1)
            else:
                pytest.fail(f"no answer: {log.read_text()}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def policy() -> LoadedModel:
    return load_policy(str(path("policy")))


@pytest.fixture(scope="module")
def reward() -> ClassifierReward:
    return ClassifierReward(load_classifier(str(path("reward"))))


def draw(
    url: str, policy: LoadedModel, cuts: CutPolicy, reward: ClassifierReward | None, **sampling: object
) -> list[list[Candidate]]:
    # This server samples only if its own generation config says so.
    config = {"do_sample": sampling.get("temperature") != 0, "eos_token_id": policy.tokenizer.eos_token_id}
    server = Server(url, str(path("policy")), concurrency=4, extra={"generation_config": json.dumps(config)})
    settings = SamplingConfig(**{"n": 4, "max_new_tokens": 60} | sampling)  # type: ignore[arg-type]
    return list(ServerEngine(server, policy.tokenizer, settings, cuts, reward).generate(PROMPTS))


def test_greedy_in_chunks_is_greedy_here(url: str, policy: LoadedModel, reward: ClassifierReward) -> None:
    """Cuts that keep everyone interrupt every answer, and change none."""
    cuts = CutSchedule((5, 17), (1.0, 1.0))
    found = draw(url, policy, cuts, reward, temperature=0, n=2)
    sampling = SamplingConfig(n=2, max_new_tokens=60, temperature=0)
    here = list(Engine(policy, sampling, cuts, reward, 16).generate(PROMPTS))
    assert [[c.response for c in row] for row in found] == [[c.response for c in row] for row in here]
    assert {c.finish_reason for row in found for c in row} == {"eos"}
    for mine, other in zip(sum(found, []), sum(here, []), strict=True):
        assert [cut.n_tokens for cut in mine.cuts] == [cut.n_tokens for cut in other.cuts] == [5, 17]
        assert [c.score for c in mine.cuts] == pytest.approx([c.score for c in other.cuts], abs=1e-4)


@pytest.mark.parametrize(
    "cuts", [CutSchedule((6, 14), (0.5, 0.5)), AdaptiveCuts((Fit(6, 0.0, 1.0, 0.5),), confidence=0.6)]
)
def test_cuts_stop_answers_at_equal_length(
    url: str, policy: LoadedModel, reward: ClassifierReward, cuts: CutPolicy
) -> None:
    for row in draw(url, policy, cuts, reward):
        assert [c.candidate_index for c in row] == [0, 1, 2, 3]
        reasons = [c.finish_reason for c in row]
        assert "cut" in reasons and ("eos" in reasons or "length" in reasons)
        for candidate in row:
            if candidate.finish_reason == "cut":
                assert candidate.cut_at_token == candidate.cuts[-1].n_tokens in cuts.tokens
                assert not candidate.cuts[-1].kept and candidate.status == "ok"


def test_waves_and_plain_best_of_n(url: str, policy: LoadedModel, reward: ClassifierReward) -> None:
    never = AdaptiveCuts((Fit(6, 0.0, 1.0, 0.5),), confidence=1.0, first_wave=2, min_gain=1e9)
    assert {tuple(c.finish_reason for c in row[2:]) for row in draw(url, policy, never, reward)} == {("skipped",) * 2}
    plain = draw(url, policy, CutSchedule(), None)
    assert all(not c.cuts and c.finish_reason in ("eos", "length") for row in plain for c in row)


def test_a_stop_string_ends_an_answer_before_it(url: str, policy: LoadedModel) -> None:
    cases: Sequence[Candidate] = sum(draw(url, policy, CutSchedule(), None, temperature=0, n=1, stop=(";",)), [])
    assert cases and all(";" not in candidate.response for candidate in cases)


def test_a_refused_request_is_an_error_row(url: str, policy: LoadedModel) -> None:
    for row in draw(url, policy, CutSchedule(), None, top_k=5):  # which this server does not know
        assert [(c.finish_reason, c.status) for c in row] == [("error", "error")] * 4
        assert row[0].error is not None and row[0].error.startswith("the server refused: ")


def test_a_server_that_is_not_there_is_one_line(policy: LoadedModel) -> None:
    server = Server("http://127.0.0.1:9/v1", "m", retries=0)
    engine = ServerEngine(server, policy.tokenizer, SamplingConfig(n=1), CutSchedule(), None)
    with pytest.raises(ConfigError, match="does not answer"):
        list(engine.generate(PROMPTS))


def test_what_cannot_work_is_refused(policy: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="write a URL"):
        Server("localhost:8000", "m")
    with pytest.raises(ConfigError, match="use a schedule with a server"):
        ServerEngine(Server("http://x/v1", "m"), policy.tokenizer, SamplingConfig(), MemoryCuts(), None)
