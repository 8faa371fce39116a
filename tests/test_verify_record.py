"""scripts/verify_record.py: a genuine set is accepted, and each way of tampering with it is rejected for its own reason."""
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
from scripts.verify_record import UsageError, main
from train import Config, PRESETS, ROOT

SEEDS, SHIFTS = (0, 1, 2, 3, 10), (0.0, 0.0012, -0.0007, 0.0005, -0.0015)  # of the losses derived from those of seed 0
TABLE = """Words before it.

| track | target | val targets | scored tokens | training files | Python | devices | words |
|---|---|---|---|---|---|---|---|
| `other` | 1.5 | 7 | not yet known | not yet known | any | 8 x TPU v6 lite | none |
| `tiny` | {target} | 2,048 | `{scored}` | `{trained}` | {python} | `1 x cpu, 1 processes` | any |

| level | of another table |
|---|---|
| digest | none |
"""

def reseal(text):
    body = text.rpartition("\nsha256:")[0] + "\n"
    return f"{body}sha256:{hashlib.sha256(body.encode()).hexdigest()}\n"

def shift(text, by):
    """All losses moved, as another seed moves them."""
    return re.sub(r"(_loss:)(\d\.\d{4})(?= )", lambda m: f"{m[1]}{float(m[2]) + by:.4f}", text)

@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    """The log of one run; blanks and = in the folder's name, which config and argv then hold."""
    logs = tmp_path_factory.mktemp("runs") / "my logs x=5"
    env = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    subprocess.run([sys.executable, "train.py", "--preset=tiny", "--seed", "0", "--target_loss=3.6", "--batch_tokens=2048,4096",
                    f"--log_dir={logs}"], cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
    text = next(logs.glob("*/log.txt")).read_text()
    assert reseal(text) == text
    return text

class Record:
    """A folder tiny/2026-01-31_Test of five runs, and a table whose target is 0.01 above their mean, or `above`."""
    def __init__(self, root, genuine):
        self.folder, self.tracks = root / "tiny" / "2026-01-31_Test", root / "tracks.md"
        self.folder.mkdir(parents=True)
        (self.folder / "README.md").write_text("Less is more.\n")
        for seed, by in zip(SEEDS, SHIFTS):
            head, bar, rest = genuine.partition(verify_record.BAR)
            rest = rest.replace("--seed 0", f"--seed {seed}").replace(" seed=0 ", f" seed={seed} ")
            rest = re.sub(r"Z-[0-9a-f]{6}", f"Z-{seed:06x}", shift(rest, by))
            self.path(seed).write_text(reseal(head + bar + rest))
        self.cells = {"scored": re.search(r"before them:(\w+)", genuine)[1], "trained": re.search(r"data: train\S* .*sha256:(\w+)", genuine)[1],
                      "python": "{}.{}".format(*sys.version_info), "target": f"{self.losses()[0] + 0.01:.4f}"}
        self.table()

    def table(self, **cells):
        self.tracks.write_text(TABLE.format(**self.cells | cells))

    def path(self, seed): return self.folder / f"seed{seed}.txt"

    def losses(self): return [float(re.search(r"^final: .*val_loss:(\S+)", self.path(seed).read_text(), re.M)[1]) for seed in SEEDS]

    def edit(self, *changes, seeds=(1,), seal=True, count=0):
        """Replace (regex, new) below the source of some logs; each must change something. The digest is made anew with seal."""
        for seed in seeds:
            head, bar, rest = self.path(seed).read_text().partition(verify_record.BAR)
            for old, new in changes:
                rest, found = re.subn(old, new, rest, count=count, flags=re.M)
                assert found, old
            self.path(seed).write_text(reseal(head + bar + rest) if seal else head + bar + rest)

    def edit_source(self, old, new, seeds=(1,), seal=True):
        for seed in seeds:
            head, bar, rest = self.path(seed).read_text().partition(verify_record.BAR)
            assert old in head
            text = head.replace(old, new, 1) + bar + rest
            self.path(seed).write_text(reseal(text) if seal else text)

    def check(self, *flags):
        return main([str(self.folder), f"--tracks={self.tracks}", *flags])

@pytest.fixture
def record(tmp_path, genuine):
    return Record(tmp_path, genuine)

def reasons(capsys):
    return [line.removeprefix("rejected: ") for line in capsys.readouterr().out.splitlines() if line.startswith("rejected: ")]

def test_a_genuine_set_is_accepted_and_its_statistics_are_those_of_its_final_losses(record, capsys):
    assert record.check() == 0
    said, losses, target = capsys.readouterr().out, record.losses(), float(record.cells["target"])
    mean, n = sum(losses) / 5, 5
    sd = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (n - 1))
    t = (mean - target) / (sd / math.sqrt(n))
    assert said.endswith("ACCEPTED\n") and "NOT CHECKED" not in said and "rejected" not in said
    assert f"n 5, mean val_loss {mean:.5f}, sd {sd:.5f}, t {t:.2f}, one-sided p {stats.t.cdf(t, n - 1):.2g} of" in said
    assert f"(target - mean) * sqrt(n) = {(target - mean) * math.sqrt(n):.5f}" in said
    rows = re.findall(r"^ +(\d+) +(\d\.\d{4}) +(\d+\.\d{3}) +\d+\.\d$", said, re.M)
    assert [(int(seed), float(loss)) for seed, loss, _ in rows] == [*zip(SEEDS, losses)]

# ---- Tampered sets ----
def copy_run(record, old, new, *changes):
    shutil.copy(record.path(old), record.path(new))
    if changes:
        record.edit(*changes, seeds=(new,))

def keep(record, *seeds):
    for seed in {*SEEDS} - {*seeds}:
        record.path(seed).unlink()

def swap_times(record):
    text = record.path(1).read_text()
    times = re.findall(r"^step:.*(train_time:\S+)", text, re.M)[1:3]
    for old, new in ((times[0], "@"), (times[1], times[0]), ("@", times[1])):
        text = text.replace(f" {old} ", f" {new} ")
    record.path(1).write_text(reseal(text))

