"""Talk to a checkpoint as its defender.

    python -m selfplay.chat CHECKPOINT [--show-thinking]
    python -m selfplay.chat adapters/selfplay    trained weights that ship (make chat)

Every question is a fresh game of one exchange. An empty line ends."""
import contextlib
import sys

from engine import run
from engine.models import load_model
from selfplay.sanitize import printable
from selfplay.turns import Turn, check_prompts, complete, defender_prompt

MAX_NEW = 512             # longest reply with its thinking, tokens
MAX_TOKENS = 8192         # longest exchange, tokens; less if the model has fewer positions


def main(argv):
    """Read questions from stdin and print the checkpoint's replies."""
    run.show_help(argv, __doc__)
    names = [word for word in argv if word != "--show-thinking"]
    if len(names) != 1:
        run.die("usage: python -m selfplay.chat CHECKPOINT [--show-thinking]")
    check_prompts()
    path, cot = run.locate(names[0]), True
    path = path and (run.newest_checkpoint(path) or path)  # of a run's folder
    if not path and names[0].startswith("adapters/"):
        run.die(f"{run.brief(names[0])} is not there: python bench/claims.py trains it; until then "
                "python -m selfplay.chat checkpoints/02_rl/step_000100 after a run of 02")
    if path and (path / "meta.json").is_file():
        cot = run.read_json(path / "meta.json", constants=dict)["constants"].get("COT", True)
    model, tok = load_model(str(path or names[0]))
    positions = getattr(model.config, "max_position_embeddings", MAX_TOKENS)
    room = min(positions, MAX_TOKENS) - MAX_NEW
    for stream in (sys.stdin, sys.stdout):  # what cannot be decoded or shown becomes a sign
        stream.reconfigure(errors="replace")
    print("one question a line, an empty line ends")
    with contextlib.suppress(EOFError):
        while line := input("> ").strip():
            ids = defender_prompt(tok, line, cot)
            if len(ids) > room:
                print(f"(too long: {len(ids)} tokens with the instructions, at most {room})")
                continue
            turn = Turn("defender", "vanilla_benign", {}, ids, line)
            [turn] = complete(model, tok, [turn], cot, MAX_NEW, temperature=0.7, batch=1)
            if "--show-thinking" in argv:
                print(f"  [thinking] {printable(turn.thinking)}")
            print(printable(turn.answer) or "(no answer in the turn format)")


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
