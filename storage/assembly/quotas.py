"""How many pairs each group keeps."""

import duckdb
import pyarrow as pa

from storage.assembly.rules import GroupRules
from storage.errors import AssemblyError

_COUNTS = """
SELECT a."group", COUNT(s.prompt_id) AS n_pairs
FROM (SELECT DISTINCT "group" FROM answers) AS a LEFT JOIN sound AS s USING ("group")
GROUP BY ALL ORDER BY ALL
"""

_KEPT = """
CREATE TEMP TABLE kept AS
SELECT s.* FROM sound AS s JOIN caps AS c USING ("group") WHERE s.turn_in_group <= c.cap
"""

_CAPS = pa.schema([("group", pa.string()), ("cap", pa.int64())])


def apply_quotas(connection: duckdb.DuckDBPyConnection, rules: GroupRules) -> None:
    """Make `kept` from `sound`; AssemblyError for a quota without a group, or a group below the minimum."""
    available: dict[str, int] = dict(connection.execute(_COUNTS).fetchall())
    caps = group_caps(available, rules)
    connection.register("caps", pa.Table.from_pylist([{"group": g, "cap": n} for g, n in caps.items()], schema=_CAPS))
    connection.execute(_KEPT)


def group_caps(available: dict[str, int], rules: GroupRules) -> dict[str, int]:
    """How many of the available pairs each group may keep."""
    unknown = sorted(rules.quotas.keys() - available.keys())
    if unknown:
        have = ", ".join(available) or "none"
        raise AssemblyError(f'quota for group "{unknown[0]}", which no candidate has; the groups are {have}')
    caps = {group: min(n, rules.quotas.get(group, _unless_none(rules.max_pairs, n))) for group, n in available.items()}
    if rules.balance == "smallest" and caps:
        smallest = min(caps.values())
        caps = dict.fromkeys(caps, smallest)
    for group, n_pairs in caps.items():
        if n_pairs < rules.min_pairs:
            raise AssemblyError(
                f'group "{group}" has {n_pairs} pairs, fewer than the minimum of {rules.min_pairs}; lower the minimum '
                "or the margin, or generate more candidates for it"
            )
    return caps


def _unless_none(cap: int | None, otherwise: int) -> int:
    return otherwise if cap is None else cap
