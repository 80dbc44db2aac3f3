"""The README and the other pages: every path, command and number in them is in the code."""
import importlib
import importlib.util
import re
import shlex
import sys

import pytest
from helpers import ROOT, import_stage, keep_constants

from engine import run

PAGES = ["README.md", "results/README.md", "bench/README.md", "judge_adapter/CARD.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
rl = import_stage("02_selfplay_rl")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(text):
    """The contents of the fenced code blocks."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors_of(text):
    """The headings as GitHub's anchors."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


def commands_of(text):
    """The `python ...` commands of the code blocks and of the running text, as lists of words."""
    lines = []
    for block in blocks_of(text):
        lines += re.findall(r"^\s*(python .+)$", block, re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(python [^`]+)`", prose)
    return [shlex.split(" ".join(line.split()), comments=True)[1:] for line in lines]


def all_commands():
    """Of every page and of the Makefile, each once."""
    found = []
    for page in PAGES:
        found += commands_of(text_of(page))
    variables = dict(re.findall(r"^(\w+) :?\??= (.*)$", MAKEFILE, re.MULTILINE), BENCH="")
    for line in re.findall(r"^\t\$\(PY\) (.+)$", MAKEFILE, re.MULTILINE):
        line = re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], line)
        if not line.startswith("-m pip"):
            found.append(shlex.split(line))
    return [words for i, words in enumerate(found) if words not in found[:i]]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """A link to a file, and to a heading in it where it names one."""
    text = text_of(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """`folder/file.py` in the running text, seen from the page or from the repository."""
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text_of(page)):
        assert (ROOT / name).is_file() or ((ROOT / page).parent / name).is_file(), name


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_commands_exist_with_their_constants(words, monkeypatch):
    """`python FILE ...` is a script, `python -m MODULE ...` a module; every NAME=value is one of
    its constants and a value that it takes."""
    if words[0] == "-m":
        name, rest = words[1], words[2:]
        assert importlib.util.find_spec(name), name
    else:
        name, rest = words[0].removesuffix(".py"), words[1:]
        assert (ROOT / words[0]).is_file(), words[0]
    options = [word for word in rest if re.match(r"[A-Z][A-Z_0-9]*=|--paper", word)]
    if options:
        monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])  # bench/common.py
        module = importlib.import_module(name.replace("/", "."))
        keep_constants(monkeypatch, module)
        run.configure(vars(module), options)


def test_the_three_stages_are_among_the_commands():
    assert [["01_sft_warmup.py"], ["02_selfplay_rl.py"], ["03_evaluate.py"]] == [
        words for words in commands_of(README) if re.fullmatch(r"\d\d_\w+\.py", words[-1])][:3]


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)
    for page in PAGES:
        named = re.findall(r"(?:^|`)make (\w+)", text_of(page), re.MULTILINE)
        assert set(named) <= set(targets), page
    assert {"demo", "test"} <= set(targets)


def section(title):
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def table_rows(text):
    """The rows of Markdown tables under a header, as lists of cells."""
    rows = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("|--"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_tree_of_files_is_the_repository():
    [tree] = blocks_of(section("The files"))
    names = set()
    for line in tree.splitlines():  # "bench/  tests/   speed beside ..."
        for word in re.split(r"\s{2,}", line):
            if re.fullmatch(r"\w+(/|\.py)", word):
                names.add(word)
    assert len(names) >= 10
    for name in names:
        path = ROOT / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
    for path in ROOT.glob("*.py"):
        assert path.name in names, path.name


def test_the_functions_of_the_seven_steps_are_in_stage_2():
    steps = [row for row in table_rows(section("How it works")) if re.match(r"\d\. ", row[0])]
    assert [int(row[0][0]) for row in steps] == [1, 2, 3, 4, 5, 6, 7]
    for row in steps:
        functions = re.findall(r"`(\w+)`", row[1])
        assert functions
        for name in functions:
            assert callable(getattr(rl, name)), name


def test_the_reward_table_is_the_codes():
    rows = [row for row in table_rows(section("How it works"))
            if row[0] in ("attacker", "defender", "both")]
    sizes = {}
    for role, _, plus, minus in rows:
        assert float(plus) == -float(minus) > 0
        sizes.setdefault(role, []).append(float(plus))
    assert sizes == dict(attacker=list(map(abs, rl.ATTACKER.values())),
                         defender=list(map(abs, rl.DEFENDER.values())), both=[rl.FORMAT_COEF])


def test_constants_of_the_readme_have_their_defaults():
    stages = {"01": import_stage("01_sft_warmup"), "02": rl, "all": rl}
    rows = [row for row in table_rows(section("Change something")) if row[0].startswith("`")]
    assert len(rows) >= 5
    for cell, defaults, _ in rows:
        stage = stages[re.search(r"\((\w+)\)$", cell)[1]]
        names = re.findall(r"`(\w+)`", cell)
        assert all(hasattr(stage, name) for name in names), cell
        if stages["all"] is stage and cell.endswith("(all)"):
            continue  # the default is words
        for name, default in zip(names, defaults.split(", "), strict=True):
            value = getattr(stage, name)
            said = default == "true" if isinstance(value, bool) else type(value)(default)
            assert said == value, f"{name} {default}"
