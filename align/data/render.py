"""Rows to tokens through the tokenizer's chat template, with the loss only where it belongs.

A conversation is rendered and tokenised once, whole. What the assistant wrote is found by rendering
the messages before each of its turns with the generation prompt: the template's text must start
with that, so training sees exactly the tokens that a policy is given and gives. The end-of-turn
token is part of what the assistant wrote; what a template puts after it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from align.data.batch import Example, Pair
from align.data.rows import ChatRow, PreferenceRow, TextRow
from reward.types import Item, Message


def render_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Tokens of the messages up to the point where the assistant begins to write.

    Raises:
        ValueError: if the tokenizer has no chat template, end-of-turn token or offsets, or a
            message holds the text of a special token.
    """
    _check(messages, tokenizer, "prompt")
    return _encode(_text(messages, tokenizer, generation=True), tokenizer)


def render_chat(row: ChatRow, tokenizer: PreTrainedTokenizerBase) -> Example:
    """One sequence; weight 1 on every turn of the assistant, its end-of-turn token included.

    Raises:
        ValueError: as `render_prompt`; also if no turn is the assistant's, or the template does not
            give a conversation that starts with its own beginning.

    Example:
        >>> from align.data.rows import Origin
        >>> from align.data.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["ab"], 264)
        >>> chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        >>> example = render_chat(ChatRow(chat, Origin("x:1")), tokenizer)
        >>> tokenizer.convert_ids_to_tokens(example.tokens)
        ['<|begin|>', '<|user|>', 'a', '<|end|>', '<|assistant|>', 'b', '<|end|>']
        >>> example.weights
        (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    """
    return _render(row.messages, tokenizer, row.origin.place)


def render_answer(
    prompt: Sequence[Message],
    answer: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    place: str,
) -> Example:
    """Prompt and answer as one sequence; only what the assistant wrote in `answer` is trained.

    Raises:
        ValueError: as `render_chat`; also if the tokens of the prompt are not where the sequence
            begins.
    """
    example = _render((*prompt, *answer), tokenizer, place, first_trained=len(prompt))
    start = render_prompt(prompt, tokenizer)
    if example.tokens[: len(start)] != start:
        raise ValueError(
            f"{place}: tokens of the prompt are not a prefix of prompt and answer; this tokenizer "
            "merges across the border, use a chat template that ends the prompt in a special token"
        )
    return example


def render_preference(row: PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Both answers after the same prompt tokens.

    Raises:
        ValueError: as `render_answer`.
    """
    return Pair(
        chosen=render_answer(row.prompt, row.chosen, tokenizer, row.origin.place),
        rejected=render_answer(row.prompt, row.rejected, tokenizer, row.origin.place),
        signal=row.signal,
        difficulty=row.difficulty,
        margin=row.margin,
        source=row.origin.name,
        rules=row.items(),
    )


def render_item(item: Item, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens of a judged conversation, the end-of-turn token of the response last.

    Raises:
        ValueError: as `render_chat`, and if the response is empty.
    """
    answer: Message = {"role": "assistant", "content": item.response}
    example = _render((*item.messages, answer), tokenizer, "item", len(item.messages))
    # What a template puts after the end of the turn is not the response's.
    last = max(index for index, weight in enumerate(example.weights) if weight)
    return example.tokens[: last + 1]


def render_continuation(
    prompt: str, response: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], int]:
    """Tokens of a prompt that is rendered already and of the response to it, and the prompt's own.

    Args:
        prompt: text up to the point where the assistant begins to write, special tokens included.
        response: without its end-of-turn token, which is put last.

    Returns: tokens, and how many of them are the prompt's.

    Raises:
        ValueError: if the tokenizer has no end-of-turn token, or the prompt's tokens are not where
            the sequence begins.
    """
    start = _encode(prompt, tokenizer)
    tokens = (*_encode(prompt + response, tokenizer), _end(tokenizer))
    if tokens[: len(start)] != start:
        raise ValueError(
            "tokens of the prompt are not a prefix of prompt and response; end the prompt in a "
            "special token, as chat templates do"
        )
    return tokens, len(start)


def render_text(row: TextRow, tokenizer: PreTrainedTokenizerBase) -> Example:
    """One document: begin token (if the tokenizer has one), text, end token; all trained.

    Raises:
        ValueError: if the tokenizer has no end token, or the text is empty or holds the text of a
            special token.
    """
    place = row.origin.place
    if not row.text:
        raise ValueError(f"{place}: empty text; drop the row")
    _check_special(row.text, tokenizer, place)
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    tokens = (*begin, *_encode(row.text, tokenizer), _end(tokenizer))
    return Example(tokens, (0.0, *(1.0,) * (len(tokens) - 1)), place)


