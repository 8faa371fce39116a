"""Is this folder a record? Only its logs are read: no JAX and no accelerator is needed.

    pip install -r scripts/requirements.txt
    python -m scripts.verify_record records/cpu/2026-11-21_Demo
    python -m scripts.verify_record records/cpu/2026-11-21_Demo --rerun=3    trains seed 3 again

A record is <track>/<date>_<Name>/ with a README.md and seed<k>.txt, the untouched log.txt of every
run that came to its end, and failed<k>.txt of every run that did not. What a track asks for stands
in the table of records/README.md and nowhere else: no target, count or hash is taken from a log.
records/README.md also says what each level of this check proves.

Exit codes: 0 accepted; 1 rejected, each reason on a line; 2 usage, or a folder that fails.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from scripts.files import NotText, read_text

TRACKS = Path(__file__).resolve().parent.parent / "records/README.md"
MAX_STEPS = 10_000_000
P_VALUE = 0.01
BAR = "\n" + "=" * 120 + "\n"  # between the source and the rest of a log
DATA_FILE = r"data: .+ tokens:(\d+) sha256:([0-9a-f]{64})\n"
STEP = re.compile(
    r"step:(\d+)/(\d+) train_loss:(\d+\.\d{4})(?: val_loss:(\d+\.\d{4}))? train_time:(\d+\.\d{3})s"
    r" step:(\d+\.\d)ms tok/s:(\d+\.\d+)([kM]) mfu:(?:-|(\d+\.\d)%) wait:\d+\.\dms eta:\d+s",
    re.ASCII,
)
SAVED = r"saved: step-\d+ in \d+\.\ds"  # may stand among the step lines
FINAL = re.compile(
    r"(?P<result>final: step:\d+/\d+ tokens:\d+ val_loss:\d+\.\d{4} train_time:\d+\.\d{3}s)"
    r" cpu_time:(?P<cpu>\d+\.\d)s wall:\d+\.\ds(?: peak_memory:\d+\.\d\dGiB)?"
    r"(?: target:(?P<target>\S+) (?:not reached|"
    r"reached at step (?P<reached>\d+) after (?P<after>\d+\.\d{3})s))?",
    re.ASCII,
)
LINES = re.compile(  # of a log, from the source to the result
    r"preset: (?P<preset>\S+) \(.+\)\n"
    r"argv: (?P<argv>.*)\n"
    r"config: (?P<config>.+)\n"
    r"versions: (?P<versions>python=(?P<python>\S+).*)\n"
    r"devices: (?P<devices>\d+ x [^,\n]+, \d+ processes, (?P<cores>\d+) host cores)\n"
    r"(?:attention: .+\n)?"  # older logs have none
    r"(?P<files>(?:data: .+ tokens:\d+ sha256:[0-9a-f]{64}\n){2,})"
    r"data: validation scores (?P<count>\d+) targets; "
    r"sha256 of these and the token before them:(?P<scored>[0-9a-f]{64})\n"
    r"data: (?P<read>\d+) tokens read for (?P<trained>\d+) trained on, .*\n"
    r"parameters: (?P<parameters>\d+)\n"
    r"(?:compiled: \w+ in \d+\.\ds.*\n)+"
    r"(?P<steps>(?:(?:step|saved):.*\n)+)" + FINAL.pattern + r"\n",
    re.ASCII,
)
RESULT = r"\nstep:(\d+)/\1 .*val_loss:"  # of a run that came to its end
SHARED = ("preset", "devices", "files", "scored", "parameters")  # what all runs say
MAY_DIFFER = {"seed", "log_dir", "save_every", "resume"}  # flags, between the runs of a record
RERUN_MAY_DIFFER = {"log_dir", "resume", "versions", "devices", "attention", "micro_tokens"}
ELSEWHERE = r"(?:^| )(?:platform|JAX_COMPILATION_CACHE_DIR)=.*?(?= [A-Za-z]\w*=|$)"  # versions
LOSS_ERROR = 0.501e-4  # half of the last digit that is written, and a little for the arithmetic
TIME_ERROR = 1.01e-3  # s, of a difference of two times
STEP_ERROR = 0.0501e-3  # s


class UsageError(ValueError):
    """What the caller can mend. Exit code 2."""


class Rejected(ValueError):
    """Why a file is not the log of a run that counts. One sentence."""


# What a log raises whose lines have the right form and impossible contents.
DAMAGED = (ValueError, ArithmeticError, LookupError, RecursionError)
NUMBERS = ("steps", "log_every", "val_every", "max_epochs", "val_tokens", "target_loss", "seed")


class Track(NamedTuple):
    """A row of the table of tracks."""

    target: float  # the mean validation loss must not be above it
    val_targets: int
    scored: list  # SHA-256 of the scored tokens; empty: not known
    files: list  # SHA-256 of the training files there are; empty: not known
    python: str  # how its version begins, or "any"
    devices: list  # parts of a log's devices line


class Step(NamedTuple):
    """The numbers of a step line, in its order. Times and rates are means since the line before."""

    step: float
    steps: float
    train_loss: float
    val_loss: float | None
    train_time: float  # s
    step_ms: float
    speed: float  # tokens per second
    mfu: float | None  # of the devices' peak


START = Step(0, 0, 0, None, 0, 0, 0, None)


class Schedule(NamedTuple):
    """Which steps a run makes, and of how many tokens."""

    steps: int
    log_every: int
    val_every: int  # steps: only at the end
    ends: list  # of the stages, in steps
    sizes: list  # of their batches, in tokens

    def tokens(self, step):
        """Training tokens up to the end of this step."""
        tokens = 0
        start = 0
        for end, size in zip(self.ends, self.sizes, strict=True):
            tokens += max(0, min(end, step) - start) * size
            start = end
        return tokens

    def lines(self):
        """[(step, of how many, whether it has a validation loss)] of the step lines of a log."""
        evaluated = {*range(self.val_every, self.steps, self.val_every), self.steps}
        written = evaluated.union(range(self.log_every, self.steps, self.log_every))
        return [(step, self.steps, step in evaluated) for step in sorted(written)]


class Run(NamedTuple):
    """What a complete log tells."""

    name: str
    source: str
    said: dict  # what LINES names
    config: dict  # {field: value}
    steps: list  # of Step

    @property
    def last(self):
        return self.steps[-1]

    @property
    def curve(self):
        return {(now.step, now.train_loss) for now in self.steps}

    @property
    def facts(self):
        """{name: value} of what the runs of a record share: see MAY_DIFFER."""
        said = {name: self.said[name] for name in SHARED}
        said["versions"] = re.sub(ELSEWHERE, "", self.said["versions"])
        said["source"] = self.source
        return self.config | said


def need(holds, reason):
    if not holds:
        raise Rejected(reason)


# ---- One log -------------------------------------------------------------------------------------


def read_log(path):
    """(source, what stands between it and the digest) of a sealed log. Raises Rejected."""
    body, _, digest = path.read_bytes().rpartition(b"\nsha256:")
    sealed = re.fullmatch(rb"[0-9a-f]{64}\n", digest)
    need(sealed, "its last line is not its digest: cut off, or without a result (failed<k>.txt)")
    true_digest = hashlib.sha256(body + b"\n").hexdigest()
    need(digest.decode() == f"{true_digest}\n", "its digest is not that of the bytes above it")
    source, _, rest = body.decode().partition(BAR)
    return source, rest


def is_number(value):
    return type(value) in (int, float)


def flatten(config):
    """{field: value} of a config in JSON. A column of the stages is one field: stages.end.

    Raises Rejected where what is read of it is no number, or KeyError without a column.
    """
    need(isinstance(config, dict), "config: no fields")
    numbers = [config[name] for name in NUMBERS if name in config]
    fields = {}
    for name, value in config.items():
        if name == "stages":
            is_table = isinstance(value, list) and value and all(type(row) is dict for row in value)
            need(is_table, "config: stages is no table")
            for column in value[0]:
                fields[f"stages.{column}"] = [row[column] for row in value]
            numbers += fields["stages.end"] + fields["stages.batch_tokens"]
        elif isinstance(value, dict):
            fields |= {f"{name}.{column}": cell for column, cell in value.items()}
        else:
            fields[name] = value
    need(all(map(is_number, numbers)), "config: words where numbers belong")
    return fields


def read_config(text):
    """{field: value} of a line config: JSON, or name=value name=value up to commit e79511b."""
    if text.startswith("{"):
        return flatten(json.loads(text))
    words = re.split(r"(?:^| )([a-z]\w*)=", text)
    return dict(zip(words[1::2], words[2::2], strict=True))


def check_flags(argv, config):
    """A flag that is a number is that number in the config. Raises Rejected, or one of DAMAGED."""
    words = [word.removeprefix("--").partition("=") for word in shlex.split(argv)]
    for flag, text in {flag: text for flag, _, text in words}.items():
        value = config.get(flag)
        if is_number(value) and text != "none":
            asked = f"--{flag}={text}"[:80]
            need(float(text) == value, f"config: not what {asked!a} asks for")


def read_schedule(config):
    """The Schedule that train.py makes of a config. Raises Rejected, or one of DAMAGED."""
    if "stage_ends" in config:  # up to commit e79511b
        ends = str(config["stage_ends"]).split(",")
        sizes = str(config["batch_tokens"]).split(",")
        sizes *= len(ends) if len(sizes) == 1 else 1
    else:
        ends = config["stages.end"]
        sizes = config["stages.batch_tokens"]
    steps, log_every, val_every = (int(config[f]) for f in ("steps", "log_every", "val_every"))
    need(0 < steps <= MAX_STEPS, f"config: {steps} steps cannot be")
    ends = [round(float(end) * steps) for end in ends]
    return Schedule(steps, log_every, val_every or steps, ends, [int(size) for size in sizes])


def check_data(said, schedule, epochs):
    """There are as many tokens as the schedule trains on. Raises Rejected."""
    *train, _ = re.findall(DATA_FILE, said["files"])
    there_are = epochs * sum(int(tokens) for tokens, _ in train)
    read = int(said["read"])
    trained = int(said["trained"])
    asked = schedule.tokens(schedule.steps)
    need(trained == asked, f"data: {trained} tokens trained on, the config asks for {asked}")
    need(trained <= read <= there_are, f"data: {read} tokens read, {there_are} there are")


def parse_step(line):
    """The Step of a line, or None where train.py writes no such line."""
    match = STEP.fullmatch(line)
    if not match:
        return None
    *texts, speed, unit, percent = match.groups()
    numbers = [float(text) if text else None for text in texts]
    scale = {"k": 1e3, "M": 1e6}[unit]
    mfu = float(percent) / 100 if percent else None
    return Step(*numbers, float(speed) * scale, mfu)


def check_clock(now, before, schedule):
    """Times and rates of a step line agree, up to the rounding of their digits. Raises Rejected."""
    seconds = now.train_time - before.train_time
    steps = now.step - before.step
    tokens = schedule.tokens(now.step) - schedule.tokens(before.step)
    speed_error = 50.1 if now.speed < 1e6 else 5010  # half of the last digit
    step_off = abs(seconds - steps * now.step_ms / 1e3)
    tokens_off = abs(tokens - seconds * now.speed)
    right = step_off <= TIME_ERROR + steps * STEP_ERROR
    right &= tokens_off <= TIME_ERROR * now.speed + speed_error * seconds
    need(right, f"step {now.step:g}: the clock does not fit the line before")


def read_steps(lines, schedule):
    """[Step]: all that the schedule asks for, with a clock that adds up. Raises Rejected."""
    steps = []
    for line in lines:
        if not re.fullmatch(SAVED, line, re.ASCII):
            steps.append(parse_step(line))
            need(steps[-1], f"{line[:80]!a} is not a step line")
    found = [(now.step, now.steps, now.val_loss is not None) for now in steps]
    asked = schedule.lines()
    need(found == asked, f"its {len(found)} step lines are not the {len(asked)} of its config")
    for before, now in itertools.pairwise([START, *steps]):
        check_clock(now, before, schedule)
    return steps


def check_final(said, last, schedule):
    """The final line repeats the last step line. Raises Rejected."""
    n = schedule.steps
    loss = f"val_loss:{last.val_loss:.4f} train_time:{last.train_time:.3f}s"
    repeats = said["result"] == f"final: step:{n}/{n} tokens:{schedule.tokens(n)} {loss}"
    need(repeats, "its final line is not that of its last step")
    possible = float(said["cpu"]) <= int(said["cores"]) * last.train_time + 0.1
    need(possible, f"final: cpu_time {said['cpu']}s is more than {said['cores']} cores have")


def check_target(said, steps, goal):
    """The final line says when the run's own target was reached. Raises Rejected."""
    need(float(said["target"] or 0) == goal, "final: its target is not the config's target_loss")
    reached = int(said["reached"] or 0)
    after = float(said["after"] or 0)
    right = False
    for limit in (goal - LOSS_ERROR, goal + LOSS_ERROR):
        below = (now for now in steps if now.val_loss is not None and now.val_loss <= limit)
        first = next(below, START)
        right |= reached == first.step and abs(after - first.train_time) <= TIME_ERROR
    need(right, f"final: target {goal:g} was not reached when it says")


