"""Runs as one page to look at: losses, rates, seeds, what differs, the leaderboard. Needs `pip install -r scripts/requirements.txt`.

    python -m scripts.report logs/20260101T000000Z-abcdef                 a run's folder, finished or not: report.html, .svg, .png
    python -m scripts.report records/cpu/2026-*/ logs/*Z-* --out=all.html    records, runs, single logs (seed0.txt), side by side

report.html is one file that asks for nothing else, in light and dark; report.svg and report.png hold its losses for a README.
Runs of one program, config, data and kind of machine, whatever their seeds, are one curve: the mean over the finished ones, step by
step, and a band from the lowest to the highest. A folder that you rename gives its curve its name.
Exit codes: 0; 2 where there is no run, a package is missing or a line is damaged.

The same numbers in TensorBoard (`pip install tensorboardX`) or Weights & Biases (`pip install wandb`):

    import json, pathlib; run = pathlib.Path("logs/20260101T000000Z-abcdef")
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]

    from tensorboardX import SummaryWriter
    with SummaryWriter(f"tensorboard/{run.name}") as writer:
        for row in rows:
            for name, value in row.items(): writer.add_scalar(name, value, row["step"])

    import wandb
    with wandb.init(project="speedrun-jax", name=run.name, config=json.loads((run / "config.json").read_text())["config"]) as board:
        for row in rows: board.log(row, step=row["step"])
"""
import argparse, hashlib, html, inspect, io, itertools, json, math, re, statistics, sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train
from scripts.verify_record import BAR, FINAL, MAY_DIFFER as RECORDS_MAY_DIFFER, STEP, flat, read_config, read_schedule
from scripts.text import usage_errors
from train import MAY_DIFFER, ROOT, UsageError, command

# ---- Runs ----
class Run(NamedTuple):
    path: Path     # the run's folder, or its log in a record
    config: dict   # {field: value}, all text
    facts: dict    # of the log's head: devices, python, jax; program and data: eight digits of a SHA-256. Empty without a log
    rows: list     # of metrics.jsonl, one per written step
    done: bool     # it came to its end
    resumed: bool

    step = property(lambda self: self.rows[-1]["step"] if self.rows else 0)
    seconds = property(lambda self: self.rows[-1]["train_time_s"] if self.rows else 0.0)
    state = property(lambda self: ("finished" if self.done else "unfinished") + ", resumed" * self.resumed)
    val_loss = property(lambda self: next((row["val_loss"] for row in self.rows[::-1] if "val_loss" in row), None))
    target = property(lambda self: float(self.config.get("target_loss", 0)))

    @property
    def name(self):  # in a record the folder's as well
        return self.path.name if self.path.suffix != ".txt" else f"{re.sub(r'^[0-9-]+_', '', self.path.parent.name)}/{self.path.stem}"

    @property
    def reached(self):  # seconds of training until an evaluation was at the target or below, or None
        return next((row["train_time_s"] for row in self.rows if row.get("val_loss", math.inf) <= self.target), None)

    @property
    def twin_of(self):  # what runs of one curve share
        config = {name: value for name, value in self.config.items() if name not in MAY_DIFFER | RECORDS_MAY_DIFFER}
        return json.dumps([config, *(self.facts.get(name) for name in ("devices", "program", "data"))], sort_keys=True)

def learning_rates(source, text):
    """step -> what multiplied the learning rates in it, for a log whose source has the schedule of this train.py; else None."""
    functions = (train.ramp, train.lr_scale, train.stage_at)
    if not all(inspect.getsource(function) in source for function in functions):
        return None
    config = json.loads(text)
    fields = {name: config[name] for name in train.Config.__annotations__}  # another model has more
    stages = tuple(train.Stage(**row) for row in config["stages"])
    cfg = train.Config(**fields | {"stages": stages})

    def rate(step):
        stage = cfg.stages[train.stage_at(step - 1, cfg)]
        return float(train.lr_scale(step - 1, stage, cfg))

    return rate

def add_row(rows, row):
    """A resumed run writes steps again: what stood there from this step on does not count."""
    for step in [step for step in rows if step >= row["step"]]:
        del rows[step]
    rows[row["step"]] = row

