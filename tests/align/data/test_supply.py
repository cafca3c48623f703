from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from align.course import Job
from align.data.batch import Example, Pair
from align.data.rows import ChatRow, Origin, TextRow
from align.data.sources import DataConfig, read_rows
from align.data.supply import supply_chats, supply_pairs, supply_texts, write_rows


@dataclass(frozen=True)
class Fixed:
    data: tuple[DataConfig, ...]
    sequence_tokens: int = 256
    batch_sequences: int = 2
    batch_items: int = 0
    micro_sequences: int = 1
    epochs: int = 1
    max_steps: int = 0
    shuffle: bool = False


def fixed(*sources: dict[str, Any], **more: Any) -> Fixed:
    return Fixed(tuple(DataConfig.model_validate(source) for source in sources), **more)


def job(base: Path, **inputs: Path) -> Job:
    return Job("sft", base, base, base, base, 3, Accelerator(cpu=True), inputs)


def write(path: Path, *records: Any) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def chat(asked: str, said: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    }


def test_sources_come_in_order_with_an_entry_each(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    write(tmp_path / "a.jsonl", chat("2+2?", "4"), chat("2+3?", "5"))
    config = fixed(
        {"path": "a.jsonl", "split": "all", "licence": "MIT", "weight": 2},
        {"task": "copy", "num_rows": 10, "weight": 0.5},
    )
    data, told = supply_chats(config, job(tmp_path), tokenizer)
    places = [item.place for item in data.items if isinstance(item, Example)]
    assert places[:4] == ["a.jsonl:1", "a.jsonl:2"] * 2
    assert len(places) == 9
    assert all(place.startswith("copy#3/") for place in places[4:])
    assert dict(told[0]) == {
        "name": "a.jsonl",
        "place": "a.jsonl",
        "licence": "MIT",
        "rows": 2,
        "held_out": 0,
        "skipped": 0,
        "reasons": (),
        "too_long": 0,
        "taken": 4,
        "tokens": sum(data.lengths[:4]),
    }
    assert (told[1]["rows"], told[1]["taken"]) == (10, 5)
    assert json.dumps(told)


def test_pairs_are_supplied_from_a_task(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    config = fixed({"task": "safety", "num_rows": 10}, batch_items=4)
    data, _ = supply_pairs(config, job(tmp_path), tokenizer)
    assert all(isinstance(item, Pair) for item in data.items)
    assert [sum(len(batch.pairs) for batch in data.batches(step)) for step in range(3)] == [4, 4, 2]


def test_texts_are_trained_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    data, _ = supply_texts(fixed({"task": "copy", "num_rows": 5}), job(tmp_path), tokenizer)
    assert len(data.items) == 5
    for item in data.items:
        assert isinstance(item, Example)
        assert item.num_trained == len(item.tokens) - 1


LONG = {"text": "a long river and a cold garden " * 20}


def test_too_long_is_an_error_by_default(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    write(tmp_path / "a.jsonl", LONG)
    config = fixed({"path": "a.jsonl", "split": "all"}, sequence_tokens=32)
    message = r"a.jsonl:1: \d+ tokens, longer than sequence_tokens = 32; raise it, or set too_long"
    with pytest.raises(ValueError, match=message):
        supply_texts(config, job(tmp_path), tokenizer)


def test_too_long_is_skipped_and_counted_if_told_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    write(tmp_path / "a.jsonl", LONG, {"text": "a cat"})
    source = {"path": "a.jsonl", "split": "all", "too_long": "skip"}
    data, (told,) = supply_texts(fixed(source, sequence_tokens=32), job(tmp_path), tokenizer)
    assert len(data.items) == told["rows"] == told["too_long"] == 1


def test_too_long_text_is_split_without_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    write(tmp_path / "a.jsonl", LONG)
    source = {"path": "a.jsonl", "split": "all", "too_long": "split"}
    whole, _ = supply_texts(fixed(source, sequence_tokens=4096), job(tmp_path), tokenizer)
    parts, (told,) = supply_texts(fixed(source, sequence_tokens=32), job(tmp_path), tokenizer)
    assert len(whole.items) == told["rows"] == 1
    assert max(parts.lengths) <= 32
    trained = [sum(item.num_trained for item in data.items) for data in (whole, parts)]
    assert trained[0] == trained[1]


def test_too_long_chat_cannot_be_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    write(tmp_path / "a.jsonl", chat(LONG["text"], "ok"))
    source = {"path": "a.jsonl", "split": "all", "too_long": "split"}
    with pytest.raises(ValueError, match=r"longer than sequence_tokens = 32.*text rows also take"):
        supply_chats(fixed(source, sequence_tokens=32), job(tmp_path), tokenizer)


def test_nothing_left_after_skipping_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    write(tmp_path / "a.jsonl", LONG)
    source = {"path": "a.jsonl", "split": "all", "too_long": "skip"}
    with pytest.raises(ValueError, match=r"a.jsonl: no row is left of 1 \(1 longer than sequence"):
        supply_texts(fixed(source, sequence_tokens=32), job(tmp_path), tokenizer)


def test_row_that_cannot_be_rendered_follows_the_policy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    write(tmp_path / "a.jsonl", {"text": "a <|end|> b"}, {"text": "a cat"})
    source = {"path": "a.jsonl", "split": "all"}
    with pytest.raises(ValueError, match=r"a.jsonl:1: the text holds the special token.*on_bad"):
        supply_texts(fixed(source), job(tmp_path), tokenizer)
    _, (told,) = supply_texts(fixed(source | {"on_bad_row": "skip"}), job(tmp_path), tokenizer)
    assert (told["rows"], told["skipped"]) == (1, 1)
    assert told["reasons"][0].startswith("a.jsonl:1: the text holds the special token")


def test_source_of_another_kind_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    source = {"task": "copy", "num_rows": 2, "as": "prompt", "on_bad_row": "skip"}
    with pytest.raises(ValueError, match=r"copy#3/\d+: a PromptRow, expected a chat or text row"):
        supply_chats(fixed(source), job(tmp_path), tokenizer)
    with pytest.raises(ValueError, match=r"copy#3/\d+: a PromptRow, expected a preference row"):
        supply_pairs(fixed(source), job(tmp_path), tokenizer)


def test_written_rows_are_read_by_another_stage(tmp_path: Path):
    messages = ({"role": "user", "content": "é\u2028"}, {"role": "assistant", "content": "4"})
    rows = [ChatRow(messages, Origin("x")), TextRow("a\nb", Origin("y"))]
    write_rows(tmp_path / "rows.jsonl", rows)
    source = DataConfig.model_validate({"from": "pairs", "split": "all"})
    found = read_rows(source, base=tmp_path, inputs={"pairs": tmp_path}, seed=0)
    assert found[0].messages == messages
    assert found[1].text == "a\nb"
