"""Rollout of a preset on one GPU: the native engine beside transformers' `generate`.

Run: python -m benchmarks.rollout [--parts exact speed int8 prefill short overlap transformers]
     [--batches 1 32 256] [--profile 32]

Random bf16 weights, random prompts, temperature 1, no stop token: 512 tokens in, 256 out. "tok/s"
is tokens out over the time on the wall of one `generate`, prefill included; "step" is a decode step
by the same clock, without prefill; "graph" the same step on the device alone. The floor of a step
is the bytes that must move (weights of the experts that random routing meets and all other weights
once, states read and written, keys and values read) over what a copy on the device reaches.

    exact         log-probabilities of the engine and of one full packed forward, both in bf16,
                  against the same weights in fp32
    speed, int8   the table, with live and with int8 experts
    prefill       65,536 tokens; a group of 16 with 8,192 against 16 prompts of 8,192
    short         one prompt alone, padded to a bucket and not, in turns; beside it the bucket's
                  graph and the plain trunk as the device runs them
    overlap       prefill and decode steps at once on two streams, and one after the other
    transformers  its `generate` at the same batches up to 32

Every part is well under a minute. vLLM has a process of its own: `rollout_vllm.py`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels import DEVICE, median_ms, say
from benchmarks.train_step import build, their_model
from model import DecodeCache, HybridConfig, HybridForCausalLM, Packed
from model.config import PRESETS, count_parameters, preset
from rollout.native.engine import NativeEngine
from rollout.native.graphs import bucket
from rollout.native.padded import bucket_of
from rollout.types import Completion, Request, Sampling

BYTES_A_SECOND = 4.2e12
PROMPT, NEW = 512, 256


def requests_of(
    number: int, prompt: int, new: int, *, samples: int = 1, seed: int = 0
) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Request(
            f"{seed}-{i}",
            tuple(torch.randint(32_000, (prompt,), generator=generator).tolist()),
            Sampling(max_new_tokens=new, seed=i),
            num_samples=samples,
        )
        for i in range(number)
    ]


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def floor_ms(config: HybridConfig, batch: int, tokens: float, expert_bytes: float = 2) -> float:
    """Least time of a decode step at `tokens` held by each of `batch` samples."""
    count = count_parameters(config)
    experts = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    others = count.total - experts * config.num_local_experts - count.embeddings // 2
    share = 1 - config.num_experts_per_tok / config.num_local_experts
    met = config.num_local_experts * (1 - share**batch)
    heads, size = config.num_attention_heads, config.head_dim
    lightning = config.layer_types.count("linear_attention")
    states = 2 * 4 * lightning * heads * size * size
    keys = 2 * 2 * (config.num_hidden_layers - lightning) * config.num_key_value_heads * size
    total = 2 * others + expert_bytes * experts * met + batch * (states + keys * tokens)
    return total / BYTES_A_SECOND * 1e3


def collect(engine: NativeEngine, requests: list[Request], done: list[Completion]) -> None:
    done += engine.generate(requests)


def speed(
    model: HybridForCausalLM,
    batches: Sequence[int],
    repeats: int,
    experts: Literal["live", "int8"] = "live",
) -> None:
    say(f"experts {experts}")
    say(
        f"{'batch':>6} {'tok/s':>8} {'decode':>8} {'step ms':>8} {'graph':>6} {'floor':>6} "
        f"{'prefill ms':>11}"
    )
    for batch in batches:
        # with room to spare
        tokens = batch * (PROMPT + 2 * NEW)
        engine = NativeEngine(model, max_slots=batch, max_cache_tokens=tokens, experts=experts)
        # as many turns as all prefills take, so that every size of batch is captured; then once
        # more: a capture gives back the memory that prefills hold
        for seed in (99, 98):
            engine.generate(requests_of(batch, PROMPT, 24, seed=seed))
        found = []
        for repeat in range(repeats):
            requests = requests_of(batch, PROMPT, NEW, seed=repeat)
            done: list[Completion] = []
            total = seconds(partial(collect, engine, requests, done))
            assert sum(len(one.tokens) for one in done) == batch * NEW
            # of the last to start: from its first token all rows decode
            decode = min(one.timings.decode_s for one in done if one.timings is not None)
            found.append((total, decode))
        total, decode = (statistics.median(times) for times in zip(*found, strict=True))
        step = decode / (NEW - 1) * 1e3
        floor = floor_ms(
            model.config, batch, PROMPT + NEW / 2, expert_bytes=1 if experts == "int8" else 2
        )
        say(
            f"{batch:6d} {batch * NEW / total:8.0f} {batch / step * 1e3:8.0f} {step:8.3f} "
            f"{graph_ms(engine, batch):6.3f} {floor:6.3f} {(total - decode) * 1e3:11.1f}"
        )
        engine.close()


def graph_ms(engine: NativeEngine, batch: int) -> float:
    """A decode step of so many again and again: it writes where nobody reads any more."""
    runner = engine._runner
    assert runner is not None, "the engine has generated"
    rows = bucket(batch)
    return median_ms(lambda: runner._graphs.replay((rows, runner._batches[rows].flags)))


def live_engine(model: HybridForCausalLM, batch: int, new: int) -> NativeEngine:
    """An engine whose `batch` samples all decode, with graphs for it."""
    engine = NativeEngine(model, max_slots=batch, max_cache_tokens=batch * (PROMPT + 2 * NEW))
    for request in requests_of(batch, PROMPT, new):
        engine.submit(request)
    for _ in range(new):
        engine.step()
        if engine.stats.num_live == batch:
            return engine
    raise RuntimeError(f"{engine.stats} after {new} turns, expected {batch} samples that decode")


def profiled(model: HybridForCausalLM, batch: int) -> None:
    """The kernels of eight decode steps."""
    engine = live_engine(model, batch, 64)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        took = seconds(lambda: [engine.step() for _ in range(8)])
    table = found.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=60
    )
    say(f"batch {batch}: 8 steps, {took / 8 * 1e3:.3f} ms each on the wall\n{table}")
    engine.close()


def prefill(model: HybridForCausalLM) -> None:
    """One prompt of 65,536 tokens; a group of 16 with 8,192 against 16 prompts of 8,192."""
    engine = NativeEngine(model, max_slots=17, max_cache_tokens=17 * 8320, prefill_tokens=65_536)
    for new, (name, number, length, samples) in (
        (1, ("65,536 tokens", 1, 65_536, 1)),
        (2, ("group of 16, 8,192 tokens", 1, 8192, 16)),
        (2, ("16 prompts of 8,192 tokens", 16, 8192, 1)),
    ):
        times = []
        for seed in range(5):
            given = requests_of(number, length, new, samples=samples, seed=seed)
            times.append(seconds(lambda given=given: engine.generate(given)) * 1e3)
        spread = f"{min(times[1:]):.1f} to {max(times[1:]):.1f}"
        say(f"prefill {name}: {statistics.median(times[1:]):.1f} ms ({spread})")
    engine.close()


@torch.no_grad()
def short(model: HybridForCausalLM) -> None:
    """The host launches a short prompt's kernels one by one; a bucket's graph launches them at
    once, of more rows."""
    choices: tuple[Literal["cuda", "never"], ...] = ("cuda", "never")
    engines = [NativeEngine(model, max_slots=2, max_cache_tokens=4096, buckets=c) for c in choices]
    say(f"{'tokens':>6} {'padded ms':>22} {'plain ms':>22} {'graph':>6} {'trunk':>6}")
    for length in (1, 17, 32, 64, 100, 128, 256, 512):
        times: tuple[list[float], ...] = ([], [])
        for seed in range(13):
            given = requests_of(1, length, 1, seed=seed)
            for engine, found in zip(engines, times, strict=True):
                found.append(seconds(lambda e=engine, given=given: e.generate(given)) * 1e3)
        # the first two compile and capture
        walls = [
            f"{statistics.median(found[2:]):.2f} ({min(found[2:]):.2f} to {max(found[2:]):.2f})"
            for found in times
        ]
        runner, rows = engines[0]._runner, bucket_of(0, length)
        assert runner is not None, "it has generated"
        graph = median_ms(lambda r=runner, rows=rows: r._piece_graphs.replay((rows, False)))
        # random tokens: equal ones would all meet the same experts
        packed = Packed(
            torch.randint(32_000, (length,), device=DEVICE),
            torch.arange(length, device=DEVICE),
            (length,),
        )
        trunk = median_ms(lambda packed=packed: model.model.run(packed), 5, pauses=40)
        say(f"{length:6d} {walls[0]:>22} {walls[1]:>22} {graph:6.2f} {trunk:6.2f}")
    for engine in engines:
        engine.close()


@torch.no_grad()
def overlap(model: HybridForCausalLM, batch: int = 32, steps: int = 24) -> None:
    """Decode steps and a prefill of 16,384 tokens, on one stream and on two."""
    engine = live_engine(model, batch, 128)
    runner = engine._runner
    assert runner is not None, "it decodes"
    loaded = runner._loaded
    assert loaded is not None, "it decodes"
    packed = Packed.from_sequences([[7] * 1024] * 16, device=DEVICE)
    cache = DecodeCache(
        model.config, num_slots=16, num_pages=16 * 16, dtype=model.dtype, device=DEVICE
    )
    slots = tuple(cache.allocate() for _ in range(16))
    other = torch.cuda.Stream(priority=0)

    def decode() -> None:
        for _ in range(steps):
            runner._graphs.replay((loaded.rows, loaded.flags))

    def new_prompts() -> None:
        cache.lengths = [0] * 16
        model.model.run(packed, cache=cache, slots=slots)

    def both() -> None:
        other.wait_stream(torch.cuda.current_stream())
        decode()
        with torch.cuda.stream(other):
            new_prompts()
        torch.cuda.current_stream().wait_stream(other)

    def in_turn() -> None:
        decode()
        new_prompts()

    for name, work in (
        (f"{steps} decode steps of {batch}", decode),
        ("prefill of 16,384 tokens", new_prompts),
        ("one after the other", in_turn),
        ("on two streams", both),
    ):
        work()
        times = [seconds(work) * 1e3 for _ in range(5)]
        say(f"overlap: {name}: {statistics.median(times):.1f} ms")
    engine.close()


@torch.no_grad()
def exactness(model: HybridForCausalLM, **options: object) -> None:
    """RMS and largest difference in nats."""
    engine = NativeEngine(model, max_slots=24, max_cache_tokens=24 * 2048, **options)
    requests = [*requests_of(8, 300, 100, samples=2), *requests_of(4, 1500, 60, seed=1)]
    together = engine.generate(requests)
    # one by one these are padded
    short = [requests_of(1, n, 20, seed=n) for n in (1, 17, 32, 33, 100, 128, 200, 257, 500)]
    alone = [one for given in short for one in engine.generate(given)]
    engine.close()
    for name, done in (("prompts together", together), ("short prompts one by one", alone)):
        say(name)
        compare(model, done)


def compare(model: HybridForCausalLM, done: Sequence[Completion]) -> None:
    """What an engine gave beside full forwards, in the model's dtype and in fp32."""

    def full() -> torch.Tensor:
        rows = []
        for one in done:
            packed = Packed.from_sequences([one.prompt + one.tokens], device=DEVICE)
            hidden = model.model.run(packed).hidden[len(one.prompt) - 1 : -1]
            targets = torch.tensor(one.tokens, device=DEVICE)[:, None]
            rows.append(model.logits(hidden).float().log_softmax(-1).gather(-1, targets)[:, 0])
        return torch.cat(rows)

    found = torch.tensor([x for one in done for x in one.logprobs], device=DEVICE)
    dtype, forward = model.dtype, full()
    model.float()
    exact = full()
    model.to(dtype)
    for name, a, b in (
        ("engine - forward", found, forward),
        ("engine - fp32", found, exact),
        ("forward - fp32", forward, exact),
    ):
        gap = (a - b).abs()
        say(f"{name}: rms {gap.square().mean().sqrt():.2e}, largest {gap.max():.2e} nats")


