"""scripts/gpu_report.py: its errors, its arithmetic, its batches, and tiny runs of both parts. No time is checked."""
import dataclasses
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
from scripts import ablate, gpu_report
from train import ROOT, UsageError

SMALL = ["--num_layers=1", "--skips=", "--late_inputs=", "--backout=", "--offset_layers=", "--long_layers=", "--window_short=16"]

def report(*argv):
    return subprocess.run([sys.executable, "-m", "scripts.gpu_report", *argv], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})

@pytest.mark.parametrize("flags, words", [
    (["--part=x"], "--part"), (["--steps=0"], "more than 0 steps"), (["--micro_tokens=a"], "--micro_tokens=a"),
    (["--minutes=0"], "minutes"), (["--minutes=nan"], "minutes"), (["--stepz=1"], "--stepz"),
    (["--smoke", "--micro_tokens=100"], "--micro_tokens=100: wanted whole rows of --seq_len=32,64"),
    (["--smoke", "--", "--num_layer=1"], "the nearest is --num_layers"), (["--smoke", "--", "--stage_ends=1,0.5"], "rising shares")])
def test_a_wrong_flag_is_an_error_before_anything_is_timed(flags, words, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # what main sets is for its own process
    with pytest.raises(UsageError, match=words):
        gpu_report.main([f"--out={tmp_path}/report", *flags])

@pytest.mark.parametrize("part", ["steps", "ablate"])
def test_without_an_accelerator_nothing_of_full_size_begins_and_the_error_is_one_sentence(part, tmp_path):
    done = report(f"--part={part}", f"--out={tmp_path}/r")
    assert done.returncode == 2 and done.stderr.startswith("error: JAX sees no accelerator") and done.stderr.count("\n") == 1
    assert "jax[cuda13]" in done.stderr and done.stdout == ""

def test_the_list_of_full_size_is_of_configs_that_can_run():
    entries, sense = ablate.read_list(gpu_report.FULL_SIZE)
    for entry in entries:
        cfg = train.Config(**train.PRESETS["speedrun"] | train.parse_flags(entry.flags))
        train.validate(dataclasses.replace(cfg, vocab_size=50257))
        assert train.count_params(train.param_specs(dataclasses.replace(cfg, vocab_size=50257)), dataclasses.replace(cfg, vocab_size=50257)) > 1.2e8
    assert len(entries) >= 6 and sense == 1
    asked = [gpu_report.parse(["--part=ablate", *flags]).proxy for flags in ([], ["--proxy=here"], ["--list=mine.txt"], ["--smoke"])]
    assert asked == ["fineweb10B", "here", None, None]

def test_smoke_times_each_stage_and_writes_text_and_json(tmp_path):
    done = report("--smoke", f"--out={tmp_path / 'new' / 'r'}", "--micro_tokens=128", "--micro_steps=2", "--steps=3", "--", *SMALL,
                  "--batch_tokens=512,256")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/r.txt").read_text() == done.stdout
    result = json.loads((tmp_path / "new/r.json").read_text())
    assert result["devices"] == "1 x cpu" and result["versions"]["jax"] == jax.__version__
    keys = ("micro_tokens", "stage", "seq_len", "tokens", "timed_tokens", "steps")
    assert [[row[key] for key in keys] for row in result["rows"]] == [
        [128, 0, 32, 512, 256, 3], [128, 1, 64, 256, 256, 3]]
    for row in result["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] and row["compile_s"] > 0 and row["compiled_gib"] > 0
        assert row["mfu"] is None and 0 < row["loss"] < 7
    assert "times are scaled from steps of 2 micro-steps" in done.stdout and done.stdout.count("\n") == 7

def test_the_part_ablate_trains_a_list_and_stops_when_the_time_is_up(tmp_path):
    (tmp_path / "list.txt").write_text(f"all: --preset=tiny --steps=2 {' '.join(SMALL)}\nbase: --stage_ends=1 --stage_lr=1 --window_long=0 --seq_len=64 --batch_tokens=512\n")
    ours = ["--part=ablate", "--seeds=0", f"--list={tmp_path / 'list.txt'}", f"--out={tmp_path / 'r'}"]
    done = report(*ours)
    assert done.returncode == 0 and "| base |" in done.stdout, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(row["name"], row["seed"], row["val"][0][0]) for row in result["rows"]] == [("base", 0, 2)]
    (tmp_path / "list.txt").write_text("base: --preset=demo\n")
    done = report(*ours, "--minutes=0.1")  # less than a demo needs
    assert done.returncode == 0 and "0.1 minutes were over" in done.stdout, done.stderr
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 1

def test_times_are_scaled_and_the_mfu_is_that_of_the_definition(monkeypatch):
    monkeypatch.setattr(train, "memory_of", lambda program: 3 << 30)
    cfg = train.Config(vocab_size=50257, bos_id=50256)
    stage, specs, waits = train.stages(cfg)[1]._replace(batch_tokens=4096), train.Model().specs(cfg), iter([0.2, 0.02, 0.06, 0.04])
    def program(state, batch):
        time.sleep(next(waits))
        return state + 1, np.float32(batch)
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", memory_stats=lambda: {"peak_bytes_in_use": 5 << 30})
    mesh = types.SimpleNamespace(devices=np.array([device] * 2), size=2)
    options = []
    lowered = types.SimpleNamespace(compile=lambda compiler_options: options.append(compiler_options) or program)
    listed = {1: ("train_1", types.SimpleNamespace(lower=lambda: lowered), ())}
    compiled = gpu_report.compile_stage(stage, listed, mesh, dataclasses.replace(cfg, deterministic=1))
    assert options == [{"xla_gpu_deterministic_ops": True}] and compiled[0] is program and compiled[1] >= 0
    args, init = types.SimpleNamespace(warmup=1, steps=3), lambda: 0
    row = gpu_report.time_stage(stage, compiled, 8 * 4096, init, [6.0, 7.0], specs, mesh, cfg, args)
    for key, seconds in (("min_ms", 0.02), ("median_ms", 0.04), ("max_ms", 0.06)):
        assert 8e3 * seconds <= row[key] < 8e3 * (seconds + 2)
    assert row["tokens_per_s"] == pytest.approx(8 * 4096 / (row["median_ms"] / 1e3)) and row["steps"] == 3 and row["loss"] == 7.0
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * train.flops_per_token(stage, specs, cfg) / (2 * 989e12))
    assert (row["compiled_gib"], row["peak_gib"]) == (3, 5)
    waits = iter([0.0] * 4)
    with pytest.raises(FloatingPointError, match="the loss after 4 steps is nan"):
        gpu_report.time_stage(stage, compiled, 8 * 4096, init, [6.0, math.nan], specs, mesh, cfg, args)
    broken = types.SimpleNamespace(compile=lambda compiler_options: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")))
    listed = {1: ("train_1", types.SimpleNamespace(lower=lambda: broken), ())}
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE"):
        gpu_report.time_stage(stage, gpu_report.compile_stage(stage, listed, mesh, cfg), 8 * 4096, init, [6.0], specs, mesh, cfg, args)

def test_random_tokens_stand_in_for_missing_shards_and_fill_the_rows_of_each_stage(tmp_path):
    cfg, whole = gpu_report.config(["--preset=speedrun", "--batch_tokens=65536,131072,65536,65536", f"--train_files={tmp_path}/none_*.bin"], 4096, 1)
    assert whole == [65536, 131072, 65536, 65536] and cfg.batch_tokens == ",".join([str(4096 * jax.device_count())] * 4)
    mesh = train.make_mesh()
    batches, cfg = gpu_report.batches_of(cfg, mesh, tmp_path)
    assert cfg.vocab_size == 50257 and set(batches) == {0, 1, 2, 3} and all(len(own) == 2 for own in batches.values())
    for stage in train.stages(cfg):
        tokens = np.asarray(batches[stage.index][0])
        assert tokens.shape == train.batch_shape(stage, mesh.size, cfg) and tokens.max() == 50256 and (tokens != train.NO_TOKEN).all()

def test_a_stage_that_does_not_fit_stays_as_a_row_and_the_others_are_timed(tmp_path, monkeypatch):
    def time_stage(stage, *_):
        if stage.index == 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        return {"tokens": 1, "timed_tokens": 1, "seq_len": 1, "compile_s": 1.0, "median_ms": 1.0, "min_ms": 1.0, "max_ms": 1.0,
                "tokens_per_s": 1e6, "mfu": 0.5, "compiled_gib": 1.0, "peak_gib": 2.0, "loss": 4.0}
    monkeypatch.setattr(gpu_report, "time_stage", time_stage)
    monkeypatch.setattr(gpu_report, "compile_stage", lambda *_: None)
    said, kept, args = [], [], gpu_report.parse(["--smoke", "--micro_tokens=0,128,64", "--", *SMALL])
    def say(text, rows=()):
        said.append(text)
        kept.append(len(rows))
    rows = gpu_report.part_steps(args, say)
    assert [row.get("error") for row in rows] == ["RESOURCE_EXHAUSTED: Out of memory", None] * 3
    assert [row["micro_tokens"] for row in rows] == [64, 64, 128, 128, 0, 0]  # what is known of the peak grows; 0: all at once
    assert kept == [0, 0, *range(1, 7)]  # each is written before the next begins
    assert "RESOURCE_EXHAUSTED" in said[-2] and "1000.0  50.0%" in said[-1] and "2.00" in said[-1]
    args.minutes = 0
    assert gpu_report.part_steps(args, say) == [] and "minutes are over" in said[-1]
