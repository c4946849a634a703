import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import SchemaError
from storage.lake import Lake
from storage.schema import checked, to_table
from storage.writer import Provenance, Shard
from tests.storage.assembly.pairs import build_pairs
from tests.storage.rows import candidate, prompt

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("n_tokens", 1.5),
        ("n_tokens", 2**40),
        ("n_tokens", True),
        ("token_ids", ["a"]),
        ("cuts", "x"),
        ("response", b"\xff"),
        ("response", "\ud800"),
        ("score", "high"),
    ],
)
def test_a_value_that_does_not_fit_names_its_column(column: str, value: object) -> None:
    with pytest.raises(SchemaError, match=f'column "{column}" must be') as caught:
        to_table("candidates", [candidate(**{column: value})])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("cuts", pa.array(["x"])),
        ("token_ids", pa.array([1])),
        ("n_tokens", pa.array([2**40])),
        ("response", pa.array([{"a": 1}])),
        ("response", pa.array([b"\xff"])),
    ],
)
def test_a_column_that_cannot_be_cast_is_refused(column: str, values: pa.Array) -> None:
    table = to_table("candidates", [candidate()])
    with pytest.raises(SchemaError):
        checked("candidates", table.set_column(table.schema.get_field_index(column), column, values))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(texts, st.lists(st.integers(0, 2**31 - 1)), st.none() | st.floats(allow_nan=False))))
def test_rows_survive_the_way_through_a_shard(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, list[int], float | None]]
) -> None:
    rows = [candidate("p", i, score, response=text, token_ids=ids) for i, (text, ids, score) in enumerate(drawn)]
    lake = Lake.open(str(tmp_path_factory.mktemp("lake")))
    writer = lake.writer("candidates", "demo", "0123456789ab")
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", rows))
    ref = writer.commit(Provenance("generate", {}, {}, {}, "winnow"))
    assert lake.read_table(ref, "candidates").to_pylist() == rows


@pytest.mark.parametrize("kind", ["prompts", "preferences"])
def test_every_main_table_is_what_datasets_loads_by_default(tmp_path: Path, kind: str) -> None:
    import datasets

    prompts = to_table("prompts", [prompt("p0"), prompt("p1")])
    answers = [candidate(f"p{i}", j, float(j)) for i in range(2) for j in range(2)]
    pairs = build_pairs(to_table("candidates", answers), prompts)
    lake = Lake.open(str(tmp_path / "lake"))
    writer = lake.writer(kind, "demo", "0123456789ab")
    data = {"prompts": prompts, "preferences": pairs.preferences}[kind]
    writer.write(Shard(kind, "train", 0, 2), data.slice(0, 1))
    writer.write(Shard(kind, "train", 1, 2), data.slice(1))
    writer.write(Shard(kind, "test", 0, 1), data.slice(0, 0))
    writer.write(Shard("rejected", "train", 0, 1), pairs.rejected)
    ref = writer.commit(Provenance("x", {"license": "mit: yes"}, {}, {}, "winnow"))
    loaded = datasets.load_dataset(ref.uri, cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 2}
    assert loaded["train"].column_names == data.schema.names
    assert loaded["train"].to_list() == data.to_pylist()


def test_storage_needs_neither_torch_nor_prefect() -> None:
    script = """
import importlib, pkgutil, sys
import storage
for module in pkgutil.walk_packages(storage.__path__, "storage."):
    importlib.import_module(module.name)
assert not {"torch", "transformers", "prefect", "runtime", "tasks", "flows", "datasets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
