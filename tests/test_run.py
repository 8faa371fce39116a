"""What a run writes, how it resumes, what its clock counts, and the seam for another architecture.

One run of a model of two tiny blocks, whose stage changes after half of twelve steps, is looked at by most tests; the
others share its compiled programs.
"""
import ast
import contextlib
import dataclasses
import errno
import glob
import hashlib
import io
import json
import math
import os
import pty
import re
import shlex
import shutil
import struct
import sys
import threading
import time
import types
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timedelta, timezone
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from shards import BOS, make_folder

STEPS = 12
SIZES = ["--preset=tiny", f"--steps={STEPS}", "--num_layers=2", "--model_dim=24", "--head_dim=8", "--mlp_dim=40", "--skips=0>1",
         "--late_inputs=0>1", "--backout=0", "--window_long=20,24",
         "--long_layers=1", "--attn_block=14", "--batch_tokens=224,448", "--seq_len=14,28", "--micro_tokens=28",
         "--window_short=9,16", "--val_window_short=16", "--val_tokens=500", "--val_seq_len=40", "--val_context=11",
         "--target_loss=5.3", "--stage_lr=1,0.5", "--warmup_steps=2", "--cooldown_frac=0.4", "--final_lr_scale=0.1",
         "--embed_lr=0.05", "--head_lr=0.05"]
EVERY = ["--val_every=4", "--save_every=4", "--log_every=1"]
STEP_LINE = re.compile(r"step:(?P<step>\d+)/(?P<steps>\d+) train_loss:(?P<train_loss>\d+\.\d{4})( val_loss:(?P<val_loss>\d+\.\d{4}))? "
                       r"train_time:(?P<train_time>\d+\.\d{3})s step:\d+\.\dms tok/s:\d+\.\d+[kM] mfu:(-|\d+\.\d%)( \w+:\S+)* eta:\d+s")
