"""What does a compiled GPU program cost? Bounds, read off its text without a GPU.

    roofline    of each kernel the longer of FLOPs / peak and bytes / bandwidth, summed
    table       the same, with each matmul at least as long as XLA's own table of matmuls says. The
                table was measured for bf16 results; ours are float32

Loop bodies count times their trip count. What the compiler's order of instructions exposes of the
collectives is added to both. cuDNN's attention (FMHA) is a call that the text says nothing of, so
it stands apart: its FLOPs follow from shapes and window.

Not in the bounds: what launching a kernel costs, the autotuner's choices, how near a kernel comes
to its roofline. Nothing here was ever calibrated.
"""

import collections
import functools
import json
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import train
from scripts.dry_run.estimate import Chip, Walk, waits
from scripts.dry_run.hlo import Module, total_bytes

SMALL = 1e-3  # matmuls of a smaller share of all FLOPs are not looked up in the table
FMHA_SHARE = 0.4  # of the peak FLOPs that FMHA reaches: an assumption


# ---- The walk ------------------------------------------------------------------------------------
class Fmha(NamedTuple):
    """One call of cuDNN's attention."""

    flops: float  # of the scores that causality and window leave
    bytes: float  # moved, of the mask only what lies in the band
    mask: str  # the instruction that made it, or ""


def is_fmha(i):
    return i.op == "custom-call" and "__cudnn$fmha" in i.attrs


def origin(name, computation):
    """The instruction that made a value, behind views of it."""
    i = computation[name]
    while i.op in ("bitcast", "get-tuple-element") and i.operands[0] in computation:
        i = computation[i.operands[0]]
    return i


def read_fmha(i, computation):
    """Fmha of a call. Its operands begin with q [B, T, H, K] and k [B, S, G, K]."""
    B, T, H, K = computation[i.operands[0]].arrays[0].dims
    window = int(i.find(r'"sliding_window_length": ?(\d+)', T)) or T  # tokens, with the query's own
    window = min(window, T)
    scores = T * window - window * (window - 1) / 2
    matmuls = 5 if "Backward" in i.find(r'custom_call_target="([^"]*)"') else 2
    moved = 0.0
    mask = ""
    for operand in i.operands:
        array = computation[operand].arrays[0]
        if array.dims[-2:] == (T, T):
            moved += array.bytes * scores / T**2
            mask = origin(operand, computation).name
        else:
            moved += array.bytes
    moved += total_bytes(array for array in i.arrays if array.dtype != "u8")  # u8: scratch memory
    return Fmha(2.0 * matmuls * B * H * K * scores, moved, mask)


def matmul_sizes(dot, computation):
    """(batch, M, K, N) of a dot."""
    left, right = (computation[name].arrays[0].dims for name in dot.operands[:2])

    def axes(key):
        found = dot.find(key + r"=\{([\d,]*)\}", "")
        return [int(axis) for axis in found.split(",") if axis]

    batch = math.prod(left[axis] for axis in axes("lhs_batch_dims"))
    summed = math.prod(left[axis] for axis in axes("lhs_contracting_dims"))
    rows = math.prod(left) // (batch * summed)
    columns = math.prod(right) // (batch * summed)
    return batch, rows, summed, columns


