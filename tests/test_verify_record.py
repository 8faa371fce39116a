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
from scripts.verify_record import BAR, DAMAGED, UsageError, main, read_run
from train import DEMO, ROOT, SPEEDRUN

SEEDS = (0, 1, 2, 3, 10)
SHIFTS = (0.0, 0.0012, -0.0007, 0.0005, -0.0015)  # of the losses derived from those of seed 0
FLAGS = """--preset=demo --steps=30 --num_layers=1 --model_dim=32 --num_heads=1 --head_dim=32
--mlp_dim=64 --offset_layers= --skips= --backout= --gate_dims=0 --smear=0 --optimizer=adamw
--adamw_lr=2e-2 --stages.end=0.5,1 --stages.batch_tokens=2048,4096 --stages.seq_len=64
--stages.lr=1 --val.seq_len=64 --val_tokens=2048 --val_context=32 --micro_tokens=65536
--val_every=10 --log_every=5 --target_loss=3.1 --vocab_size=none --attention=auto --seed=0"""
TABLE = """Words before it.

| track | target | val targets | scored tokens | training files | Python | devices |
|---|---|---|---|---|---|---|
| `other` | 1.5 | 7 | not yet known | not yet known | any | 8 x TPU v6 lite |
| `tiny` | {target} | 2,048 | `{scored}` | `{trained}` | {python} | `1 x cpu, 1 processes` |

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

    def move(match):
        return f"{match[1]}{float(match[2]) + by:.4f}"

    return re.sub(r"(_loss:)(\d\.\d{4})(?= )", move, text)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    """The log of one run, in a folder whose name has a blank and an =."""
    logs = tmp_path_factory.mktemp("runs") / "my logs x=5"
    env = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "train.py", *FLAGS.split(), f"--log_dir={logs}"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
    text = next(logs.glob("*/log.txt")).read_text()
    assert reseal(text) == text
    return text


class Record:
    """A folder of five runs, and a table whose target is 0.01 above their mean."""

    def __init__(self, root, genuine):
        self.folder = root / "tiny" / "2026-01-31_Test"
        self.tracks = root / "tracks.md"
        self.folder.mkdir(parents=True)
        self.write("README.md", b"Less is more.\n")
        head, bar, rest = genuine.partition(BAR)
        for seed, by in zip(SEEDS, SHIFTS, strict=True):
            text = re.sub(r'((?:--seed=|"seed": ))0\b', rf"\g<1>{seed}", shift(rest, by))
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

    def write(self, name, data):
        (self.folder / name).write_bytes(data)


def edit(path, *changes, seal=True, part=2):
    """Replace (regex, new) in a log, below its source or in it (part 0); each must be found."""
    parts = list(path.read_text().partition(BAR))
    for old, new in changes:
        parts[part], found = re.subn(old, new, parts[part], flags=re.M)
        assert found, old
    text = "".join(parts)
    path.write_text(reseal(text) if seal else text)


@pytest.fixture
def record(tmp_path, genuine, monkeypatch):
    record = Record(tmp_path, genuine)
    monkeypatch.setattr(verify_record, "TRACKS", record.tracks)
    return record


def check(record, *flags):
    return main([str(record.folder), *flags])


def reasons(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("rejected: ") for line in lines if line.startswith("rejected: ")]


def test_a_genuine_set_is_accepted_and_its_statistics_are_those_of_its_losses(record, capsys):
    assert check(record) == 0
    said = capsys.readouterr().out
    losses = record.losses()
    target = float(record.cells["target"])
    mean = sum(losses) / 5
    sd = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 4)
    t = (mean - target) / (sd / math.sqrt(5))
    p = stats.t.cdf(t, 4)
    assert said.endswith("ACCEPTED\n") and "NOT CHECKED" not in said and "rejected" not in said
    assert f"n 5, mean val_loss {mean:.5f}, sd {sd:.5f}, t {t:.2f}, one-sided p {p:.2g} of" in said
    assert f"(target - mean) * sqrt(n) = {(target - mean) * math.sqrt(5):.5f}" in said
    rows = re.findall(r"^ +seed(\d+).txt +(\d\.\d{4}) +\d+\.\d{3} +\d+\.\d$", said, re.M)
    assert rows == [(str(seed), f"{loss:.4f}") for seed, loss in zip(SEEDS, losses, strict=True)]


@pytest.mark.parametrize("folder", sorted((ROOT / "records/cpu").iterdir()), ids=lambda p: p.name)
def test_the_records_of_this_repository_are_accepted(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.endswith("ACCEPTED\n")


# ---- Tampered sets -------------------------------------------------------------------------------


def edits(*changes, seeds=(1,), **how):
    """A tampering: regexes replaced in some of the logs."""

    def tamper(record):
        for seed in seeds:
            edit(record.path(seed), *changes, **how)

    return tamper


def field(name, value):
    return rf'("{name}": )("[^"]*"|[^,"]+)', rf"\g<1>{value}"


def flag(text):
    return "--seed", f"--{text} --seed"


def set_to(name, value):
    """In config and argv."""
    return field(name, value), flag(f"{name}={value}")


def rescaled(factor, what, digits):
    def scale(match):
        return f"{float(match[0]) * factor:.{digits}f}"

    return edits((rf"(?<={what}:)\d+\.\d+", scale))


def written(name, data):
    return lambda record: record.write(name, data)


def sealed(data):
    return data + b"\nsha256:" + hashlib.sha256(data + b"\n").hexdigest().encode() + b"\n"


def copied(*changes):
    """Seed 3 under the name of seed 4, changed."""

    def tamper(record):
        shutil.copy(record.path(3), record.path(4))
        edit(record.path(4), *changes)

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


def slowed(record):
    """A clock a thousand times as slow, its arithmetic kept; the CPU time as it was."""
    before = 0.0

    def step_line(match):
        nonlocal before
        seconds = round(1000 * float(match[3]), 3)
        step_ms = 1e3 * (seconds - before) / 5
        before = seconds
        speed = (2048 if int(match[1]) <= 15 else 4096) / step_ms
        clock = f"train_time:{seconds:.3f}s step:{step_ms:.1f}ms tok/s:{speed:.1f}k"
        return f"step:{match[1]}/30{match[2]}{clock}"

    def longer(match):
        return f"{match[1]}{1000 * float(match[2]):.3f}s"

    steps = r"^step:(\d+)/30(.*)train_time:(\S+)s step:\S+ tok/s:\S+", step_line
    final = r"(^final: .*train_time:)(\S+)s", longer
    edit(record.path(1), steps, final, (r"(after )(\S+)s$", longer))


def other_validation_file(record):
    """The validation file is one of the track's training files."""
    new = "data: train_000000 tokens:99999 sha256:" + "0" * 64 + r"\ndata: val_000000\1"
    edit(record.path(1), (r"^data: val_0.*\n", ""), (r"^data: train_000000(.*)", new))
    record.table(trained=record.cells["trained"] + "` `" + "0" * 64)


