"""selfplay/data.py: tables in every form, seeds, exchanges, and logs that go on after a kill."""
import hashlib
import json
import re

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from helpers import ROOT, read_jsonl, stops, write_jsonl

from engine.batching import chunks
from selfplay import data


# ---- tables --------------------------------------------------------------------------------------

def test_csv_with_bom_quotes_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    text = '\ufeffid,text\r\n1,"a ""b"", c\r\nd"\r\n\r\n2,zwölf\r\n'
    path.write_bytes(text.encode())
    assert data.read_table(path) == [(3, dict(id="1", text='a "b", c\r\nd')),
                                     (5, dict(id="2", text="zwölf"))]


def test_a_gap_in_parquet_is_none(tmp_path):
    """As in JSON: a NaN could not be read back from a checkpoint of SSP's pool."""
    rows = [dict(id="a", n=1, yes=True, more="x"), dict(id="b", n=None, yes=None, more=None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    got = [row for _, row in data.read_table(tmp_path / "a.parquet")]
    assert got == rows and got[1]["n"] is None and got[0]["yes"] is True
    json.dumps(got, allow_nan=False)


def test_tsv_jsonl_and_parquet_hold_the_same(tmp_path):
    rows = [dict(id="1", text="a, b"), dict(id="2", text="c\u2028d")]  # U+2028: a line end to some
    (tmp_path / "a.tsv").write_bytes("id\ttext\n1\ta, b\n2\tc\u2028d\n".encode())
    write_jsonl(tmp_path / "a.jsonl", ["\ufeff" + json.dumps(rows[0]), "", rows[1]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.tsv", "a.jsonl", "a.parquet"):
        assert [row for _, row in data.read_table(tmp_path / name)] == rows
    assert [n for n, _ in data.read_table(tmp_path / "a.jsonl")] == [1, 3]


@pytest.mark.parametrize("name, text, words", [
    ("a.csv", "id,text\n1,x\n2\n", ["a.csv line 3", "1 columns", "header has 2"]),
    ("a.csv", "id,text\n1,x,y\n", ["line 2", "3 columns"]),
    ("a.csv", 'id,text\n1,"x\n2,y\n', ["a.csv line"]),  # a quote that never ends
    ("a.tsv", "id\ttext\n1\tx\n2\n", ["a.tsv line 3"]),
    ("a.jsonl", '{"id": 1}\n{"id": \n', ["a.jsonl line 2", "not JSON"]),
    ("a.parquet", "no parquet", ["a.parquet", "not a Parquet file"])])
def test_a_bad_table_stops_with_its_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    line = stops(data.read_table, tmp_path / name)
    assert all(word in line for word in words), line


def test_a_parquet_file_with_wrong_bytes_inside_stops(tmp_path):
    """Its footer is whole: what pyarrow raises then is no ValueError."""
    path = tmp_path / "a.parquet"
    rows = [dict(id=str(n), text=f"some words {n}") for n in range(200)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data_ = bytearray(path.read_bytes())
    data_[4:400] = bytes(255 - x for x in data_[4:400])
    path.write_bytes(data_)
    assert "a.parquet: not a Parquet file" in stops(data.read_table, path)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_what_is_not_utf8_stops(tmp_path, name):
    (tmp_path / name).write_bytes(b"id,text\n1,\xff\xfe\n")
    assert name in stops(data.read_table, tmp_path / name)


# ---- exchanges -----------------------------------------------------------------------------------

def test_read_exchanges(tmp_path):
    rows = [dict(prompt="one", response="a"), dict(prompt="two", response=None),
            dict(prompt="", x=1),
            dict(prompt="a line\u2028separator and \x85 next line", response="\u2029")]
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [rows[0], "", *rows[1:]])
    assert data.read_exchanges(path) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert data.read_exchanges(path) == rows


@pytest.mark.parametrize("line, says", [
    ('{"prompt": "x"', "not JSON"),
    ("[1]", "not a JSON dict"),
    ('{"response": "x"}', "prompt"),
    ('{"prompt": 1}', "prompt"),
    ('{"prompt": null}', "prompt"),
    ('{"prompt": "x", "response": 1}', "response"),
    ('{"prompt": "x", "response": ["y"]}', "response")])
def test_read_exchanges_names_the_line(tmp_path, line, says):
    fine = dict(prompt="fine")
    path = write_jsonl(tmp_path / "x.jsonl", [fine, "", line, fine])
    message = stops(data.read_exchanges, path)
    assert "x.jsonl line 3" in message and says in message


def test_read_exchanges_without_a_file(tmp_path):
    assert "none.jsonl" in stops(data.read_exchanges, tmp_path / "none.jsonl")


# ---- seeds ---------------------------------------------------------------------------------------

GOOD = [
    '{"id": "a", "prompt": " first ", "harmful": true, "category": "c", "split": "train"}',
    '{"id": "b", "prompt": "second", "harmful": false, "category": "c", "split": "train"}',
    "",
    '{"id": "c", "prompt": "third", "harmful": false, "category": "c", "split": "dev"}',
    '{"id": "d", "prompt": "fourth", "harmful": true, "category": "c", "split": "dev"}',
    '{"id": "e", "prompt": "fifth", "harmful": false, "category": "c", "split": "test"}',
    '{"id": "f", "prompt": "sixth", "harmful": true, "category": "c", "split": "test"}']


def column(seeds, name):
    return [seed[name] for seed in seeds]


def test_load_seeds(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", GOOD)
    seeds = data.load_seeds(path)
    assert column(seeds, "id") == ["a", "b", "c", "d", "e", "f"]
    assert column(seeds, "prompt") == ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert column(seeds, "harmful") == [True, False, False, True, False, True]
    assert column(data.load_seeds(path, "dev"), "id") == ["c", "d"]
    assert column(data.load_seeds(path, "test"), "id") == ["e", "f"]
    assert seeds[0]["category"] == "c" and seeds[0]["split"] == "train"
    harmful, benign = data.halves(seeds)
    assert column(harmful, "id") == ["a", "d", "f"]
    assert column(benign, "id") == ["b", "c", "e"]


def test_a_seed_has_our_columns_and_an_id_of_its_own(tmp_path):
    """What a run keeps of a seed can be written and compared, whatever columns the file has. A line
    without an id gets one; one id for two lines stops, before a run that 03 could not read."""
    frame = pandas.DataFrame(dict(tactics=[["a"], ["b"]], prompt=["x", "y"], harmful=[True, False],
                                  id=["one", None], category=["c", None], split=["dev"] * 2))
    frame.to_parquet(tmp_path / "s.parquet")
    assert data.load_seeds(str(tmp_path / "s.parquet")) == [
        dict(id="one", prompt="x", harmful=True, split="dev", category="c"),
        dict(id="s-2", prompt="y", harmful=False, split="dev")]
    path = write_jsonl(tmp_path / "t.jsonl", ['{"id": 1, "prompt": "x", "harmful": true}',
                                              '{"id": "1", "prompt": "y", "harmful": false}'])
    said = stops(data.load_seeds, path)
    assert "t.jsonl line 2: its id '1' is that of" in said and "t.jsonl line 1" in said


def test_load_seeds_from_csv_with_bom(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes('\ufeffprompt,harmful\n"one, with a comma\nand a second line",TRUE\n'
                     'zwölf,0\nthree,false\n'.encode())
    seeds = data.load_seeds(str(path))
    assert column(seeds, "prompt") == ["one, with a comma\nand a second line", "zwölf", "three"]
    assert column(seeds, "harmful") == [True, False, False]
    assert len(set(column(seeds, "id"))) == 3


def test_load_seeds_of_several_files(tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", ['{"prompt": "mine", "harmful": true}'])
    path = write_jsonl(tmp_path / "s.jsonl", GOOD[:5])
    seeds = data.load_seeds(f"{path},{own}")
    assert column(seeds, "prompt") == ["first", "second", "third", "fourth", "mine"]


def test_lines_without_a_split_are_split_by_their_prompt(tmp_path):
    """By the prompt's hash one tenth is dev and another tenth test. A line stays where it is when
    the file grows or is shuffled."""
    prompts = [f"question number {i}" for i in range(400)]
    want = dict(train=set(), dev=set(), test=set())
    for prompt in prompts:
        tenth = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
        want[{0: "dev", 1: "test"}.get(tenth, "train")].add(prompt)
    assert 20 < len(want["dev"]) < 60 and 20 < len(want["test"]) < 60
    for order in (prompts, prompts[::-1]):
        rows = [dict(prompt=p, harmful=i % 2 == 0) for i, p in enumerate(order)]
        path = write_jsonl(tmp_path / "s.jsonl", rows)
        for split, those in want.items():
            assert set(column(data.load_seeds(path, split), "prompt")) == those
        assert len(data.load_seeds(path)) == 400


def test_load_seeds_that_ship(monkeypatch, tmp_path):
    """They are found from any folder, and each split holds both kinds."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "dev", "test"):
        seeds = data.load_seeds("prompts/seeds.jsonl", split)
        assert set(column(seeds, "harmful")) == {True, False}
        assert set(column(seeds, "split")) == {split}
        assert len(set(column(seeds, "id"))) == len(seeds)


def test_counts_of_the_seeds_that_ship():
    seeds, counts = read_jsonl(ROOT / "prompts" / "seeds.jsonl"), {}
    for s in seeds:
        key = s["harmful"], s["category"] == "sounds_harmful"
        counts[key] = counts.get(key, 0) + 1
    assert counts[True, False] >= 256 and counts[False, False] >= 256
    assert counts[False, True] >= 64  # benign, though they sound harmful
    dev = [s for s in seeds if s["split"] == "dev" and s["category"] != "sounds_harmful"]
    assert column(dev, "harmful").count(True) == 96 and len(dev) == 2 * 96
    test = [s["harmful"] for s in seeds if s["split"] == "test"]
    assert test.count(True) >= 200 and test.count(False) >= 200
    assert len(set(column(seeds, "id"))) == len(seeds)


def test_borderline_seeds_are_benign_ones_of_all_splits():
    counts = {split: len(data.load_seeds("prompts/seeds.jsonl,prompts/borderline.jsonl", split))
              - len(data.load_seeds("prompts/seeds.jsonl", split)) for split in data.SPLITS}
    assert counts == dict(train=80, dev=40, test=39)
    assert set(column(read_jsonl(ROOT / "prompts" / "borderline.jsonl"), "harmful")) == {False}


def test_no_seed_that_ships_is_there_twice():
    """Case and punctuation aside, no two are the same, whatever their split. And no two of
    different splits are nearly the same: they share fewer than four fifths of their words."""
    seeds = read_jsonl(ROOT / "prompts" / "seeds.jsonl")
    seeds += read_jsonl(ROOT / "prompts" / "borderline.jsonl")
    words = [re.findall(r"\w+", seed["prompt"].lower()) for seed in seeds]
    assert len(set(map(tuple, words))) == len(seeds)
    bags = list(map(set, words))
    for i, seed in enumerate(seeds):
        for j in range(i):
            if seeds[j]["split"] != seed["split"]:
                shared = len(bags[i] & bags[j]) / len(bags[i] | bags[j])
                assert shared < 0.8, (seeds[j]["id"], seed["id"])


@pytest.mark.parametrize("line, says", [
    ('{"prompt": "x", "harmful": true', ["JSON"]),
    ('{"harmful": true}', ["prompt"]),
    ('{"prompt": "  ", "harmful": true}', ["prompt"]),
    ('{"prompt": 3, "harmful": true}', ["prompt"]),
    ('{"prompt": "x"}', ["harmful", "true or false"]),
    ('{"prompt": "x", "harmful": "maybe"}', ["harmful", "'maybe'"]),
    ('{"prompt": "x", "harmful": null}', ["harmful"]),
    ('{"prompt": "x", "harmful": 2}', ["harmful"]),
    ('["x", true]', ["not a JSON dict"]),
    ('{"prompt": "x", "harmful": true, "split": "held_back"}',
     ["`split` must be train, dev or test", "'held_back'"]),
])
def test_load_seeds_names_the_line(tmp_path, line, says):
    path = write_jsonl(tmp_path / "s.jsonl", [GOOD[0], line, GOOD[1]])
    message = stops(data.load_seeds, path)
    assert "s.jsonl" in message and "line 2" in message
    assert all(word in message for word in says), message


def test_load_seeds_names_the_line_of_a_csv(tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("prompt,harmful\nx,true\ny,perhaps\n")
    assert "line 3" in stops(data.load_seeds, str(bad))


def test_load_seeds_names_what_is_missing(tmp_path):
    for name in ("no_such.jsonl", "no/such.tsv", "prompts/seeds"):  # the hub is not asked
        assert f"{name!r} not found" in stops(data.load_seeds, name)
    assert "'prompts' is a folder" in stops(data.load_seeds, "prompts")
    assert "'results/reference' is a folder" in stops(data.load_seeds, "results/reference")
    assert "benign" in stops(data.load_seeds, write_jsonl(tmp_path / "h.jsonl", GOOD[:1]))
    assert "harmful" in stops(data.load_seeds, write_jsonl(tmp_path / "b.jsonl", GOOD[1:2]))


@pytest.mark.parametrize("split", ["held_back", "tests", ""])
def test_another_split_stops(tmp_path, split):
    """The one that a caller asks for, as well as a line's."""
    path = write_jsonl(tmp_path / "s.jsonl", GOOD)
    message = stops(data.load_seeds, path, split)
    assert "train, dev or test" in message and repr(split) in message


def test_load_seeds_from_the_hub(monkeypatch):
    """WildJailbreak's columns: the vanilla rows, harmful by data_type."""
    import datasets
    rows = [dict(data_type="vanilla_harmful", vanilla="<a>", adversarial=""),
            dict(data_type="adversarial_harmful", vanilla="<b>", adversarial="<c>"),
            dict(data_type="vanilla_benign", vanilla="<d>", adversarial="")]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    seeds = data.load_seeds("allenai/wildjailbreak")
    assert column(seeds, "id") == ["wildjailbreak-1", "wildjailbreak-3"]
    assert column(seeds, "prompt") == ["<a>", "<d>"]
    assert column(seeds, "harmful") == [True, False]
    [(words, options)] = asked
    assert words[0] == "allenai/wildjailbreak" and options["split"] == "train"


def test_a_hub_that_does_not_give_the_seeds(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = stops(data.load_seeds, "nobody-at-all/no-such-data")
    assert "nobody-at-all/no-such-data" in message and "ConnectionError" in message


def test_a_hub_that_is_not_there_is_asked_once(monkeypatch):
    """load_dataset() itself tries six times and waits 23 seconds between."""
    import datasets
    import huggingface_hub
    asked = []

    def fail(self, name, timeout):
        asked.append((name, timeout))
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was asked"))
    assert "ConnectionError" in stops(data.load_seeds, "somebody/some-data")
    assert asked == [("somebody/some-data", 5)]


# ---- logs ----------------------------------------------------------------------------------------

def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"id": "2"}\n{"id": "3", "answ')
    assert data.read_rows(path) == [{"id": "1"}, {"id": "2"}]
    assert path.read_bytes() == b'{"id": "1"}\n{"id": "2"}\n'
    path.write_bytes(b'{"id"')
    assert data.read_rows(path) == [] and path.read_bytes() == b""
    assert data.read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", [0, 1, 25, 60, 100])
def test_a_file_resumed_from_any_byte_is_the_same(tmp_path, cut):
    batches = chunks([dict(id=str(n)) for n in range(7)], 3)
    asked = []

    def work(number, batch):  # what a row holds depends on its batch, as bfloat16 does
        asked.append([item["id"] for item in batch])
        return [dict(id=item["id"], batch=number, others=len(batch)) for item in batch]

    path = tmp_path / "a.jsonl"
    data.append_missing(path, batches, work)
    whole = path.read_bytes()
    assert asked == [["0", "1", "2"], ["3", "4", "5"], ["6"]] and whole.count(b"\n") == 7

    path.write_bytes(whole[:len(whole) - cut])
    data.append_missing(path, batches, work)
    assert path.read_bytes() == whole


def test_the_digest_of_seeds_is_of_their_content(tmp_path, monkeypatch):
    """Of files and of hub datasets, where the name alone says nothing."""
    rows = [dict(prompt="a", harmful=True), dict(prompt="b", harmful=False)]
    one = data.seeds_digest(str(write_jsonl(tmp_path / "one.jsonl", rows)))
    assert one == data.seeds_digest(str(write_jsonl(tmp_path / "one.jsonl", rows)))
    other = [dict(prompt="a", harmful=True), dict(prompt="c", harmful=False)]
    assert one != data.seeds_digest(str(write_jsonl(tmp_path / "one.jsonl", other)))
    for table in (rows, other):
        monkeypatch.setattr(data, "_hub_seeds", lambda name: list(enumerate(table, 1)))
        other, one = one, data.seeds_digest("some/dataset")
    assert one != other
