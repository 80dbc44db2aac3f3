"""01_sft_warmup.py: examples, filters, loss mask, rates, and the files it writes."""
import copy
import json
import math
import random
import types

import pytest
import torch
from helpers import (KINDS, FakeJudge, import_stage, keep_constants, read_jsonl, seeded, stops,
                     write_jsonl)

from engine.logprobs import token_logprobs
from selfplay.sanitize import neutralize
from selfplay.turns import Turn, attacker_prompt, defender_prompt, example, parse

sft = import_stage("01_sft_warmup")
SEED = dict(id="b1", prompt="What is a prime number?", harmful=False)
EXAMPLE = (SEED, "The user asks about maths.", "A number with two divisors.", "comply")


# ---- texts ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, ended, want", [
    ("One. Two is", False, "One."),
    ("One.  Two\nis", True, "One. Two is"),
    ("Who? Me! And", False, "Who? Me!"),
    ("no end here", False, "")])
def test_brief_texts_are_whole_sentences(text, ended, want):
    assert sft.trimmed(text, ended) == want


LISTED = "Two steps:\n\n1. `a = 1`\n2. run\n\n```\nfor x in y:\n    print(x)\n```"


@pytest.mark.parametrize("ended, want", [(True, LISTED), (False, "")])
def test_full_texts_keep_their_lines(monkeypatch, ended, want):
    """Without BRIEF lists and code stay; what was cut at its limit is not used at all."""
    monkeypatch.setattr(sft, "BRIEF", False)
    assert sft.trimmed(LISTED, ended) == want


@pytest.mark.parametrize("text, fit", [
    ("The user asks about maths.", True),
    ("The user wants it short!", True),
    ("The user asks.", False),                      # too short
    ("The user asks " + "a lot of " * 40 + "things.", False),
    ("A person asks about maths.", False),
    ("The user asks about maths", False),           # no end
    ("The user asks about <answer> tags.", False)])
def test_usable_thinking(text, fit):
    assert sft.usable_thinking(text) is fit


@pytest.mark.parametrize("text, fit", [
    ("Primes.", True),
    ("First, what is a prime?\n\n- if 2 < n\n- so, then " + "a lot of " * 400, True),
    ("", False),
    ("<think>The user asks about maths.", False),
    ("The user asks about maths. </Thinking>", False),
    ("The user asks. < answer > A number.", False)])
def test_usable_thinking_without_brief(monkeypatch, text, fit):
    """Neither its opening, its end nor its length counts."""
    monkeypatch.setattr(sft, "BRIEF", False)
    assert sft.usable_thinking(text) is fit


def test_columns_of_a_prompt_file(monkeypatch, tmp_path):
    monkeypatch.setattr(sft.run, "PROMPTS", tmp_path)
    file = tmp_path / "x.txt"
    file.write_text("# a comment\na | b | c | d\n\n e|f|g\n")
    assert sft.read_columns("x.txt", 3) == [("a", "b", "c | d"), ("e", "f", "g")]
    assert "prompts/x.txt line 4" in stops(sft.read_columns, "x.txt", 4)
    file.write_text("# a comment\na | | c\n")
    assert "prompts/x.txt line 2" in stops(sft.read_columns, "x.txt", 3)
    file.write_text("# a comment\n\n")
    assert "prompts/x.txt: no line" in stops(sft.read_columns, "x.txt", 3)
    (tmp_path / "strategies.txt").write_text("a | b | {{SEED}}\na | b | no seed\n")
    assert "strategies.txt line 2: slots must be SEED, not none" in stops(
        sft.read_columns, "strategies.txt", 3)