def rescale(record, factor, what, digits):
    record.edit((rf"(?<={what}:)(\d+\.\d+)", lambda m: f"{float(m[1]) * factor:.{digits}f}"))

def write(record, name, data):
    (record.folder / name).write_bytes(data)

def sealed(data):
    return data + b"\nsha256:" + hashlib.sha256(data + b"\n").hexdigest().encode() + b"\n"

def cut(record, seed, start, name=None):
    """Drop the end of a log from the line that starts so, as of a run that broke off."""
    text = record.path(seed).read_text()
    record.path(seed).unlink()
    (record.folder / (name or f"seed{seed}.txt")).write_text(text[:text.rindex(f"\n{start}") + 1])

def call_failed(record, seed, change=lambda data: data, readme="failed{}.txt: the machine went away"):
    """A run that came to its end under the name of one that did not."""
    record.path(seed).rename(record.folder / f"failed{seed}.txt")
    write(record, f"failed{seed}.txt", change((record.folder / f"failed{seed}.txt").read_bytes()))
    write(record, "README.md", readme.format(seed).encode())

def slow(record, factor, eta=True, cpu=True):
    """One log's clock times factor, its arithmetic kept; of eta and the CPU time where asked for."""
    before = 0, 0.0
    def step_line(match):
        nonlocal before
        step, now = int(match[1]), round(float(match[3]) * factor, 3)
        (since, since_s), before = before, (step, now)
        done, was = (2048 * at + 2048 * max(at - 15, 0) for at in (step, since))
        ms, rate = 1e3 * (now - since_s) / (step - since), (done - was) / (now - since_s)
        left = f"{(92160 - done) / rate:.0f}s" if eta else match[5]
        return f"step:{step}/30{match[2]}train_time:{now:.3f}s step:{ms:.1f}ms tok/s:{rate / 1e3:.1f}k{match[4]}eta:{left}"
    times = lambda match: f"{match[1]}{float(match[2]) * factor:.{len(match[2].partition('.')[2])}f}s"
    record.edit((r"^step:(\d+)/30(.*)train_time:(\S+)s step:\S+ tok/s:\S+( .*)eta:(\S+)", step_line),
                (r"(wall:)(\S+)s", times), *[(r"(cpu_time:)(\S+)s", times)] * cpu)
    end = re.findall(r"^step:(\d+)/.*train_time:(\S+)s step", record.path(1).read_text(), re.M)
    record.edit((rf"{FINAL}train_time:\S+", rf"\1train_time:{end[-1][1]}s"), (r"at step (\d+) after \S+", lambda m: f"at step {m[1]} after {dict(end)[m[1]]}s"))

def decoy(record, text):
    """Text in the source's Config that only looks like more of it, and a config that follows it."""
    record.edit_source("    kv_heads = property", f"{text}    kv_heads = property", seeds=SEEDS)
    record.edit((" rope_base=1024.0 ", " rope_base=5.0 "), seeds=SEEDS)

def big_seed(record):
    record.edit(("--seed 10", "--seed 9007199254740993"), (" seed=10 ", " seed=9007199254740992 "), seeds=(10,))
    record.path(10).rename(record.path(9007199254740992))

