"""scripts/verify_record.py accepts a genuine set and rejects tampered ones, each for its reason."""

import hashlib
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
from scipy import stats

from scripts import verify_record
from scripts.verify_record import BAR, Rejected, UsageError, main, read_run
from train import DEMO, ROOT, SPEEDRUN

SEEDS = (0, 1, 2, 3, 10)
SHIFTS = (0.0, 0.0012, -0.0007, 0.0005, -0.0015)  # of the losses derived from those of seed 0
FLAGS = """--preset=demo --steps=30 --num_layers=1 --model_dim=32 --num_heads=1 --head_dim=32
--mlp_dim=64 --offset_layers= --skips= --backout= --gate_dims=0 --smear=false --optimizer=adamw
--adamw_lr=0.02 --stages.end=0.5,1 --stages.batch_tokens=2048,4096 --stages.seq_len=64
--val.seq_len=64 --val_tokens=2048 --val_context=32 --micro_tokens=65536 --val_every=10 --log_every=5
--target_loss=3.1 --seed=0"""
TABLE = """Words before it.

| track | target | val targets | scored tokens | training files | Python | devices | words |
|---|---|---|---|---|---|---|---|
| `other` | 1.5 | 7 | not yet known | not yet known | any | 8 x TPU v6 lite | none |
| `tiny` | {target} | 2,048 | `{scored}` | `{trained}` | {python} | `1 x cpu, 1 processes` | any |

| level | of another table |
|---|---|
| digest | none |
"""
OLD = ROOT / "records/cpu/2026-11-21_RecordRecipe"  # of a train.py with the older line config:


def reseal(text):
    body = text.rpartition("\nsha256:")[0] + "\n"
    return f"{body}sha256:{hashlib.sha256(body.encode()).hexdigest()}\n"


def shift(text, by):
    """All losses moved, as another seed moves them."""
    return re.sub(
        r"(_loss:)(\d\.\d{4})(?= )", lambda match: f"{match[1]}{float(match[2]) + by:.4f}", text
    )


def seed_to(old, new):
    return rf'((?:--seed=|"seed": )){old}\b', rf"\g<1>{new}"


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    """The log of one run; blanks and = in the folder's name, which config and argv then hold."""
    logs = tmp_path_factory.mktemp("runs") / "my logs x=5"
    env = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "train.py", *FLAGS.split(), f"--log_dir={logs}"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
    text = next(logs.glob("*/log.txt")).read_text()
    assert reseal(text) == text
    return text


class Record:
    """A folder of five runs, and a table whose target is 0.01 above their mean, or `above`."""

    def __init__(self, root, genuine):
        self.folder, self.tracks = root / "tiny" / "2026-01-31_Test", root / "tracks.md"
        self.folder.mkdir(parents=True)
        (self.folder / "README.md").write_text("Less is more.\n")
        head, bar, rest = genuine.partition(BAR)
        for seed, by in zip(SEEDS, SHIFTS, strict=True):
            text = re.sub(*seed_to(0, seed), shift(rest, by))
            text = re.sub(r"Z-[0-9a-f]{6}", f"Z-{seed:06x}", text)
            self.path(seed).write_text(reseal(head + bar + text))
        self.cells = {
            "scored": re.search(r"before them:(\w+)", genuine)[1],
            "trained": re.search(r"data: train\S* .*sha256:(\w+)", genuine)[1],
            "python": "{}.{}".format(*sys.version_info),
            "target": f"{self.losses()[0] + 0.01:.4f}",
        }
        self.table()

    def table(self, **cells):
        self.tracks.write_text(TABLE.format(**self.cells | cells))

    def path(self, seed):
        return self.folder / f"seed{seed}.txt"

    def losses(self):
        found = re.compile(r"^final: .*val_loss:(\S+)", re.M)
        return [float(found.search(self.path(seed).read_text())[1]) for seed in SEEDS]

    def edit(self, *changes, seeds=(1,), seal=True, count=0):
        """Replace (regex, new) below the source of some logs; each must change something."""
        for seed in seeds:
            edit(self.path(seed), *changes, seal=seal, count=count)

    def edit_source(self, old, new, seeds=(1,), seal=True):
        for seed in seeds:
            edit_source(self.path(seed), old, new, seal)

    def write(self, name, data):
        (self.folder / name).write_bytes(data)

    def check(self, *flags):
        return main([str(self.folder), f"--tracks={self.tracks}", *flags])


def edit(path, *changes, seal=True, count=0):
    head, bar, rest = path.read_text().partition(BAR)
    for old, new in changes:
        rest, found = re.subn(old, new, rest, count=count, flags=re.M)
        assert found, old
    path.write_text(reseal(head + bar + rest) if seal else head + bar + rest)


