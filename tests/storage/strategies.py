"""Hypothesis strategies of the storage tests."""

from hypothesis import strategies as st


def _around(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return inner | st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)


# Not st.recursive: its limits made Hypothesis report inconsistent data on a loaded machine.
json_values = _around(_around(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)))
