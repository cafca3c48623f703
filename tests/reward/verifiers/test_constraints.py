"""Every instruction type: a response that follows and one that does not."""

# ruff: noqa: RUF001 (other scripts)

from __future__ import annotations

import pytest

from reward.types import Item, Verdict
from reward.verifiers import verify
from reward.verifiers.constraints import INSTRUCTIONS, count_sentences
from reward.verifiers.language import LANGUAGES, is_language

CASES = [
    ("keywords:existence", {"keywords": ["mom", "tea"]}, "My MOM drinks tea.", "My mom drinks."),
    (
        "keywords:frequency",
        {"relation": "at least", "keyword": "tea", "frequency": 2},
        "Tea and tea",
        "tea",
    ),
    (
        "keywords:frequency",
        {"relation": "less than", "keyword": "tea", "frequency": 2},
        "tea",
        "Tea and tea",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocket and Rocky", "A ROCK."),
    (
        "keywords:letter_frequency",
        {"let_relation": "at least", "letter": "!", "let_frequency": 2},
        "Ha! Ha!",
        "Ha!",
    ),
    (
        "keywords:letter_frequency",
        {"let_relation": "less than", "letter": "Q", "let_frequency": 1},
        "no such letter",
        "quite",
    ),
    ("language:response_language", {"language": "ko"}, "안녕하세요 친구", "hello"),
    (
        "length_constraints:number_sentences",
        {"relation": "at least", "num_sentences": 2},
        "One. Two!",
        "Dr. Smith came.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "One\n***\nTwo",
        "One\n***\n\n***\nTwo",
    ),
    (
        "length_constraints:number_words",
        {"relation": "less than", "num_words": 3},
        "two words",
        "now three words",
    ),
    (
        "length_constraints:number_words",
        {"relation": "exactly", "num_words": 3},
        "now three words",
        "two words",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "president"},
        'One here.\n\n"President, he said',
        "President one.\n\nTwo here.",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name] at [place]",
        "[name]",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Bye.\nP.S. tea",
        "Bye.\nPS tea",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "Bye. P.P.S tea",
        "Bye. P.S. tea",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n---", "* a\n**b**\nc"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and **two**",
        "**one** and * *",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Tea>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "a******b", "a******a"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say tea. "},
        "say tea. Tea!",
        "Tea! say tea.",
    ),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'Tea. "any questions?"', "Any? q"),
    ("startend:quotation", {}, ' "tea" ', '"tea'),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "DRINK hot TEA",
        "Drink TEA",
    ),
    ("change_case:english_capital", {}, "TEA, 2!", "TEa"),
    ("change_case:english_lowercase", {}, "tea, 2!", "Tea"),
    ("punctuation:no_comma", {}, "tea. milk", "tea, milk"),
]


def judge(response: str, *instructions: tuple[str, dict]) -> Verdict:
    names, kwargs = [name for name, _ in instructions], [kwargs for _, kwargs in instructions]
    arguments = {"instruction_id_list": names, "kwargs": kwargs}
    return verify(Item((), response, verifier="constraints", arguments=arguments))


def test_every_type_has_a_case():
    assert {name for name, *_ in CASES} == set(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 25


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES)
def test_each_type_tells_a_good_response_from_a_bad_one(name, kwargs, good, bad):
    assert judge(good, (name, kwargs)) == Verdict(1.0, reason="all followed")
    assert judge(bad, (name, kwargs)) == Verdict(0.0, reason=f"failed: {name}")
    assert judge(" ", (name, kwargs)).value == 0.0


LOOSE = [
    ("startend:quotation", {}, 'Sure!\n"tea"'),
    ("startend:quotation", {}, '"tea"\nAnything else?'),
    ("startend:quotation", {}, 'Sure!\n"tea"\nAnything else?'),
    ("detectable_format:json_format", {}, 'Here it is:\n{"a": 1}\nDone'),
    ("change_case:english_lowercase", {}, "Sure\nall of this is lower"),
    ("startend:end_checker", {"end_phrase": "the end."}, "Tea.\n**The end.**"),
    ("punctuation:no_comma", {}, "Well, yes.\nTea"),
]


@pytest.mark.parametrize(("name", "kwargs", "response"), LOOSE)
def test_loosely_a_first_or_last_line_and_stars_are_forgiven(name, kwargs, response):
    arguments = {"instruction_id_list": [name], "kwargs": [kwargs]}
    strict, loose = (
        verify(Item((), response, verifier="constraints", arguments={**arguments, "loose": loose}))
        for loose in (False, True)
    )
    assert (strict.value, loose.value) == (0.0, 1.0)


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES)
def test_loosely_is_never_stricter(name, kwargs, good, bad):
    arguments = {"instruction_id_list": [name], "kwargs": [kwargs], "loose": True}
    assert verify(Item((), good, verifier="constraints", arguments=arguments)).value == 1.0
    assert verify(Item((), " ", verifier="constraints", arguments=arguments)).value == 0.0


