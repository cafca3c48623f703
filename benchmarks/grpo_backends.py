"""A grpo stage through each engine: the same samples, the same losses, a killed worker too.

Run: python -m benchmarks.grpo_backends RUN [--recipe stages/recipes/tiny.yaml] [--stage grpo]
     [--steps 10] [--kill-at 4] [--backends vllm workers killed] [--set grpo.behaviour=engine]

RUN is a run of the recipe whose stages before this one are done; nothing in it is touched. The
stage's first steps are trained from its start artifact with its reward artifact, over and over:
sampled by the native engine, by vLLM in this process, by two `align serve-rollout`, and by two of
which one is killed while it samples. A token is drawn from its own logits by a hash of (seed,
sample, position), so every engine gives the same samples, unless rounding moves a border across the
hash: such a token, and a response that is lost, doubled or in another place, ends the run with its
name. Then losses, norms and the engines' log-probabilities must agree to BOUND, step by step.

vLLM needs an environment that has it (`make test-vllm` makes one): run all of this there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from accelerate import Accelerator

from align.course import Job, Step
from align.data.batch import Batch
from align.evals import EvalConfig
from align.loop import train
from align.prompts import open_scorer, read_prompts
from align.trainers.grpo import GrpoCourse, Tools
from align.trainers.lm import adapted, open_start
from stages.artifact import find_artifact
from stages.kinds import KINDS
from stages.recipe import Stage, load_recipe

BOUND = 1e-4
COMPARED = ("loss", "grad_norm", "reward/mean")
BACKENDS = ("vllm", "workers", "killed")


class Recorded(GrpoCourse):
    """Keeps what each step was made of; calls `before` at the beginning of step `at`."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.steps: list[Sequence[Batch]] = []
        self.at, self.before = -1, lambda: None

    def step(self, index: int) -> Step:
        if index == self.at:
            self.before()
        step = super().step(index)
        self.steps.append(step.batches)
        return step


@dataclass(frozen=True)
class Trained:
    """One way through the stage: a line of metrics and the microbatches of each step."""

    lines: list[dict[str, float]]
    steps: list[Sequence[Batch]]
    seconds: float


