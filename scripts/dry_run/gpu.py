"""GPUs that are not here: what the compiler is told of them, and programs compiled for them.

XLA's GPU compiler needs no GPU where a text describes one (a GpuTargetConfigProto). A kind of GPU
is a row of KINDS. What the compiler does not have then: the autotuner, which tries tiles on the
device, so matmuls get the tiles of XLA's cost model; CUB's sizes, so sorts are XLA's own; and
cuDNN, so its attention is a call that nobody has checked.
"""

import collections
import contextlib
import importlib.util
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

import train
from scripts.dry_run.estimate import collective_lines
from scripts.dry_run.gpu_cost import FMHA_SHARE, gpu_cost
from scripts.dry_run.programs import list_jobs, out_of_memory
from scripts.files import write_whole
from train import UsageError

POOL = 0.75  # of a device's memory is what JAX takes and gives to programs
CUDNN = (9, 12, 0)  # what jax[cuda13] 0.12 is built against; a window with a mask wants 9.10.2


# ---- Kinds ---------------------------------------------------------------------------------------
class Kind(NamedTuple):
    """A GPU. Rates are per second, as the vendor states them; products are dense."""

    name: str
    capability: str
    memory: int  # bytes
    bandwidth: float  # bytes
    flops: float  # bf16
    link: float  # bytes to the other GPUs of a host, one way
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of a core
    clock_ghz: float
    l2: int  # bytes
    shared: int  # bytes of shared memory of a core; a block can have 1,024 less
    threads: int  # of a core

    @property
    def pool_gib(self):
        return POOL * self.memory / 2**30


H100 = Kind(
    name="NVIDIA H100 80GB HBM3",
    capability="9.0",
    memory=84_942_979_072,
    bandwidth=3352e9,
    flops=989.4e12,
    link=450e9,
    cores=132,
    lanes=128,
    clock_ghz=1.98,
    l2=50 << 20,
    shared=228 << 10,
    threads=2048,
)
A100 = Kind(
    name="NVIDIA A100-SXM4-80GB",
    capability="8.0",
    memory=84_942_979_072,
    bandwidth=2039e9,
    flops=312e12,
    link=300e9,
    cores=108,
    lanes=64,
    clock_ghz=1.41,
    l2=40 << 20,
    shared=164 << 10,
    threads=2048,
)
RTX4090 = Kind(
    name="NVIDIA GeForce RTX 4090",
    capability="8.9",
    memory=25_386_352_640,
    bandwidth=1008e9,
    flops=165.2e12,
    link=32e9,
    cores=128,
    lanes=128,
    clock_ghz=2.52,
    l2=72 << 20,
    shared=100 << 10,
    threads=1536,
)
KINDS = {
    "h100": H100,
    "h200": H100._replace(name="NVIDIA H200 141GB HBM3e", memory=151_397_597_184, bandwidth=4800e9),
    "a100": A100,
    "rtx4090": RTX4090,
}
EXAMPLES = [f"{name}:{count}" for name in KINDS for count in (1, 8)]


def is_gpu(topology):
    """Whether h100:8 and the like are meant, rather than a TPU's topology."""
    return topology.split(":")[0] in KINDS


def read_topology(topology, memory_gib=None):
    """h100:8 -> (its Kind, 8). memory_gib: of each device, in place of its own.

    Raises UsageError.
    """
    name, _, count = topology.partition(":")
    if not re.fullmatch(r"\w+(:[1-9]\d?)?", topology):
        raise UsageError(
            f"{topology}: wanted {name}:DEVICES with 1 to 99 devices, such as {name}:8"
        )
    kind = KINDS[name]
    if memory_gib is not None:
        if not 0 < memory_gib < 1e6:
            raise UsageError(
                f"--memory_gib={memory_gib:g}: wanted the memory of a device, such as 24"
            )
        kind = kind._replace(memory=int(memory_gib * 2**30))
    return kind, int(count or 1)


