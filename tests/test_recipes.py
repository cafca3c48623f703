"""Every shipped recipe is read and cross-checked; the report's numbers stand in one of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from align.evals import EvalConfig
from align.launches import Launch
from stages.checks import cross_check
from stages.document import ConfigError
from stages.kinds import KINDS
from stages.plan import derived, plan_text
from stages.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "stages/recipes").glob("*.yaml"))


def load(name: str, *sets: str) -> Recipe:
    file = ROOT / f"stages/recipes/{name}.yaml"
    return load_recipe(file, sets, kinds=KINDS, eval_config=EvalConfig)


@pytest.mark.parametrize("name", [file.stem for file in RECIPES])
def test_a_shipped_recipe_is_right(name: str):
    recipe = load(name)
    cross_check(recipe, ROOT, with_files=False)
    assert recipe.name == name
    text = plan_text(recipe)
    assert all(f"\n{stage.name}: {stage.head.kind} from" in text for stage in recipe.stages)


@pytest.mark.parametrize("name", ["tiny", "tiny-base"])
def test_what_the_demo_reads_is_in_the_package(name: str):
    cross_check(load(name), ROOT)


def test_one_precision_is_that_of_every_stage_that_names_no_other():
    recipe = load("tiny", "precision=fp64", "sft-long.precision=bf16")
    cross_check(recipe, ROOT, with_files=False)
    trained = [stage for stage in recipe.stages if stage.head.kind != "sample"]
    found = {stage.name: stage.config.precision for stage in trained}
    assert found.pop("sft-long") == "bf16"
    assert len(found) == 6
    assert set(found.values()) == {"fp64"}
    assert load("tiny").stage("lm").config.precision == "fp32"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ("precision=fp65",),
            "--set precision=fp65: precision = fp65: expected fp32, bf16 or fp64",
        ),
        (("precison=fp64",), "precison = fp64: unknown key; did you mean 'precision'?"),
        (
            ("precision=fp64", "dpo-long.backend=trl"),
            "dpo-long: precision = fp64 with backend = trl, expected native",
        ),
    ],
)
def test_a_precision_that_cannot_be_is_one_line(sets: tuple[str, ...], message: str):
    with pytest.raises(ConfigError) as caught:
        load("tiny", *sets)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_are_recipes():
    names = {file.stem for file in RECIPES}
    assert {"tiny", "tiny-base", "tiny-real", "small-lora", "minimax-01"} <= names


# PAPER: Table 7 of arXiv 2501.08313.
TABLE_7 = {
    "sft-short": (8192, 2, 128, 1e-5, 1e-6, "cosine"),
    "sft-long": (1_032_192, 2, 80, 3e-6, 3e-6, "constant"),
    "dpo-short": (8192, 1, 64, 5e-7, 5e-8, "cosine"),
    "dpo-long": (1_032_192, 1, 64, 5e-7, 5e-7, "constant"),
    "grpo": (8192, 1, 512, 1e-6, 1e-7, "cosine"),
}


@pytest.mark.parametrize("stage", TABLE_7)
def test_the_reports_numbers_stand_to_the_digit(stage: str):
    config = load("minimax-01").stage(stage).config
    numbers = derived(load("minimax-01").stage(stage))
    batch = numbers.get("responses per step", numbers.get("rows per step"))
    optim = config.optim
    found = (config.sequence_tokens, config.epochs, batch, optim.lr, optim.min_lr, optim.schedule)
    assert found == TABLE_7[stage]
    assert config.max_steps == 0


def test_ifeval_is_only_an_eval():
    for name in (file.stem for file in RECIPES):
        trained = [stage.resolved() for stage in load(name).stages]
        assert "ifeval" not in str(trained)


def test_the_real_rows_are_the_ones_that_were_asked_for():
    stages = {stage.name: str(stage.resolved()) for stage in load("tiny-real").stages}
    assert "gsm8k" in stages["sft-short"]
    assert all(name in stages["sft-long"] for name in ("qmsum", "squality"))
    assert all(name in stages["reward"] for name in ("hh_harmless", "pandalm", "llms_from_scratch"))
    assert all(name in stages["grpo"] for name in ("svamp", "math_train"))


@pytest.mark.parametrize("file", sorted((ROOT / "stages/launch").glob("*.yaml")), ids=str)
def test_a_launch_preset_is_one_that_accelerate_reads(file: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    written = YAML(typ="safe").load(file.read_text())
    assert str(config.distributed_type).rpartition(".")[2] == written["distributed_type"]


@pytest.mark.parametrize(
    ("sets", "processes", "told"),
    [
        (["parallel.sequence=3"], 8, "parallel.sequence = 3: expected a divisor of the 8 proc"),
        (["parallel.expert=16"], 0, "expected a divisor of the model's 4 experts: 1, 2, 4"),
        (["parallel.expert=4"], 6, "the 6 processes and of the model's 4 experts: 1, 2"),
        (["parallel.sequence=4096"], 0, "parallel.sequence = 4096, expected at most sequence_tok"),
        (["parallel.sequences=2"], 0, "parallel.sequences = 2: unknown key; did you mean"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_it_starts(
    sets: list[str], processes: int, told: str
):
    file = ROOT / "stages/recipes/tiny.yaml"
    with pytest.raises(ValueError, match=re.escape(told)):
        cross_check(
            load_recipe(
                file, [f"sft-short.{s}" for s in sets], kinds=KINDS, eval_config=EvalConfig
            ),
            ROOT,
            launch=Launch(processes),
        )
