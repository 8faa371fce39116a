"""Runs as one page to look at: losses, rates, seeds, what differs, the leaderboard.

    pip install -r scripts/requirements.txt
    python -m scripts.report logs/20260101T000000Z-abcdef
    python -m scripts.report records/cpu/2026-*/ logs/*Z-* --out=all.html

RUN is a run's folder, finished or not, a record's folder, or a log in one. The page asks for
nothing over the network, and is light or dark as its reader likes it. Beside it lie its losses for
a README, as .svg and .png.

Runs of one program, config, data, versions and kind of machine are one curve, whatever their seeds:
the mean over the finished ones, step by step, and a band from the lowest to the highest. A folder
that you rename gives its curve its name.

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
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts import verify_record
from scripts.verify_record import BAR, DAMAGED, FINAL, parse_step, read_config, read_schedule
from train import MAY_DIFFER, ROOT, UsageError, command, require

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter
except ImportError:
    matplotlib = None

OF_A_RUN = MAY_DIFFER | verify_record.MAY_DIFFER  # fields that may differ within a curve
LEADERBOARD = ROOT / "records/README.md"
PANELS = {  # fields of a row: (name, unit)
    "lr": ("Learning rate", "times each weight's own"),
    "step_ms": ("Step time", "ms"),
    "tokens_per_s": ("Speed", "tokens per second"),
    "mfu": ("Model FLOPs utilization", "of the devices' peak"),
}
AXES = ("time", "tokens")


# ---- Runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    path: Path  # the run's folder, or its log in a record
    config: dict  # {field: value}
    facts: dict  # of the log's head: devices, versions, and hashes of program and data
    rows: list  # of metrics.jsonl, or as many columns as a log has; one per written step
    done: bool  # it came to its end

    @property
    def name(self):
        """The folder's name; in a record the log's as well."""
        if self.path.suffix != ".txt":
            return self.path.name
        record = re.sub(r"^[0-9-]+_", "", self.path.parent.name)
        return f"{record}/{self.path.stem}"

    @property
    def seconds(self):
        return self.rows[-1]["train_time_s"] if self.rows else 0.0

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
        "step_ms": step.step_ms,
        "tokens_per_s": step.speed,
    }
    optional = {"val_loss": step.val_loss, "mfu": step.mfu}
    return row | {name: value for name, value in optional.items() if value is not None}


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_log(path):
    """The Run that a log tells of, whole or not. Raises one of DAMAGED for what is no log."""
    text = path.read_text(encoding="utf-8")
    source, bar, _ = text.partition(BAR)
    if not bar:
        raise ValueError("no log of train.py")
    head = {}
    files = []
    for line in text.rpartition(BAR)[2].split("\n"):  # of a resumed run the last head counts
        key, _, value = line.partition(": ")
        head.setdefault(key, value)
        if key == "data" and " sha256:" in value:
            files.append(value)
    config = read_config(head["config"])
    schedule = read_schedule(config)
    versions = re.findall(r"\b(?:python|jax)=\S+", head["versions"])
    facts = {"devices": head["devices"], "versions": " ".join(versions)}
    facts |= {"program": short_hash(source), "data": short_hash("".join(files))}

    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):  # the last is still being written
        if FINAL.fullmatch(line):
            return Run(path, config, facts, rows, done=True)  # samples follow
        if re.match(r"step:\d+/", line):
            step = parse_step(line)
            if not step:
                raise ValueError(f"line {number}, {line[:60]!r}, is no step line of train.py")
            add_row(rows, row_of(step, schedule))
    return Run(path, config, facts, rows, done=False)


def read_metrics(path):
    """The rows of metrics.jsonl, but for the result, which repeats the last of them.

    Raises one of DAMAGED.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        whole = {"step", "tokens", "train_time_s"} <= row.keys()
        if not whole or not all(math.isfinite(value) for value in row.values()):
            raise ValueError(f"{line[:60]!r} lacks a number")
        if "train_loss" in row:
            add_row(rows, row)
    return rows


