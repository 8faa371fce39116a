"""What does each technique add? Trains a list of variants with several seeds each, and compares them with the first, pair by pair.

    python -m scripts.ablate LIST                  run what is not in records/ablations/LIST.jsonl yet, then print the table
    python -m scripts.ablate LIST --table          the table alone, of old lists too; --reach=NAME adds how soon each reaches NAME's final loss
    python -m scripts.ablate LIST --proxy=DIR      on the shards *train_*.bin and *val_*.bin of a folder, not on the demo's text
    python -m scripts.ablate reencode SHARDS DIR --bpe=DIR     make such a folder of GPT-2 shards (scripts/reencode.py)

LIST is a text file, a line each, # begins a comment:
    all: --steps=500                    flags put before everybody's own; optional, as is the next line
    sense: minus                        minus (the default): an entry is base less a technique; plus: base and a technique
    base:                               what all are compared with, the first entry
    no softcap: --softcap=              NAME: FLAGS of train.py
    gpt2: model=gpt2 --adamw_lr=0.0006  through `python -m scripts.baselines gpt2 FLAGS`
    gelu: patch=gelu.diff               with train.py changed by a diff beside the list (git apply): what has no flag

A run is a process on its own share of the cores, one JSON line when it has ended. Which runs are there is known by model, name of the diff, flags,
seed and data, so a list can be stopped (Ctrl-C), continued and extended. A seed gives both runs of a pair the same order of data
and the same first value of each weight that they share. Runs go seed by seed, so that what is there early is a whole table.
train.py and scripts/ are copied first: they can be edited while a list runs. A run that failed stays as a line with its error.
"""
import argparse, collections, contextlib, datetime, glob, hashlib, json, math, os, re, shlex, shutil, signal, subprocess, sys, tempfile
import time
from pathlib import Path

import numpy as np

from scripts import reencode
from train import PRESETS, ROOT, UsageError, file_sha256, open_shards, parse_flags, require

# model: of scripts.baselines, or "": train.py's. patch: the path of a diff, or ""
Entry = collections.namedtuple("Entry", "name model flags patch", defaults=("",))
OURS = ("--seed", "--log_dir", "--resume", "--train_files", "--val_files")  # flags that this script gives

# ---- The list ----

def check_flags(flags):
    """Raises UsageError for flags that no preset takes. Without --preset a run's machine chooses one."""
    errors = []
    for preset in PRESETS:
        try:
            return parse_flags(flags, preset)
        except UsageError as error:
            errors.append(error)
    raise errors[0]

def read_list(path, runs=True):
    """([Entry, ...], 1 where an entry is base less a technique, -1 where it is base and one).

    Without runs, for the table alone, flags may be those of an older train.py. Raises UsageError, and
    OSError for a file that is not there.
    """
    entries, common, sense = [], [], "minus"
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        (name, colon, rest), where = line.partition(":"), f"{path}, line {number}"
        name = name.strip()
        def need(holds, wanted):
            require(holds, f"{where}, {name!r}: {wanted}")
        need(colon and name, "wanted NAME: FLAGS")
        try:
            flags = shlex.split(rest, comments=True)
        except ValueError as error:
            need(False, error)  # an open quote
        if name in ("all", "sense"):
            need(not entries, "wanted above the entries")
            common, sense = (flags, sense) if name == "all" else (common, " ".join(flags))
            need(sense in ("minus", "plus"), "wanted minus or plus")
            continue
        need(name == "base" or entries, "wanted base: first")
        need(name not in [entry.name for entry in entries], "an entry of this name is there already")
        taken = lambda prefix: flags.pop(0)[len(prefix):] if flags and flags[0].startswith(prefix) else ""
        model, patch = taken("model="), taken("patch=")
        patch = patch and Path(path).parent / patch
        need(not patch or patch.is_file(), f"there is no file {patch}")
        flags = common + flags
        need(not (given := [flag for flag in flags if flag.split("=")[0] in OURS]), f"{given[:1]} is given by the script; leave it out")
        if runs and not model and not patch:  # a diff may bring flags
            try:
                check_flags(flags)
            except (UsageError, OSError) as error:
                need(False, error)
        entries.append(Entry(name, model, flags, patch))
    require(entries, f"{path}: no entries; wanted base: first")
    return entries, 1 if sense == "minus" else -1

