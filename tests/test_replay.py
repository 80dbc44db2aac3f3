"""selfplay/replay.py: SSP's pool against a pocket calculator and a slow reference."""
import math
import random

import numpy
import pytest

from judge import Labels
from selfplay.replay import Likeness, Pool, mean_of
from selfplay.turns import Turn


def new_pool(size=512, text=""):
    return Pool(size, 1.0, 0.8, text)


def numbers(items):
    return [item.number for item in items]


def filled(n):
    """A pool of n failures, all alike but for their number."""
    pool = new_pool()
    for i in range(n):
        seed = dict(id=f"old{i}", prompt=f"bad old {i}", harmful=True)
        pool.insert(seed, f"attack {i}", f"unsafe {i}", 0.0)
    return pool


def test_ucb_by_hand():
    """Unvisited items, ties by age, N over the items that are there: by a pocket calculator."""
    pool = new_pool()
    for i, r in enumerate((0.4, 0.0, 0.0)):
        pool.insert(dict(id=str(i)), f"attack {i}", "reply", r)
    zero, one, _ = pool.items
    assert numbers(pool.top(3)) == [1, 2, 0]  # ln(1) = 0: 1.0, 1.0, 0.6

    pool.visit(one, 0.5, "new")
    pool.visit(one, 0.7, "new")
    assert one.mean == pytest.approx(0.6) and one.visits == one.safe == 2
    assert one.reply == "reply"  # .5 and .7 are no failures
    ucb = [pool.ucb(x) for x in pool.items]
    assert ucb == pytest.approx([1.6481470, 1.0051479, 2.0481470], abs=1e-6)

    pool.visit(zero, 0.1, "worse")
    assert zero.reply == "worse" and zero.mean == 0.1  # the reward it came in with is forgotten
    pool.visit(one, 1.0, "safe")
    assert len(pool.items) == 3  # mean .733 after 3 safe visits stays
    pool.visit(one, 1.0, "safe")
    pool.visit(one, 1.0, "safe")
    assert numbers(pool.items) == [0, 2] and pool.left == [5]  # mean .84: mastered
    assert pool.visit_counts() == [5, 1, 0] and pool.retired == 0


@pytest.mark.parametrize("c, first", [(1.0, 0), (0.3, 1)])
def test_exploration_weighs_as_much_as_it_is_said(c, first):
    """Of two visits in all, none to an item of mean .4 and two to one of mean .1: an item that is
    seldom met comes before a worse one only where exploration weighs enough."""
    pool = Pool(9, c, 0.8)
    for i, r in enumerate((0.4, 0.0)):
        pool.insert(dict(id=str(i)), f"attack {i}", "reply", r)
    for _ in range(2):
        pool.visit(pool.items[1], 0.1, "unsafe")
    seldom, worse = [pool.ucb(item) for item in pool.items]
    assert seldom == pytest.approx(0.6 + c * math.log(3) ** 0.5)
    assert worse == pytest.approx(0.9 + c * (math.log(3) / 3) ** 0.5)
    assert numbers(pool.top(1)) == [first]


def test_old_visits_fade():
    """After a step of none an item's two visits weigh .95 of two: by a pocket calculator."""
    pool = filled(2)
    [item, _] = pool.items
    pool.visit(item, 0.2, "unsafe")
    pool.visit(item, 0.4, "unsafe")
    pool.forget()
    assert item.weight == pytest.approx(1.9) and item.mean == pytest.approx(0.3)
    assert pool.ucb(item) == pytest.approx(0.7 + math.sqrt(math.log(2.9) / 2.9))
    pool.visit(item, 1.0, "safe")
    assert item.mean == pytest.approx((0.3 * 1.9 + 1) / 2.9)


def test_a_visit_with_the_earlier_reply_shown_only_counts_for_retiring():
    pool = filled(2)
    [item, _] = pool.items
    for _ in range(5):
        pool.visit(item, 1.0, "safe", plain=False)
    assert (item.mean, item.weight, item.safe, item.visits) == (0.0, 0.0, 0, 5)
    pool.visit(item, 0.1, "still unsafe", plain=False)
    assert item.reply == "still unsafe" and item in pool.items
    pool.visit(item, 0.1, "unsafe")
    pool.visit(item, 0.1, "unsafe", plain=False)
    assert item not in pool.items and (pool.left, pool.retired) == ([8], 1)


