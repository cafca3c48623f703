"""Keys of services, read from the environment: a key in a recipe or a command would be seen."""

from __future__ import annotations

import os


def key_of(variable: str, name: str) -> str:
    """What a variable holds; "" for no variable.

    Args:
        name: of the option or key that names the variable, for the message.

    Raises: ValueError if there is no such variable, or it is empty.
    """
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ValueError(f"{name} = {variable}: no such variable, or it is empty; set it")
    return key
