"""`backend: trl`: an sft, dpo or grpo stage through TRL 1.16's own trainer, in TRL's public seams.

The model, the rendered tokens, the packing, the optimizer, its schedule, the rollouts and their
scores are ours; the loss and the loop are TRL's. What TRL would do in silence is set here: nothing
is truncated, dropped or filtered, telemetry is off, a non-finite loss stops the run. What it cannot
do is refused in one line that names the key.

Where it differs from `backend: native`: the routing loss is weighed per microbatch and not per
token, and is part of the loss that metrics.jsonl tells; nothing is resumed; pairs and rollouts are
padded and not packed; in grpo a response without a valid score has advantage 0 and is not left out.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from accelerate.utils import DistributedType
from datasets import Dataset as Table
from peft import LoraConfig as PeftLoraConfig
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig

from align.course import Job, Outcome
from align.data.batch import Example
from align.data.supply import supply_chats, supply_pairs
from align.loop import TrainConfig, set_checkpointing
from align.lora import peft_config
from align.metrics import MetricsWriter
from align.policy import save_policy
from align.prompts import answer, end_of_turn, open_scorer, read_prompts
from align.trainers.dpo import DpoConfig
from align.trainers.grpo import GrpoConfig, GrpoCourse, Tools
from align.trainers.lm import open_start
from align.trainers.sft import SftConfig
from align.trl_trainers import (
    OurGrpo,
    OurTrainer,
    Plan,
    Reporter,
    SteppedDpo,
    SteppedSft,
    dpo_inputs,
    sft_inputs,
)
from model import HybridForCausalLM
from rollout.types import Sampling

Built = TypeVar("Built", bound=OurTrainer)

# What TRL and transformers write into the config of the model that they train.
TOUCHED = (
    *("output_router_logits", "router_aux_loss_coef", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


@dataclass(frozen=True)
class Rollout:
    """TRL's `rollout_func` and `reward_funcs` over our engine and scorer.

    TRL carries a prompt as its number in the run, written as text; row, tokens and seed are looked
    up here, so a response is the same as on `backend: native`.
    """

    course: GrpoCourse
    config: GrpoConfig

    def sample(self, numbers: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """Prompts of whole groups in a row -> tokens, log-probabilities and scores."""
        size, per_step = self.config.group_size, self.config.prompts_per_step
        places = [int(number) for number in numbers[::size]]
        steps = {step: self.course.turns.of(step) for step in {p // per_step for p in places}}
        prompts = [steps[place // per_step][place % per_step] for place in places]
        self.course.source.refresh(trainer.state.global_step)
        groups = answer(
            self.course.source.engine,
            prompts,
            sampling=Sampling(
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                stop_token_ids=(end_of_turn(self.course.tools.tokenizer),),
            ),
            num_samples=size,
            tokenizer=self.course.tools.tokenizer,
            scorer=self.course.tools.scorer,
        )
        done = [completion for group in groups for completion in group.completions]
        scores = [score for group in groups for score in group.scores]
        return {
            "prompt_ids": [list(completion.prompt) for completion in done],
            "completion_ids": [list(completion.tokens) for completion in done],
            "logprobs": [list(completion.logprobs) for completion in done],
            "score": [score.value if score.valid else None for score in scores],
        }


def hand_on(score: list[float | None], **others: Any) -> list[float | None]:
    """The scores that came with the rollout; None where no judge gave one."""
    return score


def run_sft(config: SftConfig, job: Job) -> Outcome:
    """`align.trainers.sft.run` through TRL's SFTTrainer, over the same packed steps.

    Raises:
        ValueError: if TRL cannot honour a key, or a row, a file or the policy is wrong.
        RuntimeError: if a loss or gradient norm is not finite.
    """
    model, tokenizer = _open(config, job)
    data, sources = supply_chats(config, job, tokenizer)
    for item in data.items:
        if isinstance(item, Example) and not set(item.weights) <= {0.0, 1.0}:
            _refuse("data", item.place, "its token weights are not 0 or 1, as TRL's labels are")
    first = data.batches(0)[0]
    columns = {key: sft_inputs(first)[key][0].tolist() for key in ("input_ids", "labels")}
    trainer = _build(
        config,
        job,
        model,
        data.num_steps,
        lambda lora: SteppedSft(
            model=model,
            # The loader below brings our packing and its borders; max_length would truncate.
            args=SFTConfig(**_arguments(config, job), max_length=None, packing=False),
            train_dataset=Table.from_list([columns]),
            processing_class=tokenizer,
            peft_config=lora,
        ),
    )
    trainer.data, trainer.collate = data, sft_inputs
    return Outcome(_fit(trainer, model, tokenizer, config=config, job=job), sources)


def run_dpo(config: DpoConfig, job: Job) -> Outcome:
    """`align.trainers.dpo.run` through TRL's DPOTrainer, over the same pairs in the same steps.

    Raises: as `run_sft`.
    """
    for key, value in (
        ("label_smoothing", config.label_smoothing),
        ("sft_weight", config.sft_weight),
    ):
        if value:
            _refuse(key, f"{value:g}", "TRL's sigmoid loss has none; set it to 0")
    model, tokenizer = _open(config, job)
    data, sources = supply_pairs(config, job, tokenizer)
    reference = None if config.lora else copy.deepcopy(model).requires_grad_(False)
    # The constructor wants text to tokenise; the pairs that are trained come from the loader.
    stand_in = Table.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = _build(
        config,
        job,
        model,
        data.num_steps,
        lambda lora: SteppedDpo(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                **_arguments(config, job),
                beta=config.beta,
                loss_type=["sigmoid"],
                max_length=None,
                disable_dropout=False,
            ),
            train_dataset=stand_in,
            processing_class=tokenizer,
            peft_config=lora,
        ),
    )
    trainer.data, trainer.collate = data, lambda batch: dpo_inputs(batch.pairs)
    return Outcome(_fit(trainer, model, tokenizer, config=config, job=job), sources)


def run_grpo(config: GrpoConfig, job: Job) -> Outcome:
    """`align.trainers.grpo.run` through TRL's GRPOTrainer: same prompts, seeds, engine, scorer.

    Raises: as `run_sft`.
    """
    _check_grpo(config)
    model, tokenizer = _open(config, job)
    prompts = read_prompts(
        config.data,
        job=job,
        tokenizer=tokenizer,
        max_tokens=config.sequence_tokens - config.max_new_tokens,
    )
    tools = Tools(tokenizer, open_scorer(job, tokenizer))
    course = GrpoCourse(config, job, policy=model, reference=None, prompts=prompts, tools=tools)
    _check_no_prompt_is_dropped(config, course.turns.num_prompts, job.accelerator.num_processes)
    longest = prompts.max_tokens + config.max_new_tokens
    arguments = _grpo_arguments(config, job, longest)
    rollout = Rollout(course, config)
    trainer = _build(
        config,
        job,
        model,
        course.num_steps,
        lambda lora: OurGrpo(
            model=model,
            args=GRPOConfig(**_arguments(config, job) | arguments, max_steps=course.num_steps),
            reward_funcs=[hand_on],
            rollout_func=rollout.sample,
            train_dataset=Table.from_dict(
                {"prompt": [str(i) for i in range(course.turns.num_prompts)]}
            ),
            processing_class=tokenizer,
            peft_config=lora,
        ),
    )
    return Outcome(_fit(trainer, model, tokenizer, config=config, job=job), prompts.data)


def _check_grpo(config: GrpoConfig) -> None:
    if config.behaviour != "trainer":
        _refuse("behaviour", config.behaviour, "TRL takes the ratio to the trainer's own numbers")
    if config.flat_groups != "keep":
        _refuse("flat_groups", config.flat_groups, "TRL trains on every group; use keep")
    if config.flat_groups != "keep":
        _refuse("flat_groups", config.flat_groups, "TRL trains on every group; set it to keep")
    if config.loss.drop_ratio:
        _refuse("loss.drop_ratio", f"{config.loss.drop_ratio:g}", "TRL drops no token; set it to 0")
    if config.loss.beta and config.lora is None:
        _refuse(
            "loss.beta",
            f"{config.loss.beta:g}",
            "TRL would load transformers' own class as the reference; set it to 0 or add lora",
        )
    if config.precision != "fp32":
        _refuse("precision", config.precision, "TRL scores rollouts outside of autocast; use fp32")


def _check_no_prompt_is_dropped(config: GrpoConfig, num_prompts: int, world: int) -> None:
    whole = config.prompts_per_step * config.updates_per_rollout
    if num_prompts % whole:
        _refuse(
            "prompts_per_step",
            str(config.prompts_per_step),
            f"TRL drops the last {num_prompts % whole} of {num_prompts} prompts, which fill no "
            f"rollout of {whole}; set max_steps, or a number of prompts that divides",
        )
    if config.prompts_per_step % world:
        _refuse(
            "prompts_per_step",
            str(config.prompts_per_step),
            f"TRL wants as many groups on each of {world} processes; use a multiple of {world}",
        )


def _grpo_arguments(config: GrpoConfig, job: Job, longest: int) -> dict[str, Any]:
    """GRPOConfig's keys from ours; `longest` is a padded row in tokens."""
    loss, world = config.loss, job.accelerator.num_processes
    groups = config.prompts_per_step // world
    room = config.micro_sequences * config.sequence_tokens // (config.group_size * longest)
    # TRL wants equal microbatches of whole groups: the most that fit where we would pack.
    per_micro = max(n for n in range(1, groups + 1) if groups % n == 0 and n <= max(room, 1))
    accumulation = groups // per_micro
    is_cispo, is_dr = loss.objective == "cispo", loss.objective == "dr_grpo"
    return {
        "num_generations": config.group_size,
        "per_device_train_batch_size": per_micro * config.group_size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation * config.updates_per_rollout,
        "num_iterations": 1,
        # Responses come from our engine; TRL reads the number only as dr_grpo's constant.
        "max_completion_length": loss.max_response_tokens if is_dr else config.max_new_tokens,
        "temperature": config.temperature,
        "loss_type": loss.objective,
        "epsilon": loss.epsilon_low,
        # For cispo this is the cap itself, for the others the distance from 1.
        "epsilon_high": loss.is_max if is_cispo else loss.epsilon_high,
        "delta": loss.ratio_cap or None,
        "beta": loss.beta,
        "use_bias_correction_kl": False,
        "importance_sampling_level": "token",
        "scale_rewards": config.scale,
        "mask_truncated_completions": False,
        "shuffle_dataset": False,
        "disable_dropout": False,
        "use_vllm": False,
        "log_completions": False,
    }


