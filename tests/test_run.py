"""What a run writes, how it resumes, what its clock counts, and the seam for another architecture.

One run of two tiny blocks, whose stage changes after half of twelve steps, is looked at by most
tests. The others share its compiled programs.
"""

import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
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
from victim import BIGRAM, metrics_of, weights_of

import train

STEPS = 12
SIZES = [
    f"@{train.ROOT}/scripts/presets/tiny.args", f"--steps={STEPS}", "--num_layers=2",
    "--model_dim=24", "--head_dim=8", "--mlp_dim=40", "--skips=((0,1),)", "--late_inputs=((0,1),)",
    "--backout=0", "--long_layers=1", "--stages.batch_tokens=224,448", "--stages.seq_len=14,28",
    "--stages.short=9,16", "--stages.long=20,24", "--stages.lr=1,0.5", "--micro_tokens=28",
    "--val.seq_len=40", "--val.short=16", "--val_tokens=500", "--val_context=11", "--adam_lr=0.05",
    "--warmup_steps=2", "--cooldown_frac=0.4", "--final_lr_scale=0.1", "--target_loss=5.3",
    "--shuffle=false", "--val_every=4", "--save_every=4", "--log_every=1",
]  # fmt: skip
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


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs whose programs are alike share them; compiled without optimizing, in half the time."""
    programs, real = {}, train.compile_all
    not_compiled_in = train.MAY_DIFFER | {"train_files", "val_files", "target_loss"}

    def remembered(model, mesh, cfg):
        key = model.specs, train.replace(cfg, **dict.fromkeys(not_compiled_in))
        if key not in programs:
            programs[key] = real(model, mesh, cfg)
        found, notes = programs[key]
        return dict(found), notes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_all", remembered)
        patch.setattr(os, "sync", lambda: None)  # a disk that others keep busy may take seconds
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def trained(*flags, **seams):
    """(run folder, what the run printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = train.main([*SIZES, *flags], **seams)
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    """The run most tests look at, of bytes, in a folder of its own."""
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
        folder, printed = trained(*data)
    watching.clear()
    return types.SimpleNamespace(
        home=home,
        folder=home / folder,
        printed=printed,
        argv=[*SIZES, *data],
        data=data,
        log=(home / folder / "log.txt").read_text(),
        rows=metrics_of(home / folder),
        writes=writes,
        started=started,
    )


@pytest.fixture
def no_samples(monkeypatch):
    monkeypatch.setattr(train, "show_samples", lambda *_: None)


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


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


def config_of(run, *flags):
    cfg, _ = train.configure([*run.argv, *flags])
    return train.open_data(cfg)[2]


def assert_sealed(folder):
    above, _, line = (folder / "log.txt").read_bytes().rstrip(b"\n").rpartition(b"\n")
    assert line.decode() == "sha256:" + hashlib.sha256(above + b"\n").hexdigest()


# ---- The run folder and log.txt ----


def test_a_run_folder_is_named_by_its_start_and_holds_all_of_the_run(finished):
    stamp, _, ident = finished.folder.name.rpartition("-")
    made = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    assert timedelta(seconds=-1) <= made - finished.started <= timedelta(minutes=9)
    assert re.fullmatch(r"[0-9a-f]+", ident) and finished.folder.parent == finished.home / "logs"
    parts = ("params.safetensors", "opt.safetensors", "manifest.json")
    checkpoints = {f"ckpt/step-0000{step}/{part}" for step in ("08", "12") for part in parts}
    assert files_of(finished.folder) == {"log.txt", "metrics.jsonl", "config.json"} | checkpoints


def test_a_run_writes_nothing_outside_its_folder_and_the_users_cache(finished):
    allowed = (finished.folder, Path(os.environ["XDG_CACHE_HOME"]), Path("/dev"))
    outside = [path for path in finished.writes if not any(map(path.is_relative_to, allowed))]
    assert set(outside) <= {finished.home / "logs"}
    assert any(path.name == "log.txt" for path in finished.writes)
    assert {path.name for path in finished.home.iterdir()} == {"my data", "logs"}


def parts_of(finished):
    """(lines of the head, lines of steps, all lines from the first step on) of log.txt."""
    lines = finished.log[len(Path(train.__file__).read_text()) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step:"))
    steps = [line for line in lines[first:] if line.startswith("step:")]
    return lines[:first], steps, lines[first:]


def test_the_log_starts_with_the_source_and_all_that_repeating_the_run_takes(finished):
    assert finished.log.startswith(Path(train.__file__).read_text())
    head, _, _ = parts_of(finished)
    lines = dict(reversed(line.partition(": ")[::2]) for line in head if ": " in line)
    lines = {name: text for text, name in lines.items()}
    config = json.loads(lines["config"])
    assert config == json.loads(json.dumps(dataclasses.asdict(config_of(finished))))
    assert json.loads((finished.folder / "config.json").read_text()) == {
        "config": config,
        "meta": {"tokenizer": "bytes", "vocab_size": 257, "bos_id": BOS},
    }
    assert (config["vocab_size"], config["bos_id"], config["preset"]) == (257, BOS, "demo")
    assert shlex.split(lines["argv"]) == finished.argv
    for name, text in {"jax": jax.__version__, "numpy": np.__version__}.items():
        assert f"{name}={text} " in lines["versions"]
    assert f"python={sys.version.split()[0]} " in lines["versions"]
    for file in glob.glob("/proc/cpuinfo"):  # another CPU sums bfloat16 in another order
        if names := re.findall(r"model name\s*: (.*)", Path(file).read_text()):
            assert f" processor={names[0]}" in lines["versions"]
    assert lines["devices"].startswith("8 x cpu, 1 processes")
    for path in (finished.home / "my data").glob("*.bin"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        num_tokens = (path.stat().st_size - 1024) // 2
        assert f"data: {path.name} tokens:{num_tokens} sha256:{digest}" in head
    scored = (finished.home / "my data/val_000000.bin").read_bytes()[1024:][: 2 * 501]
    assert hashlib.sha256(scored).hexdigest() in "\n".join(head)
    arrays = tensors_of(finished.folder / "ckpt/step-000012/params.safetensors").values()
    assert lines["parameters"] == str(sum(array.size for array in arrays))
    compiled = r"^compiled: (\w+) in \d+\.\ds, \d+\.\d\d GiB per device$"
    found = re.findall(compiled, "\n".join(head), re.M)
    assert sorted(found) == ["eval", "init", "train_0", "train_1"]


def test_every_step_line_matches_one_expression_and_says_what_the_metrics_say(finished):
    _, steps, _ = parts_of(finished)
    found = [STEP_LINE.fullmatch(line) for line in steps]
    assert all(found), steps
    assert [int(match["step"]) for match in found] == [*range(1, STEPS + 1)]
    assert [int(match["step"]) for match in found if match["val_loss"]] == [4, 8, 12]
    for match, row in zip(found, finished.rows[:-1], strict=True):
        for name in ("train_loss", "train_time_s", "val_loss"):
            assert not match[name] or float(match[name]) == pytest.approx(row[name], abs=6e-4)


def test_the_log_ends_with_the_result_two_samples_what_is_next_and_a_hash(finished):
    _, _, tail = parts_of(finished)
    (final,) = (line for line in tail if line.startswith("final: "))
    last = finished.rows[-1]
    assert f"step:12/12 tokens:{last['tokens']} val_loss:{last['val_loss']:.4f} " in final
    assert f"train_time:{last['train_time_s']:.3f}s" in final
    assert f"target:5.3 reached at step {last['target_reached_step']} after " in final
    wanted = ("final: ", "sample: def main(", "sample: class ", "wrote: ", "next: ", "sha256:")
    begins = [finished.log.rindex("\n" + words) for words in wanted]
    assert begins == sorted(begins)
    assert_sealed(finished.folder)


def test_console_and_log_get_the_same_lines(finished):
    printed = finished.printed.splitlines()
    head, _, tail = parts_of(finished)
    logged = [line for line in [*head, *tail] if line and not line.startswith(("=", "sha256:"))]
    assert [line for line in printed if line in logged] == logged


def test_what_a_model_writes_does_not_reach_the_terminal_as_control_characters(
    finished, monkeypatch
):
    written = iter(2 * b"\x1b[2J\n\ta\xff".ljust(200, b"x"))

    def draw(key, logits):
        return jnp.int32(next(written))

    monkeypatch.setattr(jax, "jit", lambda function: function)
    monkeypatch.setattr(jax.random, "categorical", draw)
    for line in samples_of({"table": np.zeros((384, 384))}, BIGRAM, config_of(finished)):
        assert "(?[2J\n\ta\ufffdxx" in line.replace("class ", "(") and "\x1b" not in line


# ---- metrics.jsonl ----


def test_metrics_say_how_many_tokens_at_which_learning_rate_in_which_stage(finished):
    *steps, last = finished.rows
    assert all(set(row) - {"val_loss"} == METRICS for row in steps)  # no mfu: no known peak
    assert [row["step"] for row in steps] == [*range(1, 13)]
    assert [row["step"] for row in steps if "val_loss" in row] == [4, 8, 12]
    first = [224 * n for n in range(1, 7)]
    assert [row["tokens"] for row in steps] == first + [6 * 224 + 2 * tokens for tokens in first]
    assert [row["stage"] for row in steps] == [0] * 6 + [1] * 6
    # over 0.4 of the first 10.8 steps down to 0.1, where the rate stays
    share = [min(1, max(0, (10.8 - step) / 4.32)) for step in range(12)]
    scale = [(1 if step < 6 else 0.5) * w + 0.1 * (1 - w) for step, w in enumerate(share)]
    scale = [min(1, (step + 1) / 3) * x for step, x in enumerate(scale)]
    assert [row["lr"] for row in steps] == pytest.approx(scale, abs=2e-6)
    for name in ("train_time_s", "cpu_time_s", "wall_s"):
        times = [row[name] for row in steps]
        assert times == sorted(times) and times[0] > 0
    same = ("step", "val_loss", "train_time_s", "cpu_time_s", "tokens")
    assert last == {name: steps[-1][name] for name in same} | {"target_reached_step": 4}
    assert steps[3]["val_loss"] <= 5.3  # the run goes on after the target


def test_a_line_over_the_end_of_a_stage_counts_the_tokens_of_both(
    finished, tmp_path, no_samples, monkeypatch
):
    monkeypatch.setattr(train, "peak_flops", lambda: 1e12)
    folder, _ = trained(
        *finished.data, f"--log_dir={tmp_path}/logs", "--log_every=4", "--val_every=0"
    )
    *rows, _ = metrics_of(folder)
    assert [row["step"] for row in rows] == [4, 8, 12]
    cfg = config_of(finished)
    for row, tokens in zip(rows, (4 * 224, 2 * 224 + 2 * 448, 4 * 448), strict=True):
        assert row["tokens_per_s"] * 4 * row["step_ms"] / 1e3 == pytest.approx(tokens, rel=1e-3)
        flops = train.flops_per_token(cfg.stages[row["stage"]], train.param_specs(cfg), cfg)
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops / 1e12)


def test_a_dozen_steps_learn_something(finished):
    losses = [row["train_loss"] for row in finished.rows if "train_loss" in row]
    there = 1 - 0.5 / 1.5 / 14  # the last token of a row has no second next one
    # a small head finds every token equally likely
    assert losses[0] == pytest.approx(math.log(257) * there, abs=0.02)
    assert losses[-1] < losses[0] - 0.8


# ---- Checkpoints ----


def test_a_checkpoint_names_every_row_of_the_weight_table_with_its_optimizer_state(finished):
    size = {"L": 2, "I": 2, "D": 24, "F": 40, "HK": 16, "GK": 16, "J": 1, "E": 5, "H": 2}
    size |= {"smear": 1, "backout": 1, "V": 384}  # 257 tokens, padded to 3 * 128
    table = jax.tree.leaves_with_path(train.param_specs(config_of(finished)))
    rows = {train.name_of(path): row for path, row in table}
    shapes = {name: tuple(size[axis] for axis in row.axes.split()) for name, row in rows.items()}
    assert shapes["embed"] == shapes["head"] == (384, 24) and shapes["attention/gate"] == (2, 5, 2)
    assert shapes["blocks/w_down"] == (2, 40, 24) and shapes["blocks/y_mix"] == (2,)
    params = tensors_of(finished.folder / "ckpt/step-000012/params.safetensors")
    assert {name: array.shape for name, array in params.items()} == shapes
    squares = {f"attention/{name}": (2, 1, 16) for name in ("w_q", "w_k", "w_v")}
    squares |= {
        "attention/w_out": (2, 16, 1),
        "blocks/w_up": (2, 1, 40),
        "blocks/w_down": (2, 40, 1),
    }
    wanted = {f"{name}/square": shape for name, shape in squares.items()}  # of each unit
    wanted |= {f"{name}/momentum": shapes[name] for name in squares}
    others = rows.keys() - squares.keys()
    wanted |= {f"{name}/{slot}": shapes[name] for name in others for slot in ("m", "v")}
    state = tensors_of(finished.folder / "ckpt/step-000012/opt.safetensors")
    assert {name: array.shape for name, array in state.items()} == wanted
    assert all(array.any() for array in state.values())  # every weight has seen a gradient


def test_a_manifest_names_format_step_config_and_the_sha256_of_its_files(finished):
    for step in (8, 12):
        folder = finished.folder / "ckpt" / f"step-{step:06d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["format"], manifest["step"]) == (2, step)
        assert manifest["config"] == train.as_json(config_of(finished))
        files = ("params.safetensors", "opt.safetensors")
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
        assert manifest["sha256"] == hashes
        assert manifest["progress"]["row"] == finished.rows[step - 1]


def test_a_checkpoint_is_on_the_disk_before_it_bears_its_name(finished, tmp_path, monkeypatch):
    events, rename = [], Path.rename

    def heard(path, target):
        events.append((path.name, target.name, files_of(path)))
        return rename(path, target)

    monkeypatch.setattr(os, "sync", lambda: events.append("sync"))
    monkeypatch.setattr(Path, "rename", heard)
    trained(*finished.data, f"--log_dir={tmp_path}/logs", "--save_every=0", model=GPT_SILENT)
    files = {"manifest.json", "opt.safetensors", "params.safetensors"}
    assert events == ["sync", (".writing", "step-000012", files)]


GPT_SILENT = train.GPT._replace(logits=lambda weights, ids, cfg: jnp.zeros((*ids.shape, 384)))


@pytest.mark.parametrize("save_every,kept", [(0, [12]), (5, [10, 12]), (1, [11, 12])])
def test_the_last_two_checkpoints_are_kept_and_one_at_the_end_always(
    save_every, kept, finished, tmp_path, no_samples
):
    flags = [f"--save_every={save_every}", "--val_every=0", f"--log_dir={tmp_path}/logs"]
    folder, _ = trained(*finished.data, *flags)
    assert sorted(int(path.name[5:]) for path in (folder / "ckpt").iterdir()) == kept
    rows = metrics_of(folder)  # val_every=0: once, and the result
    assert [row["step"] for row in rows if "val_loss" in row] == [12, 12]
    assert weights_of(folder) == weights_of(finished.folder)


@pytest.fixture(scope="module")
def learned(finished):
    """The run's weights as compute copies."""
    params = {"blocks": {}, "attention": {}}
    file = finished.folder / "ckpt/step-000012/params.safetensors"
    for name, array in tensors_of(file).items():
        stack, _, row = name.rpartition("/")
        (params[stack] if stack else params)[row] = jnp.array(array)
    return train.unstack(params)


def test_the_logged_validation_loss_is_that_of_the_saved_weights(finished, learned):
    """Every target of the first 500 once, after up to 11 tokens of its past, padded with BOS."""
    cfg = config_of(finished)
    tokens = np.fromfile(finished.home / "my data/val_000000.bin", "<u2", offset=1024).astype(int)
    inputs, targets, weights = [], [], []
    for first in range(0, 500, 29):
        places = range(first - 11, first + 29)
        inputs.append([tokens[i] if 0 <= i < 500 else BOS for i in places])
        targets.append([tokens[i + 1] if first <= i < 500 else 0 for i in places])
        weights.append([float(first <= i < 500) for i in places])
    assert np.sum(weights) == 500
    batch = {"tokens": jnp.array(inputs), "targets": jnp.array(targets), "step": STEPS}
    batch["weights"] = jnp.array(weights)
    batch["inputs"], batch["labels"] = learned["embed"][inputs,], learned["head"][targets,]
    key = jax.random.key(0)
    nats, total = jax.jit(lambda w, batch: train.gpt_loss(w, batch, key, cfg.val, cfg))(
        learned, batch
    )
    assert total == 500
    assert finished.rows[-1]["val_loss"] == pytest.approx(float(nats) / 500, rel=2e-6)


def test_only_the_first_of_several_processes_writes(finished, tmp_path, monkeypatch, capsys):
    cfg, mesh = config_of(finished), train.make_mesh()
    state = train.compile_all(train.GPT, mesh, cfg)[0]["init"]()
    monkeypatch.setattr(jax, "process_index", lambda *_: 1)
    log = train.Log(tmp_path / "run", train.param_specs(cfg), cfg, {})
    log.line("a line")
    log.metrics({"step": 1})
    train.save_checkpoint(tmp_path / "run", state, log.progress(), "", cfg)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# ---- Resuming, and the clock ----


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
    """A run on the same data that was told to leave at step 4, before the stage changed, resumed.

    On a clock by which a step takes a second and all else takes far longer.
    """
    log_dir = tmp_path_factory.mktemp("resumed") / "logs"
    flags = [*finished.data, f"--log_dir={log_dir}", "--resume=auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_samples", lambda *_: None)
        slow_clock(patch)
        with pytest.raises(SystemExit) as left:
            trained(*flags, hook=lambda step: step == 4)
    assert left.value.code == 75
    (first,) = log_dir.iterdir()
    assert [path.name for path in (first / "ckpt").iterdir()] == ["step-000004"]
    tied = shutil.copytree(first / "ckpt/step-000004", log_dir.parent / "tied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_samples", lambda *_: None)
        slow_clock(patch)
        folder, _ = trained(*flags)
    assert folder == first and list(log_dir.iterdir()) == [folder]
    return types.SimpleNamespace(folder=folder, tied=tied, rows=metrics_of(folder))


def slow_clock(patch):
    """Replace train's clock: a training step takes 1 s, and what is not training far more."""
    cost = {"init": 10.0, "eval": 1e2, "save_checkpoint": 1e3, "compile_all": 1e4, "warm_up": 1e5}
    now = [0.0]

    def tick(seconds=1e-6):
        now[0] += seconds
        return now[0]

    def slow(name, function):
        return lambda *arguments: (tick(cost.get(name, 1.0)), function(*arguments))[1]

    remembered = train.compile_all

    def compile_all(*arguments):
        programs, notes = remembered(*arguments)
        return {name: slow(name, program) for name, program in programs.items()}, notes

    patch.setattr(train, "compile_all", slow("compile_all", compile_all))
    for name in ("warm_up", "save_checkpoint"):
        patch.setattr(train, name, slow(name, getattr(train, name)))
    clocks = {"perf_counter": tick, "process_time": tick}
    patch.setattr(train, "time", types.SimpleNamespace(**vars(time) | clocks))


def test_a_resumed_run_ends_bit_for_bit_as_the_one_that_was_left_alone(finished, resumed):
    for step in (8, 12):
        assert weights_of(resumed.folder, step) == weights_of(finished.folder, step)
    names = ("step", "train_loss", "val_loss", "tokens", "lr", "target_reached_step")
    mine, theirs = (
        [[row.get(name) for name in names] for row in run.rows] for run in (resumed, finished)
    )
    assert mine == theirs


def test_a_resumed_run_continues_in_its_own_log(resumed):
    log = (resumed.folder / "log.txt").read_text()
    assert f"resumed: {resumed.folder}/ckpt/step-000004 at step 4" in log
    assert log.count(Path(train.__file__).read_text()) == 2  # the second may be another version's
    found = [int(match["step"]) for match in map(STEP_LINE.fullmatch, log.splitlines()) if match]
    assert found == [*range(1, 13)]
    assert re.search(r"target:5.3 reached at step 4 after 4\.00\ds", log)
    assert_sealed(resumed.folder)


def test_the_clock_counts_steps_and_neither_compilation_warm_up_evaluation_nor_saves(resumed):
    for row in resumed.rows:
        ahead = 0 if "val_loss" in row else 1  # a step is waited for once the next is dispatched
        for name in ("train_time_s", "cpu_time_s"):
            assert row[name] == pytest.approx(row["step"] + ahead, abs=1e-2)


def test_the_wall_clock_counts_everything_since_the_run_began(resumed):
    walls = [row["wall_s"] for row in resumed.rows if "wall_s" in row]
    # compilation; warm-up: first values, each stage's program; first values again
    start = 1e4 + 1e5 + 2 * 10 + 2
    assert walls[3] == pytest.approx(start + 4 + 1e2, abs=0.01)
    assert walls[-1] == pytest.approx(start + 8 + 2e2 + 1e3, abs=0.01)  # of the resumed part


def test_a_checkpoint_of_the_tied_stage_holds_one_table_twice_and_a_later_one_two(
    finished, resumed
):
    for folder, alike in ((resumed.tied, True), (finished.folder / "ckpt/step-000008", False)):
        params = tensors_of(folder / "params.safetensors")
        assert np.array_equal(params["embed"], params["head"]) == alike
        state = tensors_of(folder / "opt.safetensors")
        for slot in ("m", "v"):
            assert np.array_equal(state[f"embed/{slot}"], state[f"head/{slot}"]) == alike


def test_a_slow_disk_shows_in_the_train_time(finished, tmp_path, monkeypatch, no_samples):
    real = train.to_devices

    def slow(rows, *rest):
        time.sleep(0.3 * bool(rows))
        return real(rows, *rest)

    monkeypatch.setattr(train, "to_devices", slow)
    flags = [f"--log_dir={tmp_path}/logs", "--val_every=0", "--save_every=0", "--target_loss=0.1"]
    folder, _ = trained(*finished.data, *flags)
    rows = metrics_of(folder)
    assert rows[-1]["train_time_s"] > 0.9 * 0.3 * 10  # two are made before the clock starts
    waits = [row["input_wait_ms"] for row in rows if "input_wait_ms" in row]
    assert sum(waits) > 500  # a slow machine's steps hide the rest
    assert "target_reached_step" not in rows[-1]
    assert "target:0.1 not reached" in (folder / "log.txt").read_text()


# ---- The seam for another architecture, and sampling ----


def test_another_architecture_runs_through_the_same_loop_and_may_start_from_weights(tmp_path):
    flags = [*make_folder(tmp_path / "data"), "--val_tokens=500"]
    with contextlib.redirect_stdout(io.StringIO()):
        folder = train.main([*flags, f"--log_dir={tmp_path}/logs"], BIGRAM)
    rows = metrics_of(folder)
    assert rows[0]["train_loss"] == pytest.approx(math.log(384), abs=1e-4)
    (table,) = tensors_of(folder / "ckpt/step-000012/params.safetensors").values()
    state = tensors_of(folder / "ckpt/step-000012/opt.safetensors")
    assert set(state) == {"table/m", "table/v"}
    tokens = np.fromfile(tmp_path / "data/val_000000.bin", "<u2", offset=1024)[:501]
    logits = table.astype(np.float64)[tokens[:-1]]
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(500), tokens[1:]]
    assert rows[-1]["val_loss"] == pytest.approx(nats.mean(), abs=1e-5) and nats.mean() < 5.5

    def first_state(state, cfg):
        assert int(state.step) == 0 and not np.any(state.params["table"])
        return state._replace(
            params={"table": jax.device_put(table, state.params["table"].sharding)}
        )

    tuned = BIGRAM._replace(first_state=first_state)
    with contextlib.redirect_stdout(io.StringIO()):
        folder = train.main([*flags, f"--log_dir={tmp_path}/tuned"], tuned)
    assert metrics_of(folder)[0]["train_loss"] < rows[0]["train_loss"] - 0.5


def test_the_hook_is_called_after_each_dispatched_step(finished, tmp_path, no_samples):
    heard = []
    trained(*finished.data, f"--log_dir={tmp_path}/logs", hook=heard.append)
    assert heard == [*range(1, STEPS + 1)]


def samples_of(weights, model, cfg):
    lines = []
    train.show_samples(weights, model, types.SimpleNamespace(cfg=cfg, line=lines.append))
    return lines


def test_a_sample_follows_the_model_and_its_seed(finished):
    cfg = config_of(finished)
    follows = jnp.arange(384)[None] == (jnp.arange(384)[:, None] + 1) % 257
    certain = {"table": jnp.where(follows, 50.0, 0.0)}
    one, two = samples_of(certain, BIGRAM, cfg)
    assert one.startswith("sample: def main()*+,-./0123456789:;<=>?@ABC")
    assert two.startswith("sample: class !\"#$%&'()*+,-./0123456789")
    vague = {"table": jax.random.normal(jax.random.key(5), (384, 384))}
    assert samples_of(vague, BIGRAM, cfg) == samples_of(vague, BIGRAM, cfg)
    assert samples_of(vague, BIGRAM, cfg) != samples_of(vague, BIGRAM, train.replace(cfg, seed=1))


def test_a_byte_is_drawn_as_often_as_its_logit_and_the_temperature_say(finished):
    row = np.full(384, -1e9, np.float32)
    row[[ord(c) for c in "XYZ"]] = np.log([0.1, 0.2, 0.7])
    model = BIGRAM._replace(logits=lambda weights, ids, cfg: jnp.tile(row, (*ids.shape, 1)))
    text = "".join(samples_of({"table": np.zeros((384, 384))}, model, config_of(finished)))
    drawn = np.array([text.count(c) for c in "XYZ"])
    wanted = np.array([0.1, 0.2, 0.7]) ** (1 / 0.7)
    assert drawn.sum() == 400 and np.abs(drawn / 400 - wanted / wanted.sum()).max() < 0.07


def test_logits_are_of_rows_of_any_length_also_where_the_attention_wants_rows_in_256s(
    finished, learned
):
    cfg = train.replace(config_of(finished), attention="band")
    assert train.next_logits(learned, jnp.array([[BOS, 7, 9]]), cfg).shape == (1, 3, 384)


def test_deterministic_and_the_platform_choose_options_that_the_compiler_knows(finished):
    cfg, mesh = config_of(finished), train.make_mesh()
    assert train.compiler_options(mesh, cfg) == {}
    options = train.compiler_options(mesh, train.replace(cfg, deterministic=True))
    assert options == {"xla_gpu_deterministic_ops": True}
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)  # an unknown one is refused
    chip = types.SimpleNamespace(platform="tpu")
    mesh = types.SimpleNamespace(devices=np.array([chip]))
    assert train.compiler_options(mesh, cfg) == train.TPU_OPTIONS


def test_matrices_that_fill_whole_devices_in_float32_compile():
    """XLA on a CPU of two devices refused slices of a batch that were whole members of it."""
    mesh = train.make_mesh(jax.devices()[:2])
    split = train.P(None, None, "data")

    def both(*matrices):
        return train.orthogonalize_all(matrices, [True, True], "float32")

    up = np.random.default_rng(0).normal(size=(2, 16, 32)).astype(np.float32)
    got = train.on_devices(both, mesh, (split, split), [split, split])(up, -up)
    np.testing.assert_allclose(got[0], -got[1], atol=1e-5)
    np.testing.assert_allclose(got[0], train.orthogonalize(up, "float32"), atol=1e-5)