def read_log(path):
    """The Run that a log tells of, whole or not. Raises UsageError where path is no log, or damaged."""
    with usage_errors(f"{path}: cannot be read"):
        text = path.read_text(encoding="utf-8")
    source, bar, _ = text.partition(BAR)
    if not bar:
        raise UsageError(f"{path}: no log of train.py; wanted a run's folder, a record's folder, or a seed<k>.txt in one")
    lines = text.rpartition(BAR)[2].split("\n")
    head = dict(line.split(": ", 1) for line in lines[::-1] if re.match(r"(preset|config|versions|devices): ", line))
    with usage_errors(f"{path}: its head is damaged or incomplete"):
        config = read_config(head["config"], source, head["preset"].split()[0])
        schedule, rate = read_schedule(config), learning_rates(source, head["config"])
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:8]
    files = [line for line in lines if re.match(r"data: .*sha256", line)]
    facts = {"devices": head.get("devices", ""), "program": digest(source), "data": digest("".join(files))}
    facts |= dict(re.findall(r"\b(python|jax)=(\S+)", head.get("versions", "")))
    rows, done = {}, False
    for number, line in enumerate(text.split("\n")[:-1], 1):  # what follows the last newline is still being written
        if done := bool(FINAL.fullmatch(line)):
            break  # samples follow
        if re.match(r"step:\d+/", line):
            if not (match := STEP.fullmatch(line)) or not math.isfinite(float(match[3]) + float(match[4] or 0)):
                raise UsageError(f"{path}, line {number}: {line[:60]!r} is damaged, wanted a step line as train.py writes it")
            step = int(match[1])
            row = {"step": step, "tokens": schedule.tokens(step), "train_loss": float(match[3]), "train_time_s": float(match[5]),
                   "step_ms": float(match[6]), "tokens_per_s": float(f"{match[7]}.{match[8]}") * {"k": 1e3, "M": 1e6}[match[9]]}
            row |= {"val_loss": float(match[4])} if match[4] else {}
            row |= {"mfu": float(match[10]) / 100} if match[10] else {}
            row |= {"lr": rate(step)} if rate else {}
            add_row(rows, row)
    return Run(path, config, facts, [*rows.values()], done, "\nresumed: " in text)

def read_metrics(path):
    """({step: row}, the last of each step's; whether the result is among them). Raises UsageError."""
    rows, done = {}, False
    with usage_errors(f"{path}: cannot be read"):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # the last is whole or still being written
    for number, line in enumerate(lines, 1):
        with usage_errors(f"{path}, line {number}: {line[:60]!r} is damaged, wanted a row of numbers as train.py writes it"):
            row = json.loads(line)
            if not {"step", "tokens", "train_time_s"} <= {*row} or not all(math.isfinite(value) for value in row.values()):
                raise ValueError("a number is missing")
        done = "train_loss" not in row  # the result repeats the last step's
        add_row(rows, rows.get(row["step"], {}) | row if done else row)
    return rows, done

def read_folder(path):
    """The Run in a folder that train.py made; of one without log.txt, less its facts. Raises UsageError."""
    log = read_log(path / "log.txt") if (path / "log.txt").exists() else None
    rows, done = read_metrics(path / "metrics.jsonl")
    with usage_errors(f"{path / 'config.json'}: damaged or missing, wanted the run's config"):
        config = log.config if log else flat(json.loads((path / "config.json").read_text())["config"])
        read_schedule(config)
    facts, resumed = (log.facts, log.resumed) if log else ({}, False)
    return Run(path, config, facts, [*rows.values()], done, resumed)

def find_runs(path):
    """The Runs at a path: one, or a record's. Raises UsageError."""
    if path.is_file():
        return [read_log(path.resolve())]
    if any((path / name).is_file() for name in ("metrics.jsonl", "log.txt")):
        return [read_folder(path.resolve())]
    logs = [log for kind in ("seed", "failed") for log in sorted(path.glob(f"{kind}*.txt"), key=lambda log: (len(log.name), log.name))]
    if not logs:
        raise UsageError(f"{path}: no run there; wanted a run's folder with metrics.jsonl, a record's with seed<k>.txt, or a log")
    return [read_log(log.resolve()) for log in logs]

# ---- Curves: runs that differ in their seed alone ----
class Curve(NamedTuple):
    label: str
    color: str     # of LIGHT
    runs: list     # all, of which
    finished: list # are averaged
    starts: list   # tokens before each stage but the first

    def series(self, field, runs=None):
        """Arrays (tokens, seconds, mean, lowest, highest) of a field, at the steps that all runs with it have; by default the finished."""
        tables = [{row["step"]: row for row in run.rows if field in row} for run in runs or self.finished]
        tables = [table for table in tables if table]
        steps = sorted(set.intersection(*map(set, tables)) if tables else [])
        rows = lambda name: np.array([[table[step][name] for table in tables] for step in steps]).reshape(len(steps), len(tables) or 1)
        values = rows(field)
        return rows("tokens").mean(1), rows("train_time_s").mean(1), values.mean(1), values.min(1), values.max(1)

