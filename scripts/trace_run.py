"""Train, write a trace of some steps by JAX's profiler, and say where their time went.

    python -m scripts.trace_run 20:25 --preset=demo    steps 21 to 25; other flags are train.py's
    python -m scripts.trace_run 20:25 --out=DIR        there, by default in logs/trace-<time>

It prints how long the device was busy and its kernels (a TPU's and a CPU's: operations) by their
share of that time; names that differ only in their last numbers are one row. About one more step
is in it, for the next one is already under way when the profiler stops.
To look at it: `pip install xprof`, then `xprof --logdir=DIR`; or open the .trace.json.gz within at
https://ui.perfetto.dev. Tracing costs time: these steps are slower than the others.
"""

import collections
import itertools
import os
import re
import sys
import time
from pathlib import Path

import jax

import train

# ---- What a trace says ---------------------------------------------------------------------------


def read_lines(folder):
    """[[(start, end, name)] of each line] of the newest trace in a folder, in nanoseconds.

    A line is a stream of the first GPU, the operations of the first TPU, or without these what a
    thread of the CPU has computed.
    """
    paths = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not paths:
        return []
    lines = []
    planes = {p.name: p for p in jax.profiler.ProfileData.from_file(str(paths[-1])).planes}
    devices = sorted(name for name in planes if re.fullmatch(r"/device:(GPU|TPU):\d+", name))
    if devices:
        found = list(planes[devices[0]].lines)
        streams = [line for line in found if line.name.startswith("Stream")]
        lines = [
            line.events for line in streams or [line for line in found if line.name == "XLA Ops"]
        ]
    elif jax.default_backend() == "cpu" and "/host:CPU" in planes:
        lines = [
            [event for event in line.events if "hlo_op" in dict(event.stats)]
            for line in planes["/host:CPU"].lines
        ]
    return [[(e.start_ns, e.start_ns + e.duration_ns, e.name) for e in line] for line in lines]


def own_times(events):
    """Yield (name, nanoseconds) of each event of a line, without those of the events inside it."""
    inside = []  # [end, name, own time] of those that are not over
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while inside and inside[-1][0] <= start:
            yield tuple(inside.pop()[1:])
        if inside:
            inside[-1][2] -= end - start
        inside.append([end, name, end - start])
    yield from (tuple(event[1:]) for event in inside)


def busy_time(events):
    """Nanoseconds in which at least one event was under way."""
    total = until = 0
    for start, end, _ in sorted(events):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def summary(folder, num_rows=20):
    """Lines: how busy the device was, and what took most of the time."""
    lines = read_lines(folder)
    events = [event for line in lines for event in line]
    if not events:
        return [f"{folder}: the trace holds no kernel"]
    times = collections.defaultdict(list)
    for name, own in itertools.chain(*map(own_times, lines)):
        times[re.sub(r"([._]\d+)+$", "", name)].append(own)
    busy = busy_time(events)
    span = max(end for _, end, _ in events) - min(start for start, _, _ in events)
    total = sum(map(sum, times.values()))
    said = [f"{span / 1e6:.1f} ms, busy {busy / span:.1%}; {len(events)} kernels: share, ms, calls"]
    for name in sorted(times, key=lambda name: -sum(times[name]))[:num_rows]:
        own = sum(times[name])
        said.append(f"{own / total:7.1%}{own / 1e6:10.2f}{len(times[name]):8}  {name[:70]}")
    return said


# ---- The run -------------------------------------------------------------------------------------


class Trace:
    """A hook: the profiler is on after step `begin` until step `end` is over. Signals are heard."""

    def __init__(self, begin, end, folder):
        self.begin, self.end, self.folder = begin, end, folder
        self.is_on = self.was_on = False
        self.stop = train.Stop()

    def __call__(self, step):
        if self.begin <= step < self.end and not self.was_on:
            jax.profiler.start_trace(self.folder)
            self.is_on = self.was_on = True
        if step > self.end:  # whose loss has been waited for
            self.finish()
        return self.stop(step)

    def finish(self):
        if self.is_on:
            self.is_on = False
            try:
                jax.profiler.stop_trace()
            except jax.errors.JaxRuntimeError as error:  # the disk
                raise train.UsageError(f"{self.folder}: no trace is written: {error}") from error
            print(f"wrote: {self.folder}, a trace of steps {self.begin + 1} to {self.end}")


def main(argv=None):
    """Returns the run's folder. Raises UsageError for a range that holds no step of the run."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv:
        return print(__doc__)
    span, *flags = argv or [""]
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", span)
    begin, end = map(int, match.groups()) if match else (0, 0)
    wanted = "wanted START:STOP first, rising steps such as 20:25"
    train.require(0 < begin < end, f"{span or 'no steps'}: {wanted}")
    steps = train.read_flags(flags).get("steps", "")
    has_it = not steps.isdecimal() or begin < int(steps)
    train.require(has_it, f"{span}: a run of --steps={steps} has no such step")
    outs = [f"logs/trace-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"]
    outs += [flag.removeprefix("--out=") for flag in flags if flag.startswith("--out=")]
    there = next(path for path in (Path(outs[-1]), *Path(outs[-1]).parents) if path.exists())
    may_write = there.is_dir() and os.access(there, os.W_OK)
    train.require(may_write, f"--out={outs[-1]}: {there} is no folder to write into")
    trace = Trace(begin, end, outs[-1])
    try:
        run = train.main([flag for flag in flags if not flag.startswith("--out=")], hook=trace)
    finally:
        trace.finish()  # where the run ended first
    train.require(trace.was_on, f"{span}: the run had no such step, so there is no trace")
    print(*summary(outs[-1]), sep="\n")
    return run


if __name__ == "__main__":
    sys.exit(train.command(main))
