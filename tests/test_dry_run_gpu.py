"""scripts/dry_run for GPUs: what train.py's programs must and must not hold, read off the text of
the GPU compiler, and what is said of them. No GPU is used."""

import contextlib
import importlib.util
import io
import json
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dry_run import SMALL, arrays_of, whole_logits

import train
from scripts.dry_run import command as dry_run
from scripts.dry_run import gpu, gpu_cost
from scripts.dry_run.gpu_cost import GpuWalk, gpu_chip, matmul_sizes, scores_and_masks
from scripts.dry_run.hlo import Array, Module
from scripts.dry_run.programs import Job
from train import UsageError

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None
    or jax.__version_info__ < (0, 11, 2),  # where JAX makes the mask's gradient, [T, T]
    reason="wants jax-cuda13-plugin with JAX 0.11.2 or newer",
)
ROW, MICRO_STEPS, HEADS, WIDTH = 512, 2, 2, 64  # micro-steps: of each of eight devices
FLAGS = [*SMALL, f"--num_heads={HEADS}", f"--head_dim={WIDTH}"]


def run(folder, *flags):
    """(result, {program: Module}, what it printed) of a dry run."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = dry_run.main([*flags, f"--dump={folder}", f"--json={folder}/rows.json"])
    modules = {path.stem: Module(path.read_text()) for path in folder.glob("*.hlo")}
    return result, modules, said.getvalue()


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """(result, Module, what it printed) of the training step on eight devices."""
    folder = tmp_path_factory.mktemp("gpu")
    result, modules, said = run(folder, "h100:8", "--stage=0", *FLAGS)
    assert json.loads((folder / "rows.json").read_text()) == result
    return result, modules["train_0"], said


def calls_of(module, word):
    """Instructions whose op or custom call begins so."""
    target = re.compile(rf'custom_call_target="{re.escape(word)}')
    for computation in module.computations.values():
        for i in computation.values():
            if i.op.startswith(word) or target.search(i.attrs):
                yield i


def visible_scores(window):
    """Of a row and head: each query sees itself and `window` tokens before."""
    return sum(min(t, window) + 1 for t in range(ROW))


@needs_compiler
@pytest.mark.system
def test_a_step_calls_fmha_and_writes_no_scores_and_no_whole_logits(step):
    result, module, said = step
    assert result["attention"] == "cudnn"
    names = [re.search(r"fmha\w+", i.attrs)[0] for i in calls_of(module, "__cudnn$fmha")]
    backward = ["Backward" in name for name in names]
    assert sorted(backward) == [False, False, True, True]  # two layers
    (row,) = result["programs"]
    assert row["fmha_calls"] == 4 * MICRO_STEPS
    scores = HEADS * 2 * MICRO_STEPS * (visible_scores(128) + visible_scores(256))
    assert row["fmha_tflop"] == pytest.approx((2 + 5) * 2 * WIDTH * scores / 1e12)
    # two rows of a micro-step, and no axis for the heads: a mask, and of two windows at most two
    square = [array for _, array in arrays_of(module) if array.dims.count(ROW) > 1]
    assert {(array.dtype, array.dims[0], np.prod(array.dims)) for array in square} == {
        ("bf16", 2, 2 * ROW * ROW)
    }
    assert row["score_arrays"] == 0 and "[T, T] scores: none" in said
    assert "which FMHA reads: bf16[2, 512, 512]" in said
    assert whole_logits(module) == []


@needs_compiler
@pytest.mark.system
def test_gradients_are_reduced_once_a_step_outside_of_loops(step):
    result, module, said = step
    inside = GpuWalk(module, gpu_chip(gpu.KINDS["h100"])).rows(module.entry)
    assert [row.name for row in inside if row.op and row.in_loop] == []
    assert len(list(calls_of(module, "reduce-scatter-start"))) == 1
    (reduction,) = calls_of(module, "reduce-scatter-start")
    specs = train.param_specs(dry_run.config(FLAGS))
    del specs["embed"]  # the stage is tied: all its gradients reach the head
    split = [spec for spec in jax.tree.leaves(specs) if train.split_axis(spec, 8) is not None]
    total = sum(np.prod(spec.shape) for spec in split)
    halves = sum(np.prod(a.dims) for a in reduction.arrays if a.dtype == "bf16")
    assert halves == total + total / 8  # what goes in and what is left
    assert "reduce-scatter: 1 times" in said and "in a loop" not in said


@needs_compiler
@pytest.mark.system
def test_bounds_are_printed_and_no_projection(step):
    result, _, said = step
    (row,) = result["programs"]
    assert 0 < row["roofline_ms"] <= (row["table_ms"] or row["roofline_ms"])
    assert 0 < row["fmha_roofline_ms"] and row["launches"] > 4 * MICRO_STEPS
    assert 0 < row["peak_gib"] < 0.1 and row["pool_gib"] == pytest.approx(0.75 * 79.1, rel=1e-3)
    assert "projection" not in said and "never calibrated" in said


@needs_compiler
@pytest.mark.system
def test_a_piece_calls_fmha_where_it_is_asked_for_and_must_fit(tmp_path):
    for attention in ("cudnn", "xla"):
        flags = ["h200:1", "--piece=attention", f"--attention={attention}", *FLAGS]
        result, modules, said = run(tmp_path, *flags)
        assert sorted(modules) == ["attention_128", "attention_256"]
        calls = [len(list(calls_of(module, "__cudnn$fmha"))) for module in modules.values()]
        assert calls == ([2, 2] if attention == "cudnn" else [0, 0])
        assert [row["fmha_calls"] for row in result["programs"]] == calls
    flags[flags.index("--micro_tokens=1024")] = "--micro_tokens=16384"
    words = r"needs [\d.]+ GiB of JAX's pool of 0.01, .* --micro_tokens=\d+, --head_block"
    with pytest.raises(UsageError, match=words):
        run(tmp_path, *flags, "--memory_gib=0.01")


@needs_compiler
@pytest.mark.system
def test_the_table_knows_a_large_matmul_on_an_h100_and_has_none_of_another_gpu():
    sizes = (1, 4096, 4096, 4096)
    (device,) = gpu.gpu_devices(gpu.KINDS["h100"], 1)
    assert 1 < gpu_cost.table_seconds(device, *sizes) / (2 * 4096**3 / 989.4e12) < 4
    for name in ("a100", "rtx4090"):
        (device,) = gpu.gpu_devices(gpu.KINDS[name], 1)
        assert gpu_cost.table_seconds(device, *sizes) is None


# ---- Without the compiler ----
FMHA = """
ENTRY %main () -> bf16[2,3,512,64] {
  %q = bf16[2,512,3,64]{3,2,1,0} parameter(0)
  %select = bf16[2,512,512]{2,1,0} fusion(), kind=kLoop, calls=%fused
  %mask = bf16[2,1,512,512]{3,2,1,0} bitcast(%select)
  %score = f32[2,3,512,512]{3,2,1,0} exponential(%q)
  ROOT %y = (bf16[2,3,512,64]{3,1,2,0}, f32[2,3,512]{2,1,0}, u8[9]{0}) custom-call(%q, %q, %q, \
%mask), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", \
backend_config={"cudnn_fmha_backend_config": {"sliding_window_length": 129}}
}

