"""Prompt and response as other trainers send them, read as an item: one text, template and all."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from align.data.render import render_continuation
from align.prompts import malformed
from reward.scorer import Encoded
from reward.serving.types import Task
from reward.types import Item


def query_reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], Task | None]:
    """A reader of (prompt, query), where the query is the prompt and the response to it.

    A prompt that holds a special token is a chat that was rendered already, and its tokens are read
    as they stand; any other is the text of one user message. Padding around the query and one
    end-of-turn token after it are not the response's. The reader gives None for a response that is
    no legal turn: nothing but white space, or special tokens inside.

    The reader raises ValueError if a query does not begin with its prompt.

    Example:
        >>> from align.data.tokenizer import train_tokenizer
        >>> read = query_reader(train_tokenizer(["2+3?"], 263))
        >>> read("2+3?", "2+3?5<|end|>").item.response
        '5'
    """
    specials = [str(token) for token in tokenizer.all_special_tokens]
    pad, end = str(tokenizer.pad_token or ""), str(tokenizer.eos_token or "")

    def read(prompt: str, query: str) -> Task | None:
        text = query
        if pad and not prompt.startswith(pad):
            text = _without(text, pad, front=True)
        if not text.startswith(prompt):
            raise ValueError("the query does not begin with its prompt")
        response = text[len(prompt) :]
        if pad:
            response = _without(response, pad, front=False)
        response = response.removesuffix(end)
        if malformed(response, tokenizer):
            return None
        item = Item(({"role": "user", "content": prompt},), response)
        if not any(token in prompt for token in specials):
            return Task(item)
        return Task(item, lambda: Encoded(*render_continuation(prompt, response, tokenizer)))

    return read


def _without(text: str, pad: str, *, front: bool) -> str:
    while text.startswith(pad) if front else text.endswith(pad):
        text = text.removeprefix(pad) if front else text.removesuffix(pad)
    return text
