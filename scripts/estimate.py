"""How long does a compiled TPU program take? Predicted from its text, without a TPU.

    python -m scripts.estimate step.hlo [v6e|v5e|v5p]        on a saved `compiled.as_text()`

The scheduled HLO that the TPU compiler writes holds, for nearly every instruction, what is needed. Two sums over the
instructions that run, loop bodies times their trip count:

    low    the roofline: the longer of FLOPs / peak and HBM bytes / bandwidth. What lies in VMEM is free, a slice counts what
           it touches, prefetch between HBM and VMEM counts once in total.
    high   the compiler's own `estimated_cycles` / clock, at least the time of its HBM bytes.

Synchronous collectives are added to both, asynchronous ones as far as the order of instructions exposes them (`waits`). The estimate is the
mean of low and high. A Pallas kernel, which the compiler says nothing about, counts by its cost_estimate and, where its
instruction bundles were counted (scripts/bundles.py), by these; JAX's splash attention by a fit to measured times.

Calibration, all on v6e: three phases of a public 8-chip speedrun log (training at two lengths, evaluation) and one public
single-chip step: estimate / measured = 0.93, 1.00, 1.06, 0.94; low alone is 0.64 to 0.76 of measured, high 1.22 to 1.36. So
allow 15 % on a whole step and more on a piece. The links between chips are hardly tested by this; v5e and v5p not at all.
Host input, dispatch and evaluation are not in it. To compare two variants look at low and the estimate together.
"""
import argparse, collections, math, re
from pathlib import Path
from typing import NamedTuple

class Chip(NamedTuple):
    """flops: bf16 per second; bandwidth: HBM bytes per second; clock: Hz; link: bytes per second, one way; hbm_gib: usable."""
    flops: float
    bandwidth: float
    clock: float
    link: float
    hbm_gib: float

CHIPS = {"v6e": Chip(918e12, 1638e9, 1.75e9, 90e9, 31.25), "v5e": Chip(197e12, 819e9, 1.5e9, 45e9, 15.75),
         "v5p": Chip(459e12, 2765e9, 1.75e9, 90e9, 95.0)}
SPLASH_EFFICIENCY, SPLASH_BLOCK_S = 0.70, 0.55e-6  # fit to measured v6e times, blocks of 256 to 2048, within 7 %
BUNDLE_RANGE = 1.0, 1.15, 1.3  # low, estimate, high: of a kernel's time by its bundles, which lack stalls
LAUNCH_S = 3e-6                # of a synchronous collective

DTYPE_BYTES = {"pred": 1, "s4": .5, "u4": .5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "s16": 2,
               "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
               "collective-broadcast")
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota",
        "opt-barrier", "domain", "add-dependency", "async-update"}
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape"}

class UncostedKernel(ValueError):
    """A Pallas kernel without a cost_estimate: the compiler's scheduler and this file would both take it as free."""

# ---- Text to instructions ----
class Array(NamedTuple):
    dtype: str
    dims: tuple
    space: int  # 0: HBM, 1: VMEM
    bytes = property(lambda self: math.prod(self.dims) * DTYPE_BYTES[self.dtype])

class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple
    attrs: str      # all that follows the operands; of a parameter or constant what stands in the brackets
    is_root: bool
    arrays: tuple   # of the result

    def find(self, pattern, default=None):
        found = re.search(pattern, self.attrs)
        return found[1] if found else default

    def called(self, key): return self.find(key + r"=%?([\w.\-]+)")

def total_bytes(arrays): return sum(array.bytes for array in arrays)

