"""Commands of the stages: run one, and see by meta.json whether it has run to its end.

A command is a list of words: the script, then NAME=value."""
import shlex
import subprocess
import sys

from engine import models, run
from engine.run import die


def launch(words):
    """Run a script in a process of its own. One that fails stops the grid."""
    line = f"python {shlex.join(words)}"
    print(f"\n{line}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=run.ROOT)
    if done.returncode:
        die(f"{line} ended with exit code {done.returncode}, see above; then the same command of "
            "this script goes on from there")


def differences(meta, words):
    """Where a meta.json is not of a command: constants (["STEPS=40 (now 60)"]), or MODEL, if that
    is a folder, by its content."""
    made_by = run.read_json(meta, constants=dict)
    constants, out = made_by["constants"], []
    for item in words[1:]:
        name, _, text = item.partition("=")
        made = constants.get(name)
        now = run.TRUTH.get(text.lower()) if type(made) is bool else run.publishable(text)
        if type(made) in (int, float):
            now = type(made)(text)
        if name == "MODEL" and (run.ROOT / text).is_dir():
            began = made_by.get("inputs", {}).get("MODEL", "")
            if not began.startswith(models.folder_digest(run.ROOT / text)):
                out.append(f"other content of {text}")
        elif run.publishable(made) != now and name != "RUN":
            out.append(f"{name}={made} (now {now})")
    return out


def last_checkpoint(words):
    """The folder that a command's run ends with; None while it is not there."""
    given = dict(word.split("=", 1) for word in words[1:])
    folder = run.CHECKPOINTS / given["RUN"]
    if "STEPS" in given:
        folder /= f"step_{int(given['STEPS']):06d}"
    whole = (folder / "meta.json").is_file() and not differences(folder / "meta.json", words)
    return folder if whole else None
