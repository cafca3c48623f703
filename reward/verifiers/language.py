"""Which language a text is in, by its script and, where languages share one, by function words.

A small judge that is sure or silent: a script used by one language of the table decides alone
(Thai, Korean, Tamil, ...); a text in another script than the wanted one is certainly not in that
language; within a shared script (Latin, Cyrillic, Arabic, Devanagari) the language whose commonest
function words occur most decides, and a text with too few of them, or a tie, is left undecided.
It does not look for a foreign sentence inside a text.
"""

# ruff: noqa: RUF001 (words of other scripts are what this file is about)

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

# Language -> (scripts as they begin Unicode character names, commonest function words).
_WORDS = {
    "en": ("LATIN", "the of and to in is that it for with as are was this be have you not"),
    "de": ("LATIN", "der die und das ist nicht ein eine zu den mit von auf sich im dem es ich"),
    "es": ("LATIN", "el la de que y en los se del las un por con una para es no su como más"),
    "fi": ("LATIN", "ja on ei se että oli olla mutta hän kun joka ovat myös kuin tai niin"),
    "fr": ("LATIN", "le la les de des et est un une du que qui dans pour pas au sur ce vous il"),
    "it": ("LATIN", "il di che e la per un in una è non sono con del della le i si da come gli"),
    "nl": ("LATIN", "de het een en van is dat niet op te zijn met voor er aan ik die ook"),
    "pt": ("LATIN", "o a de que e do da em um uma para com não os no se na por mais as você"),
    "sw": ("LATIN", "na ya wa kwa ni katika za la kuwa cha hii si pia kama hiyo yake"),
    "vi": ("LATIN", "và của là có không được cho các trong một người những với để này đã"),
    "bg": ("CYRILLIC", "и на да е се за от в с не са че като по до си ще това"),
    "ru": ("CYRILLIC", "и в не на что с он как это по но из к у за от то о для был мы вы"),
    "uk": ("CYRILLIC", "і в не на що з та як це до за але від у про є ми ви він її"),
    "ar": ("ARABIC", "في من على إلى أن هذا هذه التي الذي هو كان لا ما مع عن أو هي"),
    "fa": ("ARABIC", "است که را این در از به برای با آن می و یک های بود هم ما"),
    "ur": ("ARABIC", "ہے کے میں کی اور کا سے کو پر نہیں ہیں یہ ایک نے بھی کر تھا"),
    "hi": ("DEVANAGARI", "है के में की और का से को पर हैं नहीं यह ने एक भी था हो कि"),
    "mr": ("DEVANAGARI", "आहे आणि मी तो ती हे नाही आहेत या व हा ते मध्ये असे होते एक"),
    "ne": ("DEVANAGARI", "छ र हो छन् पनि लागि यो गर्न भएको गर्ने तर मा थियो एक हुन्छ"),
    "bn": ("BENGALI", ""),
    "el": ("GREEK", ""),
    "gu": ("GUJARATI", ""),
    "he": ("HEBREW", ""),
    "ja": ("HIRAGANA KATAKANA", ""),
    "kn": ("KANNADA", ""),
    "ko": ("HANGUL", ""),
    "ml": ("MALAYALAM", ""),
    "pa": ("GURMUKHI", ""),
    "ta": ("TAMIL", ""),
    "te": ("TELUGU", ""),
    "th": ("THAI", ""),
    "zh": ("CJK", ""),
}
LANGUAGES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = MappingProxyType(
    {
        code: (frozenset(scripts.split()), frozenset(words.split()))
        for code, (scripts, words) in _WORDS.items()
    }
)
# Fewer function words than this say nothing.
MIN_HITS = 3


def is_language(text: str, code: str) -> bool | None:
    """Whether a text is in a language; None if this judge cannot tell.

    Args:
        code: ISO 639-1, a key of `LANGUAGES`.
    Raises: ValueError for another code.

    Example:
        >>> is_language("The cat is on the mat.", "en"), is_language("The cat is on the mat.", "th")
        (True, False)
        >>> is_language("Cat!", "en") is None
        True
    """
    if code not in LANGUAGES:
        raise ValueError(f"language = {code!r}, expected one of {', '.join(sorted(LANGUAGES))}")
    scripts = Counter(unicodedata.name(sign, "?").split()[0] for sign in text if sign.isalpha())
    if not scripts:
        return None
    own, _ = LANGUAGES[code]
    if scripts.keys() & {"HIRAGANA", "KATAKANA"}:
        # Japanese mixes its syllables with Chinese signs; Chinese has no such syllables.
        scripts["HIRAGANA"] += scripts.pop("CJK", 0)
    if 2 * sum(scripts[script] for script in own) <= scripts.total():
        return False
    rivals = {name: words for name, (script, words) in LANGUAGES.items() if script == own}
    if len(rivals) == 1:
        return True
    found = re.findall(r"[^\W\d_]+(?:[\u0900-\u097f]*)", text.lower())
    hits = Counter({name: sum(word in words for word in found) for name, words in rivals.items()})
    (best, most), (_, second) = hits.most_common(2)
    return None if most < MIN_HITS or most == second else best == code
