"""scripts/sweep.py: grids, lists, resuming, and the table. That real runs are run, and kept, is tested in test_ablate.py."""
import os
import signal
import subprocess
import sys
import time

import pytest

from scripts import sweep
from shards import shard_bytes
from test_ablate import FAKE, cells
from train import ROOT, UsageError, parse_flags


@pytest.fixture
def fake(tmp_path):
    """run(flags) -> exit code of main with a program that trains nothing (a loss of 2 + seed, with --softcap= more by
    0.1 (seed + 1); --steps=13 fails). run.started: the flags of each run."""
    (tmp_path / "fake.py").write_text(FAKE)
    def run(*flags):
        run.started.clear()
        def command(entry, source):
            run.started.append(entry.flags)
            return [sys.executable, str(tmp_path / "fake.py")]
        return sweep.main(["mine", f"--out={tmp_path / 'out.jsonl'}", "--jobs=1", *flags], command)
    run.started = []
    return run


# ---- Settings ----

def test_values_of_numbers_have_commas_and_those_of_texts_are_repeated_flags():
    assert sweep.read_grid(["--muon_lr=0.01,2e-2", "--stages.end=0.5,1", "--seed=0,1", "--stages.end=0.3,0.6,1", "--seed=2", "--seed=1",
                            "--skips=((0,2),)", "--skips=", "--smear=0,true", "--num_kv_heads=none,1"]) == {
        "muon_lr": ["0.01", "0.02"], "stages.end": ["0.5,1", "0.3,0.6,1"], "seed": ["0", "1", "2"], "skips": ["((0, 2),)", "()"],
        "smear": ["False", "True"], "num_kv_heads": ["none", "1"]}

def test_a_grid_is_every_combination_and_a_list_is_combined_with_it():
    own, entries = sweep.settings_of([{}], {"muon_lr": ["0.1", "0.2"], "skips": ["()", "((0, 2),)"]}, {"steps": "3"})
    assert [entry.flags for entry in entries] == [
        ["--steps=3", f"--skips={skips}", f"--muon_lr={lr}"] for lr in (0.1, 0.2) for skips in ("()", "((0, 2),)")]
    assert all(parse_flags(entry.flags).muon_lr == float(values["muon_lr"]) for entry, values in zip(entries, own.values(), strict=True))
    points = [{"preset": "demo", "model_dim": "16"}, {"preset": "demo"}]
    own, entries = sweep.settings_of(points, {"muon_lr": ["0.1", "0.2"]}, {})
    assert [*own.values()] == [point | {"muon_lr": lr} for point in points for lr in ("0.1", "0.2")]
    assert all(entry.name == " ".join(entry.flags) for entry in entries)
    assert [*sweep.settings_of([{}], {}, {"steps": "3"})[0]] == ["all alike"]
    with pytest.raises(UsageError, match="--muon_lr: given twice"):
        sweep.settings_of([{"muon_lr": "0.3"}], {"muon_lr": ["0.1", "0.2"]}, {})

def test_a_list_is_a_line_of_flags_each(tmp_path):
    (tmp_path / "points.txt").write_text("# a comment\n--num_layers=2 --skips='((0,1),)'  # small\n\n--num_layers=4\n")
    assert sweep.read_points(tmp_path / "points.txt") == [{"num_layers": "2", "skips": "((0, 1),)"}, {"num_layers": "4"}]

@pytest.mark.parametrize("argv, words", [
    (["--muon_rl=1,2"], "--muon_rl"), (["--muon_lr=1,x"], "--muon_lr"), (["--muon_lr=1,"], "--muon_lr"), (["--seed=x"], "--seed"),
    (["--steps=1,2", "--", "--steps=3"], "--steps: given twice"), (["--log_dir=a"], "--log_dir: given by the script"),
    (["--", "--seed=1"], "--seed: given by the script"), (["--train_files=x"], "--data=DIR"), (["--list=nowhere.txt"], "nowhere.txt"),
    (["--jobs=0"], "at least 1 job"), (["--", "--stps=3"], "--stps"), (["--data=nowhere"], "no shards match")])
def test_wrong_flags_are_one_sentence_before_anything_runs(fake, argv, words):
    with pytest.raises((UsageError, OSError), match=words) as caught:
        fake(*argv)
    assert "\n" not in str(caught.value) and not fake.started

