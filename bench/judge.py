"""The judge's labels: constrained scoring (ours) against generating the three lines (as published).

    python bench/judge.py                   64 exchanges of 250 tokens, three rounds
    python bench/judge.py JUDGE=allenai/wildguard

constrained   judge.py SCORING=constrained: the lines are fed, only " yes" and " no" compete
generate      judge.py SCORING=generate: 32 tokens at most are sampled greedily, then parsed

Exchanges are those of prompts/probe.jsonl; a reply is said again until the judge's input, its
instruction included, has 250 tokens. The embedded judge calibrates what it scores and not what it
generates, so the labels may differ; the share that does not is printed.
"""
import bisect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, so that `judge` is the one that is measured
import common  # noqa: E402
import judge  # noqa: E402
import policy  # noqa: E402
import stage  # noqa: E402

# ==================================================================================================
JUDGE = "embedded"        # see judge.py
QUANTIZE = "auto"         # see judge.py
JUDGE_TOKENS = 8192       # tokens of a batch, padding included, on both sides
EXCHANGES = 64            # labelled in a run
TOKENS = 250              # of the judge's input, about
ROUNDS = 3                # processes of each side, in turn
REPEATS = 2               # timed runs in a process, after one to warm up
SIDE = "all"              # or "constrained", "generate": that side alone, in this process
# ==================================================================================================
RANGES = dict(SIDE=["all", "constrained", "generate"], QUANTIZE=["auto", "nf4", "none"],
              JUDGE_TOKENS=(256, 10 ** 7), EXCHANGES=(1, 10 ** 5), TOKENS=(1, 10 ** 5),
              ROUNDS=(1, 99), REPEATS=(1, 99))


def exchanges(scorer):
    """EXCHANGES pairs (prompt, reply) whose input is TOKENS long, or just over."""
    rows, out = judge.read_exchanges(ROOT / "prompts" / "probe.jsonl"), []
    for i in range(EXCHANGES):
        prompt, reply = rows[i % len(rows)]["prompt"], rows[i % len(rows)]["response"]
        words = reply.split()
        words = words * (TOKENS // max(1, len(words)) + 1)
        n = bisect.bisect_left(range(len(words)), TOKENS,
                               key=lambda n: len(scorer.encode(prompt, " ".join(words[:n]))))
        out.append((prompt, " ".join(words[:n])))
    return out


def one_side():
    """Time the labelling of this process' side."""
    scorer = judge.load_judge(JUDGE, QUANTIZE, SIDE, JUDGE_TOKENS)
    pairs, labels = exchanges(scorer), []

    def work():
        labels[:] = scorer.classify(pairs)

    work()
    times = [common.seconds(work) for _ in range(REPEATS)]
    tokens = sum(len(scorer.encode(p, r)) for p, r in pairs)
    common.report(times, EXCHANGES, tokens=tokens / EXCHANGES,
                  parsed=sum(x.parsed for x in labels) / EXCHANGES,
                  labels=[[getattr(x, f) for f in judge.FIELDS] for x in labels])


def main(argv):
    """Both sides in turn, or the one that is named."""
    stage.configure(globals(), argv)
    if SIDE != "all":
        return one_side()
    common.make_base(policy.EMBEDDED if judge.adapter_of(JUDGE) else JUDGE)
    common.head(f"judge {JUDGE}: {EXCHANGES} exchanges of {TOKENS} tokens, {JUDGE_TOKENS} a batch")
    sides = {s: (sys.executable, [*argv, f"SIDE={s}"]) for s in ("constrained", "generate")}
    results = common.alternate(__file__, sides, ROUNDS)
    medians = common.table(results, "constrained", "exchanges")
    ours, peer = (results[s][0] for s in sides)
    same = {f: sum(a[k] == b[k] for a, b in zip(ours["labels"], peer["labels"])) / EXCHANGES
            for k, f in enumerate(judge.FIELDS)}
    print(f"input {ours['tokens']:.0f} tokens on the mean; parsed {peer['parsed']:.2f} of what was "
          "generated; the same label on both sides: "
          + ", ".join(f"{f} {share:.2f}" for f, share in same.items()))
    common.ratio("judge", medians["generate"], medians["constrained"])


if __name__ == "__main__":
    main(sys.argv[1:])
