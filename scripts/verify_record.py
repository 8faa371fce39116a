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
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TRACKS = Path(__file__).resolve().parent.parent / "records/README.md"
MAX_BYTES = 16 << 20  # of a file; a log of train.py has some 100 kB
MAX_STEPS = 10_000_000
P_VALUE = 0.01
BAR = "\n" + "=" * 120 + "\n"  # between the source and the rest of a log
HEADER = re.compile(  # the lines from there to the first step line
    r"preset: (?P<preset>\S+) \(.+\)\n"
    r"argv: (?P<argv>.*)\n"
    r"config: (?P<config>.+)\n"
    r"versions: (?P<versions>python=(?P<python>\S+).*)\n"
    r"devices: (?P<devices>\d{1,6} x [^,\n]+, \d{1,6} processes, (?P<cores>\d{1,6}) host cores)\n"
    r"(?P<files>(?:data: .+ tokens:\d{1,15} sha256:[0-9a-f]{64}\n){2,})"
    r"data: validation scores (?P<count>\d{1,15}) targets; "
    r"sha256 of these and the token before them:(?P<scored>[0-9a-f]{64})\n"
    r"data: (?P<read>\d{1,15}) tokens read for (?P<trained>\d{1,15}) trained on, .*\n"
    r"parameters: (?P<parameters>\d{1,18})"
    r"(?:\ncompiled: \w+ in \d+\.\ds.*)+",
    re.ASCII,
)
DATA_FILE = r"tokens:(\d{1,15}) sha256:([0-9a-f]{64})\n"
STEP = re.compile(
    r"step:(\d{1,12})/(\d{1,12}) train_loss:(\d{1,6}\.\d{4})(?: val_loss:(\d{1,6}\.\d{4}))?"
    r" train_time:(\d{1,9}\.\d{3})s step:(\d{1,12}\.\d)ms"
    r" tok/s:(\d{1,9}\.\d{1,2})([kM]) mfu:(?:-|(\d{1,9}\.\d)%)"
    r" wait:\d{1,12}\.\dms eta:\d{1,12}s",
    re.ASCII,
)
FINAL = re.compile(
    r"(final: step:\d{1,12}/\d{1,12} tokens:\d{1,18} val_loss:\d{1,6}\.\d{4}"
    r" train_time:\d{1,9}\.\d{3}s) cpu_time:(?P<cpu>\d{1,12}\.\d)s wall:\d{1,12}\.\ds"
    r"(?: peak_memory:\d+\.\d\dGiB)?(?: target:(?P<target>\S+) (?:not reached|"
    r"reached at step (?P<reached>\d{1,12}) after (?P<after>\d{1,9}\.\d{3})s))?",
    re.ASCII,
)
SAVED = r"saved: step-\d{6,9} in \d{1,12}\.\ds"  # may stand among the step lines
RESULT = r"final:\s*step:\d|step:(\d{1,12})/\1 .{,200}val_loss:"  # of a run that came to its end
MAY_DIFFER = {"seed", "log_dir", "save_every", "resume"}  # between the runs of a record
RERUN_MAY_DIFFER = {"log_dir", "resume", "versions", "devices"}
ELSEWHERE = r"(?:^| )(?:platform|JAX_COMPILATION_CACHE_DIR)=.*?(?= [A-Za-z]\w*=|$)"  # versions
SETTLED = {"vocab_size": "none", "bos_id": "none", "attention": "auto"}  # flags that a run replaces
FLAG_WORDS = {"true": "1", "false": "0", "null": "none"}
LOSS_ERROR = 0.501e-4  # half of the last digit that is written, and a little for the arithmetic
TIME_ERROR = 1.01e-3  # s, of a difference of two times
STEP_ERROR = 0.0501e-3  # s
SPEED_ERROR = {"k": 50.1, "M": 5010}  # tokens per second


class UsageError(ValueError):
    """What the caller can mend. One sentence, exit code 2."""


