"""Is this folder a record? Needs `pip install -r scripts/requirements.txt`, but no JAX and no accelerator.

    python -m scripts.verify_record records/cpu/2026-01-31_Name              reads the logs, runs nothing of them
    python -m scripts.verify_record records/cpu/2026-01-31_Name --rerun=3    and then trains seed 3 again, with its own source

A record is `<track>/<date>_<Name>/` with a README.md and `seed<k>.txt`, the untouched log.txt of every run that came to its
end; of one that did not, `failed<k>.txt`. What a track asks for stands in the table of records/README.md and nowhere else:
no target, count or hash is taken from a log. records/README.md also says what each level of this check proves.
Exit codes: 0 accepted, 1 rejected, each reason on a line, 2 usage.
"""
import argparse, hashlib, itertools, math, re, shlex, statistics, subprocess, sys, tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 16 << 20  # of a file; a log of train.py has some 100 kB, and 150 bytes per written step
P_VALUE = 0.01
BAR = "\n" + "=" * 120 + "\n"  # between the source and the rest
HEADER = ("preset", "argv", "config", "versions", "devices", "data", "parameters", "compiled")
MAY_DIFFER = {"seed", "log_dir", "save_every", "resume"}           # fields, between the runs of a record
ELSEWHERE = {"platform", "JAX_COMPILATION_CACHE_DIR"}              # versions, likewise
SETTLED = {"vocab_size", "bos_id"}                                 # fields that the data settles; those of default "auto" too
FIELDS = {"steps", "seed", "log_every", "val_every", "val_tokens", "batch_tokens", "stage_ends", "target_loss"}  # what is read here
SLACK = 1.002         # of a rounding error, for the arithmetic on it
INT, LOSS, SECONDS, TENTHS = r"(\d{1,12})", r"(\d{1,6}\.\d{4}|nan|inf)", r"(\d{1,9}\.\d{3})s", r"(\d{1,12}\.\d)"
STEP = re.compile(rf"step:{INT}/{INT} train_loss:{LOSS}(?: val_loss:{LOSS})? train_time:{SECONDS} step:{TENTHS}ms "
                  rf"tok/s:(\d{{1,9}})\.(\d\d?)([kM]) mfu:(?:-|{TENTHS}%) wait:{TENTHS}ms eta:{INT}s", re.ASCII)
FINAL = re.compile(rf"final: step:{INT}/{INT} tokens:(\d{{1,18}}) val_loss:{LOSS} train_time:{SECONDS} "
                   rf"cpu_time:{TENTHS}s wall:{TENTHS}s(?: peak_memory:\d+\.\d\dGiB)?"
                   rf"(?: target:(\S+) (?:not reached|reached at step {INT} after {SECONDS}))?", re.ASCII)

SAVED = re.compile(rf"saved: step-\d{{6,9}} in {TENTHS}s", re.ASCII)  # off the clock

class UsageError(ValueError): pass
class Rejected(ValueError):
    """Why a file is not the log of a run that counts; its text is one sentence."""

class Track(NamedTuple):
    target: float     # the mean validation loss must not be above it
    val_targets: int
    scored: list      # SHA-256 of the scored tokens; empty: not known
    files: list       # SHA-256 of the training files there are; empty: not known
    python: str       # "3.11": any release of it; "any"
    devices: list     # parts of a log's devices line

class Run(NamedTuple):
    name: str
    source_sha256: str
    argv: dict        # {flag: value}
    config: dict      # {field: value}, all text
    versions: dict
    devices: list
    files: list       # (name, tokens, SHA-256) of training files and, last, the validation file
    scored: tuple     # (targets, SHA-256)
    losses: tuple     # all that were written: (step, training loss, validation loss or None)
    train_time: float
    cpu_time: float
    folder: str       # where it ran

def need(ok, reason):
    if not ok:
        raise Rejected(reason)