%fused () -> bf16[2,512,512] {
  ROOT %zero = bf16[2,512,512]{2,1,0} broadcast()
}
"""


def test_fmha_counts_the_scores_in_the_band_and_its_mask_is_no_score():
    module = Module(FMHA)
    walk = GpuWalk(module, gpu_chip(gpu.KINDS["h100"]))
    rows = list(walk.rows(module.entry))
    (call,) = walk.fmha.values()
    scores = visible_scores(128)
    assert call.flops == 2 * 2 * 2 * 3 * 64 * scores
    moved = 4 * 2 * 512 * 3 * 64 * 2 + 2 * 3 * 512 * 4  # q, k, v, y; the softmax's sums
    assert call.bytes == pytest.approx(moved + 2 * 2 * scores)
    written = [
        (row.name, row.calls, array)
        for row in rows
        for array in module.computations["main"][row.name].arrays
    ]
    scores, masks = scores_and_masks(written, walk, ROW, dry_run.config(FLAGS))
    assert scores == [(1, Array("f32", (2, 3, 512, 512), 0))]
    assert masks == [(1, Array("bf16", (2, 512, 512), 0))]
    for no_window in ("0", "9999"):
        walk = GpuWalk(Module(FMHA.replace("129", no_window)), gpu_chip(gpu.KINDS["h100"]))
        list(walk.rows("main"))
        (call,) = walk.fmha.values()
        assert call.flops == 2 * 2 * 2 * 3 * 64 * visible_scores(ROW)


SQUARE = """
ENTRY %main () -> f32[4,512,512] {
  %q = bf16[16,512,64]{2,1,0} parameter(0)
  %k = bf16[16,64,512]{2,1,0} parameter(1)
  %x = bf16[2,512,512]{2,1,0} parameter(2)
  %w = bf16[512,512]{1,0} parameter(3)
  %score = f32[16,512,512]{2,1,0} fusion(%q, %k), kind=kCustom, calls=%gemm
  %value = f32[16,512,64]{2,1,0} dot(%score, %k), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={2}
  %h = f32[2,512,512]{2,1,0} dot(%x, %w), lhs_contracting_dims={2}, rhs_contracting_dims={0}
  %l = bf16[8,64,512]{2,1,0} parameter(4)
  %grad = f32[8,512,512]{2,1,0} dot(%l, %l), lhs_batch_dims={0}, lhs_contracting_dims={1}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="transpose(jvp(BTN,BTD->ND))/dot"}
  ROOT %moment = f32[4,512,512]{2,1,0} multiply(%m, %m)
}

