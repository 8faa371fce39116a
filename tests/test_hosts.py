"""Several hosts: processes on loopback, joined by jax.distributed, with eight devices in all."""

import os
import re
import socket
import time

import numpy as np
import pytest
import safetensors.numpy
from shards import documents, make_folder
from victim import STEPS, TERM, ended, metrics_of, started, steps_logged

import train


class Hosts:
    """Starts runs of several processes in one folder, and ends what is left of them."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.data = make_folder(folder / "data", train=(documents(1, 200), documents(2, 200)))

    def start(self, *flags, count=2, each={}, model="bigram", pause=0.0):
        """`count` processes with eight devices in all. each: {host: its own flags}."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [*self.data, f"--log_dir={self.folder}/logs", f"--cpu_devices={8 // count}", *flags]
        run = []
        for i in range(count):
            joined = [f"--multihost=127.0.0.1:{port},{count},{i}"] * (count > 1)
            output = self.folder / f"out-{len(self.processes)}"
            words = [*argv, *joined, *each.get(i, [])]
            run.append(started(words, output, model=model, pause=pause))
            run[-1].output = output
            self.processes.append(run[-1])
        return run

    def run_folder(self):
        (folder,) = (self.folder / "logs").iterdir()
        return folder

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.end()


def said(process):
    return process.output.read_text() if process.output.exists() else ""


def codes(run):
    """The exit codes, once all have ended."""
    found = [ended(process, 400) for process in run]
    assert None not in found, "\n\n".join(map(said, run))
    return found


def wait_for(words, process):
    while words not in said(process):
        assert process.is_alive(), said(process)
        time.sleep(0.02)


def assert_alike(here, there):
    """Two run folders hold the same losses and weights, but for the order of float32 sums."""
    for mine, theirs in zip(metrics_of(here), metrics_of(there), strict=True):
        for name in ("step", "train_loss", "val_loss"):
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=1e-5)
    (mine,), (theirs,) = (
        sorted(run.glob("ckpt/*/params.safetensors"))[-1:] for run in (here, there)
    )
    mine, theirs = map(safetensors.numpy.load_file, (mine, theirs))
    for name in mine.keys() | theirs.keys():
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-3)


def test_two_hosts_of_four_devices_train_as_one_of_eight_and_only_the_first_writes(tmp_path):
    runs = {count: Hosts(tmp_path / str(count)) for count in (1, 2)}
    alone = runs[1].start(count=1)
    both = runs[2].start()
    assert codes([*alone, *both]) == [0, 0, 0], said(both[0])
    assert_alike(runs[1].run_folder(), runs[2].run_folder())
    assert steps_logged(runs[2].run_folder()) == [*range(1, STEPS + 1)]
    assert "step:12/12" in said(both[0]) and "step:" not in said(both[1])
    files = {path.name for path in runs[2].run_folder().iterdir()}
    assert files == {"log.txt", "metrics.jsonl", "config.json", "ckpt"}


@pytest.mark.system
def test_told_one_of_two_hosts_both_stop_after_the_same_step_and_go_on_as_one(hosts, tmp_path):
    alone = Hosts(tmp_path / "alone")
    (one,) = alone.start(count=1)
    run = hosts.start(pause=0.3)
    wait_for("step:3/", run[0])
    os.kill(run[1].pid, TERM)
    assert codes(run) == [75, 75], said(run[0])
    step = int(re.search(r"stopped after step (\d+)\.", said(run[0]))[1])
    saved = max(path.name for path in hosts.run_folder().glob("ckpt/*"))
    assert 3 <= step < STEPS and saved == f"step-{step:06d}"
    assert codes(hosts.start("--resume=auto")) == [0, 0]
    assert steps_logged(hosts.run_folder()) == [*range(1, STEPS + 1)]
    assert codes([one]) == [0]
    assert_alike(hosts.run_folder(), alone.run_folder())


@pytest.mark.system
def test_hosts_that_differ_end_with_2_before_they_compile(hosts, tmp_path):
    other = make_folder(tmp_path / "other", train=(documents(3, 200),))
    for own in (["--seed=7"], other):
        run = hosts.start(each={1: own})
        assert codes(run) == [2, 2], said(run[0])
        for host in run:
            text = said(host)
            assert "error: hosts differ" in text and "Traceback" not in text
    assert not (hosts.folder / "logs").exists()


def test_what_names_no_host_is_refused():
    for words in ("8476", "127.0.0.1:ten,2,0", "127.0.0.1:80,2", ":80,2,0", "here,2,0"):
        with pytest.raises(train.UsageError, match=f"--multihost={words}"):
            train.start_devices(train.replace(train.DEMO, multihost=words))


@pytest.mark.system
def test_one_two_and_four_processes_train_the_tiny_preset_alike_for_fifty_steps(tmp_path):
    preset = f"@{train.ROOT}/scripts/presets/tiny.args"
    runs = {count: Hosts(tmp_path / str(count)) for count in (1, 2, 4)}
    for count, hosts in runs.items():
        flags = [preset, "--steps=50", "--max_epochs=9"]
        assert set(codes(hosts.start(*flags, count=count, model="gpt"))) == {0}
    for count in (2, 4):
        assert_alike(runs[1].run_folder(), runs[count].run_folder())


@pytest.mark.system
@pytest.mark.parametrize("told", [[0], [1], [0, 1]], ids=str)
def test_a_signal_to_any_hosts_stops_both_after_the_same_step(told, hosts):
    run = hosts.start(pause=0.3)
    wait_for("step:2/", run[0])
    for i in told:
        os.kill(run[i].pid, TERM)
    assert codes(run) == [75, 75]
    assert f"stopped after step {steps_logged(hosts.run_folder())[-1]}." in said(run[0])
