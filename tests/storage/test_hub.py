"""Pushes by the command line to a small hub on this machine, and the folder that would be uploaded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import ExtraError, HubError, RefError
from storage.hub import Target, push
from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.hub_server import TOKEN, Hub, running_hub
from tests.storage.rows import preference, rejected

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as found:
        yield found


def _publish(lake: Lake, version: str, n_shards: int) -> DatasetRef:
    writer = lake.writer("preferences", "demo", version)
    for index in range(n_shards):
        rows = to_table("preferences", [preference(f"p{index}")])
        writer.write(Shard("preferences", "train", index, n_shards), rows)
    writer.write(Shard("rejected", "train", 0, 1), to_table("rejected", [rejected()]))
    plots = Path(lake.root).parent / "plots"
    plots.mkdir(exist_ok=True)
    (plots / "picture.png").write_bytes(b"png")
    writer.add_tree(plots, "plots")
    return writer.commit(Provenance("assemble", {}, {}, {}, "winnow assemble"))


def _push(hub: Hub, lake: Lake, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    home = {"HF_HOME": str(hub.folder / "home"), "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "flows.cli", "push", *arguments, "--lake", lake.root, "--json"]
    variables = os.environ | home | quiet
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=100)


def test_a_pushed_version_loads_and_replaces_the_one_before(hub: Hub, tmp_path: Path) -> None:
    import datasets

    lake = Lake.open(str(tmp_path / "lake"))
    first, second = _publish(lake, "a" * 12, 3), _publish(lake, "b" * 12, 1)
    done = _push(hub, lake, str(first), "me/pairs")
    assert done.returncode == 0, done.stderr
    shards = [f"preferences/train-0000{i}-of-00003.parquet" for i in range(3)]
    rest = ["rejected/train-00000-of-00001.parquet"]
    assert hub.files("me/pairs") == ["README.md", "manifest.json", *shards, *rest]
    assert json.loads(done.stdout)["files"] == hub.files("me/pairs")
    done = _push(hub, lake, str(second), "me/pairs")
    assert done.returncode == 0, done.stderr
    assert hub.files("me/pairs") == ["README.md", "manifest.json", "preferences/train-00000-of-00001.parquet", *rest]
    loaded = datasets.load_dataset(str(hub.folder / "me/pairs/main"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["prompt_id"] == ["p0"]


def test_a_revision_is_a_branch_of_its_own(hub: Hub, tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = _publish(lake, "a" * 12, 1)
    done = _push(hub, lake, str(ref), "me/pairs", "--revision", "next", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.files("me/pairs") == []
    assert "manifest.json" in hub.files("me/pairs", "next")
    assert hub.private["me/pairs"] is True


def test_nothing_private_goes_to_a_dataset_that_is_public_already(hub: Hub, tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = _publish(lake, "a" * 12, 1)
    hub.private["me/pairs"] = False
    (hub.folder / "me/pairs/main").mkdir(parents=True)
    done = _push(hub, lake, str(ref), "me/pairs", "--private")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'error: "me/pairs" is public already; make it private there' in done.stderr
    assert hub.files("me/pairs") == []


@pytest.mark.parametrize(("name", "token"), [("me/pairs", "hf_wrong"), ("not a name", TOKEN)])
def test_a_refused_push_is_one_line_without_the_token(name: str, token: str, hub: Hub, tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    done = _push(hub, lake, str(_publish(lake, "a" * 12, 1)), name, token=token)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f'"{name}" cannot be pushed to' in done.stderr
    assert token not in done.stderr + done.stdout


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = _publish(lake, "a" * 12, 1)
    with running_hub(tmp_path / "hub") as gone:
        pass
    done = _push(gone, lake, str(ref), "me/pairs")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "check the name, the network and your token" in done.stderr


def _never(folder: Path, target: Target, message: str) -> tuple[str, str]:
    raise AssertionError("nothing may be uploaded")


def test_damaged_versions_are_not_uploaded(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = _publish(lake, "a" * 12, 2)
    shard = next(Path(ref.uri).glob("preferences/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(HubError, match=r"train-0000\d-of-00002.parquet is not what the manifest lists"):
        push(lake, ref, Target("me/pairs"), _never)


def test_unpublished_versions_and_models_are_refused(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    writer = lake.writer("prompts", "demo", "c" * 12)
    with pytest.raises(RefError, match="is not in the lake"):
        push(lake, writer.ref, Target("me/x"), _never)
    model = lake.writer("models", "demo", "d" * 12).commit(Provenance("finetune", {}, {}, {}, "winnow"))
    with pytest.raises(HubError, match="push takes prompts, candidates, preferences"):
        push(lake, model, Target("me/x"), _never)


def test_without_huggingface_hub_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = _publish(lake, "a" * 12, 1)
    monkeypatch.setattr("storage.hub.find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"pip install 'winnow\[hub\]'"):
        push(lake, ref, Target("me/x"))


def test_the_uploaded_folder_is_the_version_byte_for_byte(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = _publish(lake, "a" * 12, 2)
    found: dict[str, bytes] = {}

    def collect(folder: Path, target: Target, message: str) -> tuple[str, str]:
        assert (target, message) == (Target("me/pairs"), str(ref))
        found.update({f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()})
        return "url", "commit"

    pushed = push(lake, ref, Target("me/pairs"), collect)
    assert pushed.files == sorted(found)
    assert not any(path.startswith("plots/") for path in found)
    assert all((Path(ref.uri) / path).read_bytes() == data for path, data in found.items())
