"""scripts/compare.py: lists, grids, resuming, differences, failures, and one tiny real run."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import scipy.interpolate
import scipy.stats
from shards import make_folder, shard_bytes

from scripts import compare
from train import ROOT, UsageError

# Trains nothing. A seed moves the loss by 1, no softcap by 0.1 (seed + 1).
FAKE = """
import json, pathlib, sys, time
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:] if "=" in flag)
seed = int(flags["seed"])
steps = int(flags.get("steps", 15))
is_plain = not flags.get("softcap", "on").strip("()")
if steps == 99:
    time.sleep(60)
folder = pathlib.Path(flags["log_dir"]) / "run"
folder.mkdir()
more = seed + 0.1 * (seed + 1) * is_plain
rows = []
for i in (1, 2, 3):
    rows.append({"step": i, "tokens": 100 * i, "train_loss": 1, "val_loss": 5 - i + more})
rows.append({"step": 4, "train_loss": 1})
rows.append(rows[2] | {"train_time_s": 2.0, "cpu_time_s": 4.0 + is_plain})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
lines = [
    "data: nothing", "=" * 120,
    "versions: python=3.11.1 jax=0.10.2 numpy=2.0.0 processor=Some CPU @ 2 GHz XLA_FLAGS=--xla_a=1",
    "devices: 1 x cpu, 1 processes", "data: train_000000.bin tokens:7 sha256:abc",
    "parameters: 77",
]
(folder / "log.txt").write_text("\\n".join(lines))
if steps == 13:
    print("words before")
    print("error: unlucky", file=sys.stderr)
    sys.exit(5)
"""
LIST = "all: --steps=3  # short\n\n# a comment: no entry\nbase:\nno softcap: --softcap=\n"
DIFF = """--- a/train.py
+++ b/train.py
@@ -1,2 +1,3 @@
 # /// script
+# a changed copy
 # requires-python = ">=3.11"
"""


class Fake:
    """compare.main with the program above. started: the names of what ran last."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "out.jsonl"
        self.started = []
        (folder / "fake.py").write_text(FAKE)

    def program(self, entry, source):
        self.started.append(entry.name)
        return [sys.executable, str(self.folder / "fake.py")]

    def main(self, *argv):
        self.started.clear()
        compare.main([argv[0], f"--out={self.out}", *argv[1:]], self.program)
        return self.started

    def list(self, text, *flags):
        (self.folder / "list.txt").write_text(text)
        return self.main(str(self.folder / "list.txt"), *flags)

    def lines(self):
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def rewrite(self, rows):
        self.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


def cells(printed, name):
    """The cells of a table's row."""
    for line in printed.splitlines():
        found = [cell.strip() for cell in line.split("|")[1:-1]]
        if found and found[0].split(":")[0] == name:
            return found
    raise AssertionError(f"no row {name} in {printed}")


# ---- Lists and grids -----------------------------------------------------------------------------

WRONG = {
    "base\n": "wanted NAME: FLAGS",
    "a: --steps=3\n": "wanted base: first",
    "base:\nall: --steps=3\n": "line 2, 'all': wanted above the entries",
    "base:\na:\na:\n": "there already",
    "sense: up\nbase:\n": "minus or plus",
    "base: --seed=3\n": "--seed=3 is given by the script",
    "all: --log_dir=x\nbase:\n": "--log_dir=x is given",
    "base: --step=3\n": "line 1, 'base': .*the nearest is --steps",
    "base: --skips='3\n": "line 1, .*quot",
    "base: model=nanogtp\n": "model=nanogtp: wanted record2025, nanogpt",
    "base: patch=none.diff\n": "there is no file .*none.diff",
    "# nothing\n": "no entries",
}


def test_a_wrong_list_is_one_sentence_that_names_the_line(fake):
    for text, words in WRONG.items():
        with pytest.raises(UsageError, match=words) as caught:
            fake.list(text)
        assert "\n" not in str(caught.value) and not fake.started


@pytest.mark.parametrize(
    "argv, words",
    [
        (["x", "--muon_rl=1,2"], "--muon_rl"),
        (["x", "--muon_lr=1,"], "--muon_lr="),
        (["x", "--log_dir=a"], "--log_dir=a is given by the script"),
        (["x", "--", "--stps=3"], "--stps"),
        (["x", "--jobs=0"], "wanted a job"),
        (["x", "--seeds=a"], "--seeds=a"),
        (["x", "--data=nowhere"], "no shards match"),
        (["a/b"], "a/b: wanted a list's file"),
        (["nowhere.txt"], "nowhere.txt"),
        (["nowhere.txt", "--", "--steps=3"], "--steps=3: in a list"),
    ],
)
def test_a_wrong_command_is_one_sentence_before_anything_runs(fake, argv, words):
    with pytest.raises((UsageError, OSError), match=words) as caught:
        fake.main(*argv)
    assert "\n" not in str(caught.value) and not fake.started


