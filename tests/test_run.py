"""What a run writes, what its clock counts, and the seam for another architecture.

Three runs of one small model share their programs: one that writes much; one that is left, and
resumed, on a clock by which everything takes a time of its own; and one that writes little.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import math
import os
import re
import shlex
import struct
import sys
import time
import types
from datetime import datetime, timedelta, timezone
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shards import BOS, make_folder
from victim import MATRIX, STEPS, compiled_once, metrics_of, weights_of

import train

FLAGS = """
--stages.lr=0.3,0.15 --warmup_steps=2 --cooldown_frac=0.4 --final_frac=0.1 --final_lr_scale=0.02
--val_every=4 --save_every=4 --log_every=1 --target_loss=5
""".split()
STEP_LINE = re.compile(
    r"step:(?P<step>\d+)/12 train_loss:(?P<train_loss>\d+\.\d{4})"
    r"( val_loss:(?P<val_loss>\d+\.\d{4}))? "
    r"train_time:(?P<train_time_s>\d+\.\d{3})s step:\d+\.\dms tok/s:\d+\.\d+[kM] mfu:(-|\d+\.\d%)"
    r"( \w+:\S+)* eta:\d+s"
)
METRICS = {
    "step", "tokens", "train_time_s", "cpu_time_s", "wall_s", "train_loss", "lr", "step_ms",
    "tokens_per_s", "stage", "input_wait_ms",
}  # fmt: skip
SOURCE = Path(train.__file__).read_text()

CERTAIN = b"\x1b[2J\n\ta\xff"  # what the model writes after "("


def logits_of_bytes(weights, ids, cfg):
    """After CERTAIN come X, Y and Z, each as often as is said here."""
    table = np.zeros((384, 384), np.float32)
    for before, after in zip(b" (" + CERTAIN, b"(" + CERTAIN + b"X", strict=True):
        table[before, after] = 50
    drawn = list(b"XYZ")
    table[drawn] = -1e9
    for before in drawn:
        table[before, drawn] = np.log([0.1, 0.2, 0.7])
    return jnp.array(table)[ids]


MODEL = MATRIX._replace(logits=logits_of_bytes)
compiled_once = pytest.fixture(compiled_once, scope="module", autouse=True)


def trained(flags, hook=lambda step: False, model=MODEL):
    """(run folder, what the run printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = train.main([*FLAGS, *flags], model, hook)
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    """The run that writes much, of bytes, in a folder of its own."""
    home, writes, watching = tmp_path_factory.mktemp("finished"), [], [True]

    def watch(event, arguments):
        if watching and event == "open" and set(str(arguments[1])) & set("wax+"):
            writes.append(Path(os.fsdecode(arguments[0])).absolute())
        elif watching and event in ("os.mkdir", "os.rename"):
            writes.extend(Path(p).absolute() for p in arguments if isinstance(p, str))

    data = make_folder(home / "my data", tokenizer="bytes")
    started = datetime.now(timezone.utc)
    sys.addaudithook(watch)
    with contextlib.chdir(home):
        folder, printed = trained(data)
    watching.clear()
    log = (home / folder / "log.txt").read_text()
    lines = log[len(SOURCE) :].splitlines()
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step:"))
    return types.SimpleNamespace(
        home=home,
        folder=home / folder,
        printed=printed,
        data=data,
        cfg=train.open_data(train.configure([*FLAGS, *data], MATRIX.presets)[0])[2],
        log=log,
        head=lines[:first_step],
        tail=lines[first_step:],
        rows=metrics_of(home / folder),
        writes=writes,
        started=started,
    )


def tensors_of(path):
    """{name: float32 array} of a safetensors file, by the description of its format."""
    blob = path.read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    body, arrays = blob[8 + size :], {}
    for name, entry in json.loads(blob[8 : 8 + size]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            data = body[slice(*entry["data_offsets"])]
            arrays[name] = np.frombuffer(data, "<f4").reshape(entry["shape"])
    return arrays


def assert_sealed(folder):
    above, _, line = (folder / "log.txt").read_bytes().rstrip(b"\n").rpartition(b"\n")
    assert line.decode() == "sha256:" + hashlib.sha256(above + b"\n").hexdigest()


# ---- The run folder and log.txt ----


def test_a_run_folder_is_named_by_its_start_and_nothing_is_written_elsewhere(finished):
    stamp, _, ident = finished.folder.name.rpartition("-")
    made = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    assert timedelta(seconds=-1) <= made - finished.started <= timedelta(minutes=9)
    assert re.fullmatch(r"[0-9a-f]+", ident) and finished.folder.parent == finished.home / "logs"
    parts = ("params.safetensors", "opt.safetensors", "manifest.json")
    checkpoints = {f"ckpt/step-0000{step}/{part}" for step in ("08", "12") for part in parts}
    inside = (path for path in finished.folder.rglob("*") if path.is_file())
    found = {path.relative_to(finished.folder).as_posix() for path in inside}
    assert found == {"log.txt", "metrics.jsonl", "config.json"} | checkpoints
    allowed = (finished.folder, Path(os.environ["XDG_CACHE_HOME"]), Path("/dev"))
    outside = [path for path in finished.writes if not any(map(path.is_relative_to, allowed))]
    assert set(outside) <= {finished.home / "logs"}
    assert any(path.name == "log.txt" for path in finished.writes)
    assert {path.name for path in finished.home.iterdir()} == {"my data", "logs"}


def test_the_log_starts_with_the_source_and_all_that_repeating_the_run_takes(finished):
    assert finished.log.startswith(SOURCE)
    lines = dict(line.split(": ", 1) for line in reversed(finished.head) if ": " in line)
    config = json.loads(lines["config"])
    assert config == json.loads(json.dumps(dataclasses.asdict(finished.cfg)))
    assert json.loads((finished.folder / "config.json").read_text()) == {
        "config": config,
        "meta": {
            "tokenizer": "bytes",
            "vocab_size": 257,
            "bos_id": BOS,
            "tokenizer_sha256": hashlib.sha256().hexdigest(),
        },
    }
    assert (config["vocab_size"], config["bos_id"], config["preset"]) == (257, BOS, "demo")
    assert shlex.split(lines["argv"]) == FLAGS + finished.data
    python = sys.version.split()[0]
    for words in (f"jax={jax.__version__}", f"numpy={np.__version__}", f"python={python}"):
        assert f"{words} " in lines["versions"]
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for name in re.findall(r"model name\s*: (.*)", cpuinfo)[:1]:  # another sums in another order
        assert f" processor={name}" in lines["versions"]
    assert lines["devices"].startswith("8 x cpu, 1 processes")
    for path in (finished.home / "my data").glob("*.bin"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        num_tokens = (path.stat().st_size - 1024) // 2
        assert f"data: {path.name} tokens:{num_tokens} sha256:{digest}" in finished.head
    scored = (finished.home / "my data/val_000000.bin").read_bytes()[1024:][: 2 * 59]
    assert hashlib.sha256(scored).hexdigest() in "\n".join(finished.head)
    arrays = tensors_of(finished.folder / "ckpt/step-000012/params.safetensors").values()
    assert lines["parameters"] == str(sum(array.size for array in arrays))
    compiled = r"^compiled: (\w+) in \d+\.\ds, \d+\.\d\d GiB per device$"
    found = re.findall(compiled, "\n".join(finished.head), re.M)
    assert sorted(found) == ["eval", "init", "train_0", "train_1"]


def test_every_step_line_matches_one_expression_and_says_what_the_metrics_say(finished):
    steps = [line for line in finished.tail if line.startswith("step:")]
    found = [STEP_LINE.fullmatch(line) for line in steps]
    assert all(found), steps
    for match, row in zip(found, finished.rows[:-1], strict=True):
        for name in ("step", "train_loss", "train_time_s", "val_loss"):
            said = match[name] and float(match[name])
            assert said == (pytest.approx(row[name], abs=6e-4) if name in row else None)


def test_the_log_ends_with_the_result_two_samples_what_is_next_and_a_hash(finished):
    (final,) = (line for line in finished.tail if line.startswith("final: "))
    last = finished.rows[-1]
    assert f"step:12/12 tokens:{last['tokens']} val_loss:{last['val_loss']:.4f} " in final
    assert f"train_time:{last['train_time_s']:.3f}s" in final
    assert f"target:5 reached at step {last['target_reached_step']} after " in final
    wanted = ("final: ", "sample: def main(", "sample: class ", "wrote: ", "next: ", "sha256:")
    begins = [finished.log.rindex("\n" + words) for words in wanted]
    assert begins == sorted(begins)
    assert_sealed(finished.folder)
    lines = finished.head + finished.tail
    logged = [line for line in lines if line and not line.startswith(("=", "sha256:"))]
    printed = finished.printed.splitlines()
    assert [line for line in printed if line in logged] == logged  # the console gets the same


def test_metrics_say_how_many_tokens_at_which_learning_rate_in_which_stage(finished):
    *steps, last = finished.rows
    assert all(set(row) - {"val_loss"} == METRICS for row in steps)  # no mfu: no known peak
    assert [row["step"] for row in steps] == [*range(1, 13)]
    assert [row["step"] for row in steps if "val_loss" in row] == [4, 8, 12]
    first = [56 * n for n in range(1, 7)]
    assert [row["tokens"] for row in steps] == first + [6 * 56 + 2 * tokens for tokens in first]
    assert [row["stage"] for row in steps] == [0] * 6 + [1] * 6
    # over 0.4 of the first 10.8 steps down to 0.02, where the rate stays
    share = [min(1, max(0, (10.8 - step) / 4.32)) for step in range(12)]
    scale = [(0.3 if step < 6 else 0.15) * w + 0.02 * (1 - w) for step, w in enumerate(share)]
    scale = [min(1, (step + 1) / 3) * x for step, x in enumerate(scale)]
    assert [row["lr"] for row in steps] == pytest.approx(scale, abs=2e-6)
    same = ("step", "val_loss", "train_time_s", "cpu_time_s", "tokens")
    assert last == {name: steps[-1][name] for name in same} | {"target_reached_step": 4}
    assert steps[3]["val_loss"] <= 5  # the run goes on after the target
    assert steps[0]["train_loss"] == pytest.approx(math.log(384), abs=0.02)  # all alike at first
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] - 0.8


# ---- Checkpoints ----


def nats_of(weights, file, num_targets):
    """Float64 mean nats of a shard's first targets by the model's definition."""
    tokens = np.fromfile(file, "<u2", offset=1024)[: num_targets + 1]
    table, matrices, head = (np.float64(weights[name]) for name in ("table", "matrices", "head"))
    logits = table[tokens[:-1]] @ matrices.sum(axis=0) @ head.T
    scored = logits[np.arange(num_targets), tokens[1:]]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - scored)


def test_a_checkpoint_holds_every_weight_with_its_optimizer_state(finished):
    checkpoint = finished.folder / "ckpt/step-000012"
    weights = tensors_of(checkpoint / "params.safetensors")
    shapes = {"table": (384, 24), "matrices": (4, 24, 40), "head": (384, 40)}
    assert {name: array.shape for name, array in weights.items()} == shapes
    state = tensors_of(checkpoint / "opt.safetensors")
    assert {name: array.shape for name, array in state.items()} == {
        "table/m": (384, 24),
        "table/v": (384, 24),
        "matrices/momentum": (4, 24, 40),
        "matrices/square": (4, 1, 40),  # of each unit
        "head/m": (384, 40),
        "head/v": (384, 40),
    }
    assert all(array.any() for array in state.values())  # every weight has seen a gradient
    nats = nats_of(weights, finished.home / "my data/val_000000.bin", 58)
    assert finished.rows[-1]["val_loss"] == pytest.approx(nats, rel=1e-5)  # each target once


# ---- Resuming, and the clock ----


def slow_clock(patch):
    """Replace train's clock: a training step takes 1 s, its batch 0.25 s, all else far more."""
    cost = {"init": 10.0, "eval": 1e2, "save_checkpoint": 1e3, "compile_all": 1e4, "warm_up": 1e5}
    now = [0.0]

    def tick(seconds=1e-6):
        now[0] += seconds
        return now[0]

    def slow(name, function):
        return lambda *arguments: (tick(cost.get(name, 1.0)), function(*arguments))[1]

    compile_all, train_batches = train.compile_all, train.train_batches

    def slow_programs(*arguments):
        programs, notes = compile_all(*arguments)
        return {name: slow(name, program) for name, program in programs.items()}, notes

    def slow_batches(*arguments):
        for batch in train_batches(*arguments):
            tick(0.25)
            yield batch

    patch.setattr(train, "compile_all", slow("compile_all", slow_programs))
    patch.setattr(train, "train_batches", slow_batches)
    for name in ("warm_up", "save_checkpoint"):
        patch.setattr(train, name, slow(name, getattr(train, name)))
    clocks = {"perf_counter": tick, "process_time": tick}
    patch.setattr(train, "time", types.SimpleNamespace(**vars(time) | clocks))


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
    """A run that was told to leave at step 5, and resumed, on the slow clock."""
    log_dir = tmp_path_factory.mktemp("resumed") / "logs"
    flags = [*finished.data, f"--log_dir={log_dir}", "--resume=auto"]
    with pytest.MonkeyPatch.context() as patch:
        slow_clock(patch)
        with pytest.raises(SystemExit) as left:
            trained(flags, lambda step: step == 5)
    assert left.value.code == 75
    (first,) = log_dir.iterdir()
    with pytest.MonkeyPatch.context() as patch:
        slow_clock(patch)
        folder, _ = trained(flags)
    assert folder == first and list(log_dir.iterdir()) == [folder]
    return types.SimpleNamespace(folder=folder, rows=metrics_of(folder))


def test_a_resumed_run_continues_in_its_own_log(resumed):
    log = (resumed.folder / "log.txt").read_text()
    assert f"resumed: {resumed.folder}/ckpt/step-000005 at step 5" in log
    assert log.count(SOURCE) == 2  # the second may be another version's
    found = [int(match["step"]) for match in map(STEP_LINE.fullmatch, log.splitlines()) if match]
    assert found == [*range(1, 13)]
    assert "target:5 reached at step 4 after 5.000s" in log
    assert_sealed(resumed.folder)


def test_the_clock_counts_steps_and_the_wait_for_data_and_nothing_else(resumed):
    for row in resumed.rows:
        ahead = 0 if "val_loss" in row or row["step"] == 5 else 1  # the next one is dispatched
        # the first batch after a resumption is off the clock
        seconds = 1.25 * (row["step"] + ahead) - 0.25 * (row["step"] > 5)
        for name in ("train_time_s", "cpu_time_s"):
            assert row[name] == pytest.approx(seconds, abs=1e-2)
    waits = [row["input_wait_ms"] for row in resumed.rows[:-1]]
    assert sum(waits) == pytest.approx(250 * (STEPS - 1), abs=1)


def test_the_wall_clock_counts_everything_since_the_run_began(resumed):
    walls = [row["wall_s"] for row in resumed.rows[:-1]]
    # compilation; warm-up: first values, each stage's program; first values again
    start = 1e4 + 1e5 + 2 * 10 + 2
    assert walls[3] == pytest.approx(start + 4 * 1.25 + 1e2, abs=0.01)
    resumed_part = 7 * 1.25 + 2e2 + 1e3
    assert walls[-1] == pytest.approx(start + resumed_part, abs=0.01)


def test_a_run_that_writes_little_saves_and_evaluates_at_its_end_with_the_same_bits(
    finished, tmp_path, monkeypatch
):
    events, steps, rename = [], [], Path.rename

    def heard(path, target):
        events.append((path.name, target.name, {file.name for file in path.iterdir()}))
        return rename(path, target)

    monkeypatch.setattr(os, "sync", lambda: events.append("sync"))
    monkeypatch.setattr(Path, "rename", heard)
    monkeypatch.setattr(train, "peak_flops", lambda: 1e12)
    flags = [f"--log_dir={tmp_path}", "--log_every=4", "--val_every=0", "--save_every=0"]
    folder, _ = trained([*finished.data, *flags, "--target_loss=0.1"], steps.append)
    assert steps == [*range(1, STEPS + 1)]  # the hook is called after each dispatched step
    # a checkpoint is on the disk before it bears its name
    files = {"manifest.json", "opt.safetensors", "params.safetensors"}
    assert events == ["sync", (".writing", "step-000012", files)]
    assert weights_of(folder) == weights_of(finished.folder)
    assert "target:0.1 not reached" in (folder / "log.txt").read_text()

    *rows, last = metrics_of(folder)
    assert [row["step"] for row in rows] == [4, 8, 12] and "target_reached_step" not in last
    assert ["val_loss" in row for row in rows] == [False, False, True]
    cfg = finished.cfg
    # a line over the end of a stage counts the tokens of both
    for row, tokens in zip(rows, (4 * 56, 2 * 56 + 2 * 112, 4 * 112), strict=True):
        assert row["tokens_per_s"] * 4 * row["step_ms"] / 1e3 == pytest.approx(tokens, rel=1e-3)
        flops = train.flops_per_token(cfg.stages[row["stage"]], MATRIX.specs(cfg), cfg)
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops / 1e12)


