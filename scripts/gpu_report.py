"""What does this machine make of the speedrun? One command, less than ten minutes, on one GPU. A CPU would need hours: there, --smoke.

    python -m scripts.gpu_report                                    step time, MFU and memory of each stage, full size
    python -m scripts.gpu_report --micro_tokens=8192,32768 -- --preset=speedrun --attn_block=1024
    python -m scripts.gpu_report --part=ablate          short trainings at full size, records/ablations/gpu.txt, on fineweb10B/ or --proxy=DIR
    python -m scripts.gpu_report --smoke                            the same at tiny shapes, to see that it works

A step is the whole global batch, accumulated on the devices there are, optimizer included. --micro_steps=N times a shorter
accumulation and scales the time to the whole batch, which counts the optimizer too often: a bound from above. What follows
-- are flags of train.py. Batches come from --train_files where there are such shards, else from documents of random tokens: what
a step costs does not depend on them; the loss of these few steps begins near log(vocabulary). A part ablate that the time cut off is
continued by the same command, until each difference has its three seeds. The report is printed, and after each row written to
OUT.txt and OUT.json, with versions and devices.
"""
import argparse, dataclasses, json, math, re, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

import train
from scripts import ablate
from scripts.bench import generate_shards
from train import ROOT, DataError, UsageError

FULL_SIZE = ROOT / "records/ablations/gpu.txt"
SMOKE = ["--preset=tiny"]
SMOKE_LIST = "all: --preset=tiny\nbase:\nno skips: --skips=\n"
HEAD = """\
  micro  stage  rows of   tokens  compile  median      min      max  thousand    MFU   GiB, by the  peak GiB,    loss
 tokens                   a step        s      ms       ms       ms  tokens/s          compiler     so far"""

# ---- Steps ----

def config(flags, micro_tokens, micro_steps):
    """(cfg of a few steps in each stage, tokens of a whole step by stage). Raises UsageError, DataError."""
    cfg, _ = train.configure([*flags, f"--micro_tokens={micro_tokens}"])
    table = train.stages(cfg)
    if any(max(micro_tokens, stage.seq_len) % stage.seq_len for stage in table):
        raise UsageError(f"--micro_tokens={micro_tokens}: wanted whole rows of --seq_len={cfg.seq_len}")
    short = lambda stage: micro_steps * max(micro_tokens or stage.batch_tokens, stage.seq_len) * jax.device_count() or stage.batch_tokens
    batches = ",".join(str(min(stage.batch_tokens, short(stage))) for stage in table)
    ends = ",".join(str((i + 1) / len(table)) for i in range(len(table)))  # as many steps in each
    cfg = dataclasses.replace(cfg, batch_tokens=batches, steps=8 * len(table), stage_ends=ends, max_epochs=1000)
    train.validate(cfg)
    return cfg, [stage.batch_tokens for stage in table]

def batches_of(cfg, mesh, folder):
    """({stage's index: two batches at most}, cfg completed): of the shards of --train_files, of the demo's text where that is empty, of random
    tokens where there are none. Raises DataError."""
    if not cfg.train_files:
        cfg = dataclasses.replace(cfg, train_files=train.embedded_corpus()[0])
    if not train.find_shards(cfg.train_files):
        if not list(folder.glob("*.bin")):
            generate_shards(folder, 1, 2 * train.tokens_before(cfg.steps, train.stages(cfg)) + 100_000)
        cfg = dataclasses.replace(cfg, train_files=f"{folder}/train_*.bin")
    shards, table, batches = train.open_shards(cfg.train_files), train.stages(cfg), {}
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or shards.meta["vocab_size"],
                              bos_id=cfg.bos_id if cfg.bos_id >= 0 else shards.meta["bos_id"])
    for step, (rows, _) in enumerate(train.plan(shards, cfg)):
        stage = train.stage_at(step, table)
        if len(own := batches.setdefault(stage.index, [])) < 2:
            own.append(train.to_devices(rows, stage, mesh, cfg))
    return batches, cfg

def compile_stage(stage, listed, mesh, cfg):
    """(program, seconds), or the runtime's error."""
    (_, function, arguments), start = listed[stage.index], time.perf_counter()
    try:
        return function.lower(*arguments).compile(compiler_options=train.compiler_options(mesh, cfg)), time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        return error

