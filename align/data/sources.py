"""Where rows come from: files, the hub, procedural tasks, and other stages of the run.

Every row is checked when it is read. A bad one ends the reading with its file and line, or is left
out and counted if the config says so; nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.data.files import Raw, local_files, parse, read_file, read_hub
from align.data.formats import FORMATS, read_record
from align.data.generate import TASKS, WAYS, Problem
from align.data.generate.problem import LICENCE
from align.data.records import Kind, Tie, WrongKind
from align.data.rows import ChatRow, Origin, Row, TextRow

Split = Literal["all", "train", "dev"]

ROWS_FILE = "rows.jsonl"
KEPT_REASONS = 5
# Draws of a task that may fail in a row, per row of the split, before the task counts as used up.
PATIENCE = 2000


class DataConfig(BaseModel):
    """One source of rows: exactly one of path, hub, task and from."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    path: str = ""
    """File (json, jsonl, parquet, txt; the text ones also .gz), folder of such files or glob."""
    hub: str = ""
    """Dataset id or folder for `datasets.load_dataset`."""
    hub_config: str = ""
    """Configuration of the hub dataset; "" is its default."""
    hub_split: str = "train"
    """Split of the hub dataset as its publisher cut it; ours (`split`) is taken of that."""
    hub_revision: str = "main"
    """Revision of the hub dataset."""
    task: str = ""
    """Procedural task, a key of `align.data.generate.TASKS`."""
    from_: str = Field(default="", alias="from")
    """Name of another stage, whose artifact holds rows.jsonl."""
    name: str = ""
    """Name in manifests and reports; "" takes the file's, dataset's, task's or stage's."""
    licence: str = ""
    """Licence of the rows, for the manifest."""
    weight: float = Field(default=1.0, gt=0)
    """How often each row is seen per epoch: 0.5 a seeded half, 2 twice."""
    format: str = "auto"
    """Form of the records, a key of `align.data.formats.FORMATS`; auto finds it by the fields."""
    as_: Kind = Field(default="auto", alias="as")
    """Kind of row to make; auto is what the stage wants, else the format's own."""
    split: Split = "train"
    """Part of the rows, by a hash of the prompt: never the same prompt in train and dev."""
    dev_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of prompts that are dev; keep one value in a project, parts of two values overlap."""
    limit: int = Field(default=0, ge=0)
    """Most rows, taken from the start of the split; 0 takes all."""
    signal: str = ""
    """Reward signal that preferences speak about; "" leaves it to the rows ("overall")."""
    ties: Literal["error", "skip"] = "error"
    """What to do with comparisons that nobody won; skip counts them."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used; skip counts them and keeps the first reasons."""
    too_long: Literal["error", "skip", "split"] = "error"
    """What to do with a row longer than a sequence; split cuts text rows into windows."""
    text_chars: int = Field(default=4000, ge=0)
    """Text files are cut at empty lines into rows of at least this many characters; 0: one row."""
    num_rows: int = Field(default=1000, ge=1)
    """Rows that a task makes, of this split."""
    difficulty: tuple[float, float] = (0.0, 1.0)
    """Easiest and hardest problem of a task, 0 to 1."""
    context_tokens: int = Field(default=0, ge=0)
    """Length of a retrieval task's row in tokens; 0 lets the difficulty choose."""
    ways: tuple[str, ...] = ()
    """Ways of being wrong for a task's preferences, keys of `WAYS`; empty takes all it has."""
    seed: int = Field(default=0, ge=0)
    """Of a task, beside the stage's seed: two sources of one task need two seeds to differ."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        given = {"path": self.path, "hub": self.hub, "task": self.task, "from": self.from_}
        named = [key for key, value in given.items() if value]
        if len(named) != 1:
            raise ValueError(
                f"data names {' and '.join(named) or 'no source'}; "
                f"expected exactly one of {', '.join(given)}"
            )
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(
                f"format = {self.format!r}, expected auto or one of {', '.join(FORMATS)}"
            )
        self._check_task()
        return self

    def _check_task(self) -> None:
        only = {"num_rows", "difficulty", "context_tokens", "ways", "seed"} & self.model_fields_set
        if not self.task:
            if only:
                raise ValueError(f"{sorted(only)} are for a task; remove them or name a task")
            return
        if self.task not in TASKS:
            raise ValueError(f"task = {self.task!r}, expected one of {', '.join(TASKS)}")
        task = TASKS[self.task]
        low, high = self.difficulty
        if not 0 <= low <= high <= 1:
            raise ValueError(f"difficulty = [{low}, {high}], expected 0 <= lowest <= highest <= 1")
        if self.context_tokens and not task.has_context:
            raise ValueError(f"task {self.task} has no context; remove context_tokens")
        if unknown := [way for way in self.ways if way not in task.ways]:
            raise ValueError(
                f"ways = {unknown}, expected of {', '.join(task.ways)} for task {self.task}"
            )

    @property
    def label(self) -> str:
        """The source's name for people."""
        return self.name or self.task or self.from_ or self.hub or Path(self.path).name


