"""Reports of small lakes, read back as a browser would."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import JsonValue

from storage.errors import ExtraError, LakeError, RefError
from storage.lake import DatasetRef, Lake
from storage.report.page import Report, build_report
from storage.report.pictures import main_picture, stage_pictures
from storage.report.svg import png
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import candidate, metric, preference, prompt, rejected, training

pytest.importorskip("matplotlib", reason="reports need the extra `report`")

HOSTILE = '<script>alert("x")</script>&amp;"\' onload=x $\\frac{ _a \x00\x07\u202e</style>'
VOID = {"meta", "link", "br", "img", "hr", "input"}
MANY = 30

Rows = Mapping[tuple[str, str], Sequence[dict[str, object]]]


class Page(HTMLParser):
    """All elements with their attributes, the text of each kind of element, and whether every one is closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, tag: str) -> list[str]:
        return [text for name, text in self.text if name == tag]


def _publish(
    lake: Lake,
    place: tuple[str, str, str],
    rows: Rows,
    inputs: Mapping[str, str] | None = None,
    stats: Mapping[str, JsonValue] | None = None,
) -> DatasetRef:
    """A version from (kind, stage, version), with one shard per table and split."""
    kind, stage, version = place
    writer = lake.writer(kind, "demo", version)
    for (table, split), found in rows.items():
        writer.write(Shard(table, split, 0, 1), to_table(table, found))
    return writer.commit(Provenance(stage, {"name": "demo"}, inputs or {}, stats or {}, f"winnow {stage}"))


def _answers(groups: Sequence[str], n: int = 8) -> Iterator[dict[str, object]]:
    """Candidates of four prompts per group: half are cut, and later scores follow earlier ones."""
    draw = random.Random(0)
    for number, group in enumerate(groups):
        for place in range(4):
            for index in range(n):
                score = draw.gauss(number, 2.0)
                cut = [{"n_tokens": 4, "score": score + draw.gauss(0, 1), "kept": index % 2 == 0}]
                common = {"group": group, "cuts": cut, "response": f"answer {index} of {group}"}
                key = f"p{number}-{place}"
                if index % 2:
                    yield candidate(key, index, None, n_tokens=4, finish_reason="cut", cut_at_token=4, **common)
                else:
                    yield candidate(key, index, score, n_tokens=10 + index, **common)


def _chain(lake: Lake, groups: Sequence[str] = ("child", "clerk")) -> dict[str, DatasetRef]:
    """prompts, candidates, pairs, a model and its evaluation."""
    ids = [(f"p{number}-{place}", group) for number, group in enumerate(groups) for place in range(4)]
    prompts = _publish(
        lake,
        ("prompts", "ingest", "a" * 12),
        {
            ("prompts", "train"): [prompt(key, group) for key, group in ids],
            ("rejected", "train"): [rejected(group=group, reason="duplicate") for group in (*groups, None)],
        },
    )
    scored = _publish(
        lake,
        ("candidates", "score", "b" * 12),
        {("candidates", "train"): list(_answers(groups))},
        {"prompts": str(prompts), "reward": "sha256:1"},
    )
    report = [
        {"group": group, "prompts": 4, "candidates": 32, "pairs": 4, "mean_margin": 1.5, "dropped": {"tie": 0}}
        for group in groups
    ]
    pairs = _publish(
        lake,
        ("preferences", "assemble", "c" * 12),
        {
            ("preferences", "train"): [preference(key, g, score_margin=i / 3) for i, (key, g) in enumerate(ids)],
            ("rejected", "train"): [rejected(group=groups[0]), rejected("p8", groups[0], "margin")],
        },
        {"candidates": str(scored), "prompts": str(prompts)},
        {"pairs": len(ids), "groups": report},  # type: ignore[dict-item]
    )
    model = _publish(
        lake,
        ("models", "finetune", "d" * 12),
        {("training", "train"): [training(i, name, 1 / i) for i in range(1, 9) for name in ("loss", "nll")]},
        {"preferences": str(pairs)},
        {"groups": {group: {"pairs": 4, "accuracy": 1.0} for group in groups}},
    )
    metrics = [
        metric(which, group, name, value)
        for which, value in (("before", 0.25), ("after", 0.75))
        for group in ("all", *groups)
        for name in ("classifier", "truth")
    ]
    evaluation = _publish(
        lake,
        ("candidates", "evaluate", "e" * 12),
        {
            ("candidates", "before"): [candidate("p0-0", 0, 0.1, group=groups[0])],
            ("candidates", "after"): [candidate("p0-0", 0, 0.9, group=groups[0])],
            ("metrics", "test"): metrics,
        },
        {"after": str(model), "prompts": str(prompts)},
    )
    return {"prompts": prompts, "candidates": scored, "preferences": pairs, "models": model, "evaluation": evaluation}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake.open(str(tmp_path_factory.mktemp("report") / "lake"))
    _chain(lake)
    return lake


