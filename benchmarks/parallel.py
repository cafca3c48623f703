"""Rows and experts shared by GPUs: the scaling table, and what the large model would need on paper.

Run: python -m benchmarks.parallel [--ranks 2] [--parts sequence lasp softmax ...]
or:  torchrun --nproc_per_node 2 -m benchmarks.parallel
Without a GPU: python -m benchmarks.parallel --preset tiny --tokens 512 --expert-tokens 256 ...

    sequence  a training step of one row, on one GPU and on all, with AdamW
    lasp      one lightning layer's attention forward + backward, by each way to share it
    softmax   the same of a softmax layer
    expert    forward + backward with the experts shared, as many tokens a GPU as one GPU has alone
    fsdp      losses of sharded (FSDP2) and unsharded training, step by step
    long      LoRA SFT and DPO steps of a packed row of a million tokens, on one GPU and on all
    paper     bytes a step and memory of the 456B preset on 64 to 2,048 GPUs, by `volume.py`

Random weights and tokens; times are medians on the wall of the slowest rank. Beside each shared
time stands a model of it: the one GPU's time over the ranks, and the bytes of `volume.py` over the
speed of an all-to-all that the run measures.
"""

from __future__ import annotations

import argparse
import functools
import traceback
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import long_rows, shared_layers, volume
from benchmarks.ranks import Ranks, build, mean_loss, row, run_on
from model import Packed
from model.config import PRESETS, count_parameters, preset
from model.lightning import decay_slopes
from model.parallel.apply import parallelize
from model.parallel.expert import average_expert_gradients, leave_out_of_ddp
from model.parallel.mesh import ParallelConfig, open_mesh

PASSES = 4
# calls of a lightning layer that are launched one behind the other, as the layers of a model are
CALLS = 8
PROBE_BYTES = 2**28


def link_speed(ranks: Ranks, size: int = PROBE_BYTES) -> float:
    """Bytes a second that one rank receives in an all-to-all."""
    sent = torch.zeros(size // 2, dtype=torch.bfloat16, device=ranks.device)
    got = torch.empty_like(sent)
    seconds = ranks.seconds(lambda: dist.all_to_all_single(got, sent), 5, warm_ups=2)
    return size * (ranks.world.size - 1) / ranks.world.size / seconds


def training(model: nn.Module, step: Callable[[], Tensor]) -> Callable[[], None]:
    """A step with torch's AdamW; the optimizer's states are made in the first."""
    is_cuda = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=is_cuda or None)

    def work() -> None:
        step().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def check_loss(ranks: Ranks, name: str, found: Tensor, wanted: float) -> None:
    off = abs(float(found.detach()) - wanted) / max(abs(wanted), 1e-30)
    ranks.say(f"  {name}: loss off by {off:.1e} of one process's")


def sequence(ranks: Ranks, options: argparse.Namespace) -> None:
    """A whole training step of one row."""
    config, size = preset(options.preset), ranks.world.size
    packed = row([options.tokens], config.vocab_size, ranks)
    ranks.say(f"\nsequence: {options.preset}, one row of {options.tokens} tokens, full checkpoints")
    model = build(config, ranks)
    model.model.checkpointing = "full"
    wanted = 0.0
    if ranks.world.rank == 0:
        with torch.no_grad():
            wanted = float(mean_loss(model, packed))
    wanted = ranks.largest(wanted)
    ranks.clear()
    one = ranks.seconds(training(model, lambda: mean_loss(model, packed)), PASSES, alone=True)
    say_step(ranks, "1 GPU", options.tokens, one)
    del model
    ranks.clear()
    parallel = ParallelConfig(sequence=size)
    mesh = open_mesh(parallel, device_type=ranks.device.type)
    model = build(config, ranks)
    parallelize(model, mesh, parallel)
    model.model.checkpointing = "full"
    with torch.no_grad():
        check_loss(ranks, f"{size} GPUs", mean_loss(model, packed), wanted)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    work = training(model, lambda: mean_loss(wrapped, packed))
    for overlaps in (True, False):
        shared_layers.set_overlap(model, overlaps)
        shared = ranks.seconds(work, PASSES)
        name = f"{size} GPUs" + ("" if overlaps else ", no overlap")
        say_step(ranks, name, options.tokens, shared, f", {one / shared:.2f} times")
    moved = volume.sequence_volume(
        config, options.tokens, size, reduced=count_parameters(config).total
    )
    say_volume(ranks, moved, one / size, options.speed)


def say_step(ranks: Ranks, name: str, tokens: int, seconds: float, more: str = "") -> None:
    peak = ranks.peak_gb()
    ranks.say(
        f"  {name:>20}: {seconds * 1e3:9.1f} ms, {tokens / seconds:9.0f} tokens/s, "
        f"peak {peak:.1f} GB{more}"
    )


def say_volume(ranks: Ranks, moved: volume.Volume, compute: float, speed: float) -> None:
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in vars(moved).items() if size)
    waits = moved.total / speed
    ranks.say(
        f"  on paper: {moved.total / 1e6:.1f} MB to each rank ({parts}), {waits * 1e3:.1f} ms at "
        f"{speed / 1e9:.0f} GB/s; without overlap {(compute + waits) * 1e3:.1f} ms a step"
    )


