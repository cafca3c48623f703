"""The table of procedural tasks; adding a family is one line here."""

from __future__ import annotations

from align.data.generate.arithmetic import arithmetic
from align.data.generate.constraints import constraints
from align.data.generate.problem import Task
from align.data.generate.retrieval import multi_needle, needle, recall
from align.data.generate.safety import safety
from align.data.generate.sequences import copy, reverse, sort

_ANSWER = ("near_miss", "other_answer", "impolite")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("needle", needle, _ANSWER, has_context=True),
        Task("multi_needle", multi_needle, _ANSWER, has_context=True),
        Task("recall", recall, _ANSWER, has_context=True),
        Task("arithmetic", arithmetic, _ANSWER),
        Task("sort", sort, _ANSWER),
        Task("copy", copy, _ANSWER),
        Task("reverse", reverse, _ANSWER),
        Task("constraints", constraints, ("violated", "impolite")),
        Task("safety", safety, ("unsafe", "over_refusal", "impolite")),
    )
}
