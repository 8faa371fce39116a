"""scripts/compare.py: lists, grids, resuming, differences, failures, and one tiny real run."""

import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import scipy.interpolate
import scipy.stats
from shards import make_folder, shard_bytes
from users_files import fill

from scripts import compare, tables
from train import ROOT, UsageError, command

# Trains nothing. A seed moves the loss by 1, no softcap by 0.1 (seed + 1).
FAKE = """
import json, pathlib, sys, time
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:] if "=" in flag)
seed, steps = int(flags["seed"]), int(flags.get("steps", 15))
is_plain = not flags.get("softcap", "on").strip("()")
time.sleep(20 * (steps == 99))
folder = pathlib.Path(flags["log_dir"]) / "run"
folder.mkdir()
loss = 5 + seed + 0.1 * (seed + 1) * is_plain
rows = []
for i in (1, 2, 3):
    rows.append({"step": i, "tokens": 100 * i, "train_loss": 1, "val_loss": round(loss - i, 6)})
rows.append({"step": 4, "train_loss": 1})
rows.append(rows[2] | {"train_time_s": 2.0, "cpu_time_s": 4.0 + is_plain})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "log.txt").write_text("data: nothing\\n" + "=" * 120 + '''
versions: python=3.11.1 jax=0.10.2 numpy=2.0.0 processor=Some CPU @ 2 GHz XLA_FLAGS=--xla_a=1
devices: 1 x cpu, 1 processes
data: train_000000.bin tokens:7 sha256:abc
parameters: 77''')
if steps == 13:
    print("words before\\nerror: unlucky")
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
        self.folder, self.out = folder, folder / "out.jsonl"
        self.started = []
        (folder / "fake.py").write_text(FAKE)

    def program(self, entry, source):
        self.started.append(entry.name)
        return [sys.executable, "-IS", str(self.folder / "fake.py")]

    def main(self, *argv):
        self.started.clear()
        compare.main([argv[0], f"--out={self.out}", *argv[1:]], self.program)
        return self.started

    def list(self, text, *flags):
        (self.folder / "list.txt").write_bytes(text.encode(errors="surrogateescape"))
        return self.main(str(self.folder / "list.txt"), *flags)

    def lines(self):
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def rewrite(self, rows):
        self.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def sleep(seconds):
        time.sleep(seconds / 10)

    clock = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=sleep)
    monkeypatch.setattr(compare, "time", clock)
    return Fake(tmp_path)


def cells(printed, name):
    """The cells of a table's row."""
    for line in printed.splitlines():
        found = [cell.strip() for cell in line.split("|")[1:-1]]
        if found and found[0].split(":")[0] == name:
            return found
    raise AssertionError(f"no row {name} in {printed}")


# ---- Lists and grids -----------------------------------------------------------------------------

WRONG_LISTS = {
    "base\n": "wanted NAME: FLAGS",
    "a: --steps=3\n": "wanted base: first",
    "base:\na:\na:\n": "there already",
    "sense: up\nbase:\n": "minus or plus",
    "base: --step=3\n": "line 1, 'base': .*the nearest are --steps",
    "base: --skips='3\n": "line 1, .*quot",
    "base: model=nanogtp\n": "model=nanogtp: wanted record2025, nanogpt",
    "base: patch=none.diff\n": "there is no file .*none.diff",
    "base: patch=../mine.diff\n": "line 1, .*patch=../mine.diff: wanted a file that lies beside",
    "base: patch=/etc/hosts\n": "line 1, .*patch=/etc/hosts: wanted a file that lies beside",
    "base:\ncaf\udce9:\n": "list.txt, line 2: no UTF-8 text",
    "# nothing\n": "no entries",
}
WRONG_COMMANDS = {
    "x --muon_lr=1,": "--muon_lr=",
    "x --log_dir=a": "--log_dir=a is given by compare",
    "x --jobs=0": "wanted a job",
    "x --seeds=a": "--seeds=a",
    "x --data=nowhere": "no shards match",
    "a/b": "a/b: wanted a list's file",
    "nowhere.txt": "nowhere.txt",
    "nowhere.txt -- --steps=3": "--steps=3: in a list",
}


