"""The table of stage kinds: one line each, and the only place that knows them all."""

from __future__ import annotations

from align import trl_backend
from align.trainers import dpo, eval, grpo, lm, reward, sample, sft
from stages.recipe import Kind

KINDS = {
    "lm": Kind(lm.LmConfig, lm.run, gives="policy"),
    "sft": Kind(sft.SftConfig, sft.run, gives="policy", run_trl=trl_backend.run_sft),
    "reward": Kind(reward.RewardConfig, reward.run, gives="reward"),
    "sample": Kind(sample.SampleConfig, sample.run, gives="rows", takes_reward=True),
    "dpo": Kind(dpo.DpoConfig, dpo.run, gives="policy", run_trl=trl_backend.run_dpo),
    "grpo": Kind(
        grpo.GrpoConfig,
        grpo.run,
        gives="policy",
        run_trl=trl_backend.run_grpo,
        takes_reward=True,
    ),
    "eval": Kind(eval.EvalStageConfig, eval.run, gives="report"),
}
