"""Plain values as JSON, between the tests' process and the program's.

What arrives is made of Python's own types and nothing else, whatever the sender did: no class of
the sender is loaded and none of its methods runs. Anything that is no plain value stays where it is
and travels as a reference.
"""

import json
import os
from collections.abc import Callable
from typing import Any

MAX_FRAME_BYTES = 4 << 20
SEQUENCES: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
NUMBERS: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "decimal.Decimal": lambda text: _decimal(text),
    "fractions.Fraction": lambda text: _fraction(text),
}
TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}


class EndedError(Exception):
    """The other side has closed the channel, or sent what is no message."""


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """The JSON form of a value; `refer` gives that of anything that is not plain."""
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str.__str__(value)
    if isinstance(value, int):
        # Decimal digits are slow and limited in number.
        return int(value) if value.bit_length() < 63 else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [encode(each, refer) for each in value]
    if isinstance(value, dict):
        pairs = [[encode(key, refer), encode(each, refer)] for key, each in value.items()]
        return {"dict": pairs}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(each, refer) for each in value]}
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    full_name = f"{type(value).__module__}.{type(value).__name__}"
    return {full_name: str(value)} if full_name in NUMBERS else {"reference": refer(value)}


def decode(form: Any, resolve: Callable[[Any], Any]) -> Any:
    """The value of a JSON form; `resolve` gives what a reference stands for."""
    if isinstance(form, list):
        return [decode(each, resolve) for each in form]
    if not isinstance(form, dict):
        return form
    ((kind, body),) = form.items()
    if kind == "reference":
        return resolve(body)
    if kind == "dict":
        return {decode(key, resolve): decode(each, resolve) for key, each in body}
    if kind == "type":
        return TYPES[body]
    if kind == "complex":
        return complex(*body)
    if kind in NUMBERS:
        return NUMBERS[kind](body)
    return SEQUENCES[kind](decode(each, resolve) for each in body)


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Writes one message: its length in four bytes, then JSON."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a value of {len(body)} bytes; at most {MAX_FRAME_BYTES} can be passed")
    frame = len(body).to_bytes(4, "big") + body
    while frame:
        frame = frame[os.write(descriptor, frame) :]


def receive(descriptor: int) -> dict[str, Any]:
    """Reads one message. Raises: EndedError."""
    size = int.from_bytes(_read(descriptor, 4), "big")
    if size > MAX_FRAME_BYTES:
        raise EndedError(f"a message of {size} bytes")
    message = json.loads(_read(descriptor, size))
    if not isinstance(message, dict):
        raise EndedError("no message")
    return message


def _decimal(text: str) -> Any:
    # Here, not above: most programs never need it, and each run would pay for the import.
    from decimal import Decimal

    return Decimal(text)


def _fraction(text: str) -> Any:
    from fractions import Fraction

    # Not Fraction(text): "1e999999999" would be computed.
    return Fraction(*map(int, text.split("/")))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 16))
        if not part:
            raise EndedError("closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
