"""What stage 2 will need in memory, by arithmetic, before any weight is loaded.

    python memory.py [--paper] [NAME=value ...]   the plan of 02 with these constants, and no run

Input: the models' configs and tokenizers (a few kB each) and 02's constants. 02 prints this plan
before it loads anything; on CUDA it stops where the plan does not fit, unless MEMORY_CHECK=false.

A row is something that needs memory and when: "always", or in a phase of a step (attack, reply,
judge, learn, collect). The peak is what is always there and the phase that needs most. Turns are
taken as long as the constants let them become, so a run of short turns stays below its plan. Not
counted: the CUDA context (about 0.5 GB) and what the allocator leaves unused; on a CPU, where the
libraries, scratch and freed blocks that the C library keeps come to more, the sum is multiplied by
what was measured. GB are 2^30 bytes, as in the step line.
"""
import dataclasses
import importlib
import sys
import types
from typing import NamedTuple

import psutil  # accelerate brings it
import torch

import judge
import optim
import policy
import stage
from stage import ROOT, die

GB = 2 ** 30
NF4 = 0.5 + 4 / 64  # bytes of a packed weight: 4 bits, and a float32 scale for each block of 64
LOGITS = 8          # bytes of a logit of a chunk, besides itself: two float32
ON_CPU = 1.5        # 02 with its defaults on 2 cores, 100 steps: 9.9 GB measured, 6.7 by the rows
DRAW = 20           # bytes of a logit when a token is drawn, besides itself: 3 float32, 1 float64


class Row(NamedTuple):
    """One line of the plan; how: the arithmetic in words."""
    phase: str
    name: str
    bytes: int
    how: str


@dataclasses.dataclass(frozen=True)
class Shape:
    """What counts of a model. weights: parameters, tied ones once; packed: those that NF4 packs (of
    linear layers, not of the head); inner: width of the feed-forward layer."""
    weights: int
    packed: int
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def shape(config):
    """A transformers config -> Shape. The parameters are counted on a model without storage."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    packed = sum(m.weight.numel() for m in model.modules()
                 if isinstance(m, torch.nn.Linear) and m is not head)
    heads = config.num_attention_heads
    return Shape(sum(p.numel() for p in model.parameters()), packed, config.num_hidden_layers,
                 config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size),
                 heads, getattr(config, "num_key_value_heads", None) or heads,
                 getattr(config, "head_dim", None) or config.hidden_size // heads,
                 head.weight.shape[0])


# ---- the arithmetic ------------------------------------------------------------------------------

def kv_bytes(s, size):
    """Keys and values of one position in all layers; size: bytes of a number."""
    return 2 * s.layers * s.kv_heads * s.head_dim * size


def pass_bytes(s, size):
    """What one position needs in a forward pass without gradients: a layer's feed-forward part."""
    return (3 * s.inner + 2 * s.hidden) * size


def activation_bytes(s, size, row, eager):
    """What autograd keeps of one position, without checkpointing, in a row of `row` positions.

    Norms keep their input in float32, the normalized one, and their output; attention keeps query,
    key and value (one for each query head) and its output, and the cache keys and values; the
    feed-forward part keeps four inner widths. Eager attention keeps the probabilities of all heads
    in float32 and in `size`, the fused kernels keep the mask.
    """
    norm = (4 + 2 * size) * s.hidden
    scores = s.heads * row * (4 if size == 4 else 4 + size) if eager else row * size + 4 * s.heads
    layer = (2 * norm + 4 * s.heads * s.head_dim * size + 4 * s.inner * size + scores)
    return s.layers * layer + norm + kv_bytes(s, size)


def weight_bytes(s, size, nf4):
    """A frozen model: packed by NF4 or as it is."""
    return int(NF4 * s.packed) + (s.weights - s.packed) * size if nf4 else s.weights * size