def end_of_group(text, start):
    """Index just after the bracket group that opens at text[start]."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    return len(text)

def parse_arrays(text):
    found = re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?", text)
    space = lambda layout: int(match[1]) if (match := re.search(r"S\((\d+)\)", layout)) else 0
    return tuple(Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), space(layout))
                 for dtype, dims, layout in found if dtype in DTYPE_BYTES)

def parse_instruction(line):
    """Instruction of a line `  [ROOT ]%name = type op(operands), attributes`, or None."""
    if not (head := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
        return None
    rest = line[head.end():]
    end = end_of_group(rest, 0) if rest[0] == "(" else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    op, end = rest[:start], end_of_group(rest, start)
    inside, plain = re.sub(r"/\*.*?\*/", "", rest[start + 1:end - 1]), rest[:start] in ("parameter", "constant")
    operands = () if op == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside))
    attrs = inside if plain else rest[end:]
    return Instruction(head[2], type_text, op, operands, attrs, bool(head[1]), parse_arrays(type_text))

def parse(text):
    """HLO text -> ({computation: {name: Instruction}}, the entry's name)."""
    computations, entry, current, last = {}, None, None, None
    for line in text.splitlines():
        if line.startswith(" "):
            if current is not None and (instruction := parse_instruction(line)):
                last = instruction.name
                current[last] = instruction
        elif head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line):
            current, last = computations.setdefault(head[2], {}), None
            entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif current and last:  # a kernel's metadata holds raw newlines
            current[last] = current[last]._replace(attrs=current[last].attrs + line)
    return computations, entry

# ---- FLOPs and bytes of an instruction ----
def valid_positions(size, stride, dilation, in_dilation, pad, inputs, outputs):
    """How often, along one axis of a convolution, a kernel element meets a real input element."""
    count = 0
    for k in range(size):
        base = k * dilation - pad
        if stride % in_dilation == 0:
            if base % in_dilation == 0:
                first = max(0, math.ceil(-base / stride))
                count += max(0, min(outputs - 1, math.floor(((inputs - 1) * in_dilation - base) / stride)) - first + 1)
        else:
            places = [o * stride + base for o in range(outputs)]
            count += sum(p >= 0 and p % in_dilation == 0 and p // in_dilation < inputs for p in places)
    return count

def convolution_flops(instruction, computation):
    """2 per multiplication with an element that exists. Every matmul of a TPU program is a convolution."""
    lhs, rhs = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attrs)
    window = dict(item.split("=") for item in instruction.find(r"window=\{([^}]*)\}", "").split())
    num_axes = len(window["size"].split("x")) if window.get("size") else 0
    field = lambda key, default: list(map(int, window[key].split("x"))) if key in window else [default] * num_axes
    pads = [int(pad.split("_")[0]) for pad in window["pad"].split("x")] if "pad" in window else [0] * num_axes
    columns = zip(field("size", 1), field("stride", 1), field("rhs_dilate", 1), field("lhs_dilate", 1), pads)
    valid = math.prod(valid_positions(*column, lhs[labels[1].index(str(d))], out[labels[3].index(str(d))])
                      for d, column in enumerate(columns))
    features = rhs[labels[2].index("i")] * out[labels[3].index("f")]
    return 2 * valid * features * out[labels[3].index("b")] / int(instruction.find(r"batch_group_count=(\d+)", 1))

