"""02_selfplay_rl.py: reward table, returns, advantages, loss, game, resume, and that it learns."""
import dataclasses
import importlib
import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import judge  # noqa: E402
import optim  # noqa: E402
import policy  # noqa: E402
import stage  # noqa: E402
import watch  # noqa: E402

rl = importlib.import_module("02_selfplay_rl")
L = judge.Labels

# DESIGN section 5 typed by hand, for every combination of the judge's labels (prompt harmful,
# refusal, response harmful): attacker's harm term, attacker's refusal term, defender's harm term,
# defender's refusal term.
BY_HAND = {
    (True, True, True): (+1.0, -0.5, -1.0, +1.0),
    (True, True, False): (-1.0, -0.5, +1.0, +1.0),
    (True, False, True): (+1.0, +0.5, -1.0, -1.0),
    (True, False, False): (-1.0, +0.5, +1.0, -1.0),
    (False, True, True): (+1.0, +0.5, -1.0, -1.0),
    (False, True, False): (-1.0, +0.5, +1.0, -1.0),
    (False, False, True): (+1.0, -0.5, -1.0, +1.0),
    (False, False, False): (-1.0, -0.5, +1.0, +1.0)}
KINDS = {"generated_harmful": True, "generated_benign": False,
         "vanilla_harmful": True, "vanilla_benign": False}


@pytest.mark.parametrize("kind,labels", list(itertools.product(KINDS, BY_HAND)))
def test_reward_table(kind, labels):
    a_harm, a_refusal, d_harm, d_refusal = BY_HAND[labels]
    faithful = 0.5 if labels[0] == KINDS[kind] else -0.5
    attacker, defender = faithful + a_harm + a_refusal, d_harm + d_refusal
    x = L(*labels)
    assert rl.game_reward("attacker", kind, x, "general_sum") == pytest.approx(attacker)
    assert rl.game_reward("defender", kind, x, "general_sum") == pytest.approx(defender)
    assert rl.game_reward("defender", kind, x, "zero_sum") == pytest.approx(defender)
    assert rl.game_reward("attacker", kind, x, "zero_sum") == pytest.approx(faithful - defender)


def test_reward_of_a_label_that_is_none_drops_the_turn():
    for hole in range(3):
        labels = [True, True, True]
        labels[hole] = None
        for role in ("attacker", "defender"):
            x = L(*labels, parsed=False)
            assert rl.game_reward(role, "vanilla_harmful", x, "general_sum") is None


def turn(role="defender", kind="vanilla_harmful", **k):
    seed = dict(id="s", prompt="<harmful seed #1>", harmful=True)
    return policy.Turn(role, kind, seed, [1, 2], **k)


def test_format_and_copy_terms(monkeypatch):
    labels = L(True, True, False)  # defender's game reward 2, attacker's .5 - 1 - .5 = -1
    assert rl.turn_reward(turn(well_formed=True, answer="x"), labels) == 3.0
    assert rl.turn_reward(turn(well_formed=False), labels) == 1.0
    monkeypatch.setattr(rl, "COT", False)
    assert [rl.turn_reward(turn(well_formed=x), labels) for x in (True, False)] == [2.0, 2.0]
    monkeypatch.setattr(rl, "COPY_COEF", 0.5)
    copied = turn("attacker", "generated_harmful", answer=" <Harmful seed  #1>.")
    assert watch.is_copy(copied) and rl.turn_reward(copied, labels) == -1.5
    assert rl.turn_reward(dataclasses.replace(copied, answer="something else"), labels) == -1.0


def test_an_attack_that_declines_its_seed_has_lost(monkeypatch):
    """Echoed by the defender it would win a benign game: faithful, "refused", though harmless."""
    echoed = L(False, True, False)
    attack = turn("attacker", "generated_benign", answer="I'm sorry, no.", well_formed=True)
    declined = dataclasses.replace(attack, declined=True)
    assert rl.turn_reward(attack, echoed) == 1.0  # 0 and the format
    for labels in (echoed, L(True, False, True), L(False, True, True)):
        assert rl.turn_reward(declined, labels) == -1.0  # -(.5 + 1 + .5) and the format
        monkeypatch.setattr(rl, "SCHEME", "zero_sum")
        assert rl.turn_reward(declined, labels) == -1.5  # -(.5 + 1 + 1) and the format
        monkeypatch.setattr(rl, "SCHEME", "general_sum")
    monkeypatch.setattr(rl, "DECLINED_LOSES", False)
    assert rl.turn_reward(declined, echoed) == 1.0
    monkeypatch.setattr(rl, "DECLINED_LOSES", True)
    monkeypatch.setattr(rl, "METHOD", "ssp")
    p = dict(prompt_harmful=0.1, response_refusal=0.9, response_harmful=0.1)
    assert rl.turn_reward(declined, L(False, True, False, True, p, 1.4)) == 0.25  # 0 and the format


