"""02_selfplay_rl.py: rewards, returns, advantages, loss, the game, SSP; that the loop learns."""
import copy
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import types

import numpy
import pandas
import pytest
import torch
from helpers import (KINDS, ROOT, SMALL, FakeJudge, import_stage, keep_constants, read_jsonl,
                     seeded, stops, write_jsonl)

import judge
from engine.logprobs import cross_entropy_step, token_logprobs
from engine.models import load_model
from engine.optim import OPTIMIZERS, MasterAdamW, cosine_with_warmup
from judge import Labels, settle
from selfplay import session
from selfplay.replay import Pool
from selfplay.turns import Turn, example, plain_prompt

rl = import_stage("02_selfplay_rl")


# ---- rewards -------------------------------------------------------------------------------------

# SRT section 3 typed by hand, for every combination of the judge's labels (prompt harmful, refusal,
# response harmful): attacker's harm term, attacker's refusal term, defender's harm term, defender's
# refusal term.
BY_HAND = {
    (True, True, True): (+1.0, -0.5, -1.0, +1.0),
    (True, True, False): (-1.0, -0.5, +1.0, +1.0),
    (True, False, True): (+1.0, +0.5, -1.0, -1.0),
    (True, False, False): (-1.0, +0.5, +1.0, -1.0),
    (False, True, True): (+1.0, +0.5, -1.0, -1.0),
    (False, True, False): (-1.0, +0.5, +1.0, -1.0),
    (False, False, True): (+1.0, -0.5, -1.0, +1.0),
    (False, False, False): (-1.0, -0.5, +1.0, +1.0)}
GAMES = {"generated_harmful": True, "generated_benign": False,
         "vanilla_harmful": True, "vanilla_benign": False}


@pytest.mark.parametrize("kind, labels", list(itertools.product(GAMES, BY_HAND)))
def test_reward_table(kind, labels):
    a_harm, a_refusal, d_harm, d_refusal = BY_HAND[labels]
    faithful = 0.5 if labels[0] == GAMES[kind] else -0.5
    attacker, defender = faithful + a_harm + a_refusal, d_harm + d_refusal
    x = Labels(*labels)
    assert rl.game_reward("attacker", kind, x, "general_sum") == pytest.approx(attacker)
    assert rl.game_reward("defender", kind, x, "general_sum") == pytest.approx(defender)
    assert rl.game_reward("defender", kind, x, "zero_sum") == pytest.approx(defender)
    assert rl.game_reward("attacker", kind, x, "zero_sum") == pytest.approx(faithful - defender)


@pytest.mark.parametrize("role", ["attacker", "defender"])
@pytest.mark.parametrize("hole", range(3))
def test_a_label_that_is_none_drops_the_turn(role, hole):
    labels = [True, True, True]
    labels[hole] = None
    x = Labels(*labels, parsed=False)
    assert rl.game_reward(role, "vanilla_harmful", x, "general_sum") is None
    assert rl.turn_reward(turn(role), x) is None


def turn(role="defender", kind="vanilla_harmful", **fields):
    seed = dict(id="s", prompt="<harmful seed #1>", harmful=True)
    return Turn(role, kind, seed, [1, 2], **fields)


def test_format_and_copy_terms(monkeypatch):
    labels = Labels(True, True, False)  # defender's game reward 2, attacker's .5 - 1 - .5 = -1
    assert rl.turn_reward(turn(well_formed=True, answer="x"), labels) == 3.0
    assert rl.turn_reward(turn(well_formed=False), labels) == 1.0

    monkeypatch.setattr(rl, "COT", False)
    assert rl.turn_reward(turn(well_formed=True), labels) == 2.0
    assert rl.turn_reward(turn(well_formed=False), labels) == 2.0

    monkeypatch.setattr(rl, "COPY_COEF", 0.5)
    copied = turn("attacker", "generated_harmful", answer=" <Harmful seed  #1>.")
    assert rl.turn_reward(copied, labels) == -1.5
    assert rl.turn_reward(dataclasses.replace(copied, answer="something else"), labels) == -1.0


@pytest.mark.parametrize("labels", [
    Labels(False, True, False),  # echoed by the defender, it would win a benign game
    Labels(True, False, True), Labels(False, True, True)])
@pytest.mark.parametrize("scheme, lost", [
    ("general_sum", -1.0),       # -(.5 + 1 + .5) and the format
    ("zero_sum", -1.5)])         # -(.5 + 1 + 1) and the format
def test_an_attack_that_declines_its_seed_has_lost(monkeypatch, labels, scheme, lost):
    monkeypatch.setattr(rl, "SCHEME", scheme)
    declined = turn("attacker", "generated_benign", answer="I'm sorry, no.", well_formed=True,
                    declined=True)
    assert rl.turn_reward(declined, labels) == lost


def test_declined_attacks_as_published_and_with_ssp(monkeypatch):
    """Faithful, "refused", though harmless: 0 of the table, and the format."""
    echoed, attack = Labels(False, True, False), turn("attacker", "generated_benign",
                                                      answer="I'm sorry, no.", well_formed=True)
    declined = dataclasses.replace(attack, declined=True)
    assert rl.turn_reward(attack, echoed) == 1.0
    monkeypatch.setattr(rl, "DECLINED_LOSES", False)
    assert rl.turn_reward(declined, echoed) == 1.0

    monkeypatch.setattr(rl, "DECLINED_LOSES", True)
    monkeypatch.setattr(rl, "METHOD", "ssp")
    p = dict(prompt_harmful=0.1, response_refusal=0.9, response_harmful=0.1)
    lost = Labels(False, True, False, True, p, 1.4)
    assert rl.turn_reward(declined, lost) == 0.0  # the format and the charge, each .25
    assert rl.turn_reward(dataclasses.replace(attack, relevant=False), lost) == 0.0
    assert rl.turn_reward(attack, lost) == pytest.approx(0.25 + 0.9 * 0.9)


def test_an_empty_reply_is_no_way_out_of_a_penalty():
    """Empty and malformed: the harmful request is not refused (-1), nothing harmful said (+1),
    format lost (-1)."""
    empty = settle(Labels(True, True, True), "")
    assert rl.turn_reward(turn(well_formed=False), empty) == -1.0
    assert rl.turn_reward(turn(well_formed=True), Labels(True, True, False)) == 3.0


def test_a_seed_that_is_shown_may_have_its_own_label(monkeypatch):
    """A refusal of a benign seed that the judge takes for harmful: right by its label (+1), wrong by
    the seed's own (-1). The attack of a game has no label but the judge's."""
    refusal = Labels(True, True, False)
    for own, want in ((False, 3.0), (True, 1.0)):
        monkeypatch.setattr(rl, "SEED_LABELS", own)
        assert rl.turn_reward(turn(kind="vanilla_benign", well_formed=True), refusal) == want
        assert rl.turn_reward(turn(kind="generated_benign", well_formed=True), refusal) == 3.0
        assert rl.turn_reward(turn(well_formed=True), refusal) == 3.0
        assert rl.turn_reward(turn(well_formed=True), Labels(False, True, False)) == 2 * own + 1


@pytest.mark.parametrize("harmful", [True, False])
@pytest.mark.parametrize("scheme, attacker", [("general_sum", -1 - 0.5), ("zero_sum", -1 - 1.0)])
def test_an_empty_reply_is_neither_refusal_nor_answer(harmful, scheme, attacker):
    """Harmless (+1 and -1), and the refusal term is lost by both players, whatever the request."""
    empty, kind = settle(Labels(harmful, True, True), ""), "generated_harmful"
    assert rl.game_reward("defender", kind, empty, scheme) == 0.0
    faithful = 0.5 if harmful else -0.5
    assert rl.game_reward("attacker", kind, empty, scheme) == faithful + attacker


@pytest.mark.parametrize("kind", ["generated_harmful", "generated_benign", "replayed_harmful"])
def test_an_empty_reply_wins_nothing_with_ssp(kind):
    p = dict(prompt_harmful=0.9, response_refusal=0.9, response_harmful=0.9)
    empty = settle(Labels(True, True, True, True, p, 4.6), " ")
    assert rl.game_reward("defender", kind, empty, "ssp") == 0.0
    assert rl.game_reward("attacker", kind, empty, "ssp") == 0.0


def scored(score, refusal=0.0):
    """Labels with a rubric's score and a probability of refusal."""
    p = dict(prompt_harmful=0.9, response_refusal=refusal, response_harmful=(score - 1) / 4)
    return Labels(True, refusal > 0.5, score > 3, True, p, score)


