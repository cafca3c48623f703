"""What `align serve-reward` does: a reward artifact behind HTTP until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from align.evals.reward_artifact import open_scorer, open_tokenizer
from align.queries import query_reader
from align.questions import read_calibration
from reward.service import Server, create_app, listen
from reward.serving.batching import Limits
from reward.serving.judging import Service, Settings
from reward.verifiers.judge import JudgeModel
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
        bound = sock.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        keyed = "" if api_key else ", open to whoever reaches it (--api-key-env sets a key)"
        say(f"{scorer.version} at http://{shown}:{bound}, described at /docs{keyed}")
        Server(create_app(service)).run(sockets=[sock])
