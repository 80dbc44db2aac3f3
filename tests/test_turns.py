"""selfplay/turns.py: parsing against a table and an enumeration, rendering by hand, completions."""
import copy
import itertools
import re
import shutil
import time

import pytest
from helpers import KINDS, seeded, stops
from jinja2.exceptions import TemplateError

from engine import run
from engine.sampling import sample
from selfplay import turns
from selfplay.data import load_seeds

SECRET = "SECRET plan"


# ---- parse ---------------------------------------------------------------------------------------

TABLE = [  # completion (the prompt ended in <think>), thinking, answer, well_formed
    ("plan</think><answer>reply</answer>", "plan", "reply", True),
    (" plan </think> <answer> reply </answer> ", "plan", "reply", True),
    ("\nplan\nmore\n</think>\n\n<answer>\nline 1\nline 2\n</answer>\n", "plan\nmore",
     "line 1\nline 2", True),
    ("a < b > c</think><answer>x <b>y</b></answer>", "a < b > c", "x <b>y</b>", True),
    ("plan</think><answer>reply</answer><", "plan", "reply", False),

    # malformed: closed thinking
    ("plan</think>reply", "plan", "reply", False),
    ("plan</think><answer>reply", "plan", "reply", False),
    ("plan</think>reply</answer>", "plan", "reply", False),
    ("plan</think>so <answer>reply</answer>", "plan", "reply", False),
    ("plan</think><answer>reply</answer> and more", "plan", "reply", False),
    ("plan</think><answer>one</answer><answer>two</answer>", "plan", "one", False),
    ("plan</think><answer></answer>", "plan", "", False),
    ("plan</think><answer>  \n </answer>", "plan", "", False),
    ("plan</think>", "plan", "", False),
    ("plan</think><answer>", "plan", "", False),
    ("</think><answer>reply</answer>", "", "reply", False),
    (" \n </think><answer>reply</answer>", "", "reply", False),
    ("one</think>two</think><answer>reply</answer>", None, "reply", False),
    ("<think>plan</think><answer>reply</answer>", None, "reply", False),

    # malformed: thinking never closed, but one complete answer
    (SECRET + "<answer>reply</answer>", SECRET, "reply", False),
    (SECRET + "<answer>reply</answer> and more", SECRET, "reply", False),
    ("<answer>reply</answer>", "", "reply", False),
    (SECRET + "</THINK><answer>reply</answer>", None, "reply", False),
    (SECRET + "</ think><answer>reply</answer>", None, "reply", False),

    # malformed: thinking never closed and no such answer, so nothing may go on
    (SECRET, SECRET, "", False),
    (SECRET + "<answer>reply", None, "", False),
    (SECRET + "reply</answer>", None, "", False),
    (SECRET + "</answer>reply<answer>", None, "", False),
    (SECRET + "<answer>one</answer><answer>two</answer>", None, "", False),
    ("", "", "", False),
    (" \n", "", "", False),

    # malformed: thinking opened again after it was closed
    ("plan</think>reply <think>" + SECRET, None, "reply", False),
    ("plan</think><think>" + SECRET, None, "", False),
    ("plan</think><answer>reply <think>" + SECRET + "</answer>", None, "reply", False),
    ("plan</think><answer>reply</answer><think>" + SECRET, None, "reply", False),
    ("plan</think><think>" + SECRET + "</think><answer>reply</answer>", None, "reply", False),
    ("plan<think>" + SECRET + "</think>reply", None, "reply", False),
]


@pytest.mark.parametrize("text, thinking, answer, well_formed", TABLE)
def test_parse_table(text, thinking, answer, well_formed):
    got = turns.parse(text, True)
    assert got[1:] == (answer, well_formed)
    if thinking is not None:
        assert got[0] == thinking
    assert "SECRET" not in got[1]


def test_parse_enumerated():
    """Every sequence of up to 6 tags and words: no word of the thinking in the answer, and one
    well-formed pattern."""
    brackets = {"<think>": "(", "</think>": ")", "<answer>": "[", "</answer>": "]", "w": "w"}
    leaks, checked, good = [], 0, 0
    for n in range(1, 7):
        for tags in itertools.product(brackets, repeat=n):
            pieces = [f"w{i}" if tag == "w" else tag for i, tag in enumerate(tags)]
            inside, hidden = True, set()
            for piece in pieces:
                if piece in ("<think>", "</think>"):
                    inside = piece == "<think>"
                elif inside and piece[0] == "w":
                    hidden.add(piece)

            if "</think>" not in tags and re.findall(r"[\[\]]", "".join(map(brackets.get, tags))) == [
                    "[", "]"]:  # one complete answer
                hidden -= set(pieces[pieces.index("<answer>"):pieces.index("</answer>")])

            _, answer, well_formed = turns.parse(" ".join(pieces), True)

            pattern = "".join(brackets[tag] for tag in tags)
            assert well_formed == bool(re.fullmatch(r"w+\)\[w+\]", pattern)), pieces
            if hidden & set(answer.split()):
                leaks.append(" ".join(pieces))
            assert not re.search(r"</?(think|answer)>", answer)
            checked, good = checked + 1, good + well_formed
    # w)[w] and the two ways to double a word
    assert checked == sum(5 ** n for n in range(1, 7)) and good == 3
    assert not leaks, f"{len(leaks)} leak thinking, such as {min(leaks, key=len)!r}"