def test_an_error_is_exit_code_2():
    argv = [sys.executable, "-m", "scripts.compare", "nowhere.txt"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "nowhere.txt" in done.stderr


def test_a_list_gives_names_models_and_flags_in_order(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("sense: plus\n" + LIST + "gpt : model=nanogpt --log_dir='a b'\n")
    entries, common, sense = compare.read_list(path, runs=False)
    assert common == ["--steps=3"] and sense == -1
    assert [(entry.name, entry.model, entry.flags) for entry in entries] == [
        ("base", "", ["--steps=3"]),
        ("no softcap", "", ["--steps=3", "--softcap="]),
        ("gpt", "nanogpt", ["--steps=3", "--log_dir=a b"]),
    ]
    assert compare.program_of(entries[2], tmp_path)[1:] == [
        "-P",
        "-m",
        "scripts.baselines",
        "nanogpt",
    ]
    assert compare.program_of(entries[0], tmp_path)[1:] == ["-P", str(tmp_path / "train.py")]


def test_a_grid_is_every_combination_and_text_values_are_repeated_flags():
    words = ["--muon_lr=0.01,2e-2", "--stages.end=0.5,1", "--stages.end=0.3,0.6,1", "--smear=0"]
    entries, _, _ = compare.read_grid([*words, "--muon_lr=0.01"], ["--steps=3", "--smear=1"])
    assert [entry.flags for entry in entries] == [
        [f"--muon_lr={lr}", "--smear=0", f"--stages.end={ends}", "--steps=3"]
        for lr in ("0.01", "2e-2")
        for ends in ("0.5,1", "0.3,0.6,1")
    ]
    assert [entry.flags for entry in compare.read_grid([], ["--steps=3"])[0]] == [["--steps=3"]]


# ---- Running -------------------------------------------------------------------------------------


def test_runs_go_seed_by_seed_and_a_second_invocation_runs_only_what_is_new(fake, capsys):
    assert fake.list(LIST, "--jobs=1", "--seeds=0,1") == ["base", "no softcap"] * 2
    first, second = fake.lines()[:2]
    assert [row["seed"] for row in fake.lines()] == [0, 0, 1, 1]
    assert second["val"] == [[1, 100, 4.1], [2, 200, 3.1], [3, 300, 2.1]]
    said = {"val_loss": 2.1, "cpu_time_s": 5.0, "params": 77, "flags": "--steps=3 --softcap="}
    assert second == second | said | {"data": {"train_000000.bin": "abc"}}
    assert second["processor"] == "Some CPU @ 2 GHz"
    assert first["source_sha256"] == hashlib.sha256((ROOT / "train.py").read_bytes()).hexdigest()
    assert not fake.list(LIST, "--seeds=0,1")
    assert fake.list(LIST + "more: --softcap=7,7,0\n", "--seeds=1,0") == ["more", "more"]
    assert not fake.list(LIST.replace("steps=3", "steps=4"), "--seeds=0", "--table")
    assert "warning" not in capsys.readouterr().out


def test_a_line_cut_short_is_no_line_and_other_data_are_another_run(fake, tmp_path):
    fake.list(LIST, "--seeds=0", "--jobs=1")
    fake.out.write_text(fake.out.read_text()[:-40])
    assert fake.list(LIST, "--seeds=0") == ["no softcap"]
    assert not fake.list(LIST, "--seeds=0")
    for split in ("train", "val"):
        (tmp_path / f"{split}_000000.bin").write_bytes(shard_bytes([1, 2, 3]))
    assert fake.list(LIST, "--seeds=0", f"--data={tmp_path}") == ["base", "no softcap"]
    assert str(tmp_path) not in fake.out.read_text()


def test_a_failed_run_stays_with_its_error_and_runs_again_only_when_asked(fake, capsys):
    text = LIST + "bad: --steps=13\n"
    for flags, runs in (([], ["base", "no softcap", "bad"]), ([], []), (["--retry"], ["bad"])):
        assert fake.list(text, "--jobs=1", "--seeds=0", *flags) == runs
        printed = capsys.readouterr().out
        assert "failed: bad, seed 0: exit code 5: error: unlucky" in printed
        assert cells(printed, "bad")[1:4] == ["0 (1 failed)", "-", "-"]
    errors = [row.get("error") for row in fake.lines()]
    assert errors == [None, None, *["exit code 5: error: unlucky"] * 2]


def test_a_diff_changes_the_copy_that_its_entry_runs_and_names_the_run(fake, tmp_path, capsys):
    patch = tmp_path / "mine.diff"
    patch.write_text(DIFF)
    text = "all: --steps=3\nbase:\nother: patch=mine.diff --softcap=\n"
    seen = {}
    plain = fake.program

    def program(entry, source):
        assert (source / "scripts/compare.py").exists()
        seen[entry.name] = (source / "train.py").read_text().splitlines()[1]
        return plain(entry, source)

    fake.program = program
    assert fake.list(text, "--seeds=0", "--jobs=1") == ["base", "other"]
    own_line = (ROOT / "train.py").read_text().splitlines()[1]
    assert seen == {"base": own_line, "other": "# a changed copy"}
    base, other = fake.lines()
    assert other["source_sha256"] == base["source_sha256"] != other["patched_sha256"]
    patch.write_text(DIFF.replace("changed", "twice changed"))
    assert not fake.list(text, "--seeds=0")  # a run is known by the diff's name
    assert "different diffs" not in capsys.readouterr().out
    assert len(fake.list(text, "--seeds=0,1")) == 2
    assert "warning: the runs of other are of different diffs" in capsys.readouterr().out
    patch.rename(tmp_path / "another.diff")
    assert fake.list(text.replace("mine", "another"), "--seeds=0") == ["other"]
    (tmp_path / "another.diff").write_text(DIFF.replace("/// script", "nowhere in it"))
    with pytest.raises(UsageError, match="another.diff: does not fit this train.py .*make it anew"):
        fake.list(text.replace("mine", "another"), "--seeds=2")
    assert not fake.started


def test_lines_that_are_no_fair_comparison_are_warned_of(fake, capsys):
    fake.list(LIST, "--seeds=0,1", "--jobs=1")
    rows = fake.lines()
    rows[0]["source_sha256"] = "another"
    rows[3]["processor"] = "B"
    fake.rewrite(rows)
    capsys.readouterr()
    assert not fake.list(LIST, "--seeds=0,1")
    printed = capsys.readouterr().out
    assert "warning: these runs are of 2 different sources of train.py" in printed
    warning = "warning: no softcap, seed 1, ran on B, base on Some CPU @ 2 GHz: no pair"
    assert [line for line in printed.split("\n") if "no pair" in line] == [warning]
    assert fake.list(LIST, "--seeds=0", "--same_source") == ["base"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_comparison_keeps_what_has_ended_and_continues(fake, tmp_path, sent):
    text = LIST + "slow: --steps=99\nlast: --softcap=2,2,0\n"
    (tmp_path / "list.txt").write_text(text)
    (tmp_path / "driver.py").write_text(
        "import sys\nimport train\nfrom scripts import compare\n"
        f"fake = [sys.executable, '-P', {str(tmp_path / 'fake.py')!r}]\n"
        "compare.main.__defaults__ = (None, lambda entry, source: fake)\n"
        "sys.exit(train.command(compare.stoppable))\n"
    )
    argv = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "list.txt")]
    argv += ["--jobs=1", "--seeds=0", f"--out={fake.out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("[2/4]"):
            break
    time.sleep(0.5)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=120)
    if sent != signal.SIGKILL:
        assert process.returncode == 130 and "the same command continues" in said
        assert cells(said, "no softcap")[1] == "1"
    assert [row["name"] for row in fake.lines()] == ["base", "no softcap"]
    assert fake.list(text.replace("99", "98"), "--seeds=0", "--jobs=1") == ["slow", "last"]


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="wants two cores to give away",
)
def test_each_job_has_cores_of_its_own(fake, tmp_path):
    (tmp_path / "fake.py").write_text(
        "import os, sys, time\ntime.sleep(0.5)\nprint(*os.sched_getaffinity(0))\nsys.exit(3)"
    )
    cores = os.sched_getaffinity(0)
    fake.list(LIST, "--seeds=0", "--jobs=2")
    shares = []
    for row in fake.lines():
        shares.append(set(map(int, re.search("exit code 3: (.*)", row["error"])[1].split())))
    assert shares[0] | shares[1] == cores and not shares[0] & shares[1]
    assert os.sched_getaffinity(0) == cores


