"""scripts/bench.py: its errors, and one tiny run. No time is checked."""
import json
import os
import subprocess
import sys

import pytest

from scripts.bench import main
from train import ROOT, UsageError

TINY = ["--", "--num_layers=2", "--model_dim=16", "--num_heads=2", "--head_dim=8", "--mlp_dim=24", "--vocab_size=131", "--skips=",
        "--batch_tokens=64", "--seq_len=32", "--attn_block=32"]

def bench(*argv):
    return subprocess.run([sys.executable, "-m", "scripts.bench", *argv], cwd=ROOT, capture_output=True, text=True, timeout=600)

def test_help_names_the_workloads_and_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for words in ("--only", "--rounds", "--steps", "--core", "--json", "--modded_jax", "--nanogpt", "bench_step.args"):
        assert words in said

@pytest.mark.parametrize("flag, words", [
    (["--only=stop"], "wanted step, char"), (["--rounds=0"], "at least 1 round"), (["--steps=x"], "--steps"),
    (["--stepz=1"], "--stepz"), (["--nanogpt=/nowhere"], "--nanogpt=/nowhere: no 3adf61e:model.py there"),
    (["--core=9999"], "--core=9999: this process may run on"), (["--", "--num_layer=2"], "the nearest is --num_layers"),
    (["--", "--compute_dtype=int7"], "int7")])
def test_a_wrong_flag_is_an_error_before_anything_runs(flag, words):
    with pytest.raises(UsageError, match=words):
        main(flag)

def test_an_error_is_one_sentence_and_exit_code_2():
    done = bench("--json=/nowhere/rows.json")
    assert done.returncode == 2 and "/nowhere/rows.json" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

def test_a_tiny_run_prints_and_writes_a_row_for_each_turn_and_names_the_missing_peer(tmp_path):
    done = bench("--only=step", "--rounds=2", "--steps=1", f"--json={tmp_path / 'rows.json'}", *TINY)
    assert done.returncode == 0, done.stderr
    assert "modded_jax: not run: give --modded_jax=DIR" in done.stdout
    assert "pinned to" in done.stdout if hasattr(os, "sched_setaffinity") else "not pinned" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["program"], row["round"]) for row in rows] == [
        (f"ours {dtype}", turn) for turn in range(2) for dtype in ("bfloat16", "float32")]
    assert all(row["cpu_ms"] > 0 and row["tokens_per_s"] > 0 and min(row["gflops"]) > 0 for row in rows)
    assert all(len(row["losses"]) == row["round"] + 2 for row in rows)
    assert sum(line.startswith("step  ours") for line in done.stdout.splitlines()) == 4
