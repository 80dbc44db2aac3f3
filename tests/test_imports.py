"""The shape of the code: who imports whom, no side effects of an import, and the two bars that keep
it readable (inline loops in 100 lines, lines in all)."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

STAGES = ("01_sft_warmup", "02_selfplay_rl", "03_evaluate")
BELOW = {  # what the files of a room may import; a stage may import all of them
    "engine": {"engine"},
    "selfplay": {"engine", "selfplay"},
    "evaluation.scores": {"engine", "selfplay"},
    "judge": {"engine", "selfplay", "evaluation.scores"},
    "evaluation": {"engine", "selfplay", "judge", "evaluation"},
    "judge_adapter": {"engine", "selfplay", "judge", "evaluation", "judge_adapter"},
    "stage": {"engine", "selfplay", "judge", "evaluation", "judge_adapter"},
    "bench": {"engine", "selfplay", "judge", "evaluation", "judge_adapter", "bench"}}
DENSITY = 5      # comprehensions in 100 lines, fewer than
LINES = 7650     # outside tests/ and bench/, at most
SKIPPED = {"checkpoints", "results", "shared"}


# ---- the files -----------------------------------------------------------------------------------

def find_files(*endings):
    """Files of the repository, without environments and what runs write."""
    found = []
    for path in sorted(ROOT.iterdir()):
        if path.is_dir() and path.name not in SKIPPED and not path.name.startswith("."):
            found += [p for p in sorted(path.rglob("*")) if p.is_file()]
        elif path.is_file():
            found.append(path)
    return [path for path in found if path.name.endswith(endings)]


def module_name(path):
    """engine/run.py -> engine.run; bench/common.py -> bench.common, whose import says common."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in find_files(".py") if path.parent.name != "tests"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room_of(name):
    """The key of BELOW that a module falls under."""
    if name in STAGES:
        return "stage"
    return name if name in BELOW else name.split(".")[0]


