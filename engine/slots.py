"""Sampling in slots: rows of any length stand side by side, each at its own position of static
storage, and a slot whose row has ended takes the next prompt. So no straggler holds a batch. On
CUDA one token of all slots is one captured graph: the device does not wait for Python's launches.

S slots, M positions of a slot, b slots in use; the other letters are those of sampling.py."""
import contextlib
import functools

import torch

from engine import progress
from engine.attention import register
from engine.batching import micro_batches, pad, shared_opening

FREE = 0.85  # of the free device memory that keys and values may take; the rest is for a pass


def slots_that_fit(model, length, most):
    """How many slots of `length` positions fit into the device's free memory: 1 to `most`."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(model.device)[0] * FREE
    _, heads, width = key_value_shape(model.config)
    each = 2 * model.config.num_hidden_layers * length * heads * width * model.dtype.itemsize
    return max(1, min(most, int(free / each)))


def key_value_shape(config):
    """A config -> (query heads, heads of keys and values, their width)."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def flash_works(device, dtype, config):
    """Does torch's flash attention work here, and agree with masked()? Else masked() is used."""
    if torch.device(device).type != "cuda" or dtype == torch.float32:
        return False
    heads, kv_heads, width = key_value_shape(config)
    q = torch.randn(2, heads, width, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, 8, kv_heads, width, device=device, dtype=dtype)
    used = torch.tensor([3, 8], device=device)
    try:
        got = varlen(q, k, v, used, width ** -0.5, None)
    except (ImportError, RuntimeError, TypeError, ValueError) as problem:
        progress.say(f"rollouts without flash attention: {str(problem).splitlines()[0][:80]}")
        return False
    want = masked(q, k, v, used, width ** -0.5, None)
    if (got - want).abs().max() > 16 * torch.finfo(dtype).eps * want.abs().max():
        progress.say("rollouts without flash attention: it differs from the plain one")
        return False
    return True


def varlen(q_bHD, k_bMKD, v_bMKD, used_b, scale, window):
    """Flash attention of one query a row over its first `used` positions, read in place.
    This is the operator beneath varlen_attn, which has no seqused_k in torch 2.11."""
    b, M = k_bMKD.shape[:2]
    start = torch.arange(b + 1, dtype=torch.int32, device=q_bHD.device)
    return torch.ops.aten._flash_attention_forward(
        q_bHD.contiguous(), k_bMKD.flatten(0, 1), v_bMKD.flatten(0, 1), start, start * M, 1, M,
        0.0, False, False, scale=scale, seqused_k=used_b.int(),
        window_size_left=window - 1 if window else -1, window_size_right=0 if window else -1)[0]


def masked(q_bHD, k_bMKD, v_bMKD, used_b, scale, window):
    """The same by a mask over all positions. The query heads of a group are folded together."""
    b, M, K, D = k_bMKD.shape
    at_M, end_b1 = torch.arange(M, device=q_bHD.device), used_b[:, None]
    seen_bM = at_M < end_b1
    if window:
        seen_bM &= at_M >= end_b1 - window
    out = torch.nn.functional.scaled_dot_product_attention(
        q_bHD.view(b, K, -1, D), k_bMKD.transpose(1, 2), v_bMKD.transpose(1, 2),
        attn_mask=seen_bM[:, None, None], scale=scale)
    return out.reshape(b, -1, D)


