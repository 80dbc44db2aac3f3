"""engine/cost.py and selfplay/plan.py: time and disk by hand, and a plan for a card elsewhere."""

import pytest
import torch
from helpers import import_stage, stops

from engine import cost, memory, models
from selfplay import session
from selfplay.data import load_seeds

rl = import_stage("02_selfplay_rl")
SEEDS = load_seeds("prompts/seeds.jsonl", "train")
# a million weights, half of them packed by NF4; two layers with keys and values of 64 numbers
MODEL = memory.Shape(10 ** 6, 5 * 10 ** 5, 1000, 2, 64, 128, 4, 4, 16, 500)
CARD = cost.Card(1, 1.0, 100.0)
TURNS = dict(reply=(8, 4, 100, 40))


def seconds(**how):
    return cost.seconds(CARD, MODEL, [(MODEL, 2, False)], 2, "master", TURNS, 1, **how)


def test_seconds_by_hand():
    """8 rows, 4 at a time, prompts of 100, 20 new tokens of 40 on average."""
    out = seconds()
    kv = 2 * 2 * 4 * 16 * 2                                   # bytes of a position
    step = max((2e6 + 4 * (100 + 10) * kv) / 0.6e12, 2e6 * 4 / 40e12)
    assert out["reply"] == pytest.approx(8 * 20 / 4 * step + 2e6 * 8 * 100 / 40e12)
    assert out["reference"] == pytest.approx(2e6 * 8 * 120 / 40e12)
    assert out["judge"] == pytest.approx(2e6 * 8 * (250 + 20) / 40e12)
    assert out["learn"] == pytest.approx(6e6 * 8 * 120 / 40e12 + 1e6 * (32 + 6) / 0.6e12)


def test_what_makes_a_step_longer_or_shorter():
    plain = seconds()
    assert seconds(checkpointing=True)["learn"] > plain["learn"] > seconds(rank=1)["learn"]
    assert seconds(rank=1)["reply"] == plain["reply"]
    # half of the weights packed in 4.5 bits, .4 of them written and read in 16; the rest in 16
    nf4, kv = seconds(rank=1, nf4=True)["reply"], 2 * 2 * 4 * 16 * 2
    read = 5e5 * (4.5 / 8 + 0.4 * 4 + 2) + 4 * 110 * kv
    assert nf4 == pytest.approx(40 * read / 0.6e12 + 2e6 * 8 * 100 / 40e12)
    more = cost.seconds(CARD, MODEL, [(MODEL, 2, False)] * 2, 2, "master", TURNS, 6)
    assert more["judge"] == 2 * plain["judge"] and more["learn"] > plain["learn"]
    assert more["reference"] == 2 * plain["reference"]  # the policy's own log-probabilities too
    none = dict(TURNS, attack=(0, 4, 100, 40))
    assert "attack" not in cost.seconds(CARD, MODEL, [], 2, "master", none, 1)


def test_evaluations_are_a_part_of_the_steps():
    """Three dev seeds a step on average: an attack each, and replies to both; nothing is learnt."""
    turns = dict(TURNS, attack=(4, 4, 100, 40))
    plain = cost.seconds(CARD, MODEL, [(MODEL, 2, False)], 2, "master", turns, 1)
    more = cost.seconds(CARD, MODEL, [(MODEL, 2, False)], 2, "master", turns, 1, looks=3)
    assert more["attack"] == pytest.approx(plain["attack"] * 7 / 4)
    assert more["reply"] == pytest.approx(plain["reply"] * 14 / 8)
    assert more["judge"] == pytest.approx(plain["judge"] * 21 / 12)
    assert more["learn"] == plain["learn"] and more["reference"] == plain["reference"]


def test_rows_that_wait_cost_as_many_steps_as_their_tokens():
    """A few rows take at least the steps of one turn."""
    one = dict(reply=(1, 4, 100, 40))
    few = cost.seconds(CARD, MODEL, [], 2, "master", one, 1)["reply"]
    assert few > 20 * 2e6 / 0.6e12


def test_disk_by_hand():
    """Three checkpoints of bfloat16 weights, the optimizer's state twice while one is written."""
    assert cost.disk_bytes(MODEL, 2, "master", 50, 20) == 3 * 2e6 + 2 * 12e6
    assert cost.disk_bytes(MODEL, 2, "kahan", 40, 20, rank=4, adapters=2) == (
        2 * 2 * 8000 + 2 * 8 * 8000)