# ---- The table of tracks ----
def read_track(path, name):
    """The Track of a name, from the Markdown table in path whose first column is headed `track`. Raises UsageError."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the table of tracks cannot be read ({error!r})") from error
    rows = [[cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in lines]
    table = list(itertools.dropwhile(lambda row: row[0] != "track", rows))
    found = {row[0]: dict(zip(table[0], row)) for row in table[2:]}
    if name not in found:
        raise UsageError(f"{name}: no such track in {path}; wanted DIR to be <track>/<YYYY-MM-DD>_<Name>, <track> one of "
                         f"{', '.join(found) or 'none'}")
    row, hashes = found[name], lambda cell: re.findall(r"\b[0-9a-f]{64}\b", cell)
    try:
        return Track(float(row["target"]), int(row["val targets"].replace(",", "")), hashes(row["scored tokens"]),
                     hashes(row["training files"]), row["Python"], row["devices"].split(", "))
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path}: the row of {name} lacks a column or a number ({error!r})") from error

# ---- One log ----
def read_bytes(path):
    """At most MAX_BYTES of a regular file. Raises Rejected."""
    need(path.is_file() and not path.is_symlink(), "not a plain file")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    need(len(data) <= MAX_BYTES, f"more than {MAX_BYTES >> 20} MiB, longer than any log of train.py")
    return data

def read_log(path):
    """(source, the lines between it and the digest) of a sealed log. Raises Rejected."""
    body, _, digest = read_bytes(path).rpartition(b"\nsha256:")
    need(re.fullmatch(rb"[0-9a-f]{64}\n", digest), "its last line is not its digest: cut off, or a run without a result, whose log is "
         "named failed<k>.txt and told of in README.md")
    need(hashlib.sha256(body + b"\n").hexdigest() == digest[:64].decode(), "its digest is not that of the bytes above it")
    try:
        source, bar, rest = body.decode().partition(BAR)
    except UnicodeDecodeError:
        raise Rejected("not text in UTF-8") from None
    need(bar, "no source of train.py with a line of 120 = below it")
    return source, rest.split("\n")

def source_defaults(source, preset):
    """{field: value} of the Config in a source's text, and of its preset. Read, never executed. Raises Rejected."""
    fields, _, rest = source.partition("class Config:")[2].partition("PRESETS = ")
    found = [re.match(r"    (\w+): \w+ = (.*?) +# ", line) for line in fields.splitlines() if len(line) < 400]
    defaults = {match[1]: match[2].strip('"') for match in found if match}
    need(rest and FIELDS <= {*defaults}, "its source has no Config and PRESETS as train.py has")
    changes = rest.partition(f'"{preset}": dict(')[2].partition(")")[0]
    return defaults, {name: value.strip('"') for name, value in re.findall(r'\b(\w+)=("[^"]*"|[^",\s]+)', changes)}

def parse_argv(text):
    """{flag: value}. Raises Rejected for what the log alone does not repeat."""
    try:
        words, flags = iter(shlex.split(text)), {}
    except ValueError:
        raise Rejected("argv has an open quote") from None
    for word in words:
        name, equals, value = word.partition("=")
        value = value if equals else next(words, None)
        need(not name.startswith("@"), "argv reads flags from a file, which is not in the log: write them out")
        need(name.startswith("--") and value is not None, f"argv: {name!a} is no --flag=value")
        flags[name[2:]] = value
    return flags

def parse_config(text, fields):
    """{field: value}. As values may hold blanks, the source's fields, in their order, say where one ends. Raises Rejected."""
    text, values, at = f" {text}", {}, 0
    for name, following in zip(fields, [*fields[1:], None]):
        start = at + len(f" {name}=")
        end = text.find(f" {following}=", start) if following else len(text)
        need(text.startswith(f" {name}=", at) and end >= start, f"config: {name} or {following} is not where its source has it")
        values[name], at = text[start:end], end
    return values

def alike(a, b):
    """Equal as text, or as numbers: 10_485_760 and 10485760, .02 and 0.02."""
    try:
        return a == b or float(a) == float(b)
    except ValueError:
        return False

def check_config(config, argv, defaults, changes):
    """The config is what argv makes of the source, as far as its text tells. Raises Rejected."""
    for name in argv:
        need(name in config, f"argv: --{name} is no field of the config")
    for name, value in config.items():
        asked = argv.get(name, changes.get(name, defaults[name]))
        settled = asked == defaults[name] and (name in SETTLED or asked == "auto")
        need(settled or alike(value, asked), f"config: {name}={value!a}, but argv and the source make it {asked!a}")

def read_data(lines):
    """(files, scored, tokens trained on) of a header's data lines, less `data: `. Raises Rejected."""
    wanted = [r"(.+) tokens:(\d{1,15}) sha256:([0-9a-f]{64})"] * (len(lines) - 2) + [
        r"validation scores (\d{1,15}) targets; sha256 of these and the token before them:([0-9a-f]{64})",
        r"\d{1,15} tokens read for (\d{1,15}) trained on, .*"]
    found = [re.fullmatch(pattern, line, re.ASCII) for pattern, line in zip(wanted, lines)]
    need(len(lines) >= 4 and all(found), "its data lines are not those of files, of what validation scores and of what was read")
    *files, scored, read = [match.groups() for match in found]
    need(len({digest for _, _, digest in files}) == len(files), "data: the same file twice, perhaps to train and to validate on")
    return files, (int(scored[0]), scored[1]), int(read[0])

