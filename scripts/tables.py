"""The tables that scripts.compare prints: entries beside the first, and how soon they get there.

rows: {name of an entry: {seed: line of the file of results}}.
"""

import collections
import json
import math
import shlex

import numpy as np

from train import require

# ---- The table -----------------------------------------------------------------------------------


def paired(differences):
    """(mean, its standard error) of a difference per seed; nan where there are too few."""
    count = len(differences)
    mean = float(np.mean(differences)) if count else math.nan
    error = float(np.std(differences, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return mean, error


def p_of(t, df):
    """Two-sided p of Student's t: the share of cos^(df - 1) beyond the angle atan(t / sqrt(df))."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    weights = np.cos(angles) ** (df - 1)
    is_beyond = angles > math.atan(abs(t) / math.sqrt(df))
    return float(weights[is_beyond].sum() / weights.sum())


def judge(gains):
    """({name: verdict}, a sentence that says how) of {name: [a difference per seed]}.

    Few seeds tell little of one entry's noise, so its standard error counts as at least that of the
    whole list. There are as many comparisons as entries, so p is judged by their number
    (Bonferroni).
    """
    how = "Differences are between runs of the same seed: mean ± standard error."
    verdicts = dict.fromkeys(gains, "-")
    many = {name: own for name, own in gains.items() if len(own) > 1}
    if not many:
        return verdicts, how
    df = sum(len(own) - 1 for own in many.values())
    squares = sum(float(np.var(own)) * len(own) for own in many.values())
    pooled = math.sqrt(squares / df)
    for name, own in many.items():
        mean, error = paired(own)
        error = max(error, pooled / math.sqrt(len(own)))
        t = mean / error if error else math.inf
        verdicts[name] = "not seen at this scale"
        if p_of(t, df) < 0.05 / len(many):
            verdicts[name] = "helps" if mean > 0 else "hurts"
    how += (
        f" helps, hurts: two-sided p < 0.05 / {len(many)}, by Student's t ({df} degrees of "
        f"freedom) over the larger of that error and the list's, {pooled:.4f} / sqrt(n)."
    )
    return verdicts, how


def without_errors(rows):
    """{name: {seed: line}} of the runs that did not fail."""
    good = {}
    for name, own in rows.items():
        good[name] = {seed: row for seed, row in own.items() if "error" not in row}
    return good


def mean_loss(runs):
    """Over the seeds of one entry; infinite where there are none."""
    losses = [row["val_loss"] for row in runs.values()]
    return float(np.mean(losses)) if losses else math.inf


def gains_of(good, base, sense):
    """{name: [what a run has more than base's of the same seed, times sense]}."""
    gains = {}
    for name, own in good.items():
        both = sorted(own.keys() & good[base].keys())
        losses = [(own[seed]["val_loss"], good[base][seed]["val_loss"]) for seed in both]
        gains[name] = [sense * (loss - base_loss) for loss, base_loss in losses]
    return gains


def time_key(good):
    """Which time is compared. An accelerator works while the CPU waits."""
    rows = [row for own in good.values() for row in own.values()]
    return "cpu_time_s" if all(" cpu," in row["devices"] for row in rows) else "train_time_s"


def cells_of(rows, own, base, gains, key):
    """What a table's row says of an entry's runs. own, base: those and base's, without failures."""
    num_failed = len(rows) - len(own)
    both = own.keys() & base.keys()
    difference, error = paired(gains)
    gain = time = "-"
    if own is not base and both:
        gain = f"{difference:+.4f}" + (f" ± {error:.4f}" if len(both) > 1 else "")
        gain += f" (n={len(both)})"
    total = sum(base[seed][key] for seed in both)
    if total:
        time = f"{sum(own[seed][key] for seed in both) / total:.2f}"
    return [
        f"{len(own)}" + (f" ({num_failed} failed)" if num_failed else ""),
        f"{mean_loss(own):.4f}" if own else "-",
        gain,
        time,
        next((str(row["params"]) for row in own.values()), "-"),
    ]


def lines_of(head, rows):
    """A table in markdown."""
    lines = []
    for cells in [head, ["---"] * len(head), *rows]:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def best_first(entries, rows):
    """The entries, the least mean loss first."""
    good = without_errors(rows)
    return sorted(entries, key=lambda entry: mean_loss(good[entry.name]))


def table_of(comparison, rows):
    """Markdown: each entry against the first. rows: {name: {seed: line}}."""
    entries, common, sense = comparison
    base = entries[0].name
    good = without_errors(rows)
    gains = gains_of(good, base, sense)
    del gains[base]
    verdicts, how = judge(gains)
    key = time_key(good)
    kind = "CPU time" if key == "cpu_time_s" else "train time"
    head = ["variant", "n", "mean val loss", "gain", f"{kind} / first", "parameters", "verdict"]
    cells = []
    for entry in entries:
        name = entry.name
        variant = f"{name}: `{entry.own}`" if entry.own else name
        found = cells_of(rows[name], good[name], good[base], gains.get(name, []), key)
        cells.append([variant, *found, verdicts.get(name, "-")])
    said = f"Flags of all: `{shlex.join(common)}`"
    meaning = "Gain: the loss without a technique minus the loss with it."
    return "\n".join([said, "", *lines_of(head, cells), "", f"{meaning} {how}"])


def mixtures(rows):
    """Yield warnings of lines that are no fair comparison: of several sources, data or versions."""
    kinds = {
        "source_sha256": "sources of train.py (--same_source runs the others again)",
        "data": "data",
        "versions": "versions of Python and packages",
    }
    for key, what in kinds.items():
        count = len({json.dumps(row[key]) for row in rows if key in row})
        if count > 1:
            yield f"warning: these runs are of {count} different {what}"
    diffs = collections.defaultdict(set)
    for row in rows:
        if "patched_sha256" in row:
            diffs[row["name"], str(row.get("source_sha256"))].add(str(row["patched_sha256"]))
    for (name, _), made in diffs.items():
        if len(made) > 1:
            yield f"warning: the runs of {name} are of different diffs"


def unlike_processors(rows, base):
    """Yield warnings of runs on another CPU than base's of the same seed.

    A CPU sums bfloat16 in an order of its own, so another one is like another seed.
    """
    for name, runs in rows.items():
        for seed, row in runs.items():
            other = rows[base].get(seed, row)
            own, theirs = (one.get("processor") or "an unnamed CPU" for one in (row, other))
            if own != theirs and "error" not in row | other:
                where = f"{name}, seed {seed}, ran on {own}, {base} on {theirs}"
                yield f"warning: {where}: no pair"


def notes_of(rows, base):
    """Lines that the table's reader must see."""
    every = [row for own in rows.values() for row in own.values()]
    failed = [row for row in every if "error" in row]
    notes = [f"failed: {row['name']}, seed {row['seed']}: {row['error']}" for row in failed]
    return [*notes, *mixtures(every), *unlike_processors(rows, base)]


# ---- How soon ------------------------------------------------------------------------------------


def curve(own):
    """(tokens, mean losses) of each evaluation, over the seeds of an entry; ([], []) of none."""
    curves = [row["val"] for row in own.values() if row.get("val")]
    if not curves:
        return [], []
    tokens = [tokens for _, tokens, _ in curves[0]]
    for rows in curves:
        are_alike = [row[1] for row in rows] == tokens
        require(are_alike, "--reach: the runs of an entry were evaluated after unlike tokens")
    return tokens, np.mean(curves, axis=0)[:, 2].tolist()


def tokens_to(target, tokens, losses):
    """Tokens at which a curve, straight between evaluations, first is at target; None if never."""
    for i, loss in enumerate(losses):
        if loss <= target and i == 0:
            return tokens[0]
        if loss <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return tokens[i - 1] + share * (tokens[i] - tokens[i - 1])
    return None


def reach(name, rows):
    """Markdown: when each entry's mean curve reaches the final loss of `name`.

    Raises UsageError.
    """
    tokens, losses = curve(rows.get(name, {}))
    require(tokens, f"--reach={name}: wanted an entry that has a finished run")
    total = tokens[-1]
    target = losses[-1]
    head = ["name", f"tokens to {target:.4f}, the final loss of {name}", f"share of its {total}"]
    cells = []
    for other, own in rows.items():
        at = tokens_to(target, *curve(own))
        found = ["not reached", "-"] if at is None else [f"{at:.0f}", f"{at / total:.3f}"]
        cells.append([other, *found])
    return "\n".join(lines_of(head, cells))
