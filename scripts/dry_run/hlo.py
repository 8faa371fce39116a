"""The text of a compiled program: its instructions, with the FLOPs and HBM bytes of each.

What a compiler writes (`compiled.as_text()`) is a list of computations. Each is a list of
instructions in the order in which they run:

    %fused (p0: bf16[256,512], p1: bf16[512,384]) -> bf16[256,384] {
      %p0 = bf16[256,512]{1,0} parameter(0)
      %p1 = bf16[512,384]{1,0:S(1)} parameter(1)
      ROOT %y = bf16[256,384]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
    }

S(1) in a layout says that the array lies in VMEM, the fast memory of a core; without it in HBM.
"""

import math
import re
from typing import NamedTuple

DTYPE_BYTES = {"token": 0, "pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3b11fnuz": 1}
DTYPE_BYTES |= dict.fromkeys(["s8", "u8", "f8e4m3fn", "f8e5m2"], 1)
DTYPE_BYTES |= dict.fromkeys(["s16", "u16", "f16", "bf16"], 2)
DTYPE_BYTES |= dict.fromkeys(["s32", "u32", "f32"], 4)
DTYPE_BYTES |= dict.fromkeys(["s64", "u64", "f64", "c64"], 8)
COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
NO_WORK = {  # what a GPU launches nothing for; nor for the ends of asynchronous instructions
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "add-dependency",
    "domain",
    "partition-id",
    "replica-id",
}
SLICES = ("dynamic-slice", "slice", "gather")  # they touch only a part of their first operand
INT8 = ("s8", "u8")


class NoProgram(ValueError):
    """A text is no whole program of this form. The sentence begins with the line, or a name."""


# ---- Text to instructions ------------------------------------------------------------------------
class Array(NamedTuple):
    dtype: str
    dims: tuple
    space: int  # 0: HBM, 1: VMEM

    @property
    def bytes(self):
        return math.prod(self.dims) * DTYPE_BYTES[self.dtype]


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple  # names
    attrs: str  # what follows the operands; of a parameter or constant what is in the brackets
    is_root: bool
    arrays: tuple  # of the result

    def find(self, pattern, default=None):
        """The first group of a regex in the attributes."""
        found = re.search(pattern, self.attrs)
        return found[1] if found else default

    def called(self, key):
        """The computation that an attribute names, as in calls=%fused."""
        return self.find(key + r"=%?([\w.\-]+)")

    @property
    def branches(self):
        """Of a conditional: the computations of which one runs."""
        listed = self.find(r"branch_computations=\{([^}]*)\}")
        if listed:
            return [name.strip().lstrip("%") for name in listed.split(",")]
        return [self.called("true_computation"), self.called("false_computation")]

    @property
    def is_kernel(self):
        """Whether it calls a Pallas kernel."""
        target = 'custom_call_target="tpu_custom_call"'
        return self.op == "custom-call" and target in self.attrs

    @property
    def cost_estimate(self):
        """{flops, transcendentals, bytes_accessed}, as a kernel states them; or {}."""
        stated = self.find(r'"cost_estimate":\{([^}]*)\}', "")
        numbers = re.findall(r'"(\w+)":"?(-?[\d.e+]+)', stated)
        return {key: max(float(number), 0.0) for key, number in numbers}


def total_bytes(arrays):
    return sum(array.bytes for array in arrays)


def parse_arrays(text):
    """bf16[256,512]{1,0:S(1)}, or a tuple of such, as Arrays."""
    arrays = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?", text):
        if dtype in DTYPE_BYTES:
            sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
            space = re.search(r"S\((\d+)\)", layout)
            arrays.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(arrays)


def end_of_group(text, start):
    """Index just after the bracket group that opens at text[start]."""
    depth = 0
    for i in range(start, len(text)):
        depth += text[i] in "([{"
        depth -= text[i] in ")]}"
        if depth == 0:
            return i + 1
    return len(text)


def parse_instruction(line):
    """Instruction of a line `  [ROOT ]%name = type op(operands), attributes`, or None."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = end_of_group(rest, 0) if rest[0] == "(" else rest.index(" ")
    type_text = rest[:end]
    rest = rest[end:].lstrip()
    start = rest.find("(")
    op = rest[:start]
    end = end_of_group(rest, start)
    inside = re.sub(r"/\*.*?\*/", "", rest[start + 1 : end - 1])
    operands = () if op == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside))
    attrs = inside if op in ("parameter", "constant") else rest[end:]
    arrays = parse_arrays(type_text)
    return Instruction(head[2], type_text, op, operands, attrs, bool(head[1]), arrays)


def parse(text):
    """HLO text -> ({computation: {name: Instruction}}, the entry's name). Raises NoProgram."""
    computations = {}
    entry = current = last = None
    number = 0
    for number, line in enumerate(text.split("\n"), 1):
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line)
        if line.startswith(" "):
            try:
                instruction = None if current is None else parse_instruction(line)
            except (ValueError, IndexError) as error:
                raise NoProgram(f"line {number}: no instruction: {line[:60]!r}") from error
            if instruction:
                last = instruction.name
                current[last] = instruction
        elif head:
            current = computations.setdefault(head[2], {})
            last = None
            entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif current and last:  # a kernel's metadata holds raw newlines
            current[last] = current[last]._replace(attrs=current[last].attrs + line)
    if entry is None or current is not None:
        raise NoProgram(f"line {number}: it ends before the ENTRY computation has ended")
    return computations, entry