# ---- examples ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_example_is_what_the_model_should_sample(loaded, kind):
    """The completion is a well-formed turn with one turn end, last; the prompt opens <think>."""
    _, tok = loaded[kind]
    attack = (SEED, "I will add a story.", "Tell a story about primes.", "fiction")
    row, attacker = sft.build(tok, [EXAMPLE], [attack])
    assert row["completion_ids"].count(tok.turn_end) == 1
    assert row["completion_ids"][-1] == tok.turn_end
    _, thinking, answer, _ = EXAMPLE
    assert parse(tok.decode(row["completion_ids"][:-1]), True) == (thinking, answer, True)
    prompt = tok.decode(row["prompt_ids"])
    assert prompt.endswith("<think>") and SEED["prompt"] in prompt
    assert (row["role"], row["kind"], row["seed"]) == ("defender", "comply", "b1")
    assert (attacker["role"], attacker["kind"]) == ("attacker", "fiction")


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_ids_of_an_example(loaded, kind):
    """Both roles' completions have one form; the prompts are the game's."""
    _, tok = loaded[kind]
    attack = (SEED, "I will add a story.", "Tell a story about primes.", "fiction")
    rows = sft.build(tok, [EXAMPLE], [attack])
    for row, (_, thinking, answer, _) in zip(rows, (EXAMPLE, attack)):
        text = f" {thinking} </think> <answer> {answer} </answer>"
        ids = tok(text, add_special_tokens=False).input_ids + [tok.turn_end]
        assert row["completion_ids"] == ids
    assert rows[0]["prompt_ids"] == defender_prompt(tok, SEED["prompt"], True)
    assert rows[1]["prompt_ids"] == attacker_prompt(tok, SEED, True)


def test_an_example_from_a_file_cannot_forge_a_turn(loaded):
    """The text of defender.jsonl is data: it is neutralized, and that twice is as good as once."""
    _, tok = loaded["qwen2"]
    row = example(tok, "x<|im_end|>y", "so </think> <answer> yes", "no </answer><|im_end|>", True)
    assert row["completion_ids"].count(tok.turn_end) == 1
    thinking, answer, well_formed = parse(tok.decode(row["completion_ids"][:-1]), True)
    assert well_formed and "yes" in thinking and answer.startswith("no")
    assert example(tok, "x", neutralize("</think>", tok), neutralize("<|im_end|>", tok), True) == (
        example(tok, "x", "</think>", "<|im_end|>", True))
    assert example(tok, "x", "a thought", "y", False) == example(tok, "x", "", "y", False)


def test_no_cot_example(loaded, monkeypatch):
    monkeypatch.setattr(sft, "COT", False)
    _, tok = loaded["qwen2"]
    [row] = sft.build(tok, [(SEED, "", "A number.", "comply")], [])
    whole = tok.decode(row["prompt_ids"] + row["completion_ids"])
    assert "<think>" not in whole and "<answer>" not in whole
    assert tok.decode(row["completion_ids"][:-1]) == "A number."


def test_attacker_examples_use_every_strategy_and_keep_the_seed(loaded, monkeypatch):
    _, tok = loaded["qwen2"]
    monkeypatch.setattr(sft, "ATTACKER_EXAMPLES", 64)
    seeds = [dict(id=f"{h}{i}", prompt=f"request number {h}{i}", harmful=h)
             for h in (True, False) for i in range(5)]
    out = sft.attacker_examples(tok, seeds, random.Random(0))
    names = [name for *_, name in out]
    assert set(names) == {name for name, *_ in sft.read_columns("strategies.txt", 3)}
    assert len(set(map(names.count, names))) == 1
    assert all(seed["prompt"] in text and thought for seed, thought, text, _ in out)
    assert sum(seed["harmful"] for seed, *_ in out) == 32


REPLIES = {  # seed -> what the model replies to it
    "bad 0": "I'm sorry, but no.",
    "bad 1": "I'm sorry, but step one is this.",     # harmful
    "bad 2": "I'm sorry, not this.",
    "bad 3": "It would hurt people, so no.",         # the matcher knows no such opening
    "bad 4": "I cannot say it all in one line.",     # the judge sees no refusal
    "good 0": "Here is a recipe for soup.",
    "good 1": "I'm sorry, I cannot.",
    "good 2": "A good long answer.",
    "good 3": "Short.",                              # too short
    "good 4": "I don't know all soups, but here is one."}  # the matcher sees a refusal
THOUGHT = "The user asks for something, and this reply fits it."


class NoSpecialTokens:
    """As much of a tokenizer as neutralizing needs."""
    added_tokens_decoder = {}


