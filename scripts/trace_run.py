"""Train, and write a trace of some steps by JAX's profiler.

    python -m scripts.trace_run 20:25 --preset=demo    steps 21 to 25; other flags are train.py's
    python -m scripts.trace_run 20:25 --out=DIR        there, by default in logs/trace-<time>

To look at it: `pip install xprof`, then `xprof --logdir=DIR`; or open the .trace.json.gz within at
https://ui.perfetto.dev. Tracing costs time: these steps are slower than the others.
"""

import os
import re
import sys
import time
from pathlib import Path

import jax

import train


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
    return run


if __name__ == "__main__":
    sys.exit(train.command(main))
