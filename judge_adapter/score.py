"""Figures of the judge on held-out rows, and the picture of its calibration."""
import numpy
import pandas
from matplotlib.figure import Figure

from evaluation.scores import binary_scores, reliability
from judge import FIELDS, calibrated
from judge_adapter.calibrate import fit


def measure(rows, margins, augmented_weight):
    """Held-out rows and their log-odds [N][3] -> dict of three tables, also printed: labels (on the
    real rows, with the reliability before and after calibration), sources (the request's harm by
    source of prompts), slices (share of right labels by kind of augmented rows). The calibration of
    a row comes from the half of the rows that it is not in."""
    halves = [fit(rows[k::2], margins[k::2], augmented_weight) for k in (1, 0)]
    table, out = pandas.DataFrame(rows), dict(labels={}, sources={}, slices={})
    for k, field in enumerate(FIELDS):
        table[f"p_{field}"] = [calibrated(m, halves[i % 2][field]) for i, m in enumerate(margins)]
        table[f"raw_{field}"] = 1 / (1 + numpy.exp(-numpy.array(margins)[:, k]))
        real = table[table[field].notna() & ~table.source.str.startswith("aug_")]
        if real.empty:
            continue
        before = reliability(real[field], real[f"raw_{field}"])
        after = reliability(real[field], real[f"p_{field}"])
        out["labels"][field] = dict(_scores(real, field), ece_before=before[0], ece_after=after[0],
                                    reliability=after[1], reliability_before=before[1])
    for source, some in table.groupby("source"):
        if source.startswith("promptonly_"):
            out["sources"][source] = _scores(some.dropna(subset="prompt_harmful"), "prompt_harmful")
        if source.startswith("aug_"):
            out["slices"][source[4:]] = right = dict(n=len(some))
            for field in FIELDS:
                known = some.dropna(subset=field)
                if len(known):
                    right[field] = float(((known[f"p_{field}"] > 0.5) == known[field]).mean())
    for name, figures in out.items():
        text = pandas.DataFrame.from_dict(figures, "index").drop(
            columns=["reliability", "reliability_before"], errors="ignore")
        print(f"\nheld out, {name}:\n{text.to_string(float_format='%.3f', na_rep='')}")
    return out


def _scores(known, field):
    p = known[f"p_{field}"]
    return binary_scores(known[field].astype(bool), p > 0.5, p)


def draw_reliability(path, labels):
    """Share of true labels against mean p, before and after calibration; a dot's area is its n."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, len(labels), squeeze=False)[0]
    for axis, (field, x) in zip(axes, labels.items()):
        axis.plot([0, 1], [0, 1], color="0.7", lw=1)
        for when, bins, color in (("before", x["reliability_before"], "#D55E00"),
                                  ("after", x["reliability"], "#0072B2")):
            mean, share, n = numpy.transpose(bins)
            axis.plot(mean, share, color=color, lw=1, label=f"{when}: ECE {x['ece_' + when]:.3f}")
            axis.scatter(mean, share, s=4 + 200 * n / x["n"], color=color, alpha=0.5)
        axis.set(title=f"{field} (n {x['n']}, held out)", xlabel="p of the judge",
                 ylabel="share that people labelled so")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
