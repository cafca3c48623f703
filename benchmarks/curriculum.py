"""Does a curriculum help a reward model? Real preference rows, held-out accuracy, equal compute.

    python -m benchmarks.curriculum --data FOLDER [--seeds 3] [--arms none curriculum ...]

FOLDER holds the rows in their publishers' fields: `preference/` (HH harmless, PandaLM with three
annotators, Tulu human eval, LLMs-from-scratch, LLMBar), `safety/` (XSTest completions, measured but
never trained on), and for the base `text/`, `longctx/books/`, `sft/`. Prompts are split by a hash
of their letters and digits, so a prompt that two sources share is on one side for both.

No pretrained base is used: the preset starts from random weights, learns these rows' training side
and some text as a language model once (`--lm-epochs`), and every run starts from that.

Arms see the same pairs equally often in as many steps: `none` in random order; `curriculum` by the
difficulty of the data and the phases leaf, dimension, whole; `unphased` by the difficulty alone;
`refreshed` as `curriculum`, but also by the model's own margin, opened by its competence, for which
it reads all training pairs again without a backward (said in the table). Differences are paired:
mean over pairs of (arm - none), averaged over seeds; their standard error is over pairs.

Every finished run is a line of `runs.jsonl` in --out at once, and the same command goes on where a
cut left it. `--tables FILE` prints the tables of such a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from align.course import Job
from align.data.render import render_preference
from align.data.tokenizer import train_tokenizer
from align.evals.reward_artifact import open_tokenizer
from align.pairs import BUCKETS, pair_facts, pair_leads, won
from align.policy import save_policy
from align.trainers import lm, reward
from benchmarks.curriculum_rows import SOURCES, dev_rows, prepare, source
from model import HybridForCausalLM, preset
from reward.curriculum import CurriculumConfig, difficulty
from reward.model import RewardModel

TREE = {
    "name": "people",
    "gate": "learned",
    "dimensions": {
        "helpfulness": {"weight": 0.6, "signals": {"quality": {"weight": 0.7}, "style": {}}},
        "harmlessness": {"weight": 0.4, "signals": {"harmlessness": {}}},
    },
}
ARMS: dict[str, Any] = {
    "none": "none",
    "curriculum": {"pacing": "root"},
    "unphased": {"pacing": "root", "leaves_first": False},
    "refreshed": {"pacing": "competence", "model_weight": 1.0, "refreshes": 4},
}
# By arm and seed: metrics, what the record says by quarter, difficulty and lead of held-out pairs.
Runs = Mapping[tuple[str, int], Any]
RUNS_FILE = "runs.jsonl"
CAPACITY = 4096


def job_of(folder: Path, name: str, start: Path, seed: int) -> Job:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return Job(name, place, place / "artifact", start, folder, seed, accelerator)


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """Keys that every stage here has in common."""
    return {
        "sequence_tokens": CAPACITY,
        "micro_sequences": 8 if torch.cuda.is_available() else 1,
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "log_every_steps": 10,
        "max_steps": options.max_steps,
    }


def make_base(folder: Path, options: argparse.Namespace) -> None:
    """The policy that every run starts from."""
    rows = [json.loads(line) for line in (folder / "chats.jsonl").open(encoding="utf-8")]
    rows += [json.loads(line) for line in (folder / "texts.jsonl").open(encoding="utf-8")]
    texts = [
        text
        for row in rows
        for text in ([m["content"] for m in row.get("messages", [])] or [row["text"]])
    ]
    tokenizer = train_tokenizer(texts, 8192)
    torch.manual_seed(0)
    shape = preset(
        options.preset,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_policy(HybridForCausalLM(shape), tokenizer, folder / "random")
    config = lm.LmConfig.model_validate(
        {
            **shared(options),
            "data": [
                {"path": "chats.jsonl", "as": "chat", "split": "all", "too_long": "skip"},
                {"path": "texts.jsonl", "split": "all", "too_long": "split"},
            ],
            "batch_sequences": 16 if torch.cuda.is_available() else 1,
            "epochs": options.lm_epochs,
            "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_share": 0.05},
        }
    )
    outcome = lm.run(config, job_of(folder, "base", folder / "random", 0))
    told = {key: round(value, 3) for key, value in outcome.metrics.items()}
    print(f"base: {told}", flush=True)


def train(folder: Path, arm: str, seed: int, options: argparse.Namespace) -> None:
    """One run; leaves every held-out pair's difficulty and lead in `arm-seed/told.json`."""
    config = reward.RewardConfig.model_validate(
        {
            **shared(options),
            "data": [source(name, "train") for name in SOURCES],
            "dev": [source(name, "dev") for name in SOURCES],
            "hierarchy": TREE,
            "curriculum": ARMS[arm],
            "batch_items": options.batch_items,
            "epochs": options.epochs,
            "optim": {"lr": options.lr, "min_lr": options.lr / 10, "warmup_share": 0.1},
        }
    )
    job = job_of(folder, f"{arm}-{seed}", folder / "base/artifact", seed)
    outcome = reward.run(config, job)
    model = RewardModel.load(job.artifact, device=job.accelerator.device)
    tokenizer = open_tokenizer(job.artifact)
    found: dict[str, Any] = {}
    for name in (*SOURCES, "xstest-safe", "xstest-unsafe"):
        pairs = [render_preference(row, tokenizer) for row in dev_rows(folder, name)]
        pairs = [p for p in pairs if len(p.chosen.tokens) + len(p.rejected.tokens) <= CAPACITY]
        leads = pair_leads(model, pairs, precision=lambda: reward.autocast(config, job.accelerator))
        found[name] = [
            (round(difficulty(pair_facts(pair, model.hierarchy), CurriculumConfig()), 6), lead)
            for pair, lead in zip(pairs, leads, strict=True)
        ]
    told = {
        "arm": arm,
        "seed": seed,
        "metrics": outcome.metrics,
        "pacing": pacing_told(job.artifact),
        "leads": found,
    }
    (job.folder / "told.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    metrics = outcome.metrics
    print(
        f"{arm} {seed}: {metrics['step']:.0f} steps, {metrics['tokens']:.0f} tokens in "
        f"{metrics['seconds']:.1f} s, loss {metrics['loss']:.3f}, held out "
        f"{metrics['before/accuracy']:.3f} -> {metrics['after/accuracy']:.3f}",
        flush=True,
    )


def pacing_told(artifact: Path) -> dict[str, list[float]]:
    """By quarter of the run: mean difficulty of what was trained, and its lead then and later."""
    lines = [json.loads(line) for line in (artifact / reward.RECORD_FILE).open(encoding="utf-8")]
    size = max(1, len(lines) // 4)
    quarters = [lines[i * size : (i + 1) * size] for i in range(4)]
    return {
        key: [statistics.fmean(line[key] for line in some) for some in quarters]
        for key in ("difficulty", "margin", "later")
    }


def run_all(folder: Path, given: Sequence[str], options: argparse.Namespace) -> None:
    """Every arm and seed not told of yet, some beside each other, each a process of its own."""
    done = read_runs(folder / RUNS_FILE)
    waiting = [
        (arm, seed)
        for arm in options.arms
        for seed in range(options.seeds)
        if (arm, seed) not in done
    ]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < options.parallel:
            arm, seed = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.curriculum", *given]
            running[arm, seed] = subprocess.Popen([*command, "--worker", arm, str(seed)])
        for (arm, seed), process in list(running.items()):
            if process.poll() is None:
                continue
            if process.returncode:
                raise RuntimeError(f"{arm} {seed} failed; its message stands above")
            del running[arm, seed]
            told = (folder / f"{arm}-{seed}/told.json").read_text(encoding="utf-8")
            with (folder / RUNS_FILE).open("a", encoding="utf-8") as file:
                file.write(told)
        time.sleep(0.1)


def read_runs(path: Path) -> Runs:
    """What finished runs left, by arm and seed."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["arm"], line["seed"]): line for line in lines}


def tables(told: Runs) -> Iterator[Table]:
    """Of the arms and seeds that were run; differences are over the seeds that both arms have."""
    arms = [arm for arm in ARMS if any(arm == one for one, _ in told)]
    seeds = {arm: sorted(seed for one, seed in told if one == arm) for arm in arms}
    rows = groups(told[arms[0], seeds[arms[0]][0]]["leads"])
    table = Table("held-out pairs", "number", *arms, *(f"{arm} - none" for arm in arms[1:]))
    for label, members in rows.items():
        cells = [shown(per_pair(told, arm, members, seeds[arm])) for arm in arms]
        for arm in arms[1:]:
            both = sorted({*seeds[arm]} & {*seeds[arms[0]]})
            mine, plain = (per_pair(told, one, members, both) for one in (arm, arms[0]))
            cells.append(shown([a - b for a, b in zip(mine, plain, strict=True)]))
        table.add_row(label, str(len(members)), *cells)
    yield table
    table = Table(
        "arm", "steps", "trained tokens", "read again", "by seed", "mean, error over seeds"
    )
    for arm in arms:
        metrics = [told[arm, seed]["metrics"] for seed in seeds[arm]]
        values = [m["after/accuracy"] for m in metrics]
        config = ARMS[arm]
        times = config.get("refreshes", 0) if isinstance(config, dict) else 0
        table.add_row(
            arm,
            f"{metrics[0]['step']:.0f}",
            f"{metrics[0]['tokens']:.0f}",
            f"{times} times",
            " ".join(f"{value:.3f}" for value in values),
            shown(values),
        )
    yield table
    table = Table("arm", "of seed 0", "first quarter", "second", "third", "last")
    for arm in arms:
        for key, values in told[arm, seeds[arm][0]]["pacing"].items():
            table.add_row(arm, key, *(f"{value:.3f}" for value in values))
    yield table


def groups(leads: Mapping[str, Sequence[Any]]) -> dict[str, list[tuple[str, int]]]:
    """Pairs of each line of the table, by source and index.

    Easy, medium and hard are thirds of a label's pairs by difficulty, as near as equal ones allow.
    """
    labelled: dict[str, list[tuple[float, str, int]]] = {}
    for name, pairs in leads.items():
        label = SOURCES[name][1] if name in SOURCES else name
        known = labelled.setdefault(label, [])
        known += [(hard, name, index) for index, (hard, _) in enumerate(pairs)]
    found: dict[str, list[tuple[str, int]]] = {}
    for label, known in labelled.items():
        for place, (_, name, index) in enumerate(sorted(known)):
            hard = BUCKETS[len(BUCKETS) * place // len(known)]
            lines = [label, f"{label}, {hard}"]
            if name in SOURCES:
                lines += ["all", f"all, {hard}"]
            for line in lines:
                found.setdefault(line, []).append((name, index))
    rank = {name: place for place, name in enumerate(("", *BUCKETS))}
    order = ["all", "harmlessness", "style", "quality", "helpfulness", "overall"]
    order += [name for name in leads if name not in SOURCES]
    return {
        line: found[line]
        for line in sorted(
            found,
            key=lambda one: (order.index(one.split(",")[0]), rank[one.partition(", ")[2]]),
        )
    }


def per_pair(
    told: Runs, arm: str, members: Sequence[tuple[str, int]], seeds: Sequence[int]
) -> list[float]:
    """Share of the seeds that rank each pair right."""
    return [
        statistics.fmean(won(told[arm, seed]["leads"][name][i][1]) for seed in seeds)
        for name, i in members
    ]


def shown(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/curriculum"))
    parser.add_argument("--preset", default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--parallel", type=int, default=3, help="runs beside each other")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-items", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--lm-epochs", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=0, help="cuts every stage, for a trial")
    parser.add_argument("--limit", type=int, default=0, help="rows of each file, for a trial")
    parser.add_argument("--tables", type=Path, help="only prints what this file of runs says")
    parser.add_argument("--worker", nargs=2, help="one arm and seed; the command itself uses it")
    options = parser.parse_args(given)
    if options.worker:
        train(options.out, options.worker[0], int(options.worker[1]), options)
        return
    if not options.tables:
        if not options.data:
            parser.error("--data is needed to run anything")
        if not (options.out / "base/artifact/config.json").exists():
            prepare(options.data, options.out, options.limit)
            make_base(options.out, options)
        run_all(options.out, given, options)
    console = Console(width=150)
    for table in tables(read_runs(options.tables or options.out / RUNS_FILE)):
        console.print(table)


if __name__ == "__main__":
    main()
