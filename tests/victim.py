"""A run of train.py in a process of its own, to be struck by signals: from outside, or by itself at a chosen point.

The model is a table of bigrams, so that a run takes a second; all else is the trainer's own. Processes are forked from a
server that has imported train and started no backend (multiprocessing's forkserver).
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors.numpy

import train

STEPS, EVERY = 12, 3
FLAGS = ["--preset=tiny", "--cpu_devices=1", f"--steps={STEPS}", f"--save_every={EVERY}", "--val_every=4", "--log_every=1",
         "--stage_ends=0.5,1", "--batch_tokens=56,112", "--seq_len=14,28", "--val_tokens=58", "--val_seq_len=40", "--val_context=11"]


def bigram_loss(weights, tokens_BT, target_BT, weight_BT, stage, cfg):
    logits_BTV = weights["table"][tokens_BT]
    picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weight_BT * (jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT))


BIGRAM = train.Model(lambda cfg: {"table": train.Spec("V V", train.constant(0.0), "embed")}, bigram_loss,
                     lambda cfg: {"embed": train.Rule("adam", 0.3, beta1=0.5, beta2=0.9, eps=1e-8)},
                     lambda weights, tokens_BT, cfg: weights["table"][tokens_BT])


def started(argv, output, strikes=(), cache=None):
    """Start a run whose console goes to the file `output`. strikes: (point of POINTS, which time it is reached, signal numbers).
    Returns the Process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "victim"])
    here = [str(Path(train.__file__).parent), str(Path(__file__).parent)]
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), os.pathsep.join(here)  # for the server's first imports
    try:
        process = context.Process(target=live, args=(argv, str(output), strikes, str(cache or Path(output).parent / "compiled")))
        process.start()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({"PYTHONPATH": before} if before is not None else {})
    return process


def live(argv, output, strikes, cache):
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["train.py", *argv]
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
    for name, value in {"compilation_cache_dir": cache, "persistent_cache_min_compile_time_secs": 0,
                        "persistent_cache_min_entry_size_bytes": -1, "disable_most_optimizations": True}.items():
        jax.config.update(f"jax_{name}", value)
    train.sample = lambda *_: [104, 105]  # drawing takes twice as long as all the rest
    for point, count, numbers in strikes:
        POINTS[point](count, numbers)
    code = train.command(lambda: train.main(argv, BIGRAM, train.Stop().listen()))
    sys.stdout.flush()
    os._exit(code or 0)


# ---- Points at which a run strikes itself ----

def hit(numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.02)  # a Python handler runs between two bytecodes


def replaced(owner, name, when, strike):
    """Let a call of owner.name be strike(real function, *its arguments), the count-th time that when(*its arguments)."""
    def install(count, numbers):
        real, calls = getattr(owner, name, open), itertools.count(1)

        def struck(*arguments, **rest):
            if when(*arguments) and next(calls) == count:
                return strike(lambda: real(*arguments, **rest), lambda: hit(numbers), *arguments)
            return real(*arguments, **rest)
        setattr(owner, name, struck)
    return install


def before(real, strike, *_):
    strike()
    return real()


def after(real, strike, *_):
    result = real()
    strike()
    return result


def half_written(real, strike, *arguments):
    """The file exists, and half of its bytes do."""
    path = next(x for x in arguments if isinstance(x, Path))
    real()
    os.truncate(path, path.stat().st_size // 2)
    strike()


def half_deleted(real, strike, folder, **_):
    min(Path(folder).iterdir()).unlink()
    strike()
    return real()


def torn(real, strike, path, *_):
    """An opened file of which only the first half of the first write arrives."""
    file = real()
    write = file.write

    def half(text):
        write(text[:len(text) // 2])
        file.flush()
        strike()
        return write(text[len(text) // 2:])
    file.write = half
    return file


def of_program(key):
    """A compiled program: before its count-th run, those of the warm-up aside."""
    def install(count, numbers):
        real, calls = train.compile_all, itertools.count(1 if key == "eval" else 0)

        def compile_all(*arguments):
            programs, notes = real(*arguments)

            def program(*operands):
                if next(calls) == count:
                    hit(numbers)
                return programs[key](*operands)
            return programs | {key: program}, notes
        train.compile_all = compile_all
    return install


def written_anew(name):
    return lambda path, mode="r": mode == "w" and Path(path).name.endswith(name)


always = lambda *_, **__: True
POINTS = {
    "the data are read": replaced(train, "open_data", always, before),
    "programs are compiled": replaced(train, "compile_all", always, before),
    "programs are warmed up": replaced(train, "warm_up", always, before),
    "the first batch is made": replaced(train, "train_batches", always, after),
    "training": of_program(0),
    "training in a later stage": of_program(1),
    "validation": of_program("eval"),
    "tensors are half written": replaced(safetensors.numpy, "save_file", always, half_written),
    "tensors are written": replaced(safetensors.numpy, "save_file", always, after),
    "the manifest is half written": replaced(Path, "write_text", always, half_written),
    "the manifest is written": replaced(Path, "write_text", always, after),
    "files are flushed": replaced(train, "flush", always, before),
    "the checkpoint gets its name": replaced(Path, "rename", lambda path, to: to.name.startswith("step-"), before),
    "the checkpoint has its name": replaced(Path, "rename", lambda path, to: to.name.startswith("step-"), after),
    "an old checkpoint is deleted": replaced(shutil, "rmtree", lambda path, **_: Path(path).exists(), before),
    "an old checkpoint is half deleted": replaced(shutil, "rmtree", lambda path, **_: Path(path).exists(), half_deleted),
    "metrics are half written": replaced(train, "open", written_anew("metrics.jsonl"), torn),
    "the config is half written": replaced(train, "open", written_anew("config.json"), torn),
    "the picture is half written": replaced(train, "open", written_anew("loss.svg"), torn),
    "data are described": replaced(train.Run, "line", lambda run, text, *_: text.startswith("data: "), after),
    "the result is reported": replaced(train, "report", always, before),
    "samples are drawn": replaced(train, "sample", always, before),
    "the log is sealed": replaced(train.Run, "seal", always, before),
}


# ---- What a run left ----

def runs_of(logs):
    return sorted(path for path in Path(logs).iterdir() if path.is_dir())


def steps_written(folder):
    return [int(step) for step in re.findall(rf"^step:(\d+)/\d+ ", (folder / "log.txt").read_text(), re.MULTILINE)]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def ended(process, seconds=120):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def struck(process, number):
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid, number)


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


if __name__ == "__main__":  # victim.py CACHE FLAGS: as `python train.py FLAGS`
    live(sys.argv[2:], "/dev/stdout", (), sys.argv[1])
