"""cached_fineweb10B.py as a user runs it: a process of its own, against a hub on loopback that fails in many ways."""

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_hub import COMMIT, REPO, FakeHub, make_shard

import cached_fineweb10B as download

SCRIPT = Path(download.__file__).resolve()
VAL, ONE, TWO, THREE = download.shard_names(3)
# The script as __main__, with the waits between retries cut to a fiftieth.
HURRIED = "import runpy, sys, time; nap = time.sleep; time.sleep = lambda s: nap(s / 50); {prelude}; " \
          "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def start(hub, tmp_path):
    """start(*arguments) -> the running script. Shards go to tmp_path/shards."""
    def start(*arguments, prelude="pass", **env):
        clean = {key: value for key, value in os.environ.items()
                 if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
        env = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **env}
        command = [sys.executable, "-c", HURRIED.format(prelude=prelude), SCRIPT, *arguments]
        command += ["--dir", tmp_path / "shards"]
        process = subprocess.Popen([str(word) for word in command], env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        return process

    processes = []
    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """run(*arguments) -> (exit status, stdout, stderr); a failure must be exactly one line on stderr."""
    def run(*arguments, **kwargs):
        process = start(*arguments, **kwargs)
        out, err = process.communicate(timeout=120)
        assert len(err.splitlines()) == (process.returncode != 0), err
        return process.returncode, out, err
    return run


@pytest.fixture
def shards(tmp_path):
    return tmp_path / "shards"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def flip_a_bit(path, offset=2000):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def assert_complete(folder, hub, names):
    assert names_in(folder) == sorted(["SHA256SUMS", *names])  # and no staging folder
    assert all((folder / name).read_bytes() == hub.files[name] for name in names)
    lines = [f"{hashlib.sha256(hub.files[name]).hexdigest()}  {name}\n" for name in sorted(names)]
    assert (folder / "SHA256SUMS").read_text() == "".join(lines)


# ---- What goes well ----

def test_n_training_shards_and_the_validation_shard_arrive_verified(hub, run, shards):
    status, out, _ = run(2)
    assert status == 0
    assert f"{REPO} at main is commit {COMMIT}" in out
    assert out.count("fetched and verified") == 3
    assert f"all 3 shards (0.00 GB) verified in {shards}: 3 fetched, 0 skipped" in out
    assert_complete(shards, hub, [VAL, ONE, TWO])


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_sha256sum_can_read_the_recorded_hashes(hub, run, shards):
    run(1)
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=shards, capture_output=True).returncode == 0
    flip_a_bit(shards / ONE)
    assert subprocess.run(command, cwd=shards, capture_output=True).returncode == 1


def test_a_second_run_asks_for_no_bytes(hub, run, shards):
    run(2)
    assert len(hub.bodies()) == 3
    status, out, _ = run(2)
    assert (status, len(hub.bodies())) == (0, 3)
    assert out.count("here and verified, skipped") == 3 and "0 fetched, 3 skipped" in out
    assert_complete(shards, hub, [VAL, ONE, TWO])


def test_the_record_keeps_shards_beyond_n_and_forgets_shards_that_are_gone(hub, run, shards):
    run(3)
    (shards / THREE).unlink()
    assert run(1)[0] == 0
    assert_complete(shards, hub, [VAL, ONE, TWO])


def test_the_default_is_what_the_speedrun_reads(run):
    status, _, err = run()  # the fake hub has 3 training shards
    assert status == 3
    assert any(name in err for name in download.shard_names(download.SPEEDRUN_SHARDS)[4:])


def test_the_token_goes_to_the_hub_and_never_to_the_host_of_the_bytes(hub, run):
    assert run(1, HF_TOKEN="hf_secret")[0] == 0
    sent = {(method, authorization) for method, name, _, authorization in hub.requests if name in hub.files}
    assert sent == {("HEAD", "Bearer hf_secret"), ("GET", "Bearer hf_secret"), ("BODY", None)}


def test_importing_the_script_does_nothing(tmp_path):
    code = "import cached_fineweb10B, threading; assert threading.active_count() == 1"
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert names_in(tmp_path) == []


# ---- Wrong arguments ----

@pytest.mark.parametrize("n", ["0", "104", "abc", "²"])
def test_an_n_out_of_range_is_refused_in_one_sentence(run, shards, n):
    status, _, err = run(n)
    assert status == 2
    assert err == f"N is {n}, expected a whole number from 1 to 103, as in: python cached_fineweb10B.py 8\n"
    assert not shards.exists()


def test_an_unknown_revision_is_named(run):
    status, _, err = run(1, "--revision", "v99")
    assert status == 3
    assert f"{VAL}: the hub answered HTTP 404 for this file of the dataset {REPO} at revision v99" in err


