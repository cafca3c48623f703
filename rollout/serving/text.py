"""Tokens to text as they come: whole characters only, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

# what a decoder gives for bytes that are no whole character yet
BROKEN = "\ufffd"


class TextStream:
    """The text of one sample in pieces that, joined, are its decoded tokens up to a stop string.

    A token may end inside a character, and text may turn out to begin a stop string: such text is
    held back until it is decided.

    Args:
        decode: text of tokens; of a list and of its parts between whole characters alike.
        stops: strings of which the first to be complete ends the text, itself left out.

    Example:
        >>> stream = TextStream(lambda tokens: "".join(map(chr, tokens)), ("END",))
        >>> [stream.add(ord(letter)) for letter in "aEbEND"], stream.end()
        (['a', '', 'Eb', '', '', ''], '')
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        # text of tokens before `read` is out; it is decoded again from `start`, for a token's text
        # may depend on the one before
        self._start = self._read = 0
        self._held = ""
        self._is_over = False

    def add(self, token: int) -> str:
        """The text that this token decides."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if after.endswith(BROKEN) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._release(after[len(before) :])

    def end(self) -> str:
        """What is left when no token follows."""
        before = self._decode(self._tokens[self._start : self._read])
        rest = self._release(self._decode(self._tokens[self._start :])[len(before) :])
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        if self._is_over:
            return ""
        text, self._held = self._held + text, ""
        ends = [(text.find(stop) + len(stop), len(stop)) for stop in self._stops if stop in text]
        if ends:
            self._is_over = True
            # the first to be complete, however many characters came at once
            end, size = min(ends, key=lambda each: (each[0], -each[1]))
            return text[: end - size]
        size = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        cut = len(text) - size
        self._held = text[cut:]
        return text[:cut]
