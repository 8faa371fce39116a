"""What does a training step cost on this machine, and beside the same step of other programs?

    python -m scripts.bench                          each stage of what train.py would run here
    python -m scripts.bench --micro_tokens=8192,16384,32768 -- --preset=speedrun       on a GPU
    python -m scripts.bench --nanogpt=DIR --modded_jax=DIR         in turns with peers, on one core
    python -m scripts.bench --loader                 how many tokens per second does the host pack?

What follows -- are flags of train.py.

Stages: the whole step of the whole global batch, optimizer included, on all devices there are.
Compilation, step times, tokens per second, MFU and memory, a row for each stage and each
--micro_tokens. Smaller micro-steps go first, because the peak of memory is the process's. Tokens
are random, since a step's cost does not depend on them; the loss of these few steps begins near
log(vocabulary).

Peers: DIR is a checkout, of which one file is run.
    modded_jax   train.py of modded-nanogpt-jax, as of commit 0316a10: a speedrun in pure JAX. The
                 step is a small GPT's under a full vocabulary (scripts/presets/bench_step.args).
    nanogpt      model.py of nanoGPT, as of commit 3adf61e: eager, in float32; it needs torch. The
                 step is its README's character model by AdamW (scripts/presets/char_adamw.args).
Ours, in bfloat16 and float32, and the peer take turns, all on one core. A row is a turn: CPU time
per step and median wall time. A busy machine slows all of them, so the ratios are the result.

Loader: train_batches of train.py, on one core, for each stage of the preset speedrun, from a
generated shard that lies in the page cache, as a real run's do.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import train
from scripts.files import require_place, write_whole
from train import GPT, ROOT, UsageError, replace, require

WARMUP = 2  # steps before those that are timed
NUM_TURNS = 3
PRESETS = {"modded_jax": "bench_step.args", "nanogpt": "char_adamw.args"}
STEPS = {"modded_jax": 4, "nanogpt": 60}  # of a turn
FILES = {"modded_jax": "train.py", "nanogpt": "model.py"}
NAMES = {  # that are used of them
    "modded_jax": "Config get_mesh init_params init_optimizer train_step".split(),
    "nanogpt": "GPT GPTConfig".split(),
}
DTYPES = ("bfloat16", "float32")
BOS = 50256


def draw_tokens(vocab_size, shape):
    """uint16, as frequent as Zipf's law says, so that a batch has about as many kinds as a text."""
    ids = vocab_size ** np.random.default_rng(1337).random(shape) - 1
    return ids.astype(np.uint16)


def random_tokens(num_rows, stage, cfg):
    """uint16 [B, T+1], a document every 500 tokens."""
    tokens = draw_tokens(cfg.vocab_size, (num_rows, stage.seq_len + 1))
    tokens[:, ::500] = cfg.bos_id
    return tokens


# ---- Stages --------------------------------------------------------------------------------------

HEAD = """\
  micro stage   row  tokens compile  median     min     max thousand    MFU   GiB by    peak    loss
 tokens             a step       s      ms      ms      ms tokens/s        compiler     GiB"""
LINE = (
    "{micro_tokens:7}{stage:6}{seq_len:6}{tokens:8}{compile_s:8.1f}{median_ms:8.1f}{min_ms:8.1f}"
    "{max_ms:8.1f}{k:9.1f}{mfu:>7}{compiled_gib:9.2f}{peak_gib:>8}{loss:8.3f}"
)


def configure(flags):
    """The Config that these flags give here, its vocabulary that of its shards. Raises UsageError.

    Without shards the vocabulary is GPT-2's.
    """
    cfg, _ = train.configure(flags)
    pattern = cfg.train_files or train.embedded_corpus()[0]
    meta = train.read_meta(Path(pattern).parent / "meta.json")
    return train.complete_config(train.Shards([], [], meta), cfg)


def compile_step(function, arguments, options):
    """(program, seconds)."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile(compiler_options=options)
    return program, time.perf_counter() - start


def time_stage(stage, program, state, mesh, num_steps, cfg):
    """A stage's numbers. Raises JaxRuntimeError, and NonFiniteLoss."""
    tokens_BT1 = random_tokens(stage.batch_tokens // stage.seq_len, stage, cfg)
    batch = train.to_devices([[row] for row in tokens_BT1], stage, mesh, cfg)
    seconds = []
    for _ in range(WARMUP + num_steps):
        start = time.perf_counter()
        state, loss = jax.block_until_ready(program(state, batch))
        seconds.append(time.perf_counter() - start)
    loss = train.require_finite(loss, f"the loss after {len(seconds)} steps")
    step_ms = 1e3 * np.array(seconds[WARMUP:])
    tokens_per_s = 1e3 * stage.batch_tokens / float(np.median(step_ms))
    flops = tokens_per_s * train.flops_per_token(stage, GPT.specs(cfg), cfg)
    peak = train.peak_flops()
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "seq_len": stage.seq_len,
        "tokens": stage.batch_tokens,
        "median_ms": float(np.median(step_ms)),
        "min_ms": float(step_ms.min()),
        "max_ms": float(step_ms.max()),
        "tokens_per_s": tokens_per_s,
        "mfu": flops / peak if peak else None,
        "compiled_gib": train.memory_of(program) / 2**30,
        "peak_gib": used / 2**30 if used else None,
        "loss": loss,
    }


