import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value, load_dataset

from storage import views
from storage.catalog import query
from storage.errors import LakeError, ViewError
from storage.lake import DatasetRef, Lake
from storage.layouts import LAYOUTS
from storage.schema import to_table
from storage.views import Selection, ViewRows, first_rows, write_view
from storage.writer import Provenance, Shard
from tests.storage.rows import dialogue, prompt, publish

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
LAST = {"role": "user", "content": "And p0?"}
GOOD, BAD = {"role": "assistant", "content": "6"}, {"role": "assistant", "content": "7"}
PROMPT = [SYSTEM, FIRST, REPLY, LAST]
SINGLE: dict[str, object] = {"prompt": [LAST]}

GOLDEN: dict[str, list[dict[str, object]]] = {
    "trl": [
        {
            "prompt": PROMPT,
            "chosen": [GOOD],
            "rejected": [BAD],
            "prompt_id": "p0",
            "group": "child",
            "score_chosen": 1.5,
            "score_rejected": -0.5,
        }
    ],
    "trl_kto": [
        {"prompt": PROMPT, "completion": [GOOD], "label": True, "prompt_id": "p0", "group": "child"},
        {"prompt": PROMPT, "completion": [BAD], "label": False, "prompt_id": "p0", "group": "child"},
    ],
    "prompts": [
        {
            "prompt": [{"role": "user", "content": "question p0"}],
            "prompt_id": "p0",
            "group": "child",
            "reference": None,
        }
    ],
    "ultrafeedback": [
        {
            "prompt": "2 + 2?",
            "prompt_id": "p0",
            "chosen": [*PROMPT, GOOD],
            "rejected": [*PROMPT, BAD],
            "messages": [*PROMPT, GOOD],
            "score_chosen": 1.5,
            "score_rejected": -0.5,
        }
    ],
    "openrlhf": [{"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD]}],
    "open_instruct": [
        {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD], "prompt_id": "p0", "group": "child"},
    ],
    "nemo_rl": [
        {
            "context": PROMPT,
            "completions": [{"rank": 0, "completion": [GOOD]}, {"rank": 1, "completion": [BAD]}],
        }
    ],
    "llama_factory": [
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "gpt", "value": "4"},
                {"from": "human", "value": "And p0?"},
            ],
            "chosen": {"from": "gpt", "value": "6"},
            "rejected": {"from": "gpt", "value": "7"},
            "system": "Be brief.",
        }
    ],
    # md5("p0") starts with 5: the chosen answer comes first.
    "argilla": [
        {
            "id": "p0",
            "fields": {"prompt": PROMPT, "response_1": "6", "response_2": "7"},
            "metadata": {"group": "child", "score_1": 1.5, "score_2": -0.5},
            "suggestions": {"preferred": {"value": "response_1", "agent": "winnow"}},
        }
    ],
    "text": [{"prompt": "And p0?", "chosen": "6", "rejected": "7", "prompt_id": "p0", "group": "child"}],
}
WRITABLE = [(name, suffix) for name, layout in LAYOUTS.items() for suffix in layout.suffixes]