def raised_target(record):
    """The runs' own target is above their losses, the track's is not."""
    reached = r"(^step:10/.*train_time:)(\S+)( (?:.*\n)*.*)target:3.1 .*"
    told = (reached, r"\1\2\3target:9 reached at step 10 after \2")
    for seed in SEEDS:
        edit(record.path(seed), ("--target_loss=3.1", "--target_loss=9"))
        edit(record.path(seed), field("target_loss", 9), told)
    record.table(target="2.0")


def mean_off(by):
    return lambda record: record.table(target=f"{sum(record.losses()) / 5 + by:.4f}")


def failed(start, readme=b"failed10.txt: the machine went away", change=lambda data: data):
    """seed10.txt, cut before the last line that starts so, is told to be a run that broke off."""

    def tamper(record):
        text = record.path(10).read_text()
        record.path(10).unlink()
        record.write("failed10.txt", change(text[: text.rindex(f"\n{start}") + 1].encode()))
        record.write("README.md", readme)

    return tamper


FINAL = r"(^final: .*)"
STAGE_1 = '"end": 1.0, "batch_tokens": 4096'
SAME_LOSS = r"^((?:step:30/|final:).* val_loss:)\S+", r"\g<1>2.9999"
SHA = "sha256:" + "0" * 64
CLOCK = "the clock is inconsistent"
TAMPERED = [
    # the digest, and what is cut off
    (edits((r"val_loss:\d\.\d{4}", "val_loss:3.0000"), seal=False), "digest is not that of"),
    (edits(("tokens", "tokenz"), seal=False, part=0), "digest is not that of"),
    (written("seed1.txt", b""), "its last line is not its digest"),
    (written("seed4.txt", sealed(bytes(range(256)))), "cannot be read as a log"),
    (edits((r"\Z", f"step:5/30\n{SHA}\nsha256:")), "a digest in its midst"),
    (edits((f"{FINAL}\n", "")), "no step lines and final line"),
    (edits(("^next: .*\n", "")), "its end is not"),
    (edits((r"^(step:15/)", r"resumed: a/ckpt/step-000010 at step 10\n\1")), "a resumed run"),
    # edited, removed, added and reordered lines
    (edits((r"^(step:30/.*val_loss:)\S{3}", r"\g<1>3.2")), "final line is not that of its last"),
    (edits(("^step:15/.*\n", "")), "its 5 step lines are not the 6 that the config asks for"),
    (edits((r"^(step:15/.*\n)", r"\1\1")), "its 7 step lines are not the 6"),
    (edits((r"^(step:15/.*\n)(step:20/.*\n)", r"\2\1")), "its 6 step lines are not the 6"),
    (edits((r"^(step:10/.*) val_loss:\S+", r"\1")), "not those of val_every"),
    (edits((r"^step:15/", "note: all is well\nstep:15/")), "'note: all is well' stands among"),
    (edits((r"^(step:15/.*train_loss:)\S+", r"\1nan")), "'step:15/30 train_loss:nan .* stands"),
    (edits((r"^(config: .*\n)", r"\1\1")), "its header is not"),
    (edits(flag("\x1b[8m=1")), "control characters"),
    # the clock
    (swap_times, f"step 10: {CLOCK}: 5 steps of"),
    (edits((r"(^step:15/.*train_time:)\S+", r"\g<1>0.001s")), f"step 15: {CLOCK}: 0.001s is not"),
    (rescaled(0.5, "train_time", 3), f"step 5: {CLOCK}: 5 steps of"),
    (rescaled(0.5, " step", 1), f"step 5: {CLOCK}: 5 steps of"),
    (edits((r"(^step:20/.*tok/s:)", r"\g<1>1")), f"step 20: {CLOCK}: 1.* not 4096 tokens"),
    (edits((rf"{FINAL}_time:\S+s cpu", r"\1_time:0.010s cpu")), "final line is not that of its"),
    (edits((r"cpu_time:\S+s", "cpu_time:999.9s")), "cpu_time 999.9s is more than"),
    (slowed, "cpu_time .* is less than half"),
    # the config
    (edits(flag("muon_lr=0.03"), seeds=SEEDS), "muon_lr='0.02', but the flags ask for '0.03'"),
    (edits((STAGE_1, STAGE_1[:-4] + "1024")), r"batch_tokens='\[2048, 1024\]', but the flags"),
    (edits(("^preset: demo", "preset: tiny")), "preset='demo', but the flags ask for 'tiny'"),
    (edits(('"steps"', '"steps": 31, "steps"')), "config: not JSON as train.py writes it"),
    (edits(('"log_every": 5, ', ""), ("--log_every=5", "")), "cannot be read as a log"),
    (edits(("--seed", "@my.args --seed")), "what an @FILE holds is not in the log"),
    (edits(flag("sed=1")), "argv: '--sed' is no field"),
    (edits(field("resume", '"logs/a"'), flag("resume=logs/a")), "config: resume is a path"),
    (edits(*set_to("steps", 10**11)), "a schedule that cannot be"),
    # the data
    (edits(("^data: train_.*\n", "")), "its header is not"),
    (edits(("scores 2048 ", "scores 2047 "), seeds=SEEDS), "2047 validation targets, the track"),
    (edits(*set_to("val_tokens", 1024), seeds=SEEDS), "1024 validation targets, the track"),
    (edits((r"(before them:)\w{4}", r"\g<1>0000"), seeds=SEEDS), "scored tokens are not the"),
    (edits((r"(train_0.*sha256:)\w{4}", r"\g<1>0000"), seeds=SEEDS), "is none of the track's"),
    (edits((r"^(data: )val_0(.*\n)", r"\g<1>train_1\2\1val_0\2")), "the same file twice"),
    (other_validation_file, "validation file is a training file of the track"),
    (edits(("92160 tokens read for 92160", "92161 tokens read for 92161")), "92161 tokens trained"),
    # the target
    (raised_target, r"^mean \d\.\d+ is above the track's target 2$"),
    (edits(("target:3.1 ", "target:3.2 ")), "its target is not the config's"),
    (edits(("reached at step 20", "reached at step 10")), "not reached when it says"),
    (edits(("reached at step 20 .*", "not reached")), "not reached when it says"),
    (edits((r"20 after \S+", "20 after 999.000s")), "not reached when it says"),
    # runs that do not belong together
    (edits(("tokens", "tokenz"), part=0), "seed1.txt: another source than seed0.txt"),
    (edits(*set_to("muon_lr", 0.03)), "seed1.txt: another muon_lr than seed0.txt"),
    (edits((r"(val_0.*sha256:)\w{4}", r"\g<1>0000")), "another files than seed0.txt"),
    (edits((r"^parameters: \d+", "parameters: 7")), "another parameters than seed0.txt"),
    (edits((" jax=", " jax=9.")), "another versions than seed0.txt"),
    (copied(), "seed4.txt: its seed is '3': misnamed, or one run twice"),
    (copied(("--seed=3", "--seed=4"), field("seed", 4)), "seed4.txt: the same run as seed3.txt"),
    (
        copied(
            ("--seed=3", "--seed=4"),
            field("seed", 4),
            ("Z-000003", "Z-000004"),
            (r"(^step:5/30 \S+:)\S+", r"\g<1>5.4321"),
        ),
        "seed4.txt: the same run as seed3.txt",
    ),
    # the track and the statistics
    (edits((r"python=3\.\d+", "python=3.1"), seeds=SEEDS), "Python '3.1.*the track is for 3"),
    (edits(("1 x cpu", "8 x TPU v6 lite"), seeds=SEEDS), "8 x TPU .*the track is for 1 x cpu"),
    (keep(0), "^n = 1: "),
    (two_far_runs, "^p = 0.*wanted below 0.01"),
    (mean_off(0.0002), "^p = 0.*wanted below 0.01"),
    (mean_off(-0.01), "^mean .* is above the track's target"),
    (edits(SAME_LOSS, seeds=SEEDS), "^5 runs with the same loss"),
    # what lies in the folder
    (written("README.md", b" \n"), "README.md: missing or empty"),
    (failed("step:25/", b"notfailed10.txt.bak"), "failed10.txt.*README.md does not tell of it"),
    (failed("final: "), "failed10.txt.*it counts, as seed"),
    (failed("sha256", change=lambda data: data + BAR.encode() + b"x\n"), "it counts, as seed"),
    (lambda r: r.path(10).rename(r.folder / "seed10.svg"), "not part of a record"),
    (lambda r: os.truncate(r.path(1), 1 << 40), "seed1.txt.*more than 16 MiB"),
    (lambda r: (r.folder / "a.svg").symlink_to(r.path(1)), "a.svg.*not a plain file"),
]