FINAL = r"(^final: .*)"
TAMPERED = {
    "edited loss": (lambda r: r.edit((r"val_loss:\d\.\d{4}", "val_loss:3.0000"), seal=False), "seed1.txt.*digest is not that of"),
    "edited loss, digest recomputed": (lambda r: r.edit((r"^(step:30/.*val_loss:)\d\.\d", r"\g<1>3.2")), "seed1.txt.*final line is not that of its last step"),
    "edited final loss": (lambda r: r.edit((rf"{FINAL}val_loss:\d\.\d", r"\1val_loss:3.2")), "seed1.txt.*final line is not that of its last step"),
    "one bit of the source": (lambda r: r.edit_source("tokens", "tokenz", seal=False), "seed1.txt.*digest is not that of"),
    "removed line": (lambda r: r.edit(("^step:15/.*\n", "")), "seed1.txt.*step:20/30 stands where the config asks for step:15/30"),
    "removed last step": (lambda r: r.edit(("^step:30/.*\n", "")), "seed1.txt.*the steps end at 25 of 30"),
    "removed evaluation": (lambda r: r.edit((r"^(step:10/.*) val_loss:\S+", r"\1")), "seed1.txt.*step 10: no val_loss"),
    "added evaluation": (lambda r: r.edit((r"^(step:15/.*) train_time", r"\1 val_loss:3.0000 train_time")), "seed1.txt.*step 15: a val_loss"),
    "added line": (lambda r: r.edit((r"^step:15/", "note: all is well\nstep:15/")), "seed1.txt.*'note: all is well' stands among"),
    "duplicated step": (lambda r: r.edit((r"^(step:15/.*\n)", r"\1\1")), "seed1.txt.*step:15/30 stands where the config asks for step:20/30"),
    "other number of steps": (lambda r: r.edit((r"^step:15/30", "step:15/31")), "seed1.txt.*step:15/31 stands where"),
    "removed header line": (lambda r: r.edit(("^versions: .*\n", "")), "seed1.txt.*header has 0 lines versions:"),
    "two configs": (lambda r: r.edit((r"^(config: .*\n)", r"\1\1")), "seed1.txt.*header has 2 lines config:"),
    "header out of order": (lambda r: r.edit((r"^(versions: .*\n)(devices: .*\n)", r"\2\1")), "seed1.txt.*order is not"),
    "removed end": (lambda r: r.edit(("^next: .*\n", "")), "seed1.txt.*its end is not"),
    "no compiled lines": (lambda r: r.edit(("^compiled: .*\n", "")), "seed1.txt.*header has 0 lines compiled:"),
    "no beginning of the end": (lambda r: r.edit(("^wrote: .*\n", "")), "seed1.txt.*its end is not"),
    "no samples and no end": (lambda r: r.edit((r"^sample: (.*\n)*wrote: .*\nnext: .*\n", "")), "seed1.txt.*its end is not"),
    "no final line": (lambda r: r.edit(("^final: .*\n", "")), "seed1.txt.*no step lines and final line"),
    "no step lines": (lambda r: r.edit(("^step:.*\n", "")), "seed1.txt.*no step lines and final line"),
    "final line before the steps": (lambda r: r.edit((r"^((?:(?:step|saved):.*\n)+)(final: .*\n)", r"\2\1")), "seed1.txt.*no step lines and final line"),
    "final line of another form": (lambda r: r.edit((r"(^final: .*) wall:\S+", r"\1")), "seed1.txt.*is not a final line"),
    "a step after the last": (lambda r: r.edit((r"^(step:30/.*\n)", r"\1\1")), "seed1.txt.*step:30/30 stands where"),
    "no training file": (lambda r: r.edit(("^data: train_.*\n", "")), "seed1.txt.*its data lines are not"),
    "scored line of another form": (lambda r: r.edit(("targets; sha256", "targets, sha256")), "seed1.txt.*its data lines are not"),
    "no host cores": (lambda r: r.edit((r", \d+ host cores", "")), "seed1.txt': 'devices: 1 x cpu, 1 processes' is no line of train.py's header"),
    "flag without a value": (lambda r: r.edit((r"^(argv: .*)", r"\1 --muon_lr")), "seed1.txt.*argv: '--muon_lr' is no --flag"),
    "config of other beginning": (lambda r: r.edit((r"^config: preset=", "config: presets=")), "seed1.txt.*config: preset or steps is not where"),
    "no steps": (lambda r: r.edit((" log_every=5 ", " log_every=0 "), ("--seed", "--log_every=0 --seed")), "seed1.txt.*a schedule that cannot be"),
    "batches of three stages": (lambda r: r.edit(("batch_tokens=2048,4096", "batch_tokens=2048,4096,1")), "seed1.txt.*a schedule that cannot be"),
    "batches of no tokens": (lambda r: r.edit(("batch_tokens=2048,4096", "batch_tokens=0,4096"), ("92160", "61440"), (r"^(step:(?:5|1.)/.*tok/s:)\S+", r"\g<1>0.0k")),
                             "seed1.txt.*a schedule that cannot be"),
    "stages that end early": (lambda r: r.edit((" stage_ends=0.5,1 ", " stage_ends=0.5,0.9 "), ("--seed", "--stage_ends=0.5,0.9 --seed")),
                              "seed1.txt.*a schedule that cannot be"),
    "no scored line": (lambda r: r.edit(("^data: validation .*\n", "")), "seed1.txt.*its data lines are not"),
    "other val count": (lambda r: r.edit(("scores 2048 ", "scores 2047 "), seeds=SEEDS), "2047 validation targets, the track scores 2048"),
    "other val count in the config": (lambda r: r.edit((" val_tokens=2048 ", " val_tokens=1024 "), ("--seed", "--val_tokens=1024 --seed"), seeds=SEEDS),
                                      "1024 validation targets, the track scores 2048"),
    "other source": (lambda r: r.edit_source("tokens", "tokenz"), "seed1.txt': another source than seed0.txt"),
    "no source": (lambda r: write(r, "seed1.txt", sealed(b"preset: tiny (asked for)")), "seed1.txt.*no source of train.py"),
    "another program": (lambda r: r.edit_source("class Config:", "class Configs:"), "seed1.txt.*its source has no Config"),
    "reordered times": (swap_times, "seed1.txt.*step 10: 5 steps of .*the clock is inconsistent"),
    "a time that stands still": (lambda r: r.edit((r"(^step:15/.*train_time:)\S+( .*\n.*train_time:)(\S+)", r"\g<1>0.001s\2\3")),
                                 "seed1.txt.*step 15: train_time 0.001s is not after"),
    "duplicated seed": (lambda r: copy_run(r, 3, 4), "seed4.txt': its seed is '3': misnamed, or one run twice"),
    "one run under two seeds": (lambda r: copy_run(r, 3, 4, (r"(seed[= ])3\b", r"\g<1>4")), "seed4.txt': the same run as seed3.txt"),
    "one run under two seeds and folders": (lambda r: copy_run(r, 3, 4, (r"(seed[= ])3\b", r"\g<1>4"), ("Z-000003", "Z-000004")), "seed4.txt': the same run as seed3.txt"),
    "one folder for two runs": (lambda r: r.edit(("Z-000001", "Z-000002")), "seed2.txt': the same run as seed1.txt"),
    "misnamed": (lambda r: r.path(1).rename(r.path(4)), "seed4.txt': its seed is '1'"),
    "n = 1": (lambda r: keep(r, 0), "^n = 1: "),
    "n = 0": (lambda r: keep(r), "^n = 0: "),
    "two far runs": (lambda r: (r.path(1).write_text(reseal(shift(r.path(1).read_text(), -0.05))), keep(r, 0, 1)), "^p = 0.*wanted below 0.01"),
    "truncated": (lambda r: cut(r, 1, "sha256:"), "seed1.txt.*its last line is not its digest"),
    "truncated within a line": (lambda r: r.path(1).write_text(r.path(1).read_text()[:-3]), "seed1.txt.*its last line is not its digest"),
    "empty": (lambda r: write(r, "seed1.txt", b""), "seed1.txt.*its last line is not its digest"),
    "target raised in the log": (lambda r: (r.edit(("target_loss=3.6", "target_loss=9"),
                                                   (r"(^step:10/.*train_time:)(\S+)( (?:.*\n)*.*)target:3.6 .*", r"\1\2\3target:9 reached at step 10 after \2"),
                                            seeds=SEEDS), r.table(target="2.0")), r"^mean \d\.\d+ is above the track's target 2$"),
    "target raised in the final line": (lambda r: r.edit(("target:3.6 ", "target:3.2 ")), "seed1.txt.*its target is not the config's"),
    "target reached elsewhere": (lambda r: r.edit(("reached at step 20", "reached at step 10")), "seed1.txt.*not reached where it says"),
    "target reached unsaid": (lambda r: r.edit(("reached at step 20 .*", "not reached")), "seed1.txt.*not reached where it says"),
    "target met by too little": (lambda r: r.table(target="{:.4f}".format(sum(r.losses()) / 5 + 0.0002)), "^p = 0.*wanted below 0.01"),
    "target missed": (lambda r: r.table(target="{:.4f}".format(sum(r.losses()) / 5 - 0.01)), "^mean .* is above the track's target"),
    "same loss everywhere": (lambda r: r.edit((r"^((?:step:30/|final:).* val_loss:)\S+", r"\g<1>2.9999"), seeds=SEEDS), "^5 runs with the same loss"),
    "clock scaled, digest recomputed": (lambda r: rescale(r, 0.5, "train_time", 3), "seed1.txt.*the clock is inconsistent"),
    "steps faster than the clock": (lambda r: rescale(r, 0.5, " step", 1), "seed1.txt.*step 5: 5 steps of .*the clock is inconsistent"),
    "last time edited": (lambda r: r.edit((r"(^step:30/.*train_time:)\S+s", r"\g<1>9.000s"), (rf"{FINAL}train_time:\S+s(.*)wall", r"\1train_time:9.000s\2wall")),
                         "seed1.txt.*5 steps of .*the clock is inconsistent"),
    "final time edited": (lambda r: r.edit((rf"{FINAL}train_time:\S+s", r"\1train_time:0.010s")), "seed1.txt.*final line is not that of its last step"),
    "more CPU time than there was": (lambda r: r.edit((r"cpu_time:\S+s", "cpu_time:999.9s")), "seed1.txt.*cpu_time 999.9s is more than"),
    "wall below train time": (lambda r: r.edit((r"wall:\S+s", "wall:0.0s")), "seed1.txt.*wall 0.0s is less"),
    "tokens per second edited": (lambda r: r.edit((r"(^step:20/.*tok/s:)", r"\g<1>1")), "seed1.txt.*step 20: 1.* tok/s are not 4096 tokens in"),
    "tokens edited": (lambda r: r.edit((r"tokens:92160", "tokens:92161")), "seed1.txt.*final: 92161 tokens"),
    "tokens trained on edited": (lambda r: r.edit((r"92160 tokens read for 92160", "92161 tokens read for 92161")), "seed1.txt.*data: 92161 tokens trained on"),
    "not finite": (lambda r: r.edit((r"^(step:15/.*train_loss:)\S+", r"\1nan")), "seed1.txt.*step 15: a loss that is not finite"),
    "resumed": (lambda r: r.edit((r"^step:15/", "resumed: logs/a/ckpt/step-000010 at step 10\nstep:15/")), "seed1.txt.*a resumed run"),
    "other validation tokens": (lambda r: r.edit((r"(before them:)\w{4}", r"\g<1>0000"), seeds=SEEDS), "the scored tokens have SHA-256 0000"),
    "other training file": (lambda r: r.edit((r"(train_000000.*sha256:)\w{4}", r"\g<1>0000"), seeds=SEEDS), "a training file is none of the track's"),
    "validation file in training": (lambda r: (r.edit((r"^(data: )val_000000(.*\n)", r"\g<1>train_000001\2\1val_000000\2"))), "seed1.txt.*the same file twice"),
    "validation file is a training file": (lambda r: r.edit((r"^data: val_000000.*\n", ""), (r"^data: train_000000(.*)", lambda m: "data: train_000000 tokens:99999 sha256:"
                                           + "0" * 64 + "\ndata: val_000000" + m[1])) or r.table(trained=r.cells["trained"] + "` `" + "0" * 64),
                                           "seed1.txt.*the validation file, is a training file of the track"),
    "other validation file in one": (lambda r: r.edit((r"(val_000000.*sha256:)\w{4}", r"\g<1>0000")), "seed1.txt': other data than seed0.txt"),
    "other config in one": (lambda r: r.edit(("muon_lr=0.023", "muon_lr=0.03"), ("--seed", "--muon_lr=0.03 --seed")), "seed1.txt': another config than seed0.txt: muon_lr='0.023' there, '0.03' here"),
    "config edited against argv": (lambda r: r.edit(("--seed", "--muon_lr=0.03 --seed"), seeds=SEEDS), "config: muon_lr='0.023', but argv and the source make it '0.03'"),
    "config edited against the source": (lambda r: r.edit(("muon_lr=0.023", "muon_lr=0.03"), seeds=SEEDS), "config: muon_lr='0.03', but .* make it '0.023'"),
    "config edited against the preset": (lambda r: r.edit(("model_dim=32", "model_dim=64"), seeds=SEEDS), "config: model_dim='64', but .* make it '32'"),
    "config without a field": (lambda r: r.edit((" ns_steps=5", "")), "seed1.txt.*config: muon_momentum or ns_steps is not where"),
    "preset edited": (lambda r: r.edit(("^preset: tiny", "preset: demo")), "seed1.txt': preset: 'demo', but the config's is 'tiny'"),
    "flags of a file": (lambda r: r.edit(("--seed", "@my.args --seed")), "seed1.txt.*argv reads flags from a file"),
    "unknown flag": (lambda r: r.edit(("--seed", "--sed=1 --seed")), "seed1.txt.*argv: '--sed' is no field"),
    "argv of words": (lambda r: r.edit(("--seed", "now --seed")), "seed1.txt.*argv: 'now' is no --flag"),
    "argv with an open quote": (lambda r: r.edit(("--seed", "' --seed")), "seed1.txt.*argv has an open quote"),
    "other Python": (lambda r: r.edit((r"python=3\.\d+", "python=3.1"), seeds=SEEDS), "Python '3.1.*the track is for 3"),
    "other devices": (lambda r: r.edit(("devices: 1 x cpu", "devices: 8 x TPU v6 lite"), seeds=SEEDS), "devices: .*8 x TPU v6 lite.*the track is for 1 x cpu"),
    "other versions in one": (lambda r: r.edit((" jax=", " jax=9.")), "seed1.txt': other versions or devices than seed0.txt"),
    "other host in one": (lambda r: r.edit((r"\d+ host cores", "999 host cores")), "seed1.txt.*other versions or devices than seed0.txt"),
    "other flags of XLA in one": (lambda r: r.edit((" backend=cpu", " backend=cpu XLA_FLAGS=--xla_a=1 --xla_b=2")), "seed1.txt': other versions or devices"),
    "no README": (lambda r: (r.folder / "README.md").unlink(), "README.md.: missing or empty"),
    "empty README": (lambda r: write(r, "README.md", b" \n"), "README.md.: missing or empty"),
    "huge README": (lambda r: write(r, "README.md", b" " * (verify_record.MAX_BYTES + 1)), "README.md.*more than 16 MiB"),
    "failure untold": (lambda r: cut(r, 10, "step:25/", "failed10.txt"), "failed10.txt.*README.md does not tell of it"),
    "failure hidden as a run": (lambda r: cut(r, 10, "step:25/"), "seed10.txt.*its last line is not its digest"),
    "bad run called a failure": (lambda r: (write(r, "README.md", b"failed10.txt"), r.path(10).rename(r.folder / "failed10.txt")), "failed10.txt.*it counts, as seed"),
    "bad run cut and called a failure": (lambda r: (write(r, "README.md", b"failed10.txt"), cut(r, 10, "final: ", "failed10.txt")), "failed10.txt.*it counts, as seed"),
    "run set aside": (lambda r: r.path(10).rename(r.folder / "seed10.txt.bak"), "seed10.txt.bak.*not part of a record"),
    "seed with a zero before it": (lambda r: r.path(10).rename(r.folder / "seed010.txt"), "seed010.txt.*not part of a record"),
    "binary garbage": (lambda r: write(r, "seed4.txt", bytes(range(256)) * 99), "seed4.txt.*its last line is not its digest"),
    "sealed binary garbage": (lambda r: write(r, "seed4.txt", sealed(bytes(range(256)) * 99)), "seed4.txt.*not text in UTF-8"),
    "sealed source alone": (lambda r: write(r, "seed4.txt", sealed(b"x" + verify_record.BAR.encode())), "seed4.txt.*no step lines"),
    "huge": (lambda r: os.truncate(r.path(1), 1 << 40), "seed1.txt.*more than 16 MiB"),
    "folder": (lambda r: (r.folder / "seed4.txt").mkdir(), "seed4.txt.*not a plain file"),
    "link": (lambda r: (r.folder / "seed4.txt").symlink_to(r.path(1)), "seed4.txt.*not a plain file"),
    "pipe": (lambda r: os.mkfifo(r.folder / "seed4.txt"), "seed4.txt.*not a plain file"),
    "astronomic steps": (lambda r: r.edit((" steps=30 ", " steps=1" + "0" * 11 + " "), ("--seed", "--steps=1" + "0" * 11 + " --seed")), "seed1.txt.*data: 92160 tokens trained on"),
    "steps that are no number": (lambda r: r.edit((" steps=30 ", " steps=many "), ("--seed", "--steps=many --seed")), "seed1.txt.*cannot be read as a log"),
    "infinite stage": (lambda r: r.edit((" stage_ends=0.5,1 ", " stage_ends=inf,1 "), ("--seed", "--stage_ends=inf,1 --seed")), "seed1.txt.*cannot be read as a log"),
    "one run under two seeds, one loss changed": (lambda r: copy_run(r, 3, 4, (r"(seed[= ])3\b", r"\g<1>4"), ("Z-000003", "Z-000004"),
                                                                     (r"(^step:5/30 train_loss:)\S+", r"\g<1>5.4321")), "seed4.txt': the same run as seed3.txt"),
    "source behind the bar": (lambda r: r.edit((r"\Apreset", f"import os{verify_record.BAR}preset")), "seed1.txt': 'import os' is no line of train.py's header"),
    "note in the header": (lambda r: r.edit((r"^step:5/", "note: of another run\nstep:5/")), "seed1.txt': 'note: of another run' is no line of"),
    "line of the header that says nothing": (lambda r: r.edit((r"^compiled: init.*", "compiled: never")), "seed1.txt': 'compiled: never' is no line of"),
    "other number of parameters": (lambda r: r.edit((r"^parameters: \d+", "parameters: 7")), "seed1.txt': 7 parameters, seed0.txt has "),
    "parameters that are no number": (lambda r: r.edit((r"^parameters: .*", "parameters: few")), "seed1.txt': 'parameters: few' is no line of"),
    "devices twice": (lambda r: r.edit((r"^(devices: .*)", r"\1, 64 host cores")), "seed1.txt': 'devices: .*' is no line of"),
    "other devices before the track's": (lambda r: r.edit(("^devices: ", "devices: 8 x NVIDIA H200, "), seeds=SEEDS), "'devices: .*' is no line of"),
    "version twice": (lambda r: r.edit((r"^versions: (.*)", r"versions: jax=0 \1")), "seed1.txt.*versions: a name twice"),
    "digest in the midst": (lambda r: r.path(1).write_text(reseal(r.path(1).read_text() + "step:5/30\n" + "sha256:" + "0" * 64 + "\n")),
                            "seed1.txt.*a digest in its midst"),
    "bad run called a failure, a bar behind it": (lambda r: call_failed(r, 10, lambda data: data + verify_record.BAR.encode() + b"killed\n"), "failed10.txt.*it counts, as seed"),
    "bad run called a failure, in one line": (lambda r: call_failed(r, 10, lambda data: data.replace(b"\n", b"\r")), "failed10.txt.*it counts, as seed"),
    "bad run called a failure, its result moved": (lambda r: call_failed(r, 10, lambda data: re.sub(rb"\n(final: |step:30/)", rb"\n \1", data)), "failed10.txt.*it counts, as seed"),
    "failure of another name told": (lambda r: (write(r, "README.md", b"notfailed10.txt.bak"), cut(r, 10, "step:25/", "failed10.txt")), "failed10.txt.*README.md does not tell"),
    "bad run called a picture": (lambda r: r.path(10).rename(r.folder / "seed10.svg"), "seed10.svg.*not part of a record"),
    "folder called a picture": (lambda r: (r.folder / "a.svg").mkdir(), "a.svg.*not a plain file"),
    "link called a picture": (lambda r: (r.folder / "a.svg").symlink_to("/etc/passwd"), "a.svg.*not a plain file"),
    "pipe called a picture": (lambda r: os.mkfifo(r.folder / "a.svg"), "a.svg.*not a plain file"),
    "huge picture": (lambda r: write(r, "a.svg", b"<svg" + b" " * (1 << 20)), "a.svg.*more than 1 MiB"),
    "resumed, its line taken out": (lambda r: r.edit((" resume= ", " resume=logs/a "), ("--seed", "--resume=logs/a --seed")), "seed1.txt.*config: resume is a path"),
    "clock slowed but for eta": (lambda r: slow(r, 100, eta=False), r"seed1.txt.*step 5: eta \d+s is not .*the clock is inconsistent"),
    "eta edited": (lambda r: r.edit((r"(^step:10/.*eta:)\S+", r"\g<1>999s")), "seed1.txt.*step 10: eta 999s is not"),
    "clock slowed but for the CPU": (lambda r: slow(r, 1000, cpu=False), "seed1.txt.*cpu_time .* is less than half"),
    "waited longer than it took": (lambda r: r.edit((r"(^step:10/.*wait:)\S+", r"\g<1>9999.0ms")), "seed1.txt.*step 10: it waited 9999.0ms for data, of"),
    "mfu of a CPU": (lambda r: r.edit((r"(^step:10/.*mfu:)-", r"\g<1>99.9%")), "seed1.txt.*step 10: an mfu, but no peak of a CPU"),
    "target reached at another time": (lambda r: r.edit((r"at step 20 after \S+", "at step 20 after 999.000s")), "seed1.txt.*final: step 20 was reached after .*not 999.000s"),
    "target that is no number": (lambda r: r.edit((" target_loss=3.6 ", " target_loss=nan "), ("--target_loss=3.6", "--target_loss=nan"), ("target:3.6 .*", "target:nan not reached")),
                                 "seed1.txt.*its target is not the config's"),
    "preset that the source has not": (lambda r: r.edit(("^preset: tiny", "preset: nosuch"), ("^config: preset=tiny", "config: preset=nosuch")), "seed1.txt.*preset: 'nosuch' is none of its source"),
    "preset of the config alone": (lambda r: r.edit(("^config: preset=tiny", "config: preset=speedrun"), ("--preset=tiny ", "")), "seed1.txt.*preset: 'tiny', but the config's is 'speedrun'"),
    "default within a string": (lambda r: decoy(r, '    NOTE = """\n    rope_base: float = 5.0   # of a string\n    """\n'), "config: rope_base='5.0', but .* make it '1024.0'"),
    "default behind another line's end": (lambda r: decoy(r, "    # \u2028    rope_base: float = 5.0   # of a comment\n"), "config: rope_base='5.0', but .* make it '1024.0'"),
    "preset within a string": (lambda r: decoy(r, '    NOTE = """\nPRESETS = \n    "tiny": dict(rope_base=5.0)\n"""\n'), "config: rope_base='5.0', but .* make it '1024.0'"),
    "default that is not written out": (lambda r: r.edit_source("rope_base: float = 1024.0", "rope_base: float = 2.0 ** 10"), "seed1.txt.*its source has no Config"),
    "source that is no program": (lambda r: r.edit_source("import jax\n", "import import\n"), "seed1.txt.*its source has no Config"),
    "source without an end": (lambda r: r.edit_source("import jax\n", "import jax\n" + "# of no use\n" * 50000), "seed1.txt.*no source of train.py, of at most"),
    "validation file shorter than what is scored": (lambda r: r.edit((r"(val_000000.* tokens:)\d+", r"\g<1>2048")), "seed1.txt.*2048 targets scored of a file with 2048 tokens"),
    "fewer tokens read than trained on": (lambda r: r.edit((r"^data: \d+ tokens read", "data: 92159 tokens read")), "seed1.txt.*data: 92159 tokens read for 92160"),
    "more tokens read than there are": (lambda r: r.edit((r"(train_000000.* tokens:)\d+", r"\g<1>10")), "seed1.txt.*tokens read for 92160, of 1 times 10 that there are"),
    "seed that is another as a whole number": (big_seed, "seed9007199254740992.txt.*config: seed='9007199254740992', but .* make it '9007199254740993'"),
    "words within what the data settles": (lambda r: r.edit((r" (vocab_size=\d+) ", r" \1 num_layers=1 ")), "seed1.txt.*config: vocab_size='257 num_layers=1'"),
    "automatic choice that the source has not": (lambda r: r.edit((" attention=xla ", " attention=flash ")), "seed1.txt.*config: attention='flash', but"),
    "flags of a file as a value": (lambda r: r.edit(("--seed", "--log_dir @my.args --seed")), "seed1.txt.*argv reads flags from a file"),
    "end of another step": (lambda r: r.edit(("ckpt/step-000030", "ckpt/step-000020")), "seed1.txt.*its end is of another folder or step"),
    "end of another folder": (lambda r: r.edit((r"^wrote: .*(?=/\d+T)", "wrote: logs")), "seed1.txt.*its end is of another folder or step"),
    "two final lines": (lambda r: r.edit((f"{FINAL}\n", r"\1\n\1\n")), "seed1.txt.*its end is not"),
    "long line": (lambda r: r.edit(("^(argv: .*)", lambda m: f"{m[1]} --log_dir={'a' * 20000}")), "seed1.txt.*a line of control characters, or of more than 20000"),
    "control characters": (lambda r: r.edit(("--seed", "--\x1b[8m=1 --seed")), "seed1.txt.*a line of control characters"),
    "stages without number": (lambda r: r.edit((" stage_ends=0.5,1 ", f" stage_ends={'1,' * 1000}1 "), (" batch_tokens=2048,4096 ", " batch_tokens=2048 "),
                                               ("^(argv: .*)", lambda m: f"{m[1]} --stage_ends={'1,' * 1000}1 --batch_tokens=2048"), ("92160", "61440")), "seed1.txt.*a schedule that cannot be"),
    "stages that fall": (lambda r: r.edit((" stage_ends=0.5,1 ", " stage_ends=2,1 "), ("--seed", "--stage_ends=2,1 --seed")), "seed1.txt.*a schedule that cannot be"),
}

