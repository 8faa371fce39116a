"""scripts/bench.py: its errors, its arithmetic, and tiny runs of each kind. No time is checked."""

import glob
import importlib.util
import json
import math
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import train
from scripts import attention, bench
from scripts.dry_run.hlo import Module
from train import ROOT, UsageError

TINY = [
    *("--num_layers=1", "--compute_dtype=float32", "--model_dim=16", "--num_heads=2"),
    *("--head_dim=8", "--mlp_dim=24", "--vocab_size=131", "--skips=", "--late_inputs="),
    *("--stages.seq_len=32", "--stages.batch_tokens=64"),
]
SMALL = [
    f"@{ROOT}/scripts/presets/tiny.args",
    *("--num_layers=1", "--skips=", "--late_inputs=", "--backout=", "--offset_layers="),
    *("--long_layers=", "--stages.short=16", "--stages.batch_tokens=512,256"),
]
PEER = """
import dataclasses
import jax
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Config:
    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    dtype: str
    batch_size: int
    micro_batch_size: int
    min_sequence_length: int
    max_sequence_length: int
    sequence_warmup_intervals: int
    n_train_iters: int

class Optimizer:
    pass

def get_mesh(config):
    return jax.make_mesh((1,), ("data",))

def init_params(config, mesh):
    return jnp.zeros(config.vocab_size), jnp.float32(config.batch_size)

def init_optimizer(config, params, mesh):
    return Optimizer(), jnp.int32(0)

def train_step(config, params, tables, opt_state, optimizer, x, y):
    assert x.shape == y.shape == (1, config.batch_size, config.max_sequence_length)
    return params, opt_state + 1, {"loss": tables + opt_state}
"""


def run(*argv):
    fast = {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    argv = [sys.executable, "-m", "scripts.bench", *argv]
    environment = os.environ | fast
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment)


def rows_of(tmp_path, *argv):
    """(rows, what was printed)."""
    done = run(f"--json={tmp_path / 'rows.json'}", *argv)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "rows.json").read_text()), done.stdout


