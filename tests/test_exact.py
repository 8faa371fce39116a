"""The same bits: of two runs, of a run that was stopped anywhere and resumed, and of the losses this version is known to give."""
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import re
from pathlib import Path

import conftest  # noqa: F401 (its devices, where this file is run by itself)
import jax
import numpy as np
import pytest

import train
from shards import documents, make_folder
from victim import BIGRAM, metrics_of, steps_written

STEPS, STAGE_1 = 12, 6
SIZES = ["--preset=tiny", f"--steps={STEPS}", "--num_layers=1", "--model_dim=24", "--head_dim=8", "--mlp_dim=40", "--skips=",
         "--late_inputs=", "--backout=", "--offset_layers=0", "--long_layers=0", "--attn_block=14", "--batch_tokens=56,112", "--seq_len=14,28",
         "--window_short=9,16", "--window_long=20,24", "--val_tokens=300", "--val_seq_len=40", "--val_context=11", "--warmup_steps=2",
         "--val_every=4", "--save_every=5", "--log_every=1", "--shuffle=0"]
SHARD_0 = 28 * 16 + 1  # tokens: 16 rows of the longest length, read by 6 steps of 56 and one of 112


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs whose programs are alike share them; compiled without optimizing, in half the time. No waiting for disks."""
    programs, real = {}, train.compile_all
    elsewhere = dict.fromkeys(train.MAY_DIFFER | {"train_files", "val_files"})

    def remembered(model, mesh, cfg):
        key = model, mesh, dataclasses.replace(cfg, **elsewhere)
        if key not in programs:
            programs[key] = real(model, mesh, cfg)
        return dict(programs[key][0]), programs[key][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_all", remembered)
        patch.setattr(os, "fsync", lambda *_: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


class StopAfter(train.Stop):
    """A signal that is heard in a step."""
    def __init__(self, step): self.step = step
    def at(self, done): return done == self.step


def ticking(patch):
    """A clock by which a training step takes a second, an evaluation or a checkpoint a thousand, and all else next to nothing."""
    now = [0.0]

    def tick(seconds=1e-7):
        now[0] += seconds
        return now[0]
    clock = type("Clock", (), {"perf_counter": staticmethod(tick), "process_time": staticmethod(tick),
                               **{name: staticmethod(getattr(train.time, name)) for name in ("strftime", "gmtime")}})
    patch.setattr(train, "time", clock)
    save = train.save_checkpoint
    patch.setattr(train, "save_checkpoint", lambda *arguments: (tick(1000), save(*arguments))[1])
    return tick


def trained(flags, num_devices, stop=None, seen=None):
    """Run folder. seen: a list to which (program, step of the optimizer, SHA-256 of the batch) of each training step go."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        devices, real, tick = jax.devices()[:num_devices], train.compile_all, ticking(patch)
        patch.setattr(train, "make_mesh", lambda mesh=train.make_mesh: mesh(devices))

        def compile_all(*arguments):
            programs, notes = real(*arguments)

            def watched(key):
                def program(state, batch):
                    if key == "eval":
                        tick(1000)
                    elif seen is not None and not (np.asarray(batch) == train.NO_TOKEN).all():  # the warm-up's are empty
                        seen.append((key, int(state.step), hashlib.sha256(np.asarray(batch).tobytes()).hexdigest()))
                        tick(1)
                    return programs[key](state, batch)
                return program
            return programs | {key: watched(key) for key in programs if key != "init"}, notes
        patch.setattr(train, "compile_all", compile_all)
        return train.main([*SIZES, *flags], stop=stop)