@pytest.mark.parametrize("tamper, reason", TAMPERED, ids=[reason for _, reason in TAMPERED])
def test_a_tampered_set_is_rejected_for_its_reason_alone(tamper, reason, record, capsys):
    tamper(record)
    assert check(record) == 1
    said = reasons(capsys)
    assert said and all(re.search(reason, line) for line in said), said
    same = {line.partition(":")[2] for line in said}
    assert len(said) == 1 or (len(said) == len(SEEDS) and len(same) == 1), said


@pytest.mark.parametrize(
    "change, reason",
    [
        (("--seed", "--muon_lr=0.03 --seed"), "muon_lr='0.02', but the flags ask for '0.03'"),
        ((" steps=540", " steps=550"), "steps='550', but the flags ask for '540'"),
        (("batch_tokens=1024", "batch_tokens=2048"), "tokens trained on, the config asks for"),
        (("^config: .*", "config: {}"), "cannot be read|no field of the config"),
    ],
)
def test_a_tampered_log_of_the_older_form_is_rejected(change, reason, tmp_path):
    path = tmp_path / "seed0.txt"
    shutil.copy(OLD / path.name, path)
    read_run(path)
    edit(path, change)
    with pytest.raises(DAMAGED, match=reason):
        read_run(path)


def test_garbled_logs_are_rejected_without_a_traceback(record):
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
        except DAMAGED as error:
            seen.add(str(error)[:20])
    assert len(seen) > 15


