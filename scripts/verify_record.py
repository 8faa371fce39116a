"""Is this folder a record? Needs `pip install -r scripts/requirements.txt`, but no JAX and no accelerator.

    python -m scripts.verify_record records/cpu/2026-01-31_Name              reads the logs, runs nothing of them
    python -m scripts.verify_record records/cpu/2026-01-31_Name --rerun=3    and then trains seed 3 again, with its own source

A record is `<track>/<date>_<Name>/` with a README.md and `seed<k>.txt`, the untouched log.txt of every run that came to its
end; of one that did not, `failed<k>.txt`. What a track asks for stands in the table of records/README.md and nowhere else:
no target, count or hash is taken from a log. records/README.md also says what each level of this check proves. The config of a
log is JSON; up to commit e79511b it was `name=value name=value`, and of such a log the source's literals are read too.
Exit codes: 0 accepted, 1 rejected, each reason on a line, 2 usage, or a folder or an output that fails.
"""
import argparse, ast, contextlib, functools, hashlib, itertools, json, math, os, re, shlex, statistics, subprocess, sys, tempfile, warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 16 << 20  # of a file; a log of train.py has some 100 kB, and 150 bytes per written step
MAX_SOURCE, MAX_LINE, MAX_STAGES = 1 << 19, 20_000, 1000  # characters of a log's source, of another line; stages of a schedule
P_VALUE = 0.01
BAR = "\n" + "=" * 120 + "\n"  # between the source and the rest
HEADER = {  # the lines from there to the first step line, in this order; those of data and compiled are several
    "preset": r"\S+ \(.+\)", "argv": ".*", "config": ".+", "versions": ".+",
    "devices": r"\d{1,6} x [^,]+, \d{1,6} processes, \d{1,6} host cores", "data": ".+", "parameters": r"\d{1,18}", "compiled": r"\w+ in \d+\.\ds.*"}
MAY_DIFFER = {"seed", "log_dir", "save_every", "resume"}           # fields, between the runs of a record
ELSEWHERE = {"platform", "JAX_COMPILATION_CACHE_DIR"}              # versions, likewise
SETTLED = {"vocab_size", "bos_id"}                                 # fields that the data settles, to a number; those of default "auto" too
FIELDS = {"preset", "steps", "seed", "log_every", "val_every", "val_tokens", "target_loss",
          "max_epochs", "log_dir", "resume"}  # what is read here, and of the stages
OLD_STAGES, STAGES = ("stage_ends", "batch_tokens"), ("stages.end", "stages.batch_tokens")
WORDS = {"true": True, "false": False, "none": None, "": []}  # values of flags that are no literals
NO_JSON = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
SLACK = 1.002         # of a rounding error, for the arithmetic on it
INT, LOSS, SECONDS, TENTHS = r"(\d{1,12})", r"(\d{1,6}\.\d{4}|nan|inf)", r"(\d{1,9}\.\d{3})s", r"(\d{1,12}\.\d)"
STEP = re.compile(rf"step:{INT}/{INT} train_loss:{LOSS}(?: val_loss:{LOSS})? train_time:{SECONDS} step:{TENTHS}ms "
                  rf"tok/s:(\d{{1,9}})\.(\d\d?)([kM]) mfu:(?:-|{TENTHS}%) wait:{TENTHS}ms eta:{INT}s", re.ASCII)
FINAL = re.compile(rf"final: step:{INT}/{INT} tokens:(\d{{1,18}}) val_loss:{LOSS} train_time:{SECONDS} "
                   rf"cpu_time:{TENTHS}s wall:{TENTHS}s(?: peak_memory:\d+\.\d\dGiB)?"
                   rf"(?: target:(\S+) (?:not reached|reached at step {INT} after {SECONDS}))?", re.ASCII)
