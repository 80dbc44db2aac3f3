"""Rollout tokens a second on mixed lengths: our sample() against what transformers offers.

    python bench/sample.py                  batches of 32 and 128, three rounds of every side
    python bench/sample.py BATCHES=32 SIDES=ours,generate
    python bench/sample.py BATCHES=16 TIMES=4 SIDES=ours,slots,generate   prompts wait their turn

ours            engine.sampling: exact, keeps the log-probabilities, rows that have ended leave
slots           ours with rollout="slots": a row that has ended makes room for the next prompt
generate        HF generate, dynamic cache
static          HF generate, static cache (compiled on CUDA, as transformers does by itself)
generate_batch  transformers' continuous batching, by the manager that generate_batch wraps (itself
                it takes one length for all requests); its cache has room for the whole batch

The ratio is of the fastest of the last three to ours, at the first of BATCHES.
All draw from softmax(logits) over the whole vocabulary at temperature 1; tokens count up to and
with EOS. Lengths are forced by a countdown: ids at the end of the vocabulary mean "n tokens to
come", a prompt ends in its length, and the logits after "n to come" are made to give "n - 1 to
come", after "1 to come" EOS. So the last token alone says what follows, and one line of code does
it on logits wherever they are: a LogitsProcessor for generate, a hook on the output head for ours
(which never names the row it is in, and still works when rows leave the batch). What a side hands
back must be the countdown. In generate_batch, which takes no LogitsProcessor of ours, EOS is off
and a request ends at its length.
"""
import sys
import time
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from engine import models, run  # noqa: E402
from engine.batching import chunks  # noqa: E402
from engine.run import die  # noqa: E402
from engine.sampling import sample  # noqa: E402

# ==================================================================================================
MODEL = "smollm2"         # a folder or hub id works too
DTYPE: Literal["auto", "float32", "bfloat16"] = "bfloat16"  # of the weights
BATCHES = "32,128"        # rows at a time
TIMES = 1                 # prompts: as many as TIMES batches
LENGTHS = ("16 256 48 112 72 160 96 60 128 40 200 88 104 80 144 24 "  # tokens of the completions
           "116 232 64 92 176 32 136 100 84 216 56 120 108 76 152 128")  # in turn: mean 110
PROMPT_TOKENS = 85        # about: defender prompts nearest to it
PEER_ATTENTION = "sdpa"   # of the HF sides: transformers' default
ROUNDS = 3                # processes of each side and batch, in turn
REPEATS = 1               # timed runs in a process, after a short one to warm up
SIDES = "ours,slots,generate,static,generate_batch"
SIDE: Literal["all", "ours", "slots", "generate", "static", "generate_batch"] = "all"  # or one: it
#                           alone, in this process, on the first of BATCHES
# ==================================================================================================
PEERS = ["static", "generate_batch"]  # that may not run everywhere
WARM = 8  # longest completion of the run that warms up; shapes are those of the timed runs


