"""What does a training step cost on one CPU core, and what beside the same step of other programs?

    python -m scripts.bench                                both workloads in bfloat16 and float32, this repository alone
    python -m scripts.bench --modded_jax=DIR --nanogpt=DIR     in turns with its peers: the ratios are the result
    python -m scripts.bench --only=step -- --compute_dtype=bfloat16     what follows -- are flags of train.py

step  a small GPT under a full GPT-2 vocabulary (scripts/presets/bench_step.args). Peer: modded-nanogpt-jax (DIR: a git
      repository that has commit 0316a10), a speedrun in one file of pure JAX, with Muon and Adam too.
char  the character model of nanoGPT's README by AdamW (scripts/presets/char_adamw.args). Peer: nanoGPT (DIR: a git
      repository that has commit 3adf61e), eager, in float32; it needs torch.

Each program is compiled once, in a process of its own, all on one core with one thread; then they take turns. A row is
one turn: CPU time per step and median wall time, with the CPU's speed just before and after, as GFLOP of a float32
matmul per second of CPU. Tokens are random (Zipf) and the same for all; a step's cost does not depend on them.
"""
import argparse, contextlib, importlib.util, io, json, multiprocessing, os, subprocess, sys, time, types

import jax
import jax.numpy as jnp
import numpy as np

from train import (PRESETS, ROOT, Config, Model, UsageError, make_init, make_mesh, make_train_step, parse_flags, stages,
                   to_devices, validate)

FLAGS = {"step": "bench_step.args", "char": "char_adamw.args"}
PEER = {"step": ("modded_jax", "0316a10:train.py"), "char": ("nanogpt", "3adf61e:model.py")}
TURN = {"step": 4, "char": 60}  # steps

# ---- The programs: each function compiles one and returns (state, put, step, seconds that took) ----
# put(tokens uint16 [B, T+1]) -> batch is not timed; step(state, batch) -> (state, loss) is, until the loss is a number.

def ours(cfg, source):
    mesh, stage = make_mesh(), stages(cfg)[0]
    put = lambda tokens_BT1: to_devices([[row] for row in tokens_BT1], stage, mesh, cfg)
    state, start = make_init(Model(), mesh, cfg)(), time.perf_counter()
    step = make_train_step(stage, Model(), mesh, cfg).lower(state, put([])).compile()
    return state, put, step, time.perf_counter() - start

def modded_jax(cfg, source):
    """Its Config, weights, optimizers and train_step as they are; the mesh gets the axis type it was written for."""
    plain, auto = jax.make_mesh, jax.sharding.AxisType.Auto
    jax.make_mesh = lambda shape, names: plain(shape, names, axis_types=(auto,) * len(names))
    peer, length = run_source("modded_jax", source), stages(cfg)[0].seq_len
    num_rows = stages(cfg)[0].batch_tokens // length
    its = peer.Config(n_layers=cfg.num_layers, d_model=cfg.model_dim, n_heads=cfg.num_heads, vocab_size=cfg.vocab_size,
                      dtype=cfg.compute_dtype, batch_size=num_rows, micro_batch_size=num_rows, min_sequence_length=length,
                      max_sequence_length=length, sequence_warmup_intervals=length, n_train_iters=cfg.steps)
    put = lambda tokens_BT1: [jnp.asarray(x[None], jnp.int32) for x in (tokens_BT1[:, :-1], tokens_BT1[:, 1:])]
    with peer.get_mesh(its) as mesh:
        params, tables = peer.init_params(its, mesh)
        optimizer, opt_state = peer.init_optimizer(its, params, mesh)
        program, start = jax.jit(peer.train_step, static_argnums=(0, 4), donate_argnums=(1, 3)), time.perf_counter()
        program = program.lower(its, params, tables, opt_state, optimizer, *put(np.zeros((num_rows, length + 1)))).compile()
    def step(state, batch):
        params, opt_state, metrics = program(state[0], tables, state[1], *batch)
        return (params, opt_state), metrics["loss"]
    return (params, opt_state), put, step, time.perf_counter() - start

