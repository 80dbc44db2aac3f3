"""Talk to a checkpoint as its defender.

    python -m selfplay.chat CHECKPOINT [--show-thinking]

Every question is a fresh game of one exchange. An empty line ends.
"""
import json
import sys

from engine.models import load_model
from engine.run import die, locate
from selfplay.turns import Turn, complete, defender_prompt

REPLY_TOKENS = 512  # longest reply (ours)


def chat(name, show_thinking):
    """Read questions from stdin and print the checkpoint's replies, until an empty line."""
    path = locate(name)
    model, tok = load_model(str(path or name))
    cot = True
    if path and (path / "meta.json").is_file():
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        cot = meta.get("constants", {}).get("COT", True)
    print("one question a line, an empty line ends")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        turn = Turn("defender", "vanilla_benign", {}, defender_prompt(tok, line, cot), line)
        [turn] = complete(model, tok, [turn], cot, REPLY_TOKENS, 0.7, 1)
        if show_thinking:
            print(f"  [thinking] {turn.thinking}")
        print(turn.answer or "(no answer in the turn format)")


def main(argv):
    names = [word for word in argv if not word.startswith("--")]
    if len(names) != 1:
        die("usage: python -m selfplay.chat CHECKPOINT [--show-thinking]")
    chat(names[0], "--show-thinking" in argv)


if __name__ == "__main__":
    main(sys.argv[1:])
