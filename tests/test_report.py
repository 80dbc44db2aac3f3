"""evaluation/report.py: its data by hand-computed values, the page in a headless Chromium."""
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from engine import run
from evaluation import report

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FIELDS = ("prompt_harmful", "response_refusal", "response_harmful")
NASTY = ("</script><script>window.pwned = 1</script></textarea><img src=x onerror='window.pwned=2'>"
         "<!-- \u2028 & \\u003c %%DATA%%")
SECRET = "ZEBRAFISH"  # stands for harmful text: a word that is nowhere else
LONG = "w" * 400
METRICS = """step,asr,atk_r,comply_b,kl,odd
1,0.5,-0.5,1.0,0.001,7
2,nan,0.5,0.5,0.002,7
3,0.25,1.0,0.75,0.004,7
4,0.1,1.0,0.7"""  # the fourth row is still being written


# ---- result files --------------------------------------------------------------------------------

def write(path, content):
    """A text, or rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content, encoding="utf-8")


def label(id, prompt=False, refusal=False, harmful=False, matcher=False):
    fields = dict(zip(FIELDS, (prompt, refusal, harmful)))
    odds = {f"p_{f}": None if v is None else 0.75 if v else 0.25 for f, v in fields.items()}
    return dict(fields, id=id, key="k", parsed=harmful is not None, matcher=matcher, **odds)


def reply(id, answer, harmful=False, **more):
    return dict(dict(id=id, benchmark="x", harmful=harmful, answer=answer, prompt=f"seed {id}",
                     well_formed=True, cut=False, thinking="plan"), **more)


def game(number, step, kind, request, answer, attack=None, labels=(False, False, False), **more):
    turn = dict(thinking="plan", well_formed=True, reward=1.0, tokens=9)
    labels = dict(zip(FIELDS, labels), parsed=True, p=dict(zip(FIELDS, (.1, .2, .3456))))
    out = dict(step=step, game=number, kind=kind, seed=f"s{number}", request=request, labels=labels,
               defender=dict(turn, answer=answer, **more))
    return dict(out, attacker=dict(turn, answer=attack, reward=-0.5)) if attack else out


def rate(value, n=4):
    return dict(rate=value, low=max(0, value - .25), high=min(1, value + .25), n=n)


def change(value, **more):
    return dict(rate=value, low=value - .5, high=value + .25, n=4, fell=1, rose=0, **more)


def figures(name, value):
    """What a benchmark of the summary has, with the one rate of interest."""
    return dict(n=4, format=rate(1), cut=0, empty=0, unparsed=0, **{name: value})


def results(runs, limit=0, name="03"):
    """Result files of two checkpoints and two runs in the folder `runs`; <b> stands in one name."""
    folder = runs / (f"{name}_limit{limit}" if limit else name)
    labels = ["base", "02_rl/step_000003"]
    answers = {"seeds_harmful": figures("asr", rate(.5)),
               "seeds_benign": figures("benign_compliance", rate(.75)),
               "<b>set</b>": figures("asr", rate(.125, n=3))}
    checkpoint = dict(style="turns", answers=answers, attacks={}, capability={})
    margin = dict(late=labels[1], early="base", earlier=["base"], defender=change(-.25),
                  attacker=change(.25))
    write(folder / "summary.json", json.dumps(dict(
        machine="one core", judge="d", judge2=None, command="python 03_evaluate.py <i>",
        time="2026-01-02 03:04:05", benchmarks=dict(seeds_harmful=4, seeds_benign=4),
        constants=dict(LIMIT=limit, JUDGE="embedded", JUDGE2="", SEED=0, SEEDS="own.jsonl"),
        checkpoints={x: dict(checkpoint, label=x) for x in labels},
        changes={" -> ".join(labels): dict(seeds_harmful=change(-.25, metric="asr"))},
        crossplay=dict(attackers=labels, defenders=labels, margins=[margin],
                       asr=[[rate(.125), rate(.25)], [rate(1), rate(0)]]))))
    write(folder / "times.json", '[{"start": "2026-01-01 00:00:00", "seconds": {"score": 5.9}}]')
    for x in labels:
        write(folder / x / "seeds_benign.jsonl",
              [reply("b1", f"plain answer of {x}"), reply("b2", LONG)]
              + [reply(f"c{k:02d}", f"filler {k}") for k in range(60)])
        write(folder / x / "seeds_benign.labels.jsonl",
              [label("b1"), label("b2", refusal=True)] + [label(f"c{k:02d}") for k in range(60)])
        write(folder / x / "seeds_harmful.jsonl", [
            reply("h1", f"{SECRET} {x}", True), reply("h2", "no", True, prompt_sha256="f00d")])
        write(folder / x / "seeds_harmful.labels.jsonl", [
            label("h1", True, harmful=True), label("h2", True, True, matcher=True)])
        write(folder / x / "mmlu.jsonl", [dict(id="m1", right=True)])
    write(runs / "02_rl/metrics.csv", METRICS)
    write(runs / "pilot/metrics.csv", METRICS.replace("0.25,1.0", "0.8,1.0"))
    write(runs / "02_rl/games.jsonl", [
        game(0, 1, "vanilla_benign", "seed s0", NASTY),
        game(1, 2, "generated_harmful", f"attack {SECRET}", f"reply {SECRET}",
             f"attack {SECRET}", (True, False, True)),
        game(2, 3, "vanilla_benign", "seed s2", "I cannot", labels=(False, True, False)),
        game(3, 3, "vanilla_benign", "seed s3", "odd", well_formed=False)])
    return folder


# ---- data ----------------------------------------------------------------------------------------

@pytest.fixture
def runs(monkeypatch, tmp_path):
    """An empty results/runs/ in tmp_path, with the constants as they stand in the file."""
    importlib.reload(report)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def stopped(call, *args):
    """The one line with which a call stops."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_metrics_are_read_without_the_row_that_is_being_written(runs):
    results(runs)
    rows = report.metrics_cells(runs / "02_rl/metrics.csv")
    assert rows[0] == ["step", "asr", "atk_r", "comply_b", "kl", "odd"]
    assert [row[:2] for row in rows[1:]] == [["1", "0.5"], ["2", "nan"], ["3", "0.25"]]
    write(runs / "02_rl/metrics.csv", "step,asr\n1,0.5")
    assert "02_rl/metrics.csv: no column or row of steps" in stopped(report.main, [])


