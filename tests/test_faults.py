"""Damaged checkpoints, losses, memory and disks that give way: each is one sentence, an exit code.

What was good before still is. In one process, with a model of one table.
"""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from shards import documents, make_folder
from victim import BIGRAM, EVERY, SMALL, STEPS, metrics_of, weights_of

import train

ONE_STAGE = train.replace(SMALL, stages=SMALL.stages[1:])
MODEL = BIGRAM._replace(presets={"demo": ONE_STAGE})
FILES = ("params.safetensors", "opt.safetensors", "manifest.json")
LAST, BEFORE = f"ckpt/step-{STEPS:06d}", f"ckpt/step-{STEPS - EVERY:06d}"


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Programs are compiled once, without optimizing."""
    made, real = [], train.compile_all

    def remembered(*arguments):
        if not made:
            made.append(real(*arguments))
        programs, notes = made[0]
        return dict(programs), notes

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
        code = train.command(lambda: train.main([f"--log_dir={logs}", *flags], MODEL))
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
    cfg = train.parse_flags([f"--log_dir={run.parent}", "--resume=auto"], "demo", MODEL.presets)
    manifest = json.loads((run / LAST / "manifest.json").read_text())
    for name in ("train_files", "val_files", "vocab_size", "bos_id", "attention"):
        cfg = train.replace(cfg, **{name: manifest["config"][name]})
    return run, cfg, manifest["data"]


def state_like(cfg):
    """The shapes of the run's State, placed on a device."""
    return jax.eval_shape(train.make_init(MODEL, train.make_mesh(jax.devices()[:1]), cfg))


def steps_of(run):
    """Of the checkpoints; fails for what is half written."""
    return sorted(int(path.name[5:]) for path in (run / "ckpt").iterdir())


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- Damaged checkpoints ----


