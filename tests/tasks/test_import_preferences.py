"""The import as a stage: what is published, what it is called, and what can follow it."""

import json
import shutil
from pathlib import Path

import pytest

from runtime.models import load_policy
from storage.catalog import query
from storage.lake import DatasetRef, Lake
from storage.verify import verify
from tasks import evaluate, finetune
from tasks.errors import ConfigError, InputError
from tasks.import_preferences import import_preferences, prepare
from tasks.settings import EvaluateConfig, FinetuneConfig, ImportConfig
from tests.tasks.importers.helpers import user, write_rows


def _publish(source: Path, root: Path, **settings: object) -> tuple[Lake, DatasetRef]:
    config = ImportConfig.model_validate({"name": "human", "source": str(source)} | settings)
    return Lake.open(str(root)), import_preferences.fn(prepare(config), str(root))


def _rows(n: int = 60) -> list[dict[str, object]]:
    return [{"prompt": f"{i // 2}?", "chosen": "yes", "rejected": f"no {i}", "group": "abc"[i % 3]} for i in range(n)]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, DatasetRef]:
    """A lake with 60 pairs of 30 prompts, a bad row, and a pair that another one of its group contradicts."""
    folder = tmp_path_factory.mktemp("import")
    extra = [
        {"prompt": "", "chosen": "x", "rejected": "y", "group": "a"},
        {"prompt": "0?", "chosen": "no 0", "rejected": "yes", "group": "a"},
    ]
    path = write_rows(folder / "p.jsonl", [*_rows(), *extra])
    return _publish(path, folder / "lake", test_share=0.3, license="mit")


def test_pairs_prompts_and_rejected_rows_are_published_with_their_lineage(imported: tuple[Lake, DatasetRef]) -> None:
    lake, ref = imported
    manifest = lake.manifest(ref)
    assert (ref.kind, ref.name, manifest.stage) == ("preferences", "human", "import")
    assert manifest.inputs["prompts"] == str(lake.resolve("prompts/human"))
    assert manifest.inputs["source"].startswith("sha256:")
    stats = manifest.stats
    assert stats["rows"] == 62 and stats["rejected"] == {"empty_prompt": 1} and stats["contradictions"] == 1
    assert (stats["pairs"], stats["test_pairs"]) == tuple(
        lake.read_table(ref, "preferences", split).num_rows for split in ("train", "test")
    )
    pairs = lake.read_table(ref, "preferences").to_pylist()
    assert len(pairs) == 61
    assert all(pair["score_margin"] is pair["chosen_index"] is pair["n_votes"] is None for pair in pairs)
    assert [row["reason"] for row in lake.read_table(ref, "rejected").to_pylist()] == ["empty_prompt"]
    assert [verdict.problem for verdict in verify(lake, ref)] == [None] * 3
    card = (Path(ref.uri) / "README.md").read_text()
    assert 'license: "mit"' in card and "- preference" in card and "synthetic" not in card


def test_no_prompt_is_in_both_splits(imported: tuple[Lake, DatasetRef]) -> None:
    lake, ref = imported
    ids = [set(lake.read_table(ref, "preferences", split)["prompt_id"].to_pylist()) for split in ("train", "test")]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    prompts = lake.resolve("prompts/human")
    for split, wanted in zip(("train", "test"), ids, strict=True):
        assert set(lake.read_table(prompts, "prompts", split)["prompt_id"].to_pylist()) == wanted


