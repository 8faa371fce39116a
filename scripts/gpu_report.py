"""What does this machine make of the speedrun? One command, less than ten minutes, on one GPU.

    python -m scripts.gpu_report                    step time, MFU and memory of each stage, full size
    python -m scripts.gpu_report --micro_tokens=8192,32768 -- --stages.batch_tokens=131072
    python -m scripts.gpu_report --smoke            the same at tiny shapes, to see that it works

A step is the whole global batch, accumulated on the devices there are, optimizer included.
--micro_steps=N times a shorter accumulation and scales the time to the whole batch, which counts the
optimizer too often: a bound from above. What follows -- are flags of train.py. Batches come from
--train_files where there are such shards, else from documents of random tokens: what a step costs
does not depend on them; the loss of these few steps begins near log(vocabulary). The report is
printed, and after each row written to OUT.txt and OUT.json, with versions and devices.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

import train
from scripts.bench import generate_shards
from train import GPT, ROOT, UsageError, replace, require

SMOKE = [f"@{ROOT}/scripts/presets/tiny.args"]
HEAD = """\
  micro  stage  rows of   tokens  compile  median      min      max  thousand    MFU   GiB, by the  peak GiB,    loss
 tokens                   a step        s      ms       ms       ms  tokens/s          compiler     so far"""
LINE = (
    "{micro_tokens:7}{stage:7}{seq_len:9}{tokens:9}{compile_s:9.1f}{median_ms:8.1f}{min_ms:9.1f}"
    "{max_ms:9.1f}{k:10.1f}{mfu:>7}{compiled_gib:14.2f}{peak_gib:>11}{loss:10.3f}"
)

# ---- Steps ----


def config(flags, micro_tokens, micro_steps):
    """(cfg of eight steps in each stage, tokens of a whole step by stage). Raises UsageError."""
    cfg, _ = train.configure([*flags, f"--micro_tokens={micro_tokens}"])
    stages = []
    for i, stage in enumerate(cfg.stages):
        micro = max(micro_tokens or 1 << 16, stage.seq_len)
        whole = f"--micro_tokens={micro_tokens}: wanted whole rows of {stage.seq_len} tokens"
        require(micro % stage.seq_len == 0, whole)
        short = micro_steps * micro * jax.device_count() or stage.batch_tokens
        batch_tokens = min(stage.batch_tokens, short)
        stages.append(replace(stage, end=(i + 1) / len(cfg.stages), batch_tokens=batch_tokens))
    short = replace(cfg, stages=tuple(stages), steps=8 * len(stages), max_epochs=1000)
    return short, [stage.batch_tokens for stage in cfg.stages]


def batches_of(cfg, mesh, folder):
    """([two batches of each stage], cfg completed). Raises UsageError.

    Of the shards of --train_files; of the demo's text where that is empty; of random tokens where
    there are none.
    """
    if not cfg.train_files:
        cfg = replace(cfg, train_files=train.embedded_corpus()[0])
    if not train.find_shards(cfg.train_files):
        if not list(folder.glob("*.bin")):
            generate_shards(folder, 1, 2 * train.tokens_before(cfg.steps, cfg) + 100_000)
        cfg = replace(cfg, train_files=f"{folder}/train_*.bin")
    shards = train.open_shards(cfg.train_files)
    cfg = train.complete_config(shards, cfg)
    batches = [[] for _ in cfg.stages]
    for step, (rows, _) in enumerate(train.plan(shards, cfg)):
        i = train.stage_at(step, cfg)
        if len(batches[i]) < 2:
            batches[i].append(train.to_devices(rows, cfg.stages[i], mesh, cfg))
    return batches, cfg


def compile_step(listed, options):
    """(program, seconds), or the runtime's error."""
    function, arguments = listed
    start = time.perf_counter()
    try:
        program = function.lower(*arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return error
    return program, time.perf_counter() - start


def time_stage(stage, compiled, whole_tokens, init, batches, specs, cfg, args):
    """A stage's numbers. Raises JaxRuntimeError, and ArithmeticError for a loss that is not finite."""
    if isinstance(compiled, Exception):
        raise compiled
    program, compile_s = compiled
    state, seconds = init(), []
    for i in range(args.warmup + args.steps):
        start = time.perf_counter()
        state, loss = jax.block_until_ready(program(state, batches[i % len(batches)]))
        seconds.append(time.perf_counter() - start)
    loss = train.require_finite(loss, f"the loss after {len(seconds)} steps")
    step_ms = 1e3 * whole_tokens / stage.batch_tokens * np.array(seconds[args.warmup :])
    tokens_per_s = 1e3 * whole_tokens / float(np.median(step_ms))
    peak = train.peak_flops()
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "seq_len": stage.seq_len,
        "tokens": whole_tokens,
        "timed_tokens": stage.batch_tokens,
        "compile_s": compile_s,
        "median_ms": float(np.median(step_ms)),
        "min_ms": float(step_ms.min()),
        "max_ms": float(step_ms.max()),
        "steps": len(step_ms),
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * train.flops_per_token(stage, specs, cfg) / peak if peak else None,
        "compiled_gib": train.memory_of(program) / 2**30,
        "peak_gib": used / 2**30 if used else None,
        "loss": loss,
    }


