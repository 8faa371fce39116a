"""The same bits: of two runs, of a run stopped anywhere and resumed, and of the known losses."""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401 (its devices, where this file is run by itself)
import jax
import numpy as np
import pytest
from shards import BOS, TINY, documents, make_folder
from victim import BIGRAM

import train

STEPS, STAGE_1 = 12, 6
SIZES = [
    TINY,
    f"--steps={STEPS}",
    "--num_layers=1",
    "--model_dim=24",
    "--head_dim=8",
    "--mlp_dim=40",
    "--skips=",
    "--late_inputs=",
    "--backout=",
    "--offset_layers=0",
    "--long_layers=0",
    "--stages.batch_tokens=56,112",
    "--stages.seq_len=14,28",
    "--stages.short=9,16",
    "--stages.long=20,24",
    "--val_tokens=300",
    "--val.seq_len=40",
    "--val_context=11",
    "--warmup_steps=2",
    "--val_every=4",
    "--save_every=5",
    "--log_every=1",
    "--shuffle=false",
]
SHARD_0 = 28 * 16 + 1  # tokens: read by 6 steps of 56 and one of 112


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of one config share their programs, which are not optimized. No waiting for disks."""
    programs, real = {}, train.compile_all
    elsewhere = dict.fromkeys(("log_dir", "resume", "train_files", "val_files"))

    def remembered(model, mesh, cfg):
        key = model.loss, mesh, train.replace(cfg, **elsewhere)
        if key not in programs:
            programs[key] = real(model, mesh, cfg)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_all", remembered)
        patch.setattr(os, "sync", lambda: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def run_on(num_devices, *arguments):
    """train.main on some of the devices, without its console."""
    devices, make_mesh = jax.devices()[:num_devices], train.make_mesh
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(train, "make_mesh", lambda: make_mesh(devices))
        return train.main(*arguments)


def ticking(patch):
    """A clock by which only tick(seconds) takes a while, and all else next to nothing."""
    now = [0.0]

    def tick(seconds=1e-7):
        now[0] += seconds
        return now[0]

    real = train.time
    clock = SimpleNamespace(
        perf_counter=tick, process_time=tick, strftime=real.strftime, gmtime=real.gmtime
    )
    patch.setattr(train, "time", clock)
    return tick


def trained(flags, num_devices, seen, hook=lambda step: False):
    """Run folder. A step takes a second, an evaluation and a checkpoint a thousand.

    seen: gets (program, step of the optimizer, SHA-256 of the batch) of each training step.
    """
    with pytest.MonkeyPatch.context() as patch:
        tick, compile_all, save = ticking(patch), train.compile_all, train.save_checkpoint

        def watched(name, program, state, batch):
            tokens = np.asarray(batch["tokens"])
            if name == "eval":
                tick(1000)
            elif (tokens != train.NO_TOKEN).any():  # the warm-up's batches are empty
                seen.append((name, int(state.step), hashlib.sha256(tokens.tobytes()).hexdigest()))
                tick(1)
            return program(state, batch)

        def watch_all(*arguments):
            programs, notes = compile_all(*arguments)
            more = {
                name: lambda *pair, name=name: watched(name, programs[name], *pair)
                for name in programs
                if name != "init"
            }
            return programs | more, notes

        patch.setattr(train, "compile_all", watch_all)
        patch.setattr(train, "save_checkpoint", lambda *parts: (tick(1000), save(*parts))[1])
        return run_on(num_devices, [*SIZES, *flags], train.GPT, hook)


def bits(folder, step):
    files = (folder / f"ckpt/step-{step:06d}").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    keys = ("step", "tokens", "train_loss", "val_loss", "lr", "stage")
    return [[row.get(key) for key in keys] for row in metrics_of(folder)]


@pytest.fixture(
    scope="module",
    params=[(8, False), (1, True)],
    ids=["8 devices, a plain stream", "1 device, packed documents"],
)
def alone(request, tmp_path_factory):
    """A run that was left alone, on two shards."""
    home, (num_devices, packed), seen = tmp_path_factory.mktemp("alone"), request.param, []
    tokens = documents(1, 20)[:SHARD_0], documents(2, 120)
    flags = [*make_folder(home / "data", train=tokens), f"--stages.doc_len={20 * packed}"]
    folder = trained([*flags, f"--log_dir={home}/logs"], num_devices, seen)
    return SimpleNamespace(
        num_devices=num_devices, tokens=tokens, flags=flags, folder=folder, seen=seen
    )


def test_two_runs_of_one_config_have_the_same_bits(alone, tmp_path):
    seen = []
    again = trained([*alone.flags, f"--log_dir={tmp_path}"], alone.num_devices, seen)
    for step in (10, STEPS):
        assert len(bits(again, step)) == 2 and bits(again, step) == bits(alone.folder, step)
    assert losses(again) == losses(alone.folder) and seen == alone.seen


@pytest.mark.parametrize(
    "last",
    [1, STAGE_1, STAGE_1 + 1, STEPS - 1],
    ids=["the first step", "a stage's last", "a shard's last", "the last but one"],
)
def test_a_run_stopped_after_any_step_and_resumed_is_as_one_left_alone(last, alone, tmp_path):
    flags, seen = [*alone.flags, f"--log_dir={tmp_path}"], []
    with pytest.raises(SystemExit) as stopped:
        trained(flags, alone.num_devices, seen, lambda step: step == last)
    assert stopped.value.code == 75 and len(seen) == last
    (run,) = tmp_path.iterdir()
    manifest = json.loads((run / f"ckpt/step-{last:06d}/manifest.json").read_text())
    assert manifest["step"] == last
    assert manifest["progress"]["seconds"][0] == pytest.approx(last, abs=1e-3)
    assert trained([*flags, "--resume=auto"], alone.num_devices, seen) == run
    assert seen == alone.seen and [step for _, step, _ in seen] == list(range(STEPS))
    assert bits(run, STEPS) == bits(alone.folder, STEPS)
    assert losses(run) == losses(alone.folder)
    for folder in (run, alone.folder):
        assert metrics_of(folder)[-1]["train_time_s"] == pytest.approx(STEPS, abs=1e-3)


def test_the_steps_named_are_where_a_stage_and_a_shard_end(alone):
    names = [name for name, _, _ in alone.seen]
    assert names == ["train_0"] * STAGE_1 + ["train_1"] * (STEPS - STAGE_1)
    assert len({digest for _, _, digest in alone.seen}) == STEPS
    if alone.num_devices == 8:  # the plain stream
        cfg = train.replace(train.parse_flags([*SIZES, *alone.flags]), bos_id=BOS)
        steps = list(train.plan(train.Shards([], alone.tokens, {}), cfg))
        last, first = steps[STAGE_1][0][-1], steps[STAGE_1 + 1][0][0]
        assert np.concatenate(last).tolist() == alone.tokens[0][-29:].tolist()
        assert np.concatenate(first).tolist() == alone.tokens[1][:29].tolist()


# ---- Losses that are known ----

GOLDEN = Path(__file__).with_name("golden")


def machine():
    """What decides the bits of a CPU's program beside its source and compiler."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name, flags = (re.search(rf"{key}\s*: (.*)", info) for key in ("model name", "flags"))
    digest = hashlib.sha256((flags[1] if flags else "").encode()).hexdigest()[:8]
    model = name[1] if name else platform.processor()
    return f"{platform.machine()}, {model}, flags {digest}, {os.cpu_count()} cores"