def test_a_prompt_of_two_groups_keeps_all_its_pairs_and_is_there_once(imported: tuple[Lake, DatasetRef]) -> None:
    lake, ref = imported
    ids = lake.read_table(lake.resolve("prompts/human"), "prompts")["prompt_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 30
    per_prompt: dict[str, set[str]] = {}
    for pair in lake.read_table(ref, "preferences").to_pylist():
        per_prompt.setdefault(pair["prompt_id"], set()).add(pair["group"])
    twice = {prompt_id for prompt_id, groups in per_prompt.items() if len(groups) > 1}
    others = lake.read_table(lake.resolve("prompts/human"), "rejected").to_pylist()
    assert len(twice) == 30
    assert {(row["prompt_id"], row["reason"]) for row in others} == {(p, "duplicate_in_other_group") for p in twice}


def test_the_views_show_groups_of_pairs_without_scores(imported: tuple[Lake, DatasetRef]) -> None:
    lake, _ = imported
    rows = query(lake, 'SELECT "group", pairs, mean_margin FROM groups ORDER BY "group"').rows
    assert rows == [("a", 21, None), ("b", 20, None), ("c", 20, None)]


def test_datasets_loads_both_splits(imported: tuple[Lake, DatasetRef], tmp_path: Path) -> None:
    import datasets

    lake, ref = imported
    loaded = datasets.load_dataset(ref.uri, cache_dir=str(tmp_path))
    for split in ("train", "test"):
        assert loaded[split].to_list() == lake.read_table(ref, "preferences", split).to_pylist()


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_model_is_trained_on_the_train_split_of_an_import(
    imported: tuple[Lake, DatasetRef], tmp_path: Path, tiny_policy_dir: Path, method: str
) -> None:
    root = str(tmp_path / "lake")
    shutil.copytree(imported[0].root, root)
    lake, ref = Lake.open(root), imported[1]
    config = FinetuneConfig.model_validate(
        {"name": "human", "preferences": "preferences/human", "model": str(tiny_policy_dir), "method": method}
        | {"epochs": 1, "threads": 1}
    )
    model = finetune.finetune.fn(finetune.prepare(config, lake), root)
    stats = lake.manifest(model).stats
    assert stats["pairs"] == lake.manifest(ref).stats["pairs"] < 61
    assert isinstance(stats["groups"], dict) and set(stats["groups"]) == {"a", "b", "c"}
    trained, base = (load_policy(path).model for path in (str(lake.folder(model, "model")), str(tiny_policy_dir)))
    assert any((a != b).any() for a, b in zip(trained.parameters(), base.parameters(), strict=True))


def test_training_where_every_pair_is_held_out_says_so(tmp_path: Path, tiny_policy_dir: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", _rows(3))
    lake, _ = _publish(path, tmp_path / "lake", test_share=0.999)
    config = FinetuneConfig(name="human", model=str(tiny_policy_dir), threads=1)
    with pytest.raises(ConfigError, match="has no pair to train on; lower test_share"):
        finetune.finetune.fn(finetune.prepare(config, lake), lake.root)


def test_the_held_out_prompts_of_an_import_can_be_answered(
    imported: tuple[Lake, DatasetRef], tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    root = str(tmp_path / "lake")
    shutil.copytree(imported[0].root, root)
    lake, policy = Lake.open(root), str(tiny_policy_dir)
    config = EvaluateConfig.model_validate(
        {"name": "human", "before": policy, "after": policy, "reward_model": str(tiny_reward_dir), "truth": "none"}
        | {"samples": 1, "max_new_tokens": 4, "threads": 1}
    )
    step = evaluate.prepare(config, lake)
    n_heldout = lake.read_table(lake.resolve("prompts/human"), "prompts", "test").num_rows
    assert evaluate.answer.fn(step, root, "before") == n_heldout > 0


def test_equal_inputs_are_one_version_and_the_same_bytes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", _rows())
    refs = [_publish(path, tmp_path / name)[1] for name in ("one", "two")]
    assert refs[0].version == refs[1].version
    shards = [sorted(Path(ref.uri).rglob("*.parquet")) for ref in refs]
    assert len(shards[0]) == 3
    assert [file.read_bytes() for file in shards[0]] == [file.read_bytes() for file in shards[1]]


OTHERS: dict[str, object] = {
    "name": "other",
    "format": "jsonl",
    "dataset_split": "test",
    "files": "*.jsonl",
    "layout": "hh_rlhf",
    "votes": "each",
    "choices_a": ["x"],
    "choices_b": ["y"],
    "choices_tie": ["z"],
    "max_pairs_per_group": 3,
    "min_agreement": 0.75,
    "min_margin": 1.0,
    "min_confidence": 0.5,
    "test_share": 0.4,
    "seed": 1,
}
LAYOUTS = {
    **dict.fromkeys(("votes", "choices_a", "choices_b", "choices_tie", "min_agreement"), "annotators"),
    **dict.fromkeys(("answer_a_column", "answer_b_column", "choice_column", "annotator_column"), "annotators"),
    "min_confidence": "persona",
}


@pytest.mark.parametrize("field", [name for name in ImportConfig.model_fields if name != "source"])
def test_every_field_is_part_of_the_version(tmp_path: Path, field: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", _rows())
    base: dict[str, object] = {"source": str(path), "layout": LAYOUTS.get(field, "columns")}
    changes = {field: OTHERS.get(field, "text")}
    if field.startswith("score_"):
        base |= {"score_chosen_column": "s", "score_rejected_column": "s"}
    versions = {prepare(ImportConfig.model_validate(values)).version for values in (base, base | changes)}
    assert len(versions) == 2


def test_the_bytes_and_the_names_of_a_source_are_part_of_the_version(tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "a.jsonl", tmp_path / "two" / "a.jsonl"
    for path in (first, second):
        write_rows(path, _rows(2))

    def version(**settings: object) -> str:
        return prepare(ImportConfig.model_validate({"source": str(tmp_path)} | settings)).inputs["source"]

    before = version()
    assert version(files="a.jsonl") == before  # the same files
    second.rename(second.with_name("b.jsonl"))
    renamed = version()
    write_rows(first, _rows(3))
    assert len({before, renamed, version(), version(files="a.jsonl")}) == 4


def test_a_quota_keeps_the_same_pairs_whatever_their_order(tmp_path: Path) -> None:
    kept = []
    for name, rows in (("a", _rows()), ("b", _rows()[::-1])):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        lake, ref = _publish(path, tmp_path / name, max_pairs_per_group=5)
        assert lake.manifest(ref).stats["rejected"] == {"quota": 45}
        kept.append(sorted(row["rejected"][0]["content"] for row in lake.read_table(ref, "preferences").to_pylist()))
    assert kept[0] == kept[1]
    lake, ref = _publish(tmp_path / "a.jsonl", tmp_path / "a", max_pairs_per_group=5, seed=1)
    assert sorted(r["rejected"][0]["content"] for r in lake.read_table(ref, "preferences").to_pylist()) != kept[0]


def test_scores_and_votes_reach_the_table(tmp_path: Path) -> None:
    rows = [{"prompt": [user("x")], "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1.5}]
    lake, ref = _publish(write_rows(tmp_path / "p.jsonl", rows), tmp_path / "lake")
    (row,) = lake.read_table(ref, "preferences").to_pylist()
    assert (row["score_chosen"], row["score_rejected"], row["score_margin"]) == (3.0, 1.5, 1.5)
    judged = {"prompt": "x", "response_a": "a", "response_b": "b", "group": "g"}
    votes = [judged | {"annotator": str(i), "choice": "aab"[i]} for i in range(3)]
    lake, ref = _publish(write_rows(tmp_path / "v.jsonl", votes), tmp_path / "lake", layout="annotators")
    (row,) = lake.read_table(ref, "preferences").to_pylist()
    assert (row["n_votes"], row["agreement"], row["annotator"], row["strategy"]) == (3, 2 / 3, None, "majority")
    assert lake.manifest(ref).stats["judgements"] == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "gives no pair; most often: the source is empty"),
        (["{"], "gives no pair; most often: unreadable"),
        ([{"chosen": "a", "rejected": "b"}], 'set prompt_column, or layout = "hh_rlhf"'),
    ],
)
def test_a_source_without_a_pair_is_one_line_and_leaves_no_lake(
    tmp_path: Path, rows: list[object], message: str
) -> None:
    path = write_rows(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError) as caught:
        _publish(path, tmp_path / "lake")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "lake").exists()


def test_a_missing_source_and_an_empty_folder_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="source is empty; give a file"):
        prepare(ImportConfig())
    with pytest.raises(InputError, match=r'no file like "\*" with an ending out of .jsonl'):
        prepare(ImportConfig(source=str(tmp_path)))
    with pytest.raises(ConfigError, match='files = "/x" is not a pattern below the folder'):
        prepare(ImportConfig(source=str(tmp_path), files="/x"))
