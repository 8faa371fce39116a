"""What do a Pallas TPU kernel's instruction bundles cost? A bundle is what the chip issues in one clock cycle.

The compiler writes them where told to by LIBTPU_INIT_ARGS, which is read once, when libtpu loads (`dump_flags`): per kernel a
file with one line per bundle, `  0x92   : > { %474 = sbr.rel (%p) target = $region44 ... } /* Start region 45 ... */`. The
bundles of a grid step are those from the target of the grid loop's backward branch to that branch. A forward branch skips
what lies between it and its target, such as the body of a `pl.when`, by default counted as never skipped.

    seconds = bundles per grid step, weighted by how often they run * grid steps / clock

Stalls are not in it (DMA that is not done, results that are not ready): against splash attention kernels that were timed,
bundles give 0.82 / 0.79 / 0.93 at blocks 256 / 512 / 1024. scripts/estimate.py therefore multiplies by 1.15.
"""
import base64, glob, hashlib, math, os, re
from typing import NamedTuple

DELAY = 4        # bundles after a branch that run whether it is taken or not
SHORT = 60       # spans of fewer bundles belong to the pipeline rather than to the kernel

def dump_flags(folder):
    """To be appended to LIBTPU_INIT_ARGS before jax is imported."""
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
        tests |= {p: (register, int(k)) for p, register, k in re.findall(r"(%p\w+) = scmp\.ne\.s32\.totalorder (%s\w+), (\d+)\b", line)}
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

# ---- The kernels of a compiled program ----
def grid_of(body):
    """Grid of a kernel, from the MLIR that its custom call carries in base64."""
    from jax._src.lib import tpu
    from jax.extend.mlir import ir
    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        main = next(iter(ir.Module.parse(base64.b64decode(body)).body.operations))
        return tuple(main.attributes["iteration_bounds"]) if "iteration_bounds" in main.attributes else ()

def read(folder):
    """{instruction name: text of its bundles} of a dump."""
    named = {}
    for path in glob.glob(f"{glob.escape(str(folder))}/*-final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", os.path.basename(path))
        if name and not name[1].startswith("<"):
            with open(path) as file:
                named[name[1]] = file.read()
    return named

def kernel_seconds(module, texts, clock, rules=()):
    """{instruction name: seconds of one call} of the Pallas kernels of an estimate.Module. texts: of `read`. rules: (regex,
    function from grid to weights) pairs, the first that matches a kernel's name counts. A kernel that the compiler took over
    from one just like it has no bundles of its own and gets the other's time. Raises ValueError for one that has none at all."""
    calls = [(i, computation) for computation in module.computations.values() for i in computation.values()
             if i.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attrs]
    seconds, alike = {}, {}
    for call, computation in calls:
        body = call.find(r'"body":"([^"]*)"', "")
        arrays = [*call.arrays, *(a for name in call.operands if name in computation for a in computation[name].arrays)]
        exact, loose = ((hashlib.sha256(body.encode()).hexdigest(), tuple(shapes)) for shapes in
                        (arrays, [array._replace(space=0) for array in arrays]))
        if call.name in texts:
            grid = grid_of(body)
            weights = next((rule(grid) for pattern, rule in rules if re.search(pattern, call.name)), ())
            time = count(parse(texts[call.name]), weights) * math.prod(grid) / clock
            seconds[call.name] = alike[exact] = time
            alike.setdefault(loose, time)
        else:
            seconds[call.name] = exact, loose
    for name, keys in [(name, keys) for name, keys in seconds.items() if isinstance(keys, tuple)]:
        if (time := alike.get(keys[0], alike.get(keys[1]))) is None:
            raise ValueError(f"kernel {name}: the compiler left no bundles of it")
        seconds[name] = time
    return seconds
