"""Print one game of each kind as several checkpoints play it, beside one another.

    python -m selfplay.show adapters/selfplay checkpoints/02_rl/step_000100

Seeds: the first harmful and the first benign one of prompts/seeds.jsonl that were held back.
Greedy, nobody judges. What models write is shown with control characters escaped."""
import sys
import textwrap

from engine import run
from engine.models import load_model
from selfplay.data import halves, load_seeds
from selfplay.sanitize import printable
from selfplay.turns import Turn, attacker_prompt, check_prompts, complete, defender_prompt

MAX_NEW = 112             # longest turn, tokens: 02's REPLY_TOKENS
SHOWN = 300               # characters of a text


def games(model, tok, seeds, cot):
    """Each seed plainly, then as the model (the defender's adapter) rewrites it -> the replies."""
    drafts = [Turn("attacker", "", seed, attacker_prompt(tok, seed, cot)) for seed in seeds]
    attacks = complete(model, tok, drafts, cot, MAX_NEW, 0.0, len(drafts))
    drafts = []
    for attack in attacks:
        half = "harmful" if attack.seed["harmful"] else "benign"
        for how, request in (("vanilla", attack.seed["prompt"]), ("generated", attack.answer)):
            ids = defender_prompt(tok, request, cot)
            drafts.append(Turn("defender", f"{how}_{half}", attack.seed, ids, request))
    return complete(model, tok, drafts, cot, MAX_NEW, 0.0, len(drafts))


def lines(label, text):
    """A labelled text in at most SHOWN characters, wrapped."""
    text = textwrap.shorten(printable(text), SHOWN, placeholder=" ...") or "(nothing)"
    return textwrap.fill(text, 100, initial_indent=f"  {label:9s}", subsequent_indent=" " * 11)


def main(argv):
    """The command of the docstring."""
    run.show_help(argv, __doc__)
    if not argv or any(word.startswith("-") for word in argv):
        run.die("usage: python -m selfplay.show CHECKPOINT [CHECKPOINT ...]")
    check_prompts()
    harmful, benign = halves(load_seeds("prompts/seeds.jsonl", "dev"))
    shown = {}
    for name in argv:
        path = run.locate(name) or run.die(f"{run.brief(name)} is not there")
        path = run.newest_checkpoint(path) or path
        made = run.read_json(path / "meta.json", constants=dict)["constants"]
        shown[name] = games(*load_model(str(path)), [harmful[0], benign[0]], made.get("COT", True))
    for together in zip(*shown.values()):
        print(f"\n{together[0].kind}, seed {together[0].seed['id']}\n"
              + lines("seed", together[0].seed["prompt"]))
        for name, turn in zip(shown, together):
            print(f" {printable(name)}")
            if turn.kind.startswith("generated"):
                print(lines("attack", turn.request))
            print(lines("reply", turn.answer))


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
