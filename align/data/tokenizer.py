"""A small byte-level BPE tokenizer with the chat template built in.

Every one of the 256 bytes is a token, so any text comes back as it went in; digits stand alone, so
a number is its digits; the tokens that structure a chat lie above and are never made by text.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
NUM_BYTES = 256


def chat_template() -> str:
    """The Jinja chat template that this package ships.

    Example:
        >>> "{%- generation -%}" in chat_template()
        True
    """
    return files("align.data").joinpath("chat.jinja").read_text(encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` tokens learned from `texts`; same texts, same tokenizer.

    Args:
        texts: training text, in any pieces.
        vocab_size: tokens in all: 256 bytes, 7 special tokens, the rest learned merges.

    Raises:
        ValueError: if vocab_size leaves no room for the bytes and special tokens, or the texts are
            too few to learn that many merges.

    Example:
        >>> tokenizer = train_tokenizer(["a cat and a hat"] * 4, 265)
        >>> tokenizer.decode(tokenizer.encode("a hat: 42")), len(tokenizer)
        ('a hat: 42', 265)
    """
    specials = [BEGIN, END, PAD, *ROLES]
    least = NUM_BYTES + len(specials)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size = {vocab_size}, expected >= {least} "
            f"({NUM_BYTES} bytes and {len(specials)} special tokens)"
        )
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    found = core.get_vocab_size() + len(specials)
    if found != vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size}, but the texts give only {found} tokens; "
            f"give more text or set vocab_size to {found}"
        )
    # After training, so that the ids of the special tokens lie above all learned ones.
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(),
    )