def bits(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


def losses(folder):
    return [[row.get(key) for key in ("step", "tokens", "train_loss", "val_loss", "lr", "stage")] for row in metrics_of(folder)]


class Alone:
    """A run that was left alone: on 8 devices and a plain stream of two shards, or on one device and packed documents."""
    def __init__(self, home, num_devices, packed):
        self.home, self.num_devices, self.seen = home, num_devices, []
        self.tokens = documents(1, 20)[:SHARD_0], documents(2, 120)
        self.flags = [*make_folder(home / "data", train=self.tokens), f"--max_doc_len={20 * packed}"]
        self.folder = trained([*self.flags, f"--log_dir={home}/logs"], num_devices, seen=self.seen)


@pytest.fixture(scope="module", params=[(8, False), (1, True)], ids=["8 devices, a plain stream", "1 device, packed documents"])
def alone(request, tmp_path_factory):
    return Alone(tmp_path_factory.mktemp("alone"), *request.param)


def test_two_runs_of_one_config_have_the_same_bits(alone, tmp_path):
    again = trained([*alone.flags, f"--log_dir={tmp_path}"], alone.num_devices)
    for step in (10, STEPS):
        assert len(bits(again / f"ckpt/step-{step:06d}")) == 2
        assert bits(again / f"ckpt/step-{step:06d}") == bits(alone.folder / f"ckpt/step-{step:06d}")
    assert losses(again) == losses(alone.folder)


@pytest.mark.parametrize("last", [1, STAGE_1, STAGE_1 + 1, STEPS - 1],
                         ids=["the first step", "a stage's last", "a shard's last", "the last but one"])
def test_a_run_stopped_after_any_step_and_resumed_has_the_bits_batches_rates_and_clock_of_one_left_alone(last, alone, tmp_path):
    flags, seen = [*alone.flags, f"--log_dir={tmp_path}"], []
    with pytest.raises(train.Preempted, match=f"^stopped after step {last}, which is saved; go on with the same command and --resume="):
        trained(flags, alone.num_devices, StopAfter(last), seen)
    run, = tmp_path.iterdir()
    manifest = json.loads((run / f"ckpt/step-{last:06d}/manifest.json").read_text())
    assert manifest["step"] == last and manifest["progress"]["seconds"][0] == pytest.approx(last, abs=1e-3)
    assert steps_written(run) == list(range(1, last + 1))
    assert trained([*flags, "--resume=auto"], alone.num_devices, seen=seen) == run
    assert seen == alone.seen and [step for _, step, _ in seen] == list(range(STEPS))
    assert bits(run / f"ckpt/step-{STEPS:06d}") == bits(alone.folder / f"ckpt/step-{STEPS:06d}")
    assert losses(run) == losses(alone.folder) and steps_written(run) == list(range(1, STEPS + 1))
    assert metrics_of(run)[-1]["train_time_s"] == pytest.approx(STEPS, abs=1e-3)
    assert metrics_of(alone.folder)[-1]["train_time_s"] == pytest.approx(STEPS, abs=1e-3)


def test_the_steps_named_are_where_a_stage_and_a_shard_end(alone):
    assert [stage for stage, _, _ in alone.seen] == [0] * STAGE_1 + [1] * (STEPS - STAGE_1)
    assert len({digest for _, _, digest in alone.seen}) == STEPS
    shards = train.Shards([], list(alone.tokens), {"bos_id": 256})
    cfg = train.Config(**json.loads((alone.folder / "config.json").read_text())["config"])
    first = [np.concatenate([np.concatenate(row) for row in rows]) for rows, _ in train.plan(shards, cfg)]
    if alone.num_devices == 8:  # the plain stream
        assert first[STAGE_1][-29:].tolist() == alone.tokens[0][-29:].tolist()
        assert first[STAGE_1 + 1][:29].tolist() == alone.tokens[1][:29].tolist()


# ---- Losses that are known ----

GOLDEN = Path(__file__).with_name("golden")


def machine():
    """What decides the bits of a CPU's program beside its source and compiler."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{platform.machine()}, {name[1] if name else platform.processor()}, {os.cpu_count()} cores"


def golden_run(home):
    """50 steps of the tiny preset with seed 0 on one device: losses as logged, and the SHA-256 of the last checkpoint."""
    folder = make_folder(home / "data")
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(train, "make_mesh", lambda mesh=train.make_mesh: mesh(devices))
        run = train.main(["--preset=tiny", "--steps=50", *folder, "--max_epochs=6", f"--log_dir={home}/logs", "--log_every=1"])
    rows = metrics_of(run)[:-1]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(run.glob("ckpt/step-000050/*.safetensors")))).hexdigest()
    return {"jax": jax.__version__, "numpy": np.__version__, "machine": machine(), "sha256": digest,
            "train_loss": [row["train_loss"] for row in rows], "val_loss": [row["val_loss"] for row in rows if "val_loss" in row]}


def test_the_tiny_preset_gives_its_known_losses_and_on_the_same_jax_and_machine_its_known_bits(tmp_path):
    """Written by `PYTHONPATH=. python tests/test_exact.py`, for each minor version of JAX."""
    jax.config.update("jax_disable_most_optimizations", False)
    found = golden_run(tmp_path)
    minor = ".".join(jax.__version__.split(".")[:2])
    files = sorted(GOLDEN.glob(f"jax-{minor}.json")) or sorted(GOLDEN.glob("jax-*.json"))
    assert files
    for known in (json.loads(path.read_text()) for path in files):
        assert len(found["train_loss"]) == 50 and len(found["val_loss"]) == 5
        for name in ("train_loss", "val_loss"):
            np.testing.assert_allclose(found[name], known[name], rtol=0, atol=1e-4)
        if all(known[key] == found[key] for key in ("jax", "machine")):
            assert found == known | {"numpy": np.__version__}


# ---- A long run ----

@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and open files are read from /proc")
def test_three_thousand_steps_leave_memory_compilations_and_open_files_where_they_were(tmp_path, monkeypatch):
    marks, compiled, real = [], [], train.compile_all
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None)

    def compile_all(*arguments):
        before = len(compiled)
        programs, notes = real(*arguments)
        marks.append(len(compiled) - before)

        def evaluate(*operands):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            marks.append((pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir("/proc/self/fd")), len(compiled)))
            return programs["eval"](*operands)
        return programs | {"eval": evaluate}, notes
    monkeypatch.setattr(train, "compile_all", compile_all)
    monkeypatch.setattr(train, "make_mesh", lambda mesh=train.make_mesh, devices=jax.devices()[:1]: mesh(devices))
    flags = ["--preset=tiny", "--steps=3000", "--batch_tokens=56,112", "--seq_len=14,28", "--val_tokens=58", "--val_seq_len=40",
             "--val_context=11", "--val_every=100", "--save_every=100", "--log_every=1", "--max_epochs=30", f"--log_dir={tmp_path}/logs"]
    with contextlib.redirect_stdout(io.StringIO()):
        folder = train.main([*flags, *make_folder(tmp_path / "data")], BIGRAM)
    num_compiled, *marks = marks
    assert num_compiled == 4 and len(marks) == 30  # first values, two stages, evaluation
    memory, files, later = zip(*marks[2:])  # from step 300 on
    print(f"memory at step 300: {memory[0]:.0f} MiB, then at most {max(memory) - memory[0]:+.1f} MiB; open files {sorted(set(files))}")
    assert max(memory) - memory[0] < 50 and len(set(files)) == 1 and len(set(later)) == 1
    assert steps_written(folder) == list(range(1, 3001))
    lines = (folder / "log.txt").read_text().split("=" * 120)[-1].strip().splitlines()
    wanted = (r"step:\d+/3000 train_loss:\d+\.\d{4}( val_loss:\d+\.\d{4})? train_time:\d+\.\d{3}s step:\d+\.\dms tok/s:\d+\.\d+[kM] mfu:- "
              r"wait:\d+\.\dms eta:\d+s|saved: step-\d{6} in \d+\.\ds|[a-z]+: .*|sha256:[0-9a-f]{64}")
    assert all(re.fullmatch(wanted, line) for line in lines) and sum(line.startswith("saved: ") for line in lines) == 30
    assert [row["step"] for row in metrics_of(folder)] == [*range(1, 3001), 3000]
    assert sorted(path.name for path in (folder / "ckpt").iterdir()) == ["step-002900", "step-003000"]


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as home:
        text = json.dumps(golden_run(Path(home)), indent=1)
    name = GOLDEN / f"jax-{'.'.join(jax.__version__.split('.')[:2])}.json"
    name.parent.mkdir(exist_ok=True)
    name.write_text(text + "\n")
    print(f"wrote {name}")