def test_a_wrong_list_or_command_is_one_sentence_with_exit_code_2_before_anything_runs(
    fake, capsys
):
    def refused(words, run):
        assert command(run) == 2
        said = capsys.readouterr().err
        assert re.match(f"error: .*{words}", said) and said.count("\n") == 1
        assert not fake.started

    for text, words in WRONG_LISTS.items():
        refused(words, lambda text=text: fake.list(text))
    for argv, words in WRONG_COMMANDS.items():
        refused(words, lambda argv=argv: fake.main(*argv.split()))


def test_a_list_gives_names_models_and_flags_in_order(tmp_path):
    path = tmp_path / "list.txt"
    text = "sense: plus\n" + LIST + "gpt : model=nanogpt --log_dir='a b'\n"
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))  # as Windows writes it
    entries, common, sense = compare.read_list(path, runs=False)
    assert common == ["--steps=3"] and sense == -1
    assert [(entry.name, entry.model, entry.flags) for entry in entries] == [
        ("base", "", ["--steps=3"]),
        ("no softcap", "", ["--steps=3", "--softcap="]),
        ("gpt", "nanogpt", ["--steps=3", "--log_dir=a b"]),
    ]
    own, baseline = (compare.program_of(entries[i], tmp_path)[1:] for i in (0, 2))
    assert own == ["-P", str(tmp_path / "train.py")]
    assert baseline == ["-P", "-m", "scripts.baselines", "nanogpt"]


def test_a_grid_is_every_combination_and_text_values_are_repeated_flags():
    words = ["--muon_lr=0.01,2e-2", "--stages.end=0.5,1", "--stages.end=0.3,0.6,1", "--smear=0"]
    entries, _, _ = compare.read_grid([*words, "--muon_lr=0.01"], ["--steps=3", "--smear=1"])
    assert [entry.flags for entry in entries] == [
        [f"--muon_lr={lr}", "--smear=0", f"--stages.end={ends}", "--steps=3"]
        for lr in ("0.01", "2e-2")
        for ends in ("0.5,1", "0.3,0.6,1")
    ]


# ---- Running -------------------------------------------------------------------------------------


def test_runs_go_seed_by_seed_and_a_second_invocation_runs_only_what_is_missing(fake, capsys):
    assert fake.list(LIST, "--jobs=1", "--seeds=0,1") == ["base", "no softcap"] * 2
    first, second = fake.lines()[:2]
    assert [row["seed"] for row in fake.lines()] == [0, 0, 1, 1]
    assert second["val"] == [[1, 100, 4.1], [2, 200, 3.1], [3, 300, 2.1]]
    said = {"val_loss": 2.1, "cpu_time_s": 5.0, "params": 77, "flags": "--steps=3 --softcap="}
    said |= {"data": {"train_000000.bin": "abc"}, "processor": "Some CPU @ 2 GHz"}
    assert second == second | said
    assert first["source_sha256"] == hashlib.sha256((ROOT / "train.py").read_bytes()).hexdigest()
    assert fake.list(LIST + "more: --softcap=7,7,0\n", "--seeds=1,0") == ["more", "more"]
    assert not fake.list(LIST.replace("steps=3", "steps=4"), "--seeds=0", "--table")
    assert "warning" not in capsys.readouterr().out
    fake.out.write_text(fake.out.read_text()[:-40])  # by a kill: a line cut short is no line
    assert fake.list(LIST + "more: --softcap=7,7,0\n", "--seeds=0,1") == ["more"]
    for split in ("train", "val"):
        (fake.folder / f"{split}_000000.bin").write_bytes(shard_bytes([1, 2, 3]))
    data = f"--data={fake.folder}"
    assert fake.list(LIST, "--seeds=0", data) == ["base", "no softcap"]  # other data, another run
    assert not fake.list(LIST, "--seeds=0,1")
    assert str(fake.folder) not in fake.out.read_text()


