"""However the tokens arrive, packed or padded, the answer is the same.

All in the real layer order: lightning first, softmax after every few.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from model import HybridForCausalLM, Packed
from tests.helpers import assert_close
from tests.model.setting import (
    EXACT,
    RAGGED,
    VOCABULARY,
    build,
    exact,
    gradients,
    packed_logits,
    padded,
    random_sequences,
    separate_logits,
    shared_model,
    summed_logprobs,
)

# Packed


@pytest.mark.parametrize("lengths", RAGGED)
def test_packing_equals_separate_sequences(model: HybridForCausalLM, lengths: list[int]):
    sequences = random_sequences(lengths)
    together = packed_logits(model, Packed.from_sequences(sequences))
    assert_close("logits", together, torch.cat(separate_logits(model, sequences)), exact(model))


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_packing_equals_separate_sequences_of_any_length(lengths: list[int], seed: int):
    model = shared_model(torch.float32)
    sequences = random_sequences(lengths, seed)
    with torch.no_grad():
        together = packed_logits(model, Packed.from_sequences(sequences))
        assert_close("logits", together, torch.cat(separate_logits(model, sequences)), exact(model))


def test_packing_gives_the_gradients_of_separate_sequences():
    model, sequences = build().double(), random_sequences([5, 1, 70, 33])
    summed_logprobs(model, sequences).backward()
    together = gradients(model)
    model.zero_grad()
    for sequence in sequences:
        summed_logprobs(model, [sequence]).backward()
    apart = gradients(model)
    assert together.keys() == apart.keys() == dict(model.named_parameters()).keys()
    for name, value in apart.items():
        assert_close(f"gradient of {name}", together[name], value, exact(model))


def test_later_document_has_no_gradient_into_an_earlier_one(model: HybridForCausalLM):
    embeddings = model.get_input_embeddings()
    sequences = random_sequences([9, 12])
    packed = Packed.from_sequences(sequences)
    seen: list[Tensor] = []
    hook = embeddings.register_forward_hook(lambda _m, _i, out: seen.append(out))
    hidden = model.model.run(packed).hidden
    hook.remove()
    (grad,) = torch.autograd.grad(hidden[9:].square().sum(), seen[0])
    assert float(grad.reshape(21, -1)[:9].abs().max()) == 0.0
    assert float(grad.reshape(21, -1)[9:].abs().min(dim=-1).values.max()) > 0.0


def test_logprobs_and_entropy_are_those_of_the_logits(model: HybridForCausalLM):
    packed = Packed.from_sequences(random_sequences([40, 3]))
    targets = packed.tokens.roll(-1)
    for temperature in (1.0, 0.7):
        out = model(packed=packed, targets=targets, temperature=temperature, with_entropy=True)
        full = (packed_logits(model, packed).double() / temperature).log_softmax(-1)
        expected = full.gather(-1, targets[:, None])[:, 0]
        assert_close("logprobs", out.logprobs, expected, exact(model))
        assert_close("entropy", out.entropy, -(full.exp() * full).sum(-1), exact(model))
        assert out.logprobs.dtype == model.dtype
    assert model(packed=packed).logprobs is None


# As the ecosystem's collators emit it


def test_trl_padding_free_collator_equals_separate(model: HybridForCausalLM):
    sequences = random_sequences([5, 1, 9, 66])
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": sequence} for sequence in sequences])
    out = model(**batch)
    apart = torch.cat(separate_logits(model, sequences))
    assert_close("logits", out.logits[0], apart, exact(model))
    assert torch.isfinite(out.loss)


def test_trl_packed_rows_equal_separate(model: HybridForCausalLM):
    sequences = random_sequences([5, 1, 9, 66])
    joined = [sequences[0] + sequences[1], sequences[2] + sequences[3]]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate(
        [
            {"input_ids": joined[0], "seq_lengths": [5, 1]},
            {"input_ids": joined[1], "seq_lengths": [9, 66]},
        ]
    )
    apart = torch.cat(separate_logits(model, sequences))
    assert_close("logits", model(**batch).logits[0], apart, exact(model))


@pytest.mark.parametrize("flash", [False, True])
def test_transformers_flattening_collator_equals_separate(model: HybridForCausalLM, flash: bool):
    sequences = random_sequences([4, 1, 33])
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash)
    batch = collate([{"input_ids": sequence} for sequence in sequences])
    apart = torch.cat(separate_logits(model, sequences))
    assert_close("logits", model(**batch).logits[0], apart, exact(model))


def test_cu_seq_lens_alone_say_the_borders(model: HybridForCausalLM):
    sequences = random_sequences([4, 1, 33])
    packed = Packed.from_sequences(sequences)
    out = model(
        input_ids=packed.tokens[None],
        cu_seq_lens_q=packed.cu_seqlens,
        cu_seq_lens_k=packed.cu_seqlens,
        max_length_q=33,
        max_length_k=33,
    )
    assert_close(
        "logits", out.logits[0], torch.cat(separate_logits(model, sequences)), exact(model)
    )


def test_packed_loss_equals_the_token_mean_over_separate_sequences(model: HybridForCausalLM):
    sequences = random_sequences([5, 1, 9])
    batch = DataCollatorWithFlattening()([{"input_ids": sequence} for sequence in sequences])
    total = torch.zeros(())
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence])).logits[0, :-1]
        targets = torch.tensor(sequence[1:], dtype=torch.int64)
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    # transformers' loss function computes in fp32 whatever the model's dtype
    assert_close("loss", model(**batch).loss, total / (4 + 0 + 8), EXACT)


# Padded


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", [[3, 9], [1, 70, 64], [5, 5]])
def test_padding_changes_nothing(model: HybridForCausalLM, lengths: list[int], left: bool):
    sequences = random_sequences(lengths)
    tokens, mask = padded(sequences, left=left)
    out = model(input_ids=tokens, attention_mask=mask)
    assert out.logits.shape == (*tokens.shape, VOCABULARY)
    for row, real, alone in zip(
        out.logits, mask.bool(), separate_logits(model, sequences), strict=True
    ):
        assert_close("logits", row[real], alone, exact(model))


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_loss_and_no_gradient(left: bool):
    model, sequences = build().double(), random_sequences([3, 40, 17])
    tokens, mask = padded(sequences, left=left)
    labels = tokens.masked_fill(mask == 0, -100)
    loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    batched = gradients(model)
    model.zero_grad()
    total = torch.zeros(())
    for sequence in sequences:
        row = torch.tensor([sequence])
        total = total + model(input_ids=row, labels=row).loss * (len(sequence) - 1)
    (total / (2 + 39 + 16)).backward()
    assert_close("loss", loss, total / 57, EXACT)
    for name, value in gradients(model).items():
        assert_close(f"gradient of {name}", batched[name], value, EXACT)


def test_padded_hidden_states_are_unpadded_hidden_states(model: HybridForCausalLM):
    sequences = random_sequences([3, 9])
    tokens, mask = padded(sequences, left=True)
    hidden = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
    for row, real, sequence in zip(hidden, mask.bool(), sequences, strict=True):
        alone = model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        assert_close("hidden", row[real], alone, exact(model))


def test_logits_to_keep_gives_the_last_positions(model: HybridForCausalLM):
    tokens, mask = padded(random_sequences([3, 9]), left=True)
    whole = model(input_ids=tokens, attention_mask=mask).logits
    kept = model(input_ids=tokens, attention_mask=mask, logits_to_keep=2).logits
    assert_close("logits", kept, whole[:, -2:], exact(model))


# Memory for time


def test_gradient_checkpointing_changes_nothing():
    model, sequences = build().double().train(), random_sequences([30, 1, 66])
    plain_loss = summed_logprobs(model, sequences)
    plain_loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss = summed_logprobs(model, sequences)
    loss.backward()
    assert_close("loss", loss, plain_loss, exact(model))
    for name, value in gradients(model).items():
        assert_close(f"gradient of {name}", value, plain[name], exact(model))
