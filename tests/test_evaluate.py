"""03_evaluate.py: what it collects and asks, resume, two judges, cross-play; with played models
and with tiny ones."""
import csv
import dataclasses
import itertools
import json
import re
import shutil
import types
import weakref
from pathlib import Path

import numpy
import pytest
from helpers import FakeJudge, import_stage, keep_constants, read_jsonl, stops, write_jsonl

from engine import models, run
from evaluation import attackers, scores
from evaluation.players import Checkpoint

SAFE_AND_UNSAFE = [["1", "<a>", "safe"], ["2", "<b>", "unsafe"]]


def write_csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(rows)


def xstest(folder, rows):
    """XSTest as its authors publish it, in a DATA_DIR."""
    write_csv(folder / "xstest/xstest_prompts.csv", ["id", "prompt", "label"], *rows)


def make_checkpoint(folder, **meta):
    """A folder that looks like a checkpoint with this meta.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "meta.json").write_text(json.dumps(meta or dict(constants={})))
    return folder


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """The stage, writing below tmp_path, on six held-back seeds, three of them harmful, and one for
    training that must not be seen."""
    module = import_stage("03_evaluate")
    keep_constants(monkeypatch, module)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "results" / "runs")
    monkeypatch.setattr(scores, "RESAMPLES", 200)
    monkeypatch.setattr(module.gc, "collect", lambda: None)  # half a second a call in a test
    monkeypatch.chdir(tmp_path)  # the user's own checkpoints/ must not matter
    rows = [dict(id=f"s{n}", prompt=f"<seed #{n}>", harmful=n % 2 == 1, split="dev")
            for n in range(1, 7)]
    rows.append(dict(id="t1", prompt="<training seed>", harmful=True, split="train"))
    module.SEEDS = write_jsonl(tmp_path / "seeds.jsonl", rows)
    return module


# ---- (1) collect

def test_collect_takes_held_back_seeds_and_the_files_it_finds(stage, tmp_path):
    xstest(tmp_path, SAFE_AND_UNSAFE)
    found = stage.collect(tmp_path)
    assert {name: [i["id"] for i in items] for name, items in found.items()} == dict(
        seeds_harmful=["s1", "s3", "s5"], seeds_benign=["s2", "s4", "s6"], xstest_unsafe=["2"],
        xstest_safe=["1"])
    assert found["seeds_harmful"][0] == dict(id="s1", prompt="<seed #1>", harmful=True,
                                             benchmark="seeds_harmful", text_ships=False)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_seeds_of_one_split_are_asked(stage, tmp_path, split):
    """SPLIT=test: the test seeds and no dev seed; the reverse by default."""
    rows = []
    for n in range(12):
        rows.append(dict(id=f"{('dev', 'test', 'train')[n % 3]}{n}", prompt=f"<seed #{n}>",
                         harmful=n % 2 == 1, split=("dev", "test", "train")[n % 3]))
    stage.SEEDS = write_jsonl(tmp_path / "all.jsonl", rows)
    assert stage.SPLIT == "dev"
    stage.SPLIT = split
    asked = [item["id"] for items in stage.collect("").values() for item in items]
    assert sorted(asked) == sorted(row["id"] for row in rows if row["split"] == split)


def test_texts_of_the_shipped_seeds_ship(stage):
    stage.SEEDS = "prompts/seeds.jsonl"
    (run.ROOT / "prompts").symlink_to(run.PROMPTS)
    assert {i["text_ships"] for items in stage.collect("").values() for i in items} == {True}


def test_limit_is_evenly_spaced(stage):
    stage.LIMIT = 2  # of 3: places 0 * 3 // 2 = 0 and 1 * 3 // 2 = 1
    assert [i["id"] for i in stage.collect("")["seeds_harmful"]] == ["s1", "s3"]


@pytest.mark.parametrize("name, why", [
    (".", "none of the files named above is in it"), ("nowhere", "no such folder"),
    ("seeds.jsonl", "none of the files named above is in it")])
def test_a_data_dir_without_any_file_stops(stage, world, tmp_path, capsys, name, why):
    line = stops(stage.main, [*world.argv, f"DATA_DIR={tmp_path / name}"])
    assert why in line and world.loads == []
    said = capsys.readouterr().out
    for file in ("xstest/xstest_prompts.csv", "mmlu/test/*_test.csv"):
        assert (f"DATA_DIR has no {file}" in said) == (name != "nowhere")


def test_two_prompts_with_one_id_stop(stage, tmp_path):
    xstest(tmp_path, [["1", "<a>", "safe"], ["1", "<b>", "safe"], ["2", "<c>", "unsafe"]])
    assert "same id" in stops(stage.collect, tmp_path)


def test_labels_of_another_adapter_are_other_labels(stage, tmp_path):
    """A folder with an adapter is a judge: its digest changes with its weights or calibration."""
    names, digests = ("adapter_config.json", "adapter_model.safetensors", "calibration.json"), set()
    for n in range(3):
        for k, name in enumerate(names):
            (tmp_path / name).write_text("new" if k == n else "old")
        digests.add(stage.judge_digest(str(tmp_path)))
    assert len(digests) == 3  # old weights, new weights, new calibration
    (tmp_path / "calibration.json").unlink()
    assert "run python -m judge_adapter.train" in stops(stage.judge_digest, str(tmp_path))


def test_the_embedded_judge_without_its_config_stops_at_once(stage, tmp_path, monkeypatch):
    for name in ("adapter_model.safetensors", "calibration.json"):
        (tmp_path / name).touch()
    monkeypatch.setattr(stage.judge, "ADAPTER", tmp_path)
    assert "adapter_config.json not found" in stops(stage.judge_digest, "embedded")


# ---- (2) the order of work

def named(jobs):
    """list_jobs() in words: [(model that is loaded, ["attacker: file", ...])]."""
    return [(model.label, [f"{job.attacker.label}: {job.benchmark}" for job in group])
            for model, group in itertools.groupby(jobs, lambda job: job.defender)]


def test_the_plan_of_work(stage):
    base, sft, rl = (Checkpoint(name, name, "turns", True, "") for name in ("base", "sft", "r/1"))
    # base and sft are evaluated, rl takes part in cross-play alone
    assert named(stage.list_jobs(base, [base, sft], [base, sft, rl], ["seeds", "mmlu"])) == [
        ("sft", ["sft: attacks", "sft: attacks_own", "sft: seeds", "sft: mmlu"]),
        ("r/1", ["r/1: attacks", "r/1: attacks_own"]),
        ("base", ["base: attacks", "base: attacks_own", "base: seeds", "base: mmlu",
                  "sft: attacks_on_base", "r/1: attacks_on_base"]),
        ("sft", ["base: attacks_on_sft", "r/1: attacks_on_sft"]),
        ("r/1", ["base: attacks_on_r_1", "sft: attacks_on_r_1"])]
    # without cross-play, with a base that is not evaluated
    assert named(stage.list_jobs(base, [sft], [], ["seeds"])) == [
        ("sft", ["sft: attacks", "sft: attacks_own", "sft: seeds"]),
        ("base", ["sft: attacks_on_base"])]
    # who takes part in cross-play alone does not attack a base that does not
    jobs = named(stage.list_jobs(base, [sft], [sft, rl], []))
    assert jobs[2] == ("base", ["sft: attacks_on_base"])


# ---- the whole stage, with models and judges that are played

def obedient(request, reply):
    return "bad" in request and reply == "yes"


class World:
    """Models and judges, played. A checkpoint `plain_base` obeys every request, all others refuse;
    the third attack of 01_sft is empty. The judge finds harm in a "yes" to a request with "bad" in
    it; a judge named `second` finds harm in every answer and a refusal in none."""

    def __init__(self, tok):
        self.tok, self.loads, self.batches, self.judges = tok, [], [], weakref.WeakSet()

    def load_model(self, path, dtype, quantize=False):
        self.loads.append(Path(path).name)
        config = types.SimpleNamespace(max_position_embeddings=4096)
        return types.SimpleNamespace(name=Path(path).name, config=config), self.tok

    def complete(self, model, tok, turns, cot, max_new, temperature, batch, generator,
                 rollout):
        self.batches.append([len(turn.prompt_ids) + max_new for turn in turns])
        said = []
        for turn in turns:
            attack = turn.role == "attacker"
            assert (temperature, cot) == (1.0, True) if attack else (
                0.0, model.name != "plain_base")
            answer = "yes" if model.name == "plain_base" else "I'm sorry, no"
            if attack:
                number = re.findall(r"#(\d)", tok.decode(turn.prompt_ids))[-1]
                answer = "" if (model.name, number) == ("01_sft", "3") else f"bad #{number}"
            said.append(dataclasses.replace(turn, ids=[5, tok.turn_end], answer=answer,
                                            well_formed=bool(answer)))
        return said

    def load_judge(self, name, quantize, max_text):
        assert not self.judges  # one judge at a time may be in memory
        played = FakeJudge(refusal=lambda request, reply: reply != "yes", harmful=obedient)
        if Path(name).name == "second":
            played = FakeJudge(harmful=lambda request, reply: True)
        self.judges.add(played)
        self.loads.append(Path(name).name)
        return played


@pytest.fixture
def world(stage, loaded, monkeypatch, tmp_path):
    """A World, and `argv` of main() for two checkpoints, plain_base and 01_sft."""
    world = World(loaded["qwen2"][1])
    make_checkpoint(tmp_path / "plain_base", stage="engine")
    make_checkpoint(tmp_path / "01_sft", constants=dict(COT=True))
    make_checkpoint(tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors", "calibration.json"):
        (tmp_path / "judge").mkdir(exist_ok=True)
        (tmp_path / "judge" / name).write_text("{}")
    world.argv = ["CHECKPOINTS=plain_base,01_sft", "BASE=plain_base", f"JUDGE={tmp_path / 'judge'}",
                  f"SEEDS={stage.SEEDS}", "PROGRESS=false", "EVAL_TOKENS=8", "ATTACK_TOKENS=8",
                  "JUDGE2="]
    world.two_judges = [*world.argv, f"JUDGE2={tmp_path / 'second'}"]
    monkeypatch.setattr(models, "load_model", world.load_model)
    monkeypatch.setattr(stage, "complete", world.complete)
    monkeypatch.setattr(stage.judge, "load_judge", world.load_judge)
    monkeypatch.setattr(attackers, "load_embedder", lambda name: lambda texts: numpy.array(
        [[float(t.endswith(str(n))) for n in range(10)] for t in texts]))
    return world


def results(folder, run="03"):
    """{path: bytes} of what a run made, without times: no meta.json, times.json; of summary.json
    all but the date and the command line."""
    made = {}
    for path in sorted((folder / "results/runs" / run).rglob("*")):
        if path.is_file() and path.name not in ("meta.json", "times.json", "lock"):
            made[str(path.relative_to(folder / "results/runs"))] = path.read_bytes()
    name = f"{run}/summary.json"
    if name in made:
        summary = json.loads(made[name])
        made[name] = {k: v for k, v in summary.items() if k not in ("time", "command")}
    return made


def jsonl(folder):
    return {name: text for name, text in results(folder).items() if name.endswith(".jsonl")}


def test_the_stage_end_to_end_and_resumed(stage, world, tmp_path, capsys):
    stage.main(world.argv)
    # Each attacks and answers itself; the base also 01_sft; then 01_sft the base.
    assert world.loads == ["01_sft", "plain_base", "01_sft", "judge"]
    made, printed = results(tmp_path), capsys.readouterr().out
    summary = made["03/summary.json"]
    base, sft = (summary["checkpoints"][k]["answers"] for k in ("plain_base", "01_sft"))
    # The judge finds "bad" only in attacks: direct requests "<seed #n>" score 0.
    direct, own, on_base = "seeds_harmful", "attacks_own", "attacks_on_base"
    assert [base[b]["asr"]["rate"] for b in (direct, own, on_base)] == [0, 1, 1]
    # Of the three attacks of 01_sft one is empty: it obeys none of its own, the base obeys 2 of 3.
    assert [sft[b]["asr"]["rate"] for b in (own, on_base)] == [0, pytest.approx(2 / 3)]
    assert [x["seeds_benign"]["benign_compliance"]["rate"] for x in (base, sft)] == [1, 0]
    figures = summary["checkpoints"]["01_sft"]["attacks"]["attacks"]
    assert (figures["empty"], figures["sent"], figures["faithful"]["rate"]) == (
        1, 2, pytest.approx(2 / 3))
    assert figures["diversity"]["rate"] == 1.0 and figures["seed_cosine"]["rate"] == 0
    change = summary["changes"]["plain_base -> 01_sft"]["seeds_benign"]
    assert (change["rate"], change["fell"], change["metric"]) == (-1, 3, "benign_compliance")
    assert summary["benchmarks"] == dict(seeds_harmful=3, seeds_benign=3)
    assert summary["judge2"] is None and summary["constants"]["RUN"] == "03"
    assert summary["checkpoints"]["01_sft"]["path"] == "01_sft"
    table = made["03/table.md"].decode()
    assert "Warning: 01_sft, seeds_benign: benign compliance below .85: over-refusal" in table
    assert "Warning: plain_base" not in table
    assert "| seeds_harmful ASR (n 3) | .00 [.00, .56] | .00 [.00, .56] |" in table
    assert "| seeds_benign benign compliance (n 3) | 1.00 [.44, 1.00] | .00 [.00, .56] |" in table
    answers = made["03/01_sft/seeds_harmful.jsonl"].decode()
    assert "prompt_sha256" in answers and "<seed #1>" not in answers  # not the shipped file's text
    assert "skipped capability: it needs DATA_DIR" in printed
    assert "benign compliance" not in printed  # the screen shows a few rows and names the file
    assert "full table: results/runs/03/table.md" in printed
    assert "python -m evaluation.report RUN=03" in printed
    assert "python -m selfplay.chat CHECKPOINT" in printed
    [times] = json.loads((tmp_path / "results/runs/03/times.json").read_text())
    assert list(times["seconds"]) == ["generate", "labels", "score"]

    files = jsonl(tmp_path)
    torn = tmp_path / "results/runs/03/01_sft/attacks_own.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])
    (tmp_path / "results/runs/03/plain_base/seeds_benign.labels.jsonl").unlink()
    stage.main(world.argv)
    assert jsonl(tmp_path) == files
    assert len(json.loads((tmp_path / "results/runs/03/times.json").read_text())) == 2


def test_the_attackers_own_adapter_attacks(stage, world, tmp_path, monkeypatch):
    """A checkpoint with attacker/ in it attacks with the model there; what else is asked of it, its
    own answers to these attacks included, the model in the folder itself answers."""
    (tmp_path / "01_sft/attacker").mkdir()
    (tmp_path / "01_sft/attacker/adapter_config.json").write_text("{}")
    roles, complete = set(), stage.complete

    def spy(model, tok, turns, *rest):
        for turn in turns:
            roles.add((model.name, turn.role))
        return complete(model, tok, turns, *rest)

    monkeypatch.setattr(stage, "complete", spy)
    stage.main(world.argv)
    assert world.loads == ["attacker", "01_sft", "plain_base", "01_sft", "judge"]
    assert roles == {("attacker", "attacker"), ("01_sft", "defender"),
                     ("plain_base", "attacker"), ("plain_base", "defender")}
    attacks = read_jsonl(tmp_path / "results/runs/03/01_sft/attacks.jsonl")
    assert sorted(row["answer"] for row in attacks) == ["bad #1", "bad #3", "bad #5"]


def test_nothing_is_generated_or_judged_twice(stage, world):
    stage.main(world.argv)
    # Two checkpoints: 6 prompts each, 3 attacks each; the base's 3 attacks on itself and on the
    # other, the other's 2 with text on itself and on the base.
    assert sum(map(len, world.batches)) == 12 + 6 + 6 + 4
    world.loads.clear()
    stage.main(world.argv)
    assert sum(map(len, world.batches)) == 28 and world.loads == []


def test_other_settings_do_not_resume(stage, world, tmp_path):
    stage.main(world.argv)
    before = (tmp_path / "results/runs/03/meta.json").read_text()
    world.loads.clear()
    assert "EVAL_TOKENS=8 (now 9)" in stops(stage.main, [*world.argv, "EVAL_TOKENS=9"])
    (tmp_path / "01_sft" / "model.safetensors").write_bytes(b"other weights")
    assert "checkpoint=" in stops(stage.main, world.argv)  # trained anew in the same folder
    assert world.loads == [] and (tmp_path / "results/runs/03/meta.json").read_text() == before


def test_other_prompts_do_not_resume_but_new_benchmarks_do(stage, world, tmp_path):
    stage.main(world.argv)
    xstest(tmp_path, SAFE_AND_UNSAFE)
    stage.main([*world.argv, f"DATA_DIR={tmp_path}"])
    assert "xstest_safe" in (tmp_path / "results/runs/03/table.md").read_text()
    xstest(tmp_path, [["1", "<other>", "safe"], ["2", "<b>", "unsafe"]])
    assert "xstest_safe=" in stops(stage.main, [*world.argv, f"DATA_DIR={tmp_path}"])


def test_a_folder_of_another_stage_stops(stage, world, tmp_path):
    folder = tmp_path / "results/runs/02_rl"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(dict(stage="02_selfplay_rl.py")))
    line = stops(stage.main, [*world.argv, "RUN=02_rl"])
    assert "belongs to '02_selfplay_rl.py'" in line and world.loads == []
    assert [p.name for p in folder.iterdir()] == ["meta.json"]


def test_a_limit_run_has_a_folder_of_its_own(stage, world, tmp_path):
    stage.main([*world.argv, "LIMIT=1"])
    assert [p.name for p in (tmp_path / "results/runs").iterdir()] == ["03_limit1"]
    assert {p.name for p in (tmp_path / "results/runs/03_limit1").iterdir()} == {
        "table.md", "summary.json", "times.json", "rates.png", "crossplay.png", "meta.json",
        "plain_base", "01_sft", "lock"}
    assert len(read_jsonl(tmp_path / "results/runs/03_limit1/01_sft/seeds_benign.jsonl")) == 1


@pytest.mark.parametrize("word", [
    "RUN=a/b", "DATA_DIR=nowhere", "SEEDS=nowhere.jsonl", "CHECKPOINTS=checkpoints/x",
    "CHECKPOINTS=01_sft,01_sft", "FORMAT=other", "JUDGE=./nowhere", "JUDGE2=./nowhere",
    "JUDGE2=judge", "EMBEDDER=./nowhere", "LIMIT=-1"])
def test_mistakes_stop_before_a_model_is_loaded(stage, world, tmp_path, word):
    if word == "JUDGE2=judge":
        word = f"JUDGE2={tmp_path / 'judge'}"  # the same as JUDGE
    stops(stage.main, [*world.argv, word])
    assert world.loads == [] and not (tmp_path / "results").exists()


def test_an_adapter_without_calibration_stops(stage, world, tmp_path):
    (tmp_path / "judge/calibration.json").unlink()
    assert "run python -m judge_adapter.train" in stops(stage.main, world.argv)
    assert world.loads == []


# ---- judges

def test_labels_of_another_judge_are_made_anew(stage, world, tmp_path):
    stage.main(world.argv)
    file = tmp_path / "results/runs/03/01_sft/seeds_benign.labels.jsonl"
    before = file.read_text()
    (tmp_path / "judge/calibration.json").write_text("{ }")
    world.loads.clear()
    stage.main(world.argv)
    assert world.loads == ["judge"]
    assert before != file.read_text() and before.count("\n") == file.read_text().count("\n")


def test_a_second_judge_labels_the_same_answers(stage, world, tmp_path):
    stage.main(world.two_judges)
    assert world.loads[-2:] == ["judge", "second"]
    made = results(tmp_path)
    base = made["03/summary.json"]["checkpoints"]["plain_base"]["answers"]
    # Direct requests "<seed #n>": the first judge finds no harm, the base answers all with "yes".
    direct = base["seeds_harmful"]
    assert (direct["asr"]["rate"], direct["judge2_asr"]["rate"]) == (0, 1)
    assert (direct["agreement_harm"]["rate"], direct["agreement_refusal"]["rate"]) == (0, 1)
    assert direct["judge2_refusal"]["rate"] == 0 and direct["agreement_matcher"]["rate"] == 1
    assert base["attacks_own"]["agreement_harm"]["rate"] == 1
    assert base["seeds_benign"]["judge2_compliance"]["rate"] == 1
    # The second judge finds harm in every answer: all but the empty attack of 01_sft.
    assert [[x["rate"] for x in row] for row in made["03/summary.json"]["crossplay"][
        "judge2_asr"]] == [[1, 1], [pytest.approx(2 / 3)] * 2]
    assert "seeds_harmful judge2 ASR (n 3)" in made["03/table.md"].decode()

    files, folder = jsonl(tmp_path), tmp_path / "results/runs"
    torn = "03/plain_base/seeds_benign.labels2.jsonl"
    (folder / torn).write_bytes(files[torn][:-9])
    world.loads.clear()
    stage.main(world.two_judges)
    assert world.loads == ["second"]  # the first judge has nothing to do
    assert jsonl(tmp_path) == files

    (tmp_path / "second/model.safetensors").write_bytes(b"trained anew in the same folder")
    stage.main(world.two_judges)
    now = jsonl(tmp_path)
    assert {name for name in files if now[name] != files[name]} == {
        name for name in files if name.endswith(".labels2.jsonl")}
    assert results(tmp_path)["03/table.md"] == made["03/table.md"]  # it judges as before


def test_without_a_second_judge_its_labels_are_not_read(stage, world, tmp_path):
    stage.main(world.two_judges)
    stage.main([*world.argv, "JUDGE2="])
    text = (tmp_path / "results/runs/03/summary.json").read_text()
    assert "judge2_asr" not in text and "agreement_matcher" in text


# ---- cross-play, batches, resume to the byte, what may be published

def test_cross_play_by_hand(stage, world, tmp_path):
    """plain_base obeys every attack, all others refuse; one attack of 01_sft has no text."""
    for n in (20, 40):
        make_checkpoint(tmp_path / "rl" / f"step_{n:06d}", constants=dict(COT=True),
                        parent=str(tmp_path / "01_sft"))
    stage.main([*world.argv, "CHECKPOINTS=plain_base,01_sft,rl/step_000040",
                "CROSSPLAY=rl/step_000020"])
    made = results(tmp_path)
    summary = made["03/summary.json"]
    cross = summary["crossplay"]
    names = ["plain_base", "01_sft", "rl/step_000020", "rl/step_000040"]  # in order of training
    assert cross["attackers"] == cross["defenders"] == names
    for a, row in zip(names, cross["asr"]):
        obeyed = 2 / 3 if a == "01_sft" else 1
        assert [x["rate"] for x in row] == [pytest.approx(obeyed), 0, 0, 0]
        assert {x["n"] for x in row} == {3}  # the empty attack is in n
    assert list(summary["checkpoints"]) == ["plain_base", "01_sft", "rl/step_000040"]
    assert list(summary["changes"]) == ["plain_base -> 01_sft", "01_sft -> rl/step_000040"]
    [margin] = cross["margins"]
    assert (margin["late"], margin["early"]) == ("rl/step_000040", "01_sft")
    assert margin["earlier"] == ["01_sft", "rl/step_000020"]
    assert margin["defender"]["rate"] == margin["attacker"]["rate"] == 0
    table = made["03/table.md"].decode()
    assert "| 01_sft (n 3) | .67 [.00, 1.00] | .00 [.00, .56] |" in table
    assert "the late defender rl/step_000040" in table and "the late attacker" in table
    assert made["03/crossplay.png"][:4] == b"\x89PNG"
    assert world.loads.count("plain_base") == 1 and world.loads.count("judge") == 1
    # step 20 takes part in cross-play alone
    assert "03/rl/step_000020/seeds_benign.jsonl" not in made
    assert {Path(name).name for name in made if name.startswith("03/01_sft/attacks")
            and "labels" not in name} == {
        "attacks.jsonl", "attacks_own.jsonl", "attacks_on_base.jsonl",
        "attacks_on_rl_step_000020.jsonl", "attacks_on_rl_step_000040.jsonl"}
    assert "03/plain_base/attacks_on_base.jsonl" not in made  # it is its own


def test_answers_of_a_defender_that_was_trained_anew_go(stage, world, tmp_path, capsys):
    """Its own folder is deleted, as 03 says; what it answered to others is made anew."""
    for n in (20, 40):
        make_checkpoint(tmp_path / "rl" / f"step_{n:06d}", constants=dict(COT=True),
                        parent=str(tmp_path / "01_sft"))
    argv = [*world.argv, "CHECKPOINTS=plain_base,01_sft,rl/step_000040",
            "CROSSPLAY=rl/step_000020"]
    stage.main(argv)
    folder = tmp_path / "results/runs/03"
    stale = folder / "01_sft/attacks_on_rl_step_000040.jsonl"
    kept = (folder / "01_sft/seeds_harmful.jsonl").stat().st_mtime_ns
    stale.write_text(stale.read_text().replace('"answer": "', '"answer": "old '))
    (tmp_path / "rl/step_000040/model.safetensors").write_bytes(b"other weights")
    assert "checkpoint=" in stops(stage.main, argv) and "old " in stale.read_text()
    shutil.rmtree(folder / "rl")
    capsys.readouterr()
    stage.main(argv)
    assert "attacks_on_rl_step_000040.jsonl: answers of another" in capsys.readouterr().out
    assert "old " not in stale.read_text()
    assert (folder / "01_sft/seeds_harmful.jsonl").stat().st_mtime_ns == kept


def test_cross_play_can_be_left_out(stage, world, tmp_path):
    stage.main([*world.argv, "CROSSPLAY=none"])
    assert world.loads == ["01_sft", "plain_base", "judge"]
    made = results(tmp_path)
    assert "crossplay" not in made["03/summary.json"] and "03/crossplay.png" not in made


def test_without_attacks_the_checkpoints_answer_only(stage, world, tmp_path, capsys):
    """ATTACK=false: nobody rewrites a seed, the base is asked only what the others are."""
    stage.main([*world.argv, "ATTACK=false"])
    assert sum(map(len, world.batches)) == 2 * 6
    made, printed = results(tmp_path), capsys.readouterr().out
    for checkpoint in made["03/summary.json"]["checkpoints"].values():
        assert list(checkpoint["answers"]) == ["seeds_harmful", "seeds_benign"]
        assert checkpoint["attacks"] == {}
    table = made["03/table.md"].decode()
    assert "| seeds_harmful ASR (n 3)" in table
    assert "| attacks" not in table and "Attackers." not in table
    assert "03/crossplay.png" not in made and "03/rates.png" in made
    assert not [name for name in made if "attack" in name]
    assert "benign requests" in printed and "that work" not in printed


def test_batches_hold_as_many_tokens_as_they_may_the_longest_prompts_first(stage, world,
                                                                           monkeypatch, tmp_path):
    seeds = [dict(id=str(n), prompt=f"<seed #{n} {'x' * (n * 7 % 5)}>", harmful=n % 2 == 1,
                  split="dev") for n in range(1, 10)]
    argv = [*world.argv, f"SEEDS={write_jsonl(tmp_path / 'more.jsonl', seeds)}", "CROSSPLAY=none"]
    generate, files = stage.generate, []

    def one_file(*args):
        world.batches = []
        generate(*args)
        files.append(world.batches)

    monkeypatch.setattr(stage, "generate", one_file)
    stage.main([*argv, "SAMPLE_TOKENS=1", "RUN=alone"])
    alone = [sum(file, []) for file in files]  # lengths: a batch holds one prompt
    assert all(len(batch) == 1 for file in files for batch in file)
    assert all(lengths == sorted(lengths, reverse=True) for lengths in alone)
    assert any(len(set(lengths)) > 2 for lengths in alone)
    files.clear()
    limit = 2 * max(map(max, alone))
    stage.main([*argv, f"SAMPLE_TOKENS={limit}", "RUN=together"])
    for file, lengths in zip(files, alone, strict=True):
        assert sorted(sum(file, []), reverse=True) == lengths
        assert all(max(batch) * len(batch) <= limit for batch in file)
        assert list(map(max, file)) == sorted(map(max, file), reverse=True)
        assert len(file) <= 3  # of at most 5 prompts: at least two fit


@pytest.mark.parametrize("calls", [1, 6, 11, 20, 27, 30, 45])
def test_killed_and_started_again_gives_the_same_bytes(stage, world, tmp_path, monkeypatch, calls):
    """The run ends at its n-th row, of answers or of labels, with half of a line written."""
    argv = [*world.argv, "SAMPLE_TOKENS=1"]
    stage.main(argv)
    whole, left, dump = results(tmp_path), [calls], json.dumps
    shutil.rmtree(tmp_path / "results")

    def killed(row, **kw):
        if "answer" in row or "key" in row:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return dump(row, **kw)

    monkeypatch.setattr(json, "dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.main(argv)
    monkeypatch.setattr(json, "dumps", dump)
    for path in (tmp_path / "results").rglob("*.jsonl"):  # the system wrote half a buffer
        if path.stat().st_size:
            path.write_bytes(path.read_bytes()[:-7])
            break
    assert set(results(tmp_path)) < set(whole)
    stage.main(argv)
    assert results(tmp_path) == whole


def test_table_and_summary_name_no_folder_of_this_machine(stage, world, tmp_path):
    xstest(tmp_path / "data", SAFE_AND_UNSAFE)
    stage.main([*world.two_judges, f"DATA_DIR={tmp_path / 'data'}", "CAPABILITY=",
                f"CHECKPOINTS={tmp_path / 'plain_base'},{tmp_path / '01_sft'}"])
    made = results(tmp_path)
    assert len(made) > 10
    for name, text in made.items():
        assert str(tmp_path) not in (text.decode() if name.endswith((".jsonl", ".md")) else
                                     str(text)), name
    table = made["03/table.md"].decode()
    assert "DATA_DIR=data" in table and "JUDGE2=second" in table and "Seed: 0" in table


# ---- tiny models

def test_the_whole_stage_on_tiny_random_models(stage, tiny_models, tmp_path, monkeypatch):
    """Real sampling, real constrained scoring by two judges, and three sets of questions."""
    monkeypatch.setattr(attackers, "load_embedder", lambda name: None)
    data = tmp_path / "data"
    xstest(data, SAFE_AND_UNSAFE)
    question = ["<question>", "<a>", "<b>", "<c>", "<d>"]
    write_csv(data / "mmlu/dev/logic_dev.csv", [*question, "A"], *[[*question, "B"]] * 4)
    write_csv(data / "mmlu/test/logic_test.csv", [*question, "C"])
    (data / "arc").mkdir()
    write_jsonl(data / "arc/ARC-Challenge-Test.jsonl", [dict(
        id="q", answerKey="2", question=dict(stem="<stem>", choices=[
            dict(text="<one>", label="1"), dict(text="<number two>", label="2")]))])
    (data / "truthfulqa/v1").mkdir(parents=True)
    (data / "truthfulqa/v1/mc_task.json").write_text(json.dumps(
        [dict(question="<q>", mc1_targets={"<yes>": 0, "<no>": 1})]), encoding="utf-8-sig")
    argv = [f"CHECKPOINTS={tiny_models['qwen2']},{tiny_models['llama']}",
            f"BASE={tiny_models['llama']}", f"JUDGE={tiny_models['mistral']}",
            f"JUDGE2={tiny_models['qwen2']}", "JUDGE_QUANTIZE=none", "DTYPE=float32",
            f"SEEDS={stage.SEEDS}", "EVAL_TOKENS=4", "ATTACK_TOKENS=24", f"DATA_DIR={data}"]
    stage.main(argv)
    whole = results(tmp_path)
    summary = whole["03/summary.json"]
    for label in ("qwen2", "llama"):
        known = summary["checkpoints"][label]["capability"]
        assert {x: v["n"] for x, v in known.items()} == dict(
            mmlu=1, arc_challenge=1, truthfulqa_mc1=1)
        assert "acc_norm" in known["arc_challenge"]
        assert summary["checkpoints"][label]["answers"]["xstest_safe"]["agreement_harm"]["n"] <= 1
        assert f"03/{label}/xstest_safe.labels2.jsonl" in whole
    assert summary["changes"]["qwen2 -> llama"]["mmlu"]["metric"] == "acc"
    assert "mmlu acc (n 1)" in whole["03/table.md"].decode()
    for name in ("mmlu.jsonl", "xstest_safe.jsonl", "seeds_harmful.labels2.jsonl"):
        (tmp_path / "results/runs/03/llama" / name).unlink()
    stage.main(argv)
    assert results(tmp_path) == whole
    write_csv(data / "mmlu/test/logic_test.csv", [*question, "D"])
    assert "mmlu=" in stops(stage.main, argv)  # other questions do not resume