class Slots:
    """S slots of M positions. All that a token step reads or writes lies in tensors that stay."""
    side = None  # a CUDA stream for all of them: cuBLAS keeps memory for each

    def __init__(self, model, stop_ids, S, M, max_new, pick):
        """pick: (logits_bV, uniform_b) -> (token_b, logp_b)."""
        device, config = model.device, model.config
        _, heads, width = key_value_shape(config)
        self.model, self.S, self.T, self.pick = model, S, max_new, pick
        self.keys, self.values, self.reach = [], [], M
        zeros = functools.partial(torch.zeros, dtype=torch.long, device=device)
        for _ in range(config.num_hidden_layers):
            for store in (self.keys, self.values):
                store.append(zeros(S, M, heads, width, dtype=model.dtype))
        self.token, self.at, self.count = zeros(S), zeros(S), zeros(S)  # at: position of the token
        self.done = zeros(S, dtype=torch.bool) | True
        self.uniform_ST = zeros(S, max_new, dtype=torch.float64)
        self.token_ST, self.logp_ST = zeros(S, max_new), zeros(S, max_new, dtype=torch.float32)
        self.logits = zeros(S, model.get_output_embeddings().weight.shape[0], dtype=model.dtype)
        self.stops = torch.tensor(sorted(stop_ids), device=device)
        self.row = torch.arange(S, device=device)
        self.as_is = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # 4D: passed through
        self.attention = varlen if flash_works(device, model.dtype, config) else masked
        graphs = device.type == "cuda" and not hasattr(model, "no_graphs")
        self.graphs, self.pool = ({} if graphs else None), None

    def state(self):
        """The tensors that a token step changes, but for keys and values."""
        return (self.token, self.at, self.count, self.done, self.token_ST, self.logp_ST)

    def restore(self, state):
        """Put back what state() gave."""
        for tensor, kept in zip(self.state(), state):
            tensor.copy_(kept)

    def attend(self, module, query, key, value, mask, scaling=None, sliding_window=None, **_):
        """What transformers calls in a token step: query [b, H, 1, D], key, value [b, K, 1, D]."""
        b, layer, reach = query.shape[0], module.layer_idx, self.reach
        keys, values = self.keys[layer][:b], self.values[layer][:b]
        keys[self.row[:b], self.at[:b]] = key[:, :, 0]
        values[self.row[:b], self.at[:b]] = value[:, :, 0]
        out = self.attention(query[:, :, 0], keys[:, :reach], values[:, :reach], self.at[:b] + 1,
                             scaling, sliding_window)
        return out[:, None], None

    def step(self, b):
        """One token for the slots [0, b). Nothing here waits for the device."""
        hidden = self.model.base_model(
            input_ids=self.token[:b, None], position_ids=self.at[:b, None],
            attention_mask=self.as_is, use_cache=False).last_hidden_state[:, -1]
        self.take(self.row[:b], self.model.get_output_embeddings()(hidden), ~self.done[:b], 1)

    def take(self, rows, logits, live, moved):
        """Draw a token from the logits for those of the rows that live."""
        self.logits[:len(rows)] = logits
        n = self.count[rows].clamp(max=self.T - 1)
        token, logp = self.pick(logits, self.uniform_ST[rows, n])
        self.token_ST[rows, n] = torch.where(live, token, self.token_ST[rows, n])
        self.logp_ST[rows, n] = torch.where(live, logp, self.logp_ST[rows, n])
        self.token[rows] = torch.where(live, token, self.token[rows])
        self.count[rows] += live.long()
        self.at[rows] += moved * live.long()
        # not isin(), which sorts and waits where there are many stop ids
        self.done[rows] |= (token[:, None] == self.stops).any(1) | (self.count[rows] >= self.T)

    def admit(self, rows, prompts, uniform_BT, prefill):
        """Put prompts into the slots `rows` and draw their first tokens. prefill: sampling.py."""
        rows = torch.tensor(rows, device=self.row.device)
        shared, cache = shared_opening(self.model, prompts)
        ids_BP, rest_B = pad([p[shared:] for p in prompts], self.row.device)
        hidden_BD = prefill(self.model, ids_BP, rest_B, cache)
        for store, new in ((self.keys, "keys"), (self.values, "values")):
            for layer, kept in zip(cache.layers, store):
                text = getattr(layer, new).transpose(1, 2)
                kept[rows, :text.shape[1]] = text
        self.uniform_ST[rows] = uniform_BT.to(self.row.device)
        self.count[rows], self.done[rows], self.at[rows] = 0, False, shared + rest_B
        live = torch.ones_like(rows, dtype=torch.bool)
        self.take(rows, self.model.get_output_embeddings()(hidden_BD), live, 0)

    def compact(self, held):
        """Move the rows of the slots `held` to the front -> {old slot: new slot} of those moved."""
        holes = [r for r in range(len(held)) if r not in held]
        moved = dict(zip([r for r in held if r >= len(held)], holes))
        if moved:
            source, target = list(moved), list(moved.values())
            for x in (*self.keys, *self.values, self.uniform_ST, *self.state()):
                x[target] = x[source]
            self.done[source] = True
        return moved

    def run(self, b, steps):
        """`steps` tokens for the slots [0, b)."""
        if self.graphs is not None and b not in self.graphs:
            self.graphs[b] = None
            try:
                self.graphs[b] = self.capture(b)
            except RuntimeError as problem:
                progress.say(f"rollouts without CUDA graphs: {str(problem).splitlines()[0][:80]}")
                self.graphs, self.model.no_graphs = None, True
                with contextlib.suppress(Exception):  # torch 2.11 leaves its pool open
                    torch._C._cuda_endAllocateToPool(self.row.device.index, self.pool)
        graph = self.graphs and self.graphs[b]
        for _ in range(steps):
            if graph:
                graph.replay()
            else:
                self.step(b)

    def capture(self, b):
        """A CUDA graph of step(b), whose logits agree with those of the step itself."""
        before = [x.clone() for x in self.state()]
        side = Slots.side = Slots.side or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels now, not while it captures
            self.step(b)
            self.step(b)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.stream(torch.cuda.current_stream())  # back to it if the capture fails
        with here, torch.cuda.graph(graph, pool=self.pool):
            self.step(b)
        self.restore(before)
        self.step(b)
        want, live = self.logits[:b].float().clone(), ~before[3][:b]
        self.restore(before)
        graph.replay()
        apart = ((self.logits[:b].float() - want).abs() * live[:, None]).max()
        self.restore(before)
        if not apart <= 16 * torch.finfo(self.model.dtype).eps * want.abs().max():  # or it is nan
            raise RuntimeError(f"the graph's logits differ from the step's by {apart:.2g}")
        return graph


