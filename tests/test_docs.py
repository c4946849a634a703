"""What docs/ shows is run: every statement of queries.md, every command of views.md."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from flows.cli import main
from storage.catalog import query
from storage.lake import Lake
from storage.layouts import LAYOUTS
from storage.views import Selection, ViewRows
from tests.storage.demo_lake import fill

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^## (?P<title>.+?)$.*?```sql\n(?P<sql>.+?)\n```\n\n```text\n(?P<shown>.+?)\n```", re.S | re.M)
EXAMPLES = [match.groupdict() for match in BLOCK.finditer((DOCS / "queries.md").read_text())]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake.open(str(tmp_path_factory.mktemp("docs") / "lake"))
    fill(lake)
    return lake


def test_no_statement_of_the_page_is_missed() -> None:
    page = (DOCS / "queries.md").read_text()
    assert len(EXAMPLES) == page.count("```sql") == page.count("\n## ") >= 10


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["title"])
def test_a_documented_query_gives_rows_under_the_documented_columns(lake: Lake, example: dict[str, str]) -> None:
    result = query(lake, example["sql"])
    header, *rows = example["shown"].splitlines()
    assert result.columns == header.split()
    assert rows and result.rows
    assert all(any(value is not None for value in row) for row in zip(*result.rows, strict=True))


def test_the_page_of_views_has_every_layout_with_its_columns_and_files(lake: Lake) -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+? \| ([\w, ]+) \| ([.\w ]+) \|$", (DOCS / "views.md").read_text(), re.M)
    assert [row[0] for row in rows] == list(LAYOUTS)
    for name, columns, files in rows:
        view = ViewRows(lake, lake.resolve(f"{LAYOUTS[name].table}/demo"), Selection(name, split="train"))
        assert view.schema.names == columns.split(", ")
        assert set(files.split()) == set(LAYOUTS[name].suffixes)


@pytest.mark.parametrize("page", ["views.md"])
def test_a_documented_command_runs_or_says_what_is_documented(
    lake: Lake, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WINNOW_LAKE", lake.root)
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"^    \$ winnow (.+)\n    (.+)$", (DOCS / page).read_text(), re.M)
    for command, answer in shown:
        monkeypatch.setattr(sys, "argv", ["winnow", *shlex.split(command)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, error = capsys.readouterr()
        assert stop.value.code == (2 if answer.startswith("error:") else 0), error
        assert _shape((error or out).strip().replace(str(tmp_path), "~/winnow")) == _shape(answer)
    assert len(shown) == (DOCS / page).read_text().count("    $ winnow ")


def _shape(text: str) -> str:
    """Versions and counts are the demo's."""
    return re.sub(r"\b[0-9a-f]{12}\b|\d+", "N", text)
