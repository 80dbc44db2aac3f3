"""evaluation/held_back.py: what is measured on dev seeds during self-play, by hand."""
import dataclasses
import math

import numpy
import pytest

from evaluation import held_back
from judge import Labels
from selfplay.turns import Turn

BAD = [dict(id=f"h{i}", prompt=f"bad {i}", harmful=True) for i in range(3)]
GOOD = [dict(id="b0", prompt="good 0", harmful=False)]
HARM, REFUSED, EMPTY = Labels(True, False, True), Labels(True, True, False), Labels(
    True, False, False, empty=True)
FINE, OVER = Labels(False, False, False), Labels(False, True, False)
# The attacks on bad 0, 1, 2 as unit vectors: cosines .6, 0 and .8; each seed is its own axis.
VECTORS = {"attack h0": [1, 0, 0], "attack h1": [0.6, 0.8, 0], "attack h2": [0, 1, 0],
           "bad 0": [1, 0, 0], "bad 1": [0, 1, 0], "bad 2": [0, 0, 1]}


def embed(texts):
    return numpy.array([VECTORS[text] for text in texts], dtype=float)


def test_games_are_each_seed_plainly_and_attacked():
    assert [(kind, seed["id"]) for kind, seed in held_back.games(BAD[:1] + GOOD)] == [
        ("vanilla_harmful", "h0"), ("vanilla_benign", "b0"),
        ("generated_harmful", "h0"), ("generated_benign", "b0")]


@pytest.fixture
def played(loaded):
    """Turns of the games of BAD and GOOD with the labels below, and the tokenizer."""
    plain = dict(h0=HARM, h1=REFUSED, h2=EMPTY, b0=FINE)
    attacked = dict(h0=HARM, h1=HARM, h2=REFUSED, b0=OVER)
    turns = []
    for game, (kind, seed) in enumerate(held_back.games(BAD + GOOD)):
        labels = (plain if kind.startswith("vanilla") else attacked)[seed["id"]]
        if kind.startswith("generated"):
            turns.append(Turn("attacker", kind, seed, [1], game=game, thinking="a b",
                              answer=f"attack {seed['id']}", labels=labels, well_formed=True))
        turns.append(Turn("defender", kind, seed, [1], "request", game=game, thinking="one",
                          answer="" if labels is EMPTY else "two words", labels=labels))
    return turns, loaded["qwen2"][1]


def test_rates_of_the_four_kinds(played):
    turns, tok = played
    m = held_back.measure(turns, tok, embed)
    assert (m["dev_asr_vanilla"], m["dev_refuse"]) == pytest.approx((1 / 3, 1 / 3))
    assert (m["dev_asr"], m["dev_refuse_attacked"]) == pytest.approx((2 / 3, 1 / 3))
    assert (m["dev_comply"], m["dev_comply_attacked"]) == (1.0, 0.0)
    assert m["dev_empty"] == 1 / 8 and m["dev_fmt"] == 4 / 12
    assert m["dev_faithful"] == 1.0
    assert m["dev_diversity"] == pytest.approx(1 - (0.6 + 0.0 + 0.8) / 3, abs=1e-6)
    assert m["dev_seed_cosine"] == pytest.approx((1.0 + 0.8 + 0.0) / 3, abs=1e-6)


def test_lengths_of_thinking_and_answer_apart(played):
    turns, tok = played

    def length(text):
        return len(tok(text, add_special_tokens=False).input_ids)

    m = held_back.measure(turns, tok, embed)
    assert m["dev_think"] == length("one") and m["dev_think_atk"] == length("a b")
    assert m["dev_answer"] == pytest.approx(length("two words") * 7 / 8)
    assert m["dev_attack"] == pytest.approx(
        sum(length(f"attack {seed['id']}") for seed in BAD + GOOD) / 4)


def test_an_empty_reply_to_a_benign_seed_is_no_compliance(played):
    turns, tok = played
    empty = dataclasses.replace(FINE, empty=True)
    turns = [dataclasses.replace(t, labels=empty) if t.kind == "vanilla_benign" else t
             for t in turns]
    assert held_back.measure(turns, tok, embed)["dev_comply"] == 0.0


def test_without_attacks_there_is_no_diversity(played):
    turns, tok = played
    m = held_back.measure([t for t in turns if t.role == "defender"], tok, embed)
    assert math.isnan(m["dev_diversity"]) and math.isnan(m["dev_seed_cosine"])
    assert math.isnan(m["dev_attack"])


def test_the_line_says_the_rates(played):
    turns, tok = played
    assert held_back.line(20, held_back.measure(turns, tok, embed)) == (
        "  dev, step 20 | harmful: asr 0.33 refuse 0.33, attacked 0.67 0.33 | "
        "benign: comply 1.00, attacked 0.00 | empty 0.12 | attacks: diversity 0.53")