def checked(read, path):
    """read(path). Raises UsageError where it fails."""
    try:
        return read(path)
    except (*DAMAGED, OSError) as error:
        wanted = "wanted it as train.py writes it, or the folder of a run or a record"
        raise UsageError(f"{path}: damaged, or no log ({error!r}); {wanted}") from error


def find_runs(path):
    """The Runs at a path: one, or a record's. Raises UsageError."""
    path = path.resolve()
    if path.is_file():
        return [checked(read_log, path)]
    log = path / "log.txt"
    if log.exists():
        run = checked(read_log, log)._replace(path=path)
        metrics = path / "metrics.jsonl"
        if metrics.exists():  # it has the learning rate, and all digits
            run = run._replace(rows=checked(read_metrics, metrics))
        return [run]
    logs = [*path.glob("seed*.txt"), *path.glob("failed*.txt")]
    require(logs, f"{path}: no run there; wanted a log.txt, or a record's seed<k>.txt")
    return [checked(read_log, log) for log in sorted(logs, key=lambda log: (len(log.name), log))]


# ---- Curves: runs that differ in their seed alone ------------------------------------------------


class Curve(NamedTuple):
    label: str
    color: int  # of SERIES
    runs: list

    @property
    def finished(self):
        return [run for run in self.runs if run.done]

    @property
    def lines(self):
        """[runs whose mean is one line]: the finished ones together, each unfinished one alone."""
        alone = [[run] for run in self.runs if not run.done]
        return [self.finished, *alone] if self.finished else alone


def series(runs, field):
    """Arrays [steps, runs] of tokens, seconds and a field, at the steps that all runs have."""
    tables = [{row["step"]: row for row in run.rows if field in row} for run in runs]
    tables = [table for table in tables if table]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    arrays = []
    for name in ("tokens", "train_time_s", field):
        values = [[table[step][name] for table in tables] for step in steps]
        arrays.append(np.array(values).reshape(len(steps), len(tables)))
    return arrays


def differing(runs):
    """{name: [its value in each run]} of what is not the same in all."""
    names = dict.fromkeys(name for run in runs for name in run.shared)
    table = {name: [run.shared.get(name, "–") for run in runs] for name in names}
    return {name: values for name, values in table.items() if values.count(values[0]) < len(values)}


def label_of(run, i, firsts):
    """A curve's name: its folder's if a user gave it, else the preset and what sets it apart."""
    folder = run.name.partition("/")[0]
    if not re.fullmatch(r"\d{8}T\d{6}Z-\w{6}", folder):
        return folder[:40]
    fields = [(name, values[i]) for name, values in differing(firsts).items()]
    told = [f"{name}={value}" for name, value in fields if name in run.config]
    return ", ".join([run.config["preset"], *told[:3]])[:40]