SAVED = re.compile(rf"saved: step-\d{{6,9}} in {TENTHS}s", re.ASCII)  # off the clock
RESULT = re.compile(r"final:\s*step:\d|step:(\d{1,12})/\1 .{,200}val_loss:", re.ASCII)  # wherever it stands
SVG = re.compile(rb"\s*(?:<[?!][^>]*>\s*)*<svg\b")

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
    source: str
    argv: dict        # {flag: value}
    config: dict      # {field: value}, all text; a column of the stages is one field
    versions: dict
    devices: list
    parameters: str
    files: list       # (name, tokens, SHA-256) of training files and, last, the validation file
    scored: tuple     # (targets, SHA-256)
    losses: tuple     # all that were written: (step, training loss, validation loss or None)
    train_time: float
    cpu_time: float
    folder: str       # where it ran
    sha256 = property(lambda self: hashlib.sha256(self.source.encode()).hexdigest())  # of its source

def need(ok, reason):
    if not ok:
        raise Rejected(reason)

def show(text):
    """What a log says, within a reason: quoted, ASCII, not too long."""
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")

# ---- The table of tracks ----
def read_track(path, name):
    """The Track of a name, from the Markdown table in path whose first column is headed `track`. Raises UsageError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the table of tracks cannot be read ({error!r})") from error
    lines = itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda line: not re.match(r"\| *track *\|", line), lines))
    table = [[cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in lines]
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
def read_bytes(path, most=MAX_BYTES):
    """All of a regular file. Raises Rejected."""
    need(path.is_file() and not path.is_symlink(), "not a plain file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    need(len(data) <= most, f"more than {most >> 20} MiB, longer than any that train.py writes")
    return data

def read_log(path):
    """(source, the lines between it and the digest) of a sealed log. Raises Rejected."""
    body, _, digest = read_bytes(path).rpartition(b"\nsha256:")
    need(re.fullmatch(rb"[0-9a-f]{64}\n", digest), "its last line is not its digest: cut off, or a run without a result, whose log is "
         "named failed<k>.txt and told of in README.md")
    need(hashlib.sha256(body + b"\n").hexdigest() == digest[:64].decode(), "its digest is not that of the bytes above it")
    need(not re.search(rb"\nsha256:[0-9a-f]{64}\n", body), "a digest in its midst: more than one log")
    try:
        source, bar, rest = body.decode().partition(BAR)
    except UnicodeDecodeError:
        raise Rejected("not text in UTF-8") from None
    need(bar and len(source) <= MAX_SOURCE, f"no source of train.py, of at most {MAX_SOURCE} characters, with a line of 120 = below it")
    return source, rest.split("\n")

@functools.lru_cache(8)
def source_defaults(source, preset):
    """{field: value} of the Config in a source, and of its preset. Its literals are parsed, nothing is executed. Raises Rejected."""
    fields, presets = {}, {}
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError):
        warnings.simplefilter("ignore")  # the parser's, of escapes
        body = ast.parse(source).body
        config, = (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == "Config")
        table, = (node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRESETS")
        fields = {node.target.id: str(ast.literal_eval(node.value)) for node in config if isinstance(node, ast.AnnAssign)}
        presets = {key.value: {} if ast.unparse(call) == "{}" else {word.arg: str(ast.literal_eval(word.value)) for word in call.keywords}
                   for key, call in zip(table.keys, table.values)}
    need({*FIELDS, *OLD_STAGES} <= {*fields} and presets, "its source has no Config and PRESETS as train.py has")
    need(preset in presets, f"preset: {show(preset)} is none of its source")
    return fields, presets[preset]

def parse_argv(text):
    """{flag: value}. Raises Rejected for what the log alone does not repeat."""
    try:
        words, flags = shlex.split(text), {}
    except ValueError:
        raise Rejected("argv has an open quote") from None
    need(not any(word.startswith("@") for word in words), "argv reads flags from a file, which is not in the log: write them out")
    for word in (words := iter(words)):
        name, equals, value = word.partition("=")
        value = value if equals else next(words, None)
        need(name.startswith("--") and value is not None, f"argv: {show(name)} is no --flag=value")
        flags[name[2:]] = value
    return flags

def flat(config):
    """{field: value, all text} of a config in JSON. A column of the stages is one field, a list."""
    fields = {}
    for name, value in dict(config).items():
        if name == "stages":
            for column in value[0]:
                fields[f"stages.{column}"] = [row[column] for row in value]
        elif isinstance(value, dict):
            fields |= {f"{name}.{column}": cell for column, cell in value.items()}
        else:
            fields[name] = value
    texts = fields.items()
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in texts}

def read_config(text, source, preset):
    """{field: value} of a line config: of either form. Raises Rejected."""
    if not text.startswith("{"):
        return parse_old_config(text, [*source_defaults(source, preset)[0]])
    try:
        config = json.loads(text)
        values, written = flat(config), json.dumps(config)
    except NO_JSON:
        raise Rejected("config: not JSON as train.py writes it") from None
    need(written == text and {*FIELDS, *STAGES} <= {*values}, "config: not JSON as train.py writes it")
    return values

def parse_old_config(text, fields):
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
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return a == b or number(a) == number(b)
    return False

def literal(text):
    """What a flag's text means, as JSON gives it back: 3e-4, true, ((3, 6),); else the text."""
    try:
        return json.loads(json.dumps(WORDS[text] if text in WORDS else ast.literal_eval(text)))
    except (*NO_JSON, SyntaxError, MemoryError):
        return text

