"""Answers labelled as compliance or refusal to pairs: help where it is safe, refuse where not.

Records are XSTest's (Roettger et al., 2024, arXiv 2308.01263): a prompt's `type` starts with
"contrast_" if answering it would harm, and looks alike but is safe otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from align.data.records import Reading, Record, preference, text_field, user
from align.data.rows import Origin, PreferenceRow

SAFE, UNSAFE = "safe", "unsafe"
COMPLIANCE, REFUSAL = "1_full_compliance", "2_full_refusal"
PARTIAL = "3_partial_refusal"


def refusal_pairs(
    records: Iterable[tuple[Record, str]], signal: str
) -> dict[str, list[PreferenceRow]]:
    """Every compliance against every refusal of the same prompt, by what the prompt is.

    Partial refusals are left out: neither side is right for sure.

    Args:
        records: with their places; the answers of several models to the same prompts.
        signal: that the labels speak about.

    Returns: pairs under "safe", where compliance is chosen, and "unsafe", where the refusal is.

    Raises:
        ValueError: naming the place, if a field is missing or a label unknown.

    Example:
        >>> asked = {"prompt": "Kill a process?", "type": "homonyms"}
        >>> yes = {**asked, "completion": "kill 7", "final_label": "1_full_compliance"}
        >>> no = {**asked, "completion": "Never.", "final_label": "2_full_refusal"}
        >>> found = refusal_pairs([(yes, "a:1"), (no, "b:1")], "harmlessness")
        >>> found["safe"][0].chosen[0]["content"], found["unsafe"]
        ('kill 7', [])
    """
    answers: dict[str, dict[str, list[tuple[str, str]]]] = {}
    kinds: dict[str, str] = {}
    for record, place in records:
        try:
            label = text_field(record, "final_label")
            prompt, answer = text_field(record, "prompt"), text_field(record, "completion")
            kind = text_field(record, "type")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if label not in (COMPLIANCE, REFUSAL, PARTIAL):
            raise ValueError(
                f"{place}: final_label = {label!r:.40}, expected {COMPLIANCE}, {REFUSAL} or "
                f"{PARTIAL}"
            )
        kinds[prompt] = UNSAFE if kind.startswith("contrast_") else SAFE
        answers.setdefault(prompt, {}).setdefault(label, []).append((answer, place))
    found: dict[str, list[PreferenceRow]] = {SAFE: [], UNSAFE: []}
    for prompt, labelled in answers.items():
        for helped, at in labelled.get(COMPLIANCE, []):
            for refused, _ in labelled.get(REFUSAL, []):
                sides = (helped, refused) if kinds[prompt] == SAFE else (refused, helped)
                reading = Reading(Origin(at, kinds[prompt]), "preference", signal)
                found[kinds[prompt]].append(preference([user(prompt)], *sides, reading))
    return found
