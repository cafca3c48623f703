"""Rules on plain text: the exact answer, and the share of known answers that a response holds."""

from __future__ import annotations

import re

from reward.types import Item, Verdict


def verify_exact(item: Item) -> Verdict:
    """1 if the response is the answer, letter by letter, outer white space aside.

    Raises: ValueError if the item has no answer.

    Example:
        >>> verify_exact(Item((), " b a \\n", answer="b a", verifier="exact")).value
        1.0
    """
    answer = item.answer.strip()
    if not answer:
        raise ValueError("Item.answer = '' for verifier exact; expected the reference answer")
    same = item.response.strip() == answer
    return Verdict(float(same), reason="equals the answer" if same else "differs from the answer")


def verify_retrieval(item: Item) -> Verdict:
    """Share of the wanted answers that stand in the response as whole words, in any case.

    Args:
        item: arguments {"answers": [text, ...]}, at least one, none empty.
    Raises: ValueError if the answers are missing, empty, or not text.

    Example:
        >>> arguments = {"answers": ["7 31", "8"]}
        >>> verify_retrieval(Item((), "They are 7  31 and 18.", arguments=arguments))
        Verdict(value=0.5, valid=True, reason='1 of 2 answers found; missing: 8')
    """
    answers = item.arguments.get("answers")
    if (
        not isinstance(answers, list | tuple)
        or not answers
        or not all(isinstance(answer, str) and answer.strip() for answer in answers)
    ):
        raise ValueError(
            f"Item.arguments['answers'] = {answers!r} for verifier retrieval; "
            "expected a list of one text or more, none empty"
        )
    missing = [answer for answer in answers if not _holds(item.response, answer)]
    found = len(answers) - len(missing)
    tail = f"; missing: {', '.join(missing)}" if missing else ""
    return Verdict(found / len(answers), reason=f"{found} of {len(answers)} answers found{tail}")


def _holds(text: str, answer: str) -> bool:
    # Lookarounds, not \b: an answer may begin or end with a sign such as "$5" or "C++".
    words = r"\s+".join(re.escape(word) for word in answer.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None
