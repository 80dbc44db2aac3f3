"""Turns: rendering prompts, parsing completions, and the Turn that travels from play to update.

What fills the slots of prompts/ is neutralized first (sanitize.py). Of a turn only
the answer is passed on: thinking is hidden (SRT section 3.2, arXiv 2506.07468)."""
import contextlib
import dataclasses
import functools
import re

from engine import run
from engine.batching import micro_batches
from engine.run import die, short
from engine.sampling import sample
from selfplay.data import halves, read_rows
from selfplay.sanitize import neutralize

SLOTS = {  # what the code fills in each file of prompts/: {{NAME}}
    "attacker_benign.txt": "FORMAT SEED", "attacker_harmful.txt": "FORMAT SEED",
    "attacker_system.txt": "", "defender.txt": "FORMAT REQUEST",
    "defender_reflect.txt": "FORMAT REPLY REQUEST", "format_cot.txt": "", "format_plain.txt": "",
    "judge_rubric.txt": "PROMPT RESPONSE", "judge_wildguard.txt": "PROMPT RESPONSE",
    "strategies.txt": "SEED", "warmup_answer.txt": "REQUEST",
    "warmup_postfill.txt": "ANSWER REQUEST", "warmup_postfill_full.txt": "ANSWER REQUEST",
    "warmup_refuse.txt": "REQUEST", "warmup_thoughts.txt": ""}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of one role: what travels from play to update. Token ids are the sampled ones."""
    role: str                      # "attacker" or "defender"
    kind: str                      # HOW_harmful or HOW_benign; how: generated (by the attacker),
    #                                vanilla (the seed), replayed, reflected, paired (SSP's pool)
    seed: dict                     # the seed's line
    prompt_ids: list               # P token ids
    request: str = ""              # defender: what it answers (an attack or a seed); attacker: ""
    game: int = -1                 # number of the game in its step
    ids: list = ()                 # T token ids, the first stop id included
    logps: list = ()               # T log-probabilities at sampling time
    thinking: str = ""
    answer: str = ""
    well_formed: bool = False
    declined: bool = False         # the game's attack is empty, or a refusal of its seed
    relevant: bool = True          # SSP: the game's attack is about its seed
    labels: object = None          # judge.Labels of the game's (request, reply), on both turns
    reward: float | None = None    # None: dropped


@functools.cache  # a file that is changed during a run does not change the run
def read_prompt(name, folder=None):
    """Text of a file of prompts/ (or of a folder) without comments (lines that begin with '#') and
    outer white space. Stops if no text is left, or if its slots are not those of SLOTS."""
    path = (folder or run.PROMPTS) / name
    lines = run.read_text(path).splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).strip()
    if not text:
        die(f"{short(path)}: no text in it")
    check_slots(text, name, short(path))
    return text


def check_slots(text, name, where):
    """Stop if the text of the prompt file `name` has other slots than SLOTS says."""
    found = " ".join(sorted(set(re.findall(r"\{\{(\w+)\}\}", text))))
    if found != SLOTS.get(name, found):
        die(f"{where}: slots must be {SLOTS[name] or 'none'}, not {found or 'none'}")


def check_prompts():
    """Read every file of SLOTS anew, so that a bad one stops a run at its start."""
    read_prompt.cache_clear()
    for name in SLOTS:
        read_prompt(name)


def fill(template, **slots):
    """Replace {{NAME}} in one pass: a slot's text is not searched for further markers."""
    return re.sub(r"\{\{(\w+)\}\}", lambda m: slots[m.group(1)], template)


def render(tok, user, system="", opening=""):
    """User and system text, both neutralized -> list of prompt token ids, in the model's own chat
    template. The prompt ends in `opening`, the start of the reply. A template without system role
    (Mistral, Gemma) gets both as the user's text. The BOS comes from the template alone."""
    if not tok.chat_template:
        return tok(f"{system}\n\n{user}\n\n".lstrip() + opening).input_ids
    from jinja2.exceptions import TemplateError
    text, turn = "", dict(role="user", content=user)
    how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=bool(opening))  # Qwen3
    if system:
        with contextlib.suppress(TemplateError):  # it has no system role
            text = tok.apply_chat_template([dict(role="system", content=system), turn], **how)
    if not system or system not in text:
        turn["content"] = f"{system}\n\n{user}" if system else user
        text = tok.apply_chat_template([turn], **how)
    return tok(text + opening, add_special_tokens=False).input_ids


def defender_prompt(tok, request, cot, unsafe=None):
    """Prompt ids of a defender turn for one request (attack, seed, benchmark). unsafe: an earlier
    unsafe reply to it, to reflect on (SSP's reflective replay)."""
    if unsafe is None:
        return _prompt(tok, "defender.txt", cot, REQUEST=request)
    return _prompt(tok, "defender_reflect.txt", cot, REQUEST=request, REPLY=unsafe)


def plain_prompt(tok, request):
    """Prompt ids of a request in the model's own chat template, without the turn format."""
    return render(tok, neutralize(request, tok))


def attacker_prompt(tok, seed, cot):
    """Prompt ids of an attacker turn for one seed, by its harmfulness (SRT section 3.1)."""
    name = "attacker_harmful.txt" if seed["harmful"] else "attacker_benign.txt"
    return _prompt(tok, name, cot, read_prompt("attacker_system.txt"), SEED=seed["prompt"])