def transformers_speed(config: HybridConfig, batches: Sequence[int], new: int) -> None:
    peer = their_model(config).eval()
    for batch in batches:
        prompts = torch.randint(32_000, (batch, PROMPT), device=DEVICE)

        def run(tokens: int, prompts: torch.Tensor = prompts) -> None:
            peer.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=None,
            )  # fmt: skip

        run(4)
        short, long = seconds(lambda: run(4)), seconds(lambda: run(new))
        step = (long - short) / (new - 4)
        whole = long + step * (NEW - new)
        say(f"transformers generate, batch {batch}: {batch * NEW / whole:.0f} tok/s, step "
            f"{step * 1e3:.1f} ms (from {new} tokens)")  # fmt: skip


OURS: dict[str, Callable[[HybridForCausalLM, argparse.Namespace], None]] = {
    "exact": lambda model, _: exactness(model),
    "speed": lambda model, given: speed(model, given.batches, given.repeats),
    "int8": lambda model, given: speed(model, given.batches, given.repeats, "int8"),
    "prefill": lambda model, _: prefill(model),
    "short": lambda model, _: short(model),
    "overlap": lambda model, _: overlap(model),
}
PARTS = (*OURS, "transformers")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--preset", default="base", choices=PRESETS)
    arguments.add_argument("--batches", type=int, nargs="*", default=[1, 32, 256])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--profile", type=int, nargs="*", default=[])
    arguments.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    given = arguments.parse_args()
    config = preset(given.preset)
    model = build(HybridForCausalLM, config).eval()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in given.parts:
        if name in OURS:
            took = seconds(partial(OURS[name], model, given))
            say(f"-- {name}: {took:.0f} s")
    for batch in given.profile:
        profiled(model, batch)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if "transformers" in given.parts:
        transformers_speed(config, [b for b in given.batches if b <= 32], 20)


if __name__ == "__main__":
    main()
