"""However the tokens arrive, packed, padded, in chunks or one by one, the answer is the same.

All in the real layer order: lightning first, softmax every eighth (here every fourth) layer.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from model import DecodeCache, HybridConfig, HybridForCausalLM, Packed
from model.config import preset
from tests.helpers import assert_close

EXACT = 1e-6
VOCABULARY = 61


def small_config(**changes: object) -> HybridConfig:
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return preset("tiny", **{**values, **changes})


def build(**changes: object) -> HybridForCausalLM:
    torch.manual_seed(0)
    model = HybridForCausalLM(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def shared_model() -> HybridForCausalLM:
    return build()


@pytest.fixture
def model() -> HybridForCausalLM:
    return shared_model()


def random_sequences(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def separate_logits(model: HybridForCausalLM, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]


def packed_logits(model: HybridForCausalLM, packed: Packed) -> Tensor:
    return model.logits(model.model.run(packed).hidden)


RAGGED = [[65], [1, 63], [64, 1, 130], [1, 1, 1], [7, 300, 2]]


# Packed


@pytest.mark.parametrize("lengths", RAGGED)
def test_packing_equals_separate_sequences(model: HybridForCausalLM, lengths: list[int]):
    sequences = random_sequences(lengths)
    together = packed_logits(model, Packed.from_sequences(sequences))
    assert_close("logits", together, torch.cat(separate_logits(model, sequences)), EXACT)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_packing_equals_separate_sequences_of_any_length(lengths: list[int], seed: int):
    model = shared_model()
    sequences = random_sequences(lengths, seed)
    with torch.no_grad():
        together = packed_logits(model, Packed.from_sequences(sequences))
        assert_close("logits", together, torch.cat(separate_logits(model, sequences)), EXACT)


def gradients(model: HybridForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def summed_logprobs(model: HybridForCausalLM, sequences: Sequence[Sequence[int]]) -> Tensor:
    packed = Packed.from_sequences(sequences)
    targets = packed.tokens.roll(-1)
    out = model(packed=packed, targets=targets)
    weights = torch.linspace(0.5, 1.5, VOCABULARY)[packed.tokens]
    ends = packed.cu_seqlens[1:].long() - 1
    weights = weights.index_fill(0, ends, 0.0)
    return (out.logprobs * weights).sum()


def test_packing_gives_the_gradients_of_separate_sequences():
    model, sequences = build(), random_sequences([5, 1, 70, 33])
    summed_logprobs(model, sequences).backward()
    together = gradients(model)
    model.zero_grad()
    for sequence in sequences:
        summed_logprobs(model, [sequence]).backward()
    apart = gradients(model)
    assert together.keys() == apart.keys() == dict(model.named_parameters()).keys()
    for name, value in apart.items():
        assert_close(f"gradient of {name}", together[name], value, EXACT)


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
        assert_close("logprobs", out.logprobs, expected, EXACT)
        assert_close("entropy", out.entropy, -(full.exp() * full).sum(-1), EXACT)
        assert out.logprobs.dtype == torch.float32
    assert model(packed=packed).logprobs is None


# As the ecosystem's collators emit it


def test_trl_padding_free_collator_equals_separate(model: HybridForCausalLM):
    sequences = random_sequences([5, 1, 9, 66])
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": sequence} for sequence in sequences])
    out = model(**batch)
    apart = torch.cat(separate_logits(model, sequences))
    assert_close("logits", out.logits[0], apart, EXACT)
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
    assert_close("logits", model(**batch).logits[0], apart, EXACT)


@pytest.mark.parametrize("flash", [False, True])
def test_transformers_flattening_collator_equals_separate(model: HybridForCausalLM, flash: bool):
    sequences = random_sequences([4, 1, 33])
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash)
    batch = collate([{"input_ids": sequence} for sequence in sequences])
    apart = torch.cat(separate_logits(model, sequences))
    assert_close("logits", model(**batch).logits[0], apart, EXACT)


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
    assert_close("logits", out.logits[0], torch.cat(separate_logits(model, sequences)), EXACT)


def test_packed_loss_equals_the_token_mean_over_separate_sequences(model: HybridForCausalLM):
    sequences = random_sequences([5, 1, 9])
    batch = DataCollatorWithFlattening()([{"input_ids": sequence} for sequence in sequences])
    total = torch.zeros(())
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence])).logits[0, :-1]
        targets = torch.tensor(sequence[1:], dtype=torch.int64)
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert_close("loss", model(**batch).loss, total / (4 + 0 + 8), EXACT)


# Padded


def padded(sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(sequence) for sequence in sequences)
    rows, masks = [], []
    for sequence in sequences:
        gap = width - len(sequence)
        pad, real = [0] * gap, [1] * len(sequence)
        rows.append([*pad, *sequence] if left else [*sequence, *pad])
        masks.append([*pad, *real] if left else [*real, *pad])
    return torch.tensor(rows), torch.tensor(masks)


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
        assert_close("logits", row[real], alone, EXACT)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_loss_and_no_gradient(left: bool):
    model, sequences = build(), random_sequences([3, 40, 17])
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
        assert_close(f"gradient of {name}", batched[name], value, 2 * EXACT)


def test_padded_hidden_states_are_unpadded_hidden_states(model: HybridForCausalLM):
    sequences = random_sequences([3, 9])
    tokens, mask = padded(sequences, left=True)
    hidden = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
    for row, real, sequence in zip(hidden, mask.bool(), sequences, strict=True):
        alone = model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        assert_close("hidden", row[real], alone, EXACT)


def test_logits_to_keep_gives_the_last_positions(model: HybridForCausalLM):
    tokens, mask = padded(random_sequences([3, 9]), left=True)
    whole = model(input_ids=tokens, attention_mask=mask).logits
    kept = model(input_ids=tokens, attention_mask=mask, logits_to_keep=2).logits
    assert_close("logits", kept, whole[:, -2:], EXACT)


# Cached


def cache_for(model: HybridForCausalLM, slots: int = 6, pages: int = 64) -> DecodeCache:
    return DecodeCache(
        model.config, num_slots=slots, num_pages=pages, page_tokens=16, dtype=torch.float32
    )


def continue_cache(
    model: HybridForCausalLM, cache: DecodeCache, pieces: dict[int, Sequence[int]]
) -> dict[int, Tensor]:
    """Feeds each slot its next tokens in one packed call; the logits of each slot's tokens."""
    slots = tuple(pieces)
    flat = [token for slot in slots for token in pieces[slot]]
    positions = [int(cache.lengths[slot]) + i for slot in slots for i in range(len(pieces[slot]))]
    lengths = tuple(len(pieces[slot]) for slot in slots)
    packed = Packed(torch.tensor(flat), torch.tensor(positions), lengths)
    with torch.no_grad():
        out = model.logits(model.model.run(packed, cache=cache, slots=slots).hidden)
    return dict(zip(slots, out.split(lengths), strict=True))