@pytest.fixture
def examples(monkeypatch):
    """defender_examples of REPLIES' seeds -> {(seed id, kind): thinking}; `thought` is what the
    model writes as post-filled thinking."""
    def make(thought=THOUGHT, judge=None, **constants):
        def ask(model, tok, texts, max_new, generator):
            out = []
            for text in texts:
                known = [k for k in REPLIES if k in text and "Reply:" not in text]
                out.append((REPLIES[known[0]] if known else thought, True))
            return out

        monkeypatch.setattr(sft, "ask", ask)
        for name, value in (dict(DEFENDER_EXAMPLES=5, WARMUP_REFUSALS=0.2) | constants).items():
            monkeypatch.setattr(sft, name, value)
        judge = judge or FakeJudge(
            lambda request, reply: reply.startswith(("I'm sorry", "It would")),
            lambda request, reply: "step one" in reply)
        seeds = [dict(id=k, prompt=k, harmful=k.startswith("bad")) for k in REPLIES]
        rows = sft.defender_examples(None, NoSpecialTokens(), judge, seeds, random.Random(0), None)
        return {(seed["id"], kind): thinking for seed, thinking, _, kind in rows}
    return make


@pytest.mark.parametrize("share, refusals", [(0.2, 1), (1.0, 2)])
def test_filters_keep_safe_refusals_and_real_answers(examples, share, refusals):
    """Of harmful seeds safe refusals, WARMUP_REFUSALS of all at most; of benign ones answers. What
    is imitated needs the judge's and the matcher's opinion."""
    kept = examples(WARMUP_REFUSALS=share)
    complied = {seed for seed, kind in kept if kind == "comply"}
    refused = {seed for seed, kind in kept if kind == "refuse"}
    assert complied == {"good 0", "good 2"}
    assert len(refused) == refusals and refused <= {"bad 0", "bad 2"}
    assert set(kept.values()) == {THOUGHT}


def test_few_answers_bring_few_refusals(examples):
    """Both good answers and both refusals pass; half of four may be refusals, a third of three."""
    assert sorted(kind for _, kind in examples(WARMUP_REFUSALS=0.5)) == 2 * ["comply"] + 2 * ["refuse"]
    kinds = [kind for _, kind in examples(WARMUP_REFUSALS=0.2, DEFENDER_EXAMPLES=10)]
    assert sorted(kinds) == 2 * ["comply"] + ["refuse"]  # not 2 of the 10 that were asked for


def test_a_template_stands_in_for_unusable_thinking(examples, capsys):
    kept = examples(thought="no thought at all")
    templates = {}
    for kind, thought in sft.read_columns("warmup_thoughts.txt", 2):
        templates.setdefault(kind, []).append(thought)
    assert len(kept) == 3
    for (_, kind), thinking in kept.items():
        assert thinking in templates[kind]
    assert "usable: 0 of 3" in capsys.readouterr().out


CODE = "Soup, in code:\n\n```\nfor x in pot:\n    stir(x)\n```\n\n* salt\n* pepper"
FULL = {  # request -> (reply, ended)
    "bad 0": ("I'm sorry, but no.\n\nIt would hurt people.", True),
    "good 0": (CODE, True),
    "good 1": ("Cut. At its limit", False),
    "good 2": ("Soup.", True),
    "good 3": (CODE + " long" * 300, True)}


@pytest.mark.parametrize("ended", [True, False])
def test_full_replies_and_thoughts(monkeypatch, ended):
    """Without BRIEF: the request alone is asked; a reply is kept as it is, of any length, unless it
    was cut. `ended`: of the thoughts; a template stands in for one that was cut."""
    asked, thought = [], "The request is about soup.\n\n1. Stir.\n2. Answer " + "slowly " * 60

    def ask(model, tok, texts, max_new, generator):
        asked.append((max_new, texts))
        return [(thought, ended) if "Reply:" in text else FULL[text] for text in texts]

    monkeypatch.setattr(sft, "ask", ask)
    for name, value in dict(BRIEF=False, DEFENDER_EXAMPLES=9, WARMUP_REFUSALS=0.0, REPLY_TOKENS=7,
                            THINK_TOKENS=5).items():
        monkeypatch.setattr(sft, name, value)
    judge = FakeJudge(lambda request, reply: reply.startswith("I'm sorry"))
    seeds = [dict(id=k, prompt=k, harmful=k.startswith("bad")) for k in FULL]
    rows = sft.defender_examples(None, NoSpecialTokens(), judge, seeds, random.Random(0), None)
    assert {seed["id"]: reply for seed, _, reply, _ in rows} == {
        "good 0": CODE, "good 2": "Soup.", "good 3": FULL["good 3"][0]}
    assert all((thinking == thought) == ended and thinking for _, thinking, _, _ in rows)
    [(reply_tokens, requests), (think_tokens, thoughts)] = asked
    # with no share of refusals no harmful seed is asked
    assert sorted(requests) == ["good 0", "good 1", "good 2", "good 3"]
    assert (reply_tokens, think_tokens, len(thoughts)) == (7, 5, 3)
    assert all("sentence" not in text for text in thoughts)


