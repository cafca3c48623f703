"""The native engine beside vLLM 0.23, the last with a MiniMax of its own, on one GPU; transformers.

Run: python -m benchmarks.rollout_vllm [--python VLLM_PYTHON] [--path SITE] [--batches 1 32 256]

vLLM wants other versions than ours, so it runs in a process of its own: under the interpreter
`--python`, with `--path` before everything else on its PYTHONPATH. It opens what `align export --to
vllm` wrote of a preset with random weights, continues a few prompts greedily, and is timed as
`benchmarks.rollout` times our engine: 512 random tokens in, 256 out, bf16, temperature 1, CUDA
graphs, its defaults otherwise. "tok/s" counts prefill; a step is the time beyond the first token.

Agreement: the log-probability of every token of prompt and answer, under vLLM (or transformers,
which opens `--to transformers`), under our packed forward in bf16, and under the same weights in
fp32. A policy that was exported wrong is off by whole nats; bf16's own rounding is what two right
engines differ by.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MiniMaxForCausalLM

from benchmarks.kernels import DEVICE, say
from benchmarks.rollout import NEW, PROMPT, speed
from benchmarks.train_step import build
from model import HybridConfig, HybridForCausalLM, Packed
from model.config import PRESETS, preset
from model.kernels.logprob.op import token_logprobs
from stages.export import To, export_policy

PROMPTS, LENGTH, GREEDY = 8, 300, 48
# one process, nothing fetched, nothing sent
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def exported(model: HybridForCausalLM, folder: Path, to: To) -> Path:
    """The model as `align export` writes it, without its check on the CPU: ours is stricter."""
    model.save_pretrained(folder / "policy")
    export_policy(folder / "policy", folder / to, dtype=model.dtype, to=to, verify=False)
    return folder / to


def run_vllm(folder: Path, prompts: list[list[int]], given: argparse.Namespace) -> list[Any]:
    """What `benchmarks.vllm_side` found, as far as it came."""
    job, out = folder.parent / "job.json", folder.parent / "found.jsonl"
    log = given.log or folder.parent / "vllm.log"
    sizes = sorted({1, 2, 4, 8, 16, 32, 64, 128, *given.batches})
    options = {
        "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 1024,
        "max_num_seqs": max(sizes), "gpu_memory_utilization": 0.5, "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": sizes}, "seed": 0,
        **json.loads(given.vllm_options),
    }  # fmt: skip
    told = {
        "folder": str(folder), "out": str(out), "options": options, "prompts": prompts,
        "greedy": GREEDY, "batches": given.batches, "repeats": given.repeats, "prompt": PROMPT,
        "new": NEW, "vocabulary": 32_000,
    }  # fmt: skip
    job.write_text(json.dumps(told), encoding="utf-8")
    path = os.pathsep.join([*given.path, str(Path.cwd())])
    with log.open("w", encoding="utf-8") as file:
        try:
            code: object = subprocess.run(
                [given.python, "-m", "benchmarks.vllm_side", str(job)],
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
                stdout=file, stderr=subprocess.STDOUT, timeout=given.timeout, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = f"none within {given.timeout} s"
    if code != 0:
        tail = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        say(f"vLLM's process: exit code {code}; the end of what it said:\n  {tail}")
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return [json.loads(line) for line in lines]


@torch.no_grad()
def our_logprobs(model: HybridForCausalLM, rows: Sequence[Sequence[int]]) -> Tensor:
    """Of every token after the first of each row, one after the other; all rows in one pack."""
    packed = Packed.from_sequences(rows, device=DEVICE)
    hidden = model.model.run(packed).hidden
    logprobs, _ = token_logprobs(hidden[:-1], model.lm_head.weight, packed.tokens[1:])
    return logprobs[packed.positions[1:] != 0]


def agreement(
    model: HybridForCausalLM, rows: Sequence[Sequence[int]], theirs: Mapping[str, Tensor]
) -> None:
    """RMS and largest difference in nats; leaves the model in its dtype."""
    dtype = model.dtype
    rounded = {"packed bf16 forward": our_logprobs(model, rows)}
    exact = our_logprobs(model.float(), rows)
    model.to(dtype)
    say(
        f"{len(rows)} rows, {len(exact)} tokens of {exact.mean():.2f} nats, spread "
        f"{exact.std():.2f}; against our fp32 forward:"
    )
    for name, found in (rounded | dict(theirs)).items():
        gap = (found.to(DEVICE) - exact).abs()
        say(f"  {name}: rms {gap.square().mean().sqrt():.2e}, largest {gap.max():.2e} nats")


def beside_vllm(config: HybridConfig, folder: Path, given: argparse.Namespace) -> None:
    model = build(HybridForCausalLM, config).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (PROMPTS, LENGTH), generator=generator).tolist()
    checkpoint = exported(model, folder, "vllm")
    if not given.no_ours:
        say("native engine")
        speed(model, given.batches, given.repeats)
    gc.collect()
    torch.cuda.empty_cache()
    found = run_vllm(checkpoint, prompts, given)
    for one in found:
        if one["kind"] == "ready":
            say(f"vLLM {one['vllm']}, torch {one['torch']}: ready in {one['seconds']:.0f} s")
            say(f"{'batch':>6} {'tok/s':>8} {'decode':>8} {'step ms':>8} {'first token ms':>15}")
        if one["kind"] == "speed":
            whole, batch = statistics.median(one["whole"]), one["batch"]
            step = (whole - one["first"]) / (NEW - 1)
            say(
                f"{batch:6d} {batch * NEW / whole:8.0f} {batch / step:8.0f} {step * 1e3:8.2f} "
                f"{one['first'] * 1e3:15.0f}"
            )
    for one in found:
        if one["kind"] == "greedy":
            rows = [p + a["tokens"] for p, a in zip(prompts, one["answers"], strict=True)]
            theirs = torch.tensor([x for a in one["answers"] for x in a["logprobs"]])
            agreement(model, rows, {"vLLM": theirs})


@torch.no_grad()
def beside_transformers(config: HybridConfig, folder: Path) -> None:
    model = build(HybridForCausalLM, config).eval()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (PROMPTS, LENGTH), generator=generator)
    checkpoint = exported(model, folder, "transformers")
    peer = MiniMaxForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(DEVICE).eval()

    def theirs() -> Tensor:
        # one by one: it cannot pack
        found = []
        for row in rows.to(DEVICE):
            odds = peer(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            found.append(odds.log_softmax(-1).gather(-1, row[1:, None])[:, 0])
        return torch.cat(found)

    exact = theirs()
    peer.bfloat16()
    agreement(model, rows.tolist(), {"transformers, fp32": exact, "transformers, bf16": theirs()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=tuple(PRESETS))
    parser.add_argument("--parts", nargs="*", default=["vllm", "transformers"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32, 256])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-ours", action="store_true", help="leave our engine's rows out")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--path", nargs="*", default=[], help="first on vLLM's PYTHONPATH")
    parser.add_argument("--vllm-options", default="{}", help="more of LLM(...), as JSON")
    parser.add_argument("--log", type=Path, default=None, help="keeps what vLLM's process said")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for vLLM's process")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written")
    given = parser.parse_args()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.preset}")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if "vllm" in given.parts:
            # what vLLM's lightning norm adds, whatever the config says
            beside_vllm(preset(given.preset, lightning_norm_eps=1e-5), Path(folder), given)
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if "transformers" in given.parts:
            # transformers turns the whole head, whatever the config says
            beside_transformers(preset(given.preset, rotary_dim=None), Path(folder))


if __name__ == "__main__":
    main()