# ---- What is no tampering ------------------------------------------------------------------------


FOLLOWS = [
    ("stages.ahead", "(0.5,0.25),(0.5,),()", [[0.5, 0.25], [0.5], []], True),
    ("stages.ahead", "", [[], []], True),
    ("stages.tied", "1,0", [True, False], True),
    ("stages.lr", "1", [1.0, 1.0], True),
    ("stages.lr", "1,2", [1.0, 1.2], False),
    ("stages.lr", "1,2,3", [1.0, 2.0], False),
    ("skips", "((0,2),)", [[0, 2]], True),
    ("softcap", "", [], True),
    ("softcap", "15,15,0", [15.0, 15.0, 0], True),
    ("muon_lr", "3e-4", 0.0003, True),
    ("residual_dtype", "none", None, True),
    ("vocab_size", "none", 257, True),
    ("num_kv_heads", "none", 257, False),
    ("attention", "band", "xla", False),
    ("log_dir", "nan", "nan", True),
]


def test_a_flag_is_compared_as_train_reads_it():
    for name, text, value, follows in FOLLOWS:
        assert verify_record.follows(name, text, value) == follows, (name, text)


def test_a_failed_run_that_the_readme_tells_of_is_listed_and_does_not_count(record, capsys):
    failed("step:20/", b"failed10.txt, failed7.txt: power was lost")(record)
    record.write("failed7.txt", b"\x1b[2J\xff\n\x1b[31m\x00")
    record.write("loss.svg", b"<svg/>")
    assert check(record) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^failed: failed10.txt, which ends with '.*step:15/30 .*eta:\d+s'$", said, re.M
    )
    assert "n 4, mean" in said and "\x1b" not in said