def dot_flops(instruction, computation):
    lhs, axes = computation[instruction.operands[0]].arrays[0].dims, instruction.find(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(instruction.arrays[0].dims) * math.prod(lhs[int(axis)] for axis in axes.split(",") if axis)

class Module:
    """A parsed program, and what its instructions do; answers are kept by computation."""
    def __init__(self, text):
        self.computations, self.entry = parse(text)
        self._users, self._flops, self._parameters = {}, {}, {}
        inside = [i for name, c in self.computations.items() if name.startswith("async_collective") for i in c.values()]
        self.async_channels = {i.find(r"channel_id=(\d+)") for i in inside if i.op in COLLECTIVES} - {None}

    def users(self, name):
        """{value: [(instruction that takes it, as which operand)]}"""
        if name not in self._users:
            self._users[name] = collections.defaultdict(list)
            for instruction in self.computations[name].values():
                for k, operand in enumerate(instruction.operands):
                    self._users[name][operand].append((instruction, k))
        return self._users[name]

    def parameters(self, name):
        if name not in self._parameters:
            self._parameters[name] = {int(i.attrs or 0): i for i in self.computations[name].values() if i.op == "parameter"}
        return self._parameters[name]

    def root(self, name): return next((i for i in self.computations[name].values() if i.is_root), None)

    def flops(self, instruction, computation):
        if instruction.op in ("convolution", "dot"):
            try:
                return (convolution_flops if instruction.op == "convolution" else dot_flops)(instruction, computation)
            except (ValueError, KeyError, IndexError, TypeError):
                return 0
        if instruction.op != "fusion":
            return 0
        if (name := instruction.called("calls")) not in self._flops:
            inner = self.computations.get(name, {})
            self._flops[name] = sum(self.flops(i, inner) for i in inner.values())
        return self._flops[name]

    def reads(self, name, value, full):
        """Bytes of a value that its users inside a fusion really read: slices and gathers touch only a part."""
        total = 0
        for user, k in self.users(name)[value]:
            if user.op in ("dynamic-slice", "slice", "gather") and k == 0:
                total += total_bytes(user.arrays)
            elif user.op in ("bitcast", "reshape", "get-tuple-element"):
                total += self.reads(name, user.name, full)
            elif user.op == "fusion":
                inner = self.parameters(called := user.called("calls")).get(k)
                total += self.reads(called, inner.name, full) if inner else full
            elif user.op != "dynamic-update-slice" or k:
                return full
            if total >= full:
                return full
        return total

    def writes(self, name, value):
        """Bytes written per result; an update in place writes only the update."""
        instruction = self.computations[name][value]
        if instruction.op == "tuple":
            return [size for operand in instruction.operands for size in self.writes(name, operand)]
        if instruction.op in ("bitcast", "reshape") and instruction.operands:
            return self.writes(name, instruction.operands[0])
        if instruction.op == "dynamic-update-slice":
            return [self.computations[name][instruction.operands[1]].arrays[0].bytes]
        if instruction.op == "fusion" and (root := self.root(called := instruction.called("calls"))):
            return self.writes(called, root.name)
        return [array.bytes for array in instruction.arrays]

    def hbm_bytes(self, instruction, computation):
        """Bytes moved to and from HBM."""
        called = instruction.called("calls") if instruction.op == "fusion" else None
        fused, total = called in self.computations, 0
        for k, operand in enumerate(instruction.operands):
            source = computation.get(operand)
            if source is None or len(source.arrays) != 1 or source.arrays[0].space != 0:
                continue
            full = source.arrays[0].bytes
            if fused and (inner := self.parameters(called).get(k)):
                full = min(full, self.reads(called, inner.name, full))
            elif instruction.op in ("dynamic-slice", "slice", "gather") and k == 0:
                full = total_bytes(instruction.arrays)
            elif instruction.op == "dynamic-update-slice" and k == 0:
                full = 0
            total += full
        sizes = [array.bytes for array in instruction.arrays]
        if fused and (root := self.root(called)) and len(written := self.writes(called, root.name)) == len(sizes):
            sizes = written
        elif instruction.op == "dynamic-update-slice":
            sizes = [computation[instruction.operands[1]].arrays[0].bytes]
        return total + sum(size for size, array in zip(sizes, instruction.arrays) if array.space == 0)

    def trip_count(self, loop):
        """As annotated, else the largest constant in the condition, else None."""
        if known := loop.find(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)'):
            return int(known)
        values, waiting, seen = [], [loop.called("condition")], set()
        while waiting:
            if (name := waiting.pop()) in seen or name not in self.computations:
                continue
            seen.add(name)
            for i in self.computations[name].values():
                if i.op == "constant" and i.type.startswith(("s32[]", "u32[]")):
                    values.append(int(re.sub(r"[^\d\-]", "", i.attrs) or 0))
                waiting += [i.called("calls")] if i.called("calls") else []
        return max(values) if values and max(values) > 0 else None

# ---- Collectives and kernels ----
def group_size(instruction):
    """Devices that take part in a collective."""
    if size := instruction.find(r"replica_groups=\[\d+,(\d+)\]"):
        return int(size)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", instruction.attrs):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", mesh[2]))
    listed = instruction.find(r"replica_groups=\{\{([\d,]*)\}")
    return len(listed.split(",")) if listed else 8

