"""What is not honoured is refused, in one line that says what to do."""

from __future__ import annotations

import pytest
import torch

from model import DecodeCache, HybridForCausalLM, Packed
from tests.model.setting import random_sequences, shared_model

TOKENS = torch.tensor([[3, 4, 5, 6, 7]])
RESTARTS = torch.tensor([[0, 1, 2, 0, 1]])


@pytest.fixture
def lm() -> HybridForCausalLM:
    return shared_model(torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 5, 6]])}, r"position_ids\[0, 3\] = 5 neither"),
        (
            {"position_ids": RESTARTS, "attention_mask": torch.ones_like(TOKENS)},
            "position_ids restart inside an attention_mask run",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, "row 0 has 2 runs of 1"),
        ({"attention_mask": torch.zeros_like(TOKENS)}, "attention_mask is all 0"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask has 4 dimensions, expected 2"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask \(1, 4\) for input_ids \(1, 5\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask \(2, 5\) for input_ids \(1, 5\)"),
        ({"attention_mask": torch.ones(1, 7)}, r"speaks of \[2\] tokens before .* no cache"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q runs from 0 to 3, expected"),
        ({"cu_seq_lens_q": torch.tensor([1, 5])}, "cu_seq_lens_q runs from 1 to 5, expected"),
        ({"cu_seq_lens_q": torch.tensor([5])}, "cu_seq_lens_q runs from 5 to 5, expected"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 2, 5])}, "must not fall"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "position_ids": RESTARTS},
            "position_ids do not restart at 0 at the borders of cu_seq_lens_q",
        ),
        (
            {
                "cu_seq_lens_q": torch.tensor([0, 2, 5]),
                "attention_mask": torch.tensor([[0, 1, 1, 1, 1]]),
            },
            "cu_seq_lens_q with a padded attention_mask",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "use_cache": True},
            "cu_seq_lens_q with a cache",
        ),
        (
            {
                "cu_seq_lens_q": torch.tensor([0, 2, 5]),
                "cu_seq_lens_k": torch.tensor([0, 3, 5]),
            },
            "cu_seq_lens_k differs from cu_seq_lens_q",
        ),
        ({"cu_seq_lens_k": torch.tensor([0, 3, 5])}, "cu_seq_lens_k differs from cu_seq_lens_q"),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1]])}, "seq_idx without position_ids"),
        ({"output_attentions": True}, "are not computed; leave them out"),
        ({"output_hidden_states": True}, "are not computed; leave them out"),
        ({"return_dict": False}, "are not computed; leave them out"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "exactly one of packed, input_ids"),
        ({"packed": Packed.from_sequences([[3]])}, "exactly one of packed, input_ids"),
        ({"position_ids": RESTARTS, "use_cache": True}, "but the cache continues at 0"),
        ({"targets": TOKENS[0]}, "targets, temperature and with_entropy belong to packed"),
        ({"temperature": 0.5}, "targets, temperature and with_entropy belong to packed"),
        ({"with_entropy": True}, "targets, temperature and with_entropy belong to packed"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_call_that_cannot_be_honoured_is_refused(
    lm: HybridForCausalLM, arguments: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        lm(input_ids=TOKENS, **arguments)


def test_call_without_tokens_is_refused(lm: HybridForCausalLM):
    with pytest.raises(ValueError, match="exactly one of"):
        lm()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        lm.model()


@pytest.mark.parametrize("name", ["input_ids", "labels", "attention_mask"])
def test_packed_call_takes_nothing_of_the_padded_form(lm: HybridForCausalLM, name: str):
    with pytest.raises(ValueError, match=r"exactly one of packed|belong to the\s+padded form"):
        lm(packed=Packed.from_sequences([[3, 4, 5, 6, 7]]), **{name: TOKENS})


def test_mask_that_contradicts_the_cache_is_refused(lm: HybridForCausalLM):
    past = lm(input_ids=TOKENS, use_cache=True).past_key_values
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"speaks of \[4\] tokens .* holds \[5\]"):
        lm(input_ids=TOKENS[:, :1], attention_mask=mask, past_key_values=past)
    with pytest.raises(ValueError, match="position_ids start at 4, but the cache continues at 5"):
        lm(
            input_ids=TOKENS[:, :1],
            attention_mask=torch.ones(1, 6),
            position_ids=torch.tensor([[4]]),
            past_key_values=past,
        )


def test_packed_positions_that_do_not_follow_the_slot_are_refused(lm: HybridForCausalLM):
    cache = DecodeCache(lm.config, num_slots=1, num_pages=2)
    slot = cache.allocate()
    lm.model.run(Packed.from_sequences([[3, 4]]), cache=cache, slots=(slot,))
    with pytest.raises(ValueError, match=r"begin at \[0\], but slots \(0,\) hold \[2\]"):
        lm.model.run(Packed.from_sequences([[5]]), cache=cache, slots=(slot,))


def test_slots_that_do_not_match_the_sequences_are_refused(lm: HybridForCausalLM):
    cache = DecodeCache(lm.config, num_slots=2, num_pages=2)
    with pytest.raises(ValueError, match=r"slots = \(0, 0\) for 2 sequences"):
        lm.model.run(Packed.from_sequences([[3], [4]]), cache=cache, slots=(0, 0))
    with pytest.raises(ValueError, match=r"slots = \(0,\) for 2 sequences"):
        lm.model.run(Packed.from_sequences([[3], [4]]), cache=cache, slots=(0,))


def test_slot_that_is_not_allocated_is_refused(lm: HybridForCausalLM):
    cache = DecodeCache(lm.config, num_slots=2, num_pages=2)
    slot = cache.allocate()
    cache.free(slot)
    for use in (
        cache.free,
        cache.fork,
        lambda slot: cache.begin((slot,), Packed.from_sequences([[3]])),
    ):
        with pytest.raises(ValueError, match=f"slot {slot} is not allocated"):
            use(slot)
    with pytest.raises(ValueError, match="slot 2 is not allocated"):
        cache.free(2)


def test_cache_cannot_be_cropped(lm: HybridForCausalLM):
    with pytest.raises(RuntimeError, match="cannot crop 2 tokens: a lightning state cannot forget"):
        lm.model.new_cache(1).crop(2)


def test_full_cache_moves_nothing(lm: HybridForCausalLM):
    cache = DecodeCache(lm.config, num_slots=2, num_pages=2, page_tokens=16)
    first, second = cache.allocate(), cache.allocate()
    packed = Packed.from_sequences(random_sequences([16, 17]))
    with pytest.raises(RuntimeError, match="need 3 pages of 16 tokens, 2 of 2 are free"):
        lm.model.run(packed, cache=cache, slots=(first, second))
    assert cache.num_free_pages == 2
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 4], [0, 1], (3,)), r"Packed\.lengths = \(3,\) must be >= 1 each and sum to T = 2"),
        (([3, 4], [0, 1], (2, 0)), r"Packed\.lengths = \(2, 0\) must be >= 1"),
        (([3, 4], [0], (2,)), "must both be"),
    ],
)
def test_packed_that_does_not_add_up_is_refused(arguments: tuple, message: str):
    tokens, positions, lengths = arguments
    with pytest.raises(ValueError, match=message):
        Packed(torch.tensor(tokens), torch.tensor(positions), lengths)