@dataclass(frozen=True)
class SourceReport:
    """What reading one source came to, for the manifest.

    Args:
        place: path, hub id, task or stage.
        rows: given on.
        held_out: left to the other split.
        skipped: left out by on_bad_row and ties.
        reasons: of the first skipped ones, with their places.
    """

    name: str
    place: str
    licence: str
    rows: int
    held_out: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()


def read_rows(
    config: DataConfig,
    *,
    base: Path,
    inputs: Mapping[str, Path],
    seed: int,
    kind: Kind = "auto",
) -> list[Row]:
    """The rows of one source; `read_source` without the report."""
    return read_source(config, base=base, inputs=inputs, seed=seed, kind=kind)[0]


def read_source(
    config: DataConfig,
    *,
    base: Path,
    inputs: Mapping[str, Path],
    seed: int,
    kind: Kind = "auto",
) -> tuple[list[Row], SourceReport]:
    """The rows of one source in their order, and what became of the rest.

    Args:
        base: folder that a relative path is resolved against.
        inputs: artifact folders of other stages by name.
        seed: of the stage; only tasks use it.
        kind: what the stage wants; config.as_ wins.

    Raises:
        ValueError: with file and line if a row is bad and on_bad_row is error; if there is no such
            file, stage or dataset; if no row is left.
    """
    wanted = kind if config.as_ == "auto" else config.as_
    if config.task:
        return _task_rows(config, seed, wanted)
    tally = _Tally(config)
    rows: list[Row] = []
    for raw in _raw(config, base, inputs):
        if config.limit and len(rows) >= config.limit:
            break
        made = tally.read(raw, wanted)
        if made and not _is_in(made[0], config):
            tally.held_out += len(made)
            continue
        rows.extend(made)
    rows = rows[: config.limit or None]
    report = tally.report(len(rows))
    if not rows:
        first = f", first: {report.reasons[0]}" if report.reasons else ""
        raise ValueError(
            f"{report.place}: no row of split {config.split!r} is left ({tally.held_out} in the "
            f"other split, {tally.skipped} skipped{first}); check split, limit and the file"
        )
    return rows, report


def prompt_text(row: Row) -> str:
    """What a row asks, by which it falls into train or dev: what was said before any answer.

    System messages do not count, and white space counts once, so the same question is the same in
    every kind of row.
    """
    if isinstance(row, TextRow):
        return " ".join(row.text.split())
    messages = row.messages if isinstance(row, ChatRow) else row.prompt
    said: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            break
        if message["role"] != "system":
            said.append(message["content"])
    return " ".join(" ".join(said).split())


def split_of(text: str, dev_share: float = 0.1) -> Literal["train", "dev"]:
    """The side that a prompt is on, by its text alone: always the same, everywhere.

    Example:
        >>> [split_of(text) for text in ("2+3?", "2+4?", "2+24?")]
        ['train', 'dev', 'train']
    """
    digest = blake2b(text.encode(), digest_size=8).digest()
    return "dev" if int.from_bytes(digest) < dev_share * 2**64 else "train"