def line_of(row):
    if "error" in row:
        return "{micro_tokens:7}{stage:7}  {error}".format(**row)
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
    peak_gib = f"{row['peak_gib']:.2f}" if row["peak_gib"] else "-"
    return LINE.format(**row | {"k": row["tokens_per_s"] / 1e3, "mfu": mfu, "peak_gib": peak_gib})


def time_stages(args):
    """Yield (a line, its row) of each --micro_tokens and stage. Raises UsageError."""
    cfg = configure(args.flags)
    mesh = train.make_mesh()
    num_steps = args.steps or 5
    count = train.count_params(GPT.specs(cfg))
    yield f"{count} parameters, attention {cfg.attention}; {num_steps} steps after {WARMUP}", None
    yield HEAD, None
    for micro_tokens in args.micro_tokens or [cfg.micro_tokens]:
        cfg = replace(cfg, micro_tokens=micro_tokens)
        listed = train.list_programs(GPT, mesh, cfg)
        options = train.compiler_options(mesh, cfg)
        with ThreadPoolExecutor() as pool:
            futures = []
            for i in range(len(cfg.stages)):
                futures.append(pool.submit(compile_step, *listed[f"train_{i}"], options))
        for i, stage in enumerate(cfg.stages):
            row = {"micro_tokens": micro_tokens, "stage": i}
            try:
                program, row["compile_s"] = futures[i].result()
                state = listed["init"][0]()
                row |= time_stage(stage, program, state, mesh, num_steps, cfg)
            except (jax.errors.JaxRuntimeError, train.NonFiniteLoss) as error:
                row["error"] = str(error).split("\n")[0][:200]  # memory, mostly
            yield line_of(row), row
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    yield "; ".join([devices, *(f"{name}={text}" for name, text in train.versions().items())]), None


# ---- Peers ---------------------------------------------------------------------------------------
# Each function compiles a step and returns (put, step, seconds that took). put(tokens uint16
# [B, T+1]) -> batch is not timed; step(batch) -> loss, a number, is.


def ours(cfg):
    mesh = train.make_mesh()
    stage = cfg.stages[0]
    state = train.make_init(GPT, mesh, cfg)()

    def put(tokens_BT1):
        return train.to_devices([[row] for row in tokens_BT1], stage, mesh, cfg)

    function = train.make_train_step(stage, GPT, mesh, cfg)
    program, compile_s = compile_step(function, (state, put([])), {})

    def step(batch):
        nonlocal state
        state, loss = program(state, batch)
        return float(loss)

    return put, step, compile_s


def modded_jax(peer, cfg):
    """Its Config, weights, optimizers and train_step as they are."""
    length = cfg.stages[0].seq_len
    num_rows = cfg.stages[0].batch_tokens // length
    config = peer.Config(
        n_layers=cfg.num_layers,
        d_model=cfg.model_dim,
        n_heads=cfg.num_heads,
        vocab_size=cfg.vocab_size,
        dtype=cfg.compute_dtype,
        batch_size=num_rows,
        micro_batch_size=num_rows,
        min_sequence_length=length,
        max_sequence_length=length,
        sequence_warmup_intervals=length,
        n_train_iters=cfg.steps,
    )
    make_mesh = jax.make_mesh

    def make_auto_mesh(shape, names):
        kinds = (jax.sharding.AxisType.Auto,) * len(names)  # the default when it was written
        return make_mesh(shape, names, axis_types=kinds)

    def put(tokens_BT1):
        return [jnp.asarray(x[None], jnp.int32) for x in (tokens_BT1[:, :-1], tokens_BT1[:, 1:])]

    with mock.patch.object(jax, "make_mesh", make_auto_mesh):
        mesh = peer.get_mesh(config)
    with mesh:
        params, tables = peer.init_params(config, mesh)
        optimizer, opt_state = peer.init_optimizer(config, params, mesh)
        function = jax.jit(peer.train_step, static_argnums=(0, 4), donate_argnums=(1, 3))
        batch = put(np.zeros((num_rows, length + 1)))
        arguments = config, params, tables, opt_state, optimizer, *batch
        program, compile_s = compile_step(function, arguments, {})

    def step(batch):
        nonlocal params, opt_state
        params, opt_state, metrics = program(params, tables, opt_state, *batch)
        return float(metrics["loss"])

    return put, step, compile_s


