"""Talk to a checkpoint as its defender.

    python -m selfplay.chat CHECKPOINT [--show-thinking]

Every question is a fresh game of one exchange. An empty line ends."""
import contextlib
import json
import sys

from engine.models import load_model
from engine.run import die, locate
from selfplay.turns import Turn, complete, defender_prompt


def main(argv):
    """Read questions from stdin and print the checkpoint's replies."""
    names = [word for word in argv if not word.startswith("--")]
    if len(names) != 1:
        die("usage: python -m selfplay.chat CHECKPOINT [--show-thinking]")
    path = locate(names[0])
    model, tok = load_model(str(path or names[0]))
    cot = True
    if path and (path / "meta.json").is_file():
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        cot = meta.get("constants", {}).get("COT", True)
    print("one question a line, an empty line ends")
    with contextlib.suppress(EOFError):
        while line := input("> ").strip():
            turn = Turn("defender", "vanilla_benign", {}, defender_prompt(tok, line, cot), line)
            [turn] = complete(model, tok, [turn], cot, max_new=512, temperature=0.7, batch=1)
            if "--show-thinking" in argv:
                print(f"  [thinking] {turn.thinking}")
            print(turn.answer or "(no answer in the turn format)")


if __name__ == "__main__":
    main(sys.argv[1:])