def make_curves(runs):
    """The Curves of runs, in the order in which their first ones were given."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run.shared, sort_keys=True), []).append(run)
    firsts = [group[0] for group in groups.values()]
    curves = []
    for i, group in enumerate(groups.values()):
        label = label_of(group[0], i, firsts)
        if label in [curve.label for curve in curves]:
            label = f"{label} ({group[0].name})"
        curves.append(Curve(label, i % len(SERIES), group))
    return curves


# ---- Figures -------------------------------------------------------------------------------------
# Figures are drawn in the colours of LIGHT. In an SVG each colour becomes the CSS variable of its
# name, for which DARK has another. The series stay apart for colour-blind eyes too.

SERIES = ["#364ab5", "#a11e00", "#1b8278", "#80005c", "#9b8f13", "#8e6ffb"]
LIGHT = {
    "surface": "#fdfdfc",
    "ink": "#1c1d20",
    "muted": "#6a6d75",
    "line": "#e4e4e0",
    "goal": "#3f7d20",
    **{f"c{i}": color for i, color in enumerate(SERIES)},
}
DARK = {
    "surface": "#17181b",
    "ink": "#ececea",
    "muted": "#9b9ea7",
    "line": "#2e3036",
    "goal": "#8fce6b",
    "c0": "#59bbfb",
    "c1": "#e0561a",
    "c2": "#a5f7c1",
    "c3": "#a864a2",
    "c4": "#c5a350",
    "c5": "#6570f8",
}
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
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LIGHT["line"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
}


def time_unit(curves):
    """(seconds in it, its name) of an axis on which the longest run is some tens."""
    longest = max(run.seconds for curve in curves for run in curve.runs)
    for seconds, name in ((3600, "hours"), (60, "minutes")):
        if longest >= 1.5 * seconds:
            return seconds, name
    return 1, "seconds"


def draw_line(ax, curve, runs, field, axis, seconds):
    """The mean of runs, and the band that they fill. Returns the mean after the first steps."""
    tokens, times, values = series(runs, field)
    if not values.size:
        return []
    x = (tokens if axis == "tokens" else times / seconds).mean(1)
    mean = values.mean(1)
    look = {"color": SERIES[curve.color], "linestyle": "-" if runs[0].done else "--"}
    if field == "train_loss":
        ax.plot(x, mean, **look, linewidth=0.9, alpha=0.45)
    else:
        state = "" if runs[0].done else ", unfinished"
        ax.plot(x, mean, **look, linewidth=1.8, label=f"{curve.label}{state}  {mean[-1]:.4f}")
        if len(runs) > 1:
            low, high = values.min(1), values.max(1)
            ax.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
    return mean[x > 0.06 * x[-1]].tolist()


def draw_stages(ax, curve, axis, seconds):
    """Dots where the curve's stages begin."""
    tokens, times, _ = series(curve.lines[0], "train_loss")
    tokens = [0, *tokens.mean(1)]
    times = [0, *times.mean(1)]
    schedule = read_schedule(curve.runs[0].config)
    for number, end in enumerate(schedule.ends[:-1], 2):
        start = schedule.tokens(end)
        if start > tokens[-1]:
            return  # an unfinished run
        x = start if axis == "tokens" else np.interp(start, tokens, times) / seconds
        ax.axvline(x, color=SERIES[curve.color], linewidth=0.8, linestyle=":", alpha=0.6)
        if curve.color == 0:
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            ax.annotate(f"stage {number}", (x, 1), color=LIGHT["muted"], fontsize=8, **place)


def draw_losses(ax, curves, axis, seconds):
    """Both losses, targets and stages. What is above the first steps' fall is cut off."""
    values = []
    for curve in curves:
        for runs in curve.lines:
            for field in ("train_loss", "val_loss"):
                values += draw_line(ax, curve, runs, field, axis, seconds)
        draw_stages(ax, curve, axis, seconds)
    targets = {float(curve.runs[0].config["target_loss"]) for curve in curves} - {0.0}
    for target in targets:
        ax.axhline(target, color=LIGHT["goal"], linewidth=1.1, linestyle="--")
        ax.annotate(f"target {target:g}", (0, target), color=LIGHT["goal"], va="bottom")
    low = min([*values, *targets])
    high = max([*values, *targets])
    room = 0.05 * (high - low) + 1e-3
    ax.set_ylim(low - room, high + room)
    if ax.get_legend_handles_labels()[1]:  # there was an evaluation
        ax.legend(loc="upper right")


def draw(ax, curves, field, axis):
    """A field of all curves against an axis; of the field "loss" both."""
    seconds, unit = time_unit(curves)
    if field == "loss":
        draw_losses(ax, curves, axis, seconds)
    else:
        for curve in curves:
            for runs in curve.lines:
                draw_line(ax, curve, runs, field, axis, seconds)
        ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.set_xlabel("tokens" if axis == "tokens" else f"{unit} of training")
    if axis == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    if field == "tokens_per_s":
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    if field == "mfu":
        ax.yaxis.set_major_formatter(PercentFormatter(1))