class Rejected(ValueError):
    """Why a file is not the log of a run that counts. One sentence."""


# What a log raises whose lines have the right form and impossible contents.
DAMAGED = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)


class Track(NamedTuple):
    """A row of the table of tracks."""

    target: float  # the mean validation loss must not be above it
    val_targets: int
    scored: list  # SHA-256 of the scored tokens; empty: not known
    files: list  # SHA-256 of the training files there are; empty: not known
    python: str  # "3.11": any release of it; "any"
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
    speed_error: float  # half of its last digit
    mfu: float | None  # of the devices' peak


class Schedule(NamedTuple):
    """Which steps a run makes, and of how many tokens."""

    steps: int
    log_every: int
    val_every: int
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

    def evaluated(self):
        """The steps whose lines have a validation loss."""
        every = range(self.val_every, self.steps, self.val_every) if self.val_every else []
        return [*every, self.steps]

    def written(self):
        """The steps that have a line."""
        return sorted({*range(self.log_every, self.steps, self.log_every), *self.evaluated()})


class Run(NamedTuple):
    """What a complete log tells."""

    name: str
    source: str
    header: dict  # what HEADER names
    argv: dict  # {flag: text}
    config: dict  # {field: value}
    steps: list  # of Step
    cpu_time: float
    folder: str  # where it ran

    @property
    def last(self):
        return self.steps[-1]

    @property
    def source_hash(self):
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def facts(self):
        """{name: value} of what the runs of a record share: see MAY_DIFFER."""
        shared = ("files", "scored", "parameters", "devices")
        header = {name: self.header[name] for name in shared}
        versions = re.sub(ELSEWHERE, "", self.header["versions"])
        return self.config | header | {"source": self.source, "versions": versions}


def need(holds, reason):
    if not holds:
        raise Rejected(reason)


def show(text):
    """What a log says, fit to be printed: quoted, ASCII, not too long."""
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")


# ---- One log -------------------------------------------------------------------------------------


def read_bytes(path, most=MAX_BYTES):
    """All of a plain file. Raises Rejected."""
    need(path.is_file() and not path.is_symlink(), "not a plain file")
    need(path.stat().st_size <= most, f"more than {most >> 20} MiB")
    return path.read_bytes()


def read_log(path):
    """(source, the lines between it and the digest) of a sealed log. Raises Rejected."""
    body, _, digest = read_bytes(path).rpartition(b"\nsha256:")
    sealed = re.fullmatch(rb"[0-9a-f]{64}\n", digest)
    need(sealed, "its last line is not its digest: cut off, or without a result (failed<k>.txt)")
    true_digest = hashlib.sha256(body + b"\n").hexdigest()
    need(digest.decode() == f"{true_digest}\n", "its digest is not that of the bytes above it")
    need(b"\nsha256:" not in body, "a digest in its midst: more than one log")
    source, bar, rest = body.decode().partition(BAR)
    need(bar, "no source of train.py with a line of 120 = below it")
    return source, rest.split("\n")


def read_argv(text):
    """{flag: text} of a line argv. Raises Rejected for what the log alone does not repeat."""
    flags = {}
    for word in shlex.split(text):
        match = re.fullmatch("--([^=]+)=(.*)", word)
        need(match, f"argv: {show(word)} is no --flag=value; what an @FILE holds is not in the log")
        flags[match[1]] = match[2]
    return flags


def flatten(config):
    """{field: value} of a config in JSON. A column of the stages is one field: stages.end."""
    fields = {}
    for name, value in config.items():
        if name == "stages":
            for column in value[0]:
                fields[f"stages.{column}"] = [row[column] for row in value]
        elif isinstance(value, dict):
            fields |= {f"{name}.{column}": cell for column, cell in value.items()}
        else:
            fields[name] = value
    return fields


