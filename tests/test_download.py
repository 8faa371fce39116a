"""cached_fineweb10B.py as a user runs it: a process of its own, against a hub on loopback."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import FakeHub, make_shard

import cached_fineweb10B as download

SCRIPT = Path(download.__file__)
VAL = "fineweb_val_000000.bin"
ONE, TWO, THREE = (f"fineweb_train_00000{i}.bin" for i in (1, 2, 3))


@pytest.fixture
def hub():
    with FakeHub([VAL, ONE, TWO, THREE]) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shards"


@pytest.fixture
def start(hub, folder, tmp_path):
    """start(*arguments) -> the running script."""
    processes = []

    def start(*arguments, **env):
        clean = {}
        for key, value in os.environ.items():
            if not key.startswith("HF_") and not key.lower().endswith("_proxy"):
                clean[key] = value
        env = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **env}
        command = [sys.executable, SCRIPT, *arguments, f"--dir={folder}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=env, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments, **env):
        process = start(*arguments, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return run


def refusal(result):
    """The one sentence of a run that failed."""
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, result
    return err


def shards_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("fineweb*")}


def damage(path):
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


def test_n_training_shards_and_the_validation_shard_arrive_and_are_fetched_once(hub, run, folder):
    assert run("2")[0] == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE, TWO)}
    assert sorted(hub.downloads) == sorted([VAL, ONE, TWO])
    code, out, _ = run("3")
    assert code == 0 and hub.downloads[3:] == [THREE]
    assert "all 4 shards" in out and "1 new, 3 skipped" in out


def test_without_n_the_shards_of_the_speedrun_are_asked_for(run):
    assert "fineweb_train_000004.bin" in refusal(run())  # the first that this hub does not have


def test_a_transfer_that_breaks_off_is_taken_up_again(hub, run, folder):
    hub.break_after[ONE] = 1200
    assert run("1")[0] == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE)}
    assert hub.downloads.count(ONE) == 2


def test_wrong_bytes_never_get_a_shards_name_and_are_not_kept(hub, run, folder):
    hub.sent[ONE] = make_shard("other", 1500)
    assert f"{ONE} came wrong" in refusal(run("1"))
    assert shards_in(folder) == {VAL: hub.files[VAL]}
    hub.sent.clear()
    assert run("1")[0] == 0
    assert shards_in(folder)[ONE] == hub.files[ONE]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "begins with [0, 0]"),
        (b"<html>Too many requests", "wanted [20240520, 1]"),
        (make_shard(ONE, 5, version=2), "begins with [20240520, 2], wanted [20240520, 1]"),
        (make_shard(ONE, 5)[:-1], "1033 bytes, wanted 1034 for the 5 tokens"),
        (make_shard(ONE, 5) + b"\0\0", "1036 bytes, wanted 1034"),
        (make_shard(TWO, 5), "SHA-256 "),
        (make_shard(ONE, 5), ""),
    ],
)
def test_a_shard_is_told_by_header_size_and_hash(tmp_path, data, words):
    (tmp_path / ONE).write_bytes(data)
    sha256 = hashlib.sha256(make_shard(ONE, 5)).hexdigest()
    said = download.problem_with(tmp_path / ONE, sha256)
    assert words in said and bool(said) == bool(words)


def test_a_file_that_the_hub_vouches_for_but_is_no_shard_is_refused(hub, run, folder):
    hub.files[ONE] = make_shard(ONE, 1500, version=2)
    assert "begins with [20240520, 2]" in refusal(run("1"))
    assert ONE not in shards_in(folder)


def test_a_damaged_shard_is_named_by_verify_and_replaced_by_the_next_run(hub, run, folder):
    assert run("2")[0] == 0
    assert run("--verify")[0] == 0
    stamp = (folder / ONE).stat().st_mtime_ns
    damage(folder / ONE)
    os.utime(folder / ONE, ns=(stamp, stamp))  # an old time stamp does not help it
    os.truncate(folder / TWO, 1600)
    before = shards_in(folder)
    said = refusal(run("--verify"))
    assert f"{ONE} (SHA-256 " in said and f"{TWO} (1600 bytes, " in said and VAL not in said
    assert f"python cached_fineweb10B.py 2 --dir={folder}" in said
    assert f"{THREE} (missing)" in refusal(run("3", "--verify"))
    assert len(hub.downloads) == 3  # it only looks
    hub.sent[ONE] = b"<html>Too many requests</html>"
    refusal(run("1"))
    assert shards_in(folder) == before  # until another one has come, a damaged shard stays
    hub.sent.clear()
    fetched = len(hub.downloads)
    assert run("2")[0] == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE, TWO)}
    assert sorted(hub.downloads[fetched:]) == [ONE, TWO]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["0"], "N is 0, wanted 1 to 103"),
        (["104"], "N is 104, wanted 1 to 103"),
        (["abc"], "abc"),
        (["--verify"], "has no shards"),
    ],
)
def test_wrong_arguments_are_one_sentence(folder, arguments, words, capsys):
    code = download.main([*arguments, f"--dir={folder}"])
    assert words in refusal((code, "", capsys.readouterr().err))
    assert not folder.exists()


def test_without_a_network_it_says_so_in_one_sentence(run, folder):
    assert "ConnectError" in refusal(run("1", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "offline" in refusal(run("1", HF_HUB_OFFLINE="1"))
    assert not folder.exists()


def test_a_hub_that_states_no_sha256_is_not_trusted(hub, run, folder):
    hub.without_hash.add(ONE)
    assert f"{ONE}: the hub has no SHA-256 of it" in refusal(run("1"))
    assert hub.downloads == []


def wait_for_half_a_shard(hub, process, folder):
    deadline = time.monotonic() + 60
    while ONE not in hub.downloads or not (folder / VAL).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_half_shard_and_the_next_one_tidies_up(
    hub, start, run, folder, signum
):
    hub.hold_after[ONE] = 2000
    process = start("1")
    wait_for_half_a_shard(hub, process, folder)
    process.send_signal(signum)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signum and "Traceback" not in err
    assert shards_in(folder) == {VAL: hub.files[VAL]}
    mine = folder / ".incoming" / "notes.txt"
    mine.write_text("not the downloader's")
    hub.hold_after.clear()
    assert run("1")[0] == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE)}
    assert mine.exists() and not list(folder.rglob("*.incomplete"))


def test_a_second_download_into_the_same_folder_is_refused(hub, start, run, folder):
    hub.hold_after[ONE] = 1200
    first = start("1")
    wait_for_half_a_shard(hub, first, folder)
    assert "is held: wait for the other download" in refusal(run("1"))
    hub.released.set()
    assert first.wait(60) == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE)}


def test_it_needs_neither_jax_nor_train(tmp_path):
    code = (
        "import sys, cached_fineweb10B\n"
        "assert not {'jax', 'train', 'einops', 'safetensors'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