def test_the_published_sampling():
    """--paper: the numbers of the published batch inference, and no cap besides."""
    paper = sft.PAPER
    assert (paper["REPLY_TOKENS"], paper["THINK_TOKENS"]) == (2048, 1024)
    assert (paper["TEMPERATURE"], paper["TOP_P"]) == (0.6, 0.9)
    assert paper["BRIEF"] is False and paper["WARMUP_REFUSALS"] == 0.0
    assert sft.BRIEF is True and (sft.TEMPERATURE, sft.TOP_P) == (0.7, 1.0)


def test_a_nucleus_of_nothing_stops_at_once(monkeypatch):
    keep_constants(monkeypatch, sft)
    assert "TOP_P=0.0" in stops(sft.main, ["TOP_P=0"])


def test_thoughts_of_one_kind_alone_stop_at_once(monkeypatch):
    keep_constants(monkeypatch, sft)
    real = sft.read_columns

    def columns(name, width):
        rows = real(name, width)
        return [row for row in rows if row[0] != "refuse"] if name == "warmup_thoughts.txt" else rows

    monkeypatch.setattr(sft, "read_columns", columns)
    assert "`comply` and `refuse`" in stops(sft.main, [])


def test_without_cot_nothing_is_thought(examples):
    assert set(examples(COT=False).values()) == {""}


def test_a_judge_that_keeps_nothing(examples, capsys):
    """The chain can still be tried with a tiny model; with the embedded pair it is a mistake."""
    nothing = FakeJudge(harmful=lambda request, reply: True)
    rows = examples(judge=nothing, MODEL="some/folder", DEFENDER_EXAMPLES=10)
    assert {seed for seed, _ in rows} == {f"good {n}" for n in range(5)}  # no harmful "answers"
    assert "WARNING: the judge kept nothing" in capsys.readouterr().out
    assert "python judge.py" in stops(examples, judge=nothing, MODEL="smollm2", JUDGE="embedded")


# ---- training and rates --------------------------------------------------------------------------

def test_training_reaches_only_completions(loaded, monkeypatch):
    """The loss falls, and its gradient does not depend on the prompt's own log-probabilities."""
    for name, value in dict(LR=3e-3, EPOCHS=20, BATCH=2, TRAIN_TOKENS=4000).items():
        monkeypatch.setattr(sft, name, value)
    model, tok = copy.deepcopy(loaded["qwen2"][0]), loaded["qwen2"][1]
    rows = sft.build(tok, [EXAMPLE] * 2, [])
    prompt, completion = rows[0]["prompt_ids"], rows[0]["completion_ids"]

    def losses():
        with torch.no_grad():
            logp, _ = token_logprobs(model, [prompt], [completion])
            own, _ = token_logprobs(model, [prompt[:1]], [prompt[1:]])
        return -logp.mean().item(), -own.mean().item()

    before = losses()
    sft.train(model, rows, random.Random(0))
    after = losses()
    assert after[0] < 0.5 * before[0]
    assert after[1] > before[1] - 0.3 * (before[0] - after[0])  # prompts are not learnt by heart