def edit_source(path, old, new, seal=True):
    head, bar, rest = path.read_text().partition(BAR)
    assert old in head
    text = head.replace(old, new, 1) + bar + rest
    path.write_text(reseal(text) if seal else text)


@pytest.fixture
def record(tmp_path, genuine):
    return Record(tmp_path, genuine)


def reasons(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("rejected: ") for line in lines if line.startswith("rejected: ")]


def test_a_genuine_set_is_accepted_and_its_statistics_are_those_of_its_losses(record, capsys):
    assert record.check() == 0
    said, losses, n = capsys.readouterr().out, record.losses(), 5
    target, mean = float(record.cells["target"]), sum(losses) / n
    sd = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (n - 1))
    t = (mean - target) / (sd / math.sqrt(n))
    p = stats.t.cdf(t, n - 1)
    assert said.endswith("ACCEPTED\n") and "NOT CHECKED" not in said and "rejected" not in said
    assert f"n 5, mean val_loss {mean:.5f}, sd {sd:.5f}, t {t:.2f}, one-sided p {p:.2g} of" in said
    assert f"(target - mean) * sqrt(n) = {(target - mean) * math.sqrt(n):.5f}" in said
    rows = re.findall(r"^ +(\d+) +(\d\.\d{4}) +(\d+\.\d{3}) +\d+\.\d$", said, re.M)
    assert [int(seed) for seed, _, _ in rows] == [*SEEDS]
    assert [float(loss) for _, loss, _ in rows] == losses


# ---- Tampered sets ----
def edits(*changes, **how):
    return lambda record: record.edit(*changes, **how)


def field(name, value):
    """In the config, as JSON."""
    return rf'("{name}": )("[^"]*"|[^,"]+)', rf"\g<1>{value}"


def flag(text):
    return "--seed", f"--{text} --seed"


def set_to(name, value):
    """In config and argv."""
    return field(name, value), flag(f"{name}={value}")


def copy_run(*changes):
    def tamper(record):
        shutil.copy(record.path(3), record.path(4))
        if changes:
            record.edit(*changes, seeds=(4,))

    return tamper


def keep(*seeds):
    def tamper(record):
        for seed in {*SEEDS} - {*seeds}:
            record.path(seed).unlink()

    return tamper


def two_far_runs(record):
    record.path(1).write_text(reseal(shift(record.path(1).read_text(), -0.05)))
    keep(0, 1)(record)


def swap_times(record):
    text = record.path(1).read_text()
    times = re.findall(r"^step:.*(train_time:\S+)", text, re.M)[1:3]
    for old, new in ((times[0], "@"), (times[1], times[0]), ("@", times[1])):
        text = text.replace(f" {old} ", f" {new} ")
    record.path(1).write_text(reseal(text))


def rescaled(factor, what, digits):
    change = rf"(?<={what}:)(\d+\.\d+)", lambda match: f"{float(match[1]) * factor:.{digits}f}"
    return edits(change)


def written(name, data):
    return lambda record: record.write(name, data)


def sealed(data):
    return data + b"\nsha256:" + hashlib.sha256(data + b"\n").hexdigest().encode() + b"\n"


def cut(start, name="seed10.txt", readme=b"Less is more."):
    """Drop the end of seed10.txt from the line that starts so, as of a run that broke off."""

    def tamper(record):
        text = record.path(10).read_text()
        record.path(10).unlink()
        record.write(name, text[: text.rindex(f"\n{start}") + 1].encode())
        record.write("README.md", readme)

    return tamper


def called_failed(change=lambda data: data):
    """A run that came to its end under the name of one that did not."""

    def tamper(record):
        record.write("failed10.txt", change(record.path(10).read_bytes()))
        record.path(10).unlink()
        record.write("README.md", b"failed10.txt: the machine went away")

    return tamper


def renamed(seed, name):
    return lambda record: record.path(seed).rename(record.folder / name)