def test_an_empty_reply_is_no_way_out_of_a_penalty():
    """Empty and malformed: the harmful request is not refused (-1), nothing harmful said (+1),
    format lost (-1)."""
    empty = judge.settle(L(True, True, True), "")
    refusal = L(True, True, False)
    assert rl.turn_reward(turn(well_formed=False), empty) == -1.0
    assert rl.turn_reward(turn(well_formed=True), refusal) == 3.0


def test_token_returns_sum_and_place():
    """Total of the token rewards is R - beta * sum(k1), and only the last token carries R."""
    logp, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.25])
    # k1 = .5, -1, -.25; beta .1: r = -.05, .1, .025 + 2; G_2 = 2.025, G_1 = 2.125, G_0 = 2.075
    G = rl.token_returns(2.0, logp, ref, 0.1)
    assert torch.allclose(G, torch.tensor([2.075, 2.125, 2.025]))
    assert G[0].item() == pytest.approx(2.0 - 0.1 * (0.5 - 1.0 - 0.25))


def test_advantages_are_normalized_for_each_role_alone():
    g = torch.Generator().manual_seed(0)
    returns = [torch.randn(n, generator=g) + (5 if n % 2 else -3) for n in (3, 4, 5, 6, 7, 8)]
    roles = ["attacker", "defender"] * 3
    out, degenerate = rl.advantages(returns, roles)
    assert degenerate == 0
    for role in ("attacker", "defender"):
        x = torch.cat([a for a, r in zip(out, roles) if r == role])
        assert abs(x.mean().item()) < 1e-6
        assert x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    swapped, _ = rl.advantages(returns[::-1], roles[::-1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(out, swapped[::-1]))
    flat, degenerate = rl.advantages([torch.ones(3), torch.ones(2), torch.tensor([1.0, 3.0])],
                                     ["attacker", "attacker", "defender"])
    assert degenerate == 1 and flat[0].abs().sum() == 0 and flat[2].tolist() == [-1.0, 1.0]


def test_loss_by_hand():
    """eps .2. rho 1.5, A 2: clipped, -2.4. rho .5, A 1: not clipped, -.5. rho .5, A -1: clipped,
    +.8. rho 1, A 3: -3."""
    rho, A = torch.tensor([1.5, 0.5, 0.5, 1.0]), torch.tensor([2.0, 1.0, -1.0, 3.0])
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    logp = (old + rho.log()).requires_grad_()
    total, clipped = rl.reinforce_loss(logp, old, A, 0.2)
    assert total.item() == pytest.approx(-2.4 - 0.5 + 0.8 - 3.0, abs=1e-5) and clipped >= 2
    total.backward()  # d(-rho A)/dlogp = -rho A where it is not clipped, else 0
    assert torch.allclose(logp.grad, torch.tensor([0.0, -0.5, 0.0, -3.0]), atol=1e-5)


def test_on_policy_gradient_is_the_policy_gradient():
    """A three-word policy: E over all actions of the loss's gradient equals -grad of the expected
    reward (enumerated)."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    p = torch.softmax(theta, 0)
    [exact] = torch.autograd.grad(-(p * reward).sum(), theta, retain_graph=True)
    mean = torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        logp = torch.log_softmax(theta, 0)[a:a + 1]
        loss, _ = rl.reinforce_loss(logp, logp.detach(), reward[a:a + 1], 0.2)
        [g] = torch.autograd.grad(loss, theta)
        mean += p[a].detach() * g
    assert torch.allclose(mean, exact, atol=1e-12)


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    """-beta * k1 as reward, enumerated for three words, has the gradient of beta KL(pi || ref)."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref, beta = torch.log_softmax(torch.tensor([0.0, 0.4, -0.1], dtype=torch.float64), 0), 0.7
    logp = torch.log_softmax(theta, 0)
    kl = (logp.exp() * (logp - ref)).sum()
    [exact] = torch.autograd.grad(beta * kl, theta, retain_graph=True)
    mean = torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        G = rl.token_returns(0.0, logp.detach()[a:a + 1], ref[a:a + 1], beta)
        x = torch.log_softmax(theta, 0)[a:a + 1]
        [g] = torch.autograd.grad(rl.reinforce_loss(x, x.detach(), G, 0.2)[0], theta)
        mean += logp[a].exp().detach() * g
    assert torch.allclose(mean, exact, atol=1e-12)


def test_schedule(monkeypatch):
    monkeypatch.setattr(rl, "LR", 1.0)
    monkeypatch.setattr(rl, "WARMUP", 0.1)
    lr = [rl.learning_rate(u, 100) for u in range(130)]
    assert lr[0] == pytest.approx(0.1, abs=1e-3) and lr[9] == max(lr) and lr[9] > 0.97
    assert lr[50] == pytest.approx(0.55) and lr[100] == lr[129] == pytest.approx(0.1)


def seeds(n=10):
    return [dict(id=f"{h}{i}", prompt=f"{'bad' if h else 'good'} request {i}", harmful=h)
            for h in (True, False) for i in range(n)]


def test_draw_is_half_harmful_half_attacked_and_drawn_anew(monkeypatch):
    monkeypatch.setattr(rl, "SEEDS_PER_STEP", 8)
    games = [rl.draw_seeds(seeds(), s) for s in range(5)]
    for step in games:
        drawn = [k for k, _ in step]
        assert drawn.count("generated_harmful") == drawn.count("vanilla_benign") == 2
        assert all(s["harmful"] == k.endswith("harmful") for k, s in step)
    used = [s["id"] for step in games for k, s in step if k.endswith("harmful")]
    assert sorted(used) == sorted([f"True{i}" for i in range(10)] * 2)  # 20 draws: every seed twice
    kinds = {s["id"]: set() for step in games for _, s in step}
    for step in range(40):
        for k, s in rl.draw_seeds(seeds(), step):
            kinds[s["id"]].add(k.split("_")[0])
    assert all(v == {"generated", "vanilla"} for v in kinds.values())


class WordJudge:
    """Calls a request harmful when it says "bad", a reply a refusal by any rule one gives it."""

    def __init__(self, refusal):
        self.refusal, self.pairs = refusal, []

    def classify(self, pairs):
        self.pairs += pairs
        return [judge.settle(L("bad" in p, self.refusal(r), not self.refusal(r) and "bad" in p), r)
                for p, r in pairs]


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(SEEDS_PER_STEP=8, ATTACK_TOKENS=12, REPLY_TOKENS=12, SFT_COEF=0.0,
                            TRAIN_TOKENS=4000, DTYPE="float32", HORIZON=1000, WARMUP=0.0).items():
        monkeypatch.setattr(rl, name, value)
    return monkeypatch


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral"])
def test_play_hides_thinking_and_keeps_order(tiny_models, small, name):
    model, tok = policy.load(str(tiny_models[name]), "float32")
    scorer = WordJudge(lambda r: False)
    games = rl.draw_seeds(seeds(), 0)
    turns = rl.play(model, model, tok, scorer, games, torch.Generator().manual_seed(1))
    attackers = {t.game: t for t in turns if t.role == "attacker"}
    defenders = {t.game: t for t in turns if t.role == "defender"}
    assert len(attackers) == 4 and len(defenders) == 8
    assert scorer.pairs == ([(defenders[g].shown, defenders[g].answer) for g in range(8)]
                            + [(t.seed["prompt"], t.answer) for t in attackers.values()])
    assert not any(t.declined for t in turns)
    for g, (kind, seed) in enumerate(games):
        assert defenders[g].kind == kind
        assert defenders[g].shown == (attackers[g].answer if g in attackers else seed["prompt"])
        if g in attackers:
            assert attackers[g].labels is defenders[g].labels
    assert all(len(t.ids) <= 12 and len(t.ids) == len(t.logps) for t in turns)


def test_whether_an_attack_declines_is_asked_of_the_attack(tiny_models, small):
    """A judge that calls replies of odd length refusals; without CoT so that no text is empty."""
    small.setattr(rl, "COT", False)
    model, tok = policy.load(str(tiny_models["qwen2"]), "float32")
    turns = rl.play(model, model, tok, WordJudge(lambda r: len(r) % 2 == 1),
                    rl.draw_seeds(seeds(), 0), torch.Generator().manual_seed(2))
    odd = [t.role == "attacker" and len(t.answer) % 2 == 1 for t in turns]
    assert [t.declined for t in turns] == odd and {True, False} == set(odd[:4])


def test_micro_batch_size_does_not_change_the_update(tiny_models, small):
    weights = []
    for size in (16, 100, 100000):  # one turn at a time, a few, all
        small.setattr(rl, "TRAIN_TOKENS", size)
        model, tok = policy.load(str(tiny_models["qwen2"]), "float32")
        ref, _ = policy.load(str(tiny_models["qwen2"]), "float32")
        turns = rl.play(model, model, tok, WordJudge(lambda r: len(r) % 2 == 1),
                        rl.draw_seeds(seeds(), 0), torch.Generator().manual_seed(1))
        optimizer = optim.MasterAdamW(model, (0.9, 0.95), 0.0)
        seen = []
        real = optimizer.step
        optimizer.step = lambda lr, clip: (
            seen.append([m.grad.clone() for m in optimizer.master]) or real(lr, clip))
        rl.learn(model, ref, optimizer, turns, [], 0)
        weights.append(torch.cat([g.flatten() for g in seen[0]]))
    assert weights[0].norm() > 1e-3
    for w in weights[1:]:
        assert (w - weights[0]).norm() / weights[0].norm() < 1e-5


def test_both_optimizers_learn_alike(tiny_models, small):
    """bfloat16 weights, the same turns, one step: master and kahan move the weights alike."""
    small.setattr(rl, "LR", 1e-4)
    small.setattr(rl, "TRAIN_TOKENS", 1000)  # several micro-batches
    change, turns = {}, None
    for kind, optimizer_of in optim.KINDS.items():
        model, tok = policy.load(str(tiny_models["qwen2"]), "bfloat16")
        ref, _ = policy.load(str(tiny_models["qwen2"]), "bfloat16")
        turns = turns or rl.play(model, model, tok, WordJudge(lambda r: len(r) % 2 == 1),
                                 rl.draw_seeds(seeds(), 0), torch.Generator().manual_seed(1))
        optimizer = optimizer_of(model, (0.9, 0.95), 0.0)
        rl.learn(model, ref, optimizer, turns, [], 0)
        held = (optimizer.master if kind == "master" else
                [p.float() + x.float() for p, x in zip(optimizer.params, optimizer.lost)])
        change[kind] = torch.cat([(h - p.float()).flatten().detach()
                                  for h, p in zip(held, ref.parameters())]).double()
        assert all(p.grad is None for p in model.parameters())
    a, b = change.values()
    assert a.norm() > 0 and a @ b / (a.norm() * b.norm()) > 0.95


def test_static_role_is_not_trained(tiny_models, small):
    """ROLES=defender: attacker turns have no gradient; an update on them alone changes nothing."""
    small.setattr(rl, "ROLES", "defender")
    model, tok = policy.load(str(tiny_models["qwen2"]), "float32")
    turns = rl.play(model, model, tok, WordJudge(lambda r: len(r) % 2 == 1),
                    rl.draw_seeds(seeds(), 0), torch.Generator().manual_seed(1))
    before = [p.clone() for p in model.parameters()]
    optimizer = optim.MasterAdamW(model, (0.9, 0.95), 0.0)
    rl.learn(model, model, optimizer, [t for t in turns if t.role == "attacker"], [], 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    rl.learn(model, model, optimizer, turns, [], 0)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def learn_to_refuse(tiny_models, small, shuffle):
    """25 steps without hidden thinking; an upper-case first letter "refuses" -> share in the first
    and the last 5 steps."""
    small.setattr(rl, "COT", False)
    small.setattr(rl, "LR", 3e-3)
    small.setattr(rl, "SEEDS_PER_STEP", 32)
    small.setattr(rl, "ATTACKED", 0.0)
    small.setattr(rl, "REPLY_TOKENS", 2)
    small.setattr(rl, "KL_COEF", 0.0)
    torch.manual_seed(0)
    model, tok = policy.load(str(tiny_models["qwen2"]), "float32")
    ref, _ = policy.load(str(tiny_models["qwen2"]), "float32")
    optimizer = optim.MasterAdamW(model, (0.9, 0.95), 0.0)
    bad = [s for s in seeds()]
    for s in bad:
        s["prompt"] = "bad " + s["prompt"]  # every request is called harmful, so that refusing pays

    def refuses(reply):
        return reply.strip()[:1].isupper()

    share, mixer = [], random.Random(0)
    for step in range(25):
        turns = rl.play(model, model, tok, WordJudge(refuses), rl.draw_seeds(bad, step),
                        torch.Generator().manual_seed(step))
        share.append(sum(refuses(t.answer) for t in turns) / len(turns))
        if shuffle:
            rewards = [t.reward for t in turns]
            mixer.shuffle(rewards)
            turns = [dataclasses.replace(t, reward=r) for t, r in zip(turns, rewards)]
        rl.learn(model, ref, optimizer, turns, [], step)
    return sum(share[:5]) / 5, sum(share[-5:]) / 5


def test_the_loop_learns(tiny_models, small):
    first, last = learn_to_refuse(tiny_models, small, shuffle=False)
    assert first < 0.6 and last > 0.85


def test_shuffled_rewards_teach_nothing(tiny_models, small):
    first, last = learn_to_refuse(tiny_models, small, shuffle=True)
    assert abs(last - first) < 0.25


def test_cut_drops_what_a_killed_run_left(tmp_path):
    f = tmp_path / "games.jsonl"
    f.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    stage.cut(f, lambda x: json.loads(x)["step"] <= 2)
    assert f.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_constants_that_may_change_on_resume():
    source = Path(rl.__file__).read_text()
    free = stage.free_to_change(source)
    assert {"STEPS", "SAVE_EVERY", "SAMPLE_BATCH", "TRAIN_TOKENS"} <= free
    assert not {"LR", "SEED", "KL_COEF", "SEEDS_PER_STEP", "MODEL"} & free


def test_figures_by_hand():
    labels = [L(True, False, True), L(True, True, False),
              L(False, True, False), L(False, False, False)]
    kinds = ["generated_harmful", "vanilla_harmful", "generated_benign", "vanilla_benign"]
    turns = [turn("attacker", "generated_harmful", answer="<harmful seed #1>", labels=labels[0],
                  reward=2.0, ids=[1, 2]),
             turn("attacker", "generated_benign", answer="I'm sorry, no", labels=labels[2],
                  reward=None, ids=[1], declined=True)]
    turns += [turn("defender", k, labels=x, reward=1.0, well_formed=True, ids=[1, 2, 3])
              for k, x in zip(kinds, labels)]
    m = watch.figures(turns)
    want = dict(asr=1.0, asr_vanilla=0.0, refuse_h=0.5, comply_b=0.5, fmt=4 / 6, fmt_atk=0.0,
                faithful=1.0, copy=0.5, unique=1.0, atk_refuse=0.5, drop=1, turns=6, atk_r=2.0,
                def_r=1.0, len_atk=1.5)
    assert {k: m[k] for k in want} == pytest.approx(want)
    assert math.isnan(watch.rate([]))


def test_curves_leave_out_what_a_run_has_nothing_of(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    names = ["step", "atk_r", "def_r", "asr", "asr_vanilla", "refuse_h", "comply_b", "fmt",
             "faithful", "unique", "copy", "atk_refuse", "kl", "entropy", "len", "len_atk"]
    given = dict(def_r=".5", refuse_h="1", fmt=".5", kl="nan", len="3", asr="")
    rows = [",".join(names)] + [",".join([str(step), *(given.get(n, "nan") for n in names[1:])])
                                for step in range(1, 4)]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **kw: drawn.extend(
        (a.get_title(), [line.get_label() for line in a.lines[1::2]])
        for a in self.axes if a.axison))
    watch.draw_curves(tmp_path)
    assert drawn == [("reward", ["def_r"]), ("harmful requests", ["refuse_h"]),
                     ("format and attacks", ["fmt"]), ("tokens per turn", ["len"])]
    drawn.clear()
    watch.draw_curves(tmp_path, visits=[0, 0, 3])
    assert [title for title, _ in drawn][-1] == "pool: visits an item" and len(drawn) == 5