def _prompt(tok, name, cot, system="", **texts):
    slots = {slot: neutralize(text, tok) for slot, text in texts.items()}
    slots["FORMAT"] = read_prompt("format_cot.txt" if cot else "format_plain.txt")
    return render(tok, fill(read_prompt(name), **slots), system, "<think>" if cot else "")


def example(tok, request, thinking, answer, cot):
    """A defender's supervised example -> dict(prompt_ids, completion_ids), as the model should see
    and sample it; the stop id last. The texts may come from a file, so they are neutralized, which
    changes nothing the second time. Without `cot` the thinking is ignored."""
    thinking, answer = neutralize(thinking, tok), neutralize(answer, tok)
    text = f" {thinking} </think> <answer> {answer} </answer>" if cot else answer
    ids = tok(text, add_special_tokens=False).input_ids + [tok.turn_end]
    return dict(prompt_ids=defender_prompt(tok, request, cot), completion_ids=ids)


def read_examples(path, tok, kinds, cot):
    """A defender.jsonl of 01 -> list of example()s. kinds: as SFT_KINDS. [] if path is None."""
    if path is None:
        print("no SFT mix: there is no defender.jsonl (stage 1 writes it) and no SFT=")
    examples = []
    for row in read_rows(path, "kind", heal=None) if path else []:
        if {"request", "answer"} - row.keys() or cot and not row.get("thinking"):
            die(f"{short(path)} is of an older version or of COT=false: run 01_sft_warmup.py again")
        if kinds in ("all", row["kind"]):
            texts = row["request"], row.get("thinking", ""), row["answer"]
            examples.append(example(tok, *texts, cot))
    return examples


def longest_prompts(tok, seeds, cot, attack_tokens, unsafe_tokens=None):
    """Lengths in tokens of the longest prompts -> (attacker's, defender's). attack_tokens: of an
    attack (0: no seed is attacked). unsafe_tokens: of an earlier reply (None: no reflection)."""
    attacker, request = 0, attack_tokens
    for half in halves(sorted(seeds, key=lambda s: len(s["prompt"]))):
        for seed in half[-4:]:
            request = max(request, len(tok(seed["prompt"], add_special_tokens=False).input_ids))
            attacker = max(attacker, len(attacker_prompt(tok, seed, cot)))
    if unsafe_tokens is None:
        return attacker, len(defender_prompt(tok, "", cot)) + request
    return attacker, len(defender_prompt(tok, "", cot, "")) + request + unsafe_tokens


def complete(model, tok, turns, cot, max_new, temperature, batch, generator=None, rollout="auto"):
    """Sample each turn -> copies with ids, logps and what parse() gives. rollout: see sample()."""
    prompts, out = [turn.prompt_ids for turn in turns], []
    pairs = sample(model, tok, prompts, max_new, temperature, batch, generator, rollout=rollout)
    for turn, (ids, logps) in zip(turns, pairs):
        text = tok.decode(ids[:-1] if ids[-1] in tok.stop_ids else ids)
        thinking, answer, well_formed = parse(text, cot)
        out.append(dataclasses.replace(turn, ids=ids, logps=logps, thinking=thinking,
                                       answer=answer, well_formed=well_formed))
    return out


def sizes(turns):
    """Tokens of each turn, its prompt's included."""
    return [len(t.prompt_ids) + len(t.ids) for t in turns]


def batches_of(turns, max_tokens):
    """Micro-batches: lists of indices of turns, at most max_tokens padded tokens each. The turns of
    one have the same instruction, which the model then computes once (shared_opening)."""
    groups, out = {}, []
    for i, t in enumerate(turns):
        own = t.role == "attacker" or t.kind.startswith("reflected")  # an instruction for each kind
        groups.setdefault((t.role, t.kind if own else "any"), []).append(i)
    for group in groups.values():
        for part in micro_batches(sizes([turns[i] for i in group]), max_tokens):
            out.append([group[k] for k in part])
    return out


def parse(text, cot):
    """A completion -> (thinking, answer, well_formed). With `cot` the prompt ended in "<think>";
    well-formed is: thinking </think> <answer> answer </answer>, neither text empty, each tag once,
    nothing around. If malformed, answer is what follows the last </think> (inside <answer>, if one
    opens there); without </think>, the inside of a single <answer>...</answer>; otherwise "".
    (SRT's published code passes on the raw text where it finds no answer, thinking included.)"""
    if not cot:
        return "", text.strip(), bool(text.strip())
    thinking, closed, rest = text.rpartition("</think>")
    if not closed:
        thinking, opened, rest = text.partition("<answer>")
        if re.findall("</?answer>", text) != ["<answer>", "</answer>"]:
            return text.strip(), "", False
        rest = opened + rest
    thinking, rest = thinking.strip(), rest.strip()
    once = re.findall(r"</?(?:think|answer)>", text) == ["</think>", "<answer>", "</answer>"]
    bare = rest.startswith("<answer>") and rest.endswith("</answer>")
    rest = rest.partition("<think>")[0]  # opened again and not closed: still thinking
    if "<answer>" in rest:
        rest = rest.partition("<answer>")[2].partition("</answer>")[0]
    answer = re.sub(r"</?(?:think|answer)>", " ", rest).strip()
    return thinking, answer, bool(once and bare and thinking and answer)
