"""`winnow plan` with S3D: what it is worth here, and adapters that do not fit, each refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flows.cli import main
from flows.cli_demo import DEMO
from flows.config import validate
from runtime.decoding.s3d.files import CONFIG_NAME, WEIGHTS_NAME
from runtime.starter import s3d_path

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `winnow plan` with settings of the generate stage: exit code, output, messages."""
    (tmp_path / "config.toml").write_text('name = "x"\n[ingest]\nsource = "starter"\nmax_prompts = 4\n')

    def run(*options: str, **settings: str) -> tuple[int, str, str]:
        given = [part for key, value in settings.items() for part in ("--set", f"generate.{key}={value}")]
        arguments = ["plan", str(tmp_path / "config.toml"), "--lake", str(tmp_path / "lake"), *given, *options]
        monkeypatch.setattr("sys.argv", ["winnow", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            main()
        found = capsys.readouterr()
        return int(stopped.value.code or 0), found.out, found.err

    return run


def test_a_plan_shows_what_drafting_is_worth_by_rows(plan: Command) -> None:
    settings = {"s3d": "auto", "n": "2", "max_rows": "2"}
    code, text, _ = plan(**settings)
    lines = text.splitlines()
    assert code == 0
    [start] = [place for place, line in enumerate(lines) if line.startswith("S3D adds ")]
    assert lines[start + 1].split("  ")[0].strip() == "rows"
    assert [line.split()[0] for line in lines[start + 2 :] if line.strip()] == ["1", "2"]
    code, text, _ = plan("--json", **settings)
    found = json.loads(text)["s3d"]
    assert code == 0
    assert found["adapter_bytes"] > 0
    assert [set(one) for one in found["forecasts"]] == [{"rows", "k", "tokens_per_round", "break_even", "speedup"}] * 2
    assert json.loads(plan("--json")[1])["s3d"] is None


def test_the_demo_drafts_as_much_as_pays() -> None:
    assert validate(DEMO).generate.s3d == "auto"


def _edit(folder: Path, **values: object) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def _shrink(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_NAME)
    save_file(weights | {"mask_embeddings": weights["mask_embeddings"][:, 1:].contiguous()}, folder / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("damage", "s3d", "message"),
    [
        (lambda folder: _edit(folder, base_hash="ab" * 32), "auto", "was made for another model"),
        (lambda folder: None, '"5"', "k = 5, but the adapter was trained for k = 4"),
        (lambda folder: _edit(folder, n_first=5, n_last=4), "auto", "kept layers overlap: first 5 and last 4 of 8"),
        (lambda folder: _edit(folder, n_first=0, n_last=0), "auto", "keep at least one"),
        (_truncate, "auto", WEIGHTS_NAME),
        (lambda folder: (folder / CONFIG_NAME).write_text('{"k": 4'), "auto", "is not readable as JSON"),
        (_shrink, "auto", "mask_embeddings"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), "auto", WEIGHTS_NAME),
    ],
    ids=["base", "k", "overlap", "no layers", "truncated", "config", "sizes", "absent"],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    plan: Command, tmp_path: Path, damage: Callable[[Path], object], s3d: str, message: str
) -> None:
    folder = Path(shutil.copytree(s3d_path(), tmp_path / "adapter"))
    damage(folder)
    code, text, error = plan(s3d=s3d, s3d_adapter=str(folder))
    assert (code, text) == (2, "")
    assert error.startswith("error: ") and message in error
    assert len(error.strip().splitlines()) == 1


def test_an_adapter_for_a_model_of_other_sizes_is_one_line(plan: Command, tiny_policy_dir: Path) -> None:
    code, _, error = plan(s3d="auto", s3d_adapter=str(s3d_path()), model=str(tiny_policy_dir))
    assert code == 2
    assert "was made for another model" in error
    assert len(error.strip().splitlines()) == 1