# ---- FLOPs of an instruction ---------------------------------------------------------------------
def window_axes(convolution):
    """[(size, stride, dilation, input dilation, padding before)] of its spatial axes."""
    text = convolution.find(r"window=\{([^}]*)\}", "")
    window = dict(item.split("=") for item in text.split())
    num_axes = len(window["size"].split("x")) if "size" in window else 0
    columns = []
    for key in ("size", "stride", "rhs_dilate", "lhs_dilate", "pad"):
        default = "0" if key == "pad" else "1"
        texts = window[key].split("x") if key in window else [default] * num_axes
        columns.append([int(text.split("_")[0]) for text in texts])  # pad: before_after
    return list(zip(*columns, strict=True))


def valid_positions(axis, inputs, outputs):
    """How often, along one axis of a convolution, a kernel element meets a real input element."""
    size, stride, dilation, in_dilation, pad = axis
    last_input = (inputs - 1) * in_dilation
    count = 0
    for k in range(size):
        base = k * dilation - pad  # output o looks at the dilated input's place o * stride + base
        first = max(0, -(base // stride))
        last = min(outputs - 1, (last_input - base) // stride)
        if in_dilation == 1:
            count += max(0, last + 1 - first)
        else:
            count += sum((o * stride + base) % in_dilation == 0 for o in range(first, last + 1))
    return count


def convolution_flops(convolution, computation):
    """2 per product with an element that exists. The matmuls of a TPU program are convolutions."""
    left, right = (computation[name].arrays[0].dims for name in convolution.operands[:2])
    out = convolution.arrays[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attrs)
    if not labels:
        raise NoProgram(f"{convolution.name}: a convolution without dim_labels")
    products = out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for d, axis in enumerate(window_axes(convolution)):
        inputs = left[labels[1].index(str(d))]
        outputs = out[labels[3].index(str(d))]
        products *= valid_positions(axis, inputs, outputs)
    return 2 * products / int(convolution.find(r"batch_group_count=(\d+)", 1))


def dot_flops(dot, computation):
    left = computation[dot.operands[0]].arrays[0].dims
    summed = dot.find(r"lhs_contracting_dims=\{([\d,]*)\}")
    products = math.prod(dot.arrays[0].dims)
    for axis in summed.split(","):
        products *= left[int(axis)] if axis else 1
    return 2 * products


# ---- A program -----------------------------------------------------------------------------------
def users_of(computation):
    """{value: [(instruction that takes it, as which operand)]}"""
    users = {name: [] for name in computation}
    for instruction in computation.values():
        for k, operand in enumerate(instruction.operands):
            users.setdefault(operand, []).append((instruction, k))
    return users


class Module:
    """A parsed program, and what its instructions do."""

    def __init__(self, text):
        self.computations, self.entry = parse(text)
        self.users = {}
        self.parameters = {}  # {computation: {number: Instruction}}
        self.roots = {}
        self.async_channels = set()  # of collectives that run beside other instructions
        self.fusion_flops = {}  # answers that are known already
        for name, computation in self.computations.items():
            self.users[name] = users_of(computation)
            self.parameters[name] = {}
            for i in computation.values():
                if i.op == "parameter":
                    self.parameters[name][int(i.find(r"^(\d+)$", 0))] = i
                if i.is_root:
                    self.roots[name] = i
                if name.startswith("async_collective") and i.op in COLLECTIVES:
                    self.async_channels.add(i.find(r"channel_id=(\d+)"))
        self.async_channels.discard(None)

    def kernels(self):
        """All calls of Pallas kernels."""
        for computation in self.computations.values():
            for i in computation.values():
                if i.is_kernel:
                    yield i

    def flops(self, instruction, computation, dtypes=None):
        """Of all products, or of those whose operands are both of these dtypes."""
        if instruction.op in ("convolution", "dot"):
            operands = [computation[name].arrays[0] for name in instruction.operands[:2]]
            if dtypes and not all(array.dtype in dtypes for array in operands):
                return 0
            count = convolution_flops if instruction.op == "convolution" else dot_flops
            return count(instruction, computation)
        if instruction.op != "fusion":
            return 0
        known = called, _ = instruction.called("calls"), dtypes
        if known not in self.fusion_flops:
            inner = self.computations.get(called, {})
            self.fusion_flops[known] = sum(self.flops(i, inner, dtypes) for i in inner.values())
        return self.fusion_flops[known]

    def touched(self, name, value, full):
        """Bytes of a value that its users inside a fusion read: of what is sliced only a part."""
        total = 0
        for user, k in self.users[name][value]:
            if user.op in SLICES and k == 0:
                total += total_bytes(user.arrays)
            elif user.op in ("bitcast", "reshape", "get-tuple-element"):
                total += self.touched(name, user.name, full)
            elif user.op == "fusion":
                called = user.called("calls")
                inner = self.parameters[called].get(k)
                total += self.touched(called, inner.name, full) if inner else full
            elif user.op != "dynamic-update-slice" or k != 0:  # which updates in place
                total += full
        return min(total, full)

    def bytes_read(self, instruction, computation):
        """From HBM."""
        called = instruction.called("calls") if instruction.op == "fusion" else None
        parameters = self.parameters.get(called, {})
        total = 0
        for k, operand in enumerate(instruction.operands):
            source = computation.get(operand)
            if source is None or len(source.arrays) != 1 or source.arrays[0].space != 0:
                continue
            size = source.arrays[0].bytes
            if k in parameters:
                size = self.touched(called, parameters[k].name, size)
            elif instruction.op in SLICES and k == 0:
                size = total_bytes(instruction.arrays)
            elif instruction.op == "dynamic-update-slice" and k == 0:
                size = 0
            total += size
        return total

    def sizes_written(self, name, instruction):
        """Bytes of each result; an update in place writes only the update."""
        computation = self.computations[name]
        inner = [computation[operand] for operand in instruction.operands if operand in computation]
        if instruction.op == "tuple":
            return [size for i in inner for size in self.sizes_written(name, i)]
        if instruction.op in ("bitcast", "reshape") and inner:
            return self.sizes_written(name, inner[0])
        if instruction.op == "dynamic-update-slice":
            return [inner[1].arrays[0].bytes]
        called = instruction.called("calls") if instruction.op == "fusion" else None
        if called in self.roots:
            return self.sizes_written(called, self.roots[called])
        return [array.bytes for array in instruction.arrays]

    def bytes_written(self, instruction, computation):
        """To HBM."""
        sizes = [array.bytes for array in instruction.arrays]
        called = instruction.called("calls") if instruction.op == "fusion" else None
        if called in self.roots:
            written = self.sizes_written(called, self.roots[called])
            sizes = written if len(written) == len(sizes) else sizes
        elif instruction.op == "dynamic-update-slice":
            sizes = [computation[instruction.operands[1]].arrays[0].bytes]
        total = 0
        for size, array in zip(sizes, instruction.arrays, strict=True):
            total += size if array.space == 0 else 0
        return total

    def hbm_bytes(self, instruction, computation):
        """Bytes moved from and to HBM."""
        read = self.bytes_read(instruction, computation)
        return read + self.bytes_written(instruction, computation)

    def integers_in(self, name):
        """Constants of a computation and of those that it calls."""
        values = []
        for i in self.computations.get(name, {}).values():
            if i.op == "constant" and i.type.startswith(("s32[]", "u32[]")):
                values.append(int(re.sub(r"[^\d\-]", "", i.attrs) or 0))
            if i.called("calls"):
                values += self.integers_in(i.called("calls"))
        return values

    def trip_count(self, loop):
        """As annotated, else the largest constant in the condition, else None."""
        known = loop.find(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')
        if known:
            return int(known)
        largest = max(self.integers_in(loop.called("condition")), default=0)
        return largest if largest > 0 else None

    def num_kernels(self):
        """Kernels that a GPU launches for the program; None where a trip count is not known.

        A copy, a collective and a call of a library count as one.
        """
        count = self.kernels_in(self.entry)
        return None if math.isnan(count) else count

    def kernels_in(self, name):
        """The same of a computation, but NaN where it is not known."""
        count = 0
        for i in self.computations[name].values():
            if i.op == "while":
                count += (self.trip_count(i) or math.nan) * self.kernels_in(i.called("body"))
            elif i.op == "conditional":  # its branches are taken as equally likely
                count += sum(map(self.kernels_in, i.branches)) / len(i.branches)
            elif i.op in ("call", "call-start", "async-start"):  # of a CUDA graph, say
                count += self.kernels_in(i.called("to_apply") or i.called("calls"))
            elif i.op not in NO_WORK and not i.op.endswith(("-done", "-update")):
                count += 1
        return count
