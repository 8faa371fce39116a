"""Damaged checkpoints, losses, memory and disks that give way: each is one sentence, an exit code.

What was good before still is. In one process, with a model of one table.
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from shards import documents, make_folder
from victim import BIGRAM, EVERY, STEPS, metrics_of, weights_of

import train

FILES = ("params.safetensors", "opt.safetensors", "manifest.json")
LAST, BEFORE = f"ckpt/step-{STEPS:06d}", f"ckpt/step-{STEPS - EVERY:06d}"


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Programs are compiled once, without optimizing."""
    programs, real = {}, train.compile_all

    def remembered(model, mesh, cfg):
        if not programs:
            programs.update(zip(("them", "notes"), real(model, mesh, cfg), strict=True))
        return dict(programs["them"]), programs["notes"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_all", remembered)
        patch.setattr(os, "sync", lambda: None)  # a disk that others keep busy may take seconds
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


def end_of(logs, *flags):
    """A run by train.command: its exit code, what it printed, its folders, the one sentence."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.command(lambda: train.main([f"--log_dir={logs}", *flags], BIGRAM))
    error = err.getvalue()
    assert len(error.splitlines()) == bool(code) and error.startswith("error: " * bool(code))
    runs = sorted(logs.glob("*"))
    run = runs[-1] if runs else None
    return types.SimpleNamespace(code=code, out=out.getvalue(), error=error, runs=runs, run=run)


@pytest.fixture(scope="module")
def whole(data, compiled_once, tmp_path_factory):
    """The run that nothing happened to."""
    end = end_of(tmp_path_factory.mktemp("whole") / "logs", *data)
    assert end.code == 0 and steps_of(end.run) == [STEPS - EVERY, STEPS]
    return end


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it: (run folder, its Config with --resume=auto, its data's hash)."""
    run = Path(shutil.copytree(whole.run, tmp_path / "logs" / whole.run.name))
    cfg = train.parse_flags([f"--log_dir={run.parent}", "--resume=auto"], "demo", BIGRAM.presets)
    manifest = json.loads((run / LAST / "manifest.json").read_text())
    for name in ("train_files", "val_files", "vocab_size", "bos_id", "attention"):
        cfg = train.replace(cfg, **{name: manifest["config"][name]})
    return run, cfg, manifest["data"]


def steps_of(run):
    """Of the checkpoints; fails for what is half written."""
    return sorted(int(path.name[5:]) for path in (run / "ckpt").iterdir())


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- Damaged checkpoints ----


def damages(path):
    """(what, the file's bytes or None) in turn."""
    good, draw = path.read_bytes(), random.Random(path.name)
    for size in (0, 8, len(good) // 2, len(good) - 1):
        yield f"{size} bytes", good[:size]
    for bit in [draw.randrange(8 * len(good)) for _ in range(16 * path.name.endswith("tensors"))]:
        flipped = bytes([good[bit // 8] ^ 1 << bit % 8])
        yield f"bit {bit}", good[: bit // 8] + flipped + good[bit // 8 + 1 :]
    yield "text", b"<!DOCTYPE html>"
    yield "a list", b"[[]]"
    yield "gone", None


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_with_its_name_for_the_one_before(name, run, capsys):
    folder, cfg, data = run
    path = folder / LAST / name
    for what, blob in damages(path):
        path.write_bytes(blob) if blob is not None else path.unlink()
        found, manifest = train.find_checkpoint(cfg, data)
        assert (found, manifest["step"]) == (folder / BEFORE, STEPS - EVERY), what
        (said,) = capsys.readouterr().out.splitlines()
        assert "--resume=auto" in said and str(folder / LAST) in said, what
    with pytest.raises(train.UsageError, match="--resume="):  # what is named has no substitute
        train.find_checkpoint(train.replace(cfg, resume=str(folder / LAST)), data)


def test_where_none_is_whole_auto_starts_at_0_and_a_named_run_ends_with_2(run, data):
    folder, _, _ = run
    for path in folder.glob("ckpt/*/opt.safetensors"):
        path.write_bytes(b"")
    named = end_of(folder.parent, *data, f"--resume={folder}")
    assert (named.code, named.runs) == (2, [folder]) and str(folder) in named.error
    auto = end_of(folder.parent, *data, "--resume=auto")
    assert auto.code == 0 and len(auto.runs) == 2 and "step 0" in auto.out


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_with_the_same_bits(run, data, whole):
    folder, _, _ = run
    os.truncate(folder / LAST / "params.safetensors", 1000)
    (folder / "ckpt/.writing").mkdir()  # a process died while it wrote
    (folder / "ckpt/.writing/params.safetensors").write_bytes(b"half")
    end = end_of(folder.parent, *data, "--resume=auto", "--val_every=5", "--save_every=0")
    assert (end.code, end.runs) == (0, [folder])
    assert f"resumed: {folder / BEFORE} at step {STEPS - EVERY}" in end.out
    assert steps_of(folder) == [STEPS - EVERY, STEPS]
    assert weights_of(folder) == weights_of(whole.run)
    assert metrics_of(folder)[-1]["val_loss"] == metrics_of(whole.run)[-1]["val_loss"]


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_checkpoint_of_an_older_format_is_refused_and_the_commit_named_that_reads_it(
    resume, run, data
):
    folder, _, _ = run
    for path in (folder / "ckpt").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["format"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    end = end_of(folder.parent, *data, f"--resume={folder if resume == 'path' else 'auto'}")
    assert "e79511b" in end.out and end.code == (2 if resume == "path" else 0)
    assert len(end.runs) == (1 if resume == "path" else 2)


# ---- Which checkpoint ----


@pytest.mark.parametrize("name", sorted({*train.Config.__annotations__} - {"resume"}))
def test_only_a_difference_in_where_and_how_often_to_write_may_be_resumed(name, run, capsys):
    folder, cfg, data = run
    value = getattr(cfg, name)
    changed = value + "9" if isinstance(value, str) else (value, 5)
    if name == "stages":
        changed = (train.replace(value[0], lr=2.0), *value[1:])
    other = train.replace(cfg, **{name: changed})
    if name in train.MAY_DIFFER:
        other = train.replace(other, resume=str(folder))  # wherever log_dir is
        assert train.find_checkpoint(other, data)[0] == folder / LAST
    else:
        assert train.find_checkpoint(other, data) == (None, {})
        assert f"saved with {name}=" in capsys.readouterr().out


def test_a_run_on_other_shards_is_not_gone_on_with(run, data, tmp_path):
    folder, _, _ = run
    for path in (folder / "ckpt").iterdir():
        edit(path, data="0" * 64)
    end = end_of(folder.parent, *data, f"--resume={folder}")
    assert (end.code, end.runs) == (2, [folder]) and "other shards" in end.out
    one, other = (make_folder(tmp_path / "data", train=(documents(seed, 99),)) for seed in (1, 4))
    assert one == other  # the same names
    assert end_of(tmp_path / "new", *other).code == 0
    make_folder(tmp_path / "data", train=(documents(1, 99),))
    again = end_of(tmp_path / "new", *one, "--resume=auto")
    assert again.code == 0 and len(again.runs) == 2 and "step 0" in again.out


def test_resume_takes_a_run_or_one_of_its_checkpoints_and_auto_the_newest_run_of_the_config(
    run, capsys
):
    folder, cfg, data = run
    for path, name in ((folder, LAST), (folder / BEFORE, BEFORE), (folder / LAST, LAST)):
        assert train.find_checkpoint(train.replace(cfg, resume=str(path)), data)[0] == folder / name
    for path in (folder.parent, folder / "ckpt/step-000001", folder / "log.txt"):
        with pytest.raises(train.UsageError, match=f"--resume={path}"):
            train.find_checkpoint(train.replace(cfg, resume=str(path)), data)
    newer = shutil.copytree(folder, folder.with_name("20991231T000000Z-000000"))
    other = shutil.copytree(folder, folder.with_name("20991231T000001Z-000000"))
    for path in (other / "ckpt").iterdir():
        edit(path, config=train.as_json(train.replace(cfg, seed=1)))
    folder.with_name("zz.txt").write_text("a file")
    (folder.parent / "zzz/ckpt/step-000099").mkdir(parents=True)
    assert train.find_checkpoint(cfg, data)[0] == newer / LAST
    nowhere = train.replace(cfg, log_dir=str(folder / "none"))
    assert train.find_checkpoint(nowhere, data) == (None, {})
    assert "step 0" in capsys.readouterr().out.splitlines()[-1]
    assert train.find_checkpoint(train.replace(cfg, resume=""), data) == (None, {})
    assert capsys.readouterr().out == ""


def test_a_finished_run_is_not_resumed(run, data):
    folder, _, _ = run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for resume in ("auto", folder, folder / LAST):
        end = end_of(folder.parent, *data, f"--resume={resume}")
        assert (end.code, end.runs) == (0, [folder]) and "nothing is left to train" in end.out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ---- Files of others ----


class Opens:  # pickle calls open(path, "w") when it is read
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_with_the_right_hash_is_refused_and_not_executed(run, data, tmp_path):
    folder, _, _ = run
    evil = pickle.dumps(Opens(f"{tmp_path}/executed"))
    shutil.rmtree(folder / LAST)
    (folder / BEFORE / "params.safetensors").write_bytes(evil)
    hashes = {name: train.file_sha256(folder / BEFORE / name) for name in FILES[:2]}
    edit(folder / BEFORE, sha256=hashes)
    with pytest.raises(Exception) as caught:
        train.main([f"--log_dir={folder.parent}", *data, f"--resume={folder}"], BIGRAM)
    assert "header" in str(caught.value).lower() and not (tmp_path / "executed").exists()
    pickle.loads(evil).close()
    assert (tmp_path / "executed").exists()  # it is what this test thinks it is


def test_tensors_of_another_weight_table_are_refused_with_their_name(whole):
    shape = jax.ShapeDtypeStruct((384, 24), jnp.float32)
    for like in ({"table": shape}, {}, {"other": shape}):
        with pytest.raises(train.UsageError, match=r"params.safetensors.*(table|other)"):
            train.load_tensors(whole.run / LAST / "params.safetensors", like)


# ---- Losses, memory, disks ----


def with_program(patch, name, change):
    """Let `change` see the results of a compiled program."""
    compile_all = train.compile_all

    def changed(*arguments):
        programs, notes = compile_all(*arguments)
        program = programs[name]
        return programs | {name: lambda *operands: change(program(*operands))}, notes

    patch.setattr(train, "compile_all", changed)


@pytest.mark.parametrize("step,log_every,bad", [(2, 1, "nan"), (5, 4, "-inf"), (12, 100, "inf")])
def test_a_loss_that_is_not_finite_ends_with_5_and_its_step(
    step, log_every, bad, data, tmp_path, monkeypatch, whole
):
    name = "train_0" if step <= STEPS // 2 else "train_1"
    with_program(
        monkeypatch,
        name,
        lambda result: (result[0], jnp.where(result[0].step == step, float(bad), result[1])),
    )
    end = end_of(tmp_path / "logs", *data, f"--log_every={log_every}", "--val_every=0")
    assert end.code == 5 and f"step {step} is {bad}" in end.error and "--muon_lr" in end.error
    saved = [n for n in range(EVERY, step, EVERY)][-2:]
    assert [int(path.name[5:]) for path in sorted(end.run.glob("ckpt/*"))] == saved
    assert 9 not in saved or weights_of(end.run, 9) == weights_of(whole.run, 9)


def test_a_validation_loss_that_is_not_finite_ends_with_5(data, tmp_path, monkeypatch):
    with_program(monkeypatch, "eval", lambda result: (result[0] * jnp.nan, result[1]))
    end = end_of(tmp_path / "logs", *data)
    assert end.code == 5 and "validation" in end.error


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    """With a loss that does not show it: the step after would."""

    def break_one(result):
        state, loss = result
        table = state.params["table"]
        table = table.at[3, 4].set(jnp.where(state.step == 6, jnp.nan, table[3, 4]))
        return state._replace(params={"table": table}), loss

    with_program(monkeypatch, "train_0", break_one)
    end = end_of(tmp_path / "logs", *data, "--val_every=0")
    assert end.code == 5 and "weights" in end.error and steps_of(end.run) == [3]


@pytest.mark.parametrize("where", ["compile", "train_1", "eval"])
def test_out_of_memory_is_one_sentence_that_says_what_to_halve(where, data, tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 40G of 31G\nand more")

    if where == "compile":
        monkeypatch.setattr(train, "compile_all", exhausted)
    else:
        with_program(monkeypatch, where, exhausted)
    end = end_of(tmp_path / "logs", *data, "--micro_tokens=28", "--head_block=77")
    assert end.code == 2 and "out of memory" in end.error
    assert "--micro_tokens=28" in end.error and "--head_block=77" in end.error


def test_another_error_of_the_runtime_keeps_its_traceback(data, tmp_path, monkeypatch):
    def fails(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with_program(monkeypatch, "train_0", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        end_of(tmp_path / "logs", *data)


def refuses(owner, name, when, patch):
    """Calls of owner.name for which when(*arguments) meet a full disk."""
    real = getattr(owner, name)

    def refused(*arguments):
        if when(*arguments):
            raise OSError(28, "No space left on device")
        return real(*arguments)

    patch.setattr(owner, name, refused)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_ends_with_2_and_the_same_command_goes_on_once_there_is_room(
    what, data, tmp_path, monkeypatch, whole
):
    with monkeypatch.context() as patch:
        if what == "checkpoint":
            save_file = train.safetensors.numpy, "save_file"
            refuses(*save_file, lambda tensors, _: "table/m" in tensors and full(tmp_path), patch)
        else:
            refuses(train.Log, "line", lambda log, text: text.startswith("step:8/"), patch)
        end = end_of(tmp_path / "logs", *data)
    assert end.code == 2 and "No space left" in end.error
    assert (end.run / "ckpt/step-000006/manifest.json").exists()
    again = end_of(tmp_path / "logs", *data, "--resume=auto")
    assert again.code == 0 and again.runs == [end.run] and steps_of(end.run) == [9, 12]
    assert weights_of(end.run) == weights_of(whole.run)


def full(folder):
    """Once two checkpoints lie there."""
    return len(list(folder.glob("logs/*/ckpt/step-*"))) == 2


def test_an_error_of_the_thread_that_reads_ahead_ends_the_run(data, tmp_path, monkeypatch):
    calls = []

    def fifth(rows, stage, *_):
        calls.extend([1] if rows else [])
        return len(calls) == 5

    refuses(train, "to_devices", fifth, monkeypatch)
    end = end_of(tmp_path / "logs", *data)
    assert end.code == 2 and "No space left" in end.error


# ---- Flags ----

JUNK = [
    "x",
    "",
    "1.5",
    "-1",
    "nan",
    "1e999",
    "none",
    "true",
    "1,2",
    "((0,1),)",
    "[1]",
    ":",
    "9" * 99,
]


def test_whatever_a_flag_is_set_to_it_is_accepted_or_refused_with_its_name():
    refused = 0
    for flag in train.flag_names(train.Config):
        for text in JUNK:
            try:
                train.parse_flags([f"--{flag}={text}"], "demo")
            except train.UsageError as error:
                refused += 1
                assert re.match(r"--[\w.]+=", str(error)), (flag, text, error)
    assert refused > 300