class Workers:
    """Two rollout workers in processes of their own, on one policy."""

    def __init__(self, policy: Path, root: Path, max_tokens: int) -> None:
        self.urls: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for _ in range(2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = [sys.executable, "-m", "stages", "serve-rollout", str(policy)]
            command += ["--port", str(port), "--weights-root", str(root)]
            command += ["--max-tokens", str(max_tokens)]
            self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            self.urls.append(f"http://127.0.0.1:{port}")

    def wait(self, seconds: float = 300) -> None:
        """Until both answer."""
        deadline = time.monotonic() + seconds
        for url, process in zip(self.urls, self.processes, strict=True):
            while not self._is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the worker at {url} did not come up; see what it said")
                time.sleep(0.2)

    def kill_one(self, version: int, least: int) -> threading.Thread:
        """Kills the first once it holds `least` samples of that version, in a thread."""

        def work() -> None:
            while True:
                told = httpx.get(f"{self.urls[0]}/health").json()
                if told["policy_version"] == version and told["num_samples"] >= least:
                    break
            os.kill(self.processes[0].pid, signal.SIGKILL)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    @staticmethod
    def _is_up(url: str) -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False


def stage_of(given: argparse.Namespace, rollout: dict[str, Any]) -> Stage:
    """The stage as the recipe has it, shortened, with another engine."""
    name = given.stage
    sets = [f"{name}.max_steps={given.steps}", *given.set]
    if rollout:
        sets.append(f"{name}.rollout={json.dumps(rollout)}")
    return load_recipe(given.recipe, sets, kinds=KINDS, eval_config=EvalConfig).stage(name)


def artifact(run: Path, stage: str) -> Path:
    found = find_artifact(run / stage / "artifact")
    if found is None:
        raise SystemExit(f"{run}: stage {stage!r} is not done; run the recipe up to it first")
    return found.folder


@contextmanager
def opened(stage: Stage, folder: Path, given: argparse.Namespace) -> Iterator[tuple[Recorded, Job]]:
    """The course as the stage's own `run` makes it."""
    config = stage.config
    reward = stage.head.reward_stage
    job = Job(
        name=stage.name,
        folder=folder,
        artifact=folder / "artifact",
        start=artifact(given.run, stage.head.start),
        base=given.recipe.parent,
        seed=config.seed,
        accelerator=Accelerator(cpu=not torch.cuda.is_available()),
        inputs={"reward": artifact(given.run, reward)} if reward else {},
    )
    start, tokenizer = open_start(config, job)
    longest = config.sequence_tokens - config.max_new_tokens
    prompts = read_prompts(config.data, job=job, tokenizer=tokenizer, max_tokens=longest)
    tools = Tools(tokenizer, open_scorer(job, tokenizer))
    policy = adapted(start, config, job)
    course = Recorded(config, job, policy=policy, reference=None, prompts=prompts, tools=tools)
    try:
        yield course, job
    finally:
        course.close()


def trained(backend: str, folder: Path, given: argparse.Namespace) -> Trained:
    """The stage's first steps through one engine."""
    rollout: dict[str, Any] = {}
    plain = stage_of(given, {})
    with ExitStack() as stack:
        if backend == "vllm":
            rollout = {"backend": "vllm", "cache_gib": 1.0}
        if backend in ("workers", "killed"):
            workers = Workers(
                artifact(given.run, plain.head.start), folder, plain.config.sequence_tokens
            )
            stack.callback(workers.close)
            workers.wait()
            rollout = {"workers": workers.urls}
        stage = stage_of(given, rollout)
        course, job = stack.enter_context(opened(stage, folder, given))
        killers: list[threading.Thread] = []
        if backend == "killed":
            course.at = given.kill_at
            # the proof of a push asks for three samples; a step for a worker's half of its groups
            least = stage.config.group_size
            course.before = lambda: killers.append(workers.kill_one(given.kill_at, least))
        start = time.perf_counter()
        train(course, course.policy, config=stage.config, job=job)
        seconds = time.perf_counter() - start
        if backend == "killed":
            killers[0].join(timeout=10)
            if workers.processes[0].poll() != -signal.SIGKILL:
                raise SystemExit("killed: the worker was never caught while it sampled")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained([json.loads(line) for line in lines], course.steps, seconds)


def compare(name: str, one: Trained, other: Trained) -> dict[str, float]:
    """Largest difference of each number; ends the run where samples differ or it is over BOUND."""
    gaps: dict[str, list[float]] = {key: [] for key in (*COMPARED, "engine log-probabilities")}
    for index, (here, there) in enumerate(zip(one.steps, other.steps, strict=True)):
        places = [[p for batch in step for p in batch.places] for step in (here, there)]
        if places[0] != places[1] or len({*places[1]}) != len(places[1]):
            raise SystemExit(
                f"{name}: step {index + 1} is made of other responses, in other places"
            )
        for mine, theirs in zip(here, there, strict=True):
            if not torch.equal(mine.packed.tokens, theirs.packed.tokens):
                raise SystemExit(
                    f"{name}: step {index + 1} has other tokens between {mine.places[0]} and "
                    f"{mine.places[-1]}: not the same samples, so losses say nothing"
                )
            gap = (mine.behaviour_logprobs - theirs.behaviour_logprobs).abs().max().item()
            gaps["engine log-probabilities"].append(gap)
    for mine, theirs in zip(one.lines, other.lines, strict=True):
        for key in COMPARED:
            gaps[key].append(abs(mine[key] - theirs[key]))
    # of NaN neither is true
    over = {key: found for key, found in gaps.items() if not all(gap <= BOUND for gap in found)}
    if over:
        raise SystemExit(f"{name}: {over} by step, expected at most {BOUND} of each")
    return {key: max(found) for key, found in gaps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run of the recipe, done up to the stage")
    parser.add_argument("--recipe", type=Path, default=Path("stages/recipes/tiny.yaml"))
    parser.add_argument("--stage", default="grpo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kill-at", type=int, default=4, help="0-based step of `killed`")
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--set", nargs="*", default=[], help="key=value of the recipe, by stage")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        native = trained("native", Path(root) / "native", given)
        responses = sum(len(batch.places) for step in native.steps for batch in step)
        tokens = sum(line["rollout/response_tokens"] for line in native.lines) / given.steps
        print(
            f"native: {given.steps} steps, {responses} responses of {tokens:.1f} tokens, losses "
            f"{' '.join(format(line['loss'], '.4f') for line in native.lines)}, "
            f"{native.seconds:.0f} s",
            flush=True,
        )
        for backend in given.backends:
            other = trained(backend, Path(root) / backend, given)
            worst = compare(backend, native, other)
            told = ", ".join(f"{key} {gap:.1e}" for key, gap in worst.items())
            print(
                f"{backend}: same samples; largest differences {told}; {other.seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