def test_parse_without_cot():
    assert turns.parse(" reply ", False) == ("", "reply", True)
    assert turns.parse(" \n", False) == ("", "", False)


def test_parse_of_endless_white_space_is_fast():
    """A degenerate policy writes 2,000 tokens of white space (up to 80 characters each): no
    quadratic matching."""
    began = time.process_time()
    for text in ("x" + " " * 40_000, "x</think><answer>y" + "\n" * 40_000 + "z"):
        assert turns.parse(text, True)[2] is False
    assert time.process_time() - began < 1.0


# ---- prompts -------------------------------------------------------------------------------------

def test_read_prompt_drops_comments(tmp_path):
    (tmp_path / "p.txt").write_text("# comment\n\nfirst # kept\n\n  second\n# end\n")
    assert turns.read_prompt("p.txt", tmp_path) == "first # kept\n\n  second"


def test_a_prompt_that_is_changed_during_a_run_does_not_change_it(tmp_path):
    (tmp_path / "p.txt").write_text("before")
    assert turns.read_prompt("p.txt", tmp_path) == "before"
    (tmp_path / "p.txt").write_text("after")
    assert turns.read_prompt("p.txt", tmp_path) == "before"
    turns.check_prompts()  # the next run's start
    assert turns.read_prompt("p.txt", tmp_path) == "after"


@pytest.fixture
def prompts(monkeypatch, tmp_path):
    """A copy of prompts/ that may be changed -> its folder."""
    folder = shutil.copytree(run.PROMPTS, tmp_path / "prompts")
    monkeypatch.setattr(run, "PROMPTS", folder)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return folder


def test_the_prompts_that_ship_are_sound():
    assert set(turns.SLOTS) == {path.name for path in run.PROMPTS.glob("*.txt")}
    turns.check_prompts()


@pytest.mark.parametrize("name, content, line", [
    ("defender.txt", b"\xff", "not UTF-8"),
    ("attacker_system.txt", b"", "no text"),
    ("format_plain.txt", b"# only a comment\n \n", "no text"),
    ("defender.txt", b"{{FORMAT}}", "slots must be FORMAT REQUEST, not FORMAT"),
    ("defender.txt", b"{{FORMAT}} {{REQUEST}} {{X}}", "not FORMAT REQUEST X"),
    ("warmup_answer.txt", b"Reply.", "slots must be REQUEST, not none"),
    ("format_cot.txt", b"{{REQUEST}}", "slots must be none, not REQUEST")])
def test_a_bad_prompt_file_stops_with_its_name(prompts, name, content, line):
    (prompts / name).write_bytes(content)
    message = stops(turns.check_prompts)
    assert message.startswith(f"error: prompts/{name}: ") and line in message


def test_a_prompt_file_that_cannot_be_read(prompts):
    """guarded() makes one line of it."""
    for make in (lambda path: None, lambda path: path.mkdir()):
        (prompts / "defender.txt").unlink(missing_ok=True)
        make(prompts / "defender.txt")
        assert "error: prompts/defender.txt: " in stops(
            run.guarded, lambda argv: turns.check_prompts(), [])


def test_fill_does_not_expand_markers_in_slots(loaded):
    filled = turns.fill("{{A}}|{{B}}|{{A}}", A="{{B}}", B=r"\1 {{A}} {x} %s")
    assert filled == r"{{B}}|\1 {{A}} {x} %s|{{B}}"

    _, tok = loaded["qwen2"]
    ids = turns.defender_prompt(tok, "{{FORMAT}} {{REQUEST}}", True)
    assert "Request: {{FORMAT}} {{REQUEST}}<" in tok.decode(ids)


@pytest.mark.parametrize("kind, bos, count", [
    ("qwen2", "<|endoftext|>", 0), ("llama", "<|begin_of_text|>", 1), ("mistral", "<s>", 1)])
def test_one_bos_at_most(loaded, kind, bos, count):
    _, tok = loaded[kind]
    bos = tok.convert_tokens_to_ids(bos)
    for cot in (True, False):
        attacker = turns.attacker_prompt(tok, dict(prompt="x", harmful=True), cot)
        for ids in (turns.defender_prompt(tok, "x", cot), attacker):
            assert ids.count(bos) == count
    if count:
        text = tok.decode(turns.defender_prompt(tok, "x", True))
        assert tok(text).input_ids.count(bos) == 2, "the tokenizer must be one that could double it"


RENDERED = {
    "qwen2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
             "<|im_start|>assistant\n<think>",
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
             "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
             "<|start_header_id|>assistant<|end_header_id|>\n\n<think>",
    "mistral": "<s>[INST] S\n\nU [/INST]<think>"}  # no system role: on top of the user's text


@pytest.mark.parametrize("kind", KINDS)
def test_rendered_text_by_hand(loaded, kind):
    _, tok = loaded[kind]
    ids = turns.render(tok, "U", system="S", opening="<think>")
    assert ids == tok(RENDERED[kind], add_special_tokens=False).input_ids


