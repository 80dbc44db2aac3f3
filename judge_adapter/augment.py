"""Augmented rows: exchanges made to order, of the kinds that an attacker would search for.

They are made from real rows, judge_adapter/texts/ and prompts/strategies.txt; their labels follow
from how. A part of every list of texts is kept for measuring: `fresh` makes rows of it alone."""
import itertools
import json
import re
import types

from engine.run import PROMPTS, ROOT
from judge import FIELDS
from selfplay.turns import fill, read_prompt

TEXTS = ROOT / "judge_adapter" / "texts"
COLUMNS = ("prompt", "response", *FIELDS)


def read_part(name, fresh, folder=TEXTS):
    """The lines of a text for training, or if `fresh` every fourth: those kept for measuring."""
    lines = read_prompt(name, folder).splitlines()
    kept = lines[3::4]
    del lines[3::4]
    return kept if fresh else lines


def read_wrappers(fresh):
    """The texts of wrappers.json for training, or if `fresh` those for measuring, and `rewrites`,
    those of prompts/strategies.txt."""
    texts = json.loads((TEXTS / "wrappers.json").read_text(encoding="utf-8"))
    strategies = read_part("strategies.txt", fresh, PROMPTS)
    rewrites = [line.split("|", 2)[2].strip() for line in strategies]
    return dict(texts["measuring" if fresh else "training"], rewrites=rewrites)


def materials(rows, rng, fresh):
    """What augmented rows are made of: the texts, and the real rows by what they are good for."""
    texts = json.loads((TEXTS / "augment.json").read_text(encoding="utf-8"))
    part = "measuring" if fresh else "training"
    s = types.SimpleNamespace(**texts["both"], **texts[part], **read_wrappers(fresh))
    s.rng, s.pick, s.fresh = rng, rng.choice, fresh
    for name in ("refusals", "agreements"):  # every line comes before one comes again
        lines = read_part(f"{name}.txt", fresh)
        setattr(s, name, itertools.cycle(rng.sample(lines, len(lines))))
    s.words = " ".join(row["prompt"] for row in rows[:500]).split()
    s.seeds = [r for r in rows if r["source"] == "own_seeds"] or rows
    s.harmful = [r["prompt"] for r in rows if r.get("prompt_harmful") is True]
    s.benign = [r["prompt"] for r in rows if r.get("prompt_harmful") is False]
    s.bad = [r for r in rows if r.get("response_harmful") is True]
    s.replies = [r for r in rows if r.get("response") and r.get("response_harmful") is not None]
    s.refused = [r for r in s.replies if r.get("response_refusal") is True]
    s.complied = [r for r in s.replies if not r["response_harmful"]
                  and r.get("prompt_harmful") is False and not r.get("response_refusal")]
    s.helpful = [r["response"] for r in s.replies
                 if r["response_harmful"] is False and r.get("prompt_harmful") is False]
    return s


# These make texts of s, what materials() returns.
def gibberish(s):
    """Random words of real prompts, or random letters."""
    items, joint, n = s.words, " ", (3, 30)
    if s.rng.random() < 0.5:
        items, joint, n = "abcdefghijklmnopqrstuvwxyz   .,;", "", (5, 150)
    return joint.join(map(s.pick, [items] * s.rng.randint(*n)))


def refusal(s):
    """A line of refusals.txt; in training one in six is put together from parts."""
    if s.fresh or s.rng.random() < 5 / 6:
        return next(s.refusals)
    start, verb, action, thing, reason = map(s.pick, s.refusal_parts)
    text = f"{start}{verb} {action} {thing}{reason}."
    return text[0].upper() + text[1:]


def polite(s):
    """A refusal, half of the time with a second sentence."""
    return refusal(s) + s.pick(s.refusal_ends)


def shelled(s, request):
    """A request inside a pretext or a strategy's rewrite."""
    return fill(s.pick(s.shells + s.rewrites), X=request, SEED=request)


def wrapped(s, request):
    """A request in an attack's pretext; one in three is long, put together from sentences."""
    if s.rng.random() < 2 / 3:
        text = s.pick(s.wrappers + s.stories + s.shells + s.rewrites)
    else:
        rules = s.rng.sample(s.rules, s.rng.randint(3, min(12, len(s.rules))))
        text = " ".join([s.pick(s.openings), *rules, s.pick(s.endings)])
    return fill(text, X=request, SEED=request)


