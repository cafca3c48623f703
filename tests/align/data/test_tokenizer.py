from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.data.tokenizer import BEGIN, END, PAD, ROLES, train_tokenizer

SMALL = train_tokenizer(["the cat sat on the mat in the hat"] * 3, 275)


@given(st.text())
def test_any_text_comes_back_as_it_went_in(text: str):
    tokens = SMALL(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert SMALL.decode(tokens) == text


def test_every_byte_is_a_token():
    assert len(SMALL.convert_ids_to_tokens(range(256))) == 256
    assert SMALL.decode(SMALL.encode("".join(map(chr, range(256))))) == "".join(
        map(chr, range(256))
    )


def test_digits_stand_alone():
    assert SMALL.tokenize("12 345") == ["1", "2", "Ġ", "3", "4", "5"]


def test_special_tokens_lie_above_the_learned_ones(tokenizer: PreTrainedTokenizerFast):
    specials = tokenizer.convert_tokens_to_ids([BEGIN, END, PAD, *ROLES])
    assert specials == list(range(1017, 1024))
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token == END
    assert tokenizer.bos_token == BEGIN
    assert tokenizer.pad_token == PAD


def test_same_texts_give_the_same_tokenizer():
    texts = ["a red lamp and a blue cup", "the red cup"]
    first, second = (train_tokenizer(iter(texts), 270).backend_tokenizer for _ in range(2))
    assert first.to_str() == second.to_str()


def test_saved_tokenizer_keeps_template_and_special_tokens(tmp_path: Path):
    SMALL.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == SMALL.chat_template
    assert again.all_special_tokens == SMALL.all_special_tokens
    assert again.backend_tokenizer.to_str() == SMALL.backend_tokenizer.to_str()


def test_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size = 100, expected >= 263 \(256 bytes and 7"):
        train_tokenizer(["a"], 100)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size = 1024, but the texts give only 265 tokens"):
        train_tokenizer(["ab ab"], 1024)
