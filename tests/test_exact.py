"""The same bits: of two runs, of a run stopped anywhere and resumed, and of the known losses."""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401 (its devices, where this file is run by itself)
import jax
import numpy as np
import pytest
from shards import TINY, TRAIN, documents, make_folder
from victim import BIGRAM, MATRIX, SMALL, compiled_once, metrics_of, weights_of

import train

SHARD_0 = 28 * 16 + 1  # tokens: read by 6 steps of 56 and one of 112
TOKENS = documents(1, 20)[:SHARD_0], documents(2, 120)


class Case(NamedTuple):
    """A run, and places where it is stopped."""

    model: train.Model
    num_devices: int
    flags: list
    steps: int
    stops: dict
    tokens: tuple = TOKENS  # of the two training shards


CASES = {
    "the tiny preset, 1 device": Case(
        train.GPT,
        1,
        [TINY, "--steps=50", "--max_epochs=6", "--log_every=1"],
        50,
        {1: "the first step", 25: "a stage's last", 49: "the last but one"},
        TRAIN,
    ),
    "matrices, 8 devices, a plain stream": Case(
        MATRIX,
        8,
        ["--save_every=5"],
        12,
        {1: "the first step", 6: "a stage's last", 7: "a shard's last", 11: "the last but one"},
    ),
    "matrices, 8 devices, packed documents": Case(
        MATRIX, 8, ["--stages.doc_len=20"], 12, {6: "a stage's last", 10: "within a stage"}
    ),
}

compiled_once = pytest.fixture(compiled_once, scope="module", autouse=True)


def run_on(num_devices, *arguments):
    """train.main on some of the devices, without its console."""
    devices, make_mesh = jax.devices()[:num_devices], train.make_mesh
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(train, "make_mesh", lambda: make_mesh(devices))
        return train.main(*arguments)


def losses(folder):
    keys = ("step", "tokens", "train_loss", "val_loss", "lr", "stage")
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[row.get(key) for key in keys] for row in rows]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, compiled_once):
    """(name of a case) -> (its flags, the folder of a run that was left alone), run once."""

    @functools.cache
    def run(name):
        case, home = CASES[name], tmp_path_factory.mktemp("alone")
        flags = [*case.flags, *make_folder(home / "data", train=case.tokens)]
        return flags, run_on(case.num_devices, [*flags, f"--log_dir={home}/logs"], case.model)

    return run


@pytest.mark.parametrize("name", CASES)
def test_two_runs_of_one_config_have_the_same_bits(name, left_alone, tmp_path):
    case, (flags, alone) = CASES[name], left_alone(name)
    again = run_on(case.num_devices, [*flags, f"--log_dir={tmp_path}"], case.model)
    checkpoints = [path.name for path in (alone / "ckpt").iterdir()]
    assert f"step-{case.steps:06d}" in checkpoints
    for checkpoint in checkpoints:
        step = int(checkpoint[5:])
        weights = weights_of(again, step)
        assert len(weights) == 2 and weights == weights_of(alone, step)
    assert losses(again) == losses(alone)


@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_after_any_step_and_resumed_is_as_one_left_alone(name, left_alone, tmp_path):
    """One run, stopped at each of the places."""
    case, (flags, alone) = CASES[name], left_alone(name)
    flags = [*flags, f"--log_dir={tmp_path}", "--resume=auto"]
    for last, place in case.stops.items():
        with pytest.raises(SystemExit) as stopped:
            run_on(case.num_devices, flags, case.model, lambda step, last=last: step == last)
        assert stopped.value.code == 75
        (run,) = tmp_path.iterdir()
        manifest = json.loads((run / f"ckpt/step-{last:06d}/manifest.json").read_text())
        assert manifest["step"] == last
        assert losses(run) == losses(alone)[:last], place
    assert run_on(case.num_devices, flags, case.model) == run
    assert losses(run) == losses(alone)
    assert weights_of(run, case.steps) == weights_of(alone, case.steps)


def test_the_stops_are_where_a_stage_and_a_shard_end():
    for name, case in CASES.items():
        cfg = train.parse_flags(case.flags, "demo", case.model.presets)
        (middle,) = cfg.bounds[1:-1]
        assert case.stops[middle] == "a stage's last" and cfg.steps == case.steps, name
    steps = list(train.plan(train.Shards([], TOKENS, {}), SMALL))
    last, first = steps[6][0][-1], steps[7][0][0]
    assert np.concatenate(last).tolist() == TOKENS[0][-29:].tolist()
    assert np.concatenate(first).tolist() == TOKENS[1][:29].tolist()


# ---- What is known of the tiny preset ----

GOLDEN = Path(__file__).with_name("golden")
GPT_CASE = "the tiny preset, 1 device"


def machine():
    """What decides the bits of a CPU's program beside its source and compiler."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name, flags = (re.search(rf"{key}\s*: (.*)", info) for key in ("model name", "flags"))
    digest = hashlib.sha256((flags[1] if flags else "").encode()).hexdigest()[:8]
    model = name[1] if name else platform.processor()
    return f"{platform.machine()}, {model}, flags {digest}, {os.cpu_count()} cores"


def found_in(run):
    """Of a run of the tiny preset: its losses, and the SHA-256 of the last checkpoint."""
    rows = metrics_of(run)[:-1]
    files = sorted(weights_of(run, 50).items())
    return {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "machine": machine(),
        "sha256": hashlib.sha256(b"".join(blob for _, blob in files)).hexdigest(),
        "train_loss": [round(row["train_loss"], 6) for row in rows],
        "val_loss": [round(row["val_loss"], 6) for row in rows if "val_loss" in row],
    }


def optimized_run(home):
    """The tiny preset as it is compiled for use."""
    jax.config.update("jax_disable_most_optimizations", False)
    case = CASES[GPT_CASE]
    flags = [*case.flags, *make_folder(home / "data"), f"--log_dir={home}/logs"]
    return found_in(run_on(case.num_devices, flags))


def known_files():
    return [json.loads(path.read_text()) for path in GOLDEN.glob("jax-*.json")]


def assert_known(found):
    """The same sums in another order: the two files themselves are 1.2e-5 apart."""
    apart = []
    for known in known_files():
        pairs = [(found[name], known[name]) for name in ("train_loss", "val_loss")]
        assert [tuple(map(len, pair)) for pair in pairs] == [(50, 50), (5, 5)]
        apart.append(max(np.abs(np.subtract(*pair)).max() for pair in pairs))
    assert min(apart) < 1e-5 and max(apart) < 2e-5, apart


def test_the_tiny_preset_gives_its_known_losses(left_alone):
    assert_known(found_in(left_alone(GPT_CASE)[1]))


@pytest.mark.system
def test_the_tiny_preset_gives_its_known_losses_and_on_the_same_jax_and_machine_its_known_bits(
    tmp_path,
):
    """Written by `PYTHONPATH=. python tests/test_exact.py`, for each minor version of JAX."""
    found = optimized_run(tmp_path)
    assert_known(found)
    for known in known_files():
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

    flags = ["--steps=3000", "--val_every=100", "--save_every=100", "--max_epochs=30"]
    flags += [f"--log_dir={tmp_path}/logs", *make_folder(tmp_path / "data")]
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
        found = optimized_run(Path(home))
    file = GOLDEN / f"jax-{'.'.join(jax.__version__.split('.')[:2])}.json"
    known = json.loads(file.read_text()) if file.exists() else found
    kept = {name: known[name] for name in ("train_loss", "val_loss")}
    file.write_text(json.dumps(found | kept, indent=1) + "\n")
    print(f"wrote {file}")
