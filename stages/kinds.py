"""The table of stage kinds: one line each, and the only place that knows them all."""

from __future__ import annotations

from align.trainers import dpo, eval, grpo, lm, reward, sample, sft
from stages.recipe import Kind

KINDS = {
    "lm": Kind(lm.LmConfig, lm.run, gives="policy"),
    "sft": Kind(sft.SftConfig, sft.run, gives="policy"),
    "reward": Kind(reward.RewardConfig, reward.run, gives="reward"),
    "sample": Kind(sample.SampleConfig, sample.run, gives="rows", takes_reward=True),
    "dpo": Kind(dpo.DpoConfig, dpo.run, gives="policy"),
    "grpo": Kind(
        grpo.GrpoConfig,
        grpo.run,
        gives="policy",
        takes_reward=True,
    ),
    "eval": Kind(eval.EvalStageConfig, eval.run, gives="report"),
}