def plan(model, judges, size, optimizer, turns, train_tokens, judge_tokens, eager, trained=None):
    """What a step needs -> list of Row. From shapes and numbers alone.

    model: Shape of policy and reference; size: bytes of a number of theirs. judges: (Shape, bytes
    of a number, NF4?) of each frozen judge. turns: {"attack" | "reply": (rows sampled at a time,
    prompt tokens, new tokens)}. train_tokens, judge_tokens: of a batch, padding included. trained:
    parameters that learn (None: all; for LoRA, which is not here yet).
    """
    s, n, chunk = model, trained or model.weights, policy.LOGPROB_CHUNK
    kept = optim.BYTES[optimizer, size]
    rows = [Row("always", "policy", s.weights * size, f"{s.weights:,} weights x {size} bytes"),
            Row("always", "reference", s.weights * size, "the same, frozen"),
            Row("always", f"optimizer {optimizer}", n * kept, f"{n:,} weights x {kept} bytes")]
    for j, j_size, nf4 in judges:
        rows += [Row("always", "judge", weight_bytes(j, j_size, nf4), f"{j.weights:,} weights"
                     + (f", {j.packed:,} of them in NF4" if nf4 else f" x {j_size} bytes"))]
        work = judge_tokens * (kv_bytes(j, j_size) + pass_bytes(j, j_size))
        rows += [Row("judge", "cache and one pass", work, f"{judge_tokens:,} tokens")]
    for name, (count, prompt, new) in turns.items():
        rows += [Row(name, "key/value cache", count * (prompt + new) * kv_bytes(s, size),
                     f"{count} rows x ({prompt} + {new} tokens) x {kv_bytes(s, size):,} bytes"),
                 Row(name, "one pass", max(count * prompt * pass_bytes(s, size),
                                           count * s.vocab * (DRAW + size)),
                     "the prompts' forward pass without what they share, at most, or drawing")]
    longest = max(prompt + new for _, prompt, new in turns.values())
    each, tokens = activation_bytes(s, size, longest, eager), max(train_tokens, longest)
    rows += [Row("learn", "activations", tokens * each, f"{tokens:,} tokens x {each:,} bytes, "
                 f"{'eager' if eager else 'fused'} attention, no checkpointing"),
             Row("learn", "logits", min(chunk, tokens) * s.vocab * (LOGITS + size),
                 f"{min(chunk, tokens)} tokens x {s.vocab:,} words x {LOGITS + size} bytes"),
             Row("learn", "gradient of the head", s.vocab * s.hidden * size,
                 f"{s.vocab:,} words x {s.hidden:,} x {size} bytes")]
    # float32 sums take the gradients after each micro-batch; else they stay while others are made
    return rows + [Row("collect" if optimizer == "master" else "learn", "gradients", n * size,
                       f"{n:,} weights x {size} bytes")]


def peak(rows):
    """Rows -> (bytes at the peak, its phase): what is always there and the largest phase."""
    phases = {}
    for r in rows:
        phases[r.phase] = phases.get(r.phase, 0) + r.bytes
    always = phases.pop("always", 0)
    phase = max(phases, key=phases.get)
    return always + phases[phase], phase


