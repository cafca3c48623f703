"""One process acts, all learn the result: the runner's only traffic between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def lead(accelerator: Accelerator, act: Callable[[], Result]) -> Result:
    """What `act` returns in the main process, in every process; also a barrier.

    An error in the main process is raised in all of them, so that none waits for ever.

    Args:
        act: returns something that can be pickled.

    Raises:
        Exception: what `act` raised, in the main process; the same error elsewhere.
    """
    if accelerator.num_processes == 1:
        return act()
    told: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if accelerator.is_main_process:
        try:
            told = [(act(), None)]
        except Exception as error:
            told = [(None, error)]
    broadcast_object_list(told)
    result, raised = told[0]
    if raised is not None:
        raise raised
    return result  # type: ignore[return-value]
