"""Text of others is data: what a model, a seed or a user wrote can neither end nor forge a turn.

neutralize() breaks every delimiter by a space, so that a player can still read the text; its layout
stays. A judge reads less: plain() takes out what cannot be seen, unforge() the delimiters and the
judge's own answer lines. printable() keeps a text from steering the terminal. All are ours, not the
papers'. Each takes time linear in the text."""
import functools
import re
import unicodedata

# What could end or open a turn or write a judge's answer. The tokenizer's special tokens are added.
PLAIN = ["Answers:", "Human user:", "AI assistant:", "Harmful request:", "Response refusal:",
         "Harmful response:"]
DELIMITERS = [
    "<think>", "</think>", "<answer>", "</answer>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", *PLAIN]

# Letters that look like those of the answer lines: Cyrillic, Greek, digits.
LOOKS = {"a": "\u0430\u03b1", "e": "\u0435\u03b5", "f": "\u0493", "h": "\u04bb\u043d",
         "l": "i1|\u04cf", "m": "\u043c", "n": "\u043f", "o": "0\u043e\u03bf",
         "p": "\u0440\u03c1", "q": "\u051b", "r": "\u0433", "s": "\u0455", "t": "\u0442\u03c4",
         "u": "\u03c5", "y": "\u0443"}


def _letters(words):
    """A pattern for the letters of `words`, whatever stands between two of them."""
    classes = [f"[{letter}{LOOKS.get(letter, '')}]" for letter in words]
    return r"[\W_]{0,3}".join(classes)


LINES = "|".join(map(_letters, ["harmfulrequest", "responserefusal", "harmfulresponse"]))
ANSWER = rf"(?:{'|'.join(map(_letters, ['yes', 'no', 'na']))})(?![^\W_])"
ROLE = r"\s*(?:(?:system|user|assistant)\s*)?"
FORGED = [  # what no text has to say to a judge, longest first; words only at the start of a line
    r"(?m:^)[ \t]*-{3,}\s*Answers:(?:\s*\[/INST\])?",
    rf"(?<![^\W_])(?:{LINES})(?:[\W_]{{0,16}}{ANSWER}|[\W_]{{0,8}}?[:=]+)",
    r"<\|start_header_id\|>" + ROLE + r"<\|end_header_id\|>", r"<\|im_start\|>" + ROLE,
    r"(?m:^)[ \t]*(?:Human\s+user|AI\s+assistant|Answers)\s*:"]
# Labels of the rubric's prompt and of Llama Guard's template, which other judges do not have.
SPEAKERS = (r"(?m:^)[ \t]*(?:Request|Reply|User|Agent|Assistant)\s*:",
            r"<\s?(?:BEGIN|END)[A-Z \n]{0,30}>", r"Answer with one digit from 1 to 5",
            r"ONLY THE LAST (?:User|Agent) message")
PASSES = 8  # over a text at most: each looks for what the one before has put together

# What acts on a terminal: C0 without tab and newline, DEL, C1, directions; and lone surrogates
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
                      "\ud800-\udfff]")
# Characters without a picture that belong to a script all the same: fillers, variation selectors.
BLANKS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
                    "\U000e0100-\U000e01ef]")
_category = functools.cache(unicodedata.category)


def assigned(text):
    """`text` without control characters (tab and newline apart), halves of surrogate pairs, and
    code points for private use or not assigned: a tokenizer may write them as a special token.
    Tag characters go too (U+E0000 on): they can spell a text that no judge reads."""
    if text.isascii() and text.isprintable():
        return text
    text = re.sub("[\U000e0000-\U000e01ef]", "", text.replace("\r\n", "\n"))
    return "".join(c for c in text if c in "\t\n" or _category(c) not in ("Cc", "Cs", "Co", "Cn"))


def plain(text):
    """`text` as a judge reads it: NFKC (in which full-width letters are plain ones), no control,
    format, blank or unassigned characters; white space at most one space or two line breaks."""
    text = unicodedata.normalize("NFKC", text.replace("\r\n", "\n"))
    if not text.isascii() or not text.isprintable():
        text = "".join(c for c in text if c in "\t\n" or _category(c)[0] != "C")
        text = BLANKS.sub("", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def neutralize(text, tok):
    """assigned(text) with every delimiter (DELIMITERS, the tokenizer's special tokens) broken by a
    space. Case does not matter, and white space inside a delimiter may vary."""
    pattern, _ = _patterns(_words(tok))
    text = assigned(text)
    for _ in range(PASSES):  # a space put in may be one that a delimiter has
        broken = pattern.sub(r"\g<0> ", text)
        if broken == text:
            break
        text = broken
    return text


def unforge(text, tok, more=()):
    """`text` without special tokens, chat markers, the judge's answer lines and role labels, and
    what the patterns `more` find. What stood around is joined by one space or line break."""
    _, pattern = _patterns(_words(tok), more)
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
def _patterns(words, more=()):
    """Two regular expressions: the first character of each delimiter (any white space in it), so
    that overlapping ones are found; FORGED, delimiters that are not PLAIN, white space around."""
    every = [r"\s+".join(map(re.escape, word.split())) for word in words]
    every.append(r"-(?=--\s*Answers)")  # WildGuard's rule before its answers
    marks = sorted(map(re.escape, set(words).difference(PLAIN)), key=len, reverse=True)
    forged = rf"(?<!\s)\s*(?:(?:{'|'.join(FORGED + [*more] + marks)})\s*)+"
    first = rf"(?={'|'.join(every)})\S"
    return re.compile(first, re.IGNORECASE), re.compile(forged, re.IGNORECASE)