def collective_cost(instruction, computation, link):
    """(bytes each chip sends, seconds): a ring through a two-dimensional slice of the mesh, over two links."""
    n, op = group_size(instruction), instruction.op
    out = total_bytes(instruction.arrays)
    into = sum(total_bytes(computation[name].arrays) for name in instruction.operands if name in computation)
    size = max(out - into, into) if op.endswith("start") else max(out, into)
    ring = (n - 1) / n
    share = {"all-reduce": 2 * ring, "all-gather": ring, "reduce-scatter": ring, "all-to-all": ring / 2}
    size = (into or out) if op.startswith("all-reduce") else size
    sent = share.get(op.replace("-start", ""), 1.0) * size if n > 1 else 0.0
    return sent, sent / (2 * link) + LAUNCH_S

def splash_cost(instruction, computation):
    """(FLOPs, FLOPs padded to the 256-wide MXU, blocks that run) of a splash attention kernel of JAX, or None."""
    if not (kind := re.match(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name)):
        return None
    arrays = [computation[name].arrays[0] for name in instruction.operands if name in computation and computation[name].arrays]
    query = next((a for a in arrays if a.dtype in ("bf16", "f32") and len(a.dims) >= 3), None)
    grid = next((a.dims for a in arrays if a.dtype in ("s8", "s32") and len(a.dims) == 3), None)
    if query is None:
        return None
    *lead, length, width = query.dims
    sizes = dict(re.findall(r'\\?"(block_\w+)\\?": (\d+)', instruction.attrs))
    suffix = {"fwd": "", "dkv": "_dkv", "dq": "_dq"}[kind[1]]
    block_q, block_k = (int(sizes.get(name + suffix, 128)) for name in ("block_q", "block_kv"))
    rows, columns = grid[-2:] if grid else (length // block_q, length // block_k)
    if grid and kind[1] == "dkv":  # its mask grid is (heads, columns, rows)
        rows, columns = columns, rows
    # above the diagonal blocks are skipped; a window narrows the grid's last axis
    cells = sum(min(columns, math.ceil((row + 1) * block_q / block_k)) for row in range(rows))
    fused = "fused" in instruction.name or 'use_fused_bwd_kernel\\": true' in instruction.attrs
    matmuls = {"fwd": 2, "dq": 3, "dkv": 5 if fused else 4}[kind[1]]
    blocks = cells * math.prod(lead)
    flops = 2.0 * matmuls * block_q * block_k * width * blocks
    return flops, flops * math.ceil(width / 256) * 256 / width, blocks

def is_kernel(instruction):
    return instruction.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attrs

def kernel_cost(instruction, computation, hbm_bytes, chip, bundle_s):
    """(FLOPs, bytes, low, estimate, high seconds) of a Pallas kernel. bundle_s: seconds by its bundles, or None."""
    stated = dict(re.findall(r'"(\w+)":"?(-?[\d.e+]+)', instruction.find(r'"cost_estimate":\{([^}]*)\}', "")))
    flops = padded = max(float(stated.get("flops", 0)), 0)
    hbm_bytes, blocks = max(float(stated.get("bytes_accessed", 0)), 0) or hbm_bytes, 0
    if splash := splash_cost(instruction, computation):
        flops, padded, blocks = splash
    if not (stated or splash):
        raise UncostedKernel(f"kernel {instruction.name} has no cost_estimate; give its pallas_call a pl.CostEstimate")
    roofline = max(flops / chip.flops, hbm_bytes / chip.bandwidth)
    if bundle_s is not None:
        return flops, hbm_bytes, *(max(roofline, factor * bundle_s) for factor in BUNDLE_RANGE)
    seconds = max(padded / (chip.flops * SPLASH_EFFICIENCY) + blocks * SPLASH_BLOCK_S, hbm_bytes / chip.bandwidth)
    return flops, hbm_bytes, roofline, seconds, seconds

# ---- The walk over what runs ----
class Row(NamedTuple):
    """An instruction, its numbers for one run of it. kind: matmul, kernel, prefetch, sync or async collective, done (the end of
    the asynchronous instruction that `name` started), or the op."""
    name: str
    kind: str
    calls: float
    flops: float = 0.0
    hbm_bytes: float = 0.0
    low_s: float = 0.0
    est_s: float = 0.0   # of a kernel; elsewhere as high_s
    high_s: float = 0.0
    sent_bytes: float = 0.0
    link_s: float = 0.0  # of a collective
    op: str = ""         # of a collective
    shape: str = ""
    source: str = ""     # path of JAX operations
    in_loop: bool = False

class Walk:
    """Rows of all instructions that run. bundles: {instruction name: seconds of one call by its bundles}."""
    def __init__(self, module, chip, bundles):
        self.module, self.chip, self.bundles, self.channels, self.unknown = module, chip, bundles or {}, set(), []

    def row(self, instruction, kind, calls, **numbers):
        source = instruction.find(r'op_name="([^"]*)"', "")
        return Row(instruction.name, kind, calls, shape=instruction.type[:60], source=source, **numbers)

    def rows(self, name, calls=1, in_loop=False):
        computation = self.module.computations[name]
        for i in computation.values():
            if i.op in FREE:
                continue
            elif i.op.endswith("-done"):
                yield Row(i.operands[0] if i.operands else "", "done", calls)
            elif i.op == "while":
                if (trips := self.module.trip_count(i)) is None:
                    self.unknown.append(i.name)
                yield from self.rows(i.called("body"), calls * (trips or 1), True)
            elif i.op == "conditional":  # its branches taken as equally likely
                listed = i.find(r"branch_computations=\{([^}]*)\}")
                branches = ([branch.strip().lstrip("%") for branch in listed.split(",")] if listed else
                            [i.called("true_computation"), i.called("false_computation")])
                for branch in branches:
                    yield from self.rows(branch, calls / len(branches), in_loop)
            elif i.op == "call":
                yield from self.rows(i.called("to_apply"), calls, in_loop)
            else:
                yield from (row._replace(in_loop=in_loop) for row in self.leaf(i, computation, calls))

    def leaf(self, i, computation, calls):
        if i.op in ("async-start", "call-start"):  # a collective on its own core
            inner = self.module.computations.get(i.called("calls") or i.called("to_apply"), {})
            found = next((x for x in inner.values() if x.op.replace("-start", "") in COLLECTIVES), None)
            return [self.collective(found, inner, calls, True)._replace(name=i.name)] if found else []
        if i.op.replace("-start", "") in COLLECTIVES:
            return [self.collective(i, computation, calls, i.op.endswith("-start"))]
        if i.op in ("copy-start", "slice-start"):  # prefetch between HBM and VMEM, under compute
            moved = len(i.arrays) > 1 and 0 in (i.arrays[0].space, i.arrays[1].space)
            return [self.row(i, "prefetch", calls, hbm_bytes=i.arrays[1].bytes)] if moved else []
        return self.compute(i, computation, calls)

    def collective(self, i, computation, calls, hidden):
        sent, seconds = collective_cost(i, computation, self.chip.link)
        return self.row(i, "async collective" if hidden else "sync collective", calls, sent_bytes=sent, link_s=seconds,
                        op=i.op.replace("-start", ""))

    def compute(self, i, computation, calls):
        """Rows of one instruction that computes, and of a collective fused into it (once per channel)."""
        cycles = int(i.find(r'"estimated_cycles":"(\d+)"', 0))
        flops, moved, rows = self.module.flops(i, computation), self.module.hbm_bytes(i, computation), []
        if is_kernel(i):
            flops, moved, low, est, high = kernel_cost(i, computation, moved, self.chip, self.bundles.get(i.name))
            return [self.row(i, "kernel", calls, flops=flops, hbm_bytes=moved, low_s=low, est_s=est, high_s=high)]
        if i.op == "custom-call":
            if i.find(r'custom_call_target="([^"]*)"', "") in FREE_CALLS:
                return []
            moved = moved if i.find(r'"estimated_cycles":"(\d+)"') else 0
        fused = self.module.computations.get(i.called("calls"), {}) if i.op == "fusion" else {}
        if found := next((x for x in fused.values() if x.op in COLLECTIVES), None):
            channel = found.find(r"channel_id=(\d+)", found.name)
            if channel not in self.channels:
                self.channels.add(channel)
                rows = [self.collective(found, fused, calls, channel in self.module.async_channels)]
        low = max(flops / self.chip.flops, moved / self.chip.bandwidth)
        high = max(cycles / self.chip.clock, moved / self.chip.bandwidth) if cycles else low
        kind = "matmul" if flops else i.op
        return [self.row(i, kind, calls, flops=flops, hbm_bytes=moved, low_s=low, est_s=high, high_s=high), *rows]

def waits(rows):
    """Seconds that the program stands still for asynchronous collectives: in the compiler's order of instructions, one after
    the other on the links, each from its start until its end is asked for, while what stands between computes."""
    now, links_free, ends, waited = 0.0, 0.0, {}, 0.0
    for row in rows:
        if row.kind == "async collective":
            links_free = ends[row.name] = max(now, links_free) + row.calls * row.link_s
        elif row.kind == "done":
            wait = max(0.0, ends.get(row.name, now) - now)
            now, waited = now + wait, waited + wait
        else:
            now += row.calls * ((row.low_s + row.high_s) / 2 if row.kind != "kernel" else row.est_s)
    return waited

def estimate(text, chip="v6e", bundles=None, wait=True):
    """Costs per chip and predicted seconds of an HLO text, as a dict. bundles: see Walk. wait: False takes an asynchronous
    collective to be hidden wherever it stands, as the calibrated tool did. Raises UncostedKernel."""
    chip, module = CHIPS[chip], text if isinstance(text, Module) else Module(text)
    walk = Walk(module, chip, bundles)
    rows = list(walk.rows(module.entry))
    def total(field, *kinds):
        return sum(getattr(row, field) * row.calls for row in rows if not kinds or row.kind in kinds)
    hbm_s, busy = total("hbm_bytes") / chip.bandwidth, total("high_s")
    sync, hidden = total("link_s", "sync collective"), total("link_s", "async collective")
    waited = waits(rows) if wait else max(0.0, hidden - busy)
    exposed = sync + waited
    high, low = max(busy, hbm_s) + exposed, max(total("low_s"), hbm_s) + exposed
    rest = (high - total("high_s", "kernel") + low - total("low_s", "kernel")) / 2
    est = rest + total("est_s", "kernel")
    return {"est_s": est, "low_s": low, "high_s": high, "flops": total("flops"), "hbm_bytes": total("hbm_bytes"),
            "prefetch_bytes": total("hbm_bytes", "prefetch"), "sent_bytes": total("sent_bytes"), "sync_s": sync,
            "async_s": hidden, "wait_s": waited, "kernel_s": total("est_s", "kernel"), "matmul_s": total("high_s", "matmul"), "rows": rows,
            "unknown_trip_counts": walk.unknown}

def report(result, num_rows=25):
    ms, cost = lambda seconds: f"{1e3 * seconds:9.3f} ms", lambda row: row.calls * max(row.est_s, row.link_s)
    lines = [f"estimate {ms(result['est_s'])}   low {ms(result['low_s'])}   high {ms(result['high_s'])}",
             f"matmuls {ms(result['matmul_s'])}   kernels {ms(result['kernel_s'])}   collectives sync {ms(result['sync_s'])} "
             f"async {ms(result['async_s'])}",
             f"per chip: {result['flops']:.4g} FLOPs, {result['hbm_bytes'] / 1e9:.3f} GB of HBM traffic "
             f"({result['prefetch_bytes'] / 1e9:.3f} prefetched), {result['sent_bytes'] / 1e9:.4f} GB sent"]
    if result["unknown_trip_counts"]:
        lines.append(f"trip count unknown, taken as 1: {', '.join(result['unknown_trip_counts'])}")
    for row in sorted(result["rows"], key=cost)[::-1][:num_rows]:
        lines.append(f"{ms(cost(row))} x{row.calls:<5g} {row.kind:<16} {row.calls * row.flops / 1e9:9.1f} GFLOP "
                     f"{row.calls * row.hbm_bytes / 1e6:9.1f} MB  {row.name:<34.34} {row.shape:<40.40} {row.source[-80:]}")
    return "\n".join(lines)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Predict the time of a compiled TPU program from its optimized HLO.")
    parser.add_argument("file", type=Path, help="HLO text, as scripts/dry_run.py --dump writes it")
    parser.add_argument("chip", nargs="?", default="v6e", choices=CHIPS)
    args = parser.parse_args()
    print(report(estimate(args.file.read_text(), args.chip)))
