"""How long does a compiled TPU program take? Predicted from its text, without a TPU.

    python -m scripts.dry_run.estimate step.hlo [v6e|v5e|v5p]   on a text that dry_run --dump wrote

Two sums over the instructions that run, loop bodies times their trip count:

    low    the roofline: the longer of FLOPs / peak and HBM bytes / bandwidth. What lies in VMEM is
           free, a slice counts what it touches, prefetch to VMEM counts once in total. Products
           of int8 have a peak of their own, all others that of bf16.
    high   the compiler's own `estimated_cycles` / clock, at least the time of its HBM bytes.

The estimate is their mean. Synchronous collectives are added to both, asynchronous ones as far as
the order of instructions exposes them (`waits`). The compiler says nothing of a Pallas kernel; it
counts by its instruction bundles (bundles.py), or else by its cost_estimate.

Calibration, all on v6e: three phases of a public 8-chip speedrun log (training at two lengths,
evaluation) and one public single-chip step: estimate / measured = 0.93, 1.00, 1.06, 0.94. Low alone
is 0.64 to 0.76 of measured, high 1.22 to 1.36. So allow 15 % on a whole step and more on a piece.
Those programs held JAX's splash attention, costed by a fit that stands in commit b53da1f.
The links between chips are hardly tested by this; v5e and v5p not at all. Host input, dispatch and
evaluation are not in it. To compare two variants look at low and the estimate together.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from scripts.dry_run.hlo import COLLECTIVES, INT8, Module, NoProgram, total_bytes
from scripts.files import NotText, read_text
from train import UsageError, command


class Chip(NamedTuple):
    flops: float  # bf16, per second
    int8_flops: float  # the same of int8
    bandwidth: float  # of HBM, bytes per second
    clock: float  # Hz
    link: float  # bytes per second, one way
    hbm_gib: float  # that a program can use


CHIPS = {
    "v6e": Chip(918e12, 1836e12, 1638e9, 1.75e9, 90e9, 31.25),
    "v5e": Chip(197e12, 394e12, 819e9, 1.5e9, 45e9, 15.75),
    "v5p": Chip(459e12, 918e12, 2765e9, 1.75e9, 90e9, 95.0),
}
KERNEL_EFFICIENCY = 0.70  # share of the peak FLOPs; a fit to attention kernels timed on a v6e
BUNDLE_RANGE = (1.0, 1.15, 1.3)  # low, estimate, high: of a kernel's bundles, which lack stalls
LAUNCH_S = 3e-6  # of a synchronous collective
FREE = set(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id iota "
    "opt-barrier domain add-dependency async-update".split()
)
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape"}
SENT = {  # bytes that a chip sends of each byte, through a ring of n chips, times n / (n - 1)
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 0.5,
}


class UncostedKernel(UsageError):
    """A Pallas kernel without a cost_estimate: the compiler and this file would take it as free."""


class Row(NamedTuple):
    """An instruction; its numbers are of one run of it."""

    name: str
    kind: str  # matmul, kernel, prefetch, sync or async collective, done (of `name`), or the op
    calls: float = 1
    flops: float = 0.0
    hbm_bytes: float = 0.0
    low_s: float = 0.0
    est_s: float = 0.0  # of a kernel; elsewhere as high_s
    high_s: float = 0.0
    sent_bytes: float = 0.0
    link_s: float = 0.0  # of a collective
    op: str = ""  # of a collective
    shape: str = ""
    source: str = ""  # path of JAX operations
    in_loop: bool = False


class Cost(NamedTuple):
    """Of a program, per chip."""

    est_s: float
    low_s: float
    high_s: float
    flops: float
    hbm_bytes: float
    prefetch_bytes: float
    sent_bytes: float
    sync_s: float
    async_s: float
    wait_s: float  # for asynchronous collectives
    kernel_s: float
    matmul_s: float
    rows: list
    unknown_trip_counts: list


# ---- Collectives and kernels ---------------------------------------------------------------------
def group_size(collective):
    """Devices that take part in it."""
    size = collective.find(r"replica_groups=\[\d+,(\d+)\]")
    if size:
        return int(size)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", collective.attrs)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", mesh[2]))
    listed = collective.find(r"replica_groups=\{\{([\d,]*)\}")
    return len(listed.split(",")) if listed else 8


def collective_cost(collective, computation, link):
    """(bytes each chip sends, seconds): a ring through a slice of the mesh, over two links."""
    op = collective.op.removesuffix("-start")
    operands = [computation[name] for name in collective.operands if name in computation]
    into = sum(total_bytes(i.arrays) for i in operands)
    out = total_bytes(collective.arrays)
    if op == "all-reduce":
        size = into or out
    elif op == collective.op:
        size = max(out, into)
    else:  # the result of a start holds its operands too
        size = max(out - into, into)
    n = group_size(collective)
    ring = (n - 1) / n
    share = SENT[op] * ring if op in SENT else 1.0
    sent = share * size if n > 1 else 0.0
    return sent, sent / (2 * link) + LAUNCH_S


def kernel_cost(kernel, hbm_bytes, chip, bundle_s):
    """Numbers of a kernel's Row. bundle_s: seconds by its bundles, or None."""
    stated = kernel.cost_estimate
    if not stated:
        raise UncostedKernel(
            f"kernel {kernel.name} has no cost_estimate; give its pallas_call a pl.CostEstimate"
        )
    flops = stated.get("flops", 0.0)
    hbm_bytes = stated.get("bytes_accessed") or hbm_bytes
    transfer_s = hbm_bytes / chip.bandwidth
    low = max(flops / chip.flops, transfer_s)
    if bundle_s is None:
        est = high = max(flops / (chip.flops * KERNEL_EFFICIENCY), transfer_s)
    else:
        low, est, high = (max(low, factor * bundle_s) for factor in BUNDLE_RANGE)
    numbers = {"flops": flops, "hbm_bytes": hbm_bytes}
    return numbers | {"low_s": low, "est_s": est, "high_s": high}


