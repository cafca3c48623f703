"""The command `align`: run, check, eval, generate, score, serve-*, ledger, export.

Heavy imports stand inside the commands, so that `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from stages.console import Folder, Json, RecipeFile, Sets, Traceback, extra, guarded, show

if TYPE_CHECKING:
    from accelerate import Accelerator

    from stages.recipe import Recipe

# Dependencies read these once, at import: nothing is sent anywhere unless the user asked for it.
for _switch in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_switch, "1")

app = typer.Typer(
    name="align",
    help="Post-training of hybrid language models: one file climbs from SFT to online RL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    recipe: RecipeFile,
    *,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> if absent.")] = None,
    sets: Sets = None,
    until: Annotated[str, typer.Option(help="Last stage to run.")] = "",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Climbs a recipe: finished stages are skipped, half-done ones resume."""
    with guarded(traceback):
        from align.evals import run_eval
        from align.launches import Launch
        from stages.checks import cross_check, idle_processes
        from stages.runner import Ground, climb
        from stages.start import make_start
        from stages.table import eval_table

        loaded = _load(recipe, sets)
        here = Launch.here()
        launch = replace(here, processes=here.processes or 1)
        cross_check(loaded, Path.cwd(), launch=launch)
        accelerator = _accelerator()
        console = Console(stderr=True, highlight=False)

        def say(line: str) -> None:
            if accelerator.is_main_process:
                console.print(line, markup=False)

        for line in idle_processes(loaded, launch):
            say(f"note: {line}")
        ground = Ground(
            run=out or Path("runs") / loaded.name,
            base=Path.cwd(),
            accelerator=accelerator,
            run_eval=run_eval,
            make_start=make_start,
            say=say,
        )
        try:
            report = climb(loaded, ground, until=until)
        finally:
            # A process that leaves without it can abort the others on their way out.
            accelerator.end_training()
        if accelerator.is_main_process:
            show(report.resolved() if as_json else eval_table(report.rows))


