from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from align.data.generate import TASKS, WAYS
from align.data.rows import ChatRow, Origin, PreferenceRow, PromptRow, TextRow
from align.data.sources import (
    DataConfig,
    SourceReport,
    prompt_text,
    read_rows,
    read_source,
    split_of,
)


def config(**fields: Any) -> DataConfig:
    return DataConfig.model_validate(fields)


def read(base: Path, seed: int = 0, kind: str = "auto", **fields: Any) -> list:
    return read_rows(config(**fields), base=base, inputs={}, seed=seed, kind=kind)


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{n}+1?"},
                {"role": "assistant", "content": f"{n + 1}"},
            ]
        }
        for n in range(count)
    ]


def test_rows_keep_their_order_and_know_their_place(tmp_path: Path):
    lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    rows = read(tmp_path, path="a.jsonl", split="all", licence="MIT", name="book")
    assert rows == [
        TextRow("one", Origin("a.jsonl:1", "book", "MIT")),
        TextRow("two", Origin("a.jsonl:2", "book", "MIT")),
    ]


def test_train_and_dev_share_no_prompt_and_lose_no_row(tmp_path: Path):
    lines(tmp_path / "a.jsonl", chats(500))
    train, dev, whole = (
        read(tmp_path, path="a.jsonl", split=split) for split in ("train", "dev", "all")
    )
    assert len(train) + len(dev) == len(whole) == 500
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in dev}
    assert 30 <= len(dev) <= 70


def test_what_the_other_split_got_is_reported(tmp_path: Path):
    lines(tmp_path / "a.jsonl", chats(100))
    rows, report = read_source(config(path="a.jsonl"), base=tmp_path, inputs={}, seed=0)
    assert report == SourceReport("a.jsonl", "a.jsonl", "", len(rows), held_out=100 - len(rows))


@given(st.text())
def test_split_depends_on_the_text_alone(text: str):
    assert split_of(text) == split_of(text)
    assert (split_of(text, 0.05) == "dev") <= (split_of(text, 0.3) == "dev")


def test_one_question_is_on_one_side_in_every_kind_of_row():
    asked = ({"role": "user", "content": "2+2?"},)
    said = ({"role": "assistant", "content": "4"},)
    system = ({"role": "system", "content": "be  kind"},)
    here = Origin("a:1")
    texts = {
        prompt_text(ChatRow((*asked, *said, *asked, *said), here)),
        prompt_text(ChatRow((*system, *asked, *said), here)),
        prompt_text(PromptRow(asked, here)),
        prompt_text(PreferenceRow((*asked, *said, *asked), said, said, here)),
        prompt_text(TextRow(" 2+2?\n", here)),
    }
    assert texts == {"2+2?"}


def test_rows_of_one_record_stay_on_one_side(tmp_path: Path):
    meetings = [
        {
            "meeting_transcripts": [{"speaker": "Ann", "content": f"Meeting {n}."}],
            "general_query_list": [{"query": "What?", "answer": "a"}],
            "specific_query_list": [{"query": f"Who {i}?", "answer": "b"} for i in range(5)],
        }
        for n in range(40)
    ]
    lines(tmp_path / "a.jsonl", meetings)
    places = [
        {row.origin.place for row in read(tmp_path, path="a.jsonl", split=split, dev_share=0.5)}
        for split in ("train", "dev")
    ]
    assert not places[0] & places[1]
    assert len(places[0] | places[1]) == 40


def test_limit_takes_the_first_rows_of_the_split(tmp_path: Path):
    lines(tmp_path / "a.jsonl", chats(50))
    some, every = (read(tmp_path, path="a.jsonl", limit=limit) for limit in (7, 0))
    assert some == every[:7]


def test_kind_of_the_source_wins_over_the_stages(tmp_path: Path):
    lines(tmp_path / "a.jsonl", chats(3))
    (row, *_) = read(tmp_path, path="a.jsonl", split="all", kind="chat", **{"as": "prompt"})
    assert isinstance(row, PromptRow)