# ---- The walk over what runs ---------------------------------------------------------------------
class Walk:
    """Rows of all instructions that run. bundles: {kernel: seconds of a call by its bundles}."""

    def __init__(self, module, chip, bundles=None):
        self.module = module
        self.chip = chip
        self.bundles = bundles or {}
        self.unknown = []  # loops without a trip count
        self.channels = set()  # of the fused collectives that are counted already

    def rows(self, name, calls=1, in_loop=False):
        """Of a computation that runs `calls` times. Raises NoProgram."""
        computation = self.module.computations.get(name)
        if computation is None:
            raise NoProgram(f"{name}: it is called, but is not there")
        for i in computation.values():
            if i.op == "while":
                trips = self.module.trip_count(i)
                if trips is None:
                    self.unknown.append(i.name)
                yield from self.rows(i.called("body"), calls * (trips or 1), True)
            elif i.op == "conditional":
                for branch in i.branches:  # taken as equally likely
                    yield from self.rows(branch, calls / len(i.branches), in_loop)
            elif i.op == "call":
                yield from self.rows(i.called("to_apply"), calls, in_loop)
            elif i.op not in FREE:
                for row in self.checked_leaf(i, computation):
                    yield row._replace(calls=calls, in_loop=in_loop)

    def checked_leaf(self, i, computation):
        """Rows of an instruction. Raises NoProgram where operands or sizes do not fit."""
        try:
            return self.leaf(i, computation)
        except UsageError:
            raise
        except (LookupError, ValueError) as error:
            raise NoProgram(f"{i.name}: no instruction of a compiler") from error

    def row(self, instruction, kind, **numbers):
        source = instruction.find(r'op_name="([^"]*)"', "")
        shape = instruction.type[:60]
        return Row(instruction.name, kind, shape=shape, source=source, **numbers)

    def leaf(self, i, computation):
        """Rows of an instruction that calls no other computation: none, one or two."""
        if i.op.endswith("-done"):
            return [Row(i.operands[0] if i.operands else "", "done")]
        if i.op in ("async-start", "call-start"):
            return self.offloaded(i)
        if i.op.removesuffix("-start") in COLLECTIVES:
            return [self.collective(i, computation, i.op.endswith("-start"))]
        if i.op in ("copy-start", "slice-start"):  # between HBM and VMEM, while others compute
            into, source = i.arrays[:2] if len(i.arrays) > 1 else (None, None)
            if into and 0 in (into.space, source.space):
                return [self.row(i, "prefetch", hbm_bytes=source.bytes)]
            return []
        if i.is_kernel:
            moved = self.module.hbm_bytes(i, computation)
            numbers = kernel_cost(i, moved, self.chip, self.bundles.get(i.name))
            return [self.row(i, "kernel", **numbers)]
        return [*self.compute(i, computation), *self.fused_collective(i)]

    def collective(self, i, computation, hidden):
        sent, seconds = collective_cost(i, computation, self.chip.link)
        kind = "async collective" if hidden else "sync collective"
        op = i.op.removesuffix("-start")
        return self.row(i, kind, sent_bytes=sent, link_s=seconds, op=op)

    def offloaded(self, i):
        """A collective that a core of its own makes."""
        called = i.called("calls") or i.called("to_apply")
        inner = self.module.computations.get(called, {})
        for found in inner.values():
            if found.op.removesuffix("-start") in COLLECTIVES:
                return [self.collective(found, inner, True)._replace(name=i.name)]
        return []

    def fused_collective(self, i):
        """The first one inside a fusion. Several fusions can hold parts of one: same channel."""
        inner = self.module.computations.get(i.called("calls"), {}) if i.op == "fusion" else {}
        for found in inner.values():
            if found.op in COLLECTIVES:
                channel = found.find(r"channel_id=(\d+)", found.name)
                if channel in self.channels:
                    return []
                self.channels.add(channel)
                hidden = channel in self.module.async_channels
                return [self.collective(found, inner, hidden)]
        return []

    def compute(self, i, computation):
        cycles = int(i.find(r'"estimated_cycles":"(\d+)"', 0))
        if i.op == "custom-call" and i.find(r'custom_call_target="([^"]*)"', "") in FREE_CALLS:
            return []
        flops = self.module.flops(i, computation)
        int8 = self.module.flops(i, computation, INT8)
        matmul_s = (flops - int8) / self.chip.flops + int8 / self.chip.int8_flops
        moved = self.module.hbm_bytes(i, computation)
        if i.op == "custom-call" and not cycles:
            moved = 0
        transfer_s = moved / self.chip.bandwidth
        low = max(matmul_s, transfer_s)
        high = max(cycles / self.chip.clock, transfer_s) if cycles else low
        kind = "matmul" if flops else i.op
        numbers = {"flops": flops, "hbm_bytes": moved}
        return [self.row(i, kind, low_s=low, est_s=high, high_s=high, **numbers)]


