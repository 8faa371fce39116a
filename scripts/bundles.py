"""What do a Pallas TPU kernel's instruction bundles cost? A bundle is what the chip issues in one clock cycle.

The compiler writes them where told to by LIBTPU_INIT_ARGS, which is read once, when libtpu loads (`dump_flags`): per kernel a
file with one line per bundle, `  0x92   : > { %474 = sbr.rel (%p) target = $region44 ... } /* Start region 45 ... */`. The
bundles of a grid step are those from the target of the grid loop's backward branch to that branch. A forward branch skips
what lies between it and its target, such as the body of a `pl.when`, by default counted as never skipped.

    seconds = bundles per grid step, weighted by how often they run * grid steps / clock

Stalls are not in it (DMA that is not done, results that are not ready): against splash attention kernels that were timed,
bundles give 0.82 / 0.79 / 0.93 at blocks 256 / 512 / 1024. scripts/estimate.py therefore multiplies by 1.15.
"""
import math, re
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scripts.estimate import is_kernel

DELAY = 4        # bundles after a branch that run whether it is taken or not
SHORT = 60       # spans of fewer bundles belong to the pipeline rather than to the kernel

def dump_flags(folder):
    """To be appended to LIBTPU_INIT_ARGS. Large programs compile several times slower with it: for kernels alone."""
    return (f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles "
            "--xla_jf_dump_category_filter=codegen")

class Span(NamedTuple):
    """Bundles start..end-1, which a branch can skip. test: (register, k) where it is skipped unless register == k, or None."""
    start: int
    end: int
    test: tuple | None = None
    def holds(self, other): return self.start <= other.start and other.end <= self.end and self != other

class Listing(NamedTuple):
    num_bundles: int
    spans: list   # of forward branches
    loops: list   # of backward branches

def parse(text):
    """The text of a *-final_bundles.txt -> Listing."""
    address, regions, branches, tests = -1, {}, [], {}
    for line in text.splitlines():
        if not (head := re.match(r"\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2}\s*)*:", line)):
            continue
        address = int(head[1], 0)
        for comment in re.findall(r"/\* ((?:Start|End)[^*]*)\*/", line):
            for number in re.findall(r"Start(?:/End empty)? region (\d+)", comment):
                regions.setdefault(number, address)
        found = re.findall(r"(%p\w+) = scmp\.ne\.s32\.totalorder (%s\w+), (\d+)\b", line)
        tests |= {predicate: (register, int(k)) for predicate, register, k in found}
        branches += [(address, *found) for found in re.findall(r"sbr\.rel \((.*?)\) target = \$region(\d+)", line)]
    spans, loops = [], []
    for at, predicate, region in branches:
        if (to := regions.get(region, -1)) > at + 1 + DELAY:
            spans.append(Span(at + 1 + DELAY, to, tests.get(predicate)))
        elif 0 <= to <= at:
            loops.append(Span(to, at + 1 + DELAY))
    return Listing(address + 1, spans, loops)

def branches_of(listing, grid_loop):
    """The spans of a kernel's own branches, in order: those directly inside the longest span of the grid loop, which is the
    kernel's body; the branches beside it, and short ones, are the pipeline's (windows in and out)."""
    inside = [span for span in listing.spans if grid_loop.holds(span)]
    body = max(inside, key=lambda span: span.end - span.start, default=Span(0, 0))
    within = [span for span in inside if body.holds(span) and (span.test or span.end - span.start >= SHORT)]
    return sorted(span for span in within if not any(other.holds(span) for other in within))