def test_cached_decode_equals_full_forward(model: HybridForCausalLM):
    (sequence,) = random_sequences([75])
    cache = cache_for(model)
    slot = cache.allocate()
    rows = [continue_cache(model, cache, {slot: sequence[:30]})[slot]]
    rows += [continue_cache(model, cache, {slot: [token]})[slot] for token in sequence[30:]]
    assert int(cache.lengths[slot]) == 75
    assert_close("logits", torch.cat(rows), separate_logits(model, [sequence])[0], EXACT)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_chunked_prefill_of_several_slots_equals_whole_prefill(lengths: list[int], seed: int):
    model, chance = shared_model(), random.Random(seed)
    sequences = random_sequences(lengths)
    cache = cache_for(model)
    left = {cache.allocate(): list(sequence) for sequence in sequences}
    rows: dict[int, list[Tensor]] = {slot: [] for slot in left}
    while any(left.values()):
        cuts = {slot: chance.randint(0, len(tokens)) for slot, tokens in left.items()}
        pieces = {slot: left[slot][:cut] for slot, cut in cuts.items() if cut}
        left = {slot: tokens[cuts[slot] :] for slot, tokens in left.items()}
        if pieces:
            for slot, out in continue_cache(model, cache, pieces).items():
                rows[slot].append(out)
    with torch.no_grad():
        for slot, alone in zip(rows, separate_logits(model, sequences), strict=True):
            assert_close("logits", torch.cat(rows[slot]), alone, EXACT)


@pytest.mark.parametrize("at", [1, 15, 16, 17, 40])
def test_forked_slots_go_their_own_ways(model: HybridForCausalLM, at: int):
    prompt, first, second, third = random_sequences([at, 20, 25, 3])
    cache = cache_for(model)
    parent = cache.allocate()
    continue_cache(model, cache, {parent: prompt})
    child, other = cache.fork(parent), cache.fork(parent)
    assert int(cache.lengths[child]) == at
    rows: dict[int, list[Tensor]] = {parent: [], child: [], other: []}
    tails = {parent: first, child: second, other: third}
    for step in range(25):
        pieces = {slot: tail[step : step + 1] for slot, tail in tails.items() if step < len(tail)}
        for slot, out in continue_cache(model, cache, pieces).items():
            rows[slot].append(out)
    for slot, tail in tails.items():
        alone = separate_logits(model, [prompt + tail])[0][at:]
        assert_close("logits", torch.cat(rows[slot]), alone, EXACT)