def lasp(ranks: Ranks, options: argparse.Namespace) -> None:
    """One lightning layer's attention."""
    config = preset(options.preset)
    heads, dim = config.num_attention_heads, config.head_dim
    slopes = decay_slopes(heads, 1, config.num_hidden_layers, ranks.device)
    state = heads * dim * dim * 4
    for tokens in options.layer_tokens:
        ranks.say(
            f"\nlasp: {tokens} tokens, {heads} heads of {dim}, forward + backward; a state is "
            f"{state / 1e6:.1f} MB, keys and values {tokens * heads * dim * 4 / 1e6:.0f} MB"
        )
        compare(ranks, shared_layers.lightning(ranks, slopes, tokens, dim), calls=CALLS)


def softmax(ranks: Ranks, options: argparse.Namespace) -> None:
    """One softmax layer's attention."""
    config = preset(options.preset)
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    for tokens in options.layer_tokens:
        ranks.say(
            f"\nsoftmax: {tokens} tokens, {heads} heads of {dim}, {kv_heads} of keys, forward + "
            "backward"
        )
        compare(ranks, shared_layers.softmax(ranks, heads, kv_heads, tokens, dim), calls=1)


def repeat(form: Callable[[], Tensor], calls: int) -> None:
    for _ in range(calls):
        form()


def compare(ranks: Ranks, forms: dict[str, Callable[[], Tensor]], *, calls: int) -> None:
    """Each form's time, and its output against the first one's."""
    wanted, one = None, 0.0
    for name, form in forms.items():
        found = form()
        wanted = found if wanted is None else wanted
        off = ranks.largest(float((found - wanted).float().norm() / wanted.float().norm()))
        seconds = ranks.seconds(functools.partial(repeat, form, calls), 3) / calls
        one = one or seconds
        ranks.say(
            f"  {name:>20}: {seconds * 1e3:8.3f} ms, {one / seconds:.2f} times, off by {off:.1e}"
        )


def expert(ranks: Ranks, options: argparse.Namespace) -> None:
    """Forward + backward with the experts shared; every rank has a row of its own."""
    config, size, tokens = preset(options.preset), ranks.world.size, options.expert_tokens
    packed = row([tokens], config.vocab_size, ranks, seed=ranks.world.rank)
    for is_even in (True, False):
        model = build(config, ranks)
        if is_even:
            shared_layers.make_even(model, row([tokens], config.vocab_size, ranks))
        with torch.no_grad():
            logits = model(packed=packed).router_logits
        busiest = shared_layers.busiest(logits, config.num_experts_per_tok, size)
        ranks.say(
            f"\nexpert: {options.preset}, a row of {tokens} tokens on each GPU, "
            f"{'even' if is_even else 'random'} routers: the busiest GPU of a layer has "
            f"{ranks.largest(busiest):.2f} times its part of the experts' rows, on average"
        )
        del logits
        share_experts(ranks, options, model, packed)
        del model
        ranks.clear()


