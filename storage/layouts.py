"""The layouts that trainers read, each one SQL SELECT over a table of the lake.

The statements also work as they stand in `winnow query`. Sources, read in 2026-11:
- trl, trl_kto, prompts: huggingface/trl docs/source/dataset_formats.md (explicit conversational preference, unpaired
  preference, prompt-only)
- ultrafeedback: the card of HuggingFaceH4/ultrafeedback_binarized; `prompt` is the first user turn, as
  huggingface/alignment-handbook src/alignment/data.py took it (v0.2.0)
- openrlhf: OpenRLHF/OpenRLHF openrlhf/datasets/reward_dataset.py, with prompt_key, chosen_key and apply_chat_template
- open_instruct: allenai/open-instruct open_instruct/dataset_transformation.py, preference_tulu_tokenize_and_truncate_v1
- nemo_rl: NVIDIA-NeMo/RL docs/guides/dpo.md and nemo_rl/data/datasets/preference_datasets/preference_dataset.py
- llama_factory: hiyouga/LLaMA-Factory data/README.md (sharegpt, preference dataset) and
  src/llamafactory/data/converter.py
- argilla: argilla-io/argilla argilla/src/argilla/records/_resource.py (Record.from_dict) and _io/_json.py
- text: NVIDIA-NeMo/RL binary_preference_dataset.py; hiyouga/LLaMA-Factory data/README.md (alpaca, preference dataset)
"""

from dataclasses import dataclass

NESTED = (".parquet", ".jsonl", ".json")

# A rule names rows that a layout cannot carry: (reason, SQL condition).
Rule = tuple[str, str]

_PAIR_TURNS = "list_concat(list_concat(prompt, chosen), rejected)"
_EMPTY_TURN: Rule = (
    "a turn has no role or no content",
    f"len(list_filter({_PAIR_TURNS}, lambda m: m.role IS NULL OR m.content IS NULL)) > 0",
)
_EMPTY_MESSAGE: Rule = (
    "a turn has no role or no content",
    "len(list_filter(messages, lambda m: m.role IS NULL OR m.content IS NULL)) > 0",
)
_NO_NUMBER: Rule = (
    "a score is not a finite number",
    "NOT coalesce(isfinite(score_chosen) AND isfinite(score_rejected), false)",
)
_LONG_ANSWER: Rule = (
    "an answer has more than one turn",
    "len(chosen) <> 1 OR len(rejected) <> 1",
)
_NO_USER: Rule = (
    "the prompt has no user turn",
    "len(list_filter(prompt, lambda m: m.role = 'user')) = 0",
)


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout: the table it reads, its SELECT, what it cannot carry, and the files it may be written to."""

    table: str
    sql: str
    cannot_carry: tuple[Rule, ...] = (_EMPTY_TURN,)
    suffixes: tuple[str, ...] = NESTED


_TRL = """
SELECT prompt, chosen, rejected, prompt_id, "group", score_chosen, score_rejected
FROM preferences
"""

_TRL_KTO = """
SELECT prompt, unnest([chosen, rejected]) AS completion, unnest([true, false]) AS label, prompt_id, "group"
FROM preferences
"""

# `reference` is NULL where a prompt has no reference answer.
_PROMPTS = """
SELECT messages AS prompt, prompt_id, "group", reference
FROM prompts
"""

_ULTRAFEEDBACK = """
SELECT list_filter(prompt, lambda m: m.role = 'user')[1].content AS prompt, prompt_id,
       list_concat(prompt, chosen) AS chosen, list_concat(prompt, rejected) AS rejected,
       list_concat(prompt, chosen) AS messages, score_chosen, score_rejected