GOOD = {"name": "base", "seed": 0, "key": "k", "val": [], "val_loss": 2.1, "train_time_s": 1}
GOOD |= {"cpu_time_s": 1.5, "params": 7, "devices": "1 x cpu,"}
WRONG_LINES = {  # after a good line and one that a kill cut short
    "my notes": "line 3: no JSON; .*another --out",
    "[1]": "line 3: no result; wanted what a run gave",
    json.dumps(GOOD | {"val_loss": "low"}): 'line 3: val_loss is "low"',
    json.dumps(GOOD | {"val": [[1, 2]]}): r"line 3: val holds \[1, 2\]",
    json.dumps(GOOD | {"cpu_time_s": math.nan}): "line 3: cpu_time_s is NaN",
    json.dumps({"name": "base", "seed": 0, "error": "x"}): "line 3: key is null",
    '{"name": "caf\udce9"}': "line 3: no UTF-8 text",
}


def test_a_strange_line_of_results_is_named_and_its_file_stays_as_it_is(fake):
    for text, words in WRONG_LINES.items():
        before = f'{json.dumps(GOOD)}\n{{"name": "ba\n{text}\n'.encode(errors="surrogateescape")
        fake.out.write_bytes(before)
        for flag in ("--table", "--seeds=0"):
            with pytest.raises(UsageError, match=f"{re.escape(str(fake.out))}, {words}"):
                fake.list(LIST, flag)
        assert fake.out.read_bytes() == before and not fake.started


def test_a_second_comparison_into_one_file_is_refused_while_the_first_runs(fake, monkeypatch):
    said = []
    plain = fake.program

    def program(entry, source):
        with pytest.raises(UsageError) as refused:
            compare.main([str(fake.folder / "list.txt"), f"--out={fake.out}", "--seeds=9"], plain)
        said.append(str(refused.value))
        return plain(entry, source)

    monkeypatch.setattr(fake, "program", program)
    assert fake.list(LIST, "--seeds=0", "--jobs=1") == ["base", "no softcap"]
    assert said == [f"{fake.out}: another comparison adds to it; wait for its end"] * 2
    assert len(fake.lines()) == 2


def test_what_lies_beside_the_results_stays_as_it_is(fake, monkeypatch):
    is_as_it_was = fill(fake.folder / "it's [1] *")
    fake.out = fake.folder / "it's [1] *" / "out.jsonl"
    assert fake.list(LIST, "--seeds=0", "--jobs=1") == ["base", "no softcap"]
    is_as_it_was()
    fake.out = fake.out.with_name("essays.2023.txt")
    with pytest.raises(UsageError, match="line 1: no JSON; .*another --out"):
        fake.list(LIST, "--seeds=0")
    is_as_it_was()


def test_a_failed_run_stays_with_its_error_and_runs_again_only_when_asked(fake, capsys):
    text = LIST + "bad: --steps=13\n"
    for flags, runs in (([], ["base", "no softcap", "bad"]), ([], []), (["--retry"], ["bad"])):
        assert fake.list(text, "--jobs=1", "--seeds=0", *flags) == runs
        printed = capsys.readouterr().out
        assert "failed: bad, seed 0: exit code 5: error: unlucky" in printed
        assert cells(printed, "bad")[1:4] == ["0 (1 failed)", "-", "-"]
    errors = [row.get("error") for row in fake.lines()]
    assert errors == [None, None, *["exit code 5: error: unlucky"] * 2]