%gemm (a: bf16[16,512,64], b: bf16[16,64,512]) -> f32[16,512,512] {
  %a = bf16[16,512,64]{2,1,0} parameter(0)
  %b = bf16[16,64,512]{2,1,0} parameter(1)
  ROOT %dot = f32[16,512,512]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}
}
"""


def test_where_a_row_is_as_long_as_the_model_is_wide_weights_are_no_scores():
    module = Module(SQUARE)
    walk = GpuWalk(module, gpu_chip(gpu.KINDS["h100"]))
    written = list(gpu_cost.arrays_written(module, list(walk.rows("main"))))
    for width, wanted in ((512, [16]), (384, [16, 2, 8, 4])):
        cfg = dry_run.config([*FLAGS, f"--model_dim={width}"])
        scores, _ = scores_and_masks(written, walk, ROW, cfg)
        assert [array.dims[0] for _, array in scores] == wanted


STEP = """
%body (p: (bf16[256,128])) -> (bf16[256,128]) {
  %p = (bf16[256,128]{1,0}) parameter(0)
  %x = bf16[256,128]{1,0} get-tuple-element(%p), index=0
  %head = bf16[128,1536]{1,0} get-tuple-element(%p), index=1
  %q = bf16[2,512,3,64]{3,2,1,0} get-tuple-element(%p), index=2
  %turned = f32[8,128]{1,0} get-tuple-element(%p), index=3
  %aa = (f32[8,128]{1,0}, f32[8,128]{1,0}) all-to-all-start(%turned), replica_groups=[1,8]<=[8]
  %rows = f32[8,128]{1,0} all-to-all-done(%aa)
  %block = f32[256,1536]{1,0} dot(%x, %head), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %half = bf16[256,1536]{1,0} convert(%block)
  %y = (bf16[2,3,512,64]{3,1,2,0}, u8[9]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t = (bf16[256,128]{1,0}) tuple(%x)
}

ENTRY %main () -> f32[128,1536] {
  %tokens = bf16[1024,128]{1,0} parameter(0)
  %w = bf16[128,1536]{1,0} parameter(1)
  %part = bf16[16,128]{1,0} parameter(2)
  %ag = (bf16[16,128]{1,0}, bf16[128,128]{1,0}) all-gather-start(%part), replica_groups=[1,8]<=[8]
  %weight = bf16[128,128]{1,0} all-gather-done(%ag)
  %loop = (bf16[256,128]{1,0}) while(%t0), condition=%any, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %begun = ((bf16[1024,128]{1,0}, bf16[128,1536]{1,0}), f32[1024,1536]{1,0}, u32[]) \
fusion-start(%tokens, %w), kind=kCustom, calls=%gemm
  %all = f32[1024,1536]{1,0} fusion-done(%begun)
  %sorted = f32[8]{0} custom-call(%part), custom_call_target="mystery"
  ROOT %grad = f32[128,1536]{1,0} dot(%tokens, %all), lhs_contracting_dims={0}, \
rhs_contracting_dims={0}
}

%gemm (a: bf16[1024,128], b: bf16[128,1536]) -> f32[1024,1536] {
  %a = bf16[1024,128]{1,0} parameter(0)
  %b = bf16[128,1536]{1,0} parameter(1)
  ROOT %dot = f32[1024,1536]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
DOT_FLOPS = {
    "block": 2 * 256 * 128 * 1536,
    "all": 2 * 1024 * 128 * 1536,
    "grad": 2 * 1024 * 128 * 1536,
}
DOT_BYTES = {
    "block": 2 * 256 * 128 + 2 * 128 * 1536 + 4 * 256 * 1536,
    "all": 2 * 1024 * 128 + 2 * 128 * 1536 + 4 * 1024 * 1536,
    "grad": 2 * 1024 * 128 + 4 * 1024 * 1536 + 4 * 128 * 1536,
}
TABLE = {(1, 256, 128, 1536): 5e-6, (1, 1024, 128, 1536): 1e-9}  # slower, and faster than bytes


@pytest.fixture
def judged(monkeypatch, capsys):
    """Judge STEP, changed, as a program that needs so many GiB: (row, Cost, what was printed)."""
    monkeypatch.setattr(gpu_cost, "table_seconds", lambda device, *sizes: TABLE.get(sizes))
    monkeypatch.setattr(train, "memory_of", lambda program: program.gib * 2**30)
    costs = []

    def keep(*args):
        costs.append(gpu_cost.gpu_cost(*args))
        return costs[-1]

    monkeypatch.setattr(gpu, "gpu_cost", keep)

    def judge(text=STEP, gib=59.0):
        cfg = dry_run.config([*FLAGS, "--attention=xla"])
        mesh = train.make_mesh()
        job = Job("train_0", None, (), mesh, cfg.stages[0], 1024, chips=mesh.size)
        program = types.SimpleNamespace(as_text=lambda: text, gib=gib)
        row = gpu.judge(job, gpu.KINDS["h100"], (program, 1.0), cfg)
        return row, costs[-1], capsys.readouterr().out

    return judge


def test_costs_of_a_program_are_those_of_a_pencil(judged):
    row, cost, _ = judged()
    peak, bandwidth, link = 989.4e12, 3352e9, 450e9
    calls = {"block": 3, "all": 1, "grad": 1}
    bytes_of_half = (4 + 2) * 256 * 1536
    assert cost.flops == sum(calls[name] * DOT_FLOPS[name] for name in calls)
    moved = sum(calls[name] * DOT_BYTES[name] for name in calls)
    assert cost.hbm_bytes == moved + 3 * bytes_of_half
    gather, turn = (entry for entry in cost.rows if entry.op)
    assert gather.sent_bytes == 7 / 8 * 2 * 128 * 128 and turn.sent_bytes == 7 / 8 * 4 * 8 * 128
    assert gather.link_s == pytest.approx(3e-6 + gather.sent_bytes / link)
    assert row["collective_bytes"] == gather.sent_bytes + 3 * turn.sent_bytes
    assert all(DOT_FLOPS[name] / peak < DOT_BYTES[name] / bandwidth for name in calls)
    waited = gather.link_s + 3 * turn.link_s
    assert cost.roofline_s == pytest.approx(cost.hbm_bytes / bandwidth + waited)
    slower = 3 * (5e-6 - DOT_BYTES["block"] / bandwidth)
    assert cost.table_s == pytest.approx(cost.roofline_s + slower)
    assert cost.table_share == pytest.approx(1 - DOT_FLOPS["grad"] / cost.flops)
    assert (cost.fmha_calls, cost.launches) == (3, 3 * 4 + 4)
    assert cost.fmha_flops == 3 * 2 * 2 * 2 * 3 * 64 * visible_scores(ROW)
    blocks, whole = Array("f32", (256, 1536), 0), Array("f32", (1024, 1536), 0)
    assert sorted(cost.logits) == [(1, whole), (3, blocks)]  # not the gradient of the head
    assert cost.uncosted == {"mystery": 1}


def test_what_the_bounds_leave_out_is_said(judged):
    _, _, said = judged()
    for words in (
        "16 kernels launched",
        "all-to-all, in a loop: 3 times",
        "a step of this stage holds 2 of these per GPU",
        "[T, T] scores: none\n  float32",
        "logits of blocks of 256 of a micro-step's 1024 tokens: f32[256, 1536] 3 times, f32[1024",
        "not in the bounds: 1 calls of mystery",
    ):
        assert words in said
    assert "trip count unknown" not in said
    row, _, said = judged(STEP.replace("known_trip_count", "n"))
    assert row["launches"] is None and "trip count unknown, taken as 1: loop" in said
    assert "an unknown number of kernels" in said
    _, _, said = judged(STEP.replace("cudnn$fmha", "other").replace("f32[", "f16["))
    assert "FMHA (cuDNN's attention): none, attention is xla" in said
    assert "tokens: none" in said
    many = [(1000, Array("f32", (500, 1000), 0)), (500, Array("f32", (500, 1000), 0))]
    assert gpu.describe_arrays(many) == "f32[500, 1000] 1500 times, 3.00 GB written"


def test_a_program_that_jax_s_pool_does_not_hold_ends_with_exit_code_2(judged, capsys):
    assert train.command(lambda: judged(gib=60.0)) == 2  # of the GPU's 79.1
    error = capsys.readouterr().err
    assert error.startswith("error: train_0 does not fit") and error.count("\n") == 1


def test_sizes_of_a_matmul_are_those_of_its_einsum():
    a, b = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 11))
    text = """
ENTRY %main () -> f32[3,5,11] {
  %a = f32[3,5,7]{2,1,0} parameter(0)
  %b = f32[3,7,11]{2,1,0} parameter(1)
  ROOT %y = f32[3,5,11]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}
}
"""
    computation = Module(text).computations["main"]
    assert jnp.einsum("BMK,BKN->BMN", a, b).shape == computation["y"].arrays[0].dims
    assert matmul_sizes(computation["y"], computation) == (3, 5, 7, 11)


