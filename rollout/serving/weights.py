"""What a worker holds, and how it takes something new: proven before anybody samples from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel

from rollout.broadcast import joined
from rollout.canary import check_sums
from rollout.native.engine import NativeEngine
from rollout.sync import adapter_weights, check_fit, checksums, copy_tensors, parts
from rollout.transport import Push, read_push, read_weights
from rollout.wire import BroadcastRequest, WeightsTold


class Holder:
    """The weights of a native engine; used on the thread that owns the engine.

    Args:
        engine: whose model is changed in place.
        root: pushes come from folders below it; None refuses them.
        broadcasts: whether they come from process groups too.
    """

    def __init__(
        self, engine: NativeEngine, root: Path | None = None, *, broadcasts: bool = False
    ) -> None:
        self._engine = engine
        self._broadcasts = broadcasts
        self._root = None if root is None else root.resolve()
        self._adapter: dict[str, object] | None = None
        self.fault = ""
        """Why nothing may be sampled: a push that did not prove itself."""

    @property
    def version(self) -> int:
        return self._engine.policy_version

    @property
    def dtype(self) -> str:
        """Type of the weights, such as float32."""
        return str(self._engine.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self._engine.model.device

    def told(self) -> WeightsTold:
        """What is held right now, read from the live tensors."""
        model = self._engine.model
        return WeightsTold(
            version=self.version,
            holds="weights" if self._adapter is None else "adapter",
            checksums=checksums(parts(model)),
        )

    def push(self, path: Path, version: int) -> WeightsTold:
        """Takes the weights in a folder, or the adapter, and proves that it holds them.

        Raises:
            ValueError: if the folder lies elsewhere, is not whole, is of another version, or does
                not fit the model; if tensors were changed by then, nothing is sampled until a push
                succeeds.
            ProofError: if what is held is not what the folder says was sent.
        """
        push = self._read(path, version)
        self.fault = _broken_off(version)
        if push.holds == "adapter":
            self._attach(push)
            copy_tensors(adapter_weights(self._engine.model), read_weights(path))
            self._engine.policy_version = version
        else:
            self._engine.update_weights(read_weights(path), version)
        return self._proven(push.checksums, version)

    def receive(self, asked: BroadcastRequest) -> WeightsTold:
        """Takes the weights that a trainer broadcasts, and proves that it holds them.

        Raises:
            ValueError: if this worker takes none, or they do not fit; nothing has changed.
            RuntimeError: if the trainer cannot be reached, calls off, or the group breaks. If
                tensors were changed by then, nothing is sampled until a push succeeds.
            ProofError: if what is held is not what was sent.
        """
        if not self._broadcasts:
            raise ValueError("this worker takes no broadcasts; start it with --broadcast")
        if self._adapter is not None:
            raise ValueError(
                "a broadcast brings all weights, and this worker holds an adapter; push adapters, "
                "or start the worker anew"
            )
        check_fit(self._engine.model, [(t.name, torch.Size(t.shape)) for t in asked.tensors])
        with joined(asked, self.device) as (stream, sums):
            self.fault = _broken_off(asked.version)
            self._engine.update_weights(stream, asked.version)
            return self._proven(sums(), asked.version)

    def _proven(self, sent: Mapping[str, str], version: int) -> WeightsTold:
        told = self.told()
        held = {name: told.checksums[name] for name in sent if name in told.checksums}
        check_sums(sent, held, version=version, where="worker")
        self.fault = ""
        return told

    def _read(self, path: Path, version: int) -> Push:
        if self._root is None:
            raise ValueError("this worker takes no weights; start it with --weights-root FOLDER")
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(
                f"path = {path}, expected a folder below {self._root}, where this worker's "
                "weights come from"
            )
        push = read_push(path)
        if push.version != version:
            raise ValueError(
                f"{path} holds version {push.version}, expected {version}; the push is stale"
            )
        if push.holds == "weights" and self._adapter is not None:
            raise ValueError(
                f"{path} holds all weights, and this worker an adapter; push adapters, or start "
                "the worker anew"
            )
        return push

    def _attach(self, push: Push) -> None:
        """Puts an adapter's places into the model; they stay where they are for later pushes."""
        told = dict(push.adapter)
        if self._adapter is None:
            model = self._engine.model
            training = model.training
            PeftModel(model, LoraConfig(**told)).requires_grad_(False)
            for tensor in adapter_weights(model).values():
                tensor.data = tensor.data.to(model.device, model.dtype)
            model.train(training)
            self._adapter = told
            # what the engine prepared for the plain modules is of no use any more
            self._engine.release()
        elif self._adapter != told:
            raise ValueError(
                f"the adapter's config is {told}, this worker's is {self._adapter}; start the "
                "worker anew"
            )


def _broken_off(version: int) -> str:
    return (
        f"the push of version {version} broke off, so the weights are of two versions; push again"
    )
