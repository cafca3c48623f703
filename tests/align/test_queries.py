"""Prompts and queries of other trainers: the same tokens as the item's own rendering."""

from __future__ import annotations

import pytest

from align.data.render import render_item, render_prompt
from align.data.tokenizer import train_tokenizer
from align.queries import query_reader
from reward.types import Item

TOKENIZER = train_tokenizer(["what is two and three? five, of course, said the cat"] * 4, 290)
READ = query_reader(TOKENIZER)
CHAT = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "two and three?"})
PROMPT = TOKENIZER.apply_chat_template(list(CHAT), tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("tail", ["", "<|end|>", "<|end|><|pad|><|pad|>", "<|pad|>"])
def test_a_rendered_chat_is_read_as_its_item_would_be(tail):
    task = READ(PROMPT, "<|pad|><|pad|>" + PROMPT + "five" + tail)
    encoded = task.encode()
    assert encoded.tokens == render_item(Item(CHAT, "five"), TOKENIZER)
    assert encoded.tokens[: encoded.num_prompt_tokens] == render_prompt(CHAT, TOKENIZER)
    assert task.item.response == "five"


def test_plain_text_is_one_user_message():
    task = READ("two and three?", "two and three? five<|end|>")
    assert task.encode is None
    assert task.item == Item(({"role": "user", "content": "two and three?"},), " five")


@pytest.mark.parametrize(
    "response", ["", "  \n", "<|end|>", "a<|user|>b<|end|>", "a<|end|><|end|>"]
)
def test_a_response_that_is_no_legal_turn_is_none(response):
    assert READ(PROMPT, PROMPT + response) is None


def test_a_query_of_another_prompt_is_an_error():
    with pytest.raises(ValueError, match="the query does not begin with its prompt"):
        READ(PROMPT, "five")
    with pytest.raises(ValueError, match="not a prefix of prompt and response"):
        READ(PROMPT + "of cour", PROMPT + "of course").encode()
