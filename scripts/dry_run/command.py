"""What will a run cost on a TPU or GPU? Needs a compiler for it, but neither chip nor data.

    python -m scripts.dry_run v6e:2x4              the preset `speedrun` on a host of 8 chips
    python -m scripts.dry_run h100:8               the same on 8 GPUs
    python -m scripts.dry_run v6e:2x4 --stage=2 --dump=DIR      one program; HLO in DIR/train_2.hlo
    python -m scripts.dry_run v6e:2x4 --piece=head --head_block=2048           a piece, in a minute
    python -m scripts.dry_run v6e:2x4 --num_layers=16 --json=FILE             any flag of train.py

The TPU compiler runs on any Linux machine. Of each program this prints what is certain, its memory
and collectives, and a prediction of its time: estimate.py says how, and how wrong it has
been. Train.py's kernels count by their instruction bundles (bundles.py). The train time
that follows is a projection, not a measurement. Compiling the preset's programs takes about half an
hour on two cores. Needs `pip install "jax[tpu]"`.

Of GPUs, for which it needs `pip install jax-cuda13-plugin`, it prints memory, kernels, collectives
and bounds of the time (gpu_cost.py), but no projection: no GPU has calibrated them.
"""

import os
import sys

# Before jax is imported: constants are made on the CPU, a TPU in this machine is left alone. The
# others save minutes of asking the cloud's metadata server.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")

import argparse
import importlib.util
import json
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import jax
from jax.experimental import topologies

import train
from scripts.dry_run import bundles, gpu
from scripts.dry_run.estimate import BUNDLE_RANGE, CHIPS, collective_lines, estimate
from scripts.dry_run.hlo import Module
from scripts.dry_run.programs import PIECES, list_jobs, out_of_memory
from scripts.files import require_place, write_whole
from train import GPT, UsageError

TOPOLOGIES = {  # chips per host, where it is not the compiler's default
    "v6e:1x1": (1, 1, 1),
    "v6e:2x2": None,
    "v6e:2x4": (2, 4, 1),
    "v6e:4x4": None,
    "v5e:1x1": (1, 1, 1),
    "v5e:2x2": None,
    "v5e:2x4": (2, 4, 1),
    "v5e:4x4": None,
    "v5p:2x2x1": None,
    "v5p:2x2x2": None,
}
DEFAULT_TOPOLOGY = {"v6e": "v6e:2x4", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1"}  # for a chip alone


def topology_devices(name):
    """Devices to compile for. Raises UsageError without libtpu, and for names it does not know."""
    name = DEFAULT_TOPOLOGY.get(name, name)
    bounds = TOPOLOGIES.get(name)
    options = {"chips_per_host_bounds": bounds} if bounds else {}
    refused = UsageError(
        f"{name}: no such topology for the compiler; these work: {', '.join(TOPOLOGIES)}, and "
        f"more of a kind as far as libtpu knows them; of GPUs {', '.join(gpu.EXAMPLES)}"
    )
    if name.split(":")[0] not in CHIPS:
        raise refused
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError('the TPU compiler is missing: pip install "jax[tpu]>=0.10,<0.13"')
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise refused from error
    return list(found.devices)


# ---- Kernels by their bundles --------------------------------------------------------------------
def kernels_in(jobs):
    """The Pallas calls of the traced jobs, alike ones once."""
    seen = set()
    for job in jobs:
        traced = job.function.trace(*job.arguments)
        for eqn in bundles.kernels(traced.jaxpr.jaxpr):
            if str(eqn) not in seen:
                seen.add(str(eqn))
                yield eqn


def branch_rule(eqn):
    """How often the branches and inner loops of train.py's kernels run, for bundles.count."""
    name = str(eqn.params["name"])
    steps = eqn.params["grid_mapping"].grid[-1]
    if "band_fwd" in name or "copy_" in name:
        return {"weigh": bundles.one_of_chain(steps)}
    if "band_bwd" in name:
        tiles = eqn.invars[1].aval.shape[1] // train.TILE
        return {"weigh": bundles.one_of_chain_then_last(steps), "trips": [tiles]}
    return {}


def time_kernels(pipe, argv, model):
    """Send ({identity: seconds}, notes) of the jobs' kernels through a pipe.

    In a process of its own: libtpu is told only once, when it loads, to write bundles.
    """
    args, flags = parse(argv)
    cfg = config(flags, model.presets)
    clock = CHIPS[args.topology.split(":")[0]].clock
    jax.config.update("jax_enable_compilation_cache", False)  # what is cached leaves no bundles
    seconds = {}
    notes = []
    with tempfile.TemporaryDirectory(prefix="bundles-") as folder:
        os.chdir(folder)  # a flag of libtpu cannot hold a path with spaces
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {bundles.dump_flags('.')}"
        mesh = train.make_mesh(topology_devices(args.topology))
        chip = mesh.devices.flat[0]
        for eqn in kernels_in(list_jobs(model, mesh, cfg, args.stage, args.piece)):
            try:
                timed = bundles.time_alone(eqn, chip, clock, folder, branch_rule)
            except ValueError as error:
                notes.append(f"{error}; its cost_estimate counts instead")
                continue
            identity, call_s, per_step = timed
            if identity not in seconds:
                seconds[identity] = call_s
                notes.append(
                    f"kernel {eqn.params['name']}: grid {eqn.params['grid_mapping'].grid}, "
                    f"{per_step:.0f} bundles per grid step, {1e3 * call_s:.4f} ms before the "
                    f"factor {BUNDLE_RANGE[1]}"
                )
        pipe.send((seconds, notes))


def kernel_seconds(jobs, argv, model):
    """{identity: seconds} of the Pallas kernels in the jobs, printed too."""
    if next(kernels_in(jobs), None) is None:
        return {}
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=time_kernels, args=(end, argv, model), daemon=True)
    process.start()
    end.close()
    try:
        seconds, notes = pipe.recv()
    except EOFError:
        seconds = {}
        notes = ["kernels: the process that counts bundles broke off; cost_estimate counts instead"]
    process.join()
    print("\n".join(notes), flush=True)
    return seconds


