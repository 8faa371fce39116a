"""scripts/ablate.py and scripts/reencode.py: lists, resuming, differences, reach, failures, vocabularies, and one tiny real run."""
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.interpolate
import scipy.stats

from scripts import ablate, reencode
from shards import make_folder, shard_bytes
from train import ROOT, UsageError, open_shards

FAKE = '''
import json, pathlib, sys, time
flags = dict(flag[2:].split("=") for flag in sys.argv[1:] if "=" in flag)
seed, steps = int(flags["seed"]), int(flags.get("steps", 15))
softcap = flags.get("softcap", "on").strip("()")
if steps == 99:
    time.sleep(60)
folder = pathlib.Path(flags["log_dir"]) / "run"
folder.mkdir()
rows = [{"step": i, "tokens": 100 * i, "train_loss": 1, "val_loss": 5 - i + seed + 0.1 * (seed + 1) * (not softcap)} for i in (1, 2, 3)]
last = {key: rows[-1][key] for key in ("step", "tokens", "val_loss")} | {"train_time_s": 2.0, "cpu_time_s": 4.0 + (not softcap)}
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in [*rows, {"step": 4, "train_loss": 1}, last]))
lines = ["data: nothing", "=" * 120, "versions: python=3.11.1 jax=0.10.2 numpy=2.0.0 platform=x processor=Some CPU @ 2 GHz XLA_FLAGS=--xla_a=1", "devices: 1 x cpu, 1 processes",
         "data: train_000000.bin tokens:7 sha256:" + flags.get("data", "abc"), "parameters: 77"]
(folder / "log.txt").write_text("\\n".join(lines))
if steps == 13:
    sys.exit(print("words before") or print("error: unlucky", file=sys.stderr) or 5)
'''
LIST = "all: --steps=3  # short\n\n# a comment: not an entry\nbase:\nno softcap: --softcap=\n"


@pytest.fixture
def fake(tmp_path):
    """run(text of a list, flags) -> exit code of main with a program that trains nothing. Its lines: lines()."""
    (tmp_path / "fake.py").write_text(FAKE)
    started = []
    def command(entry, source):
        assert (source / "train.py").read_bytes() == (ROOT / "train.py").read_bytes()
        started.append(entry.name)
        return [sys.executable, str(tmp_path / "fake.py")]
    def run(text, *flags):
        (tmp_path / "list.txt").write_text(text)
        started.clear()
        return ablate.main([str(tmp_path / "list.txt"), f"--out={tmp_path / 'out.jsonl'}", *flags], command)
    run.started, run.lines = started, lambda: [*map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())]
    return run


def cells(printed, name):
    """The cells of a table's row."""
    return next([*map(str.strip, line.split("|")[1:-1])] for line in printed.splitlines() if line.startswith(f"| {name} |"))


# ---- The list ----

@pytest.mark.parametrize("text, words", [
    ("base\n", "wanted NAME: FLAGS"), ("a: --steps=3\n", "wanted base: first"), ("base:\nall: --steps=3\n", "wanted above the entries"),
    ("base:\na:\na:\n", "there already"), ("sense: up\nbase:\n", "minus or plus"), ("base: --seed=3\n", "--seed=3.* is given by the script"),
    ("all: --log_dir=x\nbase:\n", "--log_dir=x.* is given"), ("base: --step=3\n", "line 1, 'base': .*the nearest is --steps"),
    ("base: --skips='3\n", "line 1"), ("# nothing\n", "no entries")])
