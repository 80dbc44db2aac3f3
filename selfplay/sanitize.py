"""Text of others is data: what a model, a seed or a user wrote can neither end nor forge a turn.

neutralize() breaks every delimiter by a space, so that a player can still read the text. unforge()
cuts them and a judge's answer lines out of what a judge reads. Both are ours, not the papers'."""
import functools
import re

# What could end or open a turn or write a judge's answer. The tokenizer's special tokens are added.
PLAIN = ["Answers:", "Human user:", "AI assistant:", "Harmful request:", "Response refusal:",
         "Harmful response:"]
DELIMITERS = [
    "<think>", "</think>", "<answer>", "</answer>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", *PLAIN]

ROLE = r"(?:system|user|assistant)?"
FORGED = [  # what no text has to say to a judge, longest first; words only at the start of a line
    r"(?m:^)[ \t]*-{3,}\s*Answers:(?:\s*\[/INST\])?",
    r"(?:Harmful\s*request|Response\s*refusal|Harmful\s*response)\s*:\s*(?:(?:yes|no|n/a)\b)?",
    r"<\|start_header_id\|>\s*" + ROLE + r"\s*<\|end_header_id\|>", r"<\|im_start\|>\s*" + ROLE,
    r"(?m:^)[ \t]*(?:Human\s+user|AI\s+assistant|Answers)\s*:"]


def neutralize(text, tok):
    """`text` with every delimiter (DELIMITERS, the tokenizer's special tokens) broken by a space.
    Case does not matter, and white space inside a delimiter may vary."""
    pattern, _ = _patterns(_words(tok))
    while (broken := pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)) != text:
        text = broken  # a break can put two pieces side by side that are a delimiter again
    return text


def unforge(text, tok):
    """`text` without special tokens, chat markers, the judge's answer lines and role labels. What
    stood around is joined by one space or line break. Text with none of these is not changed."""
    _, pattern = _patterns(_words(tok))
    while (rest := pattern.sub(lambda m: "\n" if "\n" in m[0] else " ", text)) != text:
        text = rest.strip()  # what is joined may be a marker again
    return text


def _words(tok):
    """All delimiters that matter for a tokenizer, sorted; longer than two characters."""
    words = set(DELIMITERS) | set(map(str, tok.added_tokens_decoder.values()))
    return tuple(sorted(w for w in words if len(w.strip()) > 2))


@functools.cache
def _patterns(words):
    """Two regular expressions: all delimiters, where any run of white space parts their words; and
    FORGED with the delimiters that are not PLAIN, and the white space around a run of them."""
    every = [r"\s+".join(map(re.escape, word.split())) for word in words]
    every.append(r"-(?=--\s*Answers)")  # WildGuard's rule before its answers
    every.sort(key=len, reverse=True)
    marks = sorted(map(re.escape, set(words).difference(PLAIN)), key=len, reverse=True)
    forged = rf"(?<!\s)\s*(?:(?:{'|'.join(FORGED + marks)})\s*)+"
    return re.compile("|".join(every), re.IGNORECASE), re.compile(forged, re.IGNORECASE)
