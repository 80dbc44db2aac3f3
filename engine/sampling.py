"""Sampling: exact draws from the policy that is differentiated; a token is one write to the cache.

Shapes, named once for all files: B turns, T completion tokens of a turn, P prompt tokens of a turn,
V vocabulary, D hidden size, N = sum of T over a batch's turns (completions laid end to end)."""
import torch

from engine import library, parallel, progress, shards, slots
from engine.attention import register
from engine.batching import chunks, pad, shared_opening

# Tokens between two looks at which rows have ended: on a GPU each look waits for the device.
LOOK_EVERY = dict(cpu=1, cuda=8)
PREFILL_TOKENS = dict(cpu=16384, cuda=4096)  # of prompts in one pass, padding included


def _kv_cache(model, capacity):
    """A key/value cache with room for `capacity` positions: a token costs one write, not a copy."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Room(DynamicLayer):
        def update(self, k, v, *args, **kwargs):  # k, v [B, heads, new, head_dim]
            if not self.is_initialized:
                self.lazy_initialization(k, v)
                self.all_keys = k.new_zeros(*k.shape[:2], capacity, k.shape[3])
                self.all_values = v.new_zeros(*v.shape[:2], capacity, v.shape[3])
                self.used = 0
            end = self.used + k.shape[2]
            self.all_keys[:, :, self.used:end] = k
            self.all_values[:, :, self.used:end] = v
            self.used = end
            return self._used_part()

        def _used_part(self):
            self.keys = self.all_keys[:, :, :self.used]
            self.values = self.all_values[:, :, :self.used]
            return self.keys, self.values

        def batch_select_indices(self, rows):
            self.all_keys, self.all_values = self.all_keys[rows], self.all_values[rows]
            self._used_part()

        def batch_repeat_interleave(self, repeats):
            self.batch_select_indices([0] * repeats)

    return Cache(layers=[Room() for _ in range(model.config.num_hidden_layers)])


def _grouped_attention():
    """Register "grouped" attention. For one new token it folds the query heads of a group into the
    query length: keys and values are read in place, not repeated for each query head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def grouped(module, query, key, value, attention_mask, scaling=None, **kwargs):
        B, H, L, D = query.shape
        if L > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask,
                                          scaling=scaling, **kwargs)
        out = torch.nn.functional.scaled_dot_product_attention(
            query.view(B, key.shape[1], -1, D), key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(B, 1, H, D), None

    return register("grouped", grouped, sdpa_mask)


def nucleus(logits_BV, temperature, top_p):
    """Logits of the smallest set of most probable words whose probability at `temperature` reaches
    top_p (arXiv 1904.09751), -inf for all others. The most probable word always stays."""
    p_BV, word_BV = (logits_BV.float() / (temperature or 1.0)).softmax(-1).sort(-1, descending=True)
    late_BV = p_BV.cumsum(-1, dtype=torch.float64) - p_BV >= top_p  # reached before this word
    return logits_BV.masked_fill(late_BV.scatter(1, word_BV, late_BV), -torch.inf)


def draw(logits_BV, temperature, uniform_B):
    """Exact draw from softmax(logits / temperature) by inverse distribution -> (token_B, logp_B).
    One uniform number a row, float64: float32 has steps of 6e-8, so rarer words would be drawn
    too often or never. No top-k or top-p. temperature 0 is greedy, with logp_B at 1."""
    logp_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), -1)
    if temperature == 0:
        token_B = logp_BV.argmax(-1)
    else:
        cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
        token_B = torch.searchsorted(cdf_BV, (uniform_B.double() * cdf_BV[:, -1])[:, None],
                                     right=True)[:, 0]
        token_B = token_B.clamp_(max=logits_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


def prefill(model, ids_BP, length_B, cache):
    """Prompts through the model, in pieces of PREFILL_TOKENS, into the cache -> hidden_BD, the
    state at each prompt's last token. The padding stands to the right: it needs no mask."""
    B, P = ids_BP.shape
    row, out = torch.arange(B, device=ids_BP.device), None
    width = max(1, PREFILL_TOKENS.get(ids_BP.device.type, 4096) // B)
    for start in range(0, P, width):
        hidden = model.base_model(input_ids=ids_BP[:, start:start + width], past_key_values=cache,
                                  use_cache=True).last_hidden_state
        at_B = length_B - 1 - start
        inside_B = (at_B >= 0) & (at_B < hidden.shape[1])
        here_BD = hidden[row, at_B.clamp(0, hidden.shape[1] - 1)]
        out = here_BD if out is None else torch.where(inside_B[:, None], here_BD, out)
    return out


def choose_rollout(rollout, device):
    """"auto" -> the way that is fastest on a device, else the way that is asked for."""
    if rollout != "auto":
        return rollout
    return "slots" if torch.device(device).type == "cuda" else "plain"


@torch.no_grad()
def sample(model, tok, prompts, max_new, temperature, batch, generator=None, top_p=1.0,
           rollout="plain"):
    """Sample one completion for each prompt (token ids) -> list of (ids, logps) in the same order.
    Exactly the policy that is differentiated: softmax at `temperature` over the whole vocabulary,
    whatever the model's generation_config says. A completion ends with its first stop id or after
    `max_new` tokens. top_p in (0, 1]: under 1, draws and logps are those of nucleus(). That is for
    making training examples only, never for the game: token_logprobs knows the whole distribution.
    rollout: "plain" takes `batch` rows at a time, by length; rows that have ended leave the batch.
    "slots" (engine/slots.py) puts the next prompt in their place. Both draw the same numbers for a
    prompt. "library": transformers' continuous batching. "auto": see choose_rollout(). Several
    processes share the prompts (engine/parallel.py); each gets all completions."""
    assert 0 < top_p <= 1, top_p
    with shards.whole(model):
        return _sample(model, tok, prompts, max_new, temperature, batch, generator, top_p,
                       choose_rollout(rollout, model.device))


def _sample(model, tok, prompts, max_new, temperature, batch, generator, top_p, rollout):
    """sample() of a model that is whole, by the way that was chosen."""
    before, training = model.config._attn_implementation, model.training
    if before in ("sdpa", "eager", "folded") and rollout != "library":
        model.set_attn_implementation(_grouped_attention())

    def pick(logits_BV, uniform_B):
        if top_p < 1:
            logits_BV = nucleus(logits_BV, temperature, top_p)
        return draw(logits_BV, temperature, uniform_B)

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # processes share whole batches, so that a row's rounding is that of one process
    rows = 1 if rollout != "plain" else min(batch, -(-len(order) // parallel.number_of()))
    parts = chunks(range(len(order)), max(1, rows))
    parts = parallel.share(parts, [len(prompts[i]) + max_new for i in order])
    share = [k for part in parts for k in part]
    some, pairs = [prompts[order[k]] for k in share], []
    # a number of their own for each prompt and token, whoever completes it
    uniform_NT = torch.rand(len(prompts), max_new, generator=generator, dtype=torch.float64)[share]
    try:
        model.eval()  # gradient checkpointing would drop the cache
        with progress.bar(len(some) * max_new, "sampling", "token") as bar:
            if not some:
                pass
            elif rollout == "slots":
                where = model.device.type
                every, most = LOOK_EVERY.get(where, 8), PREFILL_TOKENS.get(where, 4096)
                pairs = slots.complete(model, tok, some, uniform_NT, batch, every, pick, prefill,
                                       most, bar)
            elif rollout == "library":
                pairs = library.complete(model, tok, some, max_new, temperature, batch,
                                         top_p, generator)
            else:
                for part, uniform_BT in zip(parts, uniform_NT.split(list(map(len, parts)))):
                    rows = [prompts[order[k]] for k in part]
                    pairs += _decode(model, tok, rows, uniform_BT, pick, bar)
    finally:
        model.train(training).set_attn_implementation(before)
    found = parallel.gather({order[k]: pair for k, pair in zip(share, pairs)})
    return [found[i] for i in range(len(prompts))]


def _step_mask(config, mask_BL):
    """attention_mask of one new token a row, over mask_BL, the key positions that hold text. As it
    is without a sliding window or where that is longer; else made here, 4D and boolean, because the
    library's window would count the padding. One mask for each type of layer where they differ."""
    window = getattr(config, "sliding_window", None)
    if not window or mask_BL.shape[1] <= window:  # 2D, the library asks a GPU whether all is text
        return mask_BL if mask_BL.device.type == "cpu" else mask_BL.bool()[:, None, None]
    full = mask_BL.bool()[:, None, None]
    near = full & (mask_BL.flip(1).cumsum(1).flip(1) <= window)[:, None, None]
    if not getattr(config, "layer_types", None):  # all layers slide: Mistral, Phi-3
        return near
    return dict(full_attention=full, sliding_attention=near)


def _decode(model, tok, prompts, uniform_BT, pick, bar):
    """One batch of `sample`. uniform_BT: the numbers that draw its tokens, bar: counts them."""
    where, (B, max_new) = model.device, uniform_BT.shape
    uniform_BT = uniform_BT.to(where)
    length_B = torch.tensor(list(map(len, prompts)), device=where)
    P = max(map(len, prompts))
    shared, cache = shared_opening(model, prompts, _kv_cache(model, P + max_new))
    ids_BP, rest_B = pad([p[shared:] for p in prompts], where)
    base, head = model.base_model, model.get_output_embeddings()
    row_of = torch.arange(B, device=where)  # the row of the batch that each live row came from
    logits_BV = head(prefill(model, ids_BP, rest_B, cache))
    mask = torch.ones(B, P + max_new, dtype=torch.long, device=where)
    mask[:, :P] = torch.arange(P, device=where) < length_B[:, None]
    stops = torch.tensor(sorted(tok.stop_ids), device=where)
    token_BT = torch.zeros_like(uniform_BT, dtype=torch.long)
    logp_BT = torch.zeros_like(uniform_BT, dtype=torch.float32)
    count_B = torch.full((B,), max_new, device=where)
    done, alive = torch.zeros(B, dtype=torch.bool, device=where), B
    for t in range(max_new):
        token, logp = pick(logits_BV, uniform_BT[row_of, t])
        token_BT[row_of, t], logp_BT[row_of, t] = token, logp
        ended = torch.isin(token, stops) & ~done
        count_B[row_of] = torch.where(ended, t + 1, count_B[row_of])
        done = done | ended
        live = alive
        if (t + 1) % LOOK_EVERY.get(where.type, 8) == 0 or t + 1 == max_new:
            live = int((~done).sum())
        bar.update(alive)
        bar.total -= (alive - live) * (max_new - t - 1)  # tokens that will not be needed
        alive = live
        if live == 0 or t + 1 == max_new:
            break
        if live <= 0.9 * len(done):
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            row_of, mask, token = row_of[keep], mask[keep], token[keep]
            length_B, done = length_B[keep], done[keep]
        hidden = base(input_ids=token[:, None], past_key_values=cache, use_cache=True,
                      attention_mask=_step_mask(model.config, mask[:, :P + t + 1]),
                      position_ids=(length_B + t)[:, None]).last_hidden_state
        logits_BV = head(hidden[:, -1])
    return [(token_BT[b, :n].tolist(), logp_BT[b, :n].tolist())
            for b, n in enumerate(count_B.tolist())]