def test_a_wrong_list_is_one_sentence_that_names_the_line(tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        ablate.read_list(tmp_path / "list.txt")
    assert "\n" not in str(caught.value)


def test_a_list_gives_names_models_and_flags_in_order(tmp_path):
    (tmp_path / "list.txt").write_text("sense: plus\n" + LIST + "gpt2 : model=gpt2 --whatever='a b'\n")
    assert ablate.read_list(tmp_path / "list.txt") == ([
        ("base", "", ["--steps=3"], ""), ("no softcap", "", ["--steps=3", "--softcap="], ""), ("gpt2", "gpt2", ["--steps=3", "--whatever=a b"], "")], -1)
    entry = ablate.Entry("gpt2", "gpt2", [])
    assert ablate.command(entry, Path("x"))[1:] == ["-P", "-m", "scripts.baselines", "gpt2"]
    assert ablate.command(entry._replace(model=""), Path("x"))[1:] == ["-P", str(Path("x/train.py"))]


DIFF = """--- a/train.py
+++ b/train.py
@@ -1,2 +1,3 @@
 # /// script
+# a changed copy
 # requires-python = ">=3.11"
"""


def test_a_diff_beside_the_list_changes_the_copy_that_its_entry_runs_and_names_the_run(tmp_path, capsys):
    (tmp_path / "mine.diff").write_text(DIFF)
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "list.txt").write_text("all: --steps=3\nbase:\nother: patch=mine.diff --softcap=\n")
    seen, args = {}, [str(tmp_path / "list.txt"), f"--out={tmp_path / 'out.jsonl'}", "--seeds=0"]
    def command(entry, source):
        seen[entry.name] = (source / "train.py").read_text().splitlines()[1], (source / "scripts/ablate.py").exists()
        return [sys.executable, str(tmp_path / "fake.py")]
    assert ablate.main(args, command) == 0 and "| other | `a diff --softcap=` |" in capsys.readouterr().out
    assert seen == {"base": ((ROOT / "train.py").read_text().splitlines()[1], True), "other": ("# a changed copy", True)}
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}  # in the order of their ends
    base, other = rows["base"], rows["other"]
    assert other["source_sha256"] == base["source_sha256"] != other["patched_sha256"] and "patched_sha256" not in base
    assert base["source_sha256"] == hashlib.sha256((ROOT / "train.py").read_bytes()).hexdigest()
    (tmp_path / "mine.diff").write_text(DIFF.replace("changed", "twice changed"))
    seen.clear()
    assert ablate.main(args, command) == 0 and not seen  # a run is known by the diff's name, as by that of a flag
    assert "of different diffs" not in capsys.readouterr().out
    assert ablate.main([*args, "--seeds=0,1"], command) == 0 and "warning: the runs of other are of different diffs" in capsys.readouterr().out
    seen.clear()
    (tmp_path / "mine.diff").rename(tmp_path / "another.diff")
    (tmp_path / "list.txt").write_text("all: --steps=3\nbase:\nother: patch=another.diff --softcap=\n")
    assert ablate.main(args, command) == 0 and [*seen] == ["other"]


def test_a_diff_that_does_not_fit_or_is_not_there_ends_in_one_sentence_before_anything_runs(tmp_path):
    (tmp_path / "list.txt").write_text("base:\nother: patch=mine.diff\n")
    def nothing(entry, source):
        raise AssertionError("ran")
    with pytest.raises(UsageError, match="line 2, 'other': there is no file .*mine.diff"):
        ablate.main([str(tmp_path / "list.txt"), f"--out={tmp_path / 'out.jsonl'}"], nothing)
    (tmp_path / "mine.diff").write_text(DIFF.replace("/// script", "nowhere in it"))
    with pytest.raises(UsageError, match="mine.diff: does not fit this train.py .*make it anew"):
        ablate.main([str(tmp_path / "list.txt"), f"--out={tmp_path / 'out.jsonl'}"], nothing)


def test_a_list_of_an_older_train_py_still_gives_its_table_but_does_not_run(capsys):
    path = str(ROOT / "records/ablations/bytes.txt")
    assert ablate.main([path, "--table"]) == 0
    assert cells(capsys.readouterr().out, "NorMuon")[2:5] == ["3", "1.2307", "+0.0537 ± 0.0183 (n=3)"]
    with pytest.raises(UsageError, match="line 5, 'NorMuon': --muon_beta2=0: there is no such flag"):
        ablate.main([path])


