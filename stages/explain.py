"""What pydantic found wrong, as one line of advice with the place in the recipe."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from stages.document import ConfigError, Document, Keys, nearest

Schema = dict[str, Any]


def validate(document: Document, keys: Keys, value: Any, shape: Any) -> Any:
    """`value`, written at `keys`, as a `shape`: a pydantic model or an annotation.

    Strict: a quoted number is no number. The way through JSON keeps a list usable for a tuple.

    Raises:
        ConfigError: for the first thing wrong, and how many more there are.
    """
    adapter = TypeAdapter(shape)
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise _explain(error, document, keys, value, adapter) from error


def _explain(
    error: ValidationError, document: Document, keys: Keys, value: Any, adapter: TypeAdapter
) -> ConfigError:
    # An unknown key is named first: a misspelt key also makes the right one look missing.
    found = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    # A list whose only item is wrong also counts as too short: that follows, and is not told.
    above = {entry["loc"][:depth] for entry in found for depth in range(len(entry["loc"]))}
    found = [e for e in found if e["type"] != "too_short" or e["loc"] not in above]
    first, others = found[0], len(found) - 1
    here, written = _locate(value, first)
    problem = _advice(first, written, adapter)
    if others:
        problem += f" (and {others} more)"
    return document.error((*keys, *here), problem)


def _locate(value: Any, entry: ErrorDetails) -> tuple[Keys, Any]:
    """Keys of an error below `value`: pydantic's own words for union members are left out."""
    here: list[str | int] = []
    inside: Any = value
    last = len(entry["loc"]) - 1
    for depth, part in enumerate(entry["loc"]):
        known = isinstance(inside, dict) and part in inside
        known |= isinstance(inside, list) and isinstance(part, int) and part < len(inside)
        if known:
            here.append(part)
            inside = inside[part]
        elif entry["type"] == "missing" and depth == last:
            here.append(part)
    return tuple(here), inside


def _advice(entry: ErrorDetails, written: Any, adapter: TypeAdapter) -> str:
    kind, message = entry["type"], entry["msg"]
    name = str(entry["loc"][-1]) if entry["loc"] else ""
    context = entry.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(name, _known_keys(adapter, entry['loc'][:-1]))}"
    if kind == "missing":
        return "is missing; add it"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = str(context["discriminator"]).strip("'")
        tags = [tag.strip("' ") for tag in str(context.get("expected_tags", "")).split(",")]
        tags = [tag for tag in tags if tag] or _tags(adapter, key)
        tag = written.get(key) if isinstance(written, dict) else None
        if tag is None:
            return f"{key} is missing; add {key}: with one of {', '.join(sorted(tags))}"
        return f"{key}: {tag} is not known; {nearest(str(tag), tags)}"
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "")
        return f"expected {choices}; {_offer(str(written), choices)}"
    if kind == "string_pattern_mismatch":
        return f"expected to match {context['pattern']}; change it"
    if kind == "too_short":
        return f"expected {context['min_length']} or more items; add what is missing"
    advice = message.replace("Input should be", "expected").replace(
        "an object", "a mapping of keys"
    )
    quoted = isinstance(written, str) and _is_number(written)
    return f"{advice}; write it without quotes" if quoted else f"{advice}; change it"


def _offer(written: str, choices: str) -> str:
    known = choices.replace(" or ", ", ").split(", ")
    offer = nearest(written, known)
    return offer if offer.startswith("did") else "choose one" if len(known) > 1 else "change it"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _tags(adapter: TypeAdapter, key: str) -> list[str]:
    schema = adapter.json_schema()
    found = [part["properties"][key].get("const") for part in _branches(schema, schema)]
    return [tag for tag in found if tag]


def _known_keys(adapter: TypeAdapter, location: tuple[str | int, ...]) -> set[str]:
    """Keys that may stand at a location, read from the JSON schema of the whole."""
    root = adapter.json_schema()
    places = _branches(root, root)
    for part in location:
        below = [s for place in places for s in _below(place, part)]
        if below:
            places = [branch for s in below for branch in _branches(s, root)]
        else:
            # pydantic names the member of a union that it tried: keep that one.
            tagged = [p for p in places if _is_tagged(p, part)]
            places = tagged or places
    return {key for place in places for key in place.get("properties", {})}


def _branches(schema: Schema, root: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _branches(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    options = schema.get("anyOf", []) + schema.get("oneOf", []) + schema.get("allOf", [])
    return [b for option in options for b in _branches(option, root)] if options else [schema]


def _below(schema: Schema, part: str | int) -> list[Schema]:
    if isinstance(part, int):
        return [schema["items"]] if isinstance(schema.get("items"), dict) else []
    found = schema.get("properties", {}).get(part)
    return [found] if found else []


def _is_tagged(schema: Schema, part: str | int) -> bool:
    constants = [p.get("const") for p in schema.get("properties", {}).values()]
    return part == schema.get("title") or part in constants
