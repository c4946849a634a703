"""`winnow compare` as a flow under Prefect and as a command."""

import json
from base64 import b64decode
from pathlib import Path

import pytest

from storage.lake import Lake
from tasks.errors import ConfigError
from tasks.settings import PipelineConfig
from tests.flows.test_cli import _run as run_command
from tests.tasks.test_chain import run_chain


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, tiny_policy_dir: Path) -> dict[str, object]:
    """A pipeline on tiny models, with held-out pairs and a comparison of two methods."""
    source = tmp_path_factory.mktemp("source") / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}?", "group": "ab"[i % 2]}) + "\n" for i in range(14)))
    reward = {"reward": "likelihood", "reward_model": str(tiny_policy_dir), "threads": 1}
    finetune = {"model": str(tiny_policy_dir), "epochs": 1, "batch_size": 4, "threads": 1, "report_to": "none"}
    return {
        "name": "flow",
        "ingest": {"source": str(source), "heldout_fraction": 0.3},
        "generate": reward | {"model": str(tiny_policy_dir), "n": 4, "max_new_tokens": 8, "cut_policy": "none"},
        "score": reward,
        "assemble": {"test_share": 0.5},
        "finetune": finetune,
        "evaluate": reward | {"samples": 1, "max_new_tokens": 8, "truth": "none"},
        "compare": {"methods": ["dpo", "gr_dpo step_size=0.5"], "seeds": [0]},
    }


@pytest.fixture
def lake(values: dict[str, object], tmp_path: Path) -> Lake:
    """A lake with its pairs."""
    return run_chain(PipelineConfig.model_validate(values), str(tmp_path / "lake"), until="assemble")


@pytest.mark.timeout(300)
def test_the_flow_shows_the_table_and_a_second_run_is_a_cache_hit(
    prefect_server: None, values: dict[str, object], lake: Lake
) -> None:
    from prefect.client.orchestration import get_client

    from flows.cli_compare import compared
    from flows.compare import compare

    config = compared(PipelineConfig.model_validate(values))
    ref = compare(config, lake.root)
    manifests = {m.label: m.created_at for m in lake.manifests()}
    assert str(ref) in manifests
    assert {label.partition("@")[0] for label in manifests} >= {"models/flow-dpo"}
    assert compare(config, lake.root) == ref
    assert {m.label: m.created_at for m in lake.manifests()} == manifests
    with get_client(sync_client=True) as client:
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts(limit=200)}
    shown = json.loads(str(artifacts["models-flow-compare-table"].data))
    assert {"figure", "group", "dpo", "gr_dpo step_size=0.5"} == set(shown[0])
    assert any(row["figure"] == "accuracy" and row["group"] == "worst" for row in shown)
    assert "models-flow-compare-image" in artifacts or "models-flow-compare-comparison" in artifacts
    # Every training shows its learning curves, and those of the groups.
    for key in ("models-flow-dpo-training-0", "models-flow-dpo-group-curves"):
        image = str(artifacts[key].data)
        assert artifacts[key].type == "image" and image.startswith("data:image/png;base64,")
        assert b64decode(image.partition(",")[2]).startswith(b"\x89PNG")


@pytest.mark.timeout(300)
def test_a_failing_method_is_named_and_what_the_others_have_finished_stays(
    prefect_server: None, values: dict[str, object], lake: Lake
) -> None:
    from flows.cli_compare import compared
    from flows.compare import compare

    broken = values | {"compare": {"methods": ["dpo", "ipo length_norm=sum max_length=3"], "seeds": [0]}}
    with pytest.raises(ConfigError, match="compare: ipo length_norm=sum max_length=3, seed 0: no pair is left"):
        compare(compared(PipelineConfig.model_validate(broken)), lake.root)
    assert lake.find("models", "flow-dpo") is not None
    assert lake.find("models", "flow-compare") is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_prints_a_table_or_one_json_object(values: dict[str, object], lake: Lake, tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    file.write_text("\n".join(_toml(values)))
    home = {"PREFECT_HOME": str(tmp_path / "prefect")}
    shown = run_command("compare", str(file), "--lake", lake.root, **home)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("models/flow-compare@")
    assert lines[2].split()[:3] == ["figure", "group", "dpo"]
    assert any(line.split()[:2] == ["accuracy", "worst"] for line in lines)
    again = run_command("compare", str(file), "--json", "--lake", lake.root, **home)
    found = json.loads(again.stdout)
    assert found["ref"] == lines[0]
    assert {figure["method"] for figure in found["stats"]["comparison"]} == {"dpo", "gr_dpo step_size=0.5"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('compare.methods=["dppo"]', 'methods has "dppo": begin with one of dpo'),
        ("compare.finetune.epochs=9", "compare.finetune is taken from [finetune]; set it there"),
        (f'name="{"n" * 30}"', "is too long to put methods behind"),
    ],
)
def test_a_mistake_is_one_line(values: dict[str, object], setting: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    file.write_text("\n".join(_toml(values)))
    home = str(tmp_path / "prefect")
    done = run_command("compare", str(file), "--set", setting, "--lake", str(tmp_path / "lake"), PREFECT_HOME=home)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def _toml(values: dict[str, object]) -> list[str]:
    """Sections of plain values; JSON's strings, numbers and lists are TOML's too."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, section in values.items():
        if isinstance(section, dict):
            plain += [f"[{key}]", *(f"{inner} = {json.dumps(value)}" for inner, value in section.items())]
    return plain