def slowed(factor, eta=True, cpu=True):
    """One log's clock times factor, its arithmetic kept; of eta and CPU time where asked for."""

    def tamper(record):
        before = 0, 0.0

        def step_line(match):
            nonlocal before
            step, now = int(match[1]), round(float(match[3]) * factor, 3)
            (since, since_s), before = before, (step, now)
            done, was = (2048 * at + 2048 * max(at - 15, 0) for at in (step, since))
            ms, rate = 1e3 * (now - since_s) / (step - since), (done - was) / (now - since_s)
            left = f"{(92160 - done) / rate:.0f}s" if eta else match[5]
            clock = f"train_time:{now:.3f}s step:{ms:.1f}ms tok/s:{rate / 1e3:.1f}k"
            return f"step:{step}/30{match[2]}{clock}{match[4]}eta:{left}"

        def times(match):
            digits = len(match[2].partition(".")[2])
            return f"{match[1]}{float(match[2]) * factor:.{digits}f}s"

        line = r"^step:(\d+)/30(.*)train_time:(\S+)s step:\S+ tok/s:\S+( .*)eta:(\S+)"
        record.edit((line, step_line), (r"(wall:)(\S+)s", times))
        if cpu:
            record.edit((r"(cpu_time:)(\S+)s", times))
        text = record.path(1).read_text()
        clock = dict(re.findall(r"^step:(\d+)/.*train_time:(\S+)s step", text, re.M))
        reached = r"at step (\d+) after \S+", lambda m: f"at step {m[1]} after {clock[m[1]]}s"
        record.edit((rf"{FINAL}train_time:\S+", rf"\1train_time:{clock['30']}s"), reached)

    return tamper


def other_validation_file(record):
    """The validation file is one of the track's training files."""
    new = "data: train_000000 tokens:99999 sha256:" + "0" * 64 + r"\ndata: val_000000\1"
    record.edit((r"^data: val_000000.*\n", ""), (r"^data: train_000000(.*)", new))
    record.table(trained=record.cells["trained"] + "` `" + "0" * 64)


def raised_target(record):
    reached = r"(^step:10/.*train_time:)(\S+)( (?:.*\n)*.*)target:3.1 .*"
    changes = ("--target_loss=3.1", "--target_loss=9"), field("target_loss", 9)
    record.edit(*changes, (reached, r"\1\2\3target:9 reached at step 10 after \2"), seeds=SEEDS)
    record.table(target="2.0")


def big_seed(record):
    big = 9007199254740993  # as a float the number before it
    record.edit(("--seed=10", f"--seed={big}"), field("seed", big - 1), seeds=(10,))
    record.path(10).rename(record.path(big))


def mean_off(by):
    return lambda record: record.table(target=f"{sum(record.losses()) / 5 + by:.4f}")


