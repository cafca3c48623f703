"""What a run of untrusted code came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal[
    "ok",
    "failed",
    "timeout",
    "memory",
    "processes",
    "files",
    "output",
    "killed",
    "stopped",
    "refused",
    "unknown",
]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, as data.

    Args:
        reason: `ok` (exit code 0), `failed` (another exit code); `timeout`, `memory`, `processes`,
            `files`, `output` for the limit that it passed; `killed` by a signal of its own making;
            `stopped` because the run it served was over; `refused` (nothing was run, because
            nothing isolates here); `unknown` (the sandbox itself failed: says nothing of the
            program).
        detail: one line for a person.
        stdout, stderr: what was written, up to `Limits.output_bytes` each; bytes that are no UTF-8
            are shown as U+FFFD.
        exit_code: None unless it ended by itself; minus the signal's number for `killed`.
        wall_s: from its own start to its end, in seconds.
        queue_s: how long it had waited for a place, in seconds.
        cpu_s: CPU time of the program and of the children it waited for, in seconds.
        peak_bytes: largest resident memory seen of all its processes together; 0 if it was over
            before the first look.
        isolation: what was in force: `bubblewrap`, `none`; "" if nothing was run.
    """

    reason: Reason
    detail: str = ""
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    wall_s: float = 0.0
    queue_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    isolation: str = ""

    @property
    def is_known(self) -> bool:
        """Whether the outcome says anything about the program.

        Example:
            >>> Outcome("timeout").is_known, Outcome("refused").is_known
            (True, False)
        """
        return self.reason not in ("refused", "unknown")
