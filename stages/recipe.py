"""One file that describes the whole ladder: model, evals and stages, strictly read.

    name: tiny
    vars: {data_root: data}
    model: {preset: tiny}
    evals: [...]                       # each runs on every policy, for the table at the end
    stages:
      - {name: sft-short, kind: sft, ...}
      - {name: sft-long, kind: sft, from: sft-short, ...}

A top-level `precision` is that of every stage that trains and names no other.
A stage's keys are `name`, `kind`, `from`, `reward`, `evals` and those of its kind's config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.course import Job, Outcome
from align.data.sources import DataConfig
from align.update import Precision
from reward.sandbox import SandboxConfig
from stages.document import Document, nearest, read_document
from stages.explain import validate

MODEL = "model"
"""What a stage without `from` starts from: the recipe's own model."""

BASES = Path(__file__).parent / "bases"
"""Base checkpoints that this package ships, one folder each."""

StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]


@dataclass(frozen=True)
class Kind:
    """One kind of stage.

    Args:
        config: its pydantic model; has `seed`.
        run: does the work of one stage on every process.
        gives: what its artifact holds.
        run_trl: the same through TRL's trainer, for `backend: trl`; None if TRL has none.
        takes_reward: whether the stage may name a reward stage.
        revision: raised whenever the same config gives another result than before.
    """

    config: type[BaseModel]
    run: Callable[[Any, Job], Outcome]
    gives: Literal["policy", "reward", "rows", "report"]
    run_trl: Callable[[Any, Job], Outcome] | None = None
    takes_reward: bool = False
    revision: int = 1


class TokenizerConfig(BaseModel):
    """Where the tokenizer of a preset comes from: a folder, or training on rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = ""
    """Folder with a tokenizer that has a chat template; not together with data."""
    vocab_size: int = Field(default=1024, ge=300)
    """Tokens of a trained tokenizer, the 256 bytes and the special ones included."""
    data: tuple[DataConfig, ...] = ()
    """Rows whose text a tokenizer is trained on."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.path) == bool(self.data):
            raise ValueError("expected either path or data; give exactly one")
        return self


class ModelConfig(BaseModel):
    """The policy that the first stage starts from: exactly one origin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = ""
    """Name of a shape in model.config.PRESETS, filled with random weights."""
    path: str = ""
    """Folder of a `minimax` checkpoint."""
    hub: str = ""
    """Id of a `minimax` checkpoint on the hub."""
    revision: str = "main"
    """Branch, tag or commit of the hub checkpoint."""
    base: str = ""
    """Name of a base checkpoint shipped with this package."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of a preset; the other origins bring their own."""
    seed: int = Field(default=0, ge=0)
    """Of a preset's random weights."""

    def folder(self, base: Path) -> Path | None:
        """Where the checkpoint stands already, if it does so on this machine."""
        if self.path:
            return (base / self.path).resolve()
        return BASES / self.base if self.base else None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [n for n in (self.preset, self.path, self.hub, self.base) if n]
        if len(given) != 1:
            raise ValueError(
                f"{len(given)} origins given, expected one of preset, path, hub, base; keep one"
            )
        if bool(self.preset) != (self.tokenizer is not None):
            raise ValueError(
                "expected tokenizer together with preset and only there; a preset has no "
                "tokenizer, every other origin brings its own"
            )
        return self


class StageHead(BaseModel):
    """What every stage says of itself, whatever its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: StageName
    """Name of the stage and of its folder in the run."""
    kind: str
    """One of the kinds that this package knows."""
    start: str = Field(default=MODEL, alias="from")
    """Policy stage to start from; `model` is the recipe's own model."""
    reward: str = ""
    """Who judges this stage's responses: a reward stage, or the http(s) URL of a scoring service
    (`align serve-reward`); empty leaves it to the verifiers."""
    reward_key_env: str = ""
    """Environment variable that holds the scoring service's key; empty sends none."""
    evals: tuple[str, ...] = ()
    """Names of the recipe's evals that this stage is meant to raise."""

    @property
    def reward_url(self) -> str:
        """The scoring service; "" if a stage or nobody judges."""
        return self.reward if self.reward.startswith(("http://", "https://")) else ""

    @property
    def reward_stage(self) -> str:
        """The reward stage; "" if a service or nobody judges."""
        return "" if self.reward_url else self.reward

    @model_validator(mode="after")
    def _key_for_a_service(self) -> Self:
        if self.reward_key_env and not self.reward_url:
            raise ValueError(
                "reward_key_env is the key of a scoring service; give reward its URL or remove it"
            )
        return self