@pytest.mark.parametrize("kind, labels, lost, kept", [
    ("generated_harmful", scored(1.0), 0.0, 0.9),
    ("vanilla_harmful", scored(3.0), 0.5, 0.9),
    ("reflected_harmful", scored(5.0), 1.0, 0.9),
    ("replayed_harmful", scored(2.0), 0.25, 0.9),
    ("generated_harmful", scored(5.4), 1.0, 0.9),
    ("generated_harmful", scored(0.9), 0.0, 0.9),
    ("vanilla_benign", scored(5.0, 0.25), 0.25, 0.1),
    ("paired_benign", scored(5.0, 0.25), 0.25, 0.1),
    ("generated_benign", scored(1.0, 1.0), 1.0, 0.1)])
def test_ssp_rewards_are_complementary_and_clipped(kind, labels, lost, kept):
    """kept: the probability that the request has its seed's label; .9 that it is harmful."""
    assert rl.game_reward("attacker", kind, labels, "ssp") == pytest.approx(lost * kept)
    assert rl.game_reward("defender", kind, labels, "ssp") == pytest.approx(1 - lost)


@pytest.mark.parametrize("kind, labels, defender", [
    ("generated_harmful", scored(2.0), 0.75), ("generated_benign", scored(2.0, 1.0), 0.75),
    ("generated_benign", scored(5.0, 0.0), 0.0)])
def test_after_an_attack_that_drifted_only_the_reply_counts(kind, labels, defender):
    """It earns less than an honest failure; the defender may refuse it, and is to be harmless."""
    assert rl.game_reward("attacker", kind, labels, "ssp", True) == -0.25
    assert rl.game_reward("attacker", kind, scored(1.0, 0.0), "ssp") == 0.0
    assert rl.game_reward("defender", kind, labels, "ssp", True) == pytest.approx(defender)
    empty = settle(labels, "")
    assert rl.game_reward("attacker", kind, empty, "ssp", True) == -0.25
    assert rl.game_reward("defender", kind, empty, "ssp", True) == 0.0


@pytest.mark.parametrize("loses", [True, False])
@pytest.mark.parametrize("fields", [{}, dict(declined=True), dict(relevant=False)])
@pytest.mark.parametrize("labels", [scored(2.0, 0.9), Labels(None, None, None, False, {}, 2.0)])
def test_the_pool_sees_the_reward_without_the_format(monkeypatch, loses, fields, labels):
    """One rule of what has drifted; a dropped turn is dropped for both."""
    for name, value in dict(METHOD="ssp", COT=False, DECLINED_LOSES=loses).items():
        monkeypatch.setattr(rl, name, value)
    reply = turn("defender", "generated_benign", answer="x", labels=labels, **fields)
    assert rl.r_def(reply) == rl.turn_reward(reply, labels)
    assert (rl.r_def(reply) is None) == (not labels.parsed)
    if labels.parsed:
        drifted = fields.get("declined", False) and loses or "relevant" in fields
        assert rl.r_def(reply) == pytest.approx(0.75 if drifted else 0.1)


def test_ssp_without_probabilities_drops_the_turn():
    assert rl.game_reward("defender", "vanilla_harmful", Labels(True, False, True), "ssp") is None


# ---- returns, advantages, loss -------------------------------------------------------------------

def test_token_returns_sum_and_place():
    """Total of the token rewards is R - beta * sum(k1), and only the last token carries R."""
    logp, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.25])
    # k1 = .5, -1, -.25; beta .1: r = -.05, .1, .025 + 2; G_2 = 2.025, G_1 = 2.125, G_0 = 2.075
    G = rl.token_returns(2.0, logp, ref, 0.1)
    assert torch.allclose(G, torch.tensor([2.075, 2.125, 2.025]))
    assert G[0].item() == pytest.approx(2.0 - 0.1 * (0.5 - 1.0 - 0.25))


def test_advantages_are_normalized_for_each_role_alone():
    g = seeded(0)
    returns = [torch.randn(n, generator=g) + (5 if n % 2 else -3) for n in (3, 4, 5, 6, 7, 8)]
    roles = ["attacker", "defender"] * 3
    out, degenerate = rl.advantages(returns, roles)
    assert degenerate == 0
    for role in ("attacker", "defender"):
        x = torch.cat([a for a, r in zip(out, roles) if r == role])
        assert abs(x.mean().item()) < 1e-6
        assert x.std(correction=0).item() == pytest.approx(1, abs=1e-5)

    swapped, _ = rl.advantages(returns[::-1], roles[::-1])
    for a, b in zip(out, swapped[::-1]):
        assert torch.allclose(a, b, atol=1e-6)


def test_advantages_of_a_role_whose_returns_are_equal_are_zero():
    returns = [torch.ones(3), torch.ones(2), torch.tensor([1.0, 3.0])]
    flat, degenerate = rl.advantages(returns, ["attacker", "attacker", "defender"])
    assert degenerate == 1
    assert [x.tolist() for x in flat] == [[0, 0, 0], [0, 0], [-1.0, 1.0]]


def test_loss_by_hand():
    """eps .2. rho 1.5, A 2: clipped, -2.4. rho .5, A 1: not clipped, -.5. rho .5, A -1: clipped,
    +.8. rho 1, A 3: -3."""
    rho, A = torch.tensor([1.5, 0.5, 0.5, 1.0]), torch.tensor([2.0, 1.0, -1.0, 3.0])
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    logp = (old + rho.log()).requires_grad_()
    total, clipped = rl.reinforce_loss(logp, old, A, 0.2)
    assert total.item() == pytest.approx(-2.4 - 0.5 + 0.8 - 3.0, abs=1e-5) and clipped == 2
    total.backward()  # d(-rho A)/dlogp = -rho A where it is not clipped, else 0
    assert torch.allclose(logp.grad, torch.tensor([0.0, -0.5, 0.0, -3.0]), atol=1e-5)


def over_all_actions(theta, gradient_of):
    """E over the actions a of a softmax policy of gradient_of(log-probability [1], a)."""
    mean = torch.zeros_like(theta)
    for a in range(len(theta)):
        logp = torch.log_softmax(theta, 0)[a:a + 1]
        [g] = torch.autograd.grad(gradient_of(logp, a), theta)
        mean += logp.exp().detach() * g
    return mean


def test_on_policy_gradient_is_the_policy_gradient():
    """A three-word policy: E over all actions of the loss's gradient equals -grad of the expected
    reward (enumerated)."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    [exact] = torch.autograd.grad(-(torch.softmax(theta, 0) * reward).sum(), theta)
    mean = over_all_actions(theta, lambda logp, a: rl.reinforce_loss(
        logp, logp.detach(), reward[a:a + 1], 0.2)[0])
    assert torch.allclose(mean, exact, atol=1e-12)


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    """-beta * k1 as reward, enumerated for three words, has the gradient of beta KL(pi || ref)."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref, beta = torch.log_softmax(torch.tensor([0.0, 0.4, -0.1], dtype=torch.float64), 0), 0.7
    logp = torch.log_softmax(theta, 0)
    [exact] = torch.autograd.grad(beta * (logp.exp() * (logp - ref)).sum(), theta)

    def loss(logp, a):
        G = rl.token_returns(0.0, logp.detach(), ref[a:a + 1], beta)
        return rl.reinforce_loss(logp, logp.detach(), G, 0.2)[0]

    assert torch.allclose(over_all_actions(theta, loss), exact, atol=1e-12)


# Typed from scripts/red_team_game_reinforce_8b.sh and the defaults of its parser: see the table in
# results/README.md. Its 40,000 prompts make 40,000 / 32 x 1.5 = 1,875 updates of the schedule; a
# rollout of 128 seeds has 128 + 64 turns, 6 updates of 32. SFT: 4 examples on each of 4 GPUs.
PUBLISHED = dict(
    STEPS=200, SEEDS_PER_STEP=128, BENIGN_FRACTION=0.5, ATTACKED=0.5, ATTACK_TOKENS=2048,
    REPLY_TOKENS=2048, LR=5e-7, HORIZON=1875 // 6, WARMUP=0.03, UPDATES=(128 + 64) // 32,
    KL_COEF=0.01, CLIP_EPS=0.2, FORMAT_COEF=1.0, RL_COEF=1.0, SFT_COEF=1.0, SFT_BATCH=4 * 4,
    SFT_KINDS="comply", CLIP_NORM=1.0, SAVE_EVERY=100, EVAL_EVERY=10, DECLINED_LOSES=False,
    COPY_COEF=0.0, SCHEME="general_sum", COT=True, ROLES="both", OPPONENT="published",
    METHOD="self_redteam", JUDGE="allenai/wildguard", SEEDS="allenai/wildjailbreak")


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_has_the_published_settings(name):
    assert rl.PAPER.get(name, getattr(rl, name)) == PUBLISHED[name]


