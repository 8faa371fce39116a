# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10,<0.13", "numpy>=2.0,<3", "einops>=0.8,<0.9", "safetensors>=0.5,<1", "huggingface_hub>=2.4,<3"]
# ///
"""Train a GPT to a target validation loss in the least time: one file, pure JAX, to be read from top to bottom.

    python train.py                      on a CPU: a byte-level demo on Python's own source, two or three minutes
    python cached_fineweb10B.py 8        on a TPU or GPU: fetch FineWeb (GPT-2 tokens), then
    python train.py                      train a GPT-2-class model towards validation loss 3.28, the `speedrun` preset
    python train.py --steps=500 @my.args every number below is a flag (--help); @FILE reads flags from a file

In order: facts (config, weight table), mathematics (model, schedules, optimizers), input (data), the steps, output
(checkpoint, log), and the run (command line, main). Importing this file does nothing.

One letter, one axis, in array names, einsum strings and the weight table alike:
    A micro-batches of a step   B rows   T query position   S key position   L layer   D model width   V vocabulary
    H query heads   G key/value heads   R query heads per key/value head   K head width   F mlp width   J skips
    I layers with attention   E inputs of a gate   C chunks of tokens   M, N any matrix's two, or N several letters in one axis: tokens, heads and their width

Every device runs the same program on its own rows. Weights and optimizer state live split over the devices; a step
gathers compute copies once, accumulates gradients locally, and reduces each gradient element once (layers with --fsdp=1: per micro-step).
"""
import argparse, bisect, collections, contextlib, ctypes, dataclasses, difflib, functools, glob, hashlib, itertools, json, math, os
import platform, re, shlex, shutil, signal, socket, sys, sysconfig, threading, time, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from einops import rearrange, reduce
from jax.experimental import multihost_utils
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

f32 = jnp.float32
ROOT = Path(__file__).resolve().parent

# What a user can mend; `command` turns each into one sentence and its exit code.
class UsageError(ValueError): exit_code = 2       # a flag that cannot be
class DataError(ValueError): exit_code = 3        # a shard or corpus that is missing, damaged or too small
class CheckpointError(ValueError): exit_code = 4  # a checkpoint that is damaged or another run's
class OtherConfig(CheckpointError): pass
class NonFiniteLoss(RuntimeError): exit_code = 5  # the loss became NaN or infinite
class Preempted(RuntimeError): exit_code = 75     # told to stop, or another host is gone: run the same again with --resume=auto

@contextlib.contextmanager
def errors_as(kind, what):
    """An error within is raised as `kind`, with `what` before it; one with an exit code passes as it is."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, safetensors.SafetensorError) as error:
        raise error if hasattr(error, "exit_code") else kind(f"{what} ({type(error).__name__}: {error})") from error

def plain(text, keep=""):
    """Text that may hold what others wrote, for the terminal: one line without control characters but `keep`, not too long."""
    return "".join(c if c.isprintable() or c in keep else "?" for c in str(text))[:1000]

def say(text, end="\n", file=None):
    """Print. A console that is closed, full, gone (`| head`) or of a narrower encoding lacks the line and stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=file, flush=True)

# ---- Config ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every number one can turn; the defaults are the speedrun. Each field is a flag, its comment the flag's help.
    The speedrun is modded-nanogpt's record 58 (January 2026) with the free tweaks of records 61 to 80. Different here: no embedding
    tables, no paired heads, three heads of 256 for six of 128 (attn_scale 0.1 / sqrt 2), Adam on every step, not every second,
    gradients as means over tokens, documents packed in rows of 4,096; more steps make up for it (1,775 there). A "gain" in a comment
    is validation loss without it minus loss with it: English text, 5M parameters, three seeds, and 2M tokens if it names no others
    (records/ablations)."""
    # -- Run
    preset: str = "auto"              # demo, speedrun, tiny; auto: demo on a CPU, else speedrun
    steps: int = 1906                 # optimizer steps
    seed: int = 0                     # of first weights, and of the data order where it is shuffled
    optimizer: str = "muon"           # muon: matrices by Muon, the rest by Adam; adamw: everything by AdamW
    # -- Model
    num_layers: int = 11              # blocks
    model_dim: int = 768              # width of the residual stream
    num_heads: int = 3                # query heads
    num_kv_heads: int = 0             # key and value heads, each shared by a group of query heads; 0: num_heads
    head_dim: int = 256               # width of one head, a multiple of 4; of 128 for --attention=band
    mlp_dim: int = 3072               # hidden width of the ReLU^2 MLP
    vocab_size: int = 0               # token ids there can be; 0: what the shards' meta.json says (GPT-2: 50257)
    bos_id: int = -1                  # the token before each document; -1: what meta.json says (GPT-2: 50256)
    tied_stages: int = 2              # stages in which the embedding is the head; then it goes its own way from there
    mlp_only: str = "6"               # blocks without attention
    skips: str = "3>6"                # the stream after block 3 re-enters before block 6; a comma list, empty: none
    late_inputs: str = "7>9,7>10"     # attention of block 9 reads the stream after block 7
    backout: str = "7"                # the stream after this block is taken out of the last one in part; empty: none
    offset_layers: str = "3,10"       # blocks that match keys by the token before them (partial key offset)
    gate_dims: int = 12               # dims of its input that a gate reads: of attention's heads, of a skip; 0: no gates
    smear: int = 1                    # 1: a gate lets some of the token before into each embedding
    softcap: str = "11.5,15,5"        # A,B,C: logits are A * tanh((logits + C) / B); one number: B = A, C = 0; 0: off
    rope_base: float = 1024.0         # the slowest rotation is 1/base radians per token, before YaRN
    attn_scale: float = 0.0707        # multiplies q.k, both of unit rms, in the first stage; 0: 1/sqrt(head_dim)
    attention: str = "auto"           # implementation: band (Pallas, for TPUs), xla; auto: band on a TPU if it can
    attn_block: int = 512             # queries per block of the xla attention, where it divides a row; keys out of reach are left out
    head_block: int = 4096            # tokens whose logits exist at a time, where it divides a micro-step; 0: all at once
    # -- Precision and sharding
    fsdp: int = 0                     # 1: in training layers stay split over the devices, gathered one by one, forward and backward
    compute_dtype: str = "bfloat16"   # matmul operands, gradients between devices; weights, optimizer state, norms, sums of softmax and loss are float32
    residual_dtype: str = "auto"      # activations between matmuls; auto: compute_dtype
    # -- Stages: one value, or one per stage separated by commas
    stage_ends: str = "0.3263,0.6527,0.979,1"  # share of the steps at which each stage ends
    batch_tokens: str = "131072,262144,393216,393216"  # tokens per optimizer step, all devices together
    seq_len: str = "4096"             # tokens per row
    max_doc_len: str = "896,2048,2048,2048"  # tokens kept of a document, rows packed; 0: plain stream, no document mask
    window_short: str = "128,384,640,768"    # tokens a short layer looks back; 0: no limit
    window_long: str = "384,896,1408,1664"   # tokens a long layer looks back; 0: no limit. Where it grows, YaRN
    stage_lr: str = "1,1.52,1.73,1.73"       # multiplies every learning rate
    mtp: str = "0.5,0.25"             # loss weights of the second and third next token; each falls to 0 over a stage, the last first, so give no more than stages; train_loss is their mean (short of a row's end)
    long_layers: str = "3,10"         # blocks with the long window, in every stage
    micro_tokens: int = 4096          # tokens per device and micro-step (accumulation follows); 0: all at once, in evaluation 65536
    # -- Optimizers
    muon_lr: float = 0.023            # Muon: spectral norm of a step, times sqrt(longer/shorter side), w_down twice that
    muon_wd: float = 1.2              # where a step shrinks a weight, it shrinks by lr^2 * wd times that root more (cautious decay)
    muon_beta2: float = 0.9           # NorMuon: decay of the mean square of a unit's steps; 0: off
    muon_momentum: str = "0.85,0.95,300,50"  # from, to, steps of linear warmup, and of the way back at the end
    ns_steps: int = 5                 # Newton-Schulz iterations, at most 5
    embed_lr: float = 0.008           # Adam, embedding
    head_lr: float = 0.008            # Adam, head
    embed_std: float = 0.005          # of the first values of embedding and head
    scalar_lr: float = 0.04           # Adam, learned scalars
    gate_lr: float = 0.008            # Adam, gates
    adamw_lr: float = 0.001           # AdamW, everything, with --optimizer=adamw
    adam_beta1: float = 0.5           # decay of the gradient's mean, embedding and head; scalars and gates 0.9; with --optimizer=adamw this one everywhere
    adam_beta2: float = 0.95          # decay of its square's mean, embedding and head; scalars and gates 0.99, those of sublayers 0.95; with adamw everywhere
    adam_eps: float = 1e-10           # added to the root of the square's mean
    adam_wd: float = 0.75             # embedding and head: as muon_wd; with --optimizer=adamw by lr * wd, everywhere
    warmup_steps: int = 0             # linear learning rate warmup
    cooldown_frac: float = 0.6        # share of the steps before final_frac's over which stage_lr is blended linearly
    final_lr_scale: float = 0.15      # into this share of the rates above, where it stays for
    final_frac: float = 0.021         # the last share of the steps
    # -- Data
    train_files: str = "fineweb10B/fineweb_train_*.bin"  # glob of training shards; empty: the embedded corpus
    val_files: str = "fineweb10B/fineweb_val_*.bin"      # glob of validation shards; empty: the embedded corpus
    max_epochs: int = 1               # how often the training tokens may be read
    shuffle: int = 0                  # 1: a plain stream is read in blocks of the longest seq_len, in random order
    # -- Evaluation
    val_tokens: int = 10_485_760      # targets scored, from the start of the first validation shard, each once
    val_every: int = 250              # steps between evaluations, and one at the end; 0: only that
    val_seq_len: int = 8192           # tokens per row of evaluation, of which
    val_context: int = 2048           # the first are context only: the row before has scored them
    val_window_short: int = 768       # tokens a short layer looks back in evaluation; 0: no limit
    val_window_long: int = 2560       # tokens a long layer looks back in evaluation; 0: no limit
    target_loss: float = 3.28         # the step and time at which it is reached are reported; 0: no target
    # -- Log and checkpoint
    log_dir: str = "logs"             # run folders are made here
    log_every: int = 10               # steps between lines of the log
    save_every: int = 0               # steps between checkpoints, and one at the end; 0: only that
    resume: str = ""                  # auto: continue the run of this config that was started last; PATH: that run or checkpoint
    profile: str = ""                 # START:STOP writes a JAX trace of these steps into the run folder
    cpu_devices: int = 0              # devices to make of a CPU, each with its share of a batch; 0: one
    multihost: str = ""               # auto: this is one of a TPU slice's hosts, each of which runs the same line; elsewhere HOST:PORT,COUNT,INDEX
    deterministic: int = 0            # 1: on a GPU only operations that give the same bits each time, slower; elsewhere they do anyway

    kv_heads = property(lambda self: self.num_kv_heads or self.num_heads)
    vocab_unit = property(lambda self: 512 if self.vocab_size > 8192 else 128)  # whole registers, equal shares of eight devices
    padded_vocab = property(lambda self: -(-self.vocab_size // self.vocab_unit) * self.vocab_unit)
    activation_dtype = property(lambda self: self.compute_dtype if self.residual_dtype == "auto" else self.residual_dtype)
    score_scale = property(lambda self: self.attn_scale or self.head_dim ** -0.5)
    cap = property(lambda self: tuple(map(float, [*self.softcap.split(","), self.softcap, "0"][:3])))  # of logits: height, width, shift

PRESETS = {
    "speedrun": {},
    "demo": dict(
        steps=750, num_layers=4, model_dim=256, num_heads=4, head_dim=64, mlp_dim=1024, mlp_only="", skips="1>3", late_inputs="", backout="2",
        attn_scale=0.2, offset_layers="0,1,2,3", tied_stages=0, stage_ends="0.3333,0.6667,1", batch_tokens="1024,2048,3072", seq_len="256",
        max_doc_len="0", window_short="0", window_long="0", stage_lr="1,1.52,1.73", mtp="", long_layers="", micro_tokens=1024, attn_block=128,
        muon_lr=0.02, muon_momentum="0.85,0.95,100,20", final_frac=0.0, residual_dtype="float32", train_files="", val_files="", shuffle=1,
        val_tokens=262_144, val_every=250, val_seq_len=256, val_context=128, val_window_short=0, val_window_long=0, target_loss=1.0),
    "tiny": dict(
        steps=30, num_layers=3, model_dim=32, num_heads=2, head_dim=16, mlp_dim=64, mlp_only="", skips="0>2", late_inputs="0>2", backout="1",
        offset_layers="1", gate_dims=5, attn_scale=0.3, tied_stages=1, stage_ends="0.5,1", batch_tokens="512,1024", seq_len="32,64",
        max_doc_len="0", long_layers="1", window_short="16,24", window_long="48,0", stage_lr="1,1.2", mtp="0.5", muon_momentum="0.85,0.95,10,5",
        final_frac=0.1, micro_tokens=0, attn_block=32, compute_dtype="float32", train_files="", val_files="", shuffle=1, val_tokens=2048,
        val_every=10, val_seq_len=64, val_context=32, val_window_short=24, val_window_long=0, target_loss=0.0, log_every=5)}
MAY_DIFFER = {"log_dir", "log_every", "save_every", "val_every", "resume", "profile", "cpu_devices", "multihost"}  # when resuming
SPEEDRUN_SHARDS = 8  # training shards that hold the speedrun's tokens and the document ends it does not read

# Steps first..last-1 share a compiled program: batch, windows, documents' length grow. windows: one per block, 0: no limit
Stage = collections.namedtuple("Stage", "index first last batch_tokens seq_len max_doc_len windows lr")
def stages(cfg):
    """The stage table. Raises UsageError where a list has neither one value nor one per stage."""
    ends = [round(float(end) * cfg.steps) for end in cfg.stage_ends.split(",")]
    def column(name, kind=int):
        with errors_as(UsageError, f"--{name}={getattr(cfg, name)}: wanted {kind.__name__}s with commas between"):
            values = [kind(x) for x in getattr(cfg, name).split(",")]
        if len(values) not in (1, len(ends)):
            raise UsageError(f"--{name}={getattr(cfg, name)}: wanted one value, or one for each of the {len(ends)} stages of --stage_ends={cfg.stage_ends}")
        return values * (len(ends) // len(values))
    windows = [layer_windows(*pair, cfg) for pair in zip(column("window_short"), column("window_long"))]
    return [Stage(*row) for row in zip(range(len(ends)), [0, *ends], ends, column("batch_tokens"), column("seq_len"),
                                       column("max_doc_len"), windows, column("stage_lr", float))]

def val_stage(cfg):
    """Validation as a stage: one batch, whose rows score all but their context."""
    num_rows, windows = -(-cfg.val_tokens // (cfg.val_seq_len - cfg.val_context)), (cfg.val_window_short, cfg.val_window_long)
    return Stage(-1, 0, 0, num_rows * cfg.val_seq_len, cfg.val_seq_len, 0, layer_windows(*windows, cfg), 0.0)

def layer_list(text): return [int(layer) for layer in text.split(",") if layer]
def layer_pairs(text): return [tuple(map(int, pair.split(">"))) for pair in text.split(",") if pair]
def layer_windows(short, long, cfg):
    return tuple(long if layer in layer_list(cfg.long_layers) else short for layer in range(cfg.num_layers))

# ---- Mesh and precision ----------------------------------------------------------------------------------------------
def make_mesh(devices=None):
    return jax.make_mesh((len(devices or jax.devices()),), ("data",), axis_types=(AxisType.Auto,), devices=devices)

SPLIT_AXES = ("F", "HK", "GK", "V", "D")  # a weight is split over the devices along the first of these that divides
def split_axis(spec, cfg, num_devices):
    """The axis, from the end, along which a weight and its optimizer state are split, or None: a copy on each device."""
    axes = spec.axes.split()
    return next((axes.index(a) - len(axes) for a in SPLIT_AXES if a in axes and AXIS_SIZE[a](cfg) % num_devices == 0), None)

product = functools.partial(jnp.einsum, preferred_element_type=f32)  # bf16 operands, float32 sums
def matmul(spec, x, w, out_dtype=None):
    """einsum(spec, x, w): operands in w's dtype, sums in float32, the result in out_dtype (default: x's). Gradients likewise,
    where autodiff would multiply in float32. A letter of one operand must occur in the other or in the result."""
    return _matmul(spec, x.astype(w.dtype), w).astype(out_dtype or x.dtype)

def _matmul_backward(spec, operands, g):
    (x, w), (x_axes, w_axes, out_axes) = operands, re.split(",|->", spec)
    g = g.astype(w.dtype)
    dx, dw = product(f"{out_axes},{w_axes}->{x_axes}", g, w), product(f"{x_axes},{out_axes}->{w_axes}", x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)
_matmul = jax.custom_vjp(lambda spec, x, w: product(spec, x, w), nondiff_argnums=(0,))
_matmul.defvjp(lambda spec, x, w: (product(spec, x, w), (x, w)), _matmul_backward)

# ---- Parameters ------------------------------------------------------------------------------------------------------
# Every weight is one row: axes, first value, optimizer group. Shapes, sharding, routing, the parameter count and the
# checkpoint's names are read off this table. Stacked over the layers that have them; a matrix is the last two axes.
AXIS_SIZE = {"L": lambda cfg: cfg.num_layers, "I": lambda cfg: cfg.num_layers - len(layer_list(cfg.mlp_only)),
             "J": lambda cfg: len(layer_pairs(cfg.skips)), "D": lambda cfg: cfg.model_dim, "F": lambda cfg: cfg.mlp_dim,
             "HK": lambda cfg: cfg.num_heads * cfg.head_dim, "GK": lambda cfg: cfg.kv_heads * cfg.head_dim, "1": lambda cfg: 1,
             "H": lambda cfg: cfg.num_heads, "E": lambda cfg: cfg.gate_dims, "V": lambda cfg: cfg.padded_vocab}

@dataclasses.dataclass(frozen=True)
class Spec:
    """One weight. Not a pytree node, so jax.tree sees each Spec as a leaf."""
    axes: str       # "L D F": one word per array axis; "HK" is two logical axes held merged
    init: Callable  # (key, shape) -> float32 array
    group: str      # the optimizer rule that owns it

SCALARS = ("scalar", "stream", "mix")  # groups of learned scalars: float32, no matrices
def normal(std): return lambda key, shape: std * jax.random.normal(key, shape)
def uniform(std): return lambda key, shape: 3 ** 0.5 * std * jax.random.uniform(key, shape, minval=-1, maxval=1)
def constant(value): return lambda key, shape: jnp.full(shape, value, f32)

def param_specs(cfg):
    """The weight table. w_down of zeros (modded-nanogpt, October 2024), not w_out (record 64): blocks start as attention alone."""
    matrix, table = uniform(0.5 * cfg.model_dim ** -0.5), normal(cfg.embed_std)
    rows = {
        "embed": Spec("V D", table, "embed"),
        "attention": {
            "w_q": Spec("I D HK", matrix, "muon"),
            "w_k": Spec("I D GK", matrix, "muon"),
            "w_v": Spec("I D GK", matrix, "muon"),
            "w_out": Spec("I HK D", matrix, "muon"),
            "gate": Spec("I E H", constant(0.0), "gate"),
            "x_mix": Spec("I", constant(1.1 ** 0.5), "stream"),  # weight of the stream; all of these: gain 0.042
            "y_mix": Spec("I", constant(1.0), "mix"),            # of what is added (in the record 0.5)
            "x0_mix": Spec("I", constant(0.0), "mix")},          # of the first embedding, which re-enters: gain 0.000
        "blocks": {
            "w_up": Spec("L D F", matrix, "muon"),
            "w_down": Spec("L F D", constant(0.0), "down"),
            "x_mix": Spec("L", constant(1.1 ** 0.5), "stream"),
            "y_mix": Spec("L", constant(1.0), "mix")},
        "head": Spec("V D", table, "head"),
        "skip_gate": Spec("E J", constant(0.0), "skip"),
        "skip_mix": Spec("J", constant(-1.5), "scalar"),
        "smear_gate": Spec("E 1", constant(0.0), "smear"),
        "smear_mix": Spec("1", constant(0.0), "scalar"),
        "backout_mix": Spec("1", constant(0.5), "scalar")}
    used = {"skip": cfg.skips, "smear": cfg.smear, "backout": cfg.backout, "gate": cfg.gate_dims}
    keep = lambda tree: {name: keep(row) if isinstance(row, dict) else row for name, row in tree.items()
                         if all(used[part] for part in used if part in name)}
    return keep(rows)

def shape_of(spec, cfg): return tuple(AXIS_SIZE[axis](cfg) for axis in spec.axes.split())
def count_params(specs, cfg): return sum(math.prod(shape_of(spec, cfg)) for spec in jax.tree.leaves(specs))
def name_of(path): return jax.tree_util.keystr(path, simple=True, separator="/")

def init_params(key, specs, cfg):
    """First values, keyed by name: adding a row leaves every other weight's value as it was."""
    leaf_key = lambda path: jax.random.fold_in(key, zlib.crc32(name_of(path).encode()))
    return jax.tree.map_with_path(lambda path, spec: spec.init(leaf_key(path), shape_of(spec, cfg)).astype(f32), specs)

