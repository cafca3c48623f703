"""What `align question` shows: the answers a reward artifact was written with, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from align.questions import QUESTIONS_FILE, read_calibration

SLICES = ("by_label", "by_difficulty", "by_length", "by_source")


def read_questions(folder: Path) -> dict[str, Any]:
    """Everything that was asked of the artifact, as JSON values, with its calibration.

    Raises:
        ValueError: the folder holds no answers.
    """
    path, calibration = folder / QUESTIONS_FILE, read_calibration(folder)
    if not path.exists() or calibration is None:
        raise ValueError(
            f"{folder}: no {QUESTIONS_FILE}; expected the artifact of a reward stage that held out "
            "20 pairs or more and was not told calibration: none"
        )
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**told, "calibration": calibration.model_dump(mode="json")}


def question_tables(told: Mapping[str, Any]) -> list[Table]:
    """Reliability by slice, then the probes."""
    slices = Table("held-out pairs", "number", "accuracy", "confidence", "calibration error")
    _add(slices, "all", told["all"])
    for kind in SLICES:
        slices.add_section()
        for name, found in told[kind].items():
            _add(slices, f"{kind.removeprefix('by_')}: {name}", found)
    probes = Table("question", "answer")
    calibration, length = told["calibration"], told["length"]
    temperatures = ", ".join(f"{n} {t:.2f}" for n, t in calibration["temperatures"].items())
    probes.add_row("temperature of each head", temperatures)
    probes.add_row("calibration error as trained", f"{calibration['ece_as_trained']:.3f}")
    probes.add_row(
        "longer answer ahead, against chosen",
        f"{length['longer_ahead']:.3f} against {length['longer_chosen']:.3f}, "
        f"correlation {length['correlation']:+.2f}",
    )
    probes.add_row("lead moved by place in the batch, at most", f"{told['position']:.1e} logits")
    for name, style in told["style"].items():
        shown = (
            f"{style['shift']:+.2f} deviations, turns {style['flips']:.1%} of right pairs around"
        )
        probes.add_row(f"an empty {name} on the worse answer", shown)
    for name, (share, number) in told["rules"].items():
        probes.add_row(f"agrees with rule {name}", f"{share:.3f} of {number} pairs")
    return [slices, probes]


def _add(table: Table, name: str, found: Mapping[str, float]) -> None:
    table.add_row(
        name,
        str(found["num_pairs"]),
        f"{found['accuracy']:.3f} ± {found['accuracy_error']:.3f}",
        f"{found['confidence']:.3f}",
        f"{found['ece']:.3f}",
    )
