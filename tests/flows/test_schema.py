"""What Prefect's run form shows. Delete parameter_schemas.json and run this test to accept a change."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema

from tasks.plan import STAGES

FLOWS = (*STAGES, "calibrate", "compare", "import_preferences", "adapt", "align", "iterate", "pipeline")
GOLDEN = Path(__file__).parent / "parameter_schemas.json"


def _schema(name: str) -> dict[str, object]:
    flow = getattr(importlib.import_module(f"flows.{name}"), name)
    return json.loads(json.dumps(parameter_schema(flow).model_dump()))


def _walk(value: object) -> Iterator[dict[str, object]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


@pytest.mark.parametrize("name", FLOWS)
def test_every_field_has_a_title_and_a_description_and_no_union_breaks_the_form(name: str) -> None:
    schema = _schema(name)
    assert not [node for node in _walk(schema) if "oneOf" in node or "discriminator" in node]
    definitions = schema["definitions"]
    assert isinstance(definitions, dict)
    assert definitions
    for model in definitions.values():
        for field, described in model["properties"].items():
            assert described.get("title"), f"{model['title']}.{field}"
            assert described.get("description"), f"{model['title']}.{field}"


def test_the_forms_are_the_golden_ones() -> None:
    shown = json.dumps({name: _schema(name) for name in FLOWS}, indent=1, sort_keys=True) + "\n"
    if not GOLDEN.exists():
        GOLDEN.write_text(shown)
    assert shown == GOLDEN.read_text(), f"a form changed; delete {GOLDEN.name} to accept it"
