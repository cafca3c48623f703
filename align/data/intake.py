"""A stage's `data:` list to what its course is made of, with the entries for its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from align.data.batch import Example, Pair
from align.data.formats import to_record
from align.data.mixture import mix
from align.data.records import Kind
from align.data.render import (
    render_chat,
    render_preference,
    render_prompt,
    render_text,
    split_windows,
)
from align.data.rows import ChatRow, PreferenceRow, PromptRow, Row, TextRow
from align.data.sources import KEPT_REASONS, DataConfig, SourceReport, read_source

Item = TypeVar("Item")


@dataclass(frozen=True)
class Loaded(Generic[Item]):
    """Items of all sources in the order of the list, and one entry per source for the manifest.

    Args:
        data: name, place, licence, rows, held_out, skipped, reasons, too_long, taken, tokens.
    """

    items: tuple[Item, ...]
    data: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt row with its tokens."""

    row: PromptRow
    tokens: tuple[int, ...]


def load_examples(
    configs: Sequence[DataConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: Path,
    inputs: Mapping[str, Path],
    seed: int,
    sequence_tokens: int,
    kind: Kind = "chat",
) -> Loaded[Example]:
    """Chats and texts as examples; `kind` is what a source gives that could give several.

    Args:
        base, inputs, seed: as in `read_source`.
        sequence_tokens: longest example; what happens to longer ones is the source's too_long.

    Raises:
        ValueError: as `read_source` and the renderers; if a row is too long; naming its place.
    """

    def render(row: Row) -> Example:
        if isinstance(row, ChatRow):
            return render_chat(row, tokenizer)
        if isinstance(row, TextRow):
            return render_text(row, tokenizer)
        raise ValueError(_wrong_kind(row, "chat or text"))

    return _load(
        configs,
        render,
        lambda example: len(example.tokens),
        base=base,
        inputs=inputs,
        seed=seed,
        limit=sequence_tokens,
        kind=kind,
        split=split_windows,
    )


def load_pairs(
    configs: Sequence[DataConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: Path,
    inputs: Mapping[str, Path],
    seed: int,
    sequence_tokens: int,
) -> Loaded[Pair]:
    """Preferences as pairs; both answers together must fit into sequence_tokens.

    Raises:
        ValueError: as `load_examples`.
    """

    def render(row: Row) -> Pair:
        if not isinstance(row, PreferenceRow):
            raise ValueError(_wrong_kind(row, "preference"))
        return render_preference(row, tokenizer)

    return _load(
        configs,
        render,
        lambda pair: len(pair.chosen.tokens) + len(pair.rejected.tokens),
        base=base,
        inputs=inputs,
        seed=seed,
        limit=sequence_tokens,
        kind="preference",
    )


def load_prompts(
    configs: Sequence[DataConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: Path,
    inputs: Mapping[str, Path],
    seed: int,
    prompt_tokens: int,
) -> Loaded[Prompt]:
    """Prompts with their tokens, none longer than prompt_tokens.

    Raises:
        ValueError: as `load_examples`.
    """

    def render(row: Row) -> Prompt:
        if not isinstance(row, PromptRow):
            raise ValueError(_wrong_kind(row, "prompt"))
        return Prompt(row, render_prompt(row.prompt, tokenizer))

    return _load(
        configs,
        render,
        lambda prompt: len(prompt.tokens),
        base=base,
        inputs=inputs,
        seed=seed,
        limit=prompt_tokens,
        kind="prompt",
    )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines that `read_rows` reads back, as a stage leaves them for another."""
    lines = [json.dumps(to_record(row), ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _load(
    configs: Sequence[DataConfig],
    render: Callable[[Row], Item],
    length: Callable[[Item], int],
    *,
    base: Path,
    inputs: Mapping[str, Path],
    seed: int,
    limit: int,
    kind: Kind,
    split: Callable[[Item, int], list[Item]] | None = None,
) -> Loaded[Item]:
    if not configs:
        raise ValueError("data is empty, expected at least one source")
    groups: list[list[Item]] = []
    counts: list[tuple[SourceReport, int]] = []
    for config in configs:
        rows, report = read_source(config, base=base, inputs=inputs, seed=seed, kind=kind)
        source = _Source(config, limit)
        made = [item for row in rows for item in source.items(row, render, length, split)]
        if not made:
            raise ValueError(
                f"{config.label}: no row is left of {len(rows)} ({source.long} longer than "
                f"{limit} tokens); raise the limit or take another source"
            )
        groups.append(made)
        counts.append((source.extend(report), source.long))
    lengths = [[length(item) for item in group] for group in groups]
    taken = mix(lengths, [config.weight for config in configs], seed=seed)
    entries = [
        {
            **asdict(report),
            "too_long": long,
            "taken": len(indices),
            "tokens": sum(sizes[index] for index in indices),
        }
        for (report, long), indices, sizes in zip(counts, taken, lengths, strict=True)
    ]
    items = [
        group[index] for group, indices in zip(groups, taken, strict=True) for index in indices
    ]
    return Loaded(tuple(items), tuple(entries))


class _Source:
    """Renders the rows of one source under its policies and counts what it leaves out."""

    def __init__(self, config: DataConfig, limit: int) -> None:
        self.config = config
        self.limit = limit
        self.long = 0
        self.reasons: list[str] = []
        self.skipped = 0

    def items(
        self,
        row: Row,
        render: Callable[[Row], Item],
        length: Callable[[Item], int],
        split: Callable[[Item, int], list[Item]] | None,
    ) -> list[Item]:
        try:
            item = render(row)
        except ValueError as error:
            if self.config.on_bad_row == "error":
                raise
            self.skipped += 1
            self.reasons.append(str(error))
            return []
        if length(item) <= self.limit:
            return [item]
        policy = self.config.too_long
        if policy == "split" and split is not None and isinstance(row, TextRow):
            return split(item, self.limit)
        if policy == "skip":
            self.long += 1
            return []
        raise ValueError(
            f"{row.origin}: {length(item)} tokens, longer than {self.limit}; raise the limit of "
            "the stage or set too_long: skip on the source (split works for text rows)"
        )

    def extend(self, report: SourceReport) -> SourceReport:
        """The report of the reading with what was left out since."""
        return SourceReport(
            report.name,
            report.place,
            report.licence,
            rows=report.rows - self.skipped - self.long,
            held_out=report.held_out,
            skipped=report.skipped + self.skipped,
            reasons=(*report.reasons, *self.reasons)[:KEPT_REASONS],
        )


def _wrong_kind(row: Row, expected: str) -> str:
    return (
        f"{row.origin}: a {type(row).__name__}, expected a {expected} row; "
        "take another source, or set as on it"
    )
