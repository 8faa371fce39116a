"""What does a training step cost on one CPU core, and what beside the same step of other programs?

    python -m scripts.bench                                both workloads in bfloat16 and float32, this repository alone
    python -m scripts.bench --modded_jax=DIR --nanogpt=DIR     in turns with its peers: the ratios are the result
    python -m scripts.bench --only=step -- --compute_dtype=bfloat16     what follows -- are flags of train.py
    python -m scripts.bench --loader                       how many tokens per second does the host loader deliver?

step  a small GPT under a full GPT-2 vocabulary (scripts/presets/bench_step.args). Peer: modded-nanogpt-jax (DIR: a git
      repository that has commit 0316a10), a speedrun in one file of pure JAX, with Muon and Adam too.
char  the character model of nanoGPT's README by AdamW (scripts/presets/char_adamw.args). Peer: nanoGPT (DIR: a git
      repository that has commit 3adf61e), eager, in float32; it needs torch.

Each program is compiled once, in a process of its own, all on one core with one thread; then they take turns. A row is
one turn: CPU time per step and median wall time, with the CPU's speed just before and after, as GFLOP of a float32
matmul per second of CPU. Tokens are random (Zipf) and the same for all; a step's cost does not depend on them.

--loader  train_batches of train.py, from generated shards of true size to arrays on eight simulated devices (a batch is put
      in eight shares, as on eight chips; their transfer is not in it), all threads on one core. A turn reads all shards
      once, mapped anew; the cold one after they were dropped from the page cache, the others from it. A real run finds
      them there: open_data has read them. Counted are tokens trained on, as the share of what is read that is cut off.
"""
import argparse, contextlib, importlib.util, io, itertools, json, math, multiprocessing, os, subprocess, sys
import tempfile, time, types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train import (
    GPT,
    NO_TOKEN,
    ROOT,
    UsageError,
    find_shards,
    make_init,
    make_mesh,
    make_train_step,
    open_shards,
    parse_flags,
    plan,
    read_flags,
    replace,
    require,
    to_devices,
    train_batches,
    write_shard,
)

FLAGS = {"step": "bench_step.args", "char": "char_adamw.args"}
PEER = {"step": ("modded_jax", "0316a10:train.py"), "char": ("nanogpt", "3adf61e:model.py")}
TURN = {"step": 4, "char": 60}  # steps

# ---- The programs: each function compiles one and returns (state, put, step, seconds that took) ----
# put(tokens uint16 [B, T+1]) -> batch is not timed; step(state, batch) -> (state, loss) is, until the loss is a number.

def ours(cfg, source):
    mesh, stage = make_mesh(), cfg.stages[0]
    put = lambda tokens_BT1: to_devices([[row] for row in tokens_BT1], stage, mesh, cfg)
    state, start = make_init(GPT, mesh, cfg)(), time.perf_counter()
    step = make_train_step(stage, GPT, mesh, cfg).lower(state, put([])).compile()
    return state, put, step, time.perf_counter() - start

def modded_jax(cfg, source):
    """Its Config, weights, optimizers and train_step as they are; the mesh gets the axis type it was written for."""
    plain, auto = jax.make_mesh, jax.sharding.AxisType.Auto
    jax.make_mesh = lambda shape, names: plain(shape, names, axis_types=(auto,) * len(names))
    peer, length = run_source("modded_jax", source), cfg.stages[0].seq_len
    num_rows = cfg.stages[0].batch_tokens // length
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
    peer, length = run_source("nanogpt", source), cfg.stages[0].seq_len
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
    stage, rng, share = cfg.stages[0], np.random.default_rng(1337), 1 / np.arange(1, cfg.vocab_size + 1)
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

# ---- The host loader ----
LOADS = list(itertools.product((896, 2048), (131_072, 262_144, 393_216)))  # doc_len, batch_tokens
PROJECTION = ROOT / "records/v6e/speedrun.json"  # of scripts/dry_run.py

def projected_consumption():
    """Tokens per second that 8 chips take at most, by the projection: not a measurement."""
    programs = json.loads(PROJECTION.read_text())["programs"]
    return max(1e3 * p["tokens_per_step"] / p["est_ms"] for p in programs if p["name"].startswith("train"))
BOS = 50256

