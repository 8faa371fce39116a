"""What does a change do to the loss? Trains variants with several seeds and compares them.

    python -m scripts.compare records/ablations/LIST.txt     a list of variants, against its base
    python -m scripts.compare lr --muon_lr=0.01,0.02 --seeds=0,1 -- --preset=demo --steps=200
                                                             a grid of flags, the best one first

A list is a text file, a line each, # begins a comment:
    all: --steps=500                    optional: flags put before everybody's own
    sense: plus                         optional: an entry is base and a technique; minus, the
                                        default: it is base less a technique
    base:                               the first entry, what the others are compared with
    no softcap: --softcap=              NAME: flags of train.py
    nanoGPT: model=nanogpt --steps=400  through `python -m scripts.baselines nanogpt`
    gelu: patch=gelu.diff               train.py changed by a diff that lies beside the list

A grid has a name and flags of train.py with several values each; every combination runs. Values
of a number have commas between them. In a tuple, a text or a column of the stage table a comma is
part of the value: repeat that flag, --stages.lr=1 --stages.lr=1,1.5,1.7 are two values. Flags that
all combinations have stand after --.

A run is a process on its own share of the cores. When it has ended it is a line of LIST.jsonl (of
a grid: logs/compare/NAME.jsonl), known by model, name of the diff, flags, seed and data. Stop with
Ctrl-C, give the same command again and it continues; with more variants or seeds only these run.
Seed by seed, so that what is there early is a whole table. A seed gives all variants the same order
of data and the same first value of each weight that they share. train.py and scripts/ are copied
first: edit them while it runs. A run that failed stays as a line with its error.
"""

import argparse
import collections
import contextlib
import datetime
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, get_type_hints

import train
from scripts.baselines import MODELS
from scripts.files import NotText, read_text
from scripts.tables import best_first, notes_of, reach, table_of, without_errors
from train import ROOT, Config, Stage, UsageError, read_flags, require

GIVEN = ("--seed", "--log_dir", "--resume", "--train_files", "--val_files")  # by this script
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


class Entry(NamedTuple):
    """A variant."""

    name: str
    flags: list
    model: str = ""  # of scripts.baselines; "": train.py's own
    patch: Path | None = None  # a diff of train.py
    own: str = ""  # what its line in the list says


class Comparison(NamedTuple):
    """What is compared."""

    entries: list
    common: list  # flags of all
    sense: int  # 1 where an entry is base less a technique, -1 where it is base and one


# ---- Lists and grids -----------------------------------------------------------------------------


def check(entry):
    """Raises UsageError for what train.py would refuse, before anything runs.

    Without --preset a run's machine chooses one, so the flags must fit any of them.
    """
    for word in entry.flags:
        is_given = word.partition("=")[0] in GIVEN
        require(not is_given, f"{word} is given by compare (--seeds, --data); leave it out")
    known = ", ".join(MODELS)
    require(not entry.model or entry.model in MODELS, f"model={entry.model}: wanted {known}")
    if entry.patch:
        return  # a diff may bring flags
    presets = MODELS[entry.model].presets if entry.model else train.PRESETS
    errors = []
    for preset in presets:
        try:
            train.parse_flags(entry.flags, preset, presets)
            return
        except UsageError as error:
            errors.append(error)
    raise errors[0]


def read_entry(name, words, common, folder):
    """An Entry of a line's words: model=NAME, patch=FILE and flags."""
    model = ""
    patch = None
    flags = list(common)
    for word in words:
        kind, _, value = word.partition("=")
        if kind == "model":
            model = value
        elif kind == "patch":
            patch = folder / value
            there = Path(os.path.realpath(folder))
            lies_there = Path(os.path.realpath(patch)).is_relative_to(there)
            require(
                lies_there, f"{word}: wanted a file that lies beside the list, or in a folder there"
            )
            require(patch.is_file(), f"there is no file {patch}")
        else:
            flags.append(word)
    return Entry(name, flags, model, patch, shlex.join(words))


def text_of(path):
    """The text of a file. Raises UsageError that names the line that is none, and OSError."""
    try:
        return read_text(path)
    except NotText as error:
        raise UsageError(str(error)) from error


