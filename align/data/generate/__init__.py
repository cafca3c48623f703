"""Procedural tasks with exact answers and a difficulty dial: the data that ships with us."""

from align.data.generate.problem import WAYS, Problem, Task
from align.data.generate.tasks import TASKS

__all__ = ["TASKS", "WAYS", "Problem", "Task"]