def test_hashes_that_the_table_does_not_know_are_said_not_to_be_checked(record, capsys):
    record.table(scored="not yet known", trained="not yet known")
    assert check(record) == 0
    said = capsys.readouterr().out
    assert "NOT CHECKED: which tokens were scored" in said
    assert "NOT CHECKED: the training files" in said


SAMPLE = "sample: \x0c\r\x85step:1/30 final: sha256:0\nstep:1/30\nfinal: \nsample: "


@pytest.mark.parametrize(
    "changes",
    [
        set_to("save_every", 10),  # off the clock
        [field("resume", '"auto"'), flag("resume=auto")],  # and found nothing
        [(r"(platform=\S+)", r"\1-other")],  # another machine of the kind
        [(" backend=cpu", " backend=cpu JAX_COMPILATION_CACHE_DIR=/a b/c")],
        [(r"^(step:10/.*)", r"\1\nsaved: step-000010 in 0.3s")],
        [("^sample: ", SAMPLE)],  # what a model may write
    ],
)
def test_what_may_differ_between_runs_does_not_count_against_them(changes, record):
    edit(record.path(1), *changes)
    assert check(record) == 0


# ---- Running one again ---------------------------------------------------------------------------


@pytest.mark.system
def test_a_rerun_gives_the_logged_losses_and_leaves_nothing(record, capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert check(record, "--rerun=0") == 0
    said = capfd.readouterr().out
    digest = hashlib.sha256(record.path(0).read_text().partition(BAR)[0].encode()).hexdigest()
    assert f"executes the program in seed0.txt (sha256:{digest})" in said
    assert said.index("this now executes") < said.index("compiling")
    assert re.search(r"rerun: the final loss is (\S+) in the log, \1 here", said)
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
    for seed in SEEDS:
        edit(record.path(seed), ("^import jax\n", program), part=0)
    shutil.copy(record.path(0), log)
    record.path(0).write_text(reseal(shift(log.read_text(), -0.004)))
    assert check(record) == 0  # nothing else can tell
    assert check(record, "--rerun=0") == 1
    assert check(record, "--rerun=0", "--tolerance=nan") == 1
    said = capfd.readouterr().out
    assert "rejected: rerun: the final losses are 0.0040 apart, tolerated 0.003\n" in said
    assert "rerun: not all losses" in said
    assert check(record, "--rerun=0", "--tolerance=0.01") == 0


@pytest.mark.parametrize("code, reason", [(7, "ended with exit code 7"), (0, "it left no log")])
def test_a_source_runs_only_with_rerun_and_only_where_all_else_is_accepted(
    code, reason, record, tmp_path, capfd
):
    mark = tmp_path / "ran"
    program = f"open({str(mark)!r}, 'w'), sys.exit({code})\n"
    for seed in SEEDS:
        edit(record.path(seed), ("^import jax\n", program), part=0)
    assert check(record) == 0 and not mark.exists()
    record.table(target="1.0")
    assert check(record, "--rerun=0") == 1 and not mark.exists()
    assert "rerun: not done" in capfd.readouterr().out
    record.table()
    assert check(record, "--rerun=0") == 1 and mark.exists()
    said = reasons(capfd)
    assert len(said) == 1 and said[0].startswith("rerun: ") and reason in said[0]


# ---- Usage, and the table of this repository -----------------------------------------------------


def test_usage_errors_say_what_was_wanted(record, tmp_path, monkeypatch):
    for folder, flags, words in (
        (tmp_path / "none", (), "wanted a folder"),
        (record.folder.parent, (), "wanted a folder"),
        (record.folder, ("--rerun=7",), "wanted K of a seed<K>.txt in"),
    ):
        with pytest.raises(UsageError, match=words):
            main([str(folder), *flags])
    record.table(target="low")
    with pytest.raises(UsageError, match="the row of tiny lacks a cell or a number"):
        check(record)
    record.tracks.write_text(record.tracks.read_text().replace("`tiny`", "`small`"))
    with pytest.raises(UsageError, match="tiny: no such track in .*one of other, small$"):
        check(record)
    record.tracks.unlink()
    with pytest.raises(UsageError, match="the table of tracks cannot be read"):
        check(record)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match="pip install -r scripts/requirements.txt$"):
        check(record)


