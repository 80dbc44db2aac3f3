"""Does everything work on this GPU, how fast, and in how much memory? In nine minutes at most.

    python bench/gpu.py                     the checks, then a step of the 3B and the 7B shape
    python bench/gpu.py SHAPES=3B MINUTES=4
    python bench/gpu.py SHAPES=tiny         a minute; also on a CPU, where it proves less

No weights are needed: models have random ones, in the published shapes. Checks: each prints one
line with what it measured; one that fails is said, and the others go on. A step: the recipes'
LoRA of rank 32 on bfloat16 weights (SHAPES=7B-nf4: on NF4), a judge of WildGuard's shape in NF4,
ROWS replies and half as many attacks of TOKENS tokens, UPDATES updates with checkpointing, as in
--gpu80. What would not end in time or not fit is cut in tokens and rows, and said; "whole" is what
the uncut step would take at the measured rates. The floor of a token step is its bytes over the
card's bandwidth (engine/cost.py).

The checks and each shape run in a process of their own, so that one that hangs or breaks the device
costs its own time alone. Each adds what it knows, phase by phase, to
results/reference/gpu_<card>.json (on a CPU: results/runs/gpu_cpu.json)."""
import copy
import dataclasses
import functools
import gc
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from engine import adapters, cost, memory, models, progress, run, sampling, slots  # noqa: E402
from engine.logprobs import token_logprobs  # noqa: E402
from engine.optim import OPTIMIZERS  # noqa: E402
from engine.run import die  # noqa: E402
from selfplay.turns import Turn  # noqa: E402

# ==================================================================================================
SHAPES = "3B,7B"          # of these: tiny, 0.5B, 1.5B, 3B, 7B, 8B; with -nf4: weights in NF4
MINUTES = 9.0             # for everything
ROWS = 128                # replies of a step; attacks: half as many
TOKENS = 2048             # of a turn
PROMPT = 300              # tokens of a prompt
RANK = 32                 # of the adapter
TRAIN_TOKENS = 16384      # of a micro-batch of what learns
UPDATES = 6               # optimizer steps of a step
PART = ""                 # "checks" or one of SHAPES: that alone, in this process
SEED = 0                  # of weights and prompts
# ==================================================================================================
# layers, hidden, inner, heads, heads of keys and values, vocabulary, tied head
CONFIGS = {"tiny": (2, 128, 256, 4, 2, 512, True), "0.5B": (24, 896, 4864, 14, 2, 151936, True),
           "1.5B": (28, 1536, 8960, 12, 2, 151936, True),
           "3B": (36, 2048, 11008, 16, 2, 151936, True),
           "7B": (28, 3584, 18944, 28, 4, 152064, False),
           "8B": (32, 4096, 14336, 32, 8, 128256, False)}
RESULTS = run.ROOT / "results"
JUDGE = (32, 4096, 14336, 32, 8, 32000, False)  # Mistral 7B, as WildGuard is
NO_STOP = types.SimpleNamespace(stop_ids={-1})   # every turn has its full length


def make_model(values, dtype=torch.bfloat16, nf4=False):
    """A Qwen2 of a shape with random weights on the device; nf4: its linear layers packed."""
    import transformers
    layers, hidden, inner, heads, kv_heads, words, tied = values
    config = transformers.Qwen2Config(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=32768)
    torch.manual_seed(SEED)
    with torch.device(models.device()):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa")
    if nf4:
        pack(model)
    return model.eval().requires_grad_(False)


def pack(model):
    """Replace the linear layers of a model, but for its head, by bitsandbytes' in NF4."""
    import bitsandbytes as bnb
    device, head = models.device(), model.get_output_embeddings()
    parents = [m for m in model.modules() if not isinstance(m, torch.nn.Linear)]
    for parent in parents:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and layer is not head:
                # on meta: it would else draw weights that nobody needs
                new = bnb.nn.Linear4bit(layer.in_features, layer.out_features,
                                        layer.bias is not None, compute_dtype=torch.bfloat16,
                                        quant_type="nf4", device="meta")
                new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False,
                                               quant_type="nf4", compress_statistics=False)
                new.bias = layer.bias
                new.support_avx512bf16_for_cpu = False
                setattr(parent, name, new.to(device))