@pytest.mark.system
def test_a_tiny_real_list_trains_and_compares(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles sooner
    make_folder(tmp_path / "data")
    (tmp_path / "mine.diff").write_text(DIFF)
    (tmp_path / "real.txt").write_text(
        "all: --preset=demo --steps=4 --val_every=2 --num_layers=1 --model_dim=32 --num_heads=2 "
        "--head_dim=16 --mlp_dim=64 --skips= --backout= --offset_layers= --stages.end=1 "
        "--stages.batch_tokens=512 --stages.seq_len=64 --val.seq_len=64 --val_context=32 "
        "--val_tokens=1024\nbase:\nlong: --val_tokens=999999999\nchanged: patch=mine.diff\n"
    )
    data = f"--data={tmp_path}/data"
    compare.main([str(tmp_path / "real.txt"), "--seeds=1", data, "--reach=base"])
    printed = capfd.readouterr().out
    lines = map(json.loads, (tmp_path / "real.jsonl").read_text().splitlines())
    rows = {row["name"]: row for row in lines}
    base = rows["base"]
    assert [row[:2] for row in base["val"]] == [[2, 1024], [4, 2048]]
    assert base["val"][-1][2] == base["val_loss"] < math.log(257)
    assert base["params"] > 257 * 32 and base["cpu_time_s"] > 0
    assert set(base["data"]) == {"train_000000.bin", "train_000001.bin", "val_000000.bin"}
    assert base["versions"]["jax"] == jax.__version__
    assert rows["changed"]["val"] == base["val"]  # the diff is a comment
    assert rows["long"]["error"].startswith("exit code 2: error: ")
    assert cells(printed, "base")[2] == f"{base['val_loss']:.4f}"


# ---- The table -----------------------------------------------------------------------------------


def test_differences_errors_and_p_are_those_of_scipy():
    for n in range(2, 12):
        differences = np.random.default_rng(n).normal(0.5, 1, n)
        mean, error = compare.paired(differences)
        assert mean == pytest.approx(differences.mean())
        assert error == pytest.approx(scipy.stats.sem(differences))
        for t in (0.3, -2.0, 4.0, 12.0):
            expected = 2 * scipy.stats.t.sf(abs(t), n - 1)
            assert compare.p_of(t, n - 1) == pytest.approx(expected, rel=2e-3, abs=2e-5)
    assert compare.paired([0.3])[0] == 0.3 and math.isnan(compare.paired([0.3])[1])


@pytest.mark.parametrize("n, others", [(3, 0), (3, 1), (3, 14), (2, 5), (8, 0)])
def test_an_effect_is_judged_by_the_larger_of_its_own_noise_and_the_lists(n, others):
    """Against scipy: one entry among quieter or louder ones, its mean just above or below a bar."""
    noise = np.random.default_rng(n).normal(0, 1, n)
    noise -= noise.mean()
    for loud in (0.1, 10.0):
        rest = {}
        for i in range(others):
            rest[f"other {i}"] = (loud * np.random.default_rng(i + 1).normal(0, 1, n)).tolist()
        df = (n - 1) * (others + 1)
        squares = sum(np.var(own) * n for own in [noise, *rest.values()])
        error = max(scipy.stats.sem(noise), math.sqrt(squares / df / n))
        bar = scipy.stats.t.isf(0.05 / (others + 1) / 2, df) * error
        unseen = "not seen at this scale"
        for share, word in ((1.01, "helps"), (-1.01, "hurts"), (0.99, unseen), (-0.99, unseen)):
            verdicts, how = compare.judge({"it": (noise + share * bar).tolist()} | rest)
            assert verdicts["it"] == word, (loud, share)
            assert f"0.05 / {others + 1}" in how and f"({df} degrees" in how
    verdicts, _ = compare.judge({"it": [1.0, 1.0, 1.0], "once": [5.0], "never": []})  # no noise
    assert verdicts == {"it": "helps", "once": "-", "never": "-"}


@pytest.mark.parametrize("sense, sign, word", [("minus", "+", "helps"), ("plus", "-", "hurts")])
def test_the_table_pairs_runs_of_one_seed(fake, capsys, sense, sign, word):
    """No softcap costs 0.1, 0.2, 0.3, 0.4, a seed 1: only in pairs is that seen."""
    text = f"sense: {sense}\n{LIST}half: --softcap= --log_every=7\n"
    fake.list(text, "--seeds=0,1,2,3")
    expected = scipy.stats.sem([0.1, 0.2, 0.3, 0.4])
    printed = capsys.readouterr().out
    assert "Flags of all: `--steps=3`" in printed and "| CPU time / first |" in printed
    gain = f"{sign}0.2500 ± {expected:.4f} (n=4)"
    variant = "no softcap: `--softcap=`"
    assert cells(printed, "no softcap") == [variant, "4", "3.7500", gain, "1.25", "77", word]
    # an accelerator works while the CPU waits
    fake.out.write_text(fake.out.read_text().replace("1 x cpu,", "1 x NVIDIA H200,"))
    fake.list(text, "--seeds=0,1,2,3", "--table")
    printed = capsys.readouterr().out
    assert "| train time / first |" in printed and cells(printed, "no softcap")[4] == "1.00"
    absent = (("base", 0), ("no softcap", 1))
    fake.rewrite(row for row in fake.lines() if (row["name"], row["seed"]) not in absent)
    fake.list(text, "--seeds=0,1,2,3,9", "--table")
    gain = f"{sign}0.3500 ± {scipy.stats.sem([0.3, 0.4]):.4f} (n=2)"
    assert cells(capsys.readouterr().out, "no softcap")[1:4] == ["3", "3.9333", gain]


def test_a_grid_has_the_best_first_and_is_known_in_any_order(fake, tmp_path, capsys):
    """0.1, 0.2 and 0.3 more than the best: 0.2 on average, 0.1 / sqrt 3 its error."""
    grid = ["--softcap=", "--softcap=9,9,0", "--stages.end=0.5,1"]
    common = ["--", "--preset=demo", "--steps=3"]
    assert len(fake.main("mine", *grid, *common)) == 6
    out = capsys.readouterr().out
    best, other = (f"softcap={value} stages.end=0.5,1" for value in ("9,9,0", ""))
    assert out.index(f"| {best} |") < out.index(f"| {other} |")
    assert cells(out, best)[1:] == ["3", "3.0000", "-", "1.00", "77", "-"]
    gain = f"-0.2000 ± {0.1 / math.sqrt(3):.4f} (n=3)"
    assert cells(out, other)[1:] == ["3", "3.2000", gain, "1.25", "77", "not seen at this scale"]
    flags = "--preset=demo --softcap=9,9,0 --stages.end=0.5,1 --steps=3"
    assert f"python train.py {flags}\n" in out
    assert not fake.main("mine", *grid[::-1], "--", "--steps=3", "--preset=demo")
    assert fake.main("mine", *grid, "--log_every=7", "--seeds=0", *common) == [
        f"softcap={value} stages.end=0.5,1 log_every=7" for value in ("", "9,9,0")
    ]
    make_folder(tmp_path / "data")
    data = f"--data={tmp_path}/data"
    assert len(fake.main("mine", *grid, "--seeds=0", data, *common)) == 2
    assert f"'--val_files={tmp_path}/data/*val_*.bin'\n" in capsys.readouterr().out


def test_reach_is_where_the_mean_curve_crosses(fake, capsys):
    """By hand: base is at 3.5 (200 tokens) and 2.5 (300), no softcap ends at 2.65."""
    fake.list(LIST, "--seeds=0,1", "--reach=no softcap")
    printed = capsys.readouterr().out.split("tokens to 2.6500")[1]
    assert cells(printed, "base") == ["base", "285", "0.950"]
    assert cells(printed, "no softcap") == ["no softcap", "300", "1.000"]
    fake.list(LIST, "--table", "--seeds=0,1", "--reach=base")
    printed = capsys.readouterr().out.split("tokens to 2.5000")[1]
    assert cells(printed, "no softcap")[1:] == ["not reached", "-"]
    with pytest.raises(UsageError, match="--reach=nobody"):
        fake.list(LIST, "--table", "--reach=nobody")
    tokens, losses = [10, 20, 40, 80], [5.0, 4.0, 4.5, 2.0]  # the first crossing counts
    assert compare.tokens_to(4.2, tokens, losses) == pytest.approx(18)
    assert compare.tokens_to(6.0, tokens, losses) == 10
    assert compare.tokens_to(1.0, tokens, losses) is None
    line = scipy.interpolate.interp1d(losses[2:], tokens[2:])
    assert compare.tokens_to(3.1, tokens, losses) == pytest.approx(float(line(3.1)))


def test_a_list_of_an_older_train_py_still_gives_its_table_but_does_not_run(capsys):
    path = str(ROOT / "records/ablations/bytes.txt")
    compare.main([path, "--table"])
    row = cells(capsys.readouterr().out, "NorMuon")
    assert row[1:4] == ["3", "1.2307", "+0.0537 ± 0.0183 (n=3)"]
    with pytest.raises(
        UsageError, match="line 5, 'NorMuon': --muon_beta2=0: there is no such flag"
    ):
        compare.main([path])
