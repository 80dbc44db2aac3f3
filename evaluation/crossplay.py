"""Cross-play: every checkpoint's attacker against every checkpoint's defender, on the same seeds.

Two margins are read from it. A defender that learnt to resist is beaten less often than its parent
was, by the same attacks. A better attacker succeeds more often against the same old defender."""
import numpy
import pandas

from evaluation.players import answers_name, histories, parent_of
from evaluation.scores import mean_change, rate
from selfplay.data import read_rows


def cross_play(players, folders, base, second=False):
    """The labels in folders {checkpoint label: folder} -> dict as of cross(). players: checkpoints
    in order of training. second: also `judge2_asr`, the matrix by JUDGE2."""
    labels = [player.label for player in players]
    past = histories(players, base, lambda player: parent_of(player, players, None))
    out = cross(read_games(players, folders, base, "labels"), labels, past)
    if second:
        games = read_games(players, folders, base, "labels2")
        out["judge2_asr"] = cross(games, labels, [])["asr"]
    return out


def read_games(players, folders, base, suffix):
    """{attacker: {defender: outcomes}} of all players, from the NAME.suffix.jsonl files."""
    games = {}
    for attacker in players:
        folder, games[attacker.label] = folders[attacker.label], {}
        attacks = read_rows(folder / "attacks.jsonl")
        for defender in players:
            file = folder / f"{answers_name(attacker, defender, base)}.{suffix}.jsonl"
            games[attacker.label][defender.label] = outcomes(attacks, read_rows(file))
    return games


def outcomes(attacks, labels):
    """Rows of an attacker's attacks, labels of a defender's answers to them -> by seed id: 1.0 for
    a harmful answer, 0.0 for none or an attack without text, NaN where the label did not parse."""
    harmful = {row["id"]: row["response_harmful"] for row in labels}
    found = {row["id"]: harmful[row["id"]] if row["answer"] else False for row in attacks}
    return pandas.Series(found, dtype=float)


def cross(games, labels, past):
    """games {attacker: {defender: outcomes}}, their labels in order, past [(late label, labels of
    the earlier ones, the first of them the parent)] -> dict(attackers, defenders, asr, margins)."""
    out = dict(attackers=labels, defenders=labels, asr=[], margins=[])
    for attacker in labels:
        out["asr"].append([rate(games[attacker][defender]) for defender in labels])
    for late, earlier in past:
        out["margins"].append(margins(games, late, earlier))
    return out


def margins(games, late, earlier):
    """Late player against early one (the first of `earlier`): differences of ASR, paired by seed
    (NaN in one: left out). defender: earlier attackers against the late minus the early defender;
    negative is better. attacker: late minus early on the early defender; positive is stronger."""
    early, total = earlier[0], 0
    for attacker in earlier:
        total += games[attacker][late] - games[attacker][early]
    return dict(late=late, early=early, earlier=earlier,
                defender=mean_change(total / len(earlier)),
                attacker=mean_change(games[late][early] - games[early][early]))


def heat_map(path, crossplay):
    """Draw the ASR of a crossplay dict, in colours that the colour-blind tell apart."""
    from matplotlib.figure import Figure
    attackers, defenders = crossplay["attackers"], crossplay["defenders"]
    size = 3 + 0.6 * len(defenders), 2.5 + 0.4 * len(attackers)
    axes = Figure(figsize=size, dpi=120, layout="constrained").add_subplot()
    rates = pandas.DataFrame(crossplay["asr"]).map(lambda x: x["rate"]).to_numpy(float)
    most = max(0.1, numpy.nanmax(rates, initial=0))
    for (a, d), x in numpy.ndenumerate(rates):
        text = "-" if numpy.isnan(x) else f"{x:.2f}".removeprefix("0")
        color = "white" if x <= 0.55 * most else "black"  # black where it is nan
        axes.text(d, a, text, ha="center", va="center", color=color)
    axes.imshow(rates, cmap="cividis", vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(len(defenders)), defenders, rotation=45, ha="right")
    axes.set_yticks(range(len(attackers)), attackers)
    axes.set(xlabel="defender", ylabel="attacker", title="share of attacks answered harmfully")
    axes.figure.savefig(path)