def test_a_list_without_settings_and_a_name_that_is_a_path_are_refused(fake, tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match="no settings"):
        fake(f"--list={tmp_path}/empty.txt")
    done = subprocess.run([sys.executable, "-m", "scripts.sweep", "a/b"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: a/b") and done.stderr.count("\n") == 1


# ---- Running, and the table ----

def test_what_has_run_is_not_run_again_whichever_way_it_is_said(fake, tmp_path, capsys):
    grid, common = ["--softcap=", "--softcap=15,15,0", "--log_every=5,6", "--seed=0"], ["--", "--preset=demo", "--steps=3"]
    assert fake(*grid, *common) == 0 and len(fake.started) == 4
    assert fake(*grid, *common) == 0 and not fake.started
    assert fake("--preset=demo", "--softcap=(15,15,0)", "--softcap=()", *grid[2:][::-1], "--", "--steps=3") == 0 and not fake.started
    assert fake(*grid, "--log_every=7", *common) == 0 and [flags for flags in fake.started if "--log_every=7" not in flags] == []
    assert len(fake.started) == 2
    assert fake(*grid, "--seed=1", *common) == 0 and len(fake.started) == 4
    assert fake(*grid, "--seed=8", "--table", *common) == 0 and not fake.started
    for split in ("train", "val"):
        (tmp_path / f"{split}_000000.bin").write_bytes(shard_bytes([1, 2, 3]))
    capsys.readouterr()
    assert fake(f"--data={tmp_path}", *grid, *common) == 0 and len(fake.started) == 4
    assert f"'--train_files={tmp_path}/*train_*.bin' '--val_files={tmp_path}/*val_*.bin'\n" in capsys.readouterr().out

def test_the_table_has_the_best_first_and_a_difference_to_it_seed_by_seed(fake, capsys):
    """0.1, 0.2 and 0.3 more than the best: 0.2 on average, 0.1 / sqrt 3 its error; the seeds themselves differ by 1."""
    assert fake("--softcap=", "--softcap=9,9,0", "--stages.end=0.5,1", "--seed=0,1,2", "--", "--steps=3") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert lines[0] == "| softcap | stages.end | n | mean val loss | above the best, same seeds | CPU s | parameters |"
    assert cells(out, "(9, 9, 0)") == ["(9, 9, 0)", "0.5,1", "3", "3.0000", "-", "4.0", "77"] and lines[2].startswith("| (9, 9, 0) |")
    assert cells(out, "()") == ["()", "0.5,1", "3", "3.2000", "+0.2000 ± 0.0577", "5.0", "77"] and len(lines) == 4
    assert "Flags of all: `--steps=3`" in out
    assert "The best: python train.py --steps=3 '--softcap=(9, 9, 0)' --stages.end=0.5,1\n" in out + "\n"

def test_a_difference_is_of_the_seeds_that_both_have_and_a_bar_in_a_value_is_no_cell(capsys):
    row = lambda loss: {"val_loss": loss, "cpu_time_s": 1.0, "params": 7}
    rows = {"a": {0: row(1.0), 1: row(1.2)}, "b": {1: row(1.5), 2: row(9.0)}}
    table = sweep.table_of({"a": {"skips": "0|2"}, "b": {"skips": "1"}}, rows, {})
    assert "| 0\\|2 | 2 | 1.1000 | - |" in table and "| 1 | 2 | 5.2500 | +0.3000 | 1.0 | 7 |" in table

def test_what_failed_is_last_with_its_error_and_runs_again_only_when_asked(fake, capsys):
    for flags, runs in (([], 2), ([], 0), (["--retry"], 1)):
        assert fake("--steps=13,3", *flags) == 0 and len(fake.started) == runs
        out = capsys.readouterr().out
        assert cells(out, "13") == ["13", "0 (1 failed)", "-", "-", "-", "-"] and out.index("| 3 |") < out.index("| 13 |")
        assert "failed: --steps=13, seed 0: exit code 5: error: unlucky" in out
    assert fake("--steps=13") == 0 and "The best" not in capsys.readouterr().out

def test_a_stopped_sweep_keeps_what_has_ended_and_continues(fake, tmp_path):
    (tmp_path / "driver.py").write_text("import sys; from scripts import ablate, sweep\n"
                                        f"ablate.run(lambda: sweep.main(command=lambda *_: [sys.executable, '-P', {str(tmp_path / 'fake.py')!r}]))")
    argv = [sys.executable, str(tmp_path / "driver.py"), "mine", "--jobs=1", "--steps=3,99,4", f"--out={tmp_path / 'out.jsonl'}"]
    process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("[1/3]"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in said and cells(said, "3")[1] == "1" and cells(said, "99")[1] == "0"
    assert fake("--steps=3,98,4") == 0 and fake.started == [["--steps=98"], ["--steps=4"]]