def read_list(path, runs):
    """The Comparison of a list. runs: whether the flags must be those of this train.py.

    Raises UsageError that names the line, and OSError for a file that is not there.
    """
    entries = []
    common = []
    sense = "minus"
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, rest = line.partition(":")
        name = name.strip()
        try:
            require(colon and name, "wanted NAME: FLAGS")
            words = shlex.split(rest, comments=True)
            if name in ("all", "sense"):
                require(not entries, "wanted above the entries")
                common = words if name == "all" else common
                sense = " ".join(words) if name == "sense" else sense
                require(sense in ("minus", "plus"), "wanted minus or plus")
                continue
            require(name == "base" or entries, "wanted base: first")
            is_new = all(entry.name != name for entry in entries)
            require(is_new, "an entry of this name is there already")
            entries.append(read_entry(name, words, common, path.parent))
            if runs:
                check(entries[-1])
        except (ValueError, OSError) as error:  # ValueError: an open quote, or a UsageError
            raise UsageError(f"{path}, line {number}, {name!r}: {error}") from error
    require(entries, f"{path}: no entries; wanted base: first")
    return Comparison(entries, common, 1 if sense == "minus" else -1)


def splits_at_commas(flag):
    """Whether a comma stands between two values of a flag, and is no part of one."""
    table, _, name = flag.rpartition(".")
    kind = get_type_hints(Stage if table == "val" else Config).get(name)
    return table != "stages" and kind in (int, float, bool, int | None)


def read_grid(words, common):
    """The Comparison of all combinations of the values that words give. Raises UsageError.

    common: flags of all, of which a combination's own take precedence. Flags are sorted, so that a
    run is known in whichever order they were said.
    """
    values = {}
    for word in words:  # one by one: a flag may come several times
        for flag, text in read_flags([word]).items():
            texts = text.split(",") if splits_at_commas(flag) else [text]
            values.setdefault(flag, []).extend(texts)
    entries = {}
    for combination in itertools.product(*values.values()):
        own = dict(zip(values, combination, strict=True))
        texts = read_flags(common) | own
        flags = [f"--{flag}={texts[flag]}" for flag in sorted(texts)]
        name = " ".join(f"{flag}={text}" for flag, text in own.items()) or "all alike"
        entries[name] = Entry(name, flags)
        check(entries[name])
    return Comparison(list(entries.values()), common, -1)


# ---- Runs that are there -------------------------------------------------------------------------


def data_of(folder):
    """(flags that name a folder's shards, what tells these data from others).

    Without a folder: of the demo's text. Raises UsageError.
    """
    if not folder:
        return [], "embedded"
    patterns = [f"{folder}/*{split}_*.bin" for split in ("train", "val")]
    hashes = []
    for pattern in patterns:
        hashes += train.open_shards(pattern).sha256
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return [f"--train_files={patterns[0]}", f"--val_files={patterns[1]}"], digest


def key_of(entry, seed, data_key):
    """Names a run, whatever the state of train.py and of a diff."""
    names = [entry.model, entry.flags, seed, data_key]
    if entry.patch:
        names.append(entry.patch.name)
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


LINE_BEGINS = '{"name": '
FIELDS = {  # of a line, and their types
    "name": str,
    "seed": int,
    "key": str,
}
RESULTS = {  # of a line without an error
    "val": list,
    "val_loss": float,
    "train_time_s": float,
    "cpu_time_s": float,
    "params": int,
    "devices": str,
}


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def problem_with(record):
    """What a line of results lacks, or ""."""
    if not isinstance(record, dict):
        return "no result"
    kinds = FIELDS if "error" in record else FIELDS | RESULTS
    for name, kind in kinds.items():
        value = record.get(name)
        if not (is_number(value) if kind is float else isinstance(value, kind)):
            return f"{name} is {json.dumps(value)[:40]}"
    for row in record.get("val", ()):
        if not (isinstance(row, list) and len(row) == 3 and all(map(is_number, row))):
            return f"val holds {json.dumps(row)[:40]}"
    return ""


