"""RewardModel: the trunk of a policy, one scalar head per signal, and a gate over dimensions.

The heads read the hidden state at the last token of each sequence, which is the end of the
response's turn; the gate reads it at the last token of the prompt, so it cannot be moved by what
the response says. Pairs labelled with the whole score are all that trains a learned gate, and they
train nothing else, so it comes to weigh highest the dimension that tells answers to such a prompt
apart.

On disk it is an ordinary trunk checkpoint with two files beside it: `heads.safetensors` and
`reward.json` (signals, hierarchy, version).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from model import HybridModel, Packed
from model.checkpoints import opened_dtype
from model.kernels.experts.blocks import least_rows
from model.memory import align_weights
from model.moe import router_losses
from reward.hierarchy import Hierarchy

HEADS_FILE = "heads.safetensors"
REWARD_FILE = "reward.json"


@dataclass(frozen=True)
class RewardOutput:
    """What a packed call of the reward model gives.

    Args:
        values: [S, N] fp32 (fp64 of a trunk in fp64), each sequence's value under each head; any
            real number. All below are of this dtype.
        overall: [S], the heads' gate-weighted total: the hierarchy's weights on raw values
            instead of their sigmoids, so that pairs labelled with nothing finer can be learned
            without saturation. Floors and ceilings are the score's, not its. With a learned gate
            its gradient reaches the gate alone: the heads have labels of their own.
        gate: [S, M], weights of the hierarchy's M dimensions, sum 1; None without a learned
            gate.
        labelled: [S, L], what each of `RewardModel.labels` speaks about: the values, the
            weighted means of dimensions, overall.
        aux_loss: the router's losses, a mean over the T tokens; None if every coefficient is 0.
    """

    values: Tensor
    overall: Tensor
    gate: Tensor | None
    labelled: Tensor
    aux_loss: Tensor | None


class _RewardFile(BaseModel):
    """What `reward.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    """1; another number was written by another release."""
    signals: tuple[str, ...]
    """Names of the heads, in the order of their rows."""
    hierarchy: Hierarchy
    """The tree that the heads were trained for."""
    version: str
    """Digest of tree and heads."""


class RewardModel(nn.Module):
    """Scores whole conversations, signal by signal.

    Args:
        trunk: of the policy it starts from; used, not copied.
        hierarchy: its heads become rows of one linear layer, its dimensions those of the gate.
        seed: of the heads' first values; the random state outside is left as it was.

    Raises: ValueError if the hierarchy declares no head.

    Example:
        >>> from model import preset
        >>> from reward.hierarchy import HIERARCHY
        >>> model = RewardModel(HybridModel(preset("tiny", num_hidden_layers=2)), HIERARCHY)
        >>> model(Packed.from_sequences([[1, 2, 3], [4]])).values.shape
        torch.Size([2, 4])
    """

    def __init__(self, trunk: HybridModel, hierarchy: Hierarchy, *, seed: int = 0) -> None:
        super().__init__()
        self.trunk = trunk
        self.hierarchy = hierarchy
        self.signals = hierarchy.heads
        self.labels = hierarchy.labels
        width, device = trunk.config.hidden_size, trunk.embed_tokens.weight.device
        if not self.signals:
            raise ValueError(
                f"hierarchy {hierarchy.name!r} declares no head, so there is nothing to train; "
                "set head: true on a signal"
            )
        weights = torch.tensor([d.weight for d in hierarchy.dimensions.values()])
        generator = torch.Generator().manual_seed(seed)
        # fp32 at least: differences of scores are smaller than bf16 resolves.
        wide = torch.promote_types(trunk.dtype, torch.float32)
        # No bias: Bradley-Terry compares scores, so a common shift would never be trained.
        self.values = skip_init(nn.Linear, width, len(self.signals), bias=False, dtype=wide)
        self.gate: nn.Linear | None = None
        with torch.no_grad():
            self.values.weight.normal_(std=(width + 1) ** -0.5, generator=generator)
            if hierarchy.gate == "learned":
                # Starts as the declared gate, whatever the prompt.
                self.gate = skip_init(nn.Linear, width, len(weights), dtype=wide)
                self.gate.weight.zero_()
                self.gate.bias.copy_((weights / weights.sum()).log())
        self.to(device)

    def forward(self, packed: Packed, prompt_lengths: Sequence[int] | None = None) -> RewardOutput:
        """Values of S sequences, each ending in the end-of-turn token of its response.

        Args:
            prompt_lengths: tokens of each sequence up to its response; needed for a learned gate.

        Raises: ValueError if a learned gate has no prompt lengths, there are not S of them, or one
            is not 1 to length - 1.
        """
        if self.gate is not None and prompt_lengths is None:
            raise ValueError("hierarchy.gate = learned reads the prompts; pass prompt_lengths")
        ends = list(accumulate(packed.lengths))
        row = self.trunk.row
        own = row.own(packed)
        hidden, router_logits = self.trunk.run(own)
        gate = None
        # Autocast would run the heads in bf16 again.
        wide = self.values.weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            # Fewer rows are multiplied by other code: their bits would depend on how many they are.
            spare = [ends[-1]] * (least_rows(hidden) - len(ends))
            last = [end - 1 for end in ends + spare]
            values = self.values(row.take(hidden, last, own).to(wide))[: len(ends)]
            if self.gate is not None and prompt_lengths is not None:
                _check_prompts(packed.lengths, prompt_lengths)
                starts = [0, *ends[:-1]]
                last = [s + p - 1 for s, p in zip(starts, prompt_lengths, strict=True)]
                last += last[-1:] * len(spare)
                gate = self.gate(row.take(hidden, last, own).to(wide))[: len(ends)].softmax(-1)
            dimensions, overall = self._total(values, gate)
            labelled = torch.cat([values, dimensions, overall[:, None]], dim=1)
        aux_loss = router_losses(self.trunk.config, router_logits, row)
        return RewardOutput(values, overall, gate, labelled, aux_loss)

    def _total(self, values: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Means of the dimensions that are labels, and the gate-weighted mean of all with heads."""
        tree = self.hierarchy.dimensions
        headed: list[str] = [name for name in tree if tree[name].head_shares]
        tables = [dimension.head_shares for dimension in tree.values() if dimension.head_shares]
        shares = values.new_tensor([[t.get(one, 0.0) for t in tables] for one in self.signals])
        means = values @ shares
        if gate is None:
            gate = values.new_tensor([[d.weight for d in tree.values()]])
            totalled = means
        else:
            # If such a pair trained the heads too, every head would learn to rank every task, all
            # would lead alike, and nothing would be left to tell the gate which dimension decides.
            totalled = means.detach()
        weights = gate[:, [place for place, name in enumerate(tree) if name in headed]]
        overall = (totalled * weights).sum(-1) / weights.sum(-1)
        named = [headed.index(name) for name in self.labels[len(self.signals) : -1]]
        return means[:, named], overall

    @property
    def version(self) -> str:
        """The tree's version and a digest of the heads.

        The trunk is not read: no two training runs end in the same heads on different trunks.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self._heads().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return f"{self.hierarchy.version}+{digest.hexdigest()[:12]}"

    def _heads(self) -> dict[str, Tensor]:
        heads = {"values.weight": self.values.weight.detach()}
        if self.gate is not None:
            heads["gate.weight"] = self.gate.weight.detach()
            heads["gate.bias"] = self.gate.bias.detach()
        return heads

    def save(self, folder: Path) -> None:
        """Writes trunk, heads and tree into `folder`, which may exist; the tokenizer is not its."""
        folder.mkdir(parents=True, exist_ok=True)
        self.trunk.save_pretrained(folder)
        save_file({n: t.cpu().contiguous() for n, t in self._heads().items()}, folder / HEADS_FILE)
        told = _RewardFile(
            format=1, signals=self.signals, hierarchy=self.hierarchy, version=self.version
        )
        (folder / REWARD_FILE).write_text(told.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> RewardModel:
        """The reward model in `folder`, in eval mode.

        Args:
            dtype: of the trunk; None takes `model.checkpoints.opened_dtype`.

        Raises: ValueError if the folder holds no reward model, or its files do not belong together.
        """
        told = _read_reward_file(folder)
        if told.signals != told.hierarchy.heads:
            raise ValueError(
                f"{folder / REWARD_FILE}: signals {told.signals} are not the heads of its "
                f"hierarchy {told.hierarchy.heads}; train the reward stage anew"
            )
        if not (folder / HEADS_FILE).exists():
            raise ValueError(f"{folder}: no {HEADS_FILE}; the reward artifact is not complete")
        dtype = dtype or opened_dtype(folder, device)
        trunk = HybridModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model = cls(trunk, told.hierarchy)
        heads, wanted = load_file(folder / HEADS_FILE), model._heads()
        shapes = {name: tuple(t.shape) for name, t in heads.items()}
        if shapes != {name: tuple(t.shape) for name, t in wanted.items()}:
            raise ValueError(
                f"{folder / HEADS_FILE}: {shapes} do not fit {REWARD_FILE} beside it; "
                "train the reward stage anew"
            )
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(heads[name])
        if model.version != told.version:
            raise ValueError(
                f"{folder / HEADS_FILE}: version {model.version}, but {REWARD_FILE} says "
                f"{told.version}; one of the files was changed, train the reward stage anew"
            )
        model.to(device).eval()
        align_weights(model)
        return model


def _check_prompts(lengths: tuple[int, ...], prompt_lengths: Sequence[int]) -> None:
    if len(prompt_lengths) != len(lengths):
        raise ValueError(f"{len(prompt_lengths)} prompt lengths for {len(lengths)} sequences")
    for index, (length, prompt) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        if not 1 <= prompt < length:
            raise ValueError(
                f"sequence {index}: prompt length {prompt}, expected 1 to {length - 1}: "
                "a prompt and a response of one token or more each"
            )


def _read_reward_file(folder: Path) -> _RewardFile:
    path = folder / REWARD_FILE
    if not path.exists():
        raise ValueError(f"{folder}: no {REWARD_FILE}; expected the artifact of a reward stage")
    try:
        told = _RewardFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, json.JSONDecodeError) as error:
        first = str(error).replace("\n", " ")[:200]
        raise ValueError(
            f"{path}: cannot read it ({first}); train the reward stage anew"
        ) from error
    if told.format != 1:
        raise ValueError(f"{path}: format {told.format}, expected 1; use the release that wrote it")
    return told
