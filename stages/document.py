"""A recipe file as plain values that remember their lines: parse, then sets, then variables.

The order is fixed: the file, then every `--set`, then `${variables}`, so a set may change a
variable and may use one. Nothing is validated here but the YAML itself; `stages.recipe` does that
and asks `Document.place` where a value came from.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

Keys = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class ConfigError(ValueError):
    """A recipe that cannot be run: one line with the place, the key, the value and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What to offer for a name that is not known: the nearest ones, or all of them.

    Example:
        >>> nearest("sfd", ["sft", "dpo"])
        "did you mean 'sft'?"
        >>> nearest("zzz", ["sft", "dpo"])
        'known: dpo, sft'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "none is known here"


@dataclass
class Document:
    """Plain values of one recipe file, and for each of them the place it was written at.

    Args:
        file: the recipe file.
        data: mappings, lists, str, int, float, bool and None only.
        places: "file:line" or "--set key=value" by keys from the top, () for the whole.
    """

    file: Path
    data: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """Where these keys, or the nearest written keys above them, were written."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]

    def dotted(self, keys: Sequence[str | int]) -> str:
        """The key as a person sets it: a stage's name stands for its place in the list.

        Example:
            >>> document = Document(Path("r.yaml"), {"stages": [{"name": "sft", "epochs": 2}]})
            >>> document.dotted(("stages", 0, "epochs"))
            'sft.epochs'
        """
        parts: list[str] = []
        value: Any = self.data
        for key in keys:
            value = _child(value, key)
            is_named = isinstance(key, int) and isinstance(value, Mapping)
            parts.append(str(value["name"]) if is_named and "name" in value else str(key))
        if len(parts) > 1 and parts[0] == "stages" and not parts[1].isdigit():
            parts = parts[1:]
        return ".".join(parts)

    def error(self, keys: Keys, problem: str) -> ConfigError:
        """`place: dotted.key = value: problem`, ready to raise."""
        value = _value_at(self.data, keys)
        shown = "" if isinstance(value, Mapping | list | _Absent) else f" = {_shown(value)}"
        name = self.dotted(keys)
        return ConfigError(f"{self.place(keys)}: {name}{shown}: {problem}".replace(": : ", ": "))


def read_document(file: Path, sets: Sequence[str] = ()) -> Document:
    """The recipe as plain values after `--set` and `${variable}`.

    Args:
        file: YAML 1.2.
        sets: "dotted.key=value" each, applied left to right; the value is read as YAML.

    Raises:
        ConfigError: file missing or not a mapping; broken YAML; a key given twice; a set that is
            not key=value or whose key leads nowhere; a variable that is not declared.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; expected a recipe file") from error
    document = Document(file, {}, {(): f"{file}:1"})
    data = _parse(text, document)
    if not isinstance(data, dict):
        raise ConfigError(f"{file}:1: the file holds no keys; expected name, model and stages")
    document.data.update(data)
    for item in sets:
        _apply_set(document, item)
    variables = document.data.get("vars", {})
    if not isinstance(variables, dict):
        raise document.error(("vars",), "expected a mapping of names to values")
    for key, value in document.data.items():
        if key != "vars":
            document.data[key] = _substitute(document, value, (key,), variables)
    return document


def _parse(text: str, document: Document) -> Any:
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        return None if node is None else _plain(yaml, node, (), document)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{document.file}:{line}: not YAML: {error.problem}; "
            "check indentation, brackets and colons of this line"
        ) from error
    except YAMLError as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{document.file}: not YAML: {first_line}") from error