def test_wrong_flags_and_a_missing_list_end_with_exit_code_2():
    for argv, words in ((["nowhere.txt"], "nowhere.txt"), (["x", "--jobs=0"], "at least 1 job"), (["x", "--seeds=a"], "--seeds=a")):
        done = subprocess.run([sys.executable, "-m", "scripts.ablate", *argv], cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


# ---- Running ----

def test_runs_go_seed_by_seed_and_a_second_invocation_runs_only_what_is_new(fake, capsys):
    assert fake(LIST, "--jobs=1", "--seeds=0,1") == 0
    assert [(row["seed"], row["name"]) for row in fake.lines()] == [(s, name) for s in (0, 1) for name in ("base", "no softcap")]
    assert fake.lines()[1]["val"] == [[1, 100, 4.1], [2, 200, 3.1], [3, 300, 2.1]]
    assert fake.lines()[1] | {"val_loss": 2.1, "cpu_time_s": 5.0, "params": 77, "flags": "--steps=3 --softcap=",
                              "data": {"train_000000.bin": "abc"}} == fake.lines()[1]
    assert fake(LIST, "--seeds=0,1") == 0 and not fake.started
    assert fake(LIST + "more: --softcap=7,7,0\n", "--seeds=1,0") == 0 and fake.started == ["more", "more"]
    assert fake(LIST + "more: --softcap=8,8,0\nother: --softcap=9,9,0\n", "--seeds=0", "--only=other") == 0 and fake.started == ["other"]
    assert fake(LIST + "more, by far: --softcap=8,8,0\nother: --softcap=9,9,0\n", "--seeds=5", "--only=more, by far", "--only=base,other") == 0
    assert fake.started == ["base", "more, by far", "other"]
    assert fake(LIST.replace("steps=3", "steps=4"), "--seeds=0", "--table") == 0 and not fake.started
    with pytest.raises(UsageError, match="no entry nobody"):
        fake(LIST, "--only=nobody")
    assert "warning" not in capsys.readouterr().out


def test_a_failed_run_stays_as_a_line_with_its_error_and_runs_again_only_when_asked(fake, capsys):
    text = LIST + "bad: --steps=13\n"
    for flags, runs in (([], ["base", "no softcap", "bad"]), ([], []), (["--retry"], ["bad"])):
        assert fake(text, "--jobs=1", "--seeds=0", *flags) == 0
        printed = capsys.readouterr().out
        assert fake.started == runs and "failed: bad, seed 0: exit code 5: error: unlucky" in printed
        assert cells(printed, "bad")[2:5] == ["0 (1 failed)", "-", "-"]
    assert [row.get("error") for row in fake.lines()] == [None, None] + ["exit code 5: error: unlucky"] * 2


def test_pairs_of_two_kinds_of_cpu_are_warned_of(fake, capsys, tmp_path):
    assert fake(LIST, "--seeds=0,1") == 0 and "no pair" not in capsys.readouterr().out
    rows = fake.lines()
    assert [row["processor"] for row in rows] == 4 * ["Some CPU @ 2 GHz"]
    for row in rows:
        row["processor"] = {("base", 0): "A", ("no softcap", 0): "A", ("base", 1): "A", ("no softcap", 1): "B"}[row["name"], row["seed"]]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fake(LIST, "--seeds=0,1", "--table") == 0
    assert [line for line in capsys.readouterr().out.split("\n") if "no pair" in line] == ["warning: no softcap, seed 1, ran on B, base on A: no pair"]


def test_lines_of_another_train_py_are_warned_of_and_run_again_on_demand(fake, capsys, tmp_path):
    fake(LIST, "--seeds=0")
    lines = fake.lines()
    lines[0]["source_sha256"] = "another"
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fake(LIST, "--seeds=0") == 0 and "warning: these runs are of 2 different sources of train.py" in capsys.readouterr().out
    assert fake(LIST, "--seeds=0", "--same_source") == 0 and fake.started == [lines[0]["name"]]
    assert "warning" not in capsys.readouterr().out


def test_a_line_cut_short_is_no_line_and_other_data_are_another_run(fake, tmp_path):
    fake(LIST, "--seeds=0", "--jobs=1")
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(text[:-40])
    assert fake(LIST, "--seeds=0") == 0 and fake.started == ["no softcap"]
    assert fake(LIST, "--seeds=0") == 0 and not fake.started
    for split in ("train", "val"):
        (tmp_path / f"{split}_000000.bin").write_bytes(shard_bytes([1, 2, 3]))
    assert fake(LIST, "--seeds=0", f"--proxy={tmp_path}") == 0 and fake.started == ["base", "no softcap"]
    assert str(tmp_path) not in (tmp_path / "out.jsonl").read_text()
    with pytest.raises(UsageError, match="no shards match"):
        fake(LIST, f"--proxy={tmp_path}/none")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_list_keeps_what_has_ended_and_continues(fake, tmp_path, sent):
    text = LIST + "slow: --steps=99\nlast: --softcap=2,2,0\n"
    (tmp_path / "list.txt").write_text(text)
    (tmp_path / "driver.py").write_text("import signal, sys; from scripts import ablate; [signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)]\n"
                                        f"sys.exit(ablate.main(sys.argv[1:], lambda *_: [sys.executable, '-P', {str(tmp_path / 'fake.py')!r}]))")
    argv = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "list.txt"), "--jobs=1", "--seeds=0", f"--out={tmp_path / 'out.jsonl'}"]
    process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("[2/4]"):
            break
    time.sleep(0.5)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=120)
    if sent != signal.SIGKILL:
        assert process.returncode == 130 and "interrupted" in said and cells(said, "no softcap")[2] == "1"
    assert [row["name"] for row in fake.lines()] == ["base", "no softcap"]
    assert fake(text.replace("99", "98"), "--seeds=0", "--jobs=1") == 0 and fake.started == ["slow", "last"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="wants two cores to give away")
