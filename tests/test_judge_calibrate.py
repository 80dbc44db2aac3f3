"""judge_adapter/calibrate.py and score.py: known calibrations are found again, weights of rows,
cross-fitted figures."""
import json

import numpy
import pytest
import torch
from helpers import stops
from sklearn.metrics import f1_score

import judge
from judge import FIELDS
from judge_adapter import calibrate, score

WEIGHT = 1 / 3


def drawn(n=20000, seed=0):
    """Log-odds and labels with p = sigmoid(-.3 second + .5 third + .7)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g) * 4
    p = torch.sigmoid(x @ torch.tensor([0.0, -0.3, 0.5]) + 0.7)
    return x, (torch.rand(n, generator=g) < p).double()


def test_matrix_scaling_recovers_a_known_calibration():
    x, y = drawn()
    found = calibrate.matrix_scaling(x.tolist(), y.tolist(), (1, 1, 1), [1.0] * len(x))
    assert found["weights"] == pytest.approx([0.0, -0.3, 0.5], abs=0.03)
    assert found["bias"] == pytest.approx(0.7, abs=0.07)
    assert json.loads(json.dumps(found)) == found  # as it is stored


def test_a_line_that_is_not_used_has_weight_0():
    x, y = drawn()
    found = calibrate.matrix_scaling(x.tolist(), y.tolist(), (0, 0, 1), [1.0] * len(x))
    assert found["weights"][:2] == [0.0, 0.0] and found["weights"][2] > 0.3


def test_rows_of_no_weight_do_not_count():
    x, y = drawn()
    found = calibrate.matrix_scaling(x.tolist(), y.tolist(), (1, 1, 1), [1.0] * len(x))
    weighed = calibrate.matrix_scaling(x.repeat(2, 1).tolist(), torch.cat([y, 1 - y]).tolist(),
                                       (1, 1, 1), [1.0] * len(x) + [0.0] * len(x))
    assert weighed["weights"] == pytest.approx(found["weights"], abs=1e-3)


@pytest.mark.parametrize("spread", [4.0, 400.0])
def test_the_objective_is_the_stated_one(spread):
    """At the answer the gradient of sum n_i loss_i / sum n_i + PENALTY |w|^2 is 0, in float64, also
    where the rows are separable. The penalty does not depend on the number of rows."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(60, 3, generator=g) * 3).double()
    y = (torch.rand(60, generator=g) < torch.sigmoid(x[:, 2] * spread)).double()
    n = torch.rand(60, generator=g).double()
    found = calibrate.matrix_scaling(x.tolist(), y.tolist(), (1, 1, 1), n.tolist())
    w = torch.tensor([*found["weights"], found["bias"]], dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        x @ w[:3] + w[3], y, weight=n, reduction="sum") / n.sum()
    (loss + calibrate.PENALTY * w[:3].square().sum()).backward()
    assert w.grad.abs().max() < 1e-5
    again = calibrate.matrix_scaling(x.repeat(9, 1).tolist(), y.repeat(9).tolist(), (1, 1, 1),
                                     n.repeat(9).tolist())
    assert again["weights"] == pytest.approx(found["weights"], abs=1e-3)


@pytest.mark.parametrize("n", [2, 50])
def test_augmented_rows_weigh_a_third_of_the_real_ones(n):
    """Log-odds that say nothing: p is the weighed share of true labels, whatever the counts are."""
    real = dict(dict.fromkeys(FIELDS, True), source="a")
    made = dict(dict.fromkeys(FIELDS, False), source="aug_echo")
    found = calibrate.fit([real] * 10 + [made] * n, [[0.0, 0.0, 0.0]] * (10 + n), WEIGHT)
    for field in FIELDS:
        assert judge.calibrated([0.0] * 3, found[field]) == pytest.approx(0.75, abs=1e-3)


def test_a_label_that_only_augmented_rows_carry_is_calibrated_by_them():
    real = dict(dict.fromkeys(FIELDS, True), response_refusal=None, source="a")
    made = [dict(dict.fromkeys(FIELDS, False), source="aug_echo"),
            dict(dict.fromkeys(FIELDS, True), source="aug_echo")]
    found = calibrate.fit([real] * 4 + made * 2, [[0.0, 0.0, 0.0]] * 8, WEIGHT)
    assert judge.calibrated([0.0] * 3, found["response_refusal"]) == pytest.approx(0.5, abs=1e-3)


def test_each_label_moves_by_its_own_lines():
    rows, margins = labelled(80)
    found = calibrate.fit(rows, margins, WEIGHT)
    assert found["prompt_harmful"]["weights"][1:] == [0.0, 0.0]
    assert found["response_refusal"]["weights"][0] == 0.0
    assert found["prompt_harmful"]["weights"][0] > 0.5 < found["response_harmful"]["weights"][2]