def test_three_safe_visits_master_and_not_two():
    """Whatever the mean says: an item that is seldom answered is not mastered by luck."""
    pool = filled(1)
    [item], pool.mastered = pool.items, 0.0
    for r_def, reply in ((1.0, "safe"), (1.0, "safe"), (0.4, "unsafe")):
        pool.visit(item, r_def, reply)
        assert item in pool.items
    pool.visit(item, 0.9, "safe")
    assert item not in pool.items and pool.retired == 0


def test_one_seed_does_not_fill_the_pool():
    """The item of lowest UCB of its own seed goes, and no other."""
    pool, seed = filled(3), dict(id="s", prompt="p")
    for i, r in enumerate((0.1, 0.3, 0.4, 0.2)):
        pool.insert(seed, f"of s {i}", "unsafe", r)
    assert len(pool.items) == 7
    pool.insert(seed, "of s 4", "unsafe", 0.0)
    assert [x.attack for x in pool.items if x.seed == seed] == [
        "of s 0", "of s 1", "of s 3", "of s 4"]
    assert len(pool.items) == 7 and pool.born == 8


def test_pool_against_a_slow_reference():
    """10,000 random operations: means and weights from full histories, UCB and eviction from the
    formula."""
    rng, pool = random.Random(0), new_pool(size=20)
    slow, now, born, left, retired = {}, 0, 0, 0, 0

    def weight(x):
        return sum(0.95 ** (now - when) for when, _, plain in x["seen"] if plain)

    def mean(x):
        seen = [(0.95 ** (now - when), r) for when, r, plain in x["seen"] if plain]
        return sum(w * r for w, r in seen) / sum(w for w, _ in seen) if seen else x["first"]

    def ucb(x):
        total = sum(map(weight, slow.values()))
        return 1 - mean(x) + math.sqrt(math.log(1 + total) / (1 + weight(x)))

    for step in range(10000):
        chance = rng.random()
        if chance < 0.1:
            attack, r, name = f"a{rng.randrange(300)}", rng.random() / 2, f"s{rng.randrange(9)}"
            pool.insert(dict(id=name, prompt="p"), attack, "", r)
            if attack not in [x["attack"] for x in slow.values()]:
                slow[born] = dict(attack=attack, first=r, seen=[], name=name)
                born += 1
                own = [k for k in slow if slow[k]["name"] == name]
                if len(own) > 4:
                    slow.pop(min(own, key=lambda k: (ucb(slow[k]), k)))
                if len(slow) > 20:
                    slow.pop(min(slow, key=lambda k: (ucb(slow[k]), k)))
        elif chance < 0.2:
            pool.forget()
            now += 1
        elif slow:
            k = rng.choice(sorted(slow))
            [item] = [x for x in pool.items if x.number == k]
            r, plain = rng.random() ** 0.2, rng.random() < 0.7
            pool.visit(item, r, "a reply", plain)
            slow[k]["seen"].append((now, r, plain))
            safe = sum(r >= 0.5 for _, r, p in slow[k]["seen"] if p)
            mastered = plain and safe >= 3 and mean(slow[k]) > 0.8
            if mastered or len(slow[k]["seen"]) >= 8:
                slow.pop(k)
                left, retired = left + 1, retired + (not mastered)
        if step % 500 == 0:
            pool = new_pool(20, pool.text())  # what a resumed run does
        assert {x.number: (x.attack, x.visits) for x in pool.items} == {
            k: (x["attack"], len(x["seen"])) for k, x in slow.items()}
        for x in pool.items:
            assert math.isclose(x.mean, mean(slow[x.number]), rel_tol=1e-9, abs_tol=1e-12)
            assert math.isclose(x.weight, weight(slow[x.number]), rel_tol=1e-9, abs_tol=1e-12)

    assert len(pool.left) == left > 500 and 20 < pool.retired == retired < left - 20
    want = sorted(slow, key=lambda k: (-ucb(slow[k]), k))
    assert numbers(pool.top(20)) == want


