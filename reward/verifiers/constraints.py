"""The exact rule for instructions about form: IFEval's 25 types, judged strictly or loosely.

Names and arguments are those of "Instruction-Following Evaluation for Large Language Models" (Zhou
et al., 2023, arXiv 2311.07911); the checks are written from its descriptions. Where we differ:
sentences are split by a small rule instead of a trained splitter, all-capital words are counted on
runs of letters, a line of dashes is no bullet, a postscript begins a word, and the language is
judged by `reward.verifiers.language`, which may abstain.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from reward.types import Item, Verdict
from reward.verifiers.language import is_language

RELATIONS: Mapping[str, Callable[[int, int], bool]] = MappingProxyType(
    {
        "at least": operator.ge,
        "less than": operator.lt,
        "at most": operator.le,
        "more than": operator.gt,
        "exactly": operator.eq,
    }
)
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|Inc|Ltd|Co|No|U\.S|[A-Z])\.$"
)

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Instruction:
    """One type of instruction: its check (None = cannot tell) and the arguments it needs."""

    check: Callable[[str, Arguments], bool | None]
    needs: tuple[str, ...] = ()


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores.

    Example:
        >>> count_words("It's 3 words?")
        4
    """
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Pieces that end in . ! ? (or a line that ends without); common abbreviations do not end one.

    Example:
        >>> count_sentences("Dr. Smith paid $3.50. Why? Nobody knows")
        3
    """
    count = 0
    for line in filter(str.strip, text.splitlines()):
        start = 0
        for end in re.finditer(r"[.!?\u3002\uff01\uff1f]+[\"')\]\u201d\u2019]*(?=\s|$)", line):
            piece = line[start : end.end()]
            if not _ABBREVIATION.search(piece) and re.search(r"\w", piece):
                count, start = count + 1, end.end()
        count += re.search(r"\w", line[start:]) is not None
    return count


def _compare(count: int, arguments: Arguments, *, relation: str, number: str) -> bool:
    name = arguments[relation]
    if name not in RELATIONS:
        raise ValueError(f"{relation} = {name!r}, expected one of {', '.join(RELATIONS)}")
    return RELATIONS[name](count, int(arguments[number]))


def _count(
    counter: Callable[[str, Arguments], int], *, relation: str, number: str, also: str = ""
) -> Instruction:
    """An instruction that compares a count with a number by a named relation."""
    return Instruction(
        lambda text, arguments: _compare(
            counter(text, arguments), arguments, relation=relation, number=number
        ),
        (relation, number, *([also] if also else [])),
    )


def _find(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text, re.IGNORECASE)


def _has_words(text: str, arguments: Arguments) -> bool:
    return all(_find(re.escape(word), text) for word in arguments["keywords"])


def _lacks_words(text: str, arguments: Arguments) -> bool:
    words = arguments["forbidden_words"]
    return not any(_find(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in words)


def _capital_words(text: str, arguments: Arguments) -> int:
    del arguments
    words = re.findall(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*", text)
    return sum(word.isupper() for word in words)


def _paragraphs(text: str, arguments: Arguments) -> bool:
    pieces = re.split(r"\s?\*\*\*\s?", text)
    # A divider before the first or after the last paragraph separates nothing.
    inner = pieces[int(not pieces[0].strip()) : len(pieces) - int(not pieces[-1].strip())]
    return all(map(str.strip, inner)) and len(inner) == int(arguments["num_paragraphs"])


def _paragraph_starts(text: str, arguments: Arguments) -> bool:
    pieces = [piece.strip() for piece in re.split(r"\n\n", text)]
    place = int(arguments["nth_paragraph"])
    if len([p for p in pieces if p]) != int(arguments["num_paragraphs"]) or place > len(pieces):
        return False
    first = re.match(r"[\"'\u201c\u2018(*_]*([^\s.,?!'\"\u201d\u2019;:)*_]+)", pieces[place - 1])
    return first is not None and first[1].lower() == str(arguments["first_word"]).lower()


def _highlights(text: str, arguments: Arguments) -> bool:
    double = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    # Doubled stars are taken out first: each half would look like a star of a single section.
    rest = re.sub(r"\*\*[^\n*]*\*\*", " ", text)
    single = [part for part in re.findall(r"\*([^\n*]+)\*", rest) if part.strip()]
    return len(single) + len(double) >= int(arguments["num_highlights"])


def _bullets(text: str, arguments: Arguments) -> bool:
    items = re.findall(r"^\s*(?:\*[^*]|-[^-]).*$", text, re.MULTILINE)
    return len(items) == int(arguments["num_bullets"])


def _sections(text: str, arguments: Arguments) -> bool:
    name = re.escape(str(arguments["section_spliter"]))
    return len(re.findall(rf"\s?{name}\s?\d+\s?", text)) >= int(arguments["num_sections"])


def _title(text: str, arguments: Arguments) -> bool:
    del arguments
    return any(title.strip("< >") for title in re.findall(r"<<[^\n]+>>", text))


def _json(text: str, arguments: Arguments) -> bool:
    del arguments
    body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = str(arguments["postscript_marker"]).strip()
    letters = re.sub(r"[^A-Za-z]", "", marker)
    if letters.lower() in ("ps", "pps"):
        pattern = r"\.\s?".join(letters) + (r"\." if marker.endswith(".") else "")
        return bool(_find(rf"(?m)^\s*{pattern}(?!\w).*$|\s{pattern}(?!\w).*$", text))
    return marker.lower() in text.lower()


def _placeholders(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= int(arguments["num_placeholders"])


def _two_responses(text: str, arguments: Arguments) -> bool:
    del arguments
    pieces = [piece.strip() for piece in text.split("******")]
    inner = pieces[int(not pieces[0]) : len(pieces) - int(not pieces[-1])]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _repeats(text: str, arguments: Arguments) -> bool:
    return text.strip().lower().startswith(str(arguments["prompt_to_repeat"]).strip().lower())


def _ends(text: str, arguments: Arguments) -> bool:
    end = str(arguments["end_phrase"]).strip().lower()
    return text.strip().strip('"').strip().lower().endswith(end)


def _quoted(text: str, arguments: Arguments) -> bool:
    del arguments
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


def _in_case(text: str, *, is_upper: bool) -> bool:
    # Letters without case (other scripts) are neither, so such a text is not English.
    letters = [sign for sign in text if sign.isalpha()]
    return bool(letters) and all(s.isupper() if is_upper else s.islower() for s in letters)


INSTRUCTIONS: Mapping[str, Instruction] = MappingProxyType(
    {
        "keywords:existence": Instruction(_has_words, ("keywords",)),
        "keywords:frequency": _count(
            lambda text, a: len(_find(re.escape(str(a["keyword"])), text)),
            relation="relation",
            number="frequency",
            also="keyword",
        ),
        "keywords:forbidden_words": Instruction(_lacks_words, ("forbidden_words",)),
        "keywords:letter_frequency": _count(
            lambda text, a: text.lower().count(str(a["letter"]).lower()),
            relation="let_relation",
            number="let_frequency",
            also="letter",
        ),
        "language:response_language": Instruction(
            lambda text, a: is_language(text, a["language"]), ("language",)
        ),
        "length_constraints:number_sentences": _count(
            lambda text, _: count_sentences(text), relation="relation", number="num_sentences"
        ),
        "length_constraints:number_paragraphs": Instruction(_paragraphs, ("num_paragraphs",)),
        "length_constraints:number_words": _count(
            lambda text, _: count_words(text), relation="relation", number="num_words"
        ),
        "length_constraints:nth_paragraph_first_word": Instruction(
            _paragraph_starts, ("num_paragraphs", "nth_paragraph", "first_word")
        ),
        "detectable_content:number_placeholders": Instruction(_placeholders, ("num_placeholders",)),
        "detectable_content:postscript": Instruction(_postscript, ("postscript_marker",)),
        "detectable_format:number_bullet_lists": Instruction(_bullets, ("num_bullets",)),
        "detectable_format:constrained_response": Instruction(
            lambda text, _: any(option in text for option in _OPTIONS)
        ),
        "detectable_format:number_highlighted_sections": Instruction(
            _highlights, ("num_highlights",)
        ),
        "detectable_format:multiple_sections": Instruction(
            _sections, ("section_spliter", "num_sections")
        ),
        "detectable_format:json_format": Instruction(_json),
        "detectable_format:title": Instruction(_title),
        "combination:two_responses": Instruction(_two_responses),
        "combination:repeat_prompt": Instruction(_repeats, ("prompt_to_repeat",)),
        "startend:end_checker": Instruction(_ends, ("end_phrase",)),
        "startend:quotation": Instruction(_quoted),
        "change_case:capital_word_frequency": _count(
            _capital_words, relation="capital_relation", number="capital_frequency"
        ),
        "change_case:english_capital": Instruction(lambda text, _: _in_case(text, is_upper=True)),
        "change_case:english_lowercase": Instruction(
            lambda text, _: _in_case(text, is_upper=False)
        ),
        "punctuation:no_comma": Instruction(lambda text, _: "," not in text),
    }
)


def verify_constraints(item: Item) -> Verdict:
    """Share of the instructions that the response follows; the reason names those it does not.

    An empty response follows none. An instruction that cannot be judged is left out of the share;
    if none can, the verdict is not valid. Judged loosely, an instruction is also followed if it is
    without the response's first line, its last line or both (a greeting, a closing remark), each
    with and without stars: IFEval's eight readings.

    Args:
        item: arguments {"instruction_id_list": [id, ...], "kwargs": [{...}, ...]} as in IFEval;
            arguments that are null are as good as absent. {"loose": true} judges loosely.
    Raises: ValueError if the lists are missing, empty or of different length, for an unknown
        instruction, for a missing or wrong argument, and if loose is no boolean.

    Example:
        >>> arguments = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        ...              "kwargs": [{}, {}]}
        >>> verify_constraints(Item((), "No commas here.", arguments=arguments))
        Verdict(value=0.5, valid=True, reason='failed: startend:quotation')
    """
    names, all_arguments = _instructions(item)
    readings = _readings(item)
    failed, unknown = [], []
    for name, arguments in zip(names, all_arguments, strict=True):
        try:
            followed = _followed(INSTRUCTIONS[name], readings, arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} with {dict(arguments)}: {error}") from error
        if followed is None:
            unknown.append(name)
        elif not followed:
            failed.append(name)
    judged = len(names) - len(unknown)
    parts = [f"failed: {', '.join(failed)}"] if failed else []
    parts += [f"cannot tell: {', '.join(unknown)}"] if unknown else []
    reason = "; ".join(parts) or "all followed"
    if not judged:
        return Verdict(0.0, valid=False, reason=reason)
    return Verdict(1 - len(failed) / judged, reason=reason)


def _readings(item: Item) -> list[str]:
    """The texts of which one has to follow; none of them is empty."""
    is_loose = item.arguments.get("loose", False)
    if not isinstance(is_loose, bool):
        raise ValueError(f"Item.arguments['loose'] = {is_loose!r}, expected true or false")
    lines = item.response.split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]] if is_loose else [lines]
    texts = ["\n".join(part).strip() if is_loose else item.response for part in parts]
    if is_loose:
        texts += [text.replace("*", "") for text in texts]
    return [text for text in texts if text.strip()]


def _followed(instruction: Instruction, readings: list[str], arguments: Arguments) -> bool | None:
    found = [instruction.check(text, arguments) for text in readings]
    return True if True in found else None if None in found else False


def _instructions(item: Item) -> tuple[list[str], list[Arguments]]:
    names = item.arguments.get("instruction_id_list")
    kwargs = item.arguments.get("kwargs")
    if (
        not isinstance(names, list | tuple)
        or not isinstance(kwargs, list | tuple)
        or not names
        or len(names) != len(kwargs)
    ):
        raise ValueError(
            f"Item.arguments = {dict(item.arguments)} for verifier constraints; expected lists "
            "'instruction_id_list' and 'kwargs' of one length, at least 1"
        )
    cleaned: list[Arguments] = []
    for name, arguments in zip(names, kwargs, strict=True):
        if name not in INSTRUCTIONS:
            raise ValueError(f"instruction {name!r} is unknown, expected one of {_known()}")
        given = {key: value for key, value in (arguments or {}).items() if value is not None}
        missing = [key for key in INSTRUCTIONS[name].needs if key not in given]
        if missing:
            raise ValueError(f"{name} with {given}: missing {', '.join(missing)}")
        cleaned.append(given)
    return list(names), cleaned


def _known() -> str:
    return ", ".join(sorted(INSTRUCTIONS))