def _open(config: TrainConfig, job: Job) -> tuple[HybridForCausalLM, PreTrainedTokenizerBase]:
    """The starting policy, once every key that TRL cannot honour has been refused."""
    kind = job.accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        _refuse("launch", kind.value, "weights must be whole on each process; use ddp")
    if config.save_every_steps:
        _refuse(
            "save_every_steps",
            str(config.save_every_steps),
            "TRL's checkpoints can be half written and are not resumed; set it to 0",
        )
    model, tokenizer = open_start(config, job)
    keys = model.config
    if keys.router_aux_scaling != "switch":
        _refuse("router_aux_scaling", keys.router_aux_scaling, "TRL knows the switch form only")
    if keys.router_z_loss_coef:
        _refuse("router_z_loss_coef", f"{keys.router_z_loss_coef:g}", "TRL has no z-loss")
    if keys.lm_head_fp32 and config.precision == "bf16":
        _refuse("lm_head_fp32", "true", "TRL multiplies the head in bf16; use precision: fp32")
    if config.optim.weights != "fp32":
        _refuse("optim.weights", config.optim.weights, "TRL's loop runs here on fp32 weights only")
    set_checkpointing(model, config.checkpointing)
    return model, tokenizer


def _refuse(key: str, value: str, why: str) -> NoReturn:
    raise ValueError(f"backend: trl: {key} = {value}: {why}, or use backend: native")