@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_set_is_rejected_for_its_reason_alone(name, record, capsys):
    tamper, reason = TAMPERED[name]
    tamper(record)
    assert record.check() == 1
    said = reasons(capsys)
    assert said and all(re.search(reason, line) for line in said), said
    assert len(said) == 1 or len(said) == len(SEEDS) and len({line.partition(":")[2] for line in said}) == 1, said

def test_the_tampered_sets_are_as_many_as_the_readme_says():
    assert f"tampers with a set in {len(TAMPERED)} ways" in (ROOT / "records/README.md").read_text()

# ---- What is no tampering ----
def test_a_failed_run_that_the_readme_tells_of_is_listed_and_does_not_count(record, capsys):
    (record.folder / "README.md").write_text("## Failures\nfailed10.txt: the machine was taken away\n")
    cut(record, 10, "step:20/", "failed10.txt")
    (record.folder / "loss.svg").write_text("<svg/>")
    assert record.check() == 0
    said = capsys.readouterr().out
    assert re.search(r"^failed: failed10.txt, which ends with 'step:15/30 .*eta:\d+s'$", said, re.M) and "n 4, mean" in said

def test_a_garbled_failed_run_is_shown_without_control_characters(record, capsys):
    (record.folder / "README.md").write_text("failed7.txt")
    (record.folder / "failed7.txt").write_bytes(b"\x1b[2J\xff\n\x1b[31m\x00")
    assert record.check() == 0
    assert "\x1b" not in capsys.readouterr().out

