"""One row of a source to a pair or a judgement, for each layout."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from tasks.importers.records import Judgement, Pair, answer_text, pair_of, refuse_equal
from tasks.importers.transcripts import split_transcripts
from tasks.messages import Messages, Unusable, clean_prompt, clean_text, clean_turns, prompt_id_of
from tasks.settings_import import ImportConfig, Layout, choice_key

Row = Mapping[str, object]
NO_GROUP = "all"
STATEMENT = 'Is the following statement something you would say?\n"{}"'


def parse_row(row: Row, config: ImportConfig, group: str) -> Pair | Judgement:
    """The row under the configured layout; Unusable with a reason when it does not fit."""
    return _PARSERS[config.layout](row, config, group)


def needed_columns(config: ImportConfig) -> list[str]:
    """Columns without which no row can be used, and those that the configuration names."""
    columns = {
        "columns": [config.chosen_column, config.rejected_column],
        "hh_rlhf": [config.chosen_column, config.rejected_column],
        "persona": ["answer_matching_behavior", "answer_not_matching_behavior"],
        "annotators": [
            config.answer_a_column,
            config.answer_b_column,
            config.choice_column,
            config.annotator_column,
            *([] if config.group_constant else [config.group_column or "group"]),
        ],
    }[config.layout]
    named = (config.prompt_column, config.group_column, config.score_chosen_column, config.score_rejected_column)
    return [*columns, *(column for column in named if column)]


def _columns(row: Row, config: ImportConfig, group: str) -> Pair:
    chosen, rejected = row.get(config.chosen_column), row.get(config.rejected_column)
    column = config.prompt_column or "prompt"
    if config.prompt_column or row.get(column) is not None:
        messages = _prompt(row.get(column), column)
        chosen, rejected = _answer(chosen, messages), _answer(rejected, messages)
    else:
        messages, chosen, rejected = _implicit(chosen, rejected)
    pair = pair_of(_system(messages, config, group), (chosen, rejected), group)
    score_chosen = _score(row, config.score_chosen_column or "score_chosen")
    score_rejected = _score(row, config.score_rejected_column or "score_rejected")
    return replace(pair, score_chosen=score_chosen, score_rejected=score_rejected)


def _hh_rlhf(row: Row, config: ImportConfig, group: str) -> Pair:
    chosen, rejected = (_text(row, column) for column in (config.chosen_column, config.rejected_column))
    messages, chosen, rejected = split_transcripts(chosen, rejected)
    return pair_of(_system(messages, config, group), (chosen, rejected), group)


def _persona(row: Row, config: ImportConfig, group: str) -> Pair:
    asked = row.get("question") or STATEMENT.format(_text(row, "statement"))
    answers = _text(row, "answer_matching_behavior"), _text(row, "answer_not_matching_behavior")
    if config.min_confidence:
        confidence = _score(row, "label_confidence")
        if confidence is None or confidence < config.min_confidence:
            raise Unusable("low_confidence", f"label_confidence {confidence} is below {config.min_confidence}")
    return pair_of(_system(_prompt(asked, "question"), config, group), answers, group)


def _annotators(row: Row, config: ImportConfig, group: str) -> Judgement:
    column = config.prompt_column or "prompt"
    prompt = _prompt(row.get(column), column)
    messages = _system(prompt, config, group)
    found = (_answer(row.get(column), prompt) for column in (config.answer_a_column, config.answer_b_column))
    a, b = (answer_text(answer) for answer in found)
    refuse_equal(a, b)
    said = row.get(config.choice_column)
    meaning = config.choices().get(choice_key(said))
    if said is None or meaning is None:
        known = ", ".join(config.choices())
        raise Unusable("unknown_choice", f"the choice {str(said)[:40]!r} is none of {known}")
    first, second = sorted((a, b))
    choice = None if meaning == "tie" else (first, second).index(a if meaning == "a" else b)
    annotator = clean_text(_cell(row, config.annotator_column))
    return Judgement(prompt_id_of(messages), messages, group, annotator, (first, second), choice)


_PARSERS: Mapping[Layout, Callable[[Row, ImportConfig, str], Pair | Judgement]] = {
    "columns": _columns,
    "hh_rlhf": _hh_rlhf,
    "persona": _persona,
    "annotators": _annotators,
}


def group_of(row: Row, config: ImportConfig, file_group: str | None) -> str:
    """The constant, the configured column, the layout's own column, or what the file's name says."""
    if config.group_constant:
        return clean_text(config.group_constant)
    usual = "persona" if config.layout == "persona" else "group"
    column = config.group_column or (usual if usual in row or config.layout == "annotators" else None)
    if column is not None:
        value = row.get(column)
        group = clean_text(str(value)) if value is not None else ""
        if not group:
            raise Unusable("no_group", f'column "{column}" is empty')
        return group
    if config.layout == "columns":
        return NO_GROUP
    if not file_group:
        raise Unusable("no_group", "neither a column nor a file's name says it; set group_constant or group_column")
    return file_group


def _prompt(value: object, column: str) -> Messages:
    """A prompt that is text (one user message) or a list of messages."""
    if isinstance(value, str):
        return clean_prompt([{"role": "user", "content": value}], None)
    if isinstance(value, list) and value:
        return clean_prompt(value, None)
    raise Unusable("missing_value", f'column "{column}" has neither text nor messages')


def _answer(value: object, prompt: Messages) -> object:
    """The text of an answer that is text, one message, or the whole conversation."""
    if not isinstance(value, list):
        return value
    turns = clean_turns(value)
    return _last(turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns)


def _implicit(chosen: object, rejected: object) -> tuple[Messages, str, str]:
    """Two whole conversations: what they share is the prompt."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise Unusable("no_prompt", 'no prompt beside text; set prompt_column, or layout = "hh_rlhf" for transcripts')
    one, other = clean_turns(chosen), clean_turns(rejected)
    if len(one) < 2 or one[:-1] != other[:-1]:
        raise Unusable("no_shared_prompt", "the conversations differ before their last messages")
    return clean_prompt(one[:-1], None), _last(one[-1:]), _last(other[-1:])


def _last(turns: Messages) -> str:
    if len(turns) != 1:
        raise Unusable("several_turns", f"an answer has {len(turns)} messages; a pair differs in one")
    if turns[0]["role"] != "assistant":
        raise Unusable("no_answer", f"the last message is the {turns[0]['role']}'s, not the assistant's")
    return turns[0]["content"]


def _system(messages: Messages, config: ImportConfig, group: str) -> Messages:
    text = config.system_prompt and config.system_prompt.replace("{group}", group)
    return clean_prompt(messages, text or None)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unusable("missing_value", f'column "{column}" has no text')
    return value


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None or not str(value).strip():
        raise Unusable("missing_value", f'column "{column}" is empty')
    return str(value)


def _score(row: Row, column: str) -> float | None:
    """A number, also one that is text (CSV); None for an empty cell."""
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable("bad_score", f'column "{column}" has {str(value)[:40]!r}, which is no number')
    return number
