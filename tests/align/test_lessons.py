"""Which pairs a step of a reward stage sees: all equally often, in the order asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from align.data.loader import PackedData
from align.lessons import Lessons
from align.pairs import pair_facts
from reward.curriculum import CurriculumConfig
from reward.hierarchy import Hierarchy
from tests.align.trainers.test_reward import TREE, labelled


def lessons(count: int = 16, curriculum: Any = "none", **changes: Any) -> Lessons:
    pairs, tree = labelled(count), Hierarchy.model_validate(TREE)
    given = {"sequence_tokens": 64, "batch_items": 4, "epochs": 2, "seed": 1} | changes
    data = PackedData(pairs, **given)
    return Lessons(data, [pair_facts(pair, tree) for pair in pairs], curriculum)


def indices_of(plan: Lessons, step: int) -> list[int]:
    known = [pair.chosen.tokens for pair in plan.pairs]
    return [known.index(p.chosen.tokens) for b in plan.batches(step, 0, 1) for p in b.pairs]


@pytest.mark.parametrize(("max_steps", "num_steps"), [(0, 8), (3, 3), (11, 11)])
def test_curriculum_and_random_order_see_the_same_pairs_equally_often(max_steps, num_steps):
    seen = []
    for curriculum in ("none", CurriculumConfig()):
        plan = lessons(curriculum=curriculum, max_steps=max_steps)
        assert plan.num_steps == num_steps
        steps = [indices_of(plan, step) for step in range(num_steps)]
        assert all(len(step) == 4 for step in steps)
        seen.append([i for step in steps for i in step])
    if not max_steps:
        assert Counter(seen[0]) == Counter(seen[1]) == Counter(dict.fromkeys(range(16), 2))
    hardest = [plan.pairs[i].difficulty for i in seen[1][:4]]
    assert max(hardest) < 0.8
    assert "overall" not in {plan.pairs[i].signal for i in seen[1][:2]}


def refreshed(plan: Lessons, margins: list[float]) -> list[list[int]]:
    found = []
    for step in range(plan.num_steps):
        if plan.is_due(step):
            plan.draw(margins if step else [])
        found.append(indices_of(plan, step))
    return found


def test_a_refresh_reorders_what_is_left_and_keeps_every_pair_equally_often():
    curriculum = CurriculumConfig(
        model_weight=9.0, refreshes=3, start_share=0.1, full_at=1.0, leaves_first=False
    )
    late_wrong = [9.0 - i for i in range(16)]
    rising = refreshed(lessons(curriculum=curriculum), late_wrong)
    falling = refreshed(lessons(curriculum=curriculum), late_wrong[::-1])
    for steps in (rising, falling):
        assert Counter(i for step in steps for i in step) == Counter(dict.fromkeys(range(16), 2))
    assert rising[:2] == falling[:2]
    # What the model already ranks right comes first: then by index, or against it.
    assert sum(rising[2] + rising[3]) < sum(falling[2] + falling[3])


def test_competence_opens_the_hard_pairs_earlier():
    curriculum = CurriculumConfig(
        pacing="competence", refreshes=1, start_share=0.1, leaves_first=False
    )
    shown = {}
    for name, margin in (("able", 1.0), ("unable", -1.0)):
        plan = lessons(curriculum=curriculum, epochs=1)
        steps = refreshed(plan, [margin] * 16)
        shown[name] = max(plan.pairs[i].difficulty for i in steps[2])
        assert Counter(i for step in steps for i in step) == Counter(range(16))
    assert shown["able"] > shown["unable"]


def test_a_resumed_run_draws_as_if_it_had_not_stopped():
    curriculum = CurriculumConfig(model_weight=1.0, refreshes=3)
    whole = lessons(curriculum=curriculum)
    steps = refreshed(whole, [float(i) for i in range(16)])
    first = lessons(curriculum=curriculum)
    for step in range(5):
        if first.is_due(step):
            first.draw([float(i) for i in range(16)] if step else [])
    second = lessons(curriculum=curriculum)
    second.load_state_dict(first.state_dict())
    rest = []
    for step in range(5, second.num_steps):
        if second.is_due(step):
            second.draw([float(i) for i in range(16)])
        rest.append(indices_of(second, step))
    assert rest == steps[5:]


def test_the_record_tells_the_margin_then_and_later():
    plan = lessons(curriculum=CurriculumConfig(refreshes=1, model_weight=1.0), epochs=1)
    steps = refreshed(plan, [0.0] * 16)
    then = {
        (step, plan.pairs[i].chosen.place): step + i / 100
        for step, some in enumerate(steps)
        for i in some
    }
    later = [float(i) for i in range(16)]
    lines = plan.record(then, later)
    assert [line.step for line in lines] == sorted(line.step for line in lines)
    assert Counter(line.later for line in lines) == Counter(later)
    assert all(line.margin == pytest.approx(line.step + line.later / 100) for line in lines)


def test_refreshes_without_batch_items_are_refused():
    curriculum = CurriculumConfig(refreshes=1, model_weight=1.0)
    with pytest.raises(ValueError, match="refreshes = 1 with batch_items = 0"):
        lessons(curriculum=curriculum, batch_items=0)