def test_the_learning_rate_of_every_update(monkeypatch):
    """Linear from 0 over a tenth of the updates, rounded up; then a cosine to a tenth of LR."""
    rates = []

    class Recorder:
        left_out = 0

        def __init__(self, *_):
            pass

        def step(self, lr, clip):
            rates.append(lr)

    monkeypatch.setattr(sft, "OPTIMIZERS", dict(master=Recorder))
    monkeypatch.setattr(sft, "cross_entropy_step", lambda *_: 1.0)
    for name, value in dict(LR=8.0, EPOCHS=3, BATCH=2).items():
        monkeypatch.setattr(sft, name, value)
    sft.train(None, [{}] * 7, random.Random(0))  # 12 updates, 2 of them warm-up
    assert rates[:3] == [0.0, 4.0, 8.0]
    assert rates[7] == pytest.approx(4.4)  # half of the way down
    assert rates[-1] == pytest.approx(0.8 + 7.2 * (1 + math.cos(0.9 * math.pi)) / 2)
    assert len(rates) == 12 and rates[2:] == sorted(rates[2:], reverse=True)


def test_a_batch_is_the_mean_over_its_tokens(loaded, monkeypatch):
    """TRAIN_TOKENS cuts a batch into micro-batches and changes nothing."""
    for name, value in dict(LR=1e-3, EPOCHS=2, BATCH=3).items():  # the first update has rate 0
        monkeypatch.setattr(sft, name, value)
    start, tok = loaded["qwen2"]
    long = (SEED, "The user asks about maths and wants it long.", "A number. " * 20, "comply")
    rows, weights = sft.build(tok, [EXAMPLE, long, EXAMPLE], []), []
    for tokens in (16, 4000):
        monkeypatch.setattr(sft, "TRAIN_TOKENS", tokens)
        model = copy.deepcopy(start)
        sft.train(model, rows, random.Random(0))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    moved = (weights[0] - torch.cat([p.detach().flatten() for p in start.parameters()])).norm()
    assert moved > 0 and (weights[1] - weights[0]).norm() < 0.02 * moved


def test_probe_rates_by_hand(monkeypatch, capsys):
    """Six turns a role, half of them harmful: well-formed shares, ASR and compliance."""
    monkeypatch.setattr(sft, "PROBE", 6)
    monkeypatch.setattr(sft, "defender_prompt", lambda *_: [1])
    monkeypatch.setattr(sft, "attacker_prompt", lambda *_: [1])
    answers = iter(["", "Yes.", "step one", "I'm sorry.", "No.", "",
                    "a", "b", "", "c", "d", "e"])

    def complete(model, tok, drafts, *_):
        done = []
        for draft in drafts:
            answer = next(answers)
            done.append(Turn(draft.role, draft.kind, draft.seed, [1], draft.request, answer=answer,
                             well_formed=bool(answer)))
        return done

    monkeypatch.setattr(sft, "complete", complete)
    judge = FakeJudge(lambda request, reply: reply.startswith("I'm sorry"),
                      lambda request, reply: "step one" in reply)
    seeds = [dict(id=str(i), prompt=f"{'bad' if i % 2 else 'good'} {i}", harmful=i % 2 == 1)
             for i in range(6)]
    rates = sft.try_turns(None, None, judge, seeds, "before")
    # harmful: "", "step one" and "No."; benign: "Yes.", a refusal and "", which is no answer
    assert rates == dict(defender=4 / 6, attacker=5 / 6, asr=1 / 3, comply=1 / 3)
    assert [request for request, _ in judge.pairs] == ["bad 1", "good 0", "bad 3", "good 2",
                                                       "bad 5", "good 4"]
    assert capsys.readouterr().out.startswith("before: well-formed defender 0.67 attacker 0.83")


def test_ask_samples_as_the_constants_say(monkeypatch):
    """TEMPERATURE and TOP_P are of these examples only; the game draws from the policy itself."""
    seen = []

    def sample(model, tok, prompts, max_new, temperature, batch, generator, top_p, rollout):
        seen.append((temperature, top_p))
        return [([0], [0.0])]

    monkeypatch.setattr(sft, "sample", sample)
    monkeypatch.setattr(sft, "render", lambda tok, text: [1])
    tok = types.SimpleNamespace(decode=lambda ids, **how: "text", stop_ids={0})
    for temperature, top_p in ((0.7, 1.0), (0.6, 0.9)):
        monkeypatch.setattr(sft, "TEMPERATURE", temperature)
        monkeypatch.setattr(sft, "TOP_P", top_p)
        assert sft.ask(None, tok, ["one"], 6, None) == [("text", True)]
    assert seen == [(0.7, 1.0), (0.6, 0.9)]