def waits(rows):
    """Seconds that the program stands still for asynchronous collectives.

    In the compiler's order of instructions: they run one after the other on the links, each from
    its start until its end is asked for, while what stands between computes.
    """
    now = links_free = waited = 0.0
    ends = {}
    for row in rows:
        if row.kind == "async collective":
            links_free = max(now, links_free) + row.calls * row.link_s
            ends[row.name] = links_free
        elif row.kind == "done":
            wait = max(0.0, ends.get(row.name, now) - now)
            now += wait
            waited += wait
        elif row.kind == "kernel":
            now += row.calls * row.est_s
        else:
            now += row.calls * (row.low_s + row.high_s) / 2
    return waited


def estimate(module, chip_name="v6e", bundles=None, wait=True):
    """Cost of a Module. bundles: see Walk. Raises UncostedKernel, and NoProgram.

    wait: False takes an asynchronous collective to be hidden wherever it stands, as the calibrated
    tool did.
    """
    chip = CHIPS[chip_name]
    walk = Walk(module, chip, bundles)
    rows = list(walk.rows(module.entry))

    def total(field, *kinds):
        counted = [row for row in rows if not kinds or row.kind in kinds]
        return sum(getattr(row, field) * row.calls for row in counted)

    hbm_bytes = total("hbm_bytes")
    transfer_s = hbm_bytes / chip.bandwidth
    sync_s = total("link_s", "sync collective")
    async_s = total("link_s", "async collective")
    wait_s = waits(rows) if wait else max(0.0, async_s - total("high_s"))
    exposed_s = sync_s + wait_s
    low_s = max(total("low_s"), transfer_s) + exposed_s
    high_s = max(total("high_s"), transfer_s) + exposed_s
    kernel_s = total("est_s", "kernel")
    other_low_s = low_s - total("low_s", "kernel")
    other_high_s = high_s - total("high_s", "kernel")
    return Cost(
        est_s=(other_low_s + other_high_s) / 2 + kernel_s,
        low_s=low_s,
        high_s=high_s,
        flops=total("flops"),
        hbm_bytes=hbm_bytes,
        prefetch_bytes=total("hbm_bytes", "prefetch"),
        sent_bytes=total("sent_bytes"),
        sync_s=sync_s,
        async_s=async_s,
        wait_s=wait_s,
        kernel_s=kernel_s,
        matmul_s=total("high_s", "matmul"),
        rows=rows,
        unknown_trip_counts=walk.unknown,
    )


