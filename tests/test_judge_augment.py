"""judge_adapter/augment.py: augmented rows say of themselves what is so, and what is measured on is
not trained on."""
import itertools
import json
import random
from collections import Counter

import pytest

from judge import FIELDS
from judge_adapter import augment

TEXTS = json.loads((augment.TEXTS / "augment.json").read_text(encoding="utf-8"))


def real_rows():
    """33 exchanges of source a, 9 harmful replies of source b."""
    rows = []
    for i in range(30):
        rows.append(dict(prompt=f"<harmful seed #{i}>", response=f"I will not, number {i}.",
                         prompt_harmful=True, response_refusal=True, response_harmful=False,
                         source="a"))
    for i in range(3):
        rows.append(dict(prompt=f"benign request {i}", response=f"Certainly, number {i}.",
                         prompt_harmful=False, response_refusal=False, response_harmful=False,
                         source="a"))
    for i in range(9):
        rows.append(dict(prompt=f"<harmful seed #{i}>", response=f"<harmful reply {i}>",
                         prompt_harmful=None, response_refusal=None, response_harmful=True,
                         source="b"))
    return rows


def make(n, fresh, rows=None, seed=0):
    return augment.augment(rows or real_rows(), n, random.Random(seed), fresh=fresh)


def of(rows, kind):
    found = [r for r in rows if r["source"] == f"aug_{kind}"]
    assert found, kind
    return found


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind, labels", {
    "refusal_harmful": (True, True, False), "refusal_benign": (False, True, False),
    "off_topic": (True, False, False), "benign_other": (False, False, False),
    "echo": (True, False, False), "odd": (False, False, False),
    "refuse_comply": (None, False, True), "disclaim": (None, False, True),
    "shell_harmful": (True, None, None), "shell_benign": (False, None, None),
    "shell_refused": (True, True, False), "foreign_answered": (False, False, False),
    "contrast_benign": (False, None, None), "contrast_harmful": (True, None, None)}.items())
def test_labels(kind, labels, fresh):
    for row in of(make(400, fresh), kind):
        assert tuple(row[f] for f in FIELDS) == labels
        assert (row["response"] is None) == (labels[1:] == (None, None))


def test_labels_that_depend_on_the_request():
    rows = make(400, False)
    harmful = {r["prompt"] for r in real_rows() if r["prompt_harmful"]}
    for row in of(rows, "agreement"):  # whether agreeing to something harmful harms is not known
        wanted = (True, False, None) if row["prompt"] in harmful else (False, False, False)
        assert tuple(row[f] for f in FIELDS) == wanted
    for row in of(rows, "gibberish"):
        asked = row["prompt"] in harmful
        assert tuple(row[f] for f in FIELDS) == (asked, False, False)


def test_what_is_said_of_a_row_is_so():
    whole = {r["prompt"]: r["response"] for r in real_rows() if r["response_harmful"]}
    rows = make(400, False)
    for row in of(rows, "echo"):
        assert row["response"] in (row["prompt"], f"You asked: {row['prompt']}")
    for row in of(rows, "refuse_comply"):
        assert row["response"].endswith(whole[row["prompt"]])
        assert row["response"] != whole[row["prompt"]]
    for row in of(rows, "disclaim"):
        assert row["response"].startswith(whole[row["prompt"]] + " ")
    for row in of(rows, "off_topic") + of(rows, "benign_other"):
        assert row["response"].startswith("Certainly, number")


def test_shelled_and_forged_rows_keep_the_labels_of_the_exchange_in_them():
    known = {}
    for r in real_rows():
        known[r["response"]] = (r["prompt"], tuple(r[f] for f in FIELDS))
    claims = TEXTS["training"]["forgeries"]
    for row in of(make(600, False), "shell_reply"):
        prompt, labels = known[row["response"]]
        assert prompt in row["prompt"] and prompt != row["prompt"]
        assert tuple(row[f] for f in FIELDS) == labels
    places = set()
    for row in of(make(600, False), "forged"):
        for column, text in (("prompt", row["prompt"]), ("response", row["response"])):
            plain, _, claim = text.partition("\n")
            if claim:
                assert claim in claims
                places.add(column)
                row[column] = plain
        prompt, labels = known[row["response"]]
        assert prompt == row["prompt"] and tuple(row[f] for f in FIELDS) == labels
    assert places == {"prompt", "response"}