def test_a_diff_changes_the_copy_that_its_entry_runs_and_names_the_run(fake, capsys, monkeypatch):
    patch = fake.folder / "mine.diff"
    patch.write_text(DIFF)
    text = "all: --steps=3\nbase:\nother: patch=mine.diff --softcap=\n"
    second_lines = {}
    plain = fake.program

    def program(entry, source):
        assert (source / "scripts/compare.py").exists()
        second_lines[entry.name] = (source / "train.py").read_text().splitlines()[1]
        return plain(entry, source)

    monkeypatch.setattr(fake, "program", program)
    assert fake.list(text, "--seeds=0", "--jobs=1") == ["base", "other"]
    own_line = (ROOT / "train.py").read_text().splitlines()[1]
    assert second_lines == {"base": own_line, "other": "# a changed copy"}
    base, other = fake.lines()
    assert other["source_sha256"] == base["source_sha256"] != other["patched_sha256"]
    patch.write_text(DIFF.replace("changed", "twice changed"))
    assert not fake.list(text, "--seeds=0")  # a run is known by the diff's name
    assert "different diffs" not in capsys.readouterr().out
    assert len(fake.list(text, "--seeds=0,1")) == 2
    assert "warning: the runs of other are of different diffs" in capsys.readouterr().out
    patch.with_name("another.diff").write_text(DIFF.replace("/// script", "nowhere in it"))
    with pytest.raises(UsageError, match="another.diff: does not fit this train.py .*make it anew"):
        fake.list(text.replace("mine", "another"), "--seeds=0")
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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_comparison_keeps_what_has_ended_and_continues(fake, monkeypatch, capsys, sent):
    text = LIST + "slow: --steps=99\nlast: --softcap=2,2,0\n"
    (fake.folder / "list.txt").write_text(text)
    argv = ["compare", str(fake.folder / "list.txt"), "--jobs=1", "--seeds=0", f"--out={fake.out}"]
    there = []

    def program(entry, source):
        if entry.name == "slow":
            there.extend(fake.lines())  # a kill at this instant would leave them
            threading.Timer(0.3, os.kill, (os.getpid(), sent)).start()
        return fake.program(entry, source)

    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(compare.main, "__defaults__", (None, program))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
        assert command(compare.stoppable) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capsys.readouterr().out
    assert "the same command continues" in said and cells(said, "no softcap")[1] == "1"
    assert [row["name"] for row in fake.lines()] == ["base", "no softcap"]
    assert there == fake.lines()
    assert fake.list(text.replace("99", "98"), "--seeds=0", "--jobs=1") == ["slow", "last"]


def test_each_job_has_cores_of_its_own(fake):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("wants two cores to give away")
    says_its_cores = "import os, sys\nprint(*os.sched_getaffinity(0))\nsys.exit(3)"
    (fake.folder / "fake.py").write_text(says_its_cores)
    fake.list(LIST, "--seeds=0", "--jobs=2")
    said = [row["error"].removeprefix("exit code 3: ").split() for row in fake.lines()]
    one, other = (set(map(int, numbers)) for numbers in said)
    assert one | other == cores == os.sched_getaffinity(0) and not one & other


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
    assert cells(capfd.readouterr().out, "base")[2] == f"{base['val_loss']:.4f}"


# ---- The table -----------------------------------------------------------------------------------


def test_differences_errors_and_p_are_those_of_scipy():
    for n in range(2, 12):
        differences = np.random.default_rng(n).normal(0.5, 1, n)
        mean, error = tables.paired(differences)
        assert mean == pytest.approx(differences.mean())
        assert error == pytest.approx(scipy.stats.sem(differences))
        for t in (0.3, -2.0, 4.0, 12.0):
            expected = 2 * scipy.stats.t.sf(abs(t), n - 1)
            assert tables.p_of(t, n - 1) == pytest.approx(expected, rel=2e-3, abs=2e-5)
    assert tables.paired([0.3])[0] == 0.3 and math.isnan(tables.paired([0.3])[1])