def test_a_wrong_flag_is_an_error_before_anything_is_timed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no shards are
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # main's are for its own process
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for argv, words in (
        (["--steps=0"], "--steps=0"),
        (["--stepz=1"], "--stepz"),
        (["--micro_tokens=a"], "--micro_tokens=a: wanted numbers"),
        (["--nanogpt=/nowhere"], "--nanogpt=/nowhere: holds no model.py"),
        (["--shard_tokens=0"], "--shard_tokens=0"),
        (["--torch", "--trace=there"], "--trace is of the stages alone; leave it out, or --torch"),
        (["--", "--num_layer=2"], "--num_layer=2:"),
        (["--torch"], "--torch: wanted PyTorch: pip install torch"),
        (
            ["--attention", "--", *SMALL, "--train_files=no_*.bin"],
            "--attention: wanted a GPU or a TPU",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            bench.main(argv)


@pytest.mark.system
def test_each_stage_is_a_row_of_times_and_memory(tmp_path):
    flags = ["--micro_tokens=128", "--steps=3", f"--trace={tmp_path}", "--", *SMALL]
    rows, printed = rows_of(tmp_path, *flags)
    shapes = [(row["micro_tokens"], row["stage"], row["seq_len"], row["tokens"]) for row in rows]
    assert shapes == [(128, 0, 32, 512), (128, 1, 64, 256)]
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] and row["compile_s"] > 0
        assert row["compiled_gib"] > 0 and row["mfu"] is None and 0 < row["loss"] < 7
        assert row["ahead_ms"] > 0 and row["kernels"] is None  # those of a GPU
        assert row["trace"][0].startswith("3 steps traced: ") and "fusion" in str(row["trace"])
        assert bench.line_of(row) in printed
    assert "1 x cpu" in printed and f"jax={jax.__version__}" in printed


def test_times_are_medians_and_the_mfu_is_that_of_the_definition(monkeypatch):
    monkeypatch.setattr(train, "memory_of", lambda program: 3 << 30)
    monkeypatch.setattr(train, "peak_flops", lambda: 2 * 989e12)
    cfg = train.replace(train.SPEEDRUN, vocab_size=50257, bos_id=50256)
    stage = train.replace(cfg.stages[1], batch_tokens=4096 * jax.device_count())
    now = [0.0]
    device = {"free": 0.0}
    # of the device; the first two are not counted, the last four are not waited for one by one
    seconds = iter([9.0, 9.0, 0.01, 0.08, 0.03, 9.0, 0.02, 0.03, 0.04])
    losses = iter([9.0, 8.5, 8.0, 7.5, 7.4, 7.3, 7.2, 7.1, 7.0])
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    class Result(float):
        is_over = 0.0  # when

    def wait(results):
        for result in results if isinstance(results, tuple) else (results,):
            now[0] = max(now[0], result.is_over)
        return results

    def program(state, batch):
        now[0] += 0.01  # what the host does, before the device has it
        device["free"] = max(device["free"], now[0]) + next(seconds, 1)
        results = Result(state + 1), Result(next(losses, math.nan))
        for result in results:
            result.is_over = device["free"]
        return results

    monkeypatch.setattr(jax, "block_until_ready", wait)
    arguments = program, 0, train.make_mesh()
    row = bench.time_stage(stage, *arguments, 3, cfg)
    times = [row["min_ms"], row["median_ms"], row["max_ms"]]
    assert times == pytest.approx([20, 40, 90])
    assert (row["ahead_ms"], row["gap_ms"]) == (pytest.approx(30), pytest.approx(10))
    assert row["tokens_per_s"] == pytest.approx(stage.batch_tokens / 0.04)
    flops = row["tokens_per_s"] * train.flops_per_token(stage, train.GPT.specs(cfg), cfg)
    assert row["mfu"] == pytest.approx(flops / (2 * 989e12))
    assert (row["compiled_gib"], row["loss"]) == (3, 7.0)
    with pytest.raises(train.NonFiniteLoss, match="the loss after 9 steps is nan"):
        bench.time_stage(stage, *arguments, 3, cfg)


def test_a_stage_that_does_not_fit_stays_as_a_row_and_the_others_are_timed(monkeypatch):
    def time_stage(stage, *_):
        if stage.seq_len == 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        names = "median_ms ahead_ms gap_ms kernels compiled_gib peak_gib loss tokens"
        return dict.fromkeys(names.split(), 1) | {"tokens_per_s": 1e6, "mfu": 0.5, "trace": []}

    programs = {"init": (lambda: None,), "train_0": (None, ()), "train_1": (None, ())}
    monkeypatch.setattr(bench, "time_stage", time_stage)
    monkeypatch.setattr(bench, "compile_step", lambda *_: (None, 1.0))
    monkeypatch.setattr(train, "list_programs", lambda *_: programs)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    args = bench.parse(["--micro_tokens=256,64", "--", *SMALL, "--train_files=nowhere_*.bin"])
    lines, rows = zip(*bench.time_stages(args), strict=True)
    rows = [row for row in rows if row]
    errors = [row.get("error") for row in rows]
    assert errors == ["RESOURCE_EXHAUSTED: Out of memory", None] * 2
    assert [row["micro_tokens"] for row in rows] == [64, 64, 256, 256]  # the peak only grows
    assert "RESOURCE_EXHAUSTED" in lines[3] and "1000.0  50.0%" in lines[4]


def test_micro_steps_that_nobody_asks_for_are_as_large_as_training_makes_them(monkeypatch):
    def list_programs(model, mesh, cfg):
        raise LookupError(f"asked for {cfg.micro_tokens}")

    def fit_memory(model, mesh, cfg, manifest):
        return train.replace(cfg, micro_tokens=8192)

    monkeypatch.setattr(train, "list_programs", list_programs)
    monkeypatch.setattr(train, "fit_memory", fit_memory)
    args = bench.parse(["--", *SMALL, "--train_files=nowhere_*.bin", "--micro_tokens=none"])
    with pytest.raises(LookupError, match="asked for 8192"):
        list(bench.time_stages(args))


PROGRAM = """
%body (p: (f32[8])) -> (f32[8]) {
  %p = (f32[8]) parameter(0)
  %x = f32[8] get-tuple-element(%p), index=0
  %a = f32[8] fusion(%x), kind=kLoop, calls=%fused
  %b = (f32[8], u8[4]) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t = (f32[8]) tuple(%a)
}

%fused (y: f32[8]) -> f32[8] {
  %y = f32[8] parameter(0)
  %c = f32[8] negate(%y)
  ROOT %d = f32[8] tanh(%c)
}

%graph (z: f32[8]) -> f32[8] {
  %z = f32[8] parameter(0)
  %e = f32[8] fusion(%z), kind=kLoop, calls=%fused
  %v = f32[8] copy(%e)
  %bits = s32[8] bitcast(%v)
  ROOT %sorted = s32[8] sort(%bits), dimensions={0}, to_apply=%less
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %w = f32[8] parameter(0)
  %s = s32[] constant(0)
  %f = f32[8] copy-start(%w)
  %g = f32[8] copy-done(%f)
  %h = (f32[8]) tuple(%g)
  %i = (f32[8]) while(%h), condition=%any, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %j = f32[8] get-tuple-element(%i), index=0
  %k = f32[8] call(%j), to_apply=%graph
  %l = (f32[8], f32[8]) all-reduce-start(%k), replica_groups={{0,1}}, to_apply=%sum
  %m = f32[8] all-reduce-done(%l)
  %n = ((f32[8]), f32[8], s32[]) call-start(%m), to_apply=%body
  %o = f32[8] call-done(%n)
  %q = f32[8] opt-barrier(%o)
  %r = (f32[8]) conditional(%s, %q, %q), branch_computations={%body, %graph}
  ROOT %u = f32[8] get-tuple-element(%r), index=0
}
"""


def test_kernels_are_counted_as_often_as_they_run_and_a_fusion_is_one():
    body, graph, copy, reduction = 2, 3, 1, 1
    loop, conditional = 5 * body, (body + graph) / 2
    total = copy + loop + graph + reduction + body + conditional
    assert Module(PROGRAM).num_kernels() == total
    assert Module(PROGRAM.replace("known_trip_count", "unknown")).num_kernels() is None


# ---- The fast attention ----

SHORT_ROWS = [
    *("--preset=speedrun", "--num_heads=1", "--head_dim=32"),
    *("--stages.seq_len=256", "--stages.batch_tokens=256", "--stages.candidates=0"),
]


@pytest.fixture
def check(monkeypatch):
    """Check one case here, where JAX's plain implementation answers for cuDNN, with a change."""
    plain = jax.nn.dot_product_attention
    change = {}

    def answer(*arrays, implementation, **settings):
        assert implementation == "cudnn"
        return plain(*arrays, implementation="xla", **settings | change)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    monkeypatch.setattr(train, "lacking", lambda *_: {"cudnn": ""})
    monkeypatch.setattr(attention, "FASTEST", {"cpu": "cudnn"})
    monkeypatch.setattr(attention, "HEAD_DIMS", (32,))
    monkeypatch.setattr(attention, "WINDOWS", (100,))

    def run(**changes):
        change.update(changes)
        return list(attention.check_attention(1, train.parse_flags(SHORT_ROWS)))[-1][1]

    return run


def test_an_attention_that_rounds_as_the_plain_one_passes_and_one_token_of_window_does_not(check):
    row = check()
    assert 0.2 < row["ratio"] < 2 and (row["head_dim"], row["window"]) == (32, 100)
    assert all(0 < row[array]["fast"] < 0.03 for array in attention.ARRAYS)
    sentence = r"errs over 3 times .*\(head_dim 32, window 100\)\. Train with"
    with pytest.raises(UsageError, match=sentence):
        check(local_window_size=(99, 0))


def test_rows_are_one_document_documents_of_one_token_and_documents_of_500():
    whole_T, ones_T, *others = np.asarray(attention.document_starts(5, 20_000))
    position_T = np.arange(20_000)
    assert (whole_T == 0).all() and (ones_T == position_T).all()
    num_starts = sum((start_T == position_T).sum() for start_T in others)
    assert len(others) == 3 and num_starts == pytest.approx(60_000 / 500, rel=0.3)


def test_a_wrong_gradient_alone_is_an_error_of_the_attention(check, monkeypatch):
    right = jax.nn.dot_product_attention

    def wrong(q, k, v, **settings):
        wide = v.astype(np.float32)
        same = 1.125 * wide - jax.lax.stop_gradient(0.125 * wide)  # exactly v, for 8 bits of it
        return right(q, k, same.astype(v.dtype), **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", wrong)
    with pytest.raises(UsageError, match="errs over 3 times"):
        check()


def test_a_value_that_is_no_number_is_an_error_of_the_attention(check, monkeypatch):
    ones = np.ones((1, 256, 8), np.float32)
    errors = attention.errors_of(np.where(ones.cumsum(axis=1) == 200, math.nan, ones), ones, ones)
    assert math.isnan(errors["ratio"])
    row = {"ratio": math.nan, "fast_ms": 1, "plain_ms": 1}
    row |= dict.fromkeys(attention.ARRAYS, errors)
    monkeypatch.setattr(attention, "compare", lambda *_: row)
    with pytest.raises(UsageError, match="as attention_xla: nan"):
        check()


def test_a_case_that_is_refused_is_wrong_and_does_not_hide_the_others(check, monkeypatch):
    def compare(name, head_dim, window, *_):
        raise RuntimeError(f"No execution plans for {window}\nmore")

    monkeypatch.setattr(attention, "compare", compare)
    monkeypatch.setattr(attention, "WINDOWS", (0, 100))
    sentence = r"nan \(head_dim 32, window 0\), nan \(head_dim 32, window 100\)"
    with pytest.raises(UsageError, match=sentence):
        check()


def test_where_no_case_can_run_nothing_passes(check, monkeypatch):
    monkeypatch.setattr(train, "lacking", lambda *_: {"cudnn": "JAX 0.11.2 or newer"})
    with pytest.raises(UsageError, match="nothing was checked; cudnn wants JAX 0.11.2 or newer"):
        check()


def why_no_gpu():
    """Why a GPU cannot be used here, or nothing."""
    if not glob.glob("/dev/nvidia[0-9]*"):
        return "no NVIDIA GPU here"
    plugins = (f"jax_cuda{version}_plugin" for version in (12, 13))
    if not any(map(importlib.util.find_spec, plugins)):
        return 'JAX sees no GPU: pip install "jax[cuda13]"'
    return "" if jax.__version_info__ >= (0, 11, 2) else "cuDNN's attention wants JAX 0.11.2"


@pytest.mark.skipif(bool(why_no_gpu()), reason=why_no_gpu())
def test_on_a_gpu_the_output_and_the_gradients_of_the_fast_attention_are_right():
    argv = [sys.executable, "-m", "scripts.bench", "--attention", "--steps=1"]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    argv += ["--", "--preset=speedrun"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n   128 ") == len(attention.WINDOWS), done.stdout


# ---- Peers ----


def test_the_plain_gpt_in_torch_has_our_matrices_and_sees_no_later_token():
    torch = pytest.importorskip("torch", reason="PyTorch is no requirement: pip install torch")
    cfg = bench.configure([*SMALL, "--train_files=nowhere_*.bin", "--compute_dtype=float32"])
    cfg = train.replace(cfg, stages=cfg.stages[-1:])
    model = bench.make_torch_gpt(cfg)
    ours = {"muon", "muon_down", "embed", "head"}
    specs = [spec for spec in jax.tree.leaves(train.GPT.specs(cfg)) if spec.group in ours]
    numbers = sum(weight.numel() for weight in model.parameters())
    assert numbers - model.positions.weight.numel() == sum(math.prod(s.shape) for s in specs)
    tokens = torch.arange(128).reshape(2, 64)
    embedded = model.embed(tokens).detach().requires_grad_()
    model.blocks(embedded)[:, 20].sum().backward()
    reached = embedded.grad.abs().sum(dim=2) > 0
    assert reached[:, :21].all() and not reached[:, 21:].any()


@pytest.mark.system
def test_a_peer_takes_turns_with_ours_and_the_ratios_are_turn_by_turn(tmp_path):
    (tmp_path / "train.py").write_text(PEER)
    flags = [f"--modded_jax={tmp_path}", "--steps=2", "--", *TINY]
    rows, printed = rows_of(tmp_path, *flags)
    names = [f"{whose} {dtype}" for whose in ("ours", "modded_jax") for dtype in bench.DTYPES]
    assert [(row["turn"], row["program"]) for row in rows] == [
        (turn, name) for turn in range(bench.NUM_TURNS) for name in names
    ]
    peers = [row["losses"] for row in rows if row["program"] == "modded_jax float32"]
    assert peers == [[3, 4], [5, 6], [7, 8]]  # two rows, and a step that was not counted
    times = {name: [row["cpu_ms"] for row in rows if row["program"] == name] for name in names}
    ratios = np.divide(times["ours float32"], times["modded_jax float32"])
    by_turn = " ".join(f"{ratio:.3f}" for ratio in ratios)
    line = f"ours float32 / modded_jax float32: {np.median(ratios):.3f} of the CPU time"
    assert f"{line} (by turn: {by_turn})" in printed


@pytest.mark.system
def test_the_loader_reads_a_shard_like_fineweb_and_has_a_row_for_each_stage(tmp_path):
    bench.write_random_shard(tmp_path / "train_000000.bin", 3_000_000)
    (tokens,) = train.open_shards(f"{tmp_path}/*.bin").tokens
    starts = np.flatnonzero(tokens == bench.BOS)
    assert starts[0] == 0 and len(tokens) == 3_000_000 and tokens.max() == bench.BOS
    assert np.median(np.diff(starts)) == pytest.approx(403, rel=0.05)
    assert np.diff(starts).mean() == pytest.approx(690, rel=0.08)
    rows, printed = rows_of(tmp_path, "--loader", "--shard_tokens=1500000")
    assert [row["stage"] for row in rows] == [0, 1, 2, 3]
    assert all(min(row["million_tokens_per_s"]) > 0 for row in rows)
    done = run("--loader", "--shard_tokens=60000")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: --shard_tokens=60000: too few for a batch" in done.stderr
