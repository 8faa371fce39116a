"""What do a Pallas TPU kernel's instruction bundles cost? A chip issues one bundle a clock cycle.

The compiler writes them where LIBTPU_INIT_ARGS tells it to, which is read once, when libtpu loads
(`dump_flags`): of each kernel a file with one line per bundle,

    0x92   : > { %474 = sbr.rel (%p) target = $region44 ... } /* Start region 45 ... */

The bundles of a grid step are those from the target of the grid loop's backward branch to that
branch. A forward branch skips what lies between it and its target, such as the body of a `pl.when`.
Unless its weight is known it counts as never taken.

    seconds = bundles per grid step, weighted by how often they run * grid steps / clock

Stalls are not in it (a DMA that is not done, a result that is not ready): against splash attention
kernels that were timed, bundles give 0.82, 0.79 and 0.93 at blocks of 256, 512 and 1024. So
estimate.py multiplies by 1.15.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scripts.dry_run.hlo import Module

DELAY = 4  # bundles after a branch that run whether it is taken or not
SHORT = 60  # spans of fewer bundles belong to the pipeline rather than to the kernel


def dump_flags(folder):
    """To be appended to LIBTPU_INIT_ARGS. They slow large programs down: for kernels alone."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles --xla_jf_dump_category_filter=codegen"
    )


# ---- Bundles of a grid step ----------------------------------------------------------------------
class Span(NamedTuple):
    """Bundles start to end - 1, which a branch skips or repeats."""

    start: int
    end: int
    test: tuple | None = None  # (register, k): skipped unless the register holds k

    @property
    def size(self):
        return self.end - self.start

    def holds(self, other):
        return self.start <= other.start and other.end <= self.end and self != other


class Listing(NamedTuple):
    num_bundles: int
    spans: list  # of forward branches
    loops: list  # of backward branches


def parse(text):
    """The text of a *-final_bundles.txt -> Listing."""
    address = -1
    regions = {}  # where each one starts
    tests = {}
    branches = []
    for line in text.splitlines():
        head = re.match(r"\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2}\s*)*:", line)
        if not head:
            continue
        address = int(head[1], 0)
        for comment in re.findall(r"/\* ((?:Start|End)[^*]*)\*/", line):
            for number in re.findall(r"Start(?:/End empty)? region (\d+)", comment):
                regions.setdefault(number, address)
        compares = r"(%p\w+) = scmp\.ne\.s32\.totalorder (%s\w+), (\d+)\b"
        for predicate, register, number in re.findall(compares, line):
            tests[predicate] = register, int(number)
        for predicate, region in re.findall(r"sbr\.rel \((.*?)\) target = \$region(\d+)", line):
            branches.append((address + 1 + DELAY, predicate, region))
    spans = []
    loops = []
    for after, predicate, region in branches:
        target = regions.get(region, -1)
        if target > after:
            spans.append(Span(after, target, tests.get(predicate)))
        elif 0 <= target < after - DELAY:
            loops.append(Span(target, after))
    return Listing(address + 1, spans, loops)


def outermost(spans):
    return [span for span in spans if not any(other.holds(span) for other in spans)]


def longest(spans, default):
    return max(spans, key=lambda span: span.size, default=default)


def branches_of(listing, grid_loop):
    """Spans of the kernel's own branches, in order.

    The longest span inside the grid loop is the kernel's body. Branches beside it, and short ones,
    are the pipeline's, which moves blocks in and out.
    """
    inside = [span for span in listing.spans if grid_loop.holds(span)]
    body = longest(inside, Span(0, 0))
    own = [span for span in inside if span.test or span.size >= SHORT]
    return sorted(outermost([span for span in own if body.holds(span)]))