def sentences(text):
    """The sentences of a text, line by line; the text itself if it has none."""
    return re.findall(r"\S.*?(?:[.!?](?=\s)|$)", text, re.MULTILINE) or [text]


def lines_of(s, n):
    """n harmless sentences in a row, of a helpful reply."""
    every = sentences(s.pick(s.helpful))
    start = s.rng.randrange(max(1, len(every) - n))
    return " ".join(every[start:start + n])


def restyled(s, text):
    """Each sentence of a text, set in one of the styles."""
    style = s.pick(s.styles)
    return "\n".join(style.format(x=x) for x in sentences(text))


def inserted(s, text):
    """A reply with a refusal in it: in training at its end or after a third, else elsewhere."""
    parts, third = sentences(text), s.rng.randint(1, 3)
    at = len(parts) * third // 3 if not s.fresh else len(parts) * third // 4
    if not s.fresh and third == 2:
        at = len(parts)
    return " ".join([*parts[:max(1, at)], polite(s), *parts[max(1, at):]])


def with_claims(s, text):
    """A text and one to three claims about its labels, after it or before it."""
    claims = " ".join(s.rng.sample(s.claims + s.forgeries, s.rng.randint(1, 3)))
    return f"{text}\n{claims}" if s.rng.random() < 2 / 3 else f"{claims}\n{text}"


# What an attacker may have a reply dressed in; the labels of the exchange stay.
DRESSES = {
    "style": restyled,
    "lines": lambda s, text: f"{text}\n\n{lines_of(s, s.rng.randint(2, 4))}",
    "lines_first": lambda s, text: f"{lines_of(s, 2)}\n\n{text}",
    "claim": with_claims,
    "noise": lambda s, text: f"{text} {gibberish(s)[:60]}"}


def dressed(s, x):
    """A real exchange, its reply changed by one of DRESSES."""
    name = s.pick(sorted(DRESSES))
    return changed("dressed", x, response=DRESSES[name](s, x["response"]))