def test_a_label_without_two_values_cannot_be_calibrated():
    rows = [dict(dict.fromkeys(FIELDS, True), source="a")] * 4
    assert "prompt_harmful" in stops(calibrate.fit, rows, [[1.0, 1.0, 1.0]] * 4, WEIGHT)


# ---- figures on held-out rows --------------------------------------------------------------------

def labelled(n):
    """n rows with each combination of labels in turn, half of them not labelled as refusals, and
    log-odds that carry the label exactly."""
    rows, margins = [], []
    for i in range(n):
        asked, harmful = bool(i // 2 % 2), bool(i // 4 % 2)
        rows.append(dict(prompt="x", response="y", prompt_harmful=asked,
                         response_refusal=not harmful if i < n / 2 else None,
                         response_harmful=harmful, source="a"))
        margins.append([3.0 if asked else -3.0, -3.0 if harmful else 3.0, 3.0 if harmful else -3.0])
    return rows, margins


def test_measured_figures():
    """Log-odds that carry the label score 1; slices and sources count their own rows alone."""
    rows, margins = labelled(80)
    made = dict(rows[0], source="aug_echo", prompt_harmful=True, response_refusal=None)
    rows, margins = rows + [made] * 4, margins + [[3.0, 3.0, -3.0]] * 3 + [[-3.0, 3.0, -3.0]]
    for asked in (True, True, False, False):
        rows.append(dict(prompt="x", response=None, prompt_harmful=asked, response_refusal=None,
                         response_harmful=None, source="promptonly_x"))
        margins.append([3.0 if asked else -3.0, 0.0, 0.0])
    out = score.held_out_scores(rows, margins, WEIGHT)
    labels = out["labels"]
    assert labels["prompt_harmful"]["f1"] == labels["response_harmful"]["f1"] == 1.0
    assert (labels["prompt_harmful"]["n"], labels["response_harmful"]["n"],
            labels["response_refusal"]["n"]) == (84, 80, 40)
    # before: |p - 0| and |p - 1| with p = sigmoid(-+3) = .0474 and .9526
    assert labels["response_harmful"]["ece_before"] == pytest.approx(0.0474, abs=1e-4)
    assert [n for *_, n in labels["response_harmful"]["reliability_before"]] == [40, 40]
    assert out["sources"] == {"promptonly_x": dict(n=4, positives=2, f1=1.0, precision=1.0,
                                                   recall=1.0, auc=1.0)}
    # one of the four requests is called harmless
    assert out["slices"] == {"echo": dict(n=4, prompt_harmful=0.75, response_harmful=1.0)}
    assert json.loads(json.dumps(out)) is not None


def test_measured_figures_are_cross_fitted():
    """Log-odds of the odd rows shifted: each half is judged by the calibration of the other."""
    rows, margins = labelled(80)
    assert score.held_out_scores(rows, margins, WEIGHT)["labels"]["prompt_harmful"]["f1"] == 1.0
    for line in margins[1::2]:
        line[0] += 100.0
    assert score.held_out_scores(rows, margins, WEIGHT)["labels"]["prompt_harmful"]["f1"] < 0.8


@pytest.mark.parametrize("missing", [[], ["response_refusal"], ["response_refusal",
                                                               "response_harmful"]])
def test_the_picture_is_drawn(tmp_path, missing):
    """Also of data in which no real row carries some label: only augmented rows do."""
    rows, margins = labelled(80)
    made = [dict(r, source="aug_x") for r in rows]
    for row in rows:
        row.update(dict.fromkeys(missing))
    labels = score.held_out_scores(rows + made, margins * 2, WEIGHT)["labels"]
    assert set(labels) == set(FIELDS) - set(missing)
    score.draw_reliability(tmp_path / "x.png", labels)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


# ---- thresholds ----------------------------------------------------------------------------------

def scores_of(n, shift, seed=0):
    """Labels and numbers in [0, 1] that tell them apart best at 0.5 + shift."""
    rng = numpy.random.default_rng(seed)
    gold = rng.random(n) < 0.4
    return gold, numpy.clip(0.5 + shift + (gold - 0.5) * 0.3 + rng.normal(0, 0.1, n), 0, 1)


def test_the_threshold_is_half_where_another_is_better_by_chance_only():
    chosen, best = [], []
    for seed in range(20):
        gold, p = scores_of(200, 0.0, seed)
        chosen.append(calibrate.choose_threshold(gold.tolist(), p.tolist()))
        best.append(calibrate.best_threshold(gold, p))
    assert chosen.count(0.5) >= 18 and best.count(0.5) == 0


def test_a_threshold_that_is_better_is_taken():
    gold, p = scores_of(1000, 0.2)
    best = calibrate.best_threshold(gold, p)
    assert calibrate.choose_threshold(gold, p) == best and abs(best - 0.7) < 0.1
    assert calibrate.f1(gold, p > best) == pytest.approx(f1_score(gold, p > best))
    assert calibrate.f1(gold & False, gold & False) == 0