def damages(path):
    """(what, the file's bytes or None) in turn; then it is whole again."""
    good, draw = path.read_bytes(), random.Random(path.name)
    for size in (0, 8, len(good) // 2, len(good) - 1):
        yield f"{size} bytes", good[:size]
    for bit in [draw.randrange(8 * len(good)) for _ in range(8 * path.name.endswith("tensors"))]:
        flipped = bytes([good[bit // 8] ^ 1 << bit % 8])
        yield f"bit {bit}", good[: bit // 8] + flipped + good[bit // 8 + 1 :]
    yield "text", b"<!DOCTYPE html>"
    yield "a list", b"[[]]"
    yield "gone", None
    path.write_bytes(good)


def test_a_damaged_checkpoint_is_passed_over_with_its_name_for_the_one_before(run, capsys):
    folder, cfg, data = run
    for path in (folder / LAST / name for name in FILES):
        for what, blob in damages(path):
            path.write_bytes(blob) if blob is not None else path.unlink()
            with pytest.raises(train.UsageError, match="--resume="):  # a name has no substitute
                train.find_checkpoint(train.replace(cfg, resume=str(folder / LAST)), data)
            capsys.readouterr()
            found, manifest = train.find_checkpoint(cfg, data)
            assert (found, manifest["step"]) == (folder / BEFORE, STEPS - EVERY), (path, what)
            (said,) = capsys.readouterr().out.splitlines()
            assert "--resume=auto" in said and str(folder / LAST) in said, (path, what)
    assert train.find_checkpoint(cfg, data)[0] == folder / LAST


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


def test_where_none_is_whole_or_all_are_older_auto_starts_at_0_and_a_named_run_ends_with_2(
    run, data
):
    folder, _, _ = run
    (folder / LAST / "opt.safetensors").write_bytes(b"")
    older = folder / BEFORE / "manifest.json"
    older.write_text(older.read_text().replace('"format"', '"was"'))
    named = end_of(folder.parent, *data, f"--resume={folder}")
    assert (named.code, named.runs) == (2, [folder]) and str(folder) in named.error
    assert "older train.py" in named.error and "e520f26" in named.error
    auto = end_of(folder.parent, *data, "--resume=auto")
    assert auto.code == 0 and len(auto.runs) == 2 and "step 0" in auto.out


# ---- What is not ours, and who owns a run ----


def everything_in(folder):
    """{path: bytes, or where a link leads}, hidden files too."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root, name)
            if path.is_symlink():
                found[path] = os.readlink(path)
            elif path.is_file():
                found[path] = path.read_bytes()
    return found


def test_what_a_user_puts_beside_or_into_checkpoints_stays(run, tmp_path, data):
    folder, cfg, _ = run
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/params.safetensors").write_text("mine")
    before = folder / BEFORE
    shutil.copytree(before, folder / "ckpt/step-000001")
    for name in ("step-00001", "step-000001.bak", "step-000002 copy", "step-best", ".writing.old"):
        shutil.copytree(before, folder / "ckpt" / name)
    (folder / "ckpt/step-000003").symlink_to(tmp_path / "mine")
    (folder / "ckpt/step-000002").write_text("a file")
    (before / "notes.2026.txt").write_text("the best one")
    (folder.parent / "step-000001").mkdir()
    (folder.parent / "step-000001/manifest.json").write_text("{}")
    mine = everything_in(tmp_path)
    for path in list(mine):
        if path.parent == folder / "ckpt/step-000001" or path.parent == folder:
            del mine[path]  # a checkpoint of ours that is too old, and the log
    state = train.load_checkpoint(folder / LAST, STEPS, state_like(cfg))
    train.save_checkpoint(folder, state._replace(step=np.int32(STEPS + 1)), {}, {"data": ""}, cfg)
    found = everything_in(tmp_path)
    assert {path: found.get(path) for path in mine} == mine
    assert not (folder / "ckpt/step-000001").exists()


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(run):
    folder, cfg, data = run
    for name in ("step-999999", "step-1000000", "step-0000001.bak"):
        shutil.copytree(folder / LAST, folder / "ckpt" / name)
    assert train.find_checkpoint(cfg, data)[0] == folder / "ckpt/step-1000000"


def test_a_run_has_one_owner_and_is_free_again_when_that_is_gone(run, data, monkeypatch):
    folder, *_ = run
    shutil.rmtree(folder / LAST)
    before = everything_in(folder)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, folder], stdout=subprocess.PIPE, cwd=train.ROOT, text=True
    )
    assert owner.stdout.readline() == "has it\n"
    with monkeypatch.context() as patch:
        for name in ("fit_memory", "compile_all"):
            patch.setattr(train, name, None)  # it is told before anything is compiled
        end = end_of(folder.parent, *data, "--resume=auto")
    assert end.code == 2 and str(folder) in end.error and everything_in(folder) == before
    owner.kill()
    owner.wait()
    assert end_of(folder.parent, *data, "--resume=auto").code == 0


OWNER = """
import sys, time, pathlib, train
with train.owning(pathlib.Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(600)
"""


# ---- Which checkpoint ----


def test_only_a_difference_in_where_and_how_often_to_write_may_be_resumed(run, capsys):
    folder, cfg, data = run
    for name in {*train.Config.__annotations__} - {"resume"}:
        value = getattr(cfg, name)
        changed = value + "9" if isinstance(value, str) else (value, 5)
        if name == "stages":
            changed = (train.replace(value[0], lr=2.0), *value[1:])
        other = train.replace(cfg, **{name: changed})
        if name in train.MAY_DIFFER:
            other = train.replace(other, resume=str(folder))  # wherever log_dir is
            assert train.find_checkpoint(other, data)[0] == folder / LAST, name
        else:
            assert train.find_checkpoint(other, data) == (None, {}), name
            assert f"saved with {name}=" in capsys.readouterr().out


def test_a_run_goes_on_with_the_attention_and_micro_steps_of_another_machine(run, capsys):
    folder, cfg, data = run
    other = train.replace(cfg, attention="cudnn", micro_tokens=32768)
    assert train.find_checkpoint(other, data)[0] == folder / LAST
    said = f"{folder / LAST} was trained with --attention=xla, now it is cudnn"
    assert capsys.readouterr().out == said + "\n"


def test_a_run_on_other_shards_is_not_gone_on_with(run, tmp_path):
    """What counts is what the shards hold, whatever they are called."""
    folder, _, _ = run
    flags = [*make_folder(tmp_path / "moved"), f"--resume={folder}"]
    assert end_of(folder.parent, *flags).code == 0
    make_folder(tmp_path / "moved", train=(documents(1, 90), documents(4, 70)))
    end = end_of(folder.parent, *flags)
    assert (end.code, end.runs) == (2, [folder]) and "other shards" in end.error


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
    for resume in ("auto", folder / LAST):
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
    (folder / LAST / "params.safetensors").write_bytes(evil)
    edit(folder / LAST, sha256={n: train.file_sha256(folder / LAST / n) for n in FILES[:2]})
    end = end_of(folder.parent, *data, f"--resume={folder / LAST}")
    assert end.code == 2 and "header" in end.error.lower()
    assert not (tmp_path / "executed").exists()
    pickle.loads(evil).close()
    assert (tmp_path / "executed").exists()  # it is what this test thinks it is


def test_tensors_of_another_weight_table_are_refused_with_their_name(whole):
    shape = jax.ShapeDtypeStruct((384, 24), np.float32)
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
        return programs | {name: lambda *operands: change(*program(*operands))}, notes

    patch.setattr(train, "compile_all", changed)


def loss_is(bad, at):
    return lambda state, loss: (state, float(bad) if int(state.step) == at else loss)


def weight_is_nan(state, loss):  # at step 6, with a loss that does not show it
    table = np.array(state.params["table"])
    table[3, 4] = np.nan if int(state.step) == 6 else table[3, 4]
    table = jax.device_put(table, state.params["table"].sharding)
    return state._replace(params={"table": table}), loss


NOT_FINITE = [  # program, what it gives, what is said, which checkpoints stand
    ("train_0", loss_is("-inf", 5), "step 5 is -inf", [3]),
    ("train_0", loss_is("nan", 12), "step 12 is nan", [6, 9]),
    ("eval", lambda nats, count: (float("nan"), count), "the validation loss is nan", [6, 9]),
    ("train_0", weight_is_nan, "weights are not finite", [3]),
]
SAID = [row[2] for row in NOT_FINITE]


@pytest.mark.parametrize("program,change,said,saved", NOT_FINITE, ids=SAID)
def test_a_loss_or_weights_that_are_not_finite_end_with_5_and_what_was_saved_stands(
    program, change, said, saved, data, tmp_path, monkeypatch, whole
):
    with_program(monkeypatch, program, change)
    end = end_of(tmp_path / "logs", *data, "--log_every=5", "--val_every=0")
    assert end.code == 5 and said in end.error and steps_of(end.run) == saved
    assert ("--muon_lr" in end.error) == (change != weight_is_nan)
    assert 9 not in saved or weights_of(end.run, 9) == weights_of(whole.run, 9)


@pytest.mark.parametrize("where", ["compile", "eval"])
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


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_ends_with_2_and_the_same_command_goes_on_once_there_is_room(
    what, data, tmp_path, monkeypatch, whole
):
    def fills_up(owner, name, when):
        real = getattr(owner, name)

        def refused(*arguments):
            if when(*arguments):
                raise OSError(28, "No space left on device")
            return real(*arguments)

        patch.setattr(owner, name, refused)

    def third_save(tensors, path):
        return "table/m" in tensors and len(list(path.parent.parent.glob("step-*"))) == 2

    with monkeypatch.context() as patch:
        if what == "checkpoint":
            fills_up(train.safetensors.numpy, "save_file", third_save)
        else:
            fills_up(train.Log, "line", lambda log, text: text.startswith("step:8/"))
        end = end_of(tmp_path / "logs", *data)
    assert end.code == 2 and "No space left" in end.error
    assert (end.run / "ckpt/step-000006/manifest.json").exists()
    again = end_of(tmp_path / "logs", *data, "--resume=auto")
    assert again.code == 0 and again.runs == [end.run] and steps_of(end.run) == [9, 12]
    assert weights_of(end.run) == weights_of(whole.run)