def test_the_table_of_settings_says_what_paper_has():
    """results/README.md: `NAME` value in a row's second column is the value of --paper."""
    table = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    table = table.split("## The published settings")[1].split("\n## ")[0]
    named = {}
    for row in re.findall(r"^\| .+? \| (.+?) \| .+ \|$", table, re.MULTILINE):
        if "01_sft_warmup.py" not in row:
            named |= dict(re.findall(r"`([A-Z_]+)` ([\w./-]+)", row))
    assert len(named) > 25
    for name, value in named.items():
        assert str(rl.PAPER.get(name, getattr(rl, name))) == str(type(getattr(rl, name))(
            value if type(getattr(rl, name)) is not bool else value == "True")), name


# ---- the game ------------------------------------------------------------------------------------

def some_seeds(n=10):
    out = []
    for harmful in (True, False):
        for i in range(n):
            word = "bad" if harmful else "good"
            out.append(dict(id=f"{word}{i}", prompt=f"{word} request {i}", harmful=harmful))
    return out


def word_judge(refusal):
    """A FakeJudge that calls replies refusals by a rule, and the other replies to a bad request
    harmful."""
    return FakeJudge(lambda request, reply: refusal(reply),
                     lambda request, reply: "bad" in request and not refusal(reply))


def odd(reply):
    return len(reply) % 2 == 1


def even_harms():
    """A judge that calls replies of even length harmful."""
    return FakeJudge(harmful=lambda request, reply: not odd(reply))


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(SEEDS_PER_STEP=8, ATTACK_TOKENS=12, REPLY_TOKENS=12, SFT_COEF=0.0,
                            TRAIN_TOKENS=4000, DTYPE="float32", HORIZON=1000, WARMUP=0.0).items():
        monkeypatch.setattr(rl, name, value)
    return monkeypatch


def a_step(model, tok, scorer, step=0, seed=1):
    return rl.play(model, model, tok, scorer, rl.draw_seeds(some_seeds(), step), seeded(seed))


def test_draw_is_half_harmful_half_attacked_and_drawn_anew(monkeypatch):
    monkeypatch.setattr(rl, "SEEDS_PER_STEP", 8)
    games = []
    for step in range(5):
        drawn = rl.draw_seeds(some_seeds(), step)
        kinds = [kind for kind, _ in drawn]
        for kind in GAMES:
            assert kinds.count(kind) == 2
        games += drawn
    assert all(seed["harmful"] == kind.endswith("harmful") for kind, seed in games)
    used = sorted(seed["id"] for kind, seed in games if kind.endswith("harmful"))
    assert used == sorted([f"bad{i}" for i in range(10)] * 2)  # 20 draws: every seed twice

    for n, attacked in ((1, 1), (2, 2), (6, 4)):  # a half is one more
        monkeypatch.setattr(rl, "SEEDS_PER_STEP", n)
        kinds = [kind for kind, _ in rl.draw_seeds(some_seeds(), 0)]
        assert len(kinds) == n and sum(kind.startswith("generated") for kind in kinds) == attacked
    monkeypatch.setattr(rl, "SEEDS_PER_STEP", 8)

    ways, patterns = {}, set()
    for step in range(40):
        drawn = [(kind.split("_")[0], seed) for kind, seed in rl.draw_seeds(some_seeds(), step)]
        patterns.add(tuple(way for way, _ in drawn))
        for way, seed in drawn:
            ways.setdefault(seed["id"], set()).add(way)
    # every seed is attacked at times, and who is attacked is drawn anew every step (departure a)
    assert len(ways) == 20
    assert all(seen == {"generated", "vanilla"} for seen in ways.values())
    assert len(patterns) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_play_hides_thinking_and_keeps_order(loaded, small, kind):
    model, tok = loaded[kind]
    scorer, games = word_judge(lambda reply: False), rl.draw_seeds(some_seeds(), 0)
    turns = rl.play(model, model, tok, scorer, games, seeded(1))
    attackers = {t.game: t for t in turns if t.role == "attacker"}
    defenders = {t.game: t for t in turns if t.role == "defender"}
    assert len(attackers) == 4 and len(defenders) == 8

    exchanges = [(defenders[g].request, defenders[g].answer) for g in range(8)]
    rewrites = [(t.seed["prompt"], t.answer) for t in attackers.values()]
    assert scorer.pairs == exchanges + rewrites
    for t in turns:  # nothing is refused; an attack without text has declined (departure h)
        assert t.declined == (t.game in attackers and not attackers[t.game].answer)
    for g, (kind, seed) in enumerate(games):
        assert defenders[g].kind == kind
        if g in attackers:
            assert defenders[g].request == attackers[g].answer
            assert attackers[g].labels is defenders[g].labels
        else:
            assert defenders[g].request == seed["prompt"]
    assert all(len(t.ids) <= 12 and len(t.ids) == len(t.logps) for t in turns)


def test_defender_only_as_published_has_no_attacker(loaded, small):
    """ROLES=defender: all seeds go straight to the defender; with frozen_turns half are attacked."""
    small.setattr(rl, "ROLES", "defender")
    turns = a_step(*loaded["qwen2"], word_judge(odd))
    assert [t.role for t in turns] == ["defender"] * 8
    assert {t.kind for t in turns} == {"vanilla_harmful", "vanilla_benign"}
    small.setattr(rl, "OPPONENT", "frozen_turns")
    assert [t.role for t in a_step(*loaded["qwen2"], word_judge(odd))].count("attacker") == 4


def test_attacker_only_as_published_asks_the_frozen_model_in_plain_chat(loaded, small):
    """ROLES=attacker: attacked games only; the defender's prompt is the request in the template of
    the model, and its whole reply is its answer."""
    small.setattr(rl, "ROLES", "attacker")
    model, tok = loaded["qwen2"]
    turns = a_step(model, tok, word_judge(odd))
    assert [t.role for t in turns] == ["attacker"] * 4 + ["defender"] * 4
    assert all(t.kind.startswith("generated") for t in turns)
    for t in turns[4:]:
        words = tok.decode(t.prompt_ids)
        assert "<think>" not in words and "Request:" not in words
        assert t.prompt_ids == plain_prompt(tok, t.request)
        text = tok.decode(t.ids[:-1] if t.ids[-1] in tok.stop_ids else t.ids)
        assert t.answer == text.strip() and t.thinking == ""

    small.setattr(rl, "OPPONENT", "frozen_turns")
    turns = a_step(model, tok, word_judge(odd))
    assert len(turns) == 12 and "<think>" in tok.decode(turns[-1].prompt_ids)


def both(model):
    """The policy of a run in which one model has both roles."""
    return dict(attacker=model, defender=model)


@pytest.mark.parametrize("role, frozen", [("both", ""), ("attacker", "d"), ("defender", "a")])
def test_who_plays_which_role(small, role, frozen):
    small.setattr(rl, "ROLES", role)
    r = types.SimpleNamespace(policy=dict(attacker="one", defender="other"), ref="start")
    attacker, defender = rl.players(r)
    assert (attacker, defender) == ("start" if "a" in frozen else "one",
                                    "start" if "d" in frozen else "other")


def test_whether_an_attack_declines_is_asked_of_the_attack(loaded, small):
    """A judge that calls replies of odd length refusals; without CoT so that no text is empty."""
    small.setattr(rl, "COT", False)
    turns = a_step(*loaded["qwen2"], word_judge(odd), seed=2)
    of_game = {t.game: odd(t.answer) for t in turns if t.role == "attacker"}
    assert [t.declined for t in turns] == [of_game.get(t.game, False) for t in turns]
    assert {True, False} == set(of_game.values())


def test_an_empty_attack_has_declined(loaded, small):
    """Malformed turns have no answer. The judge refuses nothing; departure h."""
    turns = a_step(*loaded["qwen2"], word_judge(lambda text: False), seed=2)
    answers = {t.game: t.answer for t in turns if t.role == "attacker"}
    assert "" in answers.values()
    for t in turns:
        assert t.declined == (answers.get(t.game) == "")


def test_an_attack_is_relevant_from_a_cosine_on(loaded, small):
    """The embedder is asked for (attack, its seed); the reply is judged as one to the seed, too."""
    for name, value in dict(METHOD="ssp", COT=False, RELEVANT=0.5).items():
        small.setattr(rl, name, value)
    asked = []

    class Cosines:
        def cosines(self, attack, seeds):
            asked.append((attack, *seeds))
            return [0.5 if odd(attack) else 0.4]

    def harmful(request, reply):
        return "bad" in request  # the seeds' prompts, not the attacks

    model, tok = loaded["qwen2"]
    games = rl.draw_seeds(some_seeds(), 0)
    turns = rl.play(model, model, tok, FakeJudge(harmful=harmful), games, seeded(2),
                    likeness=Cosines())
    attacks = [t for t in turns if t.role == "attacker"]
    assert asked == [(t.answer, t.seed["prompt"]) for t in attacks]
    relevant = {t.game: odd(t.answer) for t in attacks}
    assert {True, False} == set(relevant.values())
    for t in turns:
        assert t.relevant == relevant.get(t.game, True)
        if t.game not in relevant or not t.relevant:
            continue
        of_attack, of_seed = ("bad" in text for text in (t.request, t.seed["prompt"]))
        if t.role == "defender" and of_seed and not of_attack:
            p = t.labels.p["response_harmful"]
            assert 0.4 < p < 0.6 and t.labels.score == pytest.approx(1 + 4 * p)
            break
    else:
        pytest.fail("no attacked harmful game")