def data_of(proxy):
    """(flags that name a folder's shards, what tells these data from others); without a folder the demo's text. Raises UsageError."""
    if not proxy:
        return [], "embedded"
    globs = [f"{proxy}/*{split}_*.bin" for split in ("train", "val")]
    hashes = [digest for pattern in globs for digest in open_shards(pattern).sha256]
    return [f"--train_files={globs[0]}", f"--val_files={globs[1]}"], hashlib.sha256("".join(hashes).encode()).hexdigest()

def key_of(entry, seed, data):
    """Names a run whatever the state of train.py, and of a diff."""
    names = [entry.model, entry.flags, seed, data] + ([entry.patch.name] if entry.patch else [])
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]

def read_records(path):
    """{key: the last line that has it}. A line that a kill cut short is passed over."""
    records = {}
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            records[record["key"]] = record
    return records

# ---- Running ----

def snapshot(folder, root=ROOT):
    """Copies what a run executes. Returns the SHA-256 of train.py."""
    shutil.copy(root / "train.py", folder)
    shutil.copytree(root / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    return file_sha256(folder / "train.py")

def patched(entry, source):
    """The folder of train.py as the entry wants it, made of a snapshot if need be. Raises UsageError for a diff that does not fit."""
    if not entry.patch:
        return source
    folder = source / f"patch-{hashlib.sha256(str(entry.patch.resolve()).encode()).hexdigest()[:16]}"
    if not folder.exists():
        folder.mkdir()
        snapshot(folder, source)
        made = subprocess.run(["git", "apply", entry.patch.resolve()], text=True, capture_output=True, cwd=folder,
                              env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)})
        why = " ".join(made.stderr.split())[:300]
        require(made.returncode == 0, f"{entry.patch}: does not fit this train.py ({why}); make it anew")
    return folder

def command(entry, source):
    """-P: of two folders that have a scripts.baselines, take the copy."""
    return [sys.executable, "-P", *(["-m", "scripts.baselines", entry.model] if entry.model else [str(source / "train.py")])]

def result_of(folder, code):
    """What a run's folder says, or {"error": the last line of what it said}."""
    with contextlib.suppress(OSError, StopIteration, LookupError, TypeError, ValueError):  # something is not there
        run = next(folder.glob("*/metrics.jsonl") if code == 0 else iter(())).parent
        *rows, final = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        log = (run / "log.txt").read_text().split("=" * 120)[-1]
        stated = re.search("^versions: .*", log, re.M)[0]
        versions = dict(re.findall(r"(python|jax|numpy)=(\S+)", stated))
        processor = re.search(r" processor=(.*?)(?= [A-Z_]+=|$)", stated)  # none beside an accelerator
        return {"val": [[row["step"], row["tokens"], row["val_loss"]] for row in rows if "val_loss" in row],
                "val_loss": final["val_loss"], "train_time_s": final["train_time_s"], "cpu_time_s": final["cpu_time_s"],
                "params": int(re.search(r"^parameters: (\d+)", log, re.M)[1]), "versions": versions, "processor": processor and processor[1],
                "devices": re.search("^devices: (.*)", log, re.M)[1], "data": dict(re.findall(r"^data: (\S+) tokens:\d+ sha256:(\w+)", log, re.M))}
    said = (folder / "said.txt").read_text(errors="replace").split("\n")
    last = next((line for line in reversed(said) if line.strip()), "it said nothing")
    return {"error": f"exit code {code}: {last[:300].replace(str(folder), 'DIR')}"}