def test_freed_slot_starts_clean_and_leaves_the_others(model: HybridForCausalLM):
    prompt, tail, fresh = random_sequences([20, 20, 30])
    cache = cache_for(model, slots=2)
    parent = cache.allocate()
    continue_cache(model, cache, {parent: prompt})
    child = cache.fork(parent)
    cache.free(parent)
    again = cache.allocate()
    assert int(cache.lengths[again]) == 0
    out = continue_cache(model, cache, {again: fresh, child: tail})
    assert_close("fresh", out[again], separate_logits(model, [fresh])[0], EXACT)
    assert_close("kept", out[child], separate_logits(model, [prompt + tail])[0][20:], EXACT)


def test_pages_come_back_when_slots_are_freed(model: HybridForCausalLM):
    cache = cache_for(model, slots=3, pages=5)
    for _ in range(4):
        slot = cache.allocate()
        continue_cache(model, cache, {slot: random_sequences([60])[0]})
        fork = cache.fork(slot)
        continue_cache(model, cache, {fork: [5]})
        cache.free(slot)
        cache.free(fork)


def test_cache_says_when_it_is_full(model: HybridForCausalLM):
    cache = cache_for(model, slots=1, pages=2)
    slot = cache.allocate()
    with pytest.raises((RuntimeError, ValueError), match="num_slots"):
        cache.allocate()
    with pytest.raises((RuntimeError, ValueError), match="num_pages"):
        continue_cache(model, cache, {slot: random_sequences([33])[0]})


# transformers' generate


def greedy(model: HybridForCausalLM, **arguments: object) -> Tensor:
    return model.generate(
        **arguments,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )


def test_generate_on_a_left_padded_batch_equals_one_by_one(model: HybridForCausalLM):
    sequences = random_sequences([3, 70, 17, 1])
    tokens, mask = padded(sequences, left=True)
    batch = greedy(model, input_ids=tokens, attention_mask=mask)
    for i, sequence in enumerate(sequences):
        alone = greedy(model, input_ids=torch.tensor([sequence]))
        new = alone.sequences[0, len(sequence) :]
        assert batch.sequences[i, tokens.shape[1] :].tolist() == new.tolist()
        for step, logits in enumerate(alone.logits):
            assert_close(f"logits of step {step}", batch.logits[step][i], logits[0], EXACT)


def test_generate_equals_the_full_forward(model: HybridForCausalLM):
    (sequence,) = random_sequences([20])
    out = greedy(model, input_ids=torch.tensor([sequence]))
    full = model(input_ids=out.sequences).logits[0, 19:-1]
    assert_close("logits", torch.stack([row[0] for row in out.logits]), full, EXACT)
    assert full.argmax(-1).tolist() == out.sequences[0, 20:].tolist()


def test_sampled_logits_of_a_left_padded_batch_are_those_of_the_full_forward(
    model: HybridForCausalLM,
):
    sequences = random_sequences([3, 30])
    tokens, mask = padded(sequences, left=True)
    torch.manual_seed(3)
    out = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=9,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6
    for i, row in enumerate(out.sequences):
        prompt = sequences[i // 3]
        real = torch.cat((torch.tensor(prompt), row[30:]))
        full = model(input_ids=real[None]).logits[0, len(prompt) - 1 : -1]
        got = torch.stack([step[i] for step in out.logits])
        assert_close("logits", got, full, EXACT)


def test_beam_search_with_a_cache_equals_beam_search_without(model: HybridForCausalLM):
    tokens, mask = padded(random_sequences([3, 11]), left=True)
    arguments = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=tokens, attention_mask=mask, use_cache=True, **arguments)
    plain = model.generate(input_ids=tokens, attention_mask=mask, use_cache=False, **arguments)
    assert cached.tolist() == plain.tolist()


def test_generate_leaves_no_state_behind(model: HybridForCausalLM):
    tokens = torch.tensor(random_sequences([12]))
    first = greedy(model, input_ids=tokens).sequences
    greedy(model, input_ids=torch.tensor(random_sequences([25], seed=4)))
    assert greedy(model, input_ids=tokens).sequences.tolist() == first.tolist()


# Memory for time


def test_gradient_checkpointing_changes_nothing():
    model, sequences = build().train(), random_sequences([30, 1, 66])
    plain_loss = summed_logprobs(model, sequences)
    plain_loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss = summed_logprobs(model, sequences)
    loss.backward()
    assert_close("loss", loss, plain_loss, EXACT)
    for name, value in gradients(model).items():
        assert_close(f"gradient of {name}", value, plain[name], EXACT)
