"""cached_fineweb10B.py against a hub on loopback, as a process where signals or locks count."""

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest
from fake_hub import FakeHub, make_shard
from huggingface_hub import constants
from users_files import fill

import cached_fineweb10B as download

VAL = "fineweb_val_000000.bin"
ONE, TWO, THREE = (f"fineweb_train_00000{i}.bin" for i in (1, 2, 3))


def point_at(url, patch):
    """What HF_ENDPOINT=url does to a process that starts with it."""
    patch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch):
    for key in list(os.environ):
        if key.startswith("HF_") or key.lower().endswith("_proxy"):
            monkeypatch.delenv(key)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    with FakeHub([VAL, ONE, TWO, THREE]) as hub:
        point_at(hub.url, monkeypatch)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "it's [1] * é"


@pytest.fixture
def run(hub, folder, capsys):
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        code = download.main([*arguments, f"--dir={folder}"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def held(hub, folder, tmp_path):
    """held() -> a process that fetches a shard, of which a part has come."""
    processes = []

    def held():
        hub.downloads.clear()
        hub.hold_after[ONE] = 2000
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, download.__file__, "1", f"--dir={folder}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=env, text=True, **pipes)
        processes.append(process)
        deadline = time.monotonic() + 60
        while ONE not in hub.downloads or not (folder / VAL).exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        return process

    yield held
    for process in processes:
        process.kill()
        process.communicate()


def refusal(result):
    """The one sentence of a run that failed."""
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, result
    return err


def shards_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("fineweb*")}


def test_n_training_shards_and_the_validation_shard_arrive_and_are_fetched_once(hub, run, folder):
    assert run("2")[0] == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE, TWO)}
    assert sorted(hub.downloads) == sorted([VAL, ONE, TWO])
    code, out, _ = run("3")
    assert code == 0 and hub.downloads[3:] == [THREE]
    assert "all 4 shards" in out and "1 new, 3 skipped" in out
    assert "fineweb_train_000004.bin" in refusal(run())  # of the speedrun's 8 this hub has 3


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
    hub.files[TWO] = make_shard(TWO, 1500, version=2)  # a hub that vouches for what is no shard
    assert "begins with [20240520, 2]" in refusal(run("2"))
    hub.without_hash.add(TWO)
    fetched = len(hub.downloads)
    assert f"{TWO}: the hub has no SHA-256 of it" in refusal(run("2"))
    assert len(hub.downloads) == fetched and TWO not in shards_in(folder)


def test_a_shard_is_told_by_header_size_and_hash(tmp_path):
    good = make_shard(ONE, 5)
    cases = {
        b"": "begins with [0, 0]",
        b"<html>Too many requests": "wanted [20240520, 1]",
        make_shard(ONE, 5, version=2): "begins with [20240520, 2], wanted [20240520, 1]",
        good[:-1]: "1033 bytes, wanted 1034 for the 5 tokens",
        good + b"\0\0": "1036 bytes, wanted 1034",
        make_shard(TWO, 5): "SHA-256 ",
        good: "",
    }
    for data, words in cases.items():
        (tmp_path / ONE).write_bytes(data)
        said = download.problem_with(tmp_path / ONE, hashlib.sha256(good).hexdigest())
        assert words in said and bool(said) == bool(words), data[:20]


def test_a_damaged_shard_is_named_by_verify_and_replaced_by_the_next_run(hub, run, folder):
    assert run("2")[0] == 0
    assert run("--verify")[0] == 0
    stamp = (folder / ONE).stat().st_mtime_ns
    data = bytearray(hub.files[ONE])
    data[2000] ^= 1
    (folder / ONE).write_bytes(data)
    os.utime(folder / ONE, ns=(stamp, stamp))  # an old time stamp does not help it
    os.truncate(folder / TWO, 1600)
    before = shards_in(folder)
    said = refusal(run("--verify"))
    assert f"{ONE} (SHA-256 " in said and f"{TWO} (1600 bytes, " in said and VAL not in said
    printed = said[said.index("python cached_fineweb10B.py") :]
    assert shlex.split(printed)[1:] == ["cached_fineweb10B.py", "2", f"--dir={folder}"]
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


def test_wrong_arguments_and_no_network_are_one_sentence_and_leave_nothing(
    run, folder, monkeypatch
):
    cases = {"0": "N is 0, wanted 1 to 103", "104": "N is 104, ", "abc": "abc"}
    for argument, words in (cases | {"--verify": "has no shards"}).items():
        assert words in refusal(run(argument)), argument
    point_at("http://127.0.0.1:9", monkeypatch)
    assert "ConnectError" in refusal(run("1"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in refusal(run("1"))
    assert not folder.exists()


def test_a_run_that_is_stopped_leaves_no_half_shard_and_the_next_one_tidies_up(
    hub, held, run, folder
):
    for signum in (signal.SIGINT, signal.SIGKILL):
        process = held()
        process.send_signal(signum)
        _, err = process.communicate(timeout=10)
        assert process.returncode == -signum and "Traceback" not in err
        assert shards_in(folder) == {VAL: hub.files[VAL]}
    are_as_they_were = [fill(folder), fill(folder / ".incoming/.cache/huggingface/download")]
    hub.hold_after.clear()
    assert run("1")[0] == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE)}
    for is_as_it_was in are_as_they_were:
        is_as_it_was()
    cut_off = [path.name for path in folder.rglob("*.incomplete")]
    assert {*cut_off} == {"notes.incomplete"}


NO_LISTINGS = b"""[1]
{}
null
[{"type": "file"}]
[{"type": "x"}]
<html>
\xff""".split(b"\n")


def test_a_hub_that_speaks_nonsense_is_one_sentence_and_links_are_not_followed(hub, run, folder):
    for hub.listing in NO_LISTINGS:
        refusal(run("1"))
        assert not folder.exists()
    hub.listing = None
    mine = folder.parent / "mine"
    mine.write_bytes(b"mine")
    (folder / ".incoming").mkdir(parents=True)
    (folder / ".incoming" / ONE).symlink_to(mine)
    assert f"{ONE} is a link to elsewhere" in refusal(run("1"))
    (folder / ".incoming" / ONE).unlink()
    os.mkfifo(folder / TWO)
    assert f"{TWO} (no file)" in refusal(run("2", "--verify"))
    assert mine.read_bytes() == b"mine"


def test_a_second_download_into_the_same_folder_is_refused(hub, held, run, folder):
    first = held()
    assert "is held: wait for the other download" in refusal(run("1"))
    hub.released.set()
    assert first.wait(60) == 0
    assert shards_in(folder) == {name: hub.files[name] for name in (VAL, ONE)}
