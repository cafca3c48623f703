"""Text as it comes is the text of all tokens, up to the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout.serving.text import TextStream


def decode(tokens) -> str:
    return bytes(tokens).decode("utf-8", "replace")


@given(st.text(max_size=30), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop_string(text: str, stops: list[str]):
    text = text.replace("\ufffd", "")
    stream = TextStream(decode, stops)
    pieces = [stream.add(byte) for byte in text.encode()]
    joined = "".join(pieces) + stream.end()
    # as soon as one is complete, at the longest that is
    heads = (text[: n + 1] for n in range(len(text)))
    whole = next((head for head in heads if head.endswith(tuple(stops))), None)
    if whole is None:
        assert joined == text
    else:
        assert joined == whole[: -max(len(stop) for stop in stops if whole.endswith(stop))]
    assert not any(stop in joined for stop in stops)


@given(st.text("abc", max_size=20))
def test_no_piece_is_taken_back(text: str):
    """What is out never turns out to begin a stop string."""
    stream, out = TextStream(decode, ("abc",)), ""
    for byte in text.encode():
        out += stream.add(byte)
        assert text.partition("abc")[0].startswith(out)


def test_a_character_comes_out_once_it_is_whole():
    stream = TextStream(decode)
    assert [stream.add(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    broken = TextStream(decode)
    assert broken.add(0xC3) == ""
    assert broken.end() == "\ufffd"
