# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.13",
#   "numpy>=2.0,<3",
#   "einops>=0.8,<0.9",
#   "safetensors>=0.5,<1",
#   "huggingface_hub>=2.4,<3",
# ]
# ///
"""Train a GPT to a target validation loss in the least time: one file of JAX, read top to bottom.

    python train.py                        on a CPU: a small model learns Python's own source
    python cached_fineweb10B.py 8          on a TPU or GPU: fetch FineWeb as GPT-2 tokens, then
    python train.py                        train a GPT-2-class model towards a loss of 3.28
    python train.py --steps=500 @my.args   every number below is a flag; @FILE holds flags
    --seed=1 --smear=false --bos_id=none --skips=((1,3),) --long_layers=  how values are written

The order is: Config and flags; mesh, weights, model; schedules, optimizers; data; the compiled
steps; checkpoint, clock and log; the run. The TPU kernels stand last: skip them at first.
Importing this file starts no device.

One letter is one axis, in array names, einsum strings and the weight table alike:
    A  micro-steps of a step      B  rows of a batch     T  query position   S  key position
    L  layers   I  layers with attention   J  skips      D  model width      F  MLP width
    H  query heads                G  key heads           R  query heads per key head
    K  head width                 E  inputs of a gate    V  vocabulary       C  chunks of tokens
    Q  width of the copy pointer's queries and keys           P  candidates   U  their groups
    M, N  any matrix's two axes, or several axes merged: tokens, heads and their width
    1  an axis of size one        K4  the first quarter of K

Every device runs one program on its own rows. Weights and optimizer state live split over the
devices. A step gathers them once, accumulates gradients locally, and reduces each gradient once.
"""

import ast
import bisect
import collections
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from einops import rearrange, reduce
from jax import lax
from jax.experimental import multihost_utils
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

f32 = jnp.float32
tree_map = jax.tree.map
ROOT = Path(__file__).resolve().parent


class UsageError(ValueError):
    """What a user can mend: a flag, a shard, a checkpoint, memory. One sentence, exit code 2."""


