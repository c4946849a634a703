"""Which answers an export is calibrated on, and how much of a table is in memory for that."""

import random
from collections.abc import Iterator, Mapping

import pytest

from tasks.calibration_text import _asked, _best, _chosen


def _rows(seed: int, n_prompts: int, n_answers: int) -> list[Mapping[str, object]]:
    """Made up, in any order: some without a score, some equal, some not finished."""
    rng = random.Random(seed)
    rows: list[Mapping[str, object]] = [
        {
            "prompt_id": f"p{prompt:03}",
            "candidate_index": index,
            "response": f"{prompt} {index}",
            "score": rng.choice([None, 0.0, 1.0, rng.random()]),
            "status": rng.choice(["ok", "ok", "ok", "error"]),
            "finish_reason": rng.choice(["eos", "eos", "cut"]),
        }
        for prompt in range(n_prompts)
        for index in range(n_answers)
    ]
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("n_texts", [1, 7, 40, 90, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_answers_chosen_batch_by_batch_are_those_chosen_from_the_whole_table(seed: int, n_texts: int) -> None:
    rows = _rows(seed, 30, 8)
    finished = [row for row in rows if row["status"] == "ok" and row["finish_reason"] == "eos"]
    batches = [rows[start : start + 11] for start in range(0, len(rows), 11)]
    assert _chosen(batches, n_texts) == _best(finished, n_texts)
    assert len(_chosen(batches, n_texts)) == min(n_texts, len(finished))


def test_the_best_answer_of_every_prompt_comes_before_any_second() -> None:
    rows = [
        {"prompt_id": prompt, "candidate_index": index, "score": score, "status": "ok", "finish_reason": "eos"}
        for prompt in ("b", "a")
        for index, score in enumerate((None, 1.0, 2.0))
    ]
    found = [(row["prompt_id"], row["score"]) for row in _chosen([rows[:4], rows[4:]], 5)]
    assert found == [("a", 2.0), ("b", 2.0), ("a", 1.0), ("b", 1.0), ("a", None)]


def test_no_more_rows_are_held_than_are_chosen_and_a_batch() -> None:
    alive: set[int] = set()
    most = 0

    class Row(dict[str, object]):
        def __init__(self, number: int) -> None:
            super().__init__(
                prompt_id=f"p{number % 500}", candidate_index=number, score=1.0, status="ok", finish_reason="eos"
            )
            alive.add(number)

        def __del__(self) -> None:
            alive.discard(self["candidate_index"])  # type: ignore[arg-type]

    def batches() -> Iterator[list[Row]]:
        nonlocal most
        for start in range(0, 5000, 50):
            yield [Row(number) for number in range(start, start + 50)]
            most = max(most, len(alive))

    assert len(_chosen(batches(), 20)) == 20
    assert most <= 20 + 2 * 50


def test_the_place_of_a_prompt_is_that_among_all_prompts() -> None:
    ids = [f"p{number:02}" for number in range(30)]
    shuffled = random.Random(0).sample(ids, len(ids))
    rows = [{"prompt_id": one, "messages": [{"role": "user", "content": one}]} for one in shuffled]
    found = _asked([rows[:10], rows[10:]], ["p03", "p04", "p17", "p29"])
    assert [(prompt, place) for prompt, (place, _) in found.items()] == [
        ("p03", 3), ("p04", 4), ("p17", 17), ("p29", 29)
    ]  # fmt: skip
    assert found["p17"][1][0].content == "p17"
