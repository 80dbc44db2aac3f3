"""What a self-play run will need in memory, by arithmetic, before any weight is loaded.

02_selfplay_rl.py hands over shapes of models, lengths of turns and sizes of batches. A row of the
plan is something that needs memory, and when: "always", or in a phase of a step (attack, reply,
judge, reference, learn, collect). Turns count as long as the constants let them become. Not
counted: the CUDA context (about 0.5 GB) and what the allocator leaves unused. On a CPU, libraries
and freed blocks come to more: there the sum is multiplied by a measured factor. GB: 2^30 bytes."""
from collections import namedtuple

import psutil  # accelerate brings it
import torch

from engine.logprobs import LOGPROB_CHUNK
from engine.optim import BYTES
from engine.run import die
from engine.sampling import PREFILL_TOKENS
from engine.slots import key_value_shape

GB = 2 ** 30
NF4 = 0.5 + 4 / 64  # bytes of a packed weight: 4 bits, and a float32 scale for each block of 64
LOGITS = 8          # bytes of a logit of a chunk, besides itself: two float32
ON_CPU = 1.5        # 02 with all weights on 2 cores, 100 steps: 9.9 GB measured, 6.7 by the rows
DRAW = 20           # bytes of a logit when a token is drawn, besides itself: 3 float32, 1 float64
Row = namedtuple("Row", "phase name bytes how")  # of the plan; how: the arithmetic in words
# What counts of a model. weights: parameters, tied ones once; packed: those that NF4 packs (of
# linear layers, not of the head); ports: inputs and outputs of those layers, which is what an
# adapter of rank 1 has; inner: width of the feed-forward layer.
Shape = namedtuple("Shape", "weights packed ports layers hidden inner heads kv_heads head_dim "
                   "vocab")


def shape(config):
    """A transformers config -> Shape. The parameters are counted on a model without storage."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    packed = ports = 0
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m is not head:
            packed += m.weight.numel()
            ports += m.in_features + m.out_features
    weights, hidden = sum(p.numel() for p in model.parameters()), config.hidden_size
    return Shape(weights, packed, ports, config.num_hidden_layers, hidden,
                 getattr(config, "intermediate_size", 4 * hidden), *key_value_shape(config),
                 head.weight.shape[0])


def kv_bytes(s, size):
    """Keys and values of one position in all layers; size: bytes of a number."""
    return 2 * s.layers * s.kv_heads * s.head_dim * size


def pass_bytes(s, size):
    """What one position needs in a forward pass without gradients: a layer's feed-forward part."""
    return (3 * s.inner + 2 * s.hidden) * size


def activation_bytes(s, size, row, eager, rank=0, checkpointing=False):
    """What autograd keeps of one position in a row of `row`; rank: of an adapter, 0: none. Norms:
    input in float32, normalized, output. Attention: query, key, value (fused: one for each query
    head), output, cache; if eager, all probabilities in float32 and `size`, else the mask.
    Feed-forward part: four inner widths. Adapter: what its seven first matrices give.
    checkpointing: the input of each layer, and all of one layer at a time."""
    norm = (4 + (1 if rank else 2) * size) * s.hidden  # for its own weight, if that learns
    scores = s.heads * row * (4 if size == 4 else 4 + size) if eager else row * size + 4 * s.heads
    heads = 2 * s.heads + 2 * (s.kv_heads if eager else s.heads)  # engine/attention.py; fused
    layer = 2 * norm + heads * s.head_dim * size + 4 * s.inner * size + scores
    layer += 7 * rank * size if rank else 0
    if checkpointing:
        return s.layers * s.hidden * size + layer + norm
    return s.layers * layer + norm + kv_bytes(s, size)


def weight_bytes(s, size, nf4):
    """(bytes, the arithmetic) of a model's weights; nf4: those of linear layers are in NF4."""
    if nf4:
        need = int(NF4 * s.packed) + (s.weights - s.packed) * size
        return need, f"{s.weights:,} weights, {s.packed:,} of them in NF4"
    return s.weights * size, f"{s.weights:,} weights x {size} bytes"


