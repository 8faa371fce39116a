"""Train a grid or a list of settings, several seeds each; one table at the end, the best first.

    python -m scripts.sweep lr --muon_lr=0.01,0.02,0.04 --adam_lr=0.004,0.008 --seed=0,1 -- --preset=demo --steps=200
    python -m scripts.sweep lr --list=points.txt --seed=0,1 -- --preset=demo   (a line of flags each, # comments)
    ... --table     (between NAME and --: run nothing, print the table of what is there)

Before -- every flag of train.py may take several values, and every combination runs; after it stand flags that all have.
Values of a number have commas between them, or the flag is repeated. In a tuple, a text or a column of the stage table a comma
is part of the value: repeat the flag, --stages.lr=1 --stages.lr=1,1.5,1.7 are two values. With --list each of its settings is
combined with the grid.

Runs are lines of logs/sweeps/NAME.jsonl, known by settings, seed and data, whichever way these were said: stop a sweep with Ctrl-C,
give the same command again and it continues; give it more values or seeds and only these are run. (scripts/ablate.py does that.)
"""
import argparse, itertools, os, shlex, sys
from pathlib import Path

import numpy as np

from scripts import ablate
from train import ROOT, Config, Stage, UsageError, flag_names, parse_flags, parse_value, read_flags, require

NAMES = flag_names(Config)

KINDS = Config.__annotations__ | {f"val.{name}": kind for name, kind in Stage.__annotations__.items()}
NUMBERS = (int, float, bool, int | None)

def spell(flag, text):
    """A value in one spelling, whichever way it was said: 2e-2 is 0.02. What is no value stays, to be refused later."""
    try:
        value = parse_value(text, KINDS[flag])
    except (KeyError, TypeError, ValueError, SyntaxError):
        return text
    return value if isinstance(value, str) else "none" if value is None else repr(value)

def read_pairs(words):
    """Yield (flag, text) of --FLAG=TEXT. Raises UsageError for a flag that is not there."""
    for word in words:  # one by one: a flag may come several times
        for flag, text in read_flags([word]).items():
            if flag not in NAMES:
                parse_flags([f"--{flag}={text}"])  # says which flag is near
            yield flag, text

def read_grid(words):
    """{flag: its values as texts} of --FLAG=VALUES, in order. Raises UsageError."""
    grid = {}
    for flag, text in read_pairs(words):
        texts = text.split(",") if KINDS.get(flag) in NUMBERS else [text]
        grid.setdefault(flag, []).extend(spell(flag, text) for text in texts)
    return {flag: [*dict.fromkeys(texts)] for flag, texts in grid.items()}

def read_setting(words): return {flag: spell(flag, text) for flag, text in read_pairs(words)}

def read_points(path):
    """[{flag: value}, ...] of a file's lines. Raises UsageError, and OSError where there is none."""
    lines = [shlex.split(line, comments=True) for line in Path(path).read_text().splitlines()]
    require(any(lines), f"--list={path}: no settings; wanted a line of flags for each")
    return [read_setting(line) for line in lines if line]

def flags_of(setting): return [f"--{flag}={setting[flag]}" for flag in NAMES if flag in setting]  # in one order, whatever was said

def settings_of(points, grid, common):
    """({entry name: what it has of its own}, [ablate.Entry, ...]) of all combinations. Raises UsageError."""
    grids = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    own = {}
    for point, values in itertools.product(points, grids):
        twice = [*point.keys() & values.keys(), *common.keys() & {*point, *values}]
        require(not twice, f"--{''.join(twice[:1])}: given twice, of grid, list and flags after --; give it once")
        own[shlex.join(flags_of(point | values)) or "all alike"] = point | values
    everything = [common | values for values in own.values()]
    for flag in dict.fromkeys(flag for setting in everything for flag in setting):
        require(f"--{flag}" not in ablate.OURS, f"--{flag}: given by the script; seeds are --seed=0,1 before --, a folder of shards is --data=DIR")
    for setting in everything:
        ablate.check_flags(flags_of(setting))
    return own, [ablate.Entry(name, "", flags_of(setting)) for name, setting in zip(own, everything)]

