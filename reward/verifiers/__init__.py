"""Rules that judge exactly: one name, one function from an item to a verdict.

A rule's verdict is in [0, 1]. A rule that could not judge (its own failure, a time limit, a
reference answer it cannot read) says `valid=False`; wrong data (an unknown rule, missing arguments)
is a ValueError, because no response can repair it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

from reward.sandbox import Sandbox, shared_sandbox
from reward.types import Item, Verdict
from reward.verifiers.code import verify_code
from reward.verifiers.constraints import verify_constraints
from reward.verifiers.facts import verify_facts
from reward.verifiers.form import verify_json, verify_language, verify_length, verify_repetition
from reward.verifiers.judge import JudgeModel, unconfigured
from reward.verifiers.math import verify_math
from reward.verifiers.text import verify_exact, verify_retrieval

__all__ = ["VERIFIERS", "verify", "verify_all"]

VERIFIERS: Mapping[str, Callable[[Item], Verdict]] = MappingProxyType(
    {
        "code": verify_code,
        "constraints": verify_constraints,
        "exact": verify_exact,
        "facts": verify_facts,
        "json": verify_json,
        "judge": unconfigured,
        "language": verify_language,
        "length": verify_length,
        "math": verify_math,
        "repetition": verify_repetition,
        "retrieval": verify_retrieval,
    }
)


def verify(
    item: Item, sandbox: Sandbox | None = None, *, judge: JudgeModel | None = None
) -> Verdict:
    """The verdict of the rule that the item names.

    Args:
        sandbox: where programs run; None takes the shared one, which refuses to run them where
            nothing isolates.
        judge: asked by the rule `judge`; None leaves that rule without a verdict.

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
    if item.verifier == "code":
        return verify_code(item, sandbox)
    if item.verifier == "judge" and judge is not None:
        return judge.verify(item)
    return VERIFIERS[item.verifier](item)


def verify_all(
    items: Sequence[Item], sandbox: Sandbox | None = None, *, judge: JudgeModel | None = None
) -> list[Verdict]:
    """One verdict an item, in order; programs run and the judge is asked side by side, as many as
    the sandbox and the judge allow.

    Raises: ValueError as `verify`.

    Example:
        >>> items = [Item((), "5", answer=answer, verifier="math") for answer in ("5", "6")]
        >>> [verdict.value for verdict in verify_all(items)]
        [1.0, 0.0]
    """
    sandbox = shared_sandbox() if sandbox is None else sandbox
    waiting = sum(item.verifier in ("code", "judge") for item in items)
    if waiting < 2:
        return [verify(item, sandbox, judge=judge) for item in items]
    places = (
        sandbox.config.places
        if judge is None
        else max(sandbox.config.places, judge.config.max_parallel)
    )
    with ThreadPoolExecutor(min(waiting, places)) as pool:
        return list(pool.map(lambda item: verify(item, sandbox, judge=judge), items))
