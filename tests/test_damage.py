"""Damaged and foreign files, and values nobody meant: each ends in one short line that names the
file, its line and what to do, or is left out and counted."""
import json
import os

import pytest
from helpers import import_stage, keep_constants, one_line, write_jsonl

from engine import run
from evaluation import players, publish, report
from selfplay import data, monitor
from selfplay.replay import Pool

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS, LONG = "9" * 5000, "x" * 100_000
HALF = '"\\ud800"'  # of a surrogate pair
ENGINE = dict(stage="engine", source="a wheel")


def stops(call, *args, **kwargs):
    """The one line of a call that must stop; at most 200 characters after "error: "."""
    with pytest.raises(SystemExit) as problem:
        call(*args, **kwargs)
    line = one_line(problem)
    assert len(line) <= 207, line
    return line


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty repository -> its folder."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "results" / "runs")
    monkeypatch.setattr(run, "REFERENCE", tmp_path / "results" / "reference")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stage(place, monkeypatch):
    """Stage 3 in an empty repository."""
    module = import_stage("03_evaluate")
    keep_constants(monkeypatch, module)
    return module


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def checkpoint(folder, meta):
    """A folder that looks like a checkpoint."""
    for name in ("config.json", "model.safetensors"):
        write(folder / name, "{}")
    write(folder / "meta.json", meta)
    return folder


def find(folder):
    return players.find_checkpoint(str(folder), "turns", "chat")


# ---- logs: answers, labels, games, defender.jsonl ------------------------------------------------

@pytest.mark.parametrize("line, why", [
    ('{"id": "b", "p": NaN}', "not JSON"), ('{"id": "b", "p": -1e999}', "not JSON"),
    (f'{{"id": "b", "answer": {HALF}}}', "not JSON"), (DEEP, "too deep"),
    ("[]", "not a JSON dict"), ("3", "not a JSON dict"), ('"id"', "not a JSON dict"),
    ("{}", "no 'id'"), ('{"id": 3}', "'id'"), ('{"id": ["b"]}', "'id'"),
    ('{"id": "b", "answer": null}', "'answer'"), ('{"id": "b", "parsed": 1}', "'parsed'"),
    ('{"id": "b", "response_harmful": "no"}', "'response_harmful'"),
    ('{"id": "b", "response_refusal": 0}', "'response_refusal'"),
    (f'{{"id": "b", "step": {DIGITS}.5}}', "not JSON")])
@pytest.mark.parametrize("heal", [True, False])
def test_a_line_of_a_log(place, line, why, heal):
    file = place / "results/runs/03/x.labels.jsonl"
    write(file, f'{{"id": "a"}}\n{line}\n{{"id": "c"}}\n')
    said = stops(data.rows_by_id, file, heal=heal)
    assert "results/runs/03/x.labels.jsonl line 2: " in said and why in said
    assert said.endswith("correct or delete it")


def test_a_log_that_lacks_what_is_needed(place):
    file = write(place / "attacks.jsonl", '{"id": "a", "answer": "x"}\n{"id": "b"}\n')
    assert "attacks.jsonl line 2: no 'answer'" in stops(data.read_rows, file, "answer")


def test_text_that_is_not_utf8(place):
    (place / "games.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xff"}\n')
    said = stops(run.truncate_log, place / "games.jsonl", 2, lambda line: 1)
    assert "games.jsonl: not UTF-8" in said and "in line 2" in said


@pytest.mark.parametrize("torn", ['{"id": "b', '{"id": "b"}', "\x00" * 9])
def test_a_torn_last_line_is_healed_whole_or_not_at_all(place, monkeypatch, capsys, torn):
    file = write(place / "answers.jsonl", '{"id": "a"}\n' + torn)

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        data.read_rows(file)
    assert file.read_text().endswith(torn)  # as it was
    capsys.readouterr()
    assert data.read_rows(file, heal=False) == [dict(id="a")] and file.read_text().endswith(torn)
    assert capsys.readouterr().out == ""
    assert data.read_rows(file) == [dict(id="a")] and file.read_text() == '{"id": "a"}\n'
    assert capsys.readouterr().out == "answers.jsonl: a torn last line was cut off\n"


# ---- metrics.csv, pool.jsonl ---------------------------------------------------------------------

@pytest.mark.parametrize("row", ["x,0.5", "2,high", "2", "2,0.5,1", f"{DIGITS},1", "-1,0.5",
                                 "nan,1", f"2,{LONG}{LONG}", "2,\x00", '2,"0.5'])
@pytest.mark.parametrize("call", [monitor.last_step, lambda file: monitor.truncate_metrics(file, 2),
                                  lambda file: monitor.write_metrics(file, dict(step=3))])
def test_a_row_of_metrics(place, row, call):
    file = write(place / "results/runs/02_rl/metrics.csv", f"step,asr\n1,0.25\n{row}\n")
    assert "results/runs/02_rl/metrics.csv line 3: " in stops(call, file)
    assert file.read_text().startswith("step,asr\n1,0.25\n")