def test_hashes_that_the_table_does_not_know_are_said_not_to_be_checked(record, capsys):
    record.table(scored="not yet known", trained="not yet known")
    assert record.check() == 0
    said = capsys.readouterr().out
    assert "NOT CHECKED: which validation tokens were scored" in said and "NOT CHECKED: which files were trained on" in said

@pytest.mark.parametrize("changes", [
    [(r" save_every=0", " save_every=10"), ("--seed", "--save_every=10 --seed")],       # off the clock
    [(r" resume= ", " resume=auto "), ("--seed", "--resume=auto --seed")],              # and found nothing
    [(r"(platform=\S+)", r"\1-other")],                                                 # another machine of the kind
    [(r" backend=cpu", " backend=cpu JAX_COMPILATION_CACHE_DIR=/a b/c")],
    [(r"^sample: ", "sample: \x0c\r\x85step:1/30 final: sha256:0\nstep:1/30\nfinal: \nsample: ")],  # what a model may write
    [("--seed", "--muon_lr 0.02_3 --seed")]])          # the same number
def test_what_may_differ_between_the_runs_of_a_record_does_not_count_against_it(changes, record):
    record.edit(*changes, count=1)
    assert record.check() == 0

@pytest.mark.parametrize("changes", [
    [(r" log_dir=.*? log_every", " log_dir=/a/ckpt/b log_every"), (r"^(argv: .*)", r"\1 --log_dir=/a/ckpt/b"), (r"^wrote: .*(?=/\d+T)", "wrote: /a/ckpt/b")],
    [(" target_loss=3.6 ", " target_loss=3.6000001 "), ("--target_loss=3.6", "--target_loss=3.6000001")]])  # the final line says 3.6