def time_stage(stage, compiled, whole_tokens, init, batches, specs, mesh, cfg, args):
    """A stage's row. Raises JaxRuntimeError, FloatingPointError for a loss that is not finite."""
    if isinstance(compiled, Exception):
        raise compiled
    (program, compile_s), state, seconds, device = compiled, init(), [], mesh.devices.flat[0]
    for i in range(args.warmup + args.steps):
        start = time.perf_counter()
        state, loss = jax.block_until_ready(program(state, batches[i % len(batches)]))
        seconds.append(time.perf_counter() - start)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss after {len(seconds)} steps is {loss}")
    scale = whole_tokens / stage.batch_tokens
    step_ms = 1e3 * scale * np.array(seconds[args.warmup:])
    tokens_per_s = 1e3 * whole_tokens / float(np.median(step_ms))
    peak = next((flops for kind, flops in train.PEAK_FLOPS.items() if kind in device.device_kind), 0) * mesh.size
    used = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {"micro_tokens": cfg.micro_tokens, "stage": stage.index, "seq_len": stage.seq_len, "tokens": whole_tokens, "timed_tokens":
            stage.batch_tokens, "compile_s": compile_s, "median_ms": float(np.median(step_ms)), "min_ms": float(step_ms.min()), "max_ms":
            float(step_ms.max()), "steps": len(step_ms), "tokens_per_s": tokens_per_s, "mfu": tokens_per_s *
            train.flops_per_token(stage, specs, cfg) / peak if peak else None, "compiled_gib": train.memory_of(program) / 2**30,
            "peak_gib": used / 2**30 if used else None, "loss": float(loss)}

def part_steps(args, say):
    """Rows of each stage and --micro_tokens, smallest first, since memory's peak is the process's; until the time is up. Raises UsageError."""
    rows, mesh, start, model = [], None, time.perf_counter(), train.Model()
    over = lambda: time.perf_counter() - start > 60 * args.minutes and (say(f"{args.minutes:g} minutes are over, what is left was not timed") or True)
    with tempfile.TemporaryDirectory() as folder:
        for micro_tokens in sorted(args.micro_tokens, key=lambda tokens: tokens or math.inf):
            cfg, whole = config(args.flags, micro_tokens, args.micro_steps)
            mesh = mesh or train.make_mesh()
            batches, cfg = batches_of(cfg, mesh, Path(folder))
            specs, listed = model.specs(cfg), train.list_programs(model, mesh, cfg)
            if over():
                return rows
            if not rows:
                say(f"{train.count_params(specs, cfg)} parameters, attention {cfg.attention}; {args.steps} steps timed after {args.warmup}")
                say(HEAD)
            print(f"compiling {len(listed) - 2} programs side by side ...", file=sys.stderr, flush=True)
            with ThreadPoolExecutor() as pool:
                compiled = list(pool.map(lambda stage: compile_stage(stage, listed, mesh, cfg), train.stages(cfg)))
            for stage in train.stages(cfg):
                if over():
                    return rows
                rows.append(row := {"micro_tokens": micro_tokens, "stage": stage.index})
                try:
                    row |= time_stage(stage, compiled[stage.index], whole[stage.index], listed["init"][1], batches[stage.index], specs, mesh, cfg, args)
                except (jax.errors.JaxRuntimeError, FloatingPointError) as error:
                    row["error"] = str(error).split("\n")[0][:200]
                    say(f"{micro_tokens:7}{stage.index:7}  {row['error']}", rows)
                    continue
                say("{micro_tokens:7}{stage:7}{seq_len:9}{tokens:9}{compile_s:9.1f}{median_ms:8.1f}{min_ms:9.1f}{max_ms:9.1f}{k:10.1f}{mfu:>7}"
                    "{compiled_gib:14.2f}{peak_gib:>11}{loss:10.3f}".format(**row | {
                        "k": row["tokens_per_s"] / 1e3, "mfu": f"{row['mfu']:.1%}" if row["mfu"] else "-",
                        "peak_gib": f"{row['peak_gib']:.2f}" if row["peak_gib"] else "-"}), rows)
    if any(row.get("timed_tokens") != row.get("tokens") for row in rows):
        say(f"times are scaled from steps of {args.micro_steps} micro-steps to the whole batch")
    return rows

