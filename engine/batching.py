"""Batches of token lists: padding, shared openings, micro-batches."""
import os

import torch

from engine import shards


def pad(rows, where):
    """Rows of ids -> (right-padded ids_BL, length_B). Masks come from lengths: any id can pad."""
    length_B = torch.tensor(list(map(len, rows)))
    ids_BL = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    return ids_BL.to(where), length_B.to(where)


def common_prefix(rows):
    """Length of the common opening of B token lists, at least one token short of the shortest."""
    return min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)


def shared_opening(model, rows, cache=None):
    """What B token lists open with goes through the model once -> (its length, its key/value cache
    expanded to B rows). Differentiable: the gradients of all rows meet in the one pass. Length 0,
    with an empty cache, under gradient checkpointing, where transformers drops every cache, and of
    a sharded model, whose layers are put together once a pass."""
    from transformers import DynamicCache
    cache = DynamicCache() if cache is None else cache
    dropped = model.training and model.is_gradient_checkpointing or shards.is_sharded(model)
    shared = 0 if dropped else common_prefix(rows)
    if shared:
        opening = torch.tensor([rows[0][:shared]], device=model.device)
        model.base_model(input_ids=opening, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    return shared, cache


def micro_batches(lengths, max_tokens):
    """Indices sorted by length, cut into lists of padded size (rows x longest) <= `max_tokens`."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def chunks(items, size):
    """A list in pieces of `size`, the last one shorter."""
    return [items[k:k + size] for k in range(0, len(items), size)]


def evenly(items, n):
    """At most n of the items, evenly spaced; n = 0 means all."""
    if not 0 < n < len(items):
        return items
    return [items[k * len(items) // n] for k in range(n)]