def read_records(path):
    """{key: the last line that has it}. A line that a kill cut short is passed over.

    Raises UsageError that names the line which is none of ours, and OSError.
    """
    records = {}
    lines = text_of(path).split("\n") if path.exists() else [""]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line or "{}")
        except (json.JSONDecodeError, RecursionError):
            was_cut = line.startswith(LINE_BEGINS) or LINE_BEGINS.startswith(line)
            wanted = "wanted a line as this script writes it, or another --out"
            require(was_cut, f"{path}, line {number}: no JSON; {wanted}")
            continue
        if line:
            problem = problem_with(record)
            require(not problem, f"{path}, line {number}: {problem}; wanted what a run gave")
            records[record["key"]] = record
    return records


@contextlib.contextmanager
def only_writer(path):
    """The file of results, open to add lines. Its lock dies with the process. Raises UsageError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        train.lock(file, f"{path}: another comparison adds to it; wait for its end")
        yield file


def append_record(file, record):
    """Add a line to a file, whose last one a kill may have cut short."""
    is_cut = Path(file.name).read_bytes()[-1:] not in (b"", b"\n")
    file.write("\n" * is_cut + json.dumps(record) + "\n")
    file.flush()


# ---- Running -------------------------------------------------------------------------------------


def copy_source(source, folder):
    """Copy what a run executes. Returns the folder."""
    folder.mkdir()
    shutil.copy(source / "train.py", folder)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / "scripts", folder / "scripts", ignore=ignore)
    return folder


def apply_patch(patch, folder):
    """Change a copy of train.py by a diff. Raises UsageError where it does not fit."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    argv = ["git", "apply", patch.resolve()]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True)
    why = " ".join(done.stderr.decode(errors="replace").split())[:300]
    fits = done.returncode == 0
    require(fits, f"{patch}: does not fit this train.py ({why}); make it anew")


def make_sources(entries, folder):
    """{entry's name: a folder with the train.py and scripts that it runs}. Raises UsageError."""
    plain = copy_source(ROOT, folder / "plain")
    sources = {}
    for entry in entries:
        if entry.name in sources:
            continue
        sources[entry.name] = plain
        if entry.patch:
            sources[entry.name] = copy_source(plain, folder / f"patched_{len(sources)}")
            apply_patch(entry.patch, sources[entry.name])
    return sources


def program_of(entry, source):
    """A run's command line without its flags. -P: import from the copy, not from this folder."""
    if entry.model:
        return [sys.executable, "-P", "-m", "scripts.baselines", entry.model]
    return [sys.executable, "-P", str(source / "train.py")]


def share_cores(num_jobs):
    """The cores of each job. None where this system does not say which there are."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * num_jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::num_jobs] or [cores[i % len(cores)]] for i in range(num_jobs)]


@contextlib.contextmanager
def on_cores(cores):
    """A process started inside has only these cores, as a child has what its parent has."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Run(NamedTuple):
    """What works on an entry and a seed."""

    entry: Entry
    seed: int
    folder: Path  # of its log
    process: subprocess.Popen


def start(entry, seed, source, cores, data_flags, program):
    """Start a Run."""
    folder = Path(tempfile.mkdtemp(dir=source))
    argv = [*program(entry, source), *entry.flags, *data_flags]
    argv += [f"--seed={seed}", f"--log_dir={folder}"]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    # unbuffered, so that an error is the last line
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with on_cores(cores), open(folder / "said.txt", "w") as said:
        process = subprocess.Popen(
            argv, stdout=said, stderr=said, env=environment, start_new_session=True
        )
    return Run(entry, seed, folder, process)


