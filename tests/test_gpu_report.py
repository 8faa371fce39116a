"""scripts/gpu_report.py: its errors, its arithmetic, its batches, and a tiny run. No time is checked."""
import json
import math
import os
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

import train
from scripts import gpu_report
from train import ROOT, UsageError

SMALL = ["--num_layers=1", "--skips=", "--late_inputs=", "--backout=", "--offset_layers=",
         "--long_layers=", "--stages.short=16"]


def report(*argv):
    fast = {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run([sys.executable, "-m", "scripts.gpu_report", *argv], cwd=ROOT,
                          capture_output=True, text=True, timeout=600, env=os.environ | fast)


@pytest.mark.parametrize("flags, words", [
    (["--steps=0"], "more than 0 steps"), (["--micro_tokens=a"], "--micro_tokens=a"),
    (["--minutes=nan"], "minutes"), (["--stepz=1"], "--stepz"),
    (["--smoke", "--micro_tokens=100"], "--micro_tokens=100"),
    (["--smoke", "--", "--num_layer=1"], "--num_layer=1:")])
def test_a_wrong_flag_is_an_error_before_anything_is_timed(flags, words, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # main's are for its own process
    with pytest.raises(UsageError, match=words):
        gpu_report.main([f"--out={tmp_path}/report", *flags])


def test_without_an_accelerator_nothing_of_full_size_begins(tmp_path):
    done = report(f"--out={tmp_path}/r")
    assert done.returncode == 2 and done.stderr.startswith("error: JAX sees no accelerator")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_smoke_times_each_stage_and_writes_text_and_json(tmp_path):
    done = report("--smoke", f"--out={tmp_path / 'new' / 'r'}", "--micro_tokens=128", "--micro_steps=2",
                  "--steps=3", "--", *SMALL, "--stages.batch_tokens=512,256")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/r.txt").read_text() == done.stdout
    result = json.loads((tmp_path / "new/r.json").read_text())
    assert result["devices"] == "1 x cpu" and result["versions"]["jax"] == jax.__version__
    keys = ("micro_tokens", "stage", "seq_len", "tokens", "timed_tokens", "steps")
    assert [[row[key] for key in keys] for row in result["rows"]] == [
        [128, 0, 32, 512, 256, 3], [128, 1, 64, 256, 256, 3]]
    for row in result["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] and row["compile_s"] > 0
        assert row["compiled_gib"] > 0 and row["mfu"] is None and 0 < row["loss"] < 7
    assert "times are scaled from steps of 2 micro-steps" in done.stdout


def test_times_are_scaled_and_the_mfu_is_that_of_the_definition(monkeypatch):
    monkeypatch.setattr(train, "memory_of", lambda program: 3 << 30)
    monkeypatch.setattr(train, "peak_flops", lambda: 2 * 989e12)
    cfg = train.replace(train.SPEEDRUN, vocab_size=50257, bos_id=50256)
    stage, specs = train.replace(cfg.stages[1], batch_tokens=4096), train.GPT.specs(cfg)
    waits = iter([0.2, 0.02, 0.06, 0.04])

    def program(state, batch):
        time.sleep(next(waits, 0))
        return state + 1, np.float32(batch)

    args = types.SimpleNamespace(warmup=1, steps=3)
    numbers = 8 * 4096, lambda: 0
    row = gpu_report.time_stage(stage, (program, 0.1), *numbers, [6.0, 7.0], specs, cfg, args)
    for key, seconds in (("min_ms", 0.02), ("median_ms", 0.04), ("max_ms", 0.06)):
        assert 8e3 * seconds <= row[key] < 8e3 * (seconds + 2)
    assert row["tokens_per_s"] == pytest.approx(8 * 4096 / (row["median_ms"] / 1e3))
    flops = row["tokens_per_s"] * train.flops_per_token(stage, specs, cfg)
    assert row["mfu"] == pytest.approx(flops / (2 * 989e12))
    assert (row["compiled_gib"], row["steps"], row["loss"]) == (3, 3, 7.0)
    with pytest.raises(train.NonFiniteLoss, match="the loss after 4 steps is nan"):
        gpu_report.time_stage(stage, (program, 0.1), *numbers, [6.0, math.nan], specs, cfg, args)


def test_random_tokens_stand_in_for_missing_shards_and_fill_the_rows_of_each_stage(tmp_path):
    flags = ["--preset=speedrun", "--stages.batch_tokens=65536,131072,65536,65536"]
    cfg, whole = gpu_report.config([*flags, f"--train_files={tmp_path}/none_*.bin"], 4096, 1)
    assert whole == [65536, 131072, 65536, 65536]
    assert {stage.batch_tokens for stage in cfg.stages} == {4096 * jax.device_count()}
    mesh = train.make_mesh()
    batches, cfg = gpu_report.batches_of(cfg, mesh, tmp_path)
    assert cfg.vocab_size == 50257 and [len(own) for own in batches] == [2] * 4
    for stage, own in zip(cfg.stages, batches, strict=True):
        tokens = np.asarray(own[0]["tokens"])
        assert tokens.shape == train.batch_shape(stage, mesh.size, cfg)
        assert tokens.max() == 50256 and (tokens != train.NO_TOKEN).all()


def test_a_stage_that_does_not_fit_stays_as_a_row_and_the_others_are_timed(monkeypatch):
    def time_stage(stage, *_):
        if stage.seq_len == 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        names = "compile_s median_ms min_ms max_ms compiled_gib peak_gib loss"
        return dict.fromkeys(names.split(), 1.0) | {
            "tokens": 1, "timed_tokens": 1, "seq_len": 1, "tokens_per_s": 1e6, "mfu": 0.5}

    monkeypatch.setattr(gpu_report, "time_stage", time_stage)
    monkeypatch.setattr(gpu_report, "compile_step", lambda *_: None)
    said, kept = [], []
    args = gpu_report.parse(["--smoke", "--micro_tokens=65536,64", "--", *SMALL])

    def say(text, rows=()):
        said.append(text)
        kept.append(len(rows))

    rows = gpu_report.time_steps(args, say)
    assert [row.get("error") for row in rows] == ["RESOURCE_EXHAUSTED: Out of memory", None] * 2
    assert [row["micro_tokens"] for row in rows] == [64, 64, 65536, 65536]  # the peak grows
    assert kept == [0, 0, *range(1, 5)]  # each is written before the next begins
    assert "RESOURCE_EXHAUSTED" in said[-2] and "1000.0  50.0%" in said[-1]
    args.minutes = 0
    assert gpu_report.time_steps(args, say) == [] and "minutes are over" in said[-1]
