"""The policy that a recipe starts from: made here, or found where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from align.data.rows import ChatRow, PreferenceRow, Row, TextRow
from align.data.sources import read_rows
from align.data.tokenizer import train_tokenizer
from align.policy import save_policy
from model import HybridForCausalLM, preset
from stages.recipe import ModelConfig, TokenizerConfig


def make_start(config: ModelConfig, temporary: Path, base: Path) -> Path:
    """The folder to read the recipe's first policy from.

    A preset is filled with random weights into `temporary`; any other origin is used where it
    stands and `temporary` stays empty.

    Args:
        config: exactly one origin, checked.
        temporary: empty folder.
        base: folder that relative paths are resolved against.

    Raises:
        RuntimeError: the hub cannot be reached and the checkpoint is not in its local cache.
    """
    outside = config.folder(base)
    if outside is not None:
        return outside
    if config.tokenizer is None:
        return _download(config)
    tokenizer = _tokenizer(config.tokenizer, base, config.seed)
    set_seed(config.seed)
    shape = preset(
        config.preset,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_policy(HybridForCausalLM(shape), tokenizer, temporary)
    return temporary


def _download(config: ModelConfig) -> Path:
    try:
        return Path(snapshot_download(config.hub, revision=config.revision))
    except OSError as error:
        first = str(error).splitlines()[0]
        raise RuntimeError(
            f"model.hub = {config.hub}@{config.revision}: cannot be had ({first}); check the name "
            "and the network, or download it and use model.path"
        ) from error


def _tokenizer(config: TokenizerConfig, base: Path, seed: int) -> PreTrainedTokenizerBase:
    if config.path:
        return AutoTokenizer.from_pretrained(base / config.path, local_files_only=True)
    rows = (r for s in config.data for r in read_rows(s, base=base, inputs={}, seed=seed))
    return train_tokenizer((text for row in rows for text in _texts(row)), config.vocab_size)


def _texts(row: Row) -> Iterator[str]:
    if isinstance(row, TextRow):
        yield row.text
        return
    if isinstance(row, ChatRow):
        messages = row.messages
    elif isinstance(row, PreferenceRow):
        messages = (*row.prompt, *row.chosen, *row.rejected)
    else:
        messages = row.prompt
    yield from (message["content"] for message in messages)
