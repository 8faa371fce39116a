"""What does a training step cost on one CPU core, and what beside the same step of other programs?

    python -m scripts.bench                                    both workloads, this repository alone
    python -m scripts.bench --modded_jax=DIR --nanogpt=DIR     in turns with the peers: the ratios are the result
    python -m scripts.bench --only=step -- --micro_tokens=512  what follows -- are flags of train.py

step  a small GPT under a full GPT-2 vocabulary, as in scripts/presets/bench_step.args. Peer: modded-nanogpt-jax (DIR: a
      git repository that has commit 0316a10), a speedrun in one file of pure JAX, also with Muon and Adam.
char  the character model of nanoGPT's README by AdamW, as in scripts/presets/char_adamw.args. Peer: nanoGPT (DIR: a git
      repository that has commit 3adf61e), eager, in float32; needs torch.

Every program is compiled once, in a process of its own; all are pinned to one core, with one thread. Then they take
turns, a block of steps each. Times are of that block: CPU time per step, and the median of the steps' wall times. A
machine's speed drifts, so beside each stands what it did just before and after: GFLOP of a float32 matmul per second of
CPU. Tokens are random (Zipf), the same for all; a step's cost does not depend on them.
"""
import argparse, contextlib, importlib.util, io, json, multiprocessing, os, subprocess, sys, time, types

import jax
import jax.numpy as jnp
import numpy as np

from train import PRESETS, ROOT, Config, Model, UsageError, make_init, make_mesh, make_train_step, parse_flags, stages, \
    to_devices, validate

FLAGS = {"step": "bench_step.args", "char": "char_adamw.args"}
PEER = {"step": "modded_jax", "char": "nanogpt"}
FILE = {"modded_jax": "0316a10:train.py", "nanogpt": "3adf61e:model.py"}
TURN = {"step": 4, "char": 60}  # steps

# ---- The programs: each compiles one and returns (state, put, step, seconds of compiling) ----
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
    mesh = peer.get_mesh(its)
    put = lambda tokens_BT1: [jnp.asarray(x[None], jnp.int32) for x in (tokens_BT1[:, :-1], tokens_BT1[:, 1:])]
    with mesh:
        params, tables = peer.init_params(its, mesh)
        optimizer, opt_state = peer.init_optimizer(its, params, mesh)
        program, start = jax.jit(peer.train_step, static_argnums=(0, 4), donate_argnums=(1, 3)), time.perf_counter()
        blank = put(np.zeros((num_rows, length + 1)))
        program = program.lower(its, params, tables, opt_state, optimizer, *blank).compile()

    def step(state, batch):
        params, opt_state, metrics = program(state[0], tables, state[1], *batch)
        return (params, opt_state), metrics["loss"]
    return (params, opt_state), put, step, time.perf_counter() - start

def nanogpt(cfg, source):
    """Its model and its AdamW, in the order of its training loop."""
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
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
    """GFLOP of a float32 matmul per second of CPU, now."""
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    y, count, start = x @ x, 0, time.process_time()
    while time.process_time() < start + seconds:
        np.matmul(x, x, out=y)
        count += 1
    return 2e-9 * size ** 3 * count / (time.process_time() - start)

