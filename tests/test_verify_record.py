"""scripts/verify_record.py accepts a genuine set and rejects tampered ones, each for its reason."""

import hashlib
import math
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from shards import documents, make_folder

import train
from scripts import verify_record
from scripts.verify_record import DAMAGED, UsageError, main, read_run
from train import DEMO, ROOT, SPEEDRUN, replace

SHIFTS = (0.0, 0.0012, -0.0007, 0.0005, -0.0015)  # of the losses, by seed
SEEDS = range(len(SHIFTS))
LOSSES = [2.55 + shift for shift in SHIFTS]
SOURCE = "# It stands for the source of a trainer.\n"
FLAGS = """--preset=demo --steps=30 --num_layers=1 --model_dim=32 --num_heads=1 --head_dim=32
--mlp_dim=64 --offset_layers= --skips= --backout= --gate_dims=0 --smear=0 --optimizer=adamw
--stages.end=0.5,1 --stages.batch_tokens=2048,4096 --stages.seq_len=64 --val.seq_len=64
--val_tokens=2048 --val_context=32 --micro_tokens=4096 --val_every=10 --log_every=5
--target_loss=3.1 --vocab_size=none --attention=auto""".split()
TABLE = """Words before it.

| track | target | val targets | scored tokens | training files | Python | devices |
|---|---|---|---|---|---|---|
| `other` | 1.5 | 7 | not yet known | not yet known | any | 8 x TPU v6 lite |
| `tiny` | {target} | 2,048 | `{scored}` | `{trained}` | {python} | `1 x cpu, 1 processes` |
"""
SPARE = "0" * 64  # the SHA-256 of a training file of the track that no run reads
OLD = ROOT / "records/cpu/2026-11-21_RecordRecipe"  # of a train.py with the older line config:


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags that name the shards, and what train.open_data says of them."""
    flags = make_folder(tmp_path_factory.mktemp("shards"), train=[documents(1, 1500)])
    return flags, train.open_data(train.parse_flags([*FLAGS, *flags]))


def write_log(data, folder, seed, shift, **config):
    """The log of a run of 30 steps, as train.py itself writes it. Nothing is trained."""
    flags, (train_shards, val_shards, cfg, note) = data
    cfg = replace(cfg, seed=seed, **config)
    folder.mkdir(parents=True, exist_ok=True)
    log = train.Log(folder, train.GPT.specs(cfg), cfg, {})
    notes = [note, "parameters: 9000", "compiled: train_0 in 1.0s, 0.01 GiB per device"]
    changed = [f"--{name}={value}" for name, value in config.items()]
    argv = [*FLAGS, *flags, *changed, f"--seed={seed}"]
    log.begin(SOURCE, "asked for", argv, train_shards, val_shards, notes)
    for step in range(5, 31, 5):
        log.clock.total = (0.4 + seed / 100) * step * np.array([1.0, 0.9])  # wall, CPU
        loss = 4 - step / 20 + shift
        log.step(step, loss, loss + 0.05 if step % 10 == 0 else None)
    log.line("saved: step-000030 in 0.1s")
    log.result()
    log.seal()
    text = (folder / "log.txt").read_text()
    return reseal(text.replace("\ndevices: 8 x", "\ndevices: 1 x"))


@pytest.fixture(scope="module")
def genuine(data, tmp_path_factory):
    """The logs of five seeds."""
    folder = tmp_path_factory.mktemp("logs")
    return [write_log(data, folder / f"{seed}", seed, SHIFTS[seed]) for seed in SEEDS]


@pytest.fixture
def record(tmp_path, genuine, monkeypatch):
    """The folder of these, of a track whose target is 0.01 above their mean."""
    folder = tmp_path / "tiny/2026-01-31_Test"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("Less is more.\n")
    for seed in SEEDS:
        (folder / f"seed{seed}.txt").write_text(genuine[seed])
    monkeypatch.setattr(verify_record, "TRACKS", tmp_path / "tracks.md")
    write_table(folder)
    return folder


def write_table(record, target=2.56, **cells):
    log = (record / "seed0.txt").read_text()
    known = {
        "scored": re.search(r"before them:(\w+)", log)[1],
        "trained": re.search(r"data: train\S* .*sha256:(\w+)", log)[1] + f"`, `{SPARE}",
        "python": "{}.{}".format(*sys.version_info),
    }
    verify_record.TRACKS.write_text(TABLE.format(target=target, **known | cells))


def check(record, *flags):
    return main([str(record), *flags])


def reasons(capture):
    return re.findall("^rejected: (.*)", capture.readouterr().out, re.M)


def reseal(text):
    body = text.rpartition("\nsha256:")[0] + "\n"
    return f"{body}sha256:{hashlib.sha256(body.encode()).hexdigest()}\n"


def edit(path, *changes, seal=True):
    """Replace (regex, new) in a log; each must be found."""
    text = path.read_text()
    for old, new in changes:
        text, found = re.subn(old, new, text, flags=re.M)
        assert found, old
    path.write_text(reseal(text) if seal else text)


def test_a_genuine_set_is_accepted_and_its_statistics_are_those_of_its_losses(record, capsys):
    assert check(record) == 0
    said = capsys.readouterr().out
    mean = sum(LOSSES) / 5
    sd = math.sqrt(sum((loss - mean) ** 2 for loss in LOSSES) / 4)
    t = (mean - 2.56) / (sd / math.sqrt(5))
    p = stats.t.cdf(t, 4)
    assert said.endswith("ACCEPTED\n") and "NOT CHECKED" not in said and "rejected" not in said
    assert f"n 5, mean val_loss {mean:.5f}, sd {sd:.5f}" in said
    assert f"t {t:.2f}, one-sided p {p:.2g} of mean <= 2.56" in said
    assert f"(target - mean) * sqrt(n) = {(2.56 - mean) * math.sqrt(5):.5f}" in said
    assert "mean train_time 12.600 s" in said  # 30 steps of 0.40 to 0.44 s
    for seed in SEEDS:
        assert f"seed{seed}.txt: val_loss {LOSSES[seed]:.4f}, train_time 1" in said


def test_the_records_of_this_repository_are_accepted(capsys):
    folders = list((ROOT / "records/cpu").iterdir())
    assert len(folders) >= 2
    for folder in folders:
        assert main([str(folder)]) == 0
        assert capsys.readouterr().out.endswith("ACCEPTED\n")


# ---- Tampered sets -------------------------------------------------------------------------------


def edits(*changes, seeds=(1,), seal=True):
    """A tampering: regexes replaced in some of the logs."""

    def tamper(record):
        for seed in seeds:
            edit(record / f"seed{seed}.txt", *changes, seal=seal)

    return tamper


def field(name, value):
    return rf'("{name}": )("[^"]*"|[^,"]+)', rf"\g<1>{value}"


def half(match):
    return f"{float(match[0]) / 2:.3f}"


def train_on_validation(record):
    """The one training file is the validation file; the table knows none of the track's."""
    edits(TRAINED_ON)(record)
    write_table(record, trained="not yet known")