REAL_COMPILE_ALL = train.compile_all
METRICS = {"step", "tokens", "train_time_s", "cpu_time_s", "wall_s", "train_loss", "val_loss", "lr", "step_ms", "tokens_per_s", "mfu",
           "stage", "input_wait_ms", "target_reached_step"}


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Configs whose programs are alike share them; compiled without optimizing, in half the time."""
    programs, real = {}, train.compile_all
    not_compiled_in = dict.fromkeys(train.MAY_DIFFER | {"train_files", "val_files", "target_loss"})

    def remembered(model, mesh, cfg):
        key = model, mesh.size, dataclasses.replace(cfg, **not_compiled_in)
        if key not in programs:
            programs[key] = real(model, mesh, cfg)
        found, notes = programs[key]
        return dict(found), notes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_all", remembered)
        for name in ("sync", "fsync"):  # a disk that others keep busy may take seconds
            patch.setattr(os, name, lambda *_: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def trained(*flags, model=None):
    """(run folder, what the run printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = train.main([*SIZES, *EVERY, *flags], model)
    return folder, printed.getvalue()


class Finished(types.SimpleNamespace):
    """folder, printed, argv, data (flags), log (text), rows (metrics), writes (paths), started, ended."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    """The run most tests look at: left alone, in a folder of its own, with a byte-level model."""
    home, writes, watching = tmp_path_factory.mktemp("finished"), [], [True]

    def watch(event, arguments):
        if watching and event == "open" and isinstance(arguments[0], (str, bytes)) and set(str(arguments[1])) & set("wax+"):
            writes.append(Path(os.fsdecode(arguments[0])).absolute())
        elif watching and event in ("os.mkdir", "os.rename"):
            writes.extend(Path(p).absolute() for p in arguments if isinstance(p, str))
    data = make_folder(home / "my data", tokenizer="bytes")
    started, here = datetime.now(timezone.utc), Path.cwd()
    sys.addaudithook(watch)
    os.chdir(home)
    try:
        folder, printed = trained(*data)
    finally:
        os.chdir(here)
        watching.clear()
    folder = home / folder
    return Finished(folder=folder, printed=printed, argv=[*SIZES, *EVERY, *data], data=data, log=(folder / "log.txt").read_text(),
                    rows=metrics_of(folder), writes=writes, home=home, started=started, ended=datetime.now(timezone.utc))


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def bytes_of(folder):
    """The contents of a checkpoint, its manifest aside, which tells the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def tensors_of(path):
    """{name: array} of a safetensors file, by the description of its format."""
    blob = path.read_bytes()
    size, = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8:8 + size])
    return {name: np.frombuffer(blob[8 + size:][slice(*entry["data_offsets"])], {"F32": "<f4"}[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


@pytest.fixture
def no_samples(monkeypatch):
    monkeypatch.setattr(train, "sample", lambda *_: [104, 105])


def config_of(run, *flags):
    return train.open_data(train.configure([*run.argv, *flags])[0])[-1]


def copy_of(finished, folder):
    """The finished run, copied into a log_dir of its own. Returns (flag, run folder)."""
    shutil.copytree(finished.folder, folder / "logs" / finished.folder.name)
    return f"--log_dir={folder}/logs", folder / "logs" / finished.folder.name


# ---- The run folder ----

def test_a_run_folder_is_named_by_the_time_of_its_start_and_holds_all_of_the_run(finished):
    assert finished.folder.parent == finished.home / "logs"
    stamp, _, ident = finished.folder.name.rpartition("-")
    assert re.fullmatch(r"[0-9a-f]+", ident)
    made = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    assert finished.started - timedelta(seconds=1) <= made <= finished.ended
    checkpoints = {f"ckpt/step-{step}/{file}" for step in ("000008", "000012")
                   for file in ("params.safetensors", "opt.safetensors", "manifest.json")}
    assert files_of(finished.folder) == {"log.txt", "metrics.jsonl", "config.json", "loss.svg"} | checkpoints


def test_a_run_writes_nothing_outside_its_folder_and_the_users_cache(finished):
    cache = Path(os.environ["XDG_CACHE_HOME"])
    allowed = (finished.folder, cache, Path("/dev"))
    outside = {path for path in finished.writes if not any(path.is_relative_to(folder) for folder in allowed)}
    assert outside <= {finished.home / "logs"}
    assert any(path.name == "log.txt" for path in finished.writes)
    assert {path.name for path in finished.home.iterdir()} == {"my data", "logs"}
    assert files_of(finished.home / "my data") == {"train_000000.bin", "train_000001.bin", "val_000000.bin", "meta.json"}


def test_config_json_holds_the_resolved_config_and_the_meta_json(finished):
    saved = json.loads((finished.folder / "config.json").read_text())
    assert saved["config"] == dataclasses.asdict(config_of(finished))
    assert saved["config"]["vocab_size"] == 257 and saved["config"]["bos_id"] == BOS
    assert saved["meta"] == {"tokenizer": "bytes", "vocab_size": 257, "bos_id": BOS}


# ---- log.txt ----

def test_the_log_starts_with_the_source_of_train_py(finished):
    assert finished.log.startswith(Path(train.__file__).read_text())


def head_and_steps(finished):
    lines = finished.log[len(Path(train.__file__).read_text()):].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("step:"))
    return lines[:first], [line for line in lines[first:] if line.startswith("step:")], lines[first:]


def test_the_head_of_the_log_holds_all_that_repeating_the_run_takes(finished):
    head, _, _ = head_and_steps(finished)
    text = "\n".join(head)
    argv, = (line for line in head if line.startswith("argv: "))
    assert shlex.split(argv)[1:] == finished.argv
    config, = (line for line in head if line.startswith("config: "))
    for name, value in dataclasses.asdict(config_of(finished)).items():
        assert f" {name}={value}" in config
    assert "preset: tiny (asked for)" in head
    versions, = (line for line in head if line.startswith("versions: "))
    assert f"jax={jax.__version__}" in versions and f"numpy={np.__version__}" in versions and f"python={sys.version.split()[0]}" in versions
    if names := [line.split(": ")[1] for file in glob.glob("/proc/cpuinfo") for line in Path(file).read_text().splitlines() if line.startswith("model name")]:
        assert f" processor={names[0]}" in versions  # what is not the same on two kinds of CPU is the order of bfloat16 sums
    assert any(re.fullmatch(r"devices: 8 x cpu, 1 processes.*", line) for line in head)
    for path in sorted((finished.home / "my data").glob("*.bin")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"data: {path.name} tokens:{(path.stat().st_size - 1024) // 2} sha256:{digest}" in head
    scored = (finished.home / "my data/val_000000.bin").read_bytes()[1024:][:2 * 501]
    assert hashlib.sha256(scored).hexdigest() in text
    numbers = sum(array.size for array in tensors_of(finished.folder / "ckpt/step-000012/params.safetensors").values())
    assert f"parameters: {numbers}" in head
    compiled = [re.fullmatch(r"compiled: (\w+) in \d+\.\ds, \d+\.\d\d GiB per device", line) for line in head if line.startswith("compiled: ")]
    assert sorted(match[1] for match in compiled) == ["eval", "init", "train_0", "train_1"]


def test_every_step_line_matches_one_expression_and_says_what_the_metrics_say(finished):
    _, steps, _ = head_and_steps(finished)
    found = [STEP_LINE.fullmatch(line) for line in steps]
    assert all(found), steps
    assert [int(match["step"]) for match in found] == list(range(1, STEPS + 1)) and {match["steps"] for match in found} == {"12"}
    assert [int(match["step"]) for match in found if match["val_loss"]] == [4, 8, 12]
    for match, row in zip(found, finished.rows):
        assert float(match["train_loss"]) == pytest.approx(row["train_loss"], abs=6e-5)
        assert float(match["train_time"]) == pytest.approx(row["train_time_s"], abs=6e-4)
        assert not match["val_loss"] or float(match["val_loss"]) == pytest.approx(row["val_loss"], abs=6e-5)


def test_the_log_ends_with_the_result_and_the_sha256_of_all_bytes_above(finished):
    _, _, tail = head_and_steps(finished)
    final, = (line for line in tail if line.startswith("final: "))
    last = finished.rows[-1]
    assert f"step:12/12 tokens:{last['tokens']} val_loss:{last['val_loss']:.4f} train_time:{last['train_time_s']:.3f}s" in final
    assert f"target:5.3 reached at step {last['target_reached_step']} after " in final
    above, _, line = (finished.folder / "log.txt").read_bytes().rstrip(b"\n").rpartition(b"\n")
    assert line.decode() == "sha256:" + hashlib.sha256(above + b"\n").hexdigest()


def test_a_byte_level_run_ends_with_samples_of_both_prompts(finished):
    for prompt in ("def main(", "class "):
        assert f"\nsample: {prompt}" in finished.log
    assert finished.log.index("\nfinal: ") < finished.log.index("\nsample: ") < finished.log.index("\nsha256:")


def test_console_and_log_get_the_same_lines(finished):
    printed = finished.printed.splitlines()
    head, _, tail = head_and_steps(finished)
    logged = [line for line in [*head, *tail] if line and not line.startswith(("=", "sha256:"))]
    assert [line for line in printed if line in logged] == logged


# ---- metrics.jsonl and loss.svg ----

def test_metrics_rows_have_only_known_keys_and_leave_out_what_is_not_there(finished):
    for row in finished.rows:
        assert set(row) <= METRICS and None not in row.values()
    assert "null" not in (finished.folder / "metrics.jsonl").read_text()
    *steps, last = finished.rows
    usual = METRICS - {"val_loss", "mfu", "target_reached_step"}
    assert [set(row) - {"val_loss"} for row in steps] == [usual] * STEPS  # no mfu: a CPU's peak is not known
    assert [row["step"] for row in steps if "val_loss" in row] == [4, 8, 12]


def test_metrics_say_how_many_tokens_at_which_learning_rate_in_which_stage(finished):
    *steps, _ = finished.rows
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["tokens"] for row in steps] == [224 * n for n in range(1, 7)] + [6 * 224 + 448 * n for n in range(1, 7)]
    assert [row["stage"] for row in steps] == [0] * 6 + [1] * 6
    share = [min(1, max(0, (10.8 - step) / 4.32)) for step in range(12)]  # over 0.4 of 10.8 steps, down to 0.1, where it stays
    scale = [min(1, (step + 1) / 3) * ((1 if step < 6 else 0.5) * w + 0.1 * (1 - w)) for step, w in enumerate(share)]
    assert [row["lr"] for row in steps] == pytest.approx(scale, abs=2e-6)
    for name in ("train_time_s", "cpu_time_s", "wall_s"):
        times = [row[name] for row in steps]
        assert times == sorted(times) and times[0] > 0
    for row in steps:
        assert row["tokens_per_s"] == pytest.approx((448 if row["stage"] else 224) / row["step_ms"] * 1e3, rel=1e-3)


def test_a_line_over_the_end_of_a_stage_counts_the_tokens_of_both(finished, tmp_path, no_samples):
    folder, _ = trained(*finished.data, f"--log_dir={tmp_path}/logs", "--log_every=4", "--val_every=0")
    *rows, _ = metrics_of(folder)
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row, tokens in zip(rows, (4 * 224, 2 * 224 + 2 * 448, 4 * 448)):
        assert row["tokens_per_s"] * 4 * row["step_ms"] / 1e3 == pytest.approx(tokens, rel=1e-3)


def test_weights_of_another_table_are_refused_before_anything_is_compiled_or_written(finished, tmp_path, monkeypatch):
    log_dir, folder = copy_of(finished, tmp_path)
    shutil.rmtree(folder / "ckpt/step-000012")
    before = {name: (folder / name).read_bytes() for name in files_of(folder)}
    monkeypatch.setattr(train, "compile_all", lambda *_: pytest.fail("compiled"))
    more = lambda cfg: train.param_specs(cfg) | {"extra": train.Spec("D", train.constant(0.0), "scalar")}
    with pytest.raises(train.CheckpointError, match="params.safetensors: extra is nothing, this config wants"):
        trained(*finished.data, log_dir, "--resume=auto", model=train.Model(specs=more))
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before


def test_a_setting_that_is_new_at_a_resume_is_told_since_bits_may_differ(finished, tmp_path, no_samples, monkeypatch):
    log_dir, folder = copy_of(finished, tmp_path)
    shutil.rmtree(folder / "ckpt/step-000012")
    monkeypatch.setenv("JAX_SOMETHING", "7")
    assert "bits may differ: JAX_SOMETHING was None, is 7" in trained(*finished.data, log_dir, "--resume=auto")[1]


def test_a_signal_is_heard_also_where_nobody_reads_what_it_says(monkeypatch):
    stop, left = train.Stop(), []
    def write(*_):
        raise BrokenPipeError
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "_exit", left.append)
    stop.looping = True
    stop.hear(15, None)
    assert stop.asked and left == []
    stop.hear(2, None)
    assert left == [130]


def test_the_last_metrics_row_is_the_result(finished):
    *steps, last = finished.rows
    assert set(last) >= {"step", "val_loss", "train_time_s", "target_reached_step"}
    assert (last["step"], last["val_loss"], last["train_time_s"]) == (12, steps[-1]["val_loss"], steps[-1]["train_time_s"])
    below = [row["step"] for row in steps if row.get("val_loss", math.inf) <= 5.3]
    assert last["target_reached_step"] == below[0] < 12  # the run goes on after the target


def test_a_dozen_steps_learn_something(finished):
    losses = [row["train_loss"] for row in finished.rows if "train_loss" in row]
    there = 1 - 0.5 / 1.5 / 14  # the last token of a row has no second next one
    assert losses[0] == pytest.approx(math.log(257) * there, abs=0.02)  # a small head finds every token equally likely
    assert losses[-1] < losses[0] - 0.8


def test_loss_svg_is_xml_that_holds_every_point(finished):
    root = ElementTree.parse(finished.folder / "loss.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    *steps, last = finished.rows
    path, = (e for e in root.iter() if e.tag.endswith("path") and e.get("class") == "train")
    line = np.array([[float(x) for x in point.split()] for point in path.get("d").lstrip("M").split("L")])
    number, loss = np.array([(row["step"], row["train_loss"]) for row in steps]).T
    across, down = np.polyfit(number, line[:, 0], 1), np.polyfit(loss, line[:, 1], 1)
    np.testing.assert_allclose(np.polyval(across, number), line[:, 0], atol=0.11)  # the picture's scales are linear
    np.testing.assert_allclose(np.polyval(down, loss), line[:, 1], atol=0.11)
    assert across[0] > 0 > down[0]
    dots = {(float(e.get("cx")), float(e.get("cy"))) for e in root.iter() if e.tag.endswith("circle")}
    wanted = [(np.polyval(across, row["step"]), np.polyval(down, row["val_loss"])) for row in steps if "val_loss" in row]
    assert len(dots) == len(wanted) == 3
    np.testing.assert_allclose(sorted(dots), sorted(wanted), atol=0.2)
    words = " ".join(e.text for e in root.iter() if e.tag.endswith("text"))
    assert "target 5.3" in words and f"{last['val_loss']:.4f}" in words
    picture = lambda target: train.loss_svg(finished.rows, dataclasses.replace(train.Config(), steps=last["step"], target_loss=target))
    assert "dashes: target none" in picture(0.0) and 'class="goal"' not in picture(0.0)
    low = min(row["val_loss"] for row in finished.rows if "val_loss" in row)
    assert f"dashes: target {math.ceil(low)}<" in picture(float(math.ceil(low))) and 'class="goal"' in picture(float(math.ceil(low)))


# ---- Checkpoints ----

def test_a_checkpoint_names_every_row_of_the_weight_table_with_its_optimizer_state(finished):
    size = {"L": 2, "I": 2, "D": 24, "F": 40, "V": 384, "HK": 16, "GK": 16, "J": 1, "E": 5, "H": 2, "1": 1}  # 257 tokens, padded to 3 * 128
    table = train.param_specs(config_of(finished))
    rows = {train.name_of(path): row for path, row in jax.tree.leaves_with_path(table)}
    shapes = {name: tuple(size[axis] for axis in row.axes.split()) for name, row in rows.items()}
    assert shapes["embed"] == shapes["head"] == (384, 24) and shapes["blocks/w_down"] == (2, 40, 24) and shapes["attention/w_q"] == (2, 24, 16)
    assert shapes["attention/gate"] == (2, 5, 2) and shapes["smear_gate"] == (5, 1) and shapes["blocks/y_mix"] == (2,)
    params = tensors_of(finished.folder / "ckpt/step-000012/params.safetensors")
    assert {name: array.shape for name, array in params.items()} == shapes
    assert all(np.isfinite(array).all() for array in params.values())
    squares = {"attention/w_q": (2, 1, 16), "attention/w_k": (2, 1, 16), "attention/w_v": (2, 1, 16), "attention/w_out": (2, 16, 1),
               "blocks/w_up": (2, 1, 40), "blocks/w_down": (2, 40, 1)}  # one number for each unit of a matrix
    state = tensors_of(finished.folder / "ckpt/step-000012/opt.safetensors")
    assert {name: array.shape for name, array in state.items()} == \
        {f"{name}/square": shape for name, shape in squares.items()} | {f"{name}/momentum": shapes[name] for name in squares} | \
        {f"{name}/{slot}": shapes[name] for name in rows if name not in squares for slot in ("m", "v")}
    for name, array in state.items():  # every weight has seen a gradient
        assert array.any(), name


def test_a_manifest_names_step_config_versions_and_the_sha256_of_its_files(finished):
    for step in (8, 12):
        folder = finished.folder / "ckpt" / f"step-{step:06d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["step"] == step and manifest["config"] == dataclasses.asdict(config_of(finished))
        assert manifest["versions"]["jax"] == jax.__version__
        assert manifest["sha256"] == {name: hashlib.sha256(blob).hexdigest() for name, blob in bytes_of(folder).items()}


def test_a_checkpoint_is_on_the_disk_before_it_bears_its_name(finished, tmp_path, monkeypatch):
    events, rename = [], Path.rename
    monkeypatch.setattr(os, "sync", lambda: events.extend(["sync"] * 3))
    monkeypatch.setattr(os, "fsync", lambda _: events.append("sync"))
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append((path.name, target.name, sorted(files_of(path)))) or rename(path, target))
    cfg, mesh = config_of(finished), train.make_mesh()
    state = train.compile_all(train.Model(), mesh, cfg)[0]["init"]()
    train.save_checkpoint(state, tmp_path, cfg, {}, {})
    at, = (i for i, event in enumerate(events) if event != "sync")
    staging, name, files = events[at]
    assert name == "step-000000" and not staging.startswith("step-")
    assert files == ["manifest.json", "opt.safetensors", "params.safetensors"] and at >= 3


@pytest.mark.parametrize("save_every,kept", [(0, [12]), (5, [10, 12]), (100, [12]), (1, [11, 12])])
def test_the_last_two_checkpoints_are_kept_and_one_at_the_end_always(save_every, kept, finished, tmp_path, no_samples):
    folder, _ = trained(*finished.data, f"--log_dir={tmp_path}/logs", f"--save_every={save_every}", "--val_every=0")
    assert sorted(int(path.name[5:]) for path in (folder / "ckpt").iterdir()) == kept
    assert [row["step"] for row in metrics_of(folder) if "val_loss" in row] == [12, 12]  # val_every=0: once, and the result
    assert bytes_of(folder / "ckpt/step-000012") == bytes_of(finished.folder / "ckpt/step-000012")


def test_the_logged_validation_loss_is_that_of_the_saved_weights(finished):
    """Every target of the first 500 once, after up to 11 tokens of its chunk's past, padded with BOS before the first."""
    cfg = config_of(finished)
    tokens = np.fromfile(finished.home / "my data/val_000000.bin", "<u2", offset=1024).astype(np.int32)
    inputs, targets, weights = [], [], []
    for first in range(0, 500, 29):
        places = range(first - 11, first + 29)
        inputs.append([tokens[i] if 0 <= i < 500 else BOS for i in places])
        targets.append([tokens[i + 1] if first <= i < 500 else 0 for i in places])
        weights.append([float(first <= i < 500) for i in places])
    assert np.sum(weights) == 500
    params = {"blocks": {}, "attention": {}}
    for name, array in tensors_of(finished.folder / "ckpt/step-000012/params.safetensors").items():
        stack, _, row = name.rpartition("/")
        (params[stack] if stack else params)[row] = jnp.array(array)
    nats = jax.jit(lambda w, *rows: train.loss_fn(w, *rows, train.val_stage(cfg), cfg))(
        train.unstack(params), jnp.array(inputs), jnp.array(targets), jnp.array(weights, jnp.float32))
    assert finished.rows[-1]["val_loss"] == pytest.approx(float(nats) / 500, rel=2e-6, abs=1e-6)


# ---- Resuming ----

@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
    """A run on the same data whose process died after the checkpoint of step 4, before the stage changed, resumed with
    --resume=auto. On a clock by which a step takes a second and all else takes far longer."""
    log_dir = tmp_path_factory.mktemp("resumed") / "logs"
    flags, real = [*finished.data, f"--log_dir={log_dir}"], train.save_checkpoint

    def save_and_die(state, *rest):
        real(state, *rest)
        if int(state.step) == 4:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample", lambda *_: [104, 105])
        slow_clock(patch)
        patch.setattr(train, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            trained(*flags)
    first, = log_dir.iterdir()
    assert sorted(path.name for path in (first / "ckpt").iterdir()) == ["step-000004"]
    tied = shutil.copytree(first / "ckpt/step-000004", log_dir.parent / "tied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample", lambda *_: [104, 105])
        slow_clock(patch)
        folder, printed = trained(*flags, "--resume=auto")
    return Finished(folder=folder, printed=printed, first=first, tied=tied, log_dir=log_dir, rows=metrics_of(folder))


def slow_clock(patch):
    """Replace train's clock: a training step takes 1 s, and what is not training takes far more."""
    cost = {"step": 1.0, "init": 10.0, "eval": 1e2, "checkpoint": 1e3, "compile": 1e4, "warm_up": 1e5}
    now = [0.0]

    def tick(seconds=1e-6):
        now[0] += seconds
        return now[0]

    def slow(name, function):
        return lambda *arguments: (tick(cost[name]), function(*arguments))[1]
    compile_all, warm_up, save_checkpoint = train.compile_all, train.warm_up, train.save_checkpoint

    def slow_compile(*arguments):
        tick(cost["compile"])
        programs, notes = compile_all(*arguments)
        return {key: slow(key if key in cost else "step", program) for key, program in programs.items()}, notes
    patch.setattr(train, "time", types.SimpleNamespace(**vars(time) | {"perf_counter": tick, "process_time": tick}))
    patch.setattr(train, "compile_all", slow_compile)
    patch.setattr(train, "warm_up", slow("warm_up", warm_up))
    patch.setattr(train, "save_checkpoint", slow("checkpoint", save_checkpoint))


def test_a_resumed_run_ends_bit_for_bit_as_the_one_that_was_left_alone(finished, resumed):
    for step in (8, 12):
        name = f"ckpt/step-{step:06d}"
        assert bytes_of(resumed.folder / name) == bytes_of(finished.folder / name)
    losses = lambda rows: [(row["step"], row.get("train_loss"), row.get("val_loss"), row["tokens"]) for row in rows]
    assert losses(resumed.rows) == losses(finished.rows)


def test_a_resumed_run_continues_in_its_own_folder_and_log(resumed):
    assert resumed.folder == resumed.first and list(resumed.log_dir.iterdir()) == [resumed.folder]
    log = (resumed.folder / "log.txt").read_text()
    assert f"resumed: {resumed.folder}/ckpt/step-000004 at step 4" in log
    assert log.count(Path(train.__file__).read_text()) == 2  # the second part may be another version's
    assert [int(m["step"]) for m in map(STEP_LINE.fullmatch, log.splitlines()) if m] == list(range(1, 13))
    above, _, line = (resumed.folder / "log.txt").read_bytes().rstrip(b"\n").rpartition(b"\n")
    assert line.decode() == "sha256:" + hashlib.sha256(above + b"\n").hexdigest()


def test_the_clock_counts_steps_and_neither_compilation_warm_up_evaluation_nor_checkpoints(resumed):
    for row in resumed.rows:
        ahead = 0 if "val_loss" in row else 1  # a step is settled once the next is dispatched
        assert row["train_time_s"] == pytest.approx(row["step"] + ahead, abs=1e-2)
        assert row["cpu_time_s"] == pytest.approx(row["step"] + ahead, abs=1e-2)


def test_the_wall_clock_counts_everything_since_the_run_began(resumed):
    walls = [row["wall_s"] for row in resumed.rows if "wall_s" in row]
    start = 1e4 + 1e5 + 2 * 10 + 2  # compilation; warm-up: first values, each stage's program once, first values again
    assert walls[3] == pytest.approx(start + 4, abs=0.01)
    assert walls[-1] == pytest.approx(start + 8 + 1e2 + 1e3, abs=0.01)  # of the resumed part, before its last evaluation


def test_the_time_at_which_the_target_is_reached_is_training_time_and_outlives_a_resume(finished, resumed):
    step = finished.rows[-1]["target_reached_step"]
    assert resumed.rows[-1]["target_reached_step"] == step == 4
    assert re.search(r"target:5.3 reached at step 4 after 4\.00\ds", (resumed.folder / "log.txt").read_text())


def test_a_checkpoint_of_the_tied_stage_holds_one_table_twice_and_a_later_one_two(finished, resumed):
    for folder, alike in ((resumed.tied, True), (finished.folder / "ckpt/step-000008", False), (finished.folder / "ckpt/step-000012", False)):
        params, state = tensors_of(folder / "params.safetensors"), tensors_of(folder / "opt.safetensors")
        assert np.array_equal(params["embed"], params["head"]) == alike
        for slot in ("m", "v"):
            assert np.array_equal(state[f"embed/{slot}"], state[f"head/{slot}"]) == alike and state[f"head/{slot}"].any()


def test_a_slow_disk_shows_in_the_train_time(finished, tmp_path, monkeypatch, no_samples):
    real = train.to_devices

    def slow(rows, *rest):
        time.sleep(0.3 * bool(rows))
        return real(rows, *rest)
    monkeypatch.setattr(train, "to_devices", slow)
    folder, _ = trained(*finished.data, f"--log_dir={tmp_path}/logs", "--val_every=0", "--save_every=0", "--target_loss=0.1")
    rows = metrics_of(folder)
    assert rows[-1]["train_time_s"] > 0.9 * 0.3 * 10  # two are made before the clock starts
    assert sum(row["input_wait_ms"] for row in rows if "input_wait_ms" in row) > 500  # milliseconds; a slow machine's steps hide the rest
    assert "target_reached_step" not in rows[-1] and "target:0.1 not reached" in (folder / "log.txt").read_text()


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_still_ends_the_same(finished, tmp_path, no_samples):
    log_dir, folder = copy_of(finished, tmp_path)
    with open(folder / "ckpt/step-000012/params.safetensors", "r+b") as file:
        file.truncate(1000)
    for name in (".writing-step-000012", ".writing-step-000010"):  # a process died while it wrote
        (folder / "ckpt" / name).mkdir()
        (folder / "ckpt" / name / "params.safetensors").write_bytes(b"half")
    again, printed = trained(*finished.data, log_dir, "--resume=auto", "--log_every=3", "--val_every=5", "--save_every=0")
    assert again == folder
    assert re.search(r"passing over .*step-000012.*params.safetensors", printed)
    assert f"resumed: {folder}/ckpt/step-000008 at step 8" in printed
    assert bytes_of(folder / "ckpt/step-000012") == bytes_of(finished.folder / "ckpt/step-000012")
    assert not [path for path in (folder / "ckpt").iterdir() if path.name.startswith(".")]
    steps = [row["step"] for row in metrics_of(folder)]
    assert steps == sorted(steps) and [(row["step"], "val_loss" in row) for row in metrics_of(folder) if row["step"] > 8] == [
        (9, False), (10, True), (12, True), (12, True)]
    assert metrics_of(folder)[-1]["val_loss"] == finished.rows[-1]["val_loss"]


def flip_bit(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 4
    path.write_bytes(blob)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "truncated_params": lambda f: os.truncate(f / "params.safetensors", 5000),
    "empty_optimizer_state": lambda f: os.truncate(f / "opt.safetensors", 0),
    "flipped_bit_in_params": lambda f: flip_bit(f / "params.safetensors"),
    "flipped_bit_in_optimizer_state": lambda f: flip_bit(f / "opt.safetensors"),
    "no_params": lambda f: (f / "params.safetensors").unlink(),
    "no_optimizer_state": lambda f: (f / "opt.safetensors").unlink(),
    "no_manifest": lambda f: (f / "manifest.json").unlink(),
    "empty_manifest": lambda f: (f / "manifest.json").write_text(""),
    "truncated_manifest": lambda f: os.truncate(f / "manifest.json", 300),
    "manifest_is_a_list": lambda f: (f / "manifest.json").write_text("[]"),
    "manifest_is_not_text": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\xfa"),
    "manifest_without_step": lambda f: (f / "manifest.json").write_text(json.dumps({"sha256": {}})),
    "manifest_with_a_word_for_a_step": lambda f: edit(f / "manifest.json", step="last"),
    "manifest_with_a_list_for_a_config": lambda f: edit(f / "manifest.json", config=[1, 2]),
    "manifest_with_no_hashes": lambda f: edit(f / "manifest.json", sha256={}),
    "empty_folder": lambda f: [path.unlink() for path in f.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("by", ["auto", "path"])
def test_a_damaged_checkpoint_is_passed_over_with_its_name_for_the_one_before(kind, by, finished, tmp_path, capsys):
    log_dir, folder = copy_of(finished, tmp_path)
    cfg = config_of(finished, log_dir, f"--resume={folder if by == 'path' else 'auto'}")
    DAMAGE[kind](folder / "ckpt/step-000012")
    found, manifest = train.find_checkpoint(cfg)
    assert found == folder / "ckpt/step-000008" and manifest["step"] == 8
    said, = (line for line in capsys.readouterr().out.splitlines() if "passing over" in line)
    assert str(folder / "ckpt/step-000012") in said
    DAMAGE[kind](folder / "ckpt/step-000008")
    with pytest.raises(train.CheckpointError) as caught:
        train.find_checkpoint(cfg)
    assert str(folder / "ckpt/step-00000") in str(caught.value)


def test_all_checkpoints_damaged_end_the_run_before_it_compiles(finished, tmp_path, monkeypatch):
    log_dir, folder = copy_of(finished, tmp_path)
    for step in (8, 12):
        DAMAGE["flipped_bit_in_params"](folder / f"ckpt/step-{step:06d}")
    monkeypatch.setattr(train, "compile_all", lambda *_: pytest.fail("compiled before the checkpoint was checked"))
    before = files_of(folder)
    with pytest.raises(train.CheckpointError, match="step-000008"):
        trained(*finished.data, log_dir, "--resume=auto")
    assert files_of(folder) == before


def test_a_finished_run_is_not_resumed(finished, tmp_path):
    log_dir, folder = copy_of(finished, tmp_path)
    before = {name: (folder / name).read_bytes() for name in files_of(folder)}
    for resume in ("auto", str(folder), str(folder / "ckpt/step-000012")):
        again, printed = trained(*finished.data, log_dir, f"--resume={resume}")
        assert again == folder and "nothing is left to train" in printed
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before


def test_resume_takes_a_run_folder_or_one_of_its_checkpoints(finished, tmp_path):
    log_dir, folder = copy_of(finished, tmp_path)
    for path, step in ((folder, 12), (folder / "ckpt/step-000008", 8), (folder / "ckpt/step-000012", 12)):
        found, manifest = train.find_checkpoint(config_of(finished, log_dir, f"--resume={path}"))
        assert found == folder / "ckpt" / f"step-{step:06d}" and manifest["step"] == step
    for path in (tmp_path, folder / "ckpt/step-000004", folder / "log.txt"):
        with pytest.raises(train.CheckpointError, match=re.escape(f"--resume={path}")):
            train.find_checkpoint(config_of(finished, log_dir, f"--resume={path}"))


def test_auto_takes_the_newest_run_of_this_config_and_is_not_misled_by_what_else_lies_there(finished, tmp_path):
    log_dir, folder = copy_of(finished, tmp_path)
    newer, other = folder.with_name("20991231T000000Z-000000"), folder.with_name("20991231T000001Z-000000")
    shutil.copytree(folder, newer)
    shutil.copytree(folder, other)
    for path in (other / "ckpt").glob("*/manifest.json"):
        manifest = {key: value for key, value in json.loads(path.read_text()).items() if key != "manifest_sha256"}
        path.write_text(train.manifest_text(manifest | {"config": manifest["config"] | {"seed": 1}}))
    folder.with_name("zz.txt").write_text("a file")
    (folder.parent / "zzz").mkdir()
    (folder.parent / "zzz" / "config.json").write_text("no json")
    found, _ = train.find_checkpoint(config_of(finished, log_dir, "--resume=auto"))
    assert found == newer / "ckpt/step-000012"


def test_auto_without_a_run_of_this_config_says_so_and_starts_at_step_0(finished, tmp_path, capsys):
    log_dir, _ = copy_of(finished, tmp_path)
    for flags in ([f"--log_dir={tmp_path}/none"], [log_dir, "--seed=1"]):
        found, manifest = train.find_checkpoint(config_of(finished, *flags, "--resume=auto"))
        assert found is None and manifest["step"] == 0
        assert re.search(r"--resume=auto: no checkpoint .*step 0", capsys.readouterr().out)


def test_auto_is_not_stopped_by_a_damaged_run_of_another_config(finished, tmp_path, capsys):
    log_dir, folder = copy_of(finished, tmp_path)
    (folder / "ckpt/step-000012/manifest.json").write_text("{")
    found, manifest = train.find_checkpoint(config_of(finished, log_dir, "--resume=auto", "--seed=1"))
    assert found is None and manifest["step"] == 0 and "step 0" in capsys.readouterr().out


def test_without_resume_nothing_is_resumed(finished, tmp_path, monkeypatch, capsys):
    log_dir, folder = copy_of(finished, tmp_path)
    monkeypatch.chdir(folder / "ckpt/step-000008")  # where a manifest.json lies
    found, manifest = train.find_checkpoint(config_of(finished, log_dir))
    assert found is None and manifest["step"] == 0 and "resume" not in capsys.readouterr().out


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(train.Config)])
def test_only_a_difference_in_where_and_how_often_to_write_may_be_resumed(field, finished, tmp_path):
    log_dir, folder = copy_of(finished, tmp_path)
    cadence = {"save_every", "val_every", "log_every", "profile", "log_dir", "resume", "cpu_devices", "multihost"}
    cfg = config_of(finished, log_dir, "--resume=auto")
    value = getattr(cfg, field)
    changed = {field: value + "9" if isinstance(value, str) else value + 1}
    if field in ("log_dir", "resume"):
        changed = {"log_dir": log_dir.split("=")[1], "resume": "auto"}
    by_auto = train.find_checkpoint(dataclasses.replace(cfg, **changed))[0]
    assert (by_auto is not None) == (field in cadence)
    by_path = dataclasses.replace(cfg, **{"resume": str(folder)} | (changed if field != "resume" else {}))
    if field in cadence:
        assert train.find_checkpoint(by_path)[0] == folder / "ckpt/step-000012"
    else:
        with pytest.raises(train.CheckpointError, match=rf"--{field}={re.escape(str(value))}\b|--{field}="):
            train.find_checkpoint(by_path)


def test_weights_of_other_shapes_are_named(finished):
    folder, mesh = finished.folder / "ckpt/step-000012", train.make_mesh()
    state = lambda **changes: jax.eval_shape(train.make_init(train.Model(), mesh, dataclasses.replace(config_of(finished), **changes)))
    with pytest.raises(train.CheckpointError, match=r"params.safetensors.*blocks/w_down.*\(2, 40, 24\).*\(2, 56, 24\)"):
        train.load_checkpoint(folder, 12, state(mlp_dim=56))
    with pytest.raises(train.CheckpointError, match=r"params.safetensors.*smear_gate.*\(5, 1\).*nothing"):
        train.load_checkpoint(folder, 12, state(smear=0))
    with pytest.raises(train.CheckpointError, match=r"opt.safetensors.*attention/w_k/square.*\(2, 1, 16\).*nothing"):
        train.load_checkpoint(folder, 12, state(muon_beta2=0.0))
    with pytest.raises(train.CheckpointError, match=r"opt.safetensors.*attention/w_k/m is nothing.*\(2, 24, 16\)"):
        train.load_checkpoint(folder, 12, state(optimizer="adamw"))


def test_only_the_first_of_several_processes_writes(finished, tmp_path, monkeypatch, capsys):
    cfg, mesh = config_of(finished), train.make_mesh()
    state = train.compile_all(train.Model(), mesh, cfg)[0]["init"]()
    monkeypatch.setattr(jax, "process_index", lambda *_: 1)
    run = train.Run(tmp_path / "run", train.param_specs(cfg), cfg, train.FRESH, {})
    run.line("a line")
    run.metrics({"step": 1})
    train.save_checkpoint(state, tmp_path / "run", cfg, {}, {})
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# ---- Things that go wrong, and a trace ----

def with_program(patch, key, change):
    """Let `change` see the results of a compiled program."""
    real = train.compile_all

    def compile_all(*arguments):
        programs, notes = real(*arguments)
        return programs | {key: lambda *operands: change(programs[key](*operands))}, notes
    patch.setattr(train, "compile_all", compile_all)


def test_a_training_loss_that_is_not_finite_ends_the_run_with_its_step_and_the_checkpoints_stand(finished, tmp_path, monkeypatch):
    with_program(monkeypatch, 1, lambda result: (result[0], result[1] * jnp.where(result[0].step == 10, jnp.nan, 1)))
    with pytest.raises(train.NonFiniteLoss, match=r"step 10 is nan.*_lr"):
        trained(*finished.data, f"--log_dir={tmp_path}/logs")
    run, = (tmp_path / "logs").iterdir()
    assert sorted(path.name for path in (run / "ckpt").iterdir()) == ["step-000004", "step-000008"]
    assert bytes_of(run / "ckpt/step-000008") == bytes_of(finished.folder / "ckpt/step-000008")
    assert [row["step"] for row in metrics_of(run)] == list(range(1, 10))


def test_a_validation_loss_that_is_not_finite_ends_the_run_too(finished, tmp_path, monkeypatch, no_samples):
    with_program(monkeypatch, "eval", lambda result: (result[0] * jnp.nan, result[1]))
    with pytest.raises(train.NonFiniteLoss, match="validation"):
        trained(*finished.data, f"--log_dir={tmp_path}/logs", "--val_every=0")


def test_an_error_of_the_prefetch_thread_ends_the_run(finished, tmp_path, monkeypatch):
    real, made = train.to_devices, []

    def fails(rows, stage, *rest):
        made.append(stage.index)
        if made.count(1) == 3 and rows:
            raise OSError("the disk is gone")
        return real(rows, stage, *rest)
    monkeypatch.setattr(train, "to_devices", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        trained(*finished.data, f"--log_dir={tmp_path}/logs")


def test_profile_writes_a_trace_into_the_run_folder(finished, tmp_path, no_samples):
    folder, _ = trained(*finished.data, f"--log_dir={tmp_path}/logs", "--profile=2:4")
    traces = list((folder / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    assert bytes_of(folder / "ckpt/step-000012") == bytes_of(finished.folder / "ckpt/step-000012")


@pytest.mark.parametrize("profile", ["6:10", "10:500"])
def test_a_trace_that_began_before_a_resume_or_would_end_after_the_run_does_no_harm(profile, finished, tmp_path, no_samples):
    log_dir, folder = copy_of(finished, tmp_path)
    shutil.rmtree(folder / "ckpt/step-000012")
    try:
        trained(*finished.data, log_dir, "--resume=auto", f"--profile={profile}")
        assert list((folder / "profile").rglob("*.xplane.pb"))
    finally:
        with contextlib.suppress(RuntimeError):
            jax.profiler.stop_trace()
    assert bytes_of(folder / "ckpt/step-000012") == bytes_of(finished.folder / "ckpt/step-000012")


# ---- The terminal ----

def screen_of(text):
    """The lines a terminal shows in the end."""
    lines = [""]
    for piece in re.split(r"(\r\n|\n|\r|\x1b\[K)", text):
        if piece in ("\r\n", "\n"):
            lines.append("")
            column = 0
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            column = 0 if lines[-1] == "" else column
            lines[-1] = lines[-1][:column] + piece + lines[-1][column + len(piece):]
            column += len(piece)
    return lines


def test_on_a_terminal_a_progress_line_is_replaced_by_the_next_and_validation_stays(finished, tmp_path, no_samples, monkeypatch):
    master, slave = pty.openpty()
    received = []

    def drain():
        with contextlib.suppress(OSError):
            while piece := os.read(master, 1 << 16):
                received.append(piece)
    reader = threading.Thread(target=drain)
    reader.start()
    with open(slave, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        folder = train.main([*SIZES, *EVERY, *finished.data, f"--log_dir={tmp_path}/logs"])
    reader.join(timeout=100)
    os.close(master)
    text = b"".join(received).decode()
    shown = [line for line in screen_of(text) if line.startswith("step:")]
    assert [STEP_LINE.fullmatch(line)["step"] for line in shown] == ["4", "8", "12"]
    assert all("val_loss" in line for line in shown)
    sent = re.findall(r"step:(\d+)/12 train_loss", text)
    assert sent == [str(step) for step in range(1, 13)]
    log = (folder / "log.txt").read_text()
    assert "\x1b" not in log.split("=" * 120)[-1] and len([line for line in log.splitlines() if STEP_LINE.fullmatch(line)]) == 12


def test_a_shorter_line_leaves_nothing_of_the_one_it_replaces(finished, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    cfg = config_of(finished)
    run = train.Run(tmp_path / "run", train.param_specs(cfg), cfg, train.FRESH, {})
    for text, passing in (("a long line that passes", True), ("passes too", True), ("stays", False), ("also stays", False), ("passing", True)):
        run.line(text, passing)
    assert screen_of(terminal.getvalue()) == ["stays", "also stays", "passing"]
    assert (tmp_path / "run/log.txt").read_text().splitlines() == ["a long line that passes", "passes too", "stays", "also stays", "passing"]


def test_elsewhere_every_line_is_plain(finished):
    printed = finished.printed.split("\nsample: ")[0]
    assert "\r" not in printed and "\x1b" not in printed
    assert [m["step"] for m in map(STEP_LINE.fullmatch, finished.printed.splitlines()) if m] == [str(step) for step in range(1, 13)]


# ---- Another architecture, sampling ----

def bigram_specs(cfg):
    return {"table": train.Spec("V V", train.constant(0.0), "embed")}


def bigram_loss(weights, tokens_BT, target_BT, weight_BT, stage, cfg):
    logits_BTV = weights["table"][tokens_BT]
    hit_BTV = target_BT[..., None] == jnp.arange(logits_BTV.shape[-1])[None, None]
    return -jnp.sum(jnp.where(hit_BTV, jax.nn.log_softmax(logits_BTV), 0) * weight_BT[..., None])


def bigram_rules(cfg):
    return {"embed": train.Rule("adam", 0.3, beta1=0.5, beta2=0.9, eps=1e-8)}


def bigram_logits(weights, tokens_BT, cfg):
    return weights["table"][tokens_BT]


BIGRAM = train.Model(bigram_specs, bigram_loss, bigram_rules, bigram_logits)


def test_another_architecture_runs_through_the_same_loop(finished, tmp_path):
    flags = [*make_folder(tmp_path / "data"), f"--log_dir={tmp_path}/logs", "--micro_tokens=0"]
    folder, _ = trained(*flags, model=BIGRAM)
    rows = metrics_of(folder)
    assert rows[0]["train_loss"] == pytest.approx(math.log(384), abs=1e-4)
    assert rows[-1]["val_loss"] < rows[0]["train_loss"] - 0.5
    table, = tensors_of(folder / "ckpt/step-000012/params.safetensors").values()
    tokens = np.fromfile(tmp_path / "data/val_000000.bin", "<u2", offset=1024)[:501]
    logits = table.astype(np.float64)[tokens[:-1]]
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(500), tokens[1:]]
    assert rows[-1]["val_loss"] == pytest.approx(nats.mean(), abs=1e-5)
    assert set(tensors_of(folder / "ckpt/step-000012/opt.safetensors")) == {"table/m", "table/v"}
    shutil.rmtree(folder / "ckpt/step-000012")
    last = bytes_of(folder / "ckpt/step-000008")
    again, _ = trained(*flags, "--resume=auto", model=BIGRAM)
    assert again == folder and metrics_of(folder)[-1]["val_loss"] == rows[-1]["val_loss"]
    assert bytes_of(folder / "ckpt/step-000008") == last


def test_sampling_with_a_seed_is_deterministic_and_follows_the_model(finished):
    cfg = config_of(finished)
    certain = {"table": jnp.where(jnp.arange(384)[None] == (jnp.arange(384)[:, None] + 1) % 257, 50.0, 0.0)}
    assert train.sample(certain, [BOS, 7], 20, BIGRAM, cfg) == list(range(8, 28))
    vague = {"table": jax.random.normal(jax.random.key(5), (384, 384))}
    draw = lambda **changes: train.sample(vague, [BOS, 7], 30, BIGRAM, dataclasses.replace(cfg, **changes))
    assert draw() == draw() and len(draw()) == 30
    assert draw() != draw(seed=1)


@pytest.fixture(scope="module")
def learned(finished):
    """The run's weights as compute copies."""
    params = {"blocks": {}, "attention": {}}
    for name, array in tensors_of(finished.folder / "ckpt/step-000012/params.safetensors").items():
        stack, _, row = name.rpartition("/")
        (params[stack] if stack else params)[row] = jnp.array(array)
    return train.unstack(params)


@pytest.mark.parametrize("attention", ["xla", "band"])
def test_a_sample_without_heat_takes_the_likeliest_token_after_all_before_it(attention, finished, learned):
    """Also where the run's attention wants rows in 256s: what is sampled has any length."""
    cfg, ids = dataclasses.replace(config_of(finished), attention=attention), [BOS, 7, 9]
    found = train.sample(learned, ids, 8, train.Model(), cfg, temperature=1e-6)
    logits = jax.jit(lambda weights, ids: train.next_logits(weights, ids, dataclasses.replace(cfg, attention="xla")))(
        learned, jnp.array([ids + found]))[0]
    assert logits.shape == (11, 384) and found == jnp.argmax(logits, axis=1).tolist()[2:-1]


def test_a_token_is_drawn_as_often_as_its_logit_says(finished):
    odds = {"table": jnp.log(jnp.array([[0.1, 0.2, 0.7]]))}
    model = BIGRAM._replace(logits=lambda weights, tokens_BT, cfg: jnp.tile(weights["table"][:, None], (1, tokens_BT.shape[1], 1)))
    for temperature, wanted in ((1.0, [0.1, 0.2, 0.7]), (0.5, [0.01 / 0.54, 0.04 / 0.54, 0.49 / 0.54])):
        drawn = train.sample(odds, [0], 400, model, config_of(finished), temperature)
        assert np.abs(np.bincount(drawn, minlength=3) / 400 - wanted).max() < 0.08


def test_matrices_that_fill_whole_devices_in_float32_compile():
    """XLA refused slices of a batch that were whole members of it in unlike layouts, on a CPU of two devices."""
    cfg, mesh = train.Config(compute_dtype="float32"), train.make_mesh(jax.devices()[:2])
    spread = jax.shard_map(lambda up, down: train.orthogonalize_spread([up, down], [-1, -2], 2, cfg), mesh=mesh,
                           in_specs=(train.P(None, None, "data"), train.P(None, "data")),
                           out_specs=[train.P(None, None, "data"), train.P(None, "data")], check_vma=False)
    up = np.random.default_rng(0).normal(size=(2, 16, 32)).astype(np.float32)
    got = jax.jit(spread)(up, up.swapaxes(1, 2))
    np.testing.assert_allclose(got[0], np.swapaxes(got[1], 1, 2), atol=1e-5)


def test_the_compiler_options_of_the_platform_are_among_the_versions_that_the_log_states(monkeypatch):
    assert train.COMPILER_OPTIONS["tpu"] and not set(train.COMPILER_OPTIONS["tpu"]) & set(train.versions())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert train.COMPILER_OPTIONS["tpu"].items() <= train.versions().items()


@pytest.mark.parametrize("asked", [0, 1])
def test_deterministic_reaches_the_compiler_which_knows_the_option(asked, finished, tmp_path, no_samples, monkeypatch):
    """On a CPU the option changes nothing, but a compiler that did not know it would refuse it."""
    heard, compile_ = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, compiler_options=None: heard.append(compiler_options) or compile_(
        self, compiler_options=compiler_options))
    monkeypatch.setattr(train, "compile_all", REAL_COMPILE_ALL)
    folder, _ = trained(*finished.data, f"--log_dir={tmp_path}/logs", f"--deterministic={asked}")
    assert heard == [{"xla_gpu_deterministic_ops": True} if asked else {}] * 4  # init, two stages, eval
    assert bytes_of(folder / "ckpt/step-000012") == bytes_of(finished.folder / "ckpt/step-000012")


def test_a_warning_that_nobody_can_read_stops_no_training(finished, tmp_path, monkeypatch):
    run = train.Run(tmp_path / "run", train.param_specs(config_of(finished)), config_of(finished), train.FRESH, {})
    full = io.StringIO()
    full.flush = lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    monkeypatch.setattr(sys, "stderr", full)
    run.warn("log.txt", "log.txt could not be written", "", "a")
    assert "log.txt" in run.unwritten


def full_disk():
    stream = io.StringIO()
    def write(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    stream.write = write
    return stream


def closed_stream():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("console", [lambda: None, closed_stream, lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), full_disk],
                         ids=["none", "closed", "ascii", "full"])
def test_a_console_that_cannot_show_a_line_stops_no_training(console, finished, tmp_path, monkeypatch):
    cfg = config_of(finished)
    run = train.Run(tmp_path / "run", train.param_specs(cfg), cfg, train.FRESH, {})
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console())
        for passing in (False, True):
            run.line("sample: \ufffd", passing)
        train.say("speedrun-jax")
    assert (tmp_path / "run/log.txt").read_text(encoding="utf-8") == "sample: \ufffd\n" * 2


def test_all_that_is_printed_goes_through_say():
    calls = [node for node in ast.walk(ast.parse(Path(train.__file__).read_text())) if isinstance(node, ast.Call)
             and getattr(node.func, "id", "") == "print"]
    assert len(calls) == 1


def test_what_a_model_writes_does_not_reach_the_terminal_as_control_characters(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sample", lambda *_: [*b"\x1b[2J\n\ta", 255, 256])
    folder, printed = trained(*finished.data, f"--log_dir={tmp_path}/logs")
    for text in ((folder / "log.txt").read_text(encoding="utf-8"), printed):
        assert "sample: def main(?[2J\n\ta\ufffd\n" in text and "\x1b" not in text.split("=" * 120)[-1]
