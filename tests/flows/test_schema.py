"""What Prefect's run form shows. Delete parameter_schemas.json and run this test to accept a change."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema

from tasks.plan import STAGES
from tasks.settings import CONNECTED, ChainConfig

FLOWS = (*STAGES, "calibrate", "compare", "import_preferences", "adapt", "align", "iterate", "pipeline", "watch")
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


@pytest.mark.parametrize("name", FLOWS)
def test_every_field_is_a_control_of_the_form_and_none_a_json_editor(name: str) -> None:
    schema = _schema(name)
    definitions = schema["definitions"]
    assert isinstance(definitions, dict)
    properties = schema["properties"]
    assert isinstance(properties, dict)
    assert all(field.get("description") for field in properties.values())
    for model in [schema, *definitions.values()]:
        for field, described in model["properties"].items():
            assert _is_control(described), f"{field}: {described}"


@pytest.mark.parametrize("name", FLOWS)
def test_the_form_says_in_which_order_fields_stand(name: str) -> None:
    schema = _schema(name)
    definitions = schema["definitions"]
    assert isinstance(definitions, dict)
    for model in [schema, *definitions.values()]:
        positions = [described["position"] for described in model["properties"].values()]
        assert positions == sorted(set(positions))


def _is_control(node: dict[str, object]) -> bool:
    """Text, number, tick box, drop-down, list of these, a box of a model's own, or one of them or None."""
    if "anyOf" in node:
        choices = node["anyOf"]
        assert isinstance(choices, list)
        return sum(choice.get("type") != "null" for choice in choices) == 1 and all(map(_is_control, choices))
    if node.get("type") == "array":
        items = node.get("items")
        return isinstance(items, dict) and _is_control(items)
    is_model = "$ref" in node or "allOf" in node
    return (
        is_model
        or "enum" in node
        or "const" in node
        or node.get("type") in ("string", "integer", "number", "boolean", "null")
    )


def test_the_form_of_a_pipeline_leaves_out_what_it_sets_itself() -> None:
    definitions = _schema("pipeline")["definitions"]
    assert isinstance(definitions, dict)
    stages = definitions["ChainConfig"]["properties"]
    assert set(stages) == {"name", *STAGES}
    for stage in STAGES:
        shown = definitions[stages[stage]["$ref"].rpartition("/")[2]]["properties"]
        hidden = {"name", *CONNECTED.get(stage, ())}
        # The server refuses a default that its own schema does not know.
        assert set(stages[stage]["default"]) == set(shown) and not hidden & set(shown)
        ChainConfig.model_validate({stage: stages[stage]["default"]})
    assert "approve_training" in definitions["PipelineExecutionConfig"]["properties"]
    for name in ("generate", "score"):
        definitions = _schema(name)["definitions"]
        assert isinstance(definitions, dict)
        assert "approve_training" not in definitions["ExecutionConfig"]["properties"]


def test_the_forms_are_the_golden_ones() -> None:
    shown = json.dumps({name: _schema(name) for name in FLOWS}, indent=1, sort_keys=True) + "\n"
    if not GOLDEN.exists():
        GOLDEN.write_text(shown)
    assert shown == GOLDEN.read_text(), f"a form changed; delete {GOLDEN.name} to accept it"