def test_the_shell_sees_the_verdict_as_exit_code_and_jax_is_not_needed(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError")
    folder = shutil.copytree(OLD, tmp_path / "cpu" / OLD.name)

    def shell(*argv):
        command = [sys.executable, "-m", "scripts.verify_record", *argv]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        return done.returncode, done.stderr

    assert shell(str(folder)) == (0, "")
    edit(folder / "seed1.txt", ("val_loss:", "val_loss:1"))
    assert shell(str(folder)) == (1, "")
    code, error = shell(f"{folder}/none")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert shell()[0] == 2


def test_the_tracks_of_this_repository_ask_for_what_its_presets_score():
    table = ROOT / "records/README.md"
    v6e, cpu = (verify_record.read_track(table, name) for name in ("v6e-8", "cpu"))
    assert (v6e.target, v6e.val_targets) == (SPEEDRUN.target_loss, SPEEDRUN.val_tokens)
    assert v6e.devices == ["8 x TPU v6 lite", "1 processes"] and not v6e.scored and not v6e.files
    assert (cpu.target, cpu.val_targets) == (DEMO.target_loss, DEMO.val_tokens)
    assert len(cpu.scored) == len(cpu.files) == 1 and cpu.scored != cpu.files
    assert cpu.python == "3.11" and cpu.devices == ["1 x cpu", "2 host cores"]