def gives(text, value):
    """Whether a flag's text is this value, of which a tuple may have lost its parentheses."""
    return literal(text) in (value, *(value if isinstance(value, list) and len(value) == 1 else ()))

def follows(name, text, value):
    """Whether a config in JSON with this value (its text) is what --name=text asks for."""
    if text == value or (name, text) == ("attention", "auto") or text == "none" and name in SETTLED:
        return True
    with contextlib.suppress(ValueError):
        value = json.loads(value)
    if not name.startswith("stages."):
        return gives(text, value)
    texts = re.split(r",(?![^(]*\))", text)  # at commas outside of parentheses: one a row, or one
    texts *= len(value) if len(texts) == 1 else 1
    return len(texts) == len(value) and all(map(gives, texts, value))

def check_config(config, argv, source, preset):
    """The config is what argv asks for, as far as text tells. Raises Rejected."""
    need(config["preset"] == preset, f"preset: {show(preset)}, but the config's is {show(config['preset'])}")
    for name in argv:
        need(name in config, f"argv: {show('--' + name)} is no field of the config")
    if STAGES[0] in config:
        check_json_config(config, argv, source)
    else:
        check_old_config(config, argv, source, preset)
    need(config["resume"] in ("", "auto"), "config: resume is a path, but a resumed run's clock has a gap: not for records")

def check_json_config(config, argv, source):
    """That all of it follows from preset and argv is left to --rerun."""
    for name in config:
        declared = rf"^    {re.escape(name.rpartition('.')[2])}: "
        need(re.search(declared, source, re.M), f"config: {show(name)} is no field of its source")
    for name, text in argv.items():
        ok = follows(name, text, config[name])
        need(ok, f"config: {name}={show(config[name])}, but argv asks for {show(text)}")

def check_old_config(config, argv, source, preset):
    """It is what argv makes of the source's literals."""
    defaults, changes = source_defaults(source, preset)
    for name, value in config.items():
        asked = argv.get(name, changes.get(name, defaults[name]))
        settled = asked == defaults[name] and (name in SETTLED and re.fullmatch("[0-9]+", value) or asked == "auto" and f'"{value}"' in source)
        need(settled or alike(value, asked), f"config: {name}={show(value)}, but argv and the source make it {show(asked)}")

