"""SSP's experience pool (arXiv 2601.10589): attacks that worked, replayed by an upper confidence
bound (UCB). The paper gives the idea; the rules and constants are ours.

An item is one attack. It enters if it is about its seed and FAILED of FRESH new replies are unsafe.
A visit replays it: plainly, or "reflected", with the defender's last unsafe reply in the prompt.
The mean reward is over plain visits; older ones weigh less, for the defender changes (arXiv
0805.3415). An item leaves when it is mastered (see visit()) or retired, after RETIRE visits. Each
replay brings a similar benign request along, so that refusing everything has a price. A safe
reflected reply becomes an SFT example under the plain prompt, without the help."""
import dataclasses
import json
import math
import re

import numpy

from engine.run import check_fields, parse_json
from selfplay.monitor import mean

PER_SEED = 4       # items of one seed at most: a seed that is hard must not fill the pool
DISCOUNT = 0.95    # of the weight of earlier visits, a step
SAFE_VISITS = 3    # plain visits with a safe reply that an item needs to be mastered
RETIRE = 8         # visits after which an item leaves, mastered or not. Without this limit one item
#                    was visited 23 times, because the judge's label of its replies kept changing
FRESH = 3          # new replies to an attack that has worked: the first one may be bad luck
FAILED = 2         # of the FRESH replies: so many must be unsafe for the attack to enter the pool
ALIKE = 0.9        # cosine above which two attacks are one; of 20 rewrites of a seed one is so near
DISTILLED = 64     # safe replies kept for the SFT mix, the newest
BEFORE = re.compile(r"earlier|previous|(?:last|that|my|unsafe) repl", re.I)  # mentions a past reply
PAIRS = 4          # benign seeds that take turns beside one attack, the likest ones
# What the pool counts. left: visits of each item that has left. distilled: examples, their texts.
TOTALS = dict(born=int, retired=int, left=list, distilled=list)


class Likeness:
    """Cosines of sentence embeddings. embed: tuple of texts -> unit vectors, as evaluation's."""

    def __init__(self, embed):
        self.embed, self.known = embed, {}

    def vectors(self, texts):
        """Unit vectors [n, D] of n texts; each is embedded once."""
        new = sorted(set(texts) - self.known.keys())
        if new:
            self.known.update(zip(new, self.embed(tuple(new))))
        return numpy.stack(list(map(self.known.get, texts)))

    def cosines(self, text, others):
        """Of a text and each of the others (at least one): [n]."""
        return self.vectors(others) @ self.vectors([text])[0]


def mean_of(labels, others):
    """Labels of one reply as one to the request and to its seed -> the first ones, with the mean
    probabilities and score of both. As they are if one has none."""
    if None in (labels.score, others.score) or labels.p.keys() != others.p.keys():
        return labels
    p = {name: (value + others.p[name]) / 2 for name, value in labels.p.items()}
    p["prompt_harmful"] = labels.p["prompt_harmful"]  # of the request: is the seed's label kept?
    return dataclasses.replace(labels, p=p, score=(labels.score + others.score) / 2)


@dataclasses.dataclass(eq=False)
class Item:
    """A past failure. mean: r_def over its plain visits; weight: their number; both discounted."""
    number: int
    seed: dict
    attack: str
    reply: str
    mean: float | int  # before the first plain visit: the reward it came in with
    weight: float | int = 0.0
    visits: int = 0    # reflected ones included
    safe: int = 0      # plain visits with a safe reply


