"""A run of train.py in a process of its own, to be struck by signals: from outside or by itself.

The models are as small as can be, so that a run takes a second; all else is the trainer's own.
Processes are forked from a server that has imported train and started no backend.
"""

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
from unittest import mock

import jax
import jax.numpy as jnp
import safetensors.numpy

import train

STEPS, EVERY = 12, 3
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


# ---- Models ----


def bigram_specs(cfg):
    table = train.Spec("V V", "V", train.constant(0.0), "table")
    return train.with_shapes({"table": table}, train.axis_sizes(cfg))


def bigram_logits(weights, tokens_BT, cfg):
    return weights["table"][tokens_BT]


def matrix_specs(cfg):
    """A stack of matrices for Muon between two tables."""
    specs = {
        "table": train.Spec("V D", "V", train.normal(0.1), "table"),
        "matrices": train.Spec("L D F", "F", train.normal(0.1), "muon"),
        "head": train.Spec("V F", "V", train.normal(0.1), "table"),
    }
    return train.with_shapes(specs, train.axis_sizes(cfg))


def matrix_logits(weights, tokens_BT, cfg):
    hidden_BTF = weights["table"][tokens_BT] @ jnp.sum(weights["matrices"], axis=0)
    return hidden_BTF @ weights["head"].T


def loss_by(logits):
    def loss(weights, batch, key, stage, cfg):
        logits_BTV = logits(weights, batch["tokens"], cfg)
        hit_BTV = batch["targets"][..., None] == jnp.arange(logits_BTV.shape[-1])[None, None]
        nats_BT = -jnp.sum(jnp.where(hit_BTV, jax.nn.log_softmax(logits_BTV), 0), axis=-1)
        return jnp.sum(nats_BT * batch["weights"]), jnp.sum(batch["weights"])

    return loss


def rules(cfg):
    return {"table": train.Adam(0.3, beta1=0.5, beta2=0.9, eps=1e-8), "muon": train.Muon(0.02)}


SMALL = train.replace(
    train.DEMO,
    steps=STEPS,
    model_dim=24,
    mlp_dim=40,
    stages=(train.Stage(0.5, 56, seq_len=14), train.Stage(1.0, 112, seq_len=28)),
    val=train.Stage(seq_len=40),
    val_tokens=58,
    val_context=11,
    compute_dtype="float32",
    shuffle=False,
    target_loss=0.0,
    save_every=EVERY,
    val_every=4,
    log_every=1,
)
PRESETS = {"demo": SMALL}
BIGRAM = train.Model(PRESETS, bigram_specs, rules, loss_by(bigram_logits), bigram_logits)
MATRIX = train.Model(PRESETS, matrix_specs, rules, loss_by(matrix_logits), matrix_logits)
MODELS = {"bigram": BIGRAM, "matrix": MATRIX, "gpt": train.GPT}


def compiled_once():
    """A fixture: runs of one config share their programs, which are not optimized.

    There is no waiting for disks.
    """
    programs, real = {}, train.compile_all
    elsewhere = ("log_dir", "resume", "train_files", "val_files", "target_loss")
    elsewhere = dict.fromkeys((*elsewhere, "val_every", "save_every", "log_every"))

    def remembered(model, mesh, cfg):
        optimized = not jax.config.read("jax_disable_most_optimizations")
        key = model.loss, mesh, optimized, train.replace(cfg, **elsewhere)
        if key not in programs:
            programs[key] = real(model, mesh, cfg)
        return programs[key]

    jax.config.update("jax_disable_most_optimizations", True)
    with mock.patch.object(train, "compile_all", remembered), mock.patch.object(os, "sync"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- A process ----


def started(argv, output, strikes=(), cache="", model="bigram", pause=0.0):
    """Start a run whose console goes to the file `output`. Returns the Process.

    strikes: (point, which time it is reached, signal numbers). A point is a key of POINTS, or
    "step", which is reached after each dispatched step. model: of MODELS. pause: seconds to wait at
    each step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "victim"])
    here = [str(Path(train.__file__).parent), str(Path(__file__).parent)]
    arguments = (argv, str(output), strikes, str(cache), model, pause)
    process = context.Process(target=live, args=arguments)
    # for the server's first imports
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(here)}):
        process.start()
    return process


def live(argv, output, strikes, cache, model, pause):
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["train.py", *argv]
    jax.config.update("jax_disable_most_optimizations", True)
    if cache:
        jax.config.update("jax_num_cpu_devices", 1)  # fewer to start
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache}
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # drawing takes longer than all the rest
    train.show_samples = lambda params, model, log: log.line("sample: x")
    stop = train.Stop()
    at_step = {count: numbers for point, count, numbers in strikes if point == "step"}

    def hook(step):
        hit(at_step.get(step, ()))
        time.sleep(pause)
        return stop(step)

    for point, count, numbers in strikes:
        if point != "step":
            install(point, count, numbers)
    sys.exit(train.command(lambda: train.main(argv, MODELS[model], hook)))


# ---- Points at which a run strikes itself ----


def hit(numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.02)  # a Python handler runs between two bytecodes


def install(point, count, numbers):
    """The count-th time that a run reaches a point of POINTS, it strikes itself."""
    owner, name, when, how = POINTS[point]
    real, reached = getattr(owner, name), itertools.count(1)

    def struck(*arguments, **rest):
        if when(*arguments) and next(reached) == count:
            return how(lambda: real(*arguments, **rest), lambda: hit(numbers), *arguments)
        return real(*arguments, **rest)

    setattr(owner, name, struck)


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


def always(*_):
    return True


def is_manifest(path, *_):
    return path.name == "manifest.json"


def is_there(path, *_):
    return Path(path).exists()


POINTS = {  # (owner and name of a function, which calls count, how it strikes)
    "compiling": (train, "compile_all", always, before),
    "tensors half written": (safetensors.numpy, "save_file", always, half_written),
    "manifest half written": (Path, "write_text", is_manifest, half_written),
    "before the name": (Path, "rename", always, before),
    "after the name": (Path, "rename", always, after),
    "half deleted": (shutil, "rmtree", is_there, half_deleted),
    "validation": (train, "evaluate", always, before),
    "samples": (train, "show_samples", always, before),
    "seal": (train.Log, "seal", always, before),
}


# ---- What a run left ----


def ended(process, seconds=120):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def steps_logged(run):
    found = re.findall(r"^step:(\d+)/\d+ ", (run / "log.txt").read_text(), re.MULTILINE)
    return list(map(int, found))


def metrics_of(run):
    """The rows of metrics.jsonl. Of a step that was trained twice the last counts."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {(row["step"], "train_loss" in row): row for row in rows}
    return [last[key] for key in sorted(last, key=lambda key: (key[0], not key[1]))]


def weights_of(run, step=STEPS):
    folder = run / f"ckpt/step-{step:06d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


if __name__ == "__main__":  # victim.py CACHE PAUSE FLAGS: as `python train.py FLAGS`
    live(sys.argv[3:], "/dev/stdout", (), sys.argv[1], "bigram", float(sys.argv[2]))