class _Tally:
    """Reads records and counts those that it leaves out."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.held_out = 0
        self.skipped = 0
        self.reasons: list[str] = []

    def read(self, raw: Raw, kind: Kind) -> list[Row]:
        config = self.config
        origin = Origin(raw.place, config.label, config.licence)
        try:
            return read_record(
                parse(raw),
                origin,
                format_name=config.format,
                kind=kind,
                signal=config.signal,
            )
        except WrongKind as error:
            raise WrongKind(f"{raw.place}: {error}") from error
        except Tie as error:
            self._skip(raw.place, error, config.ties, "ties")
        except ValueError as error:
            self._skip(raw.place, error, config.on_bad_row, "on_bad_row")
        return []

    def _skip(self, place: str, error: ValueError, policy: str, key: str) -> None:
        if policy == "error":
            raise ValueError(f"{place}: {error} ({key}: skip leaves such rows out)") from error
        self.skipped += 1
        if len(self.reasons) < KEPT_REASONS:
            self.reasons.append(f"{place}: {error}")

    def report(self, rows: int) -> SourceReport:
        config = self.config
        return SourceReport(
            name=config.label,
            place=config.path or config.hub or config.from_,
            licence=config.licence,
            rows=rows,
            held_out=self.held_out,
            skipped=self.skipped,
            reasons=tuple(self.reasons),
        )


def _is_in(row: Row, config: DataConfig) -> bool:
    """A record's rows stay together: the first one's prompt decides."""
    return config.split in ("all", split_of(prompt_text(row), config.dev_share))


def _raw(config: DataConfig, base: Path, inputs: Mapping[str, Path]) -> Iterator[Raw]:
    if config.hub:
        yield from read_hub(config.hub, config.hub_config, config.hub_split, config.hub_revision)
        return
    is_stage = bool(config.from_)
    files = [_stage_file(config.from_, inputs)] if is_stage else local_files(config.path, base)
    for name, path in files:
        yield from read_file(name, path, config.text_chars)


def _stage_file(stage: str, inputs: Mapping[str, Path]) -> tuple[str, Path]:
    if stage not in inputs:
        raise ValueError(f"data.from = {stage!r}, expected a stage of this run: {sorted(inputs)}")
    path = inputs[stage] / ROWS_FILE
    if not path.is_file():
        raise ValueError(f"data.from = {stage!r}: its artifact holds no {ROWS_FILE}")
    return f"{stage}/{ROWS_FILE}", path


def _task_rows(config: DataConfig, seed: int, kind: Kind) -> tuple[list[Row], SourceReport]:
    """Distinct problems of the wanted split, in the order of their index."""
    share = {"all": 1.0, "dev": config.dev_share, "train": 1 - config.dev_share}[config.split]
    rows: list[Row] = []
    seen: set[str] = set()
    held_out = since = 0
    index = -1
    wanted = min(config.num_rows, config.limit or config.num_rows)
    while len(rows) < wanted:
        index, since = index + 1, since + 1
        if since > PATIENCE / share:
            raise ValueError(
                f"task {config.task} has only {len(rows)} distinct prompts of num_rows = "
                f"{config.num_rows} at difficulty {list(config.difficulty)}; lower num_rows or "
                "widen difficulty"
            )
        problem = TASKS[config.task].problem(
            index,
            seed=seed + 1_000_003 * config.seed,
            difficulty=config.difficulty,
            context_tokens=config.context_tokens,
        )
        row = _task_row(problem, config, kind, index)
        if row is None or problem.question in seen:
            continue
        seen.add(problem.question)
        if not _is_in(problem.prompt_row(), config):
            held_out += 1
            continue
        rows.append(row)
        since = 0
    return rows, SourceReport(
        config.label, f"task {config.task}", config.licence or LICENCE, len(rows), held_out
    )


def _task_row(problem: Problem, config: DataConfig, kind: Kind, index: int) -> Row | None:
    """One row of a problem; None if it cannot be wrong in any of the wanted ways."""
    if kind == "text":
        return problem.text_row()
    if kind == "prompt":
        return problem.prompt_row()
    if kind in ("chat", "auto"):
        return problem.chat_row()
    ways = [way for way in WAYS if way in problem.wrong and way in (config.ways or WAYS)]
    if not ways:
        return None
    row = problem.preference_row(ways[index % len(ways)])
    return replace(row, signal=config.signal) if config.signal else row