class Schedule(NamedTuple):
    steps: int
    log_every: int
    val_every: int
    ends: list   # of the stages, in steps
    sizes: list  # of their batches, in tokens
    def tokens(self, steps=math.inf):  # of the first steps, by default all
        return sum((min(end, steps) - start) * size for start, end, size in zip([0, *self.ends], self.ends, self.sizes) if start < steps)
    def evaluates(self, step): return step == self.steps or bool(self.val_every) and step % self.val_every == 0
    def written_after(self, step):
        return min([self.steps, *((step // every + 1) * every for every in (self.log_every, self.val_every) if every)])

def read_schedule(config):
    """The Schedule that train.py makes of a config. Raises Rejected, ValueError, OverflowError."""
    steps, log_every, val_every = (int(config[name]) for name in ("steps", "log_every", "val_every"))
    ends = [round(float(end) * steps) for end in config["stage_ends"].split(",")]
    sizes = [int(size) for size in config["batch_tokens"].split(",")]
    sizes *= len(ends) if len(sizes) == 1 else 1
    need(min(steps, log_every) > 0 and len(sizes) == len(ends) and ends == sorted(ends) and ends[-1] == steps,
         "config: a schedule that cannot be")
    return Schedule(steps, log_every, val_every, ends, sizes)

def check_steps(lines, schedule):
    """The step lines are those of the schedule, in its order, with finite losses and a clock that adds up: step is the mean over
    the steps since the line before. Returns ((step, training loss, validation loss or None), ...), train_time. Raises Rejected."""
    losses, before, before_s = [], 0, 0.0
    for line in lines:
        match = STEP.fullmatch(line)
        need(match, f"{line[:80]!a} stands among the step lines")
        step, due = int(match[1]), schedule.written_after(before)
        train_loss, val_loss, now_s, step_ms = (float(text or 0) for text in match.group(3, 4, 5, 6))
        need(before < schedule.steps and (step, int(match[2])) == (due, schedule.steps),
             f"step:{step}/{match[2]} stands where the config asks for step:{due}/{schedule.steps}")
        need(bool(match[4]) == schedule.evaluates(step),
             f"step {step}: {'a' if match[4] else 'no'} val_loss, against the config's val_every")
        need(math.isfinite(train_loss + val_loss), f"step {step}: a loss that is not finite")
        need(now_s > before_s, f"step {step}: train_time {now_s:.3f}s is not after the {before_s:.3f}s of the line before")
        since, grew = step - before, now_s - before_s
        need(abs(grew - since * step_ms / 1e3) <= SLACK * (0.001 + since * 0.05e-3),
             f"step {step}: {since} steps of {step_ms}ms are not the {grew:.3f}s by which train_time grew: the clock is inconsistent")
        scale, size = {"k": 1e3, "M": 1e6}[match[9]], (schedule.tokens(step) - schedule.tokens(before)) / since
        rate, half = float(f"{match[7]}.{match[8]}") * scale, 0.5 * SLACK * scale / 10 ** len(match[8])
        need((rate - half) * (step_ms - 0.05 * SLACK) <= 1e3 * size <= (rate + half) * (step_ms + 0.05 * SLACK),
             f"step {step}: {rate:.0f} tok/s are not {size:g} tokens in {step_ms}ms")
        losses.append((step, train_loss, val_loss if match[4] else None))
        before, before_s = step, now_s
    need(before == schedule.steps, f"the steps end at {before} of {schedule.steps}")
    return tuple(losses), before_s

def check_final(line, config, losses, train_time, tokens, cores):
    """The final line repeats the last step line, and says truly when the log's own target was reached. Returns cpu_time."""
    match = FINAL.fullmatch(line)
    need(match, f"{line[:80]!a} is not a final line")
    step, steps, count, val_loss, time, cpu, wall, target, reached, _ = match.groups()
    last = losses[-1][0], losses[-1][0], losses[-1][2], train_time
    need((int(step), int(steps), float(val_loss), float(time)) == last, "its final line is not that of its last step")
    need(int(count) == tokens, f"final: {count} tokens, but the config's stages train on {tokens}")
    need(float(wall) + 0.05 * SLACK >= train_time, f"final: wall {wall}s is less than the train_time in it")
    need(float(cpu) <= train_time * cores + 0.05 * SLACK,
         f"final: cpu_time {cpu}s is more than {cores} cores have in {time}s: the clock is inconsistent")
    goal, half = float(config["target_loss"]), 0.5e-4 * SLACK
    need(alike(target or "0", config["target_loss"]), "final: its target is not the config's target_loss")
    may, must = ([at for at, _, loss in losses if loss is not None and loss <= goal + side] for side in (half, -half))
    told = int(reached) if reached else math.inf
    need(not target or (not reached or told in may) and told <= min(must, default=math.inf),
         f"final: target {target} was not reached where it says")
    return float(cpu)

def read_run(path):
    """The Run that a complete log tells of. Raises Rejected, and ValueError or OverflowError for numbers that are none."""
    source, lines = read_log(path)
    lines = [line for line in lines if not SAVED.fullmatch(line)]
    first = next((i for i, line in enumerate(lines) if line.startswith("step:")), None)
    final = next((i for i, line in enumerate(lines) if line.startswith("final: ")), None)
    need(first is not None and final is not None and first < final, "no step lines and final line in it")
    need(not any(line.startswith("resumed: ") for line in lines[:final]), "a resumed run, whose clock has a gap: not for records")
    header = [(key, value) for key, _, value in (line.partition(": ") for line in lines[:first]) if key in HEADER]
    keys = [key for key, _ in header]
    for key in HEADER:
        need(key in keys and (key in ("data", "compiled") or keys.count(key) == 1), f"its header has {keys.count(key)} lines {key}:")
    need([key for key, _ in itertools.groupby(keys)] == [*HEADER], f"its header's order is not {', '.join(HEADER)}")
    one = dict(header)
    defaults, changes = source_defaults(source, one["preset"].partition(" ")[0])
    argv, config = parse_argv(one["argv"]), parse_config(one["config"], [*defaults])
    check_config(config, argv, defaults, changes)
    files, scored, reads = read_data([value for key, value in header if key == "data"])
    schedule = read_schedule(config)
    tokens = schedule.tokens()
    need(reads == tokens, f"data: {reads} tokens trained on, but the config's stages train on {tokens}")
    losses, train_time = check_steps(lines[first:final], schedule)
    devices = one["devices"].split(", ")
    cores = re.fullmatch(r"(\d{1,6}) host cores", devices[-1], re.ASCII)
    need(cores, "devices: no number of host cores")
    cpu_time = check_final(lines[final], config, losses, train_time, tokens, int(cores[1]))
    need(len(lines) > final + 2 and lines[-2].startswith("wrote: ") and lines[-1].startswith("next: "), "its end is not train.py's")
    pairs = re.split(r"(?:^| )([A-Za-z]\w*)=", one["versions"])[1:]
    return Run(path.name, hashlib.sha256(source.encode()).hexdigest(), argv, config, dict(zip(pairs[::2], pairs[1::2])), devices, files,
               scored, losses, train_time, cpu_time, lines[-2].partition("/ckpt/")[0])

# ---- The set ----
def check_track(run, track):
    """The run is one of this track: what it scored, trained on and ran on. Raises Rejected."""
    for text in (str(run.scored[0]), run.config["val_tokens"]):
        need(text == str(track.val_targets), f"{text} validation targets, the track scores {track.val_targets}")
    need(not track.scored or run.scored[1] in track.scored, f"the scored tokens have SHA-256 {run.scored[1][:12]}..., not the track's: "
         "other validation data (an embedded corpus is that of one release of Python)")
    *trained, held_out = [digest for _, _, digest in run.files]
    need(not track.files or {*trained} <= {*track.files}, "a training file is none of the track's")
    need(held_out not in track.files, "its last file, the validation file, is a training file of the track")
    release = run.versions.get("python", "none")
    need(track.python == "any" or f"{release}.".startswith(f"{track.python}."), f"Python {release!a}, the track is for {track.python}")
    for part in track.devices:
        need(part in run.devices, f"devices: {', '.join(run.devices)!a}, the track is for {', '.join(track.devices)}")

def compare(run, first, fields=MAY_DIFFER):
    """What two runs must have in common, as reasons why not."""
    if run.source_sha256 != first.source_sha256:
        yield f"another source than {first.name}"
    pairs = ((name, first.config.get(name), run.config.get(name)) for name in first.config | run.config if name not in fields)
    if differing := [f"{name}={theirs!a} there, {ours!a} here" for name, theirs, ours in pairs if theirs != ours]:
        yield f"another config than {first.name}: {differing[0]}"
    if (run.files, run.scored) != (first.files, first.scored):
        yield f"other data than {first.name}"

def check_together(runs):
    """(name, reason) of runs that are not repetitions of the first with other seeds."""
    for i, run in enumerate(runs):
        twins = [other.name for other in runs[:i] if run.folder == other.folder or run.losses == other.losses]
        if run.name != f"seed{run.config['seed']}.txt":
            yield run.name, f"its seed is {run.config['seed']!a}: misnamed, or one run twice"
        elif twins:
            yield run.name, f"the same run as {twins[0]}: same folder or same losses"
    for run in runs[1:]:
        yield from ((run.name, reason) for reason in compare(run, runs[0]))
        ours, theirs = ({k: v for k, v in each.versions.items() if k not in ELSEWHERE} for each in (run, runs[0]))
        if ours != theirs or run.devices != runs[0].devices:
            yield run.name, f"other versions or devices than {runs[0].name}"

def check_failed(path, readme):
    """failed<k>.txt is of a run without a result, and README.md tells of it. Raises Rejected."""
    rest = read_bytes(path).decode(errors="replace").rpartition(BAR)[2]
    need(not re.search(r"^(?:final: |step:(\d{1,12})/\1 .*val_loss:)", rest, re.MULTILINE | re.ASCII),
         "a run that came to its end: it counts, as seed<k>.txt")
    need(path.name in readme, "README.md does not tell of it")
    print(f"failed: {path.name}, which ends with {rest.strip().rpartition(chr(10))[2][-120:]!a}")

def read_record(folder, track):
    """(Runs that count, reasons against the record). Prints what failed."""
    runs, reasons, readme = [], [], ""
    paths = sorted(folder.iterdir(), key=lambda path: (path.name != "README.md", len(path.name), path.name))  # seed2 before seed10
    for path in paths if (folder / "README.md") in paths else [folder / "README.md", *paths]:
        try:
            if path.name == "README.md":
                readme = read_bytes(path).decode(errors="replace") if path.exists() else ""
                need(readme.strip(), "missing or empty")
            elif re.fullmatch(r"seed(0|[1-9][0-9]*)\.txt", path.name):
                run = read_run(path)
                check_track(run, track)
                runs.append(run)
            elif re.fullmatch(r"failed[0-9]+\.txt", path.name):
                check_failed(path, readme)
            else:
                need(path.suffix == ".svg", "not part of a record: README.md, seed<k>.txt, failed<k>.txt, *.svg")
        except Rejected as error:
            reasons.append(f"{path.name!a}: {error}")
        except (ValueError, OverflowError, OSError) as error:
            reasons.append(f"{path.name!a}: cannot be read as a log ({str(error)[:100]!a})")
    return runs, reasons + [f"{name!a}: {reason}" for name, reason in check_together(runs)]

def judge(runs, track):
    """Print the runs and their statistics. Returns reasons why their mean is not shown to be at most the target."""
    from scipy import stats
    print(f"{'seed':>8} {'val_loss':>9} {'train_time s':>13} {'cpu_time s':>11}")
    for run in runs:
        print(f"{run.config['seed']:>8.20} {run.losses[-1][2]:>9.4f} {run.train_time:>13.3f} {run.cpu_time:>11.1f}")
    losses, times, n = [run.losses[-1][2] for run in runs], [run.train_time for run in runs], len(runs)
    if n < 2:
        return [f"n = {n}: a t-test needs two runs at least"]
    mean, sd = statistics.fmean(losses), statistics.stdev(losses)
    if sd == 0:
        return [f"{n} runs with the same loss to the last digit: seeds do not do that"]
    t, p = stats.ttest_1samp(losses, track.target, alternative="less")
    print(f"n {n}, mean val_loss {mean:.5f}, sd {sd:.5f}, t {t:.2f}, one-sided p {p:.2g} of mean <= {track.target:g}\n"
          f"(target - mean) * sqrt(n) = {(track.target - mean) * math.sqrt(n):.5f}\n"
          f"train_time: mean {statistics.fmean(times):.3f} s, sd {statistics.stdev(times):.3f} s")
    if mean > track.target:
        return [f"mean {mean:.5f} is above the track's target {track.target:g}"]
    return [] if p < P_VALUE else [f"p = {p:.2g}, wanted below {P_VALUE}: too few runs, too near the target or too far apart"]

# ---- Running one again ----
def rerun(path, logged, tolerance):
    """Train with the source in a log, in a temporary folder; relative paths of data are looked up from here. Returns reasons."""
    flags = {name: value for name, value in logged.argv.items() if name not in ("log_dir", "resume")}
    with tempfile.TemporaryDirectory(prefix="rerun-") as folder:
        script = Path(folder) / "train.py"
        script.write_bytes(read_log(path)[0].encode())
        command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items()), f"--log_dir={folder}/logs"]
        digest = hashlib.sha256(script.read_bytes()).hexdigest()
        print(f"rerun: this now executes the program in {path.name} (sha256:{digest}), with all that you may do on this machine: "
              f"{shlex.join(command)}", flush=True)
        code = subprocess.run(command).returncode
        if code:
            return [f"rerun: the program ended with exit code {code}"]
        try:
            again = read_run(next(Path(folder).glob("logs/*/log.txt")))
        except (StopIteration, ValueError, OverflowError, OSError) as error:
            return [f"rerun: it left no log that can be read ({str(error)[:200]!a})"]
    reasons = [f"rerun: {reason}" for reason in compare(again, logged, {"log_dir", "resume"})]
    if differing := [name for name in logged.versions | again.versions if logged.versions.get(name) != again.versions.get(name)]:
        print(f"rerun: not the same here as in the log: {', '.join(differing)}")
    mine, theirs = ({step: val for step, _, val in run.losses if val is not None} for run in (again, logged))
    for step in sorted(mine.keys() & theirs.keys()):
        print(f"rerun: step {step} val_loss {theirs[step]:.4f} in the log, {mine[step]:.4f} here")
    print(f"rerun: {'all' if again.losses == logged.losses else 'not all'} losses, of training too, are equal in all printed digits")
    off = abs(again.losses[-1][2] - logged.losses[-1][2])
    return reasons + ([f"rerun: the final losses are {off:.4f} apart, tolerated are {tolerance:g}"] if off > tolerance + 1e-9 else [])

def main(argv=None):
    """Returns 0 where the record is accepted, 1 where not. Raises UsageError."""
    parser = argparse.ArgumentParser(prog="python -m scripts.verify_record", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("folder", metavar="DIR", type=Path, help="<track>/<date>_<Name>")
    flag("--rerun", type=int, metavar="K", help="train seed K again, with the source in its log: runs others' code")
    flag("--tolerance", type=float, default=0.003, help="of the rerun's final loss, nats (default: 0.003)")
    flag("--tracks", metavar="FILE", type=Path, default=ROOT / "records/README.md", help="default: records/README.md")
    args = parser.parse_args(argv)
    try:
        import scipy  # now, rather than after the work
    except ImportError:
        raise UsageError("scipy is missing: pip install -r scripts/requirements.txt") from None
    folder, path = args.folder.resolve(), args.folder / f"seed{args.rerun}.txt"
    if not folder.is_dir() or not re.fullmatch(r"\d{4}-\d\d-\d\d_\w[\w.-]*", folder.name):
        raise UsageError(f"{args.folder}: wanted a folder <track>/<YYYY-MM-DD>_<Name>")
    track = read_track(args.tracks, folder.parent.name)
    if args.rerun is not None and not path.is_file():
        raise UsageError(f"--rerun={args.rerun}: there is no {path}")
    print(f"{folder.parent.name}/{folder.name}: target {track.target:g}, {track.val_targets} validation targets")
    runs, reasons = read_record(folder, track)
    against = judge(runs, track)
    reasons = reasons or against  # what some of the runs show is no reason against all
    if runs:
        print(f"source of {runs[0].name}: sha256:{runs[0].source_sha256}")
    for what, known in (("which validation tokens were scored", track.scored), ("which files were trained on", track.files)):
        if not known:
            print(f"NOT CHECKED: {what}; the table of tracks knows no SHA-256 yet")
    if args.rerun is not None and reasons:
        print("rerun: not done, since the record is rejected as it stands")
    elif args.rerun is not None:
        reasons += rerun(path, next(run for run in runs if run.name == path.name), args.tolerance)
    print("\n".join([*(f"rejected: {reason}" for reason in reasons), "REJECTED" if reasons else "ACCEPTED"]))
    return 1 if reasons else 0

if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
