"""Cards, against golden files (delete one and run this test to accept a change) and as `datasets` reads them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from pydantic import JsonValue

from storage.card import render_card
from storage.histogram import histogram
from storage.lake import DatasetRef, FileEntry, Lake, Manifest
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import candidate, metric, preference, prompt, rejected, training

GOLDEN = Path(__file__).parent / "golden_cards"
VERSIONS = {"prompts": "a" * 12, "generate": "b" * 12, "score": "c" * 12, "preferences": "d" * 12, "models": "e" * 12}
HOSTILE = "a|b`<script>alert(1)</script>\n# title [x](http://x)"


def _manifest(kind: str, stage: str, version: str, **values: object) -> Manifest:
    fields: dict[str, object] = {"config": {}, "inputs": {}, "stats": {}, "command": f"winnow {stage}", "files": ()}
    made = datetime(2026, 1, 1, tzinfo=UTC)
    place = {"kind": kind, "name": "demo", "version": version, "stage": stage, "created_at": made}
    return Manifest.model_validate({**place, "schema_version": 1, **fields, **values})


def _file(table: str, split: str, rows: int) -> FileEntry:
    path = f"{table}/{split}-00000-of-00001.parquet"
    return FileEntry(path=path, sha256="0" * 64, size_bytes=1, rows=rows, table=table, split=split)


def _family(group: str = "child", license: str | None = "cc-by-4.0", language: str | None = "en, de") -> list[Manifest]:
    """Prompts, candidates, scored candidates, preferences and a model, each made from the one before."""
    cuts: dict[str, JsonValue] = {
        "candidates": 4,
        "cut": 1,
        "tokens_decoded": 30,
        "tokens_saved_estimate": 10,
        "share_saved_estimate": 0.25,
    }
    scores = {"edges": [0.0, 0.5, 1.0], "counts": {group: [1, 2]}}
    found = [
        _manifest(
            "prompts",
            "ingest",
            VERSIONS["prompts"],
            config={"license": license, "language": language},
            inputs={"source": "sha256:1"},
            stats={"rows": 3, "rejected": {"duplicate": 1}, "groups": [{"group": group, "prompts": 2}]},
            files=(_file("prompts", "train", 2), _file("prompts", "test", 0), _file("rejected", "train", 1)),
        )
    ]
    found.append(
        _manifest(
            "candidates",
            "generate",
            VERSIONS["generate"],
            inputs={"prompts": found[-1].label, "model": "sha256:2", "calibration": "candidates/gone@0123456789ab"},
            stats=cuts | {"groups": [{"group": group, **cuts}]},
            files=(_file("candidates", "train", 4),),
        )
    )
    found.append(
        _manifest(
            "candidates",
            "score",
            VERSIONS["score"],
            inputs={"candidates": found[-1].label, "prompts": found[0].label, "reward": "sha256:3"},
            stats={"scored": 3, "score_histogram": scores, "groups": [{"group": group, "mean_score": 0.123456789}]},
            files=(_file("candidates", "train", 4_000),),
        )
    )
    report = {"group": group, "prompts": 2, "candidates": 4, "pairs": 1, "mean_margin": 0.5, "dropped": {"tie": 1}}
    found.append(
        _manifest(
            "preferences",
            "assemble",
            VERSIONS["preferences"],
            inputs={"candidates": found[-1].label, "prompts": found[0].label},
            stats={"pairs": 1, "groups": [report], "prompts_without_pair": {"tie": 1}},
            files=(_file("preferences", "train", 1_000_000), _file("rejected", "train", 1)),
        )
    )
    found.append(
        _manifest(
            "models",
            "finetune",
            VERSIONS["models"],
            inputs={"preferences": found[-1].label, "model": "sha256:2"},
            stats={"groups": {group: {"pairs": 1, "accuracy": 1.0}}},
            files=(_file("training", "train", 5),),
        )
    )
    return found


def _card(family: list[Manifest], place: int) -> str:
    return render_card(family[place], {one.label: one for one in family[:place]})


def _front(card: str) -> dict[str, object]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("place", "stage"), list(enumerate(["ingest", "generate", "score", "assemble", "finetune"])))
def test_the_cards_are_the_golden_ones(place: int, stage: str) -> None:
    shown, golden = _card(_family(), place), GOLDEN / f"{stage}.md"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(shown)
    assert shown == golden.read_text(), f"a card changed: look at it, then delete {golden.name} to accept"


@pytest.mark.parametrize("place", range(4))
def test_a_license_and_languages_of_the_prompts_reach_all_that_is_made_of_them(place: int) -> None:
    front = _front(_card(_family(), place))
    assert (front["license"], front["language"]) == ("cc-by-4.0", ["de", "en"])


@pytest.mark.parametrize("place", range(5))
def test_what_is_not_stated_is_absent_and_said_so(place: int) -> None:
    card = _card(_family(license=None, language=None), place)
    front = _front(card)
    assert "license" not in front
    assert "language" not in front
    assert "\nlicense: not stated\n" in card
    assert "\nlanguage: not stated\n" in card


def test_a_model_does_not_take_the_license_of_the_prompts() -> None:
    assert "license" not in _front(_card(_family(), 4))


def test_without_its_ancestors_a_card_says_so_and_claims_no_license() -> None:
    card = render_card(_family()[2], {})
    assert "license: not stated" in card
    assert f"`candidates/demo@{VERSIONS['generate']}` (not in this lake)" in card


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (10_000, "10K<n<100K"), (999_999, "100K<n<1M")]
    + [(1_000_000, "1M<n<10M"), (10**9 - 1, "100M<n<1B"), (10**9, "n>1B")],
)
def test_the_size_category_counts_rows_of_the_main_table(rows: int, category: str) -> None:
    files = (_file("preferences", "train", rows), _file("rejected", "train", 5_000))
    assert _front(render_card(_manifest("preferences", "assemble", "a" * 12, files=files)))["size_categories"] == [
        category
    ]


@pytest.mark.parametrize("place", range(5))
def test_hostile_text_stays_text(place: int) -> None:
    family = _family(group=HOSTILE, license=f'x"\ntags: [evil] {HOSTILE}')
    family[place] = family[place].model_copy(update={"command": f"winnow ```\n{HOSTILE}"})
    card = _card(family, place)
    assert "evil" not in str(_front(card).get("tags"))
    outside = "".join(card.split("````")[::2])
    outside = "".join(part for index, part in enumerate(outside.split("```")) if index % 2 == 0)
    body = outside.split("---\n", 2)[2]
    assert "<script" not in body
    assert "\n# title" not in body
    assert "[x](" not in body


def test_a_histogram_has_round_edges_and_counts_every_finite_value_once() -> None:
    scores = [0.1, 0.2, 0.3, 0.3, 0.95, None, float("nan"), float("inf")]
    rows = [candidate(f"p{i}", 0, score, group="ab"[i % 2]) for i, score in enumerate(scores)]
    found = histogram(to_table("candidates", rows), "score")
    assert found is not None
    assert found.edges[:3] == [0.1, 0.15, 0.2]
    assert found.totals[:5] == [1, 0, 1, 0, 2]
    assert sum(found.totals) == 5
    assert {group: sum(counts) for group, counts in found.counts.items()} == {"a": 3, "b": 2}


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e308, -1e308], [1e-300, 2e-300], [3.0, 3.0 + 1e-12]])
def test_a_histogram_of_odd_values_still_counts_all_of_them(values: list[float]) -> None:
    rows = [candidate(f"p{i}", 0, value) for i, value in enumerate(values)]
    found = histogram(to_table("candidates", rows), "score")
    assert found is not None
    assert sum(found.totals) == len(values)
    assert found.edges == sorted(set(found.edges))


def test_a_histogram_of_nothing_finite_is_none() -> None:
    rows = [candidate("p0", 0, None), candidate("p1", 0, float("nan"))]
    assert histogram(to_table("candidates", rows), "score") is None


def _publish_every_kind(lake: Lake) -> list[tuple[DatasetRef, dict[str, dict[str, int]]]]:
    """One version of each kind, with the configs, splits and numbers of rows that `datasets` should find."""
    tables: list[tuple[str, str, dict[tuple[str, str], list[dict[str, object]]]]] = [
        ("prompts", "ingest", {("prompts", "train"): [prompt()], ("prompts", "test"): [prompt("p1")]}),
        ("candidates", "score", {("candidates", "train"): [candidate(), candidate(index=1)]}),
        (
            "candidates",
            "evaluate",
            {
                ("candidates", "before"): [candidate()],
                ("candidates", "after"): [candidate()],
                ("metrics", "test"): [metric()],
            },
        ),
        ("preferences", "assemble", {("preferences", "train"): [preference()]}),
        ("models", "finetune", {("training", "train"): [training()]}),
    ]
    found = []
    for place, (kind, stage, shards) in enumerate(tables):
        writer = lake.writer(kind, "demo", f"{place:012d}")
        configs: dict[str, dict[str, int]] = {}
        for (table, split), rows in shards.items():
            writer.write(Shard(table, split, 0, 1), to_table(table, rows))
            configs.setdefault(table, {})[split] = len(rows)
        writer.write(Shard("rejected", "train", 0, 1), to_table("rejected", [rejected()]))
        found.append((writer.commit(Provenance(stage, {}, {}, {}, "winnow")), configs))
    return found


def test_datasets_loads_every_kind_of_version_by_its_card(tmp_path: Path) -> None:
    import datasets

    for ref, configs in _publish_every_kind(Lake.open(str(tmp_path / "lake"))):
        assert sorted(datasets.get_dataset_config_names(ref.uri)) == sorted(configs)
        for config, splits in configs.items():
            loaded = datasets.load_dataset(ref.uri, config, cache_dir=str(tmp_path / "cache" / ref.version))
            assert {split: rows.num_rows for split, rows in loaded.items()} == splits
        default = datasets.load_dataset(ref.uri, cache_dir=str(tmp_path / "cache" / ref.version))
        assert sorted(default) == sorted(next(iter(configs.values())))


def test_a_card_in_the_lake_knows_the_license_of_its_prompts(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    writer = lake.writer("prompts", "demo", "a" * 12)
    writer.write(Shard("prompts", "train", 0, 1), to_table("prompts", [prompt()]))
    prompts = writer.commit(Provenance("ingest", {"license": "mit", "language": "en"}, {}, {}, "winnow"))
    other = lake.writer("candidates", "demo", "b" * 12)
    other.write(Shard("candidates", "train", 0, 1), to_table("candidates", [candidate()]))
    ref = other.commit(Provenance("generate", {}, {"prompts": str(prompts)}, {}, "winnow"))
    assert _front((Path(ref.uri) / "README.md").read_text())["license"] == "mit"


def test_a_damaged_ancestor_does_not_stop_a_version_from_being_published(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    lake.store.create(f"prompts/demo/{'a' * 12}/manifest.json", b"{")
    writer = lake.writer("candidates", "demo", "b" * 12)
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", [candidate()]))
    ref = writer.commit(Provenance("generate", {}, {"prompts": f"prompts/demo@{'a' * 12}"}, {}, "winnow"))
    assert f"`prompts/demo@{'a' * 12}` (not in this lake)" in (Path(ref.uri) / "README.md").read_text()