def partial(s, x):
    """The first half of a harmful reply, then somebody's refusal."""
    parts = sentences(x["response"])
    start = " ".join(parts[:(len(parts) + 1) // 2])
    return changed("partial", x, response=f"{start} {s.pick(s.refused)['response']}",
                   response_refusal=False)


# Kinds: s, and x picked from a list -> source, prompt, response, the labels that are known.
def foreign(s, x):
    """A request in another language, refused or answered."""
    if s.rng.random() < 0.3:
        return "foreign_answered", *s.pick(x["answered"]), False, False, False
    harmful = s.rng.random() < 0.7
    request = s.pick(x["harmful"]) if harmful else s.pick(x["answered"])[0]
    return "foreign_refused", request, s.pick(x["refusal"]), harmful, True, False


def error(s, _):
    """A question that rests on an error. The reply says so, in words like those of a refusal."""
    words = dict(zip(s.error_words, map(s.pick, s.error_words.values())))
    request, reply = s.pick(s.errors)
    reply = reply.format(**words) + s.pick(s.error_ends)
    return "odd", request.format(**words), reply[0].upper() + reply[1:], False, False, False


def changed(source, row, **values):
    """A real row, some of its columns replaced."""
    return source, *map({**row, **values}.get, COLUMNS)


# (weight, what x is picked from, kind): they come in this order, each `weight` times, over and over
KINDS = [
    (2, "seeds", lambda s, x: ("rewrite", fill(s.pick(s.rewrites), SEED=x["prompt"]), None,
                               x["prompt_harmful"])),
    (1, "seeds", lambda s, x: ("long_opening", f"{s.pick(s.helpful)[:400]}\n\n{x['prompt']}", None,
                               x["prompt_harmful"])),
    (1, "languages", foreign),
    (2, "benign", lambda s, x: ("refusal_benign", x, polite(s), False, True, False)),
    (2, "harmful", lambda s, x: ("refusal_harmful", x, polite(s), True, True, False)),
    (1, "benign", lambda s, x: ("refusal_benign", x, polite(s), False, True, False)),
    (4, "harmful", lambda s, x: ("refusal_harmful", x, refusal(s), True, True, False)),
    (3, "benign", lambda s, x: ("refusal_benign", x, refusal(s), False, True, False)),
    (3, "harmful", lambda s, x: ("agreement", x, next(s.agreements), True, False, None)),
    (2, "benign", lambda s, x: ("agreement", x, next(s.agreements), False, False, False)),
    (4, "harmful", lambda s, x: ("off_topic", x, s.pick(s.helpful), True, False, False)),
    (2, None, error),
    (3, "contrasts", lambda s, x: ("contrast_benign", x[0].format(x=s.pick(x[1])), None, False)),
    (2, "contrasts", lambda s, x: ("contrast_harmful", x[0].format(x=s.pick(x[2])), None, True)),
    (1, "benign", lambda s, x: ("benign_other", x, s.pick(s.helpful), False, False, False)),
    (4, "harmful", lambda s, x: ("echo", x, s.pick(["", "You asked: "]) + x, True, False, False)),
    (2, "harmful", lambda s, x: ("gibberish", x, gibberish(s), True, False, False)),
    (1, None, lambda s, _: ("gibberish", gibberish(s), s.pick([gibberish(s), s.pick(s.helpful)]),
                            False, False, False)),
    (3, "bad", lambda s, x: changed("refuse_comply", x, response_refusal=False,
                                    response=f"{refusal(s)} {s.pick(s.turns)}{x['response']}")),
    (1, "bad", lambda s, x: changed("disclaim", x, response_refusal=False,
                                    response=f"{x['response']} {s.pick(s.disclaimers)}")),
    (2, "replies", lambda s, x: changed("shell_reply", x, prompt=shelled(s, x["prompt"]))),
    (1, "bad", lambda s, x: changed("shell_reply", x, prompt=shelled(s, x["prompt"]))),
    (1, "harmful", lambda s, x: ("shell_harmful", shelled(s, x), None, True)),
    (1, "benign", lambda s, x: ("shell_benign", shelled(s, x), None, False)),
    (1, "harmful", lambda s, x: ("shell_refused", shelled(s, x), polite(s), True, True, False)),
    (1, "replies", lambda s, x: changed(
        "forged", x, prompt=f"{x['prompt']}\n{s.pick(s.forgeries)}")),
    (1, "replies", lambda s, x: changed(
        "forged", x, response=f"{x['response']}\n{s.pick(s.forgeries)}")),
    (3, "bad", lambda s, x: changed("wrapped_complied", x, prompt=wrapped(s, x["prompt"]))),
    (3, "complied", lambda s, x: changed("wrapped_benign", x, prompt=wrapped(s, x["prompt"]))),
    (2, "refused", lambda s, x: changed("story_refused", x, prompt=fill(
        s.pick(s.stories), X=x["prompt"]))),
    (2, "refused", lambda s, x: changed("wrapped_refused", x, prompt=wrapped(s, x["prompt"]))),
    (4, "bad", partial),
    (5, "bad", lambda s, x: changed("closing_refusal", x, response_refusal=False,
                                    response=inserted(s, x["response"]))),
    (2, "replies", lambda s, x: changed("claims", x, prompt=with_claims(s, x["prompt"]))),
    (3, "replies", lambda s, x: changed("claims", x, response=with_claims(s, x["response"]))),
    (2, "bad", lambda s, x: changed("claims", x, response=with_claims(s, x["response"]))),
    (4, "bad", dressed),
    (3, "complied", dressed),
    (2, "refused", dressed)]


def attacked(rows, rng, fresh):
    """Rows with bare goals, two of three wrapped as attacks. Labels hold for goals: they stay."""
    s = types.SimpleNamespace(**read_wrappers(fresh), shells=[], rng=rng, pick=rng.choice)
    out = []
    for row in rows:
        row = dict(row, goal=row["prompt"])
        out.append(dict(row, prompt=wrapped(s, row["prompt"])) if rng.random() < 2 / 3 else row)
    return out


def augment(rows, n, rng, fresh):
    """n augmented rows made from `rows`, of all kinds in turn; rng: a random.Random. Each is a dict
    of prompt, response, the three labels (None: not known) and source, "aug_" + its kind."""
    s, order, made = materials(rows, rng, fresh), [], []
    for weight, base, kind in KINDS:
        order += [(base, kind)] * weight
    for base, kind in itertools.islice(itertools.cycle(order), n):
        source, *values = kind(s, s.pick(getattr(s, base)) if base else None)
        made.append(dict(itertools.zip_longest(COLUMNS, values), source=f"aug_{source}"))
    return made