def _plain(yaml: YAML, node: Node, keys: Keys, document: Document) -> Any:
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            document.places[(*keys, index)] = f"{document.file}:{item.start_mark.line + 1}"
        return [
            _plain(yaml, item, (*keys, index), document) for index, item in enumerate(node.value)
        ]
    if isinstance(node, MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in found:
                first = document.places[(*keys, name)].rpartition(":")[2]
                raise ConfigError(
                    f"{document.file}:{line}: {name}: given twice, first in line {first}; keep one"
                )
            document.places[(*keys, name)] = f"{document.file}:{line}"
            found[name] = _plain(yaml, value_node, (*keys, name), document)
        return found
    return _scalar(yaml, node)


def _scalar(yaml: YAML, node: Node) -> Any:
    value = yaml.constructor.construct_object(node)
    # Dates and bytes have no JSON form: they stay the text that was written.
    return value if isinstance(value, str | int | float | None) else str(node.value)


def _apply_set(document: Document, item: str) -> None:
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {item}: expected key=value, such as sft-short.optim.lr=2e-6")
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        raise ConfigError(f"--set {item}: the value is not YAML: {error.problem}") from error
    written = Document(document.file, {})
    value = None if node is None else _plain(yaml, node, (), written)
    keys = _resolve(document, dotted, item)
    _put(document.data, keys, value)
    inside = [known for known in document.places if known[: len(keys)] == keys]
    for known in inside:
        del document.places[known]
    document.places[keys] = f"--set {item}"


def _resolve(document: Document, dotted: str, item: str) -> Keys:
    """Keys from the top for a dotted name; list items go by index or by their `name`."""
    parts = dotted.split(".")
    stages = document.data.get("stages", [])
    names = _names(stages)
    if parts[0] in names:
        parts = ["stages", *parts]
    elif len(parts) > 1 and parts[0] not in document.data:
        known = [*names, *document.data]
        raise ConfigError(
            f"--set {item}: no stage or key is named '{parts[0]}'; {nearest(parts[0], known)}"
        )
    keys: list[str | int] = []
    value: Any = document.data
    for depth, part in enumerate(parts):
        key: str | int = part
        if isinstance(value, list):
            names = _names(value)
            if part not in names and not (part.isdigit() and int(part) < len(value)):
                raise ConfigError(
                    f"--set {item}: '{part}' is no item of {'.'.join(parts[:depth])}; expected "
                    f"an index below {len(value)} or a name; {nearest(part, filter(None, names))}"
                )
            key = names.index(part) if part in names else int(part)
        elif not isinstance(value, dict):
            raise ConfigError(
                f"--set {item}: {'.'.join(parts[:depth])} is {_shown(value)}, which has no key "
                f"'{part}'; set the whole value instead"
            )
        keys.append(key)
        missing: Any = {}
        value = _child(value, key) if _has(value, key) else missing
    if keys[0] == "vars" and len(keys) == 2 and not _has(document.data.get("vars"), keys[1]):
        declared = document.data.get("vars") or {}
        raise ConfigError(
            f"--set {item}: the recipe declares no variable '{keys[1]}'; "
            f"{nearest(str(keys[1]), declared)}"
        )
    return tuple(keys)


def _substitute(document: Document, value: Any, keys: Keys, variables: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return {k: _substitute(document, v, (*keys, k), variables) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(document, v, (*keys, i), variables) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if name not in variables:
            raise document.error(
                keys, f"variable '{name}' is not declared under vars; {nearest(name, variables)}"
            )
    whole = _VARIABLE.fullmatch(value)
    # A value that is nothing but a variable keeps the variable's type.
    if whole:
        return variables[whole[1]]
    return _VARIABLE.sub(lambda match: str(variables[match[1]]), value)


@dataclass(frozen=True)
class _Absent:
    pass


def _has(value: Any, key: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(key, int) and 0 <= key < len(value)
    return isinstance(value, dict) and key in value


def _child(value: Any, key: str | int) -> Any:
    return value[key] if _has(value, key) else _Absent()


def _value_at(value: Any, keys: Keys) -> Any:
    for key in keys:
        value = _child(value, key)
    return value


def _put(data: Any, keys: Keys, value: Any) -> None:
    for key in keys[:-1]:
        if not _has(data, key):
            data[key] = {}
        data = data[key]
    data[keys[-1]] = value


def _names(items: Any) -> list[str]:
    if not isinstance(items, list):
        return []
    return [str(item["name"]) if _has(item, "name") else "" for item in items]


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, bool | None) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