def test_each_job_has_cores_of_its_own(fake, tmp_path):
    (tmp_path / "fake.py").write_text("import os, sys, time; time.sleep(0.5); print(*os.sched_getaffinity(0)); sys.exit(3)")
    cores = os.sched_getaffinity(0)
    fake(LIST, "--seeds=0")
    shares = [set(map(int, re.search("exit code 3: (.*)", row["error"])[1].split())) for row in fake.lines()]
    assert shares[0] | shares[1] == cores and not shares[0] & shares[1] and os.sched_getaffinity(0) == cores


def test_a_tiny_real_list_trains_and_compares(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles sooner
    make_folder(tmp_path / "data")
    (tmp_path / "mine.diff").write_text(DIFF)
    (tmp_path / "real.txt").write_text(
        "all: --preset=demo --steps=4 --val_every=2 --num_layers=1 --model_dim=32 --num_heads=2 --head_dim=16 --mlp_dim=64 --skips= --backout= "
        "--offset_layers= --stages.end=1 --stages.batch_tokens=512 --stages.seq_len=64 --val.seq_len=64 --val_context=32 --val_tokens=1024\n"
        "base:\nlong: --val_tokens=999999999\nchanged: patch=mine.diff\n")
    assert ablate.main([str(tmp_path / "real.txt"), "--seeds=1", f"--out={tmp_path / 'real.jsonl'}", f"--proxy={tmp_path}/data", "--reach=base"]) == 0
    printed = capfd.readouterr().out
    lines = {row["name"]: row for row in map(json.loads, (tmp_path / "real.jsonl").read_text().splitlines())}
    base, source = lines["base"], (ROOT / "train.py").read_bytes()
    assert [row[:2] for row in base["val"]] == [[2, 1024], [4, 2048]] and base["val"][-1][2] == base["val_loss"] < math.log(257)
    assert base["params"] > 257 * 32 and base["cpu_time_s"] > 0 and base["source_sha256"] == hashlib.sha256(source).hexdigest()
    assert set(base["data"]) == {"train_000000.bin", "train_000001.bin", "val_000000.bin"} and base["versions"]["jax"] == jax.__version__
    assert lines["changed"]["val"] == base["val"]  # the diff is a comment
    assert lines["long"]["error"].startswith("exit code 2: error: ") and cells(printed, "base")[3] == f"{base['val_loss']:.4f}"


# ---- The table ----

@pytest.mark.parametrize("n", range(2, 12))
def test_differences_errors_and_p_are_those_of_scipy(n):
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    mean, error = ablate.paired(differences)
    assert mean == pytest.approx(differences.mean()) and error == pytest.approx(scipy.stats.sem(differences))
    for t in (0.3, -2.0, 4.0, 12.0):
        assert ablate.p_of(t, n - 1) == pytest.approx(2 * scipy.stats.t.sf(abs(t), n - 1), rel=2e-3, abs=2e-5)
    assert ablate.paired([0.3])[0] == 0.3 and math.isnan(ablate.paired([0.3])[1]) and math.isnan(ablate.paired([])[0])


@pytest.mark.parametrize("n, others", [(3, 0), (3, 1), (3, 14), (2, 5), (8, 0)])
def test_an_effect_is_judged_by_the_larger_of_its_own_noise_and_the_lists(n, others):
    """Against scipy: one entry of given noise among others that are quieter or louder, its mean just above and below the bar."""
    noise = np.random.default_rng(n).normal(0, 1, n)
    noise -= noise.mean()
    for loud in (0.1, 10.0):
        rest = {f"other {i}": (loud * np.random.default_rng(i + 1).normal(0, 1, n)).tolist() for i in range(others)}
        df = (n - 1) * (others + 1)
        squares = sum(np.sum((np.array(own) - np.mean(own)) ** 2) for own in [noise, *rest.values()])
        error = max(scipy.stats.sem(noise), math.sqrt(squares / df / n))
        bar = scipy.stats.t.isf(0.05 / (others + 1) / 2, df) * error
        for share, word in ((1.01, "helps"), (-1.01, "hurts"), (0.99, "not seen at this scale"), (-0.99, "not seen at this scale")):
            words, how = ablate.judge({"it": (noise + share * bar).tolist()} | rest)
            assert words["it"] == word and f"0.05 / {others + 1}" in how and f"({df} degrees" in how, (loud, share)
    words, _ = ablate.judge({"it": [1.0, 1.0, 1.0], "once": [5.0], "never": []})  # no noise at all
    assert words == {"it": "helps", "once": "-", "never": "-"} and ablate.judge({"once": [5.0]})[0] == {"once": "-"}


@pytest.mark.parametrize("sense, sign, word", [("minus", "+", "helps"), ("plus", "-", "hurts")])
def test_the_table_pairs_runs_of_one_seed(fake, capsys, tmp_path, sense, sign, word):
    """A seed moves the fake's loss by 1, no softcap by 0.1, 0.2, 0.3, 0.4: only in pairs is that seen."""
    text = f"sense: {sense}\n" + LIST
    fake(text, "--seeds=0,1,2,3", "--only=base")
    capsys.readouterr()
    fake(text + "half: --softcap= --log_every=7\n", "--seeds=0,1,2,3")
    expected = scipy.stats.sem([0.1, 0.2, 0.3, 0.4])
    printed = capsys.readouterr().out
    assert "Flags of all: `--steps=3`" in printed and cells(printed, "base")[1] == ""
    assert cells(printed, "no softcap") == ["no softcap", "`--softcap=`", "4", "3.7500", f"{sign}0.2500 ± {expected:.4f} (n=4)", "1.25", "77", word]
    assert "| CPU time / base |" in printed
    out = tmp_path / "out.jsonl"  # an accelerator works while the CPU waits
    out.write_text(out.read_text().replace("1 x cpu,", "1 x NVIDIA H200,"))
    fake(text + "half: --softcap= --log_every=7\n", "--seeds=0,1,2,3", "--table")
    printed = capsys.readouterr().out
    assert "| train time / base |" in printed and cells(printed, "no softcap")[5] == "1.00"


def test_pairs_are_of_the_seeds_that_both_have(fake, capsys, tmp_path):
    fake(LIST, "--seeds=0,1,2,3")
    lines = [line for line in fake.lines() if (line["name"], line["seed"]) not in (("base", 0), ("no softcap", 1))]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    fake(LIST, "--seeds=0,1,2,3,9", "--table")
    assert cells(capsys.readouterr().out, "no softcap")[2:5] == ["3", "3.9333", f"+0.3500 ± {scipy.stats.sem([0.3, 0.4]):.4f} (n=2)"]


def test_reach_is_where_the_mean_curve_crosses(fake, capsys):
    """By hand: at 300 tokens base is at 2.5 (seeds 0, 1); no softcap is at 3.15 and 2.65 above it: not reached."""
    assert fake(LIST, "--seeds=0,1", "--reach=no softcap") == 0  # its end: 2.65, between base's 3.5 (200) and 2.5 (300)
    printed = capsys.readouterr().out.split("tokens to 2.6500")[1]
    assert cells(printed, "base") == ["base", "285", "0.950"] and cells(printed, "no softcap") == ["no softcap", "300", "1.000"]
    fake(LIST, "--table", "--seeds=0,1", "--reach=base")
    assert cells(capsys.readouterr().out.split("tokens to 2.5000")[1], "no softcap")[1:] == ["not reached", "-"]
    with pytest.raises(UsageError, match="--reach=nobody"):
        fake(LIST, "--table", "--reach=nobody")
    tokens, losses = [10, 20, 40, 80], [5.0, 4.0, 4.5, 2.0]  # up again in between: the first crossing counts
    assert ablate.tokens_to(4.2, tokens, losses) == pytest.approx(18) and ablate.tokens_to(6.0, tokens, losses) == 10
    assert ablate.tokens_to(1.0, tokens, losses) is None
    line = scipy.interpolate.interp1d(losses[2:], tokens[2:])
    assert ablate.tokens_to(3.1, tokens, losses) == pytest.approx(float(line(3.1)))


# ---- Another vocabulary ----

def made_up_bpe(folder):
    """A GPT-2 like vocabulary: single bytes, some pairs, the BOS last. Returns the bytes of each id."""
    shown = {i: chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]}  # of the published encoder.py
    for i in range(256):
        shown.setdefault(i, chr(256 + len([j for j in range(i) if j not in range(33, 127) and j not in range(161, 173) and j < 174])))
    pieces = [bytes([i]) for i in range(256)] + [b"th", b" the", b"\xc3\xa9", b"\n\n"]
    (folder / "encoder.json").write_text(json.dumps({"".join(map(shown.get, piece)): i for i, piece in enumerate(pieces)} | {"<|endoftext|>": 260}))
    return [*pieces, b""]


