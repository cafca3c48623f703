"""`align serve-reward`, `serve-rollout` and `ledger`: what they serve, or say when they cannot."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from align.data.render import render_prompt
from align.evals.reward_artifact import open_scorer
from align.policy import load_policy
from align.prompts import end_of_turn
from align.questions import HeadCalibration
from reward.calibration import Calibration
from reward.types import Item
from rollout.native.engine import NativeEngine
from rollout.sync import checksums, weights
from rollout.types import Request, Sampling
from stages.artifact import Facts, publish
from tests.stages.fakes import TOKENIZER, align

CHAT = [{"role": "user", "content": "two and three?"}]


class InstantServer:
    """In place of uvicorn: one request of each kind, then the end."""

    answers: dict[str, dict]

    def __init__(self, door) -> None:
        self._door = door

    def run(self, sockets) -> None:
        assert sockets[0].getsockname()[1] > 0
        rendered = TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        with TestClient(self._door, headers={"authorization": "Bearer k1"}) as client:
            score = {"items": [{"messages": CHAT, "response": "five"}]}
            reward = {"query": [rendered + "five<|end|>"], "prompts": [rendered], "labels": ["5"]}
            InstantServer.answers = {
                path: client.post(path, json=body).json()
                for path, body in (("/v1/score", score), ("/get_reward", reward))
            }


@pytest.fixture
def artifact(judge: Path, tmp_path: Path) -> Path:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for file in judge.iterdir():
        (temporary / file.name).write_bytes(file.read_bytes())
    facts = Facts(stage="reward", kind="reward", gives="reward", inputs={}, parents={})
    return publish(temporary, tmp_path / "artifact", facts).folder


def test_an_artifact_is_served_with_its_digest_its_tokenizer_and_a_key(artifact, monkeypatch):
    monkeypatch.setattr("stages.serving.Server", InstantServer)
    monkeypatch.setenv("REWARD_KEY", "k1")
    options = ("--port", "0", "--api-key-env", "REWARD_KEY", "--label-verifier", "math")
    result = align("serve-reward", str(artifact), *options)
    assert result.exit_code == 0, result.stderr
    scored, rewarded = InstantServer.answers["/v1/score"], InstantServer.answers["/get_reward"]
    manifest = json.loads((artifact / "manifest.json").read_text())
    local = open_scorer(artifact)
    plain, ruled = local.score(
        [Item(tuple(CHAT), "five"), Item(tuple(CHAT), "five", answer="5", verifier="math")]
    )
    assert scored["judge"]["artifact"] == manifest["digest"]
    assert scored["judge"]["version"] == local.version
    assert scored["scores"][0]["score"] == pytest.approx(plain.value, abs=1e-6)
    assert rewarded["rewards"] == pytest.approx([ruled.value], abs=1e-6)
    (line,) = [line for line in result.stderr.splitlines() if "described at" in line]
    assert line.startswith(f"{local.version} at http://127.0.0.1:")
    assert "open to whoever" not in line


def test_a_calibrated_artifact_serves_calibrated_chances(judge, tmp_path, monkeypatch):
    artifact = Path(shutil.copytree(judge, tmp_path / "copy"))
    monkeypatch.setattr("stages.serving.Server", InstantServer)
    monkeypatch.setenv("REWARD_KEY", "k1")
    options = ("--port", "0", "--api-key-env", "REWARD_KEY", "--label-verifier", "math")

    def served() -> dict:
        result = align("serve-reward", str(artifact), *options)
        assert result.exit_code == 0, result.stderr
        return InstantServer.answers["/v1/score"]

    plain = served()
    fitted = HeadCalibration(
        overall=Calibration(temperature=4.0, num_pairs=50), temperatures={}, ece_as_trained=0.1
    )
    (artifact / "calibration.json").write_text(fitted.model_dump_json())
    calibrated = served()
    assert (plain["judge"]["calibrated"], calibrated["judge"]["calibrated"]) == (False, True)
    before, after = (told["scores"][0]["probability"] for told in (plain, calibrated))
    logit = math.log(before / (1 - before))
    assert after == pytest.approx(1 / (1 + math.exp(-logit / 4)), abs=1e-6)
    (artifact / "calibration.json").write_text("{}")
    result = align("serve-reward", str(artifact), *options)
    assert "calibration.json: cannot read it" in result.stderr


def test_what_is_missing_or_wrong_is_one_line(judge, tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "gone"):
        none = align("serve-reward", str(folder))
        told = f"error: {folder}: no reward.json; expected the artifact of a reward stage\n"
        assert (none.exit_code, none.stderr) == (2, told)
    items = align("score", str(judge), str(tmp_path / "gone.jsonl"))
    told = f"error: {tmp_path / 'gone.jsonl'}: no such file or folder; check the path\n"
    assert (items.exit_code, items.stderr) == (1, told)
    key = align("serve-reward", str(judge), "--api-key-env", "NO_SUCH_KEY")
    assert (key.exit_code, key.stderr) == (
        2,
        "error: --api-key-env = NO_SUCH_KEY: no such variable, or it is empty; set it\n",
    )
    for name in ("stages.serving", "reward.service"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    extra = align("serve-reward", str(judge))
    assert (extra.exit_code, extra.stderr) == (
        1,
        "error: uvicorn is not installed; run pip install -e '.[serve]' in the project's folder\n",
    )


class InstantRollout:
    """In place of uvicorn: a chat, the weights, then the end."""

    answers: dict[str, dict]

    def __init__(self, door) -> None:
        self._door = door

    def run(self, sockets) -> None:
        assert sockets[0].getsockname()[1] > 0
        with TestClient(self._door, headers={"authorization": "Bearer k1"}) as client:
            chat = {"model": "mine", "messages": CHAT, "max_tokens": 5, "temperature": 0}
            InstantRollout.answers = {
                "chat": client.post("/v1/chat/completions", json=chat).json(),
                "long": client.post("/v1/chat/completions", json=chat | {"max_tokens": 64}).json(),
                "weights": client.get("/v1/weights").json(),
            }


def test_a_policy_is_served_with_its_template_and_a_key(policy, monkeypatch):
    monkeypatch.setattr("stages.serving.make_server", InstantRollout)
    monkeypatch.setenv("ROLLOUT_KEY", "k1")
    options = (
        "--port",
        "0",
        "--api-key-env",
        "ROLLOUT_KEY",
        "--name",
        "mine",
        "--max-tokens",
        "64",
    )
    result = align("serve-rollout", str(policy), *options)
    assert result.exit_code == 0, result.stderr
    model, tokenizer = load_policy(policy)
    prompt = render_prompt(CHAT, tokenizer)
    stop = Sampling(max_new_tokens=5, temperature=0, stop_token_ids=(end_of_turn(tokenizer),))
    engine = NativeEngine(model, max_slots=2, max_cache_tokens=256)
    (done,) = engine.generate([Request("p", prompt, stop)])
    answer = InstantRollout.answers["chat"]
    text = tokenizer.decode(done.tokens, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert InstantRollout.answers["long"]["error"]["code"] == "context_length_exceeded"
    assert InstantRollout.answers["weights"]["checksums"] == checksums(weights(model))
    (line,) = [line for line in result.stderr.splitlines() if "described at" in line]
    assert line.startswith("mine at http://127.0.0.1:")


def test_the_ledger_of_a_stage_is_shown(tmp_path):
    missing = align("ledger", str(tmp_path))
    assert (missing.exit_code, missing.stderr) == (
        2,
        f"error: {tmp_path}/metrics.jsonl: no such file; give the folder of a grpo stage\n",
    )
    line = {"step": 3, "ledger/ratio": 1.25, "ledger/correlation": 0.875}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    shown = align("ledger", str(tmp_path))
    assert shown.exit_code == 0
    assert "correlation" in shown.stdout
    assert "0.875" in shown.stdout