class GpuWalk(Walk):
    """Rows of all kernels that run, of FMHA calls and of collectives."""

    def __init__(self, module, chip):
        super().__init__(module, chip)
        self.fmha = {}  # {instruction: Fmha}
        self.matmuls = {}  # {instruction: [(batch, M, K, N)]}
        self.of_weights = set()  # matmuls whose einsum ends in two axes, as weights' gradients do
        self.uncosted = collections.Counter()  # {target of a custom call: instructions}

    def matmuls_in(self, i, computation):
        if i.op == "dot":
            return [matmul_sizes(i, computation)]
        inner = self.module.computations.get(i.called("calls"), {}) if i.op == "fusion" else {}
        return [sizes for each in inner.values() for sizes in self.matmuls_in(each, inner)]

    def compute(self, i, computation):
        if i.op == "fusion-start":  # its result is (operands, results, context)
            given = sum(len(computation[name].arrays) for name in i.operands)
            i = i._replace(op="fusion", arrays=i.arrays[given:-1])
        if is_fmha(i):
            call = self.fmha[i.name] = read_fmha(i, computation)
            seconds = max(call.flops / self.chip.flops, call.bytes / self.chip.bandwidth)
            numbers = {"flops": call.flops, "hbm_bytes": call.bytes}
            return [self.row(i, "fmha", low_s=seconds, est_s=seconds, high_s=seconds, **numbers)]
        rows = super().compute(i, computation)
        if i.op == "custom-call" and rows:
            self.uncosted[i.find(r'custom_call_target="([^"]*)"', "?")] += 1
        sizes = self.matmuls_in(i, computation)
        if sizes:
            self.matmuls[i.name] = sizes
            if re.search(r"->\w\w\)", i.find(r'op_name="([^"]*)"', "")):
                self.of_weights.add(i.name)
        return rows

    def collective(self, i, computation, hidden):
        """A switch joins the GPUs, so bytes of an all-to-all travel once, and not along a ring."""
        row = super().collective(i, computation, hidden)
        factor = 2 if row.op == "all-to-all" else 1
        return row._replace(sent_bytes=factor * row.sent_bytes, link_s=factor * row.link_s)


# ---- XLA's table of matmuls ----------------------------------------------------------------------
@functools.cache
def table_seconds(device, batch, rows, summed, columns):
    """Of a matmul from bf16 to bf16, as XLA's table for this device says; None where it has none.

    The compiler states it in a program of that matmul alone.
    """
    mesh = train.make_mesh([device])
    whole = NamedSharding(mesh, P())
    a_BMK = jax.ShapeDtypeStruct((batch, rows, summed), jnp.bfloat16, sharding=whole)
    b_BKN = jax.ShapeDtypeStruct((batch, summed, columns), jnp.bfloat16, sharding=whole)
    told = {"xla_gpu_collect_cost_model_stats": True, "xla_gpu_enable_triton_gemm": False}
    program = jax.jit(functools.partial(jnp.einsum, "BMK,BKN->BMN")).lower(a_BMK, b_BKN)
    try:
        text = program.compile(compiler_options=told).as_text()
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):  # "Cannot find key: sm_80": no table of an A100
            return None
        raise
    microseconds = [0.0]
    for stated in re.findall(r'"reification_cost":(\[.*?\]),"device_type"', text):
        entries = [entry for entry in json.loads(stated) if entry["name"] == "sol"]
        microseconds += [entry["exec_time_us"] for entry in entries]
    return 1e-6 * max(microseconds) or None


# ---- A program -----------------------------------------------------------------------------------
class Cost(NamedTuple):
    """Of a program, per GPU and step."""

    rows: list
    roofline_s: float  # without FMHA
    table_s: float | None  # the same, with matmuls by the table; None where there is none
    table_share: float  # of the FLOPs outside of FMHA
    flops: float  # without FMHA
    hbm_bytes: float  # without FMHA
    launches: float | None  # collectives and copies too; None where a trip count is unknown
    wait_s: float  # for collectives; in both bounds
    fmha_calls: float
    fmha_flops: float
    fmha_s: float  # its roofline
    scores: list  # (calls, Array) of [T, T] arrays that are written, but for FMHA's mask
    masks: list  # the same of FMHA's mask
    logits: list  # the same of float32 logits: of a block of tokens, or of all
    uncosted: dict  # {custom call: instructions}
    unknown_trip_counts: list


def gpu_chip(kind):
    """A kind of GPU as estimate.py's walk wants it, which reckons with two links."""
    gib = kind.memory / 2**30
    return Chip(
        kind.flops, 2 * kind.flops, kind.bandwidth, 1e9 * kind.clock_ghz, kind.link / 2, gib
    )