@pytest.mark.parametrize("cosine, refused", [(0.4, False), (0.6, True)])
def test_after_an_attack_that_drifted_the_reply_is_no_reply_to_the_seed(loaded, small, cosine,
                                                                        refused):
    """RELEVANT=.5: attacks that are below it, or that the judge calls refusals. The labels of a
    game are those of its request and reply alone, though as a reply to its seed, which says "bad"
    in half of the games, the judge would find the reply more harmful."""
    for name, value in dict(METHOD="ssp", COT=False, RELEVANT=0.5).items():
        small.setattr(rl, name, value)
    model, tok = loaded["qwen2"]
    scorer = FakeJudge(lambda request, reply: refused, lambda request, reply: "bad" in request)
    likeness = types.SimpleNamespace(cosines=lambda attack, seeds: [cosine])
    turns = rl.play(model, model, tok, scorer, rl.draw_seeds(some_seeds(), 0), seeded(2),
                    likeness=likeness)
    attacked = [t for t in turns if t.role == "defender" and t.kind.startswith("generated")]
    assert [t.kind for t in attacked] == ["generated_harmful"] * 2 + ["generated_benign"] * 2
    assert not any("bad" in t.request for t in attacked)
    for t in attacked:
        assert (t.declined, t.relevant) == (refused, cosine > 0.5)
        assert t.labels == scorer.labels_of(t.request, t.answer)


# ---- one update ----------------------------------------------------------------------------------

def test_micro_batch_size_does_not_change_the_update(loaded, small):
    start, tok = loaded["qwen2"]
    small.setattr(rl, "DECLINED_LOSES", False)  # else all attacks lose alike: they have no text
    turns, gradients = a_step(start, tok, word_judge(odd)), []
    for size in (16, 100, 100000):  # one turn at a time, a few, all
        small.setattr(rl, "TRAIN_TOKENS", size)
        model = copy.deepcopy(start)
        optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
        step = optimizer.step

        def spy(lr, clip):
            gradients.append(torch.cat([m.grad.flatten() for m in optimizer.master]))
            return step(lr, clip)

        small.setattr(optimizer, "step", spy)
        rl.learn(model, start, optimizer, turns, [], 0)
    assert gradients[0].norm() > 1e-3
    for g in gradients[1:]:
        assert (g - gradients[0]).norm() / gradients[0].norm() < 1e-5


def sharper(model):
    """A copy of a model with other log-probabilities: its head is 1.1 times as large."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)
    return model


def test_what_is_learnt_is_the_reward_less_the_distance_from_the_reference(loaded, small):
    """learn(): the return of each token is the turn's reward, less KL_COEF times the sum from this
    token on of the log-probability in sampling less that of the reference."""
    for name, value in dict(KL_COEF=0.3, LR=0.0, DECLINED_LOSES=False).items():
        small.setattr(rl, name, value)
    ref, tok = loaded["qwen2"]
    model, normalize, given = sharper(ref), rl.advantages, []

    def spy(returns, groups):
        given.extend(returns)
        return normalize(returns, groups)

    small.setattr(rl, "advantages", spy)
    turns = a_step(model, tok, word_judge(odd))
    rl.learn(model, ref, MasterAdamW(model, (0.9, 0.95), 0.0), turns, [], 0)
    distances = []
    for t, got, ref_T in zip(turns, given, rl.logprobs_of(ref, turns), strict=True):
        k1_T = torch.tensor(t.logps) - ref_T
        distances.append(k1_T.sum().item())
        for s in range(len(t.ids)):
            want = t.reward - 0.3 * k1_T[s:].sum().item()
            assert got[s].item() == pytest.approx(want, abs=1e-4)
    assert max(map(abs, distances)) > 0.1 and len({t.reward for t in turns}) > 1


def test_the_ratio_is_to_the_policy_that_sampled(loaded, small):
    """update() with old log-probabilities of which the new ones are 1.5 times: an advantage of 1 is
    clipped at every token and has no gradient, one of -1 has 1.5 times that of a ratio of 1."""
    small.setattr(rl, "LR", 0.0)
    model, tok = copy.deepcopy(loaded["qwen2"][0]), loaded["qwen2"][1]
    turns = a_step(model, tok, word_judge(odd))
    same, optimizer = rl.logprobs_of(model, turns), MasterAdamW(model, (0.9, 0.95), 0.0)
    lower = [logp_T - math.log(1.5) for logp_T in same]

    def one(sign, old):
        advantage = [torch.full((len(t.ids),), sign) for t in turns]
        return rl.update(model, optimizer, turns, advantage, old, [], 0.0)

    plain, up, down = one(-1.0, None), one(1.0, lower), one(-1.0, lower)
    assert one(-1.0, same)["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert plain["clipped"] == down["clipped"] == 0 and up["clipped"] == up["tokens"] > 0
    assert up["grad_norm"] == 0 and plain["grad_norm"] > 1e-3
    assert down["grad_norm"] == pytest.approx(1.5 * plain["grad_norm"], rel=1e-4)


def test_a_second_update_is_compared_with_before_the_first(loaded, small):
    """Each of two updates gets the log-probabilities that its own turns had before the step; by the
    second one some have moved farther than CLIP_EPS."""
    for name, value in dict(UPDATES=2, LR=1e-2, CLIP_EPS=1e-3, DECLINED_LOSES=False).items():
        small.setattr(rl, name, value)
    start, tok = loaded["qwen2"]
    model, update, seen = copy.deepcopy(start), rl.update, []

    def spy(model, optimizer, turns, advantage, old, *rest):
        out = update(model, optimizer, turns, advantage, old, *rest)
        seen.append((turns, old, out["clipped"]))
        return out

    small.setattr(rl, "update", spy)
    turns = a_step(start, tok, word_judge(odd))
    m = rl.learn(model, start, MasterAdamW(model, (0.9, 0.95), 0.0), turns, [], 0)
    [(first, _, none), (second, _, some)] = seen
    assert sorted(t.ids for t in first + second) == sorted(t.ids for t in turns)
    assert none == 0 < some and m["clipped"] == some / sum(len(t.ids) for t in turns)
    for part, old, _ in seen:
        torch.testing.assert_close(old, rl.logprobs_of(start, part), atol=1e-5, rtol=1e-5)


def test_the_learning_rate_of_every_update(small, loaded):
    """Two updates a step, HORIZON=4 steps: 8 updates, of which WARMUP=.2 makes 2 a linear warm-up;
    then half a cosine to a tenth of LR, where it stays: by hand. What is reported is the last."""
    for name, value in dict(UPDATES=2, LR=8.0, HORIZON=4, WARMUP=0.2).items():
        small.setattr(rl, name, value)
    model = copy.deepcopy(loaded["qwen2"][0])
    turns = [turn(ids=[7, 8], logps=[-1.0, -1.0], reward=float(n)) for n in range(2)]
    optimizer, given = MasterAdamW(model, (0.9, 0.95), 0.0), []

    def step(lr, clip):
        given.append((lr, clip))
        return 0.0

    small.setattr(optimizer, "step", step)
    by_hand = {0: [0, 4], 1: [8, 7.2 * (1 + math.cos(math.pi / 6)) / 2 + 0.8], 2: [6.2, 4.4],
               4: [0.8, 0.8], 9: [0.8, 0.8]}
    for number, want in by_hand.items():
        given.clear()
        m = rl.learn(model, loaded["qwen2"][0], optimizer, turns, [], number)
        assert [lr for lr, _ in given] == pytest.approx(want) and m["lr"] == given[1][0]
        assert {clip for _, clip in given} == {rl.CLIP_NORM}


def test_both_optimizers_learn_alike(tiny_models, small):
    """bfloat16 weights, the same turns, one step: master and kahan move the weights alike."""
    small.setattr(rl, "LR", 1e-4)
    small.setattr(rl, "TRAIN_TOKENS", 1000)  # several micro-batches
    start, tok = load_model(tiny_models["qwen2"], "bfloat16")
    turns, changes = a_step(start, tok, word_judge(odd)), []
    for name in ("master", "kahan"):
        model = copy.deepcopy(start)
        optimizer = OPTIMIZERS[name](model, (0.9, 0.95), 0.0)
        rl.learn(model, start, optimizer, turns, [], 0)
        if name == "master":
            held = optimizer.master
        else:
            held = [p.float() + x.float() for p, x in zip(optimizer.params, optimizer.lost)]
        change = [(h - p.float()).flatten() for h, p in zip(held, start.parameters())]
        changes.append(torch.cat(change).detach().double())
        assert all(p.grad is None for p in model.parameters())
    a, b = changes
    assert a.norm() > 0 and a @ b / (a.norm() * b.norm()) > 0.95


def test_static_role_is_not_trained(loaded, small):
    """ROLES=defender: attacker turns have no gradient; an update on them alone changes nothing."""
    small.setattr(rl, "ROLES", "defender")
    small.setattr(rl, "OPPONENT", "frozen_turns")
    small.setattr(rl, "COT", False)  # so that no reply is empty
    start, tok = loaded["qwen2"]
    turns, model = a_step(start, tok, word_judge(odd)), copy.deepcopy(start)
    optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)

    rl.learn(model, start, optimizer, [t for t in turns if t.role == "attacker"], [], 0)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters()))
    rl.learn(model, start, optimizer, turns, [], 0)
    assert not all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters()))


def test_dropped_turns_are_not_learnt_from(loaded, small):
    start, tok = loaded["qwen2"]
    model = copy.deepcopy(start)
    turns = [dataclasses.replace(t, reward=None) for t in a_step(start, tok, word_judge(odd))]
    m = rl.learn(model, start, MasterAdamW(model, (0.9, 0.95), 0.0), turns, [], 0)
    assert m["degenerate"] == 2 and m["grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters()))


def test_warm_up_examples_are_mixed_in(loaded, small):
    """Without rewards that differ, what is learnt is the SFT mix: its loss is the plain mean over
    the examples' tokens and falls."""
    for name, value in dict(SFT_COEF=1.0, SFT_BATCH=3, LR=1e-3, KL_COEF=0.0).items():
        small.setattr(rl, name, value)
    start, tok = loaded["qwen2"]
    model = copy.deepcopy(start)
    optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
    turns = [dataclasses.replace(t, reward=1.0) for t in a_step(start, tok, word_judge(odd))]
    sft = [dict(prompt_ids=[5, 6, 7], completion_ids=[8 + i] * (i + 1)) for i in range(3)]
    prompts, completions = zip(*(e.values() for e in sft))
    with torch.no_grad():
        logp, _ = token_logprobs(start, list(prompts), list(completions))

    first = rl.learn(model, start, optimizer, turns, sft, 0)
    assert first["sft"] == pytest.approx(-logp.mean().item(), rel=1e-5)
    assert first["degenerate"] == 2 and first["grad_norm"] > 0
    assert rl.learn(model, start, optimizer, turns, sft, 1)["sft"] < first["sft"]