def test_reencoded_shards_hold_the_same_documents(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r scripts/requirements.txt")
    pieces, rng, old = made_up_bpe(tmp_path), np.random.default_rng(0), tmp_path / "old"
    words = ["the", " the", " hé", " thin", "\n\n", " 中文 ", "\t", " é", "<|endoftext|>", " x\x00", " 😀"]
    def tokens(num_docs):
        docs = ["".join(rng.choice(words, 60)) for _ in range(num_docs)]
        return docs, np.concatenate([[260, *text.encode().replace(b" the", b"\xff")] for text in docs])
    documents = {}
    old.mkdir()
    (old / "meta.json").write_text('{"tokenizer": "made up", "vocab_size": 261, "bos_id": 260}')
    for name, num_docs in (("proxy_train_000001", 20), ("proxy_train_000002", 15), ("proxy_val_000000", 9)):
        documents[name], ids = tokens(num_docs)
        (old / f"{name}.bin").write_bytes(shard_bytes(np.where(ids == 255, 257, ids)))
    ends = []
    for out in (tmp_path / "new", tmp_path / "again"):
        ablate.main(["reencode", str(old), str(out), f"--bpe={tmp_path}", "--vocab=300", "--sample=10"])
        ends.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert ends[0] == ends[1] and set(ends[0]) == {"train_000000.bin", "train_000001.bin", "val_000000.bin", "tokenizer.json", "meta.json"}
    tokenizer, table = tokenizers.Tokenizer.from_file(str(tmp_path / "new/tokenizer.json")), reencode.gpt2_bytes(tmp_path)
    assert table == pieces
    for split, names in (("train", ["proxy_train_000001", "proxy_train_000002"]), ("val", ["proxy_val_000000"])):
        new = open_shards(f"{tmp_path}/new/{split}_*.bin")
        assert new.meta == {"tokenizer": "tokenizer.json", "vocab_size": 300, "bos_id": 0}
        for name, ids, before in zip(names, new.tokens, open_shards(f"{old}/*{split}_*.bin").tokens, strict=True):
            assert ids.max() < 300 and ids[0] == 0 and len(ids) < len(before)
            texts = [tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in np.split(ids, np.flatnonzero(ids == 0))[1:]]
            assert [text.removeprefix("<|endoftext|>") for text in texts] == documents[name] == [*reencode.texts_of(before, table, 260)]
    printed, total = capsys.readouterr().out, sum(len(text.encode()) for text in documents["proxy_val_000000"])
    assert f"val_000000.bin: {len(new.tokens[0])} tokens for {len(before)}, {total / len(new.tokens[0]):.3f} bytes per token" in printed
    ablate.main(["reencode", str(old), str(tmp_path / "few"), f"--bpe={tmp_path}", "--vocab=300", "--sample=10", "--tokens=1e2"])
    few = open_shards(f"{tmp_path}/few/train_*.bin").tokens
    assert [len(ids) for ids in few] == [100] and few[0].tolist() == open_shards(f"{tmp_path}/new/train_*.bin").tokens[0][:100].tolist()


def test_a_document_cut_by_the_end_of_a_shard_is_still_text():
    table = [bytes([i]) for i in range(256)] + [b""]
    assert [*reencode.texts_of(np.array([0xa9, 97, 256, 98, 0xc3]), table, 256)] == ["\ufffda", "b\ufffd"]


def test_reencode_says_what_it_lacks(tmp_path, monkeypatch):
    made_up_bpe(tmp_path)
    (tmp_path / "train_1.bin").write_bytes(shard_bytes([1, 2]))
    (tmp_path / "val_1.bin").write_bytes(shard_bytes([1, 2]))
    ours = ["reencode", str(tmp_path), f"{tmp_path}/new", f"--bpe={tmp_path}"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(UsageError, match="pip install -r scripts/requirements.txt"):
            ablate.main(ours)
    with pytest.raises(UsageError, match="--vocab=9"):
        ablate.main([*ours, "--vocab=9"])
    pytest.importorskip("tokenizers", reason="pip install -r scripts/requirements.txt")
    with pytest.raises(UsageError, match="a vocabulary of 50257, but .* has 261"):
        ablate.main(ours)
    (tmp_path / "meta.json").write_text('{"tokenizer": "made up", "vocab_size": 261, "bos_id": 260}')
    with pytest.raises(UsageError, match="holds train_1.bin"):
        ablate.main(["reencode", str(tmp_path), str(tmp_path), f"--bpe={tmp_path}"])
    with pytest.raises((UsageError, OSError), match="encoder.json"):
        ablate.main([*ours[:-1], "--bpe=nowhere"])
