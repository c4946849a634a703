"""Assembling small tables that are in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset as pads

from storage.assembly.assembly import GroupReport, assembled
from storage.assembly.rules import AnswerRules, AssemblyRules, GroupRules, PairRules


@dataclass(frozen=True)
class Built:
    """All that an assembly gives."""

    preferences: pa.Table
    test: pa.Table
    rejected: pa.Table
    groups: dict[str, GroupReport]


def build_pairs(
    candidates: pa.Table,
    prompts: pa.Table,
    rules: PairRules | AnswerRules | GroupRules | AssemblyRules | None = None,
    screened: Sequence[Mapping[str, str]] = (),
) -> Built:
    """The pairs of some candidates under one kind of rules, or all."""
    names = {PairRules: "pairs", AnswerRules: "answers", GroupRules: "groups"}
    everything = rules if isinstance(rules, AssemblyRules) else AssemblyRules()
    if rules is not None and not isinstance(rules, AssemblyRules):
        everything = AssemblyRules(**{names[type(rules)]: rules})  # type: ignore[arg-type]
    with assembled(pads.dataset(candidates), pads.dataset(prompts), everything, screened) as assembly:
        tables = [pa.concat_tables(assembly.preferences(split, 2)) for split in ("train", "test")]
        rejected = pa.concat_tables(assembly.rejected(2))
        assert assembly.n_pairs == {"train": tables[0].num_rows, "test": tables[1].num_rows}
        assert assembly.n_rejected == rejected.num_rows
        return Built(*tables, rejected, {report.group: report for report in assembly.groups()})