OF_ALL_KINDS = {
    "device_vendor": "NVIDIA Corporation",
    "driver_version": "13.0.0",
    "runtime_version": "12.8.0",
    "compile_time_toolkit_version": "12.8.0",
    "ecc_enabled": True,
    "device_address_bits": 64,
    "pcie_bandwidth": 32 << 30,
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "shared_memory_per_block": 48 << 10,
    "registers_per_block_limit": 2**16,
    "registers_per_core_limit": 2**16,
}


def target_config(kind):
    """The text of the GpuTargetConfigProto that tells the compiler of a Kind."""
    own = {
        "name": kind.name,
        "core_count": kind.cores,
        "fpus_per_core": kind.lanes,
        "clock_rate_ghz": kind.clock_ghz,
        "device_memory_size": int(POOL * kind.memory / 0.8),  # of which XLA counts on 0.8
        "memory_bandwidth": int(kind.bandwidth),
        "l2_cache_size": kind.l2,
        "threads_per_core_limit": kind.threads,
        "shared_memory_per_core": kind.shared,
        "shared_memory_per_block_optin": kind.shared - 1024,
        "dnn_version": ".".join(map(str, CUDNN)),
    }
    fields = (OF_ALL_KINDS | own).items()
    device = " ".join(f"{name}: {json.dumps(value)}" for name, value in fields)
    major, minor = kind.capability.split(".")
    capability = f"major: {major} minor: {minor}"
    if kind.capability == "9.0":
        capability += " feature_extension: ACCELERATED_FEATURES"  # sm_90a
    cudnn = "major: {} minor: {} patch: {}".format(*CUDNN)
    return (
        f"gpu_device_info {{ {device} cuda_compute_capability {{ {capability} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {cudnn} }} '
        f'device_description_str: "{kind.name}"'
    )


def gpu_devices(kind, count):
    """Devices to compile for. Raises UsageError without the plugin."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        version = jax.__version__
        raise UsageError(f"the GPU compiler is missing: pip install jax-cuda13-plugin=={version}")
    shape = f"1x1x{count}"  # partitions, hosts, devices of a host
    found = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(kind), topology=shape
    )
    return list(found.devices)


# ---- Compiling -----------------------------------------------------------------------------------
@contextlib.contextmanager
def pretended_cudnn(capability):
    """cuDNN's attention can be lowered inside, for a device of this capability.

    JAX asks the device that is there and the cuDNN that is installed, and here is neither. The
    three functions are JAX's own, not public: a new version may call them otherwise.
    """

    def numbers(text):
        return tuple(map(int, text.split(".")))

    def at_least(wanted):
        return numbers(capability) >= numbers(wanted)

    def equal(wanted):
        return numbers(capability) == numbers(wanted)

    version = CUDNN[0] * 10_000 + CUDNN[1] * 100 + CUDNN[2]
    answers = {
        "check_compute_capability": at_least,
        "is_cuda_compute_capability_equal": equal,
        "check_cudnn_version": lambda: version,
    }
    with mock.patch.multiple("jax._src.cudnn.fused_attention_stablehlo", **answers):
        yield


def options():
    """What the compiler is told: without an autotuner, tiles by XLA's cost model."""
    if jax.__version_info__ < (0, 12):  # 0.10.2 does not know it; nobody has asked those between
        return {}
    return {"xla_gpu_experimental_cost_model_gemm_tiling_default": True}


def compile_job(job, kind, cfg):
    """(compiled program, seconds)."""
    told = train.compiler_options(job.mesh, cfg) | options()
    start = time.perf_counter()
    with pretended_cudnn(kind.capability):
        lowered = job.function.lower(*job.arguments)
    program = lowered.compile(compiler_options=told)
    return program, time.perf_counter() - start


