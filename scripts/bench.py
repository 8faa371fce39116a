"""What does a training step cost on one CPU core, and what beside the same step of other programs?

    python -m scripts.bench                             both workloads, this repository only
    python -m scripts.bench --modded_jax=DIR --nanogpt=DIR   beside the peers, taking turns: look at the ratios
    python -m scripts.bench --only=step -- --micro_tokens=512    what follows -- are flags of train.py

step   a small GPT under a full GPT-2 vocabulary, scripts/presets/bench_step.args. Its peer is modded-nanogpt-jax (DIR:
       a git repository that has commit 0316a10), a speedrun in pure JAX with the same optimizers.
char   the character model of nanoGPT's README with AdamW, scripts/presets/char_adamw.args. Its peer is nanoGPT (DIR: a
       git repository that has commit 3adf61e), which needs torch; it clips gradients and has biasless layer norms.

Programs are compiled once, each in a process of its own, all pinned to one core with one thread. Then they take turns,
a block of steps each, for some rounds. A machine's speed drifts, so an absolute time is worth what the calibration
beside it says: GFLOP/s of a float32 matmul just before and after. The ratios of a round were measured together.
Tokens are random, Zipf-distributed: a step's cost does not depend on them, the losses only show that it learns.
"""
import argparse, contextlib, importlib.util, io, json, multiprocessing, os, subprocess, sys, time, types

import jax
import numpy as np

from train import (PRESETS, ROOT, Config, Model, UsageError, make_init, make_mesh, make_train_step, parse_flags, stages, to_devices,
                   validate)

PEERS = {"step": ("modded_jax", "0316a10:train.py"), "char": ("nanogpt", "3adf61e:model.py")}
FLAGS = {"step": "bench_step.args", "char": "char_adamw.args"}
BLOCK = {"step": 4, "char": 60}  # steps a program runs before it is the other's turn

# ---- The programs: each function compiles one and returns (state, put, step, seconds it took) ----
# put(tokens uint16 [B, T+1]) -> batch, untimed; step(state, batch) -> (state, loss), timed until the loss is a number.