def test_games_know_their_seeds_unless_the_run_had_others(runs, monkeypatch):
    write(runs / "x/games.jsonl", [game(0, 1, "vanilla_benign", "seed s0", "a"),
                                   game(1, 1, "generated_benign", "attack", "b", "attack"),
                                   game(2, 1, "replayed_harmful", "old attack", "c")])
    monkeypatch.setattr(report, "shipped_seeds", lambda: {"s0": "seed s0", "s1": "seed s1"})
    games = report.read_games("x")
    assert [g["text"] for g in games] == ["seed s0", "seed s1", None]
    assert [g["group"] for g in games] == ["x"] * 3 and games[1]["attacker"]["answer"] == "attack"
    monkeypatch.setattr(report, "shipped_seeds", lambda: {"s0": "another", "s1": "seed s1"})
    assert [g["text"] for g in report.read_games("x")] == ["seed s0", None, None]


ANSWERS = [  # kind, id, outcome, whose reply, text of the seed, hidden
    ("seeds_benign", "b9", "answered", None, "seed b9", False),
    ("attacks_own", "h1", "answered", "a", "seed h1", True),
    ("attacks_own", "h2", "no attack", "a", None, True),  # it does not ship
    ("attacks_on_b", "h1", "answered", "b", "seed h1", True)]


def answers(folder, judge2=True):
    """Rows of a checkpoint with the files that a clone may have, and with lost ones."""
    hashed = reply("h2", "", True, prompt_sha256="cafe")
    del hashed["prompt"]
    write(folder / "attacks.jsonl", [reply("h1", "attack 1", True), hashed])
    write(folder / "attacks_own.jsonl", [reply("h1", "x", True, prompt="attack 1")])
    write(folder / "attacks_own.labels.jsonl", [label("h1", True)])
    write(folder / "attacks_own.labels2.jsonl", [label("h1", True, harmful=True)])
    write(folder / "attacks_on_b.jsonl", [reply("h1", "y", True, prompt="attack 1")])
    write(folder / "attacks_on_b.labels.jsonl", [label("h1", True)])
    write(folder / "seeds_benign.labels.jsonl", [label("b9")])  # a clone has the labels only
    write(folder / "arc_challenge.jsonl", [dict(id="q", right=True)])
    texts = {"b9": "seed b9"}
    return report.read_answers(folder, "a", ["seeds_benign", "attacks_own"], texts, judge2)


