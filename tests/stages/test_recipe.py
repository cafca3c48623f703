"""Bad recipes: each ends in one line with the place, the key, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.checks import cross_check
from stages.document import ConfigError, read_document
from tests.stages.fakes import LADDER, load

HEAD = "name: x\nmodel: {preset: tiny, tokenizer: {data: [{task: arithmetic}]}}\n"
ONE = HEAD + "stages:\n  - name: sft\n    kind: sft\n"
TWO = ONE + "  - name: dpo\n    kind: dpo\n    from: sft\n"


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return file


def problem(tmp_path: Path, text: str, *sets: str) -> str:
    """What loading and cross-checking say, without the folder of the file."""
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        cross_check(load(file, *sets), tmp_path)
    message = str(caught.value).replace(f"{tmp_path}/", "").replace(str(tmp_path), "BASE")
    assert "\n" not in message
    return message


BAD = {
    "misspelt key": (
        ONE + "    epoch: 2\n",
        "r.yaml:6: sft.epoch = 2: unknown key; did you mean 'epochs'?",
    ),
    "misspelt key far inside": (
        ONE + "    optim:\n      lr: 1e-5\n      schedul: cosine\n",
        "r.yaml:8: sft.optim.schedul = cosine: unknown key; did you mean 'schedule'?",
    ),
    "misspelt key at the top": (
        ONE + "eval: []\n",
        "r.yaml:6: eval: unknown key; did you mean 'evals'?",
    ),
    "unheard-of key": (
        ONE + "    zzz: 2\n",
        "r.yaml:6: sft.zzz = 2: unknown key; known: data, epochs, fail_at, make, optim, seed",
    ),
    "wrong type": (
        ONE + "    epochs: two\n",
        "r.yaml:6: sft.epochs = two: expected a valid integer; change it",
    ),
    "quoted number": (
        ONE + '    epochs: "2"\n',
        "r.yaml:6: sft.epochs = 2: expected a valid integer; write it without quotes",
    ),
    "yes for a number": (
        ONE + "    epochs: true\n",
        "r.yaml:6: sft.epochs = true: expected a valid integer; change it",
    ),
    "number out of range": (
        ONE + "    epochs: 0\n",
        "r.yaml:6: sft.epochs = 0: expected greater than or equal to 1; change it",
    ),
    "a word that is no choice": (
        ONE + "    optim: {schedule: cosin}\n",
        "r.yaml:6: sft.optim.schedule = cosin: expected cosine or constant; did you mean 'cosine'?",
    ),
    "a list where keys belong": (
        ONE + "    optim: [1]\n",
        "r.yaml:6: sft.optim: expected a mapping of keys; change it",
    ),
    "unknown kind": (
        ONE.replace("kind: sft", "kind: stf"),
        "r.yaml:5: sft.kind = stf: no such kind; did you mean 'sft'?",
    ),
    "stage without kind": (
        HEAD + "stages:\n  - {name: sft}\n",
        "r.yaml:4: sft.kind: is missing; add it",
    ),
    "stage that is a word": (
        HEAD + "stages: [sft]\n",
        "r.yaml:3: stages.0 = sft: expected a mapping with name and kind; indent its keys",
    ),
    "name that is no folder": (
        ONE.replace("name: sft", "name: ../sft"),
        "r.yaml:4: ../sft.name = ../sft: expected to match ^[a-z0-9][a-z0-9_-]*$; change it",
    ),
    "no stages": (
        HEAD + "stages: []\n",
        "r.yaml:3: stages: expected 1 or more items; add what is missing",
    ),
    "unknown stage in from": (
        TWO.replace("from: sft", "from: sfd"),
        "r.yaml:8: dpo.from = sfd: no stage has this name; did you mean 'sft'?",
    ),
    "cycle": (
        ONE + "    from: dpo\n" + TWO.removeprefix(ONE),
        "r.yaml:6: sft.from = dpo: the stages go in a circle: sft <- dpo <- sft; "
        "start one of them from model",
    ),
    "itself": (
        ONE + "    from: sft\n",
        "r.yaml:6: sft.from = sft: the stages go in a circle: sft <- sft; "
        "start one of them from model",
    ),
    "a stage that stands below": (
        ONE + "    from: lm\n  - {name: lm, kind: lm}\n",
        "r.yaml:6: sft.from = lm: this stage stands below sft; move sft behind it",
    ),
    "name given twice": (
        ONE + "  - {name: sft, kind: dpo}\n",
        "r.yaml:6: sft.name = sft: a stage of this name stands at r.yaml:4; give one another name",
    ),
    "reserved name": (
        ONE + "  - {name: model, kind: dpo}\n",
        "r.yaml:6: model.name = model: this name has a meaning of its own; choose another",
    ),
    "reward that is no reward stage": (
        ONE + "  - {name: grpo, kind: grpo, reward: sft}\n",
        "r.yaml:6: grpo.reward = sft: this stage is of kind sft, expected one that is a reward "
        "stage; the recipe has none yet; add one",
    ),
    "a key for a judge that is no service": (
        ONE + "  - {name: grpo, kind: grpo, reward_key_env: KEY}\n",
        "r.yaml:6: grpo: reward_key_env is the key of a scoring service; give reward its URL or "
        "remove it",
    ),
    "reward for a kind without judge": (
        ONE + "    reward: rm\n  - {name: rm, kind: reward}\n",
        "r.yaml:6: sft.reward = rm: a stage of kind sft has no judge; remove the key",
    ),
    "start from a reward stage": (
        ONE + "  - {name: rm, kind: reward}\n  - {name: dpo, kind: dpo, from: rm}\n",
        "r.yaml:7: dpo.from = rm: this stage is of kind reward, expected one that trains a policy; "
        "choose from: sft",
    ),
    "pairs from no sample stage": (
        TWO + "    data: [{from: sft}]\n",
        "r.yaml:9: dpo.data.0.from = sft: this stage is of kind sft, expected one that samples "
        "rows; the recipe has none yet; add one",
    ),
    "pairs that were sampled for sft": (
        ONE + "  - {name: best, kind: sample, make: sft}\n"
        "  - {name: dpo, kind: dpo, data: [{from: best}]}\n",
        "r.yaml:7: dpo.data.0.from = best: that stage has make: sft, but kind dpo reads make: dpo; "
        "change one",
    ),
    "missing data file": (
        ONE + "    data:\n      - path: gone.jsonl\n",
        "r.yaml:7: sft.data.0.path = gone.jsonl: no such file, folder of .jsonl, .json, "
        ".parquet, .txt, .jsonl.gz, .json.gz, .txt.gz or glob in BASE; check the path",
    ),
    "unknown variable": (
        ONE + "    data: [{path: '${rot}/a.jsonl'}]\nvars: {root: data}\n",
        "r.yaml:6: sft.data.0.path = ${rot}/a.jsonl: variable 'rot' is not declared under vars; "
        "did you mean 'root'?",
    ),
    "unknown eval": (
        ONE + "    evals: [maths]\nevals: [{kind: task, name: math}]\n",
        "r.yaml:6: sft.evals.0 = maths: no eval of the recipe has this name; did you mean 'math'?",
    ),
    "eval from an unknown stage": (
        ONE + "evals: [{kind: task, name: math, from: sfd}]\n",
        "r.yaml:6: evals.math.from = sfd: no stage of this name trains a policy; did you mean "
        "'sft'?",
    ),
    "from on an eval that compares with the parent": (
        ONE + "evals: [{kind: task, name: math, is_relative: true, from: sft}]\n",
        "r.yaml:6: evals.math.from = sft: this eval runs on the stages that aim at it only; "
        "remove the key",
    ),
    "aim without a number before it": (
        ONE + "    evals: [math]\nevals: [{kind: task, name: math, from: sft}]\n",
        "r.yaml:6: sft.evals.0 = math: is asked from sft on, so model has no number to rise from; "
        "set the eval's `from` to model",
    ),
    "unknown kind of eval": (
        ONE + "evals: [{kind: tusk, name: math}]\n",
        "r.yaml:6: evals.math: kind: tusk is not known; did you mean 'task'?",
    ),
    "two evals of one name": (
        ONE + "evals:\n  - {kind: task, name: math}\n  - {kind: pair, name: math}\n",
        "r.yaml:8: evals.math: two evals are named 'math'; give one another name",
    ),
    "judge without reward stage": (
        ONE + "evals: [{kind: task, name: won, judge: reward}]\n",
        "r.yaml:6: evals.won.judge = reward: no stage of the recipe gives a reward model; add "
        "one or use judge: verifier",
    ),
    "unknown preset": (
        ONE.replace("preset: tiny", "preset: tinny"),
        "r.yaml:2: model.preset = tinny: no such preset; did you mean 'tiny'?",
    ),
    "two origins": (
        ONE.replace("preset: tiny", "preset: tiny, path: folder"),
        "r.yaml:2: model: 2 origins given, expected one of preset, path, hub, base; keep one",
    ),
    "missing checkpoint": (
        "name: x\nmodel: {path: gone}\n" + ONE.removeprefix(HEAD),
        "r.yaml:2: model.path = gone: no config.json in this folder; expected a saved checkpoint",
    ),
    "not YAML": (
        ONE + "    optim: {lr: 1e-5\n",
        "r.yaml:7: not YAML: expected ',' or '}', but got '<stream end>'; check indentation, "
        "brackets and colons of this line",
    ),
    "key given twice": (
        ONE + "    epochs: 1\n    epochs: 2\n",
        "r.yaml:7: epochs: given twice, first in line 6; keep one",
    ),
    "empty file": ("", "r.yaml:1: the file holds no keys; expected name, model and stages"),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_is_one_line_with_place_and_remedy(tmp_path: Path, text: str, expected: str):
    assert problem(tmp_path, text) == expected


def test_several_problems_are_counted(tmp_path: Path):
    text = ONE + "    epochs: two\n    seed: three\n"
    assert problem(tmp_path, text).endswith("(and 1 more)")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file or directory; expected a rec"):
        read_document(tmp_path / "gone.yaml")


BAD_SETS = {
    "no value": (
        "sft.epochs",
        "--set sft.epochs: expected key=value, such as sft-short.optim.lr=2e-6",
    ),
    "unknown stage": (
        "stf.epochs=2",
        "--set stf.epochs=2: no stage or key is named 'stf'; did you mean 'sft'?",
    ),
    "unknown key": (
        "sft.optim.lrr=2",
        "--set sft.optim.lrr=2: sft.optim.lrr = 2: unknown key; did you mean 'lr'?",
    ),
    "wrong type": (
        "sft.epochs=many",
        "--set sft.epochs=many: sft.epochs = many: expected a valid integer; change it",
    ),
    "not YAML": (
        "sft.epochs=[1",
        "--set sft.epochs=[1: the value is not YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "into a number": (
        "sft.kind.a=1",
        "--set sft.kind.a=1: stages.sft.kind is sft, which has no "
        "key 'a'; set the whole value instead",
    ),
    "unknown variable": (
        "vars.rot=a",
        "--set vars.rot=a: the recipe declares no variable 'rot'; did you mean 'root'?",
    ),
    "no such item": (
        "sft.data.3.path=a",
        "--set sft.data.3.path=a: '3' is no item of "
        "stages.sft.data; expected an index below 1 or a name; none is known here",
    ),
}


@pytest.mark.parametrize(("item", "expected"), BAD_SETS.values(), ids=BAD_SETS.keys())
def test_a_bad_set_is_one_line_too(tmp_path: Path, item: str, expected: str):
    text = ONE + "    data: [{task: arithmetic}]\nvars: {root: data}\n"
    assert problem(tmp_path, text, item) == expected


def test_sets_apply_from_left_to_right_and_before_variables(tmp_path: Path):
    recipe = load(
        written(tmp_path, LADDER),
        "sft-long.optim.lr=2e-6",
        "sft-long.optim.lr=3e-6",
        "vars.lr=4e-6",
        "grpo.data=[{task: arithmetic}]",
        "grpo.data.0.split=dev",
        "evals.depth.num_items=9",
        "stages.reward.epochs=7",
    )
    assert recipe.stage("sft-long").config.optim.lr == 3e-6
    # A value that is one variable keeps its type; a set of the variable reaches it.
    assert recipe.stage("sft-short").config.optim.lr == 4e-6
    assert recipe.stage("grpo").config.data[0].split == "dev"
    assert recipe.evals["depth"].num_items == 9
    assert recipe.stage("reward").config.epochs == 7


def test_a_set_value_is_yaml_and_a_word_stays_a_word(tmp_path: Path):
    file = written(tmp_path, ONE)
    assert load(file, "sft.make=sft").stage("sft").config.make == "sft"
    document = read_document(file, ["sft.curriculum=none", "sft.lora=null", "sft.on=[1, a]"])
    stage = document.data["stages"][0]
    assert (stage["curriculum"], stage["lora"], stage["on"]) == ("none", None, [1, "a"])


def test_variables_fill_strings_and_keep_types(tmp_path: Path):
    text = "vars: {root: /d, n: 3, f: 1e-6}\na: '${root}/x-${n}'\nb: ${n}\nc: ['${f}']\nd: $5\n"
    document = read_document(written(tmp_path, text))
    found = {key: document.data[key] for key in "abcd"}
    assert found == {"a": "/d/x-3", "b": 3, "c": [1e-6], "d": "$5"}


def test_the_resolved_recipe_holds_every_default(tmp_path: Path):
    resolved = load(written(tmp_path, LADDER)).resolved()
    stage = resolved["stages"][1]
    assert (stage["from"], stage["epochs"], stage["optim"]["schedule"]) == (
        "sft-short",
        1,
        "cosine",
    )
    assert resolved["model"]["preset"] == "tiny"