def test_cards_by_their_device_names():
    names = {"NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA L40S": "L40S", "NVIDIA L4": "L4",
             "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100",
             "NVIDIA A10G": "A10", "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada"}
    for name, want in names.items():
        assert cost.find_card(name) == (want, cost.CARDS[want])
    for name in ("the CPU", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA L40", "NVIDIA GH200 480GB"):
        assert cost.find_card(name) is None


@pytest.fixture
def here(tiny_models, monkeypatch):
    for name, value in dict(JUDGE=tiny_models["llama"], DTYPE="bfloat16", PLAN_ONLY=True).items():
        monkeypatch.setattr(rl, name, value)
    return str(tiny_models["qwen2"])


def test_a_plan_for_a_card_elsewhere(here, monkeypatch, capsys):
    monkeypatch.setattr(rl, "CARD", "RTX 3090")
    session.plan_memory(vars(rl), here, SEEDS)
    memory_line, time_line, disk_line = capsys.readouterr().out.splitlines()[-3:]
    assert memory_line.endswith("22.8 GB free on RTX 3090 when it is empty")
    assert time_line.startswith("time: ") and "by arithmetic" in time_line
    assert disk_line.startswith("disk: ") and disk_line.endswith("GB of checkpoints")
    monkeypatch.setattr(rl, "CARD", "h100")
    assert "CARD=h100: none of RTX 3090," in stops(session.plan_memory, vars(rl), here, SEEDS)
    monkeypatch.setattr(rl, "CARD", "")
    session.plan_memory(vars(rl), here, SEEDS)
    assert "time: " not in capsys.readouterr().out


def test_a_plan_for_a_card_elsewhere_does_not_depend_on_this_machine(here, monkeypatch):
    """On a card weights are in bfloat16 and a judge is in NF4, whatever the CPU here is fast at."""
    seen = []
    monkeypatch.setattr(session.plan, "plan_run", lambda *a: seen.append(a[3:6:2]))
    monkeypatch.setattr(rl, "DTYPE", "auto")
    monkeypatch.setattr(rl, "METHOD", "ssp")
    monkeypatch.setattr(rl, "RUBRIC_JUDGE", here)
    for here_is in (torch.float32, torch.bfloat16):
        for card in ("RTX 3090", ""):
            monkeypatch.setattr(session.models, "pick_dtype", lambda *a, **k: here_is)
            monkeypatch.setattr(rl, "CARD", card)
            session.plan_memory(vars(rl), here, SEEDS)
    for judges, size in seen[::2]:
        assert size == 2 and [judge[1:] for judge in judges] == [(2, True), (2, True)]
    for (judges, size), want in zip(seen[1::2], (4, 2)):
        assert size == want and [judge[1:] for judge in judges] == [(want, False)] * 2


def test_slots_are_as_many_as_fit(here, monkeypatch, capsys):
    """On a card that is too small for all rows the plan takes fewer; checkpointing where even the
    fewest leave no room. The plain way does not give way."""
    seen, real = [], memory.print_plan
    monkeypatch.setattr(memory, "print_plan", lambda rows, *a: seen.append(rows) or real(rows, *a))
    monkeypatch.setattr(rl, "CARD", "RTX 3090")
    monkeypatch.setattr(rl, "TRAIN_TOKENS", 64)
    session.plan_memory(vars(rl), here, SEEDS)
    small, need = 0.9 * memory.peak(seen[-1])[0] / memory.GB, {}
    for gb in (24, small):
        monkeypatch.setitem(cost.CARDS, "RTX 3090", cost.Card(gb, 1, 100))
        for rollout in ("auto", "plain"):
            monkeypatch.setattr(rl, "ROLLOUT", rollout)
            session.plan_memory(vars(rl), here, SEEDS)
            need[gb, rollout] = sum(r.bytes for r in seen[-1] if r.name == "key/value cache")
    assert need[24, "auto"] == need[24, "plain"] == need[small, "plain"]
    assert need[24, "auto"] > need[small, "auto"] > 0


def test_a_reference_on_the_cpu_counts_only_while_it_scores():
    def always(**how):
        rows = memory.plan(MODEL, [], 2, "kahan", dict(reply=(4, 100, 40)), 512, 512, False, **how)
        names = {(r.phase, r.name) for r in rows}
        return sum(r.bytes for r in rows if r.phase == "always"), names
    (resident, names), (cpu, others) = always(), always(reference="cpu")
    assert resident - cpu == 2 * MODEL.weights
    assert ("always", "reference") in names and ("reference", "reference") in others


def test_two_players_have_two_adapters():
    def of(players):
        rows = memory.plan(MODEL, [], 2, "master", dict(reply=(4, 100, 40)), 512, 512, False,
                           rank=4, players=players)
        return {r.name: r.bytes for r in rows}
    one, two = of(1), of(2)
    assert one["adapters"] == 2 * 4000 * 2 and two["adapters"] == 3 * 4000 * 2
    assert two["optimizer master"] == 2 * one["optimizer master"]


def test_a_visiting_model_goes_home_without_a_copy(loaded):
    """Moved (here to float64, which needs other storage as a device does) and back, also when the
    block fails."""
    model = loaded["qwen2"][0]
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError), models.visiting(model, torch.float64):
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        raise RuntimeError
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with models.visiting(model, torch.device("cpu")):
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("changes, said", [
    (dict(REFERENCE="cpu", LORA_RANK=4), "REFERENCE=cpu is for runs in which all weights"),
    (dict(REFERENCE="cpu", ROLES="defender"), "REFERENCE=cpu is for runs in which all weights"),
    (dict(ADAPTERS="per_role"), "give LORA_RANK"),
    (dict(ADAPTERS="per_role", LORA_RANK=4, ROLES="attacker"), "ROLES=both"),
    (dict(BASE_QUANT="nf4"), "give LORA_RANK")])
def test_constants_that_exclude_one_another_stop_at_once(monkeypatch, changes, said):
    for name, value in dict(dict(LORA_RANK=0), **changes).items():
        monkeypatch.setattr(rl, name, value)
    assert said in stops(session.start, vars(rl), None)