# ---- The seam for another architecture, and sampling ----


def test_another_architecture_may_start_from_weights(finished, tmp_path):
    draw = np.random.default_rng(0).standard_normal
    start = {
        name: np.float32(draw(spec.shape)) for name, spec in MATRIX.specs(finished.cfg).items()
    }

    def first_state(state, cfg):
        assert int(state.step) == 0
        places = {name: w.sharding for name, w in state.params.items()}
        return state._replace(params=jax.device_put(start, places))

    flags = [*finished.data, f"--log_dir={tmp_path}"]
    folder, _ = trained(flags, model=MODEL._replace(first_state=first_state))
    nats = nats_of(start, finished.home / "my data/train_000000.bin", 56)
    assert metrics_of(folder)[0]["train_loss"] == pytest.approx(nats, rel=1e-5)


def test_a_sample_follows_the_models_probabilities_and_has_no_control_characters(finished):
    first, second = (
        finished.log.index("\nsample: def main("),
        finished.log.index("\nsample: class "),
    )
    one, two = finished.log[first:second], finished.log[second : finished.log.index("\nwrote: ")]
    shown = "(?[2J\n\ta\ufffdX"
    assert "main" + shown in one and "class " + shown in two
    counts = np.array([(one + two).count(letter) for letter in "XYZ"])
    wanted = np.array([0.1, 0.2, 0.7]) ** (1 / 0.7)  # by the temperature
    assert counts.sum() == 400 - 8 - 9
    assert np.abs(counts / counts.sum() - wanted / wanted.sum()).max() < 0.07