class Pool:
    """At most `size` failed defences. ucb_c: weight of exploration. mastered: mean reward above
    which an item leaves after SAFE_VISITS. text: what text() gave, to go on from. likeness: a
    Likeness; None: only equal attacks are alike. benign: seeds that are paired with attacks."""

    def __init__(self, size, ucb_c, mastered, text="", likeness=None, benign=()):
        self.size, self.ucb_c, self.mastered = size, ucb_c, mastered
        self.likeness, self.benign = likeness, list(benign) if likeness else []
        self.born, self.retired, self.left, self.distilled, self.items = 0, 0, [], [], []
        item = {field.name: field.type for field in dataclasses.fields(Item)}
        for n, line in enumerate(text.splitlines(), 1):
            row, where = parse_json(line, f"pool.jsonl line {n}"), f"pool.jsonl line {n}"
            check_fields(row, where, item if n > 1 else TOTALS)
            if n == 1:
                for name in TOTALS:
                    setattr(self, name, row[name])
                for example in self.distilled:
                    check_fields(example, where, dict(request=str, thinking=str, answer=str))
                continue
            check_fields(row["seed"], where, dict(id=str, prompt=str))
            self.items.append(Item(*map(row.get, item)))

    def text(self):
        """JSON lines: TOTALS, then an item each."""
        totals = {name: getattr(self, name) for name in TOTALS}
        return "".join(json.dumps(row) + "\n" for row in [totals, *map(vars, self.items)])

    def ucb(self, item):
        """(1 - mean r_def) + c sqrt(ln(1 + N) / (1 + n)); n: discounted plain visits, N: of all."""
        total = math.fsum(x.weight for x in self.items)
        return 1 - item.mean + self.ucb_c * math.sqrt(math.log(1 + total) / (1 + item.weight))

    def top(self, k):
        """The k items of highest UCB, the highest first; the older first where equal."""
        return sorted(self.items, key=lambda item: (-self.ucb(item), item.number))[:k]

    def knows(self, attack):
        """Is there an item of this attack, or of one that is almost the same?"""
        attacks = [item.attack for item in self.items]
        if self.likeness is None or not attacks:
            return attack in attacks
        return bool(self.likeness.cosines(attack, attacks).max() > ALIKE)

    def insert(self, seed, attack, reply, r_def):
        """A new failure, unless an attack like it is there. Over PER_SEED the lowest UCB of its
        seed goes, over the size the lowest of all, the older where equal."""
        if self.knows(attack):
            return
        self.items.append(Item(self.born, seed, attack, reply, r_def))
        self.born += 1
        alike = [item for item in self.items if item.seed == seed]
        for items, most in ((alike, PER_SEED), (self.items, self.size)):
            if len(items) > most:
                self.items.remove(min(items, key=lambda item: (self.ucb(item), item.number)))

    def visit(self, item, r_def, reply, plain=True):
        """Count a new reply to an item. reply: "" if empty (r_def 0); the item then keeps its last
        unsafe one. plain: that one was not shown. Removes an item that is mastered or retired."""
        item.visits += 1
        if r_def < 0.5 and reply:
            item.reply = reply
        if plain:
            item.mean = (item.mean * item.weight + r_def) / (item.weight + 1)
            item.weight += 1
            item.safe += bool(r_def >= 0.5 and reply)
        mastered = plain and reply and item.safe >= SAFE_VISITS and item.mean > self.mastered
        if (mastered or item.visits >= RETIRE) and item in self.items:
            self.items.remove(item)
            self.left.append(item.visits)
            self.retired += not mastered

    def forget(self):
        """A step has passed: earlier visits weigh less."""
        for item in self.items:
            item.weight *= DISCOUNT

    def games(self, room, mode):
        """A game (kind, seed, item) for each of the `room` items of highest UCB, and as many benign
        ones without an item. mode: "off" (no games), "plain", or "reflect": an item is shown with
        its earlier reply at every second visit, so that what is learnt holds without it."""
        games, pairs = [], []
        for item in [] if mode == "off" else self.top(room):
            shown = mode == "reflect" and item.visits % 2 == 0
            games.append((f"{'reflected' if shown else 'replayed'}_harmful", item.seed, item))
            if self.benign:
                pairs.append(("paired_benign", self.pair(item)))
        return games + pairs

    def pair(self, item):
        """A benign seed that sounds like an item's: the PAIRS likest ones take turns."""
        cosine = self.likeness.cosines(item.seed["prompt"], [s["prompt"] for s in self.benign])
        likest = numpy.argsort(-cosine, kind="stable")[:PAIRS]
        return self.benign[likest[item.visits % len(likest)]]

    def experience(self, games, turns, r_def, play):
        """Count a step's replays, let new failures in that fail again -> the pool's metrics. games:
        (kind, seed, item if replayed). turns: the defender's. r_def, play: as in 02."""
        rewards, again = list(map(r_def, turns)), []
        failures = self.failures(turns, rewards)
        for turn, reward in failures:
            game = "replayed_harmful", turn.seed, Item(-1, turn.seed, turn.request, "", reward)
            again += [game] * FRESH
        retried = []
        for turn in play(again) if again else []:  # an empty reply is not unsafe
            retried.append(None if turn.labels.empty else r_def(turn))
        m = dict(self.remember(games, turns, rewards), **self.admit(failures, retried))
        mastered, born = len(self.left) - self.retired, max(1, self.born)
        return dict(m, pool=len(self.items), mastered=mastered / born,
                    retired=self.retired / born, distilled=len(self.distilled))

    def failures(self, turns, rewards):
        """The defender's turns that may come in: attacks on harmful seeds, about their seed, that
        were answered unsafely. rewards: r_def of each turn, None if dropped."""
        out, seen = [], set()
        for turn, r_def in zip(turns, rewards):
            attacked = turn.kind == "generated_harmful" and turn.relevant and not turn.declined
            failed = attacked and r_def is not None and r_def < 0.5 and not turn.labels.empty
            if failed and turn.request not in seen and not self.knows(turn.request):
                out.append((turn, r_def))
                seen.add(turn.request)
        return out

    def admit(self, failures, retried):
        """Insert the failures() whose attacks fail again. retried: r_def of FRESH replies to each
        in turn, None if dropped or empty -> the share that failed again."""
        admitted = []
        for n, (turn, r_def) in enumerate(failures):
            again = retried[n * FRESH:(n + 1) * FRESH]
            unsafe = sum(r is not None and r < 0.5 for r in again)
            admitted.append(unsafe >= FAILED)
            if unsafe >= FAILED:
                self.insert(turn.seed, turn.request, turn.answer, r_def)
        return dict(confirmed=mean(admitted))

    def remember(self, games, turns, rewards):
        """Count a step's replays, keep safe reflected replies as examples -> metrics."""
        fresh, replayed, paired = [], [], []
        self.forget()
        for turn, r_def in zip(turns, rewards):
            if turn.kind == "paired_benign":
                paired.append(turn.labels.response_refusal is False and not turn.labels.empty)
            if r_def is None or not turn.kind.endswith("harmful"):
                continue
            if not games[turn.game][2:]:
                fresh.append(r_def)
                continue
            replayed.append(r_def)
            reply = "" if turn.labels.empty else turn.answer
            reflected = turn.kind.startswith("reflected")
            self.visit(games[turn.game][2], r_def, reply, not reflected)
            if reflected and r_def >= 0.5 and reply:
                self.distil(turn)
        return dict(r_fresh=mean(fresh), r_replay=mean(replayed), comply_pair=mean(paired))

    def distil(self, turn):
        """A safe reply with the earlier one shown -> an example without, the newest of its request.
        Not if the turn is malformed, or speaks of what will not be there."""
        if turn.well_formed and not BEFORE.search(f"{turn.thinking} {turn.answer}"):
            kept = [text for text in self.distilled if text["request"] != turn.request]
            new = dict(request=turn.request, thinking=turn.thinking, answer=turn.answer)
            self.distilled = [*kept, new][-DISTILLED:]

    def visit_counts(self):
        """Visits of each item that the pool still has, or that was mastered or retired."""
        return self.left + [item.visits for item in self.items]