def test_loose_is_a_boolean():
    arguments = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "loose": "yes"}
    with pytest.raises(ValueError, match=r"Item.arguments\['loose'\] = 'yes', expected true or f"):
        verify(Item((), "x", verifier="constraints", arguments=arguments))


def test_the_value_is_the_share_followed_and_null_arguments_are_absent():
    verdict = judge(
        "Hot tea, please",
        ("punctuation:no_comma", {"num_words": None}),
        ("startend:quotation", {}),
        ("keywords:existence", {"keywords": ["tea"], "language": None}),
    )
    assert verdict.value == pytest.approx(1 / 3)
    assert verdict.reason == "failed: punctuation:no_comma, startend:quotation"


def test_an_undecided_instruction_is_left_out_and_alone_gives_no_verdict():
    unsure = ("language:response_language", {"language": "de"})
    assert judge("Tee", unsure) == Verdict(
        0.0, valid=False, reason="cannot tell: language:response_language"
    )
    verdict = judge("Tee", unsure, ("punctuation:no_comma", {}))
    assert (verdict.value, verdict.valid) == (1.0, True)
    assert verdict.reason == "cannot tell: language:response_language"


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ([("punctuation:no_coma", {})], "'punctuation:no_coma' is unknown, expected one of change"),
        ([("keywords:existence", {})], "keywords:existence with {}: missing keywords"),
        (
            [
                (
                    "length_constraints:number_words",
                    {"relation": "around", "num_words": 3},
                )
            ],
            "relation = 'around', expected one of at least, less than, at most, more than, exactly",
        ),
        ([("language:response_language", {"language": "tlh"})], "language = 'tlh', expected one"),
        ([], "expected lists 'instruction_id_list' and 'kwargs' of one length, at least 1"),
    ],
)
def test_wrong_instructions_are_errors(instructions, message):
    with pytest.raises(ValueError, match=message):
        judge("text", *instructions)


def test_lists_of_different_length_are_an_error():
    arguments = {"instruction_id_list": ["startend:quotation"], "kwargs": []}
    with pytest.raises(ValueError, match="of one length"):
        verify(Item((), "x", verifier="constraints", arguments=arguments))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One.", 1),
        ("One. Two? Three!", 3),
        ("It costs 3.50 at Mr. Lee's, e.g. for tea.", 1),
        ('He said "Stop!" Then he left.', 2),
        ("A title\nA line. Another", 3),
        ("Wait... what?!", 2),
        ("...", 0),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


SAMPLES = {
    "en": "The cat is on the mat and it is not happy with that.",
    "de": "Die Katze ist nicht auf dem Tisch und das ist mir egal.",
    "es": "El gato está en la mesa y no es de los vecinos, como se sabe.",
    "fi": "Kissa on pöydällä ja se ei ole iloinen, mutta hän on.",
    "fr": "Le chat est dans la maison et il ne sort pas avec les chiens.",
    "it": "Il gatto è sul tavolo e non è contento della cena che gli danno.",
    "pt": "O gato não está na mesa e a mulher saiu com os filhos para uma festa.",
    "sw": "Paka na mbwa ni wanyama wa nyumbani kwa watu katika nchi hii.",
    "vi": "Con mèo là của những người trong nhà và không được cho ăn.",
    "ru": "Кошка не на столе, и это как раз то, что он хотел.",
    "bg": "Котката не е на масата и това не се харесва на тях.",
    "ar": "القط في البيت على الطاولة من هذا الخشب",
    "fa": "این گربه در خانه است و آن را از بازار آورد",
    "ur": "یہ بلی گھر میں ہے اور اس کی ماں بھی گھر میں ہے",
    "hi": "यह बिल्ली घर में है और उसका नाम मीरा है",
    "mr": "ती मांजर घरात आहे आणि हे घर मोठे आहे",
    "ne": "यो बिरालो घरमा छ र त्यो ठूलो पनि छ",
    "th": "แมวอยู่บนโต๊ะ",
    "zh": "猫在桌子上",
    "ja": "猫は机の上にいます",
    "pa": "ਬਿੱਲੀ ਮੇਜ਼ ਤੇ ਹੈ",
}


@pytest.mark.parametrize("code", SAMPLES)
def test_a_text_is_in_its_language_and_in_no_other(code):
    assert is_language(SAMPLES[code], code) is True
    others = {other: is_language(SAMPLES[code], other) for other in LANGUAGES if other != code}
    assert not any(others.values()), others


def test_numbers_and_signs_have_no_language():
    assert is_language("1, 2, 3!", "en") is None