def test_samples_are_drawn_by_the_seed(finished, monkeypatch):
    key, seeds = jax.random.key, []
    monkeypatch.setattr(jax.random, "key", lambda seed: (seeds.append(seed), key(seed))[1])
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: 1 / 0)  # that is enough
    with pytest.raises(ZeroDivisionError):
        log = types.SimpleNamespace(cfg=train.replace(finished.cfg, seed=5))
        train.show_samples({}, MODEL._replace(specs=lambda cfg: {}), log)
    assert seeds == [5]


def test_deterministic_and_the_platform_choose_options_that_the_compiler_knows(finished):
    mesh = train.make_mesh()
    assert train.compiler_options(mesh, finished.cfg) == {}
    options = train.compiler_options(mesh, train.replace(finished.cfg, deterministic=True))
    assert options == {"xla_gpu_deterministic_ops": True}
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)  # an unknown one is refused
    chip = types.SimpleNamespace(platform="tpu")
    mesh = types.SimpleNamespace(devices=np.array([chip]))
    assert train.compiler_options(mesh, finished.cfg) == train.TPU_OPTIONS
    chip.platform = "gpu"
    options = train.compiler_options(mesh, finished.cfg)
    assert options == {"xla_allow_excess_precision": False}  # streams are as narrow as they say
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)


def test_the_log_names_the_packages_that_a_gpu_runs_by_and_a_damaged_one_harms_nothing(monkeypatch):
    found = [
        types.SimpleNamespace(name=None, version=None),  # a pip that was stopped
        types.SimpleNamespace(name="nvidia-cudnn-cu13", version="9.12.0"),
        types.SimpleNamespace(name="jax-cuda13-plugin", version="0.12.0"),
        types.SimpleNamespace(name="nvidia-cudnn-cu13", version="8.9"),  # later on the path
        types.SimpleNamespace(name="pytest", version="8"),
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    versions = train.versions()
    assert versions["nvidia-cudnn-cu13"] == "9.12.0" and versions["jax-cuda13-plugin"] == "0.12.0"
    assert versions["jax"] == jax.__version__ and "pytest" not in versions