def generate_shards(folder, num_shards, num_tokens):
    """Shards like FineWeb's: a BOS before each document, lengths log-normal (median 403, mean 690), tokens Zipf."""
    rng, share = np.random.default_rng(1337), 1 / np.arange(1, BOS + 1)
    quantiles = np.searchsorted(np.cumsum(share / share.sum()), (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.uint16)
    for i in range(num_shards):
        tokens = quantiles[rng.integers(0, 1 << 16, num_tokens, np.uint16)]
        lengths = np.maximum(2, rng.lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), num_tokens // 500 + 1).astype(int))
        starts = np.cumsum(lengths) - lengths
        tokens[starts[starts < num_tokens]] = BOS
        write_shard(Path(folder) / f"train_{i:06d}.bin", tokens)

def drop_from_cache(pattern):
    """Whether this system can; what is still to be written goes to the disk first."""
    for path in find_shards(pattern) if hasattr(os, "posix_fadvise") else []:
        with open(path, "rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hasattr(os, "posix_fadvise")

def read_from_disk():
    """Megabytes that came from a disk for this process; nan where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0]) / 1e6
    return math.nan

def load_turn(pattern, mesh, cfg):
    """Every batch once."""
    shards, disk, wall, cpu = open_shards(pattern), read_from_disk(), time.perf_counter(), time.process_time()
    for batch in train_batches(shards, 0, mesh, cfg):
        jax.block_until_ready(batch)
    wall, cpu, tokens = time.perf_counter() - wall, time.process_time() - cpu, cfg.steps * cfg.stages[0].batch_tokens
    return {"tokens_per_s": tokens / wall, "tokens_per_cpu_s": tokens / cpu, "disk_mb": read_from_disk() - disk}

def count_waste(shards, mesh, cfg):
    """What is read and not trained on, counted from the batches: shares of the tokens read, of the places of rows, of the
    documents cut to doc_len and by the end of a row; tokens cut per row end. A slice's address tells its document."""
    lengths, stage, num_rows, holes, places, cuts = {}, cfg.stages[0], 0, 0, 0, []
    for tokens in shards.tokens:
        edges = [*np.flatnonzero(tokens == cfg.bos_id).tolist(), len(tokens)]
        lengths |= {tokens.ctypes.data + 2 * first: last - first for first, last in itertools.pairwise(edges)}
    for rows, read in plan(shards, cfg):
        batch, num_rows = np.asarray(to_devices(rows, stage, mesh, cfg)["tokens"]), num_rows + len(rows)
        holes, places = holes + int((batch == NO_TOKEN).sum()), places + batch.size
        cuts += [(lengths[part.__array_interface__["data"][0]], len(part)) for row in rows for part in row]
    whole, left = np.array(cuts).T
    kept = np.minimum(whole, stage.doc_len)
    return {"not_trained": 1 - num_rows * stage.seq_len / read, "empty": holes / places, "documents": len(cuts), "too_long":
            float(np.mean(kept < whole)), "row_end": float(np.mean(left < kept)), "row_end_tokens": int(np.sum(kept - left)) / num_rows}

def bench_loader(args):
    """Prints a row for each load, and returns them as dicts. Raises UsageError."""
    always = [f"--steps=999999 --vocab_size={BOS + 1} --bos_id={BOS} --stages.end=1 --stages.short=0 --stages.long=0 "
              f"--stages.doc_len={doc_len} --stages.batch_tokens={batch_tokens}".split() for doc_len, batch_tokens in LOADS]
    configs = [parse_flags([*load, *args.flags]) for load in always]
    print(f"jax {jax.__version__}, {pin(args.core)}. {args.shards} shards of {args.shard_tokens} tokens, rows of {configs[0].stages[0].seq_len}. "
          f"Consumed: {args.consumes / 1e6:.2f} million tokens/s"
          + (f", the projection of {PROJECTION.relative_to(ROOT)} for 8 chips" if args.projected else ""))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows, mesh = [], make_mesh()
    with tempfile.TemporaryDirectory() as folder:
        generate_shards(folder, args.shards, args.shard_tokens)
        print(LOADER_HEAD)
        for cfg in dict.fromkeys(configs):
            rows.append(row := bench_load(f"{folder}/train_*.bin", mesh, cfg, args))
            print("{doc_len:>7}{batch_tokens:>8}{median_m:10.1f}{best_m:8.1f}{cpu_m:8.1f}{cold_m:8.1f}{cold_disk_mb:6.0f}"
                  "{times:10.1f}{batch_ms:9.2f}{plan_s_per_gtoken:8.1f}{not_trained:11.1%}{empty:7.1%}{too_long:8.1%}{row_end:8.1%}"
                  "{row_end_tokens:11.1f}".format(**row), flush=True)
    print("loader: at least {times:.1f} times what is consumed (doc_len {doc_len}, batch {batch_tokens})"
          .format(**min(rows, key=lambda row: row["times"])))
    return rows

LOADER_HEAD = """\
    doc   batch   trained on, million tokens per second     times   ms per  plan s/  not trained  empty  documents cut  tokens cut
   _len  tokens    median    best per CPU-s  cold  (MB)  consumed    batch   Gtoken      of read places  length row end per row end"""

def bench_load(pattern, mesh, cfg, args):
    shards, start = open_shards(pattern), time.process_time()
    reads = [read for _, read in plan(shards, cfg)]
    plan_s, steps = time.process_time() - start, min(args.steps or len(reads), len(reads))
    batch_tokens, given = cfg.stages[0].batch_tokens, f"--shards={args.shards} --shard_tokens={args.shard_tokens}"
    require(steps, f"{given}: too few for a batch of {batch_tokens} tokens")
    cfg = replace(cfg, steps=steps)
    waste = count_waste(shards, mesh, cfg)
    del shards  # the kernel keeps in its cache what is mapped
    cold = load_turn(pattern, mesh, cfg) if drop_from_cache(pattern) else {"tokens_per_s": math.nan, "disk_mb": math.nan}
    turns = [load_turn(pattern, mesh, cfg) for _ in range(args.rounds)]
    median, median_cpu = (float(np.median([turn[key] for turn in turns])) for key in ("tokens_per_s", "tokens_per_cpu_s"))
    return {"doc_len": cfg.stages[0].doc_len, "batch_tokens": batch_tokens, "steps": cfg.steps, "turns": turns, "median_m": median / 1e6,
            "best_m": max(turn["tokens_per_s"] for turn in turns) / 1e6, "cpu_m": median_cpu / 1e6, "cold_m": cold["tokens_per_s"] / 1e6,
            "cold_disk_mb": cold["disk_mb"], "times": median / args.consumes, "batch_ms": 1e3 * batch_tokens / median,
            "plan_s_per_gtoken": 1e9 * plan_s / reads[-1]} | waste

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
    flag("--steps", type=int, default=0, metavar="N", help="steps of a turn (default: {step}, {char}; of the loader: all there are)"
         .format(**TURN))
    flag("--core", type=int, metavar="N", help="CPU to run on (default: the first this process may use)")
    flag("--json", metavar="FILE", help="write the rows there, a list of objects")
    flag("--loader", action="store_true", help="time the host loader instead")
    flag("--consumes", type=float, metavar="TOKENS_PER_S",
         help=f"what it is compared with (default: what {PROJECTION.relative_to(ROOT)} says of 8 chips, a projection)")
    flag("--shards", type=int, default=2, metavar="N", help="shards it reads (default: %(default)s)")
    flag("--shard_tokens", type=int, default=100_000_000, metavar="N", help="tokens in each (default: %(default)s)")
    for peer, _ in PEER.values():
        flag(f"--{peer}", metavar="DIR", help="the peer's git repository (default: not run)")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.flags, args.only = argv[split + 1:], args.only.split(",")
    if args.rounds < 1 or args.steps < 0 or not set(args.only) <= set(FLAGS):
        fail(f"--only={','.join(args.only)} --rounds={args.rounds} --steps={args.steps}: wanted step, char or both with a "
             "comma, at least 1 round, and no negative steps")
    args.projected, args.consumes = args.consumes is None, projected_consumption() if args.consumes is None else args.consumes
    if min(args.consumes, args.shards, args.shard_tokens) <= 0:
        fail(f"--consumes={args.consumes:g} --shards={args.shards} --shard_tokens={args.shard_tokens}: wanted more than 0 of each")
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
    if args.loader:
        rows = bench_loader(args)
        return args.json and Path(args.json).write_text(json.dumps(rows, indent=1))
    for workload in args.only:
        flags, (peer, path) = [f"@{ROOT}/scripts/presets/{FLAGS[workload]}", *args.flags], PEER[workload]
        asked = read_flags(flags).get("compute_dtype")
        dtypes = [asked] if asked else ["bfloat16", "float32"]
        configs = [parse_flags([*flags, f"--compute_dtype={dtype}"]) for dtype in dtypes]
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
