"""Public preference data next to the repository, counted again in another way; skipped where it is absent."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tasks.importers.collect import contradictions
from tests.tasks.importers.helpers import collected, write_rows

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared with models and data, which is absent"),
]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def _lines(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _halves(text: str) -> tuple[str, str] | None:
    """(all but the last turn, its text) without any parsing of turns; None when a human has the last word."""
    at = text.rfind(ASSISTANT)
    return (text[:at], text[at + len(ASSISTANT) :].strip()) if at >= 0 and HUMAN not in text[at:] else None


def _answers(row: dict[str, str]) -> tuple[str, str] | None:
    """(better, worse) of a row that makes a pair."""
    chosen, rejected = _halves(row["chosen"]), _halves(row["rejected"])
    if chosen is None or rejected is None or chosen[0] != rejected[0]:
        return None
    turns = chosen[0].replace(ASSISTANT, HUMAN).split(HUMAN)[1:]
    is_asked = chosen[0].rfind(HUMAN) > chosen[0].rfind(ASSISTANT) and all(turn.strip() for turn in turns)
    return (chosen[1], rejected[1]) if is_asked and chosen[1] and rejected[1] and chosen[1] != rejected[1] else None


def test_every_row_of_hh_rlhf_is_a_pair_or_has_a_reason() -> None:
    folder = DATA / "hh-rlhf"
    found = collected(folder, layout="hh_rlhf")
    wanted: list[tuple[str, str, str]] = []
    n_rows = 0
    for path in sorted(folder.glob("*.jsonl.gz")):
        group, lines = path.name.removesuffix(".test.jsonl.gz"), _lines(path)
        n_rows += len(lines)
        wanted += [(group, *answers) for answers in map(_answers, lines) if answers]
    assert len(found.pairs) + len(found.rejected) == found.rows_per_file.total() == n_rows
    n_doubles = Counter(str(row["group"]) for row in found.rejected if row["reason"] == "duplicate")
    assert Counter(pair.group for pair in found.pairs) + n_doubles == Counter(group for group, _, _ in wanted)
    assert {(pair.group, pair.chosen, pair.rejected) for pair in found.pairs} == set(wanted)
    assert 0.98 < len(found.pairs) / n_rows < 1
    assert {"helpful-base", "harmless-base"} <= {pair.group for pair in found.pairs}


def test_persona_statements_keep_thirteen_groups_of_a_thousand() -> None:
    path = DATA / "persona-evals" / "persona.jsonl.gz"
    rows = _lines(path)
    found = collected(path, layout="persona")
    wanted = {(r["persona"], r["question"].strip(), r["answer_matching_behavior"].strip()) for r in rows}
    assert {(p.group, p.messages[0]["content"], p.chosen) for p in found.pairs} == wanted
    assert len(found.pairs) + len(found.rejected) == len(rows) == 13_000
    assert {(p.chosen, p.rejected) for p in found.pairs} == {("Yes", "No"), ("No", "Yes")}
    # The same statement in two groups, answered the other way: kept, for that is what groups are about.
    both = {(p.messages[0]["content"], p.chosen) for p in found.pairs}
    n_disputed = sum((question, "No") in both for question, answer in both if answer == "Yes")
    assert n_disputed > 0 and contradictions(found.pairs) == 0


def test_verified_solutions_are_imported_with_their_scores(tmp_path: Path) -> None:
    """GSM8K's four model solutions a question: the first right one against the first wrong one."""
    table = []
    for row in _lines(DATA / "gsm8k" / "example_model_solutions.jsonl.gz"):
        solutions = [value for value in row.values() if isinstance(value, dict)]
        right = [s["solution"].strip() for s in solutions if s["is_correct"]]
        wrong = [s["solution"].strip() for s in solutions if not s["is_correct"]]
        if right and wrong:
            scores = {"score_chosen": 1, "score_rejected": 0}
            table.append({"question": row["question"], "chosen": right[0], "rejected": wrong[0]} | scores)
    source = write_rows(tmp_path / "solutions.jsonl.gz", table)
    found = collected(source, prompt_column="question", group_constant="checker")
    assert len(table) > 300
    assert [(p.chosen, p.rejected) for p in found.pairs] == [(row["chosen"], row["rejected"]) for row in table]
    assert {(p.margin, p.group, p.n_votes) for p in found.pairs} == {(1.0, "checker", None)}


def test_ten_raters_of_words_keep_their_disagreement(tmp_path: Path) -> None:
    """Ten people rated each word of VADER; of two words a rater is for the one rated higher."""
    words = {}
    for line in (DATA / "vader" / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines():
        word, _, _, ratings = line.split("\t")
        words[word.strip()] = [int(rating) for rating in ratings.strip("[] ").split(",")]
    draw = random.Random(0)
    names = [word for word in sorted(words) if word.isalpha() and len(words[word]) == 10]
    pairs = [tuple(draw.sample(names, 2)) for _ in range(400)]
    table, votes = [], Counter[tuple[str, str, str, str]]()
    for a, b in dict.fromkeys(tuple(sorted(pair)) for pair in pairs):
        for rater in range(10):
            half = "first five" if rater < 5 else "last five"
            difference = words[a][rater] - words[b][rater]
            choice = "a" if difference > 0 else "b" if difference < 0 else "tie"
            votes[a, b, half, choice] += 1
            ask = f"Which word is more positive: {a} or {b}?"
            row = {"prompt": ask, "response_a": a, "response_b": b, "annotator": str(rater)}
            table.append(row | {"group": half, "choice": choice})
    found = collected(write_rows(tmp_path / "raters.jsonl", table), layout="annotators")
    wanted = {}
    for a, b, half in {key[:3] for key in votes}:
        for answer, other, choice in ((a, b, "a"), (b, a, "b")):
            if votes[a, b, half, choice] >= 3:
                wanted[half, answer, other] = votes[a, b, half, choice] / 5
    assert {(p.group, p.chosen, p.rejected): p.agreement for p in found.pairs} == wanted
    assert len(wanted) + len(found.rejected) == len({key[:3] for key in votes})
    assert {"tie", "low_agreement"} == {row["reason"] for row in found.rejected}
    each = collected(tmp_path / "raters.jsonl", layout="annotators", votes="each")
    assert len(each.pairs) == len(table) - sum(n for key, n in votes.items() if key[3] == "tie")
    opposite = {(p.group, p.chosen, p.rejected) for p in found.pairs}
    n_disputed = sum(("last five", b, a) in opposite for group, a, b in opposite if group == "first five")
    assert n_disputed > 0  # the two halves disagree on some pairs, and both opinions are there