def imports_of(name):
    """Our modules that a module imports anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(TREES[name]):
        words = []
        if isinstance(node, ast.Import):
            words = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            words = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(
                node.func, "id", "")) in ("import_module", "__import__", "run_module"):
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
        for word in words:
            if name.startswith("bench.") and f"bench.{word}" in FILES and word != "judge":
                word = f"bench.{word}"  # a script finds the files beside it
            if word in FILES:
                found.add(word)
    # `from engine import run` names the package too, whose own file imports nothing
    return {word for word in found if word not in ("engine", "selfplay", "evaluation",
                                                   "judge_adapter")}


def test_the_files_are_found():
    """Otherwise nothing below would test anything."""
    assert {"engine.run", "selfplay.turns", "evaluation.scores", "judge", "judge_adapter.train",
            "bench.common", *STAGES} <= set(FILES)
    assert {"engine.run", "judge"} <= imports_of("02_selfplay_rl")
    assert "bench.common" in imports_of("bench.step")
    for package in ("engine", "selfplay", "evaluation", "judge_adapter"):
        assert imports_of(package) == set()


# ---- who imports whom ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    allowed = BELOW[room_of(name)]
    for other in imports_of(name):
        assert other in allowed or other.split(".")[0] in allowed, f"{name} imports {other}"


def test_nobody_imports_a_stage():
    """Nor by importlib, nor one that is not there any more. (bench/ executes one as a file.)"""
    for name, tree in TREES.items():
        assert not imports_of(name) & set(STAGES), name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                assert not re.search(r"\b0\d_\w+", ast.unparse(node)), f"{name} line {node.lineno}"


def test_no_circle():
    """Modules in rounds: those whose imports are all done; in a circle nobody is ever next."""
    waiting = {name: imports_of(name) for name in FILES}
    while waiting:
        ready = [name for name, others in waiting.items() if not others & set(waiting)]
        assert ready, f"a circle among {sorted(waiting)}"
        for name in ready:
            del waiting[name]


# ---- modules are not written to ------------------------------------------------------------------

def imported_names(tree):
    """Names that imports bind, and those that hold what importlib gave."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.Assign) and "import_module" in ast.unparse(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def written_to(tree):
    """(line, what) of every vars(module), module.name = ..., setattr(module, ...) and del."""
    names, found = imported_names(tree), []

    def is_imported(node):
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return isinstance(node, ast.Name) and node.id in names

    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            if is_imported(node):
                found.append((node.lineno, ast.unparse(node)))
        if isinstance(node, ast.Attribute) and node.attr == "__dict__" and is_imported(node):
            found.append((node.lineno, ast.unparse(node)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("vars", "setattr",
                                                                           "delattr"):
            if node.args and is_imported(node.args[0]):
                found.append((node.lineno, ast.unparse(node)))
    return found


@pytest.mark.parametrize("source, count", [
    ("import a\na.x = 1", 1), ("import a\na.x += 1", 1), ("import a\na.b.x = 1", 1),
    ("import a.b\ndel a.b.x", 1), ("from a import b\nb.x: int = 1", 1), ("import a\nvars(a)", 1),
    ("import a as c\nsetattr(c, 'x', 1)", 1), ("import a\na.__dict__['x'] = 1", 2),
    ("import a\nfor a.x in range(3): pass", 1), ("import a\nwith f() as a.x: pass", 1),
    ("import a\na.x, y = 1, 2", 1), ("import a\na.TABLE['x'] = 1", 1),
    ("m = importlib.import_module('a')\nm.x = 1", 1),
    ("import a\ny = a.x\nself.x = 1\nvars(self)", 0), ("import a\na.f(1)\nt['x'] = a.x", 0)])
def test_what_counts_as_writing_to_a_module(source, count):
    assert len(written_to(ast.parse(source))) == count


@pytest.mark.parametrize("name", FILES)
def test_nobody_writes_to_a_module(name):
    assert written_to(TREES[name]) == []


# ---- an import does nothing ----------------------------------------------------------------------

IMPORT_ALL = """
import importlib, os, sys
before = dict(os.environ), list(sys.argv), os.getcwd()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert (dict(os.environ), list(sys.argv), os.getcwd()) == before
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The code in a folder of its own, to see what an import writes."""
    folder = tmp_path_factory.mktemp("imports") / "repo"
    for path in FILES.values():
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    for room in ("prompts", "judge_adapter", "evaluation"):
        shutil.copytree(ROOT / room, folder / room, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    return folder


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["repository", "bench"])
def test_an_import_prints_and_writes_nothing(copied, where):
    """Nor does it need a model, a network, a terminal or the repository's folder as the current
    one; environment, arguments and folder stay as they are."""
    names = []
    for name in FILES:
        if name.startswith("bench.") == (where == "bench"):
            names.append(name.removeprefix("bench."))
    paths = [str(copied)] if where == "repository" else [str(copied / "bench"), str(copied)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    before = listing(copied)
    here = copied.parent / where
    here.mkdir()
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], cwd=here, env=env, text=True,
                          capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-2000:]
    assert listing(copied) == before and list(here.iterdir()) == []


# ---- words and bars ------------------------------------------------------------------------------

def test_no_file_cites_what_is_not_in_the_repository():
    """DESIGN and HOUSE are notes of ours. Cite the paper: its section, equation or page."""
    for path in find_files(".py", ".md", ".html", ".txt", "Makefile"):
        if path != Path(__file__).resolve():
            cited = re.search(r"\b(?:DESIGN|HOUSE\.md|PITFALLS)\b", path.read_text("utf-8"))
            assert not cited, f"{path}: {cited.group()}"


@pytest.mark.parametrize("name", FILES)
def test_few_inline_loops(name):
    loops = sum(isinstance(node, ast.comprehension) for node in ast.walk(TREES[name]))
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert 100 * loops < DENSITY * lines, f"{loops} in {lines} lines"


def test_few_lines():
    total = 0
    for name, path in FILES.items():
        if not name.startswith("bench."):
            total += len(path.read_text(encoding="utf-8").splitlines())
    assert total <= LINES