def test_cudnn_is_pretended_in_the_dry_run_alone():
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    names = ("check_compute_capability", "is_cuda_compute_capability_equal", "check_cudnn_version")
    real = [getattr(cudnn, name) for name in names]
    with gpu.pretended_cudnn("9.0"):
        assert cudnn.check_compute_capability("8.9") and cudnn.check_compute_capability("9.0")
        assert not cudnn.check_compute_capability("10.0")
        assert not cudnn.is_cuda_compute_capability_equal("10.3")
        assert cudnn.check_cudnn_version() == 91200
    assert [getattr(cudnn, name) for name in names] == real


def test_without_the_plugin_the_error_names_the_package():
    sentence = rf"^the GPU compiler is missing: pip install jax-cuda13-plugin=={jax.__version__}$"
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        with pytest.raises(UsageError, match=sentence):
            dry_run.main(["h100:1"])


def test_a_wrong_flag_is_an_error_before_anything_compiles():
    assert [gpu.read_topology(name)[1] for name in ("h100", "h100:8", "h100:99")] == [1, 8, 99]
    for argv, words in (
        (["h100:0"], "h100:0: wanted h100:DEVICES with 1 to 99 devices, such as h100:8"),
        (["h100:100"], "wanted h100:DEVICES"),
        (["h100:2x4"], "wanted h100:DEVICES"),
        (["h300:8"], "h300:8: no such topology.*h100:1, h100:8, h200:1, h200:8"),
        (["h100:1", "--memory_gib=0"], "--memory_gib=0: wanted the memory of a device"),
        (["h100:1", "--memory_gib=nan"], "--memory_gib=nan: wanted the memory of a device"),
        (["v6e:1x1", "--memory_gib=80"], "--memory_gib=80: it is for GPUs, not v6e:1x1"),
        (["h100:1", "--attention=band"], "--attention=band: wanted a TPU"),
    ):
        with pytest.raises(UsageError, match=words):
            dry_run.main(argv)