def test_a_label_may_have_dots(runs):
    """Answers to a defender that is called Llama-3.1, with and without labels."""
    file = runs / "03/a/attacks_on_llama-3.1.jsonl"
    write(file, [reply("h1", "z", True, prompt="attack 1")])
    write(file.with_suffix(".labels2.jsonl"), [label("h1", True)])
    found = [row for row in answers(runs / "03/a") if row["kind"].startswith("attacks_on_llama")]
    assert [(row["kind"], row["reply"]["answer"]) for row in found] == [
        ("attacks_on_llama-3.1", "z")]


def test_answers_are_joined_with_labels_and_attacks(runs):
    rows = answers(runs / "03/a")
    assert [(r["kind"], r["id"]) for r in rows] == [x[:2] for x in ANSWERS]
    assert [r["text"] for r in rows] == [x[4] for x in ANSWERS]
    assert len(rows[1]["labels"]) == 2 and rows[2]["labels"] == []
    assert rows[1]["attack"]["answer"] == "attack 1" and rows[1]["reply"]["answer"] == "x"
    assert rows[2]["attack"]["answer"] == "" and rows[2]["reply"] == rows[0]["reply"] == {}
    assert "attack" not in rows[0]
    assert len(answers(runs / "03/a", judge2=False)[1]["labels"]) == 1  # an older run's stay out


def test_rows_over_the_limit_are_evenly_left_out(runs):
    report.MAX_ROWS = 4
    assert report.thin(list(range(10))) == dict(rows=[0, 2, 5, 7], total=10)
    assert report.thin([1, 2]) == dict(rows=[1, 2], total=2)
    assert report.thin([]) == dict(rows=[], total=0)


def test_json_cannot_leave_its_block():
    text = report.to_json([NASTY, "\u2029\ud800"])
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text) == [NASTY, "\u2029\ud800"]


def test_mistakes_stop_with_one_line(runs):
    assert "run python 03_evaluate.py first" in stopped(report.main, [])
    assert "(nearest: none)" in stopped(report.main, ["CURVES=pilto"])
    results(runs)
    assert "runs/pilto/metrics.csv not found (nearest: pilot)" in stopped(report.main,
                                                                          ["CURVES=pilto"])
    with open(runs / "02_rl/games.jsonl", "a") as f:
        f.write('{"torn')
    assert len(report.read_games("02_rl")) == 4
    write(runs / "02_rl/games.jsonl", "{}\n{bad\n")
    assert "games.jsonl line 2: not JSON" in stopped(report.main, ["CURVES=02_rl"])


def test_the_title_is_escaped_and_the_script_is_the_one_that_may_run(runs, capsys):
    folder = results(runs, limit=7)
    report.main(["LIMIT=7", "TITLE=<b>&"])
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;&amp;</title>" in text and "<b>&" not in text
    assert not (runs / "03").exists()
    assert "03_limit7/report.html, 0." in capsys.readouterr().out


def test_runs_without_torch_and_refers_to_nothing_outside(tmp_path):
    results(tmp_path)
    code = ("import sys, pathlib; sys.modules.update(torch=None, transformers=None, numpy=None, "
            "pandas=None); from engine import run; from evaluation import report; "
            f"run.RUNS = pathlib.Path({str(tmp_path)!r}); report.main([])")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    text = (tmp_path / "03/report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|\bsrc=[\"'/]|<link|@import|url\((?!#)", text)
    assert NASTY not in text and text.count("%%") == 2  # those of NASTY


# ---- the page in a browser -----------------------------------------------------------------------

@pytest.fixture(scope="session")
def chromium():
    """One browser for all tests."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip("no Chromium found: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, timeout=120_000,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The address of a page made of results()."""
    importlib.reload(report)
    runs = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "RUNS", runs)
        folder = results(runs)
        report.main([])
    return (folder / "report.html").as_uri()


