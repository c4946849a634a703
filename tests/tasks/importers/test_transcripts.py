import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.importers.transcripts import Turn, parse_transcript, render_transcript, split_transcripts
from tasks.messages import Unusable

MARKERS = ("\n\nHuman:", "\n\nAssistant:")
# Pieces of markers, so that near misses are common.
pieces = st.sampled_from(["\n", "\n\n", "Human", "Assistant", ":", " ", "Human:", "\r\n", "é", "a"])
anything = st.lists(pieces, max_size=12).map("".join)
plain = anything.filter(lambda text: not any(marker in text for marker in MARKERS))
turns = st.lists(st.builds(Turn, st.sampled_from(["Human", "Assistant"]), plain), min_size=1, max_size=5)


@given(st.sampled_from(MARKERS), anything)
def test_every_character_of_a_transcript_comes_back(marker: str, rest: str) -> None:
    assert render_transcript(parse_transcript(marker + rest)) == marker + rest


@given(turns)
def test_turns_survive_the_way_through_a_transcript(said: list[Turn]) -> None:
    assert parse_transcript(render_transcript(said)) == said


@given(turns, plain, plain)
def test_what_two_transcripts_share_is_the_prompt(said: list[Turn], better: str, worse: str) -> None:
    texts = [render_transcript([*said, Turn("Assistant", answer)]) for answer in (better, worse)]
    messages, chosen, rejected = split_transcripts(*texts)
    assert (chosen, rejected) == (better, worse)
    assert [message["content"] for message in messages] == [turn.text for turn in said]
    roles = {"Human": "user", "Assistant": "assistant"}
    assert [message["role"] for message in messages] == [roles[turn.speaker] for turn in said]


def test_a_marker_inside_a_line_is_text() -> None:
    text = "\n\nHuman: say\nHuman: and Assistant: too\n\n\nAssistant: ok \n\n Human: no"
    assert parse_transcript(text) == [
        Turn("Human", " say\nHuman: and Assistant: too\n"),
        Turn("Assistant", " ok \n\n Human: no"),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("no marker", "\n\nHuman: x\n\nAssistant: y", "no_transcript"),
        ("", "", "no_transcript"),
        ("text\n\nHuman: x\n\nAssistant: y", "\n\nHuman: x\n\nAssistant: z", "no_transcript"),
        ("\n\nHuman: x\n\nAssistant: y", "\n\nHuman: X\n\nAssistant: z", "no_shared_prompt"),
        (
            "\n\nHuman: x\n\nAssistant: y",
            "\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant: z",
            "no_shared_prompt",
        ),
        ("\n\nHuman: x\n\nHuman: y", "\n\nHuman: x\n\nAssistant: z", "no_answer"),
    ],
)
def test_transcripts_that_give_no_pair_say_why(chosen: str, rejected: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        split_transcripts(chosen, rejected)
    assert caught.value.args[0] == reason