def table_of(own, rows, common, data_flags=()):
    """Markdown, the least mean loss first. own: {name: {field: value}}, rows: {name: {seed: line}}."""
    good = {name: {seed: row for seed, row in runs.items() if "error" not in row} for name, runs in rows.items()}
    mean = {name: float(np.mean([row["val_loss"] for row in runs.values()])) if runs else np.inf for name, runs in good.items()}
    order, columns = sorted(own, key=mean.get), [*dict.fromkeys(name for setting in own.values() for name in setting)]
    best = good[order[0]]
    out = [f"Flags of all: `{shlex.join(flags_of(common))}`", ""] if common else []
    out += ["| " + " | ".join([*columns, "n", "mean val loss", "above the best, same seeds", "CPU s", "parameters"]) + " |",
            "|---" * (len(columns) + 5) + "|"]
    for name in order:
        runs, failed = good[name], len(rows[name]) - len(good[name])
        both = sorted(runs.keys() & best.keys())
        above, error = ablate.paired([runs[seed]["val_loss"] - best[seed]["val_loss"] for seed in both])
        cells = [*(str(own[name].get(column, "")).replace("|", "\\|") for column in columns),
                 f"{len(runs)}" + (f" ({failed} failed)" if failed else ""),
                 f"{mean[name]:.4f}" if runs else "-",
                 "-" if not both or name == order[0] else f"{above:+.4f}" + (f" ± {error:.4f}" if len(both) > 1 else ""),
                 f"{np.mean([row['cpu_time_s'] for row in runs.values()]):.1f}" if runs else "-",
                 next((str(row["params"]) for row in runs.values()), "-")]
        out.append("| " + " | ".join(cells) + " |")
    winner = shlex.join([*flags_of(common | own[order[0]]), *data_flags])
    return "\n".join(out + [f"\nThe best: python train.py {winner}"] * bool(best))

def parse(argv):
    """(arguments, flags of fields, flags after --). Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.sweep --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.sweep NAME [--FIELD=VALUE,VALUE ...] [-- FLAGS]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("name", metavar="NAME", help="of the sweep")
    flag("--list", metavar="FILE", help="settings, a line of flags each")
    flag("--jobs", type=int, default=2, metavar="N",
         help="runs at a time, each on its share of the cores; 1 on an accelerator (default: %(default)s)")
    flag("--data", metavar="DIR", help="folder of the shards *train_*.bin and *val_*.bin (default: the demo's text)")
    flag("--out", metavar="FILE", help="where the lines are (default: logs/sweeps/NAME.jsonl)")
    flag("--table", action="store_true", help="run nothing")
    flag("--same_source", action="store_true", help="run again what another train.py ran")
    flag("--retry", action="store_true", help="run again what failed")
    split = argv.index("--") if "--" in argv else len(argv)
    args, fields = parser.parse_known_args(argv[:split])
    if args.jobs < 1 or not args.name or os.sep in args.name:
        fail(f"{args.name} --jobs={args.jobs}: wanted a name, no path, and at least 1 job")
    args.out = Path(args.out or ROOT / "logs/sweeps" / f"{args.name}.jsonl")
    return args, fields, argv[split + 1:]

def main(argv=None, command=ablate.command):
    """Returns the exit code: 0, or 130 if interrupted. Raises UsageError before anything runs."""
    args, fields, rest = parse(sys.argv[1:] if argv is None else argv)
    grid, common, points = read_grid(fields), read_setting(rest), read_points(args.list) if args.list else [{}]
    args.seeds = [parse_flags([f"--seed={seed}"]).seed for seed in grid.pop("seed", ["0"])]
    own, entries = settings_of(points, grid, common)
    data = ablate.data_of(args.data)
    rows, interrupted = ablate.run_missing(entries, data, args, command)
    print(table_of(own, rows, common, data[0]), *ablate.notes_of(rows), sep="\n", flush=True)
    return 130 if interrupted else 0

if __name__ == "__main__":
    ablate.run(main)