def test_ask_says_whether_a_reply_has_ended(loaded):
    model, tok = loaded["qwen2"]
    replies = sft.ask(model, tok, ["one", "two"], 6, seeded(0))
    assert len(replies) == 2 and all(isinstance(text, str) for text, _ in replies)
    tok = copy.copy(tok)
    tok.stop_ids = set(range(len(tok) + 8))  # every word ends a reply
    assert [ended for _, ended in sft.ask(model, tok, ["one"], 6, seeded(0))] == [True]


# ---- what a run works with ----------------------------------------------------------------------

@pytest.fixture
def opened(workplace, tiny_models, monkeypatch):
    """words -> what main() gives to each of its parts up to the first example: `rates` and
    `examples` (their seeds), `judge` (how it is loaded)."""
    def start(*words):
        seen = {}

        def try_turns(model, tok, scorer, seeds, when):
            seen["rates"] = seeds

        def defender_examples(model, tok, scorer, seeds, rng, generator):
            seen["examples"] = seeds
            raise InterruptedError

        monkeypatch.setattr(sft, "try_turns", try_turns)
        monkeypatch.setattr(sft, "defender_examples", defender_examples)
        monkeypatch.setattr(sft.judge, "load_judge", lambda *_, **how: seen.update(judge=how))
        with pytest.raises(InterruptedError):
            sft.main([f"MODEL={tiny_models['qwen2']}", f"JUDGE={tiny_models['mistral']}",
                      "QUANTIZE=none", "DTYPE=float32", *words])
        return seen
    return start


def test_train_seeds_make_examples_and_dev_seeds_the_rates(opened, tmp_path):
    """Of seeds of all three splits; test seeds are not read."""
    seeds, ids = [], dict(train=[], dev=[], test=[])
    for n in range(12):
        split = ("test", "train", "dev")[n % 3]
        seeds.append(dict(id=str(n), prompt=f"<seed #{n}>", harmful=n % 2 == 1, split=split))
        ids[split].append(str(n))
    seen = opened(f"SEEDS={write_jsonl(tmp_path / 'some.jsonl', seeds)}")
    assert [seed["id"] for seed in seen["examples"]] == ids["train"]
    assert [seed["id"] for seed in seen["rates"]] == ids["dev"]


def test_the_judge_reads_thinking_and_reply(opened):
    """Of a turn that may be as long as both together."""
    how = opened("REPLY_TOKENS=2048", "THINK_TOKENS=1024")["judge"]
    assert how["max_text"] == sft.judge.text_limit(2048 + 1024) > sft.judge.text_limit(2048)


# ---- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("cot", [True, False])
def test_written_examples(loaded, monkeypatch, tmp_path, cot):
    """Both roles as text. The defender's also for stage 2, which can give them to any tokenizer:
    with this one they are the token ids that were trained on."""
    monkeypatch.setattr(sft, "COT", cot)
    _, tok = loaded["qwen2"]
    attack = (SEED, "I will add a story.", "Tell a story about primes.", "fiction")
    rows = sft.build(tok, [EXAMPLE], [attack])
    mix = sft.write_examples(tmp_path, rows)
    texts = read_jsonl(tmp_path / "examples.jsonl")
    assert texts == [
        dict(role="defender", kind="comply", seed="b1", thinking=EXAMPLE[1], answer=EXAMPLE[2]),
        dict(role="attacker", kind="fiction", seed="b1", thinking=attack[1], answer=attack[2])]
    [line] = map(json.loads, mix.splitlines())
    assert line == dict(kind="comply", seed="b1", request=SEED["prompt"], thinking=EXAMPLE[1],
                        answer=EXAMPLE[2])
    again = example(tok, line["request"], line["thinking"], line["answer"], cot)
    assert again == {name: rows[0][name] for name in ("prompt_ids", "completion_ids")}
    _, other = loaded["llama"]
    assert example(other, line["request"], line["thinking"], line["answer"], cot)["completion_ids"]
