"""evaluation/publish.py: what goes to results/reference/, and what does not."""
import io
import json

import pytest
from PIL import Image

from engine import run
from evaluation import publish
from selfplay.data import read_rows

SEEDS = {"h1": "seed one", "b1": "seed two"}
META = dict(command="python 02_selfplay_rl.py RUN=x", machine="one core, 2 GB",
            time="2026-01-02 03:04:05", parent="01_sft", versions=dict(torch="2"),
            stage="02_selfplay_rl.py", constants=dict(SEED=7, RUN="x", METHOD="ssp"))


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """results/runs/ and results/reference/ in tmp_path; two seeds ship."""
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(publish, "shipped_seeds", lambda: SEEDS)
    return tmp_path / "runs"


def game(number, kind, seed, request):
    return dict(step=1, game=number, kind=kind, seed=seed, request=request)


def make(folder, meta, games=(), **files):
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    if games:
        (folder / "games.jsonl").write_text("".join(json.dumps(g) + "\n" for g in games))


def stopped(names):
    """The one line with which the command stops."""
    with pytest.raises(SystemExit) as stop:
        publish.main(names)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def picture():
    """A PNG of many colours."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_what_goes(runs, capsys):
    """The files of the list and nothing else; pictures in fewer colours; an older copy is gone."""
    png = picture()
    make(runs / "x", META, metrics_csv=b"step\r\n1\r\n", curves_png=png, table_md=b"a table",
         summary_json=b"{}", state_pt=b"weights")
    stale = run.REFERENCE / "x/old.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    publish.main(["x"])
    got = {p.name: p.read_bytes() for p in (run.REFERENCE / "x").iterdir()}
    assert sorted(got) == ["curves.png", "meta.json", "metrics.csv", "published.json",
                           "summary.json", "table.md"]
    assert got["metrics.csv"] == b"step\r\n1\r\n" and got["table.md"] == b"a table"
    with Image.open(io.BytesIO(got["curves.png"])) as shown:
        assert shown.size == (64, 64) and len(got["curves.png"]) < len(png)
    assert json.loads(got["meta.json"]) == META
    assert json.loads(got["published.json"]) == dict(
        command="python 02_selfplay_rl.py RUN=x", seed=7, machine="one core, 2 GB",
        time="2026-01-02 03:04:05", versions=dict(torch="2"))
    size = sum(map(len, got.values()))
    assert f"reference/x: {size / 1e3:.0f} kB, of 0 games that may go" in capsys.readouterr().out


GAMES = [game(0, "vanilla_harmful", "h1", "seed one"), game(1, "generated_harmful", "h1", "attack"),
         game(2, "replayed_benign", "b1", "old attack")]


@pytest.mark.parametrize("seeds, more, kept", [
    ("prompts/seeds.jsonl", [], [0, 1, 2]),
    (str(run.ROOT / "prompts/seeds.jsonl"), [], [0, 1, 2]),
    # a seed that does not ship, by id or by text: then attacks may be on other seeds too
    ("prompts/seeds.jsonl", [game(3, "vanilla_benign", "own-1", "private")], []),
    ("prompts/seeds.jsonl", [game(3, "vanilla_harmful", "h1", "private")], []),
    ("prompts/seeds.jsonl,own.jsonl", [], []),
    # an attack whose seed does not ship
    ("prompts/seeds.jsonl", [game(3, "generated_harmful", "own-1", "private")], [])])
def test_only_games_on_seeds_that_ship_go(runs, seeds, more, kept):
    make(runs / "x", dict(META, constants=dict(SEED=0, SEEDS=seeds)), GAMES + more)
    publish.main(["x"])
    assert read_rows(run.REFERENCE / "x/games_sample.jsonl") == [GAMES[k] for k in kept]


def test_fifty_games_evenly_spaced(runs):
    games = [game(n, "vanilla_harmful", "h1", "seed one") for n in range(120)]
    make(runs / "x", dict(META, constants=dict(SEED=0, SEEDS="prompts/seeds.jsonl")), games)
    publish.main(["x"])
    sample = read_rows(run.REFERENCE / "x/games_sample.jsonl")
    assert [g["game"] for g in sample][:4] == [0, 2, 4, 7] and len(sample) == 50


def test_a_damaged_picture_leaves_the_older_copy(runs):
    png = picture()
    make(runs / "x", META, metrics_csv=b"step\r\n1\r\n", curves_png=png)
    publish.main(["x"])
    before = {p.name: p.read_bytes() for p in (run.REFERENCE / "x").iterdir()}
    for damaged in (png[:200], b""):
        (runs / "x/curves.png").write_bytes(damaged)
        assert "x/curves.png: a damaged picture" in stopped(["x"])
        assert {p.name: p.read_bytes() for p in (run.REFERENCE / "x").iterdir()} == before


def test_mistakes_stop_with_one_line(runs):
    make(runs / "02_rl", META)
    make(runs / "old", {k: v for k, v in META.items() if k != "machine"})
    make(runs / "older", dict(META, constants={}))
    assert "(nearest: 02_rl)" in stopped(["02_lr"])
    assert "results/reference" not in stopped(["02_rl", "none"]) and not run.REFERENCE.exists()
    assert "results/runs/NAME/meta.json not found" in stopped([])
    for name in ("old", "older"):
        assert f"{name}/meta.json lacks one of seed, command, machine" in stopped([name])
    assert not run.REFERENCE.exists()
