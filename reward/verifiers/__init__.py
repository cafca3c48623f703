"""Rules that judge exactly: one name, one function from an item to a verdict.

A rule's verdict is in [0, 1]. A rule that could not judge (its own failure, a time limit, a
reference answer it cannot read) says `valid=False`; wrong data (an unknown rule, missing arguments)
is a ValueError, because no response can repair it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from reward.types import Item, Verdict
from reward.verifiers.constraints import verify_constraints
from reward.verifiers.math import verify_math
from reward.verifiers.text import verify_exact, verify_retrieval

__all__ = ["VERIFIERS", "verify"]

VERIFIERS: Mapping[str, Callable[[Item], Verdict]] = MappingProxyType(
    {
        "constraints": verify_constraints,
        "exact": verify_exact,
        "math": verify_math,
        "retrieval": verify_retrieval,
    }
)


def verify(item: Item) -> Verdict:
    """The verdict of the rule that the item names.

    Raises: ValueError if the item names no rule, an unknown one, or lacks what the rule needs.

    Example:
        >>> prompt = ({"role": "user", "content": "2+3?"},)
        >>> verify(Item(prompt, "It is 5.", answer="5", verifier="math"))
        Verdict(value=1.0, valid=True, reason='5 equals 5')
    """
    if item.verifier not in VERIFIERS:
        raise ValueError(
            f"Item.verifier = {item.verifier!r}, expected one of {', '.join(sorted(VERIFIERS))}; "
            "name the rule in the prompt row's `verifier`"
        )
    return VERIFIERS[item.verifier](item)