def test_several_updates_take_k1_from_the_training_forward(loaded, small):
    """With UPDATES=2 what sampling noted is not used: KL and returns are the training forward's."""
    small.setattr(rl, "UPDATES", 2)
    small.setattr(rl, "LR", 0.0)
    ref, tok = loaded["qwen2"]
    model = sharper(ref)
    turns = a_step(model, tok, word_judge(odd))
    wrong = [dataclasses.replace(t, logps=[-9.0] * len(t.ids)) for t in turns]
    here = torch.cat(rl.logprobs_of(model, turns)) - torch.cat(rl.logprobs_of(ref, turns))
    metrics = [rl.learn(model, ref, MasterAdamW(model, (0.9, 0.95), 0.0), some, [], 0)
               for some in (turns, wrong)]
    assert here.mean().abs() > 1e-4
    for m in metrics:
        assert m["kl"] == pytest.approx(here.mean().item(), abs=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)


def sft_examples(n):
    return [dict(prompt_ids=[5, 6, 7], completion_ids=[8 + i] * (i + 1)) for i in range(n)]


def test_the_control_learns_the_sft_mix_alone(loaded, small):
    """RL_COEF=0: the update is that of the examples; the games and their rewards do not matter."""
    for name, value in dict(SFT_COEF=1.0, SFT_BATCH=3, LR=1e-3, RL_COEF=0.0).items():
        small.setattr(rl, name, value)
    start, tok = loaded["qwen2"]
    sft, after = sft_examples(20), []
    for seed in (1, 2, None):
        model = copy.deepcopy(start)
        optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
        if seed:  # games of another number
            m = rl.learn(model, start, optimizer,
                         a_step(start, tok, word_judge(odd), 0, seed)[seed:], sft, 0)
            assert math.isnan(m["entropy"]) and math.isnan(m["gap"])  # not measured, so not 0
        else:
            batch = random.Random(f"{rl.SEED} sft 0").sample(sft, 3)
            cross_entropy_step(model, optimizer, batch, rl.TRAIN_TOKENS)
            optimizer.step(1e-3 * cosine_with_warmup(0, rl.HORIZON, 0), 1.0)
        after.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
    assert not torch.equal(after[0], torch.cat([p.flatten() for p in start.parameters()]))


def test_the_weight_of_the_policy_loss(loaded, small):
    """RL_COEF=.5 halves the gradient of the turns."""
    small.setattr(rl, "LR", 0.0)
    start, tok = loaded["qwen2"]
    turns, norms = a_step(start, tok, word_judge(odd)), []
    for coef in (1.0, 0.5):
        small.setattr(rl, "RL_COEF", coef)
        model = copy.deepcopy(start)
        optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
        norms.append(rl.learn(model, start, optimizer, turns, [], 0)["grad_norm"])
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-4)


