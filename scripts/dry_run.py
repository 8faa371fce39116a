"""What will a run cost on a TPU? Needs `pip install "jax[tpu]"`, but no TPU and no data.

    python -m scripts.dry_run v6e:2x4                          the programs of the preset `speedrun` for a host of 8 chips
    python -m scripts.dry_run v6e:2x4 --stage=2 --dump=DIR     one program; its optimized HLO in DIR/train_2.hlo
    python -m scripts.dry_run v6e:2x4 --piece=head --head_block=2048     a part alone, in well under a minute
    python -m scripts.dry_run v6e:2x4 --num_layers=16 --json=FILE        any flag of train.py; FILE gets the numbers

The TPU compiler runs on any Linux machine. For each program this prints what is certain, its memory and its collectives,
and a prediction of its time (scripts/estimate.py says how, and how wrong it has been; kernels of train.py by their
instruction bundles, scripts/bundles.py). From these follows the train time of the schedule: a projection, not a measurement.
Compiling the preset's programs takes about ten minutes on two cores.
"""
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: constants are made there, a TPU in this machine is left alone
for _name, _value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                      "TPU_ACCELERATOR_TYPE": "v6e-8"}.items():  # else minutes of asking the cloud's metadata server
    os.environ.setdefault(_name, _value)

import argparse, collections, contextlib, importlib.util, json, math, multiprocessing, re, shutil, tempfile, time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

import train
from scripts import bundles, estimate
from train import GPT, UsageError, f32, replace

TOPOLOGIES = {"v6e:1x1": (1, 1, 1), "v6e:2x2": None, "v6e:2x4": (2, 4, 1), "v6e:4x4": None, "v5e:1x1": (1, 1, 1),
              "v5e:2x2": None, "v5e:2x4": (2, 4, 1), "v5e:4x4": None, "v5p:2x2x1": None, "v5p:2x2x2": None}  # chips per host