def test_a_piece_is_sized_without_compiling_a_step(monkeypatch):
    def compile_job(job, kind, cfg):
        raise LookupError(f"{job.name} of {cfg.micro_tokens}")

    monkeypatch.setattr(gpu, "gpu_devices", lambda *_: jax.devices())
    monkeypatch.setattr(gpu, "compile_job", compile_job)
    flags = [flag for flag in FLAGS if not flag.startswith("--micro_tokens")]
    with pytest.raises(LookupError, match="head of 32768"):
        dry_run.main(["h100:8", "--piece=head", *flags])


def test_micro_steps_are_as_large_as_95_percent_of_the_pool_hold(capsys):
    kind, _ = gpu.read_topology("h100:1", 32)
    assert kind.pool_gib == pytest.approx(24)
    cfg = dry_run.config([], platform="gpu", capability=9.0)
    model = train.GPT._replace()

    def list_jobs(model, mesh, cfg, number):
        return [types.SimpleNamespace(name=f"train_{number}")]

    for gib_of_32768, name, micro_tokens in (
        (15.1, "%fusion.1", 49152),
        (22.7, "%fusion.1", 32768),
        (22.9, "%fusion.1", 16384),
        (60.0, "%fusion.1", 8192),
        (200.0, "%fusion.1", 4096),
        (8.0, "%fusion.1.remat", 4096),  # it fits because things are computed twice
    ):

        def compiled(job, kind, cfg, gib=gib_of_32768, name=name):
            size = gib * 2**30 * cfg.micro_tokens / 32768
            return types.SimpleNamespace(size=size, as_text=lambda: f"  {name} = f32[]"), 0.0

        with (
            mock.patch.object(gpu, "list_jobs", list_jobs),
            mock.patch.object(gpu, "compile_job", compiled),
            mock.patch.object(train, "memory_of", lambda program: program.size),
        ):
            settled, ready = gpu.fit_memory(model, mock.Mock(size=1), kind, cfg)
        assert settled.micro_tokens == micro_tokens
        fullest = "train_2" if micro_tokens == 49152 else "train_3"  # of speedrun's four stages
        (program, _) = ready[fullest]
        assert program.size == gib_of_32768 * 2**30 * micro_tokens / 32768
    assert "of 0.95 * 24.00" in capsys.readouterr().out