def read_data(lines, epochs):
    """(files, scored, tokens trained on) of a header's data lines, less `data: `. Raises Rejected."""
    wanted = [r"(.+) tokens:(\d{1,15}) sha256:([0-9a-f]{64})"] * (len(lines) - 2) + [
        r"validation scores (\d{1,15}) targets; sha256 of these and the token before them:([0-9a-f]{64})",
        r"(\d{1,15}) tokens read for (\d{1,15}) trained on, .*"]
    found = [re.fullmatch(pattern, line, re.ASCII) for pattern, line in zip(wanted, lines)]
    need(len(lines) >= 4 and all(found), "its data lines are not those of files, of what validation scores and of what was read")
    *files, (count, digest), (read, trained) = [match.groups() for match in found]
    need(len({digest for _, _, digest in files}) == len(files), "data: the same file twice, perhaps to train and to validate on")
    *sizes, held_out = [int(tokens) for _, tokens, _ in files]
    need(held_out > int(count), f"data: {count} targets scored of a file with {held_out} tokens")
    need(int(trained) <= int(read) <= epochs * sum(sizes), f"data: {read} tokens read for {trained}, of {epochs} times {sum(sizes)} that there are")
    return files, (int(count), digest), int(trained)

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
    columns = STAGES if STAGES[0] in config else OLD_STAGES
    ends, sizes = (config[name].strip("[]").split(",") for name in columns)
    ends = [round(float(end) * steps) for end in ends]
    sizes = [int(size) for size in sizes]
    sizes *= len(ends) if len(sizes) == 1 else 1
    need(min(steps, log_every, *sizes) > 0 and len(sizes) == len(ends) <= MAX_STAGES and ends == sorted(ends) and ends[-1] == steps,
         "config: a schedule that cannot be")
    return Schedule(steps, log_every, val_every, ends, sizes)

def check_steps(lines, schedule, on_cpu):
    """The step lines are those of the schedule, in its order, with finite losses and a clock that adds up: step is the mean over the steps
    since the line before. Returns ((step, training loss, validation loss or None), ...), {step: train_time}. Raises Rejected."""
    losses, clock, before, before_s = [], {}, 0, 0.0
    for line in lines:
        match = STEP.fullmatch(line)
        need(match, f"{show(line)} stands among the step lines")
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
        left = (schedule.tokens() - schedule.tokens(step)) / size
        need(abs(int(match[12]) - left * step_ms / 1e3) <= SLACK * (0.5 + left * 0.05e-3),
             f"step {step}: eta {match[12]}s is not {left:g} times {step_ms}ms: the clock is inconsistent")
        need(float(match[11]) <= step_ms + 0.1 * SLACK, f"step {step}: it waited {match[11]}ms for data, of {step_ms}ms")
        need(not (on_cpu and match[10]), f"step {step}: an mfu, but no peak of a CPU is known")
        losses.append((step, train_loss, val_loss if match[4] else None))
        clock[step] = before_s = now_s
        before = step
    need(before == schedule.steps, f"the steps end at {before} of {schedule.steps}")
    return tuple(losses), clock

def check_final(line, config, losses, clock, tokens, cores):
    """The final line repeats the last step line, and says truly when the log's own target was reached. Returns cpu_time."""
    match = FINAL.fullmatch(line)
    need(match, f"{show(line)} is not a final line")
    step, steps, count, val_loss, time, cpu, wall, target, reached, after = match.groups()
    (end, _, loss), train_time = losses[-1], clock[losses[-1][0]]
    need((int(step), int(steps), float(val_loss), float(time)) == (end, end, loss, train_time), "its final line is not that of its last step")
    need(int(count) == tokens, f"final: {count} tokens, but the config's stages train on {tokens}")
    need(float(wall) + 0.05 * SLACK >= train_time, f"final: wall {wall}s is less than the train_time in it")
    need(float(cpu) <= train_time * cores + 0.05 * SLACK,
         f"final: cpu_time {cpu}s is more than {cores} cores have in {time}s: the clock is inconsistent")
    goal, half = float(config["target_loss"]), 0.5e-4 * SLACK
    need(math.isfinite(goal) and alike(target or "0", f"{goal:g}"), "final: its target is not the config's target_loss")
    may, must = ([at for at, _, loss in losses if loss is not None and loss <= goal + side] for side in (half, -half))
    told = int(reached) if reached else math.inf
    need(not target or (not reached or told in may) and told <= min(must, default=math.inf),
         f"final: target {target} was not reached where it says")
    need(not reached or abs(clock[told] - float(after)) <= 0.05, f"final: step {reached} was reached after {clock.get(told)}s, not {after}s")
    return float(cpu)

