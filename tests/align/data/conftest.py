from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from align.data.generate import TASKS
from align.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The size that ships: 1024 tokens learned from the tasks' own text."""
    texts = (
        task.problem(index).text_row().text for task in TASKS.values() for index in range(1000)
    )
    return train_tokenizer(texts, 1024)