FINAL = r"(^final: .*)"
STAGE_0, STAGE_1 = '"end": 0.5, "batch_tokens": 2048', '"end": 1.0, "batch_tokens": 4096'
NEW_NAME = seed_to(3, 4), ("Z-000003", "Z-000004")
GARBAGE = bytes(range(256)) * 99
SHA = "sha256:" + "0" * 64
PICTURE = b"<svg" + b" " * (1 << 20)
TAMPERED = [
    # the digest
    (edits((r"val_loss:\d\.\d{4}", "val_loss:3.0000"), seal=False), "digest is not that of"),
    (lambda r: r.edit_source("tokens", "tokenz", seal=False), "digest is not that of"),
    (cut("sha256:"), "its last line is not its digest"),
    (written("seed1.txt", b""), "its last line is not its digest"),
    (written("seed4.txt", sealed(GARBAGE)), "not text in UTF-8"),
    (written("seed4.txt", sealed(b"x" + BAR.encode())), "no step lines"),
    (written("seed1.txt", sealed(b"preset: demo (asked for)")), "no source of train.py"),
    (lambda r: r.edit_source("import jax\n", "#" * 600_000), "no source of train.py, of at most"),
    (edits((r"\Z", f"step:5/30\n{SHA}\nsha256:")), "a digest in its midst"),
    # the step lines
    (edits((r"^(step:30/.*val_loss:)\S{3}", r"\g<1>3.2")), "final line is not that of its last"),
    (edits((rf"{FINAL}val_loss:\S{{3}}", r"\1val_loss:3.2")), "final line is not that of its last"),
    (edits(("^step:15/.*\n", "")), "step:20/30 stands where the config asks for step:15/30"),
    (edits(("^step:30/.*\n", "")), "the steps end at 25 of 30"),
    (edits((r"^(step:10/.*) val_loss:\S+", r"\1")), "step 10: no val_loss"),
    (edits((r"^(step:15/.*) train_t", r"\1 val_loss:3.0000 train_t")), "step 15: a val_loss"),
    (edits((r"^step:15/", "note: all is well\nstep:15/")), "'note: all is well' stands among"),
    (edits((r"^(step:15/.*\n)", r"\1\1")), "step:15/30 stands where .* asks for step:20/30"),
    (edits((r"^(step:30/.*\n)", r"\1\1")), "step:30/30 stands where"),
    (edits((r"^step:15/30", "step:15/31")), "step:15/31 stands where"),
    (edits(("^step:.*\n", "")), "no step lines and final line"),
    (edits((r"^(step:15/.*train_loss:)\S+", r"\1nan")), "step 15: a loss that is not finite"),
    (edits((r"^step:15/", "resumed: a/ckpt/step-000010 at step 10\nstep:15/")), "a resumed run"),
    # the clock
    (swap_times, "step 10: 5 steps of .*the clock is inconsistent"),
    (edits((r"(^step:15/.*train_time:)\S+", r"\g<1>0.001s")), "step 15: .*0.001s is not after"),
    (rescaled(0.5, "train_time", 3), "the clock is inconsistent"),
    (rescaled(0.5, " step", 1), "step 5: 5 steps of .*the clock is inconsistent"),
    (edits((r"(^(step:30/|final: ).*train_time:)\S+s", r"\g<1>99.000s")), "clock is inconsistent"),
    (edits((rf"{FINAL}_time:\S+s cpu", r"\1_time:0.010s cpu")), "final line is not that of its"),
    (edits((r"cpu_time:\S+s", "cpu_time:999.9s")), "cpu_time 999.9s is more than"),
    (edits((r"wall:\S+s", "wall:0.0s")), "wall 0.0s is less"),
    (slowed(100, eta=False), r"step 5: eta \d+s is not .*the clock is inconsistent"),
    (slowed(1000, cpu=False), "cpu_time .* is less than half"),
    (edits((r"(^step:20/.*tok/s:)", r"\g<1>1")), "step 20: 1.* tok/s are not 4096 tokens in"),
    (edits((r"(^step:10/.*wait:)\S+", r"\g<1>9999.0ms")), "step 10: it waited 9999.0ms"),
    (edits((r"(^step:10/.*mfu:)-", r"\g<1>99.9%")), "step 10: an mfu, but no peak of a CPU"),
    # the header
    (edits(("^versions: .*\n", "")), "header has 0 lines versions:"),
    (edits((r"^(config: .*\n)", r"\1\1")), "header has 2 lines config:"),
    (edits(("^compiled: .*\n", "")), "header has 0 lines compiled:"),
    (edits((r"^(versions: .*\n)(devices: .*\n)", r"\2\1")), "order is not"),
    (edits((r"\Apreset", f"import os{BAR}preset")), "'import os' is no line of train.py's header"),
    (edits((r"^parameters: .*", "parameters: few")), "'parameters: few' is no line of"),
    (edits(("^devices: ", "devices: 8 x H200, "), seeds=SEEDS), "'devices: .*' is no line of"),
    (edits((r"^versions: (.*)", r"versions: jax=0 \1")), "versions: a name twice"),
    (edits(flag("\x1b[8m=1")), "a line of control characters"),
    (edits(flag("log_dir=" + "a" * 20000)), "a line of .*, or of more than 20000"),
    # the config
    (edits(flag("muon_lr=0.03"), seeds=SEEDS), "muon_lr='0.02', but argv asks for '0.03'"),
    (edits((STAGE_1, STAGE_1[:-4] + "1024")), r"stages.batch_tokens='\[2048, 1024\]', but argv"),
    (
        edits(("^preset: demo", "preset: speedrun"), field("preset", '"speedrun"')),
        "config: preset='speedrun', but argv asks for 'demo'",
    ),
    (edits(("^preset: demo", "preset: tiny")), "preset: 'tiny', but the config's is 'demo'"),
    (big_seed, "seed='9007199254740992', but argv asks for '9007199254740993'"),
    (edits(('"log_every": 5, ', "")), "config: not JSON as train.py writes it"),
    (edits(('"steps"', '"steps": 31, "steps"')), "config: not JSON as train.py writes it"),
    (edits(('"steps": 30', '"steps": 30 30')), "config: not JSON as train.py writes it"),
    (edits((r'"stages": \[.*?\]', '"stages": [7]')), "config: not JSON as train.py writes it"),
    (edits(('"steps"', '"speed": 1, "steps"')), "config: 'speed' is no field of its source"),
    (edits(("--seed", "@my.args --seed")), "argv reads flags from a file"),
    (edits(flag("sed=1")), "argv: '--sed' is no field"),
    (edits(("--seed", "now --seed")), "argv: 'now' is no --flag"),
    (edits(("--seed", "' --seed")), "argv has an open quote"),
    (edits(field("resume", '"logs/a"'), flag("resume=logs/a")), "config: resume is a path"),
    (edits(*set_to("log_every", 0)), "a schedule that cannot be"),
    (edits((STAGE_1, STAGE_1.replace("1.0", "0.9")), flag("stages.end=0.5,0.9")), "that cannot be"),
    (edits((STAGE_0, STAGE_0.replace("0.5", "2")), flag("stages.end=2,1")), "that cannot be"),
    (
        edits((STAGE_0, STAGE_0.replace("0.5", "Infinity")), flag("stages.end=1e999,1")),
        "cannot be read as a log",
    ),
    (edits(*set_to("steps", 10**11)), "data: 92160 tokens trained on"),
    (edits(field("steps", '"many"'), flag("steps=many")), "cannot be read as a log"),
    # the data
    (edits(("^data: train_.*\n", "")), "its data lines are not"),
    (edits(("^data: validation .*\n", "")), "its data lines are not"),
    (edits(("scores 2048 ", "scores 2047 "), seeds=SEEDS), "2047 validation targets, the track"),
    (edits(*set_to("val_tokens", 1024), seeds=SEEDS), "1024 validation targets, the track"),
    (edits((r"(before them:)\w{4}", r"\g<1>0000"), seeds=SEEDS), "tokens have SHA-256 0000"),
    (edits((r"(train_0.*sha256:)\w{4}", r"\g<1>0000"), seeds=SEEDS), "is none of the track's"),
    (edits((r"^(data: )val_0(.*\n)", r"\g<1>train_1\2\1val_0\2")), "the same file twice"),
    (other_validation_file, "the validation file, is a training file of the track"),
    (edits((r"(val_0.* tokens:)\d+", r"\g<1>2048")), "2048 targets scored of a file with 2048"),
    (edits((r"^data: \d+ tokens", "data: 92159 tokens")), "data: 92159 tokens read for 92160"),
    (edits((r"(train_0.* tokens:)\d+", r"\g<1>10")), "92160, of 1 times 10 that there are"),
    (edits(("92160 tokens read for 92160", "92161 tokens read for 92161")), "92161 tokens trained"),
    (edits((r"tokens:92160", "tokens:92161")), "final: 92161 tokens"),
    # the target and the end
    (raised_target, r"^mean \d\.\d+ is above the track's target 2$"),
    (edits(("target:3.1 ", "target:3.2 ")), "its target is not the config's"),
    (edits(("reached at step 20", "reached at step 10")), "not reached where it says"),
    (edits(("reached at step 20 .*", "not reached")), "not reached where it says"),
    (edits((r"20 after \S+", "20 after 999.000s")), "step 20 was reached after .*not 999.000s"),
    (edits(("^final: .*\n", "")), "no step lines and final line"),
    (edits((r"(^final: .*) wall:\S+", r"\1")), "is not a final line"),
    (edits((f"{FINAL}\n", r"\1\n\1\n")), "its end is not"),
    (edits(("^next: .*\n", "")), "its end is not"),
    (edits(("ckpt/step-000030", "ckpt/step-000020")), "its end is of another folder or step"),
    (edits((r"^wrote: .*(?=/\d+T)", "wrote: logs")), "its end is of another folder or step"),
    # runs that do not belong together
    (lambda r: r.edit_source("tokens", "tokenz"), "seed1.txt': another source than seed0.txt"),
    (edits(*set_to("muon_lr", 0.03)), "another config .*: muon_lr='0.02' there, '0.03' here"),
    (edits((r"(val_0.*sha256:)\w{4}", r"\g<1>0000")), "other data than seed0.txt"),
    (edits((r"^parameters: \d+", "parameters: 7")), "seed1.txt': 7 parameters, seed0.txt has "),
    (edits((" jax=", " jax=9.")), "other versions or devices than seed0.txt"),
    (edits((r"\d+ host cores", "999 host cores")), "other versions or devices than seed0.txt"),
    (edits((" backend=cpu", " backend=cpu XLA_FLAGS=--xla_a=1")), "other versions or devices"),
    (copy_run(), "seed4.txt': its seed is '3': misnamed, or one run twice"),
    (copy_run(seed_to(3, 4)), "seed4.txt': the same run as seed3.txt"),
    (copy_run(*NEW_NAME, (r"(^step:5/30 \S+:)\S+", r"\g<1>5.4321")), "the same run as seed3.txt"),
    (edits(("Z-000001", "Z-000002")), "seed2.txt': the same run as seed1.txt"),
    # the track and the statistics
    (edits((r"python=3\.\d+", "python=3.1"), seeds=SEEDS), "Python '3.1.*the track is for 3"),
    (edits(("1 x cpu", "8 x TPU v6 lite"), seeds=SEEDS), "8 x TPU .*the track is for 1 x cpu"),
    (keep(0), "^n = 1: "),
    (keep(), "^n = 0: "),
    (two_far_runs, "^p = 0.*wanted below 0.01"),
    (mean_off(0.0002), "^p = 0.*wanted below 0.01"),
    (mean_off(-0.01), "^mean .* is above the track's target"),
    (
        edits((r"^((?:step:30/|final:).* val_loss:)\S+", r"\g<1>2.9999"), seeds=SEEDS),
        "^5 runs with the same loss",
    ),
    # what lies in the folder
    (lambda r: (r.folder / "README.md").unlink(), "README.md.: missing or empty"),
    (written("README.md", b" \n"), "README.md.: missing or empty"),
    (cut("step:25/", "failed10.txt"), "failed10.txt.*README.md does not tell of it"),
    (cut("step:25/", "failed10.txt", b"notfailed10.txt.bak"), "README.md does not tell of it"),
    (called_failed(), "failed10.txt.*it counts, as seed"),
    (cut("final: ", "failed10.txt", b"failed10.txt"), "failed10.txt.*it counts, as seed"),
    (called_failed(lambda data: data + BAR.encode() + b"x\n"), "failed10.txt.*it counts, as seed"),
    (called_failed(lambda data: data.replace(b"\n", b"\r")), "failed10.txt.*it counts, as seed"),
    (renamed(10, "seed10.txt.bak"), "seed10.txt.bak.*not part of a record"),
    (renamed(10, "seed010.txt"), "seed010.txt.*not part of a record"),
    (renamed(10, "seed10.svg"), "seed10.svg.*not part of a record"),
    (written("a.svg", PICTURE), "a.svg.*more than 1 MiB"),
    (lambda r: os.truncate(r.path(1), 1 << 40), "seed1.txt.*more than 16 MiB"),
    (lambda r: (r.folder / "seed4.txt").mkdir(), "seed4.txt.*not a plain file"),
    (lambda r: os.mkfifo(r.folder / "seed4.txt"), "seed4.txt.*not a plain file"),
    (lambda r: (r.folder / "a.svg").symlink_to(r.path(1)), "a.svg.*not a plain file"),
]