def random_prompts(model, count, length):
    """Prompts (token ids) that open alike, as a system prompt makes them."""
    words, generator = model.config.vocab_size, torch.Generator().manual_seed(SEED)
    rows = torch.randint(5, words, (count, length), generator=generator)
    rows[:, :length // 2] = rows[0, :length // 2]
    return rows.tolist()


def gap(model, prompts, pairs):
    """Mean and largest difference between the log-probabilities of sampling and of training."""
    with torch.no_grad():
        logp_N, _ = token_logprobs(model, prompts, [ids for ids, _ in pairs])
    sampled_N = torch.tensor([x for _, logps in pairs for x in logps], device=logp_N.device)
    apart = (logp_N - sampled_N).abs()
    return apart.mean().item(), apart.max().item()


def require(true, what):
    if not true:
        raise AssertionError(what)


# ---- checks: each returns what it measured, or raises --------------------------------------------

def check_attention():
    """Torch's flash attention with grouped heads, alone and in a CUDA graph, against float64."""
    device, worst = models.device(), {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    way = slots.varlen if device.type == "cuda" else slots.masked
    for heads, kv_heads, width in ((28, 4, 128), (16, 2, 128), (9, 3, 64)):
        q = torch.randn(6, heads, width, device=device, dtype=dtype)
        k, v = torch.randn(2, 6, 700, kv_heads, width, device=device, dtype=dtype)
        used = torch.tensor([1, 5, 64, 333, 699, 700], device=device)
        want = slots.masked(q.double(), k.double(), v.double(), used, width ** -0.5, None)
        apart = (way(q, k, v, used, width ** -0.5, None) - want).abs().max().item()
        if device.type == "cuda":
            graph, other = torch.cuda.CUDAGraph(), used.flip(0).contiguous()
            with torch.cuda.graph(graph):
                out = way(q, k, v, used, width ** -0.5, None)
            used.copy_(other)
            graph.replay()
            want = slots.masked(q.double(), k.double(), v.double(), used, width ** -0.5, None)
            apart = max(apart, (out - want).abs().max().item())
        worst[f"{heads}/{kv_heads}/{width}"] = apart
    require(max(worst.values()) < 0.02, worst)
    return worst


def check_rollouts():
    """Slots with graphs, slots without, the plain way and the library: the same distribution as in
    training; slots and the plain way draw the same numbers: in float32 nearly all tokens agree.
    Rows end at different times, so slots are filled again beside others that go on, and when fewer
    are left, there is another graph."""
    model, out, captured = make_model(CONFIGS["tiny"], torch.float32), {}, []
    tok = types.SimpleNamespace(stop_ids=set(range(0, model.config.vocab_size, 25)))
    prompts, real = random_prompts(model, 24, 40), slots.Slots.capture

    def capture(s, b):
        graph = real(s, b)
        captured.append(b)
        return graph

    def without(s, b):
        raise RuntimeError("switched off by the benchmark")

    want = None
    for name, way, instead in (("plain", "plain", capture), ("slots", "slots", capture),
                               ("slots without graphs", "slots", without),
                               ("library", "library", capture)):
        with mock.patch.object(slots.Slots, "capture", instead):
            pairs = sampling.sample(model, tok, prompts, 64, 1.0, 8,
                                    torch.Generator().manual_seed(SEED), rollout=way)
        mean, most = gap(model, prompts, pairs)
        want = want or pairs
        equal = sum(a[0] == b[0] for a, b in zip(want, pairs)) / len(pairs)
        out[name] = dict(mean_gap=mean, largest_gap=most, rows_as_plain=equal)
        require(most < 1e-3, out)
    out["graphs"], lengths = len(captured), {len(ids) for ids, _ in want}
    require(len(lengths) > 5, f"rows end together: {lengths}")
    require(out["slots"]["rows_as_plain"] > 0.9, out)
    require(len(captured) > 1 or models.device().type == "cpu", f"{len(captured)} CUDA graphs")
    return out


def check_nf4():
    """A packed model says what the same weights say after they were unpacked."""
    import bitsandbytes.functional as bnb
    packed = make_model(CONFIGS["tiny"], nf4=True)
    plain = make_model(CONFIGS["tiny"])
    for name, layer in packed.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    ids = torch.tensor(random_prompts(plain, 4, 50), device=models.device())
    with torch.no_grad():
        a, b = packed(input_ids=ids).logits.float(), plain(input_ids=ids).logits.float()
    apart = ((a - b).abs().max() / b.abs().max()).item()
    require(apart < 0.03, apart)
    return dict(relative=apart)


def gradients(model, prompts, completions):
    """Log-probabilities of completions, and the gradients of their sum in one vector."""
    model.zero_grad()
    logp_N, _ = token_logprobs(model, prompts, completions)
    logp_N.sum().backward()
    grads = []
    for p in model.parameters():
        if p.requires_grad:
            grads.append(p.grad.float().flatten())
    return logp_N.detach(), torch.cat(grads)


def check_checkpointing(nf4=False):
    """Gradient checkpointing with an adapter, over weights in bfloat16 or in NF4."""
    model = make_model(CONFIGS["tiny"], nf4=nf4)
    adapters.choose_weights(model, 8, 16, SEED)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    prompts = random_prompts(model, 6, 30)
    want, grads = gradients(model, prompts, [p[:20] for p in prompts])
    models.checkpoint_gradients(model)
    got, others = gradients(model, prompts, [p[:20] for p in prompts])
    out = dict(logps=(got - want).abs().max().item(),
               cosine=torch.nn.functional.cosine_similarity(grads, others, dim=0).item())
    require(out["logps"] < 0.1 and out["cosine"] > 0.999, out)
    return out


def updates(model, optimizer, first, last):
    """Updates on made-up gradients that do not depend on the device."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.collect()
        optimizer.step(1e-3, 1.0)


def check_optimizers():
    """Five updates on the device and on the CPU; and 3 + 2 updates by way of the saved state."""
    out = {}
    for name, make in OPTIMIZERS.items():
        here = make_model(CONFIGS["tiny"]).requires_grad_(True)
        there, again = copy.deepcopy(here).to("cpu"), copy.deepcopy(here)
        first, second = make(here, (0.9, 0.95), 0.0), make(there, (0.9, 0.95), 0.0)
        updates(here, first, 0, 3)
        third = make(again, (0.9, 0.95), 0.0)
        third.restore({key: t.detach().cpu() for key, t in first.tensors().items()})
        updates(here, first, 3, 5)
        updates(again, third, 3, 5)
        updates(there, second, 0, 5)
        apart = resumed = 0.0
        for a, b, c in zip(here.parameters(), there.parameters(), again.parameters()):
            apart = max(apart, (a.cpu().float() - b.float()).abs().max().item())
            resumed = max(resumed, (a.float() - c.float()).abs().max().item())
        out[name] = dict(from_cpu=apart, resumed=resumed)
        require(apart < 2e-3 and resumed == 0.0, out)
    return out


CHECKS = dict(attention=check_attention, rollouts=check_rollouts, nf4=check_nf4,
              checkpointing=check_checkpointing,
              checkpointing_nf4=functools.partial(check_checkpointing, nf4=True),
              optimizers=check_optimizers)


# ---- a step --------------------------------------------------------------------------------------

def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed_rollout(model, rows, budget):
    """Sample `rows` turns, as many tokens as fit into the budget -> (pairs, dict)."""
    prompts = random_prompts(model, rows, PROMPT)
    generator = torch.Generator().manual_seed(SEED)

    def work(tokens):
        return sampling.sample(model, NO_STOP, prompts, tokens, 1.0, rows, generator,
                               rollout="auto")
    short = min(TOKENS, 16)
    work(short)  # kernels are loaded and chosen
    first = common.seconds(lambda: work(short))
    again = common.seconds(lambda: work(2 * short))
    each = max(again - first, 0.1 * first) / short
    tokens = max(short, min(TOKENS, int((budget - again) / each)))
    done = []
    spent = common.seconds(lambda: done.extend(work(tokens)))
    token_step = (spent - first) / (tokens - short) if tokens > 2 * short else each
    return prompts, done, dict(rows=rows, tokens=tokens, seconds=spent, token_step_s=token_step,
                               whole_s=spent + token_step * (TOKENS - tokens))


def time_step(name, card, budget, keep):
    """A step of a shape, by phase -> dict. budget: seconds. keep: called after each phase with what
    is known. A judge or an update that fails does not take the rollouts along."""
    began, nf4 = time.time(), name.endswith("-nf4")
    free()
    judge_of = CONFIGS["tiny"] if "tiny" in name else JUDGE
    judge = attempt(lambda: dict(model=make_model(judge_of, nf4=True)))
    ref = make_model(CONFIGS[name.removesuffix("-nf4")], nf4=nf4)
    model = adapters.twin(ref)
    adapters.choose_weights(model, RANK, 2 * RANK, SEED)
    resident = torch.cuda.memory_allocated() / 2 ** 30 if models.device().type == "cuda" else None
    out = dict(resident_gb=resident, load_s=time.time() - began)
    turns, shape = [], memory.shape(ref.config)
    for role, rows in (("attacker", ROWS // 2), ("defender", ROWS)):
        free()
        prompts, pairs, out[role] = timed_rollout(model, rows, 0.2 * budget)
        out[role]["peak_gb"] = run.peak_gb()
        if card:
            context = rows * (PROMPT + out[role]["tokens"] / 2) * memory.kv_bytes(shape, 2)
            read = memory.weight_bytes(shape, 2, nf4)[0]
            if not ref.config.tie_word_embeddings:  # of the embedding a row a token
                read -= 2 * shape.vocab * shape.hidden
            out[role]["floor_s"] = (read + context) / (card.bandwidth * 1e12)
        for prompt, (ids, logps) in zip(prompts, pairs):
            turns.append(Turn(role, "generated_harmful", {}, prompt, ids=ids, logps=logps,
                              reward=(-1.0) ** len(turns)))
        keep(out)
    free()
    out["judge"] = judge if "failed" in judge else attempt(time_judge, judge["model"])
    keep(out)
    free()
    out["learn"] = attempt(time_learning, model, ref, turns, budget - (time.time() - began))
    return out


def time_judge(judge):
    """A judge's pass over many tokens."""
    tokens = 8192 if models.device().type == "cuda" else 512
    ids = torch.tensor(random_prompts(judge, tokens // 256, 256), device=models.device())
    with torch.no_grad():
        spent = min(common.repeat(lambda: judge.base_model(input_ids=ids), 3))
    return dict(tokens=tokens, seconds=spent, peak_gb=run.peak_gb())


def time_learning(model, ref, turns, budget):
    """Reference and update by 02's learn(), on as many of the turns as end in the budget."""
    stage = common.stage("02_selfplay_rl.py", f"TRAIN_TOKENS={TRAIN_TOKENS}", "SFT_COEF=0",
                         f"UPDATES={UPDATES}")
    models.checkpoint_gradients(model)
    optimizer = OPTIMIZERS["master"](model, (0.9, 0.95), 0.0)

    metrics = {}

    def work(some):
        metrics.update(stage["learn"](model, ref, optimizer, some, [], 0))
    few = turns[:2] + turns[-2:]
    work(few)
    each = common.seconds(lambda: work(few)) / len(few)
    count = max(4, min(len(turns), int(0.8 * budget / each)))
    some = [turns[k * len(turns) // count] for k in range(count)]
    some = [dataclasses.replace(t, reward=(-1.0) ** k) for k, t in enumerate(some)]
    spent = common.seconds(lambda: work(some))
    tokens = sum(len(t.prompt_ids) + len(t.ids) for t in some)
    whole = len(turns) * (PROMPT + TOKENS)
    # kl: the adapter is new, so policy and reference are equal at first; gap: sampled against learnt
    return dict(turns=count, tokens=tokens, seconds=spent, tokens_a_second=tokens / spent,
                whole_s=whole * spent / tokens, peak_gb=run.peak_gb(), checkpointing=True,
                kl=metrics["kl"], gap=metrics["gap"])


def attempt(work, *args):
    """What work() returns, or {"failed": why}; with "said", what the engine printed meanwhile: that
    it goes without graphs or flash attention, for instance."""
    said = []
    with mock.patch.object(progress, "say", said.append):
        try:
            out = work(*args)
        except (Exception, SystemExit) as problem:  # a benchmark reports all of it, and goes on
            out = dict(failed=f"{type(problem).__name__}: {str(problem)[:300]}")
    return dict(out, said=said) if said else out


def main(argv):
    run.configure(globals(), argv)
    progress.enable(False)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as load_model() does
    names = SHAPES.split(",")
    for name in names:
        if name.removesuffix("-nf4") not in CONFIGS:
            die(f"SHAPES: {name!r} is none of {', '.join(CONFIGS)}")
    if PART not in ("", "checks", *names):
        die(f"PART={PART}: neither checks nor one of SHAPES")
    gpu = torch.cuda.is_available()
    label = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()) if gpu else "cpu"
    file = RESULTS / ("reference" if gpu else "runs") / f"gpu_{label}.json"
    if PART:
        do_part(file)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    common.head(f"random weights, seed {SEED}; at most {MINUTES} minutes")
    report = dict(meta=run.make_meta(globals(), ""), checks={}, steps={})
    run.write_text(file, json.dumps(report, indent=1))
    began, parts, failed = time.time(), ["checks", *names], []
    for k, part in enumerate(parts):
        left = 60 * MINUTES - (time.time() - began)
        each = left / (len(parts) - k)  # what a part leaves, the others get
        words = [*argv, f"PART={part}", f"MINUTES={each / 60:.2f}"]
        try:
            code = subprocess.run([sys.executable, __file__, *words], timeout=each).returncode
            why = "" if code in (0, 1) else f"ended with {code}"
        except subprocess.TimeoutExpired:
            why = f"cut after {each:.0f} s"
        report = run.read_json(file)
        if why:
            here = report if part == "checks" else report["steps"].setdefault(part, {})
            here["failed"] = why
        report["seconds"] = time.time() - began
        run.write_text(file, json.dumps(report, indent=1))
    failed = failures(report)
    print(f"wrote {run.short(file)}, {report['seconds']:.0f} s; "
          f"failed: {', '.join(failed) or 'nothing'}")
    sys.exit(bool(failed))


def do_part(file):
    """The checks, or a step of one shape: what it finds goes into the file at once."""
    began, found = time.time(), cost.find_card(memory.free_bytes()[1])
    report = run.read_json(file, checks=dict, steps=dict)

    def keep(part, name, result):
        report[part][name] = result
        run.write_text(file, json.dumps(report, indent=1))

    for name, check in CHECKS.items() if PART == "checks" else ():
        keep("checks", name, attempt(check))
        print(f"{name}: {json.dumps(report['checks'][name])}", flush=True)
    if PART != "checks":
        budget = 0.85 * 60 * MINUTES - (time.time() - began)  # the rest: imports, and what is late
        out = attempt(time_step, PART, found and found[1], budget,
                      lambda known: keep("steps", PART, known))
        keep("steps", PART, {**report["steps"].get(PART, {}), **out})
        print(f"{PART}: {json.dumps(report['steps'][PART])}", flush=True)


def failures(report):
    """Names of what failed, e.g. "nf4", "7B judge"."""
    out = ["checks"] if "failed" in report else []
    for name, found in {**report["checks"], **report["steps"]}.items():
        out += [name] if "failed" in found else []
        for phase, x in found.items():
            out += [f"{name} {phase}"] if isinstance(x, dict) and "failed" in x else []
    return out


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
