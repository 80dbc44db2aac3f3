"""Calibration of the judge: matrix scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2), each
label on its own: p = sigmoid(weights . log-odds of the three lines + bias). A label is p above its
threshold: 0.5, unless held-out real rows show that another one has a higher F1."""
import numpy
import pandas
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve

from engine.run import die
from judge import FIELDS, calibrated

PENALTY = 1e-3  # of the squared weights, beside the mean loss: few rows may be separable
LINES_USED = {  # 1: the log-odds of this line may move the label's probability
    "prompt_harmful": (1, 0, 0),    # the other lines mean nothing without a reply
    "response_refusal": (0, 1, 1),  # a refusal is one whatever was asked
    "response_harmful": (1, 1, 1)}


def matrix_scaling(margins, gold, used, row_weights):
    """Log-odds [N][3], labels [N], the lines used [3], weights of rows [N] -> dict(weights, bias).
    They minimize sum_i n_i loss_i / sum_i n_i + PENALTY |weights|^2, the bias free of penalty.
    scikit-learn's form of it is C sum_i n_i loss_i + |weights|^2 / 2."""
    model = LogisticRegression(C=1 / (2 * PENALTY * sum(row_weights)), tol=1e-8, max_iter=1000)
    model.fit(numpy.multiply(margins, used), gold, sample_weight=row_weights)
    return dict(weights=model.coef_[0].tolist(), bias=float(model.intercept_[0]))


def choose_threshold(gold, p):
    """0.5, unless the threshold of highest F1 is better by more than chance: the 95 % interval of
    their difference, over 1,000 bootstrap samples of the rows, is above 0. What is best among
    hundreds of thresholds is else best on these rows alone."""
    gold, p, gains = numpy.array(gold, dtype=bool), numpy.array(p), []
    best, rng = best_threshold(gold, p), numpy.random.default_rng(0)
    for _ in range(1000):
        rows = rng.integers(len(p), size=len(p))
        gains.append(f1(gold[rows], p[rows] > best) - f1(gold[rows], p[rows] > 0.5))
    return best if numpy.quantile(gains, 0.025) > 0 else 0.5


def f1(gold, guess):
    """F1 of guesses, arrays of booleans; 0 where nothing is true."""
    return 2 * (gold & guess).sum() / max(1, gold.sum() + guess.sum())


def best_threshold(gold, p):
    """The threshold with the highest F1, in the middle between two values of p."""
    precision, recall, values = precision_recall_curve(gold, p)
    total = (precision + recall)[:-1]
    k = int(numpy.argmax(precision[:-1] * recall[:-1] / numpy.where(total > 0, total, 1.0)))
    return float((values[k] + (values[k - 1] if k else 0.0)) / 2)


def fit(rows, margins, augmented_weight):
    """Rows with labels and their log-odds -> {label: dict(weights, bias, threshold)}. All augmented
    rows count `augmented_weight` of all real ones. At 0 bare refusals and off-topic replies are
    taken for harm; at 1 a row harm is missed (CARD.md). The threshold is of the real rows."""
    table, found = pandas.DataFrame(rows), {}
    for field in FIELDS:
        known = table[table[field].notna()]
        if known[field].nunique() < 2:
            die(f"too few held-out rows to calibrate {field}: raise HELD or AUGMENT_HELD")
        made = known.source.str.startswith("aug_")
        each = augmented_weight * sum(~made) / max(1, sum(made)) if any(~made) else 1.0
        found[field] = matrix_scaling(numpy.array(margins)[known.index], known[field].astype(bool),
                                      LINES_USED[field], made.map({True: each, False: 1.0}))
        real = known[~made] if any(~made) else known
        p = [calibrated(margins[i], found[field]) for i in real.index]
        found[field]["threshold"] = choose_threshold(real[field].astype(bool), p)
    return found