# ---- Trainings ----

def part_ablate(args, say):
    """Lines of scripts/ablate.py, one run at a time on the whole machine; interrupted when the time is up."""
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            args.list = Path(folder) / "smoke.txt"
            args.list.write_text(SMOKE_LIST)
        out = f"{args.out}.jsonl"
        argv = [str(args.list), "--jobs=1", f"--seeds={args.seeds}", f"--out={out}", *([f"--proxy={args.proxy}"] if args.proxy else [])]
        print(f"running {args.list}, at most {args.minutes:g} minutes ...", flush=True)
        process = subprocess.Popen([sys.executable, "-m", "scripts.ablate", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(60 * args.minutes, process.send_signal, [signal.SIGINT])
        timer.daemon = True
        timer.start()
        for line in process.stdout:
            say(line.rstrip("\n"), list(ablate.read_records(out).values()))
        if process.wait() and not timer.is_alive():
            say(f"{args.minutes:g} minutes were over before the list; the same command continues")
        timer.cancel()
    if process.returncode not in (0, 130, -signal.SIGINT):
        raise UsageError(f"--list={args.list}: scripts.ablate ended with exit code {process.returncode}")
    return list(ablate.read_records(out).values())

# ---- Command line ----

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.gpu_report --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.gpu_report [--FLAG=VALUE ...] [-- FLAGS]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("--part", choices=("steps", "ablate"), default="steps", help="(default: %(default)s)")
    flag("--out", metavar="PATH", help="the report's path without .txt, .json (default: logs/gpu_report/PART)")
    flag("--minutes", type=float, default=9, metavar="N", help="nothing is begun after, and no training goes on (default: %(default)s)")
    flag("--smoke", action="store_true", help="tiny shapes")
    flag("--micro_tokens", metavar="LIST", help="steps: tokens of a micro-step (default: 32768)")
    flag("--micro_steps", type=int, default=0, metavar="N", help="steps: time only so many of a step (default: 0, all)")
    flag("--steps", type=int, default=5, metavar="N", help="steps: so many are timed (default: %(default)s)")
    flag("--warmup", type=int, default=2, metavar="N", help="steps: after so many (default: %(default)s)")
    flag("--list", metavar="LIST", default=FULL_SIZE, help="ablate: as of scripts/ablate.py (default: records/ablations/gpu.txt)")
    flag("--proxy", metavar="DIR", help="ablate: folder of the shards (default: fineweb10B; for a list of your own the demo's text)")
    flag("--seeds", default="0,1,2", metavar="LIST", help="ablate: (default: %(default)s)")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.proxy = args.proxy or ("fineweb10B" if args.list == FULL_SIZE and not args.smoke else None)
    args.out = args.out or str(ROOT / "logs/gpu_report" / args.part)
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
    if done.stdout.split()[-1:] in ([], ["cpu"]):
        raise UsageError(f"JAX sees no accelerator{done.stderr.strip()[-200:] and ': ' + done.stderr.strip()[-200:]}; wanted a GPU and "
                         'pip install "jax[cuda13]>=0.10,<0.13"; --smoke does the same at tiny shapes')

def main(argv=None):
    """Raises UsageError and DataError."""
    argv, lines = sys.argv[1:] if argv is None else argv, []
    args = parse(argv)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    result = {"part": args.part, "argv": argv, "rows": []}
    def say(text, rows=None):  # and keep it, with the rows so far
        print(text, flush=True)
        lines.append(text)
        result["rows"] = result["rows"] if rows is None else rows
        Path(f"{args.out}.txt").write_text("\n".join(lines) + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.smoke and (args.part == "steps" or args.list == FULL_SIZE):
        need_accelerator()
    jax.config.update("jax_enable_compilation_cache", False)  # the time that compilation takes is wanted
    result["rows"] = (part_steps if args.part == "steps" else part_ablate)(args, say)
    result |= {"versions": train.versions(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}  # now that no run wants them
    say(f"{result['devices']}; " + " ".join(f"{name}={value}" for name, value in result["versions"].items()))
    return result

if __name__ == "__main__":
    try:
        main()
    except (UsageError, DataError, OSError) as error:
        sys.exit(print("error:", error, file=sys.stderr) or getattr(error, "exit_code", 2))