def read_header(lines):
    """({key: value}, the values of its data lines) of all lines between the source and the first step line. Raises Rejected."""
    found = [line.partition(": ")[::2] for line in lines]
    keys = [key for key, _ in found]
    for line, (key, value) in zip(lines, found):
        need(re.fullmatch(HEADER.get(key, "(?!)"), value, re.ASCII), f"{show(line)} is no line of train.py's header")
    for key in HEADER:
        need(key in keys and (key in ("data", "compiled") or keys.count(key) == 1), f"its header has {keys.count(key)} lines {key}:")
    need([key for key, _ in itertools.groupby(keys)] == [*HEADER], f"its header's order is not {', '.join(HEADER)}")
    return dict(found), [value for key, value in found if key == "data"]

def read_run(path):
    """The Run that a complete log tells of. Raises Rejected, and ValueError or OverflowError for numbers that are none."""
    source, lines = read_log(path)
    first = next((i for i, line in enumerate(lines) if line.startswith("step:")), None)
    final = next((i for i, line in enumerate(lines) if line.startswith("final: ")), None)
    need(first is not None and final is not None and first < final, "no step lines and final line in it")
    need(all(len(line) <= MAX_LINE and line.isprintable() for line in lines[:final + 1]),
         f"a line of control characters, or of more than {MAX_LINE}, before its end")
    need(not any(line.startswith("resumed: ") for line in lines[:final]), "a resumed run, whose clock has a gap: not for records")
    one, data = read_header(lines[:first])
    preset, devices = one["preset"].partition(" ")[0], one["devices"].split(", ")
    argv, config = parse_argv(one["argv"]), read_config(one["config"], source, preset)
    check_config(config, argv, source, preset)
    files, scored, trained = read_data(data, int(config["max_epochs"]))
    schedule = read_schedule(config)
    need(trained == schedule.tokens(), f"data: {trained} tokens trained on, but the config's stages train on {schedule.tokens()}")
    losses, clock = check_steps([line for line in lines[first:final] if not SAVED.fullmatch(line)], schedule, devices[0].endswith(" x cpu"))
    cpu_time = check_final(lines[final], config, losses, clock, trained, cores=int(devices[2].split()[0]))
    wrote = re.fullmatch(r"wrote: (.+)/ckpt/step-([0-9]{6,12}), .*", lines[-2])
    need(wrote and lines[-1].startswith("next: ") and lines[final + 1].startswith(("sample: ", "wrote: ")), "its end is not train.py's")
    need((Path(wrote[1]).parent, int(wrote[2])) == (Path(config["log_dir"]), schedule.steps), "its end is of another folder or step")
    pairs = re.split(r"(?:^| )([A-Za-z]\w*)=", one["versions"])[1:]
    need(len({*pairs[::2]}) == len(pairs) // 2, "versions: a name twice")
    return Run(path.name, source, argv, config, dict(zip(pairs[::2], pairs[1::2])), devices, one["parameters"], files, scored, losses,
               clock[schedule.steps], cpu_time, wrote[1])

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
    need(track.python == "any" or f"{release}.".startswith(f"{track.python}."), f"Python {show(release)}, the track is for {track.python}")
    for part in track.devices:
        need(part in run.devices, f"devices: {show(', '.join(run.devices))}, the track is for {', '.join(track.devices)}")
    need("1 x cpu" not in run.devices or run.train_time <= 10 or run.cpu_time >= run.train_time / 2, f"final: cpu_time {run.cpu_time}s is less "
         f"than half of {run.train_time}s on a CPU: an inconsistent clock, or a machine with other work")

def compare(run, first, fields=MAY_DIFFER):
    """What two runs must have in common, as reasons why not."""
    if run.source != first.source:
        yield f"another source than {first.name}"
    pairs = ((name, first.config.get(name), run.config.get(name)) for name in first.config | run.config if name not in fields)
    if differing := [f"{name}={show(theirs)} there, {show(ours)} here" for name, theirs, ours in pairs if theirs != ours]:
        yield f"another config than {first.name}: {differing[0]}"
    if (run.files, run.scored) != (first.files, first.scored):
        yield f"other data than {first.name}"
    if run.parameters != first.parameters:
        yield f"{run.parameters} parameters, {first.name} has {first.parameters}"

def check_together(runs):
    """(name, reason) of runs that are not repetitions of the first with other seeds."""
    trained = [{(step, loss) for step, loss, _ in run.losses} for run in runs]
    for i, (run, ours) in enumerate(zip(runs, trained)):
        twins = (other for other, theirs in zip(runs[:i], trained) if run.folder == other.folder or 2 * len(ours & theirs) > len(ours))
        if run.name != f"seed{run.config['seed']}.txt":
            yield run.name, f"its seed is {show(run.config['seed'])}: misnamed, or one run twice"
        elif twin := next(twins, None):
            yield run.name, f"the same run as {twin.name}: same folder, or the same training loss in most lines"
    for run in runs[1:]:
        yield from ((run.name, reason) for reason in compare(run, runs[0]))
        ours, theirs = ({k: v for k, v in each.versions.items() if k not in ELSEWHERE} for each in (run, runs[0]))
        if ours != theirs or run.devices != runs[0].devices:
            yield run.name, f"other versions or devices than {runs[0].name}"

def check_failed(path, readme):
    """failed<k>.txt is of a run without a result, and README.md tells of it. Raises Rejected."""
    text = read_bytes(path).decode(errors="replace")
    rest = text.partition(BAR)[2] or text
    need(not RESULT.search(rest), "a run that came to its end: it counts, as seed<k>.txt")
    need(re.search(rf"\b{re.escape(path.name)}\b", readme), "README.md does not tell of it")
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
                need(path.suffix == ".svg" and SVG.match(read_bytes(path, 1 << 20)), "not part of a record: README.md, seed<k>.txt, "
                     "failed<k>.txt, *.svg that are pictures")
        except Rejected as error:
            reasons.append(f"{path.name!a}: {error}")
        except (ValueError, OverflowError, OSError) as error:
            reasons.append(f"{path.name!a}: cannot be read as a log ({show(str(error))})")
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
def rerun(logged, tolerance):
    """Train with the source in a log, in a temporary folder; relative paths of data are looked up from here. Returns reasons."""
    flags = {name: value for name, value in logged.argv.items() if name not in ("log_dir", "resume")}
    with tempfile.TemporaryDirectory(prefix="rerun-") as folder:
        script = Path(folder) / "train.py"
        script.write_bytes(logged.source.encode())
        command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items()), f"--log_dir={folder}/logs"]
        print(f"rerun: this now executes the program in {logged.name} (sha256:{logged.sha256}), with all that you may do on this machine: "
              f"{shlex.join(command)}", flush=True)
        code = subprocess.run(command).returncode
        if code:
            return [f"rerun: the program ended with exit code {code}"]
        try:
            again = read_run(next(Path(folder).glob("logs/*/log.txt")))
        except (StopIteration, ValueError, OverflowError, OSError) as error:
            return [f"rerun: it left no log that can be read ({show(str(error))})"]
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
    """Returns 0 where the record is accepted, 1 where not. Raises UsageError, and OSError where a folder or the output fails."""
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
    if not 0 <= args.tolerance < math.inf:
        raise UsageError(f"--tolerance={args.tolerance}: wanted nats, 0 or more")
    folder, path = Path(os.path.realpath(args.folder)), args.folder / f"seed{args.rerun}.txt"
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
        print(f"source of {runs[0].name}: sha256:{runs[0].sha256}")
    for what, known in (("which validation tokens were scored", track.scored), ("which files were trained on", track.files)):
        if not known:
            print(f"NOT CHECKED: {what}; the table of tracks knows no SHA-256 yet")
    if args.rerun is not None and reasons:
        print("rerun: not done, since the record is rejected as it stands")
    elif args.rerun is not None:
        reasons += rerun(next(run for run in runs if run.name == path.name), args.tolerance)
    print("\n".join([*(f"rejected: {reason}" for reason in reasons), "REJECTED" if reasons else "ACCEPTED"]))
    return 1 if reasons else 0

def command():
    """main() for the shell: one sentence, and exit code 2, for what it raises."""
    try:
        return main()
    except (UsageError, OSError) as error:
        print("error:", "".join(c if c.isprintable() else "?" for c in str(error)), file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(command())