class OutOfMemory(UsageError):
    """A device's memory is too small for a program."""


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite. Exit code 5."""


def require(holds, sentence):
    """Raises UsageError where something that a user can mend does not hold."""
    if not holds:
        raise UsageError(sentence)


# ---- Config and flags ----------------------------------------------------------------------------
# `python train.py --help` prints the two classes: their comments are the help.
#
# The defaults are modded-nanogpt's record 58 (January 2026) with the free tweaks of records 61 to
# 80 (those that cost no time), a softmax over candidates (record 92) and a copy pointer (pull
# request 379). Different here: no value embeddings, no table of token pairs, no paired heads, three
# heads of 256 for six of 128 (so attn_scale is 0.1 / sqrt(2)), Adam on every step, gradients as
# means over tokens, documents packed in rows of 4,096. How many steps make up for it is an
# estimate: records/v6e.
#
# A "gain" in this file is validation loss without a technique minus loss with it: positive where it
# helps. Unless it says otherwise it was measured on English text with 5M parameters, 2M tokens and
# three seeds; the logs are in records/ablations. What gains nothing there is kept because the
# records show that it gains at full size; a number of a record is modded-nanogpt's. "Predicted"
# figures are of the program compiled for a v6e-8, by scripts/dry_run.


@dataclass(frozen=True)
class Stage:
    """Steps that share one compiled program: a row of Config.stages.

    --stages.lr=1 sets a column, --stages.lr=1,2,3,4 sets it row by row. --stages.end=0.5,1 also
    says how many rows there are: the others are cut, or the last one is repeated. Validation is a
    row too, of which seq_len, short and long count.

    Windows that grow are records 12 and 13, short and long ones record 20, cut documents record 29
    (gain of shorter ones at first 0.005, two seeds), a batch that grows record 46 (gain -0.005).
    """

    end: float = 1.0  # share of the steps at which the stage ends
    batch_tokens: int = 0  # tokens per optimizer step, over all devices
    seq_len: int = 4096  # tokens per row
    doc_len: int = 0  # tokens kept of a document, rows packed; 0: one plain stream of text
    short: int = 0  # tokens a short layer looks back; 0: seq_len
    long: int = 0  # tokens a long layer looks back; 0: seq_len
    lr: float = 1.0  # multiplies every learning rate
    ahead: tuple = ()  # loss weights of the 2nd, 3rd ... next token; the last falls to 0
    tied: bool = False  # the embedding is the head
    candidates: int = 0  # tokens that the training softmax is over, which makes train_loss lower;
    # 0: the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers one can turn. The defaults are those of the preset speedrun."""

    # Run
    preset: str = "speedrun"  # speedrun or demo; by default what this machine can do
    steps: int = 1700  # optimizer steps
    seed: int = 0  # of the first weights, and of the data's order where it is shuffled
    target_loss: float = 3.28  # the step and time at which it is reached are reported; 0: none
    # Model
    num_layers: int = 11  # blocks
    model_dim: int = 768  # width of the residual stream
    num_heads: int = 3  # query heads; predicted for a v6e-8: 13 % less time than 6 of 128
    num_kv_heads: int | None = None  # key heads, each shared by query heads; None: num_heads
    head_dim: int = 256  # width of a head, a multiple of 4; of 128 for the TPU kernels
    mlp_dim: int = 3072  # hidden width of the ReLU^2 MLP
    vocab_size: int | None = None  # token ids there are; None: what the shards' meta.json says
    bos_id: int | None = None  # the token before each document; None: what meta.json says
    mlp_only: tuple = (6,)  # blocks without attention
    long_layers: tuple = (3, 10)  # blocks with the long window
    offset_layers: tuple = (3, 10)  # blocks whose keys take half their dims from the token before
    skips: tuple = ((3, 6),)  # the stream after 3 re-enters before 6
    late_inputs: tuple = ((7, 9), (7, 10))  # attention of 9 reads after 7
    backout: tuple = (7,)  # the stream after 7 is taken out of the last one in part
    gate_dims: int = 12  # dims of its input that a gate reads; 0: no gates
    smear: bool = True  # a gate lets some of the token before into each embedding
    copy_dim: int = 128  # width of the copy pointer's queries and keys; 0: no pointer
    softcap: tuple = (11.5, 15.0, 5.0)  # (A, B, C): A * tanh((logit + C) / B); empty: no cap
    attn_scale: float = 0.0707  # multiplies q.k, both of unit rms, in the first stage
    attention: str = "auto"  # band: the TPU kernels; cudnn: on a GPU; xla: plain; auto: as able
    head_block: int = 4096  # tokens whose logits exist at a time; all, where it is no divisor
    compute_dtype: str = "bfloat16"  # of matmul operands and of gradients between devices
    residual_dtype: str | None = None  # of activations between matmuls; None: compute_dtype
    # Schedule
    stages: tuple = (
        # end     tokens   row   doc  short long  lr    ahead        tied  candidates
        Stage(0.3263, 131_072, 4096, 896, 128, 384, 1.00, (0.5, 0.25), True, 10_240),
        Stage(0.6527, 262_144, 4096, 2048, 384, 896, 1.52, (0.5,), True, 10_240),
        Stage(0.9300, 393_216, 4096, 2048, 640, 1408, 1.73, (), False, 14_336),
        Stage(1.0000, 327_680, 4096, 2048, 768, 1664, 1.60, (), False, 0),
    )
    val: Stage = Stage(seq_len=8192, short=768, long=2560)  # --val.seq_len=..., --val.short=...
    val_tokens: int = 10_485_760  # targets scored, each once, from the first validation shard
    val_context: int = 2048  # first tokens of a validation row, context only (record 21)
    micro_tokens: int | None = None  # tokens per device and micro-step, at least one row; None:
    # 4096, on a GPU the largest of 49152, 32768, 16384 and 8192 that its memory holds
    warmup_steps: int = 0  # the learning rate rises linearly over these
    cooldown_frac: float = 0.6  # share of the steps before final_frac in which the rates fall
    final_lr_scale: float = 0.15  # what they fall to, of the base rates
    final_frac: float = 0.021  # share of the steps, at the end, that keep this rate
    # Optimizers
    optimizer: str = "muon"  # muon: matrices by Muon, the rest by Adam; adamw: all by AdamW
    muon_lr: float = 0.023  # a step's spectral norm is this times sqrt(longer / shorter side)
    muon_wd: float = 1.2  # a weight that a step shrinks also loses lr^2 * wd of itself, stretched
    muon_momentum: tuple = (0.85, 0.95, 300, 50)  # from, to, steps up (record 9), steps down
    adam_lr: float = 0.008  # embedding, head and gates; of some a fraction, see optimizer_rules
    adam_beta1: float = 0.5  # decay of the gradient's mean; embedding and head, with adamw all
    adam_beta2: float = 0.95  # decay of its square's mean; the same
    adam_eps: float = 1e-10  # added to the root of the square's mean
    adam_wd: float = 0.75  # embedding and head, as muon_wd; with adamw matrices too, lr * wd
    scalar_lr: float = 0.04  # learned scalars; of some a fraction, see optimizer_rules
    adamw_lr: float = 0.001  # everything, with --optimizer=adamw
    # Data
    train_files: str = "fineweb10B/fineweb_train_*.bin"  # shards; empty: Python's own source
    val_files: str = "fineweb10B/fineweb_val_*.bin"  # shards; empty: Python's own source
    max_epochs: int = 1  # how often the training tokens may be read
    shuffle: bool = False  # read a plain stream in random blocks
    # Log and checkpoint
    val_every: int = 250  # steps between evaluations; 0: only the one at the end
    save_every: int = 0  # steps between checkpoints; 0: only the one at the end
    log_every: int = 10  # steps between lines of the log
    log_dir: str = "logs"  # run folders are made here
    resume: str = ""  # auto: go on with the newest run of this config; or the folder to go on in
    # Machine
    cpu_devices: int = 1  # devices to make of a CPU, each with its share of a batch
    multihost: str = ""  # auto on each host of a TPU slice; elsewhere HOST:PORT,COUNT,INDEX
    deterministic: bool = False  # on a GPU only operations that repeat to the bit; slower

    @property
    def kv_heads(self):
        return self.num_kv_heads or self.num_heads

    @property
    def padded_vocab(self):
        """Rows of the tables: whole registers, and equal shares of eight devices."""
        unit = 512 if self.vocab_size > 8192 else 128
        return -(-self.vocab_size // unit) * unit

    @property
    def is_packed(self):
        """Whether rows hold documents, not a plain stream."""
        return any(stage.doc_len for stage in self.stages)

    @property
    def stream_dtype(self):
        return self.residual_dtype or self.compute_dtype

    @property
    def tokens_at_once(self):
        """Tokens of a micro-step on one device."""
        return self.micro_tokens or 4096

    @property
    def bounds(self):
        """The steps at which the stages begin, and the end: [0, 555, 1110, 1581, 1700]."""
        return [0, *(round(stage.end * self.steps) for stage in self.stages)]

    @property
    def spans(self):
        """[(stage, its first step, the step after its last)]."""
        return list(zip(self.stages, self.bounds[:-1], self.bounds[1:], strict=True))


SPEEDRUN = Config()
DEMO = Config(  # minutes on two CPU cores
    preset="demo",
    steps=310,
    num_layers=4,
    model_dim=256,
    num_heads=4,
    head_dim=64,
    mlp_dim=1024,
    mlp_only=(),
    long_layers=(),
    offset_layers=(0, 1, 2, 3),
    skips=((1, 3),),
    late_inputs=(),
    backout=(2,),
    copy_dim=0,
    attn_scale=0.2,
    residual_dtype="float32",
    stages=(
        Stage(0.3333, 1024, seq_len=256),
        Stage(0.6667, 2048, seq_len=256, lr=1.52),
        Stage(1.0000, 3072, seq_len=256, lr=1.73),
    ),
    val=Stage(seq_len=256),
    val_tokens=262_144,
    val_context=128,
    micro_tokens=1024,
    muon_lr=0.02,
    muon_momentum=(0.85, 0.95, 100, 20),
    final_frac=0.0,
    train_files="",
    val_files="",
    shuffle=True,
    val_every=155,
    target_loss=1.0,
)
PRESETS = {"speedrun": SPEEDRUN, "demo": DEMO}
SPEEDRUN_SHARDS = 8  # training shards that it needs, with what the packer leaves out
MAY_DIFFER = {  # between a run and its resumption; a hash guards the data
    "val_every",
    "save_every",
    "log_every",
    "log_dir",
    "resume",
    "cpu_devices",
    "multihost",
    "micro_tokens",
    "head_block",
    "attention",
    "train_files",
    "val_files",
}


CHOICES = {
    "attention": ("auto", "band", "cudnn", "xla"),
    "optimizer": ("muon", "adamw"),
    "compute_dtype": ("bfloat16", "float32"),
    "residual_dtype": (None, "bfloat16", "float32"),
}
WORDS = {"true": True, "false": False, "none": None, "": ()}
AT_LEAST_1 = (
    "steps num_layers model_dim num_heads head_dim mlp_dim val_tokens max_epochs cpu_devices "
    "log_every seq_len head_block micro_tokens"
).split()


def flag_names(config):
    """All flags of a Config, or of another architecture's subclass of it."""
    names = [name for name in get_type_hints(config) if name not in ("stages", "val")]
    names += [f"stages.{name}" for name in get_type_hints(Stage)]
    return names + ["val.seq_len", "val.short", "val.long"]


def read_flags(argv, files=()):
    """{flag: text} of a command line. @FILE stands for the flags in it, # begins a comment there.

    Of a flag that is given twice the last one counts. Raises UsageError for a file that cannot be
    read and for what is no --FLAG=VALUE.
    """
    texts = {}
    for word in argv:
        if word.startswith("@"):
            require(word not in files, f"{word}: wanted a file of flags that does not name itself")
            try:
                words = shlex.split(Path(word[1:]).read_text(encoding="utf-8-sig"), comments=True)
            except (OSError, ValueError) as error:
                raise UsageError(f"{word}: wanted a file of flags ({error})") from error
            texts |= read_flags(words, (*files, word))
            continue
        match = re.fullmatch("--([^=]+)=(.*)", word)
        require(match, f"{word}: wanted --FLAG=VALUE, see --help")
        texts[match[1]] = match[2]
    return texts


def parse_value(text, kind):
    """A flag's text as its field holds it: 500, 3e-4, ((3, 6),), true, none; nothing is ().

    Raises TypeError, ValueError or SyntaxError.
    """
    kinds = get_args(kind) or (kind,)  # int | None: (int, NoneType)
    if str in kinds and text != "none":
        return text
    value = WORDS[text] if text in WORDS else ast.literal_eval(text)
    if type(value) is int and (kind is float or (kind is bool and value in (0, 1))):
        value = kind(value)
    if kind is tuple and type(value) is not tuple:
        value = (value,)
    if type(value) not in kinds:
        raise TypeError
    hash(value)  # a list is no value
    return value


def set_flag(row, flag, text):
    """A Config, or a Stage of it, with one flag set. stages.end says how many rows there are.

    Raises what parse_value raises.
    """
    name, _, column = flag.partition(".")
    value = getattr(row, name)
    if name == "stages":
        texts = re.split(r",(?![^(]*\))", text)  # at commas outside of parentheses
        count = len(texts) if column == "end" else len(value)
        wanted = f"wanted one value or {count}, as many as --stages.end has"
        require(len(texts) in (1, count), f"--{flag}={text}: {wanted}")
        rows = (value + value[-1:] * count)[:count]
        texts = texts * count if len(texts) == 1 else texts
        value = tuple(set_flag(*cell) for cell in zip(rows, [column] * count, texts, strict=True))
    elif column:
        value = set_flag(value, column, text)
    else:
        value = parse_value(text, get_type_hints(type(row))[name])
    return replace(row, **{name: value})


def flag_text(cfg, flag):
    """What a flag is set to, as it is written; of the stage table the column."""
    table, _, name = flag.rpartition(".")
    rows = {"": [cfg], "val": [cfg.val], "stages": cfg.stages}
    return ",".join(str(getattr(row, name)) for row in rows[table])


def parse_texts(texts, preset, presets):
    """{flag: text} -> Config, from a preset on. Raises UsageError as parse_flags."""
    require(preset in presets, f"--preset={preset}: wanted {' or '.join(presets)}")
    cfg = presets[preset]
    names = flag_names(type(cfg))
    for flag in sorted(texts, key=lambda flag: flag != "stages.end"):  # the number of rows first
        if flag not in names:
            near = ", --".join(difflib.get_close_matches(flag, names, n=3, cutoff=0))
            said = f"there is no such flag; the nearest are --{near}, see --help"
            raise UsageError(f"--{flag}={texts[flag]}: {said}")
        try:
            cfg = set_flag(cfg, flag, texts[flag])
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            wanted = f"wanted a value such as {flag_text(cfg, flag)}"
            raise UsageError(f"--{flag}={texts[flag]}: {wanted}") from error
    check(cfg)
    return cfg


def parse_flags(argv, preset="speedrun", presets=PRESETS):
    """Command line, which may hold @FILE -> Config. Without --preset it changes the one named here.

    Raises UsageError for a flag that is not there, has another type or breaks a rule.
    """
    texts = read_flags(argv)
    return parse_texts(texts, texts.get("preset", preset), presets)


def rules(cfg):
    """Yield (flag, whether it holds, what is wanted) for what would cost minutes or pass unseen.

    The tracer finds other mistakes.
    """
    for flag, choices in CHOICES.items():
        yield flag, getattr(cfg, flag) in choices, " or ".join(map(str, choices)).lower()
    for table, row in (("", cfg), ("val.", cfg.val), *(("stages.", row) for row in cfg.stages)):
        for name, value in vars(row).items():
            if isinstance(value, (int, float)):
                least = int(name in AT_LEAST_1)
                yield table + name, least <= value < 1 << 31, f"{least} or more, below 2^31"
    yield "head_dim", cfg.head_dim % 4 == 0, "a multiple of 4, for half-RoPE"
    yield "num_kv_heads", cfg.num_heads % cfg.kv_heads == 0, f"a divisor of {cfg.num_heads}"
    yield "copy_dim", cfg.copy_dim <= 1024, "at most 1024: the pointer's softmax takes no maximum"
    yield "gate_dims", cfg.gate_dims <= cfg.model_dim, f"at most {cfg.model_dim}, the model's width"
    for flag, sizes in (("softcap", (0, 3)), ("muon_momentum", (4,))):
        values = getattr(cfg, flag)
        numbers = len(values) in sizes and {type(x) for x in values} <= {int, float}
        yield flag, numbers, f"{' or '.join(map(str, sizes))} numbers"
    yield "softcap", min(cfg.softcap[:2], default=1) > 0, "A and B above 0"
    capped = 0 < max(cfg.softcap[:1], default=0) <= 40
    wanted = "0 where softcap is empty or its A above 40, because mixture_nats takes no maximum"
    yield "copy_dim", capped or not cfg.copy_dim, wanted
    yield from layer_rules(cfg)
    yield from schedule_rules(cfg)
    growth = rotary(1, cfg.val, cfg)[2] / (cfg.attn_scale or 1)
    most = 60 / cfg.head_dim / (growth or 1)
    wanted = f"less than {most:.3g}, because softmax_average takes no maximum"
    yield "attn_scale", cfg.attn_scale < most, wanted


def layer_rules(cfg):
    """The rules about which blocks have what, as rules yields them."""
    blocks = range(cfg.num_layers)
    for flag in ("mlp_only", "long_layers", "offset_layers", "backout"):
        yield flag, set(getattr(cfg, flag)) <= set(blocks), f"blocks below {cfg.num_layers}"
    for flag in ("skips", "late_inputs"):
        ordered = set(getattr(cfg, flag)) <= set(itertools.combinations(blocks, 2))
        wanted = f"pairs of an earlier and a later block below {cfg.num_layers}, such as ((0, 1),)"
        yield flag, ordered, wanted
    readers = {reader for _, reader in cfg.late_inputs} - set(cfg.mlp_only)
    yield "late_inputs", len(readers) == len(cfg.late_inputs), "each reader once, with attention"
    yield "mlp_only", len(cfg.mlp_only) < cfg.num_layers, "a block with attention left"


def schedule_rules(cfg):
    """The rules of the stage table and of validation, as rules yields them."""
    ends = [0, *(stage.end for stage in cfg.stages)]
    rising = ends == sorted(set(ends)) and ends[-1] == 1
    yield "stages.end", rising, "rising shares of the steps, the last 1"
    longest = max(stage.seq_len for stage in cfg.stages)
    for stage in cfg.stages:
        yield "stages.seq_len", longest % stage.seq_len == 0, "divisors of the longest"
        whole = stage.batch_tokens > 0 and stage.batch_tokens % stage.seq_len == 0
        yield "stages.batch_tokens", whole, "whole rows of stages.seq_len"
        numbers = {type(share) for share in stage.ahead} <= {int, float}
        yield "stages.ahead", numbers, "numbers, such as (0.5,),()"
    is_packed = {stage.doc_len > 0 for stage in cfg.stages}
    yield "stages.doc_len", len(is_packed) == 1, "0 in all stages or in none"
    yield "val_context", cfg.val_context < cfg.val.seq_len, "less than val.seq_len"


def check(cfg):
    """Raises UsageError for the first rule that is broken."""
    for flag, holds, wanted in rules(cfg):
        require(holds, f"--{flag}={flag_text(cfg, flag)}: wanted {wanted}")


def print_help():
    """The docstring and the Config section, whose comments say what each flag does."""
    print(__doc__, inspect.getsource(Stage), inspect.getsource(Config), sep="\n\n")


# ---- Mesh and precision --------------------------------------------------------------------------


EVERYWHERE = PartitionSpec()  # each device has a copy
BY_ROW = PartitionSpec(None, "data")  # the second axis, a batch's rows, is divided over the devices


def make_mesh(devices=None):
    """All devices in one row, along the axis "data"."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def product(spec, a, b):
    """einsum with float32 sums and a float32 result, whatever the operands."""
    return jnp.einsum(spec, a, b, preferred_element_type=f32)


_matmul = jax.custom_vjp(product, nondiff_argnums=(0,))


def _matmul_forward(spec, x, w):
    return product(spec, x, w), (x, w)


def _matmul_backward(spec, saved, g):
    """Autodiff would multiply in float32; these are products of the operands' own dtype."""
    x, w = saved
    x_axes, w_axes, out_axes = re.split(",|->", spec)
    g = g.astype(w.dtype)
    dx = product(f"{out_axes},{w_axes}->{x_axes}", g, w)
    dw = product(f"{x_axes},{out_axes}->{w_axes}", x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def matmul(spec, x, w, out_dtype=None):
    """einsum(spec, x, w): operands in w's dtype, float32 sums, a result in out_dtype or x's dtype.

    A letter of one operand must occur in the other or in the result.
    """
    return _matmul(spec, x.astype(w.dtype), w).astype(out_dtype or x.dtype)


# ---- Parameters ----------------------------------------------------------------------------------
# Every weight is one row of a table: axes, split, first value, optimizer. Shapes, sharding, the
# parameter count and the names in a checkpoint are read off it. Weights of one shape are stacked
# over the layers that have them, so a matrix is the last two axes.


@dataclass(frozen=True)
class Spec:
    """One weight. Not a pytree node, so jax.tree sees each row as a leaf."""

    axes: str  # a word per array axis, "L D F"; HK is two axes merged
    split: str  # the axis divided over the devices, and Muon's units; "": each has a copy
    init: Callable  # (key, shape) -> float32 array
    group: str  # its row in optimizer_rules; those of SCALAR_GROUPS stay float32
    shape: tuple[int, ...] = ()  # with_shapes fills it in


SCALAR_GROUPS = ("scalar", "stream", "mix")  # groups that stay float32 in the forward pass
STACKED = ("attention", "blocks")  # parts of the table whose first axis is the layer


def normal(std):
    """First values: normal, of this standard deviation."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def uniform(std):
    """First values: uniform around 0, of this standard deviation."""
    return lambda key, shape: 3**0.5 * std * jax.random.uniform(key, shape, minval=-1, maxval=1)


def constant(value):
    """First values: all the same."""
    return lambda key, shape: jnp.full(shape, value, f32)


def axis_sizes(cfg):
    """{axis: size} of the words in Spec.axes."""
    return {
        "L": cfg.num_layers,
        "I": cfg.num_layers - len(set(cfg.mlp_only)),
        "J": len(cfg.skips),
        "D": cfg.model_dim,
        "F": cfg.mlp_dim,
        "H": cfg.num_heads,
        "HK": cfg.num_heads * cfg.head_dim,
        "GK": cfg.kv_heads * cfg.head_dim,
        "E": cfg.gate_dims,
        "Q": cfg.copy_dim,
        "2Q": 2 * cfg.copy_dim,
        "V": cfg.padded_vocab,
        "smear": int(cfg.smear),
        "copy": int(cfg.copy_dim > 0),
        "backout": len(cfg.backout),
    }


def with_shapes(specs, sizes):
    """The table with every Spec.shape filled in from {axis: size}, without what has no size."""
    table = {}
    for name, spec in specs.items():
        if isinstance(spec, dict):
            table[name] = with_shapes(spec, sizes)
            continue
        shape = tuple(sizes[axis] for axis in spec.axes.split())
        if 0 not in shape:
            table[name] = replace(spec, shape=shape)
    return table


def param_specs(cfg):
    """Config -> the weight table, a nested dict of Spec. A row of no size is left out.

    w_down begins at zero (records 3 to 8; gain 0.009) and w_out does not (record 64), so blocks
    start as attention alone.
    """
    matrix = uniform(0.5 * cfg.model_dim**-0.5)
    table_row = normal(0.005)
    specs = {
        "embed": Spec("V D", "V", table_row, "embed"),
        "head": Spec("V D", "V", table_row, "head"),
        "attention": {
            "w_q": Spec("I D HK", "HK", matrix, "muon"),
            "w_k": Spec("I D GK", "GK", matrix, "muon"),
            "w_v": Spec("I D GK", "GK", matrix, "muon"),
            "w_out": Spec("I HK D", "HK", matrix, "muon"),
            "gate": Spec("I E H", "", constant(0.0), "gate"),
            # learned weights of the stream, of attention's output (in the record 0.5 at first) and
            # of the first embedding, which re-enters (records 9, 45, 73); gain of all 0.042
            "x_mix": Spec("I", "", constant(1.1**0.5), "stream"),
            "y_mix": Spec("I", "", constant(1.0), "mix"),
            "x0_mix": Spec("I", "", constant(0.0), "mix"),
        },
        "blocks": {
            "w_up": Spec("L D F", "F", matrix, "muon"),
            "w_down": Spec("L F D", "F", constant(0.0), "muon_down"),
            "x_mix": Spec("L", "", constant(1.1**0.5), "stream"),
            "y_mix": Spec("L", "", constant(1.0), "mix"),
        },
        "skip_mix": Spec("J", "", constant(-1.5), "scalar"),
        "skip_gate": Spec("E J", "", constant(0.0), "skip_gate"),
        "smear_mix": Spec("smear", "", constant(0.0), "scalar"),
        "smear_gate": Spec("E smear", "", constant(0.0), "smear_gate"),
        "backout_mix": Spec("backout", "", constant(0.5), "scalar"),
        "copy_qk": Spec("D 2Q", "2Q", uniform(cfg.model_dim**-0.5), "copy"),
        "copy_sink": Spec("Q copy", "", normal(128**-0.5), "copy"),
        "copy_logit": Spec("D copy", "", constant(0.0), "copy"),
    }
    return with_shapes(specs, axis_sizes(cfg))


def split_axis(spec, num_devices):
    """The number of the split axis; None where each device has a copy."""
    axes = spec.axes.split()
    if spec.split not in axes:
        return None
    axis = axes.index(spec.split)
    return axis if spec.shape[axis] % num_devices == 0 else None


def count_params(specs):
    """Numbers in all weights of a table."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))


def name_of(path):
    """A weight's name in checkpoints: "attention/w_q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init_params(key, specs):
    """First values, keyed by name: adding a row leaves every other weight's value as it was."""

    def init(path, spec):
        leaf_key = jax.random.fold_in(key, zlib.crc32(name_of(path).encode()))
        return spec.init(leaf_key, spec.shape).astype(f32)

    return jax.tree.map_with_path(init, specs)


def unstack(weights):
    """Stacked weights -> lists of per-layer dicts.

    Their gradients are then stacked once; those of slices of a stack would be summed L times.
    """
    layers = dict(weights)
    for part in set(STACKED) & set(weights):
        num_layers = len(jax.tree.leaves(weights[part])[0])
        layers[part] = [{k: w[i] for k, w in weights[part].items()} for i in range(num_layers)]
    return layers


def restack(weights):
    """The inverse of unstack."""
    stacks = dict(weights)
    for part in set(STACKED) & set(weights):
        stacks[part] = tree_map(lambda *w: jnp.stack(w), *weights[part])
    return stacks


# ---- Model ---------------------------------------------------------------------------------------
# A GPT with pre-norm blocks, ReLU^2 MLPs, windows, and normed queries and keys (arXiv:2010.04245,
# records 3 to 8).


def rms_norm(x):
    """x / rms(x) over the last axis, in float32, without parameters (arXiv:1910.07467)."""
    y = x.astype(f32)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def weighted_sum(dtype, *terms):
    """Sum of scale * x over terms (scale, x), in float32: how streams and shortcuts are mixed."""
    return sum(scale * x.astype(f32) for scale, x in terms).astype(dtype)


def before(x_BTD):
    """Each position's left neighbour; zeros at the first."""
    return jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def window_of(layer, stage, cfg):
    """Tokens a layer looks back in a stage."""
    return (stage.long if layer in cfg.long_layers else stage.short) or stage.seq_len


def rotary(num_positions, stage, cfg):
    """(cos, sin) [S, K/2] of half-RoPE (arXiv:2104.09864; gain 0.041, two seeds); and q.k's scale.

    Dim j turns with dim j + K/2. Half of these pairs turn at rates from 1 down to 1/1024 per
    token, the others stand still. Where the longest window grows from stage to stage, YaRN
    (arXiv:2309.00071, as in record 31; gain -0.013, two seeds) slows the pairs that turn less than
    32 times in it, by up to the growth, and sharpens the scores. Validation takes the table of the
    last stage.
    """
    rate_K4 = 1024.0 ** -np.linspace(0, 1, cfg.head_dim // 4)
    scale = cfg.attn_scale
    stages = cfg.stages[: cfg.stages.index(stage) + 1] if stage in cfg.stages else cfg.stages
    layers = range(cfg.num_layers)
    longest = [max(window_of(i, each, cfg) for i in layers) for each in stages]
    for old, new in itertools.pairwise(itertools.accumulate(longest, max)):
        keep = np.clip((old * rate_K4 / (2 * np.pi) - 1) / 31, 0, 1)
        rate_K4 = rate_K4 * (keep + (1 - keep) * old / new)
        scale *= 1 + 0.2 * math.log(new / old)
    angle_SK = np.outer(np.arange(num_positions), np.pad(rate_K4, (0, len(rate_K4))))
    return np.cos(angle_SK).astype(np.float32), np.sin(angle_SK).astype(np.float32), scale


def rotate(x_BTHK, cos_TK, sin_TK):
    """Turn dims (j, j + K/2) of each head by its position's angles."""
    cos, sin = (table[None, :, None] for table in (cos_TK, sin_TK))
    a, b = jnp.split(x_BTHK.astype(f32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x_BTHK.dtype)


def softmax_average(q_BGRTK, k_BGSK, v_BGSK, visible_BTS):
    """softmax(q k) v over the visible keys, [B, G, R, T, K]. R query heads share a key head.

    Scores are at most rotary's scale * head_dim, which is small, so exp needs no maximum. (The
    gradient of jax.nn.dot_product_attention would multiply float32.)
    """
    score_BGRTS = matmul("BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK, f32)
    exp_BGRTS = jnp.where(visible_BTS[:, None, None], jnp.exp(score_BGRTS), 0)
    sum_BGRT1 = jnp.sum(exp_BGRTS, axis=-1, keepdims=True)
    return (matmul("BGRTS,BGSK->BGRTK", exp_BGRTS, v_BGSK) / sum_BGRT1).astype(v_BGSK.dtype)


def gated(y_BTN, gate_BTH):
    """Each head's part of y times its gate."""
    y_BTHK = y_BTN.reshape(*gate_BTH.shape, -1) * gate_BTH[..., None]
    return y_BTHK.reshape(y_BTN.shape).astype(y_BTN.dtype)


def first_keys(document_BT, window):
    """The first key that each query sees, [B, T]: within the window and the document."""
    return jnp.maximum(document_BT, jnp.arange(document_BT.shape[1])[None] - window)


def query_blocks(first_BT, last_1T, window):
    """(queries, keys, visible_BTS) of blocks of at most 512 queries: two slices and a mask.

    The keys are all that a window can reach. Query t sees the keys first_BT[:, t] .. last_1T[:, t].
    """
    num_tokens = first_BT.shape[1]
    block = min(512, -(-num_tokens // 2))
    for begin in range(0, num_tokens, block):
        here = slice(begin, begin + block)
        keys = slice(max(0, begin - window), begin + block)
        key_11S = jnp.arange(num_tokens)[None, None, keys]
        visible_BTS = (key_11S >= first_BT[:, here, None]) & (key_11S <= last_1T[:, here, None])
        yield here, keys, visible_BTS


def heads_of(q_BTN, k_BTN, v_BTN, table, cfg):
    """Raw projections -> q [B, T, H, K], k and v [B, T, G, K]: q and k normed and turned, q scaled.

    table is rotary's.
    """
    cos_TK, sin_TK, scale = table
    heads = "B T (H K) -> B T H K"
    q_BTHK, k_BTGK, v_BTGK = (rearrange(z, heads, K=cfg.head_dim) for z in (q_BTN, k_BTN, v_BTN))
    q_BTHK = rotate(rms_norm(q_BTHK), cos_TK, sin_TK) * scale
    k_BTGK = rotate(rms_norm(k_BTGK), cos_TK, sin_TK)
    return (z.astype(cfg.compute_dtype) for z in (q_BTHK, k_BTGK, v_BTGK))


def attention_xla(q_BTN, k_BTN, v_BTN, gate_BTH, document_BT, table, window, cfg):
    """Gated attention, [B, T, HK], for any machine: causal, within the window and the document.

    q [B, T, HK], k and v [B, T, GK] are raw projections; document_BT tells where each position's
    document begins; table is rotary's.
    """
    q_BTHK, k_BTGK, v_BTGK = heads_of(q_BTN, k_BTN, v_BTN, table, cfg)
    q_BGRTK = rearrange(q_BTHK, "B T (G R) K -> B G R T K", G=cfg.kv_heads)
    k_BGSK, v_BGSK = k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)
    first_BT = first_keys(document_BT, window)
    position_1T = jnp.arange(q_BTN.shape[1])[None]
    outputs = []
    for here, keys, visible_BTS in query_blocks(first_BT, position_1T, window):
        k, v = k_BGSK[:, :, keys], v_BGSK[:, :, keys]
        outputs.append(softmax_average(q_BGRTK[:, :, :, here], k, v, visible_BTS))
    y_BGRTK = jnp.concatenate(outputs, axis=3)
    return gated(rearrange(y_BGRTK, "B G R T K -> B T (G R K)"), gate_BTH)


def attention_cudnn(q_BTN, k_BTN, v_BTN, gate_BTH, document_BT, table, window, cfg):
    """Gated attention by cuDNN's kernels, for GPUs.

    They know causality and window, and skip what lies outside. The mask adds the documents.
    Predicted for an H100, stage 2, by the roofline: 427 ms a step, attention_xla 596.
    """
    q_BTHK, k_BTGK, v_BTGK = heads_of(q_BTN, k_BTN, v_BTN, table, cfg)
    key_111S = jnp.arange(q_BTN.shape[1])[None, None, None]
    y_BTHK = jax.nn.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        mask=key_111S >= document_BT[:, None, :, None] if cfg.is_packed else None,
        scale=1.0,
        is_causal=True,
        local_window_size=(window, 0) if window < q_BTN.shape[1] else None,
        implementation="cudnn",
    )
    return gated(rearrange(y_BTHK, "B T H K -> B T (H K)"), gate_BTH)


def attention_band(q_BTN, k_BTN, v_BTN, gate_BTH, document_BT, table, window, cfg):
    """Gated attention by the kernels at the end of this file, for rows of a multiple of 256 tokens.

    cos and sin are in compute_dtype.
    """
    cos_TK, sin_TK, scale = table
    length = q_BTN.shape[1]
    band = Band(length, window, math.gcd(length, 1024), scale, cfg.num_heads)
    inputs = (z.astype(cfg.compute_dtype) for z in (q_BTN, k_BTN, v_BTN, cos_TK, sin_TK))
    first_BT = first_keys(document_BT, window)
    return banded((first_BT[:, None, None], gate_BTH.mT[:, :, None], *inputs), band)


ATTENTION = {"xla": attention_xla, "cudnn": attention_cudnn, "band": attention_band}


def compute_capability(device):
    """Of an NVIDIA GPU, such as 9.0 of an H100; 0.0 of any other device."""
    stated = str(getattr(device, "compute_capability", ""))
    return float(stated) if re.fullmatch(r"\d+\.\d+", stated) else 0.0


def this_machine():
    """(backend, compute capability): what attention is chosen by."""
    return jax.default_backend(), compute_capability(jax.devices()[0])


def heads_of_128(cfg):
    """The flags that give as many dims in heads of 128; "" where none do."""
    share = cfg.head_dim / 128
    if cfg.num_kv_heads or cfg.num_heads * cfg.head_dim % 128:
        return ""
    flags = f"--num_heads={cfg.num_heads * share:.0f} --head_dim=128"
    return f"{flags} --attn_scale={cfg.attn_scale * share**0.5:.3g}"


def lacking(cfg, backend, capability):
    """{a name in ATTENTION: what it wants that is not there, "" if nothing}, the fastest first."""
    rows = [stage.seq_len for stage in (*cfg.stages, cfg.val)]
    is_bfloat16 = "--compute_dtype=bfloat16", cfg.compute_dtype == "bfloat16"
    longest = (1 << 21) // max(cfg.head_dim, cfg.copy_dim)  # keys of a row fit into fast memory
    widest = 256 if int(capability) == 9 else 128  # heads whose gradient every cuDNN has
    flags = heads_of_128(cfg)
    narrow_heads = f"heads of at most {widest}" + f", such as {flags}" * bool(flags)
    wants = {
        "band": [
            ("a TPU", backend == "tpu"),
            is_bfloat16,
            ("multiples of 128 as head_dim and copy_dim", (cfg.head_dim | cfg.copy_dim) % 128 == 0),
            (f"rows of a multiple of {TILE} tokens", all(row % TILE == 0 for row in rows)),
            (f"rows of at most {longest} tokens", max(rows) <= longest),
        ],
        "cudnn": [
            ("an NVIDIA GPU of compute capability 8.0 or more", capability >= 8),
            # before, JAX also makes the gradient of the mask, [T, T] of each row (jax #39512)
            ("JAX 0.11.2 or newer", jax.__version_info__ >= (0, 11, 2)),
            is_bfloat16,
            # whether its gradient repeats to the bit, nobody has tried
            ("no --deterministic", not cfg.deterministic),
            (narrow_heads, cfg.head_dim <= widest),
            ("a multiple of 8 as head_dim", cfg.head_dim % 8 == 0),
            ("rows of an even number of tokens", all(row % 2 == 0 for row in rows)),
        ],
    }
    lacks = {}
    for name, ((device, is_here), *conditions) in wants.items():
        missing = [wanted for wanted, is_there in conditions if not is_there]
        lacks[name] = ", ".join(missing) if is_here else device
    return lacks | {"xla": ""}


def choose_attention(cfg, backend, capability=0.0):
    """The Config with --attention=auto settled. Raises UsageError where a named one cannot run."""
    lacks = lacking(cfg, backend, capability)
    if cfg.attention == "auto":
        return replace(cfg, attention=next(name for name in lacks if not lacks[name]))
    lack = lacks[cfg.attention]
    require(not lack, f"--attention={cfg.attention}: wanted {lack}")
    return cfg


def attention_note(cfg, backend, capability):
    """A line for the log: which attention runs, and why it is not the one made for this machine."""
    best = {"tpu": "band", "gpu": "cudnn"}.get(backend, "xla")
    lack = lacking(cfg, backend, capability)[best]
    return f"attention: {cfg.attention}" + f"; {best} wants {lack}" * bool(lack)


def offset_keys(k_BSN, starts_BS, cfg):
    """Partial key offset (record 49): the dims that RoPE leaves still come from the token before.

    Where a document starts they are 0. So one layer can look up what followed an earlier
    occurrence. The record shifts after the norm, across documents; before the norm, the score
    stays bounded. Gain 0.118; after 8M tokens, one seed, 0.062; on code 0.151.
    """
    still_N = np.arange(k_BSN.shape[-1]) // (cfg.head_dim // 4) % 2 == 1
    left_BSN = jnp.where(starts_BS[:, :, None], 0, before(k_BSN))
    return jnp.where(still_N[None, None], left_BSN, k_BSN)


def gate(x_BTD, w_EH):
    """Between 0 and 1 for each column of w, from the first few dims of x.

    Without weights one half, which is what weights of zero begin with.
    """
    if w_EH is None:
        return 0.5
    return jax.nn.sigmoid(matmul("BTE,EH->BTH", x_BTD[:, :, : len(w_EH)], w_EH, f32))


def attention(x_BTD, p, attend, cfg):
    """One layer's self-attention: attend(q, k, v, gate) -> y between the projections.

    The gates are record 28's; gain of all gates 0.009.
    """
    gate_BTH = jnp.ones((*x_BTD.shape[:2], cfg.num_heads), f32)
    if "gate" in p:
        gate_BTH = gate(x_BTD, p["gate"])
    qkv = (matmul("BTD,DN->BTN", x_BTD, p[name]) for name in ("w_q", "w_k", "w_v"))
    y_BTN = attend(*qkv, gate_BTH)
    return matmul("BTN,ND->BTD", y_BTN, p["w_out"], x_BTD.dtype)


@jax.custom_jvp
def relu_squared(x):
    """arXiv:2109.08668; gain over GELU 0.016."""
    return jnp.square(jax.nn.relu(x))


@relu_squared.defjvp
def _(primals, tangents):  # from x alone: no mask is kept for the backward pass
    (x,), (dx,) = primals, tangents
    return relu_squared(x), 2 * jax.nn.relu(x) * dx


def mlp(x_BTD, p):
    """One block's MLP: [B, T, D] -> [B, T, D]."""
    h_BTF = relu_squared(matmul("BTD,DF->BTF", x_BTD, p["w_up"]))
    return matmul("BTF,FD->BTD", h_BTF, p["w_down"])


def document_starts(tokens_BT, cfg):
    """Where each position's document begins: at a BOS where rows are packed, else at 0."""
    position_1T = jnp.arange(tokens_BT.shape[1])[None]
    starts_BT = (tokens_BT == cfg.bos_id) & cfg.is_packed
    return lax.cummax(jnp.where(starts_BT, position_1T, 0), axis=1)


def attend_row(tokens_BT, stage, cfg):
    """attend(layer, q, k, v, gate) over whole rows: within the window and the document."""
    position_1T = jnp.arange(tokens_BT.shape[1])[None]
    table = rotary(tokens_BT.shape[1], stage, cfg)
    document_BT = document_starts(tokens_BT, cfg)

    def attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH):
        window = window_of(layer, stage, cfg)
        if layer in cfg.offset_layers:
            k_BTN = offset_keys(k_BTN, document_BT == position_1T, cfg)
        core = ATTENTION.get(cfg.attention, attention_xla)  # xla where auto was not settled
        return core(q_BTN, k_BTN, v_BTN, gate_BTH, document_BT, table, window, cfg)

    return attend


def forward(weights, tokens_BT, embedded_BTD, stage, cfg, attend=None):
    """Tokens and their embeddings -> normed final activations [B, T, D].

    weights: compute copies, layers unstacked. embedded_BTD: weights["embed"][tokens_BT].
    attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH) -> y_BTN stands in for attend_row's: one with a KV
    cache, say (smear and key offset read the token before as well). A sublayer is
    x <- x_mix x + y_mix f(rms_norm(x)) (+ x0_mix x0), with learned scalars.
    """
    attend = attend or attend_row(tokens_BT, stage, cfg)
    mix = functools.partial(weighted_sum, cfg.stream_dtype)
    e_BTD = embedded_BTD.astype(cfg.stream_dtype)
    if cfg.smear:  # a share of the embedding before, across documents as in the record
        # (record 34; gain 0.020, after 8M tokens, one seed, -0.002)
        share_BT1 = weights["smear_mix"][0] * gate(e_BTD, weights.get("smear_gate"))
        e_BTD = mix((1, e_BTD), (share_BT1, before(e_BTD)))
    x_BTD = x0_BTD = rms_norm(e_BTD)
    late = {reader: source for source, reader in cfg.late_inputs}
    attentions = iter(weights["attention"])
    after = {}  # block -> the stream after it
    for i, p in enumerate(weights["blocks"]):
        for j, (source, destination) in enumerate(cfg.skips):
            if destination == i:  # records 11, 45 and 55; gain -0.001
                w_E1 = weights["skip_gate"][:, j : j + 1] if cfg.gate_dims else None
                share_BT1 = 2 * jax.nn.sigmoid(weights["skip_mix"][j]) * gate(x0_BTD, w_E1)
                x_BTD = mix((1, x_BTD), (share_BT1, after[source]))
        if i not in cfg.mlp_only:
            a = next(attentions)
            # a layer that reads an earlier stream: record 77; gain in a model of 4 layers -0.001
            read_BTD = after[late[i]] if i in late else x_BTD
            y_BTD = attention(rms_norm(read_BTD), a, functools.partial(attend, i), cfg)
            x_BTD = mix((a["x_mix"], x_BTD), (a["y_mix"], y_BTD), (a["x0_mix"], x0_BTD))
        x_BTD = mix((p["x_mix"], x_BTD), (p["y_mix"], mlp(rms_norm(x_BTD), p)))
        after[i] = x_BTD
    for j, i in enumerate(cfg.backout):  # record 40; gain 0.003
        x_BTD = mix((1, x_BTD), (-weights["backout_mix"][j], after[i]))
    return rms_norm(x_BTD)


def softcap(z, cfg):
    """Soft cap of logits (arXiv:2408.00118), float32.

    The default is 23 sigmoid((z + 5) / 7.5) - 11.5 (record 54). Gain over 15 tanh(z / 15): -0.036;
    in the demo 0.000; after 8M tokens, two seeds, 0.038 and 0.000.
    """
    if not cfg.softcap:
        return z
    height, width, shift = cfg.softcap
    return height * jnp.tanh((z + shift) / width)


def softcapped_logits(x_ND, head_VD, cfg):
    """Float32 logits [N, V]. Ids that pad the table get no probability."""
    return softcap(matmul("ND,VD->NV", x_ND, head_VD, f32), cfg) + padding(cfg)[None]


def padding(cfg):
    """What the logits of ids that pad the table get, [V]: far below all, yet its square finite."""
    return jnp.where(jnp.arange(cfg.padded_vocab) < cfg.vocab_size, 0.0, -1e15)


def _softmax_nats_forward(x_ND, head_VD, terms, nats_of, cfg, offset_V):
    """(softmax_nats, its gradients by x, head and terms), by blocks of head_block tokens.

    With logits z = x head^T, l = softcap(z) and Z = sum_v exp(l_v + offset_v), of a token:
        d(log Z) / dz = exp(l + offset) l' / Z
        l' = (height / width) (1 - (l / height)^2)
    Of [N, V] only p = exp(l + offset) (1 - (l / height)^2) is stored, in head_VD's dtype. The other
    factors are a number per token and go to the narrow side of two matmuls. The label is no part
    of it (predicted: 16.2 ms a step, 21.6 with the label in it).
    """
    height, width, _ = cfg.softcap or (1e9, 1e9, 0)  # so high a cap has a slope of 1

    def block(totals, rows):
        x_block_ND, x_block_DN, terms_N = rows
        logits_NV = softcap(matmul("ND,VD->NV", x_block_ND, head_VD, f32), cfg)
        shifted_NV = logits_NV + offset_V[None]
        top_N1 = 0.0  # exp of capped logits needs no maximum
        if height > 60:
            top_N1 = jnp.max(shifted_NV, axis=1, keepdims=True)
        exp_NV = jnp.exp(shifted_NV - top_N1)
        p_NV = (exp_NV * (1 - jnp.square(logits_NV / height))).astype(head_VD.dtype)
        sum_N1 = jnp.sum(exp_NV, axis=1, keepdims=True)
        p_NV, sum_N1 = lax.optimization_barrier((p_NV, sum_N1))  # else XLA recomputes the logits
        log_z_N = (jnp.log(sum_N1) + top_N1)[:, 0]
        nats_N, pull_back = jax.vjp(nats_of, log_z_N, terms_N)
        slope_N, dterms = pull_back(jnp.ones_like(nats_N))
        scale_N1 = slope_N[:, None] / sum_N1 * (height / width)
        dhead_DV = product("DN,NV->DV", (x_block_DN * scale_N1.T).astype(head_VD.dtype), p_NV)
        dx_ND = product("NV,VD->ND", p_NV, head_VD) * scale_N1
        return (totals[0] + jnp.sum(nats_N), totals[1] + dhead_DV), (dx_ND, dterms)

    size = cfg.head_block if len(x_ND) % cfg.head_block == 0 else len(x_ND)
    x_CND = rearrange(x_ND, "(C N) D -> C N D", N=size)
    terms_CN = tree_map(lambda z_N: z_N.reshape(-1, size), terms)
    # x goes in both ways round: XLA's CPU would widen a bf16 matmul that sums over the first axis
    start = f32(0), jnp.zeros(head_VD.shape[::-1], f32)
    (nats, dhead_DV), (dx_CND, dterms_CN) = lax.scan(block, start, (x_CND, x_CND.mT, terms_CN))
    dx_ND = dx_CND.reshape(x_ND.shape).astype(x_ND.dtype)
    dterms = tree_map(jnp.ravel, dterms_CN)
    return nats, (dx_ND, dhead_DV.T.astype(head_VD.dtype), dterms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def softmax_nats(x_ND, head_VD, terms, nats_of, cfg, offset_V):
    """Sum over tokens of nats_of(log Z, terms), where Z = sum_v exp(logit_v + offset_v).

    terms: a dict of arrays [N]. With candidates head and offset have P rows. The gradients are made
    with the value, in one pass.
    """
    return _softmax_nats_forward(x_ND, head_VD, terms, nats_of, cfg, offset_V)[0]


def _softmax_nats_backward(nats_of, cfg, saved, g):
    return *tree_map(lambda d: (g * d).astype(d.dtype), saved), None


softmax_nats.defvjp(_softmax_nats_forward, _softmax_nats_backward)


def plain_nats(log_z_N, terms):
    """weight * log Z of each token. gpt_loss takes the targets' logits off."""
    return terms["weight"] * log_z_N


# The copy pointer (CPLM, modded-nanogpt pull request 379): a head that looks for earlier positions
# of the document where the model expected what it expects now, and copies what followed them. Gain
# 0.171 after 1M tokens, two seeds, nothing on bytes. Predicted: 57.1 ms a step, 56.0 without.

COPY_WINDOW = 2048  # tokens that it looks back


def copy_sums_xla(q_BTQ, k_BTQ, targets_BT, first_BT, window):
    """(sum, hit) [B, T] of exp(q.k) over the keys first_BT[:, t] .. t - 1, for any machine.

    hit counts only keys with the query's target. q and k are normed, so exp needs no maximum.
    """
    before_1T = jnp.arange(q_BTQ.shape[1])[None] - 1
    sums = []
    hits = []
    for here, keys, visible_BTS in query_blocks(first_BT, before_1T, window):
        score_BTS = matmul("BTQ,BSQ->BTS", q_BTQ[:, here], k_BTQ[:, keys], f32)
        exp_BTS = jnp.where(visible_BTS, jnp.exp(score_BTS), 0)
        same_BTS = targets_BT[:, here, None] == targets_BT[:, None, keys]
        sums.append(jnp.sum(exp_BTS, axis=2))
        hits.append(jnp.sum(jnp.where(same_BTS, exp_BTS, 0), axis=2))
    return jnp.concatenate(sums, axis=1), jnp.concatenate(hits, axis=1)


def copy_sums_band(q_BTQ, k_BTQ, targets_BT, first_BT, window):
    """The same as copy_sums_xla by the kernels, for rows of a multiple of 256 tokens."""
    length = q_BTQ.shape[1]
    band = Band(length, window, math.gcd(length, 1024), 1.0, 1)
    sums = copied(first_BT[:, None, None], targets_BT[:, None, None], q_BTQ, k_BTQ, band)
    return tuple(sum_B11T[:, 0, 0] for sum_B11T in sums)


COPY_SUMS = {"xla": copy_sums_xla, "band": copy_sums_band}


def copy_queries_and_keys(x_BTD, weights, cfg):
    """Both [B, T, Q], of unit rms; queries are scaled."""
    qk_BTN = matmul("BTD,DN->BTN", x_BTD, weights["copy_qk"])
    q_BTQ, k_BTQ = map(rms_norm, jnp.split(qk_BTN, 2, axis=-1))
    return q_BTQ * cfg.copy_dim**-0.5, k_BTQ


def copy_sink_and_logit(q_BTQ, x_BTD, weights, cfg):
    """(the sink's exp(q.k), the logit of the pointer), [B, T]."""
    sink_BT = jnp.exp(matmul("BTQ,QN->BTN", q_BTQ, weights["copy_sink"], f32)[:, :, 0])
    logit_BT = softcap(matmul("BTD,DN->BTN", x_BTD, weights["copy_logit"], f32)[:, :, 0], cfg)
    return sink_BT, logit_BT


def copy_terms(x_BTD, weights, tokens_BT, targets_BT, cfg):
    """What mixture_nats asks of the pointer: {name: [B, T]}."""
    q_BTQ, k_BTQ = copy_queries_and_keys(x_BTD, weights, cfg)
    sink_BT, pointer_BT = copy_sink_and_logit(q_BTQ, x_BTD, weights, cfg)
    first_BT = first_keys(document_starts(tokens_BT, cfg), COPY_WINDOW)
    sums = COPY_SUMS.get(cfg.attention, copy_sums_xla)
    sum_BT, hit_BT = sums(q_BTQ, k_BTQ, targets_BT, first_BT, COPY_WINDOW)
    total_BT = sum_BT + sink_BT
    return {
        "pointer": pointer_BT,
        "hit_share": hit_BT / total_BT,
        "sink_share": sink_BT / total_BT,
    }


def mixture_nats(log_z_N, terms):
    """As plain_nats, but the next token's nats are those of the mixture with the pointer.

    alpha = e^a / (Z + e^a), where a is the pointer's logit and l the target's. hit and sink are the
    pointer's shares on positions that the target followed, and on its sink.
        p = e^l / Z (1 - alpha (1 - sink)) + alpha hit
        -log p = log Z - l + log(1 + e^a / Z) - log(1 + sink e^a / Z + hit e^(a - l))
    """
    odds_N = jnp.exp(terms["pointer"] - log_z_N)
    label_odds_N = jnp.exp(terms["pointer"] - terms["label"])
    copied_N = terms["sink_share"] * odds_N + terms["hit_share"] * label_odds_N
    mixed_N = jnp.log1p(odds_N) - jnp.log1p(copied_N)
    return terms["weight"] * log_z_N + terms["next_weight"] * mixed_N


def copy_log_probs(logits_NV, exp_NS, next_NS, sink_N, pointer_N):
    """Log-probabilities [N, V] of the same mixture.

    exp_NS: exp(q.k), 0 where the key is not visible. next_NS: the token after each key.
    """
    total_N1 = jnp.sum(exp_NS, axis=1, keepdims=True) + sink_N[:, None]
    query_N1 = jnp.arange(len(exp_NS))[:, None]
    hit_NV = jnp.zeros_like(logits_NV).at[query_N1, next_NS].add(exp_NS / total_N1)
    log_z_N1 = jax.nn.logsumexp(logits_NV, axis=1, keepdims=True)
    odds_N1 = jnp.exp(pointer_N[:, None] - log_z_N1)
    kept_N1 = jnp.log1p(odds_N1 * sink_N[:, None] / total_N1)
    mixed_NV = jnp.logaddexp(logits_NV - log_z_N1 + kept_N1, jnp.log(odds_N1 * hit_NV))
    return mixed_NV - jnp.log1p(odds_N1)


# Rows that gpt_loss gets looked up, so that their gradients are summed once a step: {name: (table,
# ids)}. inputs are rows of the embedding, labels those of the head that belong to the targets.
LOOKUPS = {"inputs": ("embed", "tokens"), "labels": ("head", "targets")}


def gpt_loss(weights, batch, key, stage, cfg):
    """(summed nats, summed weight) of a batch: -log p(target), each times its weight.

    batch: "tokens", "targets" int32 [B, T] and "weights" [B, T], from inputs_and_targets; "step";
    and by LOOKUPS "inputs", "labels" [B, T, D], rows of embed and head. In a stage with candidates
    weights["head"] has their rows alone, and "offsets" [P] are added to their logits. key is for
    models with randomness; this one has none. The same logits also predict the second and later
    next tokens (multi-token prediction, record 53; gain 0.018); the loss is then a weighted mean.
    """
    x_BTD = forward(weights, batch["tokens"], batch["inputs"], stage, cfg)
    x_BTD = x_BTD.astype(weights["head"].dtype)
    shares = [1.0, *ahead_weights(batch["step"], stage, cfg)]
    nats = 0.0
    weights_BT = []
    logits_BT = []
    for k, share in enumerate(shares):  # rolled left by k, position t holds the token at t + 1 + k
        weight_BT = jnp.pad(batch["weights"][:, k:], ((0, 0), (0, k))) * (share / sum(shares))
        label_BTD = jnp.roll(batch["labels"], -k, axis=1)
        logit_BT = softcap(jnp.sum(x_BTD.astype(f32) * label_BTD.astype(f32), axis=-1), cfg)
        nats -= jnp.sum(weight_BT * logit_BT)
        weights_BT.append(weight_BT)
        logits_BT.append(logit_BT)
    terms = {"weight": sum(weights_BT), "next_weight": weights_BT[0], "label": logits_BT[0]}
    nats_of = plain_nats
    if cfg.copy_dim:
        nats_of = mixture_nats
        terms |= copy_terms(x_BTD, weights, batch["tokens"], batch["targets"], cfg)
    x_ND = rearrange(x_BTD, "B T D -> (B T) D")
    offset_V = batch.get("offsets", padding(cfg))
    terms = tree_map(jnp.ravel, terms)
    nats += softmax_nats(x_ND, weights["head"], terms, nats_of, cfg, offset_V)
    return nats, jnp.sum(batch["weights"])


def map_logits(function, weights, tokens_BT, others, cfg):
    """function(logits [T, V] of what follows each token, *others) of each row, with its others.

    Float32, with the windows of validation; log-probabilities where there is a copy pointer. One
    row at a time, so that they fit into memory.
    """
    cfg = replace(cfg, attention="xla")  # for rows of any length
    x_BTD = forward(weights, tokens_BT, weights["embed"][tokens_BT], cfg.val, cfg)
    x_BTD = x_BTD.astype(weights["head"].dtype)
    position_T = jnp.arange(tokens_BT.shape[1])
    pointer = ()
    if cfg.copy_dim:
        first_BT = first_keys(document_starts(tokens_BT, cfg), COPY_WINDOW)
        q_BTQ, k_BTQ = copy_queries_and_keys(x_BTD, weights, cfg)
        sink_and_logit = copy_sink_and_logit(q_BTQ, x_BTD, weights, cfg)
        pointer = first_BT, q_BTQ, k_BTQ, *sink_and_logit

    def row(inputs):
        x_TD, tokens_T, pointer, others = inputs
        logits_TV = softcapped_logits(x_TD, weights["head"], cfg)
        if pointer:
            first_T, q_TQ, k_TQ, sink_T, pointer_T = pointer
            key_1S = position_T[None]
            visible_TS = (key_1S >= first_T[:, None]) & (key_1S < position_T[:, None])
            exp_TS = jnp.where(visible_TS, jnp.exp(matmul("TQ,SQ->TS", q_TQ, k_TQ, f32)), 0)
            next_TS = jnp.broadcast_to(jnp.roll(tokens_T, -1)[None], exp_TS.shape)
            logits_TV = copy_log_probs(logits_TV, exp_TS, next_TS, sink_T, pointer_T)
        return function(logits_TV, *others)

    return lax.map(row, (x_BTD, tokens_BT, pointer, others))


def next_logits(weights, tokens_BT, cfg):
    """Logits [B, T, V] of what follows each token, as map_logits."""
    return map_logits(lambda logits_TV: logits_TV, weights, tokens_BT, (), cfg)


# ---- Schedules -----------------------------------------------------------------------------------
# Pure functions of the step. Values are traced inside the compiled step. Shapes, which decide which
# program runs, are Python numbers.


def ramp(step, start, end):
    """0 until start, then straight up to 1 at end."""
    clip = np.clip if isinstance(step, int) else jnp.clip  # a Python step needs no device
    return clip((step - start) / max(end - start, 1e-9), 0.0, 1.0)


def stage_at(step, cfg):
    """The number of the stage that a step, counted from 0, belongs to."""
    return bisect.bisect_right(cfg.bounds, step) - 1


def tokens_before(step, cfg):
    """Training tokens of all steps before this one."""
    tokens = 0
    for stage, first, last in cfg.spans:
        tokens += max(0, min(last, step) - first) * stage.batch_tokens
    return tokens


def lr_scale(step, stage, cfg):
    """What multiplies every learning rate: the stage's lr, after a linear rise over warmup_steps.

    Over cooldown_frac it turns linearly into final_lr_scale, whatever the stage, and stays there
    for the last steps.
    """
    last = (1 - cfg.final_frac) * cfg.steps
    share = 1.0 - ramp(step, (1 - cfg.cooldown_frac) * last, last)
    warmup = ramp(step, -1.0, float(cfg.warmup_steps))
    return (stage.lr * share + cfg.final_lr_scale * (1 - share)) * warmup


def muon_momentum(step, cfg):
    """From low to high over the first steps, and back over the last.

    In a run that is shorter than the rise it goes back by as much as it rose.
    """
    low, high, up, down = cfg.muon_momentum
    fall_start = cfg.steps - down
    highest = low + (high - low) * ramp(fall_start, 0.0, max(up, 1.0))
    rise = low + (high - low) * ramp(step, 0.0, max(up, 1.0))
    return rise + (low - highest) * ramp(step, fall_start, float(cfg.steps))


def ahead_weights(step, stage, cfg):
    """Loss weights of the second and later next tokens. The last one falls to 0 over the stage."""
    if not stage.ahead:
        return []
    i = cfg.stages.index(stage)
    *others, last = stage.ahead
    return [*others, last * (1.0 - ramp(step, cfg.bounds[i], cfg.bounds[i + 1]))]


# ---- Optimizers ----------------------------------------------------------------------------------
# A rule says how a group of weights is updated. Its `slots` names the optimizer state of a weight,
# its `direction` turns a gradient into a step, without the learning rate. Another optimizer is
# another class with lr, wd, cautious and these two, and a row in optimizer_rules. In a tied stage
# the embedding is the head, and the head's rule moves it. Cautious decay (arXiv:2510.12402, records
# 43 and 50; gain of decay 0.004, of caution -0.004) shrinks a weight only where the step does too.


def average(decay, mean, new):
    """The running mean, of which `decay` stays."""
    return decay * mean + (1 - decay) * new


class Adam(NamedTuple):
    """Adam (arXiv:1412.6980), bias-corrected, with decoupled decay."""

    lr: float
    wd: float = 0.0  # cautious: lr^2 * wd; plain: lr * wd
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-10
    cautious: bool = True

    def slots(self, spec):
        return {"m": spec, "v": spec}

    def direction(self, grad, slots, step, cfg):
        """(direction, slots). step counts from 0."""
        m = average(self.beta1, slots["m"], grad)
        v = average(self.beta2, slots["v"], grad * grad)
        count = step.astype(f32) + 1
        m_hat = m / (1 - self.beta1**count)
        v_hat = v / (1 - self.beta2**count)
        return m_hat / (jnp.sqrt(v_hat) + self.eps), {"m": m, "v": v}


class Muon(NamedTuple):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with NorMuon's unit scales.

    `direction` is the momentum alone; `update` orthogonalizes all of Muon's matrices together. Its
    weights are stacks [L, M, N] that name a split axis. The largest singular value of a step is
    about lr * sqrt(longer / shorter side).
    """

    lr: float
    wd: float = 0.0
    cautious: bool = True

    def slots(self, spec):
        """The momentum, and a mean square for each index of the split axis."""
        axes = spec.axes.split()
        kept = axes[0], spec.split
        shape = tuple(n if axis in kept else 1 for axis, n in zip(axes, spec.shape, strict=True))
        return {"momentum": spec, "square": replace(spec, shape=shape)}

    def direction(self, grad, slots, step, cfg):
        """Nesterov momentum: an average, then a step ahead along it."""
        momentum = muon_momentum(step, cfg)
        mean = average(momentum, slots["momentum"], grad)
        return average(momentum, mean, grad), slots | {"momentum": mean}


def optimizer_rules(cfg):
    """{group of the weight table: its rule}. Ratios between the rates are the record's."""
    if cfg.optimizer == "adamw":
        rule = Adam(cfg.adamw_lr, 0.0, cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps, False)
        decayed = rule._replace(wd=cfg.adam_wd)
        matrices = dict.fromkeys(("muon", "muon_down", "embed", "head"), decayed)
        return collections.defaultdict(lambda: rule, matrices)
    table = Adam(cfg.adam_lr, cfg.adam_wd, cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps)
    small = Adam(cfg.adam_lr, eps=cfg.adam_eps)
    scalar = Adam(cfg.scalar_lr, eps=cfg.adam_eps)
    return {
        "muon": Muon(cfg.muon_lr, cfg.muon_wd),
        "muon_down": Muon(2 * cfg.muon_lr, cfg.muon_wd / 2),
        "embed": table,
        "head": table,
        "gate": small._replace(wd=cfg.adam_wd / 150),
        "skip_gate": small._replace(lr=cfg.adam_lr / 20),
        "smear_gate": small._replace(lr=cfg.adam_lr / 100),
        "copy": small,
        "scalar": scalar,
        "stream": scalar._replace(beta2=0.95),
        "mix": scalar._replace(lr=cfg.scalar_lr / 5, beta2=0.95),
    }


POLAR_EXPRESS = (  # arXiv:2505.16932, record 38; gain 0.007. Each step suits what the last leaves
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g_MN, dtype=jnp.bfloat16):
    """The semi-orthogonal matrix near each g[..., M, N], whatever its scale (norm above 1e-6).

    Newton-Schulz: odd polynomials drive the singular values towards 1. After five, those above
    0.102 % of the Frobenius norm land in [0.858, 1.142]; in bfloat16 those above 0.2 % in about
    [0.81, 1.14].
    """
    is_tall = g_MN.shape[-2] > g_MN.shape[-1]
    x = g_MN.mT if is_tall else g_MN
    norm = jnp.linalg.norm(x.astype(f32), axis=(-2, -1), keepdims=True)
    x = (x / (1.02 * norm + 1e-6)).astype(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = product("...mn,...kn->...mk", x, x).astype(dtype)
        poly = (b * gram + c * product("...mk,...kn->...mn", gram, gram)).astype(dtype)
        x = (a * x + product("...mk,...kn->...mn", poly, x)).astype(dtype)
    return x.mT if is_tall else x


def orthogonalize_all(matrices, are_split, dtype):
    """Orthogonalize stacks [L, M, N], the split ones by each device's share of the matrices.

    A split stack holds a slice of N of each matrix. Stacks of one shape are one batch. An
    all-to-all trades a slice of every matrix for every slice of some, and back: 1 / devices of the
    bytes that gathering them would move.
    """
    results = [None] * len(matrices)
    batches = collections.defaultdict(list)
    for i, matrix in enumerate(matrices):
        batches[matrix.shape[1:], are_split[i]].append(i)
    for (_, is_split), members in batches.items():
        batch = jnp.concatenate([matrices[i] for i in members]).astype(dtype)
        if is_split:
            spare = -len(batch) % lax.axis_size("data")
            batch = jnp.pad(batch, ((0, spare), (0, 0), (0, 0)))
            batch = lax.optimization_barrier(batch)  # XLA's CPU miscompiles slices without it
            batch = lax.all_to_all(batch, "data", split_axis=0, concat_axis=2, tiled=True)
        batch = orthogonalize(batch, dtype)
        if is_split:
            batch = lax.all_to_all(batch, "data", split_axis=2, concat_axis=0, tiled=True)
        for i in members:
            results[i] = batch[: len(matrices[i])].astype(f32)
            batch = batch[len(matrices[i]) :]
    return results


def equalize_units(x_LMN, square_L1N, is_split, beta2=0.9):
    """NorMuon (arXiv:2510.05491; gain 0.032, after 8M tokens, two seeds, 0.048).

    A unit is an index of N: a hidden unit, a dim of a head. Its step is divided by the root of its
    mean square over the steps; the norm of the matrix is kept. Returns (step, square). The
    record's units of w_out are its outputs.
    """

    def total(z_LMN):
        sums = jnp.sum(z_LMN, axis=(-2, -1), keepdims=True)
        return lax.psum(sums, "data") if is_split else sums

    mean_L1N = jnp.mean(x_LMN * x_LMN, axis=-2, keepdims=True)
    square_L1N = average(beta2, square_L1N, mean_L1N)
    y_LMN = x_LMN * lax.rsqrt(jnp.maximum(square_L1N, 1e-10))
    ratio = total(x_LMN * x_LMN) / jnp.maximum(total(y_LMN * y_LMN), 1e-30)
    return y_LMN * jnp.sqrt(ratio), square_L1N


def split_last(x, spec):
    """A matrix with its split axis last; its own inverse."""
    return x if spec.axes.split()[-1] == spec.split else x.mT


def orthogonal_steps(directions, slots, specs, num_devices, cfg):
    """Muon's steps from its momenta: orthogonalized, then equalized. Yields (step, slots)."""
    are_split = [split_axis(spec, num_devices) is not None and num_devices > 1 for spec in specs]
    wide = list(map(split_last, directions, specs))
    orthogonal = orthogonalize_all(wide, are_split, cfg.compute_dtype)
    for x, spec, slot, is_split in zip(orthogonal, specs, slots, are_split, strict=True):
        x, square = equalize_units(x, split_last(slot["square"], spec), is_split)
        yield split_last(x, spec), slot | {"square": split_last(square, spec)}


def move(p, direction, rule, spec, scale):
    """The weight after a step along direction. scale multiplies the learning rate."""
    lr = scale * rule.lr
    stretch = 1.0
    if isinstance(rule, Muon):
        shorter, longer = sorted(spec.shape[-2:])
        stretch = (longer / shorter) ** 0.5
    decay = rule.wd * p
    if rule.cautious:
        decay *= lr * (direction * p > 0)
    return p - lr * stretch * (direction + decay)


def update(state, grads, stage, specs, rules, num_devices, cfg):
    """One optimizer step on this device's share of every weight. Returns (params, opt_state)."""
    specs, tree = jax.tree.flatten(specs)
    params, grads, slots = map(tree.flatten_up_to, (state.params, grads, state.opt_state))
    rules = [rules[spec.group] for spec in specs]
    directions = []
    for i, rule in enumerate(rules):
        direction, slots[i] = rule.direction(grads[i], slots[i], state.step, cfg)
        directions.append(direction)
    muon = [i for i, rule in enumerate(rules) if isinstance(rule, Muon)]
    picked = ([values[i] for i in muon] for values in (directions, slots, specs))
    for i, result in zip(muon, orthogonal_steps(*picked, num_devices, cfg), strict=True):
        directions[i], slots[i] = result
    scale = lr_scale(state.step, stage, cfg)
    leaves = zip(params, directions, rules, specs, strict=True)
    return tree.unflatten(move(*leaf, scale) for leaf in leaves), tree.unflatten(slots)


# ---- Data ----------------------------------------------------------------------------------------
# A shard is 256 little-endian int32 (magic, version, token count, zeros), then uint16 token ids.

SHARD_BEGIN = [20240520, 1]
HEADER_BYTES = 1024
NO_TOKEN = 0xFFFF  # stands where a row holds no token: read as BOS, never scored
POOL = 64  # documents the packer chooses from


class Shards(NamedTuple):
    """The shards of one glob, in order."""

    paths: list  # of Path
    tokens: list  # of uint16 arrays, memory-mapped
    meta: dict  # tokenizer, vocab_size, bos_id
    sha256: tuple = ()  # of each file

    def rows(self):
        """[(path, tokens, SHA-256)] of each file."""
        return list(zip(self.paths, self.tokens, self.sha256, strict=True))


def write_file(path, blob):
    """Write bytes under another name, then rename: the file is there whole or not at all."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        staging.write_bytes(blob)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_shard(path, tokens):
    """Write uint16 tokens as a shard."""
    header = np.array([*SHARD_BEGIN, len(tokens)] + [0] * 253, "<i4")
    write_file(path, header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def file_sha256(path):
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(path):
    """The tokens of a shard, memory-mapped. Raises UsageError for anything but a whole one."""
    require(path.is_file(), f"{path}: wanted a shard, this is no file")  # a pipe never ends
    header = np.fromfile(path, "<i4", 3).tolist()
    wanted = [*SHARD_BEGIN, (path.stat().st_size - HEADER_BYTES) / 2]
    require(
        header == wanted and wanted[2] > 0,
        f"{path}: begins with {header}, for its size wanted {wanted}. Fetch it again: "
        "python cached_fineweb10B.py; or make it again",
    )
    tokens = np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES)
    return np.asarray(tokens)  # slices of a plain array are ten times as fast as of a memmap


def find_shards(pattern):
    """The paths that match, sorted by name. Only the last part of a path is a pattern."""
    folder, name = os.path.split(pattern)
    return [Path(folder, found) for found in sorted(glob.glob(name, root_dir=folder or None))]


GPT2_META = {
    "tokenizer": "gpt2",
    "vocab_size": 50257,
    "bos_id": 50256,
    "tokenizer_sha256": "00f404d36600411e497efb3df08d3b4e094f0820e2595afcb7cbd0c4353d4fcb",
}
BYTES_META = {
    "tokenizer": "bytes",
    "vocab_size": 257,
    "bos_id": 256,
    "tokenizer_sha256": hashlib.sha256().hexdigest(),
}


def read_meta(file):
    """What a meta.json says of the tokenizer, as GPT2_META; without a file that.

    tokenizer_sha256 is of the tokenizer's files, one after the other: `cat encoder.json vocab.bpe |
    sha256sum`. It is "" in an older file. Raises UsageError.
    """
    if not file.exists():
        return GPT2_META
    try:
        meta = {"tokenizer_sha256": ""} | json.loads(file.read_text(encoding="utf-8-sig"))
        return {name: type(value)(meta[name]) for name, value in GPT2_META.items()}
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise UsageError(f"{file}: wanted tokenizer, vocab_size and bos_id ({error!r})") from error


def check_same_tokenizer(what, meta, other):
    """Raises UsageError where two metas are of different tokenizers.

    Where one has no hash, names and sizes are compared, with a warning.
    """
    if not (meta["tokenizer_sha256"] and other["tokenizer_sha256"]):
        said = f"warning: {what}: no tokenizer_sha256 to compare, so the names are compared"
        print(said, file=sys.stderr)
        meta, other = ({**one, "tokenizer_sha256": ""} for one in (meta, other))
    require(meta == other, f"{what}: of another tokenizer: {meta}, wanted {other}")


def open_shards(pattern):
    """The shards of a glob, by name. Raises UsageError where there are none or one is cut."""
    paths = find_shards(pattern)
    require(
        paths,
        f"no shards match {pattern}. Fetch FineWeb: python cached_fineweb10B.py 8; make shards of "
        "your own text: python -m scripts.prepare --help; or learn from Python's own source: "
        "--preset=demo --train_files= --val_files=",
    )
    tokens = [open_shard(path) for path in paths]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(file_sha256, paths))
    return Shards(paths, tokens, read_meta(paths[0].parent / "meta.json"), hashes)


def plan_stream(shards, cfg):
    """Yield (rows, tokens read) of steps 0, 1, ... from the plain stream, each token once an epoch.

    A row is a list of uint16 views, T + 1 tokens in all. The stream is read in order or, with
    shuffle, by blocks of the longest row in random order. What a shard ends with that fills no
    block is left out.
    """
    block = max(stage.seq_len for stage in cfg.stages)
    blocks = []
    for tokens in shards.tokens:
        starts = range(0, len(tokens) - block, block)
        blocks += [tokens[start : start + block + 1] for start in starts]
    epoch_tokens = block * len(blocks)

    @functools.cache
    def order(epoch):
        generator = np.random.default_rng([cfg.seed, epoch])
        return generator.permutation(len(blocks)) if cfg.shuffle else np.arange(len(blocks))

    position = 0
    for stage, first, last in cfg.spans:
        position += -position % stage.seq_len  # rows never cross a block
        for _ in range(first, last):
            starts = range(position, position + stage.batch_tokens, stage.seq_len)
            position = starts.stop
            if position > cfg.max_epochs * epoch_tokens:  # no tokens are left
                return
            rows = []
            for start in starts:
                epoch, within = divmod(start, epoch_tokens)
                tokens = blocks[order(epoch)[within // block]]
                rows.append([tokens[start % block :][: stage.seq_len + 1]])
            yield rows, position


def each_document(shards, cfg):
    """Yield the documents of all shards, max_epochs times, each from its BOS on."""
    for _ in range(cfg.max_epochs):
        for tokens in shards.tokens:
            starts = np.flatnonzero(tokens == cfg.bos_id).tolist()
            for first, last in itertools.pairwise([*starts, len(tokens)]):
                yield tokens[first:last]


def pack_row(pool, documents, stage):
    """(a row of T + 1 tokens as a list of views, tokens read). The row is None where none are left.

    pool: a sorted list of (length, order, document), filled up from the iterator `documents`. A
    row takes the longest that fits while one does, then the shortest, cut.
    """
    row = []
    read = 0
    room = stage.seq_len + 1
    while room:
        for order, document in itertools.islice(documents, POOL - len(pool)):
            bisect.insort(pool, (min(len(document), stage.doc_len), order, document))
            read += len(document)
        if not pool:
            return None, read
        num_fitting = bisect.bisect_right(pool, (room, math.inf))
        length, _, document = pool.pop(max(0, num_fitting - 1))
        row.append(document[: min(length, room)])
        room -= len(row[-1])
    return row, read


def plan_packed(shards, cfg):
    """Yield (rows, tokens read) of steps 0, 1, ... where the beginnings of documents are packed.

    What is cut off at doc_len is not trained on, as in the records.
    """
    documents = enumerate(each_document(shards, cfg))
    pool = []
    read = 0
    for stage, first, last in cfg.spans:
        pool = sorted((min(len(doc), stage.doc_len), order, doc) for _, order, doc in pool)
        for _ in range(first, last):
            rows = []
            for _ in range(stage.batch_tokens // stage.seq_len):
                row, more = pack_row(pool, documents, stage)
                read += more
                if row is None:  # no documents are left
                    return
                rows.append(row)
            yield rows, read


def plan(shards, cfg):
    """The rows of each training step, a function of config and shards alone."""
    return plan_packed(shards, cfg) if cfg.stages[0].doc_len else plan_stream(shards, cfg)


def plan_val(shards, cfg):
    """Rows of the whole validation: row i scores the i-th seq_len - val_context targets.

    The tokens before them are context. Before the first token stand BOS.
    """
    nothing = np.full(cfg.val_context, NO_TOKEN, np.uint16)
    tokens = np.concatenate([nothing, shards.tokens[0][: cfg.val_tokens + 1]])
    starts = range(0, cfg.val_tokens, cfg.val.seq_len - cfg.val_context)
    return [[tokens[start : start + cfg.val.seq_len + 1]] for start in starts]


GROUPS = 8  # into which rows are cut where a stage has candidates: one for each chip of a v6e-8
STRIDE = 86243  # a prime above 65536, so its multiples go through any vocabulary


def targets_in(rows, stage, cfg):
    """[8, V] of bool: which tokens are targets in each eighth of the rows.

    Raises UsageError where they are more than the stage's candidates.
    """
    are_targets = np.zeros((GROUPS, cfg.vocab_size), bool)
    for i, row in enumerate(rows):
        are_targets[i * GROUPS // len(rows), np.concatenate(row)[1:]] = True
    most = np.count_nonzero(are_targets, axis=1).max()
    wanted = "wanted at least as many candidates, or 0 for the whole softmax"
    said = f"an eighth of a batch has {most} different targets; {wanted}"
    require(most <= stage.candidates, f"--stages.candidates={stage.candidates}: {said}")
    return are_targets


def choose_candidates(rows, step, stage, cfg):
    """(ids, offsets) [8, P]: what the softmax of each eighth of the rows is over, ids ascending.

    Sampled softmax (record 92). The candidates are the eighth's own targets and, up to P in all,
    the next tokens of a fixed permutation, which goes on from step to step. These others stand for
    all tokens that are no targets, of which they are a share. -log(share) added to their logits
    would make Z right on average. Half of it is added: that lost 0.092 after 1M tokens here, all of
    it 0.102 (one seed; batches are too small for it there), none of it 0.0024 in record 92.
    Predicted: 68.6 to 56.0 ms a step.
    """
    ids = []
    offsets = []
    for i, is_chosen_V in enumerate(targets_in(rows, stage, cfg)):
        start = i * cfg.vocab_size // GROUPS + step * stage.candidates
        others = (start + np.arange(stage.candidates)) * STRIDE % cfg.vocab_size
        target_ids = np.flatnonzero(is_chosen_V)
        others = others[~is_chosen_V[others]][: stage.candidates - len(target_ids)]
        is_chosen_V[others] = True
        ids.append(np.flatnonzero(is_chosen_V))
        share = max(1, len(others)) / max(1, cfg.vocab_size - len(target_ids))
        offsets.append(np.full(stage.candidates, -0.5 * math.log(share), np.float32))
        offsets[-1][np.searchsorted(ids[-1], target_ids)] = 0
    return np.array(ids, np.uint16), np.array(offsets)


def batch_shape(stage, num_devices, cfg):
    """(A, B, T + 1): micro-steps, their rows on all devices, tokens. The val stage is one batch.

    Spare places stay empty, so any number of devices will do, but for stages with candidates: a
    micro-step has rows of one eighth only. Raises UsageError.
    """
    num_rows = stage.batch_tokens // stage.seq_len
    if stage == cfg.val:
        num_rows = math.ceil(cfg.val_tokens / (stage.seq_len - cfg.val_context))
    num_parts = num_devices
    if stage.candidates:
        num_parts = max(GROUPS, num_devices)
        whole = num_parts % GROUPS == num_parts % num_devices == num_rows % num_parts == 0
        said = f"{num_rows} rows on {num_devices} devices; wanted 1, 2, 4, 8 or a multiple of 8"
        said += f" devices and a multiple of {num_parts} rows, or 0, which is for any"
        require(whole, f"--stages.candidates={stage.candidates}: {said}")
    per_group = math.ceil(num_rows / num_parts)
    at_least = math.ceil(per_group / max(1, cfg.tokens_at_once // stage.seq_len))
    # With candidates spare places would shift rows into other groups. Without, they cost time, so
    # up to a seventh more micro-steps are taken where none is left.
    at_most = per_group if stage.candidates else 8 * at_least // 7
    whole = (n for n in range(at_least, at_most + 1) if per_group % n == 0)
    num_micro = next(whole, at_least)
    num_groups = num_parts // num_devices
    per_micro = math.ceil(per_group / num_micro)
    return num_groups * num_micro, per_micro * num_devices, stage.seq_len + 1


def batch_shapes(stage, mesh, cfg):
    """{name: ShapeDtypeStruct} of a batch. Each array is split along its second axis."""
    arrays = {"tokens": (batch_shape(stage, mesh.size, cfg), jnp.uint16)}
    if stage.candidates:
        shape = 1, max(GROUPS, mesh.size), stage.candidates
        arrays |= {"candidates": (shape, jnp.uint16), "offsets": (shape, f32)}
    sharding = NamedSharding(mesh, BY_ROW)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in arrays.items()
    }


def to_devices(rows, stage, mesh, cfg, step=0):
    """Rows -> a batch {"tokens": uint16 [A, B, T+1]}, on each device the next rows in order.

    With candidates also "candidates" and "offsets" [1, U, P], U groups on all devices.
    """
    shapes = batch_shapes(stage, mesh, cfg)
    num_micro, _, width = shapes["tokens"].shape
    tokens = np.full(shapes["tokens"].shape, NO_TOKEN, np.uint16).reshape(-1, width)
    for place, row in zip(tokens, rows, strict=False):
        np.concatenate(row, out=place[: sum(map(len, row))])
    in_order = "(devices A B) T -> A (devices B) T"
    arrays = {"tokens": rearrange(tokens, in_order, devices=mesh.size, A=num_micro)}
    if stage.candidates:
        chosen = choose_candidates(rows, step, stage, cfg)
        repeats = shapes["offsets"].shape[1] // GROUPS
        ids, offsets = (np.repeat(array, repeats, axis=0)[None] for array in chosen)
        arrays |= {"candidates": ids, "offsets": offsets}
    return {
        name: jax.make_array_from_callback(array.shape, shapes[name].sharding, array.__getitem__)
        for name, array in arrays.items()
    }


def train_batches(shards, first_step, mesh, cfg, depth=2):
    """Yield batches from first_step on, already on the devices, made `depth` ahead by a thread."""
    planned = itertools.islice(plan(shards, cfg), first_step, None)

    def make(step):
        rows, _ = next(planned)
        return to_devices(rows, cfg.stages[stage_at(step, cfg)], mesh, cfg, step)

    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque()
        for step in range(first_step, cfg.steps):
            ahead.append(pool.submit(make, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        yield from (batch.result() for batch in ahead)


def cache_dir():
    """This user's own cache folder. What lies there is trusted, compiled programs among it.

    Raises UsageError.
    """
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speedrun-jax"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path
    except (OSError, RuntimeError) as error:  # a user may have no home
        raise UsageError(f"no folder for the cache ({error}); set XDG_CACHE_HOME to one") from error


NOT_CORPUS = (
    "(^|/)(test|tests|idle_test|site-packages|dist-packages|encodings|pydoc_data|lib2to3|distutils"
    "|turtledemo|ensurepip|__pycache__)/|_sysconfigdata[^/]*$"
)


def embedded_corpus():
    """The interpreter's standard library as byte shards (BOS 256). Returns globs (train, val).

    val are the files whose path's SHA-256 begins with a byte below 13, about 5 %. Raises UsageError
    under 300 files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {"train": [], "val": []}
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        path = root / name
        is_text = path.is_file() and path.stat().st_size <= 200_000
        if is_text and not re.search(NOT_CORPUS, name):
            split = "val" if hashlib.sha256(name.encode()).digest()[0] < 13 else "train"
            parts[split] += [np.array([256], np.uint16), np.fromfile(path, np.uint8)]
    count = len(parts["train"] + parts["val"]) // 2
    require(count >= 300, f"{root}: {count} Python files, the demo wants 300 of a whole Python")
    folder = cache_dir() / f"stdlib-{platform.python_version()}"
    folder.mkdir(exist_ok=True)
    write_file(folder / "meta.json", json.dumps(BYTES_META).encode())
    for split, arrays in parts.items():
        write_shard(folder / f"{split}_000000.bin", np.concatenate(arrays))
    return str(folder / "train_*.bin"), str(folder / "val_*.bin")


def complete_config(train, cfg):
    """The Config with vocab_size and bos_id, its own or the shards'. Raises UsageError."""
    missing = [name for name in ("vocab_size", "bos_id") if getattr(cfg, name) is None]
    cfg = replace(cfg, **{name: train.meta[name] for name in missing})
    fits = 0 <= cfg.bos_id < cfg.vocab_size <= 65536
    wanted = f"wanted at most 65536, and more than --bos_id={cfg.bos_id}"
    require(fits, f"--vocab_size={cfg.vocab_size}: {wanted}")
    candidates = max(stage.candidates for stage in cfg.stages)
    wanted = f"wanted at most --vocab_size={cfg.vocab_size}"
    require(candidates <= cfg.vocab_size, f"--stages.candidates={candidates}: {wanted}")
    return cfg


def check_tokens(train, val, cfg):
    """Raises UsageError where the shards do not fit each other or the Config."""
    file = val.paths[0]
    check_same_tokenizer(file, val.meta, train.meta)
    seen = {digest: path for path, _, digest in val.rows()}
    for path, _, digest in train.rows():
        same = seen.setdefault(digest, path)
        wanted = "wanted each only once in --train_files, and none of --val_files"
        require(same is path, f"{path}: the same tokens as in {same}; {wanted}")
    missing = cfg.val_tokens + 1 - len(val.tokens[0])
    require(missing <= 0, f"{file}: {missing} tokens too short for --val_tokens={cfg.val_tokens}")
    for path, tokens, _ in train.rows() + val.rows():
        largest = tokens.max()
        require(
            largest < min(cfg.vocab_size, NO_TOKEN),
            f"{path}: holds token {largest}, --vocab_size is {cfg.vocab_size}. If another "
            "tokenizer made it, its meta.json must say so",
        )


def open_data(cfg):
    """(training shards, validation shards, Config completed, a line for the log).

    The plan is read once through before anything is compiled: seconds per billion tokens. Raises
    UsageError.
    """
    corpus = embedded_corpus() if not (cfg.train_files and cfg.val_files) else ("", "")
    train = open_shards(cfg.train_files or corpus[0])
    val = open_shards(cfg.val_files or corpus[1])
    cfg = complete_config(train, cfg)
    check_tokens(train, val, cfg)
    reads = []
    for step, (rows, read) in enumerate(plan(train, cfg)):
        stage = cfg.stages[stage_at(step, cfg)]
        if stage.candidates:
            targets_in(rows, stage, cfg)  # raises where they are more
        reads.append(read)
    trained = tokens_before(cfg.steps, cfg)
    epochs = math.ceil(cfg.max_epochs * trained / max(1, tokens_before(len(reads), cfg)))
    require(
        len(reads) == cfg.steps,
        f"--steps={cfg.steps}: the shards yield {len(reads)} steps. Fetch more shards, or read "
        f"them more often with --max_epochs={max(epochs, cfg.max_epochs + 1)}",
    )
    cut = f"{1 - trained / reads[-1]:.1%} cut off"
    return train, val, cfg, f"data: {reads[-1]} tokens read for {trained} trained on, {cut}"


# ---- Steps ---------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step takes and returns, and what a checkpoint holds."""

    step: jax.Array
    params: dict
    opt_state: dict  # as params, each leaf a dict of the rule's slots


def as_it_is(state, cfg):
    return state


class Model(NamedTuple):
    """All that the loop asks of an architecture. GPT, below, is this file's.

    Stacks under the names of STACKED arrive in loss and logits as lists of layers.
    """

    presets: dict  # {name: Config}, of one class, as PRESETS: speedrun, and demo for CPUs
    specs: Callable  # (cfg) -> nested dict of Spec
    rules: Callable  # (cfg) -> {group: rule}
    # (weights, batch, key, stage, cfg) -> (summed nats, summed weight). In a stage with candidates
    # the head has their rows alone, and where it is tied the embedding too
    loss: Callable
    logits: Callable  # (weights, tokens_BT, cfg) -> float32 [B, T, V] of what follows each token
    update: Callable = update  # (state, grads, stage, specs, rules, num_devices, cfg) -> as update
    # {name: (table, ids)}: loss finds the table's rows at batch[ids] as batch[name]
    lookups: dict = {}
    # (state, cfg) -> State: what training starts from in place of first values, as a checkpoint
    first_state: Callable = as_it_is


GPT = Model(PRESETS, param_specs, optimizer_rules, gpt_loss, next_logits, lookups=LOOKUPS)


def state_shardings(model, mesh, cfg):
    """A State of NamedSharding: weights and optimizer state are split over the devices."""
    specs, rules = model.specs(cfg), model.rules(cfg)

    def place(spec):
        axis = split_axis(spec, mesh.size)
        if axis is None:
            return NamedSharding(mesh, EVERYWHERE)
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    def places(spec):
        return tree_map(place, rules[spec.group].slots(spec))

    return State(NamedSharding(mesh, EVERYWHERE), tree_map(place, specs), tree_map(places, specs))


def partition(shardings):
    return tree_map(lambda sharding: sharding.spec, shardings)


def on_devices(function, mesh, inputs, outputs, donate=()):
    """jit of a function that each device runs on its share. inputs, outputs: PartitionSpecs."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)


def gather(params, specs, num_devices, cfg):
    """Whole compute copies on every device, in compute_dtype; scalars in float32."""

    def whole(spec, w):
        if spec.group not in SCALAR_GROUPS:
            w = w.astype(cfg.compute_dtype)
        axis = split_axis(spec, num_devices)
        if axis is None or num_devices == 1:
            return w
        return lax.all_gather(w, "data", axis=axis, tiled=True)

    return tree_map(whole, specs, params)


def reduce_grads(grads, specs, num_devices, cfg):
    """Sum over the devices. What is kept split arrives split.

    Gradients travel in compute_dtype, so with bfloat16 one device and eight differ by its rounding.
    """

    def total(spec, g):
        if spec.group not in SCALAR_GROUPS:
            g = g.astype(cfg.compute_dtype)
        axis = split_axis(spec, num_devices)
        if axis is None:
            return lax.psum(g, "data").astype(f32)
        g = jnp.moveaxis(g, axis, 0)  # on a v6e 0.17 ms less than in place (predicted)
        share = lax.psum_scatter(g, "data", scatter_dimension=0, tiled=True)
        return jnp.moveaxis(share, 0, axis).astype(f32)

    return grads if num_devices == 1 else tree_map(total, specs, grads)


def inputs_and_targets(batch, cfg):
    """{"tokens": uint16 [..., T+1], ...} -> int32 "tokens" and "targets" [..., T], "weights".

    The target is the next token. NO_TOKEN weighs nothing; a batch that brings "weights" [..., T]
    has its targets weighed by them.
    """
    tokens = batch["tokens"]
    there = tokens != NO_TOKEN
    ids = jnp.where(there, tokens.astype(jnp.int32), cfg.bos_id)
    weights = there[..., 1:].astype(f32) * batch.get("weights", 1.0)
    return batch | {"tokens": ids[..., :-1], "targets": ids[..., 1:], "weights": weights}


def look_up(weights, batch, model):
    """The rows of tables that the model's loss asks for: {name: [B, T, D]}."""
    return {name: weights[table][batch[ids]] for name, (table, ids) in model.lookups.items()}


def sum_rows(ids_N, g_ND, num_rows):
    """[V, D]: for each id the sum of its rows, float32: the gradient of a lookup.

    Rows are sorted by id; what an id adds to the running sum is its total. These are matmuls and
    gathers, whose cost on a TPU is known. A scatter of rows is slow there (jax #39959).
    """
    size = min(256, len(ids_N))
    order_N = jnp.argsort(ids_N)
    padded_N = jnp.pad(order_N, (0, -len(ids_N) % size + size))
    rows_CND = rearrange(g_ND[padded_N], "(C N) D -> C N D", N=size)
    earlier_MN = jnp.tril(jnp.ones((size, size), g_ND.dtype), -1)
    inside_CND = product("MN,CND->CMD", earlier_MN, rows_CND)  # of the block so far
    block_CD = jnp.sum(rows_CND.astype(f32), axis=1)
    sums_CD = jnp.cumsum(block_CD, axis=0) - block_CD  # of all earlier blocks
    ends_V = jnp.searchsorted(ids_N[order_N], jnp.arange(num_rows), side="right", method="sort")

    def added(at_VD):
        return at_VD - jnp.pad(at_VD, ((1, 0), (0, 0)))[:-1]

    inside_ND = rearrange(inside_CND, "C N D -> (C N) D")
    # in two parts: one long running sum would lose digits
    return added(inside_ND[ends_V]) + added(sums_CD[ends_V // size])


def tie(tree, stage):
    """In a tied stage the embedding is the head (records 51 and 53; gain 0.013).

    tree: weights, or the optimizer state, which stays as it is where the two have different slots.
    """
    if not stage.tied:
        return tree
    alike = jax.tree.structure(tree["embed"]) == jax.tree.structure(tree["head"])
    return tree | {"embed": tree["head"]} if alike else tree


def spread_rows(ids_P, rows_PD, num_rows):
    """[V, D]: rows_PD[i] at ids_P[i], which ascend, and zeros. By gathers, as sum_rows."""
    all_V = jnp.arange(num_rows)
    at_V = jnp.searchsorted(ids_P, all_V, method="sort")
    is_there_V = ids_P.at[at_V].get(mode="clip") == all_V
    return jnp.where(is_there_V[:, None], rows_PD.at[at_V].get(mode="clip"), 0.0)


def sum_micro_steps(totals, micros, weights, tables, given, stage, model, cfg):
    """(totals with (nats, weight, gradients) of the micro-steps, the gradients of looked-up rows).

    weights: what the loss gets. tables: where rows are looked up. given: for the loss, as a batch.
    """

    def loss_of(weights, looked_up, micro, micro_key):
        weights = tie(weights, stage)  # so that all gradients reach the head
        return model.loss(weights, micro | looked_up | given, micro_key, stage, cfg)

    def micro_step(totals, micro):
        micro, micro_key = micro
        looked_up = look_up(tables, micro, model)
        with_grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (nats, weight), (grads, row_grads) = with_grads(weights, looked_up, micro, micro_key)
        new = nats, weight, grads
        return tree_map(lambda total, x: total + x.astype(f32), totals, new), row_grads

    return lax.scan(micro_step, totals, micros)


def accumulate(weights, batch, key, step, stage, model, cfg):
    """Sums over a device's micro-steps: (nats, weight of the targets, gradients), float32.

    weights: compute copies, layers unstacked. batch: as from to_devices, this device's part. Groups
    of rows with candidates of their own go one after the other, each with those rows of the head.
    """
    weights = tie(weights, stage)  # for look_up
    batch = inputs_and_targets(batch, cfg)
    sampled = [batch.pop(name)[0] for name in ("candidates", "offsets") if name in batch]
    micros = batch, jax.random.split(key, len(batch["tokens"]))
    context = {"tables": weights, "stage": stage, "model": model, "cfg": cfg}
    run = functools.partial(sum_micro_steps, **context)

    def group(totals, here):
        ids_P, offsets_P, micros = here
        nats, weight, grads = totals
        head_PD = weights["head"][ids_P]
        totals = nats, weight, grads | {"head": jnp.zeros(head_PD.shape, f32)}
        given = {"step": step, "offsets": offsets_P}
        totals, row_grads = run(totals, micros, weights | {"head": head_PD}, given=given)
        spread = spread_rows(ids_P, totals[2]["head"], len(weights["head"]))
        return (*totals[:2], totals[2] | {"head": grads["head"] + spread}), row_grads

    totals = f32(0), f32(0), tree_map(lambda w: jnp.zeros(w.shape, f32), weights)
    if sampled:
        num_groups = len(sampled[0])
        grouped = tree_map(lambda x: x.reshape(num_groups, -1, *x.shape[1:]), micros)
        totals, row_grads = lax.scan(group, totals, (*sampled, grouped), unroll=num_groups == 1)
    else:
        given = {"step": step}
        totals, row_grads = run(totals, micros, weights, given=given)
    nats, weight, grads = totals
    for name, (table, ids) in model.lookups.items():  # once per step, not per micro-step
        if stage.tied and table == "embed":
            table = "head"
        rows_ND = row_grads[name].reshape(-1, row_grads[name].shape[-1])
        grads[table] += sum_rows(batch[ids].ravel(), rows_ND, len(weights[table]))
    return nats, weight, grads


def make_train_step(stage, model, mesh, cfg):
    """(state, batch) -> (state, mean loss in nats per unit of weight). The state is donated."""
    specs, rules = model.specs(cfg), model.rules(cfg)

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        key = jax.random.fold_in(key, lax.axis_index("data"))
        weights = unstack(gather(state.params, specs, mesh.size, cfg))
        nats, weight, grads = accumulate(weights, batch, key, state.step, stage, model, cfg)
        nats, weight = lax.psum((nats, weight), "data")
        grads = reduce_grads(restack(grads), specs, mesh.size, cfg)
        weight = jnp.maximum(weight, 1e-9)  # the warm-up has no targets
        grads = tree_map(lambda g: g / weight, grads)
        new = model.update(state, grads, stage, specs, rules, mesh.size, cfg)
        params, opt_state = (tie(tree, stage) for tree in new)
        return State(state.step + 1, params, opt_state), nats / weight

    parts = partition(state_shardings(model, mesh, cfg))
    return on_devices(train_step, mesh, (parts, BY_ROW), (parts, EVERYWHERE), donate=0)


def make_eval_step(model, mesh, cfg):
    """(params, batch) -> (summed nats, targets scored). A row's first val_context score nothing."""
    specs = model.specs(cfg)

    def eval_step(params, batch):
        weights = unstack(gather(params, specs, mesh.size, cfg))
        scored_T = jnp.arange(cfg.val.seq_len) >= cfg.val_context

        def micro_step(totals, micro):
            micro = inputs_and_targets(micro, cfg)
            micro["weights"] *= scored_T[None]
            micro |= look_up(weights, micro, model) | {"step": cfg.steps}
            nats, weight = model.loss(weights, micro, jax.random.key(0), cfg.val, cfg)
            return (totals[0] + nats, totals[1] + weight.astype(jnp.int32)), None

        totals, _ = lax.scan(micro_step, (f32(0), jnp.int32(0)), batch)
        return lax.psum(totals, "data")

    parts = partition(state_shardings(model, mesh, cfg).params)
    return on_devices(eval_step, mesh, (parts, BY_ROW), EVERYWHERE)


def make_init(model, mesh, cfg):
    """() -> State at step 0, born split over the devices."""
    specs, rules = model.specs(cfg), model.rules(cfg)

    def zeros(spec):
        return tree_map(lambda slot: jnp.zeros(slot.shape), rules[spec.group].slots(spec))

    def init():
        params = init_params(jax.random.key(cfg.seed), specs)
        return State(jnp.int32(0), params, tree_map(zeros, specs))

    return jax.jit(init, out_shardings=state_shardings(model, mesh, cfg))


def list_programs(model, mesh, cfg):
    """{"init", "train_0", "train_1", ..., "eval": (jitted function, shapes of its arguments)}."""
    init = make_init(model, mesh, cfg)

    state = jax.eval_shape(init)  # with the shardings of init's results
    programs = {"init": (init, ())}
    for i, stage in enumerate(cfg.stages):
        step = make_train_step(stage, model, mesh, cfg)
        programs[f"train_{i}"] = step, (state, batch_shapes(stage, mesh, cfg))
    val_batch = batch_shapes(cfg.val, mesh, cfg)
    programs["eval"] = make_eval_step(model, mesh, cfg), (state.params, val_batch)
    return programs


def memory_of(program):
    """Bytes per device while a compiled program runs: arguments, results and temporaries."""
    use = program.memory_analysis()
    arguments = use.argument_size_in_bytes - use.alias_size_in_bytes
    return use.temp_size_in_bytes + arguments + use.output_size_in_bytes


def computes_twice(program):
    """Whether XLA computes some things again to save memory: the copies are called name.remat."""
    return re.search(r"\.remat(?!erialized)", program.as_text()) is not None


# Gradients and weights travel by the SparseCores (predicted for a v6e-8: 1.4 ms of 67 less), but
# lookups do not, as from JAX 0.11 on they would (0.5 ms of 61 more; on a v7x jax #40553 saw 57 %)
TPU_OPTIONS = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_offload_all_supported_gathers_to_sparsecore": "false",
    "xla_enable_async_all_reduce": "true",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
}
# What the code rounds to bfloat16 travels as that, and not as float32 (predicted for 8 H100s, stage
# 2, by the roofline: 57.0 ms become 54.7, FMHA included, and 10.4 GiB become 9.7)
GPU_OPTIONS = {"xla_allow_excess_precision": False}


def compiler_options(mesh, cfg):
    """What the compiler is told beside the program: {option: value}."""
    platform = mesh.devices.flat[0].platform
    options = {"tpu": TPU_OPTIONS, "cpu": {}}.get(platform, GPU_OPTIONS)
    return options | ({"xla_gpu_deterministic_ops": True} if cfg.deterministic else {})


def compile_all(model, mesh, cfg):
    """({name: compiled program}, lines about them), compiled in parallel, before the clock.

    Raises UsageError.
    """
    require(not jax.config.jax_disable_jit, "JAX_DISABLE_JIT is set, but every step is compiled")
    print("compiling, or taking programs from the cache ...", flush=True)
    listed = list_programs(model, mesh, cfg)
    options = compiler_options(mesh, cfg)

    programs = {}

    def build(name):
        function, arguments = listed[name]
        start = time.perf_counter()
        programs[name] = function.lower(*arguments).compile(compiler_options=options)
        seconds = time.perf_counter() - start
        gib = memory_of(programs[name]) / 2**30
        return f"compiled: {name} in {seconds:.1f}s, {gib:.2f} GiB per device"

    notes = [f"parameters: {count_params(model.specs(cfg))}"]
    with ThreadPoolExecutor() as pool:
        return programs, notes + list(pool.map(build, listed))


def tokens_of_micro_step(stage, num_devices, cfg):
    """(all, those whose logits exist at a time) on one device."""
    _, num_rows, width = batch_shape(stage, num_devices, cfg)
    tokens = num_rows // num_devices * (width - 1)
    return tokens, cfg.head_block if tokens % cfg.head_block == 0 else tokens


def fullest_stage(mesh, cfg):
    """The number of the stage that needs most memory, of equal ones the last.

    Roughly, as compiled for H100s: 40 bytes for each layer and dim of a token, 6 for each logit.
    """

    def size(number):
        stage = cfg.stages[number]
        tokens, block = tokens_of_micro_step(stage, mesh.size, cfg)
        num_logits = block * (stage.candidates or cfg.padded_vocab)
        return 40 * cfg.num_layers * cfg.model_dim * tokens + 6 * num_logits, number

    return max(range(len(cfg.stages)), key=size)


# Tried on a GPU. Predicted for 8 H100s, stage 2: 49152 launch 1,170 kernels, 32768 2,289; by the
# roofline 53.2 and 54.6 ms
MICRO_TOKENS = (49152, 32768, 16384, 8192)
ROOM = 0.95  # of the memory is for what was compiled


def fits_in_memory(model, mesh, cfg, limit):
    """Whether the stage that needs most takes no more than ROOM of the limit.

    What fits because XLA computes things twice does not count: it is slower. A refusal of cuDNN
    raises UsageError.
    """
    function, arguments = list_programs(model, mesh, cfg)[f"train_{fullest_stage(mesh, cfg)}"]
    options = compiler_options(mesh, cfg)
    try:
        with device_errors(cfg):
            program = function.lower(*arguments).compile(compiler_options=options)
    except OutOfMemory:
        return False
    return memory_of(program) < ROOM * limit and not computes_twice(program)


def fit_memory(model, mesh, cfg, manifest):
    """The Config with --micro_tokens=none settled for a GPU: the largest size that fits.

    Larger micro-steps launch fewer kernels. Each size is compiled until one fits. Where none does,
    and on other machines, the Config stays as it is. A run that goes on keeps its size or takes a
    smaller one: manifest is its checkpoint's, else {}.
    """
    if cfg.micro_tokens or jax.default_backend() != "gpu":
        return cfg
    limits = [(gpu.memory_stats() or {}).get("bytes_limit", 0) for gpu in jax.local_devices()]
    limit = multihost_utils.process_allgather(np.float32(min(limits))).min()
    before = manifest.get("config", {}).get("micro_tokens") or 4096
    sizes = [size for size in MICRO_TOKENS if limit and (not manifest or size <= before)]
    for micro_tokens in sizes:
        larger = replace(cfg, micro_tokens=micro_tokens)
        print(f"compiling to see whether --micro_tokens={micro_tokens} fits ...", flush=True)
        fits = fits_in_memory(model, mesh, larger, limit)
        if multihost_utils.process_allgather(np.array(fits)).all():
            return larger
    return replace(cfg, micro_tokens=before) if manifest and before < MICRO_TOKENS[-1] else cfg


def flops_per_token(stage, specs, cfg):
    """Model FLOPs of training on one token, for the MFU.

    6 per element of a matrix that is multiplied, 12 per dim of each query head and key that
    causality and window leave visible. Document borders and the pointer's scores are not counted.
    """
    matrices = 0
    for spec in jax.tree.leaves(specs):
        if spec.group == "head" and stage.candidates:
            matrices += stage.candidates * cfg.model_dim
        elif spec.group not in ("embed", *SCALAR_GROUPS):
            matrices += math.prod(spec.shape)
    keys = 0.0
    for i in range(cfg.num_layers):
        if i not in cfg.mlp_only:
            width = min(window_of(i, stage, cfg) + 1, stage.seq_len)
            keys += width - width * (width - 1) / 2 / stage.seq_len
    return 6 * matrices + 12 * cfg.num_heads * cfg.head_dim * keys


PEAK_FLOPS = {  # dense bf16 per device, as the vendors state it, found by the first name that fits
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "RTX 4090": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops():
    """Of all devices together; 0 where it is not known, as of a part of a GPU, or a smaller one."""
    kind = jax.devices()[0].device_kind
    known = (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", kind))
    is_less = re.search("MIG|Laptop|4090 D", kind)
    return 0 if is_less else next(known, 0) * jax.device_count()


# ---- Checkpoint ----------------------------------------------------------------------------------
# RUN/ckpt/step-000250 holds params.safetensors, opt.safetensors, and a manifest.json with their
# SHA-256, the config, the data's hash and the clock.

CHECKPOINT_FORMAT = 3
OLD_FORMATS = "commit e520f26 reads format 2, e79511b those without a number"
CHECKPOINT_FILES = {"params.safetensors", "opt.safetensors", "manifest.json"}


def named(tree):
    """{name in checkpoints: leaf}."""
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def as_json(cfg):
    """A Config as a JSON file gives it back, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def step_of(folder):
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints_in(run_folder):
    """The checkpoints of a run, by step."""
    folders = (run_folder / "ckpt").glob("step-*")
    ours = [path for path in folders if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(ours, key=step_of)


def remove_checkpoint(folder):
    """Delete a checkpoint, but none that holds what save_checkpoint does not write."""
    is_ours = folder.is_dir() and not folder.is_symlink()
    if is_ours and {path.name for path in folder.iterdir()} <= CHECKPOINT_FILES:
        shutil.rmtree(folder)


def save_checkpoint(run_folder, state, progress, about, cfg):
    """Write aside, flush, rename: it is there whole or not at all. The last two are kept.

    progress: JSON that the resumed run gets back. about: {"data": hash of the shards, "meta": their
    tokenizer}. Returns the folder, which process 0 writes. Raises OSError where the disk refuses
    and NonFiniteLoss for weights that are not finite; what was there before stands.
    """
    files = {"params.safetensors": named(state.params), "opt.safetensors": named(state.opt_state)}
    arrays = multihost_utils.process_allgather(files, tiled=True)  # whole, on every host
    if not all(np.isfinite(array).all() for array in arrays["params.safetensors"].values()):
        raise NonFiniteLoss(f"weights are not finite, so they are not saved. {run_folder} stands")
    final = run_folder / "ckpt" / f"step-{int(state.step):06d}"
    if jax.process_index() != 0:
        return final
    staging = final.parent / ".writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    hashes = {}
    for file, tensors in arrays.items():
        safetensors.numpy.save_file(tensors, staging / file)
        hashes[file] = file_sha256(staging / file)
    manifest = {
        "format": CHECKPOINT_FORMAT,
        "step": int(state.step),
        "sha256": hashes,
        "progress": progress,
        "config": as_json(cfg),
        **about,
    }
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=1))
    os.sync()  # all of it is on the disk before it bears its name
    earlier = [path for path in checkpoints_in(run_folder) if step_of(path) < step_of(final)]
    for old in earlier[:-1]:  # before the rename: a kill in here leaves the one before whole
        remove_checkpoint(old)
    remove_checkpoint(final)
    staging.rename(final)
    return final


def read_manifest(folder, cfg, data=None):
    """The manifest of a whole checkpoint of this config, and of these data (their hash).

    Raises UsageError for any other.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        is_ours = manifest.get("format") == CHECKPOINT_FORMAT
        require(is_ours, f"it is of an older train.py; {OLD_FORMATS}")
        saved, mine = manifest["config"], as_json(cfg)
        for name in sorted((mine.keys() | saved.keys()) - MAY_DIFFER):
            was = saved.get(name)
            now = mine.get(name)
            require(was == now, f"it was saved with {name}={was}, this run has {now}")
        require(data in (None, manifest["data"]), "it was trained on other shards")
        for file in ("params.safetensors", "opt.safetensors"):
            whole = file_sha256(folder / file) == manifest["sha256"][file]
            require(whole, f"{file} is damaged; delete the folder")
        return manifest
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{folder}: no checkpoint to go on from: {error}") from error


def check_tensors(file, like):
    """Raises UsageError where names, shapes or dtypes in a .safetensors file are not `like`'s."""
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            found = {(name, *part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise UsageError(f"{file}: {error}") from error
    wanted = {(name, *leaf.shape, "F32") for name, leaf in named(like).items()}
    others = sorted(map(str, wanted ^ found))
    require(not others, f"{file}: not of this weight table: {', '.join(others[:2])}")


def find_checkpoint(cfg, data, like=None):
    """(folder, manifest) of the checkpoint to resume from, or (None, {}) to start at step 0.

    data: the hash of the shards. like: a State of the shapes wanted, else they are not looked at.
    --resume=auto passes over what is damaged or another run's, and says so. Raises UsageError where
    a folder was named that has none to go on from.
    """
    if not cfg.resume:
        return None, {}
    is_auto = cfg.resume == "auto"
    root = Path(cfg.log_dir if is_auto else cfg.resume)
    runs = sorted(root.glob("*")) if is_auto else [root]
    folders = [folder for run in runs for folder in checkpoints_in(run)]
    if not is_auto and root.parent.name == "ckpt":
        folders = [root]
    problem = "nothing is there"
    for folder in reversed(folders):  # the newest first
        try:
            manifest = read_manifest(folder, cfg, data)
            if like is not None:
                check_tensors(folder / "params.safetensors", like.params)
                check_tensors(folder / "opt.safetensors", like.opt_state)
            was = manifest["config"].get("attention")
            if was not in (None, cfg.attention):
                print(f"{folder} was trained with --attention={was}, now it is {cfg.attention}")
            return folder.resolve(), manifest
        except UsageError as error:
            problem = error
            if is_auto:
                print(f"--resume=auto: passing over {error}")
    require(is_auto, f"--resume={cfg.resume}: {problem}")
    print(f"--resume=auto: nothing of this config in {cfg.log_dir}/, so it starts at step 0")
    return None, {}


def load_tensors(file, like):
    """The tree of a verified .safetensors file, each leaf placed as the one of `like`.

    Raises UsageError as check_tensors.
    """
    check_tensors(file, like)
    tensors = safetensors.numpy.load_file(file)

    def place(path, leaf):
        array = tensors[name_of(path)]
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, array.__getitem__)

    return jax.tree.map_with_path(place, like)


def load_checkpoint(folder, step, like):
    """The State in a verified folder, placed as `like` is. Raises UsageError as load_tensors."""
    params = load_tensors(folder / "params.safetensors", like.params)
    opt_state = load_tensors(folder / "opt.safetensors", like.opt_state)
    return State(jax.device_put(np.int32(step), like.step.sharding), params, opt_state)


# ---- Clock and log -------------------------------------------------------------------------------


def read_clocks():
    return np.array([time.perf_counter(), time.process_time()])


class Clock:
    """Seconds of training, [wall, CPU]. It stands still for compilation, evaluation and saves."""

    def __init__(self, seconds):
        self.total = np.array(seconds)
        self.since = None

    def start(self):
        self.since = read_clocks()

    def stop(self):
        self.total = self.seconds()
        self.since = None

    def seconds(self):
        return self.total if self.since is None else self.total + read_clocks() - self.since


def versions():
    """What may change the bits or the speed of a run: {name: text}."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*\S)", cpuinfo.read_text()) if cpuinfo.exists() else []
    gpu = ("jax-cuda", "nvidia-cublas", "nvidia-cudnn", "nvidia-nccl")
    packages = {}
    for found in importlib.metadata.distributions():
        if (found.name or "").startswith(gpu):  # a damaged one has no name
            packages.setdefault(found.name, found.version)  # the first is what Python imports
    flags = {name: os.environ[name] for name in os.environ if name[:4] in ("JAX_", "XLA_", "LIBT")}
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        **dict(sorted(packages.items())),
        "platform": platform.platform(),
        "backend": " ".join(jax.devices()[0].client.platform_version.split()),
        "processor": [*names, platform.machine()][0],  # a CPU sums bfloat16 in its own order
        **flags,
    }


def require_finite(loss, what):
    """The loss as a float, which is waited for. Raises NonFiniteLoss."""
    loss = float(loss)
    if not math.isfinite(loss):
        causes = "a learning rate (--muon_lr, --adam_lr, --scalar_lr), damaged data"
        raise NonFiniteLoss(f"{what} is {loss}. Usual causes: {causes}. The checkpoints stand")
    return loss


STEP_LINE = (
    "step:{step}/{steps} train_loss:{train_loss:.4f}{val} train_time:{train_time_s:.3f}s "
    "step:{step_ms:.1f}ms tok/s:{speed} mfu:{percent} wait:{input_wait_ms:.1f}ms eta:{eta:.0f}s"
)
FINAL_LINE = (
    "final: step:{step}/{step} tokens:{tokens} val_loss:{val_loss:.4f} "
    "train_time:{train_time_s:.3f}s cpu_time:{cpu_time_s:.1f}s wall:{wall_s:.1f}s"
)
REACHED = "reached at step {step} after {train_time_s:.3f}s"


class Log:
    """log.txt, metrics.jsonl and the console, and how far the run is. Only process 0 writes."""

    def __init__(self, folder, specs, cfg, manifest):
        progress = manifest.get("progress", {"seconds": [0.0, 0.0], "row": {}, "reached": None})
        self.folder = folder
        self.writes = jax.process_index() == 0
        self.cfg = cfg
        self.peak = peak_flops()
        self.flops = [flops_per_token(stage, specs, cfg) for stage in cfg.stages]
        self.created = time.perf_counter()
        self.clock = Clock(progress["seconds"])
        self.row = progress["row"]  # the last one of metrics
        self.reached = progress["reached"]  # the target: {step, train_time_s}
        self.marked = manifest.get("step", 0), self.clock.total[0]  # rates are means since then
        self.waited = 0.0  # seconds for batches since then

    def progress(self):
        """What a checkpoint keeps of it."""
        seconds = self.clock.seconds().tolist()
        return {"seconds": seconds, "row": self.row, "reached": self.reached}

    def append(self, name, text):
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / name
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)

    def line(self, text):
        """To log.txt and the console."""
        self.append("log.txt", text + "\n")
        if self.writes:
            print(text, flush=True)

    def begin(self, source, why, argv, train, val, notes):
        """Write into the log all that the run can be repeated from."""
        config = dataclasses.asdict(self.cfg)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        facts = [
            f"preset: {self.cfg.preset} ({why})",
            f"argv: {shlex.join(argv)}",
            f"config: {json.dumps(config)}",
            "versions: " + " ".join(map("=".join, versions().items())),
            f"devices: {devices}, {jax.process_count()} processes, {os.cpu_count()} host cores",
            attention_note(self.cfg, *this_machine()),
        ]
        for path, tokens, digest in train.rows() + val.rows():
            facts.append(f"data: {path.name} tokens:{len(tokens)} sha256:{digest}")
        scored = hashlib.sha256(val.tokens[0][: self.cfg.val_tokens + 1]).hexdigest()
        targets = f"validation scores {self.cfg.val_tokens} targets; sha256 of these"
        facts.append(f"data: {targets} and the token before them:{scored}")
        self.append("log.txt", source + "\n" + "=" * 120 + "\n")
        for fact in facts + notes:
            self.line(fact)
        if self.writes:
            text = json.dumps({"config": config, "meta": train.meta}, indent=1)
            (self.folder / "config.json").write_text(text)

    def metrics(self, row):
        self.append("metrics.jsonl", json.dumps(row) + "\n")

    def step(self, step, loss, val_loss=None):
        """Wait for a step's loss. If it is time, a line and a row of metrics.

        Times and rates are means since the last line. Raises NonFiniteLoss.
        """
        cfg = self.cfg
        loss = require_finite(loss, f"the training loss of step {step}")
        if val_loss is None and not due(cfg.log_every, step):
            return
        wall, cpu = self.clock.seconds().tolist()
        tokens = tokens_before(step, cfg)
        marked_step, marked_s = self.marked
        num_steps = step - marked_step
        rate = (tokens - tokens_before(marked_step, cfg)) / (wall - marked_s)
        i = stage_at(step - 1, cfg)
        self.row = row = {
            "step": step,
            "tokens": tokens,
            "train_time_s": wall,
            "cpu_time_s": cpu,
            "wall_s": time.perf_counter() - self.created,
            "train_loss": loss,
            "stage": i,
            "step_ms": 1e3 * (wall - marked_s) / num_steps,
            "lr": float(lr_scale(step - 1, cfg.stages[i], cfg)),
            "tokens_per_s": rate,
            "input_wait_ms": 1e3 * self.waited / num_steps,
        }
        val = ""
        percent = "-"
        if self.peak:
            row["mfu"] = rate * self.flops[i] / self.peak
            percent = f"{row['mfu']:.1%}"
        if val_loss is not None:
            row["val_loss"] = val_loss
            val = f" val_loss:{val_loss:.4f}"
            if val_loss <= cfg.target_loss and not self.reached:
                self.reached = {"step": step, "train_time_s": wall}
        eta = (tokens_before(cfg.steps, cfg) - tokens) / rate
        speed = f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k"
        more = {"steps": cfg.steps, "val": val, "percent": percent, "speed": speed, "eta": eta}
        self.line(STEP_LINE.format(**row, **more))
        self.metrics(row)
        self.marked = step, wall
        self.waited = 0.0

    def result(self):
        """The final line, and a row of metrics without a training loss."""
        kept = ("step", "tokens", "train_time_s", "cpu_time_s", "val_loss")
        row = {name: self.row[name] for name in kept}
        line = FINAL_LINE.format(**self.row)
        if stats := jax.local_devices()[0].memory_stats():  # None of a CPU
            line += f" peak_memory:{stats['peak_bytes_in_use'] / 2**30:.2f}GiB"
        when = "not reached"
        if self.reached:
            when = REACHED.format(**self.reached)
            row["target_reached_step"] = self.reached["step"]
        if self.cfg.target_loss:
            line += f" target:{self.cfg.target_loss:g} {when}"
        self.line(line)
        self.metrics(row)

    def seal(self):
        """The log's last line is the SHA-256 of all bytes above it."""
        folder = shlex.quote(str(self.folder))
        last = f"{self.folder}/ckpt/step-{self.cfg.steps:06d}"
        self.line(f"wrote: {last}, and metrics.jsonl, config.json, log.txt beside ckpt")
        self.line(f"next: its curves: python -m scripts.report {folder}; all flags: --help")
        if self.writes:
            self.append("log.txt", f"sha256:{file_sha256(self.folder / 'log.txt')}\n")


def due(every, step):
    """Whether something is done after this step that is done after every so many; 0: never."""
    return every and step % every == 0


def new_folder(cfg):
    """Of a run that starts now."""
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return Path(cfg.log_dir) / f"{started}-{os.urandom(3).hex()}"


def lock(file, holder):
    """Lock an open file until it is closed. Raises UsageError where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(holder) from error
    except OSError:
        pass  # a disk that hosts share may know no locks


@contextlib.contextmanager
def owning(folder):
    """Hold the lock of a run's folder, which dies with the process. Raises UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.ExitStack() as at_end:
        at_end.callback(os.close, handle)
        lock(handle, f"{folder}: another process is at work in this folder")
        yield


def is_sealed(folder):
    """Whether a run came to its end."""
    return (folder / "log.txt").read_bytes().splitlines()[-1].startswith(b"sha256:")


# ---- The run -------------------------------------------------------------------------------------


class Stop:
    """A hook that hears SIGTERM and Ctrl-C from the first step on: the loop saves and leaves.

    A second one ends at once, as does one before the first step. On several hosts JAX's preemption
    service hears SIGTERM, and all stop after the same step; Ctrl-C ends at once there.
    """

    asked = False
    listens = False

    def __init__(self):
        self.answer(signal.SIG_DFL)

    def answer(self, handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def hear(self, number, frame):
        self.asked = True
        self.answer(signal.SIG_DFL)

    def __call__(self, step):
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        if not self.listens:
            self.listens = True
            self.answer(self.hear)
        return self.asked


EARLY = ("cpu_devices", "multihost")  # flags that are read before JAX starts


def start_devices(cfg):
    """What must be settled before the first device is asked for: simulated CPUs, other hosts.

    Raises UsageError where there is no such host or device.
    """
    if cfg.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", cfg.cpu_devices)
    host = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", cfg.multihost)
    wanted = f"--multihost={cfg.multihost}: wanted auto, or HOST:PORT,COUNT,INDEX"
    require(host or cfg.multihost in ("", "auto"), wanted)
    try:
        if host:
            counts = int(host[2]), int(host[3])
            jax.distributed.initialize(host[1], *counts, heartbeat_timeout_seconds=30)
        elif cfg.multihost:
            jax.distributed.initialize()
        jax.devices()
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"JAX cannot start: {said}") from error


def choose_preset(train_files):
    """(preset, why): what this machine can do.

    Raises UsageError on an accelerator without shards, and on a CPU beside the speedrun's.
    """
    real = f"`python cached_fineweb10B.py {SPEEDRUN_SHARDS}`, then `python train.py`"
    if jax.default_backend() == "cpu":
        has_shards = train_files == SPEEDRUN.train_files and find_shards(train_files)
        said = f"JAX sees only a CPU, but shards match {train_files}. Mend JAX, as README says"
        require(not has_shards, f"{said}, or name the preset to train on this CPU: --preset=demo")
        return "demo", (
            "JAX sees only a CPU, so a small byte-level model learns Python from this machine's "
            f"standard library. The real thing, on a TPU VM or a GPU machine: {real}"
        )
    kind = f"JAX sees {jax.device_count()} x {jax.devices()[0].device_kind}"
    required = f"{kind}, but no shards match {train_files}: {real}; or --preset=demo"
    require(not train_files or find_shards(train_files), required)
    return "speedrun", kind


JAX_SETTINGS = {  # which the environment may have set otherwise
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_transfer_guard": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
}


def set_up_jax(cfg):
    """A cache of compiled programs of this user's own, and what numbers are."""
    for name, value in JAX_SETTINGS.items():
        jax.config.update(name, value)
    several_cpu_hosts = jax.process_count() > 1 and jax.default_backend() == "cpu"
    if not several_cpu_hosts and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if cfg.compute_dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")  # else operands are rounded


def configure(argv, presets=PRESETS):
    """Command line -> (Config, why this preset). Starts the devices. Raises UsageError."""
    texts = read_flags(argv)
    preset = texts.get("preset", next(iter(presets)))
    why = "asked for"
    early = {name: texts[name] for name in EARLY if name in texts}
    start_devices(parse_texts(early, preset, presets))
    if "preset" not in texts:
        preset, why = choose_preset(texts.get("train_files", presets[preset].train_files))
    cfg = parse_texts(texts, preset, presets)
    set_up_jax(cfg)
    return choose_attention(cfg, *this_machine()), why


def hash_of(*things):
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()


def check_hosts_agree(source, cfg, data_hash, manifest):
    """Raises UsageError on every host where one has other code, flags, shards or checkpoint."""
    config = as_json(replace(cfg, multihost=""))
    digest = hash_of(source, config, data_hash, manifest.get("step"))
    try:
        multihost_utils.assert_equal(np.frombuffer(bytes.fromhex(digest), np.uint8))
    except AssertionError as error:
        raise UsageError("hosts differ in train.py, flags, shards or checkpoint") from error


def warm_up(programs, mesh, cfg):
    """Run each training program once, on empty rows, so that the first step finds it loaded.

    The state is thrown away.
    """
    state = programs["init"]()
    for i, stage in enumerate(cfg.stages):
        state, _ = programs[f"train_{i}"](state, to_devices([], stage, mesh, cfg))
    jax.block_until_ready(state)
    if jax.process_count() > 1:  # a host that is told to go has no time to compile its save
        multihost_utils.process_allgather((state.params, state.opt_state), tiled=True)


CUDNN_REFUSES = re.compile(  # a line of an error that is attention's, not of other uses of cuDNN
    "fmha|dot_product_attention|NOT_SUPPORTED|execution plan|no supported engine|graph failed|"
    "cudnn (is )?not (found|detected)",
    re.IGNORECASE,
)


@contextlib.contextmanager
def device_errors(cfg):
    """Too little memory and a refusal of cuDNN become UsageErrors that say what to turn."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).splitlines()
        if "RESOURCE_EXHAUSTED" in str(error):
            way_out = (
                f"Halve --micro_tokens={cfg.tokens_at_once}, down to one row of stages.seq_len, or "
                f"--head_block={cfg.head_block}: the update stays the same"
            )
            if "command buffer" in str(error):  # the driver's, which JAX leaves a quarter
                way_out = "Leave the driver more: XLA_CLIENT_MEM_FRACTION=0.7"
            raise OutOfMemory(f"out of memory. {way_out} ({lines[0][:300]})") from error
        refusals = [line for line in lines if CUDNN_REFUSES.search(line)]
        if cfg.attention == "cudnn" and refusals:
            said = f"cuDNN refuses ({refusals[0][:300]}); take --attention=xla"
            raise UsageError(said) from error
        raise


def evaluate(program, params, val_rows, cfg):
    """Validation loss: mean nats per target. Raises NonFiniteLoss."""
    nats, count = program(params, val_rows)
    assert int(count) == cfg.val_tokens, f"{count} targets scored, wanted {cfg.val_tokens}"
    return require_finite(float(nats) / cfg.val_tokens, "the validation loss")


def train_loop(state, programs, batches, val_rows, about, log, hook):
    """Dispatch a step, then wait for the loss of the one before. Returns the last State.

    about: as of save_checkpoint. hook(step) must answer alike on all hosts.

    Raises NonFiniteLoss, and SystemExit of 75 when the hook asks to leave.
    """
    cfg, clock = log.cfg, log.clock
    # Waiting for batches is on the clock. After a resumption the first one is off it: the loader
    # reads all that the run has read before.
    if 0 < int(state.step) < cfg.steps:
        batches = itertools.chain([next(batches)], batches)
    pending = None  # (step, loss) on its way from the device
    clock.start()
    for step in range(int(state.step) + 1, cfg.steps + 1):
        asked = time.perf_counter()
        batch = next(batches)
        log.waited += time.perf_counter() - asked
        state, loss = programs[f"train_{stage_at(step - 1, cfg)}"](state, batch)
        if pending:
            log.step(*pending)
        pending = step, loss

        is_last = step == cfg.steps
        stopping = hook(step) and not is_last
        evaluates = is_last or due(cfg.val_every, step)
        saves = is_last or stopping or due(cfg.save_every, step)
        if not (evaluates or saves):
            continue
        jax.block_until_ready(state)
        clock.stop()
        val_loss = evaluate(programs["eval"], state.params, val_rows, cfg) if evaluates else None
        log.step(*pending, val_loss)
        pending = None
        if saves:
            start = time.perf_counter()
            folder = save_checkpoint(log.folder, state, log.progress(), about, cfg)
            log.line(f"saved: {folder.name} in {time.perf_counter() - start:.1f}s")
        if stopping:
            if log.writes:
                print(f"stopped after step {step}. --resume={log.folder} or auto goes on")
            raise SystemExit(75)
        clock.start()
    clock.stop()
    return state


def show_samples(params, model, log):
    """Two samples of a model of bytes, each byte from a whole forward pass, in the log."""
    cfg = log.cfg
    params = jax.device_put(params, jax.devices()[0])
    weights = unstack(gather(params, model.specs(cfg), 1, cfg))

    @jax.jit
    def add_byte(weights, ids, i):
        logits_V = model.logits(weights, ids[None], cfg)[0, i - 1]
        key = jax.random.fold_in(jax.random.key(cfg.seed), i)
        return ids.at[i].set(jax.random.categorical(key, logits_V / 0.7))

    for prompt in (b"def main(", b"class "):
        ids = jnp.array([cfg.bos_id, *prompt, *[0] * 200])
        for i in range(1 + len(prompt), len(ids)):
            ids = add_byte(weights, ids, i)
        text = bytes(i for i in ids.tolist() if i < 256).decode(errors="replace")
        log.line("sample: " + "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text))


def first_or_saved(programs, checkpoint, manifest, model, log):
    """The State to train on from: the checkpoint's, or where there is none the model's first."""
    state = programs["init"]()
    if not checkpoint:
        return model.first_state(state, log.cfg)
    state = load_checkpoint(checkpoint, manifest["step"], state)
    log.line(f"resumed: {checkpoint} at step {manifest['step']}")
    return state


def main(argv=None, model=GPT, hook=lambda step: False):
    """Train. Returns the run's folder.

    argv: flags, by default the command line's. model: another architecture for the same loop.
    hook(step): called after each dispatched step; where it returns true, the loop saves and leaves.

    Raises UsageError, before anything is compiled but for what the device refuses; NonFiniteLoss;
    OSError where the disk refuses; SystemExit of 75 when told to leave.
    """
    source = Path(__file__).read_text(encoding="utf-8")
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv:
        return print_help()
    cfg, why = configure(argv, model.presets)
    print(f"speedrun-jax, preset {cfg.preset}: {why}", flush=True)
    train, val, cfg, data_note = open_data(cfg)
    about = {"data": hash_of(train.sha256, val.sha256), "meta": train.meta}
    mesh = make_mesh()
    like = jax.eval_shape(make_init(model, mesh, cfg))
    checkpoint, manifest = find_checkpoint(cfg, about["data"], like)
    check_hosts_agree(source, cfg, about["data"], manifest)
    folder = checkpoint.parent.parent if checkpoint else new_folder(cfg)
    if manifest.get("step") == cfg.steps and is_sealed(folder):
        print(f"{checkpoint} is that run's last step, nothing is left to train")
        return folder

    own = owning if jax.process_index() == 0 else contextlib.nullcontext
    with contextlib.ExitStack() as owned:
        if checkpoint:  # a new folder is made later: no other process knows it
            owned.enter_context(own(folder))
        cfg = fit_memory(model, mesh, cfg, manifest)
        owned.enter_context(device_errors(cfg))
        log = Log(folder, model.specs(cfg), cfg, manifest)
        programs, notes = compile_all(model, mesh, cfg)
        if not checkpoint:
            owned.enter_context(own(folder))
        log.begin(source, why, argv, train, val, [data_note, *notes])
        warm_up(programs, mesh, cfg)
        state = first_or_saved(programs, checkpoint, manifest, model, log)
        val_rows = to_devices(plan_val(val, cfg), cfg.val, mesh, cfg)
        batches = train_batches(train, int(state.step), mesh, cfg)
        state = train_loop(state, programs, batches, val_rows, about, log, hook)
        log.result()
        if val.meta["tokenizer"] == "bytes" and jax.process_count() == 1:
            show_samples(state.params, model, log)
    log.seal()
    return folder


def command(run):
    """Call run() for the shell: for what a user can mend, one sentence and an exit code."""
    code = 0
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: else the next file that is opened would be taken for it
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a console may not know all characters
            stream.reconfigure(errors="backslashreplace")
    try:
        run()
    except (UsageError, OSError, NonFiniteLoss) as error:
        code = 5 if isinstance(error, NonFiniteLoss) else 2
        print(f"error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        code = 134  # as where JAX itself ends a process that lost a host
        print(f"error: a host is gone, or the runtime failed: {error}", file=sys.stderr, flush=True)
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # nobody reads it any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = code or 2
    if code and jax.distributed.is_initialized():
        os._exit(code)  # the usual way out waits for hosts that wait for this one
    return code


# ---- TPU kernels ---------------------------------------------------------------------------------
# An appendix: attention_xla again as two Pallas kernels, one forward and one backward, and after
# them copy_sums_xla on the same grid. Skip it on first reading. From raw queries and keys attention
# does QK norm, half-RoPE, scores, softmax, average and gate (predicted for a v6e-8: 68.4 ms a step,
# 70.4 with the gate outside).
#
# The scores of a row, T = 8 tiles of 256 queries down, keys across, window of 3 tiles, 2 tiles a
# block. A tile meets one span of keys: "#" is its own tile, where causality cuts; "+" are keys
# that its window reaches; "." is never computed.
#
#      keys ->                grid step (block)    distance d to the row's start
#      # . . . . . . .        0                    0
#      + # . . . . . .        0                    0
#      + + # . . . . .        1                    1
#      + + + # . . . .        1                    1
#      . + + + # . . .        2                    2, as all later blocks
#      . . + + + # . .        2                    2
#      . . . + + + # .        3                    2
#      . . . . + + + #        3                    2
#
# The grid is row, head, block of queries in order. Keys and values that later blocks can reach
# stay in fast memory, normed and turned once. Scores are exponents of 2.

TILE = 256  # queries of a tile, the width of the matrix unit
LN2 = math.log(2)


class Band(NamedTuple):
    """The shape of the work. Hashable: it picks the compiled kernel."""

    length: int  # tokens of a row
    window: int  # tokens a query looks back
    block: int  # queries of a grid step
    scale: float  # of q.k
    num_heads: int

    @property
    def spans(self):
        """spans[d]: (first key, first query) of each tile of a row's d-th block.

        The last d stands for all later blocks, which have as many before them as they can reach.
        """
        reach = -(-min(self.window, self.length) // self.block) + 1
        spans = []
        for d in range(min(reach, self.length // self.block)):
            queries = range(d * self.block, (d + 1) * self.block, TILE)
            spans.append([(max(0, q - self.window) // 128 * 128, q) for q in queries])
        return spans

    @property
    def num_scores(self):
        """Scores of one row and head that are computed, but for the rounding of spans to 128."""
        return TILE * sum(min(q, self.window) + TILE for q in range(0, self.length, TILE))


# What a grid step sees: inputs, results, then memory that lasts for a row. first: the first visible
# key of each query; log_sum: log2 of the softmax's denominator; z: keys so far, normed and turned;
# delta: the gated y . dy, which the softmax's gradient takes off; r: of each key, from `prepare`.
ForwardRefs = collections.namedtuple("ForwardRefs", "first gate q k v cos sin y log_sum z values")
BackwardRefs = collections.namedtuple(
    "BackwardRefs",
    "first gate q k v cos sin y dy log_sum dq delta dk dv z values r dz dvalues",
)


def dot(a, b, a_axis, b_axis):
    """a and b summed over one axis of each, in float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=f32)


def rows_at(start, size=TILE):
    return pl.ds(pl.multiple_of(start, 128), size)


def as_row(column_T1):
    return jnp.broadcast_to(column_T1, (len(column_T1), 128)).T[:1]


def band_table(refs, rows):
    """(cos, sin) [T, K] of rotary for these rows, float32; sin with the sign of each half."""
    cos, sin = refs.cos[rows].astype(f32), refs.sin[rows].astype(f32)
    return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)


def prepare(x_TK, cos, sin, scale):
    """(z, r): z = r RoPE(x), r = sqrt(scale / ln 2) / rms(x). z.z' of q and k: an exponent of 2."""
    x = x_TK.astype(f32)
    r_T1 = lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6) * (scale / LN2) ** 0.5
    turned = x * cos + pltpu.roll(x, x.shape[1] // 2, 1) * sin
    return (turned * r_T1).astype(x_TK.dtype), r_T1


def prepare_backward(dz_TK, z_TK, r_T1, cos, sin, scale):
    """The gradient by x of prepare's z, back through norm and rotation."""
    z = z_TK.astype(f32)
    g = dz_TK - z * jnp.mean(dz_TK * z, axis=1, keepdims=True) * (LN2 / scale)
    turned_back = g * cos + pltpu.roll(g * sin, g.shape[1] // 2, 1)
    return (turned_back * (r_T1 * LN2)).astype(z_TK.dtype)  # d 2^s = ln 2 2^s ds


def visible(weights, first, keys_axis, gap=0):
    """Zero the weights of keys before `first`, and of keys after the query's place - gap.

    The last TILE keys are the queries' own.
    """
    key = lax.broadcasted_iota(jnp.int32, weights.shape, keys_axis)
    query = lax.broadcasted_iota(jnp.int32, weights.shape, 1 - keys_axis)
    own = query + weights.shape[keys_axis] - (TILE + gap)
    return jnp.where((key >= first) & (key <= own), weights, 0.0)


def each_tile(tile, band):
    """Run tile(here, own, keys) for each tile of this grid step's block.

    here: its rows in the block. own: the queries' rows. keys: the rows of all keys in reach.
    """
    i = pl.program_id(2)
    for d, spans in enumerate(band.spans):

        @pl.when(jnp.minimum(i, len(band.spans) - 1) == d)
        def _(d=d, spans=spans):
            for key, query in spans:
                base = (i - d) * band.block
                here = pl.ds(query % band.block, TILE)
                tile(here, rows_at(base + query), rows_at(base + key, query - key + TILE))


def load_tile(refs, here, own, band):
    """(q, its r, k's r, rotary's table) of a tile; its keys and values join those of the row."""
    table = band_table(refs, own)
    refs.z[own], k_r_T1 = prepare(refs.k[here], *table, band.scale)
    refs.values[own] = refs.v[here]
    q_TK, q_r_T1 = prepare(refs.q[here], *table, band.scale)
    return q_TK, q_r_T1, k_r_T1, table


def band_fwd(*refs, band):
    """Gated attention of a block of queries, and log2 of the softmax's denominator."""
    refs = ForwardRefs(*refs)

    def tile(here, own, keys):
        q_TK, *_ = load_tile(refs, here, own, band)
        first_T1 = refs.first[0, here].reshape(TILE, 1) - keys.start
        e_TS = visible(jnp.exp2(dot(q_TK, refs.z[keys], 1, 1)), first_T1, 1)
        sum_T1 = jnp.sum(e_TS, axis=1, keepdims=True)
        gate_T1 = refs.gate[0, here].reshape(TILE, 1)
        y_TK = dot(e_TS.astype(q_TK.dtype), refs.values[keys], 1, 0) * (gate_T1 / sum_T1)
        refs.y[here] = y_TK.astype(q_TK.dtype)
        refs.log_sum[:, here] = as_row(jnp.log2(sum_T1))

    each_tile(tile, band)


def write_keys(refs, rows, band):
    """dk and dv of a tile of the row, once all queries have added to them."""
    r_TK = jnp.tile(refs.r[rows], (1, refs.q.shape[1] // 128))
    table = band_table(refs, rows)
    refs.dk[rows] = prepare_backward(refs.dz[rows], refs.z[rows], r_TK, *table, band.scale)
    refs.dv[rows] = refs.dvalues[rows].astype(refs.dv.dtype)


def band_bwd(*refs, band):
    """Scores are computed again, keys by queries, so that only dq needs a transposition.

    dk and dv leave with the row's last block.
    """
    refs = BackwardRefs(*refs)

    def tile(here, own, keys):
        q_TK, q_r_T1, k_r_T1, table = load_tile(refs, here, own, band)
        refs.r[own] = jnp.broadcast_to(k_r_T1, (TILE, 128))
        refs.dz[own] = refs.dvalues[own] = jnp.zeros(q_TK.shape, f32)
        dy_TK = refs.dy[here].astype(f32)
        y_dy_TK = refs.y[here].astype(f32) * dy_TK
        refs.delta[:, here] = delta_1T = as_row(jnp.sum(y_dy_TK, axis=1, keepdims=True))
        dy_TK = (dy_TK * refs.gate[0, here].reshape(TILE, 1)).astype(q_TK.dtype)
        p_ST = jnp.exp2(dot(refs.z[keys], q_TK, 1, 1) - refs.log_sum[:, here])
        p_ST = visible(p_ST, refs.first[:, here] - keys.start, 0)
        dp_ST = dot(refs.values[keys], dy_TK, 1, 1)
        ds_ST = (p_ST * (dp_ST - delta_1T)).astype(q_TK.dtype)
        dz_TK = dot(ds_ST, refs.z[keys], 0, 0)
        refs.dq[here] = prepare_backward(dz_TK, q_TK, q_r_T1, *table, band.scale)
        refs.dz[keys] += dot(ds_ST, q_TK, 1, 0)
        refs.dvalues[keys] += dot(p_ST.astype(dy_TK.dtype), dy_TK, 1, 0)

    each_tile(tile, band)

    @pl.when(pl.program_id(2) == band.length // band.block - 1)
    def _():
        @pl.loop(0, band.length // TILE)
        def _(t):
            write_keys(refs, rows_at(t * TILE), band)


def band_specs(q_BTN, k_BTN, band):
    """{name: how a grid step's share of an array is cut out}."""
    block = band.block
    head_dim = q_BTN.shape[2] // band.num_heads
    heads_per_key = q_BTN.shape[2] // k_BTN.shape[2]

    def key_head(b, h, i):
        return b, i, lax.div(h, heads_per_key)

    return {
        # [B, 1, 1, T], one for all heads, a block or all, and [B, H, 1, T]; a kernel does not see
        # axes of None
        "row": pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, 0, 0, i)),
        "whole_row": pl.BlockSpec((None, None, 1, band.length), lambda b, h, i: (b, 0, 0, 0)),
        "head": pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, h, 0, i)),
        # [B, T, HK]: a block of one head; the same of the key head it shares; a whole row, which
        # leaves with its last block
        "queries": pl.BlockSpec((None, block, head_dim), lambda b, h, i: (b, i, h)),
        "keys": pl.BlockSpec((None, block, head_dim), key_head),
        "whole": pl.BlockSpec((None, band.length, head_dim), lambda b, h, i: (b, 0, h)),
        # [B, HK, T]: the same
        "columns": pl.BlockSpec((None, head_dim, band.length), lambda b, h, i: (b, h, 0)),
        # [T, K/2], all of it
        "table": pl.BlockSpec((band.length, head_dim // 2), lambda b, h, i: (0, 0)),
    }


BAND_INPUTS = "row head queries keys keys table table"  # first, gate, q, k, v, cos, sin


def band_call(kernel, num_matmuls, inputs, input_specs, outputs, output_specs, scratch, band):
    """Run a kernel. outputs: arrays like its results. specs: words, keys of band_specs.

    scratch: [(width, dtype)] of memory for a row.
    """
    specs = band_specs(*inputs[2:4], band)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    num_rows, length, width = inputs[2].shape
    scores = num_rows * band.num_scores
    cost = pl.CostEstimate(  # without it XLA would plan as if the kernel took no time
        flops=2 * num_matmuls * scores * width,
        transcendentals=band.num_heads * scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *shapes)),
    )
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=64 << 20
    )
    call = pl.pallas_call(
        functools.partial(kernel, band=band),
        grid=(num_rows, band.num_heads, length // band.block),
        in_specs=[specs[word] for word in input_specs.split()],
        out_specs=[specs[word] for word in output_specs.split()],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((length, size), dtype) for size, dtype in scratch],
        compiler_params=params,
        cost_estimate=cost,
        name=kernel.__name__,
    )
    return call(*inputs)


def _banded_forward(inputs, band):
    q_BTN = inputs[2]
    log_sum = jax.ShapeDtypeStruct((len(q_BTN), band.num_heads, 1, band.length), f32)
    scratch = [(q_BTN.shape[2] // band.num_heads, q_BTN.dtype)] * 2  # z, values
    y_BTN, log_sum_BH1T = band_call(
        band_fwd, 2, inputs, BAND_INPUTS, (q_BTN, log_sum), "queries head", scratch, band
    )
    return y_BTN, (inputs, y_BTN, log_sum_BH1T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def banded(inputs, band):
    """Gated attention [B, T, HK] of raw queries over the keys first .. T.

    inputs: (first_B11T, gate_BH1T, q_BTN, k_BTN, v_BTN, cos, sin), the last two from rotary.
    """
    return _banded_forward(inputs, band)[0]


def _banded_backward(band, saved, dy_BTN):
    inputs, y_BTN, log_sum_BH1T = saved
    gate_BH1T, q_BTN, k_BTN = inputs[1:4]
    head_dim = y_BTN.shape[2] // band.num_heads
    narrow, wide = (head_dim, q_BTN.dtype), (head_dim, f32)
    dq_BTN, delta_BH1T, *dkv_BTN = band_call(
        band_bwd,
        5,
        (*inputs, y_BTN, dy_BTN, log_sum_BH1T),
        BAND_INPUTS + " queries queries head",
        (q_BTN, log_sum_BH1T, q_BTN, q_BTN),  # dq, delta, dk and dv of each query head
        "queries head whole whole",
        [narrow, narrow, (128, f32), wide, wide],  # z, values, r, dz, dvalues
        band,
    )
    of_group = "B T (G R K) -> B T (G K)"
    num_groups = k_BTN.shape[2] // head_dim
    dk, dv = (reduce(g, of_group, "sum", G=num_groups, K=head_dim) for g in dkv_BTN)
    dgate = delta_BH1T / jnp.maximum(gate_BH1T, 1e-30)
    return ((None, dgate, dq_BTN, dk, dv, None, None),)


banded.defvjp(_banded_forward, _banded_backward)


# The copy pointer's kernels: one head without values. Its weights are summed: all of them, and
# those of keys with the query's target. All keys and targets of a row lie in fast memory.
CopyForwardRefs = collections.namedtuple("CopyForwardRefs", "first targets q k key_targets sum hit")
CopyBackwardRefs = collections.namedtuple(
    "CopyBackwardRefs", "first targets q k key_targets dsum dhit dq dk"
)
COPY_INPUTS = "row row queries whole whole_row"


def copy_exps(refs, here, keys):
    """2^(q.k) of the visible keys, and whether key and query have one target, both [T, S]."""
    first_T1 = refs.first[0, here].reshape(TILE, 1) - keys.start
    e_TS = visible(jnp.exp2(dot(refs.q[here], refs.k[keys], 1, 1)), first_T1, 1, gap=1)
    return e_TS, refs.key_targets[:, keys] == refs.targets[0, here].reshape(TILE, 1)


def copy_fwd(*refs, band):
    """The sums of a block of queries."""
    refs = CopyForwardRefs(*refs)

    def tile(here, own, keys):
        e_TS, same_TS = copy_exps(refs, here, keys)
        refs.sum[:, here] = as_row(jnp.sum(e_TS, axis=1, keepdims=True))
        refs.hit[:, here] = as_row(jnp.sum(jnp.where(same_TS, e_TS, 0.0), axis=1, keepdims=True))

    each_tile(tile, band)


def copy_bwd(*refs, band):
    """Weights are computed again. dk is [Q, S], so that only q needs a transposition."""
    refs = CopyBackwardRefs(*refs)

    def tile(here, own, keys):
        e_TS, same_TS = copy_exps(refs, here, keys)
        dsum_T1, dhit_T1 = (d[0, here].reshape(TILE, 1) for d in (refs.dsum, refs.dhit))
        ds_TS = e_TS * jnp.where(same_TS, dsum_T1 + dhit_T1, dsum_T1)
        ds_TS = ds_TS.astype(refs.k.dtype)
        refs.dq[here] = dot(ds_TS, refs.k[keys], 1, 0).astype(refs.dq.dtype)
        refs.dk[:, own] = jnp.zeros((len(refs.dk), TILE), f32)
        refs.dk[:, keys] += dot(refs.q[here].T, ds_TS, 1, 0)

    each_tile(tile, band)


def _copied_forward(first_B11T, targets_B11T, q_BTQ, k_BTQ, band):
    q_BTQ = (q_BTQ.astype(f32) / LN2).astype(q_BTQ.dtype)  # q.k: an exponent of 2
    inputs = first_B11T, targets_B11T, q_BTQ, k_BTQ, targets_B11T
    sums = [jax.ShapeDtypeStruct(first_B11T.shape, f32)] * 2
    return band_call(copy_fwd, 1, inputs, COPY_INPUTS, sums, "row row", [], band), inputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def copied(first_B11T, targets_B11T, q_BTQ, k_BTQ, band):
    """(sum, hit) [B, 1, 1, T] of exp(q.k) over the keys first .. T - 1."""
    return _copied_forward(first_B11T, targets_B11T, q_BTQ, k_BTQ, band)[0]


def _copied_backward(band, inputs, dsums):
    q_BTQ, k_BTQ = inputs[2:4]
    dq_BTQ, dk_BQT = band_call(
        copy_bwd,
        3,
        (*inputs, *dsums),
        COPY_INPUTS + " row row",
        (q_BTQ, jax.ShapeDtypeStruct(k_BTQ.mT.shape, f32)),
        "queries columns",
        [],
        band,
    )
    return None, None, dq_BTQ, (LN2 * dk_BQT.mT).astype(k_BTQ.dtype)


copied.defvjp(_copied_forward, _copied_backward)


if __name__ == "__main__":
    sys.exit(command(lambda: main(hook=Stop())))