def read_config(text):
    """{field: value} of a line config: JSON, or name=value name=value up to commit e79511b."""
    if not text.startswith("{"):
        words = re.split(r"(?:^| )([a-z]\w*)=", text)
        return dict(zip(words[1::2], words[2::2], strict=True))
    config = json.loads(text)
    need(json.dumps(config) == text, "config: not JSON as train.py writes it")  # a name twice
    return flatten(config)


def words_of(text):
    """The words of a flag or a field without brackets and quotes; numbers are numbers."""
    words = []
    for word in re.findall(r"[^\s,()\[\]\"']+", text):
        word = FLAG_WORDS.get(word, word)
        try:
            words.append(float(word))
        except ValueError:
            words.append(word)
    return words


def follows(flag, text, value):
    """Whether --flag=text gives a field this value, as far as text tells."""
    found = value if isinstance(value, str) else json.dumps(value)
    if text == found or text == SETTLED.get(flag):
        return True
    wanted = words_of(text)
    found = words_of(found)
    if flag.startswith("stages.") and wanted:  # one cell stands for the whole column
        wanted *= len(found) // len(wanted)
    return wanted == found


def check_config(config, argv, preset):
    """The config is what preset and argv ask for. Raises Rejected."""
    for flag, text in [("preset", preset), *argv.items()]:
        need(flag in config, f"argv: {show('--' + flag)} is no field of the config")
        asked = f"config: {flag}={show(str(config[flag]))}, but the flags ask for {show(text)}"
        need(follows(flag, text, config[flag]), asked)
    need(config["resume"] in ("", "auto"), "config: resume is a path: a resumed run does not count")


def read_schedule(config):
    """The Schedule that train.py makes of a config. Raises Rejected, or one of DAMAGED."""
    if "stage_ends" in config:  # up to commit e79511b
        ends = config["stage_ends"].split(",")
        sizes = config["batch_tokens"].split(",")
        sizes *= len(ends) if len(sizes) == 1 else 1
    else:
        ends = config["stages.end"]
        sizes = config["stages.batch_tokens"]
    steps, log_every, val_every = (int(config[f]) for f in ("steps", "log_every", "val_every"))
    ends = [round(float(end) * steps) for end in ends]
    sizes = [int(size) for size in sizes]
    possible = 0 < steps <= MAX_STEPS and min(log_every, *sizes) > 0 and val_every >= 0
    rising = ends == sorted(ends) and ends[-1] == steps and len(ends) == len(sizes)
    need(possible and rising, "config: a schedule that cannot be")
    return Schedule(steps, log_every, val_every, ends, sizes)


def check_data(header, schedule, epochs):
    """There are tokens enough for the schedule, in different files. Raises Rejected."""
    files = re.findall(DATA_FILE, header["files"])
    hashes = {digest for _, digest in files}
    need(len(hashes) == len(files), "data: the same file twice, to train and to validate on?")
    there_are = epochs * sum(int(tokens) for tokens, _ in files[:-1])
    read = int(header["read"])
    trained = int(header["trained"])
    enough = trained <= read <= there_are
    need(enough, f"data: {trained} tokens trained on, {read} read, of {there_are} there are")
    asked = schedule.tokens(schedule.steps)
    need(trained == asked, f"data: {trained} tokens trained on, the config asks for {asked}")


def parse_step(line):
    """The Step of a line, or None where train.py writes no such line."""
    match = STEP.fullmatch(line)
    if not match:
        return None
    *texts, speed, unit, percent = match.groups()
    numbers = [float(text) if text else None for text in texts]
    scale = {"k": 1e3, "M": 1e6}[unit]
    mfu = float(percent) / 100 if percent else None
    return Step(*numbers, float(speed) * scale, SPEED_ERROR[unit], mfu)