def read_run(path):
    """The Run of a log. Raises Rejected, or one of DAMAGED."""
    source, rest = read_log(path)
    match = LINES.match(rest)
    parts = "preset, argv, config, versions, devices, data, parameters, compiled, step, final"
    need(match, f"the lines below its source are not those of a whole run: {parts}")
    said = match.groupdict()
    has_file = any(word.startswith("@") for word in shlex.split(said["argv"]))
    need(not has_file, "argv reads flags from a file, and what that held is not in the log")
    config = read_config(said["config"])
    schedule = read_schedule(config)
    check_data(said, schedule, int(config["max_epochs"]))
    steps = read_steps(said["steps"].splitlines(), schedule)
    check_final(said, steps[-1], schedule)
    check_target(said, steps, float(config["target_loss"]))
    check_flags(said["argv"], config)
    return Run(path.name, source, said, config, steps)


# ---- The set -------------------------------------------------------------------------------------


def read_track(path, name):
    """The Track of this name, from the Markdown table of seven columns. Raises UsageError."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        cells = [cell.strip("` ") for cell in line.strip("| ").split("|")]
        if cells[0] != name or len(cells) != 7:
            continue
        _, target, count, scored, files, python, devices = cells
        hashes = [re.findall(r"\b[0-9a-f]{64}\b", cell) for cell in (scored, files)]
        count = count.replace(",", "")
        if not (re.fullmatch(r"\d+(\.\d+)?", target) and re.fullmatch(r"\d{1,15}", count)):
            raise UsageError(f"{path}, line {number}: target and val targets must be numbers")
        return Track(float(target), int(count), *hashes, python, devices.split(", "))
    raise UsageError(f"{name}: no such track in {path}; wanted DIR to be <track>/<date>_<Name>")


def check_track(run, track):
    """The run is one of this track: what it scored, trained on and ran on. Raises Rejected."""
    said = run.said
    *train, val = [digest for _, digest in re.findall(DATA_FILE, said["files"])]
    devices = said["devices"].split(", ")
    right = {  # by column of the table
        "val targets": {int(said["count"]), int(run.config["val_tokens"])} == {track.val_targets},
        "scored tokens": said["scored"] in (track.scored or [said["scored"]]),
        "training files": set(train) <= set(track.files or train),
        "Python": track.python == "any" or said["python"].startswith(track.python),
        "devices": set(track.devices) <= set(devices),
    }
    wrong = ", ".join(name for name, holds in right.items() if not holds)
    need(not wrong, f"not the track's: {wrong}")
    need(val not in train + track.files, "its validation file is a training file")
    seconds = run.last.train_time
    alone = "1 x cpu" not in devices or seconds <= 10 or float(said["cpu"]) >= seconds / 2
    need(alone, f"cpu_time {said['cpu']}s is less than half of {seconds}s: other work beside it?")


def differences(run, first, may_differ):
    """Yield where two runs differ and must not."""
    ours = run.facts
    theirs = first.facts
    for name in ours | theirs:
        if name not in may_differ and ours.get(name) != theirs.get(name):
            yield f"another {name[:80]!a} than {first.name}"


def check_together(runs):
    """Yield reasons against runs that do not repeat the first with another seed."""
    for i, run in enumerate(runs):
        seed = str(run.config["seed"])
        if run.name != f"seed{seed}.txt":
            yield f"{run.name}: its seed is {seed[:20]!a}: misnamed, or one run twice"
        for other in runs[:i]:
            if 2 * len(run.curve & other.curve) > len(run.curve):
                yield f"{run.name}: most of its training losses are those of {other.name}"
        for reason in differences(run, runs[0], MAY_DIFFER):
            yield f"{run.name}: {reason}"


def read_part(path, track, readme):
    """The Run of a file, or None for another part of a record. Raises Rejected, or of DAMAGED."""
    need(path.is_file() and not path.is_symlink(), "no plain file")
    if re.fullmatch(r"seed\d+\.txt", path.name):
        run = read_run(path)
        check_track(run, track)
        return run
    if re.fullmatch(r"failed\d+\.txt", path.name):
        text = path.read_text(encoding="utf-8", errors="replace")
        need(not re.search(RESULT, text), "a run that came to its end: it counts, as seed<k>.txt")
        need(path.name in readme, "README.md does not tell of it")
        return None
    wanted = "README.md, seed<k>.txt, failed<k>.txt, pictures *.svg"
    need(path.name == "README.md" or path.suffix == ".svg", f"not part of a record: {wanted}")


def read_record(folder, track):
    """(Runs that count, reasons against the record). Raises OSError."""
    runs = []
    reasons = []
    readme = folder / "README.md"
    if not readme.is_file():
        raise UsageError(f"{readme}: wanted a file that tells of the record")
    readme = readme.read_text(encoding="utf-8", errors="replace")
    for path in sorted(folder.iterdir()):
        try:
            if run := read_part(path, track, readme):
                runs.append(run)
        except Rejected as error:
            reasons.append(f"{path.name!a}: {error}")
        except DAMAGED as error:
            reasons.append(f"{path.name!a}: cannot be read as a log: {repr(error)[:80]!a}")
    return runs, reasons + list(check_together(runs))


def judge(runs, target):
    """Print the runs and their statistics. Returns why they do not show that target, or ""."""
    from scipy import stats

    for run in runs:
        times = f"train_time {run.last.train_time:.3f} s, cpu_time {run.said['cpu']} s"
        print(f"{run.name}: val_loss {run.last.val_loss:.4f}, {times}")
    n = len(runs)
    losses = [run.last.val_loss for run in runs]
    if len(set(losses)) < 2:
        return f"n = {n}: a t-test needs two runs at least, whose losses differ"
    mean = statistics.fmean(losses)
    seconds = statistics.fmean(run.last.train_time for run in runs)
    t, p = stats.ttest_1samp(losses, target, alternative="less")
    print(f"n {n}, mean val_loss {mean:.5f}, sd {statistics.stdev(losses):.5f}")
    print(f"t {t:.2f}, one-sided p {p:.2g} of mean <= {target:g}")
    print(f"(target - mean) * sqrt(n) = {(target - mean) * math.sqrt(n):.5f}")
    print(f"mean train_time {seconds:.3f} s")
    if p < P_VALUE:
        return ""
    return f"p = {p:.2g}, wanted below {P_VALUE}: the mean {mean:.5f}, the target {target:g}"


# ---- Running one again ---------------------------------------------------------------------------


def train_again(logged, folder):
    """The Run of a logged source, trained anew in a folder. Raises Rejected, or one of DAMAGED."""
    script = folder / "train.py"
    script.write_bytes(logged.source.encode())
    flags = [*shlex.split(logged.said["argv"]), f"--log_dir={folder}/logs", "--resume="]
    print(f"rerun: this now executes the program in {logged.name}, with all that you may do here")
    sys.stdout.flush()
    code = subprocess.run([sys.executable, str(script), *flags]).returncode
    need(code == 0, f"the program ended with exit code {code}")
    (log,) = folder.glob("logs/*/log.txt")
    return read_run(log)


def rerun(logged, tolerance):
    """Train a run again in a temporary folder; data are looked up from here. Returns reasons."""
    with tempfile.TemporaryDirectory(prefix="rerun-") as folder:
        try:
            again = train_again(logged, Path(folder))
        except DAMAGED as error:  # Rejected is one
            return [f"rerun: no log of a whole run: {error}"]
    for name in ("versions", "devices"):
        print(f"rerun: {name} of the log: {logged.said[name]!a}; here: {again.said[name]!a}")
    theirs = logged.last.val_loss
    ours = again.last.val_loss
    print(f"rerun: the final loss is {theirs:.4f} in the log, {ours:.4f} here")
    reasons = [f"rerun: {reason}" for reason in differences(again, logged, RERUN_MAY_DIFFER)]
    apart = abs(ours - theirs)
    if not apart <= tolerance + 1e-9:  # a tolerance of nan tolerates nothing
        reasons.append(f"rerun: the final losses are {apart:.4f} apart, tolerated {tolerance:g}")
    return reasons


def parse(argv):
    """The arguments. Raises UsageError."""

    def fail(message):
        raise UsageError(f"{message} (python -m scripts.verify_record --help)")

    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify_record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    flag = parser.add_argument
    flag("folder", metavar="DIR", type=Path, help="<track>/<date>_<Name>")
    flag("--rerun", type=int, metavar="K", help="train seed K again: runs the program in its log")
    tolerance = "of the rerun's final loss, nats (default: 0.003)"
    flag("--tolerance", type=float, default=0.003, help=tolerance)
    args = parser.parse_args(argv)
    args.folder = Path(os.path.realpath(args.folder))
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder}: wanted a record's folder, <track>/<date>_<Name>")
    if args.rerun is not None and not (args.folder / f"seed{args.rerun}.txt").is_file():
        raise UsageError(f"--rerun={args.rerun}: wanted K of a seed<K>.txt in {args.folder}")
    return args


def main(argv=None):
    """Print the verdict. Returns 0 where the record is accepted, 1 where not. Raises UsageError."""
    args = parse(argv)
    track = read_track(TRACKS, args.folder.parent.name)
    print(f"{args.folder.parent.name}/{args.folder.name}: target {track.target:g}")
    runs, reasons = read_record(args.folder, track)
    against = judge(runs, track.target)
    if against and not reasons:  # what some of the runs show is no reason against all
        reasons.append(against)
    if runs:
        digest = hashlib.sha256(runs[0].source.encode()).hexdigest()
        print(f"source of {runs[0].name}: sha256:{digest}")
    for hashes, what in ((track.scored, "which tokens were scored"), (track.files, "the data")):
        if not hashes:
            print(f"NOT CHECKED: {what}; the table of tracks knows no SHA-256 yet")
    if args.rerun is not None and not reasons:
        logged = next(run for run in runs if run.name == f"seed{args.rerun}.txt")
        reasons = rerun(logged, args.tolerance)
    for reason in reasons:
        print(f"rejected: {reason}")
    print("REJECTED" if reasons else "ACCEPTED")
    return 1 if reasons else 0


def command():
    """main() for the shell. train.command would need JAX."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a console may not know all characters
    try:
        code = main()
    except SystemExit as leaving:  # of --help
        code = leaving.code
    except KeyboardInterrupt:
        code = 130
    except (UsageError, NotText, OSError, ImportError) as error:
        code = 2
        print(f"error: {error}", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # nobody reads it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    return code


if __name__ == "__main__":
    sys.exit(command())