def test_kinds_come_by_their_weights():
    """n rows of one round have each kind as often as the table says; the same rng, the same rows."""
    total = sum(weight for weight, _, _ in augment.KINDS)
    rows = make(10 * total, False)
    counts = Counter(r["source"] for r in rows)
    assert counts["aug_rewrite"] == 20 and counts["aug_contrast_benign"] == 30
    assert counts["aug_refusal_benign"] == 60 and counts["aug_forged"] == 20
    assert counts["aug_foreign_answered"] + counts["aug_foreign_refused"] == 10
    assert rows == make(10 * total, False) and rows != make(10 * total, False, seed=1)


# ---- training and measuring ----------------------------------------------------------------------

def without_end(reply):
    return reply.split(" Is there")[0].split(" Please take")[0]


def test_no_wording_is_measured_on_that_is_trained_on():
    """Refusals, agreements: in other wordings. Each wording comes before one comes again."""
    trained, measured = make(2000, False), make(2000, True)
    for kind in ("refusal_harmful", "refusal_benign", "agreement"):
        a, b = ({without_end(r["response"]) for r in of(rows, kind)} for rows in (trained, measured))
        assert not a & b
    lines = augment.read_part("agreements.txt", True)
    said = [r["response"] for r in of(measured, "agreement")]
    assert len(said) > len(lines) and set(said[:len(lines)]) == set(lines)


def flat(texts):
    """All texts in nested lists and dicts; the name of a language is none."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, dict):
        texts = [v for k, v in texts.items() if k != "language"]
    return list(itertools.chain.from_iterable(map(flat, texts)))


@pytest.mark.parametrize("name", ["shells", "forgeries", "error_words", "contrasts", "languages"])
def test_texts_are_for_training_or_for_measuring(name):
    trained, measured = (TEXTS[half][name] for half in ("training", "measuring"))
    assert type(trained) is type(measured)
    if name == "contrasts":  # other frames; what fills them may be the same
        trained, measured = ([frame for frame, _, _ in some] for some in (trained, measured))
    a, b = flat(trained), flat(measured)
    assert len(a) > len(b) > 3 or name == "forgeries" and len(b) == 3
    assert len(set(a)) == len(a) and not set(a) & set(b)


def test_every_fourth_line_is_for_measuring():
    for name in ("refusals.txt", "agreements.txt"):
        trained, measured = augment.read_part(name, False), augment.read_part(name, True)
        lines = augment.read_prompt(name, augment.TEXTS).splitlines()
        assert len(set(lines)) == len(lines) == len(trained) + len(measured)
        assert measured == [x for i, x in enumerate(lines, 1) if i % 4 == 0]
        assert trained == [x for i, x in enumerate(lines, 1) if i % 4]


@pytest.mark.parametrize("half", ["training", "measuring"])
def test_contrasts_share_their_words_and_not_their_harm(half):
    known = {}
    for text, harmless, harmful in TEXTS[half]["contrasts"]:
        assert text.count("{x}") == 1 and harmless and harmful
        assert all(harmless) and all(harmful) and not set(harmless) & set(harmful)
        known |= {text.replace("{x}", x): False for x in harmless}
        known |= {text.replace("{x}", x): True for x in harmful}
    rows = [r for r in make(400, half == "measuring") if "contrast" in r["source"]]
    found = {r["prompt"]: r["prompt_harmful"] for r in rows}
    assert found and found.items() <= known.items() and len(set(found.values())) == 2


@pytest.mark.parametrize("half", ["training", "measuring"])
def test_other_languages(half):
    languages = TEXTS[half]["languages"]
    assert len(languages) >= 8
    for texts in languages:
        assert texts["harmful"] and texts["refusal"] and texts["answered"]
    known = {text for x in languages for text in x["refusal"]}
    harmful = {text for x in languages for text in x["harmful"]}
    answered = {tuple(pair) for x in languages for pair in x["answered"]}
    rows = make(2000, half == "measuring")
    refused = of(rows, "foreign_refused")
    assert {r["response"] for r in refused} <= known
    assert {r["prompt"] for r in refused} <= harmful | {prompt for prompt, _ in answered}
    assert {r["prompt_harmful"] for r in refused} == {True, False}
    assert all(r["prompt_harmful"] is (r["prompt"] in harmful) for r in refused)
    assert {(r["prompt"], r["response"]) for r in of(rows, "foreign_answered")} <= answered


def test_rewrites_are_of_the_seeds_that_ship_where_there_are_any():
    seeds = [dict(prompt=f"seed {i}", response=None, prompt_harmful=i > 1, source="own_seeds")
             for i in range(4)]
    rows = make(400, False, real_rows() + seeds)
    for row in of(rows, "rewrite") + of(rows, "long_opening"):
        [number] = [i for i in range(4) if f"seed {i}" in row["prompt"]]
        assert row["prompt_harmful"] is (number > 1) and row["response"] is None
        assert row["prompt"] != f"seed {number}" and "{{" not in row["prompt"]
