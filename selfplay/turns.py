"""Turns: rendering prompts, parsing completions, and the Turn that travels from play to update.

A prompt's text comes from prompts/; its slots are filled by replacement, and what is filled in is
neutralized first (selfplay/sanitize.py). The hidden chain of thought is SRT section 3.2 (arXiv
2506.07468): only what stands inside <answer> leaves a turn.
"""
import dataclasses
import re

from engine.run import PROMPTS
from engine.sampling import sample
from selfplay.sanitize import neutralize


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of one role: what travels from play to update. Token ids are the sampled ones."""
    role: str                      # "attacker" or "defender"
    kind: str                      # (generated | vanilla | replayed | reflected)_(harmful | benign)
    seed: dict                     # the seed's line
    prompt_ids: list               # P token ids
    request: str = ""              # defender: the text that it answers, from attacker or seed
    game: int = -1                 # number of the game in its step
    ids: list = ()                 # T token ids, the first stop id included
    logps: list = ()               # T log-probabilities at sampling time
    thinking: str = ""
    answer: str = ""
    well_formed: bool = False
    declined: bool = False         # attacker: the judge calls it a refusal of its seed
    labels: object = None          # judge.Labels of (request, answer)
    reward: float | None = None    # None: dropped


def read_prompt(name, folder=PROMPTS):
    """Text of a prompt file without comments (lines that begin with '#') and outer white space."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")).strip()


def fill(template, **slots):
    """Replace {{NAME}} in one pass: a slot's text is not searched for further markers."""
    return re.sub(r"\{\{(\w+)\}\}", lambda m: slots[m.group(1)], template)


def render(tok, user, system="", opening=""):
    """Chat text -> prompt token ids, in the model's own template, ending in `opening` of the reply.
    `user` and `system` are ours with slots already neutralized. A template without system role
    (Mistral, Gemma) gets the system text on top of the user's. The template writes the BOS; the
    tokenizer does not add a second one."""
    if not tok.chat_template:
        text = f"{system}\n\n{user}\n\n".lstrip() + opening
        return tok(text).input_ids
    from jinja2.exceptions import TemplateError
    chat = [dict(role="user", content=user)]
    if system:
        chat.insert(0, dict(role="system", content=system))
    try:
        text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        if not system:
            raise
        text = ""
    if system and system not in text:
        chat = [dict(role="user", content=f"{system}\n\n{user}")]
        text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tok(text + opening, add_special_tokens=False).input_ids


def defender_prompt(tok, request, cot, unsafe=None):
    """Prompt ids of a defender turn for one request (attack, seed, benchmark). unsafe: an earlier
    unsafe reply to it, to reflect on (SSP's reflective replay)."""
    slots = dict(FORMAT=_format(cot), REQUEST=neutralize(request, tok))
    name = "defender.txt"
    if unsafe is not None:
        name, slots["REPLY"] = "defender_reflect.txt", neutralize(unsafe, tok)
    return render(tok, fill(read_prompt(name), **slots), opening="<think>" if cot else "")


def attacker_prompt(tok, seed, cot):
    """Prompt ids of an attacker turn for one seed, by its harmfulness (SRT section 3.1)."""
    name = "attacker_harmful.txt" if seed["harmful"] else "attacker_benign.txt"
    text = fill(read_prompt(name), FORMAT=_format(cot), SEED=neutralize(seed["prompt"], tok))
    system = read_prompt("attacker_system.txt")
    return render(tok, text, system=system, opening="<think>" if cot else "")


def _format(cot):
    return read_prompt("format_cot.txt" if cot else "format_plain.txt")


def longest_prompts(tok, seeds, cot, attack_tokens, unsafe_tokens=None):
    """Lengths in tokens of the longest prompts -> (attacker's, defender's). Of the longest seeds;
    the defender's request is also taken to be `attack_tokens` long (0: no seed is attacked), and
    its earlier reply `unsafe_tokens` (None: no reflection)."""
    attacker, request = 0, attack_tokens
    by_length = sorted(seeds, key=lambda s: len(s["prompt"]))
    for harmful in (True, False):
        half = [s for s in by_length if s["harmful"] is harmful]
        for seed in half[-4:]:
            ids = tok(seed["prompt"], add_special_tokens=False).input_ids
            request = max(request, len(ids))
            attacker = max(attacker, len(attacker_prompt(tok, seed, cot)))
    defender = len(defender_prompt(tok, "", cot)) + request
    if unsafe_tokens is not None:
        defender = len(defender_prompt(tok, "", cot, "")) + request + unsafe_tokens
    return attacker, defender


def complete(model, tok, turns, cot, max_new, temperature, batch, generator=None):
    """Sample the completions of turns that have prompts -> the turns with ids, logps, thinking,
    answer, well_formed."""
    prompts = [turn.prompt_ids for turn in turns]
    pairs = sample(model, tok, prompts, max_new, temperature, batch, generator)
    out = []
    for turn, (ids, logps) in zip(turns, pairs):
        text = tok.decode(ids[:-1] if ids[-1] in tok.stop_ids else ids)
        thinking, answer, well_formed = parse(text, cot)
        out.append(dataclasses.replace(turn, ids=ids, logps=logps, thinking=thinking,
                                       answer=answer, well_formed=well_formed))
    return out


def parse(text, cot):
    """A completion -> (thinking, answer, well_formed). The prompt ended in "<think>" when `cot`.
    Well-formed: some thinking, one </think>, one <answer>...</answer>, both non-empty, nothing else
    around, no tag twice. Otherwise the game goes on with what follows the last </think> (inside
    <answer> if opened), or with the empty string. Thinking is never shown to the other side (the
    published code shows the whole raw text in that case)."""
    if not cot:
        return "", text.strip(), bool(text.strip())
    thinking, closed, rest = text.rpartition("</think>")
    if not closed:
        return text.strip(), "", False
    thinking, rest = thinking.strip(), rest.strip()
    once = (text.count("<think>") == 0 and text.count("</think>") == 1
            and text.count("<answer>") == 1 and text.count("</answer>") == 1)
    if once and thinking and rest.startswith("<answer>") and rest.endswith("</answer>"):
        answer = rest[len("<answer>"):-len("</answer>")].strip()
        return thinking, answer, bool(answer)
    rest = rest.partition("<think>")[0]  # opened again and not closed: still thinking
    if "<answer>" in rest:
        rest = rest.partition("<answer>")[2].partition("</answer>")[0]
    return thinking, re.sub(r"</?(?:think|answer)>", " ", rest).strip(), False