def svg_of(figure, salt):
    """An <svg> whose colours are CSS variables and whose ids are those of no other figure."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<=<g) id="[^"]*"', "", text)
    text = re.sub(r'(?<=<svg) xmlns:xlink="[^"]*" width="[^"]*" height="[^"]*"', "", text)
    text = re.sub(r'(?<=font-family: )[^;"]*', "system-ui, sans-serif", text)
    text = re.sub(r"(?<=font: )([\d.]+px)[^;\"]*", r"\1 system-ui, sans-serif", text)
    for name, color in LIGHT.items():
        text = re.sub(rf'(?<=[ :"]){color}(?=[;"])', f"var(--{name})", text)
    return text


def losses_figure(curves):
    """Both losses against both axes: report.svg and report.png."""
    figure = Figure((11, 4.4), layout="constrained")
    for ax, axis in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        draw(ax, curves, "loss", axis)
    figure.axes[0].set_ylabel("loss, nats per token")
    return figure


def variables(selector):
    """CSS: the colours of both themes."""
    light = "".join(f"--{name}:{color};" for name, color in LIGHT.items())
    dark = "".join(f"--{name}:{color};" for name, color in DARK.items())
    return f"{selector}{{{light}}}@media(prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


# ---- The page ------------------------------------------------------------------------------------

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1160px;margin:auto;padding:40px 24px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 12px}
p,figcaption{color:var(--muted);margin:0 0 12px}
.pick{position:absolute;opacity:0}
.pick+label{display:inline-block;padding:5px 14px;border:1px solid var(--line);cursor:pointer;
  font-size:14px;color:var(--muted)}
.pick:checked+label{background:var(--ink);color:var(--surface);border-color:var(--ink)}
.pick:focus-visible+label{outline:2px solid var(--c0);outline-offset:2px}
#pick-time:checked~section .tokens,#pick-tokens:checked~section .time{display:none}
figure{margin:12px 0 0;min-width:0}
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
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def cell(value):
    """HTML. A Curve is its name in its colour."""
    if isinstance(value, Curve):
        color = f"color:var(--c{value.color})"
        return f'<td class="key" style="{color}">{html.escape(value.label)}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def section(title, head, rows):
    """HTML of a table under a heading."""
    lines = [f"<tr>{''.join(map(cell, row))}</tr>" for row in [head, *rows]]
    body = f"<thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody>"
    return f'<section><h2>{title}</h2><div class="scroll"><table>{body}</table></div></section>'


def seconds_text(seconds):
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 36000 else f"{seconds / 3600:.2f} h"


def loss_text(loss):
    return f"{loss:.4f}"


def mean_text(values, text):
    """The mean and, of several, their standard deviation; of none, a dash."""
    if len(values) < 2:
        return text(values[0]) if values else "–"
    mean = text(statistics.fmean(values)).removesuffix(" s")
    return f"{mean} ± {text(statistics.stdev(values))}"


def result_cells(runs):
    """Cells of what came of runs: last validation loss, time to the target, train time, tokens."""
    losses = [run.val_losses[-1][0] for run in runs if run.val_losses]
    reached = [run.to_target for run in runs if run.to_target is not None]
    tokens = max((run.rows[-1]["tokens"] for run in runs if run.rows), default=0)
    return [
        mean_text(losses, loss_text),
        mean_text(reached, seconds_text),
        mean_text([run.seconds for run in runs], seconds_text),
        f"{tokens:,}",
    ]


RESULT = ("validation loss", "to target", "training", "tokens")


def results_table(curves):
    rows = []
    for curve in curves:
        count = f"{len(curve.finished)} of {len(curve.runs)}"
        target = curve.runs[0].config["target_loss"]
        rows.append([curve, count, target, *result_cells(curve.finished)])
    return section("Results, mean ± sd", ("curve", "finished", "target", *RESULT), rows)


def differences_table(curves):
    rows = [[name, *values] for name, values in differing([c.runs[0] for c in curves]).items()]
    return section("What differs", ("", *curves), rows) if rows else ""


def runs_table(curves):
    rows = []
    for curve in curves:
        for run in curve.runs:
            step = run.rows[-1]["step"] if run.rows else 0
            state = "finished" if run.done else "unfinished"
            steps = f"{step}/{run.config['steps']}"
            made = (run.facts["devices"], run.facts["versions"])
            who = (curve, run.name, run.config["seed"])
            rows.append([*who, steps, state, *result_cells([run]), *made])
    head = ("curve", "run", "seed", "steps", "state", *RESULT, "devices", "versions")
    return section("Runs", head, rows)


def leaderboard():
    """The first table with a column `time` of records/README.md, as plain text."""
    rows = []
    for line in LEADERBOARD.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)  # a link's words
        cells = [cell.strip("*` ") for cell in line.strip("| ").split("|")]
        if rows and not line.startswith("|"):
            break
        if rows or "time" in cells:
            rows.append(cells)
    return section("Leaderboard", rows[0], rows[2:]) if rows else ""


def chart(curves, field, axis, size, words):
    """A <figure>."""
    figure = Figure(size, layout="constrained")
    draw(figure.subplots(), curves, field, axis)
    svg = svg_of(figure, f"{field}-{axis}")
    return f'<figure class="{axis}"><figcaption>{words}</figcaption>{svg}</figure>'


def page(curves, title):
    """The HTML of it all, escaped, without a single address to fetch from."""
    runs = [run for curve in curves for run in curve.runs]
    losses = [chart(curves, "loss", axis, (9.6, 4.9), "Loss, nats per token") for axis in AXES]
    panels = []
    for field, (name, unit) in PANELS.items():
        if any(field in row for run in runs for row in run.rows):
            for axis in AXES:
                panels.append(chart(curves, field, axis, (4.7, 2.1), f"{name}, {unit}"))
    tables = [results_table(curves), differences_table(curves), runs_table(curves), leaderboard()]
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title><style>{variables(":root")}{CSS}</style></head>
<body><main><h1>{title}</h1>
<p>Bold lines: validation loss, the mean over finished runs; bands: from the lowest to the highest;
thin lines: loss of the training batches; dashes: unfinished runs, and the target; dots: where
stages begin. The clock counts training only.</p>
<input class="pick" type="radio" name="axis" id="pick-time" checked>
<label for="pick-time">train time</label>
<input class="pick" type="radio" name="axis" id="pick-tokens">
<label for="pick-tokens">tokens</label>
<section>{"".join(losses)}<div class="panels">{"".join(panels)}</div></section>
{"".join(tables)}</main></body></html>
"""


