"""SSP's experience pool: an upper confidence bound brings back the failures that the defender
handles worst and has seldom met of late (arXiv 2601.10589). The paper gives the idea; the rules and
constants are ours. The bound is discounted (arXiv 0805.3415): old visits say little of a defender
that learns. A visit in which the defender was shown its earlier reply says nothing of how it does
without, so it counts for retiring alone."""
import dataclasses
import json
import math

from engine.run import check_fields, parse_json
from selfplay.monitor import mean

PER_SEED = 4       # items of one seed at most: a seed that is hard must not fill the pool
DISCOUNT = 0.95    # of the weight of earlier visits, a step
SAFE_VISITS = 3    # plain, non-empty, safe ones that an item needs to be mastered
RETIRE = 8         # visits after which an item leaves in any case: what is left is judge noise


@dataclasses.dataclass(eq=False)
class Item:
    """A past failure: the request, the last unsafe reply, the discounted mean reward over the plain
    visits and their discounted number."""
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
    which an item leaves after SAFE_VISITS. text: what text() gave, to go on from."""

    def __init__(self, size, ucb_c, mastered, text=""):
        self.size, self.ucb_c, self.mastered = size, ucb_c, mastered
        self.born, self.left, self.retired, self.items = 0, [], 0, []
        item = {field.name: field.type for field in dataclasses.fields(Item)}
        for n, line in enumerate(text.splitlines(), 1):
            row, where = parse_json(line, f"pool.jsonl line {n}"), f"pool.jsonl line {n}"
            check_fields(row, where, item if n > 1 else dict(born=int, retired=int, left=list))
            if n == 1:
                self.born, self.retired, self.left = row["born"], row["retired"], row["left"]
                continue
            check_fields(row["seed"], where, dict(id=str, prompt=str))
            self.items.append(Item(*map(row.get, item)))

    def text(self):
        """JSON lines: the totals (left: visits of each item that has left), then an item each."""
        totals = dict(born=self.born, retired=self.retired, left=self.left)
        return "".join(json.dumps(row) + "\n" for row in [totals, *map(vars, self.items)])

    def ucb(self, item):
        """(1 - mean r_def) + c sqrt(ln(1 + N) / (1 + n)); n: the item's discounted plain visits, N:
        those of all items."""
        total = math.fsum(x.weight for x in self.items)
        return 1 - item.mean + self.ucb_c * math.sqrt(math.log(1 + total) / (1 + item.weight))

    def ranked(self, items):
        """Items by UCB, the highest first; the older first where equal."""
        return sorted(items, key=lambda item: (-self.ucb(item), item.number))

    def top(self, k):
        """The k items of highest UCB."""
        return self.ranked(self.items)[:k]

    def insert(self, seed, attack, reply, r_def):
        """A new failure, unless its attack is there. Over PER_SEED the lowest UCB of its seed goes,
        over the size the lowest of all, the older where equal."""
        if attack in [item.attack for item in self.items]:
            return
        self.items.append(Item(self.born, seed, attack, reply, r_def))
        self.born += 1
        alike = [item for item in self.items if item.seed == seed]
        for items, most in ((alike, PER_SEED), (self.items, self.size)):
            if len(items) > most:
                self.items.remove(min(items, key=lambda item: (self.ucb(item), item.number)))

    def visit(self, item, r_def, reply, plain=True):
        """An item was answered afresh. reply: "" if there is nothing in it (r_def 0): not unsafe,
        and no visit that masters. plain: without its earlier reply. A mastered item leaves, and one
        that was visited often enough."""
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
        """At most `room` games (kind, seed, item) by top UCB; mode: "off", "plain" or "reflect":
        every second item also plainly, so that what is learnt holds without the earlier reply."""
        games = []
        for i, item in enumerate([] if mode == "off" else self.top(room)):
            if mode == "reflect":
                games.append(("reflected_harmful", item.seed, item))
            if mode == "plain" or i % 2 == 0:
                games.append(("replayed_harmful", item.seed, item))
        return games[:room]

    def remember(self, games, turns, rewards):
        """Add a step's new failures on attacked seeds, count its replays -> the pool's metrics.
        games: (kind, seed, item if replayed). turns: the defender's. rewards: r_def of each turn,
        None if dropped."""
        fresh, replayed = [], []
        self.forget()
        for turn, r_def in zip(turns, rewards):
            if r_def is None or not turn.kind.endswith("harmful"):
                continue
            if games[turn.game][2:]:
                replayed.append(r_def)
                reply = "" if turn.labels.empty else turn.answer
                self.visit(games[turn.game][2], r_def, reply, not turn.kind.startswith("reflected"))
            else:
                fresh.append(r_def)
                failed = r_def < 0.5 and not turn.labels.empty
                if failed and turn.kind == "generated_harmful":
                    self.insert(turn.seed, turn.request, turn.answer, r_def)
        mastered = len(self.left) - self.retired
        return dict(r_fresh=mean(fresh), r_replay=mean(replayed), pool=len(self.items),
                    mastered=mastered / max(1, self.born), retired=self.retired / max(1, self.born))

    def visit_counts(self):
        """Visits of each item that the pool still has, or that was mastered or retired."""
        return self.left + [item.visits for item in self.items]
