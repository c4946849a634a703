import csv
import gzip
import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.lake import Lake
from tasks.errors import ConfigError, InputError
from tasks.ingest import Ingested, clean, ingest, prepare
from tasks.ingest_readers import read_rows
from tasks.settings import IngestConfig


def _write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _clean(path: Path, **settings: object) -> Ingested:
    config = IngestConfig.model_validate({"source": str(path), "heldout_fraction": 0.0} | settings)
    return clean(read_rows(config), config)


def test_every_unusable_row_is_kept_with_its_reason(tmp_path: Path) -> None:
    lines: list[object] = [
        {"prompt": "good"},
        "{broken",
        "[1]",
        {"prompt": "   "},
        {"prompt": " good\n"},
        {"other": 1},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": []},
        {"prompt": "half a character: \ud800"},
        '{"prompt": "x", "number": ' + "9" * 5000 + "}",
    ]
    found = _clean(_write(tmp_path / "p.jsonl", lines))
    assert [row["messages"] for row in found.prompts["train"]] == [[{"role": "user", "content": "good"}]]
    reasons = [(row["row"], row["reason"]) for row in found.rejected]
    assert reasons == [
        (2, "unreadable"),
        (3, "unreadable"),
        (4, "empty_prompt"),
        (5, "duplicate"),
        (6, "missing_value"),
        (7, "bad_messages"),
        (8, "bad_messages"),
        (9, "missing_value"),
        (10, "unreadable"),
        (11, "unreadable"),
    ]
    assert found.n_rows == 11


def test_equal_text_in_other_unicode_form_is_one_prompt(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": unicodedata.normalize(form, "café")} for form in ("NFC", "NFD")]
    assert [row["reason"] for row in _clean(_write(tmp_path / "p.jsonl", rows)).rejected] == ["duplicate"]


def test_groups_come_from_a_column_a_constant_or_rules(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": "fix my code", "who": "dev"}, {"prompt": "tell a joke", "who": ""}]
    path = _write(tmp_path / "p.jsonl", rows)
    by_column = _clean(path, group_column="who")
    assert [row["group"] for row in by_column.prompts["train"]] == ["dev"]
    assert [row["reason"] for row in by_column.rejected] == ["no_group"]
    assert {row["group"] for row in _clean(path, group_constant="us").prompts["train"]} == {"us"}
    by_rules = _clean(path, group_rules=["code=dev", "joke|pun=fun"])
    assert [row["group"] for row in by_rules.prompts["train"]] == ["dev", "fun"]
    assert {row["group"] for row in _clean(path).prompts["train"]} == {"all"}


def test_the_same_prompt_in_two_groups_is_kept_once_and_said(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": "x", "group": "a"}, {"prompt": "x", "group": "b"}]
    assert [row["reason"] for row in _clean(_write(tmp_path / "p.jsonl", rows)).rejected] == [
        "duplicate_in_other_group"
    ]


def test_a_prompt_keeps_its_split_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": f"question {i}"} for i in range(200)]
    whole = _clean(_write(tmp_path / "a.jsonl", rows), heldout_fraction=0.3)
    part = _clean(_write(tmp_path / "b.jsonl", rows[::3]), heldout_fraction=0.3)
    test_ids = {row["prompt_id"] for row in whole.prompts["test"]}
    assert 30 < len(test_ids) < 90
    assert {row["prompt_id"] for row in part.prompts["test"]} <= test_ids


def test_prompts_above_a_limit_are_counted(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": f"question {i}"} for i in range(10)]
    found = _clean(_write(tmp_path / "p.jsonl", rows), max_prompts=4)
    assert len(found.prompts["train"]) == 4
    assert found.n_over_limit == {"train": 6}


def test_jsonl_json_csv_parquet_and_a_datasets_folder_give_the_same_prompts(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": f"question, {i}", "group": "g", "reference": str(i)} for i in range(5)]
    _write(tmp_path / "p.jsonl", rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "p.parquet")
    (tmp_path / "folder").mkdir()
    pq.write_table(table, tmp_path / "folder" / "train.parquet")
    with (tmp_path / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "group", "reference"])
        writer.writeheader()
        writer.writerows(rows)  # type: ignore[arg-type]
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    names = ("p.jsonl", "p.jsonl.gz", "p.json", "p.csv", "p.parquet", "folder")
    found = [_clean(tmp_path / name).prompts["train"] for name in names]
    stripped = [[{k: v for k, v in row.items() if k != "source"} for row in each] for each in found]
    assert len(stripped[0]) == 5
    assert all(each == stripped[0] for each in stripped)


def test_the_starters_prompts_come_in_three_uneven_groups() -> None:
    config = IngestConfig(max_prompts=100)
    groups = [row["group"] for row in clean(read_rows(config), config).prompts["train"]]
    assert groups.count("child") > groups.count("clerk") > groups.count("auditor") > 0


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("gone.jsonl", None, {}, "does not exist"),
        ("p.parquet", b"PAR1 broken", {}, "not a readable Parquet file"),
        ("p.csv", b"\xff\xfe\x00", {}, "not UTF-8"),
        ("p.xyz", b"x", {}, "unknown ending"),
        ("p.jsonl", b'{"prompt": "x"}\n', {"group_column": "who"}, 'no column "who"; it has prompt'),
        ("p.jsonl", b'{"prompt": "x"}\n', {"prompt_column": "text"}, 'no column "text"; it has prompt'),
        ("p.jsonl", b'{"prompt": ""}\n', {}, "no usable prompt: empty_prompt"),
        ("p.jsonl", b"", {}, "no usable prompt: the source is empty"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line_and_leaves_no_lake(
    tmp_path: Path, name: str, content: bytes | None, settings: dict[str, object], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    config = IngestConfig.model_validate({"source": str(tmp_path / name)} | settings)
    with pytest.raises(InputError, match=message) as caught:
        ingest.fn(prepare(config), str(tmp_path / "lake"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "lake").exists()


def test_a_broken_group_rule_is_named() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        clean([], IngestConfig(group_rules=["(=x"]))


def test_rejected_rows_are_in_the_lake(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": ""}])
    config = IngestConfig(source=str(path), heldout_fraction=0.0)
    ref = ingest.fn(prepare(config), str(tmp_path / "lake"))
    lake = Lake.open(str(tmp_path / "lake"))
    assert lake.read_table(ref, "rejected")["reason"].to_pylist() == ["empty_prompt"]
    assert lake.manifest(ref).stats["rejected"] == {"empty_prompt": 1}
