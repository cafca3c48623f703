"""What a response must not do, declared in a file: criteria in words, with their rules and heads.

A constitution is one dimension of the tree, `harmlessness`. Each criterion is a signal: a head of
the reward model, trained by the pairs labelled with the criterion's name, and forbidden patterns,
one of which makes the whole dimension 0. Floor and ceiling are the dimension's: below the floor it
caps the score, above the ceiling more harmlessness counts for nothing, so that refusing everything
does not win.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from reward.hierarchy import Dimension, Hierarchy, Signal


class Criterion(BaseModel):
    """One thing that is asked of every response."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    """The criterion in words, for people and for a judge model."""
    weight: float = Field(default=1.0, gt=0)
    """Share in harmlessness, relative to the other criteria that have a verdict."""
    head: bool = True
    """Whether the reward model has a head for it."""
    forbidden: tuple[str, ...] = ()
    """Regular expressions, case ignored; a response that holds one is not harmless at all."""


class Constitution(BaseModel):
    """Criteria by name, and how far harmlessness reaches.

    Example:
        >>> told = Constitution(criteria={"law": Criterion(text="Breaks no law.")})
        >>> told.dimension().floor
        0.3
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    criteria: dict[str, Criterion] = Field(min_length=1)
    """By name; pairs labelled with it train its head."""
    weight: float = Field(default=0.2, gt=0)
    """Declared share of harmlessness in the score."""
    floor: float = Field(default=0.3, ge=0, le=1)
    """Below this chance of being harmless the dimension caps the score at its own value."""
    ceiling: float = Field(default=0.9, gt=0, le=1)
    """Above this value the dimension counts as this much."""
    max_share: float = Field(default=0.5, gt=0, le=1)
    """Largest share the gate may give it while another dimension applies."""

    def dimension(self) -> Dimension:
        """The criteria as a dimension of the tree.

        Raises: ValueError for a pattern that is no regular expression, or a criterion without a
            head and without patterns.
        """
        signals = {
            name: Signal(
                weight=one.weight, head=one.head, forbidden=one.forbidden, criterion=one.text
            )
            for name, one in self.criteria.items()
        }
        return Dimension(
            signals=signals,
            weight=self.weight,
            floor=self.floor,
            ceiling=self.ceiling,
            max_share=self.max_share,
        )

    def over(self, tree: Hierarchy) -> Hierarchy:
        """The tree with these criteria as its harmlessness, in its old place or at the end.

        Raises: ValueError if a criterion has the name of another dimension's signal.
        """
        dimensions = {**tree.dimensions, "harmlessness": self.dimension()}
        return Hierarchy(name=tree.name, gate=tree.gate, dimensions=dimensions)


def read_constitution(path: Path) -> Constitution:
    """The constitution in a YAML file.

    Raises: ValueError naming the file and what is wrong in it.
    """
    try:
        told = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        return Constitution.model_validate(told)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path") from error
    except YAMLError as error:
        raise ValueError(f"{path}: no YAML ({str(error).splitlines()[0]})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path}: {where}: {first['msg']}") from error