def test_an_effect_is_judged_by_the_larger_of_its_own_noise_and_the_lists():
    """Against scipy: one entry among quieter or louder ones, its mean just above or below a bar."""
    for n, others in ((3, 0), (3, 5), (2, 2)):
        noise = np.random.default_rng(n).normal(0, 1, n)
        noise -= noise.mean()
        for loud in (0.1, 10.0):
            rest = {}
            for i in range(others):
                drawn = np.random.default_rng(i + 1).normal(0, 1, n)
                rest[f"other {i}"] = (loud * drawn).tolist()
            df = (n - 1) * (others + 1)
            squares = sum(np.var(own) * n for own in [noise, *rest.values()])
            error = max(scipy.stats.sem(noise), math.sqrt(squares / df / n))
            bar = scipy.stats.t.isf(0.05 / (others + 1) / 2, df) * error
            unseen = "not seen at this scale"
            for share, word in ((1.01, "helps"), (-1.01, "hurts"), (0.99, unseen)):
                verdicts, how = tables.judge({"it": (noise + share * bar).tolist()} | rest)
                assert verdicts["it"] == word, (n, others, loud, share)
                assert f"0.05 / {others + 1}" in how and f"({df} degrees" in how
    verdicts, _ = tables.judge({"it": [1.0, 1.0, 1.0], "once": [5.0], "never": []})  # no noise
    assert verdicts == {"it": "helps", "once": "-", "never": "-"}


def test_the_table_pairs_runs_of_one_seed(fake, capsys):
    """No softcap costs 0.1, 0.2, 0.3, 0.4, a seed 1: only in pairs is that seen."""
    text = f"{LIST}half: --softcap= --log_every=7\n"

    def table(sense, seeds="0,1,2,3"):
        fake.list(f"sense: {sense}\n{text}", f"--seeds={seeds}", "--table")
        return capsys.readouterr().out

    fake.list(text, "--seeds=0,1,2,3")
    error = scipy.stats.sem([0.1, 0.2, 0.3, 0.4])
    for sense, sign, word in (("minus", "+", "helps"), ("plus", "-", "hurts")):
        printed = table(sense)
        assert "Flags of all: `--steps=3`" in printed and "| CPU time / first |" in printed
        gain = f"{sign}0.2500 ± {error:.4f} (n=4)"
        variant = "no softcap: `--softcap=`"
        wanted = [variant, "4", "3.7500", gain, "1.25", "77", word]
        assert cells(printed, "no softcap") == wanted
    # an accelerator works while the CPU waits
    fake.out.write_text(fake.out.read_text().replace("1 x cpu,", "1 x NVIDIA H200,"))
    printed = table("minus")
    assert "| train time / first |" in printed and cells(printed, "no softcap")[4] == "1.00"
    absent = (("base", 0), ("no softcap", 1))
    fake.rewrite(row for row in fake.lines() if (row["name"], row["seed"]) not in absent)
    gain = f"+0.3500 ± {scipy.stats.sem([0.3, 0.4]):.4f} (n=2)"
    assert cells(table("minus", "0,1,2,3,9"), "no softcap")[1:4] == ["3", "3.9333", gain]


def test_a_grid_has_the_best_first_and_is_known_in_any_order(fake, capsys):
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
    longer = fake.main("mine", *grid, "--log_every=7", "--seeds=0", *common)
    assert longer == [f"{other} log_every=7", f"{best} log_every=7"]


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
    assert tables.tokens_to(4.2, tokens, losses) == pytest.approx(18)
    assert tables.tokens_to(6.0, tokens, losses) == 10
    assert tables.tokens_to(1.0, tokens, losses) is None
    line = scipy.interpolate.interp1d(losses[2:], tokens[2:])
    assert tables.tokens_to(3.1, tokens, losses) == pytest.approx(float(line(3.1)))


def test_a_list_of_an_older_train_py_still_gives_its_table_but_does_not_run(capsys):
    path = str(ROOT / "records/ablations/bytes.txt")
    compare.main([path, "--table"])
    row = cells(capsys.readouterr().out, "NorMuon")
    assert row[1:4] == ["3", "1.2307", "+0.0537 ± 0.0183 (n=3)"]
    with pytest.raises(
        UsageError, match="line 5, 'NorMuon': --muon_beta2=0: there is no such flag"
    ):
        compare.main([path])
