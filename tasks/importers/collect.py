"""Rows of a source to distinct pairs; whatever gives no pair is a rejected row with its reason."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tasks.errors import InputError
from tasks.importers.layouts import group_of, needed_columns, parse_row
from tasks.importers.records import Judgement, Pair
from tasks.importers.sources import SourceRow
from tasks.importers.votes import Count, count_votes, winner
from tasks.ingest_readers import Unreadable
from tasks.messages import Unusable
from tasks.rows import rejected_row
from tasks.settings_import import ImportConfig

STAGE = "import"


@dataclass(slots=True)
class Collected:
    """Pairs in the order of the source, rows of `rejected`, and what was counted on the way."""

    pairs: list[Pair] = field(default_factory=list)
    rejected: list[dict[str, object]] = field(default_factory=list)
    rows_per_file: Counter[str] = field(default_factory=Counter)
    n_judgements: int = 0

    def reject(self, reason: str, detail: str, about: Pair | Judgement) -> None:
        """Keep why there is no pair, where that is not about one row."""
        self.rejected.append(rejected_row(STAGE, reason, detail, about.group) | {"prompt_id": about.prompt_id})


def collect(rows: Iterable[SourceRow], config: ImportConfig) -> Collected:
    """Parse, count votes, drop doubles, and keep margin and quota, in this order."""
    found = Collected()
    columns: set[str] = set()
    seen: dict[object, str] = {}
    judgements: list[Judgement] = []
    for source in rows:
        found.rows_per_file[source.file] += 1
        about: Pair | Judgement | None = None
        group = None
        try:
            if isinstance(source.row, Unreadable):
                raise Unusable("unreadable", source.row.detail)
            columns.update(source.row)
            group = group_of(source.row, config, source.file_group)
            about = parse_row(source.row, config, group)
            place = f"{source.file} row {source.number}".strip()
            _refuse_double(about, place, seen)
            if isinstance(about, Judgement):
                judgements.append(about)
            else:
                _refuse_margin(about, config)
                found.pairs.append(about)
        except Unusable as error:
            reason, detail = error.args
            row = rejected_row(STAGE, reason, f"{source.file}: {detail}" if source.file else detail, group)
            prompt_id = about.prompt_id if about else None
            found.rejected.append(row | {"row": source.number, "prompt_id": prompt_id})
    _check_columns(columns, config)
    found.n_judgements = len(judgements)
    _vote(found, judgements, config)
    _keep_quota(found, config)
    return found


def contradictions(pairs: Sequence[Pair]) -> int:
    """How many pairs are in one group both ways round."""
    keys = {pair.key for pair in pairs}
    return sum((p, g, b, a) in keys for p, g, a, b in keys) // 2


def _refuse_double(about: Pair | Judgement, place: str, seen: dict[object, str]) -> None:
    key = (about.key, about.annotator)
    if key in seen:
        what = "this annotator has judged the pair" if isinstance(about, Judgement) else "the pair is there"
        raise Unusable("duplicate", f"{what} in {seen[key]}")
    seen[key] = place


def _refuse_margin(pair: Pair, config: ImportConfig) -> None:
    """The same rule as in `assemble`: ties never pair."""
    if pair.margin == 0:
        raise Unusable("tie", f"both score {pair.score_chosen}")
    if pair.margin is not None and pair.margin <= config.min_margin:
        raise Unusable("margin", f"margin {round(pair.margin, 6)} is not above {config.min_margin}")


def _vote(found: Collected, judgements: Sequence[Judgement], config: ImportConfig) -> None:
    """Judgements of the same pair in the same group, counted; a group's opinion never hides another's."""
    together: defaultdict[object, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        together[judgement.key].append(judgement)
    for same in together.values():
        count = count_votes([judgement.choice for judgement in same])
        if config.votes == "majority":
            _take_majority(found, same[0], count, config.min_agreement)
            continue
        for judgement in same:
            _take_one(found, judgement, count)


def _take_majority(found: Collected, about: Judgement, count: Count, min_agreement: float) -> None:
    choice = winner(count, min_agreement)
    if choice is None:
        found.reject("tie" if count.first == count.second else "low_agreement", str(count), about)
    else:
        found.pairs.append(_voted(about, choice, count, None))


def _take_one(found: Collected, judgement: Judgement, count: Count) -> None:
    if judgement.choice is None:
        found.reject("tie", f"annotator {judgement.annotator} is for neither", judgement)
    else:
        found.pairs.append(_voted(judgement, judgement.choice, count, judgement.annotator))


def _voted(about: Judgement, choice: int, count: Count, annotator: str | None) -> Pair:
    return Pair(
        about.prompt_id,
        about.messages,
        about.group,
        chosen=about.answers[choice],
        rejected=about.answers[1 - choice],
        strategy="majority" if annotator is None else "annotator",
        n_votes=count.n_votes,
        agreement=count.agreement(choice),
        annotator=annotator,
    )


def _keep_quota(found: Collected, config: ImportConfig) -> None:
    """At most so many pairs per group; which ones depends on the pairs and the seed, not on their order."""
    if config.max_pairs_per_group is None:
        return
    per_group: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in found.pairs:
        per_group[pair.group].append(pair)
    kept: set[int] = set()
    for pairs in per_group.values():
        kept.update(
            id(pair) for pair in sorted(pairs, key=lambda p: _draw(p, config.seed))[: config.max_pairs_per_group]
        )
    for pair in found.pairs:
        if id(pair) not in kept:
            found.reject("quota", f"the group has {config.max_pairs_per_group} pairs already", pair)
    found.pairs = [pair for pair in found.pairs if id(pair) in kept]


def _draw(pair: Pair, seed: int) -> str:
    return hashlib.sha256(repr((seed, *pair.key, pair.annotator)).encode()).hexdigest()


def _check_columns(columns: set[str], config: ImportConfig) -> None:
    """A column that no row has is a mistake, not a reason to reject every row."""
    for column in needed_columns(config):
        if columns and column not in columns:
            have, needs = ", ".join(sorted(columns)), f'which layout = "{config.layout}" needs'
            raise InputError(f'source "{config.source}" has no column "{column}", {needs}; it has {have}')
