"""Damaged and hostile files, full disks, losses and memory that give way, flags that cannot be: each is one sentence and an
exit code, and what was good before still is. A model of one tiny block on one device, so that a run takes a fraction of a
second once its programs are there."""
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import string
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import train
from shards import make_folder, shard_bytes

REPO = Path(train.__file__).resolve().parent
SMALL = """--preset=tiny --steps=8 --num_layers=1 --model_dim=8 --num_heads=1 --head_dim=4 --mlp_dim=8 --skips= --late_inputs= --backout=
    --offset_layers= --long_layers= --stage_ends=1 --window_short=16 --window_long=0 --stage_lr=1 --batch_tokens=64 --seq_len=32 --mtp=
    --smear=0 --gate_dims=0 --tied_stages=0 --val_tokens=64 --log_every=1 --val_every=4 --save_every=2 --shuffle=0""".split()
FILES = ("params.safetensors", "opt.safetensors", "manifest.json")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """One device; programs are compiled once, without optimizing."""
    programs, mesh, compile_all = {}, train.make_mesh, train.compile_all

    def remembered(model, mesh, cfg):
        key = model, mesh.size, dataclasses.replace(cfg, **dict.fromkeys(train.MAY_DIFFER | {"train_files", "val_files"}))
        if key not in programs:
            programs[key] = compile_all(model, mesh, cfg)
        return dict(programs[key][0]), programs[key][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_all", remembered)
        patch.setattr(train, "make_mesh", lambda: mesh(jax.devices()[:1]))
        patch.setattr(os, "fsync", lambda _: None)  # a disk that others keep busy may take seconds
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


class Ended:
    """A run by `train.command`: its exit code, what it printed, and the run folders there are."""
    def __init__(self, log_dir, *flags):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            self.code = train.command(lambda: train.main([*SMALL, f"--log_dir={log_dir}", *flags])) or 0
        self.out, self.err, self.runs = out.getvalue(), err.getvalue(), sorted(log_dir.glob("*")) if log_dir.is_dir() else []
        self.folder = self.runs[-1] if self.runs else None
        self.warnings = [line for line in self.err.splitlines() if line.startswith("warning: ")]
        self.error = "".join(line for line in self.err.splitlines() if line.startswith("error: "))
        assert "Traceback" not in self.out + self.err
        assert len(self.err.splitlines()) == len(self.warnings) + bool(self.code), self.err


@pytest.fixture(scope="module")
def whole(data, compiled_once, tmp_path_factory):
    """The run that nothing happened to."""
    ended = Ended(tmp_path_factory.mktemp("whole") / "logs", *data)
    assert (ended.code, ended.err, steps_of(ended)) == (0, "", [6, 8])
    return ended


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it: (run folder, config with --resume=auto)."""
    folder = Path(shutil.copytree(whole.folder, tmp_path / "logs" / whole.folder.name))
    return folder, dataclasses.replace(config(whole), log_dir=str(tmp_path / "logs"), resume="auto")


@pytest.fixture
def no_hang():
    """What waits for ever is interrupted."""
    def hung(*_):
        raise AssertionError("hung")
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def config(ended):
    return train.Config(**json.loads((ended.folder / "config.json").read_text())["config"])


def steps_of(ended):
    return sorted(int(path.name[5:]) for path in (ended.folder / "ckpt").iterdir())  # fails for what is half written


def weights_of(folder, step=8):
    return [(folder / f"ckpt/step-{step:06d}" / name).read_bytes() for name in FILES[:2]]


def lines_of(ended):
    """The steps that log.txt and metrics.jsonl tell of; log.txt's seal must be right where there is one."""
    log = (ended.folder / "log.txt").read_bytes()
    above, _, seal = log.rstrip(b"\n").rpartition(b"\n")
    assert not seal.startswith(b"sha256:") or seal[7:].decode() == hashlib.sha256(above + b"\n").hexdigest()
    assert log.endswith(b"\n")
    rows = [json.loads(line) for line in (ended.folder / "metrics.jsonl").read_text().splitlines()]
    logged = [int(step) for step in re.findall(rb"^step:(\d+)/8 train_loss:\d\.\d{4} .*eta:\d+s$", log, re.MULTILINE)]
    return logged, [row["step"] for row in rows if "stage" in row], seal.startswith(b"sha256:")


@contextlib.contextmanager
def files_of_at_most(size):
    """The kernel refuses to let a file grow past `size` bytes (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_limit(patch, owner, name, chosen, size=1000):
    """Calls of owner.name that are `chosen` meet a full disk. Returns the list of those."""
    real, met = getattr(owner, name), []

    def limited(*arguments):
        if not chosen(*arguments):
            return real(*arguments)
        met.append(arguments)
        with files_of_at_most(size):
            return real(*arguments)
    patch.setattr(owner, name, limited)
    return met


def with_program(patch, key, change):
    """Let `change` see the results of a compiled program."""
    compile_all = train.compile_all

    def changed(*arguments):
        programs, notes = compile_all(*arguments)
        return programs | {key: lambda *operands: change(*programs[key](*operands))}, notes
    patch.setattr(train, "compile_all", changed)


# ---- Damaged checkpoints ----

def sealed(manifest):
    """The manifest's text with the hash of itself that a writer of our format gives it."""
    manifest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    body = json.dumps(manifest, indent=1)
    return json.dumps(manifest | {"manifest_sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def reseal(folder, **changes):
    """Give a checkpoint a manifest that fits its files and itself, and says this besides."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[:2]}
    (folder / "manifest.json").write_text(sealed(manifest | changes))


def flips(blob, name, count=64):
    draw = random.Random(name)
    for _ in range(count):
        place = draw.randrange(8 * len(blob))
        yield f"bit {place}", blob[:place // 8] + bytes([blob[place // 8] ^ 1 << place % 8]) + blob[place // 8 + 1:]


def cuts(blob):
    return [(f"{size} bytes", blob[:size]) for size in (0, 1, 7, 8, len(blob) // 2, len(blob) - 1)]


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_flipped_bit_anywhere_is_found_and_the_checkpoint_before_is_taken(name, run, capsys):
    folder, cfg = run
    newest, before = folder / "ckpt/step-000008", folder / "ckpt/step-000006"
    good = (newest / name).read_bytes()
    for what, blob in [*flips(good, name), *cuts(good), ("deleted", None)]:
        (newest / name).write_bytes(blob) if blob is not None else (newest / name).unlink()
        found, manifest = train.find_checkpoint(cfg)
        assert (found, manifest["step"]) == (before, 6), what
        said, = capsys.readouterr().out.splitlines()
        assert said.startswith("--resume=auto: passing over ") and str(newest) in said and "; delete " in said, (what, said)
        assert name in said or name == "manifest.json", (what, said)
    with pytest.raises(train.CheckpointError, match=re.escape(str(newest))):  # one that is asked for by name has no substitute
        train.find_checkpoint(dataclasses.replace(cfg, resume=str(newest)))
    (newest / name).write_bytes(good)
    assert train.find_checkpoint(cfg)[0] == newest


def test_a_damaged_config_json_does_not_hide_a_whole_checkpoint(run):
    folder, cfg = run
    good = (folder / "config.json").read_bytes()
    for what, blob in [*flips(good, "config.json"), *cuts(good), ("nested", b"[" * 10 ** 5), ("seed", good.replace(b'"seed": 0', b'"seed": 1'))]:
        (folder / "config.json").write_bytes(blob)
        assert train.find_checkpoint(cfg)[0] == folder / "ckpt/step-000008", what


LAST_ROW = {"step": 8, "tokens": 1, "train_time_s": 1.0, "cpu_time_s": 1.0, "val_loss": 1.0}
WRONG_MANIFESTS = {  # the text, or what a manifest that fits its files and itself also says
    "not JSON": "step 8", "a word": '"step"', "a number": "8", "null": "null", "a list": "[[]]", "nested": "[" * 10 ** 5, "a digit": "9" * 10 ** 5,
    "two values": "{}{}", "no text": b"\xff\xfe", "large": {"more": "8" * (1 << 20)}, "empty object": "{}",
    "another step": {"step": 6}, "a step below": {"step": -8}, "a step as a list": {"step": [8]}, "an infinite step": {"step": math.inf},
    "no progress": {"progress": None}, "a row as a list": {"progress": {"seconds": [1, 1], "reached": None, "row": [1]}},
    "a row as a number": {"progress": {"seconds": [1, 1], "reached": None, "row": 5}},
    "a loss as a word": {"progress": {"seconds": [1, 1], "reached": None, "row": LAST_ROW | {"train_loss": "low"}}},
    "too many seconds": {"progress": {"seconds": [1, 1, 1], "reached": None, "row": LAST_ROW}},
    "seconds as a word": {"progress": {"seconds": "12", "reached": None, "row": {}, "more": 1}} | {"versions": 3},
    "versions as a list": {"versions": [1]}, "hashes as a list": {"sha256": []}, "no hashes": {"sha256": {}}, "a hash of another": {"sha256": {"log.txt": "0"}},
    "a hash as a number": {"sha256": dict.fromkeys(FILES[:2], 0)}, "other names": {"sha256": {"../../log.txt": "0", "/etc/passwd": "0"}}}


@pytest.mark.parametrize("kind", WRONG_MANIFESTS)
def test_a_manifest_of_other_contents_is_passed_over_in_one_line(kind, run, capsys, no_hang):
    folder, cfg = run
    newest, wrong = folder / "ckpt/step-000008", WRONG_MANIFESTS[kind]
    if isinstance(wrong, dict):
        reseal(newest, **wrong)
    else:
        (newest / "manifest.json").write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    assert train.find_checkpoint(cfg)[0] == folder / "ckpt/step-000006"
    said, = capsys.readouterr().out.splitlines()
    assert str(newest) in said and len(said) < 2000


def test_duplicate_names_in_a_manifest_are_no_way_around_its_hash(run):
    folder, cfg = run
    path = folder / "ckpt/step-000008/manifest.json"
    path.write_text(path.read_text().replace('"step": 8,', '"step": 8,\n "step": 8,', 1))
    assert train.find_checkpoint(cfg)[0] == folder / "ckpt/step-000006"


def test_empty_folders_and_half_written_ones_are_passed_over_and_the_latter_deleted(run, tmp_path, capsys):
    folder, cfg = run
    (folder / "ckpt/step-000010").mkdir()
    (folder / "ckpt/step-000012").write_text("a file of that name")
    other = shutil.copytree(folder, folder.with_name("other"))
    for path in (other / "ckpt").glob("step-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (other / "config.json").write_text((other / "config.json").read_text().replace('"seed": 0', '"seed": 1'))
    for home in (folder, other):
        for name in (".writing-step-000008", ".writing-step-000010"):
            (home / "ckpt" / name).mkdir()
            (home / "ckpt" / name / "params.safetensors").write_bytes(b"half")
    assert train.find_checkpoint(cfg)[0] == folder / "ckpt/step-000008"
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not list((folder / "ckpt").glob(".*")) and len(list((other / "ckpt").glob(".*"))) == 2  # another config may be writing


def test_where_no_checkpoint_verifies_a_run_ends_with_4_and_none_is_a_start_at_0(run, data):
    folder, _ = run
    for newest in (folder / "ckpt").iterdir():
        (newest / "opt.safetensors").unlink()
    ended = Ended(folder.parent, *data, "--resume=auto")
    assert (ended.code, ended.runs) == (4, [folder]) and "step-000006" in ended.error
    assert [line for line in ended.out.splitlines() if "passing over" in line][0].count("step-000008") >= 1
    shutil.rmtree(folder / "ckpt")
    ended = Ended(folder.parent, *data, "--resume=auto")
    assert (ended.code, len(ended.runs)) == (0, 2) and "starts at step 0" in ended.out


def test_a_run_goes_on_where_old_checkpoints_cannot_be_deleted(data, tmp_path, monkeypatch):
    rename = Path.rename
    def stuck(path, target):
        if path.name.startswith("step-"):
            raise PermissionError("a file in it is open")
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", stuck)
    ended = Ended(tmp_path / "logs", *data)
    assert (ended.code, ended.err) == (0, "") and steps_of(ended) == [2, 4, 6, 8]


def test_the_way_through_the_data_to_a_resumed_step_is_not_on_the_clock(run, data, monkeypatch):
    folder, _ = run
    shutil.rmtree(folder / "ckpt/step-000008")
    (folder / "log.txt").unlink()
    planned, skipped = train.plan, []
    def slowly(shards, cfg):
        for step, rows in enumerate(planned(shards, cfg)):
            if open_data_is_over and step < 6:
                skipped.append(step)
                time.sleep(0.5)
            yield rows
    open_data_is_over, describe = [], train.describe
    monkeypatch.setattr(train, "describe", lambda *arguments: (open_data_is_over.append(True), describe(*arguments)))
    monkeypatch.setattr(train, "plan", slowly)
    before = json.loads((folder / "ckpt/step-000006/manifest.json").read_text())["progress"]["seconds"][0]
    ended = Ended(folder.parent, *data, "--resume=auto")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert ended.code == 0 and skipped == [*range(6)] and last["train_time_s"] - before < 2.5


def test_a_seal_that_the_disk_refuses_ends_the_run_with_4(data, tmp_path, monkeypatch):
    with_limit(monkeypatch, train.Run, "put", lambda run, name, text, *_: text.startswith("sha256:"))
    ended = Ended(tmp_path / "logs", *data)
    assert ended.code == 4 and "log.txt" in ended.error and not lines_of(ended)[2]


@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_a_finished_run_whose_log_is_damaged_is_finished_again(damage, run, data, whole):
    folder, _ = run
    log = folder / "log.txt"
    {"gone": log.unlink, "empty": lambda: log.write_text(""), "cut": lambda: os.truncate(log, log.stat().st_size - 9)}[damage]()
    ended = Ended(folder.parent, *data, "--resume=auto")
    assert (ended.code, ended.runs, ended.err) == (0, [folder], "") and weights_of(folder) == weights_of(whole.folder)
    assert lines_of(ended)[2]


def test_metrics_that_are_no_metrics_do_no_harm(run, data):
    folder, _ = run
    shutil.rmtree(folder / "ckpt/step-000008")
    good = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"[" * 10 ** 5 + b'\n{"step": 2, "stage": 0, "train_loss": "<script>"}\n{"step": "3", "stage": 0}\nnull\n\xff\xfe\n'
                                           + good + b'{"step": 4, "sta')
    ended = Ended(folder.parent, *data, "--resume=auto")
    assert (ended.code, ended.err) == (0, "") and lines_of(ended)[1] == [*range(1, 9)]
    assert "script" not in (folder / "loss.svg").read_text()


# ---- A checkpoint of another config, other devices ----

OTHER = {"num_layers": 2, "vocab_size": 300, "optimizer": "adamw", "model_dim": 16, "seed": 1, "batch_tokens": "128"}


@pytest.mark.parametrize("field", OTHER)
def test_a_checkpoint_of_another_config_ends_a_run_with_4_and_the_field_that_differs(field, run, data):
    folder, _ = run
    flag = f"--{field}={OTHER[field]}"
    ended = Ended(folder.parent, *data, flag, f"--resume={folder}")
    assert (ended.code, ended.runs) == (4, [folder])
    assert re.search(rf"saved with --{field}=\S+, but this run has {OTHER[field]};", ended.error), ended.error


def test_on_another_number_of_devices_a_resumed_run_says_so_and_ends_nearly_the_same(run, data, whole, monkeypatch):
    folder, _ = run
    shutil.rmtree(folder / "ckpt/step-000008")
    monkeypatch.setattr(train, "make_mesh", lambda: jax.make_mesh((2,), ("data",), axis_types=(train.AxisType.Auto,), devices=jax.devices()[:2]))
    facts_of = train.facts_of
    monkeypatch.setattr(train, "facts_of", lambda *arguments: facts_of(*arguments) | {"devices": "2 x cpu"})
    ended = Ended(folder.parent, *data, "--resume=auto")
    assert ended.code == 0 and "at step 6; bits may differ: devices was 8 x cpu, is 2 x cpu" in ended.out
    for mine, theirs in zip(weights_of(folder), weights_of(whole.folder)):
        assert len(mine) == len(theirs)
    last = lambda home: json.loads((home / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert last(folder) == pytest.approx(last(whole.folder), abs=1e-5)


# ---- Hostile files ----

def tensors(header, body=b"", size=None):
    """A file by the description of the safetensors format: length of the header, the header, bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + body


class Opens:  # pickle calls open(path, "w") when it is read
    def __init__(self, path):
        self.path = path
    def __reduce__(self):
        return open, (self.path, "w")


def entry(shape=(1,), first=0, last=4, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def with_one_more(path):
    """The good file, and a tensor of no elements besides."""
    good = next(path.glob("logs/*/ckpt/step-000008/params.safetensors")).read_bytes()
    body = good[8 + int.from_bytes(good[:8], "little"):]
    return tensors(json.loads(good[8:-len(body)]) | {"../executed": entry((0,), len(body), len(body))}, body)


HOSTILE = {
    "a tensor more": with_one_more,
    "a pickle": lambda path: pickle.dumps(Opens(f"{path}/executed")),
    "an npz of objects": lambda path: (np.savez(buffer := io.BytesIO(), a=np.array([Opens(f"{path}/executed")], object)), buffer.getvalue())[1],
    "a name with ../": lambda _: tensors({"../../../executed": entry()}, bytes(4)),
    "an absolute name": lambda path: tensors({f"{path}/executed": entry()}, bytes(4)),
    "a name with NUL": lambda _: tensors({"embed\0": entry()}, bytes(4)),
    "a name of control characters": lambda _: tensors({"\x1b[2J\n\n\ud800": entry()}, bytes(4)),
    "a name of a mebibyte": lambda _: tensors({"x" * 1_000_000: entry()}, bytes(4)),
    "4 GB declared": lambda _: tensors({"embed": entry((2 ** 30,), 0, 2 ** 32)}, bytes(900)),
    "4 GB declared in no bytes": lambda _: tensors({"embed": entry((2 ** 30,), 0, 0)}, bytes(900)),
    "a shape past 64 bits": lambda _: tensors({"embed": entry((2 ** 40, 2 ** 40), 0, 4)}, bytes(4)),
    "negative sizes": lambda _: tensors({"embed": entry((-1, -4), 0, 16)}, bytes(16)),
    "offsets that overlap": lambda _: tensors({"embed": entry((2,), 0, 8), "head": entry((2,), 4, 12)}, bytes(12)),
    "a header of 2^63 bytes": lambda _: tensors({}, size=2 ** 63),
    "a header of 50 MB": lambda _: tensors({}, size=50_000_000),
    "a million tensors": lambda _: tensors(b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(10 ** 6)) + b"}"),
    "as many tensors as fit": lambda _: tensors({str(i): entry((0,), 0, 0, "U8") for i in range(15_000)}),
    "names twice": lambda _: tensors(b'{"embed":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"embed":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a header that is a list": lambda _: tensors([1, 2]), "a nested header": lambda _: tensors(b"[" * 10 ** 5), "no bytes": lambda _: b"",
    "seven bytes": lambda _: bytes(7), "a web page": lambda _: b"<!DOCTYPE html><title>404</title>" * 99}


def peak_memory(reset=False):
    """Peak resident bytes of this process since the last reset, or None where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return None


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tensor_file_with_the_right_hash_is_refused_and_nothing_is_executed(kind, run, tmp_path, whole, no_hang):
    """The attacker writes the manifest too, so that no hash helps."""
    folder, cfg = run
    newest = folder / "ckpt/step-000008"
    (newest / "params.safetensors").write_bytes(HOSTILE[kind](tmp_path))
    reseal(newest)
    before, (found, manifest) = snapshot(tmp_path), train.find_checkpoint(cfg)
    assert found == newest
    state = jax.eval_shape(train.make_init(train.Model(), train.make_mesh(), cfg))
    peak = peak_memory(reset=True)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert train.command(lambda: train.load_checkpoint(found, 8, state)) == 4
    text = said.getvalue()
    assert str(newest / "params.safetensors") in text and text.isprintable() is False and text[:-1].isprintable() and len(text) < 2000
    assert peak is None or peak_memory() - peak < 200 << 20
    assert snapshot(tmp_path) == before and not (tmp_path / "executed").exists()


def test_a_pickle_that_would_be_executed_is_what_these_tests_think_it_is(tmp_path):
    pickle.loads(pickle.dumps(Opens(f"{tmp_path}/executed"))).close()
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "endless", "loop", "folder", "other"])
def test_a_file_of_a_checkpoint_that_is_none_is_passed_over(name, kind, run, tmp_path, capsys, no_hang):
    folder, cfg = run
    path = folder / "ckpt/step-000008" / name
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "endless": lambda: path.symlink_to("/dev/zero"), "loop": lambda: path.symlink_to(path),
     "folder": path.mkdir, "other": lambda: path.symlink_to("/etc/hosts")}[kind]()
    assert train.find_checkpoint(cfg)[0] == folder / "ckpt/step-000006"
    said, = capsys.readouterr().out.splitlines()
    assert str(folder / "ckpt/step-000008") in said


def test_links_out_of_the_run_folder_are_not_followed_when_things_are_deleted(run, tmp_path, data):
    folder, _ = run
    mine = make_folder(tmp_path / "mine") and snapshot(tmp_path / "mine")
    shutil.rmtree(folder / "ckpt/step-000008")
    (folder / "ckpt/.writing-step-000008").symlink_to(tmp_path / "mine")
    (folder / "ckpt/step-000002").symlink_to(tmp_path / "mine")
    (folder / "ckpt/step-000004").mkdir()
    (folder / "ckpt/step-000004/link").symlink_to(tmp_path / "mine")
    Ended(folder.parent, *data, "--resume=auto")
    assert snapshot(tmp_path / "mine") == mine


def test_a_message_does_not_carry_the_characters_of_a_hostile_file_to_the_terminal(run, data):
    folder, _ = run
    for path in (folder / "ckpt").glob("*"):
        manifest = json.loads((path / "manifest.json").read_text())
        reseal(path, config=manifest["config"] | {"optimizer": "\x1b[2J\n\ud800" + "x" * 100_000})
    (folder / "config.json").unlink()
    ended = Ended(folder.parent, *data, f"--resume={folder}")
    assert ended.code == 4 and "--optimizer=" in ended.error and len(ended.error) < 2000
    assert all(line.isprintable() and len(line) < 2000 for line in ended.out.splitlines())


def test_the_versions_of_a_hostile_checkpoint_forge_no_line_of_the_log_or_the_terminal(run, data):
    folder, _ = run
    shutil.rmtree(folder / "ckpt/step-000008")
    versions = json.loads((folder / "ckpt/step-000006/manifest.json").read_text())["versions"]
    reseal(folder / "ckpt/step-000006", versions=versions | {"\x1b[2J\nfinal: forged": "\ud800" + "x" * 100_000})
    ended = Ended(folder.parent, *data, "--resume=auto")
    assert ended.code == 0 and "bits may differ: ?[2J?final: forged was ?xxx" in ended.out
    said = (folder / "log.txt").read_text().split("=" * 120)[-1].splitlines()
    assert [line[:12] for line in said if line.startswith("final: ")] == ["final: step:"] and max(map(len, said)) < 2000


MISSHAPEN = {
    "no config": lambda manifest: manifest.pop("config"),
    "a config of pairs": lambda manifest: manifest.update(config=[[1, 2]]),
    "a config that is none": lambda manifest: manifest.update(config=5),
    "no last row": lambda manifest: manifest["progress"].update(row=None),
    "a last row without a loss": lambda manifest: manifest["progress"]["row"].pop("val_loss"),
    "a last row without a clock": lambda manifest: manifest["progress"]["row"].pop("cpu_time_s"),
    "a target reached nowhere": lambda manifest: manifest["progress"].update(reached={"a": 1})}


@pytest.mark.parametrize("kind", MISSHAPEN)
def test_a_manifest_that_lacks_what_a_run_reads_is_passed_over(kind, run, capsys):
    folder, cfg = run
    path = folder / "ckpt/step-000008/manifest.json"
    manifest = json.loads(path.read_text())
    MISSHAPEN[kind](manifest)
    path.write_text(sealed(manifest))
    assert train.find_checkpoint(cfg)[0] == folder / "ckpt/step-000006"
    said, = capsys.readouterr().out.splitlines()
    assert str(path.parent) in said and "delete it" in said


@pytest.mark.parametrize("sends", [None, OSError(5, "Input/output error")])
def test_flush_leaves_no_file_open_whatever_the_disk_says(sends, tmp_path, monkeypatch):
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    def fsync(handle):
        if sends:
            raise sends
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(real_open(*arguments)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or real_close(handle))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) if sends else contextlib.nullcontext():
        train.flush(tmp_path)
    assert len(opened) == 1 and closed == opened


def test_a_run_whose_last_checkpoint_the_disk_refused_does_not_say_that_it_wrote_it(data, tmp_path, monkeypatch):
    save = train.save_checkpoint
    def refuse(state, *arguments):
        if int(state.step) == 8:
            raise OSError("no space")
        return save(state, *arguments)
    monkeypatch.setattr(train, "save_checkpoint", refuse)
    ended = Ended(tmp_path / "logs", *data)
    assert ended.code == 4 and "final: " in ended.out and "wrote: " not in ended.out and steps_of(ended)[-1] == 6


SHARD_FAULTS = {
    "a pipe named like a shard": lambda f: ((f / "train_000000.bin").unlink(), os.mkfifo(f / "train_000000.bin")),
    "an endless shard": lambda f: ((f / "train_000000.bin").unlink(), (f / "train_000000.bin").symlink_to("/dev/zero")),
    "a count past 31 bits": lambda f: (f / "train_000000.bin").write_bytes(shard_bytes([1] * 9, count=2 ** 31 - 1)),
    "a pickle": lambda f: (f / "train_000000.bin").write_bytes(pickle.dumps(Opens(f"{f}/executed")) + bytes(2000)),
    "a nested meta.json": lambda f: (f / "meta.json").write_text("[" * 10 ** 5),
    "a large meta.json": lambda f: (f / "meta.json").write_text('{"tokenizer": "test", "bos_id": 256, "vocab_size": ' + " " * (1 << 20) + "257}"),
    "an endless meta.json": lambda f: ((f / "meta.json").unlink(), (f / "meta.json").symlink_to("/dev/zero")),
    "a vocabulary of the wrong kind": lambda f: (f / "meta.json").write_text('{"tokenizer": "a", "vocab_size": 1e999, "bos_id": 1}'),
    "a vocabulary past 16 bits": lambda f: (f / "meta.json").write_text('{"tokenizer": "a", "vocab_size": 1%s, "bos_id": 1}' % ("0" * 30))}


@pytest.mark.parametrize("kind", SHARD_FAULTS)
def test_a_hostile_shard_or_meta_json_ends_a_run_with_3_before_it_writes(kind, tmp_path, no_hang):
    flags = make_folder(tmp_path / "data")
    SHARD_FAULTS[kind](tmp_path / "data")
    ended = Ended(tmp_path / "logs", *flags)
    assert (ended.code, ended.runs) == (3, []) and str(tmp_path / "data") in ended.error and len(ended.error) < 2000
    assert not (tmp_path / "data/executed").exists()


# ---- Disks ----

def test_a_checkpoint_that_the_disk_refuses_is_a_loud_warning_and_the_next_one_is_written(data, tmp_path, monkeypatch, whole):
    met = with_limit(monkeypatch, train, "save_checkpoint", lambda state, *_: int(state.step) in (4, 6), 30_000)
    kept, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (kept.append(weights_of(met[-1][1], 2)) if met else None, rmtree(path, **how)))
    ended = Ended(tmp_path / "logs", *data)
    assert len(met) == len(ended.warnings) == 2 and all("File too large" in text and "training goes on" in text for text in ended.warnings)
    assert "step-000004" in ended.warnings[0] and "step-000006" in ended.warnings[1]
    assert kept and all(weights == kept[0] for weights in kept)  # the one before stood while these were tried
    assert (ended.code, steps_of(ended)) == (0, [2, 8])
    assert weights_of(ended.folder) == weights_of(whole.folder) and lines_of(ended) == lines_of(whole)


def test_where_the_last_checkpoint_is_not_written_the_run_ends_with_4_and_the_same_again_ends_it(data, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        with_limit(patch, train, "save_checkpoint", lambda state, *_: int(state.step) == 8, 30_000)
        ended = Ended(tmp_path / "logs", *data)
    assert (ended.code, steps_of(ended), len(ended.warnings)) == (4, [4, 6], 1)
    assert "checkpoint" in ended.error and f"--resume={ended.folder}" in ended.error
    again = Ended(tmp_path / "logs", *data, f"--resume={ended.folder}")
    assert (again.code, again.err, steps_of(again)) == (0, "", [6, 8]) and weights_of(again.folder) == weights_of(whole.folder)


def test_lines_that_the_disk_refuses_are_written_once_there_is_room(data, tmp_path, monkeypatch, whole):
    met = with_limit(monkeypatch, train.Run, "write", lambda run, row: row["step"] in (3, 4, 5))
    ended = Ended(tmp_path / "logs", *data)
    assert len(met) == 3 and any("log.txt" in text for text in ended.warnings) and any("metrics.jsonl" in text for text in ended.warnings)
    assert ended.code == 0 and lines_of(ended) == lines_of(whole) == ([*range(1, 9)], [*range(1, 9)], True)
    assert weights_of(ended.folder) == weights_of(whole.folder)


def test_a_log_that_stays_unwritten_ends_the_run_with_4_without_half_a_line_and_with_its_checkpoint(data, tmp_path, monkeypatch, whole):
    line_of_4 = re.search(r"^step:4/.*\n", (whole.folder / "log.txt").read_text(), re.MULTILINE)
    with monkeypatch.context() as patch:
        with_limit(patch, train.Run, "put", lambda run, name, *_: name == "log.txt", line_of_4.start() + 20)
        ended = Ended(tmp_path / "logs", *data)
    logged, rows, seal = lines_of(ended)
    assert (ended.code, seal, rows, steps_of(ended)) == (4, False, [*range(1, 9)], [6, 8]) and logged == [*range(1, len(logged) + 1)] != rows
    assert "log.txt" in ended.error and weights_of(ended.folder) == weights_of(whole.folder)
    again = Ended(tmp_path / "logs", *data, f"--resume={ended.folder}")
    assert (again.code, again.err, lines_of(again)[2]) == (0, "", True)


def test_a_plot_that_the_disk_refuses_ends_the_run_with_4_and_the_same_again_draws_it(data, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        with_limit(patch, train.Run, "put", lambda run, name, *_: name == "loss.svg", 100)
        ended = Ended(tmp_path / "logs", *data)
    assert (ended.code, steps_of(ended)) == (4, [6, 8]) and "loss.svg" in ended.error and ended.warnings
    again = Ended(tmp_path / "logs", *data, f"--resume={ended.folder}")
    assert (again.code, again.err) == (0, "") and (again.folder / "loss.svg").read_text().endswith("</svg>")


def test_a_console_that_refuses_lines_stops_no_training(data, tmp_path, monkeypatch, whole):
    """As of `python train.py > log &` on a disk that is full, or into a pipe that nobody reads any more."""
    real, refused = print, []

    def refuse(text, *rest, **how):
        if str(text).startswith(("step:", "saved:")):
            refused.append(text)
            raise OSError(28, "No space left on device")
        real(text, *rest, **how)
    monkeypatch.setattr(train, "print", refuse, raising=False)
    ended = Ended(tmp_path / "logs", *data)
    assert (ended.code, len(refused)) == (0, 12) and lines_of(ended) == lines_of(whole)


ON_A_SMALL_DISK = """
import json, os, subprocess, sys
from pathlib import Path
disk, *flags = sys.argv[1:]
mount = lambda *how: subprocess.run(["mount", *how, disk], check=True)
mount("-t", "tmpfs", "-o", "size=600k", "tmpfs")
import train
filler, save, codes, steps = Path(disk, "filler"), train.save_checkpoint, [], []
def with_faults(state, *rest):
    step = int(state.step)
    if not codes and step == 4:      # no room at all
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(512)): pass
            except OSError: pass
    if step == 6: filler.unlink(missing_ok=True)
    if not codes and step == 8: mount("-o", "remount,ro")
    try:
        return save(state, *rest)
    finally:
        steps.append(sorted(path.name for path in Path(disk).glob("logs/*/ckpt/*")))
train.save_checkpoint = with_faults
train.make_mesh = lambda make=train.make_mesh: make(train.jax.devices()[:1])
for resume in ("", "auto"):
    codes.append(train.command(lambda: train.main([*flags, f"--log_dir={disk}/logs", f"--resume={resume}"])) or 0)
    mount("-o", "remount,rw")
print(json.dumps([codes, steps, sorted(path.name for path in Path(disk).glob("logs/*/*"))]))
"""


def in_a_namespace(*command):
    """The command line that may mount what others do not see; skips where this system does not allow it."""
    wrapped = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*wrapped, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True).returncode:
        pytest.skip("no mounts in a namespace of one's own here")
    return [*wrapped, *command]


def python(*command, **env):
    env = os.environ | {"PYTHONPATH": str(REPO), "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | env
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)


def test_a_disk_that_fills_up_is_emptied_and_turns_read_only_costs_no_step_of_training(data, tmp_path, whole):
    (tmp_path / "disk").mkdir()
    done = python(*in_a_namespace(sys.executable, "-c", ON_A_SMALL_DISK), str(tmp_path / "disk"), *SMALL, *data)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    codes, steps, names = json.loads(done.stdout.splitlines()[-1])
    warnings, errors = ([line for line in done.stderr.splitlines() if line.startswith(kind)] for kind in ("warning: ", "error: "))
    two = ["step-000002"], ["step-000002"], ["step-000002", "step-000006"], ["step-000002", "step-000006"]
    assert codes == [4, 0] and steps == [*two, ["step-000006", "step-000008"]]  # the step that the full disk lost is not missed
    assert any("No space left" in line and "step-000004" in line for line in warnings)
    assert any("Read-only file system" in line and "step-000008" in line for line in warnings)
    assert len(errors) == 1 and names == ["ckpt", "config.json", "log.txt", "loss.svg", "metrics.jsonl"]


# ---- Numbers that are not finite ----

@pytest.mark.parametrize("step,log_every,bad", [(1, 3, "nan"), (3, 3, "inf"), (5, 3, "nan"), (7, 100, "-inf"), (8, 100, "nan")])
def test_a_loss_that_is_not_finite_stops_the_run_whether_its_step_is_logged_or_not(step, log_every, bad, data, tmp_path, monkeypatch, whole):
    with_program(monkeypatch, 0, lambda state, loss: (state, jnp.where(state.step == step, float(bad), loss)))
    ended = Ended(tmp_path / "logs", *data, f"--log_every={log_every}", "--val_every=0")
    assert ended.code == 5 and not ended.warnings
    assert f"the training loss of step {step} is {bad}, on training tokens {64 * (step - 1)} to {64 * step}" in ended.error and str(ended.folder) in ended.error
    saved = [n for n in (2, 4, 6) if n < step][-2:]
    assert [int(path.name[5:]) for path in sorted((ended.folder / "ckpt").glob("*"))] == saved
    assert 6 not in saved or weights_of(ended.folder, 6) == weights_of(whole.folder, 6)


@pytest.mark.parametrize("weight", ["embed", "blocks/w_up"])
def test_weights_that_are_not_finite_are_not_saved(weight, data, tmp_path, monkeypatch):
    """With a loss that does not show it: the step after would."""
    def break_one(state, loss):
        poison = lambda path, x: jnp.where((state.step == 6) & (jnp.arange(x.size).reshape(x.shape) == 1), jnp.nan, x)
        broken = jax.tree.map_with_path(lambda path, x: poison(path, x) if train.name_of(path) == weight else x, state.params)
        return state._replace(params=broken), loss
    with_program(monkeypatch, 0, break_one)
    ended = Ended(tmp_path / "logs", *data, "--val_every=0")
    assert (ended.code, steps_of(ended)) == (5, [2, 4]) and f"after step 6 the weights {weight} are not finite" in ended.error
    assert train.find_checkpoint(dataclasses.replace(config(ended), resume="auto"))[1]["step"] == 4


# ---- Memory ----

@pytest.mark.parametrize("where", ["compile", "step", "eval"])
def test_memory_that_does_not_suffice_is_one_sentence_with_three_flags_to_turn(where, data, tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40G of 31G\nmore\nand more")
    monkeypatch.setattr(train, "compile_all", exhausted) if where == "compile" else with_program(monkeypatch, {"step": 0, "eval": "eval"}[where], exhausted)
    ended = Ended(tmp_path / "logs", *data)
    assert ended.code == 2 and "out of memory" in ended.error and "Used 40G of 31G" in ended.error and "more" not in ended.error.split("31G")[1]
    assert len(re.findall(r"--\w+=\d+", ended.error.split("(rows")[0] + ended.error.split("fit)")[1])) == 3


@pytest.mark.parametrize("devices,flags", [(1, "--preset=speedrun"), (8, "--preset=speedrun"), (8, "--preset=speedrun --fsdp=1"), (1, "--preset=demo"),
                                           (1, "--preset=tiny"), (8, "--preset=tiny --head_block=0 --attn_block=0"), (4, "--preset=tiny --micro_tokens=100"),
                                           (1, "--preset=speedrun --micro_tokens=12288 --head_block=1000")])
def test_the_flags_to_turn_are_flags_that_can_be_and_need_less(devices, flags, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    cfg = train.configure(flags.split())[0]
    with pytest.raises(train.UsageError, match="out of memory") as caught, train.runtime_errors(cfg):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")
    advice = re.findall(r"--(?!seq_len)\w+=\S+?\b", str(caught.value))
    assert len(advice) == 3
    turned = train.configure([*flags.split(), *advice])[0]
    row = max(stage.seq_len for stage in train.stages(cfg))

    def sizes(cfg):  # tokens of a micro-step, of logits, of queries at a time
        last = max(train.stages(cfg), key=lambda stage: stage.batch_tokens)
        micro = train.batch_shape(last, devices, cfg)[1] // devices * last.seq_len
        return (micro, cfg.head_block if cfg.head_block and micro % cfg.head_block == 0 else micro,
                cfg.attn_block if cfg.attn_block and row % cfg.attn_block == 0 else row)
    before, after = sizes(cfg), sizes(turned)
    assert after[0] < before[0] or before[0] == after[0] == row
    assert after[1] < before[1] and (after[2] < before[2] or turned.fsdp > cfg.fsdp)
    assert turned.micro_tokens >= row


# ---- Flags ----

INTS, FLOATS = ([field.name for field in dataclasses.fields(train.Config) if field.type is kind] for kind in (int, float))
POSITIVE = "steps num_layers model_dim num_heads mlp_dim val_tokens log_every max_epochs head_dim".split()
NOT_NEGATIVE = ("seed num_kv_heads ns_steps gate_dims tied_stages val_every save_every warmup_steps attn_block head_block micro_tokens "
                "val_window_short val_window_long window_short window_long max_doc_len val_context").split()
NO_LISTS = ["stage_ends", "batch_tokens", "seq_len", "max_doc_len", "window_short", "window_long", "stage_lr", "muon_momentum", "softcap", "mtp",
            "mlp_only", "skips", "late_inputs", "backout", "offset_layers", "long_layers", "profile"]
NAMES = ["preset", "optimizer", "attention", "compute_dtype", "residual_dtype", "multihost"]


def bad_flags(draw, folder):
    """(flags, exit code): one thing is wrong with them."""
    word = "".join(draw.choices(string.ascii_letters + "_-. ;=%\u00e9\u20ac\U0001f600", k=draw.randint(1, 30)))
    kind = draw.choice(["typo", "int", "float", "small", "list", "name", "path", "infinite", "file", "log_dir"])
    if kind == "typo":
        name = list(draw.choice(INTS + FLOATS + NO_LISTS))
        name.insert(draw.randrange(len(name) + 1), draw.choice("xqzXQZ9-"))
        return [draw.choice(["--", "-", ""]) + "".join(name) + draw.choice(["=1", "", "=" + word])], 2
    if kind == "int":
        return [f"--{draw.choice(INTS)}={draw.choice(['x', '1.5', '1e3', '0x10', '', 'nan', 'inf', '1,2', '--', '9' * 5000, word + '!'])}"], 2
    if kind == "float":
        return [f"--{draw.choice(FLOATS)}={draw.choice(['x', '1,5', '0x10', '', '1e', '--', word + '!'])}"], 2
    if kind == "infinite":
        return [f"--{draw.choice(FLOATS)}={draw.choice(['nan', 'inf', '-inf', '1e999'])}"], 2
    if kind == "small":
        name = draw.choice(POSITIVE + NOT_NEGATIVE + ["cpu_devices"])
        return [f"--{name}={-draw.randint(name not in POSITIVE, 10 ** draw.randint(1, 30))}"], 2
    if kind == "list":
        return [f"--{draw.choice(NO_LISTS)}={draw.choice(['x', '1,x', '1;2', ',,x', '--', '>', '1>', '1>x', '1e400,q', ':', '1:x', word + '!'])}"], 2
    if kind == "name":
        return [f"--{draw.choice(NAMES)}={draw.choice(['x', 'int8', 'Muon ', '1', 'a:b,c,d', 'a,1,0', ':1,2,2', '../..', word + '!'])}"], 2
    if kind == "path":
        where = draw.choice(["", "/", ".", "/dev/null", "none/*.bin", "[", "**", "~", "x" * 5000, str(folder), __file__, word + "/*"])
        return [f"--{draw.choice(['train_files', 'val_files'])}={where or '?'}"], 3
    if kind == "log_dir":
        return [f"--log_dir={draw.choice([__file__, __file__ + '/x', 'x' * 300, '/dev/null/logs', '/proc/none'])}"], 2
    (folder / "flags").write_bytes(draw.choice([b"\xff\xfe", b"'", b"--steps=x", b"--stps=1", b"\0", b"--steps=1\0", b"--log_dir='a\0b'", b"@none", os.urandom(99)]))
    return ["@" + draw.choice(["none", ".", str(folder), "x" * 5000, str(folder / "flags"), str(folder / "flags"), __file__])], 2


class Accepted(Exception):
    """A config has come as far as the compiler."""


def answer_to(flags):
    """(exit code, lines said) of main for these flags; None where it would compile."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = train.command(lambda: train.main(flags))
        except Accepted:
            return None, []
    return code, (out.getvalue() + err.getvalue()).splitlines()


def test_300_random_bad_command_lines_are_each_refused_in_three_lines_and_leave_nothing(data, tmp_path, monkeypatch, no_hang):
    def accepted(*_):
        raise Accepted
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(train, "compile_all", accepted)
    draw, wrong = random.Random(22), []
    for _ in range(300):
        bad, wanted = bad_flags(draw, tmp_path)
        try:
            code, said = answer_to([*SMALL, *data, *bad])
        except Exception as error:
            code, said = repr(error)[:200], []
        if code != wanted or len(said) > 3 or not said[-1].startswith("error: ") or max(map(len, said)) > 12_000:
            wrong.append((bad[0][:100], wanted, code, said[-1:]))
        if left := list(Path.cwd().iterdir()):
            wrong.append((bad[0][:100], "left", left))
            shutil.rmtree(left[0])
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.soak
def test_whatever_random_config_is_accepted_can_be_lowered(data, tmp_path, monkeypatch):
    """What validate lets through, the tracer takes: a mistake costs a second, not a traceback."""
    reached = []

    def lower(model, mesh, cfg):
        reached.append(cfg)
        for _, function, arguments in train.list_programs(model, mesh, cfg).values():
            function.lower(*arguments)
        raise Accepted
    monkeypatch.setattr(train, "compile_all", lower)
    draw, wrong, refused = random.Random(5), [], 0
    numbers = ["0", "1", "2", "3", "5", "7", "8", "12", "16", "32", "33", "64", "96", "128", "-1", "300"]
    reals = ["0", "1", "0.5", "-0.5", "2", "1e-30", "1e30", "-1e30", "0.99999"]
    lists = [",".join, ">".join]
    for _ in range(150):
        flags = []
        for _ in range(draw.randint(1, 4)):
            field = draw.choice([field for field in dataclasses.fields(train.Config) if field.name not in (
                "preset", "multihost", "cpu_devices", "log_dir", "resume", "train_files", "val_files", "attention", "steps")])
            value = draw.choice(numbers if field.type is int else reals if field.type is float else
                                [draw.choice(lists)(draw.choices(numbers + reals[:3], k=draw.randint(1, 3))), "", "float32", "bfloat16", "adamw", "0>1,0>2"])
            flags.append(f"--{field.name}={value}")
        base = draw.choice([SMALL, ["--preset=tiny", "--steps=4"]])
        try:
            answer = answer_to([*base, *data, f"--log_dir={tmp_path}/logs", *flags])
            refused += answer[0] is not None
        except Exception as error:
            wrong.append((flags, repr(error)[:300]))
            print(wrong[-1], flush=True)
    print(f"{len(reached)} lowered, {refused} refused, {len(wrong)} wrong")
    assert not wrong, "\n".join(map(str, wrong))


# ---- The compile cache ----

@pytest.fixture
def fresh(data, monkeypatch):
    """fresh(cache folder, log_dir): a run whose programs come from there or from the compiler: (Ended, hits, texts of warnings)."""
    monkeypatch.undo()
    events, listener = [], lambda event, **_: events.append(event)
    jax.monitoring.register_event_listener(listener)
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}

    def fresh(cache, log_dir):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))  # train.py leaves the cache to who says so
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()
        events.clear()
        monkeypatch.setattr(train, "compile_all", REAL_COMPILE_ALL)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ended = Ended(log_dir, *data)
        return ended, events.count("/jax/compilation_cache/cache_hits"), [str(w.message) for w in warned]
    yield fresh
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


REAL_COMPILE_ALL = train.compile_all


def test_a_cold_a_warm_and_a_broken_compile_cache_give_the_same_bits(fresh, tmp_path, whole):
    cache = tmp_path / "cache"
    cold, hits, _ = fresh(cache, tmp_path / "cold")
    assert hits == 0 and list(cache.iterdir())
    warm, hits, _ = fresh(cache, tmp_path / "warm")
    assert hits >= 3
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    cut, hits, said = fresh(cache, tmp_path / "cut")
    assert hits == 0 or any("cache" in text for text in said)
    for ended in (cold, warm, cut):
        assert ended.code == 0 and weights_of(ended.folder) == weights_of(whole.folder) and lines_of(ended) == lines_of(whole)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["a file", "not to be written"])
def test_a_compile_cache_that_is_no_folder_changes_no_bit(kind, fresh, tmp_path, whole):
    (tmp_path / "cache").write_text("a file")
    ended, hits, _ = fresh(tmp_path / "cache" if kind == "a file" else Path("/proc/self/none"), tmp_path / "logs")
    assert (ended.code, hits) == (0, 0) and weights_of(ended.folder) == weights_of(whole.folder)