FROM preferences
"""

_OPENRLHF = """
SELECT prompt, chosen, rejected
FROM preferences
"""

_OPEN_INSTRUCT = """
SELECT list_concat(prompt, chosen) AS chosen, list_concat(prompt, rejected) AS rejected, prompt_id, "group"
FROM preferences
"""

# No task_name: the loader adds it, and fails where it is there already.
_NEMO_RL = """
SELECT prompt AS context, [{'rank': 0, 'completion': chosen}, {'rank': 1, 'completion': rejected}] AS completions
FROM preferences
"""

_LLAMA_FACTORY = """
SELECT list_transform(
           list_filter(prompt, lambda m, i: NOT (i = 1 AND m.role = 'system')),
           lambda m: {'from': CASE m.role WHEN 'user' THEN 'human' WHEN 'tool' THEN 'observation' ELSE 'gpt' END,
                      'value': m.content}
       ) AS conversations,
       {'from': 'gpt', 'value': chosen[1].content} AS chosen,
       {'from': 'gpt', 'value': rejected[1].content} AS rejected,
       CASE prompt[1].role WHEN 'system' THEN prompt[1].content ELSE '' END AS system
FROM preferences
"""
# LLaMA-Factory skips such rows with no more than a warning.
_NOT_ALTERNATING: Rule = (
    "after the system turn, user (or tool) and assistant turns must alternate, the user first and last",
    """
    len(prompt) % 2 = CASE prompt[1].role WHEN 'system' THEN 1 ELSE 0 END
    OR len(list_filter(
        list_filter(prompt, lambda m, i: NOT (i = 1 AND m.role = 'system')),
        lambda m, i: CASE i % 2 WHEN 1 THEN m.role NOT IN ('user', 'tool') ELSE m.role <> 'assistant' END
    )) > 0
    """,
)

# Which answer comes first is decided by a hash of the prompt, so that annotators learn nothing from the order.
_ARGILLA = """
SELECT prompt_id AS id,
       {'prompt': prompt,
        'response_1': CASE WHEN first THEN chosen[1].content ELSE rejected[1].content END,
        'response_2': CASE WHEN first THEN rejected[1].content ELSE chosen[1].content END} AS fields,
       {'group': "group",
        'score_1': CASE WHEN first THEN score_chosen ELSE score_rejected END,
        'score_2': CASE WHEN first THEN score_rejected ELSE score_chosen END} AS metadata,
       {'preferred': {'value': CASE WHEN first THEN 'response_1' ELSE 'response_2' END, 'agent': 'winnow'}}
           AS suggestions
FROM (SELECT *, md5(prompt_id) < '8' AS first FROM preferences)
"""

_TEXT = """
SELECT prompt[1].content AS prompt, chosen[1].content AS chosen, rejected[1].content AS rejected, prompt_id, "group"
FROM preferences
"""
_NOT_ONE_USER_TURN: Rule = (
    "the prompt is more than one user turn",
    "len(prompt) <> 1 OR prompt[1].role <> 'user'",
)

LAYOUTS: dict[str, Layout] = {
    "trl": Layout("preferences", _TRL, (_EMPTY_TURN, _NO_NUMBER)),
    "trl_kto": Layout("preferences", _TRL_KTO),
    "prompts": Layout("prompts", _PROMPTS, (_EMPTY_MESSAGE,)),
    "ultrafeedback": Layout("preferences", _ULTRAFEEDBACK, (_EMPTY_TURN, _NO_NUMBER, _LONG_ANSWER, _NO_USER)),
    "openrlhf": Layout("preferences", _OPENRLHF),
    "open_instruct": Layout("preferences", _OPEN_INSTRUCT, (_EMPTY_TURN, _LONG_ANSWER)),
    "nemo_rl": Layout("preferences", _NEMO_RL, (_EMPTY_TURN, _LONG_ANSWER)),
    "llama_factory": Layout("preferences", _LLAMA_FACTORY, (_EMPTY_TURN, _LONG_ANSWER, _NOT_ALTERNATING)),
    "argilla": Layout("preferences", _ARGILLA, (_EMPTY_TURN, _NO_NUMBER, _LONG_ANSWER), (".json", ".jsonl")),
    "text": Layout("preferences", _TEXT, (_EMPTY_TURN, _LONG_ANSWER, _NOT_ONE_USER_TURN), (*NESTED, ".csv")),
}
