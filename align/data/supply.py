"""A stage's `data:` list to packed steps, with the entries for its manifest.

read -> render -> leave out what is too long, if told so -> mix by weight -> pack
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from align.course import Job
from align.data.batch import Example, Pair
from align.data.formats import to_record
from align.data.loader import PackedData, item_tokens
from align.data.mixture import mix
from align.data.records import Kind, WrongKind
from align.data.render import render_chat, render_preference, render_text, split_windows
from align.data.rows import ChatRow, PreferenceRow, Row, TextRow
from align.data.sources import KEPT_REASONS, DataConfig, SourceReport, read_source

Item = TypeVar("Item", Example, Pair)


class FixedRows(Protocol):
    """What a stage's config says about rows that are known beforehand; as in `TrainConfig`."""

    @property
    def data(self) -> tuple[DataConfig, ...]: ...
    @property
    def sequence_tokens(self) -> int: ...
    @property
    def batch_sequences(self) -> int: ...
    @property
    def batch_items(self) -> int: ...
    @property
    def micro_sequences(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def shuffle(self) -> bool: ...


Supplied = tuple[PackedData, tuple[Mapping[str, Any], ...]]


def supply_texts(config: FixedRows, job: Job, tokenizer: PreTrainedTokenizerBase) -> Supplied:
    """Packed examples where every token is trained; chats are trained on what the assistant wrote.

    Returns:
        The packed data, and for the manifest one entry per source: name, place, licence, rows,
        held_out, skipped, reasons, too_long, taken (of it per epoch, by its
        weight) and tokens (of those taken).

    Raises:
        ValueError: as `read_source` and the renderers; if a row is longer than sequence_tokens and
            its source does not say what to do then.
    """
    return _supply_examples(config, job, tokenizer, kind="text")


def supply_chats(config: FixedRows, job: Job, tokenizer: PreTrainedTokenizerBase) -> Supplied:
    """Packed chats, trained on what the assistant wrote; otherwise as `supply_texts`."""
    return _supply_examples(config, job, tokenizer, kind="chat")


def supply_pairs(config: FixedRows, job: Job, tokenizer: PreTrainedTokenizerBase) -> Supplied:
    """Packed preferences, both answers in one sequence; otherwise as `supply_texts`."""

    def render(row: Row) -> Pair:
        if not isinstance(row, PreferenceRow):
            raise WrongKind(_wrong_kind(row, "preference"))
        return render_preference(row, tokenizer)

    return _supply(config, job, render, kind="preference")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines that `read_rows` reads back, as a stage leaves them for another."""
    lines = [json.dumps(to_record(row), ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _supply_examples(
    config: FixedRows, job: Job, tokenizer: PreTrainedTokenizerBase, *, kind: Kind
) -> Supplied:
    def render(row: Row) -> Example:
        if isinstance(row, ChatRow):
            return render_chat(row, tokenizer)
        if isinstance(row, TextRow):
            return render_text(row, tokenizer)
        raise WrongKind(_wrong_kind(row, "chat or text"))

    return _supply(config, job, render, kind=kind, split=split_windows)


def _supply(
    config: FixedRows,
    job: Job,
    render: Callable[[Row], Item],
    *,
    kind: Kind,
    split: Callable[[Item, int], list[Item]] | None = None,
) -> Supplied:
    groups = []
    for source in config.data:
        rows, report = read_source(
            source, base=job.base, inputs=job.inputs, seed=job.seed, kind=kind
        )
        groups.append(
            _render(rows, report, source, render, limit=config.sequence_tokens, split=split)
        )
    lengths = [[item_tokens(item) for item in group.items] for group in groups]
    weights = [source.weight for source in config.data]
    taken = mix([len(sizes) for sizes in lengths], weights, seed=job.seed)
    told = [
        {
            **asdict(group.report),
            "too_long": group.too_long,
            "taken": len(indices),
            "tokens": sum(sizes[index] for index in indices),
        }
        for group, indices, sizes in zip(groups, taken, lengths, strict=True)
    ]
    items = [
        group.items[index]
        for group, indices in zip(groups, taken, strict=True)
        for index in indices
    ]
    data = PackedData(
        items,
        sequence_tokens=config.sequence_tokens,
        batch_sequences=config.batch_sequences,
        batch_items=config.batch_items,
        micro_sequences=config.micro_sequences,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=job.seed,
        shuffle=config.shuffle,
    )
    return data, tuple(told)


@dataclass(frozen=True)
class _Group(Generic[Item]):
    """What one source came to."""

    items: list[Item]
    report: SourceReport
    too_long: int


def _render(
    rows: Sequence[Row],
    report: SourceReport,
    source: DataConfig,
    render: Callable[[Row], Item],
    *,
    limit: int,
    split: Callable[[Item, int], list[Item]] | None,
) -> _Group[Item]:
    """The source's rows under its policies, and its report with what was left out since."""
    items: list[Item] = []
    reasons: list[str] = []
    too_long = 0
    for row in rows:
        try:
            item = render(row)
        except WrongKind:
            raise
        except ValueError as error:
            if source.on_bad_row == "error":
                raise ValueError(f"{error} (on_bad_row: skip leaves such rows out)") from error
            reasons.append(str(error))
            continue
        length = item_tokens(item)
        if length <= limit:
            items.append(item)
        elif source.too_long == "split" and split and isinstance(row, TextRow):
            items.extend(split(item, limit))
        elif source.too_long == "skip":
            too_long += 1
        else:
            raise ValueError(
                f"{row.origin}: {length} tokens, longer than sequence_tokens = {limit}; raise it, "
                "or set too_long: skip on the source (text rows also take split)"
            )
    if not items:
        raise ValueError(
            f"{source.label}: no row is left of {len(rows)} ({too_long} longer than "
            f"sequence_tokens = {limit}, {len(reasons)} bad); raise it or take another source"
        )
    left = replace(
        report,
        rows=len(rows) - too_long - len(reasons),
        skipped=report.skipped + len(reasons),
        reasons=(*report.reasons, *reasons)[:KEPT_REASONS],
    )
    return _Group(items, left, too_long)


def _wrong_kind(row: Row, expected: str) -> str:
    return (
        f"{row.origin}: a {type(row).__name__}, expected a {expected} row; "
        "take another source, or set `as` on it"
    )