def nanogpt(peer, cfg):
    """Its model and its AdamW, in the order of its training loop."""
    import torch

    torch.set_num_threads(1)
    config = peer.GPTConfig(
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        n_embd=cfg.model_dim,
        bias=False,
        block_size=cfg.stages[0].seq_len,
        vocab_size=cfg.vocab_size,
        dropout=0.0,
    )
    betas = cfg.adam_beta1, cfg.adam_beta2
    with contextlib.redirect_stdout(io.StringIO()):
        model = peer.GPT(config)
        optimizer = model.configure_optimizers(cfg.adam_wd, cfg.adamw_lr, betas, "cpu")

    def put(tokens_BT1):
        tokens_BT1 = torch.from_numpy(tokens_BT1.astype(np.int64))
        return tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous()

    def step(batch):
        _, loss = model(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return put, step, 0.0


def load_peer(name, folder):
    """The module of a peer's file. Raises UsageError where it does not run, or is another one."""
    path = Path(folder) / FILES[name]
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # only their file runs in here, and may raise anything
        raise UsageError(f"--{name}={folder}: {path} does not run here: {error!r}") from error
    lacking = [word for word in NAMES[name] if not hasattr(module, word)]
    require(not lacking, f"--{name}={folder}: {path} has no {', '.join(lacking)}")
    return module


def time_turn(put, step, num_steps, cfg):
    """Some steps of a program."""
    stage = cfg.stages[0]
    batch = put(random_tokens(stage.batch_tokens // stage.seq_len, stage, cfg))
    losses = []
    ticks = [time.perf_counter()]
    cpu = time.process_time()
    for _ in range(num_steps):
        losses.append(step(batch))
        ticks.append(time.perf_counter())
    wall_ms = 1e3 * float(np.median(np.diff(ticks)))
    return {
        "cpu_ms": 1e3 * (time.process_time() - cpu) / num_steps,
        "wall_ms": wall_ms,
        "tokens_per_s": 1e3 * stage.batch_tokens / wall_ms,
        "losses": losses,
    }


def ratios_of(rows, one, other):
    """A line: CPU time of one program by that of another, turn by turn."""
    times = {one: [], other: []}
    for row in rows:
        times.get(row["program"], []).append(row["cpu_ms"])
    ratios = np.divide(times[one], times[other])
    by_turn = " ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"{one} / {other}: {np.median(ratios):.3f} of the CPU time (by turn: {by_turn})"


def time_peer(name, folder, args):
    """Yield (a line, its row) of each turn of our programs and a peer's. Raises UsageError."""
    flags = [f"@{ROOT}/scripts/presets/{PRESETS[name]}", *args.flags]
    configs = {}
    for dtype in DTYPES:
        configs[dtype] = train.parse_flags([*flags, f"--compute_dtype={dtype}"])
    programs = {f"ours {dtype}": (cfg, *ours(cfg)) for dtype, cfg in configs.items()}
    peer = load_peer(name, folder)  # after ours, since it may change JAX's settings
    theirs = {}  # with what ours of a dtype is compared
    for dtype, cfg in configs.items():
        theirs[dtype] = f"modded_jax {dtype}" if name == "modded_jax" else "nanogpt float32"
        if name == "modded_jax":
            programs[theirs[dtype]] = cfg, *modded_jax(peer, cfg)
        elif dtype == "float32":
            programs[theirs[dtype]] = cfg, *nanogpt(peer, cfg)

    num_steps = args.steps or STEPS[name]
    for cfg, put, step, _ in programs.values():
        time_turn(put, step, 1, cfg)  # the first step is not counted
    yield f"{'program':22}{'turn':>5}{'CPU ms/step':>13}{'wall ms':>10}{'tokens/s':>10}", None
    rows = []
    for turn in range(NUM_TURNS):
        for program, (cfg, put, step, compile_s) in programs.items():
            row = {"program": program, "turn": turn, "compile_s": compile_s}
            rows.append(row | time_turn(put, step, num_steps, cfg))
            line = "{program:22}{turn:5}{cpu_ms:13.1f}{wall_ms:10.1f}{tokens_per_s:10.0f}"
            yield line.format(**rows[-1]), rows[-1]
    for dtype, other in theirs.items():
        yield ratios_of(rows, f"ours {dtype}", other), None


# ---- The host loader -----------------------------------------------------------------------------


def write_random_shard(path, num_tokens):
    """Like FineWeb's: documents of log-normal length, median 403 tokens, mean 690."""
    rng = np.random.default_rng(1337)
    tokens = draw_tokens(BOS, num_tokens)
    spread = np.sqrt(2 * np.log(690 / 403))
    lengths = rng.lognormal(np.log(403), spread, num_tokens // 500)
    starts = np.cumsum(lengths).astype(int)
    tokens[starts[starts < num_tokens]] = BOS
    tokens[0] = BOS
    train.write_shard(path, tokens)


def time_loader(args):
    """Yield (a line, its row) of each stage. Raises UsageError."""
    whole = train.parse_flags(["--preset=speedrun", *args.flags])
    whole = replace(whole, vocab_size=BOS + 1, bos_id=BOS, steps=1 << 30)
    mesh = train.make_mesh()
    yield "stage  doc_len  tokens of a batch   million tokens/s: median      best", None
    with tempfile.TemporaryDirectory() as folder:
        write_random_shard(Path(folder) / "train_000000.bin", args.shard_tokens)
        shards = train.open_shards(f"{folder}/train_*.bin")
        for i, stage in enumerate(whole.stages):
            cfg = replace(whole, stages=(replace(stage, end=1.0),))
            num_steps = sum(1 for _ in train.plan(shards, cfg))
            wanted = f"--shard_tokens={args.shard_tokens}: too few for a batch of stage {i}"
            require(num_steps, wanted)
            speeds = []
            for _ in range(NUM_TURNS):
                start = time.perf_counter()
                for batch in train.train_batches(shards, 0, mesh, replace(cfg, steps=num_steps)):
                    jax.block_until_ready(batch)
                seconds = time.perf_counter() - start
                speeds.append(1e-6 * num_steps * stage.batch_tokens / seconds)
            row = {"stage": i, "million_tokens_per_s": speeds}
            shape = f"{i:5}{stage.doc_len:9}{stage.batch_tokens:19}"
            yield f"{shape}{np.median(speeds):27.1f}{max(speeds):10.1f}", row


# ---- Command line --------------------------------------------------------------------------------


def parse(argv):
    """Raises UsageError."""

    def fail(message):
        raise UsageError(f"{message} (python -m scripts.bench --help)")

    parser = argparse.ArgumentParser(
        usage="python -m scripts.bench [--FLAG=VALUE ...] [-- FLAGS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    flag = parser.add_argument
    flag("--micro_tokens", default="", metavar="LIST", help="of the stages (default: the flag's)")
    flag("--steps", type=int, help="timed in each row (default: 5; in turns with a peer 4 or 60)")
    flag("--modded_jax", metavar="DIR", help="a checkout of modded-nanogpt-jax")
    flag("--nanogpt", metavar="DIR", help="a checkout of nanoGPT")
    flag("--loader", action="store_true", help="time the host's loader")
    flag("--shard_tokens", type=int, default=100_000_000, help="that it reads (100000000)")
    flag("--json", metavar="FILE", help="write the rows there, as they come")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.flags = argv[split + 1 :]
    if not re.fullmatch(r"(\d{1,9}(,\d{1,9})*)?", args.micro_tokens):
        fail(f"--micro_tokens={args.micro_tokens}: wanted numbers with commas between them")
    if (args.steps is not None and args.steps < 1) or not 1 <= args.shard_tokens <= 10**9:
        fail(f"--steps={args.steps} --shard_tokens={args.shard_tokens}: wanted 1 or more, to 1e9")
    args.micro_tokens = sorted(int(text) for text in args.micro_tokens.split(",") if text)
    args.peers = {}
    for name, file in FILES.items():
        folder = getattr(args, name)
        if folder:
            args.peers[name] = folder
            is_there = Path(folder, file).is_file()
            require(is_there, f"--{name}={folder}: holds no {file}; wanted a checkout of {name}")
    return args


def use_one_core():
    """Before JAX starts: everything on the CPU, on one core where this system can pin a process."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    jax.config.update("jax_platforms", "cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(args):
    """Yield (a line, its row or None). Raises UsageError."""
    if args.loader or args.peers:
        use_one_core()
    if args.loader:
        yield from time_loader(args)
    for name, folder in args.peers.items():
        yield from time_peer(name, folder, args)
    if not args.loader and not args.peers:
        yield from time_stages(args)


def main(argv=None):
    """Raises UsageError."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.json:
        require_place(args.json)
    jax.config.update("jax_enable_compilation_cache", False)  # the time it takes is wanted
    jax.config.update("jax_enable_x64", False)
    rows = []
    for line, row in measure(args):
        if row:
            rows.append(row)
        if args.json:
            write_whole(args.json, (json.dumps(rows, indent=1) + "\n").encode())
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(train.command(main))