def by_table(walk, rows, device):
    """(seconds that the table adds to the roofline, FLOPs that are in it)."""
    total = sum(row.calls * row.flops for row in rows if row.kind == "matmul")
    added = 0.0
    known = 0.0
    for row in rows:
        if row.name not in walk.matmuls or row.calls * row.flops < SMALL * total:
            continue
        found = [table_seconds(device, *sizes) for sizes in walk.matmuls[row.name]]
        if None not in found:
            added += row.calls * max(0.0, sum(found) - row.low_s)
            known += row.calls * row.flops
    return added, known / total if total else 0.0


def arrays_written(module, rows):
    """(name, calls, Array) of each result that is written to memory."""
    calls = {row.name: row.calls for row in rows if row.kind != "done"}
    for computation in module.computations.values():
        for i in computation.values():
            if i.name in calls:
                yield from ((i.name, calls[i.name], array) for array in i.arrays)


def scores_and_masks(written, walk, length, cfg):
    """Two lists of (calls, Array): of arrays with two axes of a row's length.

    Where a row is as long as the model is wide, weights and activations have two such axes too.
    Then only what a matmul of queries and keys writes is taken for scores.
    """
    made = {call.mask for call in walk.fmha.values()}
    found = [entry for entry in written if entry[2].dims.count(length) >= 2]
    masks = [entry[1:] for entry in found if entry[0] in made]
    others = [entry for entry in found if entry[0] not in made]
    widths = cfg.model_dim, cfg.mlp_dim, cfg.num_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    if length in widths:
        of_keys = cfg.head_dim, cfg.copy_dim  # a query and a key have as many dims
        makers = set()
        for name, matmuls in walk.matmuls.items():
            if any(summed in of_keys for _, _, summed, _ in matmuls):
                makers.add(name)
        others = [entry for entry in others if entry[0] in makers - walk.of_weights]
    return [entry[1:] for entry in others], masks


def logits_among(written, num_ids, sizes):
    """(calls, Array) of float32 arrays of logits. sizes: how many tokens have them at a time."""
    logits = []
    for _, calls, array in written:
        is_wide = array.dtype == "f32" and num_ids in array.dims
        if is_wide and math.prod(array.dims) // num_ids in sizes:
            logits.append((calls, array))
    return logits


def gpu_cost(text, job, kind, cfg):
    """Cost of a compiled program's text."""
    module = Module(text)
    walk = GpuWalk(module, gpu_chip(kind))
    rows = list(walk.rows(module.entry))
    fmha = [row for row in rows if row.kind == "fmha"]
    others = [row for row in rows if row.kind != "fmha"]

    def total(field, among):
        return sum(row.calls * getattr(row, field) for row in among)

    wait_s = waits(rows)
    roofline_s = total("low_s", others) + wait_s
    added_s, share = by_table(walk, others, job.mesh.devices.flat[0])
    written = list(arrays_written(module, rows))
    scores, masks = scores_and_masks(written, walk, job.stage.seq_len, cfg)
    num_ids = job.stage.candidates or cfg.padded_vocab
    sizes = train.tokens_of_micro_step(job.stage, job.mesh.size, cfg)
    return Cost(
        rows=rows,
        roofline_s=roofline_s,
        table_s=roofline_s + added_s if share else None,
        table_share=share,
        flops=total("flops", others),
        hbm_bytes=total("hbm_bytes", others),
        launches=module.num_kernels(),
        wait_s=wait_s,
        fmha_calls=sum(row.calls for row in fmha),
        fmha_flops=total("flops", fmha),
        fmha_s=total("low_s", fmha),
        scores=scores,
        masks=masks,
        logits=logits_among(written, num_ids, sizes),
        uncosted=dict(walk.uncosted),
        unknown_trip_counts=walk.unknown,
    )