# ---- Compiling -----------------------------------------------------------------------------------
def gib_of(text):
    """51.21G -> 51.21"""
    return float(text[:-1]) * 1024.0 ** ("KMGT".index(text[-1]) - 2)


def compile_job(job, chip, cfg):
    """(compiled program, seconds). Raises UsageError where memory does not suffice."""
    lowered = job.function.lower(*job.arguments)
    start = time.perf_counter()
    try:
        program = lowered.compile(compiler_options=train.TPU_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        # "Used 51.21G of 31.25G hbm", or "(50.91G) exceeds available HBM (31.25G)"
        said = str(error)
        sizes = re.findall(r"\b([\d.]+[KMGT])\b", said)
        of_hbm = re.search("memory (on|in memory space) hbm", said, re.IGNORECASE)
        if "RESOURCE_EXHAUSTED" in said and of_hbm and len(sizes) >= 2:
            raise out_of_memory(job, gib_of(sizes[0]), gib_of(sizes[1]), cfg) from error
        if "vmem" in said.lower():
            raise UsageError(
                f"{job.name} does not fit: a kernel wants more fast memory than a core has; turn "
                "--stages.seq_len, --val.seq_len or --head_dim down, or take --attention=xla"
            ) from error
        raise
    seconds = time.perf_counter() - start
    need_gib = train.memory_of(program) / 2**30
    if need_gib > chip.hbm_gib:
        raise out_of_memory(job, need_gib, chip.hbm_gib, cfg)
    return program, seconds


# ---- Judging -------------------------------------------------------------------------------------
def judge(job, chip_name, seconds, cfg, dump=None):
    """Compile a job, print what it costs, return its JSON row. seconds: see kernel_seconds."""
    chip = CHIPS[chip_name]
    program, compile_s = compile_job(job, chip, cfg)
    text = program.as_text()
    if dump:
        write_whole(Path(dump) / f"{job.name}.hlo", text.encode())
    module = Module(text)
    counted = bundles.by_instruction(module, seconds)
    cost = estimate(module, chip_name, counted)
    calibrated = estimate(module, chip_name, wait=False)
    kind = job.mesh.devices.flat[0].device_kind
    peak = next(flops for name, flops in train.PEAK_FLOPS.items() if name in kind)
    row = {
        "name": job.name,
        "steps": job.steps,
        "tokens_per_step": job.tokens,
        "est_ms": 1e3 * cost.est_s,
        "low_ms": 1e3 * cost.low_s,
        "high_ms": 1e3 * cost.high_s,
        "mfu": job.flops / (peak * job.mesh.size) / cost.est_s if job.flops else None,
        "peak_hbm_gib": train.memory_of(program) / 2**30,
        "compile_s": compile_s,
        "collective_bytes": cost.sent_bytes,
        "sync_collective_ms": 1e3 * cost.sync_s,
    }
    print(describe(job, row, cost, calibrated, counted, chip), flush=True)
    return row


def describe(job, row, cost, calibrated, counted, chip):
    """Lines about a program: its size and time, then what the time consists of."""
    steps = f"{job.steps} steps of " if job.steps else ""
    mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
    model = f"model {job.flops / job.mesh.size / 1e12:.3f} TFLOP, " if job.flops else ""
    lines = [
        f"{job.name}: {steps}{job.tokens} tokens, {row['peak_hbm_gib']:.2f} of {chip.hbm_gib} GiB "
        f"HBM per chip, compiled in {row['compile_s']:.1f} s",
        f"  predicted {row['est_ms']:.2f} ms (low {row['low_ms']:.2f}, "
        f"high {row['high_ms']:.2f}){mfu}",
        f"  per chip: {model}compiled {cost.flops / 1e12:.3f} TFLOP, "
        f"{cost.hbm_bytes / 1e9:.2f} GB of HBM traffic, {cost.sent_bytes / 1e9:.4f} GB sent",
    ]
    if job.chips:
        per_step = job.stage.batch_tokens / job.chips / job.tokens
        whole_ms = per_step * row["est_ms"]
        lines.append(
            f"  a step of this stage holds {per_step:g} of these per chip: {whole_ms:.2f} ms"
        )
    lines += describe_collectives(cost)
    if counted:
        lines.append(describe_kernels(cost, counted))
    lines.append(
        "  with kernels by their cost_estimate and asynchronous collectives for nothing: "
        f"{1e3 * calibrated.est_s:.2f} ms (low {1e3 * calibrated.low_s:.2f}, "
        f"high {1e3 * calibrated.high_s:.2f})"
    )
    if cost.unknown_trip_counts:
        lines.append(f"  trip count unknown, taken as 1: {', '.join(cost.unknown_trip_counts)}")
    return "\n".join(lines)


def describe_collectives(cost):
    """A line for each kind of them, and one for all."""

    def kind_of(row):
        is_hidden = row.kind == "async collective"
        return row.op + (", asynchronous" if is_hidden else ", synchronous, exposed")

    lines = collective_lines(cost.rows, kind_of)
    if lines:
        lines.append(
            f"  of {1e3 * cost.async_s:.2f} ms of asynchronous collectives "
            f"{1e3 * cost.wait_s:.2f} ms are exposed, by the compiler's order of instructions; "
            f"with {1e3 * cost.sync_s:.2f} ms synchronous, "
            f"{(cost.wait_s + cost.sync_s) / cost.est_s:.1%} of the whole"
        )
    return lines


def describe_kernels(cost, counted):
    calls = [entry for entry in cost.rows if entry.kind == "kernel"]
    total = sum(entry.calls for entry in calls)
    by_bundles = sum(entry.calls for entry in calls if entry.name in counted)
    how = "by their bundles"
    if by_bundles < total:
        how = f"{by_bundles:g} of them by their bundles, the others by their cost_estimate"
    return f"  kernels {1e3 * cost.kernel_s:.2f} ms in {total:g} calls, {how}"


def summary(rows, topology, cfg):
    """What the JSON file holds; the projection is of the training programs among rows."""
    training = [row for row in rows if row["name"].startswith("train")]

    def total_s(key):
        return sum(row["steps"] * row[key] for row in training) / 1e3

    tokens = train.tokens_before(cfg.steps, cfg)
    if len(training) == 1 and training[0]["steps"] < cfg.steps:  # --stage
        tokens = training[0]["steps"] * training[0]["tokens_per_step"]
    return {
        "topology": topology,
        "preset": cfg.preset,
        "tokens": tokens,
        "projected_train_s": total_s("est_ms"),
        "low_s": total_s("low_ms"),
        "high_s": total_s("high_ms"),
        "programs": rows,
    }


# ---- Command line --------------------------------------------------------------------------------
def parse(argv):
    """(own arguments, flags of train.py). Raises UsageError."""

    def fail(message):
        raise UsageError(f"{message} (python -m scripts.dry_run --help)")

    parser = argparse.ArgumentParser(
        usage="python -m scripts.dry_run TOPOLOGY [--FLAG=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    flag = parser.add_argument
    flag("topology", metavar="TOPOLOGY", help=", ".join([*TOPOLOGIES, *gpu.EXAMPLES]))
    flag("--json", metavar="FILE", help="write the numbers there")
    flag("--dump", metavar="DIR", help="write the optimized HLO of each program there")
    flag("--stage", type=int, metavar="K", help="only this stage; of --piece, default the last")
    flag("--piece", choices=PIECES, help="a piece of the training step, in the shapes of a chip")
    flag("--memory_gib", type=float, metavar="N", help="of each GPU, in place of its own")
    return parser.parse_known_args(argv)


def config(flags, presets=train.PRESETS, platform="tpu", capability=0.0):
    """Config without data: the vocabulary is GPT-2's, of Python's own source bytes.

    Raises UsageError.
    """
    cfg = train.parse_flags(flags, next(iter(presets)), presets)
    is_gpt2 = cfg.train_files and cfg.val_files
    meta = train.GPT2_META if is_gpt2 else train.BYTES_META
    cfg = train.complete_config(train.Shards([], [], meta), cfg)
    jax.config.update("jax_enable_x64", False)
    precision = "float32" if cfg.compute_dtype == "float32" else None
    jax.config.update("jax_default_matmul_precision", precision)
    return train.choose_attention(cfg, platform, capability)


def project(result, covers):
    seconds = result["projected_train_s"]
    return (
        f"projection: {seconds:.1f} s of training (low {result['low_s']:.1f}, "
        f"high {result['high_s']:.1f}) on {result['tokens']} tokens ({covers}); "
        "allow 15 % either way. A projection is no measurement"
    )


def run_on_tpu(args, argv, cfg, model):
    """Judge all jobs and project the train time; return what the JSON file holds."""
    devices = topology_devices(args.topology)
    if args.dump:
        Path(args.dump).mkdir(parents=True, exist_ok=True)
    kind = f"{len(devices)} x {devices[0].device_kind}"
    words = f"{args.topology}: {kind}, preset {cfg.preset}; nothing below was measured"
    print(words, flush=True)
    jobs = list_jobs(model, train.make_mesh(devices), cfg, args.stage, args.piece)
    seconds = kernel_seconds(jobs, argv, model)
    chip = args.topology.split(":")[0]
    rows = [judge(job, chip, seconds, cfg, args.dump) for job in jobs]
    result = summary(rows, args.topology, cfg)
    if not args.piece:
        covers = "the whole schedule" if args.stage is None else f"stage {args.stage}"
        print(project(result, covers))
    return result


def main(argv=None, model=GPT):
    """Returns what the JSON file holds. Raises UsageError.

    model: as of train.main. It is sent to another process, so its functions must be a module's.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, flags = parse(argv)
    device = "tpu", 0.0
    if gpu.is_gpu(args.topology):
        kind, _ = gpu.read_topology(args.topology, args.memory_gib)
        device = "gpu", float(kind.capability)
    elif args.memory_gib is not None:
        raise UsageError(f"--memory_gib={args.memory_gib:g}: it is for GPUs, not {args.topology}")
    cfg = config(flags, model.presets, *device)
    if args.json:
        require_place(args.json)
    if device[0] == "gpu":
        result = gpu.run(args, cfg, model)
    else:
        result = run_on_tpu(args, argv, cfg, model)
    if args.json:
        write_whole(args.json, (json.dumps(result, indent=1) + "\n").encode())
    return result
