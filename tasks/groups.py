"""How groups are named in tables that also have rows for all groups together, the worst one and the gap."""

from collections.abc import Iterable

ALL, WORST, GAP = "all", "worst", "gap"
TAKEN = (ALL, WORST, GAP)
PREFIX = "group "


def shown_group(group: str | None) -> str:
    """`all` for all groups together; a group that bears such a name itself is told from it."""
    if group is None:
        return ALL
    return f"{PREFIX}{group}" if group in TAKEN else group


def group_shown_as(name: str) -> str | None:
    """What `shown_group` was given."""
    plain = name.removeprefix(PREFIX)
    return None if name == ALL else plain if plain in TAKEN else name


def shown_groups(groups: Iterable[str]) -> dict[str, str]:
    """Each group as it is shown; none where all there is has no group, which importing calls `all`."""
    known = sorted(set(groups))
    return {} if known == [ALL] else {group: shown_group(group) for group in known}