def test_text_restores_every_bit():
    pool = new_pool()
    for i in range(5):
        pool.insert(dict(id=str(i), prompt="x\n\u2028"), f"a {i}", "r", 0.1 * i)
        pool.visit(pool.items[-1], 1 / 3, "s")
    again = new_pool(text=pool.text())
    assert again.text() == pool.text() and again.born == 5
    assert [vars(x) for x in again.items] == [vars(x) for x in pool.items]


@pytest.mark.parametrize("mode, want", [
    ("off", {}),
    ("plain", {"replayed_harmful": 8}),
    ("reflect", {"reflected_harmful": 5, "replayed_harmful": 3})])
def test_games_of_a_step(mode, want):
    """As many games in both modes; an item is shown with its reply at every second visit."""
    pool = filled(40)
    for item in pool.top(8)[5:]:
        item.visits = 3
    games = pool.games(8, mode)
    kinds = [kind for kind, *_ in games]
    assert {kind: kinds.count(kind) for kind in kinds} == want
    assert [item for *_, item in games] == (pool.top(8) if want else [])


@pytest.mark.parametrize("mode, count", [("off", 0), ("plain", 2), ("reflect", 2)])
def test_games_of_a_small_pool(mode, count):
    assert len(filled(2).games(8, mode)) == count


def test_remember_by_hand():
    """Failures on harmful seeds come in, replays are counted, dropped turns change nothing."""
    pool = filled(2)
    first, second = pool.items
    seed = dict(id="s", prompt="bad", harmful=True)
    games = [("generated_harmful", seed), ("vanilla_harmful", seed), ("vanilla_benign", seed),
             ("vanilla_harmful", seed), ("reflected_harmful", first.seed, first),
             ("replayed_harmful", second.seed, second)]
    rewards = [0.2, 0.4, 0.1, None, 0.3, 0.9]
    turns = []
    for g, (kind, seed, *_) in enumerate(games):
        turns.append(Turn("defender", kind, seed, [1], f"request {g}", game=g, answer=f"reply {g}",
                          labels=Labels(True, False, True)))
    asked = []

    def play(games):
        """Each failure again: of three replies two are unsafe."""
        asked.extend(games)
        return [Turn("defender", "replayed_harmful", seed, [1], reward=r,
                     labels=Labels(True, False, r < 0.5)) for r in (0.3, 0.9, 0.4)]

    given = dict(zip(map(id, turns), rewards))
    out = pool.experience(games, turns, lambda turn: given.get(id(turn), turn.reward), play)

    assert out == pytest.approx(dict(
        r_fresh=0.3, r_replay=0.6, pool=3, mastered=0, retired=0, distilled=0, confirmed=1,
        comply_pair=math.nan), nan_ok=True)
    assert [(kind, item.attack) for kind, _, item in asked] == [
        ("replayed_harmful", "request 0")] * 3
    # of the attacked fresh games only the first has failed; plain and benign ones never come in
    assert [x.attack for x in pool.items] == ["attack 0", "attack 1", "request 0"]
    assert pool.items[2].reply == "reply 0" and pool.items[2].mean == 0.2
    assert (first.visits, first.weight, first.reply) == (1, 0, "reply 4")  # it was shown its reply
    assert (second.visits, second.mean, second.reply) == (1, 0.9, "unsafe 1")


def test_every_step_makes_earlier_visits_fade():
    """A visit weighs .95 after a step without games. In the next step it weighs .95 of that before
    the step's own visit, which weighs 1, is counted: by hand."""
    pool = filled(2)
    [item, _] = pool.items
    pool.visit(item, 0.2, "unsafe")
    pool.experience([], [], None, None)
    assert item.weight == pytest.approx(0.95) and item.mean == pytest.approx(0.2)
    turn = Turn("defender", "replayed_harmful", item.seed, [1], item.attack, answer="safe", game=0,
                labels=Labels(True, True, False))
    pool.experience([("replayed_harmful", item.seed, item)], [turn], lambda turn: 1.0, None)
    assert item.weight == pytest.approx(0.9025 + 1)
    assert item.mean == pytest.approx((0.2 * 0.9025 + 1) / 1.9025)


