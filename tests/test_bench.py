"""scripts/bench.py: its errors, its shards, its count of waste, and two tiny runs. No time is checked."""
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from scripts.bench import BOS, compare, count_waste, generate_shards, main
from train import ROOT, SPEEDRUN, Shards, Stage, UsageError, make_mesh, open_shards, replace

TINY = ["--", "--num_layers=1", "--compute_dtype=float32", "--model_dim=16", "--num_heads=2", "--head_dim=8", "--mlp_dim=24", "--vocab_size=131", "--skips=",
        "--stages.batch_tokens=64", "--stages.seq_len=32"]

def bench(*argv):
    return subprocess.run([sys.executable, "-m", "scripts.bench", *argv], cwd=ROOT, capture_output=True, text=True, timeout=600)

def test_help_names_the_workloads_and_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for words in ("--only", "--rounds", "--steps", "--core", "--json", "--modded_jax", "--nanogpt", "bench_step.args",
                  "--loader", "--consumes", "--shards", "--shard_tokens"):
        assert words in said

@pytest.mark.parametrize("flag, words", [
    (["--only=stop"], "wanted step, char"), (["--rounds=0"], "at least 1 round"), (["--steps=x"], "--steps"),
    (["--stepz=1"], "--stepz"), (["--nanogpt=/nowhere"], "--nanogpt=/nowhere: no 3adf61e:model.py there"),
    (["--core=9999"], "--core=9999: this process may run on"), (["--consumes=0"], "--consumes=0"),
    (["--loader", "--shards=0"], "--shards=0"), (["--loader", "--", "--stages.seq_len=100"], "--stages.batch_tokens"),
    (["--", "--num_layer=2"], "--num_layer=2:"), (["--", "--compute_dtype=int7"], "int7")])
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
        ("ours float32", turn) for turn in range(2)]
    assert all(row["cpu_ms"] > 0 and row["tokens_per_s"] > 0 and min(row["gflops"]) > 0 for row in rows)
    assert all(len(row["losses"]) == row["round"] + 2 for row in rows)
    assert sum(line.startswith("step  ours") for line in done.stdout.splitlines()) == 2

def test_programs_are_compared_turn_by_turn():
    rows = [{"program": name, "cpu_ms": ms} for name, ms in (("a", 2.0), ("b", 1.0), ("a", 3.0), ("b", 6.0), ("a", 4.0), ("b", 4.0))]
    assert compare(rows, "a", "b") == "a / b: 1.000 of the CPU time (by round: 2.000 0.500 1.000)"

# ---- The host loader ----

def test_generated_shards_have_the_lengths_of_fineweb_and_are_the_same_each_time(tmp_path):
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        generate_shards(folder, 2, 3_000_000)
        made.append(open_shards(f"{folder}/*.bin").tokens)
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (made[0][0] != made[0][1]).any()
    for tokens in made[0]:
        starts = np.flatnonzero(tokens == BOS)
        assert starts[0] == 0 and len(tokens) == 3_000_000 and tokens.max() == BOS
        lengths = np.diff(starts)
        assert np.median(lengths) == pytest.approx(403, rel=0.05) and lengths.mean() == pytest.approx(690, rel=0.08)
        assert 5 < np.mean(tokens == 0) / np.mean(tokens == 9) < 20  # the tenth is a tenth as frequent

def test_the_waste_is_what_a_count_by_hand_says():
    lengths = [20, 5, 9, 3]  # two rows of 8 and a target: 6 (of 20) + 3; 6 (of 9) + 3 (of 5)
    tokens = np.concatenate([np.r_[BOS, np.arange(length - 1)] for length in lengths]).astype(np.uint16)
    cfg = replace(SPEEDRUN, stages=(Stage(1.0, 16, seq_len=8, doc_len=6),), steps=1, bos_id=BOS)
    for num_devices, empty in ((1, 0), (4, 2 / 4)):  # four devices have places for four rows
        assert count_waste(Shards([], [tokens], {}), make_mesh(jax.devices()[:num_devices]), cfg) == {
            "not_trained": 1 - 16 / 37, "empty": empty, "documents": 4, "too_long": 2 / 4, "row_end": 1 / 4, "row_end_tokens": 2 / 2}

def test_a_tiny_run_of_the_loader_prints_and_writes_a_row_for_each_load(tmp_path):
    done = bench("--loader", "--rounds=2", "--shards=2", "--shard_tokens=700000", "--consumes=1000", f"--json={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["doc_len"], row["batch_tokens"]) for row in rows] == [
        (longest, batch) for longest in (896, 2048) for batch in (131072, 262144, 393216)]
    assert all(len(row["turns"]) == 2 and row["times"] == pytest.approx(1e3 * row["median_m"]) for row in rows)
    assert all(row["steps"] * row["batch_tokens"] < 1_400_000 and 0 < row["not_trained"] < 1 for row in rows)
    assert done.stdout.startswith("jax ") and "a projection" not in done.stdout and "times what is consumed" in done.stdout

def test_shards_too_small_for_a_batch_are_an_error():
    done = bench("--loader", "--shard_tokens=60000")
    assert done.returncode == 2 and "--shard_tokens=60000: too few for a batch of 131072" in done.stderr