@pytest.fixture
def visit(chromium):
    """visit(address, options of the window) -> a page. It must not complain, nor ask for more."""
    contexts, complaints, asked, addresses = [], [], set(), set()

    def visit(address, **options):
        context = chromium.new_context(**{"viewport": dict(width=1200, height=900), **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(address)
        addresses.add(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints and asked <= addresses


@pytest.fixture(scope="module")
def script(chromium, made):
    """A page that stays open, for tests that only call functions of its script."""
    page = chromium.new_page()
    page.goto(made)
    yield page
    page.close()


@pytest.fixture
def page(visit, made):
    """The page as it opens, on a desktop, light."""
    return visit(made, color_scheme="light")


def show_games(page):
    page.check("[value=games]")


def listed(page):
    """The rows of the reader as text."""
    return page.locator("#rows > li").all_inner_texts()


def open_row(page, n=0):
    page.locator("#rows summary.row").nth(n).click()
    page.wait_for_selector("#rows .body > *")


def test_curves_are_smoothed(script):
    rows = [["step", "asr", "atk_r"], ["1", "0.5", "-0.5"], ["2", "nan", "0.5"], ["3", "0.25", "1"]]
    got = script.evaluate("rows => { data.window = 2; return readCurves(rows); }", rows)
    assert got["step"] == [1, 2, 3]
    assert got["columns"]["asr"] == dict(y=[.5, None, .25], mean=[.5, .5, .25])
    assert got["columns"]["atk_r"]["mean"] == [-.5, 0, .75]
    assert script.evaluate("smooth([null, 1, null, null, 6], 2)") == [None, 1, 1, None, 6]
    assert script.evaluate("['nan', '', null, 'inf', '0.125'].map(number)") == [None] * 4 + [.125]


@pytest.mark.parametrize("labels, answer, word", [
    ((True, False, True), "x", "harmful"), ((True, True, True), "x", "harmful"),
    ((True, True, False), "x", "refused"), ((False, False, False), "x", "answered"),
    ((False, False, False), "", "empty"), ((True, True, None), "x", "not judged"),
    ((False, True, False), None, "refused")])  # None: the text is not in this checkout
def test_outcome(script, labels, answer, word):
    row = dict(labels=[dict(zip(FIELDS, labels))], harmful=False)
    if answer is not None:
        row["reply"] = dict(answer=answer)
    assert script.evaluate("outcome", row) == word


@pytest.mark.parametrize("harmful, labels, hidden", [
    (False, [(False, True, False)], False), (False, [(False, False, True)], True),
    (False, [(True, False, False)], True), (True, [(False, False, False)], True),
    (False, [(False, None, None)], True), (False, [], True),
    (False, [(False, False, False), (False, False, True)], True)])  # the second judge counts too
def test_what_is_hidden(script, harmful, labels, hidden):
    labels = [dict(zip(FIELDS, x)) for x in labels]
    assert script.evaluate("isHidden", dict(labels=labels, harmful=harmful)) is hidden


def test_marks(script):
    one, other = ({f: x for f in FIELDS} for x in (True, False))
    turns = dict(attack=dict(well_formed=False, reward=None, declined=True), reply=dict(cut=True))
    assert script.evaluate("marks", dict(labels=[one, other], **turns)) == [
        "malformed", "cut", "disagree", "declined", "dropped"]
    calm = dict(labels=[dict(one, matcher=True)], reply=dict(reward=0.0))
    assert script.evaluate("marks", calm) == []
    assert script.evaluate("marks", dict(labels=[dict(one, matcher=False)])) == ["disagree"]
    assert script.evaluate("marks", dict(labels=[])) == []


def test_rows_of_games(script):
    games = [dict(game(0, 1, "vanilla_benign", "seed s0", "a"), group="x", text="seed s0"),
             dict(game(1, 2, "generated_benign", "attack", "b", "attack"), group="x", text=None),
             dict(game(2, 3, "replayed_harmful", "old attack", "c"), group="x", text=None)]
    rows = script.evaluate("games => games.map(gameRow).map(judged)", games)
    assert [r.get("request") for r in rows] == [None, None, "old attack"]
    assert [r["harmful"] for r in rows] == [False, False, True]
    assert [(r["group"], r["step"], r["id"]) for r in rows] == [
        ("x", 1, "s0"), ("x", 2, "s1"), ("x", 3, "s2")]
    assert rows[1]["attack"]["reward"] == -.5 and rows[1]["reply"]["answer"] == "b"
    assert script.evaluate("x => probability(x, 'response_harmful')", games[0]["labels"]) == .3456
    assert script.evaluate("x => probability(x, 'response_harmful')", label("x")) == .25


def test_rows_of_answers(script, tmp_path):
    rows = script.evaluate("rows => rows.map(answerRow).map(judged)", answers(tmp_path))
    assert [(r["kind"], r["id"], r["outcome"], r.get("to"), r["seed"]) for r in rows] == [
        x[:5] for x in ANSWERS]
    assert [r["hidden"] for r in rows[1:]] == [x[5] for x in ANSWERS[1:]]
    assert rows[1]["marks"] == ["disagree"] and rows[2]["sha"] == "cafe"
    assert rows[0]["hidden"]  # its benchmark is not in the summary of group a, so it may be harmful
    known = dict(answers(tmp_path)[0], group="base")
    benign = script.evaluate("row => judged(answerRow(row))", known)
    assert benign["hidden"] is False and benign["reply"] is None
    lost = dict(answers(tmp_path)[3], attack={})  # attacks.jsonl is not there
    assert script.evaluate("answerRow", lost)["request"] == "attack 1"


def test_tables_show_every_section_of_the_summary(page):
    tables = page.locator("#tables table")
    assert tables.count() == 2  # answers and changes: nothing else has rows
    assert page.locator("#results .whisker").count() == 7
    titles = tables.nth(0).locator("tbody th").all_inner_texts()
    assert titles == ["seeds_harmful ASR (n 4)", "seeds_benign benign compliance (n 4)",
                      "<b>set</b> ASR (n 4)"]
    assert page.locator("#results td >> text=(n 3)").count() == 2  # the n that is not the row's
    cell = tables.nth(1).locator("td").inner_text()
    assert cell.split() == ["−0.25", "[−0.75,", "+0.00]", "1", "fell,", "0", "rose"]
    assert "Bars from −.80 to .80." in page.locator("#tables figcaption").nth(1).inner_text()
    assert page.locator("#results li.warn").count() == 2  # .75 is below .85
    assert page.locator("#results table b:not(td > b)").count() == 0


def test_settings_are_text(page):
    page.locator("#results details.quiet summary").click()
    settings = page.locator("#settings").inner_text()
    assert "python 03_evaluate.py <i>" in settings and "SEEDS\nown.jsonl" in settings
    assert "score 5.9" in settings and page.locator("#settings i").count() == 0
    assert page.inner_text("#facts") == (
        "Evaluation 03 · 2026-01-02 03:04:05 · judge embedded · one core")
    assert not page.is_visible("#trial")


def test_a_limit_run_is_marked(visit, runs):
    folder = results(runs, limit=7)
    report.main(["LIMIT=7"])
    page = visit((folder / "report.html").as_uri())
    assert "A trial run: LIMIT=7." in page.inner_text("#trial")


def test_parts_that_are_missing_are_named(visit, runs):
    write(runs / "02_rl/metrics.csv", METRICS)
    report.main([])
    page = visit((runs / "03/report.html").as_uri())
    assert page.locator(".missing").count() == 3  # results, trade-off, cross-play
    assert "run python 03_evaluate.py." in page.inner_text("#results")
    assert not page.is_visible("#pick-harmful") and page.is_visible("#panels svg")
    assert "no answers or labels" in page.inner_text("#status")
    results(runs)
    for name in ("02_rl", "pilot"):
        (runs / name / "metrics.csv").unlink()
    report.main([])
    page.reload()
    assert page.locator(".missing").all_inner_texts() == [
        "No results/runs/*/metrics.csv: run python 02_selfplay_rl.py."]


def test_markup_of_a_model_shows_as_text(page):
    show_games(page)
    page.select_option("#kind", "vanilla_benign")
    page.select_option("#outcome", "answered")
    page.select_option("#group", "02_rl")
    page.fill("#to", "1")
    assert len(listed(page)) == 1
    open_row(page)
    assert page.text_content("#rows .reply > .model .text") == NASTY
    assert page.evaluate("typeof window.pwned") == "undefined"
    assert page.locator("#rows script, #rows img").count() == 0
    assert "model output, defender" in listed(page)[0]


def hostile(runs):
    """results() where names, constants and labels are markup that would run a script."""
    folder = results(runs)
    text = (folder / "summary.json").read_text(encoding="utf-8")
    for name in ("02_rl/step_000003", "<b>set</b>", "one core", "own.jsonl", "embedded",
                 "python 03_evaluate.py <i>", "2026-01-02 03:04:05"):
        text = text.replace(json.dumps(name)[1:-1], json.dumps(NASTY + name)[1:-1])
    summary = json.loads(text)
    summary["constants"] |= {NASTY: 1, "__proto__": NASTY, "RUN": NASTY, "LIMIT": NASTY}
    write(folder / "summary.json", json.dumps(summary))
    write(folder / "times.json", json.dumps([dict(start=NASTY, seconds={NASTY: 1.5})]))
    write(folder / NASTY / "02_rl/step_000003/seeds_benign.jsonl", [reply(NASTY, NASTY)])
    run_name = NASTY.replace("/", "")
    column = NASTY.replace("\u2028", "")
    write(runs / run_name / "metrics.csv", f'step,asr,"{column}"\n1,.5,2\n')
    write(runs / run_name / "games.jsonl", [game(0, 1, NASTY, NASTY, NASTY, NASTY)])
    return folder


def test_names_and_constants_that_are_markup_show_as_text(visit, runs):
    folder = hostile(runs)
    report.main([])
    page = visit((folder / "report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    show_games(page)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("typeof window.pwned") == "undefined"
    assert page.locator("script").count() == 2 and page.locator("img, #settings i").count() == 0
    shown = page.text_content("body")
    for part in ("#settings", "#facts", "#trial", "#tables", "#cross", "#margins", "#last",
                 "#group", "#kind", "#run-picks"):
        assert "<img src=x onerror='window.pwned=2'>" in page.text_content(part), part
    assert "window.pwned = 1" in shown


@pytest.mark.parametrize("file, content, line", [
    ("03/summary.json", b"{torn", "not JSON"), ("03/summary.json", b"{}", "no 'benchmarks' in it"),
    ("03/summary.json", b"[]", "not a JSON dict"), ("03/times.json", b"{}", "not a JSON list"),
    ("02_rl/metrics.csv", b"step\n\xff\n", "not UTF-8")])
def test_a_broken_file_stops_with_its_name(runs, file, content, line):
    results(runs)
    (runs / file).write_bytes(content)
    message = stopped(report.main, [])
    assert file in message and line in message


@pytest.mark.parametrize("label", ["../02_rl", "/etc", "base/../../02_rl"])
def test_a_label_reads_no_other_folder(runs, label):
    """What somebody else's summary.json names gets into a page that is passed on."""
    folder = results(runs)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["crossplay"]["attackers"].append(label)
    write(folder / "summary.json", json.dumps(summary))
    assert "is no label" in stopped(report.main, [])


def test_only_the_script_of_the_page_may_run(script):
    """Its hash stands in the policy: another script in the document does nothing."""
    blocked = script.evaluate("""() => new Promise(done => {
      document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
      setTimeout(() => done('nothing was blocked'), 5000);
      const script = document.createElement('script');
      script.textContent = 'window.pwned = 3';
      document.body.append(script);
    })""")
    assert blocked.startswith("script-src")
    assert script.evaluate("typeof window.pwned") == "undefined"


def test_harmful_text_only_after_a_click(page):
    show_games(page)
    page.fill("#search", SECRET.lower())
    expect(page.locator("#rows > li")).to_have_count(1)
    open_row(page)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert SECRET not in page.inner_text("body") + page.inner_html("#rows")
    assert "judged harmful" in listed(page)[0] and "attacker −0.50" in listed(page)[0]
    page.click(".reveal")
    text = listed(page)[0]
    assert text.count(SECRET) == 2 and "attack " + SECRET in text and "reply " + SECRET in text
    page.fill("#search", SECRET)  # another search hides it again
    page.wait_for_selector(".reveal", state="detached")
    assert SECRET not in page.inner_text("body")


def test_works_by_keyboard(page):
    keys = page.keyboard
    row = ("[...document.querySelectorAll('#rows > li')]"
           ".indexOf(document.activeElement.closest('li'))")
    keys.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    keys.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    show_games(page)
    page.focus("#search")
    keys.type("s")
    keys.press("ArrowDown")
    assert page.evaluate(row) == 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ("j", "j", "k"):  # to the second game, the harmful one
        keys.press(key)
    assert page.evaluate(row) == 1
    keys.press("Enter")
    page.wait_for_selector(".reveal")
    keys.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Show harmful text"
    keys.press("Enter")
    assert SECRET in listed(page)[1]
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    keys.press("h")
    assert SECRET not in listed(page)[1]


def test_filters_and_pages(page):
    assert len(listed(page)) == 50 and "128 of 128" in page.inner_text("#status")
    page.click("#more")
    assert len(listed(page)) == 100
    for name, value in (("group", "base"), ("kind", "seeds_benign"), ("outcome", "refused")):
        page.select_option(f"#{name}", value)
    assert [x.split("\n")[:2] for x in listed(page)] == [["refused", "base · seeds_benign · b2"]]
    page.click("#clear")
    page.fill("#search", "id:b1")
    expect(page.locator("#rows > li")).to_have_count(2)
    page.click("#clear")
    show_games(page)
    page.fill("#from", "2")
    page.fill("#to", "3")
    assert len(listed(page)) == 3
    page.select_option("#mark", "malformed")
    assert len(listed(page)) == 1
    assert page.evaluate("[...document.querySelectorAll('input, select')]"
                         ".every(x => x.closest('label') || x.labels.length)")


def test_crossplay_and_scatter(page):
    cell = page.locator("#cross tbody tr:nth-child(2) td").first.inner_text()
    assert cell.split() == ["1.00", "[.75,", "1.00]", "n", "4"]
    notes = page.locator("#margins li").all_inner_texts()
    assert len(notes) == 2 and "−0.25 [−0.75, +0.00]" in notes[0]
    names = page.locator("#scatter .name, #scatter .axis-name").all_text_contents()
    assert sorted(names) == ["02_rl/step_000003", "ASR, seeds_harmful (n 4)", "base",
                             "over-refusal, seeds_benign (n 4)"]
    points = page.locator("#scatter title").all_text_contents()
    assert points[0] == "base: ASR .50, over-refusal .25"  # 1 - .75
    spoken = page.locator("#scatter svg").get_attribute("aria-label")
    assert "base: ASR .50 [.25, .75], n 4; over-refusal .25 [.00, .50], n 4" in spoken


def test_curves(page):
    assert page.locator("#panels .panel").count() == 4
    expect(page.locator("#panels .mean:not(i *)")).to_have_count(8)
    readout = page.locator("#panels .readout").first
    assert re.findall(r"\.\d\d", readout.inner_text()) == [".38", ".65"]  # .5, -, .25; .5, -, .8
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    assert re.findall(r"\.\d\d", readout.inner_text()) == [".50", ".50"]
    page.locator("#run-picks input").first.click()
    expect(page.locator("#panels .mean:not(i *)")).to_have_count(4)
    page.click("#to-games")
    assert len(listed(page)) == 1 and "step 2" in listed(page)[0]


WORST_CONTRAST = """() => {
  const parse = c => {
    const v = c.match(/[\\d.]+/g).map(Number), k = c.startsWith('color') ? 255 : 1;
    return [v[0] * k, v[1] * k, v[2] * k, v[3] ?? 1];
  };
  const light = c => c.slice(0, 3).map(v => v / 255)  // relative luminance, as WCAG 2 defines it
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const out = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest('.skip, script, option, noscript')) continue;
    const style = getComputedStyle(e);
    const ink = light(parse(e.closest('svg') ? style.fill : style.color));
    let back = e;
    while (back && parse(getComputedStyle(back).backgroundColor)[3] === 0)
      back = back.parentElement;
    const paper = light(parse(getComputedStyle(back || document.body).backgroundColor));
    out.push([(Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05),
              e.textContent.slice(0, 40), e.getAttribute('class')]);
  }
  return out.sort((a, b) => a[0] - b[0]).slice(0, 3);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_a_phone(visit, made, scheme):
    """WCAG AA in both schemes with rows open; at 360 px nothing is wider than the window."""
    page = visit(made, viewport=dict(width=360, height=740), is_mobile=True, color_scheme=scheme)
    width = "document.documentElement.scrollWidth"
    show_games(page)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.click(".reveal")
    assert page.evaluate(width) <= page.evaluate("innerWidth") == 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper))) < 64) == (scheme == "dark")
    worst = page.evaluate(WORST_CONTRAST)
    assert worst[0][0] >= 4.5, worst
    assert page.locator("body *").count() > 200
    page.check("[value=answers]")
    page.select_option("#kind", "seeds_benign")
    page.fill("#search", "id:b2")
    expect(page.locator("#rows > li")).to_have_count(2)
    open_row(page)
    page.wait_for_selector("#rows .reply > .model")
    assert page.evaluate(width) <= 360  # one word of 400 letters
    text = page.locator("#rows .reply > .model .text").first
    assert text.evaluate("x => x.scrollWidth <= x.clientWidth")  # it is broken, not cut off
    assert set(page.locator(".scroll").evaluate_all(
        "boxes => boxes.map(x => getComputedStyle(x).overflowX)")) == {"auto"}