def _report(lake: Lake, text: str) -> Report:
    return build_report(lake, lake.resolve(text))


EXPECTED = {
    "prompts/demo": (["Dropped rows", "Prompts"], ["drops", "prompt-lengths"]),
    f"candidates/demo@{'b' * 12}": (["Answers"], ["scores", "partial", "tokens", "lengths"]),
    "preferences/demo": (
        ["Pairs", "Answers", "Dropped rows"],
        ["margins", "scores", "partial", "tokens", "lengths", "drops"],
    ),
    "models/demo": (["Held-out metrics", "Training", "Groups in training"], ["before-after", "training-0"]),
    f"candidates/demo@{'e' * 12}": (["Held-out metrics", "Answers"], ["before-after", "scores", "lengths"]),
}


@pytest.mark.parametrize("text", EXPECTED)
def test_a_report_has_its_sections_and_every_picture_says_what_it_shows(lake: Lake, text: str) -> None:
    made = _report(lake, text)
    sections, pictures = EXPECTED[text]
    # The evaluation's answers carry the cuts of the test row.
    assert [key for key in made.pictures if (key, text) != ("partial", f"candidates/demo@{'e' * 12}")] == pictures
    assert made.sections == sections
    page = Page(made.html)
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(made.pictures)
    drawn = page.all("svg")
    assert len(drawn) == len(made.pictures)
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in drawn)
    assert page.words("h2") == ["Summary", *sections, "Lineage", "Configuration"]


@pytest.mark.parametrize("text", EXPECTED)
def test_a_report_asks_for_nothing_outside_itself(lake: Lake, text: str) -> None:
    page = Page(_report(lake, text).html)
    assert not page.all("script") and not page.all("link") and not page.all("img") and not page.all("iframe")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href"):
                assert value is not None and value.startswith("#") and value[1:] in ids
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.startswith("#") and target[1:] in ids
    style = "".join(page.words("style"))
    assert "@import" not in style and "url(" not in style
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_colour_of_a_picture_follows_the_page_into_the_dark(lake: Lake) -> None:
    html = _report(lake, "preferences/demo").html
    body = html[html.index("<body>") :]
    assert re.findall(r"(?:fill|stroke|color): ?#", body) == []
    light, dark = (set(re.findall(r"(--[0-9a-f]{6}):", part)) for part in html.split("@media", 2)[:2])
    assert light == dark
    assert set(re.findall(r"var\((--[0-9a-f]{6})\)", html)) <= light


def test_a_report_is_the_same_every_time(lake: Lake) -> None:
    assert _report(lake, "preferences/demo") == _report(lake, "preferences/demo")


def test_figures_of_the_page_are_those_of_the_rows(lake: Lake) -> None:
    page = Page(_report(lake, f"candidates/demo@{'b' * 12}").html)
    alts = {svg["aria-label"] or "" for svg in page.all("svg")}
    # 16 finished answers of 10, 12, 14 and 16 tokens and 16 cut at 4 per group.
    assert any("child: 272 decoded, 144 saved (35%)" in alt for alt in alts)
    assert any("at 4 tokens: r = " in alt and "32 answers, 32 of them drawn" in alt for alt in alts)
    cells = page.words("td")
    assert cells[cells.index("child") : cells.index("child") + 4] == ["child", "4", "32", "16"]