@app.command()
def check(
    recipe: RecipeFile,
    sets: Sets = None,
    files: Annotated[
        bool, typer.Option("--files/--without-files", help="Whether data files have to exist.")
    ] = True,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes of the run; 0 is any number, or launch's.")
    ] = 0,
    launch: Annotated[
        Path | None, typer.Option(help="accelerate's config file that the run is launched with.")
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Reads and cross-checks a recipe and prints what it will do; trains nothing."""
    with guarded(traceback):
        from align.launches import Launch
        from stages.checks import cross_check, idle_processes
        from stages.plan import plan, plan_text

        loaded = _load(recipe, sets)
        found = Launch.read(launch) if launch else Launch.here()
        found = replace(found, processes=processes or found.processes)
        cross_check(loaded, Path.cwd(), with_files=files, launch=found)
        show(plan(loaded) if as_json else plan_text(loaded))
        for line in idle_processes(loaded, found):
            typer.echo(f"note: {line}", err=True)


@app.command("eval")
def evaluate(
    recipe: RecipeFile,
    policy: Folder,
    *,
    parent: Annotated[Path | None, typer.Option(help="Policy that it was made from.")] = None,
    reward: Annotated[Path | None, typer.Option(help="Reward artifact that judges.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of an eval; all if absent.")] = None,
    sets: Sets = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Runs a recipe's evals on one policy or reward artifact."""
    with guarded(traceback):
        from align.evals import run_eval
        from stages.commands import chosen_evals, result_table

        loaded = _load(recipe, sets)
        results = [
            run_eval(
                config,
                policy=policy,
                parent=parent,
                inputs={"reward": reward} if reward else {},
                base=Path.cwd(),
                seed=loaded.head.seed,
                sandbox=loaded.head.sandbox,
            )
            for config in chosen_evals(loaded, only or [])
        ]
        as_values = [json.loads(result.to_json()) for result in results]
        show(as_values if as_json else result_table(results))


@app.command()
def generate(
    policy: Folder,
    prompt: Annotated[str, typer.Argument(help="What the user says; - reads standard input.")],
    *,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Probability mass to sample from.")] = 1.0,
    num_samples: Annotated[int, typer.Option(min=1, help="Responses.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Answers a prompt with the policy of an artifact."""
    with guarded(traceback):
        from rollout.types import Sampling
        from stages.commands import answer

        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        text = sys.stdin.read() if prompt == "-" else prompt
        answers = answer(policy, text, system=system, sampling=sampling, num_samples=num_samples)
        if as_json:
            show(answers)
        for found in [] if as_json else answers:
            typer.echo(found["text"])


@app.command()
def score(
    reward: Folder,
    items: Annotated[Path, typer.Argument(help="JSONL: messages, response, answer, verifier.")],
    traceback: Traceback = False,
) -> None:
    """Scores responses with a reward artifact; one JSON line per item, down to the signals."""
    with guarded(traceback):
        from stages.commands import scores

        for line in scores(reward, items):
            typer.echo(json.dumps(line, sort_keys=True))


@app.command()
def question(reward: Folder, as_json: Json = False, traceback: Traceback = False) -> None:
    """Shows what a reward artifact answered: reliability by slice, biases, agreement with rules."""
    with guarded(traceback):
        from stages.question import question_tables, read_questions

        told = read_questions(reward)
        if as_json:
            show(told)
            return
        for table in question_tables(told):
            Console().print(table)


@app.command("serve-reward")
def serve_reward(
    reward: Folder,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the clients' key.")
    ] = "",
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 16_384,
    max_item_tokens: Annotated[
        int, typer.Option(min=0, help="Longest item, tokens; 0 is the reward model's own limit.")
    ] = 0,
    max_queue_items: Annotated[int, typer.Option(min=1, help="Items under way.")] = 65_536,
    max_queue_tokens: Annotated[int, typer.Option(min=1, help="Tokens under way.")] = 4_194_304,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Longest body, 2^20 bytes.")] = 8,
    rule_threads: Annotated[int, typer.Option(min=1, help="Rules that may block at once.")] = 8,
    label_verifier: Annotated[str, typer.Option(help="Rule for OpenRLHF's plain labels.")] = "",
    judge_url: Annotated[
        str, typer.Option(help="OpenAI-compatible URL of a model that judges, with /v1.")
    ] = "",
    judge_model: Annotated[str, typer.Option(help="Its name there.")] = "",
    judge_key_env: Annotated[str, typer.Option(help="Environment variable of its key.")] = "",
    judge_cache: Annotated[str, typer.Option(help="JSONL file that keeps its answers.")] = "",
    bf16: Annotated[bool, typer.Option("--bf16", help="Trunk in bf16.")] = False,
    traceback: Traceback = False,
) -> None:
    """Serves a reward artifact over HTTP: /v1/score, OpenRLHF's /get_reward, /metrics, /docs."""
    with guarded(traceback):
        import torch

        from reward.serving.types import Limits
        from reward.verifiers.judge import open_judge
        from serving.keys import key_of

        judge = open_judge(
            judge_url, judge_model, key_of(judge_key_env, "--judge-key-env"), judge_cache
        )
        with extra("serve", ("fastapi", "uvicorn", "httpx", "prometheus_client")):
            from stages.serving import serve_reward as serve

        serve(
            reward,
            host=host,
            port=port,
            limits=Limits(
                batch_tokens=max_batch_tokens,
                item_tokens=max_item_tokens or "model",
                queue_items=max_queue_items,
                queue_tokens=max_queue_tokens,
                rule_threads=rule_threads,
            ),
            api_key=key_of(api_key_env, "--api-key-env"),
            label_verifier=label_verifier,
            max_body_bytes=max_body_mb << 20,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            judge=judge,
            say=lambda line: typer.echo(line, err=True),
        )


@app.command("serve-rollout")
def serve_rollout(
    policy: Folder,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="Model name for clients; the folder's if empty.")] = "",
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the clients' key.")
    ] = "",
    weights_root: Annotated[
        Path | None, typer.Option(help="Take new weights from folders below this one.")
    ] = None,
    broadcast: Annotated[
        bool, typer.Option("--broadcast", help="Take new weights from trainers' process groups.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest prompt and response.")] = 8192,
    max_slots: Annotated[int, typer.Option(min=1, help="Samples decoded at once.")] = 64,
    max_cache_tokens: Annotated[
        int, typer.Option(min=0, help="Keys and values held at once; 0 is room for every slot.")
    ] = 0,
    max_samples: Annotated[int, typer.Option(min=1, help="Samples queued or live.")] = 4096,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Longest body, 2^20 bytes.")] = 64,
    bf16: Annotated[bool, typer.Option("--bf16", help="Weights in bf16.")] = False,
    traceback: Traceback = False,
) -> None:
    """Serves a policy over HTTP: OpenAI's API, and exact samples and new weights for trainers."""
    with guarded(traceback):
        import torch

        from serving.keys import key_of

        with extra("serve", ("fastapi", "uvicorn", "httpx", "prometheus_client")):
            from stages.serving import Room
            from stages.serving import serve_rollout as serve

        serve(
            policy,
            host=host,
            port=port,
            name=name,
            room=Room(
                max_tokens=max_tokens,
                max_slots=max_slots,
                max_cache_tokens=max_cache_tokens,
                max_samples=max_samples,
                max_body_bytes=max_body_mb << 20,
            ),
            api_key=key_of(api_key_env, "--api-key-env"),
            weights_root=weights_root,
            broadcasts=broadcast,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            say=lambda line: typer.echo(line, err=True),
        )


