"""The scoring service under load, killed, fuzzed, and asked by TRL's own trainer."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from align.evals.reward_artifact import open_scorer
from model import HybridModel, preset
from reward.client import HttpScorer, trl_reward
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from reward.scorer import InProcessScorer
from reward.serving.judging import Service, Settings
from reward.serving.types import Limits
from reward.types import Item, Score
from tests.align.test_trl_oracle import COMMON, VOCAB, build, tokenizer  # noqa: F401  (a fixture)
from tests.reward.live import served
from tests.reward.test_scorer import scorer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def draw(count: int) -> list[Item]:
    """Distinct items, some with a rule."""
    rng = random.Random(0)
    items = []
    for index in range(count):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 12))) + f" {index}"
        ruled = index % 3 == 0
        prompt = ({"role": "user", "content": "a number?"},)
        items.append(Item(prompt, text, answer=str(index % 7), verifier="math" * ruled))
    return items


def assert_same(found: list[Score], wanted: list[Score]) -> None:
    assert len(found) == len(wanted)
    worst = max(abs(one.value - other.value) for one, other in zip(found, wanted, strict=True))
    assert worst <= 1e-5
    assert all(
        (one.valid, set(one.signals)) == (other.valid, set(other.signals))
        for one, other in zip(found, wanted, strict=True)
    )


def test_100_000_items_from_several_clients_none_lost_none_reordered():
    distinct = draw(2000)
    exact = scorer().score(distinct)
    # Few agree to the tolerance, so no two answers could be exchanged unseen.
    assert len({round(one.value, 4) for one in exact}) > 200
    rng = random.Random(1)
    places = [[rng.randrange(2000) for _ in range(25_000)] for _ in range(4)]
    # A queue that the clients overfill, so that they are refused and come back.
    service = Service(scorer(), Settings(limits=Limits(queue_items=2500)))
    with served(service) as live, ThreadPoolExecutor(4) as clients:

        def ask(mine: list[int]) -> list[Score]:
            judge = HttpScorer(live.url, batch_items=400, deadline_s=900)
            return judge.score([distinct[place] for place in mine])

        answers = list(clients.map(ask, places))
    for mine, found in zip(places, answers, strict=True):
        assert_same(found, [exact[place] for place in mine])
    counted = service.metrics.text().decode().splitlines()
    assert "reward_items_total 100000.0" in counted
    assert "reward_queue_items 0.0" in counted
    assert any('endpoint="/v1/score",status="429"' in line for line in counted)


@pytest.fixture
def artifact(tokenizer, tmp_path: Path) -> Path:  # noqa: F811
    shape = preset("tiny", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=8)
    RewardModel(HybridModel(shape), HIERARCHY).save(tmp_path / "artifact")
    tokenizer.save_pretrained(tmp_path / "artifact")
    return tmp_path / "artifact"


def start(artifact: Path, port: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "stages", "serve-reward", str(artifact), "--port", str(port)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_clients_finish_although_the_server_is_killed_and_comes_back(artifact):
    items, port = draw(3000), free_port()
    server = start(artifact, port)
    try:
        judge = HttpScorer(f"http://127.0.0.1:{port}", batch_items=20, deadline_s=300)
        found: list[Score] = []
        load = threading.Thread(target=lambda: found.extend(judge.score(items)))
        load.start()
        time.sleep(1.0)
        for _ in range(2):
            assert load.is_alive(), "finished before it was killed: give it more items"
            server.send_signal(signal.SIGKILL)
            server.wait(30)
            time.sleep(0.5)
            server = start(artifact, port)
            HttpScorer(f"http://127.0.0.1:{port}", deadline_s=120)
            time.sleep(0.5)
        load.join(300)
        assert_same(found, open_scorer(artifact).score(items))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == -signal.SIGTERM
    finally:
        server.kill()
        server.wait(30)


def test_no_request_that_the_openapi_allows_or_forbids_breaks_the_service(tmp_path):
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,response_schema_conformance,status_code_conformance"
    with served(Service(scorer(), Settings(limits=Limits(item_tokens=2000)))) as live:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{live.url}/openapi.json"]
        options = ["--checks", f"{checks},content_type_conformance", "--max-examples", "100"]
        # Without its stateful phase: no answer here is the input of another request.
        more = ["--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
        ran = subprocess.run(
            [*command, *options, *more], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert "4 selected / 4 total" in ran.stdout


def test_trls_grpo_trains_on_the_rewards_of_a_service(tokenizer, tmp_path):  # noqa: F811
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": "the cat", "answer": "5", "verifier": "math"}] * 4
    service = Service(InProcessScorer(), Settings())
    with served(service) as live:
        trainer = GRPOTrainer(
            model=build(0),
            reward_funcs=trl_reward(HttpScorer(live.url)),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                **COMMON,
                num_generations=4,
                max_completion_length=8,
                max_steps=1,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    (logged,) = [line for line in trainer.state.log_history if "rewards/hybrid_align/mean" in line]
    assert 0 <= logged["rewards/hybrid_align/mean"] <= 1
    assert "reward_items_total 4.0" in service.metrics.text().decode()
