"""transformers' `generate`: batches padded on the left equal each prompt alone."""

from __future__ import annotations

import torch
from torch import Tensor

from model import HybridForCausalLM
from tests.helpers import assert_close
from tests.model.setting import (
    EXACT,
    padded,
    random_sequences,
)


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