def nanogpt(cfg, source):
    """Its model and its AdamW, in the order of its training loop."""
    import torch
    torch.set_num_threads(1)
    peer, length = run_source("nanogpt", source), stages(cfg)[0].seq_len
    with contextlib.redirect_stdout(io.StringIO()):
        model = peer.GPT(peer.GPTConfig(n_layer=cfg.num_layers, n_head=cfg.num_heads, n_embd=cfg.model_dim, bias=False,
                                        block_size=length, vocab_size=cfg.vocab_size, dropout=0.0))
        optimizer = model.configure_optimizers(cfg.adam_wd, cfg.adamw_lr, (cfg.adam_beta1, cfg.adam_beta2), "cpu")
    put = lambda tokens_BT1: [torch.from_numpy(x.astype(np.int64)) for x in (tokens_BT1[:, :-1], tokens_BT1[:, 1:])]
    def step(state, batch):
        _, loss = model(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return state, loss.detach()
    return None, put, step, 0.0

def run_source(name, source):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module

# ---- Measuring ----

def calibrate(seconds=0.3, size=768):
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    y, count, start = x @ x, 0, time.process_time()
    while time.process_time() < start + seconds:
        np.matmul(x, x, out=y)
        count += 1
    return 2e-9 * size ** 3 * count / (time.process_time() - start)

def work(pipe, workload, name, program, cfg, source):
    """A program's process: compile, run step 0, then for each number that arrives so many steps; at 0 it ends."""
    state, put, step, compile_s = program(cfg, source)
    stage, rng, share = stages(cfg)[0], np.random.default_rng(1337), 1 / np.arange(1, cfg.vocab_size + 1)
    shape, losses, num_steps = (stage.batch_tokens // stage.seq_len, stage.seq_len + 1), [], 1
    while num_steps:
        batches = [put(rng.choice(cfg.vocab_size, shape, p=share / share.sum()).astype(np.uint16)) for _ in range(num_steps)]
        before, ticks, cpu = calibrate(), [time.perf_counter()], time.process_time()
        for batch in batches:
            state, loss = step(state, batch)
            losses.append(float(loss))
            ticks.append(time.perf_counter())
        cpu_ms, wall_ms = 1e3 * (time.process_time() - cpu) / num_steps, 1e3 * float(np.median(np.diff(ticks)))
        pipe.send({"workload": workload, "program": name, "cpu_ms": cpu_ms, "wall_ms": wall_ms, "losses": losses[:4],
                   "tokens_per_s": 1e3 * stage.batch_tokens / wall_ms, "gflops": [before, calibrate()], "compile_s": compile_s})
        num_steps = 0
        with contextlib.suppress(EOFError):  # the end of the parent is the end of this
            num_steps = pipe.recv()

def measure(workload, programs, args):
    """programs: {name: (function, cfg, source)}. Prints a row for each turn of each, and returns them as dicts."""
    context, pipes, rows = multiprocessing.get_context("spawn"), {}, []
    for name, program in programs.items():
        pipes[name], end = context.Pipe()
        context.Process(target=work, args=(end, workload, name, *program), daemon=True).start()
        end.close()
        pipes[name].recv()  # of step 0, which is not counted; one after the other, as they share the core
    for turn in range(args.rounds):
        for pipe in pipes.values():
            pipe.send(args.steps or TURN[workload])
            rows.append(row := pipe.recv() | {"round": turn})
            print("{workload:6}{program:21}{round:5}{cpu_ms:13.1f}{wall_ms:9.1f}{tokens_per_s:10.0f}".format(**row),
                  "{:7.0f} {:.0f}{:11.1f}  ".format(*row["gflops"], row["compile_s"]), *map("{:.3f}".format, row["losses"]),
                  flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    return rows

def compare(rows, one, other):
    times = [[row["cpu_ms"] for row in rows if row["program"] == name] for name in (one, other)]
    ratios = [a / b for a, b in zip(*times)]
    return f"{one} / {other}: {np.median(ratios):.3f} of the CPU time (by round: {' '.join(map('{:.3f}'.format, ratios))})"

# ---- Command line ----

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.bench --help lists all flags)")
    parser = argparse.ArgumentParser(usage="python -m scripts.bench [--FLAG=VALUE ...] [-- FLAGS]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("--only", default="step,char", metavar="LIST", help="workloads (default: %(default)s)")
    flag("--rounds", type=int, default=3, metavar="N", help="turns of each program (default: %(default)s)")
    flag("--steps", type=int, default=0, metavar="N", help="steps of a turn (default: {step}, {char})".format(**TURN))
    flag("--core", type=int, metavar="N", help="CPU to run on (default: the first this process may use)")
    flag("--json", metavar="FILE", help="write the rows there, a list of objects")
    for peer, _ in PEER.values():
        flag(f"--{peer}", metavar="DIR", help="the peer's git repository (default: not run)")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.flags, args.only = argv[split + 1:], args.only.split(",")
    if args.rounds < 1 or args.steps < 0 or not set(args.only) <= set(FLAGS):
        fail(f"--only={','.join(args.only)} --rounds={args.rounds} --steps={args.steps}: wanted step, char or both with a "
             "comma, at least 1 round, and no negative steps")
    return args

def pin(core):
    """Puts this process and those it will start on one core. Returns a phrase that says so. Raises UsageError."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if core not in (None, *cores):
        raise UsageError(f"--core={core}: this process may run on {', '.join(map(str, cores)) or 'any, but not be pinned'}")
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false",
                   "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false",
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if not cores:
        return "not pinned to a core, for this system has no sched_setaffinity"
    os.sched_setaffinity(0, {cores[0] if core is None else core})
    return f"pinned to core {cores[0] if core is None else core}"

def peer_source(peer, path, folder):
    """(the peer's file out of git, ""), or (None, why it cannot run). Raises UsageError."""
    if not folder:
        return None, f"give --{peer}=DIR"
    shown = subprocess.run(["git", "-C", folder, "show", path], capture_output=True, text=True)
    if shown.returncode:
        raise UsageError(f"--{peer}={folder}: no {path} there, git says: {' '.join(shown.stderr.split())}")
    return shown.stdout, "" if peer != "nanogpt" or importlib.util.find_spec("torch") else "it needs torch"

def main(argv=None):
    """Raises UsageError before anything is measured."""
    args, jobs, rows, notes = parse(sys.argv[1:] if argv is None else argv), {}, [], []
    for workload in args.only:
        flags, (peer, path) = parse_flags([f"@{ROOT}/scripts/presets/{FLAGS[workload]}", *args.flags]), PEER[workload]
        dtypes = [flags["compute_dtype"]] if "compute_dtype" in flags else ["bfloat16", "float32"]
        configs = [Config(**PRESETS["demo"] | flags | {"compute_dtype": dtype}) for dtype in dtypes]
        validate(configs[0])
        source, lacks = peer_source(peer, path, getattr(args, peer))
        notes += [f"{peer}: not run: {lacks}"] if lacks else []
        programs = {f"ours {dtype}": (ours, cfg, None) for dtype, cfg in zip(dtypes, configs)}
        theirs = [f"{peer} float32" if peer == "nanogpt" else f"{peer} {dtype}" for dtype in dtypes]
        pairs = ([] if lacks else [*zip(programs, theirs)]) + [tuple(programs)] * (len(dtypes) - 1)
        programs |= {name: (globals()[peer], cfg, source) for name, cfg in zip(theirs, configs) if not lacks}
        jobs[workload] = programs, pairs
    json_file = open(args.json, "w") if args.json else None  # an error now is better than after the measurement
    print(f"jax {jax.__version__}, one thread, {pin(args.core)}. Losses are those of steps 0 to 3; step 0 is not timed.")
    print("work  program              round  CPU ms/step  wall ms  tokens/s  GFLOP/cpu-s compile s   losses")
    for workload, (programs, pairs) in jobs.items():
        measured = measure(workload, programs, args)
        rows, notes = rows + measured, notes + [f"{workload}: {compare(measured, *pair)}" for pair in pairs]
    print("\n".join(notes))
    if json_file:
        json.dump(rows, json_file, indent=1)

if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError, EOFError) as error:
        sys.exit(print("error:", str(error) or "a program broke off, its last words stand above", file=sys.stderr) or 2)