def fit_memory(model, mesh, kind, cfg):
    """(Config with --micro_tokens=none settled, {name: (program, seconds)} of what was compiled).

    As train.fit_memory does on a GPU: the stage that needs most is compiled until it fits.
    """
    if cfg.micro_tokens:
        return cfg, {}
    for micro_tokens in (*train.MICRO_TOKENS, 4096):
        cfg = replace(cfg, micro_tokens=micro_tokens)
        (job,) = list_jobs(model, mesh, cfg, train.fullest_stage(mesh, cfg))
        compiled = compile_job(job, kind, cfg)
        gib = train.memory_of(compiled[0]) / 2**30
        computes_twice = train.computes_twice(compiled[0])
        words = f"--micro_tokens={micro_tokens}: {job.name} needs {gib:.2f} GiB"
        twice = ", with things computed twice" * computes_twice
        print(f"{words} of {train.ROOM} * {kind.pool_gib:.2f}{twice}", flush=True)
        if gib < train.ROOM * kind.pool_gib and not computes_twice:
            break
    return cfg, {job.name: compiled}


# ---- Judging -------------------------------------------------------------------------------------
def judge(job, kind, compiled, cfg, dump=None):
    """Print what a compiled job costs; return its JSON row. Raises UsageError if it does not fit.

    compiled: (program, seconds).
    """
    program, compile_s = compiled
    text = program.as_text()
    if dump:
        write_whole(Path(dump) / f"{job.name}.hlo", text.encode())
    cost = gpu_cost(text, job, kind, cfg)
    sent = sum(row.calls * row.sent_bytes for row in cost.rows)
    row = {
        "name": job.name,
        "steps": job.steps,
        "tokens_per_step": job.tokens,
        "roofline_ms": 1e3 * cost.roofline_s,
        "table_ms": 1e3 * cost.table_s if cost.table_s else None,
        "table_share": cost.table_share,
        "fmha_calls": cost.fmha_calls,
        "fmha_tflop": cost.fmha_flops / 1e12,
        "fmha_roofline_ms": 1e3 * cost.fmha_s,
        "launches": cost.launches,
        "peak_gib": train.memory_of(program) / 2**30,
        "pool_gib": kind.pool_gib,
        "compile_s": compile_s,
        "collective_bytes": sent,
        "score_arrays": len(cost.scores),
        "logit_arrays": len(cost.logits),
    }
    print(describe(job, row, cost, kind, cfg), flush=True)
    if row["peak_gib"] > kind.pool_gib:
        raise out_of_memory(job, row["peak_gib"], kind.pool_gib, cfg, whose="JAX's pool of")
    return row


def describe(job, row, cost, kind, cfg):
    """Lines about a program: its memory and time, then what the time consists of."""
    steps = f"{job.steps} steps of " if job.steps else ""
    model = f"model {job.flops / job.mesh.size / 1e12:.2f} TFLOP, " if job.flops else ""
    launches = "an unknown number of" if cost.launches is None else f"{cost.launches:.0f}"
    lines = [
        f"{job.name}: {steps}{job.tokens} tokens, {row['peak_gib']:.2f} of the "
        f"{row['pool_gib']:.2f} GiB of JAX's pool per GPU, compiled in {row['compile_s']:.1f} s",
        f"  at least {describe_bounds(row, cost)}",
        f"  per GPU: {launches} kernels launched; {model}outside of FMHA compiled "
        f"{cost.flops / 1e12:.2f} TFLOP and {cost.hbm_bytes / 1e9:.1f} GB of memory traffic",
    ]
    if job.chips:
        per_step = job.stage.batch_tokens / job.chips / job.tokens
        lines.append(f"  a step of this stage holds {per_step:g} of these per GPU")
    lines.append(describe_fmha(cost, kind, cfg))
    lines += describe_collectives(cost)
    lines.append("  [T, T] scores: " + describe_arrays(cost.scores, "none"))
    if cost.masks:
        masks = describe_arrays(cost.masks)
        lines.append(f"  [T, T] masks of documents, which FMHA reads: {masks}")
    tokens, block = train.tokens_of_micro_step(job.stage, job.mesh.size, cfg)
    of = f"blocks of {block} of a micro-step's {tokens} tokens" if block < tokens else "all tokens"
    lines.append(f"  float32 logits of {of}: " + describe_arrays(cost.logits, "none"))
    for target, number in cost.uncosted.items():
        lines.append(f"  not in the bounds: {number} calls of {target}")
    if cost.unknown_trip_counts:
        lines.append(f"  trip count unknown, taken as 1: {', '.join(cost.unknown_trip_counts)}")
    return "\n".join(lines)


