"""Each layout on small files written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.errors import InputError
from tasks.importers.records import Pair
from tasks.messages import prompt_id_of
from tests.tasks.importers.helpers import assistant, collected, reasons, user, write_rows


def _hh(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": f"{prompt}\n\nAssistant:{chosen}", "rejected": f"{prompt}\n\nAssistant:{rejected}"}


def _short(pairs: list[Pair]) -> list[tuple[str, str, str, str]]:
    return [(pair.messages[-1]["content"], pair.chosen, pair.rejected, pair.group) for pair in pairs]


def test_transcripts_become_messages_and_two_answers(tmp_path: Path) -> None:
    long = "\n\nHuman: Hi\n\nAssistant: Hello \n\nHuman: Two\n\nlines?"
    rows: list[object] = [
        _hh(long, " Yes.\n\nSurely. ", " No."),
        _hh("\n\nHuman: x", " same", " same "),
        _hh("\n\nHuman: x", "", " y"),
        _hh("\n\nHuman: ", " a", " b"),
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": None},
        _hh(long, " Yes.\n\nSurely.", " No."),
        b'{"chosen": "\xff"}'.decode("latin-1"),
    ]
    found = collected(write_rows(tmp_path / "helpful-base.test.jsonl", rows), layout="hh_rlhf")
    (pair,) = found.pairs
    assert pair.messages == [user("Hi"), assistant("Hello"), user("Two\n\nlines?")]
    assert (pair.chosen, pair.rejected, pair.group) == ("Yes.\n\nSurely.", "No.", "helpful-base")
    assert (pair.score_chosen, pair.n_votes, pair.annotator, pair.strategy) == (None, None, None, "given")
    assert pair.prompt_id == prompt_id_of(pair.messages)
    assert reasons(found) == [
        (2, "equal_answers"),
        (3, "empty_answer"),
        (4, "empty_prompt"),
        (5, "no_shared_prompt"),
        (6, "missing_value"),
        (7, "duplicate"),
        (8, "missing_value"),
    ]
    assert {row["group"] for row in found.rejected} == {"helpful-base"}


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("helpful-base.test.jsonl.gz", "helpful-base"),
        ("harmless-base/train.jsonl.gz", "harmless-base"),
        ("x/test.jsonl", "x"),
        ("y/train-00000-of-00004.jsonl", "y"),
        ("v1.5_dev.jsonl", "v1.5"),
        ("contest.jsonl", "contest"),
        ("extraversion.jsonl", "extraversion"),
    ],
)
def test_a_file_name_says_the_group(tmp_path: Path, path: str, group: str) -> None:
    write_rows(tmp_path / path, [_hh("\n\nHuman: x", " y", " z")])
    for source in (tmp_path / path, tmp_path):
        assert [pair.group for pair in collected(source, layout="hh_rlhf").pairs] == [group]


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        write_rows(tmp_path / f"{name}.jsonl.gz", [_hh("\n\nHuman: x", " y", " z"), {"chosen": 1, "rejected": 2}])
    (tmp_path / "README.md").write_text("no data")
    found = collected(tmp_path, layout="hh_rlhf")
    assert [pair.group for pair in found.pairs] == ["a", "b"]
    assert [row["detail"] for row in found.rejected] == [
        f'{name}.jsonl.gz: column "chosen" has no text' for name in ("a", "b")
    ]
    assert [pair.group for pair in collected(tmp_path, layout="hh_rlhf", files="b*").pairs] == ["b"]
    constant = collected(tmp_path, layout="hh_rlhf", group_constant="us")
    assert ([pair.group for pair in constant.pairs], reasons(constant)[1]) == (["us"], (1, "duplicate"))


def test_statements_become_questions_with_two_answers(tmp_path: Path) -> None:
    row = {"question": "Would you say?\n“x”", "statement": "x", "label_confidence": 0.9}
    answers = {"answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    rows = [
        row | answers,
        {"statement": "I agree", "label_confidence": 0.99, "persona": "calm"} | answers,
        row | {"answer_matching_behavior": " No", "answer_not_matching_behavior": [" Yes"]},
        {"label_confidence": 0.99} | answers,
    ]
    path = write_rows(tmp_path / "risk-averse.jsonl", rows)
    found = collected(path, layout="persona")
    assert _short(found.pairs) == [
        ("Would you say?\n“x”", "Yes", "No", "risk-averse"),
        ('Is the following statement something you would say?\n"I agree"', "Yes", "No", "calm"),
    ]
    assert reasons(found) == [(3, "missing_value"), (4, "missing_value")]
    sure = collected(path, layout="persona", min_confidence=0.95)
    assert [pair.group for pair in sure.pairs] == ["calm"]
    assert reasons(sure)[0] == (1, "low_confidence")


def test_a_system_prompt_can_say_the_group(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "chosen": "a", "rejected": "b", "group": "left"},
        {"prompt": "x", "chosen": "b", "rejected": "a", "group": "right"},
        {"prompt": [{"role": "system", "content": "own"}, user("x")], "chosen": "a", "rejected": "b", "group": "left"},
    ]
    path = write_rows(tmp_path / "p.jsonl", rows)
    without = collected(path).pairs
    assert without[0].prompt_id == without[1].prompt_id
    found = collected(path, system_prompt="You speak for {group}. {").pairs
    assert [pair.messages[0]["content"] for pair in found] == ["You speak for left. {", "You speak for right. {", "own"]
    assert len({pair.prompt_id for pair in found}) == 3


TABLE: list[dict[str, Any]] = [
    {"q": "one", "good": "a", "bad": "b", "who": "x", "s1": 2.0, "s2": 0.5},
    {"q": "two", "good": "c", "bad": "d", "who": "y", "s1": 1.0, "s2": 1.0},
    {"q": "three", "good": "e", "bad": "f", "who": "", "s1": 1.0, "s2": 0.0},
    {"q": "four", "good": "g", "bad": "h", "who": "y", "s1": 3.0, "s2": 2.75},
    {"q": "five", "good": "i", "bad": "j", "who": "y", "s1": 0.0, "s2": 2.0},
]
MAPPING = {
    "prompt_column": "q",
    "chosen_column": "good",
    "rejected_column": "bad",
    "group_column": "who",
    "score_chosen_column": "s1",
    "score_rejected_column": "s2",
    "min_margin": 0.5,
}


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json", "t.parquet", "t.csv", "folder", "dataset"])
def test_any_table_is_mapped_by_its_columns(tmp_path: Path, name: str) -> None:
    path, settings = tmp_path / name, dict[str, object](MAPPING)
    if name in ("folder", "dataset"):
        path.mkdir()
        pq.write_table(pa.Table.from_pylist(TABLE), path / "train.parquet")
        settings |= {"format": "dataset"} if name == "dataset" else {}
    elif name == "t.parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    elif name == "t.json":
        path.write_text(json.dumps(TABLE, indent=1))
    elif name == "t.csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(TABLE[0]))
            writer.writeheader()
            writer.writerows(TABLE)
    else:
        write_rows(path, TABLE)
    found = collected(path, **settings)
    assert _short(found.pairs) == [("one", "a", "b", "x")]
    assert (found.pairs[0].score_chosen, found.pairs[0].score_rejected, found.pairs[0].margin) == (2.0, 0.5, 1.5)
    assert reasons(found) == [(2, "tie"), (3, "no_group"), (4, "margin"), (5, "margin")]


def test_messages_come_with_a_prompt_without_one_or_as_whole_conversations(tmp_path: Path) -> None:
    prompt = [user("Hi"), assistant("Hello"), user("Why?")]
    yes, no = assistant("Because."), assistant("No.")
    rows = [
        {"prompt": prompt, "chosen": [yes], "rejected": [no]},
        {"chosen": [*prompt, yes], "rejected": [*prompt, no]},
        {"prompt": "Why?", "chosen": [user("Why? "), yes], "rejected": [user("Why?"), no]},
        {"prompt": None, "chosen": [user("Whence?"), yes], "rejected": [user("Whence?"), no]},
    ]
    path = write_rows(tmp_path / "p.jsonl", rows)
    found = collected(path)
    assert [pair.messages for pair in found.pairs] == [prompt, [user("Why?")], [user("Whence?")]]
    assert {(pair.chosen, pair.rejected, pair.group) for pair in found.pairs} == {("Because.", "No.", "all")}
    assert reasons(found) == [(2, "duplicate")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "no_prompt"),
        ({"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("b")]}, "no_shared_prompt"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no_shared_prompt"),
        ({"chosen": [user("x"), user("a")], "rejected": [user("x"), user("b")]}, "no_answer"),
        ({"prompt": "x", "chosen": [user("a")], "rejected": "b"}, "no_answer"),
        ({"prompt": "x", "chosen": [assistant("a"), user("q"), assistant("b")], "rejected": "b"}, "several_turns"),
        ({"prompt": "x", "chosen": [{"role": "robot", "content": "a"}], "rejected": "b"}, "bad_messages"),
        ({"prompt": "x", "chosen": ["a"], "rejected": "b"}, "bad_messages"),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, "missing_value"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "missing_value"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "missing_value"),
        ({"prompt": [assistant("x")], "chosen": "a", "rejected": "b"}, "bad_messages"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "x", "chosen": "\n", "rejected": "b"}, "empty_answer"),
        ({"prompt": "x", "chosen": "caf\u00e9", "rejected": "cafe\u0301"}, "equal_answers"),
        ({"prompt": "x\ud800", "chosen": "a", "rejected": "b"}, "unreadable"),
        ({"prompt": "x", "chosen": "a\udfff", "rejected": "b"}, "unreadable"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "group": "\ud800"}, "unreadable"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "group": None}, "no_group"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": "high"}, "bad_score"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": True}, "bad_score"),
        ('{"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": NaN}', "bad_score"),
        ('{"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": ' + "9" * 5000 + "}", "unreadable"),
        ("[" * 100_000, "unreadable"),
        ("[1]", "unreadable"),
        ('{"prompt": "x"', "unreadable"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(tmp_path: Path, row: object, reason: str) -> None:
    good = {"prompt": "fine", "chosen": "a", "rejected": "b"}
    found = collected(write_rows(tmp_path / "p.jsonl", [good, row]))
    assert (len(found.pairs), reasons(found)) == (1, [(2, reason)])
    json.dumps(found.rejected, ensure_ascii=False).encode()  # reasons are text that can be stored


def test_bytes_that_are_no_utf8_spoil_their_row_only(tmp_path: Path) -> None:
    good = b'{"prompt": "x", "chosen": "a", "rejected": "b"}\n'
    (tmp_path / "p.jsonl").write_bytes(good + b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n')
    found = collected(tmp_path / "p.jsonl")
    assert (len(found.pairs), reasons(found)) == (1, [(2, "unreadable")])
    # PyArrow itself refuses to make such a column; files of other writers have it.
    chosen = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    table = pa.table({"prompt": ["x", "y", "z"], "chosen": chosen, "rejected": ["b", "b", "b"]})
    pq.write_table(table, tmp_path / "p.parquet")
    found = collected(tmp_path / "p.parquet")
    assert (len(found.pairs), reasons(found)) == (2, [(2, "unreadable")])


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("p.jsonl.gz", b"no gzip", {}, "not a whole gzip file"),
        ("p.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff", {}, "not a whole gzip file"),
        ("p.json", b"[1, 2", {}, "not a JSON list"),
        ("p.parquet", b"PAR1 broken", {}, "not a readable Parquet file"),
        ("p.csv", b"prompt,chosen,chosen\nx,a,b\n", {}, 'column names twice, such as "chosen"'),
        ("p.csv", b"\xff\xfe", {}, "not UTF-8"),
        ("p.gz", b"", {}, 'unknown ending ".gz"'),
        ("p.txt", b"", {}, 'unknown ending ".txt"'),
        ("p.jsonl", b'{"a": 1}\n', {}, 'no column "chosen", which layout = "columns" needs; it has a'),
        ("p.jsonl", b'{"chosen": 1, "rejected": 1}\n', {"group_column": "who"}, 'no column "who"'),
        ("p.jsonl", b'{"a": 1}\n', {"layout": "persona"}, 'no column "answer_matching_behavior"'),
        ("p.jsonl", b'{"a": 1}\n', {"layout": "annotators"}, 'no column "response_a"'),
        ("gone/p.jsonl", None, {}, "does not exist"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, settings: dict[str, object], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        collected(tmp_path / name, **settings)
    assert "\n" not in str(caught.value)