STACKED = ("attention", "blocks")
def unstack(weights):
    """Stacked weights -> lists of per-layer dicts: their gradients are then stacked once, not summed L times."""
    split = lambda stack: [jax.tree.map(lambda w: w[i], stack) for i in range(len(jax.tree.leaves(stack)[0]))]
    return {name: split(part) if name in STACKED else part for name, part in weights.items()}
def restack(weights):
    stack = lambda layers: jax.tree.map(lambda *w: jnp.stack(w), *layers)
    return {name: stack(part) if name in STACKED else part for name, part in weights.items()}

# ---- Model -----------------------------------------------------------------------------------------------------------
def rms_norm(x):
    """x / rms(x) over the last axis, in float32, without parameters (arXiv:1910.07467)."""
    y = x.astype(f32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

def rotary(num_positions, stage, cfg):
    """(cos, sin) [S, K/2] of half-RoPE (arXiv:2104.09864; gain 0.041, two seeds), and what multiplies q.k. Dim j turns with dim j + K/2: half
    of these pairs at rates from 1 down to 1/rope_base per token, the others stand still; q.k sees only differences of position.
    Where the long window grows from stage to stage, YaRN (arXiv:2309.00071, as in modded-nanogpt record 31; gain -0.013, two seeds) slows the rates
    that turn less than 32 times in it, by up to the growth, and sharpens the scores. Evaluation takes the last stage's, at any step."""
    rate, scale = cfg.rope_base ** -np.linspace(0, 1, cfg.head_dim // 4), cfg.score_scale
    table = stages(cfg) if stage.index < 0 else stages(cfg)[:stage.index + 1]
    for old, new in itertools.pairwise(itertools.accumulate((s.seq_len if 0 in s.windows else max(s.windows) for s in table), max)):
        fast = np.clip((old * rate / (2 * np.pi) - 1) / 31, 0, 1)
        rate, scale = rate * (fast + (1 - fast) * old / new), scale * (1 + 0.2 * math.log(new / old))
    angle_SK = np.outer(np.arange(num_positions), np.pad(rate, (0, len(rate))))
    return np.cos(angle_SK).astype(np.float32), np.sin(angle_SK).astype(np.float32), scale

def rotate(x_BTHK, table):
    cos, sin = (t[None, :, None] for t in table)
    a, b = jnp.split(x_BTHK.astype(f32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BTHK.dtype)

def attention_xla(q_BTN, k_BTN, v_BTN, gate_BTH, first_BT, table, window, cfg):
    """Gated attention of projected queries over the keys first_BT .. their own, by blocks of attn_block queries over keys in reach."""
    num_tokens, (*table, scale) = q_BTN.shape[1], table
    block = cfg.attn_block if cfg.attn_block and num_tokens % cfg.attn_block == 0 else num_tokens
    q_BTHK, k_BSGK, v_BSGK = (rearrange(z, "B T (H K) -> B T H K", K=cfg.head_dim) for z in (q_BTN, k_BTN, v_BTN))
    q_BTHK, k_BSGK = rotate(rms_norm(q_BTHK), table) * scale, rotate(rms_norm(k_BSGK), table)
    q_BHTK, k_BGSK, v_BGSK = (z.astype(cfg.compute_dtype).swapaxes(1, 2) for z in (q_BTHK, k_BSGK, v_BSGK))
    position_T, outputs = jnp.arange(num_tokens), []
    for begin in range(0, num_tokens, block):
        here = slice(begin, begin + block)
        keys = slice(max(0, begin - window) if window else 0, begin + block)
        key_11S = position_T[None, None, keys]
        visible_BTS = (key_11S >= first_BT[:, here, None]) & (key_11S <= position_T[None, here, None])
        q_BGNK = rearrange(q_BHTK[:, :, here], "B (G R) T K -> B G (R T) K", G=k_BGSK.shape[1])
        y_BGNK = softmax_average(q_BGNK, k_BGSK[:, :, keys], v_BGSK[:, :, keys], visible_BTS)
        outputs.append(rearrange(y_BGNK, "B G (R T) K -> B T (G R K)", T=block))
    return gated(jnp.concatenate(outputs, axis=1), gate_BTH)

def gated(y_BTN, gate_BTH): return (y_BTN.reshape(*gate_BTH.shape, -1) * gate_BTH[..., None]).reshape(y_BTN.shape).astype(y_BTN.dtype)

def softmax_average(q_BGNK, k_BGSK, v_BGSK, visible_BTS):
    """softmax(q k) v over the visible keys; N is R heads of T queries. Scores of normed q and k need no maximum."""
    visible_B1NS = jnp.tile(visible_BTS, (1, q_BGNK.shape[2] // visible_BTS.shape[1], 1))[:, None]
    exp_BGNS = jnp.where(visible_B1NS, jnp.exp(matmul("BGNK,BGSK->BGNS", q_BGNK, k_BGSK, f32)), 0)
    return (matmul("BGNS,BGSK->BGNK", exp_BGNS, v_BGSK) / jnp.sum(exp_BGNS, axis=-1, keepdims=True)).astype(v_BGSK.dtype)

def attention_band(q_BTN, k_BTN, v_BTN, gate_BTH, first_BT, table, window, cfg):
    """The same by the kernels below, for rows of a multiple of 256 tokens; the table in compute_dtype."""
    length, (*table, scale) = q_BTN.shape[1], table
    band = Band(length, min(window or length, length), math.gcd(length, 1024), scale, cfg.num_heads)
    inputs = (z.astype(cfg.compute_dtype) for z in (q_BTN, k_BTN, v_BTN, *table))
    return banded(first_BT[:, None, None], gate_BTH.mT[:, :, None], *inputs, band)
ATTENTION = {"auto": attention_xla, "xla": attention_xla, "band": attention_band}  # auto: where nothing was chosen

def offset_keys(k_BSN, starts_BS, cfg):
    """Partial key offset (modded-nanogpt, record 49): the dims that RoPE leaves still come from the token before, or are 0
    where a document starts, so one layer can look up what followed an earlier occurrence. The record shifts after the norm, across
    documents; before it, the norm still bounds the score. Gain 0.118, after 8M tokens, one seed, 0.062; on code 0.151."""
    still_N = np.arange(k_BSN.shape[-1]) // (cfg.head_dim // 4) % 2 == 1
    before_BSN = jnp.pad(k_BSN, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return jnp.where(still_N[None, None], jnp.where(starts_BS[:, :, None], 0, before_BSN), k_BSN)

def gate(x_BTD, w_EH):
    """Between 0 and 1 for each head (or other letter) from the first few dims of x; one half without weights."""
    return 0.5 if w_EH is None else jax.nn.sigmoid(matmul("BTE,EH->BTH", x_BTD[:, :, :len(w_EH)], w_EH, f32))

def attention(x_BTD, p, attend, cfg):
    """One layer's self-attention: attend(q, k, v, gate) -> y between the projections, gates from record 28 (gain of all 0.009)."""
    gate_BTH = gate(x_BTD, p["gate"]) if "gate" in p else jnp.ones((*x_BTD.shape[:2], cfg.num_heads), f32)
    y_BTN = attend(*(matmul("BTD,DN->BTN", x_BTD, p[name]) for name in ("w_q", "w_k", "w_v")), gate_BTH)
    return matmul("BTN,ND->BTD", y_BTN, p["w_out"], x_BTD.dtype)

relu_squared = jax.custom_jvp(lambda x: jnp.square(jax.nn.relu(x)))  # arXiv:2109.08668, gain over GELU 0.016; its slope from x alone, no mask is kept
relu_squared.defjvps(lambda dx, y, x: 2 * jax.nn.relu(x) * dx)
def mlp(x_BTD, p): return matmul("BTF,FD->BTD", relu_squared(matmul("BTD,DF->BTF", x_BTD, p["w_up"])), p["w_down"])

def lookup(weights, name, ids_BT, use):
    """Rows ids_BT of a table. Where weights[use] is there (zeros, in training), the gradient goes to it, row by row."""
    return jax.lax.stop_gradient(weights[name])[ids_BT] + weights[use] if use in weights else weights[name][ids_BT]

def attend_row(tokens_BT, stage, cfg):
    """attend(layer, q, k, v, gate) over whole rows: within the window and, where rows are packed, the document, which begins with BOS."""
    key_1S, table = jnp.arange(tokens_BT.shape[1])[None], rotary(tokens_BT.shape[1], stage, cfg)
    packed = any(s.max_doc_len for s in stages(cfg))  # a plain stream is one document
    doc_start_BS = jax.lax.cummax(jnp.where((tokens_BT == cfg.bos_id) & packed, key_1S, 0), axis=1)
    def attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH):
        window = stage.windows[layer]
        if layer in layer_list(cfg.offset_layers):
            k_BTN = offset_keys(k_BTN, doc_start_BS == key_1S, cfg)
        first_BT = jnp.maximum(doc_start_BS, key_1S - window) if window else doc_start_BS
        return ATTENTION[cfg.attention](q_BTN, k_BTN, v_BTN, gate_BTH, first_BT, table, window, cfg)
    return attend

def forward(weights, tokens_BT, stage, cfg, attend=None):
    """tokens -> normed final activations x_BTD. weights: compute copies, layers unstacked. attend(layer, q_BTN, k_BTN, v_BTN,
    gate_BTH) -> y_BTN of raw projections: in place of attend_row's, one with a cache, say.
    Each sublayer: x <- x_mix x + y_mix f(rms_norm(x)) (+ x0_mix x0), learned scalars (modded-nanogpt, records 9 and 73)."""
    attend, fetch = attend or attend_row(tokens_BT, stage, cfg), weights.get("fetch", lambda p, name: p)
    mix = lambda *terms: sum(scale * x.astype(f32) for scale, x in terms).astype(cfg.activation_dtype)
    def block(x_BTD, x0_BTD, read_BTD, p, heads, i):
        if heads:
            heads = fetch(heads, "attention")
            y_BTD = attention(rms_norm(read_BTD), heads, functools.partial(attend, i), cfg)
            x_BTD = mix((heads["x_mix"], x_BTD), (heads["y_mix"], y_BTD), (heads["x0_mix"], x0_BTD))
        p = fetch(p, "blocks")
        return mix((p["x_mix"], x_BTD), (p["y_mix"], mlp(rms_norm(x_BTD), p)))
    if cfg.fsdp:  # all but the gathered weights is kept for the backward pass, which gathers them again
        block = jax.checkpoint(block, policy=lambda primitive, *_, **__: primitive.name != "all_gather", static_argnums=5)
    e_BTD = lookup(weights, "embed", tokens_BT, "inputs").astype(cfg.activation_dtype)
    if cfg.smear:  # modded-nanogpt, record 34; gain 0.020, after 8M tokens, one seed, -0.002
        before_BTD = jnp.pad(e_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        e_BTD = mix((1, e_BTD), (weights["smear_mix"][0] * gate(e_BTD, weights.get("smear_gate")), before_BTD))
    x_BTD = x0_BTD = rms_norm(e_BTD)
    after, attentions, late = {}, iter(weights["attention"]), {reader: source for source, reader in layer_pairs(cfg.late_inputs)}
    for i, p in enumerate(weights["blocks"]):
        for j, (source, destination) in enumerate(layer_pairs(cfg.skips)):
            if destination == i:  # sigmoid(skip_mix) * 2 gate (records 11, 45 and 55; gain -0.001)
                open_BT1 = gate(x0_BTD, weights["skip_gate"][:, j:j + 1] if cfg.gate_dims else None)
                x_BTD = mix((1, x_BTD), (2 * jax.nn.sigmoid(weights["skip_mix"][j]) * open_BT1, after[source]))
        read_BTD = after[late[i]] if i in late else x_BTD  # record 77; in four layers no gain
        x_BTD = after[i] = block(x_BTD, x0_BTD, read_BTD, p, None if i in layer_list(cfg.mlp_only) else next(attentions), i)
    for i in layer_list(cfg.backout):  # record 40; gain 0.003
        x_BTD = mix((1, x_BTD), (-weights["backout_mix"][0], after[i]))
    return rms_norm(x_BTD)

def capped(z, cfg):
    """Soft cap of logits (arXiv:2408.00118), float32. The default is 23 sigmoid((z + 5) / 7.5) - 11.5 (modded-nanogpt, record 54;
    gain over 15 tanh(z / 15): -0.036, in the demo 0.000, after 8M tokens, two seeds, 0.038 and 0.000)."""
    height, width, shift = cfg.cap
    return height * jnp.tanh((z + shift) / width) if height else z

def softcapped_logits(x_ND, head_VD, cfg):
    """Float32 logits; the ids that pad the table get none."""
    z_NV, used_1V = capped(matmul("ND,VD->NV", x_ND, head_VD, f32), cfg), jnp.arange(cfg.padded_vocab)[None] < cfg.vocab_size
    return z_NV if cfg.vocab_size == cfg.padded_vocab else jnp.where(used_1V, z_NV, -1e15)

def _log_partition_forward(x_ND, head_VD, weight_N, cfg):
    """Sum over tokens of w log Z, Z = sum_v exp(l_v), l = capped(x head^T), and its gradient w / Z exp(l) l'. One array [N, V] is
    stored, exp(l) (1 - (l / height)^2), in head_VD's dtype; w / Z and height / width go to the narrow side of two more matmuls.
    The label is no part of it (speedrun on a v6e-8, predicted: 16.2 ms a step, 21.6 with the label in it)."""
    size, (height, width, _) = cfg.head_block if cfg.head_block and len(x_ND) % cfg.head_block == 0 else len(x_ND), cfg.cap
    def block(totals, rows):
        x_ND, x_DN, weight_N1 = rows
        logits_NV = softcapped_logits(x_ND, head_VD, cfg)
        top_N1 = 0.0 if 0 < height < 60 else jnp.max(logits_NV, axis=1, keepdims=True)  # capped logits need no maximum
        exp_NV = jnp.exp(logits_NV - top_N1)
        slope_NV = 1 - jnp.square(logits_NV / height) if height else 1.0
        p_NV, sum_N1 = (exp_NV * slope_NV).astype(head_VD.dtype), jnp.sum(exp_NV, axis=1, keepdims=True)
        p_NV, sum_N1 = jax.lax.optimization_barrier((p_NV, sum_N1))  # else XLA goes over the logits again
        loss, scale_N1 = jnp.sum(weight_N1 * (jnp.log(sum_N1) + top_N1)), weight_N1 / sum_N1 * (height / width if height else 1)
        dhead_DV = product("DN,NV->DV", (x_DN * scale_N1.T).astype(head_VD.dtype), p_NV)
        return (totals[0] + loss, totals[1] + dhead_DV), product("NV,VD->ND", p_NV, head_VD) * scale_N1
    x_CND, weight_CN1 = rearrange(x_ND, "(C N) D -> C N D", N=size), rearrange(weight_N, "(C N) -> C N 1", N=size)
    # x goes in both ways round: XLA's CPU would widen to float32 a bf16 matmul that sums over the first axis
    (loss, dhead_DV), dx_CND = jax.lax.scan(block, (f32(0), jnp.zeros(head_VD.shape[::-1], f32)), (x_CND, x_CND.mT, weight_CN1))
    return loss, (dx_CND.reshape(x_ND.shape).astype(x_ND.dtype), dhead_DV.T.astype(head_VD.dtype))
log_partition = jax.custom_vjp(lambda *arguments: _log_partition_forward(*arguments)[0], nondiff_argnums=(3,))
log_partition.defvjp(_log_partition_forward, lambda cfg, saved, g: (*((g * grad).astype(grad.dtype) for grad in saved), None))

def loss_fn(weights, tokens_BT, target_BT, weight_BT, stage, cfg):
    """Summed nats of the targets, each times its weight: log sum exp(logits) - logits[target]. In training, weights["ahead"] are
    those of the second and later next tokens, which the same logits predict (multi-token prediction, record 53; gain 0.018), in a mean."""
    x_BTD = forward(weights, tokens_BT, stage, cfg).astype(weights["head"].dtype)
    row_BTD, shares = lookup(weights, "head", target_BT, "targets"), [1.0, *weights.get("ahead", ())]
    nats, total_BT = 0.0, 0.0
    for k, share in enumerate(shares):
        later = lambda z: jnp.pad(z[:, k:], [(0, 0), (0, k)] + [(0, 0)] * (z.ndim - 2))
        weight_k_BT = share / sum(shares) * later(weight_BT)
        label_BT = jnp.sum(x_BTD.astype(f32) * later(row_BTD).astype(f32), axis=-1)
        nats, total_BT = nats - jnp.sum(weight_k_BT * capped(label_BT, cfg)), total_BT + weight_k_BT
    return nats + log_partition(rearrange(x_BTD, "B T D -> (B T) D"), weights["head"], total_BT.ravel(), cfg)

def next_logits(weights, tokens_BT, cfg):
    """Float32 logits_BTV of what follows each token, with the windows of evaluation; rows of any length."""
    x_BTD = forward(weights, tokens_BT, val_stage(cfg), dataclasses.replace(cfg, attention="xla"))
    return softcapped_logits(rearrange(x_BTD, "B T D -> (B T) D"), weights["head"], cfg).reshape(*tokens_BT.shape, -1)

# ---- Banded attention on TPUs ----------------------------------------------------------------------------------------
# Two Pallas kernels, from raw queries and keys: QK norm, half-RoPE, scores, softmax, average and gate (speedrun on a v6e-8,
# predicted: 68.4 ms a step, 70.4 with the gate outside), and all of it backward.
# Grid: row, head, block of queries in order; the keys and values that later blocks can reach stay in fast memory. A block
# goes by tiles of 256 queries, the width of the matrix unit, each against the one span of keys that its window can reach.
TILE, LN2 = 256, math.log(2)
class Band(collections.namedtuple("Band", "length window block scale num_heads")):
    """The shape of the work. spans[d], for a row's d-th block: each tile's (first key, first query) from the first block in reach
    on; the last d stands for all later blocks."""
    spans = property(lambda self: [[(max(0, query - self.window) // 128 * 128, query) for query in range(d * self.block, (d + 1) * self.block, TILE)]
        for d in range(min(-(-self.window // self.block) + 1, self.length // self.block))])

def dot(a, b, axes):  # axes: the one of each that is summed over
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=f32)
def rows_at(start, size=TILE): return pl.ds(pl.multiple_of(start, 128), size)
def as_row(column_T1): return jnp.broadcast_to(column_T1, (len(column_T1), 128)).T[:1]
def band_table(cos_ref, sin_ref, rows):
    cos, sin = cos_ref[rows].astype(f32), sin_ref[rows].astype(f32)
    return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)

def prepare(x_TK, cos, sin, scale):
    """(z, r): z = r RoPE(x), r = sqrt(scale / ln 2) / rms(x), so that z.z' of a query and a key is an exponent of 2."""
    x = x_TK.astype(f32)
    r_T1 = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6) * (scale / LN2) ** 0.5
    return ((x * cos + pltpu.roll(x, x.shape[1] // 2, 1) * sin) * r_T1).astype(x_TK.dtype), r_T1

def prepare_backward(dz_TK, z_TK, r_T1, cos, sin, scale):
    z = z_TK.astype(f32)
    g = dz_TK - z * jnp.mean(dz_TK * z, axis=1, keepdims=True) * (LN2 / scale)
    return ((g * cos + pltpu.roll(g * sin, g.shape[1] // 2, 1)) * (r_T1 * LN2)).astype(z_TK.dtype)  # d 2^s = ln 2 2^s ds

def visible(weights, first, keys_axis):
    """Zero the weights of keys before `first`, and in the last TILE keys, which are the queries' own, of later ones."""
    key, query = (jax.lax.broadcasted_iota(jnp.int32, weights.shape, axis) for axis in (keys_axis, 1 - keys_axis))
    return jnp.where((key >= first) & (key <= query + weights.shape[keys_axis] - TILE), weights, 0.0)

def each_tile(tile, band):
    """Run tile(its place in the block, the queries' own rows, the rows of all keys they can reach) for the tiles of this block."""
    i = pl.program_id(2)
    for d, spans in enumerate(band.spans):  # the last stands for all blocks with as many before them as they can reach
        @pl.when(jnp.minimum(i, len(band.spans) - 1) == d)
        def _():
            for key, query in spans:
                base = (i - d) * band.block
                tile(pl.ds(query % band.block, TILE), rows_at(base + query), rows_at(base + key, query - key + TILE))

def band_fwd(first_ref, gate_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, y_ref, log_sum_ref, z_ref, values_ref, *, band):
    def tile(here, own, keys):
        table = band_table(cos_ref, sin_ref, own)
        z_ref[own], _ = prepare(k_ref[0, here], *table, band.scale)
        values_ref[own] = v_ref[0, here]
        q_TK, _ = prepare(q_ref[0, here], *table, band.scale)
        e_TS = visible(jnp.exp2(dot(q_TK, z_ref[keys], (1, 1))), first_ref[0, 0, 0, here].reshape(TILE, 1) - keys.start, 1)
        sum_T1 = jnp.sum(e_TS, axis=1, keepdims=True)
        gate_T1 = gate_ref[0, 0, 0, here].reshape(TILE, 1)
        y_ref[0, here] = (dot(e_TS.astype(q_TK.dtype), values_ref[keys], (1, 0)) * (gate_T1 / sum_T1)).astype(q_TK.dtype)
        log_sum_ref[0, 0, :, here] = as_row(jnp.log2(sum_T1))
    each_tile(tile, band)

def band_bwd(first_ref, gate_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, y_ref, dy_ref, log_sum_ref,
             dq_ref, delta_ref, dk_ref, dv_ref, z_ref, values_ref, r_ref, dz_ref, dvalues_ref, *, band):
    """Scores are recomputed, keys by queries, so that only dq needs a transposition. dk and dv leave with the row's last block.
    delta, the gated y . dy, is what the softmax's gradient takes off, and the gate's gradient times the gate."""
    def tile(here, own, keys):
        table, dy_TK = band_table(cos_ref, sin_ref, own), dy_ref[0, here]
        z_ref[own], r_T1 = prepare(k_ref[0, here], *table, band.scale)
        r_ref[own], values_ref[own] = jnp.broadcast_to(r_T1, (TILE, 128)), v_ref[0, here]
        dz_ref[own] = dvalues_ref[own] = jnp.zeros((TILE, q_ref.shape[2]), f32)
        q_TK, r_T1 = prepare(q_ref[0, here], *table, band.scale)
        delta_ref[0, 0, :, here] = delta_1T = as_row(jnp.sum(y_ref[0, here].astype(f32) * dy_TK.astype(f32), axis=1, keepdims=True))
        dy_TK = (dy_TK.astype(f32) * gate_ref[0, 0, 0, here].reshape(TILE, 1)).astype(dy_TK.dtype)
        p_ST = jnp.exp2(dot(z_ref[keys], q_TK, (1, 1)) - log_sum_ref[0, 0, :, here])
        p_ST = visible(p_ST, first_ref[0, 0, :, here] - keys.start, 0)
        ds_ST = (p_ST * (dot(values_ref[keys], dy_TK, (1, 1)) - delta_1T)).astype(q_TK.dtype)
        dq_ref[0, here] = prepare_backward(dot(ds_ST, z_ref[keys], (0, 0)), q_TK, r_T1, *table, band.scale)
        dz_ref[keys] += dot(ds_ST, q_TK, (1, 0))
        dvalues_ref[keys] += dot(p_ST.astype(dy_TK.dtype), dy_TK, (1, 0))
    each_tile(tile, band)
    @pl.when(pl.program_id(2) == band.length // band.block - 1)
    def _():
        @pl.loop(0, band.length // TILE)
        def _(t):
            rows = rows_at(t * TILE)
            r_TK, table = jnp.tile(r_ref[rows], (1, q_ref.shape[2] // 128)), band_table(cos_ref, sin_ref, rows)
            dk_ref[0, rows] = prepare_backward(dz_ref[rows], z_ref[rows], r_TK, *table, band.scale)
            dv_ref[0, rows] = dvalues_ref[rows].astype(dv_ref.dtype)

def band_call(kernel, num_matmuls, inputs, outputs, whole_rows, scratch, band):
    """Run a kernel. Arrays go by blocks, which their rank tells: [B, T, HK or GK], [B, H or 1, 1, T], a table [T, K/2] whole.
    Results are like outputs, then like whole_rows, which leave a row at a time. scratch: (width, dtype) of memory for a row."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*outputs, *whole_rows)]
    (num_rows, length, width), head_dim = shapes[0].shape, shapes[0].shape[2] // band.num_heads
    head = lambda h, x: jax.lax.div(h, width // x.shape[2])  # several query heads may share a key head
    spec = lambda x: pl.BlockSpec(*{3: ((1, band.block, head_dim), lambda b, h, i: (b, i, head(h, x))),
        4: ((1, 1, 1, band.block), lambda b, h, i: (b, h if x.shape[1] > 1 else 0, 0, i)), 2: (x.shape, lambda b, h, i: (0, 0))}[x.ndim])
    row = pl.BlockSpec((1, length, head_dim), lambda b, h, i: (b, 0, h))
    num_blocks = length // band.block
    blocks = band.spans + band.spans[-1:] * (num_blocks - len(band.spans))
    scores = num_rows * TILE * sum(query + TILE - key for spans in blocks for key, query in spans)  # of one head
    cost = pl.CostEstimate(flops=2 * num_matmuls * scores * width, transcendentals=band.num_heads * scores,
                           bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *shapes)))
    return pl.pallas_call(
        functools.partial(kernel, band=band), grid=(num_rows, band.num_heads, num_blocks), out_shape=shapes, cost_estimate=cost,
        in_specs=[*map(spec, inputs)], out_specs=[*map(spec, outputs), *(row for _ in whole_rows)], name=kernel.__name__,
        scratch_shapes=[pltpu.VMEM((length, size), dtype) for size, dtype in scratch], compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=64 << 20))(*inputs)

def _banded_forward(first_B11T, gate_BH1T, q_BTN, k_BTN, v_BTN, cos, sin, band):
    """Gated attention of raw queries and keys [B, T, HK] over the keys first .. T. cos, sin: rotary, [T, K/2]."""
    inputs, memory = (first_B11T, gate_BH1T, q_BTN, k_BTN, v_BTN, cos, sin), (q_BTN.shape[2] // band.num_heads, q_BTN.dtype)
    log_sum = jax.ShapeDtypeStruct((len(q_BTN), band.num_heads, 1, band.length), f32)
    y_BTN, log_sum_BH1T = band_call(band_fwd, 2, inputs, (q_BTN, log_sum), (), (memory, memory), band)
    return y_BTN, (inputs, y_BTN, log_sum_BH1T)

def _banded_backward(band, saved, dy_BTN):
    inputs, y_BTN, log_sum_BH1T = saved
    (_, gate_BH1T, q_BTN, k_BTN, *_), head_dim = inputs, y_BTN.shape[2] // band.num_heads
    narrow, wide = (head_dim, q_BTN.dtype), (head_dim, f32)
    dq_BTN, delta_BH1T, *dkv_BTN = band_call(band_bwd, 5, (*inputs, y_BTN, dy_BTN, log_sum_BH1T), (q_BTN, log_sum_BH1T),
                                             (q_BTN, q_BTN), (narrow, narrow, (128, f32), wide, wide), band)
    of_group = lambda g_BTN: reduce(g_BTN, "B T (G R K) -> B T (G K)", "sum", G=k_BTN.shape[2] // head_dim, K=head_dim)
    return None, delta_BH1T / jnp.maximum(gate_BH1T, 1e-30), dq_BTN, *map(of_group, dkv_BTN), None, None
banded = jax.custom_vjp(lambda *arguments: _banded_forward(*arguments)[0], nondiff_argnums=(7,))
banded.defvjp(_banded_forward, _banded_backward)

# ---- Schedules -------------------------------------------------------------------------------------------------------
# Pure functions of the step. Values are traced inside the step; shapes, which pick a program, are Python numbers.
def ramp(step, steps, values):
    """Piecewise linear through (steps, values), constant outside. A Python step gives a Python number, off the device."""
    clip, pieces = np.clip if isinstance(step, int) else jnp.clip, zip(steps, steps[1:], values, values[1:])
    return values[0] + sum((y1 - y0) * clip((step - x0) / max(x1 - x0, 1e-9), 0.0, 1.0) for x0, x1, y0, y1 in pieces)

def lr_scale(step, stage, cfg):
    """Multiplies every learning rate: up over warmup_steps, the stage's, then blended linearly into final_lr_scale, where it stays."""
    last = (1 - cfg.final_frac) * cfg.steps
    share = ramp(step, [(1 - cfg.cooldown_frac) * last, last], [1.0, 0.0])
    return (stage.lr * share + cfg.final_lr_scale * (1 - share)) * ramp(step, [-1.0, float(cfg.warmup_steps)], [0.0, 1.0])

def muon_momentum(step, cfg):
    low, high, up, down = map(float, cfg.muon_momentum.split(","))
    rise = lambda step: ramp(step, [0.0, max(up, 1.0)], [low, high])  # in a short run not all the way, and no more of it is taken back
    return rise(step) + ramp(step, [cfg.steps - down, float(cfg.steps)], [0.0, low - rise(int(cfg.steps - down))])

def loss_shares(step, stage, cfg):
    """Weights of the second and later next tokens in the loss: the last falls to 0 over stage 0, the one before over the next."""
    shares = [float(share) for share in cfg.mtp.split(",") if share]
    shares = shares[:max(0, len(shares) - stage.index)]
    return [*shares[:-1], shares[-1] * ramp(step, [stage.first, stage.last], [1.0, 0.0])] if shares else []

def stage_at(step, table): return next(stage for stage in table if step < stage.last)
def tokens_before(step, table):  # training tokens of the steps before this one
    return sum((min(s.last, step) - s.first) * s.batch_tokens for s in table if s.first < step)

# ---- Optimizers ------------------------------------------------------------------------------------------------------
# How one group of weights is updated. kind: "muon" or "adam"; wd: cautious decay per lr^2, or plain per lr
Rule = collections.namedtuple("Rule", "kind lr wd beta1 beta2 eps plain", defaults=(0.0, 0.0, 0.0, 0.0, False))
def optimizer_rules(cfg):
    adam = functools.partial(Rule, "adam", eps=cfg.adam_eps)
    if cfg.optimizer == "adamw":
        plain = lambda wd: adam(cfg.adamw_lr, wd, cfg.adam_beta1, cfg.adam_beta2, plain=True)
        return collections.defaultdict(lambda: plain(0.0), dict.fromkeys(("muon", "down", "embed", "head"), plain(cfg.adam_wd)))
    table = functools.partial(adam, wd=cfg.adam_wd, beta1=cfg.adam_beta1, beta2=cfg.adam_beta2)
    small = functools.partial(adam, beta1=0.9, beta2=0.99)  # ratios as the record's; down: twice the rate, half the decay per lr^2
    return {"muon": Rule("muon", cfg.muon_lr, cfg.muon_wd, beta2=cfg.muon_beta2),
            "down": Rule("muon", 2 * cfg.muon_lr, cfg.muon_wd / 2, beta2=cfg.muon_beta2),
            "embed": table(cfg.embed_lr), "head": table(cfg.head_lr), "scalar": small(cfg.scalar_lr),
            "stream": small(cfg.scalar_lr, beta2=0.95), "mix": small(cfg.scalar_lr / 5, beta2=0.95),
            "gate": small(cfg.gate_lr, wd=cfg.adam_wd / 150), "skip": small(cfg.gate_lr / 20), "smear": small(cfg.gate_lr / 100)}

def slot_specs(spec, rule):
    """{name: Spec} of a weight's optimizer state, float32. "square" holds one number for each unit."""
    if rule.kind == "adam":
        return {"m": spec, "v": spec}
    return {"momentum": spec} | ({"square": dataclasses.replace(spec, axes=unit_axis(spec)[1])} if rule.beta2 else {})

def unit_axis(spec):
    """(the axis that a unit of a matrix reaches over, from the end; the axes with 1 there). A unit is an index of the axis that
    SPLIT_AXES names first: a hidden unit, a dim of a head. (The record's units of w_out are its outputs.)"""
    axes, rank = spec.axes.split(), lambda axis: [*SPLIT_AXES, axis].index(axis)
    over = -1 if rank(axes[-2]) <= rank(axes[-1]) else -2  # of two alike the first is split, so that one counts units
    return over, " ".join("1" if i == len(axes) + over else axis for i, axis in enumerate(axes))

POLAR_EXPRESS = (  # arXiv:2505.16932, record 38: five quintic steps, each the best for what the last leaves; gain 0.007
    (8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
def orthogonalize(g_MN, num_steps=5, dtype=jnp.bfloat16):
    """Semi-orthogonal matrix near each g[..., M, N]; leading axes are batched, the scale of g cancels (a norm far above 1e-6).
    Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon): odd polynomials drive the singular values towards 1; after
    five, those above 0.102 % of the Frobenius norm land in [0.858, 1.142], in bfloat16 those above 0.2 % in about [0.81, 1.14]."""
    wide = g_MN.shape[-2] <= g_MN.shape[-1]
    x = g_MN if wide else g_MN.mT
    x = (x / (1.02 * jnp.linalg.norm(x.astype(f32), axis=(-2, -1), keepdims=True) + 1e-6)).astype(dtype)
    for a, b, c in POLAR_EXPRESS[:num_steps]:
        gram = product("...mn,...kn->...mk", x, x).astype(dtype)
        poly = (b * gram + c * product("...mk,...kn->...mn", gram, gram)).astype(dtype)
        x = (a * x + product("...mk,...kn->...mn", poly, x)).astype(dtype)
    return x if wide else x.mT

def orthogonalize_spread(matrices, axes, num_devices, cfg):
    """Orthogonalize stacked matrices [..., M, N], each device its share along `axes`. Those of one shape form a padded batch; an
    all-to-all trades a slice of every matrix for every slice of some, and back: 1/num_devices of the bytes of gathering them."""
    batches, results = {}, [None] * len(matrices)
    for i, (u, axis) in enumerate(zip(matrices, axes)):
        turned = u.mT if axis == -2 else u
        batches.setdefault((turned.shape[-2:], axis is not None and num_devices > 1), []).append((i, turned))
    for (shape, split), members in batches.items():
        batch = jnp.concatenate([u.reshape(-1, *shape) for _, u in members]).astype(cfg.compute_dtype)
        if split:
            batch = jnp.pad(batch, ((0, -len(batch) % num_devices), (0, 0), (0, 0)))
            batch = jax.lax.optimization_barrier(batch)  # XLA on CPUs miscompiles slices of one concatenated here
            batch = jax.lax.all_to_all(batch, "data", split_axis=0, concat_axis=2, tiled=True)
        batch = orthogonalize(batch, cfg.ns_steps, cfg.compute_dtype)
        batch = jax.lax.all_to_all(batch, "data", split_axis=2, concat_axis=0, tiled=True) if split else batch
        for i, u in members:
            count = u.size // math.prod(shape)
            result, batch = batch[:count].reshape(u.shape).astype(f32), batch[count:]
            results[i] = result.mT if axes[i] == -2 else result
    return results

def muon_direction(grad, slots, momentum):
    """Nesterov momentum, still to be orthogonalized (Jordan et al. 2024): an average, then a step ahead along it."""
    average = momentum * slots["momentum"] + (1 - momentum) * grad
    return momentum * average + (1 - momentum) * grad, slots | {"momentum": average}

def adam_direction(grad, slots, step, rule):
    """Adam (arXiv:1412.6980), bias-corrected; step counts from 0."""
    m = rule.beta1 * slots["m"] + (1 - rule.beta1) * grad
    v = rule.beta2 * slots["v"] + (1 - rule.beta2) * grad * grad
    m_hat, v_hat = m / (1 - rule.beta1 ** (step + 1)), v / (1 - rule.beta2 ** (step + 1))
    return m_hat / (jnp.sqrt(v_hat) + rule.eps), {"m": m, "v": v}

def equalize_units(x, square, over, split, beta2):
    """NorMuon (arXiv:2510.05491; gain 0.032, after 8M tokens, two seeds, 0.048): each unit's step by the root of its mean square over
    the steps, the matrix's norm kept. over: the axis a unit reaches over; split: that over the devices, or None. Returns (step, square)."""
    def total(z, axes):
        sums = jnp.sum(z, axes, keepdims=True)
        return jax.lax.psum(sums, "data") if split in axes else sums
    width = x.shape[over] * (jax.lax.axis_size("data") if split == over else 1)
    square = beta2 * square + (1 - beta2) * total(x * x, (over,)) / width
    y = x * jax.lax.rsqrt(jnp.maximum(square, 1e-10))
    return y * jnp.sqrt(total(x * x, (-2, -1)) / jnp.maximum(total(y * y, (-2, -1)), 1e-30)), square

def update(params, grads, opt_state, step, stage, specs, rules, num_devices, cfg):
    """One optimizer step on this device's share of every weight. Returns (params, opt_state)."""
    specs, tree = jax.tree.flatten(specs)
    params, grads, slots = map(tree.flatten_up_to, (params, grads, opt_state))
    rules = [rules[spec.group] for spec in specs]
    directions, slots = map(list, zip(*(
        muon_direction(g, s, muon_momentum(step, cfg)) if rule.kind == "muon" else adam_direction(g, s, step.astype(f32), rule)
        for g, s, rule in zip(grads, slots, rules))))
    muon = [i for i, rule in enumerate(rules) if rule.kind == "muon"]
    axes = [split_axis(specs[i], cfg, num_devices) for i in muon]
    for i, axis, direction in zip(muon, axes, orthogonalize_spread([directions[i] for i in muon], axes, num_devices, cfg)):
        directions[i] = direction
        if "square" in slots[i]:
            over, split = unit_axis(specs[i])[0], axis if num_devices > 1 else None
            directions[i], slots[i]["square"] = equalize_units(direction, slots[i]["square"], over, split, rules[i].beta2)
    scale = lr_scale(step, stage, cfg)
    def move(p, direction, rule, spec):  # decay (gain 0.004), only where the step shrinks the weight (arXiv:2510.12402; records 43, 50; gain -0.004)
        lr, sides = scale * rule.lr, shape_of(spec, cfg)[-2:] if rule.kind == "muon" else (1,)
        stretch = (max(sides) / min(sides)) ** 0.5
        return p - lr * stretch * (direction + rule.wd * p * (1.0 if rule.plain else lr * (direction * p > 0)))
    return tree.unflatten(map(move, params, directions, rules, specs)), tree.unflatten(slots)

class Model(NamedTuple):
    """The seam for another architecture: all that the loop asks of one. The default is this file's. Stacks under the names of
    STACKED arrive as lists of layers. In training `loss` gets more weights: "inputs" and "targets", rows for `lookup` of the tables
    embed and head where their axes are "V D"; "ahead", the loss_shares; with --fsdp=1 "fetch", which gathers a layer of a stack."""
    specs: Callable = param_specs       # (cfg) -> nested dict of Spec
    loss: Callable = loss_fn            # (weights, tokens_BT, target_BT, weight_BT, stage, cfg) -> summed nats
    rules: Callable = optimizer_rules   # (cfg) -> {group: Rule}
    logits: Callable = next_logits      # (weights, tokens_BT, cfg) -> float32 logits_BTV of what follows each token
    update: Callable = update           # (params, grads, opt_state, step, stage, specs, rules, num_devices, cfg) -> (params, state)

# ---- Data ------------------------------------------------------------------------------------------------------------
# A shard is 256 little-endian int32 (magic, version, token count, zeros), then that many uint16 token ids.
SHARD_BEGIN, HEADER_BYTES = [20240520, 1], 1024
NO_TOKEN = 0xFFFF  # stands where a row holds no token: read as BOS, never scored
POOL = 64          # documents the packer chooses from
# tokens: of each file, uint16, memory-mapped. meta: {tokenizer, vocab_size, bos_id}
Shards = collections.namedtuple("Shards", "paths tokens meta sha256", defaults=((),))

def write_shard(path, tokens):  # uint16
    header = np.array([*SHARD_BEGIN, len(tokens)] + [0] * 253, "<i4")
    write_file(path, header.tobytes() + np.asarray(tokens, "<u2").tobytes())

def write_file(path, blob):
    """Atomically; a file that holds these bytes already is left alone."""
    if not path.is_file() or path.read_bytes() != blob:
        staging = path.with_suffix(f".{os.getpid()}")
        staging.write_bytes(blob)
        staging.replace(path)

def regular(path):
    """The path of what is a file: a pipe or a device might be read for ever. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    return path

def read_text(path):
    """The text of a small file. Raises ValueError over a mebibyte, which nothing of ours reaches."""
    if regular(path).stat().st_size > 1 << 20:
        raise ValueError(f"{path} has {path.stat().st_size} bytes")
    return path.read_text()

def file_sha256(path):
    with open(regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def open_shard(path):
    """Memory-mapped tokens of a shard. Raises DataError for anything but a whole, well-formed one."""
    with errors_as(DataError, f"{path}: cannot be read"):
        header, size = np.fromfile(regular(path), "<i4", 256).tolist(), os.path.getsize(path)
    count = header[2] if len(header) == 256 else 0
    if header[:2] != SHARD_BEGIN or count <= 0 or size != HEADER_BYTES + 2 * count:
        raise DataError(f"{path}: {size} bytes, begins with {header[:2]}, {count} tokens; wanted {HEADER_BYTES} + 2 per token, "
                        f"beginning with {SHARD_BEGIN}. Fetch it again: python cached_fineweb10B.py; or make it again")
    return np.asarray(np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES))  # a slice of a memmap costs 1 us, of its array 0.1
def find_shards(pattern): return [Path(p) for p in sorted(glob.glob(pattern) or pattern and glob.glob(str(ROOT / pattern)))]

def open_shards(pattern):
    """The shards of a glob, by name. Raises DataError where there are none, or one is not whole."""
    if not (paths := find_shards(pattern)):
        raise DataError(f"no shards match {pattern}. Fetch FineWeb: python cached_fineweb10B.py {SPEEDRUN_SHARDS}; make shards of your "
                        "own text: python -m scripts.prepare --help; or train on this machine's: --preset=demo without --train_files and --val_files")
    tokens, file = [open_shard(path) for path in paths], paths[0].parent / "meta.json"
    with ThreadPoolExecutor() as pool, errors_as(DataError, f"{pattern}: cannot be read"):
        hashes = tuple(pool.map(file_sha256, paths))
    with errors_as(DataError, f"{file}: wanted tokenizer, vocab_size and bos_id"):
        meta = json.loads(read_text(file)) if file.exists() else {"tokenizer": "gpt2", "vocab_size": 50257, "bos_id": 50256}
        return Shards(paths, tokens, {k: kind(meta[k]) for k, kind in zip(("tokenizer", "vocab_size", "bos_id"), (str, int, int))}, hashes)

def plan_stream(shards, cfg):
    """Yield (rows, tokens read) of steps 0, 1, ... from the plain stream: each token once per epoch, in order or, with
    cfg.shuffle, by blocks of the longest row in random order; what a shard ends with that fills none is left out. A row is a list
    of uint16 views, T + 1 tokens in all."""
    block = max(stage.seq_len for stage in stages(cfg))
    blocks = [tokens[start:start + block + 1] for tokens in shards.tokens for start in range(0, len(tokens) - block, block)]
    order, position = np.arange(len(blocks)), 0
    for stage in stages(cfg):
        position += -position % stage.seq_len  # rows never cross a block
        for _ in range(stage.first, stage.last):
            rows = []
            for _ in range(stage.batch_tokens // stage.seq_len):
                epoch, within = divmod(position, block * len(blocks) or 1)
                if epoch >= cfg.max_epochs or not blocks:
                    return
                if within == 0 and cfg.shuffle:
                    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(blocks))
                rows.append([blocks[order[within // block]][within % block:][:stage.seq_len + 1]])
                position += stage.seq_len
            yield rows, position

def plan_packed(shards, cfg):
    """Yield (rows, tokens read) of steps 0, 1, ...: of the beginnings (max_doc_len) of the POOL next documents, a row takes
    the longest that fits while one does, then the shortest, cut. What is cut off is not trained on, as in FineWeb's records."""
    documents = (tokens[first:last] for _ in range(cfg.max_epochs) for tokens in shards.tokens
                 for first, last in itertools.pairwise([*np.flatnonzero(tokens == cfg.bos_id).tolist(), len(tokens)]))
    queue, pool, read = enumerate(documents), [], 0
    for stage in stages(cfg):
        pool = sorted((min(len(document), stage.max_doc_len), order, document) for _, order, document in pool)
        for _ in range(stage.first, stage.last):
            rows = [[] for _ in range(stage.batch_tokens // stage.seq_len)]
            for row in rows:
                room = stage.seq_len + 1
                while room:
                    for order, document in itertools.islice(queue, POOL - len(pool)):
                        bisect.insort(pool, (min(len(document), stage.max_doc_len), order, document))
                        read += len(document)
                    if not pool:
                        return
                    length, _, document = pool.pop(max(0, bisect.bisect_right(pool, (room, math.inf)) - 1))
                    row.append(document[:min(length, room)])
                    room -= len(row[-1])
            yield rows, read
def plan(shards, cfg): return (plan_packed if stages(cfg)[0].max_doc_len else plan_stream)(shards, cfg)

def plan_val(shards, cfg):
    """Rows of the whole validation: row i scores the i-th val_seq_len - val_context targets, after their context; before the first token stand BOS."""
    tokens, nothing = shards.tokens[0][:cfg.val_tokens + 1], np.full(cfg.val_context, NO_TOKEN, np.uint16)
    starts = range(-cfg.val_context, cfg.val_tokens - cfg.val_context, cfg.val_seq_len - cfg.val_context)
    return [[nothing[:max(-start, 0)], tokens[max(start, 0):start + cfg.val_seq_len + 1]] for start in starts]

def batch_shape(stage, num_devices, cfg):
    """(A, B, T + 1): micro-steps, their rows on all devices, tokens. Spare places stay empty: any number of devices will do."""
    per_device = -(-stage.batch_tokens // stage.seq_len // num_devices)
    limit = cfg.micro_tokens or (1 << 16 if stage.index < 0 else stage.batch_tokens)
    num_micro = -(-per_device // max(1, limit // stage.seq_len))
    return num_micro, -(-per_device // num_micro) * num_devices, stage.seq_len + 1

def to_devices(rows, stage, mesh, cfg):
    """Rows -> uint16 [A, B, T+1], split over B; only the rows that this process's devices hold are read."""
    num_micro, num_rows, width = shape = batch_shape(stage, mesh.size, cfg)
    def local(index):
        chosen = np.arange(num_micro)[:, None] * num_rows + np.arange(num_rows)[index[1]]
        out = np.full((*chosen.shape, width), NO_TOKEN, np.uint16)
        for place, i in zip(out.reshape(-1, width), chosen.ravel()):
            if i < len(rows):
                np.concatenate(rows[i], out=place[:sum(map(len, rows[i]))])
        return out
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(None, "data")), local)

def train_batches(shards, first_step, mesh, cfg, depth=2):
    """Batches from first_step on, on the devices, made `depth` ahead by one thread; each depends on config and shards only."""
    planned, table = itertools.islice(plan(shards, cfg), first_step, None), stages(cfg)
    make = lambda step: to_devices(next(planned)[0], stage_at(step, table), mesh, cfg)
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(make, step) for step in range(first_step, cfg.steps))  # each once it is asked for
        ahead = collections.deque(itertools.islice(futures, depth))
        while ahead:
            ahead.extend(itertools.islice(futures, 1))
            yield ahead.popleft().result()

# ---- Demo corpus and sampler -----------------------------------------------------------------------------------------
def cache_dir():
    """This user's own cache folder: what lies there is trusted, compiled programs among it."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speedrun-jax"
    with errors_as(UsageError, f"{path}: no cache folder can be made there; set XDG_CACHE_HOME to one that can be written"):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path

NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3",
              "distutils", "turtledemo", "ensurepip", "__pycache__"}
def embedded_corpus():
    """The interpreter's own standard library as byte shards (BOS 256), in the cache. Returns globs (train, val); val are
    the files whose relative path's SHA-256 begins with a byte below 13, about 5 %. DataError under 300 files."""
    root, parts = Path(sysconfig.get_paths()["stdlib"]), {"train": [], "val": []}
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file()):
        *folders, base = name.split("/")
        if not (NOT_CORPUS.intersection(folders) or base.startswith("_sysconfigdata") or (root / name).stat().st_size > 200_000):
            split = "val" if hashlib.sha256(name.encode()).digest()[0] < 13 else "train"
            parts[split] += [np.array([256], np.uint16), np.frombuffer((root / name).read_bytes(), np.uint8)]
    if (count := sum(map(len, parts.values())) // 2) < 300:
        raise DataError(f"{root}: {count} Python files, the demo's corpus wants 300. Use a Python with its whole standard "
                        "library, or pass --train_files and --val_files")
    folder = cache_dir() / f"stdlib-{platform.python_version()}"
    with errors_as(UsageError, f"{folder}: cannot be written; set XDG_CACHE_HOME to a folder that can"):
        folder.mkdir(exist_ok=True)
        write_file(folder / "meta.json", json.dumps({"tokenizer": "bytes", "vocab_size": 257, "bos_id": 256}).encode())
        for split, arrays in parts.items():
            write_shard(folder / f"{split}_000000.bin", np.concatenate(arrays))
    return str(folder / "train_*.bin"), str(folder / "val_*.bin")

def sample(weights, prompt, num_tokens, model, cfg, temperature=0.7):
    """The prompt's (ids) next num_tokens ids, on one device, each from a whole forward pass: a picture of the training."""
    ids = jnp.array([*prompt, *[0] * num_tokens], jnp.int32)
    @jax.jit
    def step(weights, ids, i):
        logits_V = model.logits(weights, ids[None], cfg)[0, i - 1]
        return ids.at[i].set(jax.random.categorical(jax.random.fold_in(jax.random.key(cfg.seed), i), logits_V / temperature))
    for i in range(len(prompt), len(ids)):
        ids = step(weights, ids, i)
    return ids.tolist()[len(prompt):]

# ---- Steps -----------------------------------------------------------------------------------------------------------
# What a step takes and returns, and what a checkpoint holds. opt_state is as params, each leaf a dict of slot_specs.
State = NamedTuple("State", [("step", jax.Array), ("params", dict), ("opt_state", dict)])

def state_shardings(model, mesh, cfg):
    specs, rules = model.specs(cfg), model.rules(cfg)
    def place(spec):
        axis = split_axis(spec, cfg, mesh.size)
        return NamedSharding(mesh, P() if axis is None else P(*[None] * (len(spec.axes.split()) + axis), "data"))
    slots = lambda spec: jax.tree.map(place, slot_specs(spec, rules[spec.group]))
    return State(NamedSharding(mesh, P()), jax.tree.map(place, specs), jax.tree.map(slots, specs))

def partition(shardings): return jax.tree.map(lambda sharding: sharding.spec, shardings)
def on_devices(function, mesh, inputs, outputs):
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

def gather(params, specs, num_devices, cfg, fetched=True):
    """Compute copies in compute_dtype, scalars in float32; whole on every device, layers only if fetched."""
    def whole(path, spec, w):
        axis, w = split_axis(spec, cfg, num_devices), w if spec.group in SCALARS else w.astype(cfg.compute_dtype)
        if axis is None or num_devices == 1 or not fetched and name_of(path[:1]) in STACKED:
            return w
        return jax.lax.all_gather(w, "data", axis=w.ndim + axis, tiled=True)
    return jax.tree.map_with_path(whole, specs, params)

def reduce_grads(grads, specs, num_devices, cfg):
    """Sum over the devices in compute_dtype, each element once: what is kept split arrives split."""
    def total(path, spec, g):
        axis, g = split_axis(spec, cfg, num_devices), g if spec.group in SCALARS else g.astype(cfg.compute_dtype)
        if axis is None:
            return jax.lax.psum(g, "data").astype(f32)
        if cfg.fsdp and name_of(path[:1]) in STACKED:
            return g.astype(f32)  # reduced where it was gathered
        share = jax.lax.psum_scatter(jnp.moveaxis(g, axis, 0), "data", scatter_dimension=0, tiled=True)  # v6e: 0.17 ms less than in place
        return jnp.moveaxis(share, 0, axis).astype(f32)
    return jax.tree.map_with_path(total, specs, grads) if num_devices > 1 else grads

def inputs_and_targets(tokens_BT1, cfg):
    """uint16 rows of T + 1 -> inputs, targets, weights [B, T]: the target is the next token, NO_TOKEN weighs nothing."""
    there_BT1 = tokens_BT1 != NO_TOKEN
    tokens_BT1 = jnp.where(there_BT1, tokens_BT1.astype(jnp.int32), cfg.bos_id)
    return tokens_BT1[:, :-1], tokens_BT1[:, 1:], there_BT1[:, 1:].astype(f32)

def sum_rows(ids_N, g_ND, num_rows):
    """[V, D]: for each id the sum of its rows, float32: the gradient of a lookup. Rows are sorted by id, and what an id adds
    to the running sum is its total: matmuls and gathers alone, whose cost on a TPU is known; that of a scatter of rows is not."""
    size = min(256, len(ids_N))
    order = jnp.argsort(ids_N)
    rows_CND = rearrange(g_ND[jnp.pad(order, (0, -len(ids_N) % size + size))], "(C N) D -> C N D", N=size)
    block_CD = jnp.sum(rows_CND.astype(f32), axis=1)
    before_CD = jnp.cumsum(block_CD, axis=0) - block_CD
    inside_CND = product("MN,CND->CMD", jnp.tril(jnp.ones((size, size), g_ND.dtype), -1), rows_CND)  # of the block so far
    ends_V = jnp.searchsorted(ids_N[order], jnp.arange(num_rows), side="right", method="sort")
    added = lambda at_VD: at_VD - jnp.pad(at_VD, ((1, 0), (0, 0)))[:-1]
    return added(rearrange(inside_CND, "C N D -> (C N) D")[ends_V]) + added(before_CD[ends_V // size])  # in parts, so less cancels

def make_train_step(stage, model, mesh, cfg):
    """(state, tokens uint16 [A, B, T+1]) -> (state, mean loss in nats per token). The state is donated."""
    specs, rules, n = model.specs(cfg), model.rules(cfg), mesh.size
    tables = {use: name for use, name in (("inputs", "embed"), ("targets", "head")) if name in specs and specs[name].axes == "V D"}
    tied = stage.index < cfg.tied_stages and len(tables) == 2  # records 51, 53; gain 0.013
    as_one = lambda weights: weights | ({"embed": weights["head"]} if tied else {})
    def step_on_device(state, tokens_ABT1):
        weights = as_one(unstack(gather(state.params, specs, n, cfg, fetched=not cfg.fsdp)))
        extra = {"ahead": loss_shares(state.step, stage, cfg)} | ({"fetch": lambda layer, name: gather(layer, specs[name], n, cfg)} if cfg.fsdp else {})
        def micro_step(totals, tokens_BT1):
            here, tokens_BT1 = jax.lax.optimization_barrier((weights, tokens_BT1)) if cfg.fsdp else (weights, tokens_BT1)
            tokens_BT, target_BT, weight_BT = inputs_and_targets(tokens_BT1, cfg)
            rows = {use: jnp.zeros((*tokens_BT.shape, cfg.model_dim), cfg.compute_dtype) for use in tables}  # `lookup` adds them
            loss, (grads, row_grads) = jax.value_and_grad(lambda weights, rows: model.loss(
                as_one(weights) | rows | extra, tokens_BT, target_BT, weight_BT, stage, cfg), argnums=(0, 1))(here, rows)
            grads = jax.lax.optimization_barrier(grads) if cfg.fsdp else grads  # else XLA moves gathers out, or fails to
            totals = jax.tree.map(lambda total, x: total + x.astype(f32), totals, (loss, weight_BT.sum(), grads))
            return totals, ({"inputs": tokens_BT, "targets": target_BT}, row_grads)
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, f32), weights)
        (loss, count, grads), (ids, row_grads) = jax.lax.scan(micro_step, (f32(0), f32(0), zeros), tokens_ABT1)
        for use, name in tables.items():
            row_grads_ND = rearrange(row_grads[use], "A B T D -> (A B T) D")
            grads["head" if tied else name] += sum_rows(ids[use].ravel(), row_grads_ND, cfg.padded_vocab)
        loss, count = jax.lax.psum((loss, count), "data")
        grads = jax.tree.map(lambda g: g / count, reduce_grads(restack(grads), specs, n, cfg))
        params, opt_state = model.update(state.params, grads, state.opt_state, state.step, stage, specs, rules, n, cfg)
        if tied:
            params, opt_state = (tree | {"embed": tree["head"]} for tree in (params, opt_state))
        return State(state.step + 1, params, opt_state), loss / count
    parts = partition(state_shardings(model, mesh, cfg))
    return jax.jit(on_devices(step_on_device, mesh, (parts, P(None, "data")), (parts, P())), donate_argnums=0)

def make_eval_step(model, mesh, cfg):
    """(params, tokens uint16 [A, B, T+1]) -> (summed nats, targets scored). A row's first val_context score nothing."""
    def eval_on_device(params, tokens_ABT1):
        weights = unstack(gather(params, model.specs(cfg), mesh.size, cfg))
        def micro_step(totals, tokens_BT1):
            tokens_BT, target_BT, weight_BT = inputs_and_targets(tokens_BT1, cfg)
            weight_BT *= jnp.arange(cfg.val_seq_len)[None] >= cfg.val_context
            loss = model.loss(weights, tokens_BT, target_BT, weight_BT, val_stage(cfg), cfg)
            return (totals[0] + loss, totals[1] + weight_BT.sum().astype(jnp.int32)), None
        return jax.lax.psum(jax.lax.scan(micro_step, (f32(0), jnp.int32(0)), tokens_ABT1)[0], "data")
    return jax.jit(on_devices(eval_on_device, mesh, (partition(state_shardings(model, mesh, cfg).params), P(None, "data")), P()))

def make_init(model, mesh, cfg):
    """() -> State at step 0, born split over the devices."""
    def init():
        specs, rules = model.specs(cfg), model.rules(cfg)
        params = init_params(jax.random.key(cfg.seed), specs, cfg)
        slots = lambda spec: jax.tree.map(lambda slot: jnp.zeros(shape_of(slot, cfg)), slot_specs(spec, rules[spec.group]))
        return State(jnp.int32(0), params, jax.tree.map(slots, specs))
    return jax.jit(init, out_shardings=state_shardings(model, mesh, cfg))

def list_programs(model, mesh, cfg):
    """{"init", each stage's index, "eval": (name, jitted function, argument shapes)}."""
    init, rows = make_init(model, mesh, cfg), NamedSharding(mesh, P(None, "data"))
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(init), state_shardings(model, mesh, cfg))
    batch = lambda stage: jax.ShapeDtypeStruct(batch_shape(stage, mesh.size, cfg), jnp.uint16, sharding=rows)
    return {
        "init": ("init", init, ()),
        **{stage.index: (f"train_{stage.index}", make_train_step(stage, model, mesh, cfg), (state, batch(stage))) for stage in stages(cfg)},
        "eval": ("eval", make_eval_step(model, mesh, cfg), (state.params, batch(val_stage(cfg))))}

def memory_of(program):
    """Bytes per device while a compiled program runs: arguments, results and temporaries."""
    use = program.memory_analysis()
    return use.temp_size_in_bytes + use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes

# By platform, in the log. Gradients and weights travel by the SparseCores (predicted: 1.4 ms of 67 less)
COMPILER_OPTIONS = {"tpu": {"xla_enable_async_all_reduce": "true", "xla_enable_async_all_gather": "true"} | {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true" for kind in ("all_gather", "all_reduce", "reduce_scatter")}}
def compiler_options(mesh, cfg):
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {}) | ({"xla_gpu_deterministic_ops": True} if cfg.deterministic else {})

def compile_all(model, mesh, cfg):
    """({"init", each stage's index, "eval": compiled program}, a line about each), compiled in parallel."""
    listed = list_programs(model, mesh, cfg)
    def build(name, function, arguments):
        start = time.perf_counter()
        program = function.lower(*arguments).compile(compiler_options=compiler_options(mesh, cfg))
        return program, f"compiled: {name} in {time.perf_counter() - start:.1f}s, {memory_of(program) / 2**30:.2f} GiB per device"
    with ThreadPoolExecutor() as pool:
        programs, notes = zip(*pool.map(build, *zip(*listed.values())))
    return dict(zip(listed, programs)), [*notes]

def flops_per_token(stage, specs, cfg):
    """Model FLOPs of training on one token, for the MFU: 6 per element of a matrix that is multiplied, 12 per dimension
    of each query head and key that causality and window leave visible; document borders are not counted."""
    matrices = sum(math.prod(shape_of(s, cfg)) for s in jax.tree.leaves(specs) if s.group not in ("embed", *SCALARS))
    windows = [window or stage.seq_len for i, window in enumerate(stage.windows) if i not in layer_list(cfg.mlp_only)]
    keys = sum(w - w * (w - 1) / 2 / stage.seq_len for w in (min(window + 1, stage.seq_len) for window in windows))
    return 6 * matrices + 12 * cfg.num_heads * cfg.head_dim * keys
PEAK_FLOPS = {  # dense bf16 per device, as the vendors state it; for kinds not here, MFU is shown as "-"
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6": 918e12,
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12}

# ---- Checkpoint ------------------------------------------------------------------------------------------------------
# ckpt/step-NNNNNN holds params.safetensors, opt.safetensors and a manifest.json that names their SHA-256, and last its own.
def versions():
    names = re.findall(r"model name\s*: (.*\S)", Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else "")
    own = COMPILER_OPTIONS | {"cpu": {"processor": (names or [platform.machine()])[0]}}  # a CPU sums bf16 in its own order
    return {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__, "platform": platform.platform(),
            "backend": " ".join(jax.devices()[0].client.platform_version.split())} | own.get(jax.default_backend(), {}) | {
                key: value for key, value in os.environ.items() if key.startswith(("JAX_", "XLA_", "LIBTPU_"))}

def facts_of(source, train, val):
    """What decides a run's bits beside its config: a checkpoint keeps it, and the hosts of a run compare it."""
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()
    return {"data": digest(" ".join(train.sha256 + val.sha256)), "train.py": digest(source),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"} | versions()

def named(tree): return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
def manifest_text(manifest):
    body = json.dumps(manifest, indent=1)
    return json.dumps(manifest | {"manifest_sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)

def flush(path):  # what a file or folder holds is on the disk before the next thing is done
    handle = os.open(path, os.O_RDONLY)
    try: os.fsync(handle)
    finally: os.close(handle)

def save_checkpoint(state, run_folder, cfg, progress, facts):
    """Write under a temporary name, then rename: a checkpoint is there whole, or not at all. The last two are kept.
    Raises OSError where the disk refuses; what was there before stands. Raises NonFiniteLoss for weights that are not finite."""
    files = {"params.safetensors": named(state.params), "opt.safetensors": named(state.opt_state)}
    arrays = multihost_utils.process_allgather(files, tiled=True)  # whole, on every host; of several by way of the devices, one by one
    if bad := [name for name, x in arrays["params.safetensors"].items() if not np.isfinite(x).all()]:
        raise NonFiniteLoss(f"after step {int(state.step)} the weights {bad[0]} are not finite, so they are not saved; "
                            f"the checkpoints in {run_folder} stand. Usual cause: a learning rate")
    final = run_folder / "ckpt" / f"step-{int(state.step):06d}"
    if jax.process_index() != 0:
        return final
    staging = final.with_name(f".writing-{final.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        for file, tensors in arrays.items():
            safetensors.numpy.save_file(tensors, staging / file)
        manifest = {"step": int(state.step), "sha256": {file: file_sha256(staging / file) for file in arrays},
                    "progress": progress, "config": dataclasses.asdict(cfg), "versions": facts}
        (staging / "manifest.json").write_text(manifest_text(manifest))
        for path in (*staging.iterdir(), staging):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        flush(final.parent)
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, most often
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"{final}: {error}") from error
    for old in [path for path in sorted(final.parent.glob("step-*")) if path.name <= final.name][:-2]:
        with contextlib.suppress(OSError):
            shutil.rmtree(old.rename(old.with_name(f".writing-{old.name}")), ignore_errors=True)  # half of one never bears its name
    return final

def open_manifest(folder):
    """A checkpoint's manifest, if it is as it was written. Raises CheckpointError."""
    with errors_as(CheckpointError, f"{folder}: not a whole checkpoint; delete it"):
        manifest = json.loads(text := read_text(folder / "manifest.json"))
        manifest.pop("manifest_sha256", None)
        if manifest_text(manifest) != text:
            raise CheckpointError(f"{folder / 'manifest.json'}: damaged, its SHA-256 is not the one it ends with; delete {folder}")
        return manifest | {"config": {**manifest["config"]}}

def differing(folder, cfg):
    """[(field, value there, value here)] of the fields that make a checkpoint another run's, by its manifest or, where that is
    damaged, the run's config.json."""
    try:
        saved = open_manifest(folder)["config"]
    except CheckpointError:
        with errors_as(CheckpointError, f"{folder}: not a whole checkpoint, neither manifest nor config.json can be read; delete it"):
            saved = {**json.loads(read_text(folder.parent.parent / "config.json"))["config"]}
    mine = dataclasses.asdict(cfg)
    return [(k, saved.get(k), mine.get(k)) for k in sorted(mine | saved) if k not in MAY_DIFFER and mine.get(k) != saved.get(k)]

def read_manifest(folder, cfg, data=None):
    """The manifest of a checkpoint of this config, and of these data, whose files have the hashes it names. Raises CheckpointError."""
    for name, there, here in differing(folder, cfg):
        raise OtherConfig(f"{folder}: saved with --{name}={there}, but this run has {here}; use the same, or start anew without --resume")
    manifest = open_manifest(folder)
    with errors_as(CheckpointError, f"{folder}: not a whole checkpoint; delete it"):
        step, progress, facts = int(manifest["step"]), manifest["progress"], dict(manifest["versions"])
        known = lambda part, *keys: {key: part[key] for key in keys} | {str(key): x if type(x) is int else float(x) for key, x in part.items()}
        row = known(progress["row"], "step", "tokens", "train_time_s", "cpu_time_s", "val_loss") if step == cfg.steps else None
        seconds, reached = [float(x) for x in progress["seconds"]], progress["reached"] and known(progress["reached"], "step", "train_time_s")
        if f"step-{step:06d}" != folder.name or not 0 < step <= cfg.steps or len(seconds) != 2:
            raise CheckpointError(f"{folder}: its manifest is of step {step}; delete it")
        if data and facts["data"] != data:
            raise CheckpointError(f"{folder}: trained on other data than this run's shards; use the same, or start anew without --resume")
        for file in ("params.safetensors", "opt.safetensors"):
            if file_sha256(folder / file) != manifest["sha256"][file]:
                raise CheckpointError(f"{folder / file}: damaged, its SHA-256 is not the manifest's; delete {folder}")
        return {"step": step, "progress": {"seconds": seconds, "reached": reached, "row": row}, "versions": facts}

def check_tensors(file, tree):
    """Raises CheckpointError where names, shapes or dtypes of a .safetensors file are not the tree's, by its header alone."""
    want = {name: (leaf.shape, "F32") for name, leaf in named(tree).items()}
    with open(file, "rb") as opened:
        if (size := int.from_bytes(opened.read(8), "little")) > 1 << 20:
            raise CheckpointError(f"{file}: a header of {size} bytes, this config's has a few thousand")
    with errors_as(CheckpointError, f"{file}: cannot be read"), safetensors.safe_open(file, framework="numpy") as tensors:
        have = {name: (tuple((header := tensors.get_slice(name)).get_shape()), header.get_dtype()) for name in tensors.keys()}
    for name in sorted(have | want):
        if have.get(name) != want.get(name):
            raise CheckpointError(f"{file}: {name} is {have.get(name, 'nothing')}, this config wants {want.get(name, 'nothing')}")

def load_tensors(file, tree):
    """The tree of a verified .safetensors file, leaves placed as `tree`'s. Raises CheckpointError."""
    check_tensors(file, tree)
    with errors_as(CheckpointError, f"{file}: cannot be read"), safetensors.safe_open(file, framework="numpy") as tensors:
        put = lambda path, leaf: jax.make_array_from_callback(leaf.shape, leaf.sharding, tensors.get_tensor(name_of(path)).__getitem__)
        return jax.tree.map_with_path(put, tree)

def load_checkpoint(folder, step, state):
    """The State that a verified folder holds, placed as `state` is (arrays or their shapes). Raises CheckpointError."""
    return State(jax.device_put(np.int32(step), state.step.sharding), load_tensors(folder / "params.safetensors", state.params),
                 load_tensors(folder / "opt.safetensors", state.opt_state))

FRESH = {"step": 0, "progress": {"seconds": [0.0, 0.0], "reached": None, "row": None}, "versions": {}}  # where no manifest is

def find_checkpoint(cfg, data=None):
    """(checkpoint folder, its manifest) to resume from, or (None, ...) to start at step 0. Raises CheckpointError. What a process
    left half written in runs of this config is deleted: none may be running."""
    if not cfg.resume:
        return None, FRESH
    auto, problem, path = cfg.resume == "auto", None, Path(cfg.resume).resolve()
    runs = sorted(Path(cfg.log_dir).glob("*"), reverse=True) if auto else [path]
    folders = [folder for run in runs for folder in sorted(run.glob("ckpt/step-*"), reverse=True)]  # newest first
    folders = [path] if path.parent.name == "ckpt" and (path / "manifest.json").exists() else folders
    for stale in (folder for run in runs for folder in run.glob("ckpt/.writing-*")):
        with contextlib.suppress(CheckpointError):
            if not differing(stale, cfg):
                shutil.rmtree(stale, ignore_errors=True)
    for folder in folders:
        try:
            return folder, read_manifest(folder, cfg, data)
        except CheckpointError as error:
            if not (auto and isinstance(error, OtherConfig)):
                say(plain(f"--resume={cfg.resume}: passing over {error}"))
                problem = error
    if problem or not auto:
        raise problem or CheckpointError(f"--resume={cfg.resume}: no checkpoint there; wanted a run folder, or its ckpt/step-NNNNNN")
    say(f"--resume=auto: no checkpoint of a run with this config in {cfg.log_dir}/, so this one starts at step 0")
    return None, FRESH

# ---- Log -------------------------------------------------------------------------------------------------------------
class Run:
    """A run's folder, its clock, and what it writes: log.txt, metrics.jsonl, the console. Only process 0 writes.
    The clock counts training: it stands still for compilation, warm-up, evaluation, checkpoints and sampling."""
    def __init__(self, folder, specs, cfg, manifest, facts):
        self.folder, self.cfg, self.table, self.writes = folder, cfg, stages(cfg), jax.process_index() == 0
        self.peak = next((p for kind, p in PEAK_FLOPS.items() if kind in jax.devices()[0].device_kind), 0) * jax.device_count()
        self.flops = [flops_per_token(stage, specs, cfg) for stage in self.table]
        progress = manifest["progress"]
        self.total, self.reached, self.row = np.array(progress["seconds"]), progress["reached"], progress["row"]
        self.since, self.created, self.passing, self.facts = None, time.perf_counter(), False, facts
        self.marked, self.steps, self.waited = self.total[0], 0, 0.0  # since the last written step
        self.rows, self.unwritten = [], {}  # metrics; what the disk refused: {file: text}
        if self.writes:
            with errors_as(UsageError, f"--log_dir={cfg.log_dir}: no folder can be made there"):
                folder.mkdir(parents=True, exist_ok=True)
            if (folder / "metrics.jsonl").exists():  # what was measured after the checkpoint is measured again
                for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                        row = dict(json.loads(line))
                        numbers = {type(x) for x in row.values()} <= {int, float} and {"stage", "train_loss", "train_time_s"} <= row.keys()
                        self.rows += [row] if numbers and row["step"] <= manifest["step"] else []
                self.put("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows), "w")
    def start(self): self.since = np.array([time.perf_counter(), time.process_time()])
    def stop(self): self.total, self.since = self.seconds(), None
    def seconds(self):  # of training so far: [wall, cpu]
        return self.total + (0 if self.since is None else np.array([time.perf_counter(), time.process_time()]) - self.since)
    def put(self, name, text, mode="a"):
        """Write to a file of the run's folder, a whole one atomically. Where the disk refuses, training goes on, and the next text tries again."""
        if not self.writes:
            return
        before, mode = self.unwritten.pop(name, ("", mode))
        path, text = self.folder / (name if mode == "a" else f".writing-{name}"), before + text
        try:
            with open(path, mode, encoding="utf-8") as file:
                size = file.tell()
                file.write(text)
            path.replace(self.folder / name)  # "a": onto itself; what failed before keeps its mode
        except OSError as error:
            self.warn(name, f"{self.folder / name} could not be written ({error})", text, mode)
            with contextlib.suppress(OSError, NameError):
                os.truncate(path, size)  # no half a line
    def warn(self, name, problem, *unwritten):
        self.unwritten[name] = unwritten
        say(plain(f"warning: {problem}; training goes on"), file=sys.stderr)
    def line(self, text, passing=False):
        """To log.txt and the console; on a terminal the next line takes the place of a passing one."""
        if self.writes:
            self.put("log.txt", text + "\n")
            passing = passing and sys.stdout and not getattr(sys.stdout, "closed", False) and sys.stdout.isatty()
            text = text[:shutil.get_terminal_size().columns - 1] if passing else text
            say(("\r\x1b[K" if self.passing else "") + text, end="" if passing else "\n")
            self.passing = passing
    def settle(self, step, loss):
        """The metrics of a dispatched step, whose loss is waited for. Raises NonFiniteLoss."""
        stage, loss = stage_at(step, self.table), float(loss)
        first, last = tokens_before(step, self.table), tokens_before(step + 1, self.table)
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the training loss of step {step + 1} is {loss}, on training tokens {first} to {last}. Usual causes: a learning "
                                f"rate (--muon_lr, --embed_lr, --head_lr), a narrow --compute_dtype, damaged data. The checkpoints in {self.folder} stand")
        wall, cpu = self.seconds().tolist()
        self.steps += 1
        step_s, tokens = (wall - self.marked) / self.steps, last - tokens_before(step + 1 - self.steps, self.table)
        row = {"step": step + 1, "tokens": last, "train_time_s": wall, "cpu_time_s": cpu,
               "wall_s": time.perf_counter() - self.created, "train_loss": loss, "stage": stage.index, "step_ms": 1e3 * step_s,
               "lr": lr_scale(step, stage, self.cfg), "tokens_per_s": tokens / self.steps / step_s, "input_wait_ms": 1e3 * self.waited / self.steps}
        return row | ({"mfu": row["tokens_per_s"] * self.flops[stage.index] / self.peak} if self.peak else {})
    def write(self, row):
        """A step's line and metrics row; times are means since the last one."""
        left = tokens_before(self.cfg.steps, self.table) - row["tokens"]
        val = f" val_loss:{row['val_loss']:.4f}" if "val_loss" in row else ""
        mfu, speed = f"{row['mfu']:.1%}" if self.peak else "-", row["tokens_per_s"]
        self.line(f"step:{row['step']}/{self.cfg.steps} train_loss:{row['train_loss']:.4f}{val} train_time:{row['train_time_s']:.3f}s "
                  f"step:{row['step_ms']:.1f}ms tok/s:{f'{speed / 1e6:.2f}M' if speed >= 1e6 else f'{speed / 1e3:.1f}k'} "
                  f"mfu:{mfu} wait:{row['input_wait_ms']:.1f}ms eta:{left / speed:.0f}s", not val)
        self.metrics(row)
        self.marked, self.steps, self.waited = row["train_time_s"], 0, 0.0
    def metrics(self, row):
        self.rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        self.put("metrics.jsonl", json.dumps(self.rows[-1]) + "\n")
    def save(self, state, row):
        """A checkpoint off the clock. Returns whether host 0 wrote it (on others True); where not, training goes on and tries again at the next."""
        start, progress = time.perf_counter(), {"seconds": self.seconds().tolist(), "reached": self.reached, "row": row}
        try:
            folder = save_checkpoint(state, self.folder, self.cfg, progress, self.facts)
        except OSError as error:
            return self.warn("the last checkpoint", f"no checkpoint of step {row['step']} ({error}); the one before stands")
        self.unwritten.pop("the last checkpoint", None)
        self.line(f"saved: {folder.name} in {time.perf_counter() - start:.1f}s")
        return True
    def seal(self):
        """The log's last line: SHA-256 of all bytes above it. Raises CheckpointError if anything could not be written."""
        if self.writes and not self.unwritten:
            self.put("log.txt", f"sha256:{file_sha256(self.folder / 'log.txt')}\n")
        if self.unwritten:
            raise CheckpointError(f"{', '.join(self.unwritten)} of {self.folder} could not be written. Make room, then run the same "
                                  f"with --resume={self.folder}")

def loss_svg(rows, cfg):
    train = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    val, seconds = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row], rows[-1]["train_time_s"]
    low, high = min(loss for _, loss in train + val) - 0.05, max(loss for _, loss in train[len(train) // 20:] + val) + 0.05
    x = lambda step: f"{60 + 700 * step / cfg.steps:.1f}"
    y = lambda loss, up=0: f"{30 + 330 * (high - min(loss, high)) / (high - low) - up:.1f}"
    text = lambda px, py, words, anchor="middle": f'<text x="{px}" y="{py}" text-anchor="{anchor}">{words}</text>'
    ticks = [(low + (high - low) * i / 5, cfg.steps * i // 5) for i in range(6)]
    return "\n".join(['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 420" font-family="system-ui,sans-serif" font-size="12">',
        "<style>text{fill:#333}path{fill:none;stroke:#8886}.train{stroke:#6c93c7}.goal{stroke:#2a8a4a;stroke-dasharray:5 4}",
        "circle{fill:#c0392b}@media(prefers-color-scheme:dark){svg{background:#16181d}text{fill:#ddd}}</style>",
        *(f'<path d="M60 {y(loss)}H760"/>' + text(54, y(loss, -4), f"{loss:.2f}", "end") for loss, _ in ticks),
        *(text(x(step), 378, step) for _, step in ticks), *(f'<path d="M{x(stage.first)} 30V360"/>' for stage in stages(cfg)[1:]),
        f'<path class="goal" d="M60 {y(cfg.target_loss)}H760"/>' if cfg.target_loss > low else "",
        f'<path class="train" d="M{"L".join(f"{x(step)} {y(loss)}" for step, loss in train)}"/>',
        *(f'<circle cx="{x(step)}" cy="{y(loss)}" r="3.5"/>' + text(x(step), y(loss, 8), f"{loss:.3f}") for step, loss in val),
        text(410, 18, f"{cfg.preset}, seed {cfg.seed}: validation loss {val[-1][1]:.4f} after {seconds:.1f} s of training"),
        text(410, 402, f"step; dots: validation, line: training batch, nats per token; dashes: target {f'{cfg.target_loss:g}' if cfg.target_loss else 'none'}"),
        "</svg>"])

# ---- Signals, hosts, memory ------------------------------------------------------------------------------------------
class Stop:
    """What a signal asks of the loop. SIGTERM or SIGINT (Ctrl-C) between the first step and the last: a checkpoint of the present
    step, then exit 75. Before and after there is nothing to save: exit at once, as at the second signal anywhere. Several processes
    stop after the same step: JAX's preemption service hears their SIGTERM, at the first step at the earliest, and Ctrl-C is turned into one."""
    asked = looping = False
    def listen(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)
        return self
    def hear(self, number, frame):
        name, again = signal.Signals(number).name, self.asked
        ends, self.asked = again or not self.looping, True
        with contextlib.suppress(OSError):  # a `| tee` dies of the same Ctrl-C
            os.write(2, f"\n{name}: {'ends at once' if ends else 'saves a checkpoint after this step and ends; again: ends at once'}\n".encode())
        if ends:
            os._exit(128 + number if again else Preempted.exit_code)
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
    def at(self, done):  # whether to stop after this step
        return multihost_utils.reached_preemption_sync_point(done) if jax.distributed.is_initialized() else self.asked

GONE = "another host of this run is gone, or the runtime failed: see each host's output; start all again with --resume=auto"
INIT_TIMEOUT_S, HEARTBEAT_S = 120, 30  # how long hosts wait for one that does not come, and for one that says nothing any more

def join_hosts(where):
    """jax.distributed, before anything asks for a device. Raises UsageError for what is no `multihost`, Preempted where hosts are missing."""
    with errors_as(UsageError, f"--multihost={where}: wanted auto, or HOST:PORT,COUNT,INDEX"):
        address, count, index = (None, None, None) if where == "auto" else (part(x) for part, x in zip((str, int, int), where.split(","), strict=True))
        host, _, port = (address or "").rpartition(":")
        if where != "auto" and not (host and 0 < int(port) < 1 << 16 and 0 <= index < count):
            raise ValueError("an INDEX from 0 to COUNT - 1 of a process at HOST:PORT")
    if index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:  # where it cannot, JAX 0.10 may end in a segmentation fault
        with errors_as(UsageError, f"--multihost={where}: host 0 cannot listen on port {port}"):
            socket.create_server(("", int(port))).close()
    def give_up(signal_number=0):
        why = GONE if signal_number else f"after {INIT_TIMEOUT_S} s not all hosts have come; start the same line on each"
        with contextlib.suppress(OSError):
            os.write(2, f"error: --multihost={where}: {why}\n".encode())
        os._exit(Preempted.exit_code)
    join_hosts.aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(give_up)  # JAX aborts, on a thread of its own, where a host is gone
    ctypes.CDLL(None).signal(int(signal.SIGABRT), join_hosts.aborted)
    timer = threading.Timer(INIT_TIMEOUT_S, give_up)
    timer.daemon = True
    timer.start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's preemption service hears it from here on
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python hears nothing while JAX waits
    try:
        with errors_as(UsageError, f"--multihost={where}: JAX finds no other hosts"):
            jax.distributed.initialize(address, count, index, initialization_timeout=2 * INIT_TIMEOUT_S, heartbeat_timeout_seconds=HEARTBEAT_S)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, heard)

def compare_hosts(facts, folder=""):
    """Host 0's folder. Raises UsageError on every host where one has an error, or other facts: code, config, data, versions, checkpoint."""
    text = np.frombuffer(json.dumps([facts, str(folder)]).encode().ljust(1 << 16, b"\0"), np.uint8)
    hosts = [json.loads(bytes(row).rstrip(b"\0")) for row in multihost_utils.process_allgather(text)]
    ours, folder = hosts[0]
    problems = [f"host {i} cannot begin: {theirs['error']}" for i, (theirs, _) in enumerate(hosts) if "error" in theirs] or [
        f"host {i} has {name}={theirs.get(name)}, but host 0 {name}={ours.get(name)}: hosts must be alike"
        for i, (theirs, _) in enumerate(hosts) for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if problems:
        raise UsageError(problems[0])
    return Path(folder)

@contextlib.contextmanager
def runtime_errors(cfg):
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            n, half = jax.device_count(), lambda x: x // 2 if x % 2 == 0 else x
            row, shapes = max(stage.seq_len for stage in stages(cfg)), [batch_shape(stage, n, cfg) for stage in stages(cfg)]
            micro = max(1, max(rows // n * (width - 1) for _, rows, width in shapes) // 2 // row) * row
            third = "--fsdp=1" if n > 1 and not cfg.fsdp else f"--attn_block={half(math.gcd(cfg.attn_block, row))}"
            raise UsageError(f"out of memory. Turn --micro_tokens={micro} (rows of --seq_len={cfg.seq_len} must fit), "
                             f"--head_block={half(math.gcd(cfg.head_block, micro))}, and {third}: the update stays the same "
                             f"({str(error).splitlines()[0][:200]})") from error
        if jax.distributed.is_initialized():
            raise Preempted(f"{GONE} ({str(error).splitlines()[0][:200]})") from error
        raise

# ---- Command line ----------------------------------------------------------------------------------------------------
def parse_flags(argv):
    """argv -> {field: value} of the flags given. Raises UsageError, naming the nearest flag for a typo."""
    def fail(message):
        raise UsageError(f"{message} (python train.py --help lists all flags)")
    parser = argparse.ArgumentParser(usage="python train.py [--preset=NAME] [--FIELD=VALUE ...] [@FILE]", allow_abbrev=False,
        description=__doc__.split("\n\nIn order")[0] + "\n\nDefaults shown are the speedrun's; other presets have their own (PRESETS in train.py).",
        fromfile_prefix_chars="@", argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, parser.convert_arg_line_to_args = fail, lambda line: shlex.split(line, comments=True)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    source = Path(__file__).read_text().split("class Config:")[1].split("PRESETS = ")[0]
    for title, name, words in re.findall(r"^    (?:# -- (.*)|(\w+): \w+ = .*? +# (.*))$", source, re.MULTILINE):
        if title:
            group = parser.add_argument_group(title)
        else:
            kind, words = fields[name].type, f"{words} (default: {fields[name].default!r})".replace("%", "%%")
            group.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=words)
    with errors_as(UsageError, f"{' '.join(word for word in argv if word.startswith('@'))} cannot be read"):  # an open quote
        given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), fields, n=1, cutoff=0)[0]
        fail(f"{unknown[0]}: there is no such flag; the nearest is --{near}")
    for name, value in vars(given).items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"--{name}={value}: wanted a finite float")
    return vars(given)

def choose_preset(given):
    """(preset, why). Raises UsageError, and DataError on an accelerator without shards."""
    asked, real = given.get("preset", "auto"), f"`python cached_fineweb10B.py {SPEEDRUN_SHARDS}`, then `python train.py`"
    if asked in PRESETS:
        return asked, "asked for"
    if asked != "auto":
        raise UsageError(f"--preset={asked}: wanted {', '.join(PRESETS)} or auto")
    if jax.default_backend() == "cpu":
        return "demo", ("JAX sees only a CPU, so a small byte-level model learns Python from this machine's standard library. "
                        f"The real thing, on a TPU VM or a GPU machine: {real}")
    kind, pattern = jax.devices()[0].device_kind, given.get("train_files", Config.train_files)
    if pattern and not find_shards(pattern):
        raise DataError(f"JAX sees a {kind}, but no shards match {pattern}: {real}; or --preset=demo, which needs none")
    return "speedrun", f"JAX sees {jax.device_count()} x {kind}, and there are shards"

def choose_attention(cfg, platform):
    """The config with --attention=auto settled for a platform. Raises UsageError where band is asked for and cannot run."""
    lengths = [stage.seq_len for stage in (*stages(cfg), val_stage(cfg))]
    fits = (cfg.head_dim % 128 == 0 and all(length % TILE == 0 for length in lengths) and cfg.compute_dtype == "bfloat16"
            and max(lengths) * cfg.head_dim <= 1 << 21)  # a row of one head lies in fast memory
    wants = f"--head_dim in 128s, rows in {TILE}s of at most {(1 << 21) // cfg.head_dim} tokens, bfloat16"
    best = "band" if platform == "tpu" and fits else "xla"
    if platform == "tpu" and cfg.attention == "auto" and not fits:
        say(f"--attention=xla, slower here than band, which wants {wants}")
    if cfg.attention == "band" and best != "band":
        raise UsageError(f"--attention=band: wanted a TPU, {wants}; auto takes what can run")
    return cfg if cfg.attention != "auto" else dataclasses.replace(cfg, attention=best)

def validate(cfg):
    """Raises UsageError for a config that cannot run."""
    def need(ok, name, wanted):
        if not ok:
            raise UsageError(f"--{name}={getattr(cfg, name)}: wanted {wanted}")
    def read(name, parse, wanted):
        with errors_as(UsageError, f"--{name}={getattr(cfg, name)}: wanted {wanted}"):
            return parse(str(getattr(cfg, name)))
    numbers = {}
    for low, high, names in (
            (1, 999_999, "steps num_layers max_epochs"), (0, 1 << 16, "vocab_size"), (1, 2**31 - 1, "model_dim num_heads mlp_dim val_tokens val_seq_len log_every rope_base"),
            (0, 2**31 - 1, "seed num_kv_heads gate_dims tied_stages val_every save_every warmup_steps attn_block head_block micro_tokens "
             "val_window_short val_window_long window_short window_long max_doc_len batch_tokens seq_len"), (0, len(POLAR_EXPRESS), "ns_steps"),
            (0, 1e38, "stage_lr mtp embed_lr head_lr scalar_lr gate_lr adamw_lr muon_lr muon_wd muon_momentum embed_std adam_eps adam_wd final_lr_scale"),
            (0, 1, "cooldown_frac final_frac stage_ends"), (0, 0.999999, "muon_beta2 adam_beta1 adam_beta2"), (-1e6, 1e6, "softcap")):
        for name in names.split():
            numbers[name] = read(name, lambda text: [float(x) for x in text.split(",") if x or name != "mtp"], "numbers with commas between")
            need(all(low <= x <= high for x in numbers[name]), name, f"at least {low}, at most {high}")
    layers = {name: read(name, layer_list, "blocks with commas between") for name in ("mlp_only", "offset_layers", "long_layers", "backout")}
    pairs = {name: read(name, layer_pairs, "A>B,...") for name in ("skips", "late_inputs")}
    trace, table, ends = read("profile", lambda text: [int(x) for x in (text or "0:1").split(":")], "START:STOP"), stages(cfg), numbers["stage_ends"]
    need(len(momentum := numbers["muon_momentum"]) == 4 and max(momentum[:2]) < 1, "muon_momentum", "FROM,TO,STEPS,STEPS, the first two below 1")
    need(len(numbers["softcap"]) in (1, 3) and (cfg.cap[0] == 0 or min(cfg.cap[:2]) > 0), "softcap", "A,B,C or one number, A and B above 0, or 0")
    need(cfg.head_dim >= 4 and cfg.head_dim % 4 == 0, "head_dim", "a multiple of 4")
    need(cfg.gate_dims <= cfg.model_dim, "gate_dims", f"at most --model_dim={cfg.model_dim}")
    need(cfg.num_heads % cfg.kv_heads == 0, "num_kv_heads", f"a divisor of --num_heads={cfg.num_heads}")
    for name, listed in pairs.items():
        need(all(len(p) == 2 and 0 <= p[0] < p[1] < cfg.num_layers for p in listed), name, f"A>B,... with A < B < {cfg.num_layers}")
    for name, listed in layers.items():
        need(len({*listed} & {*range(cfg.num_layers)}) == len(listed), name, f"distinct blocks from 0 to {cfg.num_layers - 1}")
    need(len(layers["mlp_only"]) < cfg.num_layers, "mlp_only", "a block with attention")
    late = [reader for _, reader in pairs["late_inputs"]]
    need(len({*late} - {*layers["mlp_only"]}) == len(late), "late_inputs", "each block with attention once at most")
    for name, allowed in (("compute_dtype", "float32 or bfloat16"), ("residual_dtype", "auto or float32 or bfloat16"), ("smear", "0 or 1"),
                          ("fsdp", "0 or 1"), ("shuffle", "0 or 1"), ("deterministic", "0 or 1"), ("attention", "auto or xla or band"), ("optimizer", "muon or adamw")):
        need(str(getattr(cfg, name)) in allowed.split(" or "), name, allowed)
    need(sorted(ends) == ends and ends[0] > 0 and ends[-1] == 1, "stage_ends", "rising shares of the steps, the last 1")
    need(0 <= cfg.val_context < cfg.val_seq_len, "val_context", f"less than --val_seq_len={cfg.val_seq_len}")
    need(len(trace) == 2 and 0 <= trace[0] < trace[1], "profile", "START:STOP")
    need(len({bool(stage.max_doc_len) for stage in table}) == 1, "max_doc_len", "a length in all stages, or 0 in all")
    for stage in table:
        need(stage.seq_len >= 2 and max(s.seq_len for s in table) % stage.seq_len == 0, "seq_len", "divisors of the longest")
        need(len(numbers["mtp"]) < stage.seq_len, "mtp", "fewer weights than a row has tokens")
        need(stage.batch_tokens >= 1 and stage.batch_tokens % stage.seq_len == 0, "batch_tokens", f"multiples of --seq_len={cfg.seq_len}")
    scales = [rotary(1, stage, cfg)[2] for stage in table]
    need(0 <= min(scales) and max(scales) * cfg.head_dim <= 60, "attn_scale",
         f"at least 0, at most {60 / cfg.head_dim * cfg.score_scale / max(scales, key=abs):.4g}: exp must not overflow")

def set_up_jax(cfg):
    local = jax.process_count() == 1 or jax.default_backend() != "cpu"  # else only host 0 finds its programs, and Gloo waits 30 s for the others
    if local and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
        jax.config.update("jax_compilation_cache_max_size", 4 << 30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if cfg.compute_dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")  # accelerators would round operands otherwise

def configure(argv):
    """Flags -> (Config, why this preset); sets JAX up. Raises UsageError, DataError."""
    given = parse_flags(argv)
    if given.get("cpu_devices"):
        if not 0 < given["cpu_devices"] <= 1024:
            raise UsageError(f"--cpu_devices={given['cpu_devices']}: wanted 0 to 1024")
        jax.config.update("jax_num_cpu_devices", given["cpu_devices"])  # before anything asks for a device
    if given.get("multihost"):
        join_hosts(given["multihost"])
    preset, why = choose_preset(given)
    cfg = Config(**PRESETS[preset] | given | {"preset": preset})
    validate(cfg)
    set_up_jax(cfg)
    return choose_attention(cfg, jax.default_backend()), why

# ---- main ------------------------------------------------------------------------------------------------------------
def open_data(cfg):
    """(training shards, validation shards, a line about the plan, config completed), all checked. Raises DataError."""
    corpus = embedded_corpus() if not (cfg.train_files and cfg.val_files) else ("", "")
    train, val = open_shards(cfg.train_files or corpus[0]), open_shards(cfg.val_files or corpus[1])
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or train.meta["vocab_size"], bos_id=cfg.bos_id if cfg.bos_id >= 0 else train.meta["bos_id"])
    if not 0 <= cfg.bos_id < cfg.vocab_size <= 1 << 16:
        raise DataError(f"--bos_id={cfg.bos_id}: wanted an id of the vocabulary, which for {train.paths[0]} has {cfg.vocab_size} of at most {1 << 16}")
    if val.meta != train.meta:
        raise DataError(f"{val.paths[0]}: made with {val.meta}, but the training shards with {train.meta}")
    for path, tokens in zip(train.paths + val.paths, train.tokens + val.tokens):
        if (largest := int(tokens.max())) >= min(cfg.vocab_size, NO_TOKEN):
            raise DataError(f"{path}: holds token {largest}, but the vocabulary has {cfg.vocab_size}. If another tokenizer "
                            "made it, say so in its folder's meta.json")
    if len(val.tokens[0]) <= cfg.val_tokens:
        raise DataError(f"{val.paths[0]}: too short for --val_tokens={cfg.val_tokens}; {len(val.tokens[0]) - 1} fit")
    reads = [read for _, read in plan(train, cfg)]  # once through before anything is compiled: seconds per billion tokens
    if len(reads) < cfg.steps:
        enough = lambda n: sum(1 for _ in plan(train, dataclasses.replace(cfg, steps=n))) == n  # stages shrink with --steps
        most = bisect.bisect_left(range(1, cfg.steps), True, key=lambda n: not enough(n))
        raise DataError(f"{sum(map(len, train.tokens))} training tokens in {len(train.paths)} shards are too few for {cfg.steps} steps: "
                        f"{f'--steps={most} fits; or' if most else 'not one fits;'} fetch more, or read them again with --max_epochs={cfg.max_epochs + 1}")
    trained = tokens_before(cfg.steps, stages(cfg))
    return train, val, f"data: {reads[-1]} tokens read for {trained} trained on, {1 - trained / reads[-1]:.1%} cut off", cfg

def describe(run, source, why, argv, train, val, notes, cfg):
    run.put("log.txt", source + "\n" + "=" * 120 + "\n")
    pairs = lambda items: " ".join(f"{name}={value}" for name, value in items.items())
    files = [f"data: {path.name} tokens:{len(tokens)} sha256:{digest}" for shards in (train, val)
             for path, tokens, digest in zip(shards.paths, shards.tokens, shards.sha256)]
    scored = hashlib.sha256(val.tokens[0][:cfg.val_tokens + 1]).hexdigest()
    for text in (f"preset: {cfg.preset} ({why})", f"argv: {shlex.join(argv)}", f"config: {pairs(dataclasses.asdict(cfg))}", f"versions: {pairs(versions())}",
                 f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes, {os.cpu_count()} host cores", *files,
                 f"data: validation scores {cfg.val_tokens} targets; sha256 of these and the token before them:{scored}", *notes):
        run.line(text)

def warm_up(programs, mesh, cfg):
    state = programs["init"]()  # a throw-away one, on empty rows: the first step finds its programs loaded
    for stage in stages(cfg):
        state, _ = programs[stage.index](state, to_devices([], stage, mesh, cfg))
    jax.block_until_ready(state)
    if jax.process_count() > 1:  # nor does the first save compile its gather, maybe in the last seconds of a preempted machine
        multihost_utils.process_allgather((state.params, state.opt_state), tiled=True)

def train_loop(state, run, programs, batches, val_rows, stop, cfg):
    """Dispatch a step, then wait for the loss of the one before. Returns (state, last metrics). Raises NonFiniteLoss, Preempted."""
    due = lambda every, done: bool(every) and done % every == 0
    first, pending, row = int(state.step), None, run.row
    begin, end = np.clip([int(x) for x in (cfg.profile or "0:0").split(":")], first, cfg.steps).tolist()
    run.start()
    stop.looping = True
    for step in range(first, cfg.steps):
        asked = time.perf_counter()
        batch = next(batches)
        run.waited += time.perf_counter() - asked
        if step == begin < end and run.writes:
            jax.profiler.start_trace(str(run.folder / "profile"))
        state, loss = programs[stage_at(step, run.table).index](state, batch)
        if pending:
            row = run.settle(*pending)
            if due(cfg.log_every, row["step"]):
                run.write(row)
        pending, done, last = (step, loss), step + 1, step + 1 == cfg.steps
        if done == end > begin and run.writes:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        stopping = stop.at(done)
        evaluates, saves = last or due(cfg.val_every, done), last or due(cfg.save_every, done) or stopping
        if evaluates or saves:
            jax.block_until_ready(state)
            row, pending = run.settle(*pending), None
            run.stop()
            if evaluates:
                nats, count = programs["eval"](state.params, val_rows)
                assert int(count) == cfg.val_tokens, f"{count} targets scored, wanted {cfg.val_tokens}"
                row["val_loss"] = float(nats) / cfg.val_tokens
                if not math.isfinite(row["val_loss"]):
                    raise NonFiniteLoss(f"the validation loss after step {done} is {row['val_loss']}; {run.folder} stands as it is")
                if row["val_loss"] <= cfg.target_loss and not run.reached:
                    run.reached = {"step": done, "train_time_s": row["train_time_s"]}
            if evaluates or due(cfg.log_every, done):
                run.write(row)
            saved = saves and run.save(state, row)
            if stopping or saved and stop.asked and not jax.distributed.is_initialized():
                saved = multihost_utils.broadcast_one_to_all(bool(saved))  # no host leaves before the first has written
                raise Preempted(f"stopped after step {done}, which {'is saved' if saved else 'COULD NOT BE SAVED'}; "
                                f"go on with the same command and --resume={run.folder}, or auto")
            run.start()
    run.stop()
    stop.looping = False
    return state, row

def report(state, row, run, meta, model, cfg):
    memory = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
    target = "reached at step {step} after {train_time_s:.3f}s".format(**run.reached) if run.reached else "not reached"
    run.line(f"final: step:{row['step']}/{cfg.steps} tokens:{row['tokens']} val_loss:{row['val_loss']:.4f} "
             f"train_time:{row['train_time_s']:.3f}s cpu_time:{row['cpu_time_s']:.1f}s "
             f"wall:{time.perf_counter() - run.created:.1f}s" + (f" peak_memory:{memory / 2**30:.2f}GiB" if memory else "")
             + (f" target:{cfg.target_loss:g} {target}" if cfg.target_loss else ""))
    run.metrics({key: row[key] for key in ("step", "tokens", "train_time_s", "cpu_time_s", "val_loss")}
                | ({"target_reached_step": run.reached["step"]} if run.reached else {}))
    run.put("loss.svg", loss_svg(run.rows, cfg), "w")
    if meta["tokenizer"] == "bytes" and jax.process_count() == 1:
        whole = jax.device_put(jax.tree.map(np.asarray, state.params), jax.devices()[0])
        weights = unstack(gather(whole, model.specs(cfg), 1, cfg))
        for prompt in ("def main(", "class "):
            ids = sample(weights, [cfg.bos_id, *prompt.encode()], 200, model, cfg)
            run.line("sample: " + plain(prompt + bytes(i for i in ids if i < 256).decode(errors="replace"), keep="\n\t"))
    if run.unwritten.keys() <= {"log.txt"}:
        run.line(f"wrote: {run.folder}/ckpt/step-{cfg.steps:06d}, and loss.svg, metrics.jsonl, config.json, log.txt beside ckpt")
        run.line("next: look at loss.svg; the same with --seed=1, another run; `python train.py --help`, every number there is")

def main(argv=None, model=None, stop=None):
    """Train. argv: flags, by default the command line's. model: a Model, another architecture for the same loop. stop: what hears
    signals, by default nothing. Returns the run's folder. Raises UsageError, DataError and CheckpointError, before compiling but for
    memory, a tensor that cannot be read and what could not be written; NonFiniteLoss; Preempted when told to stop, after a checkpoint if it can."""
    source, argv, model, stop = Path(__file__).read_text(), sys.argv[1:] if argv is None else argv, model or Model(), stop or Stop()
    try:
        cfg, why = configure(argv)
        say(f"speedrun-jax, preset {cfg.preset}: {why}")
        train, val, note, cfg = open_data(cfg)
        facts = facts_of(source, train, val)
        checkpoint, manifest = find_checkpoint(cfg, facts["data"])
    except Exception as error:
        if jax.distributed.is_initialized():
            with contextlib.suppress(Exception):
                compare_hosts({"error": plain(error)})  # the others say it too
        raise
    new = Path(cfg.log_dir) / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(3).hex()}"
    mesh, specs, folder = make_mesh(), model.specs(cfg), checkpoint.parent.parent if checkpoint else new
    with runtime_errors(cfg):
        if jax.distributed.is_initialized():
            flags = {f"--{name}": value for name, value in dataclasses.asdict(cfg).items() if name != "multihost"}
            own_facts = ("platform", "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_COMPILATION_CACHE_DIR")
            flags |= {name: value for name, value in facts.items() if name not in own_facts}
            folder = compare_hosts(flags | {"checkpoint": checkpoint and "/".join(checkpoint.parts[-3:])}, folder)
        if manifest["step"] == cfg.steps and any(log.read_bytes()[-73:].startswith(b"\nsha256:") for log in folder.glob("log.txt")):
            say(f"{checkpoint} is that run's last step, nothing is left to train")
            return folder
        if checkpoint:
            shapes = jax.eval_shape(make_init(model, mesh, cfg))
            check_tensors(checkpoint / "params.safetensors", shapes.params)
            check_tensors(checkpoint / "opt.safetensors", shapes.opt_state)
        run = Run(folder, specs, cfg, manifest, facts)
        say("compiling, or taking programs from the cache ...")
        programs, notes = compile_all(model, mesh, cfg)
        describe(run, source, why, argv, train, val, [note, f"parameters: {count_params(specs, cfg)}", *notes], cfg)
        run.put("config.json", json.dumps({"config": dataclasses.asdict(cfg), "meta": val.meta}, indent=1), "w")
        warm_up(programs, mesh, cfg)
        state = programs["init"]()
        if checkpoint:
            state = load_checkpoint(checkpoint, manifest["step"], state)
            was = manifest["versions"]
            changed = [f"{k} was {was.get(k)}, is {facts.get(k)}" for k in sorted(was | facts) if facts.get(k) != was.get(k)]
            run.line(plain(f"resumed: {checkpoint} at step {manifest['step']}" + (f"; bits may differ: {'; '.join(changed)}" if changed else "")))
        val_rows = to_devices(plan_val(val, cfg), val_stage(cfg), mesh, cfg)
        batches = train_batches(train, manifest["step"], mesh, cfg)
        batches = itertools.chain([next(batches)] if 0 < manifest["step"] < cfg.steps else [], batches)  # the way there is off the clock
        state, row = train_loop(state, run, programs, batches, val_rows, stop, cfg)
        report(state, row, run, val.meta, model, cfg)
    run.seal()
    return folder

def command(run=None):
    """main() for the shell: for what a user can mend, one sentence and an exit code instead of a traceback."""
    try:
        (run or main)()
    except Exception as error:
        joined, code = jax.distributed.is_initialized(), getattr(error, "exit_code", 1)
        if not joined and not hasattr(error, "exit_code"):
            raise
        with contextlib.suppress(OSError):
            sys.excepthook(*sys.exc_info()) if code == 1 else say(plain(f"error: {error}"), file=sys.stderr)
        if joined:  # JAX would wait for hosts that wait for this one
            time.sleep(3 * (jax.process_index() == 0))  # the others say theirs first: without host 0 they end at once
            os._exit(code)
        return code

if __name__ == "__main__":
    sys.exit(command(lambda: main(stop=Stop().listen())))
