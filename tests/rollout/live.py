"""A rollout worker on a real port, in a thread of the test's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.render import render_prompt
from align.prompts import end_of_turn
from model import HybridForCausalLM
from rollout.native.engine import NativeEngine
from rollout.service import create_app, make_server
from rollout.serving.worker import Settings, Worker
from tests.align import small
from tests.serving.live import running

TOKENIZER = small.tokenizer()
MAX_TOKENS = 96


@dataclass(frozen=True)
class Live:
    url: str
    worker: Worker


def decode(tokens: Any) -> str:
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=True))


def make_worker(
    model: HybridForCausalLM, *, weights_root: Path | None = None, **changes: Any
) -> Worker:
    slots = changes.pop("max_slots", 8)
    engine = NativeEngine(
        model,
        max_slots=slots,
        max_cache_tokens=slots * (MAX_TOKENS + 64),
        decode=decode,
    )
    given = {
        "model": "small",
        "max_tokens": MAX_TOKENS,
        "encode": lambda text: TOKENIZER(text).input_ids,
        "decode": decode,
        "render": lambda messages: render_prompt(
            [{"role": m.role, "content": m.content} for m in messages], TOKENIZER
        ),
        "stop_token_ids": (end_of_turn(TOKENIZER),),
        "weights_root": weights_root,
    }
    return Worker(engine, Settings(**(given | changes)))


@contextmanager
def served(worker: Worker) -> Iterator[Live]:
    with running(make_server(create_app(worker))) as (url, _):
        yield Live(url, worker)


def is_idle(live: Live) -> bool:
    """Whether nothing is queued or in flight."""
    driver = live.worker.driver
    return driver.num_samples == driver.engine.num_in_flight == 0
