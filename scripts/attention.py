"""Is this machine's fast attention as exact as the plain one, and what does it cost? For bench.

A case is a width of a head and a window. Its rows are of the longest stage: the first is one
document, the second has documents of one token, the others have documents of 500 on average (of a
config that packs no documents each row is one). Both
attentions get the same raw projections in bfloat16; what is right is attention_xla in float32.

The fast one passes where its rounding is like the plain one's. In each block of 128 tokens, of the
output and of every gradient, the root mean square of its error is at most three times the plain
one's plus 2^-9 of the values there. So a window that is wrong by one token shows.
"""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

import train
from train import ATTENTION, UsageError, f32, replace, require, rotary

FASTEST = {"gpu": "cudnn", "tpu": "band"}
HEAD_DIMS = (128, 256)
WINDOWS = (0, 640, 1408)  # tokens; 0: the whole row
ARRAYS = ("y", "dq", "dk", "dv", "dgate")
BLOCK = 128  # tokens over which an error is averaged
LIMIT = 3.0
HEAD = """\
  head         worst    largest error, in thousandths of the largest value:       milliseconds
   dim window  ratio    fast, plain                                               of both passes"""


def document_starts(num_rows, length):
    """Where each position's document begins, int32 [B, T]."""
    rng = np.random.default_rng(1337)
    position_T = np.arange(length)
    rows = [np.zeros(length), position_T]
    for _ in range(max(1, num_rows - 2)):
        is_start_T = rng.random(length) < 1 / 500
        rows.append(np.maximum.accumulate(np.where(is_start_T, position_T, 0)))
    return jnp.array(np.stack(rows), jnp.int32)


def draw_inputs(num_rows, length, cfg):
    """(q, k, v, gate, the output's gradient), all but the gate in bfloat16."""
    rng = np.random.default_rng(1337)
    shape = 4, num_rows, length, cfg.num_heads * cfg.head_dim
    q_BTN, k_BTN, v_BTN, dy_BTN = jnp.array(rng.standard_normal(shape, np.float32), jnp.bfloat16)
    gate_BTH = jnp.array(rng.random((num_rows, length, cfg.num_heads), np.float32))
    return q_BTN, k_BTN, v_BTN, gate_BTH, dy_BTN


def make_run(name, window, cfg):
    """jit of (document_BT, *draw_inputs) -> {array: the output, or a gradient}."""

    def run(document_BT, *inputs):
        *inputs, dy_BTN = inputs
        table = rotary(document_BT.shape[1], cfg.stages[-1], cfg)

        def attend(*inputs):
            return ATTENTION[name](*inputs, document_BT, table, window, cfg)

        y_BTN, pull_back = jax.vjp(attend, *inputs)
        return dict(zip(ARRAYS, (y_BTN, *pull_back(dy_BTN)), strict=True))

    options = train.compiler_options(train.make_mesh(), cfg)  # as training rounds
    return jax.jit(run, compiler_options=options)


def block_rms(x_BTN):
    """Root mean square of each block of a row, [B, C]."""
    size = min(BLOCK, x_BTN.shape[1])
    return np.sqrt(reduce(np.square(x_BTN), "B (C T) N -> B C", "mean", T=size))


def errors_of(fast, plain, exact):
    """What a case's row says of one array."""
    fast, plain, exact = (np.asarray(x, np.float32) for x in (fast, plain, exact))
    fast_error, plain_error = np.abs(fast - exact), np.abs(plain - exact)
    allowed = block_rms(plain_error) + 2.0**-9 * block_rms(exact)
    largest = np.abs(exact).max()
    return {
        "fast": float(fast_error.max() / largest),
        "plain": float(plain_error.max() / largest),
        "ratio": float(np.max(block_rms(fast_error) / np.maximum(allowed, 1e-20))),
    }


def median_ms(run, inputs, num_calls):
    """Of calls that are waited for, so the host's share is in it."""
    seconds = []
    for _ in range(num_calls):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def compare(name, head_dim, window, num_calls, cfg):
    """What a case's row says of each array, the worst ratio, and times."""
    cfg = replace(
        cfg,
        head_dim=head_dim,
        num_heads=max(1, cfg.num_heads * cfg.head_dim // head_dim),
        num_kv_heads=None,
        compute_dtype="bfloat16",
    )
    length = max(stage.seq_len for stage in cfg.stages)
    document_BT = document_starts(cfg.tokens_at_once // length, length)
    if not cfg.is_packed:  # then no attention is asked to see documents
        document_BT = jnp.zeros_like(document_BT)
    inputs = document_BT, *draw_inputs(*document_BT.shape, cfg)
    runs = {who: make_run(who, window or length, cfg) for who in (name, "xla")}
    fast, plain = (run(*inputs) for run in runs.values())
    wide = [x.astype(f32) for x in inputs[1:]]
    with jax.default_matmul_precision("float32"):
        run = make_run("xla", window or length, replace(cfg, compute_dtype="float32"))
        exact = run(document_BT, *wide)
    row = {}
    for array in ARRAYS:
        row[array] = errors_of(fast[array], plain[array], exact[array])
    row["ratio"] = float(np.max([row[array]["ratio"] for array in ARRAYS]))  # NaN where one is
    row["fast_ms"], row["plain_ms"] = (median_ms(run, inputs, num_calls) for run in runs.values())
    return row


def line_of(row):
    if "error" in row:
        return "{head_dim:6}{window:7}  {error}".format(**row)
    errors = "".join(
        f"{1e3 * row[name]['fast']:6.1f}{1e3 * row[name]['plain']:6.1f}" for name in ARRAYS
    )
    shape = f"{row['head_dim']:6}{row['window']:7}{row['ratio']:7.2f}"
    return f"{shape}{errors}{row['fast_ms']:9.2f}{row['plain_ms']:8.2f}"


def check_attention(num_calls, cfg):
    """Yield (a line, its row) of each case.

    Raises UsageError, after all cases, where the fast attention errs too much.
    """
    platform = jax.default_backend()
    wanted = "wanted a GPU or a TPU: a CPU has only the plain attention"
    require(platform in FASTEST, f"--attention: {wanted}")
    name = FASTEST[platform]
    capability = train.compute_capability(jax.devices()[0])
    yield f"fast: attention_{name}; plain: attention_xla; right: that in float32", None
    yield HEAD, None
    yield " " * 20 + "".join(f"{array:>12}" for array in ARRAYS) + "     fast   plain", None
    wrong = []
    num_cases = 0
    for head_dim in HEAD_DIMS:
        lack = train.lacking(replace(cfg, head_dim=head_dim), platform, capability)[name]
        if lack:
            yield f"{head_dim:6}  not run: {name} wants {lack}", None
            continue
        for window in WINDOWS:
            num_cases += 1
            row = {"attention": name, "head_dim": head_dim, "window": window, "ratio": math.nan}
            try:
                row |= compare(name, head_dim, window, num_calls, cfg)
            except (RuntimeError, ValueError) as error:  # JAX, its cuDNN or memory refuses
                row["error"] = str(error).split("\n")[0][:200]
            yield line_of(row), row
            if not row["ratio"] <= LIMIT:  # NaN is wrong too
                wrong.append(f"{row['ratio']:.1f} (head_dim {head_dim}, window {window})")
    require(num_cases, f"--attention: nothing was checked; {name} wants {lack}")
    if wrong:
        said = f"attention_{name} fails, or errs over {LIMIT:g} times as much as attention_xla"
        raise UsageError(f"{said}: {', '.join(wrong)}. Train with --attention=xla")