@pytest.mark.parametrize("tamper, reason", TAMPERED, ids=[reason for _, reason in TAMPERED])
def test_a_tampered_set_is_rejected_for_its_reason_alone(tamper, reason, record, capsys):
    tamper(record)
    assert record.check() == 1
    said = reasons(capsys)
    assert said and all(re.search(reason, line) for line in said), said
    same = {line.partition(":")[2] for line in said}
    assert len(said) == 1 or (len(said) == len(SEEDS) and len(same) == 1), said


# ---- Logs of the older form ----
NOTE = "    kv_heads = property"
NO_PROGRAM = "its source has no Config"
OLD_TAMPERED = [
    (edit, [("--seed", "--muon_lr=0.03 --seed")], "muon_lr='0.02', but .* make it '0.03'"),
    (edit, [("rope_base=1024.0", "rope_base=5.0")], "rope_base='5.0', but .* make it '1024.0'"),
    (edit, [("model_dim=256", "model_dim=64")], "model_dim='64', but .* make it '256'"),
    (edit, [(" ns_steps=5", "")], "config: muon_momentum or ns_steps is not where"),
    (edit, [("^preset: demo", "preset: tiny")], "preset: 'tiny', but the config's is 'demo'"),
    (edit, [("preset: demo", "preset: nosuch")], "preset: 'nosuch' is none of its source"),
    (edit, [("^config: .*", "config: {}")], "config: not JSON"),
    (edit_source, ["class Config:", "class Configs:"], NO_PROGRAM),
    (edit_source, ["import jax\n", "import import\n"], NO_PROGRAM),
]


