from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from align.data.batch import Example
from align.data.render import (
    render_answer,
    render_chat,
    render_item,
    render_preference,
    render_prompt,
    render_text,
    split_windows,
)
from align.data.rows import ChatRow, Origin, PreferenceRow, TextRow
from align.data.tokenizer import train_tokenizer
from reward.types import Item, Message

PLACE = Origin("chats.jsonl:3")
SMALL = train_tokenizer(["the cat sat on the mat in the hat"] * 3, 275)
TEXT = st.text(min_size=1).filter(lambda text: bool(text.strip()) and "<|" not in text)
CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def trained(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    tokens = [t for t, w in zip(example.tokens, example.weights, strict=True) if w]
    return tokenizer.decode(tokens)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = deepcopy(SMALL)
    tokenizer.chat_template = template
    return tokenizer


def test_only_what_the_assistant_wrote_is_trained_with_its_end_of_turn():
    chat = (
        {"role": "system", "content": "be kind"},
        user("hat?"),
        assistant("the hat"),
        {"role": "tool", "content": "42"},
        assistant("it is 42"),
        user("mat?"),
        assistant("on the mat"),
    )
    example = render_chat(ChatRow(chat, PLACE), SMALL)
    assert trained(example, SMALL) == "the hat<|end|>it is 42<|end|>on the mat<|end|>"
    assert set(example.weights) == {0.0, 1.0}
    assert example.place == "chats.jsonl:3"
    assert example.tokens[0] == SMALL.bos_token_id


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_tokens_and_weights_are_those_of_transformers(turns: list[tuple[str, str]]):
    chat = tuple(m for asked, said in turns for m in (user(asked), assistant(said)))
    example = render_chat(ChatRow(chat, PLACE), SMALL)
    theirs = SMALL.apply_chat_template(
        list(chat), return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(example.tokens) == theirs["input_ids"]
    assert list(example.weights) == theirs["assistant_masks"]


@settings(deadline=None)
@given(TEXT, TEXT)
def test_prompt_is_a_prefix_of_prompt_and_response(asked: str, said: str):
    prompt = render_prompt([user(asked)], SMALL)
    answered = render_answer([user(asked)], [assistant(said)], SMALL, "a:1")
    assert answered.tokens[: len(prompt)] == prompt
    assert SMALL.decode(answered.tokens[len(prompt) :]) == said + "<|end|>"
    assert answered.weights == (0.0,) * len(prompt) + (1.0,) * (len(answered.tokens) - len(prompt))


def test_earlier_turns_of_a_prompt_are_not_trained_with_the_answer():
    prompt = [user("hat?"), assistant("the hat"), user("mat?")]
    example = render_answer(prompt, [assistant("on the mat")], SMALL, "a:1")
    assert trained(example, SMALL) == "on the mat<|end|>"


def test_preference_shares_the_prompt_and_keeps_its_label():
    row = PreferenceRow(
        (user("hat?"),),
        (assistant("the hat"),),
        (assistant("no"),),
        PLACE,
        signal="style",
        difficulty=0.25,
        margin=2.0,
    )
    pair = render_preference(row, SMALL)
    assert trained(pair.chosen, SMALL) == "the hat<|end|>"
    assert trained(pair.rejected, SMALL) == "no<|end|>"
    assert (pair.signal, pair.difficulty, pair.margin) == ("style", 0.25, 2.0)
    prompt = render_prompt(row.prompt, SMALL)
    assert pair.chosen.tokens[: len(prompt)] == pair.rejected.tokens[: len(prompt)] == prompt


def test_item_ends_in_the_end_of_turn_token():
    for tokenizer in (SMALL, with_template(CHATML)):
        tokens = render_item(Item((user("hat?"),), "the hat"), tokenizer)
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens).endswith("the hat<|end|>")


def test_what_a_template_puts_after_the_turn_is_not_trained():
    example = render_chat(
        ChatRow((user("hat?"), assistant("the hat")), PLACE), with_template(CHATML)
    )
    assert SMALL.decode(example.tokens).endswith("the hat<|end|>\n")
    assert trained(example, SMALL) == "the hat<|end|>"


def test_text_is_trained_whole():
    example = render_text(TextRow("the cat", Origin("a.txt:1")), SMALL)
    assert SMALL.decode(example.tokens) == "<|begin|>the cat<|end|>"
    assert example.weights == (0.0, *(1.0,) * (len(example.tokens) - 1))


def test_text_needs_no_begin_token():
    tokenizer = deepcopy(SMALL)
    tokenizer.bos_token = None
    example = render_text(TextRow("the cat", Origin("a.txt:1")), tokenizer)
    assert tokenizer.decode(example.tokens) == "the cat<|end|>"


@given(st.integers(2, 60), st.integers(2, 20))
def test_windows_train_every_token_exactly_once(length: int, limit: int):
    whole = Example(tuple(range(length)), (0.0, *(1.0,) * (length - 1)), "a.txt:1")
    windows = split_windows(whole, limit)
    trained_tokens = [
        token
        for window in windows
        for token, weight in zip(window.tokens, window.weights, strict=True)
        if weight
    ]
    assert trained_tokens == list(range(1, length))
    assert all(len(window.tokens) <= limit for window in windows)
    assert len({window.place for window in windows}) == len(windows)


def test_windows_of_one_token_are_refused():
    with pytest.raises(ValueError, match="limit = 1 tokens, expected >= 2"):
        split_windows(Example((1, 2), (0.0, 1.0), "a"), 1)


def test_missing_chat_template_is_named():
    with pytest.raises(ValueError, match="tokenizer has no chat_template; set one"):
        render_prompt([user("hat?")], with_template(None))


def test_missing_end_of_turn_token_is_named():
    tokenizer = deepcopy(SMALL)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer has no eos_token; set it to the token that"):
        render_prompt([user("hat?")], tokenizer)
    with pytest.raises(ValueError, match="tokenizer has no eos_token"):
        render_text(TextRow("the cat", PLACE), tokenizer)


def test_template_without_end_of_turn_is_refused():
    plain = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    plain += "{% if add_generation_prompt %}<|user|>{% endif %}"
    with pytest.raises(ValueError, match=r"3: the chat template does not end .* eos_token '<\|end"):
        render_chat(ChatRow((user("hat?"), assistant("the hat")), PLACE), with_template(plain))


def test_template_that_changes_earlier_turns_is_refused():
    last_only = "{{ messages[-1].content }}<|end|>{% if add_generation_prompt %}<|user|>{% endif %}"
    with pytest.raises(ValueError, match=r"chats.jsonl:3: the chat template renders message 2"):
        render_chat(ChatRow((user("hat?"), assistant("the hat")), PLACE), with_template(last_only))


def test_template_that_merges_across_the_border_is_refused():
    glued = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    glued += "{% endfor %}"
    with pytest.raises(ValueError, match="lies across the border of an assistant turn"):
        render_chat(ChatRow((user("the ca"), assistant("t")), PLACE), with_template(glued))


@pytest.mark.parametrize("text", ["a <|end|> b", "<|assistant|>"])
def test_special_token_in_a_text_is_refused(text: str):
    message = r"the text holds the special token '<\|\w+\|>'; remove or rewrite it"
    with pytest.raises(ValueError, match=f"chats.jsonl:3: {message}"):
        render_chat(ChatRow((user("hat?"), assistant(text)), PLACE), SMALL)
    with pytest.raises(ValueError, match=f"chats.jsonl:3: {message}"):
        render_text(TextRow(text, PLACE), SMALL)


def test_empty_text_is_refused():
    with pytest.raises(ValueError, match=r"chats.jsonl:3: empty text; drop the row"):
        render_text(TextRow("", PLACE), SMALL)


def test_unknown_role_is_refused_by_the_template():
    with pytest.raises(Exception, match="unknown role: judge"):
        SMALL.apply_chat_template([{"role": "judge", "content": "x"}], tokenize=False)