def copy_seed(record):
    """Seed 3 as seed 4, one loss of six changed."""
    shutil.copy(record / "seed3.txt", record / "seed4.txt")
    changes = [
        ("--seed=3", "--seed=4"),
        field("seed", 4),
        (r"(^step:5/30 \S+:)\S+", r"\g<1>5.4321"),
    ]
    edit(record / "seed4.txt", *changes)


def keep_one(record):
    for seed in SEEDS[1:]:
        (record / f"seed{seed}.txt").unlink()


def fail(start, readme):
    """Seed 4, cut before the last line that starts so, is called a run that broke off."""

    def tamper(record):
        path = (record / "seed4.txt").rename(record / "failed4.txt")
        text = path.read_text()
        path.write_text(text[: text.rindex(f"\n{start}") + 1])
        (record / "README.md").write_text(readme)

    return tamper


CLOCK = "the clock does not fit the line before"
TOLD = "failed4.txt: the machine went away"
SWAP = r"^(step:10/.*train_time:)(\S+)(.*\n.*train_time:)(\S+)", r"\1\4\3\2"
RESUMED = r"^(step:5/)", r"resumed: logs/a/ckpt/step-000004 at step 4\n\1"
TRAINED_ON = r"(train_0.*sha256:)(\w+)((?:.*\n)*data: val_0.*sha256:)\w+", r"\1\2\3\2"
VAL_TOKENS = field("val_tokens", 1024), ("--val_tokens=2048", "--val_tokens=1024")
VALIDATED_ON = r"(val_0.*sha256:).*", rf"\g<1>{SPARE}"
LAST_LOSS = r"^((?:step:30/|final:).* val_loss:)\S+", r"\g<1>2.5460"
TAMPERED = {  # what is done: (the tampering, what the reason says)
    "loss edited": (edits((r"(val_loss:)\d", r"\g<1>2"), seal=False), "digest is not that of"),
    "cut off": (edits((r".{50}\n\Z", ""), seal=False), "its last line is not its digest"),
    "no final line": (edits((r"^final: .*\n", "")), "not those of a whole run"),
    "resumed": (edits(RESUMED), "not those of a whole run"),
    "flags in a file": (edits(("--seed", "@my.args --seed")), "argv reads flags from a file"),
    "line removed": (edits((r"^step:15/.*\n", "")), "its 5 step lines are not the 6"),
    "evaluation removed": (edits((r"^(step:10/.*) val_loss:\S+", r"\1")), "its 6 .* not the 6"),
    "loss of nan": (edits((r"^(step:15/.*train_loss:)\S+", r"\1nan")), "nan .* is not a step line"),
    "last loss edited": (edits((r"^(step:30/.*val_loss:)2", r"\g<1>3")), "not that of its last"),
    "times swapped": (edits(SWAP), f"step 10: {CLOCK}"),
    "times rescaled": (edits((r"(?<=train_time:)\d+\.\d+", half)), f"step 5: {CLOCK}"),
    "step time edited": (edits((r"(^step:20/.* step:)410", r"\g<1>411")), f"step 20: {CLOCK}"),
    "speed edited": (edits((r"(^step:20/.*tok/s:)10.0", r"\g<1>10.2")), f"step 20: {CLOCK}"),
    "more CPU time": (edits((r"cpu_time:\S+s", "cpu_time:9999.9s")), "more than .* cores have"),
    "less CPU time": (edits((r"cpu_time:\S+s", "cpu_time:1.0s")), "less than half of"),
    "field removed": (edits(('"log_every": 5, ', "")), "cannot be read as a log: .*log_every"),
    "too many steps": (edits(field("steps", 10**11)), "100000000000 steps cannot be"),
    "other count": (edits(("92160 trained", "92161 trained")), "92161 tokens trained on"),
    "too few tokens": (edits((r"(data: train.* tokens:)\d+", r"\g<1>92159")), "92159 there are"),
    "other val tokens": (edits(*VAL_TOKENS), "not the track's: val targets$"),
    "trained on validation": (train_on_validation, "validation file is a training file"),
    "validated on training": (edits(VALIDATED_ON), "validation file is a training file"),
    "far from the target": (lambda record: write_table(record, 2), "^p = 1, .*, the target 2$"),
    "target edited": (edits(("target:3.1 ", "target:3.2 ")), "target is not the config's"),
    "target at step 10": (edits(("at step 20", "at step 10")), "not reached when it says"),
    "target after 1 s": (edits((r"20 after \S+", "20 after 1.000s")), "not reached when it says"),
    "run misnamed": (lambda r: (r / "seed4.txt").rename(r / "seed5.txt"), "its seed is '4'"),
    "other flag": (edits(("--seed", "--muon_lr=0.03 --seed")), "not what '--muon_lr=0.03' asks"),
    "copied seed": (copy_seed, "most of its training losses are those of seed3.txt"),
    "one run": (keep_one, "^n = 1: a t-test needs two runs"),
    "one loss": (edits(LAST_LOSS, seeds=SEEDS), "^n = 5: .* whose losses differ"),
    "near the target": (lambda record: write_table(record, 2.5501), "^p = 0.*wanted below 0.01"),
    "failure untold": (fail("step:25/", "It works."), "README.md does not tell of it"),
    "result called failed": (fail("saved: ", TOLD), "failed4.txt.*it counts, as seed"),
    "run renamed": (lambda r: (r / "seed4.txt").rename(r / "seed4.log"), "not part of a record"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_set_is_rejected_for_its_reason_alone(name, record, capsys):
    tamper, reason = TAMPERED[name]
    tamper(record)
    assert check(record) == 1
    said = reasons(capsys)
    assert len(said) == 1 and re.search(reason, said[0]), said


def test_each_way_in_which_a_run_differs_from_the_first_is_named(record, capsys):
    write_table(record, scored="not yet known")
    edit(
        record / "seed1.txt",
        (SOURCE, "# another\n"),
        (r"^preset: demo", "preset: tiny"),
        ("1 processes, ", "1 processes, 1"),
        (r"(val_0.*sha256:)\w{4}", r"\g<1>0000"),
        (r"(before them:)\w{4}", r"\g<1>0000"),
        (r"^parameters: \d+", "parameters: 7"),
        (" jax=", " jax=9."),
        field("muon_lr", 0.03),
    )
    assert check(record) == 1
    named = "preset muon_lr devices files scored parameters versions source".split()
    assert reasons(capsys) == [f"seed1.txt: another '{name}' than seed0.txt" for name in named]


def test_each_way_in_which_a_run_is_not_of_the_track_is_named(record, capsys):
    edit(
        record / "seed1.txt",
        ("scores 2048 ", "scores 2047 "),
        (r"(before them:)\w{4}", r"\g<1>0000"),
        (r"(train_0.*sha256:)\w{4}", r"\g<1>0000"),
        (r"python=3\.\d+", "python=2.7"),
        ("1 x cpu", "8 x TPU v6 lite"),
    )
    assert check(record) == 1
    columns = "val targets, scored tokens, training files, Python, devices"
    assert reasons(capsys) == [f"'seed1.txt': not the track's: {columns}"]


def test_a_tampered_log_of_the_older_form_is_rejected(tmp_path):
    path = tmp_path / "seed0.txt"
    for old, new, reason in (
        (" steps=540", " steps=550", "1105920 tokens trained on, the config asks for"),
        (" log_every=10", " log_every=5", "step lines are not the"),
        ("=1024,2048,3072", "=2048", "step 10: the clock"),
        ("^config: .*", "config: {}", "stages.end"),
    ):
        shutil.copy(OLD / path.name, path)
        edit(path, (old, new))
        with pytest.raises(DAMAGED, match=reason):
            read_run(path)


def test_garbled_logs_are_rejected_without_a_traceback(record):
    rng = random.Random(0)
    path = record / "seed1.txt"
    text = path.read_text()
    seen = set()
    for _ in range(200):
        at = rng.randrange(len(SOURCE), len(text) - 70)
        some = text[rng.randrange(2000) :][: rng.randrange(99)]
        nines = "9" * rng.choice((1, 30, 5000))
        piece = rng.choice(["", nines, " =", "\n", "-", "nan", '"', "[", some])
        path.write_text(reseal(text[:at] + piece + text[at + rng.randrange(30) :]))
        try:
            read_run(path)
        except DAMAGED as error:
            seen.add(str(error)[:20])
    assert len(seen) > 9


# ---- What is no tampering ------------------------------------------------------------------------


def test_failed_runs_and_hashes_that_are_not_known_do_not_count_against_a_set(record, capsys):
    fail("step:20/", TOLD)(record)
    (record / "loss.svg").write_text("<svg/>")
    write_table(record, scored="", trained="", python="any")
    assert check(record) == 0
    said = capsys.readouterr().out
    assert "n 4, mean" in said
    assert "NOT CHECKED: which tokens were scored" in said and "NOT CHECKED: the data" in said


def test_what_may_differ_between_runs_does_not_count_against_them(record):
    sample = "sample: \x0c\r\x85step:1/30 final: sha256:0\nstep:1/30\nfinal: \n"
    edit(
        record / "seed1.txt",
        field("save_every", 10),  # off the clock
        field("resume", '"auto"'),  # and found nothing
        field("log_dir", '"my logs"'),
        (r"(platform=\S+)", r"\1-other"),  # another machine of the kind
        (" backend=cpu", " backend=cpu JAX_COMPILATION_CACHE_DIR=/a b/c"),
        (r"^(step:10/.*)", r"\1\nsaved: step-000010 in 0.3s"),
        ("^wrote: ", f"{sample}wrote: "),  # what a model may write
    )
    assert check(record) == 0


def test_a_loss_that_rounds_to_the_target_may_have_reached_it_or_not(data, tmp_path):
    path = tmp_path / "seed0.txt"
    for shift, step in ((0.00004, 30), (-0.00004, 20)):
        text = write_log(data, tmp_path / f"{shift}", 0, shift, target_loss=3.05)
        assert "step:20/30 train_loss:3.0000 val_loss:3.0500" in text
        assert f"target:3.05 reached at step {step}" in text
        path.write_text(text)
        assert read_run(path).last.step == 30


# ---- Running one again ---------------------------------------------------------------------------


@pytest.mark.system
def test_a_rerun_trains_the_logged_source_to_the_logged_loss(
    data, record, tmp_path, capfd, monkeypatch
):
    """Seed 1 is seed 0 with other losses: only what runs again has to be true."""
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    keep_one(record)
    short = "--steps=4 --stages.end=1 --stages.batch_tokens=2048 --log_every=2 --val_every=0"
    last = ["--target_loss=0", "--seed=0", f"--log_dir={tmp_path}/my logs"]
    flags = [*FLAGS, *data[0], *short.split(), *last]
    subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True)
    (log,) = tmp_path.glob("my logs/*/log.txt")
    for seed in (0, 1):
        shutil.copy(log, record / f"seed{seed}.txt")
    higher = r"(?<=_loss:)\d+\.\d{4}", lambda match: f"{float(match[0]) + 0.01:.4f}"
    edit(record / "seed1.txt", ("--seed=0", "--seed=1"), field("seed", 1), higher)
    write_table(record, target=100)
    capfd.readouterr()
    assert check(record, "--rerun=0") == 0
    said = capfd.readouterr().out
    assert said.index("this now executes") < said.index("compiling")
    assert re.search(r"rerun: the final loss is (\S+) in the log, \1 here", said)
    assert said.endswith("ACCEPTED\n")


def replace_source(record, program):
    edits((SOURCE, lambda match: program), seeds=SEEDS)(record)


def test_a_rerun_rejects_another_loss_or_config_than_the_logs(record, tmp_path, capfd):
    """The program stands for a run: it writes a log."""
    log = tmp_path / "log.txt"
    program = f"""import pathlib, shutil, sys
folder = dict(word.split("=", 1) for word in sys.argv[1:])["--log_dir"]
pathlib.Path(folder, "run").mkdir(parents=True)
shutil.copy({str(log)!r}, folder + "/run")
"""
    replace_source(record, program)
    shutil.copy(record / "seed0.txt", log)
    assert check(record, "--rerun=0") == 0

    edit(record / "seed0.txt", LAST_LOSS)
    assert check(record) == 0  # nothing else can tell
    capfd.readouterr()
    assert check(record, "--rerun=0") == check(record, "--rerun=0", "--tolerance=nan") == 1
    apart = "rerun: the final losses are 0.0040 apart, tolerated"
    assert reasons(capfd) == [f"{apart} 0.003", f"{apart} nan"]
    assert check(record, "--rerun=0", "--tolerance=0.01") == 0

    edit(log, field("attention", '"cudnn"'))
    assert check(record, "--rerun=0", "--tolerance=0.01") == 0  # another machine's

    edit(log, field("muon_lr", 0.03))
    capfd.readouterr()
    assert check(record, "--rerun=0", "--tolerance=0.01") == 1
    assert reasons(capfd) == ["rerun: another 'muon_lr' than seed0.txt"]


def test_a_source_runs_only_with_rerun_and_only_where_all_else_is_accepted(record, tmp_path, capfd):
    mark = tmp_path / "ran"
    replace_source(record, f"import sys\nopen({str(mark)!r}, 'w'), sys.exit(7)\n")
    assert check(record) == 0 and not mark.exists()
    write_table(record, target=1)
    assert check(record, "--rerun=0") == 1 and not mark.exists()
    write_table(record)
    capfd.readouterr()
    assert check(record, "--rerun=0") == 1 and mark.exists()
    assert reasons(capfd) == ["rerun: no log of a whole run: the program ended with exit code 7"]


# ---- Usage, and the table of this repository -----------------------------------------------------


def test_usage_errors_say_what_was_wanted(record):
    with pytest.raises(UsageError, match="wanted K of a seed<K>.txt in"):
        check(record, "--rerun=7")
    with pytest.raises(UsageError, match="no such track in .*wanted DIR to be <track>/<date>_<"):
        check(record.parent)


def test_the_shell_sees_the_verdict_as_exit_code_and_jax_is_not_needed(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError")
    folder = shutil.copytree(OLD, tmp_path / "cpu" / OLD.name)
    edit(folder / "seed1.txt", ("val_loss:", "val_loss:1"))
    for path, code, error in ((folder, 1, ""), (tmp_path / "cpu/none", 2, "error: .*\n")):
        command = [sys.executable, "-m", "scripts.verify_record", path]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == code and re.fullmatch(error, done.stderr)


def test_the_tracks_of_this_repository_ask_for_what_its_presets_score():
    table = ROOT / "records/README.md"
    v6e, cpu = (verify_record.read_track(table, name) for name in ("v6e-8", "cpu"))
    assert (v6e.target, v6e.val_targets) == (SPEEDRUN.target_loss, SPEEDRUN.val_tokens)
    assert v6e.devices == ["8 x TPU v6 lite", "1 processes"] and not v6e.scored and not v6e.files
    assert (cpu.target, cpu.val_targets) == (DEMO.target_loss, DEMO.val_tokens)
    assert len(cpu.scored) == len(cpu.files) == 1 and cpu.scored != cpu.files
    assert cpu.python == "3.11" and cpu.devices == ["1 x cpu", "2 host cores"]
