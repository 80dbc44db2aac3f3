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
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first, so that `judge` is not this
import common  # noqa: E402
import judge  # noqa: E402
from engine import models, run  # noqa: E402
from selfplay.data import read_exchanges  # noqa: E402

# ==================================================================================================
JUDGE = "embedded"        # see judge.py
QUANTIZE: Literal["auto", "nf4", "none"] = "auto"  # see judge.py
JUDGE_TOKENS = 8192       # tokens of a batch, padding included, on both sides
EXCHANGES = 64            # labelled in a run
TOKENS = 250              # of the judge's input, about
ROUNDS = 3                # processes of each side, in turn
REPEATS = 2               # timed runs in a process, after one to warm up
SIDE: Literal["all", "constrained", "generate"] = "all"  # or that side alone, in this process
# ==================================================================================================


def exchanges(scorer):
    """EXCHANGES pairs (prompt, reply) whose input is TOKENS long, or just over."""
    rows, out = read_exchanges(run.PROMPTS / "probe.jsonl"), []
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
    times, said = common.repeat(work, REPEATS), {}
    for field in judge.FIELDS:
        said[field] = [getattr(x, field) for x in labels]
    tokens = sum(len(scorer.encode(prompt, reply)) for prompt, reply in pairs)
    parsed = sum(x.parsed for x in labels)
    common.report(times, EXCHANGES, tokens=tokens / EXCHANGES, parsed=parsed / EXCHANGES,
                  labels=said)


def main(argv):
    """Both sides in turn, or the one that is named."""
    run.configure(globals(), argv)
    if SIDE != "all":
        return one_side()
    common.make_base(models.EMBEDDED if judge.adapter_of(JUDGE) else JUDGE)
    common.head(f"judge {JUDGE}: {EXCHANGES} exchanges of {TOKENS} tokens, {JUDGE_TOKENS} a batch")
    sides = {}
    for name in ("constrained", "generate"):
        sides[name] = (sys.executable, [*argv, f"SIDE={name}"])
    results = common.alternate(__file__, sides, ROUNDS)
    medians = common.table(results, "constrained", "exchanges")
    ours, peer, same = results["constrained"][0], results["generate"][0], []
    for field in judge.FIELDS:
        pairs = zip(ours["labels"][field], peer["labels"][field])
        same.append(f"{field} {sum(a == b for a, b in pairs) / EXCHANGES:.2f}")
    print(f"input {ours['tokens']:.0f} tokens on the mean; parsed {peer['parsed']:.2f} of what was "
          f"generated; the same label on both sides: {', '.join(same)}")
    common.ratio("judge", medians["generate"], medians["constrained"])


if __name__ == "__main__":
    main(sys.argv[1:])
