"""Text of others is data: what a model, a seed or a user wrote can neither end nor forge a turn.

neutralize() breaks every delimiter by a space: the text stays readable where it is shown to a
player. unforge() cuts delimiters and a judge's answer lines out: what a judge reads says nothing in
their name. Both are ours; the papers do not say how they treat such text.
"""
import functools
import re

# What could end a turn, open one, or write a judge's answer when it stands in somebody's text. The
# special tokens of the tokenizer in use are added to it.
DELIMITERS = [
    "<think>", "</think>", "<answer>", "</answer>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", "Answers:",
    "Human user:", "AI assistant:", "Harmful request:", "Response refusal:", "Harmful response:"]

ROLE = r"(?:system|user|assistant)?"
FORGED = [  # what no text has to say to a judge, longest first; words only at the start of a line
    r"(?m:^)[ \t]*-{3,}\s*Answers:(?:\s*\[/INST\])?",
    r"(?:Harmful\s*request|Response\s*refusal|Harmful\s*response)\s*:\s*(?:(?:yes|no|n/a)\b)?",
    r"<\|start_header_id\|>\s*" + ROLE + r"\s*<\|end_header_id\|>", r"<\|im_start\|>\s*" + ROLE,
    r"(?m:^)[ \t]*(?:Human\s+user|AI\s+assistant|Answers)\s*:"]


def neutralize(text, tok):
    """`text` with every delimiter (DELIMITERS, the tokenizer's special tokens) broken by a space.
    No special token and no line of a judge's answer is left in it. Case does not matter, and white
    space inside a delimiter may vary."""
    found = _breaker(_words(tok))
    while True:  # a break can put two pieces side by side that are a delimiter again
        broken = found.sub(lambda m: m.group(0)[0] + " " + m.group(0)[1:], text)
        if broken == text:
            return broken
        text = broken


def unforge(text, tok):
    """`text` without special tokens, chat markers, the judge's own answer lines and role labels. A
    text with nothing of the kind comes back unchanged. Else what stood around is joined by one
    space or line break, again and again, since what is joined may be a marker."""
    found = _cutter(_words(tok))
    while True:
        rest = found.sub(lambda m: "\n" if "\n" in m.group(0) else " ", text)
        if rest == text:
            return text
        text = rest.strip()


def _words(tok):
    """All delimiters that matter for a tokenizer, sorted; longer than two characters."""
    words = set(DELIMITERS) | set(map(str, tok.added_tokens_decoder.values()))
    return tuple(sorted(w for w in words if len(w.strip()) > 2))


@functools.cache
def _breaker(words):
    """One regular expression for all delimiters; any run of white space parts their words."""
    parts = [r"\s+".join(map(re.escape, word.split())) for word in words]
    parts.append(r"-(?=--\s*Answers)")  # WildGuard's rule before its answers
    parts.sort(key=len, reverse=True)
    return re.compile("|".join(parts), re.IGNORECASE)


@functools.cache
def _cutter(words):
    """One regular expression for FORGED and all delimiters that are no plain words, with the white
    space around a run of them."""
    plain = [w for w in words if w in DELIMITERS and w.endswith(":")]
    parts = sorted(map(re.escape, set(words).difference(plain)), key=len, reverse=True)
    every = "|".join(FORGED + parts)
    return re.compile(rf"(?<!\s)\s*(?:(?:{every})\s*)+", re.IGNORECASE)
