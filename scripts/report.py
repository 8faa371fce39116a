"""Runs as one page to look at: losses, rates, seeds, what differs.

    pip install -r scripts/requirements.txt
    python -m scripts.report logs/20260101T000000Z-abcdef
    python -m scripts.report records/cpu/2026-*/ logs/*Z-* --out=all.html

RUN is a run's folder, finished or not, a record's folder, or a log in one. The page asks for
nothing over the network, and is light or dark as its reader likes it. Beside it lie its losses for
a README, as .svg and .png.

Runs of one program, config, data, versions and kind of machine are one curve, whatever their seeds:
the mean over the finished ones, step by step, and a band from the lowest to the highest. A curve
has the name of its first run's folder: rename the folder, and the curve is renamed.

Exit code 2: no run there, a damaged line, a missing package.

The same numbers in TensorBoard (pip install tensorboardX) or Weights & Biases (pip install wandb):

    import json, pathlib; run = pathlib.Path("logs/20260101T000000Z-abcdef")
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]

    from tensorboardX import SummaryWriter
    with SummaryWriter(f"tensorboard/{run.name}") as writer:
        for row in rows:
            for name, value in row.items(): writer.add_scalar(name, value, row["step"])

    import wandb
    config = json.loads((run / "config.json").read_text())["config"]
    with wandb.init(project="speedrun-jax", name=run.name, config=config) as board:
        for row in rows: board.log(row, step=row["step"])
"""

import argparse
import hashlib
import html
import io
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts import verify_record
from scripts.files import NotText, read_text, write_whole
from scripts.verify_record import (
    BAR,
    DAMAGED,
    DATA_FILE,
    is_number,
    parse_step,
    read_config,
    read_schedule,
)
from train import MAY_DIFFER, UsageError, command, require

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except (ImportError, ValueError) as error:  # ValueError: MPLBACKEND is none
    matplotlib = None
    WHY = str(error)
else:
    WHY = ""

OF_A_RUN = MAY_DIFFER - {"attention"}  # fields that may differ within a curve
OF_A_RUN |= verify_record.MAY_DIFFER
LOSSES = ("train_loss", "val_loss")
PANELS = {  # fields of a row
    "lr": "Learning rate, as a multiple of each weight's own",
    "step_ms": "Step time, ms",
    "tokens_per_s": "Speed, tokens per second",
    "mfu": "Model FLOPs utilization, of the devices' peak",
}


# ---- Runs ----------------------------------------------------------------------------------------


def printable(name):
    """A file's name, which may hold bytes that are no text, or what no page can hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


class Run(NamedTuple):
    path: Path  # its log
    config: dict  # {field: value}
    facts: dict  # of the log's head: devices, versions, and hashes of program and data
    rows: list  # of metrics.jsonl, or as many columns as a log has; one per written step
    done: bool  # it came to its end

    @property
    def folder(self):
        """Its folder's name, a record's without the date."""
        return printable(re.sub(r"^\d{4}-\d\d-\d\d_", "", self.path.parent.name))

    @property
    def val_losses(self):
        """[(loss, seconds of training)]"""
        return [(row["val_loss"], row["train_time_s"]) for row in self.rows if "val_loss" in row]

    @property
    def to_target(self):
        """Seconds of training until an evaluation was at the target or below, or None."""
        target = float(self.config["target_loss"])
        return next((seconds for loss, seconds in self.val_losses if loss <= target), None)

    @property
    def shared(self):
        """{name: value} of what runs of one curve have in common."""
        config = {name: value for name, value in self.config.items() if name not in OF_A_RUN}
        return self.facts | config


def add_row(rows, row):
    """A resumed run writes steps again: what stood there from this step on does not count."""
    while rows and rows[-1]["step"] >= row["step"]:
        rows.pop()
    rows.append(row)


def row_of(step, schedule):
    """A row as in metrics.jsonl, of a step line."""
    row = {
        "step": int(step.step),
        "tokens": schedule.tokens(int(step.step)),
        "train_time_s": step.train_time,
        "train_loss": step.train_loss,
        "val_loss": step.val_loss,
        "step_ms": step.step_ms,
        "tokens_per_s": step.speed,
        "mfu": step.mfu,
    }
    return {name: value for name, value in row.items() if value is not None}


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_log(path):
    """The Run that a log tells of, whole or not. Raises one of DAMAGED for what is no log."""
    text = read_text(path)
    source, bar, _ = text.partition(BAR)
    if not bar:
        raise ValueError("no log of train.py")
    head = text.rpartition(BAR)[2].partition("\nstep:")[0]  # of a resumed run the last one counts
    said = dict(re.findall(r"^(\w+): (.+)$", head, re.MULTILINE))
    config = read_config(said["config"])
    schedule = read_schedule(config)
    versions = re.findall(r"\b(?:python|jax)=\S+", said["versions"])
    facts = {
        "devices": said["devices"],
        "versions": " ".join(versions),
        "program": short_hash(source),
        "data": short_hash(str(re.findall(DATA_FILE, head))),
    }
    rows = []
    lines = text.split("\n")[:-1]  # the last is still being written
    for number, line in enumerate(lines, 1):
        if line.startswith("final: "):
            return Run(path, config, facts, rows, done=True)
        if line.startswith("step:"):
            step = parse_step(line)
            if not step:
                raise ValueError(f"line {number}: {line[:60]!r} is no step line of train.py")
            add_row(rows, row_of(step, schedule))
    return Run(path, config, facts, rows, done=False)


def read_metrics(path):
    """The rows of metrics.jsonl, but for the result, a repetition. Raises one of DAMAGED."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {line[:60]!r} is no JSON: {error.msg}") from error
        whole = isinstance(row, dict) and {"step", "tokens", "train_time_s"} <= row.keys()
        if not (whole and all(is_number(x) and math.isfinite(x) for x in row.values())):
            raise ValueError(f"line {number}: {line[:60]!r} lacks a number")
        if "train_loss" in row:
            add_row(rows, row)
    return rows