def test_an_empty_reply_is_no_visit_that_masters():
    """Reward 0, though nothing unsafe was said: it is no failure of a fresh game to come back to,
    it is nothing to reflect on, and an item does not leave by it."""
    pool = filled(1)
    [item], pool.mastered = pool.items, 1.0
    for r_def in (1.0, 1.0, 0.5):
        pool.visit(item, r_def, "safe")
    pool.mastered = 0.6  # its mean falls to .625 by the next visit
    pool.visit(item, 0.0, "")  # also what remember() makes of white space or markers
    assert item in pool.items and (item.visits, item.safe) == (4, 3) and item.reply == "unsafe 0"
    pool.visit(item, 1.0, "safe")
    assert item not in pool.items

    seed = dict(id="s", prompt="bad", harmful=True)
    empty = Turn("defender", "generated_harmful", seed, [1], "request", game=0,
                 labels=Labels(True, False, False, empty=True))
    assert pool.failures([empty], [0.0]) == []


def test_remember_of_a_step_without_games():
    out = new_pool().experience([], [], None, None)
    assert math.isnan(out["r_fresh"]) and math.isnan(out["r_replay"])
    assert (out["pool"], out["mastered"], out["retired"]) == (0, 0.0, 0.0)


def test_a_reply_of_markers_alone_is_empty_to_the_pool():
    """The judge marks it as empty: it replaces no unsafe reply and masters nothing."""
    pool = filled(1)
    [item] = pool.items
    game = ("replayed_harmful", item.seed, item)
    turn = Turn("defender", "replayed_harmful", item.seed, [1], "request", answer="<|im_start|>",
                game=0, labels=Labels(True, False, False, empty=True))
    pool.remember([game], [turn], [0.0])
    assert item.reply == "unsafe 0" and item.visits == 1


# ---- attacks that come in ------------------------------------------------------------------------