def read_run(folder):
    """What a finished run's folder says. Raises ValueError, LookupError, TypeError or OSError."""
    *rows, final = map(json.loads, read_text(folder / "metrics.jsonl").splitlines())
    log = read_text(folder / "log.txt").split("=" * 120)[-1]
    stated = re.search("^versions: .*", log, re.M)[0]
    processor = re.search(r" processor=(.*?)(?= [A-Z_]+=|$)", stated)  # older logs name none
    return {
        "val": [[row["step"], row["tokens"], row["val_loss"]] for row in rows if "val_loss" in row],
        "val_loss": final["val_loss"],
        "train_time_s": final["train_time_s"],
        "cpu_time_s": final["cpu_time_s"],
        "params": int(re.search(r"^parameters: (\d+)", log, re.M)[1]),
        "versions": dict(re.findall(r"(python|jax|numpy)=(\S+)", stated)),
        "processor": processor and processor[1],
        "devices": re.search("^devices: (.*)", log, re.M)[1],
        "data": dict(re.findall(r"^data: (\S+) tokens:\d+ sha256:(\w+)", log, re.M)),
    }


def result_of(run):
    """What an ended run's folder says, or {"error": the last line of what it said}."""
    code = run.process.returncode
    if code == 0:
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError):  # it is not whole
            return read_run(list(run.folder.glob("*/metrics.jsonl"))[0].parent)
    said = (run.folder / "said.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return {"error": f"exit code {code}: {lines[-1][:300].replace(str(run.folder), 'DIR')}"}


def record_of(run, source, cores, data_key):
    """The line of an ended run."""
    entry = run.entry
    record = {
        "name": entry.name,
        "seed": run.seed,
        "model": entry.model,
        "flags": shlex.join(entry.flags),
        "key": key_of(entry, run.seed, data_key),
    }
    if entry.patch:
        record["patched_sha256"] = train.file_sha256(source / "train.py")
    record |= result_of(run)
    record["source_sha256"] = train.file_sha256(source.parent / "plain" / "train.py")
    record["cores"] = cores and len(cores)
    record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return record


def words_of(record):
    """What one says of a run that has ended."""
    if "error" in record:
        return record["error"]
    times = "{train_time_s:.0f} s of training, {cpu_time_s:.0f} s of CPU".format(**record)
    return f"val_loss {record['val_loss']:.4f}, {times}"


def run_all(todo, sources, data, out, num_jobs, program):
    """Run [(entry, seed), ...], num_jobs at a time, and add a line to `out` for each that ends.

    KeyboardInterrupt ends what runs.
    """
    data_flags, data_key = data
    shares = share_cores(num_jobs)
    waiting = collections.deque(todo)
    running = {}  # by its place among the jobs
    done = 0
    begin = time.perf_counter()
    try:
        while waiting or running:
            for job, cores in enumerate(shares):
                if waiting and job not in running:
                    entry, seed = waiting.popleft()
                    source = sources[entry.name]
                    running[job] = start(entry, seed, source, cores, data_flags, program)
            time.sleep(0.1)
            for job, run in list(running.items()):
                if run.process.poll() is None:
                    continue
                record = record_of(run, sources[run.entry.name], shares[job], data_key)
                append_record(out, record)
                del running[job]
                done += 1
                left = (time.perf_counter() - begin) / done * (len(todo) - done) / 60
                which = f"[{done}/{len(todo)}] {run.entry.name}, seed {run.seed}"
                print(f"{which}: {words_of(record)}; {left:.1f} min left", flush=True)
    finally:
        for run in running.values():
            run.process.kill()
            run.process.wait()


def missing(entries, data_key, args):
    """[(entry, seed)] of what args.out lacks and is to run, seed by seed."""
    records = read_records(args.out)
    source_sha256 = train.file_sha256(ROOT / "train.py")
    todo = []
    for seed, entry in itertools.product(args.seeds, entries):
        record = records.get(key_of(entry, seed, data_key), {})
        is_stale = args.same_source and record.get("source_sha256") != source_sha256
        if not record or is_stale or (args.retry and "error" in record):
            todo.append((entry, seed))
    return todo


def run_missing(entries, data, args, program):
    """Run what args.out lacks. Returns whether it was interrupted. Raises UsageError before."""
    todo = missing(entries, data[1], args)
    if not todo or args.table:
        return False
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources([entry for entry, _ in todo], Path(folder))
        count = len(entries) * len(args.seeds)
        with only_writer(args.out) as out:
            print(f"{len(todo)} of {count} runs to do, {args.jobs} at a time", flush=True)
            try:
                run_all(todo, sources, data, out, args.jobs, program)
            except KeyboardInterrupt:
                print(f"interrupted; {args.out} has what had ended, the same command continues")
                return True
    return False


def rows_of(entries, data_key, args):
    """{name: {seed: line}} of what is there."""
    records = read_records(args.out)
    rows = {}
    for entry in entries:
        keys = {seed: key_of(entry, seed, data_key) for seed in args.seeds}
        rows[entry.name] = {seed: records[key] for seed, key in keys.items() if key in records}
    return rows


# ---- Command line --------------------------------------------------------------------------------


def parse(argv):
    """(arguments, a grid's flags, flags after --). Raises UsageError."""

    def fail(message):
        raise UsageError(f"{message} (python -m scripts.compare --help)")

    parser = argparse.ArgumentParser(
        usage="python -m scripts.compare LIST.txt|NAME [--FLAG=VALUE ...] [-- FLAGS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    flag = parser.add_argument
    has_chip = any(map(glob.glob, ACCELERATORS))
    flag("what", metavar="LIST.txt|NAME", help="a list's file, or a name for a grid")
    flag("--seeds", default="0,1,2", help="(default: %(default)s)")
    flag("--data", metavar="DIR", help="folder of *train_*.bin, *val_*.bin (default: demo's text)")
    flag("--out", metavar="FILE", help="where the lines are")
    flag("--reach", metavar="NAME", help="also: when each entry reaches this one's final loss")
    flag("--table", action="store_true", help="run nothing; old lists are printed too")
    flag("--retry", action="store_true", help="run again what failed")
    flag("--same_source", action="store_true", help="run again what another train.py ran")
    flag(
        "--jobs",
        type=int,
        default=1 if has_chip else 2,
        help="runs at a time (default: 2; 1 on an accelerator, whose memory the first takes)",
    )
    split = argv.index("--") if "--" in argv else len(argv)
    args, grid = parser.parse_known_args(argv[:split])
    common = argv[split + 1 :]
    if args.jobs < 1 or not re.fullmatch(r"\d{1,9}(,\d{1,9})*", args.seeds):
        fail(f"--jobs={args.jobs} --seeds={args.seeds}: wanted a job or more, and seeds as 0,1,2")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.is_list = args.what.endswith(".txt")
    if args.is_list and grid + common:
        fail(f"{(grid + common)[0]}: in a list, flags stand on its lines; its line all: is for all")
    if not args.is_list and not re.fullmatch(r"[\w.-]+", args.what):
        fail(f"{args.what}: wanted a list's file, LIST.txt, or a grid's name without /")
    default = ROOT / "logs/compare" / f"{args.what}.jsonl"
    if args.is_list:
        default = Path(args.what).with_suffix(".jsonl")
    args.out = Path(args.out or default)
    return args, grid, common


def main(argv=None, program=program_of):
    """Run what is missing and print the table.

    Raises UsageError before anything runs, and KeyboardInterrupt after the table.
    """
    args, grid, common = parse(sys.argv[1:] if argv is None else argv)
    if args.is_list:
        comparison = read_list(Path(args.what), runs=not args.table)
    else:
        comparison = read_grid(grid, common)
    data = data_of(args.data)
    was_interrupted = run_missing(comparison.entries, data, args, program)
    rows = rows_of(comparison.entries, data[1], args)
    if not args.is_list:
        comparison = comparison._replace(entries=best_first(comparison.entries, rows))
    first = comparison.entries[0]
    print(table_of(comparison, rows), *notes_of(rows, first.name), sep="\n", flush=True)
    if not args.is_list and without_errors(rows)[first.name]:
        words = shlex.join([*first.flags, *data[0]])
        print(f"The best, by these same runs: python train.py {words}")
    if args.reach:
        print("\n" + reach(args.reach, rows))
    if was_interrupted:
        raise KeyboardInterrupt


def stoppable():
    """main, which SIGINT and SIGTERM stop. A shell's background job would ignore the first."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    main()


if __name__ == "__main__":
    sys.exit(train.command(stoppable))