def changes(constants, need, free):
    """What to change so that need({NAME: value}) bytes <= free -> ({NAME: value}, bytes then).

    In this order, each only if it saves 2 %: smaller micro-batches and fewer rows at a time (time
    only; the update is the same), the smaller optimizer, the judge in NF4.
    """
    now, bytes_now = {}, need({})
    while bytes_now > free:
        at = {**constants, **now}
        shorter = {"TRAIN_TOKENS": max(16, at["TRAIN_TOKENS"] // 2)}
        fewer = {"SAMPLE_BATCH": max(1, min(at["SAMPLE_BATCH"], at["SEEDS_PER_STEP"]) // 2)}
        steps = [shorter, fewer, shorter | fewer, {"OPTIMIZER": "kahan"}, {"QUANTIZE": "nf4"}]
        better = next((s for s in steps if need({**now, **s}) < 0.98 * bytes_now), None)
        if better is None:
            break
        now |= better
        bytes_now = need(now)
    return now, bytes_now


# ---- from 02's constants -------------------------------------------------------------------------

def free_bytes():
    """(free bytes, where): of the first CUDA device, else of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return psutil.virtual_memory().available, "the CPU"


def at_hand(name, part, make=lambda x: x):
    """make(AutoConfig or AutoTokenizer of a model by its name in 02), or None where it cannot be
    had: no such folder, no network, a model that the arithmetic does not know."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    embedded = name == policy.EMBEDDED or judge.adapter_of(name)
    path = policy.unpack_embedded() if embedded else name
    try:
        return make(getattr(transformers, part).from_pretrained(path))
    except (OSError, ValueError, AttributeError):
        return None


def longest_turns(c, tok, seeds):
    """c: 02's constants -> {"attack" | "reply": (rows, prompt tokens, new tokens)}: the longest
    seeds, and every attack and (SSP) shown reply as long as it may be."""
    by_length = sorted(seeds, key=lambda s: len(s["prompt"]))
    some = [s for h in (True, False) for s in [x for x in by_length if x["harmful"] is h][-4:]]
    request = max(len(tok(s["prompt"], add_special_tokens=False).input_ids) for s in some)
    attacked = round(c.ATTACKED * c.SEEDS_PER_STEP)
    request = max(request, c.ATTACK_TOKENS if attacked else 0)
    prompt = len(policy.defender_prompt(tok, "", c.COT)) + request
    if c.METHOD == "ssp" and c.REPLAY == "reflect":
        prompt = len(policy.defender_prompt(tok, "", c.COT, "")) + request + c.REPLY_TOKENS
    out = {"reply": (min(c.SAMPLE_BATCH, c.SEEDS_PER_STEP), prompt, c.REPLY_TOKENS)}
    if attacked:
        out["attack"] = (min(c.SAMPLE_BATCH, attacked),
                         max(len(policy.attacker_prompt(tok, s, c.COT)) for s in some),
                         c.ATTACK_TOKENS)
    return out


def judge_shapes(c, shapes):
    """The judges of 02's constants as (Shape, bytes of a number, NF4?); judge.load_judge decides
    the same."""
    size = policy.pick_dtype("auto").itemsize
    nf4 = c.QUANTIZE == "nf4" or (c.QUANTIZE == "auto" and torch.cuda.is_available())
    return [(shapes[name], size, nf4 and not judge.adapter_of(name)) for name in judge_names(c)]


def judge_names(c):
    """The models that judge: JUDGE, and with SSP the one that rates, where it is named."""
    return [c.JUDGE] + [c.RUBRIC_JUDGE] * (c.METHOD == "ssp" and bool(c.RUBRIC_JUDGE))


def check(scope, source, seeds):
    """Print the plan of 02 (scope: its globals(); source: its model's folder or id) against what is
    free. On CUDA a plan that does not fit stops the run, unless MEMORY_CHECK is off."""
    constants, cuda = stage.constants(scope), torch.cuda.is_available()
    names = [source, *judge_names(types.SimpleNamespace(**constants))]
    shapes = {n: at_hand(n, "AutoConfig", shape) for n in names}
    tok = at_hand(source, "AutoTokenizer")
    missing = [n for n in shapes if shapes[n] is None or (n == source and tok is None)]
    if missing:
        print(f"memory: not planned, no config of {', '.join(map(stage.short, missing))} at hand")
        return
    size = policy.pick_dtype(constants["DTYPE"]).itemsize

    def planned(changed):
        c = types.SimpleNamespace(**{**constants, **changed})
        return plan(shapes[source], judge_shapes(c, shapes), size, c.OPTIMIZER,
                    longest_turns(c, tok, seeds), c.TRAIN_TOKENS, judge.JUDGE_TOKENS, not cuda)

    def need_of(changed):
        return peak(planned(changed))[0] * (1.0 if cuda else ON_CPU)

    rows, need, (free, where) = planned({}), need_of({}), free_bytes()
    for r in rows:
        print(f"  {r.phase:8s}{r.name:22s}{r.bytes / GB:8.2f} GB  {r.how}")
    print(f"memory: {need / GB:.1f} GB at the peak (always + {peak(rows)[1]}"
          + ("" if cuda else f", x {ON_CPU} on a CPU") + f"), {free / GB:.1f} GB free on {where}")
    if need <= free:
        return
    change, then = changes(constants, need_of, free)
    words = " ".join(f"{k}={v}" for k, v in change.items())
    advice = f"give {words} ({then / GB:.1f} GB)" if change else "its constants are small already"
    if then > free:
        advice += "; and shorter ATTACK_TOKENS and REPLY_TOKENS, a smaller MODEL or a larger device"
    if cuda and constants["MEMORY_CHECK"]:
        die(f"will not fit ({need / GB:.1f} GB of {free / GB:.1f} GB free): {advice}; or "
            "MEMORY_CHECK=false to try it as it is")
    print(f"WARNING: will not fit: {advice}")


def main(argv):
    """The plan of 02 with the constants of the command line."""
    rl = importlib.import_module("02_selfplay_rl")
    stage.configure(vars(rl), argv)
    rl.MEMORY_CHECK = False  # a plan that does not fit is what was asked for
    source = str(ROOT / rl.MODEL) if (ROOT / rl.MODEL).is_dir() else rl.MODEL
    check(vars(rl), source, stage.load_seeds(rl.SEEDS, "train"))


if __name__ == "__main__":
    main(sys.argv[1:])
