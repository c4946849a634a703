"""Parameters of the import of preference data."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.settings_base import SourceConfig

Layout = Literal["columns", "hh_rlhf", "persona", "annotators"]

# Fields that mean something in some layouts only.
_ONLY_FOR: Mapping[str, tuple[Layout, ...]] = {
    "prompt_column": ("columns", "annotators"),
    "chosen_column": ("columns", "hh_rlhf"),
    "rejected_column": ("columns", "hh_rlhf"),
    "score_chosen_column": ("columns",),
    "score_rejected_column": ("columns",),
    "min_margin": ("columns",),
    "min_confidence": ("persona",),
    "answer_a_column": ("annotators",),
    "answer_b_column": ("annotators",),
    "choice_column": ("annotators",),
    "annotator_column": ("annotators",),
    "choices_a": ("annotators",),
    "choices_b": ("annotators",),
    "choices_tie": ("annotators",),
    "votes": ("annotators",),
    "min_agreement": ("annotators",),
}


class ImportConfig(SourceConfig):
    """Which preference data is taken over, how its rows are laid out, and whose preferences they are."""

    source: str = Field(
        "", title="Source", description="A file, a folder of files, or a folder or hub name of a datasets dataset"
    )
    files: str = Field("*", title="Files", description="Pattern of the files to take out of a folder", min_length=1)
    layout: Layout = Field(
        "columns",
        title="Layout",
        description="columns: one pair per row; hh_rlhf: two whole transcripts per row; persona: statements with the "
        "answer that matches a behaviour; annotators: one judgement of two answers per row",
    )
    prompt_column: str | None = Field(
        None, title="Prompt column", description="Text or messages; the default is prompt (columns, annotators)"
    )
    chosen_column: str = Field("chosen", title="Chosen column", description="The better answer (columns, hh_rlhf)")
    rejected_column: str = Field("rejected", title="Rejected column", description="The worse one (columns, hh_rlhf)")
    score_chosen_column: str | None = Field(
        None, title="Chosen's score", description="Column; score_chosen is taken where present (columns)"
    )
    score_rejected_column: str | None = Field(
        None, title="Rejected's score", description="Column; score_rejected is taken where present (columns)"
    )
    min_margin: float = Field(
        0.0, title="Margin", description="Of pairs with scores, the margin must be above this (columns)", ge=0
    )
    min_confidence: float = Field(
        0.0,
        title="Label confidence",
        description="A statement's label_confidence must reach this (persona)",
        ge=0,
        le=1,
    )
    answer_a_column: str = Field("response_a", title="Answer a", description="Column (annotators)")
    answer_b_column: str = Field("response_b", title="Answer b", description="Column (annotators)")
    choice_column: str = Field("choice", title="Choice column", description="Which answer won (annotators)")
    annotator_column: str = Field("annotator", title="Annotator column", description="Who judged (annotators)")
    choices_a: list[str] = Field(
        ["a"], title="Choices for a", description="Values of the choice column, upper or lower case (annotators)"
    )
    choices_b: list[str] = Field(["b"], title="Choices for b", description="Likewise (annotators)")
    choices_tie: list[str] = Field(["tie"], title="Choices for neither", description="Likewise (annotators)")
    votes: Literal["majority", "each"] = Field(
        "majority",
        title="Votes",
        description="majority: one pair per group, as most of its annotators chose; each: one pair per annotator",
    )
    min_agreement: float = Field(
        0.5,
        title="Agreement",
        description="The share of a group's votes that is for the chosen answer must be above this (majority)",
        ge=0.5,
        lt=1,
    )
    group_column: str | None = Field(
        None,
        title="Group column",
        description="Whose preference it is; the default is persona (persona) or group, where present",
    )
    group_constant: str | None = Field(None, title="Group", description="One group for all pairs", min_length=1)
    system_prompt: str | None = Field(
        None,
        title="System prompt",
        description="Put in front of every conversation that has none; {group} stands for the group's name",
    )
    license: str | None = Field(None, title="License", description="Of the source; stored with the dataset")
    test_share: float = Field(
        0.2, title="Test share", description="Share of prompts, by hash, kept out of training", ge=0, lt=1
    )
    max_pairs_per_group: int | None = Field(
        None, title="Quota", description="At most so many pairs per group, chosen by a hash of the seed", ge=1
    )
    seed: int = Field(0, title="Seed", description="Of the split and of the quota", ge=0, lt=2**31)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, layouts in _ONLY_FOR.items():
            if self.layout not in layouts and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} is for layout = "{layouts[0]}", not "{self.layout}"; leave it out')
        if self.group_column and self.group_constant:
            raise ValueError("group_column and group_constant are both set; keep one")
        if bool(self.score_chosen_column) != bool(self.score_rejected_column):
            raise ValueError("score_chosen_column and score_rejected_column go together; set both or none")
        self.choices()
        return self

    def choices(self) -> dict[str, Literal["a", "b", "tie"]]:
        """What each value of the choice column means; ValueError for one with two meanings."""
        found: dict[str, Literal["a", "b", "tie"]] = {}
        lists: tuple[tuple[Literal["a", "b", "tie"], list[str]], ...] = (
            ("a", self.choices_a),
            ("b", self.choices_b),
            ("tie", self.choices_tie),
        )
        for meaning, values in lists:
            for value in values:
                if found.setdefault(choice_key(value), meaning) != meaning:
                    raise ValueError(f'choice "{value}" stands for {found[choice_key(value)]} and for {meaning}')
        return found


def choice_key(value: object) -> str:
    """A value of the choice column, without case and outer white space."""
    return str(value).strip().casefold()