def test_runs_in_a_folder_called_ckpt_and_a_target_of_many_digits_are_no_tampering(changes, record):
    record.edit(*changes, seeds=SEEDS)
    assert record.check() == 0

def test_the_clock_of_a_slow_machine_is_no_tampering(record):
    slow(record, 1000)
    verify_record.read_run(record.path(1))

def test_garbled_logs_are_told_from_runs_without_a_traceback(record):
    rng = random.Random(0)
    text, path = record.path(1).read_text(), record.path(1)
    start = text.index(verify_record.BAR) + len(verify_record.BAR)
    seen = set()
    for _ in range(300):
        at = rng.randrange(start, len(text) - 70)
        piece = rng.choice(["", "9" * rng.choice((1, 30, 5000)), " =", "\n", "-", "nan", text[start + rng.randrange(2000):][:rng.randrange(99)]])
        path.write_text(reseal(text[:at] + piece + text[at + rng.randrange(30):]))
        try:
            verify_record.read_run(path)
        except (verify_record.Rejected, ValueError, OverflowError) as error:
            seen.add(str(error)[:20])
    assert len(seen) > 20

# ---- Running one again ----
@pytest.fixture
def as_recorded(monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)

def test_a_rerun_gives_the_logged_losses_and_leaves_nothing(record, as_recorded, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert record.check("--rerun=0") == 0
    said = capfd.readouterr().out
    source = record.path(0).read_text().partition(verify_record.BAR)[0]
    assert f"executes the program in seed0.txt (sha256:{hashlib.sha256(source.encode()).hexdigest()})" in said
    assert said.index("this now executes") < said.index("compiling")
    assert len(re.findall(r"rerun: step (10|20|30) val_loss (\S+) in the log, \2 here", said)) == 3
    assert "rerun: all losses, of training too, are equal in all printed digits" in said and said.endswith("ACCEPTED\n")
    assert not list((tmp_path / "temporary").iterdir())

def test_a_rerun_rejects_a_loss_that_was_edited_with_care(record, as_recorded, capfd):
    text = shift(record.path(0).read_text(), -0.004)
    record.path(0).write_text(reseal(text))
    assert record.check() == 0  # nothing else can tell
    assert record.check("--rerun=0") == 1
    said = capfd.readouterr().out
    assert "rejected: rerun: the final losses are 0.0040 apart, tolerated are 0.003\n" in said and "rerun: not all losses" in said

def test_a_rerun_of_a_program_that_breaks_off_is_a_reason(record, capfd):
    record.edit_source("import jax\n", "sys.exit(7)\n", seeds=SEEDS)
    assert record.check("--rerun=0") == 1
    assert reasons(capfd) == ["rerun: the program ended with exit code 7"]

def test_a_rerun_of_a_program_that_leaves_no_log_is_a_reason(record, capfd):
    record.edit_source("import jax\n", "sys.exit(0)\n", seeds=SEEDS)
    assert record.check("--rerun=0") == 1
    assert "rerun: it left no log" in reasons(capfd)[0]

def test_the_source_in_a_log_runs_only_with_rerun_and_only_when_all_else_is_accepted(record, tmp_path, capfd):
    mark = tmp_path / "ran"
    record.edit_source("import jax\n", f"open({str(mark)!r}, 'w'), sys.exit(7)\n", seeds=SEEDS)
    assert record.check() == 0 and not mark.exists()
    record.table(target="1.0")
    assert record.check("--rerun=0") == 1 and not mark.exists()
    assert "rerun: not done" in capfd.readouterr().out
    record.table()
    assert record.check("--rerun=0") == 1 and mark.exists()

# ---- Usage, and the table of this repository ----
def test_usage_errors_say_what_was_wanted(record, tmp_path):
    for folder, flags, words in ((tmp_path / "none", (), "wanted a folder"), (record.folder.parent, (), "wanted a folder"),
                                 (record.folder, ("--tracks=/nowhere/t.md",), "the table of tracks cannot be read"),
                                 (record.folder, ("--rerun=7",), "there is no .*seed7.txt"), (record.folder, ("--tolerance=nan",), "wanted nats, 0 or more"),
                                 (record.folder, ("--tolerance=-1",), "wanted nats"), (record.folder, ("--tolerance=inf",), "wanted nats")):
        with pytest.raises(UsageError, match=words):
            main([str(folder), f"--tracks={record.tracks}", *flags])
    record.table(target="low")
    with pytest.raises(UsageError, match="the row of tiny lacks a column or a number"):
        record.check()
    record.tracks.write_text(record.tracks.read_text().replace("`tiny`", "`small`"))
    with pytest.raises(UsageError, match="tiny: no such track in .*one of other, small$"):
        record.check()
    record.tracks.write_text("no table")
    with pytest.raises(UsageError, match="one of none"):
        record.check()

def test_without_scipy_one_sentence_says_how_to_get_it(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match="^scipy is missing: pip install -r scripts/requirements.txt$"):
        record.check()

def test_the_shell_sees_the_verdict_as_exit_code_and_jax_is_not_needed(record, tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError")
    def shell(*argv):
        return subprocess.run([sys.executable, "-m", "scripts.verify_record", *argv], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=200)
    done = shell(str(record.folder), f"--tracks={record.tracks}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    record.edit(("val_loss:", "val_loss:1"))
    assert shell(str(record.folder), f"--tracks={record.tracks}").returncode == 1
    done = shell(str(record.folder))  # of no track of this repository
    assert done.returncode == 2 and done.stderr.startswith("error: tiny: no such track") and done.stderr.count("\n") == 1
    assert shell("--help").stdout.startswith("usage: python -m scripts.verify_record") and shell().returncode == 2

def test_what_cannot_be_read_or_written_costs_one_sentence_and_exit_code_2(record, tmp_path):
    def shell(folder, *flags, before=(), **options):
        done = subprocess.run([*before, sys.executable, "-m", "scripts.verify_record", str(folder), f"--tracks={record.tracks}", *flags], cwd=ROOT,
                              stderr=subprocess.PIPE, text=True, timeout=200, **{"stdout": subprocess.DEVNULL} | options)
        assert done.returncode == 0 and not done.stderr or done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.returncode
    loop = record.folder.parent / "2026-01-31_Loop"
    loop.symlink_to(loop.name)
    read, closed = os.pipe()
    os.close(read)
    assert shell(loop) == shell(record.folder, f"--rerun={10**300}") == shell(f"{record.folder}{'x' * 400}") == 2
    assert shell(f"{record.folder}\x1b[2J") == shell(record.folder, stdout=closed) == 2
    assert shell(record.folder, before=("sh", "-c", 'exec "$@" >&-', "sh")) == 0
    if os.path.exists("/dev/full"):
        assert shell(record.folder, before=("sh", "-c", 'exec "$@" >/dev/full', "sh")) == 2
    assert shell(record.folder.rename(record.folder.parent / "2026-01-31_Récord"), env=os.environ | {"PYTHONIOENCODING": "ascii"}) == 0

def test_the_tracks_of_this_repository_ask_for_what_its_presets_score():
    table = ROOT / "records/README.md"
    v6e, cpu = verify_record.read_track(table, "v6e-8"), verify_record.read_track(table, "cpu")
    assert (v6e.target, v6e.val_targets, v6e.devices) == (3.28, Config.val_tokens, ["8 x TPU v6 lite", "1 processes"])
    assert cpu.val_targets == PRESETS["demo"]["val_tokens"] and len(cpu.scored) == len(cpu.files) == 1 and cpu.scored != cpu.files
    assert not v6e.scored and not v6e.files and cpu.python == "3.11" and cpu.devices == ["1 x cpu", "2 host cores"]