# ---- Command line --------------------------------------------------------------------------------
def seconds_of(row):
    return row.calls * max(row.est_s, row.link_s)


def report(cost, num_rows=25):
    """Lines of the sums and of the dearest instructions."""

    def ms(seconds):
        return f"{1e3 * seconds:9.3f} ms"

    lines = [
        f"estimate {ms(cost.est_s)}   low {ms(cost.low_s)}   high {ms(cost.high_s)}",
        f"matmuls {ms(cost.matmul_s)}   kernels {ms(cost.kernel_s)}   "
        f"collectives sync {ms(cost.sync_s)} async {ms(cost.async_s)}",
        f"per chip: {cost.flops:.4g} FLOPs, {cost.hbm_bytes / 1e9:.3f} GB of HBM traffic "
        f"({cost.prefetch_bytes / 1e9:.3f} prefetched), {cost.sent_bytes / 1e9:.4f} GB sent",
    ]
    if cost.unknown_trip_counts:
        lines.append(f"trip count unknown, taken as 1: {', '.join(cost.unknown_trip_counts)}")
    for row in sorted(cost.rows, key=seconds_of, reverse=True)[:num_rows]:
        gflops = row.calls * row.flops / 1e9
        megabytes = row.calls * row.hbm_bytes / 1e6
        numbers = f"{row.kind:<16} {gflops:9.1f} GFLOP {megabytes:9.1f} MB"
        where = f"{row.name:<34.34} {row.shape:<40.40} {row.source[-80:]}"
        lines.append(f"{ms(seconds_of(row))} x{row.calls:<5g} {numbers}  {where}")
    return "\n".join(lines)


def collective_lines(rows, kind_of):
    """A line for each kind of collective among an estimate's rows. kind_of: row -> its words."""
    groups = {}
    for row in rows:
        if row.op:
            kind = kind_of(row) + (", in a loop" if row.in_loop else "")
            groups.setdefault(kind, []).append(row)
    lines = []
    for kind, members in sorted(groups.items()):
        calls = sum(row.calls for row in members)
        sent = sum(row.calls * row.sent_bytes for row in members)
        seconds = sum(row.calls * row.link_s for row in members)
        lines.append(f"  {kind}: {calls:g} times, {sent / 1e6:.1f} MB sent, {1e3 * seconds:.2f} ms")
    return lines


def main(argv=None):
    """Print the estimate of a file. Raises UsageError."""

    def fail(message):
        raise UsageError(f"{message}; see python -m scripts.dry_run.estimate --help")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument("file", type=Path, help="HLO text, as scripts.dry_run --dump writes it")
    parser.add_argument("chip", nargs="?", default="v6e", choices=CHIPS)
    args = parser.parse_args(argv)
    try:
        print(report(estimate(Module(read_text(args.file)), args.chip)))
    except NotText as error:
        raise UsageError(str(error)) from error
    except NoProgram as error:
        raise UsageError(f"{args.file}, {error}; wanted what dry_run --dump wrote") from error


if __name__ == "__main__":
    sys.exit(command(main))