def plan(model, judges, size, optimizer, turns, train_tokens, judge_tokens, eager, rank=0,
         nf4=False, checkpointing=False, players=1, reference="resident", shares=1):
    """What a step needs -> list of Row. model: Shape of policy and reference; size: bytes of one of
    their numbers. judges: (Shape, bytes of a number, NF4?) of each. turns: {"attack" | "reply":
    (rows sampled at a time, prompt tokens, new tokens)}. train_tokens, judge_tokens: of a batch,
    padding included. rank: of an adapter that learns; 0: all weights do. nf4: are the policy's
    other weights in NF4? checkpointing: as in activation_bytes(). players: adapters that learn.
    reference: "resident", or "cpu": on the device while it scores. shares: processes that all
    weights, gradients and the optimizer are spread over (FSDP); a model that samples is whole."""
    s, n, kept = model, players * rank * model.ports or model.weights, BYTES[optimizer, size]
    frozen = Row("always" if reference == "resident" else "reference", "reference",
                 s.weights * size, "the same, frozen")
    if rank:
        frozen = Row("always", "adapters", (n + rank * s.ports) * size,
                     f"{players + 1} of {rank * s.ports:,} weights x {size} bytes: those that "
                     "learn and, at most, the reference's")
    rows = [Row("always", "policy", *weight_bytes(s, size, nf4)), frozen,
            Row("always", f"optimizer {optimizer}", n * kept, f"{n:,} weights x {kept} bytes")]
    for j, j_size, packed in judges:
        work = judge_tokens * (kv_bytes(j, j_size) + pass_bytes(j, j_size))
        rows += [Row("always", "judge", *weight_bytes(j, j_size, packed)),
                 Row("judge", "cache and one pass", work, f"{judge_tokens:,} tokens")]
    for name, (count, prompt, new) in turns.items():
        rows += [Row(name, "key/value cache", count * (prompt + new) * kv_bytes(s, size),
                     f"{count} rows x ({prompt} + {new} tokens) x {kv_bytes(s, size):,} bytes"),
                 Row(name, "one pass", max(
                     min(count * prompt, max(count, PREFILL_TOKENS["cpu" if eager else "cuda"]))
                     * (pass_bytes(s, size) + kv_bytes(s, size) * (not eager)),  # slots copy it
                     count * s.vocab * (DRAW + size)),
                     "the prompts' forward pass without what they share, at most, or drawing")]
    longest = max(prompt + new for _, prompt, new in turns.values())
    each = activation_bytes(s, size, longest, eager, rank, checkpointing)
    tokens = max(train_tokens, longest)
    chunk, head = min(LOGPROB_CHUNK, tokens), 4 if size == 4 else 4 + size
    if reference == "cpu" and not rank:
        rows.append(Row("reference", "one pass", tokens * pass_bytes(s, size)
                        + chunk * s.vocab * (LOGITS + size), f"{tokens:,} tokens and logits"))
    rows += [Row("learn", "activations", tokens * each, f"{tokens:,} tokens x {each:,} bytes, "
                 f"{'folded' if eager else 'fused'} attention, "
                 f"{'' if checkpointing else 'no '}checkpointing"),
             Row("learn", "logits", chunk * s.vocab * (LOGITS + size),
                 f"{chunk} tokens x {s.vocab:,} words x {LOGITS + size} bytes")]
    if not rank:
        rows.append(Row("learn", "gradient of the head", s.vocab * s.hidden * head,
                        f"{s.vocab:,} words x {s.hidden:,} x {head} bytes, summed in float32"))
    # float32 sums take the gradients after each micro-batch; else they stay while others are made
    rows.append(Row("collect" if optimizer == "master" else "learn", "gradients", n * size,
                    f"{n:,} weights x {size} bytes"))
    return rows if shares == 1 else one_share(rows, s, size, shares)


def one_share(rows, s, size, shares):
    """The rows of a plan for one of `shares` processes that share all weights by FSDP. Judges stay
    whole. A pass that learns has the outermost part and two layers as a whole, with gradients."""
    out, rest = [], s.weights * size * (shares - 1) // shares
    for r in rows:
        if r.name in ("policy", "reference", "gradients") or r.name.startswith("optimizer"):
            r = r._replace(bytes=r.bytes // shares, how=f"{r.how}, of {shares} shares one")
        out.append(r)
    for phase in ("attack", "reply"):
        if phase in [r.phase for r in rows]:
            out.append(Row(phase, "the model as a whole", rest, f"the other {shares - 1} shares"))
    layer = (s.weights - s.vocab * s.hidden) // s.layers
    part = 2 * size * (s.vocab * s.hidden + 2 * layer)
    return out + [Row("reference", "the model as a whole", rest, f"the other {shares - 1} shares"),
                  Row("learn", "parts as a whole", part, "head, embedding and two layers, with "
                      "their gradients")]


def peak(rows):
    """Rows -> (bytes at the peak, its phase): what is always there and the largest phase."""
    phases = {}
    for r in rows:
        phases[r.phase] = phases.get(r.phase, 0) + r.bytes
    always = phases.pop("always", 0)
    phase = max(phases, key=phases.get)
    return always + phases[phase], phase


def free_bytes():
    """(free bytes, where): of the first CUDA device, else of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return psutil.virtual_memory().available, "the CPU"


def needed(rows, gpu):
    """Rows -> (bytes at the peak, its phase), on a CPU with what comes on top."""
    need, phase = peak(rows)
    return need * (1.0 if gpu else ON_CPU), phase


def print_plan(rows, stop, free, where, gpu):
    """Print a plan against the `free` bytes of `where`. stop: end the run where it does not fit."""
    need, phase = needed(rows, gpu)
    for r in rows:
        print(f"  {r.phase:10s}{r.name:22s}{r.bytes / GB:8.2f} GB  {r.how}")
    times = "" if gpu else f", x {ON_CPU} on a CPU"
    print(f"memory: {need / GB:.1f} GB at the peak (always + {phase}{times}), "
          f"{free / GB:.1f} GB free on {where}")
    advice = ("give a smaller TRAIN_TOKENS and SAMPLE_BATCH (slower, the same update), "
              "LORA_RANK=16 where all weights learn, CHECKPOINTING=on, BASE_QUANT=nf4, "
              "QUANTIZE=nf4, shorter turns, or a smaller MODEL")
    if need > free and stop:
        die(f"will not fit ({need / GB:.1f} GB of {free / GB:.1f} GB free): {advice}; or "
            "MEMORY_CHECK=false to try it as it is")
    if need > free:
        print(f"WARNING: will not fit: {advice}")