def cut(text, most): return text if len(text) <= most else f"{text[:most - 1]}…"

def differing(runs):
    """{field: its value in each run} of what is not the same in all, but for what may differ within a curve."""
    every = [run.facts | {k: v for k, v in run.config.items() if k not in MAY_DIFFER | RECORDS_MAY_DIFFER} for run in runs]
    names = dict.fromkeys(name for each in every for name in each)
    table = {name: [each.get(name, "–") for each in every] for name in names}
    return {name: values for name, values in table.items() if len({*values}) > 1}

def label_of(group, groups, taken):
    """A curve's name: of the folder that all its runs are in or that the user has named, else the preset and what sets it apart."""
    names, first = {run.name.partition("/")[0] for run in group}, group[0]
    if len(names) == 1 and not re.fullmatch(r"\d{8}T\d{6}Z-\w{6}", *names):
        label = " ".join(names.pop().split())
    else:
        kin = [runs[0] for runs in groups if runs[0].config.get("preset") == first.config.get("preset")]
        told = [f"{name}={first.config[name] or 'none'}" for name in differing(kin) if name in first.config]
        label = ", ".join([first.config.get("preset", "run"), *told[:3]])
    label = cut(label, 40)
    return label if label not in taken else f"{label} ({first.name})"

def make_curves(runs):
    """The Curves of runs, in the order in which their first ones were given."""
    groups, curves = {}, []
    for run in runs:
        groups.setdefault(run.twin_of, []).append(run)
    for i, group in enumerate(groups.values()):
        schedule = read_schedule(group[0].config)
        starts = [schedule._replace(ends=schedule.ends[:n]).tokens() for n in range(1, len(schedule.ends))]
        label = label_of(group, groups.values(), [curve.label for curve in curves])
        curves.append(Curve(label, SERIES[i % len(SERIES)], group, [run for run in group if run.done], starts))
    return curves

# ---- Figures ----
# Colours are those of the light page while drawing; afterwards each is the variable of its place here, which dark replaces.
SERIES = ["#364ab5", "#a11e00", "#1b8278", "#80005c", "#9b8f13", "#8e6ffb"]  # apart for colour-blind eyes too: tests/test_report.py
LIGHT = {"surface": "#fdfdfc", "ink": "#1c1d20", "muted": "#6a6d75", "line": "#e4e4e0", "goal": "#3f7d20"} | {
    f"c{i}": color for i, color in enumerate(SERIES)}
DARK = {"surface": "#17181b", "ink": "#ececea", "muted": "#9b9ea7", "line": "#2e3036", "goal": "#8fce6b"} | {
    f"c{i}": color for i, color in enumerate(["#59bbfb", "#e0561a", "#a5f7c1", "#a864a2", "#c5a350", "#6570f8"])}
FIELDS = {"train_loss": "training", "val_loss": "validation"}
PANELS = {"lr": ("Learning rate", "times each weight's own"), "step_ms": ("Step time", "ms"),
          "tokens_per_s": ("Speed", "tokens per second"), "mfu": ("Model FLOPs utilization", "of the devices' peak")}
AXES = ("time", "tokens")

def short(value, digits=3):
    """1536000 -> 1.54M"""
    unit = next((unit for unit in (1e9, 1e6, 1e3) if abs(value) >= unit), 1)
    return f"{value / unit:.{digits}g}" + {1e9: "B", 1e6: "M", 1e3: "k", 1: ""}[unit]

def time_unit(curves):
    """(seconds in it, its name) of an axis on which the longest run is some tens."""
    longest = max(run.seconds for curve in curves for run in curve.runs)
    return next(unit for unit in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if longest >= 1.5 * unit[0] or unit[0] == 1)