def line_of(row):
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
    peak_gib = f"{row['peak_gib']:.2f}" if row["peak_gib"] else "-"
    return LINE.format(**row | {"k": row["tokens_per_s"] / 1e3, "mfu": mfu, "peak_gib": peak_gib})


def time_steps(args, say):
    """Rows of each stage and --micro_tokens, smallest first, since memory's peak is the process's.

    Nothing is begun once the time is up. Raises UsageError.
    """
    rows, mesh, end = [], None, time.perf_counter() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        for micro_tokens in sorted(args.micro_tokens, key=lambda tokens: tokens or 1 << 16):
            cfg, whole = config(args.flags, micro_tokens, args.micro_steps)
            mesh = mesh or train.make_mesh()
            batches, cfg = batches_of(cfg, mesh, Path(folder))
            specs, listed = GPT.specs(cfg), train.list_programs(GPT, mesh, cfg)
            if not rows:
                say(f"{train.count_params(specs)} parameters, attention {cfg.attention}; "
                    f"{args.steps} steps timed after {args.warmup}")
                say(HEAD)
            options = train.compiler_options(mesh, cfg)
            steps = [listed[f"train_{i}"] for i in range(len(cfg.stages))]
            with ThreadPoolExecutor() as pool:
                compiled = list(pool.map(lambda step: compile_step(step, options), steps))
            for i, stage in enumerate(cfg.stages):
                if time.perf_counter() > end:
                    say(f"{args.minutes:g} minutes are over, what is left was not timed")
                    return rows
                rows.append(row := {"micro_tokens": micro_tokens, "stage": i})
                numbers = whole[i], listed["init"][0], batches[i], specs, cfg, args
                try:
                    row |= time_stage(stage, compiled[i], *numbers)
                except (jax.errors.JaxRuntimeError, ArithmeticError) as error:
                    row["error"] = str(error).split("\n")[0][:200]
                say(f"{micro_tokens:7}{i:7}  {row['error']}" if "error" in row else line_of(row), rows)
    if any(row.get("timed_tokens") != row.get("tokens") for row in rows):
        say(f"times are scaled from steps of {args.micro_steps} micro-steps to the whole batch")
    return rows


# ---- Command line ----

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.gpu_report --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.gpu_report [--FLAG=VALUE ...] [-- FLAGS]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("--out", metavar="PATH", default=str(ROOT / "logs/gpu_report/steps"),
         help="the report's path without .txt, .json (default: logs/gpu_report/steps)")
    flag("--minutes", type=float, default=9, metavar="N", help="nothing is begun after (default: %(default)s)")
    flag("--smoke", action="store_true", help="tiny shapes")
    flag("--micro_tokens", metavar="LIST", help="tokens of a micro-step (default: 32768)")
    flag("--micro_steps", type=int, default=0, metavar="N", help="time only so many of a step (default: 0, all)")
    flag("--steps", type=int, default=5, metavar="N", help="so many are timed (default: %(default)s)")
    flag("--warmup", type=int, default=2, metavar="N", help="after so many (default: %(default)s)")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.micro_tokens = args.micro_tokens or ("256" if args.smoke else "32768")
    if not re.fullmatch(r"\d+(,\d+)*", args.micro_tokens) or not 0 < args.minutes < 1e6 or args.steps <= 0 or min(args.warmup, args.micro_steps) < 0:
        fail(f"--micro_tokens={args.micro_tokens} --steps={args.steps} --minutes={args.minutes:g} --warmup={args.warmup} "
             f"--micro_steps={args.micro_steps}: wanted whole numbers with commas between them, more than 0 steps and minutes")
    args.micro_tokens = [*map(int, args.micro_tokens.split(","))]
    args.flags = (SMOKE if args.smoke else ["--preset=speedrun"]) + argv[split + 1:]
    return args

def need_accelerator():
    """Raises UsageError. Asks in a process of its own, since a GPU's memory goes to the first that asks."""
    done = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True)
    why = f"JAX sees no accelerator {done.stderr.strip()[-200:]}"
    require(done.stdout.split()[-1:] not in ([], ["cpu"]), f"{why}; wanted a GPU and "
            'pip install "jax[cuda13]>=0.10,<0.13"; --smoke does the same at tiny shapes')

def main(argv=None):
    """Raises UsageError."""
    argv, lines = sys.argv[1:] if argv is None else argv, []
    args = parse(argv)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    result = {"argv": argv, "rows": []}
    def say(text, rows=None):  # and keep it, with the rows so far
        print(text, flush=True)
        lines.append(text)
        result["rows"] = result["rows"] if rows is None else rows
        Path(f"{args.out}.txt").write_text("\n".join(lines) + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.smoke:
        need_accelerator()
    jax.config.update("jax_enable_compilation_cache", False)  # the time that compilation takes is wanted
    result["rows"] = time_steps(args, say)
    result |= {"versions": train.versions(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    say(f"{result['devices']}; " + " ".join(f"{name}={value}" for name, value in result["versions"].items()))
    return result

if __name__ == "__main__":
    sys.exit(train.command(main))