def describe_bounds(row, cost):
    bounds = f"{row['roofline_ms']:.1f} ms by the roofline"
    if row["table_ms"]:
        bounds += f", {row['table_ms']:.1f} ms with matmuls by XLA's table "
        bounds += f"({cost.table_share:.0%} of their FLOPs are in it)"
    elif cost.flops:
        bounds += ", XLA has no table of matmuls for this GPU"
    return bounds + (", without FMHA" if cost.fmha_calls else "")


def describe_fmha(cost, kind, cfg):
    if not cost.fmha_calls:
        return f"  FMHA (cuDNN's attention): none, attention is {cfg.attention}"
    rate = FMHA_SHARE * kind.flops
    return (
        f"  FMHA (cuDNN's attention): {cost.fmha_calls:.0f} calls, {cost.fmha_flops / 1e12:.2f} "
        f"TFLOP of visible scores: at least {1e3 * cost.fmha_s:.1f} ms by the roofline, "
        f"{1e3 * cost.fmha_flops / rate:.1f} ms at an assumed {rate / 1e12:.0f} TFLOP/s"
    )


def describe_collectives(cost):
    """A line for each kind of them, and one for all."""
    lines = collective_lines(cost.rows, lambda row: row.op)
    if lines:
        exposed = "ms of collectives are exposed, by the compiler's order of instructions"
        lines.append(f"  {1e3 * cost.wait_s:.2f} {exposed}; the bounds hold them")
    return lines


def describe_arrays(found, otherwise=""):
    """Their shapes, how often each is written, and the bytes of all."""
    if not found:
        return otherwise
    times = collections.Counter()
    for calls, array in found:
        times[f"{array.dtype}{list(array.dims)}"] += calls
    shapes = ", ".join(f"{shape} {calls:.0f} times" for shape, calls in times.most_common())
    gigabytes = sum(calls * array.bytes for calls, array in found) / 1e9
    return f"{shapes}, {gigabytes:.2f} GB written"


# ---- The command ---------------------------------------------------------------------------------
NEVER_CALIBRATED = (
    "These times are bounds, and they were never calibrated: no GPU has run these programs. They "
    "tell two variants apart; they say nothing of launches, the autotuner or cuDNN's own speed"
)


def run(args, cfg, model):
    """Compile and judge all jobs; return what the JSON file holds. Raises UsageError.

    cfg: with --attention settled for the GPU.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read without a GPU
    kind, count = read_topology(args.topology, args.memory_gib)
    mesh = train.make_mesh(gpu_devices(kind, count))
    said = "--deterministic=1: wanted 0, for the compiler needs the GPU to choose such kernels"
    train.require(not cfg.deterministic, said)
    print(f"{args.topology}: {count} x {kind.name}, preset {cfg.preset}; nothing was measured")
    print(train.attention_note(cfg, "gpu", float(kind.capability)), flush=True)
    if args.dump:
        Path(args.dump).mkdir(parents=True, exist_ok=True)
    ready = {}
    list_jobs(model, mesh, cfg, args.stage, args.piece)  # raises for a stage that is not there
    if args.piece:
        cfg = replace(cfg, micro_tokens=cfg.micro_tokens or 32768)
    else:
        cfg, ready = fit_memory(model, mesh, kind, cfg)
    rows = []
    for job in list_jobs(model, mesh, cfg, args.stage, args.piece):
        compiled = ready.pop(job.name, None) or compile_job(job, kind, cfg)
        rows.append(judge(job, kind, compiled, cfg, args.dump))
    print(NEVER_CALIBRATED)
    return {
        "topology": args.topology,
        "preset": cfg.preset,
        "attention": cfg.attention,
        "micro_tokens": cfg.micro_tokens,
        "programs": rows,
    }
