"""What does a training step cost on this machine, and beside the same step of other programs?

    python -m scripts.bench                          each stage of what train.py would run here
    python -m scripts.bench --micro_tokens=16384,32768,49152 -- --preset=speedrun      on a GPU
    python -m scripts.bench --attention -- --preset=speedrun  is the fast attention right? GPU, TPU
    python -m scripts.bench --torch -- --preset=speedrun   in turns with a plain GPT in PyTorch
    python -m scripts.bench --nanogpt=DIR --modded_jax=DIR         in turns with peers, on one core
    python -m scripts.bench --loader                 how many tokens per second does the host pack?

What follows -- are flags of train.py.

Stages: the whole step of the whole global batch, optimizer included, on all devices there are.
Compilation, step times, tokens per second, MFU and memory, a row for each stage and each
--micro_tokens. Smaller micro-steps go first, because the peak of memory is the process's. Tokens
are random, since a step's cost does not depend on them; the loss of these few steps begins near
log(vocabulary). Times are of steps that the host waits for one by one. `ahead` is a step's in a
row of steps where the next one is dispatched before the host waits for one, as train.py does it;
`gap`, the median less that, is what the host costs where nothing hides it. Idle time inside of a
step is in neither: --trace=DIR then traces three more steps of each stage, and says how long the
device was busy and with what. `kernels` are those that a GPU runs in a step, by the compiled
program: copies are counted, a call of a library is one.

Peers: DIR is a checkout, of which one file is run.
    modded_jax   train.py of modded-nanogpt-jax, as of commit 0316a10: a speedrun in pure JAX. The
                 step is a small GPT's under a full vocabulary (scripts/presets/bench_step.args).
    nanogpt      model.py of nanoGPT, as of commit 3adf61e: eager, in float32; it needs torch. The
                 step is its README's character model by AdamW (scripts/presets/char_adamw.args).
Ours, in bfloat16 and float32, and the peer take turns, all on one core. A row is a turn: CPU time
per step and median wall time. A busy machine slows all of them, so the ratios are the result.

Torch: the last stage of ours against a plain GPT of its layers, widths, heads and vocabulary under
torch.compile, on one device. There: norms without weights, learned positions, QK norm, ReLU^2,
untied head, whole softmax, causal attention over whole rows by scaled_dot_product_attention, bf16
autocast, fused AdamW, the same rows per micro-step. Ours besides has windows, documents, gates,
rotary, a copy pointer and Muon. So this compares tokens per second of forward, backward and
update, not of equal recipes. It needs a PyTorch that sees the same device.

Attention: scripts/attention.py says what is compared. Exit code 2 where the fast one is wrong.

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
from scripts.attention import check_attention
from scripts.dry_run.hlo import Module, NoProgram
from scripts.files import require_place, write_whole
from scripts.trace_run import summary
from train import GPT, ROOT, UsageError, replace, require

WARMUP = 2  # steps before those that are timed
NUM_TURNS = 3
NUM_TRACED = 3  # steps of a stage
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
 micro stage  tokens compile  median   ahead    gap kernels thousand    MFU  GiB by   peak   loss
tokens        a step       s      ms      ms     ms         tokens/s       compiler    GiB"""
LINE = (
    "{micro_tokens:6}{stage:6}{tokens:8}{compile_s:8.1f}{median_ms:8.1f}{ahead_ms:8.1f}"
    "{gap_ms:7.2f}{kernels:>8}{k:9.1f}{mfu:>7}{compiled_gib:8.2f}{peak_gib:>7}{loss:7.3f}"
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


def run_ahead(program, state, batch, num_steps):
    """(state, loss, seconds of a step), the next step dispatched before one is waited for.

    The clock starts when a first step is over: by then the second is under way.
    """
    state, before = program(state, batch)
    start = None
    for _ in range(num_steps):
        state, loss = program(state, batch)
        jax.block_until_ready(before)
        start = start or time.perf_counter()
        before = loss
    jax.block_until_ready((state, loss))
    return state, loss, (time.perf_counter() - start) / num_steps


def kernels_of(program):
    """Kernels that a step runs on a GPU; None on other devices, and where it cannot be counted."""
    if jax.default_backend() != "gpu":
        return None
    try:
        return Module(program.as_text()).num_kernels()
    except (NoProgram, LookupError):  # a text of another form
        return None


def trace_stage(program, state, batch, folder):
    """What the profiler saw of some steps, as summary gives it. The trace stays in the folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # which would slow the host down
    try:
        with jax.profiler.trace(folder, profiler_options=options):
            run_ahead(program, state, batch, NUM_TRACED - 1)
        busy, *rows = summary(folder)
    except (jax.errors.JaxRuntimeError, OSError, ValueError) as error:  # the times stay
        return [f"no trace: {error}"]
    return [f"{NUM_TRACED} steps traced: {busy}", *rows]


def time_stage(stage, program, state, mesh, num_steps, cfg, folder=None):
    """A stage's numbers. folder: for a trace. Raises JaxRuntimeError, and NonFiniteLoss."""
    tokens_BT1 = random_tokens(stage.batch_tokens // stage.seq_len, stage, cfg)
    batch = train.to_devices([[row] for row in tokens_BT1], stage, mesh, cfg)
    seconds = []
    for _ in range(WARMUP + num_steps):
        start = time.perf_counter()
        state, loss = jax.block_until_ready(program(state, batch))
        seconds.append(time.perf_counter() - start)
    state, loss, ahead_s = run_ahead(program, state, batch, num_steps)
    loss = train.require_finite(loss, f"the loss after {WARMUP + 2 * num_steps + 1} steps")
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
        "ahead_ms": 1e3 * ahead_s,
        "gap_ms": float(np.median(step_ms)) - 1e3 * ahead_s,
        "kernels": kernels_of(program),
        "tokens_per_s": tokens_per_s,
        "mfu": flops / peak if peak else None,
        "compiled_gib": train.memory_of(program) / 2**30,
        "peak_gib": used / 2**30 if used else None,
        "loss": loss,
        "trace": trace_stage(program, state, batch, folder) if folder else [],
    }


def line_of(row):
    if "error" in row:
        return "{micro_tokens:6}{stage:6}  {error}".format(**row)
    cells = {
        "k": row["tokens_per_s"] / 1e3,
        "mfu": f"{row['mfu']:.1%}" if row["mfu"] else "-",
        "peak_gib": f"{row['peak_gib']:.2f}" if row["peak_gib"] else "-",
        "kernels": row["kernels"] or "-",
    }
    return "\n".join([LINE.format(**row | cells), *row["trace"]])


def time_stages(args):
    """Yield (a line, its row) of each --micro_tokens and stage. Raises UsageError."""
    cfg = configure(args.flags)
    mesh = train.make_mesh()
    num_steps = args.steps or 5
    sizes = args.micro_tokens or [train.fit_memory(GPT, mesh, cfg, {}).tokens_at_once]
    count = train.count_params(GPT.specs(cfg))
    yield f"{count} parameters; {num_steps} steps after {WARMUP}", None
    yield train.attention_note(cfg, *train.this_machine()), None
    yield HEAD, None
    for micro_tokens in sizes:
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
                row |= time_stage(stage, program, state, mesh, num_steps, cfg, args.trace)
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
    options = train.compiler_options(mesh, cfg)
    program, compile_s = compile_step(function, (state, put([])), options)

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


def ratios_of(rows, one, other, clock="CPU"):
    """A line: CPU or wall time of one program by that of another, turn by turn."""
    times = {one: [], other: []}
    for row in rows:
        times.get(row["program"], []).append(row[f"{clock.lower()}_ms"])
    ratios = np.divide(times[one], times[other])
    by_turn = " ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"{one} / {other}: {np.median(ratios):.3f} of the {clock} time (by turn: {by_turn})"


def take_turns(programs, num_steps):
    """Yield (a line, its row) of each turn. programs: {name: (cfg, put, step, compile_s)}."""
    for cfg, put, step, _ in programs.values():
        time_turn(put, step, 1, cfg)  # the first step is not counted
    yield f"{'program':22}{'turn':>5}{'CPU ms/step':>13}{'wall ms':>10}{'tokens/s':>10}", None
    for turn in range(NUM_TURNS):
        for program, (cfg, put, step, compile_s) in programs.items():
            row = {"program": program, "turn": turn, "compile_s": compile_s}
            row |= time_turn(put, step, num_steps, cfg)
            line = "{program:22}{turn:5}{cpu_ms:13.1f}{wall_ms:10.1f}{tokens_per_s:10.0f}"
            yield line.format(**row), row


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

    rows = []
    for line, row in take_turns(programs, args.steps or STEPS[name]):
        rows += [row] if row else []
        yield line, row
    for dtype, other in theirs.items():
        yield ratios_of(rows, f"ours {dtype}", other), None


# ---- A plain GPT in PyTorch ----------------------------------------------------------------------


def make_torch_block(has_attention, cfg):
    """A block of the stream [B, T, D], as a module."""
    from torch import nn
    from torch.nn import functional as F

    def norm(x):
        return F.rms_norm(x, x.shape[-1:])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            heads = cfg.num_heads * cfg.head_dim
            self.qkv = nn.Linear(cfg.model_dim, 3 * heads, bias=False) if has_attention else None
            self.out = nn.Linear(heads, cfg.model_dim, bias=False) if has_attention else None
            self.up = nn.Linear(cfg.model_dim, cfg.mlp_dim, bias=False)
            self.down = nn.Linear(cfg.mlp_dim, cfg.model_dim, bias=False)

        def forward(self, x_BTD):
            if has_attention:
                qkv = self.qkv(norm(x_BTD)).unflatten(2, (3, cfg.num_heads, cfg.head_dim))
                q_BHTK, k_BHSK, v_BHSK = qkv.transpose(1, 3).unbind(2)
                q_BHTK, k_BHSK = norm(q_BHTK), norm(k_BHSK)
                y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True)
                x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).flatten(2))
            return x_BTD + self.down(F.relu(self.up(norm(x_BTD))).square())

    return Block()


