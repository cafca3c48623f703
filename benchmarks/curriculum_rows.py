"""The rows of the curriculum's benchmark: where they come from, and which side each is on."""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from align.data.files import parse, read_file
from align.data.refusals import refusal_pairs
from align.data.rows import ChatRow, PreferenceRow, TextRow
from align.data.sources import DataConfig, prompt_text, read_rows
from align.data.supply import write_rows

# name -> file, and what its labels speak about
SOURCES = {
    "hh": ("preference/hh_harmless_base.jsonl.gz", "harmlessness"),
    "polite": ("preference/llms_from_scratch_pref.jsonl.gz", "style"),
    "pandalm": ("preference/pandalm_testset_v1.jsonl.gz", "quality"),
    "tulu": ("preference/tulu_human_eval.jsonl.gz", "helpfulness"),
    "llmeval2": ("preference/llmbar_processed_llmeval2.jsonl.gz", "overall"),
    "mtbench": ("preference/llmbar_processed_mtbench.jsonl.gz", "overall"),
}
REFUSALS = ("gpt4", "llama2orig", "mistralinstruct")
TEXTS = ("text/wikitext2_valid.txt.gz", "longctx/books/frankenstein.txt.gz")
CHATS = ("sft/llms_from_scratch_instructions.jsonl", "sft/gpteacher_roleplay.jsonl.gz")
DEV_SHARE = 0.2


def side(row: PreferenceRow) -> str:
    """train or dev, by the letters and digits of what was asked."""
    text = re.sub("[^a-z0-9]", "", prompt_text(row).lower())
    digest = blake2b(text.encode(), digest_size=8).digest()
    return "dev" if int.from_bytes(digest) < DEV_SHARE * 2**64 else "train"


def prepare(data: Path, folder: Path, limit: int) -> None:
    """Both sides of every source, the refusal pairs, and the base's texts."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[ChatRow | TextRow] = []
    for name, (file, signal) in SOURCES.items():
        source = DataConfig(
            path=file,
            name=name,
            split="all",
            signal=signal,
            ties="skip",
            on_bad_row="skip",
            limit=limit,
        )
        rows = [
            row
            for row in read_rows(source, base=data, inputs={}, seed=0, kind="preference")
            if isinstance(row, PreferenceRow)
        ]
        for part in ("train", "dev"):
            write_rows(folder / f"{name}.{part}.jsonl", [row for row in rows if side(row) == part])
        texts += [
            ChatRow((*row.prompt, *answer), row.origin)
            for row in rows
            if side(row) == "train"
            for answer in (row.chosen, row.rejected)
        ]
    records = [
        (parse(raw), raw.place)
        for name in REFUSALS
        for raw in read_file(name, data / f"safety/xstest_completions_{name}.jsonl.gz", 1)
    ]
    for kind, pairs in refusal_pairs(records, "harmlessness").items():
        write_rows(folder / f"xstest-{kind}.dev.jsonl", pairs[: limit or None])
    for file in (*TEXTS, *CHATS):
        kind = "text" if file in TEXTS else "chat"
        source = DataConfig(path=file, split="all", on_bad_row="skip", limit=limit)
        for row in read_rows(source, base=data, inputs={}, seed=0, kind=kind):
            assert isinstance(row, ChatRow | TextRow)
            texts.append(row)
    write_rows(folder / "chats.jsonl", [row for row in texts if isinstance(row, ChatRow)])
    write_rows(folder / "texts.jsonl", [row for row in texts if isinstance(row, TextRow)])


def source(name: str, part: str) -> dict[str, Any]:
    keys = {"path": f"{name}.{part}.jsonl", "name": name, "split": "all", "too_long": "skip"}
    return {**keys, "on_bad_row": "skip"}


def dev_rows(folder: Path, name: str) -> list[PreferenceRow]:
    given = DataConfig(path=f"{name}.dev.jsonl", split="all", on_bad_row="skip")
    rows = read_rows(given, base=folder, inputs={}, seed=0, kind="preference")
    return [replace(row, margin=row.margin) for row in rows if isinstance(row, PreferenceRow)]