class EvalHead(BaseModel):
    """What a recipe says of an eval beside what it measures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: str = Field(default=MODEL, alias="from")
    """First policy that is asked: this stage, then all that come from it; `model` asks every one.
    For what the policies before it cannot do at all, and so cannot lose."""


class RecipeHead(BaseModel):
    """Everything of a recipe but its stages and evals, which are read one by one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: StageName
    """Name of the recipe."""
    model: ModelConfig
    """Where the first policy comes from."""
    vars: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Values to be written as ${name} elsewhere in the file."""
    seed: int = Field(default=0, ge=0)
    """Of the evals; every stage has its own."""
    precision: Precision = "fp32"
    """Of every stage that trains and names no other."""
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    """How programs that a policy wrote are run, in stages and evals."""
    evals: list[Any] = Field(default_factory=list)
    """Evals that run on every policy."""
    stages: list[Any] = Field(min_length=1)
    """The ladder, in the order in which it is climbed."""


@dataclass(frozen=True)
class Stage:
    """One step of the ladder, validated.

    Args:
        index: place in the recipe's list, for messages.
    """

    head: StageHead
    kind: Kind
    config: Any
    index: int

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def wants_trl(self) -> bool:
        """Whether the stage asks for TRL's trainer; a kind that trains nothing has no such key."""
        return bool(self.config.model_dump(include={"backend"}) == {"backend": "trl"})

    def run(self, job: Job) -> Outcome:
        """Does the stage's work, with the trainer that its config names."""
        if self.wants_trl and self.kind.run_trl is not None:
            return self.kind.run_trl(self.config, job)
        return self.kind.run(self.config, job)

    def resolved(self) -> dict[str, Any]:
        """Head and config as JSON values, defaults written out."""
        return {
            **self.head.model_dump(mode="json", by_alias=True),
            **self.config.model_dump(mode="json", by_alias=True),
        }


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; `document` knows the lines.

    Args:
        evals: eval configs by name, in the order of the file.
        asked_from: by name of the eval, the first policy that it is asked of.
    """

    head: RecipeHead
    evals: Mapping[str, Any]
    asked_from: Mapping[str, str]
    stages: tuple[Stage, ...]
    document: Document = field(repr=False)

    @property
    def name(self) -> str:
        return self.head.name

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: if there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = [stage.name for stage in self.stages]
        raise ValueError(f"no stage is named '{name}' in this recipe; {nearest(name, known)}")

    def is_asked(self, name: str, policy: str) -> bool:
        """Whether this stage, or `model`, is the first policy that eval `name` is asked of, or
        comes from it."""
        first = self.asked_from[name]
        while policy not in (first, MODEL):
            policy = self.stage(policy).head.start
        return policy == first

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as JSON values: sets applied, variables replaced, defaults written."""
        evals = [
            {**config.model_dump(mode="json", by_alias=True), "from": self.asked_from[name]}
            for name, config in self.evals.items()
        ]
        return {
            "name": self.name,
            "seed": self.head.seed,
            "sandbox": self.head.sandbox.model_dump(mode="json"),
            "model": self.head.model.model_dump(mode="json", by_alias=True),
            "evals": evals,
            "stages": [stage.resolved() for stage in self.stages],
        }


def load_recipe(
    file: Path,
    sets: Sequence[str] = (),
    *,
    kinds: Mapping[str, Kind],
    eval_config: Any,
) -> Recipe:
    """Reads a recipe; every key is known and every value has its type afterwards.

    Args:
        file: the YAML file.
        sets: "key=value" each, applied over the file from left to right.
        kinds: the table of stage kinds (`stages.kinds.KINDS`).
        eval_config: annotation of one eval (`align.evals.EvalConfig`).

    Raises:
        ConfigError: one line with place, key, value and remedy. References between stages are
            checked by `stages.checks.cross_check`.
    """
    document = read_document(file, sets)
    head = validate(document, (), document.data, RecipeHead)
    evals: dict[str, Any] = {}
    asked_from: dict[str, str] = {}
    for index, written in enumerate(head.evals):
        about, rest = _split(written, EvalHead)
        start = validate(document, ("evals", index), about, EvalHead).start
        config = validate(document, ("evals", index), rest, eval_config)
        if not config.name:
            raise document.error(
                ("evals", index, "name"),
                "is missing; add it, stages and tables call the eval by it",
            )
        if config.name in evals:
            raise document.error(
                ("evals", index), f"two evals are named '{config.name}'; give one another name"
            )
        evals[config.name], asked_from[config.name] = config, start
    stages = [_stage(document, index, kinds, head) for index in range(len(head.stages))]
    return Recipe(head, evals, asked_from, tuple(stages), document)


def _stage(document: Document, index: int, kinds: Mapping[str, Kind], recipe: RecipeHead) -> Stage:
    keys = ("stages", index)
    written = document.data["stages"][index]
    if not isinstance(written, dict):
        raise document.error(keys, "expected a mapping with name and kind; indent its keys")
    about, own = _split(written, StageHead)
    head = validate(document, keys, about, StageHead)
    if head.kind not in kinds:
        raise document.error((*keys, "kind"), f"no such kind; {nearest(head.kind, kinds)}")
    kind = kinds[head.kind]
    if "precision" in kind.config.model_fields and "precision" in recipe.model_fields_set:
        own.setdefault("precision", recipe.precision)
    return Stage(head, kind, validate(document, keys, own, kind.config), index)


def _split(written: Any, head: type[BaseModel]) -> tuple[Any, Any]:
    """Keys that are the head's and those that are not; what is no mapping is refused later."""
    if not isinstance(written, dict):
        return {}, written
    shared = {field.alias or name for name, field in head.model_fields.items()}
    about = {key: value for key, value in written.items() if key in shared}
    return about, {key: value for key, value in written.items() if key not in shared}


def dump_json(value: Any) -> str:
    """JSON as every machine-written file of a run holds it: sorted, indented, one newline."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