def ours(cfg, source):
    mesh, stage = make_mesh(), stages(cfg)[0]
    put = lambda tokens: to_devices([[row] for row in tokens], stage, mesh, cfg)
    state, start = make_init(Model(), mesh, cfg)(), time.perf_counter()
    tokens = put(np.zeros((stage.batch_tokens // stage.seq_len, stage.seq_len + 1), np.uint16))
    step = make_train_step(stage, Model(), mesh, cfg).lower(state, tokens).compile()
    return state, put, step, time.perf_counter() - start

def modded_jax(cfg, source):
    """Its own Config, weights, optimizers and train_step; only the mesh is given the axis type it was written for."""
    plain, auto = jax.make_mesh, (jax.sharding.AxisType.Auto,)
    jax.make_mesh = lambda shape, names: plain(shape, names, axis_types=auto * len(names))
    peer = run_source("modded_jax", source)
    jax.config.update("jax_compilation_cache_dir", None)
    stage = stages(cfg)[0]
    num_rows, length = stage.batch_tokens // stage.seq_len, stage.seq_len
    its = peer.Config(n_layers=cfg.num_layers, d_model=cfg.model_dim, n_heads=cfg.num_heads, vocab_size=cfg.vocab_size,
                      dtype=cfg.compute_dtype, batch_size=num_rows, micro_batch_size=num_rows, min_sequence_length=length,
                      max_sequence_length=length, sequence_warmup_intervals=length, n_train_iters=cfg.steps)
    mesh = peer.get_mesh(its)
    put = lambda tokens: [jax.numpy.asarray(x[None], "int32") for x in (tokens[:, :-1], tokens[:, 1:])]
    with mesh:
        params, tables = peer.init_params(its, mesh)
        optimizer, opt_state = peer.init_optimizer(its, params, mesh)
        start, blank = time.perf_counter(), put(np.zeros((num_rows, length + 1), np.uint16))
        program = jax.jit(peer.train_step, static_argnames=("config", "optimizer"), donate_argnums=(1, 3))
        program = program.lower(its, params, tables, opt_state, optimizer, *blank).compile()

    def step(state, batch):
        params, opt_state, metrics = program(state[0], tables, state[1], *batch)
        return (params, opt_state), metrics["loss"]
    return (params, opt_state), put, step, time.perf_counter() - start

def nanogpt(cfg, source):
    """Its model and AdamW, eager, driven as its train.py does on a CPU."""
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    peer = run_source("nanogpt", source)
    with contextlib.redirect_stdout(io.StringIO()):
        model = peer.GPT(peer.GPTConfig(n_layer=cfg.num_layers, n_head=cfg.num_heads, n_embd=cfg.model_dim, dropout=0.0,
                                        vocab_size=cfg.vocab_size, block_size=stages(cfg)[0].seq_len, bias=False))
        optimizer = model.configure_optimizers(cfg.adam_wd, cfg.adamw_lr, (cfg.adam_beta1, cfg.adam_beta2), "cpu")
    put = lambda tokens: [torch.from_numpy(x.astype(np.int64)) for x in (tokens[:, :-1], tokens[:, 1:])]

    def step(state, batch):
        _, loss = model(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return state, loss.detach()
    return None, put, step, 0.0

def run_source(name, source):
    """A module from its text, run unmodified."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module

# ---- Measuring ----

def calibrate(seconds=0.3, size=768):
    """GFLOP/s of a float32 matmul, now."""
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    y, count, start = x @ x, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        np.matmul(x, x, out=y)
        count += 1
    return 2e-9 * size ** 3 * count / (time.perf_counter() - start)

def work(pipe, build, cfg, source):
    """A program's process: compile, run one step, then a block of steps for each number that arrives, until it is 0."""
    state, put, step, compile_s = build(cfg, source)
    stage, rng, share = stages(cfg)[0], np.random.default_rng(1337), 1 / np.arange(1, cfg.vocab_size + 1)
    shape = stage.batch_tokens // stage.seq_len, stage.seq_len + 1
    draw = lambda: put(rng.choice(cfg.vocab_size, shape, p=share / share.sum()).astype(np.uint16))
    state, loss = step(state, draw())
    losses = [float(loss)]
    pipe.send(compile_s)
    while num_steps := pipe.recv():
        batches, before = [draw() for _ in range(num_steps)], calibrate()
        ticks, cpu = [time.perf_counter()], time.process_time()
        for batch in batches:
            state, loss = step(state, batch)
            losses.append(float(loss))
            ticks.append(time.perf_counter())
        cpu_ms, wall_ms = 1e3 * (time.process_time() - cpu) / num_steps, 1e3 * float(np.median(np.diff(ticks)))
        pipe.send({"cpu_ms": cpu_ms, "wall_ms": wall_ms, "tokens_per_s": 1e3 * stage.batch_tokens / wall_ms,
                   "compile_s": compile_s, "gflops": [before, calibrate()], "losses": losses[:4]})

def measure(workload, programs, args):
    """programs: {name: (function, cfg, source)}. Runs them in turns, prints a row for each turn, returns the rows."""
    context, pipes, rows = multiprocessing.get_context("spawn"), {}, []
    for name, program in programs.items():  # one after the other, as they share a core
        pipes[name], end = context.Pipe()
        context.Process(target=work, args=(end, *program), daemon=True).start()
        end.close()
        pipes[name].recv()
    for turn in range(args.rounds):
        for name, pipe in pipes.items():
            pipe.send(args.steps or BLOCK[workload])
            row = {"workload": workload, "program": name, "round": turn} | pipe.recv()
            rows.append(row)
            before, after = row["gflops"]
            print(f"{workload:9}{name:21}{turn:5}{row['cpu_ms']:12.1f}{row['wall_ms']:13.1f}{row['tokens_per_s']:10.0f}"
                  f"{before:9.0f}{after:5.0f}{row['compile_s']:11.1f}   {' '.join(f'{loss:.3f}' for loss in row['losses'])}", flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    return rows

def compare(rows, one, other):
    """A line: CPU time of one program over another's in each round, and the median."""
    times = [[row["cpu_ms"] for row in rows if row["program"] == name] for name in (one, other)]
    ratios = [a / b for a, b in zip(*times)]
    return f"{one} / {other}: {np.median(ratios):.3f} of the CPU time ({' '.join(f'{r:.3f}' for r in ratios)} by round)"

# ---- Command line ----

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (python -m scripts.bench --help lists all flags)")

def parse(argv):
    """Raises UsageError."""
    parser = Parser(prog="python -m scripts.bench", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="step,char", help="workloads, a comma list (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="compute dtypes, a comma list (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help=f"steps of a turn (default: {BLOCK['step']} and {BLOCK['char']})")
    parser.add_argument("--core", type=int, help="CPU to run on (default: the first this process may use)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, one object for each turn")
    parser.add_argument("--modded_jax", metavar="DIR", help="git repository of modded-nanogpt-jax, the peer of `step`")
    parser.add_argument("--nanogpt", metavar="DIR", help="git repository of nanoGPT, the peer of `char`")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.train_flags, args.only, args.dtypes = argv[split + 1:], args.only.split(","), args.dtypes.split(",")
    for name, wanted in (("only", PEERS), ("dtypes", ("bfloat16", "float32"))):
        if unknown := set(getattr(args, name)) - set(wanted):
            raise UsageError(f"--{name}: there is no {unknown.pop()!r}, wanted {' or '.join(wanted)}")
    if args.rounds < 1 or args.steps < 0:
        raise UsageError(f"--rounds={args.rounds} --steps={args.steps}: wanted at least one round, and no negative steps")
    return args

def pin(core):
    """This process and those it starts: one core, one thread. Returns a line that says so. Raises UsageError."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false",
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if not hasattr(os, "sched_setaffinity"):
        return "one thread each, but not pinned: this system has no sched_setaffinity"
    allowed = os.sched_getaffinity(0)
    if core is not None and core not in allowed:
        raise UsageError(f"--core={core}: this process may run on {', '.join(map(str, sorted(allowed)))}")
    os.sched_setaffinity(0, {min(allowed) if core is None else core})
    return f"pinned to core {min(allowed) if core is None else core}, one thread each"

def peer_source(folder, path):
    """The text of `revision:path` in a git repository, or None where no folder is given. Raises UsageError."""
    if folder is None:
        return None
    shown = subprocess.run(["git", "-C", folder, "show", path], capture_output=True, text=True)
    if shown.returncode:
        raise UsageError(f"{folder}: no {path} there, git says: {(shown.stderr.strip() or 'nothing').splitlines()[-1]}")
    return shown.stdout

def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    configs = {}
    for workload in args.only:
        flags = parse_flags([f"@{ROOT}/scripts/presets/{FLAGS[workload]}", *args.train_flags])
        configs[workload] = {dtype: Config(**PRESETS["demo"] | flags | {"compute_dtype": dtype}) for dtype in args.dtypes}
        validate(configs[workload][args.dtypes[0]])
    sources = {workload: peer_source(getattr(args, flag), path) for workload, (flag, path) in PEERS.items()}
    print(f"jax {jax.__version__}, {pin(args.core)}. Losses are those of steps 0 to 3; step 0 is not timed.")
    print("workload program              round CPU ms/step wall, median  tokens/s GFLOP/s around  compile s   losses")
    rows, notes = [], []
    for workload, by_dtype in configs.items():
        programs, pairs = {f"ours {dtype}": (ours, cfg, None) for dtype, cfg in by_dtype.items()}, []
        flag, source = PEERS[workload][0], sources[workload]
        if source is None:
            notes.append(f"{flag}: not run: give --{flag}=DIR")
        elif flag == "nanogpt" and not importlib.util.find_spec("torch"):
            notes.append("nanogpt: not run: it needs torch")
        elif flag == "nanogpt":
            programs["nanogpt float32"] = nanogpt, by_dtype[args.dtypes[0]], source
            pairs = [(f"ours {dtype}", "nanogpt float32") for dtype in by_dtype]
        else:
            programs |= {f"modded_jax {dtype}": (modded_jax, cfg, source) for dtype, cfg in by_dtype.items()}
            pairs = [(f"ours {dtype}", f"modded_jax {dtype}") for dtype in by_dtype]
        pairs += [("ours bfloat16", "ours float32")] if len(by_dtype) == 2 else []
        measured = measure(workload, programs, args)
        notes += [f"{workload}: {compare(measured, *pair)}" for pair in pairs]
        rows += measured
    print("\n".join(notes))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)

def command():
    """main() for the shell: one sentence and exit code 2 for a flag that cannot be."""
    try:
        main()
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EOFError:
        print("error: a program's process ended, its own message stands above", file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.exit(command())
