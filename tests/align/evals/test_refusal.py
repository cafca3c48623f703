"""The over-refusal guard: who refuses everything is found out."""

from __future__ import annotations

import json

import pytest

from align.data.refusals import refusal_pairs
from align.evals import run_eval
from align.evals.refusal import RefusalEval, guard_table
from model import HybridModel, preset
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from reward.types import Item, Score
from stages.inputs import FileDigests
from tests.align import small

YES, NO, HALF = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


def records() -> list[tuple[dict[str, str], str]]:
    found = []
    for number, (kind, label) in enumerate(
        [("homonyms", YES), ("homonyms", NO), ("contrast_homonyms", YES), ("contrast_homonyms", NO)]
        * 2
        + [("homonyms", HALF)]
    ):
        text = "Sorry, no." if label == NO else "Do it so."
        row = {"prompt": f"How to {kind}?", "type": kind, "completion": text, "final_label": label}
        found.append((row, f"a:{number}"))
    return found


class Judge:
    """Values by what the text is; harmlessness the same, capped below a floor of 0.3."""

    version = "judge"

    def __init__(self, refusal: float, help_safe: float, help_unsafe: float) -> None:
        self.values = {"refusal": refusal, "safe": help_safe, "unsafe": help_unsafe}

    def score(self, items: list[Item]) -> list[Score]:
        found = []
        for item in items:
            half = "unsafe" if "contrast" in item.messages[0]["content"] else "safe"
            value = self.values["refusal" if item.response.startswith("Sorry") else half]
            reason = "capped: harmlessness" if value < 0.3 else ""
            found.append(Score(value, dimensions={"harmlessness": value}, reason=reason))
        return found


def test_every_compliance_meets_every_refusal_and_partial_ones_stay_out():
    pairs = refusal_pairs(records(), "harmlessness")
    assert {half: len(rows) for half, rows in pairs.items()} == {"safe": 4, "unsafe": 4}
    assert all(row.chosen[0]["content"] == "Do it so." for row in pairs["safe"])
    assert all(row.chosen[0]["content"] == "Sorry, no." for row in pairs["unsafe"])


@pytest.mark.parametrize(
    ("judge", "value", "safe", "unsafe", "capped", "refusing_wins"),
    [
        (Judge(0.6, 0.9, 0.1), 1.0, 1.0, 1.0, (0.0, 1.0), False),
        (Judge(0.9, 0.2, 0.1), 0.5, 0.0, 1.0, (1.0, 1.0), True),
        (Judge(0.1, 0.9, 0.9), 0.5, 1.0, 0.0, (0.0, 0.0), False),
    ],
)
def test_the_table_tells_a_good_judge_from_one_that_always_refuses_or_never(
    judge, value, safe, unsafe, capped, refusing_wins
):
    items, details = guard_table(judge, refusal_pairs(records(), "harmlessness"))
    assert sum(items) / len(items) == value
    assert (details["safe/accuracy"], details["unsafe/accuracy"]) == (safe, unsafe)
    assert (details["safe/capped"], details["unsafe/capped"]) == capped
    assert (details["lead_of_refusing"] > 0) == refusing_wins


def test_a_half_without_pairs_and_a_label_that_is_none_are_errors():
    safe = [record for record in records() if not record[0]["type"].startswith("contrast")]
    with pytest.raises(ValueError, match="no pair of unsafe prompts"):
        guard_table(Judge(0.5, 0.5, 0.5), refusal_pairs(safe, "harmlessness"))
    wrong = {**records()[0][0], "final_label": "maybe"}
    with pytest.raises(ValueError, match="a:1: final_label = 'maybe', expected 1_full"):
        refusal_pairs([(wrong, "a:1")], "harmlessness")
    with pytest.raises(ValueError, match="a:1: no field final_label"):
        refusal_pairs([({"prompt": "a"}, "a:1")], "harmlessness")


def test_an_artifact_is_asked_by_name_and_its_file_is_an_input(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record, _ in records())
    (tmp_path / "answers.jsonl").write_text(lines)
    config = RefusalEval.model_validate({"kind": "refusal", "files": [{"path": "answers.jsonl"}]})
    shape = preset("tiny", vocab_size=small.VOCAB, num_hidden_layers=2)
    RewardModel(HybridModel(shape), HIERARCHY).save(tmp_path / "judge")
    small.tokenizer().save_pretrained(tmp_path / "judge")

    def ask(folder):
        return run_eval(config, policy=folder, parent=None, inputs={}, base=tmp_path, seed=0)

    result = ask(tmp_path / "judge")
    assert (result.metric, result.num_items) == ("balanced_accuracy", 8)
    assert result.value == pytest.approx(
        (result.details["safe/accuracy"] + result.details["unsafe/accuracy"]) / 2
    )
    assert list(FileDigests(tmp_path / "d.json").of_config(config, tmp_path)) == ["answers.jsonl"]
    with pytest.raises(ValueError, match="is a policy, expected a reward model"):
        ask(small.start(tmp_path / "policy"))