def count(listing, weigh=None, trips=()):
    """Bundles of a grid step, weighted. A kernel without a grid loop is one step.

    weigh: a function from `branches_of` to how often each runs per grid step; 1 where it says
    nothing. trips: how often each loop inside the grid loop runs. Raises ValueError where a loop
    has no trip count, or a weight no branch.
    """
    grid_loop = longest(outermost(listing.loops), Span(0, listing.num_bundles))
    inner = sorted(loop for loop in listing.loops if grid_loop.holds(loop))
    if len(inner) != len(trips):
        raise ValueError(f"{len(inner)} loops inside the kernel, but {len(trips)} trip counts")
    branches = branches_of(listing, grid_loop)
    weights = weigh(branches) if weigh else []
    if len(weights) > len(branches):
        raise ValueError(f"{len(weights)} weights for {len(branches)} branches")
    scaled = [*zip(inner, trips, strict=True), *zip(branches, weights, strict=False)]
    edges = {grid_loop.start, grid_loop.end}
    for span, _ in scaled:
        edges |= {span.start, span.end}
    edges = sorted(edges)
    bundles = 0
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        runs = [factor for span, factor in scaled if span.start <= start < span.end]
        bundles += (end - start) * math.prod(runs)
    return bundles


def one_of_chain(steps):
    """Weights of a body that is a chain of `pl.when(min(i, last) == b)`, b = 0 to last.

    i is the last grid index, below `steps`. Branch b < last runs once per row, the last one in all
    other steps. A branch that is no such test counts as always run.
    """

    def weigh(branches):
        last = max((span.test[1] for span in branches if span.test), default=0)
        weights = []
        for span in branches:
            if not span.test:
                weights.append(1)
            elif span.test[1] < last:
                weights.append(1 / steps)
            else:
                weights.append(max(steps - last, 0) / steps)
        return weights

    return weigh


def one_of_chain_then_last(steps):
    """Weights of such a chain, taken in order, and a branch that runs in the last step of a row.

    In a row of one step none of them is a branch any more.
    """

    def weigh(branches):
        if not branches and steps == 1:
            return []
        last = max(len(branches) - 2, 0)
        runs = [1] * last + [steps - last, 1]
        return [number / steps for number in runs]

    return weigh


# ---- The kernels of a program --------------------------------------------------------------------
def kernels(jaxpr):
    """All Pallas calls in a traced program, equations of its jaxpr."""

    def is_program(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from kernels(inner)


def identity(kernel):
    """What tells kernels apart in whatever program they are: their cost_estimate."""
    stated = kernel.cost_estimate
    return tuple(stated.get(key, 0) for key in ("flops", "transcendentals", "bytes_accessed"))


def compile_alone(eqn, device):
    """The Instruction that calls a kernel, in a program of nothing else."""
    axes = (AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=axes, devices=[device])
    whole = PartitionSpec()

    def shape(variable):
        aval = variable.aval
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=NamedSharding(mesh, whole))

    def call(*arrays):
        return eqn.primitive.bind(*arrays, **eqn.params)

    # a kernel's lowering asks the mesh what chip it is for
    mapped = jax.shard_map(call, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    program = jax.jit(mapped).lower(*map(shape, eqn.invars)).compile()
    return next(Module(program.as_text()).kernels())


def time_alone(eqn, device, clock, folder, rule):
    """(identity, seconds of one call, bundles per grid step) of a kernel that is compiled alone.

    libtpu must have been told to dump into folder. rule: a function from the equation to `count`'s
    keywords. Raises ValueError for a kernel that these do not describe.
    """
    older = {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    kernel = compile_alone(eqn, device)
    grid = eqn.params["grid_mapping"].grid
    wanted = rf"\d+-{re.escape(kernel.name)}-\d+-final_bundles\.txt"
    for path in Path(folder).glob("*-final_bundles.txt"):
        is_new = older.get(path) != path.stat().st_mtime_ns
        if is_new and re.fullmatch(wanted, path.name):
            listing = parse(path.read_text(encoding="utf-8", errors="replace"))
            break
    else:
        raise ValueError(f"kernel {kernel.name}: the compiler left no bundles of it")
    try:
        per_step = count(listing, **rule(eqn))
    except ValueError as error:
        raise ValueError(f"kernel {kernel.name}, grid {grid}: {error}") from error
    return identity(kernel), per_step * math.prod(grid) / clock, per_step


def by_instruction(module, seconds):
    """{name: seconds of one call} of a Module's kernels, from {identity: seconds}."""
    found = {}
    for kernel in module.kernels():
        if identity(kernel) in seconds:
            found[kernel.name] = seconds[identity(kernel)]
    return found