def read_run(path):
    """The Run of a log, with the rows of metrics.jsonl if that lies there. Raises UsageError."""
    try:
        run = read_log(path)
        if path.name == "log.txt" and path.with_name("metrics.jsonl").exists():
            path = path.with_name("metrics.jsonl")  # it has the learning rate, and all digits
            run = run._replace(rows=read_metrics(path))
    except NotText as error:
        raise UsageError(str(error)) from error
    except (*DAMAGED, OSError) as error:
        wanted = "wanted it as train.py writes it, or the folder of a run or a record"
        why = str(error) if isinstance(error, ValueError) else repr(error)
        raise UsageError(f"{path}: damaged, or no log ({why}); {wanted}") from error
    return run


def find_runs(path):
    """The Runs at a path: one, or a record's. Raises UsageError."""
    path = Path(os.path.realpath(path))
    logs = [path] if path.is_file() else []
    for name in ("log.txt", "seed*.txt", "failed*.txt"):
        logs += sorted(log for log in path.glob(name) if log.is_file())
    require(logs, f"{path}: no run there; wanted a log.txt, or a record's seed<k>.txt")
    return [read_run(log) for log in logs]


# ---- Curves: runs that differ in their seed alone ------------------------------------------------


class Curve(NamedTuple):
    label: str
    color: str  # its name in COLORS
    runs: list

    @property
    def finished(self):
        return [run for run in self.runs if run.done]

    @property
    def lines(self):
        """[runs whose mean is one line]: the finished ones together, each unfinished one alone."""
        alone = [[run] for run in self.runs if not run.done]
        return [self.finished, *alone] if self.finished else alone


