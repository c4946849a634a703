"""The tables of the lake as explicit Arrow schemas; nothing is written under another one."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from storage.errors import SchemaError

SCHEMA_VERSION = 1

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
CUTS = pa.list_(
    pa.struct([pa.field("n_tokens", pa.int32()), pa.field("score", pa.float64()), pa.field("kept", pa.bool_())])
)

# A list, not a map: `datasets` cannot load Arrow maps.
SCORES = pa.list_(pa.struct([pa.field("scorer", pa.string()), pa.field("value", pa.float64())]))

PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("messages", MESSAGES, nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("license", pa.string()),
    ]
)
CANDIDATES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("candidate_index", pa.int32(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("cut_at_token", pa.int32()),
        pa.field("cuts", CUTS, nullable=False),
        pa.field("score", pa.float64()),
        pa.field("scores", SCORES, nullable=False),
        pa.field("generator", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
PREFERENCES = pa.schema(
    [
        pa.field("prompt", MESSAGES, nullable=False),
        pa.field("chosen", MESSAGES, nullable=False),
        pa.field("rejected", MESSAGES, nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        # Null in pairs that people chose: those have neither scores nor candidates.
        pa.field("score_chosen", pa.float64()),
        pa.field("score_rejected", pa.float64()),
        pa.field("score_margin", pa.float64()),
        pa.field("strategy", pa.string(), nullable=False),
        pa.field("chosen_index", pa.int32()),
        pa.field("rejected_index", pa.int32()),
        pa.field("policy_logp_ref_chosen", pa.float64()),
        pa.field("policy_logp_ref_rejected", pa.float64()),
        # Of pairs that several people judged: how many of the group, and the share of them that is for `chosen`.
        pa.field("n_votes", pa.int32()),
        pa.field("agreement", pa.float64()),
        pa.field("annotator", pa.string()),
    ]
)
REJECTED = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("row", pa.int64()),
        pa.field("prompt_id", pa.string()),
        pa.field("group", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)
METRICS = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
    ]
)
TRAINING = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        # Null where a figure is of all groups together.
        pa.field("group", pa.string()),
        # Whether it is of pairs that were not trained on; null in the logs of older trainings, which had none.
        pa.field("held_out", pa.bool_()),
    ]
)
# S of both answers under the model that training starts from; `row` is the pair's place in its split.
REFERENCE_LOGPS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("chosen_logp", pa.float64(), nullable=False),
        pa.field("rejected_logp", pa.float64(), nullable=False),
        pa.field("n_chosen", pa.int32(), nullable=False),
        pa.field("n_rejected", pa.int32(), nullable=False),
    ]
)
COMPARISON = pa.schema(
    [
        pa.field("method", pa.string(), nullable=False),
        # Null where the figure is of the model that all methods started from.
        pa.field("seed", pa.int64()),
        # Null where a figure is of all groups together, or of the training.
        pa.field("group", pa.string()),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
    ]
)
# Figures of an edge export. x: where a figure is a point of a curve, else null.
EDGE = pa.schema(
    [
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("x", pa.float64()),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
TABLES: dict[str, pa.Schema] = {
    "prompts": PROMPTS,
    "candidates": CANDIDATES,
    "preferences": PREFERENCES,
    "rejected": REJECTED,
    "metrics": METRICS,
    "training": TRAINING,
    "reference_logps": REFERENCE_LOGPS,
    "comparison": COMPARISON,
    "edge": EDGE,
}


def to_table(table: str, rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Rows as an Arrow table under the schema of `table`; SchemaError names the first column that does not fit."""
    schema = TABLES[table]
    for number, row in enumerate(rows):
        if row.keys() != set(schema.names):
            odd = sorted(row.keys() ^ set(schema.names))[0]
            raise SchemaError(f'row {number} of {table}: column "{odd}" is missing or unknown')
    columns = []
    for field in schema:
        try:
            columns.append(pa.array([row[field.name] for row in rows], type=field.type))
            if pa.types.is_integer(field.type):
                _refuse_fractions(table, field, rows)
        # ValueError covers text that is no Unicode (lone surrogates).
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise SchemaError(f'{table}: column "{field.name}" must be {field.type}: {error}') from error
    return checked(table, pa.Table.from_arrays(columns, schema=schema))


def checked(table: str, data: pa.Table) -> pa.Table:
    """`data` cast to the schema of `table`; SchemaError for missing, extra or null columns."""
    schema = TABLES[table]
    if set(data.schema.names) != set(schema.names):
        odd = sorted(set(data.schema.names) ^ set(schema.names))[0]
        raise SchemaError(f'{table}: column "{odd}" is missing or unknown')
    for field in schema:
        if not field.nullable and data[field.name].null_count:
            raise SchemaError(f'{table}: column "{field.name}" has {data[field.name].null_count} empty values')
    try:
        return data.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise SchemaError(f"{table}: {error}") from error


def grown(table: str, data: pa.Table) -> pa.Table | None:
    """`data`, maybe of an older Winnow, under today's schema of `table`; None when it is something else.

    A schema may only grow: columns that came later are null, columns that had to be filled may have become optional.
    """
    columns = []
    for field in TABLES[table]:
        found = data.schema.field(field.name) if field.name in data.schema.names else None
        if found is None and field.nullable:
            columns.append(pa.nulls(data.num_rows, field.type))
        elif found is not None and found.type.equals(field.type) and (field.nullable or not found.nullable):
            columns.append(data[field.name])
        else:
            return None
    if not set(data.schema.names) <= set(TABLES[table].names):
        return None
    return pa.Table.from_arrays(columns, schema=TABLES[table])


def _refuse_fractions(table: str, field: pa.Field, rows: Sequence[Mapping[str, object]]) -> None:
    # PyArrow cuts 1.5 down to 1 without a word.
    for row in rows:
        value = row[field.name]
        if isinstance(value, float):
            raise SchemaError(f'{table}: column "{field.name}" must be {field.type}, not {value}')