def _published(lake: Lake, name: str) -> DatasetRef:
    table = LAYOUTS[name].table
    one = {"prompts": prompt(), "preferences": dialogue(**(SINGLE if name == "text" else {}))}
    return publish(lake, table, [one[table]])


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake.open(str(tmp_path / "lake"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_in_every_layout(lake: Lake, name: str) -> None:
    assert first_rows(lake, _published(lake, name), Selection(name), 3) == GOLDEN[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_statement_of_a_layout_runs_in_a_query(lake: Lake, name: str) -> None:
    _published(lake, name)
    result = query(lake, LAYOUTS[name].sql)
    assert [dict(zip(result.columns, row, strict=True)) for row in result.rows] == GOLDEN[name]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves its JSON and CSV files open
@pytest.mark.parametrize(("name", "suffix"), WRITABLE)
def test_a_written_view_loads_with_datasets(lake: Lake, tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    written = write_view(lake, _published(lake, name), Selection(name), path)
    kind = {".jsonl": "json"}.get(suffix, suffix[1:])
    # CSV has no types: without these options the answer "6" would become a number, and "NA" nothing.
    texts = Features({column: Value("string") for column in written.columns})
    options = {"features": texts, "keep_default_na": False} if suffix == ".csv" else {}
    loaded = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"), **options)
    assert loaded.to_list() == GOLDEN[name]
    assert (written.n_rows, written.columns) == (len(GOLDEN[name]), loaded.column_names)
    assert {entry.name for entry in tmp_path.iterdir()} == {f"rows{suffix}", "cache", "lake"}


def test_rows_keep_the_order_of_the_lake_across_batches_and_shards(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "BATCH_ROWS", 3)
    ids = [f"p{i:02d}" for i in range(20)]
    rows = [dialogue(prompt_id) for prompt_id in ids]
    ref = publish(lake, "preferences", rows[:7], rows[7:])
    assert write_view(lake, ref, Selection("trl_kto"), tmp_path / "rows.parquet").n_rows == 40
    assert pq.read_table(tmp_path / "rows.parquet")["prompt_id"].to_pylist() == [one for one in ids for _ in range(2)]


def test_only_the_group_and_the_split_that_were_asked_for(lake: Lake, tmp_path: Path) -> None:
    writer = lake.writer("prompts", "demo", "0123456789ab")
    for split in ("train", "test"):
        rows = [prompt(f"{split}-{group}", group) for group in ("child", "clerk")]
        writer.write(Shard("prompts", split, 0, 1), to_table("prompts", rows))
    ref = writer.commit(Provenance("ingest", {}, {}, {}, "winnow"))
    path = tmp_path / "rows.jsonl"
    write_view(lake, ref, Selection("prompts", split="train", group="clerk"), path)
    assert [json.loads(line)["prompt_id"] for line in path.read_text().splitlines()] == ["train-clerk"]
    with pytest.raises(ViewError, match="has the splits test, train; choose one with --split"):
        write_view(lake, ref, Selection("prompts"), path)
    with pytest.raises(ViewError, match='no split "valid"; its splits: test, train'):
        write_view(lake, ref, Selection("prompts", split="valid"), path)
    with pytest.raises(ViewError, match="has no such rows; its groups: child, clerk"):
        write_view(lake, ref, Selection("prompts", split="test", group="auditor"), path)


UNFIT: list[tuple[str, dict[str, object], str]] = [
    ("text", {}, "the prompt is more than one user turn"),
    ("text", {"prompt": [SYSTEM, LAST]}, "the prompt is more than one user turn"),
    ("llama_factory", {"prompt": [LAST, LAST]}, "must alternate"),
    ("llama_factory", {"prompt": [FIRST, REPLY]}, "must alternate"),
    ("llama_factory", {"prompt": [FIRST, SYSTEM, LAST]}, "must alternate"),
    ("llama_factory", {"chosen": [GOOD, LAST, GOOD]}, "an answer has more than one turn"),
    ("nemo_rl", {"rejected": [BAD, LAST, BAD]}, "an answer has more than one turn"),
    ("ultrafeedback", {"prompt": [SYSTEM, {"role": "tool", "content": "12"}]}, "the prompt has no user turn"),
    ("ultrafeedback", {"score_chosen": math.nan}, "a score is not a finite number"),
    ("trl", {"score_rejected": -math.inf}, "a score is not a finite number"),
    ("argilla", {"rejected": []}, "an answer has more than one turn"),
    ("trl_kto", {"chosen": [{"role": "assistant", "content": None}]}, "a turn has no role or no content"),
    ("openrlhf", {"prompt": [{"role": None, "content": "hi"}]}, "a turn has no role or no content"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), UNFIT)
def test_rows_that_a_layout_cannot_carry_are_refused_or_counted(
    lake: Lake, tmp_path: Path, name: str, changes: dict[str, object], reason: str
) -> None:
    fitting = dialogue("p1", **(SINGLE if name == "text" else {}))
    ref = publish(lake, "preferences", [dialogue("p0", **changes), fitting])
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ViewError, match=f"cannot carry 1 rows.*{reason}") as caught:
        write_view(lake, ref, Selection(name), path)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lake"]
    written = write_view(lake, ref, Selection(name, skip_unfit=True), path)
    assert list(written.unfit.values()) == [1]
    assert written.n_rows == len(path.read_text().splitlines()) == (2 if name == "trl_kto" else 1)


def test_a_view_of_nothing_but_unfit_rows_is_refused_even_when_they_may_be_skipped(lake: Lake, tmp_path: Path) -> None:
    ref = publish(lake, "preferences", [dialogue()])
    with pytest.raises(ViewError, match="can carry none of 1 rows"):
        write_view(lake, ref, Selection("text", skip_unfit=True), tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("parquet", "x.jsonl", 'format "parquet" is unknown; formats: trl, trl_kto'),
        ("trl", "x.csv", "written to files that end in .parquet, .jsonl, .json"),
        ("argilla", "x.parquet", "written to files that end in .json, .jsonl"),
        ("trl", "x", "written to files that end in"),
        ("prompts", "x.jsonl", "has no table prompts, which this format needs; give a prompts/NAME"),
        ("trl", "nowhere/x.json", "cannot be written"),
        ("trl", "folder.json", "is not a plain file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    lake: Lake, tmp_path: Path, name: str, file: str, message: str
) -> None:
    ref = publish(lake, "preferences", [dialogue()])
    (tmp_path / "folder.json").mkdir()
    with pytest.raises((ViewError, LakeError), match=message) as caught:
        write_view(lake, ref, Selection(name), tmp_path / file)
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"lake", "folder.json"}


def test_a_table_that_lies_one_step_back_is_named(lake: Lake) -> None:
    writer = lake.writer("preferences", "demo", "0123456789ab")
    writer.write(Shard("preferences", "train", 0, 1), to_table("preferences", [dialogue()]))
    ref = writer.commit(Provenance("assemble", {}, {"prompts": "prompts/demo@aaaaaaaaaaaa"}, {}, "winnow"))
    with pytest.raises(ViewError, match="give prompts/demo@aaaaaaaaaaaa, which it was made from"):
        ViewRows(lake, ref, Selection("prompts"))


def test_a_failed_view_leaves_the_older_file(lake: Lake, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("older")
    ref = publish(lake, "preferences", [dialogue(), dialogue("p1", score_chosen=math.nan)])
    with pytest.raises(ViewError):
        write_view(lake, ref, Selection("trl"), path)
    assert path.read_text() == "older"


HOSTILE = ["a'; DROP TABLE preferences; --", 'b"; SELECT 1; --', "$group", "new\nline", "", "\u202eright", "é" * 300]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_hostile_groups_and_texts_are_values_and_nothing_else(lake: Lake, tmp_path: Path, suffix: str) -> None:
    rows = [dialogue(f"p{i}", text, prompt=[{"role": "user", "content": text}]) for i, text in enumerate(HOSTILE)]
    ref = publish(lake, "preferences", rows)
    for text in HOSTILE:
        path = tmp_path / f"rows{suffix}"
        assert write_view(lake, ref, Selection("text", group=text), path).n_rows == 1
        (row,) = _read(path)
        assert (row["group"], row["prompt"]) == (text, text)
        counted = query(lake, 'SELECT COUNT(DISTINCT "group") FROM preferences').rows
        assert counted == [(len(HOSTILE),)]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        return iter(pq.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        return (json.loads(line) for line in path.read_text().split("\n") if line)
    with path.open(newline="") as file:
        return iter(list(csv.DictReader(file)))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_very_long_text_arrives_whole(lake: Lake, tmp_path: Path, suffix: str) -> None:
    text = "0123456789é\n" * 1_000_000
    ref = publish(lake, "preferences", [dialogue(prompt=[{"role": "user", "content": text}])])
    path = tmp_path / f"rows{suffix}"
    write_view(lake, ref, Selection("text"), path)
    csv.field_size_limit(2**31 - 1)
    assert next(_read(path))["prompt"] == text


def _broken(ref: DatasetRef, change: Any) -> None:
    shard = Path(ref.uri) / "preferences" / "train-00001-of-00002.parquet"
    changed = change(pq.read_table(shard))
    shard.unlink()
    if isinstance(changed, bytes):
        shard.write_bytes(changed)
    elif changed is not None:
        pq.write_table(changed, shard)


def _no_unicode(rows: pa.Table) -> pa.Table:
    bad = pa.array([b"\xff\xfe"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 1, bad.buffers())
    place = rows.schema.get_field_index("prompt_id")
    return rows.set_column(place, rows.schema.field(place), texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: None, "train-00001-of-00002.parquet is missing"),
        (lambda rows: b"PAR1 half", "is damaged"),
        (lambda rows: rows.drop_columns(["score_chosen"]), "train-00001-of-00002.parquet is damaged"),
        (lambda rows: rows.append_column("more", pa.array([1])), "is damaged"),
        (lambda rows: rows.set_column(5, "score_chosen", pa.array(["x"])), "is damaged"),
        (_no_unicode, "is damaged"),
    ],
)
def test_a_missing_damaged_or_drifted_shard_is_one_line(lake: Lake, tmp_path: Path, change: Any, message: str) -> None:
    ref = publish(lake, "preferences", [dialogue("p0")], [dialogue("p1")])
    _broken(ref, change)
    with pytest.raises(LakeError, match=message) as caught:
        write_view(lake, ref, Selection("trl"), tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(ref))
    assert [entry.name for entry in tmp_path.iterdir()] == ["lake"]