def check_clock(now, before, schedule):
    """Times and rates of a step line agree, up to the rounding of their digits. Raises Rejected."""
    at = f"step {int(now.step)}: the clock is inconsistent:"
    grew = now.train_time - before.train_time
    need(grew > 0, f"{at} {now.train_time}s is not after the {before.train_time}s before it")
    steps = now.step - before.step
    step_s = now.step_ms / 1e3
    off = abs(grew - steps * step_s)
    wrong = f"{at} {int(steps)} steps of {now.step_ms}ms are not {grew:.3f}s"
    need(off <= TIME_ERROR + steps * STEP_ERROR, wrong)
    size = (schedule.tokens(now.step) - schedule.tokens(before.step)) / steps  # tokens of a step
    least = (now.speed - now.speed_error) * (step_s - STEP_ERROR)
    most = (now.speed + now.speed_error) * (step_s + STEP_ERROR)
    need(least <= size <= most, f"{at} {now.speed:.0f} tok/s are not {size:g} tokens in {step_s}s")


def read_steps(lines, schedule):
    """[Step]: all that the schedule asks for, with a clock that adds up. Raises Rejected."""
    steps = []
    for line in lines:
        if not re.fullmatch(SAVED, line, re.ASCII):
            steps.append(parse_step(line))
            need(steps[-1], f"{show(line)} stands among the step lines")
    asked = schedule.written()
    complete = [(now.step, now.steps) for now in steps] == [(n, schedule.steps) for n in asked]
    need(complete, f"its {len(steps)} step lines are not the {len(asked)} that the config asks for")
    evaluated = [now.step for now in steps if now.val_loss is not None]
    need(evaluated == schedule.evaluated(), "its lines with val_loss are not those of val_every")
    start = Step(*[0.0] * len(Step._fields))
    for before, now in itertools.pairwise([start, *steps]):
        check_clock(now, before, schedule)
    return steps


def check_final(line, last, schedule, cores):
    """The final line repeats the last step line. Returns its match. Raises Rejected."""
    match = FINAL.fullmatch(line)
    need(match, f"{show(line)} is not a final line")
    n = schedule.steps
    loss = f"val_loss:{last.val_loss:.4f} train_time:{last.train_time:.3f}s"
    repeats = match[1] == f"final: step:{n}/{n} tokens:{schedule.tokens(n)} {loss}"
    need(repeats, "its final line is not that of its last step")
    possible = float(match["cpu"]) <= cores * last.train_time + 0.1
    need(possible, f"final: cpu_time {match['cpu']}s is more than {cores} cores have")
    return match


def check_target(final, steps, goal):
    """The final line says truly when the log's own target was reached. Raises Rejected."""
    target = final["target"] or "0"
    need(target == f"{goal:g}", "final: its target is not the config's target_loss")
    evaluated = {now.step: now for now in steps if now.val_loss is not None}
    below = [step for step, now in evaluated.items() if now.val_loss <= goal - LOSS_ERROR]
    missed = f"final: target {target} was not reached when it says"
    if not final["reached"]:
        need(not below, missed)
        return
    reached = int(final["reached"])
    now = evaluated.get(reached)
    need(now and now.val_loss <= goal + LOSS_ERROR, missed)
    in_time = abs(now.train_time - float(final["after"])) <= 0.05
    need(in_time and reached <= min(below, default=reached), missed)


def read_run(path):
    """The Run of a log. Raises Rejected, or one of DAMAGED."""
    source, lines = read_log(path)
    kinds = [line.partition(":")[0] for line in lines]
    need("step" in kinds and "final" in kinds, "no step lines and final line in it")
    first = kinds.index("step")
    last = kinds.index("final")
    need("resumed" not in kinds[:last], "a resumed run, whose clock has a gap: not for records")
    printable = all(line.isprintable() for line in lines[: last + 1])
    need(printable, "control characters before its end")
    header = HEADER.fullmatch("\n".join(lines[:first]))
    parts = "preset, argv, config, versions, devices, data, parameters, compiled"
    need(header, f"its header is not train.py's: {parts}")
    argv = read_argv(header["argv"])
    config = read_config(header["config"])
    check_config(config, argv, header["preset"])
    schedule = read_schedule(config)
    check_data(header, schedule, int(config["max_epochs"]))
    steps = read_steps(lines[first:last], schedule)
    final = check_final(lines[last], steps[-1], schedule, int(header["cores"]))
    check_target(final, steps, float(config["target_loss"]))
    wrote = re.match(r"wrote: (.+)/ckpt/step-\d+, ", lines[-2])
    need(wrote and lines[-1].startswith("next: "), "its end is not train.py's")
    cpu_time = float(final["cpu"])
    found = header.groupdict()
    return Run(path.name, source, found, argv, config, steps, cpu_time, folder=wrote[1])


