"""Copy what may be published of runs to results/reference/NAME/, the folder that is committed.

    python -m evaluation.publish NAME [NAME...]

Input: results/runs/NAME/. FILES and PICTURES are copied, and 50 evenly spaced games, with harmful
text, if all seeds of the run stand in prompts/seeds.jsonl: prompts that do not ship stay out.
published.json says what made them. What runs write has no path outside the repository in it."""
import json
import shutil
import sys

from PIL import Image  # matplotlib brings it

from engine import batching, run
from evaluation.report import find_runs, shipped_seeds
from selfplay.data import read_rows

FILES = ("metrics.csv", "table.md", "summary.json", "times.json", "meta.json")
PICTURES = ("curves.png", "rates.png", "crossplay.png")
COLORS = 64               # of a picture: a quarter of the bytes, and it looks the same (ours)


def shippable(games, seeds):
    """The games of a run, if all its seeds ship, else none: an attack may repeat its seed. SEEDS
    (`seeds`) must say so, and each seed shown unattacked has the text of prompts/seeds.jsonl."""
    shipped, ours = shipped_seeds(), run.publishable(seeds) == "prompts/seeds.jsonl"
    for game in games:
        text = shipped.get(game["seed"])
        shown = game["request"] if game["kind"].startswith("vanilla") else text
        ours = ours and text is not None and shown == text
    return games if ours else []


def shrink(picture, target):
    """Write a picture with COLORS colours."""
    try:
        image = Image.open(picture).quantize(COLORS)
    except (OSError, SyntaxError) as problem:  # what PIL raises at damaged files
        run.die(f"{run.short(picture)}: a damaged picture ({str(problem)[:60]}): make it anew")
    image.save(target, optimize=True)


def publish(name):
    """results/runs/NAME/ -> results/reference/NAME/, made anew."""
    source, target = run.RUNS / name, run.REFERENCE / name
    meta = run.read_json(source / "meta.json", constants=dict)
    made = dict(seed=meta["constants"].get("SEED"))
    made |= {key: meta.get(key) for key in ("command", "machine", "time", "versions")}
    if None in made.values():
        run.die(f"{run.short(source)}/meta.json lacks one of {', '.join(made)}: make the run again")
    games = read_rows(source / "games.jsonl", "seed", "request", "kind", heal=False)
    games = shippable(games, meta["constants"].get("SEEDS"))
    tmp = target.with_name(f"{name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    run.write_text(tmp / "published.json", json.dumps(made, indent=1))
    if games:
        sample = "\n".join(map(json.dumps, batching.evenly(games, 50)))
        run.write_text(tmp / "games_sample.jsonl", sample + "\n")
    for path in source.iterdir():
        if path.name in FILES:
            shutil.copy(path, tmp)
        elif path.name in PICTURES:
            shrink(path, tmp / path.name)
    run.replace_folder(tmp, target)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"made {run.short(target)}: {size / 1e3:.0f} kB, of {len(games)} games that may go")


def main(names):
    """Publish the runs with these names; one that is not there stops before any is written."""
    run.show_help(names, __doc__)
    for name in find_runs(names or ["NAME"], "meta.json"):
        publish(name)


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
