"""What the rows of a source become: pairs, or judgements that are counted into pairs."""

from dataclasses import dataclass

from tasks.messages import Messages, Unusable, clean_text, prompt_id_of


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversation with the better and the worse answer, in the eyes of a group."""

    prompt_id: str
    messages: Messages
    group: str
    chosen: str
    rejected: str
    strategy: str = "given"
    score_chosen: float | None = None
    score_rejected: float | None = None
    n_votes: int | None = None
    agreement: float | None = None
    annotator: str | None = None

    @property
    def margin(self) -> float | None:
        """Of the scores; None without them."""
        if self.score_chosen is None or self.score_rejected is None:
            return None
        return self.score_chosen - self.score_rejected

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Two pairs with one key are the same."""
        return self.prompt_id, self.group, self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one annotator said about two answers, which are in alphabetical order; `choice` is None for a tie."""

    prompt_id: str
    messages: Messages
    group: str
    annotator: str
    answers: tuple[str, str]
    choice: int | None

    @property
    def key(self) -> tuple[str, str, tuple[str, str]]:
        """Judgements of one pair in one group share it."""
        return self.prompt_id, self.group, self.answers


def pair_of(messages: Messages, answers: tuple[object, object], group: str) -> Pair:
    """A given pair; Unusable when its answers are no two different texts."""
    chosen, rejected = (answer_text(answer) for answer in answers)
    refuse_equal(chosen, rejected)
    return Pair(prompt_id_of(messages), messages, group, chosen, rejected)


def answer_text(answer: object) -> str:
    """An answer's text, normalised; Unusable for none."""
    if not isinstance(answer, str):
        raise Unusable("missing_value", "an answer has no text")
    text = clean_text(answer)
    if not text:
        raise Unusable("empty_answer", "an answer has no text")
    return text


def refuse_equal(one: str, other: str) -> None:
    """Unusable for two equal answers: nothing can be learned from them."""
    if one == other:
        raise Unusable("equal_answers", "both answers have the same text")
