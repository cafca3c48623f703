"""A worker under 10,000 requests of every kind: it holds afterwards what it held before.

    python -m benchmarks.rollout_service [--requests 10000] [--clients 8]

`align serve-rollout` is a process of its own, with a tiny policy of random weights. Clients send it
by turns what is answered, what is cancelled and what has to be refused (`KINDS`). Between rounds,
when nothing is in flight, /metrics says what is held: free slots and pages, tasks of the event
loop, resident memory and open files of the process. The first round is left out of the comparison:
in it buffers reach their size. Exits with 1 if anything but memory differs afterwards, if memory
grew by more than `ROOM_BYTES`, or if any answer was another than it should be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from align.data.tokenizer import train_tokenizer
from align.policy import save_policy
from model import HybridForCausalLM, preset

NAME, VOCABULARY = "leaks", 290
TEXTS = ["what is two and three? five, of course, said the cat"] * 4
OPTIONS = ("--port", "0", "--name", NAME, "--max-tokens", "256", "--max-slots", "16")
MAX_SAMPLES = 64
LONG = 200
"""Tokens of what is cancelled long before its end."""
ROOM_BYTES = 16 << 20
HELD = ("rollout_samples", "rollout_free_slots", "rollout_free_pages", "rollout_tasks")
MEMORY, FILES = "process_resident_memory_bytes", "process_open_fds"
BASE: dict[str, Any] = {"model": NAME, "prompt": [5, 9, 250, 17, 3], "max_tokens": 6}
SAMPLING = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3},
    **{"stop_token_ids": (), "stop_strings": (), "repetition_tokens": 0},
    "repetition_probability": 0.5,
}
BAD = (
    {"temperature": -1},
    {"temperature": "warm"},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_k": -1},
    {"min_p": 2},
    {"n": 0},
    {"n": MAX_SAMPLES + 1},
    {"max_tokens": 0},
    {"stop": ""},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": [5, 10**6]},
    {"presence_penalty": 0.5},
    {"temprature": 1},
)


class Client:
    """Asks in every way; each way gives what came of it."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Mapping[str, Any], **more: Any) -> int:
        return self.http.post(path, json=body, **more).status_code

    def whole(self, number: int) -> str:
        done = self.openai.completions.create(**BASE, n=1 + number % 3, seed=number)
        return f"{len({choice.finish_reason for choice in done.choices} - {'stop', 'length'})} odd"

    def chat_stream(self, number: int) -> str:
        messages = [{"role": "user", "content": "two and three?"}]
        events = self.openai.chat.completions.create(
            model=NAME, messages=messages, max_tokens=8, stream=True, seed=number
        )
        ends = [choice.finish_reason for event in events for choice in event.choices]
        return "ended" if ends[-1] in ("stop", "length") else "broken off"

    def cancelled_stream(self, number: int) -> str:
        asked = BASE | {"max_tokens": LONG, "n": 1 + number % 4, "seed": number}
        with self.openai.completions.create(**asked, stream=True) as stream:
            for _ in zip(range(1 + number % 5), stream, strict=False):
                pass
        return "left"

    def cancelled_call(self, number: int) -> str:
        asked = BASE | {"max_tokens": LONG, "n": 4, "seed": number}
        try:
            return str(self.post("/v1/completions", asked, timeout=0.002 * (1 + number % 20)))
        except httpx.TimeoutException:
            return "left"

    def stop_string(self, number: int) -> str:
        done = self.openai.completions.create(
            **BASE | {"max_tokens": 24, "stop": ["e", "a t"], "seed": number},
            extra_body={"stop_token_ids": [7]},
        )
        return "with it" if "e" in done.choices[0].text else "cut"

    def generate(self, number: int) -> str:
        return str(self.post("/v1/generate", self._exact(f"g{number}", 6, number)))

    def withdrawn(self, number: int) -> str:
        key = f"w{number}"
        try:
            status = self.post("/v1/generate", self._exact(key, LONG, number), timeout=0.02)
        except httpx.TimeoutException:
            status = 0
        self.http.delete(f"/v1/generate/{key}")
        return str(status or "left")

    def _exact(self, key: str, tokens: int, number: int) -> dict[str, Any]:
        return {
            **{"id": key, "request_id": "p", "prompt": BASE["prompt"], "num_samples": 2},
            "return_experts": number % 2 == 0,
            "sampling": SAMPLING | {"max_new_tokens": tokens},
        }

    def crowd(self, number: int) -> str:
        return str(self.post("/v1/completions", BASE | {"n": MAX_SAMPLES // 2, "max_tokens": 2}))

    def wrong_model(self, number: int) -> str:
        return str(self.post("/v1/completions", BASE | {"model": "gpt", "stream": number % 2 == 0}))

    def too_long(self, number: int) -> str:
        asked = BASE | {"prompt": [5] * (300 + number % 100), "stream": number % 2 == 0}
        return str(self.post("/v1/completions", asked))

    def bad_value(self, number: int) -> str:
        asked = BASE | BAD[number % len(BAD)] | {"stream": number % 2 == 0}
        return str(self.post("/v1/completions", asked))

    def no_json(self, number: int) -> str:
        return str(self.http.post("/v1/completions", content=b"{" * (number % 9)).status_code)

    def close(self) -> None:
        self.http.close()
        self.openai.close()


# what may come of each kind; a crowd may find the queue full, and a call may be answered before its
# asker loses patience
KINDS: dict[str, tuple[Callable[[Client, int], str], frozenset[str]]] = {
    "answered whole": (Client.whole, frozenset({"0 odd"})),
    "chat streamed": (Client.chat_stream, frozenset({"ended"})),
    "stream cancelled": (Client.cancelled_stream, frozenset({"left"})),
    "call cancelled": (Client.cancelled_call, frozenset({"left", "200", "429"})),
    "stop string": (Client.stop_string, frozenset({"cut"})),
    "generate": (Client.generate, frozenset({"200", "429"})),
    "generate withdrawn": (Client.withdrawn, frozenset({"left", "200", "429"})),
    "crowd": (Client.crowd, frozenset({"200", "429"})),
    "wrong model": (Client.wrong_model, frozenset({"404"})),
    "too long": (Client.too_long, frozenset({"400"})),
    "bad value": (Client.bad_value, frozenset({"400"})),
    "no JSON": (Client.no_json, frozenset({"400"})),
}


@dataclass(frozen=True)
class Held:
    """What the worker holds, nothing being in flight."""

    held: dict[str, int]
    memory: int
    files: int


@contextmanager
def worker(folder: Path) -> Iterator[str]:
    """`align serve-rollout` of a policy made in `folder`; its address."""
    torch.manual_seed(0)
    config = preset("tiny", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=4)
    save_policy(HybridForCausalLM(config), train_tokenizer(TEXTS, VOCABULARY), folder)
    command = [sys.executable, "-m", "stages", "serve-rollout", str(folder), *OPTIONS]
    command += ["--max-samples", str(MAX_SAMPLES)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "described at" in line:
                    yield line.split()[2].removesuffix(",").removesuffix("/v1")
                    return
            raise RuntimeError(f"the worker ended with {process.wait()} before it listened")
        finally:
            process.terminate()


def held(url: str, *, tasks: int | None = None, limit_s: float = 30.0) -> Held:
    """What is held once nothing is in flight, and `tasks` are left if that is given."""
    until = time.monotonic() + limit_s
    while True:
        text = httpx.get(f"{url}/metrics").text
        found = {
            sample.name: int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.labels
        }
        is_idle = not found["rollout_samples"] and tasks in (None, found["rollout_tasks"])
        if is_idle or time.monotonic() > until:
            return Held({name: found[name] for name in HELD}, found[MEMORY], found[FILES])
        time.sleep(0.05)


def ask(url: str, numbers: range, *, num_clients: int) -> Counter[tuple[str, str]]:
    """Sends the requests of these numbers; how often each kind came to what."""
    names = [*KINDS]

    def one(share: range) -> Counter[tuple[str, str]]:
        told: Counter[tuple[str, str]] = Counter()
        with closing(Client(url)) as client:
            for number in share:
                name = names[number % len(names)]
                try:
                    told[name, KINDS[name][0](client, number // len(names))] += 1
                except openai.RateLimitError:
                    told[name, "429"] += 1
        return told

    shares = [numbers[first::num_clients] for first in range(num_clients)]
    with ThreadPoolExecutor(num_clients) as pool:
        return sum(pool.map(one, shares), Counter())


def wrong(told: Counter[tuple[str, str]]) -> list[str]:
    """What should not have come, 429 left out: whoever finds the queue full is told so."""
    return [
        f"{name}: {outcome} ({count})"
        for (name, outcome), count in told.items()
        if outcome not in KINDS[name][1] | {"429"}
    ]


def outcomes(told: Counter[tuple[str, str]]) -> Table:
    """How often each kind came to what."""
    table = Table("request", "came to")
    for name in KINDS:
        found = {outcome: n for (kind, outcome), n in sorted(told.items()) if kind == name}
        table.add_row(name, ", ".join(f"{outcome} {n}" for outcome, n in found.items()))
    return table


def main() -> None:
    """Runs the rounds and prints what was held after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    console, size = Console(width=110), given.requests // given.rounds
    table = Table("requests", "seconds", *(name.removeprefix("rollout_") for name in HELD))
    for title in ("open files", "memory MiB"):
        table.add_column(title)
    told: Counter[tuple[str, str]] = Counter()
    seen: list[Held] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, worker(Path(folder) / "policy") as url:
        # one round more than is compared
        for turn in range(given.rounds + 1):
            numbers = range(turn * size, (turn + 1) * size)
            told += ask(url, numbers, num_clients=given.clients)
            seen.append(held(url, tasks=seen[0].held["rollout_tasks"] if seen else None))
            now = seen[-1]
            numbers_held = (str(now.held[name]) for name in HELD)
            memory, seconds = f"{now.memory / 2**20:.1f}", f"{time.perf_counter() - began:.0f}"
            table.add_row(str(numbers.stop), seconds, *numbers_held, str(now.files), memory)
    console.print(outcomes(told), table)
    first, last = seen[0], seen[-1]
    grown = last.memory - first.memory
    console.print(f"memory grew by {grown / 2**20:.1f} MiB over {given.rounds * size} requests")
    bad = wrong(told)
    if bad or last.held != first.held or last.files != first.files or grown > ROOM_BYTES:
        console.print("NOT as before", *bad)
        sys.exit(1)


if __name__ == "__main__":
    main()