def complete(model, tok, prompts, uniform_NT, slots, every, pick, prefill, prefill_tokens, bar):
    """Token ids of prompts, in the order of uniform_NT's rows -> list of (ids, logps). slots: how
    many at most; on CUDA no more than fit. every: tokens between two looks at which rows have
    ended. pick, prefill: as in sampling.py, which hands them over."""
    max_new, device = uniform_NT.shape[1], model.device
    M = max(map(len, prompts)) + max_new
    if device.type == "cuda":
        slots = slots_that_fit(model, M, min(slots, len(prompts)))
    s = Slots(model, tok.stop_ids, min(slots, len(prompts)), M, max_new, pick)
    register("slots", s.attend, lambda *args, **kwargs: None)  # it gets no mask
    before = model.config._attn_implementation
    # held: {slot: its prompt}
    waiting, held, out = list(range(len(prompts))), {}, [None] * len(prompts)
    try:
        while waiting or held:
            free = [r for r in range(s.S) if r not in held]
            if waiting and len(free) >= min(len(waiting), max(1, s.S // 8)):
                taken = waiting[:len(free)]
                del waiting[:len(free)]
                model.set_attn_implementation(before)
                for part in micro_batches([len(prompts[i]) for i in taken], prefill_tokens):
                    some = [taken[k] for k in part]
                    rows = [free.pop(0) for _ in some]
                    s.admit(rows, [prompts[i] for i in some], uniform_NT[some], prefill)
                    held.update(zip(rows, some))
                model.set_attn_implementation("slots")
            else:
                b = s.S
                if not waiting:
                    moved = s.compact(list(held))
                    held = {moved.get(r, r): i for r, i in held.items()}
                    b = len(held)
                    if s.graphs is not None:  # a graph for each power of two
                        b = min(s.S, 1 << (b - 1).bit_length())
                if device.type == "cpu":
                    s.reach = int(s.at[:b].max()) + 1
                s.run(b, every)
            count, done = s.count.tolist(), s.done.tolist()
            ended = [r for r in held if done[r]]
            tokens, logps = s.token_ST[ended].tolist(), s.logp_ST[ended].tolist()
            for r, ids, logp in zip(ended, tokens, logps):
                n = count[r]
                out[held.pop(r)] = (ids[:n], logp[:n])
                bar.update(n)
                bar.total -= max_new - n  # tokens that were not needed
    finally:
        model.set_attn_implementation(before)
        register("slots", None, None)  # else the library would hold keys, values and model
    return out