def draw(ax, curves, field, axis, labels=True):
    """A field, or the two losses for "loss", against an axis. Returns the series of its tooltip."""
    unit, shown, ends = time_unit(curves), [], []
    for curve in curves:
        for name in FIELDS if field == "loss" else [field]:
            strong = name != "train_loss"
            lines = [(curve.finished, "-")] * bool(curve.finished) + [([run], (0, (4, 2))) for run in curve.runs if not run.done]
            for runs, dashes in lines:
                tokens, seconds, mean, low, high = curve.series(name, runs)
                low, high = (low, high) if strong else (mean, mean)
                x = tokens if axis == "tokens" else seconds / unit[0]
                marker = "o" if name == "val_loss" and len(x) <= 40 else ""
                ax.plot(x, mean, color=curve.color, linestyle=dashes, marker=marker, markersize=4, solid_capstyle="round",
                        linewidth=1.8 if strong else 0.9, alpha=1 if strong else 0.45, zorder=3 if strong else 2)
                if len(runs) > 1 and strong:
                    ax.fill_between(x, low, high, color=curve.color, alpha=0.16, linewidth=0)
                if len(x):
                    words = "" if dashes == "-" else f"seed {runs[0].config.get('seed')}, unfinished"
                    shown.append({"name": curve.label, "what": " ".join([FIELDS.get(name, ""), words]).strip(), "x": x, "y": mean,
                                  "low": low, "high": high, "color": SERIES.index(curve.color)})
                if len(x) and (name == "val_loss" or field != "loss" or len(curve.series("val_loss", runs)[0]) == 0):
                    ends.append((x[-1], mean[-1], curve, words))
    ax.set_xlim(0, 1.01 * max(max(series["x"]) for series in shown))
    stage_lines(ax, curves, axis, unit, labels)
    values = [value for series in shown for value in (*series["low"], *series["high"])]
    if field == "loss":
        late = [v for s in shown for x, v in zip(s["x"], s["y"]) if s["what"].startswith("validation") or x > 0.06 * max(s["x"])]
        goals = {curve.runs[0].target for curve in curves} - {0.0}
        low, high = min([*values, *goals]), max([*late, *goals])
        ax.set_ylim(low - 0.06 * (high - low) - 1e-3, high + 0.04 * (high - low) + 1e-3)
        for i, goal in enumerate(sorted(goals)):
            ax.axhline(goal, color=LIGHT["goal"], linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
            ax.annotate(f"target {goal:g}", (0, goal), (3, 3 if i else -3), xycoords=("axes fraction", "data"), color=LIGHT["goal"],
                        textcoords="offset points", va="bottom" if i else "top", fontsize=8.5)
    else:
        ax.set_ylim(0, 1.08 * max(values) or 1)
    ax.xaxis.set_major_formatter(lambda value, _: short(value) if axis == "tokens" else f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if field == "mfu" else short(value))
    ax.set_xlabel("tokens" if axis == "tokens" else f"{unit[1]} of training")
    ax.xaxis.set_major_locator(locator(6)), ax.yaxis.set_major_locator(locator(5))
    if labels:
        end_labels(ax, ends)
    return shown

def locator(bins):
    from matplotlib.ticker import MaxNLocator
    return MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10])