# ---- The set -------------------------------------------------------------------------------------


def read_track(path, name):
    """The Track of this name, from the Markdown table whose first column is `track`.

    Raises UsageError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the table of tracks cannot be read ({error!r})") from error
    table = re.search(r"^\| *track *\|.*\n(?:\|.*\n)*|\Z", text, re.M)[0]
    lines = table.splitlines()
    rows = [[cell.strip("` ") for cell in line.strip("| ").split("|")] for line in lines]
    tracks = {row[0]: row for row in rows[2:]}
    if name not in tracks:
        wanted = "wanted DIR to be <track>/<YYYY-MM-DD>_<Name>, <track> one of"
        raise UsageError(f"{name}: no such track in {path}; {wanted} {', '.join(tracks) or 'none'}")
    try:
        _, target, count, scored, files, python, devices = tracks[name]
        numbers = float(target), int(count.replace(",", ""))
    except ValueError as error:
        raise UsageError(f"{path}: the row of {name} lacks a cell or a number ({error})") from error
    hashes = [re.findall(r"\b[0-9a-f]{64}\b", cell) for cell in (scored, files)]
    return Track(*numbers, *hashes, python, devices.split(", "))


def check_track(run, track):
    """The run is one of this track: what it scored, trained on and ran on. Raises Rejected."""
    for count in (run.header["count"], run.config["val_tokens"]):
        right = int(count) == track.val_targets
        need(right, f"{count} validation targets, the track scores {track.val_targets}")
    right = not track.scored or run.header["scored"] in track.scored
    need(right, "the scored tokens are not the track's")
    *trained, held_out = [digest for _, digest in re.findall(DATA_FILE, run.header["files"])]
    right = not track.files or set(trained) <= set(track.files)
    need(right, "a training file is none of the track's")
    need(held_out not in track.files, "its validation file is a training file of the track")
    python = run.header["python"]
    right = track.python == "any" or f"{python}.".startswith(f"{track.python}.")
    need(right, f"Python {show(python)}, the track is for {track.python}")
    devices = run.header["devices"]
    here = set(devices.split(", "))
    wanted = ", ".join(track.devices)
    need(set(track.devices) <= here, f"devices: {show(devices)}, the track is for {wanted}")
    seconds = run.last.train_time
    alone = "1 x cpu" not in here or seconds <= 10 or run.cpu_time >= seconds / 2
    busy = f"cpu_time {run.cpu_time}s is less than half of {seconds}s on a CPU"
    need(alone, f"{busy}: a wrong clock, or other work beside it")


def differences(run, first, may_differ):
    """Yield where two runs differ and must not."""
    ours = run.facts
    theirs = first.facts
    for name in ours | theirs:
        if name not in may_differ and ours.get(name) != theirs.get(name):
            yield f"another {name} than {first.name}"


def find_twin(run, others):
    """The name of another run that this one is a copy of, or None."""
    losses = {(now.step, now.train_loss) for now in run.steps}
    for other in others:
        common = losses & {(now.step, now.train_loss) for now in other.steps}
        if run.folder == other.folder or 2 * len(common) > len(losses):
            return other.name
    return None


def check_together(runs):
    """Yield reasons against runs that do not repeat the first with another seed."""
    for i, run in enumerate(runs):
        seed = str(run.config["seed"])
        twin = find_twin(run, runs[:i])
        if run.name != f"seed{seed}.txt":
            yield f"{run.name}: its seed is {show(seed)}: misnamed, or one run twice"
        elif twin:
            yield f"{run.name}: the same run as {twin}: its folder, or most of its training losses"
        for reason in differences(run, runs[0], MAY_DIFFER):
            yield f"{run.name}: {reason}"


def check_failed(path, readme):
    """failed<k>.txt is of a run without a result, and README.md tells of it. Raises Rejected."""
    text = read_bytes(path).decode(errors="replace")
    rest = text.partition(BAR)[2] or text
    need(not re.search(RESULT, rest), "a run that came to its end: it counts, as seed<k>.txt")
    need(re.search(rf"\b{re.escape(path.name)}\b", readme), "README.md does not tell of it")
    print(f"failed: {path.name}, which ends with {ascii(rest.strip()[-120:])}")


def read_part(path, track, readme):
    """The Run of a file, or None for another part of a record. Raises Rejected, or of DAMAGED."""
    if re.fullmatch(r"seed(0|[1-9][0-9]*)\.txt", path.name):
        run = read_run(path)
        check_track(run, track)
        return run
    if re.fullmatch(r"failed[0-9]+\.txt", path.name):
        check_failed(path, readme)
    elif path.name != "README.md":
        wanted = "README.md, seed<k>.txt, failed<k>.txt, *.svg that are pictures"
        need(path.suffix == ".svg", f"not part of a record: {wanted}")
        need(read_bytes(path, 1 << 20)[:4] in (b"<svg", b"<?xm"), f"not part of a record: {wanted}")
    return None


def read_record(folder, track):
    """(Runs that count, reasons against the record). Prints what failed."""
    runs = []
    reasons = []
    told = folder / "README.md"
    readme = told.read_text(encoding="utf-8", errors="replace") if told.is_file() else ""
    if not readme.strip():
        reasons.append("README.md: missing or empty")
    for path in sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name)):
        try:
            if run := read_part(path, track, readme):
                runs.append(run)
        except Rejected as error:
            reasons.append(f"{path.name!a}: {error}")
        except DAMAGED as error:
            reasons.append(f"{path.name!a}: cannot be read as a log: {show(repr(error))}")
    return runs, reasons + list(check_together(runs))


def load_scipy():
    """scipy.stats. Raises UsageError."""
    try:
        from scipy import stats
    except ImportError:
        raise UsageError("scipy is missing: pip install -r scripts/requirements.txt") from None
    return stats


def judge(runs, target):
    """Print the runs and their statistics. Returns why they do not show that target, or ""."""
    print(f"{'run':>12} {'val_loss':>9} {'train_time s':>13} {'cpu_time s':>11}")
    for run in runs:
        times = f"{run.last.train_time:>13.3f} {run.cpu_time:>11.1f}"
        print(f"{run.name:>12} {run.last.val_loss:>9.4f} {times}")
    n = len(runs)
    if n < 2:
        return f"n = {n}: a t-test needs two runs at least"
    losses = [run.last.val_loss for run in runs]
    times = [run.last.train_time for run in runs]
    mean = statistics.fmean(losses)
    sd = statistics.stdev(losses)
    if sd == 0:
        return f"{n} runs with the same loss to the last digit: seeds do not do that"
    t, p = load_scipy().ttest_1samp(losses, target, alternative="less")
    test = f"t {t:.2f}, one-sided p {p:.2g} of mean <= {target:g}"
    print(f"n {n}, mean val_loss {mean:.5f}, sd {sd:.5f}, {test}")
    print(f"(target - mean) * sqrt(n) = {(target - mean) * math.sqrt(n):.5f}")
    print(f"train_time: mean {statistics.fmean(times):.3f} s, sd {statistics.stdev(times):.3f} s")
    if mean > target:
        return f"mean {mean:.5f} is above the track's target {target:g}"
    if p >= P_VALUE:
        return f"p = {p:.2g}, wanted below {P_VALUE}: too few runs, or too near the target"
    return ""


# ---- Running one again ---------------------------------------------------------------------------


def train_again(logged, folder):
    """The Run of a logged source, trained anew in a folder. Raises Rejected, or one of DAMAGED."""
    script = folder / "train.py"
    script.write_bytes(logged.source.encode())
    flags = {name: text for name, text in logged.argv.items() if name not in RERUN_MAY_DIFFER}
    flags["log_dir"] = folder / "logs"
    command = [sys.executable, str(script), *(f"--{name}={text}" for name, text in flags.items())]
    program = f"the program in {logged.name} (sha256:{logged.source_hash})"
    print(f"rerun: this now executes {program}, with all that you may do on this machine:")
    print(f"rerun: {shlex.join(command)}", flush=True)
    code = subprocess.run(command).returncode
    need(code == 0, f"the program ended with exit code {code}")
    logs = list(folder.glob("logs/*/log.txt"))
    need(logs, "it left no log")
    return read_run(logs[0])


def rerun(logged, tolerance):
    """Train a run again in a temporary folder; data are looked up from here. Returns reasons."""
    with tempfile.TemporaryDirectory(prefix="rerun-") as folder:
        try:
            again = train_again(logged, Path(folder))
        except DAMAGED as error:  # Rejected is one
            return [f"rerun: no log of a whole run: {error}"]
    for name in ("versions", "devices"):
        if again.header[name] != logged.header[name]:
            print(f"rerun: {name} of the log: {logged.header[name]}")
            print(f"rerun: {name} here: {again.header[name]}")
    losses = [[(now.train_loss, now.val_loss) for now in run.steps] for run in (logged, again)]
    how_many = "all" if losses[0] == losses[1] else "not all"
    print(f"rerun: {how_many} losses, of training too, are equal in all printed digits")
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
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify_record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("folder", metavar="DIR", type=Path, help="<track>/<date>_<Name>")
    flag("--rerun", type=int, metavar="K", help="train seed K again: runs the program in its log")
    tolerance = "of the rerun's final loss, nats (default: 0.003)"
    flag("--tolerance", type=float, default=0.003, help=tolerance)
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    if not folder.is_dir() or not re.fullmatch(r"\d{4}-\d\d-\d\d_\w[\w.-]*", folder.name):
        raise UsageError(f"{args.folder}: wanted a folder <track>/<YYYY-MM-DD>_<Name>")
    if args.rerun is not None and not (folder / f"seed{args.rerun}.txt").is_file():
        raise UsageError(f"--rerun={args.rerun}: wanted K of a seed<K>.txt in {args.folder}")
    args.folder = folder
    return args


def main(argv=None):
    """Print the verdict. Returns 0 where the record is accepted, 1 where not. Raises UsageError."""
    args = parse(argv)
    load_scipy()  # now, rather than after the work
    track = read_track(TRACKS, args.folder.parent.name)
    print(f"{args.folder.parent.name}/{args.folder.name}: target {track.target:g}")
    runs, reasons = read_record(args.folder, track)
    against = judge(runs, track.target)
    if against and not reasons:  # what some of the runs show is no reason against all
        reasons.append(against)
    if runs:
        print(f"source of {runs[0].name}: sha256:{runs[0].source_hash}")
    if not track.scored:
        print("NOT CHECKED: which tokens were scored; the table of tracks knows no SHA-256 yet")
    if not track.files:
        print("NOT CHECKED: the training files; the table of tracks knows no SHA-256 yet")
    if args.rerun is not None and reasons:
        print("rerun: not done, since the record is rejected as it stands")
    elif args.rerun is not None:
        logged = next(run for run in runs if run.name == f"seed{args.rerun}.txt")
        reasons = rerun(logged, args.tolerance)
    for reason in reasons:
        print(f"rejected: {reason}")
    print("REJECTED" if reasons else "ACCEPTED")
    return 1 if reasons else 0


def command():
    """main() for the shell. train.command would need JAX."""
    try:
        return main()
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command())