def test_bad_row_is_an_error_with_its_line(tmp_path: Path):
    lines(tmp_path / "a.jsonl", [*chats(1), {"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match=r"^a.jsonl:2: the last message is user's; .*on_bad_row"):
        read(tmp_path, path="a.jsonl", split="all")


def test_broken_json_is_an_error_with_its_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"^a.jsonl:2: broken JSON at column 10: .*on_bad_row: "):
        read(tmp_path, path="a.jsonl", split="all")


def test_bad_rows_are_skipped_and_counted_if_told_so(tmp_path: Path):
    bad = [{"messages": []}] * 7
    lines(tmp_path / "a.jsonl", [*bad, *chats(2)])
    rows, report = read_source(
        config(path="a.jsonl", split="all", on_bad_row="skip"), base=tmp_path, inputs={}, seed=0
    )
    assert len(rows) == report.rows == 2
    assert report.skipped == 7
    assert len(report.reasons) == 5
    assert report.reasons[0] == ("a.jsonl:1: messages are [], expected a list of role and content")


def test_ties_have_a_policy_of_their_own(tmp_path: Path):
    row = {"instruction": "Add.", "input": "", "response1": "4", "response2": "5"}
    votes = {"annotator1": 1, "annotator2": 1, "annotator3": 1}
    tied = row | votes | {"annotator1": 0, "annotator2": 0}
    lines(tmp_path / "a.jsonl", [row | votes, tied])
    with pytest.raises(ValueError, match=r"a.jsonl:2: votes \[0, 0, 1\] have no winner \(ties: sk"):
        read(tmp_path, path="a.jsonl", split="all", on_bad_row="skip")
    rows, report = read_source(
        config(path="a.jsonl", split="all", ties="skip"), base=tmp_path, inputs={}, seed=0
    )
    assert len(rows) == report.skipped == 1


def test_source_of_another_kind_is_an_error_even_if_bad_rows_are_skipped(tmp_path: Path):
    lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"a.jsonl:1: no chat row can be made of a TextRow"):
        read(tmp_path, path="a.jsonl", split="all", kind="chat", on_bad_row="skip")


def test_no_row_left_is_an_error(tmp_path: Path):
    lines(tmp_path / "a.jsonl", [{"text": "2+4?"}, {"text": ""}])
    message = r"a.jsonl: no row of split 'train' is left \(1 in the other split, 1 skipped, first: "
    with pytest.raises(ValueError, match=message):
        read(tmp_path, path="a.jsonl", on_bad_row="skip")


def test_another_stage_is_read_by_its_name(tmp_path: Path):
    lines(tmp_path / "rows.jsonl", chats(3))
    source = config(**{"from": "pairs", "split": "all"})
    rows = read_rows(source, base=Path("elsewhere"), inputs={"pairs": tmp_path}, seed=0)
    assert [row.origin.place for row in rows] == [f"pairs/rows.jsonl:{n}" for n in (1, 2, 3)]
    assert source.label == "pairs"
    with pytest.raises(ValueError, match=r"data.from = 'pairs', expected a stage of this run: \['"):
        read_rows(source, base=tmp_path, inputs={"sft": tmp_path}, seed=0)
    with pytest.raises(ValueError, match=r"data.from = 'pairs': its artifact holds no rows.jsonl"):
        read_rows(source, base=tmp_path, inputs={"pairs": tmp_path / "none"}, seed=0)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_gives_distinct_rows_of_its_split(name: str, tmp_path: Path):
    both = {
        split: read(tmp_path, task=name, num_rows=100, split=split, kind="prompt")
        for split in ("train", "dev")
    }
    prompts = {split: {prompt_text(row) for row in rows} for split, rows in both.items()}
    assert len(prompts["train"]) == len(prompts["dev"]) == 100
    assert not prompts["train"] & prompts["dev"]
    assert all(split_of(text) == split for split in prompts for text in prompts[split])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("auto", ChatRow),
        ("chat", ChatRow),
        ("prompt", PromptRow),
        ("text", TextRow),
        ("preference", PreferenceRow),
    ],
)
def test_task_gives_the_kind_that_is_wanted(kind: str, expected: type, tmp_path: Path):
    rows = read(tmp_path, task="needle", num_rows=20, kind=kind)
    assert {type(row) for row in rows} == {expected}


def test_task_rows_are_a_function_of_the_seeds(tmp_path: Path):
    first, again, other, source = (
        read_rows(config(task="copy", num_rows=20, seed=own), base=tmp_path, inputs={}, seed=stage)
        for stage, own in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == again
    assert first != other
    assert first != source


def test_more_task_rows_begin_with_the_fewer(tmp_path: Path):
    few, many = (read(tmp_path, task="copy", num_rows=num) for num in (10, 40))
    assert many[:10] == few


def test_task_preferences_show_every_way_by_default(tmp_path: Path):
    rows = read(tmp_path, task="safety", num_rows=60, kind="preference")
    assert {row.signal for row in rows} == {"harmlessness", "style"}
    rows = read(tmp_path, task="safety", num_rows=60, kind="preference", ways=["unsafe"])
    assert {row.signal for row in rows} == {"harmlessness"}
    assert all(row.chosen[0]["content"].startswith("Sorry") for row in rows)
    rows = read(tmp_path, task="copy", num_rows=9, kind="preference", signal="overall")
    assert {row.signal for row in rows} == {"overall"}
    assert set(WAYS["near_miss"].signal.split()) == {"correctness"}


def test_task_report_names_our_licence(tmp_path: Path):
    _, report = read_source(config(task="copy", num_rows=5), base=tmp_path, inputs={}, seed=0)
    assert (report.name, report.place, report.licence) == ("copy", "task copy", "Apache-2.0")


def test_task_that_is_used_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("align.data.sources.PATIENCE", 20)
    message = r"task safety has only \d+ distinct prompts of num_rows = 100000 at difficulty \[0"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, task="safety", num_rows=100000, difficulty=[0, 0])


BAD = [
    ({}, "data names no source; expected exactly one of path, hub, task, from"),
    ({"path": "a", "task": "copy"}, "data names path and task; expected exactly one of path, hub,"),
    ({"path": "a", "format": "gsm"}, "format = 'gsm', expected auto or one of share_gpt_preferen"),
    ({"task": "copi"}, "task = 'copi', expected one of needle, multi_needle, recall, arithmetic"),
    ({"path": "a", "num_rows": 5}, r"\['num_rows'\] are for a task; remove them or name a task"),
    (
        {"task": "copy", "difficulty": [0.5, 0.1]},
        r"difficulty = \[0.5, 0.1\], expected 0 <= lowest",
    ),
    ({"task": "copy", "context_tokens": 64}, "task copy has no context; remove context_tokens"),
    ({"task": "copy", "ways": ["unsafe"]}, r"ways = \['unsafe'\], expected of near_miss, other_an"),
    ({"path": "a", "weight": 0}, "greater than 0"),
    ({"path": "a", "dev_share": 1}, "less than 1"),
    ({"path": "a", "limit": -1}, "greater than or equal to 0"),
    ({"path": "a", "wieght": 1}, "Extra inputs are not permitted"),
    ({"path": "a", "split": "test"}, "Input should be 'all', 'train' or 'dev'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_config_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config(**fields)