def test_a_torn_row_of_metrics_is_cut_off(place, capsys):
    file = write(place / "metrics.csv", "step,asr\n1,0.25\n2,0.")
    assert monitor.last_step(file) == 1 and file.read_text() == "step,asr\n1,0.25\n"
    assert "torn last line" in capsys.readouterr().out


TOTALS = dict(born=1, retired=0, left=[], distilled=[])
ITEM = dict(number=0, seed=dict(id="s", prompt="p"), attack="a", reply="r", mean=0.25, weight=0.0,
            visits=0, safe=0)


@pytest.mark.parametrize("line, text", [
    (1, "[]"), (1, "{}"), (1, json.dumps(dict(TOTALS, left=3))), (1, json.dumps(ITEM)),
    (1, json.dumps(dict(TOTALS, distilled=[3]))),
    (1, json.dumps(dict(TOTALS, distilled=[dict(request="r", thinking="t")]))), (2, "3"),
    (2, "{}"), (2, '{"torn'), (2, DEEP), (2, HALF), (2, json.dumps(dict(ITEM, mean="good"))),
    (2, json.dumps(dict(ITEM, mean=float("nan")))), (2, json.dumps(dict(ITEM, attack=1))),
    (2, json.dumps(dict(ITEM, seed={}))), (2, json.dumps(TOTALS)),
    (2, json.dumps(ITEM).replace("0.25", DIGITS))])
def test_a_line_of_the_pool(line, text):
    lines = [json.dumps(TOTALS), json.dumps(ITEM)]
    assert len(Pool(9, 1.0, 0.8, "\n".join(lines)).items) == 1
    lines[line - 1] = text
    assert f"pool.jsonl line {line}: " in stops(Pool, 9, 1.0, 0.8, "\n".join(lines))


# ---- checkpoints ---------------------------------------------------------------------------------

BAD_META = [("", "not JSON"), ('{"constants": {', "not JSON"), ("[]", "not a JSON dict"),
            (DEEP, "too deep"), ("{}", "no 'constants'"), ('{"constants": []}', "no 'constants'"),
            ('{"constants": {"COT": "yes"}}', "no 'COT'"),
            ('{"constants": {"LR": NaN}}', "not JSON")]


@pytest.mark.parametrize("meta, why", BAD_META)
def test_meta_json_of_a_checkpoint(place, meta, why):
    said = stops(find, checkpoint(place / "checkpoints/01_sft", meta))
    assert "checkpoints/01_sft/meta.json: " in said and why in said


def test_meta_json_of_a_parent(place):
    made = find(checkpoint(place / "a", ENGINE))
    write(place / "a/meta.json", "[]")
    assert "a/meta.json: not a JSON dict" in stops(players.parent_of, made, [], None)


@pytest.mark.parametrize("name", ["step_old", "step_1x0", "step_00001", "step_0000100",
                                  "step_000010.old", "step_000010.tmp", "step_x00010"])
def test_only_steps_of_six_digits_count(place, name):
    folder = place / "checkpoints/02_rl"
    for step in ("step_000002", name):
        checkpoint(folder / step, dict(constants={}, stage="02"))
        write(folder / step / "state.safetensors", "")
    write(folder / name / "meta.json", "[]")  # nobody reads it
    assert run.newest_checkpoint(folder).name == "step_000002"
    assert find(folder).label == "02_rl/step_000002"
    scope = dict(RUN="02_rl", __file__=str(place / "02"))
    run.claim(scope, place / "checkpoints")


# ---- stage 3, the report, what is published ------------------------------------------------------

@pytest.mark.parametrize("text, why", [
    ("", "not JSON"), ("[]", "not a JSON dict"), ("{}", "no 'fixed'"), ('{"fixed": [', "not JSON"),
    ('{"fixed": 3}', "no 'fixed'")])
def test_meta_json_of_answers(stage, place, text, why):
    base = find(checkpoint(place / "a", ENGINE))
    file = write(place / "results/runs/03/a/meta.json", text)
    said = stops(stage.check_folder, file.parent, base, base, {}, {})
    assert "results/runs/03/a/meta.json: " in said and why in said


@pytest.mark.parametrize("text", ["", "{}", "[{", "3", DEEP, f"[{DIGITS}]"])
def test_times_json(stage, place, text):
    file = write(place / "results/runs/03/times.json", text)
    assert "results/runs/03/times.json: " in stops(stage.clock, file, "now")


SUMMARY = dict(benchmarks={}, changes={}, checkpoints={}, constants={}, machine="m")


@pytest.mark.parametrize("file, text", [
    ("03/summary.json", json.dumps(dict(SUMMARY, checkpoints=[]))),
    ("03/summary.json", json.dumps(dict(SUMMARY, constants=None))),
    ("03/times.json", "[3]"), ("03/times.json", '[{"start": "now"}]'),
    ("02/metrics.csv", "step,asr\n1,0.5,0.5\n"), ("02/games.jsonl", '{"seed": "s"}\n'),
    ("02/games.jsonl", '{"seed": {}, "kind": "vanilla_benign", "request": "r"}\n'),
    ("02/games.jsonl", '{"seed": "s", "kind": "vanilla_benign", "request": null}\n')])