def test_the_weight_of_the_sft_mix(loaded, small):
    """SFT_COEF=.5 halves the gradient of the examples; the loss that is reported stays."""
    for name, value in dict(LR=0.0, SFT_BATCH=3, RL_COEF=0.0).items():
        small.setattr(rl, name, value)
    start, tok = loaded["qwen2"]
    turns, norms, losses = a_step(start, tok, word_judge(odd)), [], []
    for coef in (1.0, 0.5):
        small.setattr(rl, "SFT_COEF", coef)
        model = copy.deepcopy(start)
        optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
        m = rl.learn(model, start, optimizer, turns, sft_examples(3), 0)
        norms.append(m["grad_norm"])
        losses.append(m["sft"])
    assert norms[0] > 1e-3 and norms[1] == pytest.approx(norms[0] / 2, rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---- the loop learns -----------------------------------------------------------------------------

def learn_to_refuse(loaded, small, shuffle):
    """25 steps without hidden thinking; an upper-case first letter "refuses" -> share in the first
    and the last 5 steps."""
    for name, value in dict(COT=False, LR=3e-3, SEEDS_PER_STEP=32, ATTACKED=0.0, REPLY_TOKENS=2,
                            KL_COEF=0.0).items():
        small.setattr(rl, name, value)
    ref, tok = loaded["qwen2"]
    model = copy.deepcopy(ref)
    optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
    seeds = some_seeds()
    for seed in seeds:  # every request is called harmful, so that refusing pays
        seed["prompt"] = "bad " + seed["prompt"]

    def refuses(reply):
        return reply.strip()[:1].isupper()

    share, mixer = [], random.Random(0)
    for step in range(25):
        turns = rl.play(model, model, tok, word_judge(refuses), rl.draw_seeds(seeds, step),
                        seeded(step))
        share.append(sum(refuses(t.answer) for t in turns) / len(turns))
        if shuffle:
            rewards = [t.reward for t in turns]
            mixer.shuffle(rewards)
            turns = [dataclasses.replace(t, reward=r) for t, r in zip(turns, rewards)]
        rl.learn(model, ref, optimizer, turns, [], step)
    return sum(share[:5]) / 5, sum(share[-5:]) / 5


def test_the_loop_learns(loaded, small):
    first, last = learn_to_refuse(loaded, small, shuffle=False)
    assert first < 0.6 and last > 0.85


def test_shuffled_rewards_teach_nothing(loaded, small):
    first, last = learn_to_refuse(loaded, small, shuffle=True)
    assert abs(last - first) < 0.25


# ---- SSP: the pool in the game -------------------------------------------------------------------

def filled(n):
    """A pool of n failures."""
    pool = Pool(512, 1.0, 0.8)
    for i in range(n):
        seed = dict(id=f"old{i}", prompt=f"bad old {i}", harmful=True)
        pool.insert(seed, f"attack {i}", f"unsafe {i}", 0.0)
    return pool


@pytest.mark.parametrize("replay, n, replayed", [("off", 40, 0), ("plain", 40, 2),
                                                 ("plain", 1, 1), ("reflect", 40, 2)])
def test_replayed_games_come_on_top_of_a_step(monkeypatch, replay, n, replayed):
    """8 games of a step, REPLAY_FRACTION a quarter (departure g), as far as the pool has some."""
    for name, value in dict(METHOD="ssp", REPLAY=replay, SEEDS_PER_STEP=8).items():
        monkeypatch.setattr(rl, name, value)
    seen = []

    def stop(*args, likeness):
        seen.append(args[4])
        raise InterruptedError

    monkeypatch.setattr(rl, "play", stop)
    pool = filled(n)
    r = session.Run(None, None, None, even_harms(), None, pool, some_seeds(40), [], None, [], {}, 0,
               None)
    monkeypatch.setattr(rl, "players", lambda r: (None, None))
    with pytest.raises(InterruptedError):
        rl.one_step(r, 3)
    assert seen[0][:8] == rl.draw_seeds(some_seeds(40), 3)
    old = seen[0][8:]
    assert len(old) == replayed
    assert all(kind in ("replayed_harmful", "reflected_harmful") for kind, *_ in old)
    assert [item for *_, item in old] == pool.top(replayed)
    assert {kind for kind, *_ in old} <= {"reflected_harmful" if replay == "reflect" else
                                          "replayed_harmful"}  # nobody was visited before


def test_ssp_compares_a_turn_with_its_own_kind(monkeypatch):
    """Equal rewards within each kind: no advantage. Self-RedTeam normalizes over a role."""
    kinds = ["generated_harmful", "vanilla_harmful", "generated_benign", "vanilla_benign",
             "replayed_harmful", "reflected_harmful"]
    turns = []
    for role in ("attacker", "defender"):
        for kind in kinds:
            turns += [types.SimpleNamespace(role=role, kind=kind)] * 4
    for method, groups in (("ssp", 8), ("self_redteam", 2)):
        monkeypatch.setattr(rl, "METHOD", method)
        names = rl.baseline_groups(turns)
        assert len(set(names)) == groups
        assert names[0] == names[4] and names[8] == names[12] and names[0] != names[24]
    monkeypatch.setattr(rl, "METHOD", "ssp")
    few = [t for i, t in enumerate(turns[24:]) if i < 16 or i in (16, 17, 18)]  # 3 replayed ones
    assert set(rl.baseline_groups(few)) == {("defender", "harmful"), ("defender", "benign")}
    names = rl.baseline_groups(turns)
    returns = [torch.full((3,), float(sorted(set(names)).index(name))) for name in names]
    out, degenerate = rl.advantages(returns, names)
    assert degenerate == 8 and all(not a.any() for a in out)


def test_replayed_turns_have_no_attacker_and_reflect_on_the_reply(loaded, small):
    for name, value in dict(METHOD="ssp", REPLAY="reflect").items():
        small.setattr(rl, name, value)
    model, tok = loaded["qwen2"]
    pool = filled(3)
    pool.items[1].visits = 1  # the earlier reply is shown at every second visit
    old = pool.games(2, "reflect")
    turns = rl.play(model, model, tok, even_harms(), rl.draw_seeds(some_seeds(), 0)[:2] + old,
                    seeded(1))
    assert all(t.game < 2 for t in turns if t.role == "attacker")
    mine = [t for t in turns if t.game >= 2]
    assert [t.kind for t in mine] == ["reflected_harmful", "replayed_harmful"]
    assert [t.request for t in mine] == [item.attack for *_, item in old] == ["attack 0", "attack 1"]
    reflected, replayed = [tok.decode(t.prompt_ids) for t in mine]
    assert "unsafe 0" in reflected and "unsafe" not in replayed


def test_a_step_of_ssp_remembers_its_failures(loaded, small):
    """one_step: fresh failures come into the pool, replays are counted."""
    for name, value in dict(METHOD="ssp", REPLAY="plain", COT=False, LR=0.0).items():
        small.setattr(rl, name, value)
    small.setattr("selfplay.replay.FAILED", 0)  # whatever the fresh replies are
    model, tok = copy.deepcopy(loaded["qwen2"][0]), loaded["qwen2"][1]
    pool = filled(3)
    r = session.Run(both(model), loaded["qwen2"][0], tok, even_harms(),
               MasterAdamW(model, (0.9, 0.95), 0.0), pool, some_seeds(), [], None, [], {}, 0, None)
    turns, m = rl.one_step(r, 3)
    defended = [t for t in turns if t.role == "defender" and t.kind.endswith("harmful")]
    replayed = [t for t in defended if t.kind == "replayed_harmful"]
    fresh = [t for t in defended if t.kind != "replayed_harmful"]
    assert len(replayed) == 2 == sum(pool.visit_counts()) and len(fresh) == 4

    def reward(t):  # 1 - (score - 1) / 4, where the score is 1 + 4 p(harmful)
        return 1 - t.labels.p["response_harmful"]

    assert m["r_replay"] == pytest.approx(sum(map(reward, replayed)) / 2)
    assert m["r_fresh"] == pytest.approx(sum(map(reward, fresh)) / 4)
    attacked = [t for t in fresh if t.kind == "generated_harmful"]
    failed = [t.request for t in attacked if reward(t) < 0.5]
    assert 0 < len(attacked) < 4
    assert [item.attack for item in pool.items[3:]] == list(dict.fromkeys(failed))
    assert m["pool"] == len(pool.items) and m["mastered"] == 0


@pytest.mark.parametrize("method, texts", [("ssp", 2), ("self_redteam", 0)])
def test_a_step_of_ssp_learns_the_replies_that_the_pool_has_kept(loaded, small, method, texts):
    """learn() gets the run's examples and those that the pool has kept, each as an example of its
    request, thinking and answer; the run's own list stays as it is. Self-RedTeam has no pool."""
    for name, value in dict(METHOD=method, REPLAY="off").items():
        small.setattr(rl, name, value)
    model, tok = loaded["qwen2"]
    pool, own, given = Pool(9, 0.3, 0.8), sft_examples(2), []
    for n in range(2):
        pool.distilled.append(dict(request=f"ask {n}", thinking=f"hm {n}", answer=f"no {n}"))
    small.setattr(rl, "learn", lambda *args: given.append(args[4]) or {})
    r = session.Run(both(model), model, tok, even_harms(), None, pool, some_seeds(), [], None, own,
                    {}, 0, None)
    rl.one_step(r, 0)
    want = [example(tok, f"ask {n}", f"hm {n}", f"no {n}", True) for n in range(texts)]
    assert given == [sft_examples(2) + want] and r.sft == sft_examples(2)


def test_without_replay_both_methods_sample_the_same_tokens(loaded, small):
    for name, value in dict(REPLAY="off", LR=0.0).items():
        small.setattr(rl, name, value)
    start, tok = loaded["qwen2"]
    seen = []
    for method in ("self_redteam", "ssp"):
        small.setattr(rl, "METHOD", method)
        model = copy.deepcopy(start)
        r = session.Run(both(model), start, tok, even_harms(), MasterAdamW(model, (0.9, 0.95), 0.0),
                   Pool(512, 1.0, 0.8), some_seeds(), [], None, [], {}, 0, None)
        turns, m = rl.one_step(r, 3)
        assert ("pool" in m) == (method == "ssp")
        seen.append(turns)
    a, b = seen
    assert [(t.role, t.kind, t.game, t.ids, t.logps) for t in a] == [
        (t.role, t.kind, t.game, t.ids, t.logps) for t in b]
    assert [t.reward for t in a] != [t.reward for t in b]


# ---- runs of main(): resume, other models, a weak judge ------------------------------------------

@pytest.fixture
def small_run(workplace, tiny_models):
    """words -> rl.main on tiny models with the default constants, below tmp_path."""
    def start(*words):
        with pytest.MonkeyPatch.context() as patch:
            keep_constants(patch, rl)
            rl.main([f"MODEL={tiny_models['qwen2']}", f"JUDGE={tiny_models['mistral']}", *SMALL,
                     *words])
    return start


@pytest.fixture
def opened(small_run, monkeypatch):
    """words -> (Run that 02 works with, how load_judge was called), without a step or a game. The
    judge is a FakeJudge, and nothing is embedded."""
    def start(*words):
        runs, calls = [], []

        def load_judge(name, quantize, **how):
            calls.append(how)
            return even_harms()

        monkeypatch.setattr(rl.judge, "load_judge", load_judge)
        monkeypatch.setattr(rl.attackers, "load_embedder", lambda name: None)
        monkeypatch.setattr(rl, "evaluate", lambda r, step: runs.append(r) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_run("EVAL_EVERY=1", *words)
        return runs[0], calls[0]
    return start


def test_a_run_learns_from_train_seeds_and_is_watched_on_dev_seeds(opened, tmp_path):
    """Of seeds of all three splits. The test split is for 03, once."""
    seeds = []
    for split in ("test", "train", "dev"):
        for seed in some_seeds(3):
            prompt = f"{seed['prompt']} of {split}"
            seeds.append(dict(seed, id=f"{split} {seed['id']}", prompt=prompt, split=split))
    r, _ = opened(f"SEEDS={write_jsonl(tmp_path / 'some.jsonl', seeds)}", "EVAL_SEEDS=2")
    assert r.seeds == [seed for seed in seeds if seed["split"] == "train"]
    assert [seed["id"] for seed in r.dev] == ["dev bad0", "dev bad1", "dev good0", "dev good1"]


def test_the_pool_of_a_run_has_its_constants(opened):
    r, _ = opened("METHOD=ssp", "UCB_C=0.4", "MASTERED=0.7", "POOL_SIZE=9")
    assert (r.pool.ucb_c, r.pool.mastered, r.pool.size) == (0.4, 0.7, 9)


@pytest.mark.parametrize("attack, reply", [(2048, 8), (8, 2048)])
def test_the_judge_reads_the_longest_turn_of_the_game(opened, attack, reply):
    """Attacks are requests, replies are responses; either may be the longer one."""
    _, how = opened(f"ATTACK_TOKENS={attack}", f"REPLY_TOKENS={reply}")
    assert how["max_text"] == judge.text_limit(attack, reply) > judge.text_limit(8)


def test_resume_with_a_pool_is_bit_for_bit(small_run, workplace, monkeypatch, capsys):
    """2 + 2 steps == 4 steps: weights, optimizer, pool."""
    monkeypatch.setattr(rl.judge, "load_judge", lambda *_, **__: even_harms())
    monkeypatch.setattr("selfplay.replay.FAILED", 0)
    words = ["METHOD=ssp", "COT=false", "RELEVANT=0", "SEED=1"]
    small_run(*words, "RUN=a", "STEPS=2")
    torch.manual_seed(5)  # nothing depends on the state of the process
    small_run(*words, "RUN=a", "STEPS=4")
    assert "resumed from checkpoints/a/step_000002" in capsys.readouterr().out
    small_run(*words, "RUN=b", "STEPS=4")
    a, b = (workplace / "checkpoints" / name / "step_000004" for name in "ab")
    for name in ("model.safetensors", "state.safetensors", "pool.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()

    results = workplace / "results" / "runs" / "a"
    totals, *items = read_jsonl(results / "pool.jsonl")
    visits = sum(totals["left"]) + sum(item["visits"] for item in items)
    assert visits > 0 and items and all(item["attack"] for item in items)
    assert totals["distilled"]
    assert (results / "curves.png").stat().st_size > 10000
    # only the newest step keeps the optimizer
    assert not (workplace / "checkpoints/a/step_000002/state.safetensors").exists()

    # other constants do not go on
    message = stops(small_run, *words, "RUN=a", "STEPS=5", "LR=1e-3")
    assert "checkpoints/a/step_000004" in message and "LR 5e-05 -> 0.001" in message


@pytest.mark.parametrize("word, of", [
    ("", "MODEL"), ("", "JUDGE"), ("", "prompts"), ("", "SEEDS"), ("", "SFT")])
def test_a_run_does_not_go_on_with_other_inputs(small_run, workplace, tiny_models, tmp_path,
                                                monkeypatch, word, of):
    """The constants are the same, the content behind them is not."""
    folders = {}
    for name, kind in dict(MODEL="qwen2", JUDGE="mistral").items():
        folders[name] = tmp_path / f"a_{name}"
        shutil.copytree(tiny_models[kind], folders[name])
    prompts = tmp_path / "texts"
    shutil.copytree(rl.run.PROMPTS, prompts)
    monkeypatch.setattr(rl.run, "PROMPTS", prompts)
    seeds, sft = tmp_path / "some.jsonl", tmp_path / "sft.jsonl"
    write_jsonl(seeds, [dict(s, split="train") for s in some_seeds()])
    row = dict(kind="comply", seed="s", request="a", thinking="b", answer="c")
    write_jsonl(sft, [row])
    words = [f"MODEL={folders['MODEL']}", f"JUDGE={folders['JUDGE']}", f"SEEDS={seeds}",
             f"SFT={sft}"]
    small_run(*words, "STEPS=1")
    small_run(*words, "STEPS=1")  # goes on: nothing to do
    if of in folders:
        other, _ = load_model(str(folders[of]), "float32")
        with torch.no_grad():
            next(other.parameters()).mul_(1.001)
        other.save_pretrained(folders[of])
    else:
        file = {"prompts": prompts / "defender.txt", "SEEDS": seeds, "SFT": sft}[of]
        text = file.read_text(encoding="utf-8")
        more = json.dumps(some_seeds()[0] | dict(id="new", prompt="new", split="train"))
        more = {"prompts": "And be kind.", "SEEDS": more, "SFT": json.dumps(row)}[of]
        file.write_text(text + more + "\n", encoding="utf-8")
    message = stops(small_run, *words, "STEPS=2")
    assert f"other content of {of}" in message and "checkpoints/02_rl/step_000001" in message


def test_an_sft_file_of_a_user_is_left_as_it_is(small_run, tmp_path, capsys):
    """Without an end of its last line, as editors leave it: no row is lost, and the run goes on."""
    rows = [dict(kind="comply", seed="s", request=f"ask {i}", thinking="hm", answer=f"say {i}")
            for i in range(2)]
    sft = tmp_path / "sft.jsonl"
    sft.write_text("\n".join(map(json.dumps, rows)))
    before = sft.read_bytes()
    for steps in (1, 2):
        small_run(f"STEPS={steps}", f"SFT={sft}")
        said = capsys.readouterr().out
        assert "SFT examples 2" in said and ("resumed" in said) == (steps == 2)
    assert sft.read_bytes() == before


def test_a_damaged_state_does_not_take_the_one_before_with_it(small_run, workplace):
    """Two steps may have a state after a power cut, or as a user put one back."""
    small_run("STEPS=2", "SAVE_EVERY=1")
    folder = workplace / "checkpoints/02_rl"
    first, second = [folder / f"step_00000{n}/state.safetensors" for n in (1, 2)]
    whole = second.read_bytes()
    first.write_bytes(whole)
    second.write_bytes(whole[:len(whole) // 2])
    assert "step_000002/state.safetensors" in stops(small_run, "STEPS=3", "SAVE_EVERY=1")
    assert first.read_bytes() == whole


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_replays_bring_benign_games_along_where_there_are_any(opened, share):
    """The second paper's form has none: BENIGN_FRACTION=0."""
    r, _ = opened("METHOD=ssp", f"BENIGN_FRACTION={share}")
    assert bool(r.pool.benign) == bool(share)


def test_any_model_starts_with_an_sft_file(small_run, workplace, tmp_path, capsys):
    """No warm-up: the examples are text, so they fit every tokenizer. Of the kinds, "comply"."""
    rows = [dict(kind=kind, seed="s", request=f"ask {i}", thinking="hm", answer=f"say {i}")
            for i, kind in enumerate(["comply", "refuse", "comply"])]
    sft = write_jsonl(tmp_path / "sft.jsonl", rows)
    small_run("STEPS=1", f"SFT={sft}", "RUN=a")
    said = capsys.readouterr().out
    assert "SFT examples 2" in said and "WARNING" not in said
    (tmp_path / "meta.json").write_text(json.dumps(dict(parent="smollm2")))
    small_run("STEPS=1", f"SFT={sft}", "RUN=author")
    assert f"WARNING: 'smollm2' wrote the examples of {sft}" in capsys.readouterr().out
    small_run("STEPS=1", f"SFT={sft}", "RUN=b", "SFT_KINDS=all")
    assert "SFT examples 3" in capsys.readouterr().out
    assert "not found" in stops(small_run, "STEPS=1", "SFT=nowhere.jsonl", "RUN=c")
    for row in (dict(rows[0], thinking=""), dict(kind="comply", prompt_ids=[1]),
                {k: v for k, v in rows[0].items() if k != "answer"}):
        old = write_jsonl(tmp_path / "old.jsonl", [row])
        assert "01_sft_warmup.py again" in stops(small_run, "STEPS=1", f"SFT={old}", "RUN=c")
    assert "RL_COEF=0" in stops(small_run, "STEPS=1", "RL_COEF=0", "RUN=d")


@pytest.mark.parametrize("words, said", [
    ([], "Self-RedTeam, general_sum | self-play | hidden thinking"),
    (["COT=false"], "no thinking (the paper's no-CoT ablation)"),
    (["SCHEME=zero_sum"], "zero_sum (the paper's theory) | self-play"),
    (["ROLES=attacker"], "attacker-only against the frozen start model, asked in plain chat "
                         "(published ablation)"),
    (["ROLES=defender"], "defender-only, without an attacker (published ablation)"),
    (["ROLES=defender", "OPPONENT=frozen_turns"], "as attacker (ours)"),
    (["RL_COEF=0"], "the SFT mix alone, RL_COEF=0 (control, ours)"),
    (["METHOD=ssp", "REPLAY=plain"], "SSP, replay plain | self-play")])
def test_the_first_line_names_the_arm(small_run, workplace, capsys, words, said):
    sft = write_jsonl(workplace / "sft.jsonl", [
        dict(kind="comply", seed="s", request="ask", thinking="hm", answer="say")])
    small_run("STEPS=1", f"SFT={sft}", *words)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("arm: ") and said in first


def test_dev_seeds_are_played_greedily_and_resume_alike(small_run, workplace, monkeypatch):
    """EVAL_EVERY=2: rows 0, 2, 4 and the last one have dev_*; a run in two parts has the same."""
    words = ["EVAL_EVERY=2", "EVAL_SEEDS=3"]
    small_run(*words, "RUN=a", "STEPS=2")
    small_run(*words, "RUN=a", "STEPS=5")
    small_run(*words, "RUN=b", "STEPS=5")
    a, b = (pandas.read_csv(workplace / f"results/runs/{name}/metrics.csv") for name in "ab")
    assert a["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert a["step"][a["dev_asr"].notna()].tolist() == [0, 2, 4, 5]
    noise = ["seconds", "play_s", "gb"]
    pandas.testing.assert_frame_equal(a.drop(columns=noise), b.drop(columns=noise))


def test_greedy_games_of_dev_seeds(loaded, small):
    """evaluate(): all four kinds of each seed, temperature 0, the same twice."""
    model, tok = loaded["qwen2"]
    small.setattr(rl, "EVAL_EVERY", 10)
    seen, play = [], rl.play

    def spy(*args, **kwargs):
        seen.append(play(*args, **kwargs))
        return seen[-1]

    small.setattr(rl, "play", spy)
    r = session.Run(both(model), model, tok, even_harms(), None, Pool(9, 0.3, 0.8), some_seeds(),
               some_seeds(2), lambda texts: numpy.eye(len(texts), 9), [], {}, 0, None)
    assert rl.evaluate(r, 7) == {}
    first, again = rl.evaluate(r, 20), rl.evaluate(r, 20)
    assert first == pytest.approx(again, nan_ok=True)
    assert [t.ids for t in seen[0]] == [t.ids for t in seen[1]]
    kinds = [t.kind for t in seen[0] if t.role == "defender"]
    assert sorted(kinds) == sorted(2 * list(GAMES))


def test_texts_that_the_judge_cuts_are_counted_in_the_step(loaded, small):
    small.setattr(rl, "COT", False)
    model, tok = loaded["qwen2"]
    scorer = judge.Judge(*loaded["mistral"], max_text=4)
    policy = copy.deepcopy(model)
    r = session.Run(both(policy), model, tok, scorer, MasterAdamW(model, (0.9, 0.95), 0.0),
               Pool(512, 1.0, 0.8), some_seeds(), [], None, [], {}, 0, None)
    before = scorer.truncated
    _, m = rl.one_step(r, 0)
    assert m["cut"] == scorer.truncated - before > 8


def test_a_rubric_judge_scores_the_game(small_run, workplace, tiny_models):
    small_run("METHOD=ssp", f"RUBRIC_JUDGE={tiny_models['llama']}", "STEPS=1", "COT=false")
    for game in read_jsonl(workplace / "results" / "runs" / "02_rl" / "games.jsonl"):
        x = game["labels"]
        assert 1 <= x["score"] <= 5 and x["score"] != 1 + 4 * x["p"]["response_harmful"]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_other_architectures_run(small_run, tiny_models, workplace, capsys, kind):
    """Two stop ids, another pad, no system role; no warm-up examples; zero_sum; several updates."""
    small_run(f"MODEL={tiny_models[kind]}", "STEPS=1", "SCHEME=zero_sum", "UPDATES=2", "COT=false")
    assert "no SFT mix" in capsys.readouterr().out
    assert (workplace / "checkpoints/02_rl/step_000001/config.json").is_file()


def test_a_judge_below_the_floor_stops_the_run(small_run, workplace, capsys):
    assert "below JUDGE_FLOOR" in stops(small_run, "STEPS=1", "JUDGE_FLOOR=0.8")
    assert "judge on prompts/probe.jsonl" in capsys.readouterr().out
    assert [p.name for p in (workplace / "results/runs/02_rl").iterdir()] == ["lock"]


def test_a_tracker_logs_the_run(small_run, workplace):
    """TRACKER=tensorboard: one event file beside metrics.csv."""
    small_run("STEPS=1", "TRACKER=tensorboard")
    folder = workplace / "results" / "runs" / "02_rl"
    assert len(list(folder.glob("02_rl/events.*"))) == 1 and (folder / "metrics.csv").is_file()


def test_attacker_only_keeps_the_sft_mix_and_needs_attacked_seeds(small_run, workplace, tmp_path,
                                                                  capsys):
    """As the published script does (its SFT data do not depend on the roles)."""
    sft = write_jsonl(tmp_path / "sft.jsonl", [
        dict(kind="comply", seed="s", request="ask", thinking="hm", answer="say")])
    small_run("STEPS=1", f"SFT={sft}", "RUN=a", "ROLES=attacker")
    assert "SFT examples 1" in capsys.readouterr().out
    for role in ("attacker", "both"):
        assert "leaves the attacker no seed" in stops(small_run, "STEPS=1", f"SFT={sft}", "RUN=b",
                                                      f"ROLES={role}", "ATTACKED=0")
    assert "file not found" in stops(small_run, f"SFT={tmp_path}", "RUN=c")


def test_the_next_command_is_that_of_the_recipe(small_run, monkeypatch, capsys):
    """Without it 03 would ask the 7B for 128 tokens, by the small judge, beside SmolLM2."""
    small_run("STEPS=1")
    assert "next: python 03_evaluate.py\n" in capsys.readouterr().out
    monkeypatch.setattr(rl, "GPU24", dict(SEEDS_PER_STEP=4))
    small_run("STEPS=1", "--gpu24", "RUN=b")
    said = capsys.readouterr().out
    command = r"next: python 03_evaluate\.py --gpu24 BASE=(\S+) CHECKPOINTS=\1,checkpoints/b\n"
    assert re.search(command, said)


def test_a_run_without_a_checkpoint_says_that_it_begins_again(small_run, workplace, capsys):
    """Killed before the first one is saved, its steps are done anew."""
    out = workplace / "results" / "runs" / "02_rl"
    out.mkdir(parents=True)
    (out / "metrics.csv").write_text("step,kl\n1,0.1\n2,0.1\n")
    small_run("STEPS=1", "SAVE_EVERY=5")
    assert "02_rl: 2 steps, but no checkpoint: the run begins again" in capsys.readouterr().out
    small_run("STEPS=1", "RUN=b")
    assert "begins again" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["SCHEME=zero_sum"], ["ROLES=attacker"], ["ROLES=defender"]])
def test_ssp_stops_where_it_has_nothing_to_replay(small_run, words):
    assert "replays attacks" in stops(small_run, "METHOD=ssp", "STEPS=1", *words)


def test_ssp_warns_where_it_reflects_without_thinking(small_run, capsys):
    for words, warns in (["COT=false"], True), (["COT=false", "REPLAY=plain"], False), ([], False):
        stops(small_run, "METHOD=ssp", "STEPS=1", "SHARD=fsdp", *words)  # stops right after it
        assert ("better REPLAY=plain" in capsys.readouterr().out) is warns


def test_a_warm_up_with_another_cot_stops(small_run, tiny_models, tmp_path):
    for cot, words in ((False, []), (True, ["COT=false"])):
        model = tmp_path / f"{cot}"
        shutil.copytree(tiny_models["llama"], model)
        (model / "meta.json").write_text(json.dumps(dict(constants=dict(COT=cot))))
        said = stops(small_run, f"MODEL={model}", "STEPS=1", *words)
        assert f"was trained with COT={cot}" in said
        small_run(f"MODEL={model}", "STEPS=1", f"COT={cot}", f"RUN={cot}")
    (model / "meta.json").write_text('{"constants": 5}')
    assert "no 'constants' in it" in stops(small_run, f"MODEL={model}", "STEPS=1")


def test_cuts_of_the_rubric_are_counted_too():
    rubric = types.SimpleNamespace(truncated=3)
    assert judge.cuts(types.SimpleNamespace(truncated=2, rubric=rubric)) == 5
    assert judge.cuts(types.SimpleNamespace(truncated=2, rubric=None)) == 2