def stage_lines(ax, curves, axis, unit, labels):
    """Where a stage begins, once for all curves where they agree, else in the colour of each."""
    placed, labelled = {}, [-math.inf]
    room = 45 / (72 * ax.figure.get_figwidth() / len(ax.figure.axes)) * ax.get_xlim()[1]
    for curve in curves:
        tokens, seconds = curve.series("train_loss", curve.finished or curve.runs[:1])[:2]
        for i, start in enumerate(curve.starts if len(tokens) else []):
            x = start if axis == "tokens" else float(np.interp(start, [0, *tokens], [0, *seconds])) / unit[0]
            placed.setdefault((x, i), []).append(curve)
    for (x, i), owners in sorted(placed.items(), key=lambda item: item[0]):
        color = owners[0].color if len(owners) < len(curves) else LIGHT["muted"]
        ax.axvline(x, color=color, linewidth=0.8, linestyle=(0, (1, 2.5)), zorder=0)
        if labels and x - labelled[-1] > room:
            labelled.append(x)
            ax.annotate(f"stage {i + 2}", (x, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
                        color=color, fontsize=8)

def end_labels(ax, ends):
    """Each curve's name and last value under its end, where it has nothing of its own, none over another."""
    (low, high), room = ax.get_ylim(), math.inf
    letters = int(7 * ax.figure.get_figwidth() / len(ax.figure.axes))
    line = 14 / (72 * ax.figure.get_figheight() * 0.8) * (high - low)
    for x, y, curve, words in sorted(ends, key=lambda end: -end[1]):
        room, right = min(y - 0.6 * line, room - line), x > 0.4 * ax.get_xlim()[1]
        told = f"  {y:.4f}" + f", {words}" * bool(words)
        label = ax.annotate(cut(curve.label, max(8, letters - len(told))) + told, (x, room), (4 if right else -4, 0), va="top",
                            ha="right" if right else "left", textcoords="offset points", color=curve.color, fontsize=9.5, zorder=5,
                            fontweight="bold", bbox={"facecolor": LIGHT["surface"], "edgecolor": "none", "pad": 0.5, "alpha": 0.75})
        label.set_in_layout(False)
    ax.set_ylim(min(low, room - 1.3 * line), high)

def style():
    import matplotlib
    plain, muted = LIGHT["surface"], LIGHT["muted"]
    return matplotlib.rc_context({
        "font.size": 9, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "report",
        "figure.facecolor": plain, "axes.facecolor": plain, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LIGHT["line"],
        "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.edgecolor": LIGHT["line"], "axes.spines.left": False,
        "axes.spines.right": False, "axes.spines.top": False, "axes.labelcolor": LIGHT["muted"], "axes.labelsize": 9,
        **{f"{axis}tick.{key}": value for axis in "xy"
           for key, value in {"color": muted, "labelcolor": muted, "major.size": 0, "labelsize": 9}.items()}})

def svg_of(figure, salt):
    """An <svg> whose colours are CSS variables and whose ids are those of no other figure of the page."""
    import matplotlib
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()[out.getvalue().index("<svg"):]
    text = re.sub(r'(?<=<g) id="[^"]*"|(?<=<svg) xmlns:xlink="[^"]*" width="[^"]*" height="[^"]*"|<defs>\s*<style.*?</defs>', "", text,
                  flags=re.DOTALL)
    names = {color: f"var(--{name})" for name, color in LIGHT.items()}
    text = re.sub(r"(?<=[ :\"])#[0-9a-f]{6}(?=[;\"])", lambda match: names.get(match[0], match[0]), text)
    return re.sub(r"(?<=font-family: )[^;\"]*", "system-ui, sans-serif", text).replace("xlink:href", "href")

def chart(curves, field, axis, size, classes, words):
    """A <figure>: the chart, and its numbers for the tooltip."""
    from matplotlib.figure import Figure
    figure = Figure(size, layout="constrained")
    ax = figure.subplots()
    series = draw(ax, curves, field, axis, field == "loss")
    svg, box = svg_of(figure, f"{field}-{axis}-{classes}"), ax.get_position()
    few = lambda values: values[::-1][::1 + len(values) // 500][::-1]  # the last one always
    digits = lambda values: [float(f"{value:.5g}") for value in few(values)]
    data = {"box": digits([box.x0, 1 - box.y1, box.width, box.height]), "max": ax.get_xlim()[1], "axis": ax.get_xlabel(),
            "series": [each | {name: digits(each[name]) for name in ("x", "y", "low", "high")} for each in series]}
    return (f'<figure class="{classes} {axis}" data-chart="{html.escape(json.dumps(data))}"><figcaption>{words}</figcaption>'
            f'<div class="plot">{svg}<div class="cross"></div><div class="tip"></div></div></figure>')

def losses_figure(curves):
    """Both losses against both axes: report.svg and report.png."""
    from matplotlib.figure import Figure
    figure = Figure((11, 4.4), layout="constrained")
    for ax, axis in zip(figure.subplots(1, 2, sharey=True), AXES):
        draw(ax, curves, "loss", axis)
    figure.get_layout_engine().set(w_pad=0.12, wspace=0.04)
    figure.axes[0].set_ylabel("loss, nats per token")
    return figure

def css_variables(colors): return "".join(f"--{name}:{color};" for name, color in colors.items())

def themed(svg):
    """An <svg> for a file of its own, which follows the reader's theme."""
    return re.sub(r"(<svg[^>]*>)", lambda match: f"{match[1]}<style>svg{{{css_variables(LIGHT)}}}"
                  f"@media(prefers-color-scheme:dark){{svg{{{css_variables(DARK)}}}}}path{{stroke-linejoin:round}}</style>", svg, count=1)

# ---- The page ----
CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:1160px;margin:auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 12px;letter-spacing:-.01em}
p,figcaption,footer{color:var(--muted);margin:0}
header p{max-width:72ch}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:12px;margin:24px 0 28px}
.card{border:1px solid var(--line);border-top:4px solid var(--c);border-radius:8px;padding:12px 16px}
.card b{display:block;color:var(--c);overflow-wrap:anywhere}
.card strong{font-size:28px;line-height:1.3;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card small{font-size:16px;font-weight:400;color:var(--muted)}
.card span{color:var(--muted);font-size:14px;display:block}
.pick{position:absolute;opacity:0}
.pick+label{display:inline-block;padding:5px 14px;border:1px solid var(--line);cursor:pointer;font-size:14px;color:var(--muted)}
#pick-time+label{border-radius:7px 0 0 7px}
#pick-tokens+label{border-radius:0 7px 7px 0;border-left:0}
.pick:checked+label{background:var(--ink);color:var(--surface);border-color:var(--ink)}
.pick:focus-visible+label{outline:2px solid var(--c0);outline-offset:2px}
#pick-time:checked~section .tokens,#pick-tokens:checked~section .time,.narrow{display:none}
figure{margin:12px 0 0}
.plot{position:relative;touch-action:pan-y}
.plot svg{display:block;width:100%;height:auto}
.plot path{stroke-linejoin:round}
.plot text{font-variant-numeric:tabular-nums}
figcaption{font-size:14px;margin-bottom:6px}
figcaption b{color:var(--ink)}
.panels{display:grid;grid-template-columns:1fr 1fr;gap:24px 36px;margin-top:28px}
.panels figure{margin:0;min-width:0}
.cross{position:absolute;width:1px;background:var(--muted);pointer-events:none;display:none}
.tip{position:absolute;top:0;display:none;pointer-events:none;background:var(--surface);border:1px solid var(--line);border-radius:8px;
  padding:8px 12px;font-size:13px;line-height:1.45;white-space:nowrap;box-shadow:0 6px 20px #0002;font-variant-numeric:tabular-nums;z-index:2}
.tip div{color:var(--c)}
.tip b{color:var(--ink)}
.tip i{color:var(--muted);font-style:normal}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 16px 4px 0;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{color:var(--muted);font-weight:500}
.n{text-align:right}
.long{min-width:22em;overflow-wrap:anywhere;white-space:normal}
.sum td{font-weight:600;border-bottom:2px solid var(--line)}
.key{color:var(--c);font-weight:600}
.open{color:var(--muted);border:1px solid var(--line);border-radius:99px;padding:0 8px;white-space:nowrap}
footer{padding:40px 24px 60px;font-size:14px;overflow-wrap:anywhere}
@media(max-width:640px){
  main,header,footer{padding-left:14px;padding-right:14px}
  header{padding-top:24px}
  h1{font-size:24px}
  .panels{grid-template-columns:1fr}
  #pick-time:checked~section .wide,#pick-tokens:checked~section .wide{display:none}
  #pick-time:checked~section .narrow.time,#pick-tokens:checked~section .narrow.tokens{display:block}
  .tip{white-space:normal}
}
"""
SCRIPT = """
for (const figure of document.querySelectorAll("[data-chart]")) {
  const {box, max, axis, series} = JSON.parse(figure.dataset.chart), plot = figure.querySelector(".plot")
  const cross = figure.querySelector(".cross"), tip = figure.querySelector(".tip")
  const near = (xs, x) => xs.reduce((best, at, i) => Math.abs(at - x) < Math.abs(xs[best] - x) ? i : best, 0)
  const round = x => Math.abs(x) >= 1000 ? x.toLocaleString("en", {maximumFractionDigits: 0}) : +x.toPrecision(4)
  const densest = series.reduce((a, b) => b.x.length > a.x.length ? b : a)
  const part = (name, text) => Object.assign(document.createElement(name), {textContent: text})
  const hide = () => { cross.style.display = tip.style.display = "none" }
  const show = event => {
    const area = plot.getBoundingClientRect(), share = ((event.clientX - area.left) / area.width - box[0]) / box[2]
    if (share < -.02 || share > 1.02) return hide()
    const x = densest.x[near(densest.x, share * max)], left = box[0] + box[2] * x / max
    tip.replaceChildren(part("i", `${round(x)} ${axis}`))
    for (const s of series) {
      if (x > 1.02 * s.x.at(-1)) continue
      const i = near(s.x, x), row = part("div", `${s.name} `)
      row.style.setProperty("--c", `var(--c${s.color})`)
      row.append(part("b", round(s.y[i])), part("i", s.low[i] < s.high[i] ? ` (${round(s.low[i])} to ${round(s.high[i])})` : ""),
                 part("i", ` ${s.what}` + (Math.abs(s.x[i] - x) < .02 * max ? "" : ` at ${round(s.x[i])}`)))
      tip.append(row)
    }
    Object.assign(cross.style, {display: "block", left: `${100 * left}%`, top: `${100 * box[1]}%`, height: `${100 * box[3]}%`})
    tip.style.display = "block"
    const at = left * area.width, room = area.width - tip.offsetWidth
    tip.style.left = `${Math.max(0, at + 12 > room ? Math.min(room, at - tip.offsetWidth - 12) : at + 12)}px`
  }
  for (const name of ["pointermove", "pointerdown"]) plot.addEventListener(name, show)
  plot.addEventListener("pointerleave", hide)
}
"""

def seconds_text(seconds):
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.1f} min" if seconds < 36000 else f"{seconds / 3600:.2f} h"

def mean_text(values, form="{:.4f}".format):
    """The mean and, of several, their standard deviation; of none, a dash."""
    if len(values) < 2:
        return form(values[0]) if values else "–"
    return f"{form(statistics.fmean(values)).removesuffix(' s')} ± {form(statistics.stdev(values))}"

def table(head, rows, numbers=()):
    """HTML. rows: (cells, class of the row). numbers: columns set to the right. A cell is text, or (text, Curve) in its colour."""
    def cell(tag, i, value):
        text, style = (value[0], f' style="--c:{paint(value[1])}"') if isinstance(value, tuple) else (value, "")
        words = html.escape(str(text))
        words = f'<span class="open">{words}</span>' if words.startswith("unfinished") else words
        return f'<{tag} class="{"key" if style else "n" if i in numbers else "long" * (len(words) > 60)}"{style}>{words}</{tag}>'
    line = lambda tag, cells: "".join(cell(tag, i, value) for i, value in enumerate(cells))
    return (f'<div class="scroll"><table><thead><tr>{line("th", head)}</tr></thead><tbody>'
            + "".join(f'<tr class="{kind}">{line("td", cells)}</tr>' for cells, kind in rows) + "</tbody></table></div>")

def paint(curve): return f"var(--c{SERIES.index(curve.color)})"

def card(curve):
    """What came of one curve's runs, and the key to its colour."""
    runs, target = curve.finished, curve.runs[0].target
    reached = [run.reached for run in runs if run.reached is not None]
    losses = [run.val_loss for run in runs if run.val_loss is not None]
    mean, plus, spread = mean_text(losses).partition(" ±")
    lines = [f"validation loss, {len(runs)} run{'s' * (len(runs) > 1)}"] if losses else ["none of its runs is finished"]
    if target and runs:
        some = f", {len(reached)} of {len(runs)}" * (len(reached) < len(runs))
        lines.append(f"target {target:g} " + (f"in {mean_text(reached, seconds_text)}{some}" if reached else "not reached"))
    times = [run.seconds for run in runs]
    lines += [f"{mean_text(times, seconds_text)} of training, {short(runs[0].rows[-1]['tokens'])} tokens"] if runs else []
    lines += [f"{len(curve.runs) - len(runs)} unfinished"] if runs and len(runs) < len(curve.runs) else []
    return (f'<div class="card" style="--c:{paint(curve)}"><b>{html.escape(curve.label)}</b><strong>{mean}<small>{plus}{spread}</small></strong>'
            + "".join(f"<span>{html.escape(line)}</span>" for line in lines) + "</div>")

def runs_table(curves):
    """Every run, and the mean of each curve with several."""
    rows = []
    for curve in curves:
        for run in curve.runs:
            rows.append([(run.name, curve), run.config.get("preset", "–"), run.config.get("seed", "–"), f"{run.step:,}/{int(run.config['steps']):,}", run.state,
                         short(run.rows[-1]["tokens"]) if run.rows else "–", "–" if run.val_loss is None else f"{run.val_loss:.4f}",
                         "–" if run.reached is None or not run.target else seconds_text(run.reached), seconds_text(run.seconds),
                         run.facts.get("devices", "–").replace(", 1 processes", ""), ", ".join(f"{name} {run.facts[name]}" for name in ("python", "jax") if name in run.facts)])
        if len(done := curve.finished) > 1:
            reached = [run.reached for run in done if run.reached is not None and run.target]
            rows.append([(f"mean ± sd of {len(done)}", curve), "", "", "", "", "", mean_text([run.val_loss for run in done]),
                         mean_text(reached, seconds_text), mean_text([run.seconds for run in done], seconds_text), "", ""])
    head = "run,preset,seed,steps,state,tokens,validation loss,to target,training,devices,versions".split(",")
    return table(head, [(row, "sum" if row[1] == "" else "") for row in rows], numbers=(2, 3, 5, 6, 7, 8))

def twins_text(curve):
    """A sentence for each seed that was run twice: how far apart the losses are, 0 for an exact resume."""
    for first, second in itertools.combinations(curve.runs, 2):
        if first.config.get("seed") == second.config.get("seed"):
            losses = [{(row["step"], name): row[name] for row in run.rows for name in FIELDS if name in row} for run in (first, second)]
            common = losses[0].keys() & losses[1].keys()
            if common:
                most = max(abs(losses[0][key] - losses[1][key]) for key in common)
                yield (f"{first.name} ({first.state}) and {second.name} ({second.state}), both seed {first.config.get('seed')}: largest "
                       f"difference of {len(common)} losses at the same steps = {most:.6g}")

def leaderboard(path):
    """(head, rows) of the first Markdown table with a column `time`, as plain text; None without one. Raises UsageError."""
    with usage_errors(f"--leaderboard={path}: cannot be read"):
        lines = path.read_text(encoding="utf-8").splitlines()
    plain = lambda cell: re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", lambda match: match[1] or "", cell).strip()
    rows = [[plain(cell) for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    start = next((i for i, row in enumerate(rows) if "time" in row), None)
    if start is None:
        return None
    body = itertools.takewhile(lambda row: len(row) == len(rows[start]), rows[start + 2:])
    return rows[start], [row for row in body]

def page(curves, title, board):
    """The HTML of it all, escaped, without a single address to fetch from."""
    runs = [run for curve in curves for run in curve.runs]
    count = lambda number, word: f"{number} {word}{'s' * (number != 1)}"
    about = (f"{count(len(runs), 'run')} of {count(len(curves), 'config')}. Bold lines: validation loss, the mean over finished runs; bands: "
             "from the lowest to the highest; thin lines: loss of the training batches; dashes: unfinished runs. Nats per token; the clock "
             "counts training only.")
    losses = [chart(curves, "loss", axis, size, kind, "<b>Loss</b>, nats per token") for axis in AXES
              for size, kind in (((9.6, 4.9), "wide"), ((4.7, 4.4), "narrow"))]
    panels = [chart(curves, field, axis, (4.7, 2.1), "", f"<b>{name}</b>, {words}") for field, (name, words) in PANELS.items()
              if any(field in row for run in runs for row in run.rows) for axis in AXES]
    part = lambda name, body: f"<section><h2>{name}</h2>{body}</section>"
    differences = differing([curve.runs[0] for curve in curves])
    twins = [f"<p>{html.escape(text)}</p>" for curve in curves for text in twins_text(curve)]
    parts = [part("What differs", table(["", *((curve.label, curve) for curve in curves)],
                                        [([name, *(value or "none" for value in values)], "") for name, values in differences.items()])
                  ) if differences else "", part("The same run twice", "".join(twins)) if twins else "", part("Runs", runs_table(curves)),
             part("Leaderboard", table(board[0], [(row, "") for row in board[1]])) if board else ""]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>:root{{{css_variables(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{css_variables(DARK)}}}}}{CSS}</style></head>
<body><header><h1>{html.escape(title)}</h1><p>{about}</p><div class="cards">{"".join(map(card, curves))}</div></header>
<main><input class="pick" type="radio" name="axis" id="pick-time" checked><label for="pick-time">train time</label><input class="pick"
type="radio" name="axis" id="pick-tokens"><label for="pick-tokens">tokens</label>
<section>{"".join(losses)}<div class="panels">{"".join(panels)}</div></section>
{"".join(parts)}</main>
<footer>Made by speedrun-jax: python -m scripts.report {html.escape(" ".join(dict.fromkeys(str(run.path.name if run.path.suffix != ".txt"
    else run.path.parent.name) for run in runs)))}</footer><script>{SCRIPT}</script></body></html>
"""

def main(argv=None):
    """Write the page and its figure. Raises UsageError."""
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, a record's, or a log in one")
    flag("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html")
    flag("--title", metavar="TEXT", help="default: the curves' names")
    flag("--svg", metavar="FILE", type=Path, help="default: beside the page")
    flag("--png", metavar="FILE", type=Path, help="default: beside the page")
    flag("--leaderboard", metavar="FILE", type=Path, default=ROOT / "records/README.md",
         help="Markdown whose first table with a column `time` is shown; default: records/README.md")
    flag("--target", metavar="LOSS", type=float, help="instead of each run's own")
    args = parser.parse_args(argv)
    try:
        import matplotlib  # now, rather than after the work
    except ImportError:
        raise UsageError("matplotlib is missing: pip install -r scripts/requirements.txt") from None
    given = {} if args.target is None else {"target_loss": str(args.target)}
    runs = {run.path: run._replace(config=run.config | given) for path in args.runs for run in find_runs(path)}  # each once
    curves = make_curves(runs.values())
    if not any(run.rows for curve in curves for run in curve.runs):
        raise UsageError(f"{args.runs[0]}: no step is written yet, nothing to draw; wait for its first")
    board = leaderboard(args.leaderboard)
    with style():
        figure, picture = losses_figure(curves), io.BytesIO()
        svg = themed(svg_of(figure, "losses"))
        figure.savefig(picture, format="png", dpi=150)
        text = page(curves, args.title or (" and ".join(curve.label for curve in curves) if len(curves) < 3 else f"{len(curves)} configs"), board)
    for path, data in ((args.out, text.encode()), (args.svg or args.out.with_suffix(".svg"), svg.encode()),
                       (args.png or args.out.with_suffix(".png"), picture.getvalue())):
        with usage_errors(f"{path}: cannot be written; does its folder exist?"):
            path.write_bytes(data)
        print(f"wrote: {path}")

if __name__ == "__main__":
    sys.exit(command(main))