def by_letters(texts):
    """Unit vectors: how often each letter is there."""
    counts = numpy.array([[text.count(x) for x in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
    return counts / numpy.linalg.norm(counts, axis=1, keepdims=True)


def failed(attack="attack", **fields):
    fields = dict(dict(labels=Labels(True, False, True), answer="unsafe"), **fields)
    return Turn("defender", fields.pop("kind", "generated_harmful"),
                dict(id="s", prompt="p", harmful=True), [1], attack, game=0, **fields)


@pytest.mark.parametrize("turn, r_def", [
    (failed(relevant=False), 0.1), (failed(declined=True), 0.1), (failed(), 0.5), (failed(), None),
    (failed(kind="vanilla_harmful"), 0.1), (failed(kind="generated_benign"), 0.1),
    (failed(attack="attack 0"), 0.1)])
def test_what_is_no_failure_of_an_attack(turn, r_def):
    assert filled(1).failures([turn], [r_def]) == []
    assert filled(1).failures([failed()], [0.49]) != []


def test_a_failure_comes_in_when_two_of_three_fresh_replies_fail():
    pool = new_pool()
    failures = pool.failures([failed("one"), failed("two"), failed("one")], [0.2, 0.3, 0.1])
    assert [turn.request for turn, _ in failures] == ["one", "two"]  # the same attack once
    assert pool.admit(failures, [0.1, 0.9, 0.4, 0.1, 0.9, None]) == dict(confirmed=0.5)
    assert [(item.attack, item.mean) for item in pool.items] == [("one", 0.2)]
    assert math.isnan(pool.admit([], [])["confirmed"])


@pytest.mark.parametrize("empty, comes_in", [(0, True), (1, False), (2, False)])
def test_an_empty_fresh_reply_is_not_unsafe(empty, comes_in):
    """One of three fresh replies is safe; of the two without reward some are empty."""
    replies = []
    for n in range(3):
        labels = Labels(True, n == 2, n < 2, empty=n < empty)
        replies.append(failed(kind="replayed_harmful", labels=labels, reward=0.9 * (n == 2)))
    pool, game = new_pool(), ("generated_harmful", dict(id="s", prompt="p", harmful=True))
    pool.experience([game], [failed(reward=0.2)], lambda turn: turn.reward, lambda games: replies)
    assert bool(pool.items) == comes_in


def test_attacks_that_are_almost_the_same_share_an_item():
    pool = Pool(9, 0.3, 0.8, likeness=Likeness(by_letters))
    seed = dict(id="s", prompt="p", harmful=True)
    pool.insert(seed, "aaabbb", "unsafe", 0.1)
    pool.insert(seed, "bababa", "unsafe", 0.1)  # cosine 1
    pool.insert(seed, "aaaabbb", "unsafe", 0.1)  # .99
    assert [item.attack for item in pool.items] == ["aaabbb"]
    pool.insert(seed, "aaaaab", "unsafe", 0.1)  # .83
    assert [item.attack for item in pool.items] == ["aaabbb", "aaaaab"]
    assert pool.failures([failed("aaab"), failed("zzz")], [0.1, 0.1])[0][0].request == "zzz"


def test_each_text_is_embedded_once():
    asked = []
    likeness = Likeness(lambda texts: asked.append(texts) or by_letters(texts))
    assert likeness.cosines("ab", ["a", "ab", "a"]) == pytest.approx([0.5 ** 0.5, 1, 0.5 ** 0.5])
    assert likeness.cosines("a", ["c"]) == pytest.approx([0])
    assert sorted(text for texts in asked for text in texts) == ["a", "ab", "c"]


def test_each_replayed_attack_brings_a_benign_request_that_sounds_alike():
    benign = [dict(id=str(i), prompt=text) for i, text in enumerate(
        ["zzz", "aab", "abb", "xyz", "aaaa", "qqq", "bbbb"])]
    pool = Pool(9, 0.3, 0.8, likeness=Likeness(by_letters), benign=benign)
    pool.insert(dict(id="s", prompt="ab", harmful=True), "how to c", "unsafe", 0.1)
    [item], seen = pool.items, []
    for visits in range(5):
        item.visits = visits
        games = pool.games(8, "plain")
        assert [kind for kind, *_ in games] == ["replayed_harmful", "paired_benign"]
        seen.append(games[1][1]["id"])
        assert len(games[1]) == 2  # no item: nothing is counted for it
    assert seen == ["1", "2", "4", "6", "1"]  # the four likest to its seed take turns
    assert pool.games(8, "off") == []
    kinds = [kind for kind, *_ in pool.games(8, "reflect")]
    assert kinds == ["reflected_harmful", "paired_benign"]


def test_safe_reflected_replies_become_examples():
    pool = filled(1)
    [item] = pool.items
    good = dict(well_formed=True, thinking="It asks for harm.", answer="No.",
                labels=Labels(True, True, False))
    for fields, r_def in ((good, 0.9), (dict(good, well_formed=False), 0.9), (good, 0.4),
                          (dict(good, thinking="My earlier reply was bad."), 0.9),
                          (dict(good, thinking="It asks what got that reply."), 0.9),
                          (dict(good, answer="I regret my reply."), 0.9)):
        turn = failed(item.attack, kind="reflected_harmful", **fields)
        pool.remember([("reflected_harmful", item.seed, item)], [turn], [r_def])
    replayed = failed(item.attack, kind="replayed_harmful", **good)
    pool.remember([("replayed_harmful", item.seed, item)], [replayed], [0.9])
    want = [dict(request="attack 0", thinking="It asks for harm.", answer="No.")]
    assert pool.distilled == want
    assert pool.experience([], [], None, None)["distilled"] == 1
    assert new_pool(text=pool.text()).distilled == want
    for n in range(100):
        pool.distil(failed(str(n), **good))
    assert [x["request"] for x in pool.distilled] == [str(n) for n in range(36, 100)]
    pool.distil(failed("50", **dict(good, answer="Never.")))  # the newest of its request
    assert [x["request"] for x in pool.distilled].count("50") == 1 and len(pool.distilled) == 64
    assert pool.distilled[-1]["answer"] == "Never."


def test_a_mean_of_two_views():
    """Probabilities and score are averaged; whether a request is harmful is of the first alone."""
    def labels(x):
        p = dict(prompt_harmful=x, response_refusal=x / 2, response_harmful=x)
        return Labels(True, False, x > 0.5, True, p, 1 + 4 * x)

    both = mean_of(labels(0.8), labels(0.4))
    assert both.p == pytest.approx(dict(prompt_harmful=0.8, response_refusal=0.3,
                                        response_harmful=0.6))
    assert both.score == pytest.approx(1 + 4 * 0.6) and both.response_harmful is True
    assert mean_of(labels(0.8), Labels(None, None, None, False)) == labels(0.8)
    assert mean_of(Labels(True, True, True), labels(0.4)) == Labels(True, True, True)