def work(pipe, program, cfg, source):
    """A program's process: compile, run step 0, then for each number that arrives so many steps; at 0 it ends."""
    state, put, step, compile_s = program(cfg, source)
    stage, rng, share = stages(cfg)[0], np.random.default_rng(1337), 1 / np.arange(1, cfg.vocab_size + 1)
    shape, losses = (stage.batch_tokens // stage.seq_len, stage.seq_len + 1), []
    draw = lambda: put(rng.choice(cfg.vocab_size, shape, p=share / share.sum()).astype(np.uint16))
    def run(batch):
        nonlocal state
        state, loss = step(state, batch)
        losses.append(float(loss))
        return time.perf_counter()
    run(draw())
    pipe.send("ready")
    while num_steps := pipe.recv():
        batches, before = [draw() for _ in range(num_steps)], calibrate()
        start, cpu = time.perf_counter(), time.process_time()
        ends = [run(batch) for batch in batches]
        cpu_ms, wall_ms = 1e3 * (time.process_time() - cpu) / num_steps, 1e3 * float(np.median(np.diff([start, *ends])))
        pipe.send({"cpu_ms": cpu_ms, "wall_ms": wall_ms, "tokens_per_s": 1e3 * stage.batch_tokens / wall_ms,
                   "gflops": [before, calibrate()], "compile_s": compile_s, "losses": losses[:4]})

def measure(workload, programs, args):
    """programs: {name: (function, cfg, source)}. Prints a line for each turn of each, and returns them as dicts."""
    context, pipes, rows = multiprocessing.get_context("spawn"), {}, []
    for name, program in programs.items():
        pipes[name], end = context.Pipe()
        context.Process(target=work, args=(end, *program), daemon=True).start()
        end.close()
        pipes[name].recv()  # one after the other, as they share the core
    for turn in range(args.rounds):
        for name, pipe in pipes.items():
            pipe.send(args.steps or TURN[workload])
            row = {"workload": workload, "program": name, "round": turn} | pipe.recv()
            rows.append(row)
            print("{workload:6}{program:22}{round:5}{cpu_ms:13.1f}{wall_ms:9.1f}{tokens_per_s:10.0f}".format(**row),
                  "{:8.0f}{:5.0f}".format(*row["gflops"]), f"{row['compile_s']:10.1f}  ", *map("{:.3f}".format, row["losses"]),
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
    parser = argparse.ArgumentParser(usage="python -m scripts.bench [--FLAG=VALUE ...] [-- FLAGS OF train.py]", allow_abbrev=False,
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--only", default="step,char", metavar="LIST", help="workloads (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float32", metavar="LIST", help="compute dtypes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each program (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="steps of a turn (default: {step} and {char})".format(**TURN))
    parser.add_argument("--core", type=int, metavar="N", help="the CPU to run on (default: the first this process may use)")
    parser.add_argument("--json", metavar="FILE", help="write the table there: a list with an object for each line")
    parser.add_argument("--modded_jax", metavar="DIR", help="git repository of modded-nanogpt-jax")
    parser.add_argument("--nanogpt", metavar="DIR", help="git repository of nanoGPT")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.flags, args.only, args.dtypes = argv[split + 1:], args.only.split(","), args.dtypes.split(",")
    for name, wanted in (("only", list(FLAGS)), ("dtypes", ["bfloat16", "float32"])):
        if not set(getattr(args, name)) <= set(wanted):
            fail(f"--{name}={','.join(getattr(args, name))}: wanted {' or '.join(wanted)}, or both with a comma")
    if args.rounds < 1 or args.steps < 0:
        fail(f"--rounds={args.rounds} --steps={args.steps}: wanted at least 1 round, and steps not below 0")
    return args

def pin(core):
    """Puts this process and those it will start on one core. Returns a phrase that says so. Raises UsageError."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false",
                   "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false",
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned to a core, as this system has no sched_setaffinity"
    cores = sorted(os.sched_getaffinity(0))
    if core is not None and core not in cores:
        raise UsageError(f"--core={core}: this process may run on {', '.join(map(str, cores))}")
    os.sched_setaffinity(0, {cores[0] if core is None else core})
    return f"pinned to core {cores[0] if core is None else core}"

def peer_source(name, folder):
    """The peer's file out of git, or None where no folder is given. Raises UsageError."""
    shown = folder and subprocess.run(["git", "-C", folder, "show", FILE[name]], capture_output=True, text=True)
    if shown and shown.returncode:
        raise UsageError(f"--{name}={folder}: no {FILE[name]} there; git says: {' '.join(shown.stderr.split())}")
    return shown and shown.stdout

def main(argv=None):
    """Raises UsageError before anything is measured."""
    args, configs = parse(sys.argv[1:] if argv is None else argv), {}
    for workload in args.only:
        flags = parse_flags([f"@{ROOT}/scripts/presets/{FLAGS[workload]}", *args.flags])
        configs[workload] = {dtype: Config(**PRESETS["demo"] | flags | {"compute_dtype": dtype}) for dtype in args.dtypes}
        validate(configs[workload][args.dtypes[0]])
    sources = {name: peer_source(name, getattr(args, name)) for name in FILE}
    out = open(args.json, "w") if args.json else contextlib.nullcontext()
    print(f"jax {jax.__version__}, one thread, {pin(args.core)}. Losses are those of steps 0 to 3; step 0 is not timed.")
    print("work  program               round  CPU ms/step  wall ms  tokens/s  GFLOP/cpu-s  compile s   losses")
    rows, notes = [], []
    for workload, by_dtype in configs.items():
        peer, mine = PEER[workload], {dtype: f"ours {dtype}" for dtype in by_dtype}
        programs = {mine[dtype]: (ours, cfg, None) for dtype, cfg in by_dtype.items()}
        theirs = dict.fromkeys(by_dtype, peer) if peer == "nanogpt" else {dtype: f"{peer} {dtype}" for dtype in by_dtype}
        if missing := not sources[peer] and f"give --{peer}=DIR" or peer == "nanogpt" and not importlib.util.find_spec("torch") and "no torch":
            notes.append(f"{peer}: not run: {missing}")
        else:
            programs |= {theirs[dtype]: (globals()[peer], cfg, sources[peer]) for dtype, cfg in by_dtype.items()}
        rows += (measured := measure(workload, programs, args))
        pairs = [] if missing else [(mine[dtype], theirs[dtype]) for dtype in by_dtype]
        pairs += [tuple(mine.values())] if len(mine) == 2 else []
        notes += [f"{workload}: {compare(measured, *pair)}" for pair in pairs]
    print("\n".join(notes))
    with out as file:
        file and json.dump(rows, file, indent=1)

def command():
    """main() for the shell: one sentence and exit code 2 for what a user can mend."""
    try:
        main()
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EOFError:
        print("error: a program broke off; what it said stands above", file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.exit(command())