def test_pairs_and_answers_are_shown_side_by_side(lake: Lake) -> None:
    page = Page(_report(lake, "preferences/demo").html)
    titles = page.words("h5")
    assert titles[:2] == ["chosen, score 1", "rejected, score 0"]
    assert {"right", "wrong", "question p0-0"} <= set(page.words("pre"))
    answers = Page(_report(lake, f"candidates/demo@{'b' * 12}").html)
    assert any(text.startswith("best, score") for text in answers.words("h5"))
    assert "question p0-0" in answers.words("pre")
    assert "From prompts to pairs" in page.words("caption")


def test_the_lineage_leads_back_to_the_prompts(lake: Lake) -> None:
    codes = Page(_report(lake, "models/demo").html).words("code")
    expected = [f"{name}@{version * 12}" for name, version in (("preferences/demo", "c"), ("candidates/demo", "b"))]
    assert [*expected, f"prompts/demo@{'a' * 12}", "sha256:1"] == [
        text for text in codes if "@" in text or ":" in text
    ][-5:][:4]


def test_hostile_groups_and_texts_are_shown_as_text(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    refs = _chain(lake, (HOSTILE, "$x$", "_hidden", "\u4eba\u6c11"))
    for ref in refs.values():
        page = Page(build_report(lake, ref).html)
        assert not page.all("script")
        assert len(page.all("style")) == 1
        assert not [name for _, found in page.elements for name in found if name.startswith("on")]
        assert any("<script>alert" in text for _, text in page.text)


def test_text_that_turns_its_direction_leaves_what_stands_beside_it_alone(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    page = Page(build_report(lake, _chain(lake, ("\u202eevil",))["preferences"]).html)
    assert page.words("bdi") and not any("\u202e" in text for text in page.words("h4"))


def test_more_groups_than_colours_are_counted_and_said(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    refs = _chain(lake, [f"group {number:02d}" for number in range(MANY)])
    page = Page(build_report(lake, refs["candidates"]).html)
    assert any(f"The 6 largest of {MANY} groups; the table has all." in text for text in page.words("p"))
    assert set(page.words("td")) >= {f"group {number:02d}" for number in range(MANY)}


def test_reports_of_empty_tables_say_so(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    cases: list[tuple[tuple[str, str, str], Rows, str]] = [
        (("prompts", "ingest", "a" * 12), {("prompts", "train"): []}, "There are no prompts."),
        (("candidates", "score", "b" * 12), {("candidates", "train"): []}, "No answer has a finite score."),
        (("preferences", "assemble", "c" * 12), {("preferences", "train"): []}, "There are no pairs."),
        (("models", "finetune", "d" * 12), {("training", "train"): []}, "The training log is empty."),
        (("preferences", "assemble", "e" * 12), {("rejected", "train"): []}, "No row was dropped."),
    ]
    for place, rows, said in cases:
        made = build_report(lake, _publish(lake, place, rows))
        assert made.pictures == []
        assert said in Page(made.html).words("p")


def test_scores_that_are_no_numbers_are_left_out_of_pictures_and_counted_as_missing(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    odd = [float("nan"), float("inf"), None]
    rows = [
        candidate("p0", i, score, cuts=[{"n_tokens": 2, "score": score, "kept": True}]) for i, score in enumerate(odd)
    ]
    alone = build_report(lake, _publish(lake, ("candidates", "score", "a" * 12), {("candidates", "train"): rows}))
    assert alone.pictures == ["tokens"]
    assert "No answer has a finite score." in Page(alone.html).words("p")
    rows.append(candidate("p0", 9, 2.5))
    one = build_report(lake, _publish(lake, ("candidates", "score", "b" * 12), {("candidates", "train"): rows}))
    assert one.pictures == ["scores", "partial", "tokens", "lengths"]
    page = Page(one.html)
    assert any("child: 1, most often 2.5 to" in (svg["aria-label"] or "") for svg in page.all("svg"))
    headings, cells = page.words("th"), page.words("td")
    assert cells[headings.index("scored")] == "1"


def test_without_matplotlib_the_command_that_installs_it_is_named(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.report.style.find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"plots need matplotlib.*pip install 'winnow\[report\]'"):
        _report(lake, "preferences/demo")


def test_a_damaged_or_missing_shard_is_one_line(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    ref = _chain(lake)["preferences"]
    shard = next(Path(ref.uri).glob("preferences/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(LakeError, match="is damaged .*; remove that version and run again") as caught:
        build_report(lake, ref)
    assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(LakeError, match="is missing"):
        build_report(lake, ref)


def test_what_is_not_published_has_no_report(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    with pytest.raises(RefError, match="is not in the lake"):
        build_report(lake, lake.ref("prompts", "demo", "a" * 12))


@pytest.mark.parametrize(
    ("name", "key"),
    [("prompts", "prompt-lengths"), ("candidates", "scores"), ("preferences", "margins"), ("models", "training-0")]
    + [("evaluation", "before-after")],
)
def test_the_main_picture_of_a_stage_is_a_small_png(name: str, key: str, tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    picture = main_picture(lake, _chain(lake)[name])
    assert picture is not None
    assert picture.key == key
    data = png(picture)
    assert data.startswith(b"\x89PNG")
    assert len(data) < 100_000


def test_groups_have_curves_of_held_out_pairs_where_there_were_looks(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    rows = [training(step, "loss", 0.5, group) for step in (1, 2) for group in ("a", "b")]
    rows += [training(step, "weight", 0.1 * step, "a") for step in (1, 2)]
    held_out = [training(step, "loss", 9.0 + step, group, True) for step in (1, 2) for group in ("a", "b")]
    for version, shown in (("a" * 12, rows), ("b" * 12, [*rows, *held_out])):
        ref = _publish(lake, ("models", "finetune", version), {("training", "train"): shown})
        (picture,) = [one for one in stage_pictures(lake, ref) if one.key == "group-curves"]
        first, last = ("10", "11") if version[0] == "b" else ("0.5", "0.5")
        assert f"loss of a: {first} to {last}; loss of b: {first} to {last}" in picture.alt
        assert "weight of a: 0.1 to 0.2" in picture.alt
    alone = [row for row in rows if row["group"] == "a"]
    ref = _publish(lake, ("models", "finetune", "c" * 12), {("training", "train"): alone})
    assert "group-curves" not in [one.key for one in stage_pictures(lake, ref)]


def test_an_on_policy_training_shows_truth_reward_and_divergence_over_its_looks(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    log = [training(step, name, 0.1 * step) for step in (1, 2, 3) for name in ("loss", "reward", "kl")]
    looks = [
        training(step, name, value + step, group, True)
        for step in (0, 3)
        for group in (None, "a")
        for name, value in (("truth", 0.25), ("reward", 1.0), ("kl", 0.5), ("tokens", 9.0))
    ]
    seen = _publish(lake, ("models", "align", "a" * 12), {("training", "train"): [*log, *looks]})
    first, *others = stage_pictures(lake, seen)
    assert (first.key, [one.key for one in others]) == ("answer-curves", ["training-0"])
    assert first.title == "Answers in training: truth, reward, KL"
    assert "truth of all: 0.25 to 3.25; truth of a: 0.25 to 3.25; reward of all: 1 to 4" in first.alt
    assert _report(lake, str(seen)).pictures == ["answer-curves", "training-0"]
    unseen = _publish(lake, ("models", "align", "b" * 12), {("training", "train"): log})
    picture = main_picture(lake, unseen)
    assert picture is not None
    assert "reward of all: 0.1 to 0.3; KL of all: 0.1 to 0.3" in picture.alt