def test_files_of_the_report(place, monkeypatch, file, text):
    keep_constants(monkeypatch, report)
    write(place / "results/runs/03/summary.json", SUMMARY)
    write(place / "results/runs/02/metrics.csv", "step,asr\n1,0.5\n")
    write(place / "results/runs" / file, text)
    assert f"results/runs/{file}" in stops(report.main, [])


@pytest.mark.parametrize("meta", ['{"constants": []}', '{"constants": 3}', "{}"])
def test_meta_json_of_what_is_published(place, meta):
    write(place / "results/runs/02/meta.json", meta)
    assert "results/runs/02/meta.json: " in stops(publish.main, ["02"])


def test_long_prompts_are_cut_and_counted(stage, place, loaded, monkeypatch, capsys):
    model, tok = loaded["qwen2"]
    seen = []

    def complete(model, tok, turns, *rest):
        seen.extend(len(turn.prompt_ids) for turn in turns)
        return []

    monkeypatch.setattr(stage, "complete", complete)
    monkeypatch.setattr(stage, "EVAL_TOKENS", 8)
    items = [dict(id=str(n), prompt=text, harmful=True, text_ships=True)
             for n, text in enumerate(("short", "many words " * 20_000, "\U0001f600" * 20_000))]
    made = find(checkpoint(place / "a", dict(constants=dict(COT=True))))
    for name in ("seeds_harmful", "attacks"):
        seen.clear()
        stage.generate(model, tok, made, place / f"{name}.jsonl", items)
        assert len(seen) == 3 and max(seen) <= model.config.max_position_embeddings
        assert f"{name}.jsonl: 2 prompts cut at" in capsys.readouterr().out


# ---- seeds, exchanges ----------------------------------------------------------------------------

SEEDS = [dict(id="h", prompt="bad", harmful=True, split="dev"),
         dict(id="b", prompt="good", harmful=False, split="dev")]


def test_long_seeds_are_left_out_and_counted(place, capsys):
    more = [dict(id=str(n), prompt=LONG, harmful=True, split="dev") for n in range(2)]
    write_jsonl(place / "s.jsonl", [*SEEDS, *more])
    assert [seed["id"] for seed in data.load_seeds("s.jsonl", "dev")] == ["h", "b"]
    assert capsys.readouterr().out == "SEEDS=s.jsonl: left out 2 of more than 4000 bytes\n"
    assert len(data.load_seeds("s.jsonl", "dev", longest=200_000)) == 4
    assert "no benign seed" in stops(data.load_seeds, "s.jsonl", "dev", longest=3)


@pytest.mark.parametrize("line", [
    f'{{"prompt": {HALF}, "harmful": true}}', f'{{"prompt": "x", "harmful": true, "n": {DEEP}}}',
    '{"prompt": "x", "harmful": true, "p": Infinity}',
    json.dumps(dict(prompt="x", harmful=LONG)), json.dumps(dict(prompt="x", harmful=[LONG])),
    json.dumps(dict(prompt="x", harmful=True, split=LONG))])
def test_a_line_of_seeds(place, line):
    write_jsonl(place / "s.jsonl", [*SEEDS, line])
    assert "s.jsonl line 3: " in stops(data.load_seeds, "s.jsonl")


@pytest.mark.parametrize("row", [dict(response_harmful="no"), dict(response_refusal=0),
                                 dict(prompt_harmful=0.5), {}])
def test_labels_of_exchanges_are_true_false_or_null(place, row):
    file = write_jsonl(place / "probe.jsonl", [dict(prompt="p", response="r", group="g"),
                                               dict(dict(prompt="p", response="r"), **row)])
    assert "probe.jsonl line 2: " in stops(data.read_exchanges, file, "group")


# ---- NAME=value ----------------------------------------------------------------------------------

@pytest.mark.parametrize("word, why", [
    (f"SEED={DIGITS}", "SEED="), (f"LIMIT=-{DIGITS}", "LIMIT="), (f"RUN={'r' * 300}", "RUN="),
    (f"RUN={'r' * 101}", "RUN="), (f"RUN=/{LONG}", "RUN="), (f"SPLIT={LONG}", "SPLIT="),
    (f"PROGRESS={LONG}", "PROGRESS="), (LONG, "unknown constant"),
    (f"{LONG[:5000]}=1", "unknown constant"), (f"SEEDS={LONG}", "File name too long"),
    (f"SEEDS={LONG}/{LONG}.csv", "File name too long")])
def test_values_nobody_meant(stage, word, why):
    assert why in stops(run.guarded, stage.main, [word])


@pytest.mark.parametrize("base, names", [("a", LONG), (LONG, "a"), ("a", f"checkpoints/{LONG}"),
                                         ("", "a"), ("a", "@turns"), (" @chat", "a")])
def test_names_of_checkpoints_nobody_meant(place, base, names):
    checkpoint(place / "a", dict(constants={}))

    def main(argv):
        players.find_players(base, names, "", "turns", "chat")

    said = stops(run.guarded, main, [])
    assert "File name too long" in said or "an empty name" in said