def make_curves(runs):
    """The Curves of runs, in the order in which their first ones were given."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run.shared, sort_keys=True), []).append(run)
    curves = []
    for group in groups.values():
        label = group[0].folder[:40]
        color = f"c{len(curves) % 6}"
        curves.append(Curve(label, color, group))
    return curves


def series(runs, field):
    """Arrays [steps, runs] of tokens, seconds and a field, at the steps that all runs have."""
    tables = [{row["step"]: row for row in run.rows if field in row} for run in runs]
    steps = sorted(set(tables[0]).intersection(*tables))
    arrays = []
    for name in ("tokens", "train_time_s", field):
        values = [[table[step][name] for table in tables] for step in steps]
        arrays.append(np.array(values))
    return arrays


# ---- Figures -------------------------------------------------------------------------------------
# Figures are drawn in the light colours. In an SVG each becomes the CSS variable of its name,
# which both themes set. c0 to c5 are the curves': they stay apart for colour-blind eyes too.

COLORS = {  # in a light and in a dark theme
    "surface": ("#fdfdfc", "#17181b"),
    "ink": ("#1c1d20", "#ececea"),
    "muted": ("#6a6d75", "#9b9ea7"),
    "line": ("#e4e4e0", "#2e3036"),
    "goal": ("#3f7d20", "#8fce6b"),
    "c0": ("#364ab5", "#59bbfb"),
    "c1": ("#a11e00", "#e0561a"),
    "c2": ("#1b8278", "#a5f7c1"),
    "c3": ("#80005c", "#a864a2"),
    "c4": ("#9b8f13", "#c5a350"),
    "c5": ("#8e6ffb", "#6570f8"),
}
LIGHT = {name: light for name, (light, _) in COLORS.items()}
STYLE = {  # of matplotlib
    "font.size": 9,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "figure.facecolor": LIGHT["surface"],
    "axes.facecolor": LIGHT["surface"],
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LIGHT["line"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
}


def draw_line(ax, curve, runs, field, axis):
    """The mean of runs, and the band that they fill."""
    tokens, seconds, values = series(runs, field)
    if not values.size:
        return
    x = (tokens if axis == "tokens" else seconds / 60).mean(1)
    mean = values.mean(1)
    look = {"color": LIGHT[curve.color], "linestyle": "-" if runs[0].done else "--"}
    if field == "train_loss":
        start = len(x) // 10  # the first steps' fall would flatten all that follows
        ax.plot(x[start:], mean[start:], **look, linewidth=0.9, alpha=0.45)
        return
    state = "" if runs[0].done else ", unfinished"
    ax.plot(x, mean, **look, linewidth=1.8, label=f"{curve.label}{state}  {mean[-1]:.4f}")
    low, high = values.min(1), values.max(1)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)


def draw_targets(ax, curves):
    targets = {float(curve.runs[0].config["target_loss"]) for curve in curves}
    for target in sorted(targets - {0.0}):
        look = {"color": LIGHT["goal"], "linewidth": 1.1, "linestyle": "--"}
        ax.axhline(target, **look, label=f"target {target:g}")


def draw(ax, curves, fields, axis):
    """Fields of all curves against an axis, "time" or "tokens"."""
    for curve in curves:
        for runs in curve.lines:
            for field in fields:
                draw_line(ax, curve, runs, field, axis)
    if fields == LOSSES:
        draw_targets(ax, curves)
        if ax.get_legend_handles_labels()[1]:  # a target, or an evaluation
            ax.legend(loc="upper right")
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.set_xlabel("tokens" if axis == "tokens" else "minutes of training")
    if axis == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def svg_of(figure):
    """An <svg> whose colours are CSS variables."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(?<=<g) id="[^"]*"', "", text)  # the same in each figure
    for name, color in LIGHT.items():
        text = text.replace(color, f"var(--{name})")
    return text


def losses_figure(curves):
    """The losses against both axes: report.svg and report.png."""
    figure = Figure((11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw(left, curves, LOSSES, "time")
    draw(right, curves, LOSSES, "tokens")
    left.set_ylabel("loss, nats per token")
    return figure


def variables(selector):
    """CSS: the colours of both themes."""
    light = "".join(f"--{name}:{light};" for name, (light, _) in COLORS.items())
    dark = "".join(f"--{name}:{dark};" for name, (_, dark) in COLORS.items())
    return f"{selector}{{{light}}}@media(prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


# ---- The page ------------------------------------------------------------------------------------

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1160px;margin:auto;padding:40px 24px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 12px}
p,figcaption{color:var(--muted);margin:0 0 12px}
figure{margin:0;min-width:0}
figcaption{font-size:14px;margin-bottom:6px}
svg{display:block;width:100%;height:auto}
.panels{display:grid;grid-template-columns:1fr 1fr;gap:24px 36px;margin-top:28px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
td{padding:4px 16px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
thead td{color:var(--muted)}
.key{font-weight:600}
@media(max-width:640px){.panels{grid-template-columns:1fr}}
"""


def cell(value):
    """HTML. A Curve is its name in its colour."""
    if isinstance(value, Curve):
        return f'<td class="key" style="color:var(--{value.color})">{html.escape(value.label)}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def section(title, head, rows):
    """HTML of a table under a heading."""
    lines = [f"<tr>{''.join(map(cell, row))}</tr>" for row in [head, *rows]]
    body = f"<thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody>"
    return f'<section><h2>{title}</h2><div class="scroll"><table>{body}</table></div></section>'


def mean_text(values, digits):
    """The mean and, of several, their standard deviation; of none, a dash."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values):.{digits}f}"


RESULT = ("validation loss", "to target, s", "training, s", "tokens")


def result_cells(runs):
    """Cells of what came of runs, as RESULT names them."""
    losses = [run.val_losses[-1][0] for run in runs if run.val_losses]
    reached = [run.to_target for run in runs if run.to_target is not None]
    seconds = [run.rows[-1]["train_time_s"] for run in runs]
    tokens = max((run.rows[-1]["tokens"] for run in runs), default=0)
    return [mean_text(losses, 4), mean_text(reached, 1), mean_text(seconds, 1), f"{tokens:,}"]


def results_table(curves):
    rows = []
    for curve in curves:
        count = f"{len(curve.finished)} of {len(curve.runs)}"
        target = curve.runs[0].config["target_loss"] or "–"
        rows.append([curve, count, target, *result_cells(curve.finished)])
    return section("Results, mean ± sd", ("curve", "finished", "target", *RESULT), rows)


def differences_table(curves):
    """What is not the same in all curves."""
    shared = [curve.runs[0].shared for curve in curves]
    rows = []
    for name in {name: 0 for facts in shared for name in facts}:
        values = [facts.get(name, "–") for facts in shared]
        if values.count(values[0]) < len(values):
            rows.append([name, *values])
    return section("What differs", ("", *curves), rows) if rows else ""


def runs_table(curves):
    rows = []
    for curve in curves:
        for run in curve.runs:
            name = f"{run.folder}/{printable(run.path.name)}"
            steps = f"{run.rows[-1]['step']}/{run.config['steps']}"
            state = "finished" if run.done else "unfinished"
            told = (curve, name, run.config["seed"], steps, state)
            made = (run.facts["devices"], run.facts["versions"])
            rows.append([*told, *result_cells([run]), *made])
    head = ("curve", "run", "seed", "steps", "state", *RESULT, "devices", "versions")
    return section("Runs", head, rows)


def chart(curves, fields, axis, height, words):
    """A <figure>, half a page wide."""
    figure = Figure((4.7, height), layout="constrained")
    draw(figure.subplots(), curves, fields, axis)
    return f"<figure><figcaption>{words}</figcaption>{svg_of(figure)}</figure>"


def page(curves, title):
    """The HTML of it all, escaped, without a single address to fetch from."""
    runs = [run for curve in curves for run in curve.runs]
    charts = []
    for axis in ("time", "tokens"):
        charts.append(chart(curves, LOSSES, axis, 3.8, "Loss, nats per token"))
    for field, words in PANELS.items():
        if any(field in row for run in runs for row in run.rows):
            charts.append(chart(curves, (field,), "time", 2.1, words))
    tables = [results_table(curves), differences_table(curves), runs_table(curves)]
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{variables(":root")}{CSS}</style></head>
<body><main><h1>{title}</h1>
<p>Bold lines: validation loss, the mean over finished runs; bands: from the lowest to the highest;
thin lines: loss of the training batches, without their first tenth; dashes: unfinished runs, and
the target. The clock counts training only.</p>
<section class="panels">{"".join(charts)}</section>
{"".join(tables)}</main></body></html>
"""


def main(argv=None):
    """Write the page and its pictures. Raises UsageError."""

    def fail(message):
        raise UsageError(f"{message} (python -m scripts.report --help)")

    parser = argparse.ArgumentParser(
        prog="python -m scripts.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    flag = parser.add_argument
    flag("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, a record's, or a log")
    flag("--out", metavar="FILE", type=Path, default="report.html", help="default: report.html")
    args = parser.parse_args(argv)
    is_page = args.out.suffix in (".html", ".htm")
    require(is_page, f"--out={args.out}: wanted a file named *.html")
    require(matplotlib, f"matplotlib is missing: {WHY}: pip install -r scripts/requirements.txt")
    found = [run for path in args.runs for run in find_runs(path)]
    runs = {run.path: run for run in found if run.rows}  # each once
    require(runs, f"{args.runs[0]}: no step is written yet, nothing to draw; wait for its first")
    curves = make_curves(runs.values())
    title = ", ".join(curve.label for curve in curves)

    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        text = page(curves, title)
        figure = losses_figure(curves)
        figure.savefig(picture, format="png", dpi=150)
        svg = svg_of(figure)
    svg = svg.replace(">", f"><style>{variables('svg')}</style>", 1)
    write_whole(args.out, text.encode(errors="backslashreplace"))
    write_whole(args.out.with_suffix(".png"), picture.getvalue())
    write_whole(args.out.with_suffix(".svg"), svg.encode(errors="backslashreplace"))
    print(f"wrote: {args.out}, and the losses beside it as .svg and .png")


if __name__ == "__main__":
    sys.exit(command(main))