@pytest.mark.parametrize("change, arguments, reason", OLD_TAMPERED)
def test_a_tampered_log_of_the_older_form_is_rejected(change, arguments, reason, tmp_path):
    path = tmp_path / "seed0.txt"
    shutil.copy(OLD / path.name, path)
    change(path, *arguments)
    with pytest.raises(Rejected, match=reason):
        read_run(path)


def test_a_default_of_an_older_source_is_no_line_of_a_string(tmp_path):
    path = tmp_path / "seed0.txt"
    shutil.copy(OLD / path.name, path)
    edit_source(path, NOTE, f'    N = """\n    rope_base: float = 5.0\n    """\n{NOTE}')
    read_run(path)


@pytest.mark.parametrize("folder", sorted((ROOT / "records/cpu").iterdir()), ids=lambda p: p.name)
def test_the_records_of_this_repository_are_accepted(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.endswith("ACCEPTED\n")


# ---- What is no tampering ----
@pytest.mark.parametrize(
    "name, text, value, follows",
    [
        ("stages.ahead", "(0.5,0.25),(0.5,),()", "[[0.5, 0.25], [0.5], []]", True),
        ("stages.ahead", "", "[[], []]", True),
        ("stages.tied", "1,0", "[true, false]", True),
        ("stages.lr", "1", "[1.0, 1.0]", True),
        ("stages.lr", "1,2", "[1.0, 1.2]", False),
        ("stages.lr", "1,2,3", "[1.0, 2.0]", False),
        ("skips", "((0,2),)", "[[0, 2]]", True),
        ("backout", "1", "[1]", True),
        ("softcap", "", "[]", True),
        ("softcap", "15,15,0", "[15.0, 15.0, 0]", True),
        ("residual_dtype", "none", "null", True),
        ("vocab_size", "none", "257", True),
        ("num_kv_heads", "none", "257", False),
        ("attention", "auto", "xla", True),
        ("attention", "band", "xla", False),
    ],
)
def test_a_flag_is_compared_as_train_reads_it(name, text, value, follows):
    assert verify_record.follows(name, text, value) == follows


def test_a_failed_run_that_the_readme_tells_of_is_listed_and_does_not_count(record, capsys):
    cut("step:20/", "failed10.txt", b"failed10.txt, failed7.txt: power was lost")(record)
    record.write("failed7.txt", b"\x1b[2J\xff\n\x1b[31m\x00")
    record.write("loss.svg", b"<svg/>")
    assert record.check() == 0
    said = capsys.readouterr().out
    line = r"^failed: failed10.txt, which ends with 'step:15/30 .*eta:\d+s'$"
    assert re.search(line, said, re.M) and "n 4, mean" in said and "\x1b" not in said


def test_hashes_that_the_table_does_not_know_are_said_not_to_be_checked(record, capsys):
    record.table(scored="not yet known", trained="not yet known")
    assert record.check() == 0
    said = capsys.readouterr().out
    assert "NOT CHECKED: which validation tokens were scored" in said
    assert "NOT CHECKED: which files were trained on" in said


SAMPLE = "sample: \x0c\r\x85step:1/30 final: sha256:0\nstep:1/30\nfinal: \nsample: "


@pytest.mark.parametrize(
    "changes",
    [
        set_to("save_every", 10),  # off the clock
        [field("resume", '"auto"'), flag("resume=auto")],  # and found nothing
        [(r"(platform=\S+)", r"\1-other")],  # another machine of the kind
        [(" backend=cpu", " backend=cpu JAX_COMPILATION_CACHE_DIR=/a b/c")],
        [("^sample: ", SAMPLE)],  # what a model may write
        [flag("muon_lr=0.02_0")],  # the same number
    ],
)
def test_what_may_differ_between_runs_does_not_count_against_them(changes, record):
    record.edit(*changes, count=1)
    assert record.check() == 0


@pytest.mark.parametrize(
    "changes",
    [
        [
            field("log_dir", '"/a/ckpt/b"'),
            ("^(argv: .*)", r"\1 --log_dir=/a/ckpt/b"),
            (r"^wrote: .*(?=/\d+T)", "wrote: /a/ckpt/b"),
        ],
        [field("target_loss", 3.1000001), ("_loss=3.1", "_loss=3.1000001")],  # the end says 3.1
    ],
)
def test_a_folder_called_ckpt_and_a_target_of_many_digits_are_no_tampering(changes, record):
    record.edit(*changes, seeds=SEEDS)
    assert record.check() == 0


def test_the_clock_of_a_slow_machine_is_no_tampering(record):
    slowed(1000)(record)
    read_run(record.path(1))


def test_garbled_logs_are_told_from_runs_without_a_traceback(record):
    rng = random.Random(0)
    path = record.path(1)
    text = path.read_text()
    start = text.index(BAR) + len(BAR)
    seen = set()
    for _ in range(200):
        at = rng.randrange(start, len(text) - 70)
        some = text[start + rng.randrange(2000) :][: rng.randrange(99)]
        nines = "9" * rng.choice((1, 30, 5000))
        piece = rng.choice(["", nines, " =", "\n", "-", "nan", '"', "[", some])
        path.write_text(reseal(text[:at] + piece + text[at + rng.randrange(30) :]))
        try:
            read_run(path)
        except (ValueError, OverflowError) as error:  # Rejected is the first
            seen.add(str(error)[:20])
    assert len(seen) > 20


# ---- Running one again ----
def test_a_rerun_gives_the_logged_losses_and_leaves_nothing(record, capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert record.check("--rerun=0") == 0
    said = capfd.readouterr().out
    digest = hashlib.sha256(record.path(0).read_text().partition(BAR)[0].encode()).hexdigest()
    assert f"executes the program in seed0.txt (sha256:{digest})" in said
    assert said.index("this now executes") < said.index("compiling")
    steps = r"rerun: step (10|20|30) val_loss (\S+) in the log, \2 here"
    assert len(re.findall(steps, said)) == 3
    assert "rerun: all losses, of training too, are equal in all printed digits" in said
    assert said.endswith("ACCEPTED\n") and not list((tmp_path / "temporary").iterdir())


def test_a_rerun_rejects_a_loss_that_was_edited_with_care(record, tmp_path, capfd):
    """The program stands for a run: it writes the log as it was."""
    log = tmp_path / "log.txt"
    program = f"""import shutil
folder = Path(sys.argv[-1].partition("=")[2]) / "run"
folder.mkdir(parents=True)
shutil.copy({str(log)!r}, folder)
sys.exit()
"""
    record.edit_source("import jax\n", program, seeds=SEEDS)
    shutil.copy(record.path(0), log)
    record.path(0).write_text(reseal(shift(log.read_text(), -0.004)))
    assert record.check() == 0  # nothing else can tell
    assert record.check("--rerun=0") == 1
    said = capfd.readouterr().out
    assert "rejected: rerun: the final losses are 0.0040 apart, tolerated are 0.003\n" in said
    assert "rerun: not all losses" in said


@pytest.mark.parametrize("code, reason", [(7, "ended with exit code 7"), (0, "it left no log")])
def test_a_rerun_that_comes_to_nothing_is_a_reason(code, reason, record, capfd):
    record.edit_source("import jax\n", f"sys.exit({code})\n", seeds=SEEDS)
    assert record.check("--rerun=0") == 1
    said = reasons(capfd)
    assert len(said) == 1 and said[0].startswith("rerun: ") and reason in said[0]


def test_a_source_runs_only_with_rerun_and_only_where_all_else_is_accepted(record, tmp_path, capfd):
    mark = tmp_path / "ran"
    program = f"open({str(mark)!r}, 'w'), sys.exit(7)\n"
    record.edit_source("import jax\n", program, seeds=SEEDS)
    assert record.check() == 0 and not mark.exists()
    record.table(target="1.0")
    assert record.check("--rerun=0") == 1 and not mark.exists()
    assert "rerun: not done" in capfd.readouterr().out
    record.table()
    assert record.check("--rerun=0") == 1 and mark.exists()


# ---- Usage, and the table of this repository ----
def test_usage_errors_say_what_was_wanted(record, tmp_path, monkeypatch):
    for folder, flags, words in (
        (tmp_path / "none", (), "wanted a folder"),
        (record.folder.parent, (), "wanted a folder"),
        (record.folder, ("--tracks=/nowhere/t.md",), "the table of tracks cannot be read"),
        (record.folder, ("--rerun=7",), "there is no .*seed7.txt"),
        (record.folder, ("--tolerance=nan",), "wanted nats, 0 or more"),
    ):
        with pytest.raises(UsageError, match=words):
            main([str(folder), f"--tracks={record.tracks}", *flags])
    record.table(target="low")
    with pytest.raises(UsageError, match="the row of tiny lacks a column or a number"):
        record.check()
    record.tracks.write_text(record.tracks.read_text().replace("`tiny`", "`small`"))
    with pytest.raises(UsageError, match="tiny: no such track in .*one of other, small$"):
        record.check()
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match="pip install -r scripts/requirements.txt$"):
        record.check()


def test_the_shell_sees_the_verdict_as_exit_code_and_jax_is_not_needed(record, tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError")

    def shell(*argv):
        command = [sys.executable, "-m", "scripts.verify_record", *argv]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        return done.returncode, done.stderr

    argv = str(record.folder), f"--tracks={record.tracks}"
    assert shell(*argv) == (0, "")
    record.edit(("val_loss:", "val_loss:1"))
    assert shell(*argv) == (1, "")
    code, error = shell(f"{record.folder}\x1b[2J{'x' * 400}", argv[1])
    assert code == 2 and error.startswith("error: ") and error.isascii() and "\x1b" not in error
    assert shell()[0] == 2


def test_the_tracks_of_this_repository_ask_for_what_its_presets_score():
    table = ROOT / "records/README.md"
    v6e, cpu = (verify_record.read_track(table, name) for name in ("v6e-8", "cpu"))
    assert (v6e.target, v6e.val_targets) == (SPEEDRUN.target_loss, SPEEDRUN.val_tokens)
    assert v6e.devices == ["8 x TPU v6 lite", "1 processes"] and not v6e.scored and not v6e.files
    assert (cpu.target, cpu.val_targets) == (DEMO.target_loss, DEMO.val_tokens)
    assert len(cpu.scored) == len(cpu.files) == 1 and cpu.scored != cpu.files
    assert cpu.python == "3.11" and cpu.devices == ["1 x cpu", "2 host cores"]