def golden_run(home):
    """50 steps of the tiny preset: its losses, and the SHA-256 of the last checkpoint."""
    flags = [TINY, "--steps=50", *make_folder(home / "data"), "--max_epochs=6", "--log_every=1"]
    run = run_on(1, [*flags, f"--log_dir={home}/logs"])
    rows = metrics_of(run)[:-1]
    files = sorted(bits(run, 50).items())
    return {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "machine": machine(),
        "sha256": hashlib.sha256(b"".join(blob for _, blob in files)).hexdigest(),
        "train_loss": [round(row["train_loss"], 6) for row in rows],
        "val_loss": [round(row["val_loss"], 6) for row in rows if "val_loss" in row],
    }


def test_the_tiny_preset_gives_its_known_losses_and_on_the_same_jax_and_machine_its_known_bits(
    tmp_path,
):
    """The same sums in another order: the two files themselves are 1.2e-5 apart.

    Written by `PYTHONPATH=. python tests/test_exact.py`, for each minor version of JAX.
    """
    jax.config.update("jax_disable_most_optimizations", False)
    found = golden_run(tmp_path)
    names, apart = ("train_loss", "val_loss"), []
    files = [json.loads(path.read_text()) for path in GOLDEN.glob("jax-*.json")]
    for known in files:
        pairs = [(found[name], known[name]) for name in names]
        assert [tuple(map(len, pair)) for pair in pairs] == [(50, 50), (5, 5)]
        apart.append(max(np.abs(np.subtract(*pair)).max() for pair in pairs))
    assert min(apart) < 1e-5 and max(apart) < 2e-5, apart
    for known in files:
        if "sha256" in known and all(known[key] == found[key] for key in ("jax", "machine")):
            assert found["sha256"] == known["sha256"]


# ---- A long run ----


@pytest.mark.system
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_three_thousand_steps_leave_memory_compilations_and_open_files_where_they_were(tmp_path):
    marks, compiled = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )

    def hook(step):
        if step % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            mib = pages * os.sysconf("SC_PAGESIZE") / 2**20
            marks.append((mib, len(os.listdir("/proc/self/fd")), len(compiled)))

    flags = [
        "--steps=3000",
        "--val_every=100",
        "--save_every=100",
        "--log_every=1",
        "--max_epochs=30",
        f"--log_dir={tmp_path}/logs",
        *make_folder(tmp_path / "data"),
    ]
    folder = run_on(1, flags, BIGRAM, hook)
    memory, files, later = zip(*marks[2:], strict=True)  # from step 300 on
    assert len(marks) == 30 and max(memory) - memory[0] < 50
    assert len(set(files)) == 1 and len(set(later)) == 1 and later[0] >= 4
    assert [row["step"] for row in metrics_of(folder)] == [*range(1, 3001), 3000]
    kept = sorted(path.name for path in (folder / "ckpt").iterdir())
    assert kept == ["step-002900", "step-003000"]


if __name__ == "__main__":  # losses that are known stay, where their file is not deleted first
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        found = golden_run(Path(home))
    file = GOLDEN / f"jax-{'.'.join(jax.__version__.split('.')[:2])}.json"
    known = json.loads(file.read_text()) if file.exists() else found
    kept = {name: known[name] for name in ("train_loss", "val_loss")}
    file.write_text(json.dumps(found | kept, indent=1) + "\n")
    print(f"wrote {file}")
