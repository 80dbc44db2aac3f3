"""SSP's experience pool: an upper confidence bound brings back the failures that the defender
handles worst and has seldom met (arXiv 2601.10589). Its constants, in 02, are ours."""
import dataclasses
import json
import math

from engine.run import check_fields, parse_json
from selfplay.monitor import mean


@dataclasses.dataclass(eq=False)
class Item:
    """A past failure: the request, the last unsafe reply, the mean reward over the visits."""
    number: int
    seed: dict
    attack: str
    reply: str
    mean: float | int  # before the first visit: the reward it came in with
    visits: int = 0


class Pool:
    """At most `size` failed defences. ucb_c: weight of exploration. mastered: mean reward above
    which an item leaves after three visits. text: what text() gave, to go on from."""

    def __init__(self, size, ucb_c, mastered, text=""):
        self.size, self.ucb_c, self.mastered = size, ucb_c, mastered
        self.visits, self.born, self.left, self.items = 0, 0, [], []
        item = {field.name: field.type for field in dataclasses.fields(Item)}
        for n, line in enumerate(text.splitlines(), 1):
            row, where = parse_json(line, f"pool.jsonl line {n}"), f"pool.jsonl line {n}"
            check_fields(row, where, item if n > 1 else dict(visits=int, born=int, left=list))
            if n == 1:
                self.visits, self.born, self.left = row["visits"], row["born"], row["left"]
                continue
            check_fields(row["seed"], where, dict(id=str, prompt=str))
            self.items.append(Item(*map(row.get, item)))

    def text(self):
        """JSON lines: the totals (left: visits of each mastered item), then an item each."""
        totals = dict(visits=self.visits, born=self.born, left=self.left)
        return "".join(json.dumps(row) + "\n" for row in [totals, *map(vars, self.items)])

    def ucb(self, item):
        """(1 - mean r_def) + c sqrt(ln(1 + N) / (1 + n)); N: all visits of the run (ours)."""
        return 1 - item.mean + self.ucb_c * math.sqrt(math.log(1 + self.visits) / (1 + item.visits))

    def top(self, k):
        """The k items of highest UCB, the older first where equal."""
        return sorted(self.items, key=lambda item: (-self.ucb(item), item.number))[:k]

    def insert(self, seed, attack, reply, r_def):
        """A new failure, unless its attack is there; over the size the lowest UCB goes."""
        if attack not in [item.attack for item in self.items]:
            self.items.append(Item(self.born, seed, attack, reply, r_def))
            self.born += 1
        if len(self.items) > self.size:
            self.items.remove(min(self.items, key=lambda item: (self.ucb(item), item.number)))

    def visit(self, item, r_def, reply):
        """An item was answered afresh: count, mean, last unsafe reply; a mastered item leaves.
        reply: "" if there is nothing in it (r_def 0): not unsafe, and no visit that masters."""
        item.mean = (item.mean * item.visits + r_def) / (item.visits + 1)
        item.visits += 1
        self.visits += 1
        if r_def < 0.5 and reply:
            item.reply = reply
        mastered = item.visits >= 3 and item.mean > self.mastered and reply
        if mastered and item in self.items:
            self.items.remove(item)
            self.left.append(item.visits)

    def mix(self, fresh, room, mode):
        """A step's games (kind, seed): at most `room` of the harmful ones, which come first, give
        their places to games of the pool."""
        replayed, n_harmful = self.games(room, mode), 0
        for kind, _ in fresh:
            n_harmful += kind.endswith("harmful")
        return fresh[:max(0, n_harmful - len(replayed))] + fresh[n_harmful:] + replayed

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
        """Add a step's new failures, count its replays -> the pool's metrics. games: (kind, seed,
        item if replayed). turns: the defender's. rewards: r_def of each turn, None if dropped."""
        fresh, replayed = [], []
        for turn, r_def in zip(turns, rewards):
            if r_def is None or not turn.kind.endswith("harmful"):
                continue
            if games[turn.game][2:]:
                replayed.append(r_def)
                reply = "" if turn.labels.empty else turn.answer
                self.visit(games[turn.game][2], r_def, reply)
            else:
                fresh.append(r_def)
                if r_def < 0.5 and not turn.labels.empty:
                    self.insert(turn.seed, turn.request, turn.answer, r_def)
        return dict(r_fresh=mean(fresh), r_replay=mean(replayed), pool=len(self.items),
                    mastered=len(self.left) / max(1, self.born))

    def visit_counts(self):
        """Visits of each item that the pool has had and still has or that was mastered."""
        return self.left + [item.visits for item in self.items]