def main(argv=None):
    """Write the page and its pictures. Raises UsageError."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, a record's, or a log")
    out = Path("report.html")
    flag("--out", metavar="FILE", type=Path, default=out, help=f"default: {out}")
    flag("--title", metavar="TEXT", help="default: the curves' names")
    args = parser.parse_args(argv)
    require(matplotlib, "matplotlib is missing: pip install -r scripts/requirements.txt")
    found = itertools.chain.from_iterable(find_runs(path) for path in args.runs)
    runs = {run.path: run for run in found if run.rows}  # each once
    require(runs, f"{args.runs[0]}: no step is written yet, nothing to draw; wait for its first")
    curves = make_curves(runs.values())
    labels = [curve.label for curve in curves]
    title = args.title or (" and ".join(labels) if len(labels) < 4 else f"{len(labels)} configs")

    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = losses_figure(curves)
        figure.savefig(picture, format="png", dpi=150)
        svg = svg_of(figure, "losses")
        text = page(curves, title)
    svg = svg.replace(">", f"><style>{variables('svg')}</style>", 1)
    files = {".html": text.encode(), ".svg": svg.encode(), ".png": picture.getvalue()}
    for suffix, data in files.items():
        path = args.out if suffix == ".html" else args.out.with_suffix(suffix)
        path.write_bytes(data)
        print(f"wrote: {path}")


if __name__ == "__main__":
    sys.exit(command(main))
