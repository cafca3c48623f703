"""What `align serve-reward` and `serve-rollout` do: an artifact behind HTTP until told to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket

import torch
from transformers import PreTrainedTokenizerBase

from align.data.render import render_prompt
from align.evals.reward_artifact import open_scorer, open_tokenizer
from align.evals.types import pick_device
from align.policy import load_policy
from align.prompts import PAGE_TOKENS, PREFILL_TOKENS, end_of_turn
from align.queries import query_reader
from align.questions import read_calibration
from reward.service import Server, create_app
from reward.serving.judging import Service, Settings
from reward.serving.types import Limits
from reward.types import Message
from reward.verifiers.judge import JudgeModel
from rollout.native.engine import NativeEngine
from rollout.service import create_app as create_rollout_app
from rollout.service import make_server
from rollout.serving.worker import Settings as WorkerSettings
from rollout.serving.worker import Worker
from rollout.wire import ChatMessage
from serving.server import listen
from stages.artifact import find_artifact


def serve_reward(
    reward: Path,
    *,
    host: str,
    port: int,
    limits: Limits,
    api_key: str,
    label_verifier: str,
    max_body_bytes: int,
    dtype: torch.dtype,
    judge: JudgeModel | None,
    say: Callable[[str], None],
) -> None:
    """Serves the artifact's reward model and tree.

    Args:
        port: 0 takes a free one.
        api_key: that clients have to send; "" asks for none.
        label_verifier: rule for OpenRLHF's plain labels; "" refuses them.
        dtype: of the trunk.
        judge: asked by the rule `judge`, for trees that hold it.
        say: told the address once clients can connect.

    Raises:
        ValueError: the folder is no reward artifact, a limit is wrong, or the tree does not hold
            the label verifier.
        OSError: the address is taken.
    """
    scorer = open_scorer(reward, dtype=dtype, judge=judge)
    artifact = find_artifact(reward)
    settings = Settings(
        limits=limits,
        max_body_bytes=max_body_bytes,
        api_key=api_key,
        artifact=artifact.digest if artifact else "",
        label_verifier=label_verifier,
        read_text=query_reader(open_tokenizer(reward)),
    )
    calibration = read_calibration(reward)
    if calibration is not None:
        settings = replace(settings, calibrate=calibration.overall.probability)
    service = Service(scorer, settings)
    with listen(host, port) as sock:
        say(f"{scorer.version} at {_url(host, sock)}, described at /docs{_openness(api_key)}")
        Server(create_app(service)).run(sockets=[sock])


@dataclass(frozen=True)
class Room:
    """What a rollout worker holds at once.

    Args:
        max_tokens: longest prompt and response together.
        max_slots: samples decoded at once.
        max_cache_tokens: of keys and values; 0 is max_tokens for every slot.
        max_samples: queued or live.
        max_body_bytes: longest request body.
    """

    max_tokens: int = 8192
    max_slots: int = 64
    max_cache_tokens: int = 0
    max_samples: int = 4096
    max_body_bytes: int = 64 << 20


def serve_rollout(
    policy: Path,
    *,
    host: str,
    port: int,
    name: str,
    room: Room,
    api_key: str,
    weights_root: Path | None,
    broadcasts: bool,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> None:
    """Serves an artifact's policy, adapters merged.

    Args:
        port: 0 takes a free one.
        name: of the model, for clients; "" takes the folder's.
        api_key: that clients have to send; "" asks for none.
        weights_root: new weights come from folders below it; None takes none from there.
        broadcasts: whether they come from trainers' process groups too.
        dtype: of the weights.
        say: told the address once clients can connect.

    Raises:
        ValueError: the folder is no policy.
        OSError: the address is taken.
    """
    model, tokenizer = load_policy(policy, dtype=dtype, device=pick_device())

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    engine = NativeEngine(
        model,
        max_slots=room.max_slots,
        max_cache_tokens=room.max_cache_tokens or room.max_slots * (room.max_tokens + PAGE_TOKENS),
        page_tokens=PAGE_TOKENS,
        prefill_tokens=PREFILL_TOKENS.get(model.device.type, PREFILL_TOKENS["cuda"]),
        decode=decode,
    )
    settings = WorkerSettings(
        model=name or policy.resolve().name,
        max_tokens=room.max_tokens,
        encode=lambda text: tuple(tokenizer(text).input_ids),
        decode=decode,
        render=lambda messages: _rendered(messages, tokenizer),
        stop_token_ids=(end_of_turn(tokenizer),),
        weights_root=weights_root,
        broadcasts=broadcasts,
        max_samples=room.max_samples,
        max_body_bytes=room.max_body_bytes,
        api_key=api_key,
    )
    with listen(host, port) as sock:
        say(f"{settings.model} at {_url(host, sock)}/v1, described at /docs{_openness(api_key)}")
        make_server(create_rollout_app(Worker(engine, settings))).run(sockets=[sock])


def _url(host: str, sock: socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{sock.getsockname()[1]}"


def _openness(api_key: str) -> str:
    return "" if api_key else ", open to whoever reaches it (--api-key-env sets a key)"


def _rendered(
    messages: Sequence[ChatMessage], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    turns: list[Message] = [{"role": one.role, "content": one.content} for one in messages]
    return render_prompt(turns, tokenizer)