def test_rendered_text_without_a_system_text(loaded):
    _, tok = loaded["qwen2"]
    assert tok.decode(turns.render(tok, "U")).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    _, tok = loaded["mistral"]
    assert tok.decode(turns.render(tok, "U")) == "<s>[INST] U [/INST]"


def test_a_model_that_thinks_by_itself_does_so_in_our_format_alone(loaded):
    """Qwen3's template thinks unless it is told not to: a plain reply would begin with it."""
    tok = copy.deepcopy(loaded["qwen2"][1])
    tok.chat_template = ("{{ messages[-1]['content'] + '\nA:' }}{% if enable_thinking is defined and "
                         "not enable_thinking %}{{ 'none' }}{% endif %}")
    assert tok.decode(turns.render(tok, "U")) == "U\nA:none"
    assert tok.decode(turns.render(tok, "U", opening="<think>")) == "U\nA:<think>"


def test_system_text_is_folded_where_the_template_drops_it(loaded):
    tok = copy.deepcopy(loaded["qwen2"][1])
    tok.chat_template = ("{%- for m in messages if m['role'] == 'user' %}"
                         "{{ 'Q: ' + m['content'] + '\nA:' }}{% endfor %}")
    assert tok.decode(turns.render(tok, "U", system="S")) == "Q: S\n\nU\nA:"
    tok.chat_template = None
    assert tok.decode(turns.render(tok, "U", system="S", opening="<think>")) == "S\n\nU\n\n<think>"


def test_a_template_that_fails_is_no_empty_prompt(loaded):
    tok = copy.deepcopy(loaded["qwen2"][1])
    tok.chat_template = "{{ raise_exception('this model wants a tool list') }}"
    with pytest.raises((SystemExit, TemplateError)):
        turns.render(tok, "U", opening="<think>")


def test_reflection_shows_the_earlier_reply(loaded):
    """SSP's reflective replay: the prompt holds the request and the unsafe reply to it."""
    _, tok = loaded["qwen2"]
    text = tok.decode(turns.defender_prompt(tok, "REQUEST", True, "EARLIER REPLY"))
    assert "REQUEST" in text and "EARLIER REPLY" in text and text.endswith("<think>")
    assert "EARLIER REPLY" not in tok.decode(turns.defender_prompt(tok, "REQUEST", True))


@pytest.mark.parametrize("attack_tokens, unsafe_tokens", [
    (96, None),                 # an attack may be longer than every seed
    (0, None),                  # nobody attacks: the longest seed
    (96, 112)])                 # and an earlier reply is shown
def test_longest_prompts(loaded, attack_tokens, unsafe_tokens):
    _, tok = loaded["qwen2"]
    seeds = load_seeds(str(run.PROMPTS / "seeds.jsonl"))
    attacker, defender = turns.longest_prompts(tok, seeds, True, attack_tokens, unsafe_tokens)

    assert attacker == max(len(turns.attacker_prompt(tok, seed, True)) for seed in seeds)
    longest = max(len(tok(s["prompt"], add_special_tokens=False).input_ids) for s in seeds)
    request = attack_tokens or longest
    assert attack_tokens in (0, request) and longest < 96
    unsafe = None if unsafe_tokens is None else ""
    empty = len(turns.defender_prompt(tok, "", True, unsafe))
    assert defender == empty + request + (unsafe_tokens or 0)


# ---- completions ---------------------------------------------------------------------------------

def test_turn_ids_are_the_sampled_ids(loaded):
    """The ids are not tokenized again: that would be other ids at times."""
    model, tok = loaded["qwen2"]
    drafts = []
    for request in ("one", "two words", "three more words"):
        ids = turns.defender_prompt(tok, request, True)
        drafts.append(turns.Turn("defender", "vanilla_benign", {}, ids, request))
    prompts = [t.prompt_ids for t in drafts]
    done = turns.complete(model, tok, drafts, True, 30, 1.0, 3, seeded(5))

    assert [(t.ids, t.logps) for t in done] == sample(model, tok, prompts, 30, 1.0, 3, seeded(5))
    assert [t.prompt_ids for t in done] == prompts
    again = [tok(tok.decode(t.ids), add_special_tokens=False).input_ids for t in done]
    assert any(ids != t.ids for ids, t in zip(again, done)), (
        "re-tokenizing must differ for this to test anything")


@pytest.mark.parametrize("stopped", [True, False])
def test_complete_parses_without_the_stop_token(loaded, monkeypatch, stopped):
    _, tok = loaded["qwen2"]
    ids = tok("plan</think><answer>reply</answer>", add_special_tokens=False).input_ids
    ids += [tok.turn_end] * stopped
    monkeypatch.setattr(turns, "sample", lambda *a, **k: [(ids, [0.0] * len(ids))])
    draft = turns.Turn("attacker", "generated_harmful", {}, [1])
    [turn] = turns.complete(None, tok, [draft], True, 9, 1.0, 1)
    assert (turn.thinking, turn.answer, turn.well_formed) == ("plan", "reply", True)
    assert turn.ids == ids