@app.command()
def ledger(stage: Folder, traceback: Traceback = False) -> None:
    """Shows how far an engine's numbers were from the trainer's, a line a step of a grpo stage."""
    with guarded(traceback):
        from align.ledger import ledger_table

        show(ledger_table(stage))


@app.command()
def export(
    policy: Folder,
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint shall stand.")],
    *,
    to: Annotated[
        Literal["transformers", "vllm", "text-01"],
        typer.Option(help="Who reads it; vllm is vLLM's own loader, up to 0.23."),
    ] = "transformers",
    bf16: Annotated[bool, typer.Option("--bf16", help="Round the weights to bf16.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Open it again and compare log-probs.")
    ] = True,
    traceback: Traceback = False,
) -> None:
    """Writes a policy, or any such checkpoint, as one plain folder, its adapters merged."""
    with guarded(traceback):
        import torch

        from model.checkpoints import describe_foreign, read_folder_config
        from stages.export import LAYOUT_OF, export_policy

        dtype = torch.bfloat16 if bf16 else torch.float32
        export_policy(policy, folder, dtype=dtype, to=to, verify=verify)
        for line in describe_foreign(read_folder_config(folder)[0], LAYOUT_OF[to]):
            typer.echo(f"note: {line}", err=True)
        typer.echo(str(folder))


def main() -> None:
    """Entry point of the command `align`."""
    app()


def _load(file: Path, sets: list[str] | None) -> Recipe:
    from align.evals import EvalConfig
    from stages.kinds import KINDS
    from stages.recipe import load_recipe

    return load_recipe(file, sets or [], kinds=KINDS, eval_config=EvalConfig)


def _accelerator() -> Accelerator:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # Others wait while the main process measures: longer than the default of ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # Said outright, because without a GPU accelerate takes each process of a launch for a run of
    # its own unless it is told to use the CPU.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    _refuse_lost_processes(accelerator.num_processes)
    return accelerator


def _refuse_lost_processes(started: int) -> None:
    """`accelerate launch --cpu --num_processes 2` sets an address for two and starts one."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if started == 1 and on_cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            "accelerate launch --cpu started 1 process, whatever --num_processes asked for; for "
            "several on a CPU use `accelerate launch --config_file stages/launch/cpu.yaml "
            "--num_processes N -m stages run ...`"
        )