def plain_prompt(messages: Sequence[Message]) -> str:
    """A one-turn chat as the plain text that a base model continues.

    Raises:
        ValueError: if there is more than one message: plain text has no roles.

    Example:
        >>> plain_prompt([{"role": "user", "content": "2+3?"}])
        'Question: 2+3?\\nAnswer:'
    """
    if len(messages) != 1:
        raise ValueError(
            f"{len(messages)} messages, expected one: plain text has no roles; use form: chat"
        )
    return f"Question: {messages[0]['content']}\nAnswer:"


def render_plain_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Tokens of `plain_prompt`, begun as `render_text` begins a document.

    Raises:
        ValueError: as `plain_prompt`; also if the tokenizer has no end token, or the message holds
            the text of a special token.
    """
    text = plain_prompt(messages)
    _check_special(text, tokenizer, "prompt")
    _end(tokenizer)
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return (*begin, *_encode(text, tokenizer))


def split_windows(example: Example, limit: int) -> list[Example]:
    """Windows of at most `limit` tokens that train every token of a long text exactly once.

    Neighbours share one token: the first token of a window has nothing before it and is not
    trained there, so it is the last one of the window before.

    Raises:
        ValueError: if limit < 2.

    Example:
        >>> long = Example(tuple(range(6)), (0.0, 1.0, 1.0, 1.0, 1.0, 1.0), "a.txt:1")
        >>> [window.tokens for window in split_windows(long, 3)]
        [(0, 1, 2), (2, 3, 4), (4, 5)]
    """
    if limit < 2:
        raise ValueError(f"limit = {limit} tokens, expected >= 2")
    starts = range(0, len(example.tokens) - 1, limit - 1)
    return [
        Example(
            example.tokens[start : start + limit],
            (0.0, *example.weights[start + 1 : start + limit]),
            f"{example.place}+{start}",
        )
        for start in starts
    ]


def _render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    first_trained: int = 0,
) -> Example:
    _check(messages, tokenizer, place)
    text = _text(messages, tokenizer)
    spans = [
        _span(messages, index, text, tokenizer, place=place)
        for index in range(first_trained, len(messages))
        if messages[index]["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    weights = [0.0] * len(encoded["input_ids"])
    pending = iter(spans)
    start, end = next(pending, (len(text), len(text)))
    for index, (left, right) in enumerate(encoded["offset_mapping"]):
        if left >= end:
            start, end = next(pending, (len(text), len(text)))
        if right <= start:
            continue
        if left < start or right > end:
            raise ValueError(
                f"{place}: token {text[left:right]!r} lies across the border of an assistant turn; "
                "use a chat template that ends the prompt in a special token"
            )
        weights[index] = 1.0
    return Example(tuple(encoded["input_ids"]), tuple(weights), place)


def _span(
    messages: Sequence[Message],
    index: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    place: str,
) -> tuple[int, int]:
    """Characters of turn `index` from its first written one to its end-of-turn token."""
    before = _text(messages[:index], tokenizer, generation=True)
    through = _text(messages[: index + 1], tokenizer)
    eos = str(tokenizer.eos_token)
    stop = through.rfind(eos, len(before))
    if not (through.startswith(before) and text.startswith(through)):
        raise ValueError(
            f"{place}: the chat template renders message {index + 1} otherwise once it has been "
            "answered, so its prompt is no prefix; use a template that leaves earlier turns alone"
        )
    if stop < 0:
        raise ValueError(
            f"{place}: the chat template does not end the assistant's turn with the tokenizer's "
            f"eos_token {eos!r}; set eos_token to the template's end-of-turn token"
        )
    return len(before), stop + len(eos)


def _text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, generation: bool = False
) -> str:
    chat = cast(list[dict[str, Any]], list(messages))
    return str(
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
    )


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token; set it to the token that ends a turn")
    return int(tokenizer.eos_token_id)


def _check(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError("tokenizer has no chat_template; set one, such as align/data/chat.jinja")
    if not tokenizer.is_fast:
        raise ValueError("tokenizer gives no character offsets; use its fast version")
    _end(tokenizer)
    for message in messages:
        _check_special(message["content"], tokenizer, place)


def _check_special(text: str, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """A special token inside a message would end the turn or change its speaker."""
    for token in tokenizer.all_special_tokens:
        if token in text:
            raise ValueError(
                f"{place}: the text holds the special token {token!r}; remove or rewrite it"
            )