def run_all(todo, out, jobs, data, source, source_sha256, command):
    """Runs [(entry, seed), ...], `jobs` at a time, and appends a line for each that ends. KeyboardInterrupt ends what runs."""
    pinned, start, running, done = hasattr(os, "sched_setaffinity"), time.perf_counter(), {}, 0
    cores = sorted(os.sched_getaffinity(0)) if pinned else [*range(os.cpu_count())]
    shares = [cores[slot::jobs] or [cores[slot % len(cores)]] for slot in range(jobs)]
    waiting, cut = collections.deque(todo), out.exists() and out.read_text()[-1:] not in ("", "\n")  # its last line, by a kill
    try:
        while waiting or running:
            for slot in sorted({*range(jobs)} - {*running})[:len(waiting)]:
                (entry, seed), folder = waiting.popleft(), Path(tempfile.mkdtemp(dir=source))
                code = patched(entry, source)  # made before, in run_missing
                argv = [*command(entry, code), *entry.flags, *data[0], f"--seed={seed}", f"--log_dir={folder}"]
                path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
                environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}  # so that an error is the last line
                if pinned:
                    os.sched_setaffinity(0, shares[slot])  # a child has what its parent has
                with open(folder / "said.txt", "w") as said:
                    process = subprocess.Popen(argv, stdout=said, stderr=said, env=environment, start_new_session=True)
                if pinned:
                    os.sched_setaffinity(0, cores)
                running[slot] = process, entry, seed, folder
            time.sleep(0.1)
            for slot, (process, entry, seed, folder) in [*running.items()]:
                if process.poll() is None:
                    continue
                row = {"name": entry.name, "seed": seed, "model": entry.model, "flags": shlex.join(entry.flags), "key": key_of(entry, seed, data[1])}
                row |= {"patched_sha256": file_sha256(patched(entry, source) / "train.py")} if entry.patch else {}
                row |= result_of(folder, process.returncode) | {"source_sha256": source_sha256, "cores": len(shares[slot]), "date":
                                                               datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
                with open(out, "a") as file:
                    file.write("\n" * cut + json.dumps(row) + "\n")
                shutil.rmtree(folder)
                del running[slot]
                done, cut = done + 1, False
                words = row.get("error") or "val_loss {val_loss:.4f}, {train_time_s:.0f} s of training, {cpu_time_s:.0f} s of CPU".format(**row)
                left = (time.perf_counter() - start) / done * (len(todo) - done)
                print(f"[{done}/{len(todo)}] {entry.name}, seed {seed}: {words}; {left / 60:.1f} min left", flush=True)
    finally:
        for process, *_ in running.values():
            process.kill()
            process.wait()

def run_missing(entries, data, args, command=command):
    """Runs what is not in args.out yet; args as of parse, data as of data_of. Returns ({name: {seed: line}}, whether interrupted)."""
    interrupted, records = False, read_records(args.out)
    with tempfile.TemporaryDirectory() as source:
        source_sha256 = snapshot(Path(source))
        def lacks(entry, seed):
            row = records.get(key_of(entry, seed, data[1]))
            return not row or args.same_source and row["source_sha256"] != source_sha256 or args.retry and "error" in row
        todo = [(entry, seed) for seed in args.seeds for entry in entries if not args.table and lacks(entry, seed)]
        for entry, _ in todo:
            patched(entry, Path(source))  # before anything runs
        if todo:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            print(f"{len(todo)} of {len(entries) * len(args.seeds)} runs to do, {args.jobs} at a time", flush=True)
            try:
                run_all(todo, args.out, args.jobs, data, Path(source), source_sha256, command)
            except KeyboardInterrupt:
                interrupted = True
                print(f"interrupted; what had ended is in {args.out}, the same command continues", flush=True)
    records = read_records(args.out)
    return {entry.name: {seed: records[key] for seed in args.seeds if (key := key_of(entry, seed, data[1])) in records}
            for entry in entries}, interrupted

# ---- The table ----

def paired(differences):
    """(mean, standard error or nan) of one difference per seed."""
    n = len(differences)
    return float(np.mean(differences)) if n else math.nan, float(np.std(differences, ddof=1)) / math.sqrt(n) if n > 1 else math.nan

def p_of(t, df):
    """Two-sided p of Student's t: the share of cos^(df - 1) that lies beyond the angle atan(t / sqrt(df))."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    weights = np.cos(angles) ** (df - 1)
    return float(weights[angles > math.atan(abs(t) / math.sqrt(df))].sum() / weights.sum())

def judge(differences):
    """({name: word}, a sentence that says how) of {name: [a difference per seed]}. Few seeds tell little of one entry's noise, so its
    standard error counts as at least that of the whole list; as many comparisons as entries, so p by their number (Bonferroni)."""
    many = {name: own for name, own in differences.items() if len(own) > 1}
    df = sum(len(own) - 1 for own in many.values())
    pooled = math.sqrt(sum(float(np.var(own)) * len(own) for own in many.values()) / df) if df else math.nan
    words = dict.fromkeys(differences, "-")
    for name, own in many.items():
        mean, error = paired(own)
        error = max(error, pooled / math.sqrt(len(own)))
        seen = p_of(mean / error if error else math.inf, df) * len(many) < 0.05
        words[name] = ("helps" if mean > 0 else "hurts") if seen else "not seen at this scale"
    return words, "Differences are between runs of the same seed: mean ± standard error." + (
        f" helps, hurts: two-sided p < 0.05 / {len(many)}, by Student's t ({df} degrees of freedom) over the larger of that error and the "
        f"list's, {pooled:.4f} / sqrt(n)." if df else "")

def table_of(entries, rows, sense):
    """Markdown. rows: {name: {seed: line}}."""
    good = {name: {seed: row for seed, row in own.items() if "error" not in row} for name, own in rows.items()}
    gains = {name: [sense * (own[seed]["val_loss"] - good["base"][seed]["val_loss"]) for seed in sorted(own.keys() & good["base"].keys())]
             for name, own in good.items() if name != "base"}
    words, how = judge(gains)
    time_s = "cpu_time_s" if all(" cpu," in row["devices"] for own in good.values() for row in own.values()) else "train_time_s"
    shared = os.path.commonprefix([entry.flags for entry in entries])
    out = [f"Flags of all: `{' '.join(shared)}`", "",
           f"| name | flags | n | mean val loss | loss without it minus loss with it | {time_s.split('_')[0].replace('cpu', 'CPU')} time / base "
           "| parameters | verdict |",
           "|---|---|---|---|---|---|---|---|"]
    for name, model, flags, patch in entries:
        own, base, failed = good[name], good["base"], len(rows[name]) - len(good[name])
        both = sorted(own.keys() & base.keys())
        difference, error = paired(gains.get(name, []))
        said = " ".join([f"model={model}"] * bool(model) + ["a diff"] * bool(patch) + flags[len(shared):]).replace("|", "\\|")
        cells = [name, f"`{said}`" if said else "", f"{len(own)}" + (f" ({failed} failed)" if failed else ""),
                 f"{np.mean([row['val_loss'] for row in own.values()]):.4f}" if own else "-",
                 f"{difference:+.4f}" + (f" ± {error:.4f}" if len(both) > 1 else "") + f" (n={len(both)})" if both and name != "base" else "-",
                 f"{sum(own[s][time_s] for s in both) / sum(base[s][time_s] for s in both):.2f}" if both else "-",
                 next((str(row["params"]) for row in own.values()), "-"), words.get(name, "-")]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, "", how])

def notes_of(rows):
    """What the table's reader must know: failures, mixed sources, data or versions."""
    rows = [row for own in rows.values() for row in own.values()]
    notes = [f"failed: {row['name']}, seed {row['seed']}: {row['error']}" for row in rows if "error" in row]
    for key, what in (("source_sha256", "sources of train.py (--same_source runs the others again)"), ("data", "data"),
                      ("versions", "versions of Python and packages")):
        if (count := len({json.dumps(row[key]) for row in rows if key in row})) > 1:
            notes.append(f"warning: these runs are of {count} different {what}")
    # a CPU's bfloat16 matmuls sum in an order of its own: another CPU is like another seed, for this run and not for its base
    cpu = {(row["name"], row["seed"]): row.get("processor") for row in rows if "error" not in row}
    for (name, seed), own in cpu.items():
        if own != (base := cpu.get(("base", seed), own)):
            notes.append(f"warning: {name}, seed {seed}, ran on {own or 'an unnamed CPU'}, base on {base or 'an unnamed CPU'}: no pair")
    made = {(row["name"], row["source_sha256"], row["patched_sha256"]) for row in rows if "patched_sha256" in row}
    twice = [name for (name, _), count in collections.Counter(key[:2] for key in made).items() if count > 1]
    return notes + [f"warning: the runs of {name} are of different diffs" for name in twice]

def curve(own):
    """(tokens, mean validation loss) of each evaluation, over the seeds of one entry; ([], []) without a finished run."""
    curves = [row["val"] for row in own.values() if "val" in row]
    return ([tokens for _, tokens, _ in curves[0]], np.mean(curves, axis=0)[:, 2].tolist()) if curves else ([], [])

def tokens_to(target, tokens, losses):
    """Tokens at which a curve, straight between evaluations, first is at target; None if it never is."""
    i = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if not i:
        return None if i is None else tokens[0]
    return tokens[i - 1] + (losses[i - 1] - target) / (losses[i - 1] - losses[i]) * (tokens[i] - tokens[i - 1])

def reach(name, rows):
    """Markdown: when each entry's mean curve reaches the final loss of `name`. Raises UsageError."""
    require(curve(rows.get(name, {}))[0], f"--reach={name}: wanted an entry that has a finished run")
    (*_, total), (*_, target) = curve(rows[name])
    out = [f"| name | tokens to {target:.4f}, the final loss of {name} | share of its {total} |", "|---|---|---|"]
    for other, own in rows.items():
        at = tokens_to(target, *curve(own))
        out.append(f"| {other} | " + ("not reached | - |" if at is None else f"{at:.0f} | {at / total:.3f} |"))
    return "\n".join(out)

# ---- Command line ----

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.ablate --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.ablate LIST [--FLAG=VALUE ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("list", metavar="LIST", help="the file that lists the variants")
    chip = any(map(glob.glob, ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")))
    flag("--jobs", type=int, default=1 if chip else 2, metavar="N", help="runs at a time, each on its share of the cores (default: 2; 1 beside an accelerator, "
         "whose memory goes to the first)")
    flag("--seeds", default="0,1,2", metavar="LIST", help="(default: %(default)s)")
    flag("--out", metavar="FILE", help="where the lines are (default: records/ablations/NAME.jsonl for NAME.txt)")
    flag("--only", metavar="A,B", action="append", help="of the entries besides base only these; once for each name that has a comma")
    flag("--proxy", metavar="DIR", help="folder of the shards to train on (default: the demo's text)")
    flag("--reach", metavar="NAME", help="also print when each entry reaches the final loss of this one")
    flag("--table", action="store_true", help="run nothing")
    flag("--same_source", action="store_true", help="run again what another train.py ran")
    flag("--retry", action="store_true", help="run again what failed")
    args = parser.parse_args(argv)
    if args.jobs < 1 or not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        fail(f"--jobs={args.jobs} --seeds={args.seeds}: wanted at least 1 job, and whole numbers with commas between them")
    args.seeds = [*map(int, args.seeds.split(","))]
    args.out = Path(args.out or ROOT / "records/ablations" / f"{Path(args.list).stem}.jsonl")
    return args

def main(argv=None, command=command):
    """Returns the exit code: 0, or 130 if interrupted. Raises UsageError before anything runs."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["reencode"]:
        return reencode.main(argv[1:])
    args = parse(argv)
    entries, sense = read_list(args.list, not args.table)
    if args.only:
        names = [entry.name for entry in entries]
        wanted = [name for given in args.only for name in ([given] if given in names else given.split(","))]
        for name in wanted:
            require(name in names, f"--only: no entry {name} in {args.list}; there are {', '.join(names)}")
        entries = [entry for entry in entries if entry.name in ("base", *wanted)]
    rows, interrupted = run_missing(entries, data_of(args.proxy), args, command)
    print("\n".join([table_of(entries, rows, sense), *notes_of(rows)]), flush=True)
    if args.reach:
        print("\n" + reach(args.reach, rows))
    return 130 if interrupted else 0

def run(main):
    """main for the shell, where a list can be stopped. Does not return."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background job would ignore the first
        signal.signal(stop, signal.default_int_handler)
    try:
        sys.exit(main())
    except (UsageError, OSError) as error:
        sys.exit(print("error:", error, file=sys.stderr) or 2)

if __name__ == "__main__":
    run(main)