def share_experts(
    ranks: Ranks, options: argparse.Namespace, model: nn.Module, packed: Packed
) -> None:
    size, tokens = ranks.world.size, options.expert_tokens

    def alone() -> None:
        mean_loss(model, packed).backward()
        model.zero_grad(set_to_none=True)

    ranks.clear()
    one = ranks.seconds(alone, PASSES, alone=True)
    say_step(ranks, "1 GPU", tokens, one)
    wanted = ranks_mean(ranks, mean_loss(model, packed))
    parallel = ParallelConfig(expert=size)
    mesh = open_mesh(parallel, device_type=ranks.device.type)
    parallelize(model, mesh, parallel)
    leave_out_of_ddp(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def shared() -> None:
        mean_loss(wrapped, packed).backward()
        average_expert_gradients(model, mesh)
        model.zero_grad(set_to_none=True)

    check_loss(ranks, f"{size} GPUs", ranks_mean(ranks, mean_loss(model, packed)), float(wanted))
    ranks.clear()
    for halves in (True, False):
        shared_layers.set_halves(model, halves)
        many = ranks.seconds(shared, PASSES)
        name = f"{size} GPUs" + (", in halves" if halves else ", whole")
        say_step(ranks, name, size * tokens, many, f", {size * one / many:.2f} times")
    say_volume(ranks, volume.expert_volume(model.config, tokens, size), one, options.speed)


def ranks_mean(ranks: Ranks, loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / ranks.world.size


def fsdp(ranks: Ranks, options: argparse.Namespace) -> None:
    """Losses of sharded and unsharded training, fp32."""
    config, size = preset(options.fsdp_preset), ranks.world.size
    ranks.say(
        f"\nfsdp: {options.fsdp_preset}, fp32, {options.fsdp_steps} steps of {size} rows of "
        f"{options.fsdp_tokens} tokens, AdamW at 1e-3"
    )
    curves = []
    for is_sharded in (False, True):
        model = build(config, ranks, torch.float32)
        if is_sharded:
            mesh = init_device_mesh(ranks.device.type, (size,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        curves.append(losses(model, ranks, options, is_sharded))
        del model
        ranks.clear()
    one, many = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    off = (many / one - 1).abs()
    early = off[: max(len(off) // 5, 1)].max()
    ranks.say(
        f"  loss {one[0]:.4f} to {one[-1]:.4f} unsharded, {many[-1]:.4f} sharded; off by at most "
        f"{early:.1e} in the first fifth of the steps, {off.max():.1e} in all, "
        f"on average {(many / one - 1).mean():+.1e}"
    )


def losses(
    model: nn.Module, ranks: Ranks, options: argparse.Namespace, is_sharded: bool
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    size, found = ranks.world.size, []
    for step in range(options.fsdp_steps):
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        rows = [ranks.world.rank] if is_sharded else range(size)
        for number in rows:
            # few rows that come again, so that there is something to learn
            seed = (step * size + number) % 8
            packed = row([options.fsdp_tokens], model.config.vocab_size, ranks, seed=seed)
            loss = mean_loss(model, packed)
            (loss if is_sharded else loss / size).backward()
            total += loss.detach().double() / size
        if is_sharded:
            dist.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(float(total))
    return found


def long(ranks: Ranks, options: argparse.Namespace) -> None:
    """LoRA steps of a row of a million tokens."""
    for sizes in options.long_on:
        long_rows.measure(ranks, options, ranks.world.size if sizes == "all" else 1)


def paper(ranks: Ranks, options: argparse.Namespace) -> None:
    """The 456B preset."""
    config = preset("minimax-text-01")
    ranks.say(
        f"\npaper: minimax-text-01, rows of {options.paper_tokens} tokens, weights sharded over "
        "all GPUs; GB a GPU: states (weights, gradients, optimizer), block inputs, layer at work; "
        "bytes received a step"
    )
    head = (
        f"  {'training':>8} {'GPUs':>5} {'sequence':>8} {'expert':>6} {'states':>7} {'inputs':>7}"
    )
    ranks.say(f"{head} {'layer':>6} {'memory':>7} | GB received: weights, gradients, experts, rest")
    for lora_rank in (0, 16):
        for count in (64, 128, 256, 512, 1024, 2048):
            layout = volume.Layout(
                count, min(count, 64), 32, options.paper_tokens, lora_rank=lora_rank
            )
            held, moved = volume.memory(config, layout), volume.volume(config, layout)
            rest = moved.states + moved.heads + moved.logprobs
            ranks.say(
                f"  {'LoRA' if lora_rank else 'full':>8} {count:5} {layout.sequence:8} "
                f"{layout.expert:6} {held.state / 1e9:7.1f} {held.kept / 1e9:7.1f} "
                f"{held.layer / 1e9:6.1f} {held.total / 1e9:7.1f} | {moved.weights / 1e9:7.1f} "
                f"{moved.gradients / 1e9:7.1f} {moved.experts / 1e9:7.1f} {rest / 1e9:7.1f}"
            )


PARTS: dict[str, Callable[[Ranks, argparse.Namespace], None]] = {
    "sequence": sequence,
    "lasp": lasp,
    "softmax": softmax,
    "expert": expert,
    "fsdp": fsdp,
    "long": long,
    "paper": paper,
}


def measure(ranks: Ranks, options: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU, gloo"
    ranks.say(f"{ranks.world.size} x {device}, torch {torch.__version__}")
    options.speed = link_speed(ranks) if ranks.world.size > 1 else float("inf")
    ranks.say(f"an all-to-all brings {options.speed / 1e9:.1f} GB/s to each rank")
    for part in options.parts:
        try:
            PARTS[part](ranks, options)
        except Exception:
            # the other parts still count; a rank that waits for this one is told by its timeout
            ranks.say(f"  {part} failed:\n{traceback.format_exc()}")
        ranks.clear()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="if no launcher started them")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--preset", default="base", choices=tuple(PRESETS))
    parser.add_argument("--tokens", type=int, default=262_144, help="of the row of `sequence`")
    parser.add_argument("--layer-tokens", type=int, nargs="+", default=[32_768, 262_144])
    parser.add_argument("--expert-tokens", type=int, default=32_768)
    parser.add_argument("--fsdp-preset", default="small", choices=tuple(PRESETS))
    parser.add_argument("--fsdp-tokens", type=int, default=1024)
    parser.add_argument("--fsdp-steps", type=int, default=50)
    parser.add_argument("--long-tokens", type=int, default=1_032_192)
    parser.add_argument("--long-on", nargs="+", default=["one", "all"], choices=("one", "all"))
    parser.add_argument("--long-steps", nargs="+", default=list(long_rows.STEPS))
    parser.add_argument("--paper-tokens", type=int, default=1_032_192)
    options = parser.parse_args(arguments)
    run_on(options.ranks, measure, options)


if __name__ == "__main__":
    main()