def make_torch_gpt(cfg):
    """A module: (tokens, targets [B, T]) -> mean loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class PlainGPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(cfg.padded_vocab, cfg.model_dim)
            self.positions = nn.Embedding(cfg.stages[0].seq_len, cfg.model_dim)
            kinds = [i not in cfg.mlp_only for i in range(cfg.num_layers)]
            self.blocks = nn.Sequential(*(make_torch_block(kind, cfg) for kind in kinds))
            self.head = nn.Linear(cfg.model_dim, cfg.padded_vocab, bias=False)

        def forward(self, tokens_BT, targets_BT):
            x_BTD = self.embed(tokens_BT) + self.positions.weight[None]
            x_BTD = self.blocks(x_BTD.to(getattr(torch, cfg.compute_dtype)))
            x_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:])
            return F.cross_entropy(self.head(x_BTD).flatten(0, 1).float(), targets_BT.flatten())

    return PlainGPT()


def torch_gpt(cfg):
    """As a peer: accumulation over micro-steps, bf16 autocast, fused AdamW."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = jax.default_backend()
    said = f"PyTorch would run on {device}, JAX on {backend}; wanted the same"
    require((device == "cuda") == (backend == "gpu"), f"--torch: {said}")
    model = make_torch_gpt(cfg).to(device)
    loss_of = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.adamw_lr, fused=True)
    num_rows = max(1, cfg.tokens_at_once // cfg.stages[0].seq_len)

    def put(tokens_BT1):
        tokens_BT1 = torch.from_numpy(tokens_BT1.astype(np.int64)).to(device)
        return torch.split(tokens_BT1, num_rows)

    def step(micros):
        total = 0.0
        for tokens_BT1 in micros:
            with torch.autocast(device, getattr(torch, cfg.compute_dtype)):
                loss = loss_of(tokens_BT1[:, :-1], tokens_BT1[:, 1:]) / len(micros)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return put, step, 0.0


def time_torch(args):
    """Yield (a line, its row) of each turn of our last stage and a torch GPT. Raises UsageError."""
    require(importlib.util.find_spec("torch"), "--torch: wanted PyTorch: pip install torch")
    cfg = configure(args.flags)
    mesh = train.make_mesh()
    wanted = "wanted one device, such as by CUDA_VISIBLE_DEVICES=0"
    require(mesh.size == 1, f"--torch: {wanted}, here are {mesh.size}")
    wanted = "wanted as many, as the GPT in PyTorch has"
    require(cfg.kv_heads == cfg.num_heads, f"--num_kv_heads={cfg.num_kv_heads}: {wanted}")
    cfg = replace(cfg, stages=(replace(cfg.stages[-1], end=1.0),))
    cfg = train.fit_memory(GPT, mesh, cfg, {})
    rows = []
    try:
        programs = {"ours": (cfg, *ours(cfg)), "torch": (cfg, *torch_gpt(cfg))}
        for line, row in take_turns(programs, args.steps or 5):
            rows += [row] if row else []
            yield line, row
    except RuntimeError as error:  # of JAX or of torch
        if "out of memory" not in str(error).lower():
            raise
        said = f"--torch: out of memory. Halve --micro_tokens={cfg.tokens_at_once} after --"
        raise UsageError(said) from error
    yield ratios_of(rows, "ours", "torch", "wall"), None
    yield f"torch={importlib.import_module('torch').__version__}", None


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


def check_parts(args, fail):
    """The flags of the stages say nothing where other parts run."""
    others = ["loader", *FILES, "attention", "torch"]
    chosen = [f"--{name}" for name in others if getattr(args, name)]
    for name in ("micro_tokens", "trace"):
        if chosen and getattr(args, name):
            fail(f"--{name} is of the stages alone; leave it out, or {' and '.join(chosen)}")


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
    flag("--attention", action="store_true", help="check and time the fast attention")
    flag("--torch", action="store_true", help="in turns with a plain GPT in PyTorch")
    flag("--trace", metavar="DIR", help="trace three steps of each stage, too; the traces go there")
    flag("--cache", action="store_true", help="use train.py's cache: no true compile times")
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
    check_parts(args, fail)
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
    if args.torch:  # before JAX starts: else it takes three quarters of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.attention:
        yield from check_attention(args.steps or 20, configure(args.flags))
    if args.torch:
        yield from time_torch(args)
    if not (args.loader or args.peers or args.attention or args.torch):
        yield from time_stages(args)


def main(argv=None):
    """Raises UsageError."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.json:
        require_place(args.json)
    jax.config.update("jax_enable_compilation_cache", args.cache)  # else compilation is timed
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