class Countdown:
    """The ids that say how many tokens are still to come, and what must follow them."""

    def __init__(self, model, tok, longest):
        words = model.get_output_embeddings().weight.shape[0]
        self.stop, self.longest = tok.turn_end, longest
        end = min([words, *(i for i in tok.stop_ids if i > words // 2)])
        self.first = end - longest - 1
        if self.first <= words // 2:
            die(f"LENGTHS: a vocabulary of {words} has no {longest} ids to spare at its end")

    def prompt(self, ids, length):
        """A prompt that ends in its completion's length; no other id counts."""
        return [min(i, self.first - 1) for i in ids] + [self.first + length]

    def prompts(self, rows, lengths):
        """The same for all rows."""
        return list(map(self.prompt, rows, lengths))

    def completion(self, length):
        """What has to come out: length - 1 ids that count down, then EOS."""
        return list(range(self.first + length - 1, self.first, -1)) + [self.stop]

    def force(self, last_B, logits_BV):
        """Make the logits give what follows `last_B`, in place; after all other ids that is EOS."""
        left_B = last_B - self.first
        next_B = torch.where((left_B > 1) & (left_B <= self.longest), last_B - 1, self.stop)
        return logits_BV.scatter_(1, next_B[:, None], 1e4)  # softmax: 1 there, 0 elsewhere

    def hook(self, model):
        """Force it at the output head. The largest id a row brings in is its countdown: its prompt
        (padded on any side) holds one, a token to go on from is one or means EOS."""
        seen = {}

        def before(embedding, args):
            seen["last_B"] = args[0].amax(1)

        def after(head, args, logits):
            return self.force(seen["last_B"], logits.view(-1, logits.shape[-1])).view_as(logits)

        model.get_input_embeddings().register_forward_pre_hook(before)
        model.get_output_embeddings().register_forward_hook(after)


# ---- the sides: functions of (prompts, lengths) that give the completions ------------------------

def by_sample(model, tok, countdown, batch, longest):
    """Our sample(), by the plain way or in slots."""
    countdown.hook(model)
    rollout = "slots" if SIDE == "slots" else "plain"

    def work(prompts, lengths):
        generator = torch.Generator().manual_seed(0)
        pairs = sample(model, tok, prompts, longest, 1.0, batch, generator, rollout=rollout)
        return [ids for ids, _ in pairs]
    return work


def by_generate(model, tok, countdown, batch, longest):
    """HF generate."""
    import transformers

    class Force(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return countdown.force(input_ids[:, -1], scores)

    config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest,
        eos_token_id=sorted(tok.stop_ids), pad_token_id=0,
        cache_implementation="static" if SIDE == "static" else None)

    def work(prompts, lengths):
        rows = []
        for some in chunks(prompts, batch):
            rows += complete(some)
        return rows

    def complete(prompts):
        width = max(map(len, prompts))
        ids_BP = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_BP = torch.zeros(len(prompts), width, dtype=torch.long)
        for b, prompt in enumerate(prompts):
            ids_BP[b, width - len(prompt):] = torch.tensor(prompt)
            mask_BP[b, width - len(prompt):] = 1
        out_BL = model.generate(
            input_ids=ids_BP.to(model.device), attention_mask=mask_BP.to(model.device),
            generation_config=config, logits_processor=transformers.LogitsProcessorList([Force()]))
        rows = []
        for row in out_BL[:, width:].tolist():
            end = row.index(countdown.stop) + 1 if countdown.stop in row else len(row)
            rows.append(row[:end])
        return rows
    return work


def by_manager(manager, prompts, lengths):
    """Continuous batching: requests with their lengths."""
    names = []
    for prompt, length in zip(prompts, lengths):
        names.append(manager.add_request(prompt, max_new_tokens=length))
    done = {}
    while len(done) < len(names):
        result = manager.get_result(timeout=1)
        if result is not None and result.error:
            die(f"continuous batching: {result.error}")
        if result is not None and result.is_finished():
            done[result.request_id] = result.generated_tokens
        elif result is None and not manager.is_running():
            die("continuous batching: its thread ended")
    return [done[name] for name in names]


def continuous(model, batch, width, longest):
    """The context that generate_batch opens: a manager of paged keys and values."""
    import transformers
    from transformers.generation.continuous_batching.utils import WorkloadHints
    block = 256
    config = transformers.ContinuousBatchingConfig(
        block_size=block, num_blocks=batch * -(-(width + longest) // block),
        max_batch_tokens=max(batch, 2048), safety_margin=0.0)
    return model.continuous_batching_context_manager(
        generation_config=transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest,
            eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=config, timeout=5,
        workload_hints=WorkloadHints(width, longest, batch))


# ---- one side ------------------------------------------------------------------------------------

def timed(work, prompts, short, lengths, countdown):
    """Warm up on short completions, then time the real ones and check what came out."""
    work(*short)
    times, out = [], []

    def once():
        out[:] = map(list, work(prompts, lengths))

    for _ in range(REPEATS):
        times.append(common.seconds(once))
        same = out == list(map(countdown.completion, lengths))
        if SIDE == "generate_batch":
            same = list(map(len, out)) == lengths
        if not same:
            die(f"side {SIDE}: the forced lengths did not come out; its hook does not fit any more")
    common.report(times, sum(lengths), prompt=sum(map(len, prompts)) / len(prompts))


def one_side():
    """Time this process' side on the first of BATCHES."""
    batch, listed = int(BATCHES.split(",")[0]), list(map(int, LENGTHS.split()))
    lengths, longest = [listed[i % len(listed)] for i in range(batch * TIMES)], max(listed)
    model, tok = models.load_model(MODEL, DTYPE)
    countdown = Countdown(model, tok, longest)
    rows = common.prompts(tok, batch * TIMES, PROMPT_TOKENS)
    prompts = countdown.prompts(rows, lengths)
    few = [min(n, WARM) for n in lengths]
    short = countdown.prompts(rows, few), few
    if SIDE not in ("ours", "slots"):
        model.set_attn_implementation(PEER_ATTENTION)
    if SIDE == "generate_batch":
        with continuous(model, batch, max(map(len, prompts)), longest) as manager:
            timed(lambda p, n: by_manager(manager, p, n), prompts, short, lengths, countdown)
    else:
        make = by_sample if SIDE in ("ours", "slots") else by_generate
        timed(make(model, tok, countdown, batch, longest), prompts, short, lengths, countdown)


def main(argv):
    """All sides in turn at each batch, or the one that is named."""
    run.configure(globals(), argv)
    if SIDE != "all":
        return one_side()
    names, batches = SIDES.split(","), BATCHES.split(",")
    if not {"ours", "generate"} <= set(names) <= {"ours", "slots", "generate", *PEERS}:
        die(f"SIDES={SIDES!r}: ours, generate and any of slots, {', '.join(PEERS)}")
    common.make_base(MODEL)
    lengths = list(map(int, LENGTHS.split()))
    common.head(f"rollouts: {MODEL}, {DTYPE}, prompts ~{PROMPT_TOKENS} tokens, completions "
                f"{min(lengths)} to {max(lengths)}, mean {sum(lengths) / len(lengths):.0f}")
    began, medians = time.time(), {}
    for batch in batches:
        sides, optional = {}, set()
        for name in names:
            row = f"{name}, batch {batch}"
            sides[row] = (sys.executable, [*argv, f"SIDE={name}", f"BATCHES={batch}"])
            if name in PEERS:
                optional.add(row)
        results = common.alternate(__file__, sides, ROUNDS, optional)
        medians |= common.table(results, f"ours, batch {batch}", "tokens")
    print(f"{time.time() - began:.0f} s in all")
    first = batches[0]
    theirs = [name for name in names if name not in ("ours", "slots")]
    fastest = min(medians.get(f"{name}, batch {first}", float("inf")) for name in theirs)
    common.ratio("sample", fastest, medians[f"ours, batch {first}"])


if __name__ == "__main__":
    main(sys.argv[1:])
