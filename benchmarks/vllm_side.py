"""vLLM's half of `benchmarks.rollout_vllm`, in vLLM's own environment: imports nothing of ours.

Run by the other half: python -m benchmarks.vllm_side JOB. JOB is a JSON file that names the
checkpoint, vLLM's options, the prompts to continue greedily and the batches to time. Findings go to
the job's `out`, one JSON object a line as soon as each is known, so that what was measured outlives
a run that is stopped.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def continue_greedily(llm: Any, prompts: Sequence[list[int]], new: int) -> list[dict[str, Any]]:
    """Tokens after each prompt, and the log-probability of every token, the prompt's too."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, logprobs=0, prompt_logprobs=0,
        detokenize=False,
    )  # fmt: skip
    found = []
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False):
        answer, prompt = output.outputs[0], output.prompt_token_ids
        # of the first token there is none
        odds = list(zip(output.prompt_logprobs[1:], prompt[1:], strict=True))
        odds += zip(answer.logprobs, answer.token_ids, strict=True)
        found.append(
            {
                "tokens": list(answer.token_ids),
                "logprobs": [at[token].logprob for at, token in odds],
            }
        )
    return found


def time_batch(llm: Any, batch: int, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one `generate`, and of the same with one new token, after a short warm-up."""
    from vllm import SamplingParams

    rng = random.Random(batch)

    def run(new: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(job["vocabulary"]) for _ in range(job["prompt"])]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(temperature=1, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        took = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != new for output in outputs):
            raise RuntimeError(f"vLLM gave other than {new} tokens to some of {batch} prompts")
        return took

    run(8)
    first = run(1)
    return {"first": first, "whole": [run(job["new"]) for _ in range(job["repeats"])]}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    start = time.perf_counter()
    import torch
    import vllm

    imported = time.perf_counter() - start
    with Path(job["out"]).open("w", encoding="utf-8") as out:

        def tell(**found: Any) -> None:
            out.write(json.dumps(found) + "\n")
            out.flush()

        llm = vllm.LLM(model=job["folder"], **job["options"])
        ready = time.perf_counter() - start
        tell(kind="ready", vllm=vllm.__version__, torch=torch.__version__, imported=imported,
             seconds=ready)  # fmt: skip
        tell(kind="greedy", answers=continue_greedily(llm, job["prompts"], job["greedy"]))
        for batch in job["batches"]:
            tell(kind="speed", batch=batch, **time_batch(llm, batch, job))


if __name__ == "__main__":
    main()