PIECES = ("layer", "attention", "head", "optimizer")
def blocks_of(eqn): return eqn.params["grid_mapping"].grid[-1]
# How often a kernel's branches and inner loops run, by its name: (regex, equation -> arguments of bundles.count).
BRANCHES = [(r"band_fwd", lambda eqn: {"weights": bundles.one_of_chain(blocks_of(eqn))}),
            (r"band_bwd", lambda eqn: {"weights": bundles.one_of_chain_then_last(blocks_of(eqn)),
                                       "trips": [eqn.invars[1].aval.shape[1] // train.TILE]})]

class Job(NamedTuple):
    """A program to compile. tokens: of one run, all chips; flops: of the model in one run, all chips, 0 where not counted;
    chips: of a piece compiled for one chip, how many share a step of the stage."""
    name: str
    function: object
    arguments: tuple
    mesh: object
    steps: int
    tokens: int
    flops: float
    stage: object
    chips: int = 0

# ---- Topology and compiler ----
def topology_devices(name):
    """Devices to compile for. Raises UsageError without libtpu, and for names it does not know."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError('the TPU compiler is missing: pip install "jax[tpu]>=0.10,<0.13"')
    from jax.experimental import topologies
    chip = name.split(":")[0]
    name = name if ":" in name else {"v6e": "v6e:2x4", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1"}.get(name, name)
    bounds = {"chips_per_host_bounds": TOPOLOGIES[name]} if TOPOLOGIES.get(name) else {}
    try:
        if chip not in estimate.CHIPS:
            raise ValueError(chip)
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices)
    except Exception as error:  # whatever libtpu throws at a name
        raise UsageError(f"{name}: no such topology for the compiler; these work: {', '.join(TOPOLOGIES)}, and more of a "
                         "kind as far as libtpu knows them") from error

def time_kernels(pipe, argv, changes):
    """A process of its own, as libtpu is told once, when it loads, to write bundles: sends ({identity: seconds}, notes)."""
    args, flags = parse(argv)
    model = GPT._replace(**changes)
    folder, cfg = tempfile.mkdtemp(prefix="bundles-"), config(flags, model.presets)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {bundles.dump_flags(folder)}"
    jax.config.update("jax_enable_compilation_cache", False)  # what is cached leaves no bundles
    seconds, notes, seen = {}, [], set()
    try:
        mesh = train.make_mesh(topology_devices(args.topology))
        for job in jobs_of(args, model, mesh, cfg):
            for eqn in bundles.kernels(job.function.trace(*job.arguments).jaxpr.jaxpr):
                if (key := str(eqn)) in seen:
                    continue
                seen.add(key)
                with capture_errors(notes):
                    clock = estimate.CHIPS[args.topology.split(":")[0]].clock
                    which, time_s, per_step = bundles.time_alone(eqn, mesh.devices.flat[0], clock, folder, BRANCHES)
                    if which not in seconds:
                        seconds[which] = time_s
                        notes.append(f"kernel {eqn.params['name']}: grid {eqn.params['grid_mapping'].grid}, {per_step:.0f} bundles "
                                     f"per grid step, {1e3 * time_s:.4f} ms before the factor {estimate.BUNDLE_RANGE[1]}")
        pipe.send((seconds, notes))
    finally:
        shutil.rmtree(folder)

@contextlib.contextmanager
def capture_errors(notes):
    try:
        yield
    except ValueError as error:
        notes.append(f"{error}; its cost_estimate counts instead")

def kernel_seconds(jobs, argv, model):
    """{identity: seconds} of the Pallas kernels in the jobs, printed too."""
    if not any(True for job in jobs for _ in bundles.kernels(job.function.trace(*job.arguments).jaxpr.jaxpr)):
        return {}
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    changes = {name: part for name, part in model._asdict().items() if part is not getattr(GPT, name)}
    process = context.Process(target=time_kernels, args=(end, argv, changes), daemon=True)
    process.start()
    end.close()
    try:
        seconds, notes = pipe.recv()
    except EOFError:
        seconds, notes = {}, ["kernels: the process that counts bundles broke off; cost_estimate counts instead"]
    process.join()
    print("\n".join(notes), flush=True)
    return seconds

# ---- Programs ----
def programs_of(model, mesh, cfg, only=None):
    """Jobs of the run: the training programs and evaluation; with `only`, the program of that stage."""
    listed, specs = train.list_programs(model, mesh, cfg), model.specs(cfg)
    jobs = []
    for i, (stage, first, last) in enumerate(cfg.spans):
        if only in (None, i):
            flops = train.flops_per_token(stage, specs, cfg) * stage.batch_tokens
            name, steps, tokens = f"train_{i}", last - first, stage.batch_tokens
            jobs.append(Job(name, *listed[name], mesh, steps, tokens, flops, stage))
    if only is None:
        steps = sum(train.due(cfg.val_every, step) for step in range(1, cfg.steps)) + 1
        tokens = -(-cfg.val_tokens // (cfg.val.seq_len - cfg.val_context)) * cfg.val.seq_len
        flops = train.flops_per_token(cfg.val, specs, cfg) / 3 * tokens  # forward only
        jobs.append(Job("eval", *listed["eval"], mesh, steps, tokens, flops, cfg.val))
    return jobs

def pieces_of(piece, stage, model, mesh, cfg):
    """Jobs of one part of a training step, in the shapes that a chip sees: `layer` two blocks forward and backward over two
    micro-steps, `attention` its core for each window, `head` the loss with its gradients, `optimizer` the update with its
    collectives on all chips."""
    _, num_rows, width = train.batch_shape(stage, mesh.size, cfg)
    B, T, one = num_rows // mesh.size, width - 1, train.make_mesh(mesh.devices.flatten().tolist()[:1])
    whole = NamedSharding(one, P())
    def shape(dtype, *dims): return jax.ShapeDtypeStruct(dims, dtype, sharding=whole)
    def job(name, function, *arguments, tokens=B * T):
        mapped = jax.shard_map(function, mesh=one, in_specs=P(), out_specs=P(), check_vma=False)
        return Job(name, jax.jit(mapped), arguments, one, 0, tokens, 0.0, stage, mesh.size)
    if piece == "layer":
        few = replace(cfg, num_layers=2, mlp_only=(), skips=(), late_inputs=(), backout=(), vocab_size=128, bos_id=0)
        specs = {name: spec for name, spec in model.specs(few).items() if name != "head"}
        params = jax.tree.map(lambda spec: shape(f32, *spec.shape), specs)
        def layer(params, tokens_ABT):
            weights = train.unstack(train.gather(params, specs, 1, few))
            def total(weights, tokens_BT):
                x_BTD = train.forward(weights, tokens_BT, weights["embed"][tokens_BT], stage, few)
                return x_BTD.astype(f32).sum()
            def add(sums, tokens_BT):
                return jax.tree.map(lambda s, g: s + g.astype(f32), sums, jax.grad(total)(weights, tokens_BT)), None
            return jax.lax.scan(add, jax.tree.map(lambda w: jnp.zeros(w.shape, f32), weights), tokens_ABT)[0]
        return [job("layer", layer, params, shape(jnp.int32, 2, B, T), tokens=2 * B * T)]
    if piece == "attention":
        q, k = (shape(cfg.compute_dtype, B, T, heads * cfg.head_dim) for heads in (cfg.num_heads, cfg.kv_heads))
        def core(window):
            def forward_and_backward(q, k, v, gate_BTH, first_BT, g):
                table = train.rotary(T, stage, cfg)
                attend = lambda *inputs: train.ATTENTION[cfg.attention](*inputs, first_BT, table, window, cfg)
                return jax.vjp(attend, q, k, v, gate_BTH)[1](g)
            return forward_and_backward
        windows = sorted({train.window_of(layer, stage, cfg) for layer in range(cfg.num_layers)})
        gate_BTH, first_BT = shape(f32, B, T, cfg.num_heads), shape(jnp.int32, B, T)
        return [job(f"attention_{window}", core(window), q, k, k, gate_BTH, first_BT, q) for window in windows]
    if piece == "head":
        loss = jax.value_and_grad(lambda x, w, weight: train.log_partition(x, w, weight, cfg), argnums=(0, 1))
        x, w = (shape(cfg.compute_dtype, size, cfg.model_dim) for size in (B * T, cfg.padded_vocab))
        return [job("head", loss, x, w, shape(f32, B * T))]
    specs, rules, n = model.specs(cfg), model.rules(cfg), mesh.size
    state = train.list_programs(model, mesh, cfg)["train_0"][1][0]
    parts = train.partition(train.state_shardings(model, mesh, cfg))
    def optimizer(state, grads):
        grads = train.reduce_grads(grads, specs, n, cfg)
        params, slots = model.update(state, grads, stage, specs, rules, n, cfg)
        return train.State(state.step + 1, params, slots), train.gather(params, specs, n, cfg)
    everywhere = NamedSharding(mesh, P())
    grads = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, f32, sharding=everywhere), specs)
    function = train.on_devices(optimizer, mesh, (parts, P()), (parts, P()))
    return [Job("optimizer", function, (state, grads), mesh, 0, stage.batch_tokens, 0.0, stage)]

# ---- Compiling and judging one ----
def out_of_memory(job, need_gib, have_gib, cfg):
    """UsageError that says by how much a program does not fit, and what three flags could become:
    micro-steps halved as often as the excess asks, blocks of the head whose logits and their
    gradient take a gibibyte, and a shorter row or a smaller batch."""
    _, num_rows, width = train.batch_shape(job.stage, job.mesh.size, cfg)
    row, at_once = width - 1, num_rows // job.mesh.size * (width - 1)
    halvings, evaluates = math.ceil(math.log2(need_gib / have_gib)) or 1, job.stage == cfg.val
    block, room = min(cfg.head_block or at_once, at_once), 2 ** int(math.log2(2**30 / (8 * cfg.padded_vocab)))
    advice = {"micro_tokens": at_once >> halvings, "head_block": room if room < block else block // 2}
    if advice["micro_tokens"] < row:  # a micro-step holds one row at least
        advice["val.seq_len" if evaluates else "stages.seq_len"] = row >> halvings
    else:
        tokens = cfg.val_tokens if evaluates else job.stage.batch_tokens
        advice["val_tokens" if evaluates else "stages.batch_tokens"] = tokens >> halvings
    turns = ", ".join(f"--{name}={value}" for name, value in advice.items())
    return UsageError(f"{job.name} does not fit: it needs {need_gib:.2f} GiB of the chip's {have_gib:.2f}, "
                      f"{need_gib - have_gib:.2f} too many. Turn one or more of these: {turns}")

def compile_job(job, chip, cfg):
    """(compiled program, seconds). UsageError where memory does not suffice."""
    lowered, start = job.function.lower(*job.arguments), time.perf_counter()
    gib = lambda size: float(size[:-1]) * {"K": 2.0 ** -20, "M": 2.0 ** -10, "G": 1.0, "T": 2.0 ** 10}[size[-1]]
    try:
        program = lowered.compile(compiler_options=train.TPU_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        said = str(error)  # "Used 51.21G of 31.25G hbm", or "for HLO temporaries (50.91G) exceeds available HBM (31.25G)"
        sizes, of_hbm = re.findall(r"\b([\d.]+[KMGT])\b", said), re.search("memory (on|in memory space) hbm", said, re.I)
        if "RESOURCE_EXHAUSTED" in said and of_hbm and len(sizes) >= 2:
            raise out_of_memory(job, gib(sizes[0]), gib(sizes[1]), cfg) from error
        if "vmem" in said.lower():
            raise UsageError(f"{job.name} does not fit: a kernel wants more fast memory than a core has; turn "
                             "--stages.seq_len, --val.seq_len or --head_dim down, or take --attention=xla") from error
        raise
    need = train.memory_of(program) / 2**30
    if need > chip.hbm_gib:
        raise out_of_memory(job, need, chip.hbm_gib, cfg)
    return program, time.perf_counter() - start

def judge(job, chip_name, seconds, cfg, dump=None):
    """Compile a job, print its block, return its JSON row. seconds: of kernels by their bundles, {identity: seconds}."""
    chip = estimate.CHIPS[chip_name]
    program, compile_s = compile_job(job, chip, cfg)
    text = program.as_text()
    if dump:
        (Path(dump) / f"{job.name}.hlo").write_text(text)
    module = estimate.Module(text)
    kernels = bundles.by_instruction(module, seconds)
    cost, plain = estimate.estimate(module, chip_name, kernels), estimate.estimate(module, chip_name, wait=False)
    kind = job.mesh.devices.flat[0].device_kind
    peak = next(flops for name, flops in train.PEAK_FLOPS.items() if name in kind) * job.mesh.size
    mfu = job.flops / peak / cost["est_s"] if job.flops else None
    row = {"name": job.name, "steps": job.steps, "tokens_per_step": job.tokens, "est_ms": 1e3 * cost["est_s"],
           "low_ms": 1e3 * cost["low_s"], "high_ms": 1e3 * cost["high_s"], "mfu": mfu,
           "peak_hbm_gib": train.memory_of(program) / 2**30, "compile_s": compile_s, "collective_bytes": cost["sent_bytes"],
           "sync_collective_ms": 1e3 * cost["sync_s"]}
    print(describe(job, row, cost, plain, kernels, chip), flush=True)
    return row

def describe(job, row, cost, plain, kernels, chip):
    mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
    steps = f"{job.steps} steps of " if job.steps else ""
    model = f"model {job.flops / job.mesh.size / 1e12:.3f} TFLOP, " if job.flops else ""
    lines = [f"{job.name}: {steps}{job.tokens} tokens, {row['peak_hbm_gib']:.2f} of {chip.hbm_gib} GiB HBM per chip, "
             f"compiled in {row['compile_s']:.1f} s",
             f"  predicted {row['est_ms']:.2f} ms (low {row['low_ms']:.2f}, high {row['high_ms']:.2f}){mfu}",
             f"  per chip: {model}compiled {cost['flops'] / 1e12:.3f} TFLOP, "
             f"{cost['hbm_bytes'] / 1e9:.2f} GB of HBM traffic, {cost['sent_bytes'] / 1e9:.4f} GB sent"]
    if job.chips:
        per_step = job.stage.batch_tokens / job.chips / job.tokens
        whole = f"{per_step * row['est_ms']:.2f} ms"
        lines.append(f"  a step of this stage holds {per_step:g} of these per chip: {whole}")
    groups = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for entry in cost["rows"]:
        if entry.op:
            kind = "asynchronous" if entry.kind.startswith("async") else "synchronous, exposed"
            where = f"{entry.op}, {kind}{', in a loop' if entry.in_loop else ''}"
            groups[where] = [a + b * entry.calls for a, b in zip(groups[where], (1, entry.sent_bytes, entry.link_s))]
    lines += [f"  {where}: {count:g} times, {sent / 1e6:.1f} MB sent, {1e3 * seconds:.2f} ms"
              for where, (count, sent, seconds) in sorted(groups.items())]
    if groups:
        lines.append(f"  of {1e3 * cost['async_s']:.2f} ms of asynchronous collectives {1e3 * cost['wait_s']:.2f} ms are exposed, by the "
                     f"compiler's order of instructions; with {1e3 * cost['sync_s']:.2f} ms synchronous, "
                     f"{(cost['wait_s'] + cost['sync_s']) / cost['est_s']:.1%} of the whole")
    if kernels:
        calls = [(entry.calls, entry.name in kernels) for entry in cost["rows"] if entry.kind == "kernel"]
        total, counted = sum(n for n, _ in calls), sum(n for n, by_bundles in calls if by_bundles)
        lines.append(f"  kernels {1e3 * cost['kernel_s']:.2f} ms in {total:g} calls, "
                     + ("by their bundles" if total == counted else f"{counted:g} of them by their bundles, the others by their cost_estimate"))
    lines.append(f"  with kernels by their cost_estimate and asynchronous collectives for nothing: {1e3 * plain['est_s']:.2f} ms "
                 f"(low {1e3 * plain['low_s']:.2f}, high {1e3 * plain['high_s']:.2f})")
    if cost["unknown_trip_counts"]:
        lines.append(f"  trip count unknown, taken as 1: {', '.join(cost['unknown_trip_counts'])}")
    return "\n".join(lines)

# ---- Command line ----
def parse(argv):
    """(own arguments, flags of train.py). Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.dry_run --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.dry_run TOPOLOGY [--FLAG=VALUE ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("topology", metavar="TOPOLOGY", help=", ".join(TOPOLOGIES))
    flag("--json", metavar="FILE", help="write the numbers there")
    flag("--dump", metavar="DIR", help="write the optimized HLO of each program there")
    flag("--stage", type=int, metavar="K", help="only the program of this stage; of --piece the stage (default: the last)")
    flag("--piece", choices=PIECES, help="a part of the training step alone, in the shapes that a chip sees")
    args, rest = parser.parse_known_args(argv)
    return args, rest

def config(flags, presets=train.PRESETS):
    """Config without data: vocabulary and BOS default to GPT-2's, for the embedded corpus to bytes.
    Raises UsageError."""
    cfg = train.parse_flags(flags, next(iter(presets)), presets)
    vocab_size, bos_id = (50257, 50256) if cfg.train_files and cfg.val_files else (257, 256)
    bos_id = bos_id if cfg.bos_id is None else cfg.bos_id
    cfg = replace(cfg, vocab_size=cfg.vocab_size or vocab_size, bos_id=bos_id)
    cfg = train.choose_attention(cfg, "tpu")
    jax.config.update("jax_default_matmul_precision", "float32" if cfg.compute_dtype == "float32" else None)
    return cfg

def summary(rows, topology, cfg):
    """What the JSON file holds; the projection is of the training programs among rows."""
    steps = [row for row in rows if row["name"].startswith("train")]
    total = lambda key: sum(row["steps"] * row[key] for row in steps) / 1e3
    tokens = train.tokens_before(cfg.steps, cfg)
    if len(steps) == 1 and steps[0]["steps"] < cfg.steps:  # --stage
        tokens = steps[0]["steps"] * steps[0]["tokens_per_step"]
    return {"topology": topology, "preset": cfg.preset, "tokens": tokens, "projected_train_s": total("est_ms"),
            "low_s": total("low_ms"), "high_s": total("high_ms"), "programs": rows}

def jobs_of(args, model, mesh, cfg):
    """Raises UsageError for a stage that is not there."""
    last = len(cfg.stages) - 1
    if args.stage is not None and not 0 <= args.stage <= last:
        raise UsageError(f"--stage={args.stage}: wanted 0 to {last}")
    if args.piece:
        return pieces_of(args.piece, cfg.stages[last if args.stage is None else args.stage], model, mesh, cfg)
    return programs_of(model, mesh, cfg, args.stage)

def main(argv=None, model=GPT):
    """Returns what the JSON file holds. Raises UsageError. model: as of train.main; what it changes
    of GPT is sent to another process, so functions must be a module's."""
    argv = sys.argv[1:] if argv is None else argv
    args, flags = parse(argv)
    cfg = config(flags, model.presets)
    devices = topology_devices(args.topology)
    if args.dump:
        Path(args.dump).mkdir(parents=True, exist_ok=True)
    mesh, chip = train.make_mesh(devices), args.topology.split(":")[0]
    kind = f"{len(devices)} x {devices[0].device_kind}"
    print(f"{args.topology}: {kind}, preset {cfg.preset}; nothing below was measured", flush=True)
    jobs = jobs_of(args, model, mesh, cfg)
    seconds = kernel_seconds(jobs, argv, model)
    result = summary([judge(job, chip, seconds, cfg, args.dump) for job in jobs], args.topology, cfg)
    if not args.piece:
        covers = "the whole schedule" if args.stage is None else f"stage {args.stage}"
        print("projection: {projected_train_s:.1f} s of training (low {low_s:.1f}, high {high_s:.1f})".format(**result),
              f"on {result['tokens']} tokens ({covers}); {result['projected_train_s'] * 505e6 / max(result['tokens'], 1):.1f} s "
              "per 505M tokens; allow 15 % either way. A projection is no measurement")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return result

if __name__ == "__main__":
    try:
        main()
    except (UsageError, estimate.UncostedKernel, OSError) as error:
        sys.exit(print("error:", error, file=sys.stderr) or 2)