# ---- Broken transfers ----

@pytest.mark.parametrize("how, percent", [("cut", 0), ("cut", 99), ("reset", 50)])
def test_a_broken_transfer_goes_on_from_where_it_broke(hub, run, shards, how, percent):
    hub.files[ONE] = make_shard(1, 150_000)
    size = len(hub.files[ONE])
    hub.on_get[ONE] = iter([(how, size * percent // 100)])
    status, _, _ = run(1)
    ranges = [byte_range for name, byte_range in hub.bodies() if name == ONE]
    assert (status, len(ranges), ranges[0]) == (0, 2, None)
    if how == "cut":  # a reset may drop bytes that were sent but not yet read
        assert ranges[1] == (f"bytes={size * percent // 100}-" if percent else None)
    assert_complete(shards, hub, [VAL, ONE])


def test_a_transfer_that_falls_silent_is_taken_up_again(hub, run, shards):
    hub.on_get[ONE] = iter([("hold", 2000)])
    assert run(1, HF_HUB_DOWNLOAD_TIMEOUT="1")[0] == 0
    assert hub.bodies()[-1] == (ONE, "bytes=2000-")
    assert_complete(shards, hub, [VAL, ONE])


def test_many_breaks_are_borne_as_long_as_each_attempt_brings_something(hub, run, shards):
    hub.on_get[ONE] = iter([("cut", 250)] * 9)  # more breaks than there are retries
    assert run(1)[0] == 0
    assert_complete(shards, hub, [VAL, ONE])


def test_a_server_that_always_breaks_off_is_given_up_and_leaves_no_shard(hub, run, shards):
    hub.on_get[ONE] = itertools.chain([("cut", 2000)], itertools.repeat(("cut", 0)))
    status, _, err = run(1)
    assert status == 3
    assert err.startswith(f"{ONE}: RemoteProtocolError") and f"after 2000 of {len(hub.files[ONE])} bytes" in err
    assert "run the same command again" in err
    assert names_in(shards) == sorted([".incoming", "SHA256SUMS", VAL])
    hub.on_get.clear()
    assert run(1)[0] == 0  # the run after it goes on from byte 2000
    assert hub.bodies()[-1] == (ONE, "bytes=2000-")
    assert_complete(shards, hub, [VAL, ONE])


def test_a_server_without_ranges_is_read_again_from_the_start(hub, run, shards):
    hub.ranges = False
    hub.on_get[ONE] = iter([("cut", 2000)])
    assert run(1)[0] == 0
    assert_complete(shards, hub, [VAL, ONE])


def test_three_server_errors_and_then_an_answer_complete(hub, run, shards):
    hub.on_head[VAL], hub.on_head[ONE] = iter([500, 502, 503]), iter([503, 429, 500])
    hub.on_get[ONE] = iter([500, 500, 500])
    assert run(1)[0] == 0
    assert_complete(shards, hub, [VAL, ONE])


def test_a_redirect_loop_is_given_up(hub, run, shards):
    hub.loop = True
    status, _, err = run(1)
    assert (status, "TooManyRedirects" in err) == (3, True)
    assert names_in(shards) == []


def test_a_killed_download_is_resumed_by_the_next_run(hub, start, run, shards):
    size = interrupted(hub, start, shards, signal.SIGKILL)[1]
    assert run(1)[0] == 0
    assert hub.bodies()[-1] == (ONE, f"bytes={size}-")
    assert_complete(shards, hub, [VAL, ONE])


def test_ctrl_c_stops_at_once_without_a_traceback_and_the_next_run_goes_on(hub, start, run, shards):
    process, size = interrupted(hub, start, shards, signal.SIGINT)
    assert process.returncode == 130
    assert process.stderr.read() == "\nstopped; run the same command again, it goes on from there\n"
    assert run(1)[0] == 0
    assert hub.bodies()[-1] == (ONE, f"bytes={size}-")
    assert_complete(shards, hub, [VAL, ONE])


def interrupted(hub, start, shards, signum):
    """Signals the script when ONE has stopped half-way and VAL is done. Returns (process, bytes of ONE on disk)."""
    hub.files[ONE] = make_shard(1, 150_000)
    hub.on_get[ONE] = iter([("hold", 131_072)])
    # A shell that starts pytest in the background would have SIGINT ignored here too.
    process = start(1, prelude="import signal; signal.signal(signal.SIGINT, signal.default_int_handler)")
    part = shards / ".incoming" / f"{ONE}.{hashlib.sha256(hub.files[ONE]).hexdigest()[:16]}.part"
    deadline = time.monotonic() + 100
    while not (part.exists() and part.stat().st_size > 100_000 and VAL in names_in(shards)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    process.wait(timeout=30)
    assert ONE not in names_in(shards)
    return process, part.stat().st_size


def test_two_downloads_at_once_share_the_work(hub, start, shards):
    hub.on_get[ONE] = iter([("hold", 1200)])
    first, second = start(1), None
    while not hub.bodies():
        time.sleep(0.02)
    second = start(1)
    assert second.stdout.readline().startswith(REPO)
    assert second.stdout.readline() == f"another download is at work in {shards}; waiting for it\n"
    hub.released.set()
    assert (first.wait(100), second.wait(100)) == (0, 0)
    assert "0 fetched, 2 skipped" in second.stdout.read()
    assert len(hub.bodies()) == 2
    assert_complete(shards, hub, [VAL, ONE])


# ---- Wrong bytes ----

def test_wrong_bytes_of_the_right_size_are_fetched_once_more_and_then_refused(hub, run, shards):
    wrong = bytearray(hub.files[ONE])
    wrong[-1] ^= 128
    hub.served[ONE] = bytes(wrong)
    status, _, err = run(1)
    want, came = (hashlib.sha256(data).hexdigest()[:16] for data in (hub.files[ONE], wrong))
    assert status == 3
    assert err.startswith(f"{ONE}: fetched twice from the dataset {REPO} at {COMMIT}, and wrong again")
    assert f"SHA-256 {came}, expected {want}" in err
    assert [body for body in hub.bodies() if body[0] == ONE] == [(ONE, None)] * 2
    assert ONE not in names_in(shards) and not list(shards.glob(".incoming/*.part"))


def test_a_file_with_the_right_hash_but_no_shard_header_is_refused(hub, run, shards):
    hub.files[ONE] = make_shard(1, 1501, magic=20240521)
    status, _, err = run(1)
    assert status == 3
    assert err.startswith(f"{ONE}: ") and "magic number 20240521 and version 1, expected 20240520 and 1" in err
    assert ONE not in names_in(shards)


def test_a_damaged_leftover_is_not_built_upon(hub, run, shards):
    hub.on_get[ONE] = itertools.chain([("cut", 2000)], itertools.repeat(("cut", 0)))
    assert run(1)[0] == 3
    part, = shards.glob(".incoming/*.part")
    flip_a_bit(part, 1500)
    hub.on_get.clear()
    assert run(1)[0] == 0
    assert hub.bodies()[-2:] == [(ONE, "bytes=2000-"), (ONE, None)]
    assert_complete(shards, hub, [VAL, ONE])


@pytest.mark.parametrize("damage", [
    flip_a_bit, lambda path: path.write_text("<html>Too many requests</html>")], ids=["flipped", "error page"])
def test_a_damaged_shard_is_found_and_replaced(hub, run, shards, damage):
    run(1)
    before = (shards / ONE).stat()
    damage(shards / ONE)
    os.utime(shards / ONE, ns=(before.st_atime_ns, before.st_mtime_ns))  # an old time stamp must not help it
    status, out, _ = run(1)
    assert status == 0
    assert f"{VAL}: here and verified, skipped" in out and "1 fetched, 1 skipped" in out
    assert_complete(shards, hub, [VAL, ONE])


def test_a_damaged_shard_loses_its_name_even_when_the_new_one_does_not_come(hub, run, shards):
    run(1)
    flip_a_bit(shards / ONE)
    hub.on_get[ONE] = itertools.repeat(404)
    status, _, err = run(1)
    assert (status, err.startswith(f"{ONE}: HTTP 404")) == (3, True)
    assert ONE not in names_in(shards) and ONE not in (shards / "SHA256SUMS").read_text()


@pytest.mark.parametrize("etag", ["0123456789abcdef0123456789abcdef01234567", ""], ids=["of git", "none"])
def test_a_hub_that_gives_no_sha256_is_not_trusted(hub, run, shards, etag):
    hub.etags[ONE] = etag
    status, _, err = run(1)
    assert (status, err.startswith(f"{ONE}: the hub gave size {len(hub.files[ONE])}, ")) == (3, True)
    assert "expected a size, a commit and a SHA-256" in err
    assert hub.bodies() == []


@pytest.mark.parametrize("header, words", [
    (b"", "magic number 0 and version 0"), (b"version https://git-lfs", "magic number"),
    (make_shard(0, 5, version=2), "version 2, expected 20240520 and 1"),
    (make_shard(0, 5)[:900], "900 bytes, expected 1034"), (make_shard(0, 5)[:-1], "1033 bytes, expected 1034"),
    (make_shard(0, 5) + b"\0\0", "1036 bytes, expected 1034 for the 5 tokens"),
    (make_shard(0, 0)[:8] + b"\xff" * 4 + bytes(1012), "1024 bytes, expected 1022 for the -1 tokens"),
])
def test_a_file_that_is_no_shard_is_told_apart_by_header_and_size(tmp_path, header, words):
    (tmp_path / "shard").write_bytes(header)
    assert words in download.problem_with(tmp_path / "shard", [hashlib.sha256(header).hexdigest()])


# ---- --verify, and no network ----

def test_verify_accepts_good_shards_and_fetches_nothing(hub, run, shards):
    run(2)
    fetched = len(hub.bodies())
    status, out, _ = run("--verify")
    assert (status, out.splitlines()[-1]) == (0, "all 3 shards verified against SHA256SUMS and the hub")
    assert len(hub.bodies()) == fetched


def test_verify_names_every_bad_shard(hub, run, shards):
    run(3)
    flip_a_bit(shards / ONE)
    os.truncate(shards / TWO, 1600)
    before = {path: path.read_bytes() for path in shards.iterdir()}
    for endpoint in (hub.url, "http://127.0.0.1:9"):
        status, _, err = run("--verify", HF_ENDPOINT=endpoint)
        assert (status, err.startswith(f"2 of 4 shards in {shards} did not verify")) == (3, True)
        assert f"{ONE} (SHA-256 " in err and f"{TWO} (1600 bytes, expected " in err
        assert VAL not in err and THREE not in err
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


def test_verify_finds_a_shard_whose_record_was_changed_to_match(hub, run, shards):
    run(1)
    sums, old = (shards / "SHA256SUMS"), hashlib.sha256((shards / ONE).read_bytes()).hexdigest()
    flip_a_bit(shards / ONE)
    sums.write_text(sums.read_text().replace(old, hashlib.sha256((shards / ONE).read_bytes()).hexdigest()))
    assert run("--verify", HF_ENDPOINT="http://127.0.0.1:9")[0] == 0  # only the hub can tell
    status, _, err = run("--verify")
    assert (status, f"{ONE} (SHA-256 " in err) == (3, True)


def test_verify_with_n_also_misses_what_is_not_there(run, shards):
    run(1)
    assert run(1, "--verify")[0] == 0
    status, _, err = run(3, "--verify")
    assert (status, "2 of 4 shards" in err, "2 missing" in err) == (3, True, True)


def test_a_shard_without_a_record_cannot_be_verified_without_the_hub(run, shards):
    run(1)
    (shards / "SHA256SUMS").unlink()
    status, _, err = run("--verify", HF_HUB_OFFLINE="1")
    assert (status, "expected one in SHA256SUMS to compare it with" in err) == (3, True)


def test_without_a_network_recorded_shards_are_enough(run, shards):
    run(2)
    status, out, _ = run(2, HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 0
    assert "all 3 shards verified against SHA256SUMS; the hub could not be reached (" in out


def test_without_a_network_a_damaged_shard_is_named_and_kept(run, shards):
    run(1)
    flip_a_bit(shards / ONE)
    status, _, err = run(2, HF_HUB_OFFLINE="1")
    assert status == 3
    assert "2 of 3 shards" in err and f"{ONE} (SHA-256 " in err and "1 missing" in err
    assert "the hub could not be reached (HF_HUB_OFFLINE is set)" in err and "once it can be, fetch again" in err
    assert ONE in names_in(shards)


def test_without_a_network_or_shards_the_failure_comes_soon(run, shards):
    began = time.monotonic()
    status, _, err = run(prelude="time.sleep = nap", HF_ENDPOINT="http://127.0.0.1:9")  # at its true pace
    assert time.monotonic() - began < 12
    assert status == 3
    assert "9 of 9 shards" in err and "the hub could not be reached (ConnectError" in err and "9 missing" in err
    assert names_in(shards) == []


# ---- The disk ----

def test_too_little_room_is_noticed_before_the_first_byte(hub, run, shards):
    prelude = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9000, 1000, 8000)"
    status, _, err = run(1, prelude=prelude)  # 8050 bytes
    assert (status, err.startswith(f"{shards}: 0.00 GB to fetch but 0.00 GB free; make room")) == (3, True)
    assert hub.bodies() == []


def test_a_disk_that_fills_up_is_one_sentence_and_the_next_run_goes_on(hub, run, shards):
    hub.files[ONE] = make_shard(1, 150_000)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))"
    status, _, err = run(1, prelude=limit)
    assert (status, "File too large; nothing unverified was given a shard's name: make room" in err) == (3, True)
    assert ONE not in names_in(shards)
    assert run(1)[0] == 0
    assert hub.bodies()[-1] == (ONE, "bytes=100000-")
    assert_complete(shards, hub, [VAL, ONE])


def test_a_folder_that_cannot_be_written_is_named(run, shards):
    shards.write_text("a file where the folder should be")
    status, _, err = run(1)
    assert (status, err.startswith(f"{shards}: File exists; ")) == (3, True)
