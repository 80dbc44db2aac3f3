"""engine/batching.py: padding, shared openings, micro-batches, and lists in pieces; by hand."""
import copy

import pytest
import torch
from engine_tools import ragged_prompts
from helpers import KINDS

from engine import batching


def test_pad():
    ids, length = batching.pad([[5, 6, 7], [8], [9, 4]], "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert length.tolist() == [3, 1, 2]
    assert ids.dtype == length.dtype == torch.long


# ---- what rows open with -------------------------------------------------------------------------

@pytest.mark.parametrize("rows, want", [
    ([[1, 2, 3], [1, 2, 4]], 2),
    ([[1, 2, 3], [9, 2, 3]], 0),
    ([[1, 2, 3]], 2),                          # one token is left of each row
    ([[1, 2, 3], [1, 2, 3]], 2),
    ([[1, 2], [1, 2, 3, 4]], 1),
    ([[1, 5, 9], [1, 5, 2], [1, 4, 9]], 1),    # the middle one in order of words decides nothing
    ([[7], [7, 1]], 0)])
def test_common_prefix(rows, want):
    assert batching.common_prefix(rows) == want
    assert batching.common_prefix(rows[::-1]) == want


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_opening_is_computed_once_and_is_differentiable(loaded, kind):
    """The rest of the rows on its cache gives what whole rows give: hidden states and gradients."""
    model, tok = loaded[kind]
    opening = ragged_prompts(tok, 1)[0]
    rows = [opening + rest for rest in ([11, 12, 13], [14, 15, 16])]
    seen = []
    handle = model.base_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    shared, cache = batching.shared_opening(model, rows)
    rest = torch.tensor([row[shared:] for row in rows])
    hidden = model.base_model(input_ids=rest, past_key_values=cache,
                              use_cache=True).last_hidden_state
    handle.remove()
    assert shared == len(opening) and seen == [(1, len(opening)), (2, 3)]
    want = model.base_model(input_ids=torch.tensor(rows)).last_hidden_state[:, shared:]
    torch.testing.assert_close(hidden, want, rtol=0, atol=2e-5)
    weights = list(model.base_model.parameters())
    some = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((hidden * some).sum(), weights)
    plain = torch.autograd.grad((want * some).sum(), weights)
    for a, b in zip(ours, plain):
        assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 0


def test_rows_that_share_nothing_make_no_pass(loaded):
    shared, cache = batching.shared_opening(loaded["llama"][0], [[5, 6], [7, 6]])
    assert shared == 0 and cache.get_seq_length() == 0


def test_gradient_checkpointing_shares_nothing(loaded):
    """transformers drops every cache while it checkpoints: in training mode alone."""
    model = copy.deepcopy(loaded["llama"][0])
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    rows = [[5, 6, 7], [5, 6, 8]]
    assert batching.shared_opening(model, rows)[0] == 2
    shared, cache = batching.shared_opening(model.train(), rows)
    assert shared == 0 and cache.get_seq_length() == 0


# ---- micro-batches -------------------------------------------------------------------------------

def test_micro_batches():
    # 2 x 2 <= 6; 3 x 3 > 6; 2 x 5 > 6
    assert batching.micro_batches([3, 1, 2, 5], 6) == [[1, 2], [0], [3]]
    assert batching.micro_batches([9, 2, 2], 4) == [[1, 2], [0]]  # over the limit: alone
    assert batching.micro_batches([], 4) == []
    g = torch.Generator().manual_seed(0)
    for limit in (1, 50, 200, 10 ** 6):
        lengths = torch.randint(1, 90, (57,), generator=g).tolist()
        batches = batching.micro_batches(lengths, limit)
        assert sorted(i for b in batches for i in b) == list(range(57))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= limit for b in batches)


# ---- lists ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, size, want", [
    (5, 2, [[0, 1], [2, 3], [4]]), (4, 2, [[0, 1], [2, 3]]), (2, 9, [[0, 1]]), (0, 3, [])])
def test_chunks(n, size, want):
    assert batching.chunks(list(range(n)), size) == want


@pytest.mark.parametrize("length, n, want", [
    (10, 4, [0, 2, 5, 7]),             # 0, 10 / 4, 20 / 4, 30 / 4
    (7, 3, [0, 2, 4]), (5, 1, [0]), (5, 4, [0, 1, 2, 3]),
    (5, 0, [0, 1, 2, 3, 4]), (5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (0, 3, [])])
def test_evenly(length, n, want):
    assert batching.evenly(list(range(length)), n) == want
