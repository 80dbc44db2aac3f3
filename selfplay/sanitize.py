"""Text of others is data: what a model, a seed or a user wrote can neither end nor forge a turn.

neutralize() breaks every delimiter by a space, so that a player can still read the text. unforge()
cuts them and a judge's answer lines out of what a judge reads. Both are ours, not the papers'.
printable() keeps a text from steering the terminal. All three take time linear in the text."""
import functools
import re

# What could end or open a turn or write a judge's answer. The tokenizer's special tokens are added.
PLAIN = ["Answers:", "Human user:", "AI assistant:", "Harmful request:", "Response refusal:",
         "Harmful response:"]
DELIMITERS = [
    "<think>", "</think>", "<answer>", "</answer>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", *PLAIN]

ROLE = r"\s*(?:(?:system|user|assistant)\s*)?"
FORGED = [  # what no text has to say to a judge, longest first; words only at the start of a line
    r"(?m:^)[ \t]*-{3,}\s*Answers:(?:\s*\[/INST\])?",
    r"(?:Harmful\s*request|Response\s*refusal|Harmful\s*response)\s*:\s*(?:(?:yes|no|n/a)\b)?",
    r"<\|start_header_id\|>" + ROLE + r"<\|end_header_id\|>", r"<\|im_start\|>" + ROLE,
    r"(?m:^)[ \t]*(?:Human\s+user|AI\s+assistant|Answers)\s*:"]
PASSES = 8  # over a text at most: each looks for what the one before has put together

# What acts on a terminal: C0 without tab and newline, DEL, C1, the direction of writing; and halves
# of surrogate pairs, which cannot be printed.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
                      "\ud800-\udfff]")


def neutralize(text, tok):
    """`text` with every delimiter (DELIMITERS, the tokenizer's special tokens) broken by a space.
    Case does not matter, and white space inside a delimiter may vary."""
    pattern, _ = _patterns(_words(tok))
    for _ in range(PASSES):  # a space put in may be one that a delimiter has
        broken = pattern.sub(r"\g<0> ", text)
        if broken == text:
            break
        text = broken
    return text


def unforge(text, tok):
    """`text` without special tokens, chat markers, the judge's answer lines and role labels. What
    stood around is joined by one space or line break. Text with none of these is not changed."""
    _, pattern = _patterns(_words(tok))
    for _ in range(PASSES):
        rest = pattern.sub(lambda m: "\n" if "\n" in m[0] else " ", text)
        if rest == text:
            return text
        text = rest.strip()
    return pattern.sub(" ... ", text)  # nested this deep on purpose: dots join to no marker


def printable(text):
    """`text` as a terminal may show it: CONTROLS are written out, e.g. as \\x1b."""
    return CONTROLS.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def _words(tok):
    """All delimiters that matter for a tokenizer, sorted; longer than two characters."""
    words = set(DELIMITERS) | set(map(str, tok.added_tokens_decoder.values()))
    return tuple(sorted(w for w in words if len(w.strip()) > 2))


@functools.cache
def _patterns(words):
    """Two regular expressions: the first character of each delimiter (any run of white space parts
    its words), so that overlapping ones are found too; and FORGED with the delimiters that are not
    PLAIN, and the white space around a run of them."""
    every = [r"\s+".join(map(re.escape, word.split())) for word in words]
    every.append(r"-(?=--\s*Answers)")  # WildGuard's rule before its answers
    marks = sorted(map(re.escape, set(words).difference(PLAIN)), key=len, reverse=True)
    forged = rf"(?<!\s)\s*(?:(?:{'|'.join(FORGED + marks)})\s*)+"
    first = rf"(?={'|'.join(every)})\S"
    return re.compile(first, re.IGNORECASE), re.compile(forged, re.IGNORECASE)