def _arguments(config: TrainConfig, job: Job) -> dict[str, Any]:
    """What every TRL config gets: its defaults that would change a run in silence, set."""
    return {
        "output_dir": str(job.folder / "trl"),
        "seed": job.seed,
        "use_cpu": job.accelerator.device.type == "cpu",
        # Ours is entered by the trainer's own context, because the process' accelerator is fp32.
        "bf16": False,
        "fp16": False,
        # Ours, set on the model when it is opened.
        "gradient_checkpointing": False,
        "max_grad_norm": config.optim.clip_norm,
        "num_train_epochs": 1,
        "average_tokens_across_devices": True,
        "logging_steps": config.log_every_steps,
        # The filter would hide a loss that is not finite.
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "push_to_hub": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def _build(
    config: TrainConfig,
    job: Job,
    model: HybridForCausalLM,
    num_steps: int,
    make: Callable[[PeftLoraConfig | None], Built],
) -> Built:
    """The trainer; new adapters start as those of `backend: native` do."""
    kept = {key: value for key, value in model.config.to_dict().items() if key in TOUCHED}
    generation = copy.deepcopy(model.generation_config)
    plan = Plan(config, job, num_steps=num_steps, kept=kept, generation=generation)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Known; constraints.txt pins the version that was tested.
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        torch.manual_seed(job.seed)
        trainer = make(peft_config(config.lora) if config.lora else None)
    trainer.plan = plan
    return trainer


def _fit(
    trainer: OurTrainer,
    model: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: TrainConfig,
    job: Job,
) -> dict[str, float]:
    """Trains, and leaves the policy in job.artifact as a native stage would."""
    writer = MetricsWriter(
        job.folder, accelerator=job.accelerator, run_name=job.name, report_to=config.report_to
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(trainer.plan, writer))
    writer.open()
    try:
        trainer.train()
    finally:
        writer.close()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.eval()
    for key, value in trainer.plan.kept.items():
        setattr(model.config, key, value)
    model.generation_config = trainer.plan.generation
    save_policy(trained, tokenizer, job.artifact, base=job.start)
    return dict(trainer.plan.last)