def count(listing, weights=(), trips=()):
    """Bundles of a grid step, weighted; a kernel without a grid loop is one step. weights: runs per grid step of each of
    `branches_of`, in order (default: 1 for those not given), or a function from these spans to a list. trips: of each
    counted loop inside the grid loop, in order. Raises ValueError where a loop has no trip count, or a weight no branch."""
    outer = [loop for loop in listing.loops if not any(other.holds(loop) for other in listing.loops)]
    grid_loop = max(outer, key=lambda loop: loop.end - loop.start, default=Span(0, listing.num_bundles))
    inner = sorted(loop for loop in listing.loops if grid_loop.holds(loop))
    if len(inner) != len(trips):
        raise ValueError(f"{len(inner)} counted loops inside the kernel, but {len(trips)} trip counts")
    branches = branches_of(listing, grid_loop)
    weights = weights(branches) if callable(weights) else weights
    if len(weights) > len(branches):
        raise ValueError(f"{len(weights)} weights for {len(branches)} branches")
    scaled = [*zip(inner, trips), *zip(branches, weights)]
    def runs(address): return math.prod(factor for span, factor in scaled if span.start <= address < span.end)
    edges = sorted({grid_loop.start, grid_loop.end, *(edge for span, _ in scaled for edge in span[:2])})
    return sum((end - start) * runs(start) for start, end in zip(edges, edges[1:]))

def one_of_chain(last_grid_size):
    """Weights of a body that is a chain of `pl.when(min(i, last) == b)`, i the last grid index, b = 0 .. last: branch b < last
    runs once per row, the last one in all other steps. A branch that is not such a test counts as always run."""
    def weights(branches):
        most = max((span.test[1] for span in branches if span.test), default=0)
        share = lambda b: 1 / last_grid_size if b < most else max(last_grid_size - most, 0) / last_grid_size
        return [share(span.test[1]) if span.test else 1 for span in branches]
    return weights

def one_of_chain_then_last(last_grid_size):
    """Weights of such a chain, taken in order, before a branch that runs in the last step of a row. In a row of one step none of them
    is a branch any more."""
    def weights(branches):
        if not branches and last_grid_size == 1:
            return []
        most = max(len(branches) - 2, 0)
        return [number / last_grid_size for number in [1] * most + [last_grid_size - most, 1]]
    return weights

# ---- The kernels of a program ----
def kernels(jaxpr):
    """All Pallas calls in a traced program, equations of its jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from kernels(inner)

def identity(costs):
    """What tells kernels apart in whatever program they are: their cost_estimate, a dict of FLOPs, transcendentals and bytes."""
    return tuple(int(costs.get(key, 0)) for key in ("flops", "transcendentals", "bytes_accessed"))

def identity_of(custom_call):
    return identity(dict(re.findall(r'"(\w+)":"?(\d+)', re.search(r'"cost_estimate":\{([^}]*)\}|$', custom_call)[1] or "")))

def time_alone(eqn, device, clock, folder, rules=()):
    """(identity of it, seconds of one call, its number of bundles per grid step) of a kernel, compiled alone for a device; libtpu
    must have been told to dump into folder. rules: (regex of the kernel's name, function from its equation to the arguments of
    `count`). Raises ValueError for a kernel that these do not describe."""
    mesh, whole = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=[device]), PartitionSpec()
    arguments = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=NamedSharding(mesh, whole)) for v in eqn.invars]
    for path in Path(folder).glob("*"):
        path.unlink()
    alone = jax.shard_map(lambda *xs: eqn.primitive.bind(*xs, **eqn.params), mesh=mesh, in_specs=whole, out_specs=whole,
                          check_vma=False)  # a kernel's lowering asks the mesh what chip it is for
    text = jax.jit(alone).lower(*arguments).compile().as_text()
    call = next(line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line)
    name, grid = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", call)[1], eqn.params["grid_mapping"].grid
    paths = [path for path in Path(folder).glob("*-final_bundles.txt")
             if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-final_bundles\.txt", path.name)]
    if not paths:
        raise ValueError(f"kernel {name}: the compiler left no bundles of it")
    rule = next((rule(eqn) for pattern, rule in rules if re.search(pattern, str(eqn.params["name"]))), {})
    try:
        per_step = count(parse(paths[0].read_text()), **rule)
    except ValueError as error:
        raise ValueError(f"kernel {name}, grid {grid}: {error}") from error
    return identity_of(call), per_step * math.prod(grid) / clock, per_step

def by_instruction(module, seconds):
    """{instruction name: seconds of one call} of the kernels of an estimate.Module, from {identity: seconds}."""
    calls = [i for computation in module.computations.values() for i in computation.values() if is_kernel(i)]
    return {i.name: seconds[identity_of(i.attrs)] for i in calls if identity_of(i.attrs) in seconds}
