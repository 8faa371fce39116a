"""Several processes of one run, joined by jax.distributed on loopback: two of four simulated devices stand for two hosts.

Processes are forked from one that has imported train.py and no more, since importing JAX takes longer than a tiny run.
"""
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

import train
from shards import documents, make_folder

STEPS = 12
SMALL = [f"--steps={STEPS}", "--num_layers=1", "--model_dim=24", "--head_dim=8", "--mlp_dim=40", "--skips=", "--late_inputs=", "--backout=",
         "--offset_layers=", "--long_layers=", "--mtp=", "--tied_stages=0", "--stage_ends=1", "--batch_tokens=512", "--seq_len=32",
         "--window_short=16", "--window_long=0", "--stage_lr=1", "--val_tokens=500", "--val_every=6"]
GONE = "another host of this run is gone, or the runtime failed: see each host's output; start all again with --resume=auto"

# What a host does before it calls train.main, lines of Python that see train. Long enough a run to be hit in its middle:
SLOWLY = """
settle = train.Run.settle
train.Run.settle = lambda *arguments: (time.sleep(0.3), settle(*arguments))[1]
"""
# Each batch's rows that lie on this host, as lines `rows CALL FIRST_ROW SHA256`:
TELLS_ROWS = """
to_devices, calls = train.to_devices, train.itertools.count()
def telling(*arguments):
    batch, call = to_devices(*arguments), next(calls)
    for shard in batch.addressable_shards:
        print("rows", call, shard.index[1].start, train.hashlib.sha256(train.np.asarray(shard.data)).hexdigest(), flush=True)
    return batch
train.to_devices = telling
"""
TELLS_WRITES = """
def watch(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or event == "open" and set(str(arguments[1])) & set("wax+"):
        print("writes", *arguments, flush=True)
sys.addaudithook(watch)
open(os.devnull, "w").close()  # is heard
"""
TELLS_COMPILES = """
heard, save = [], train.save_checkpoint
train.jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: heard.append(name) if "backend_compile" in name else None)
def telling_compiles(*arguments):
    before, folder = len(heard), save(*arguments)
    print("compiles:", before > 2, len(heard) - before, "with a cache:", bool(train.jax.config.jax_compilation_cache_dir), flush=True)
    return folder
train.save_checkpoint = telling_compiles
"""
# What hosts may have of their own:
MAY_DIFFER = """
train.platform.platform = lambda: "another kernel"
os.environ["JAX_COORDINATOR_BIND_ADDRESS"] = "nowhere"
"""


def be_host(argv, patch, output, optimized):
    """In a forked process: `python train.py` with argv, after `patch`."""
    for number in (1, 2):
        os.dup2(os.open(f"{output}.{number}", os.O_WRONLY), number)
    train.jax.config.update("jax_disable_most_optimizations", not optimized)
    sys.argv = ["train.py", *argv]
    exec(patch, {"train": train, "os": os, "time": time, "sys": sys})
    sys.exit(train.command(lambda: train.main(stop=train.Stop().listen())))


class Host:
    """One process of a run, what it has printed, and how it ends."""
    out = property(lambda self: Path(f"{self.output}.1").read_text())
    err = property(lambda self: Path(f"{self.output}.2").read_text())

    def __init__(self, output, argv, patch, optimized):
        self.output, context = output, multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train"])
        for number in (1, 2):
            Path(f"{output}.{number}").touch()
        self.process = context.Process(target=be_host, args=(argv, patch, output, optimized))
        self.process.start()

    def says(self, words):
        end = time.monotonic() + 200
        while words not in self.out:
            assert self.process.is_alive() and time.monotonic() < end, f"no {words!r} in\n{self.out}\n{self.err}"
            time.sleep(0.02)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def ends(self, within=200):
        """(exit code, its last words on stderr)."""
        self.process.join(within)
        assert self.process.exitcode is not None, f"still runs after {within} s\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        theirs = re.compile(r"\[(external/)?gloo|[EWIF]\d{4} |.*\bgrpc", re.IGNORECASE)  # the runtime's threads speak when they like
        own = [line for line in self.err.splitlines() if not theirs.match(line)]
        return self.process.exitcode, (own or [""])[-1]

    def steps(self):
        return [int(step) for step in re.findall(r"^step:(\d+)/", self.out, re.MULTILINE)]


class Hosts:
    """Starts runs of `count` processes with eight devices in all; each: {host: flags}, patches: {host: lines}. Ends what is left."""
    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.data = make_folder(folder / "data", train=(documents(1, 200), documents(2, 200)))

    def start(self, *flags, count=2, sizes=SMALL, each={}, patch="", patches={}, only=None, optimized=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        hosts = []
        for i in range(count) if only is None else [only]:
            joined = [f"--multihost=127.0.0.1:{port},{count},{i}"] * (count > 1)
            argv = ["--preset=tiny", "--log_every=1", *sizes, *self.data, f"--log_dir={self.folder}/logs", f"--cpu_devices={8 // count}"]
            output = self.folder / f"out-{len(self.started)}"
            hosts.append(Host(output, [*argv, *joined, *flags, *each.get(i, [])], patch + patches.get(i, ""), optimized))
            self.started.append(hosts[-1])
        return hosts

    def run_folders(self):
        return sorted((self.folder / "logs").iterdir())

    def end(self):
        for host in self.started:
            if host.process.is_alive():
                host.signal(signal.SIGKILL)
                host.process.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, and two, that were left alone: {count: (hosts, run folder)}."""
    runs, kept = {}, [Hosts(tmp_path_factory.mktemp(f"of-{count}")) for count in (1, 2)]
    for count, hosts in zip((1, 2), kept):
        runs[count] = hosts.start(count=count, patch=TELLS_ROWS + TELLS_COMPILES, patches={1: TELLS_WRITES + MAY_DIFFER})
    ended = {count: [host.ends() for host in hosts] for count, hosts in runs.items()}
    for hosts in kept:
        hosts.end()
    assert ended == {1: [(0, "")], 2: [(0, "")] * 2}
    return {count: (runs[count], *hosts.run_folders()) for count, hosts in zip((1, 2), kept)}


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.end()


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in ("train_loss", "val_loss") if name in row}


def assert_close(here, there, bound=1e-5):
    assert here.keys() == there.keys() and max(abs(here[key] - there[key]) for key in here) <= bound


def rows_of(hosts):
    """{(batch, first row): SHA-256} over all hosts, no rows on two of them."""
    lines = [line.split()[1:] for host in hosts for line in host.out.splitlines() if line.startswith("rows ")]
    assert len({(call, first) for call, first, _ in lines}) == len(lines)
    return {(call, first): digest for call, first, digest in lines}


def weights_of(folder, step=STEPS):
    return {file: (folder / "ckpt" / f"step-{step:06d}" / file).read_bytes() for file in ("params.safetensors", "opt.safetensors")}


def test_a_save_compiles_nothing_for_which_a_preempted_host_may_have_no_time(whole):
    """Of several hosts of CPUs only the first finds its programs in JAX's cache: Gloo, which waits 30 s, would give the others up."""
    for count, (hosts, _) in whole.items():
        for host in hosts:
            assert [line for line in host.out.splitlines() if line.startswith("compiles: ")] == [f"compiles: True 0 with a cache: {count == 1}"]


def test_two_hosts_of_four_devices_train_as_one_of_eight(whole):
    (_, alone), (_, together) = whole[1], whole[2]
    assert len(losses(alone)) == STEPS + 2
    assert_close(losses(alone), losses(together))


def test_each_row_of_each_batch_is_on_one_host_and_on_the_device_where_one_process_has_it(whole):
    alone, together = rows_of(whole[1][0]), rows_of(whole[2][0])
    assert len(alone) == 8 * (STEPS + 2)  # warm-up, validation, the steps; on eight devices
    assert together == alone


def test_only_the_first_host_writes_and_tells(whole):
    (first, second), folder = whole[2]
    assert {path.name for path in folder.iterdir()} == {"log.txt", "metrics.jsonl", "config.json", "loss.svg", "ckpt"}
    told = [line for line in second.out.splitlines() if not line.startswith(("rows ", "compiles: ", "[Gloo]", "speedrun-jax", "compiling")) and "peer ranks" not in line]
    written = [line for line in told if line.startswith("writes ")]
    assert any(os.devnull in line for line in written) and not [line for line in written if str(folder.parent) in line]
    assert told == written and second.err == "" and first.steps() == [*range(1, STEPS + 1)]


def stopped(hosts, run):
    """Both ended after the same step, with 75 and the same sentence, which names the run's folder. Returns the step."""
    (first, words), (second, same) = [host.ends() for host in run]
    folder, = hosts.run_folders()
    step = run[0].steps()[-1]
    assert first == second == 75 and 3 <= step < STEPS
    assert words == same == (f"error: stopped after step {step}, which is saved; go on with the same command and "
                             f"--resume={folder}, or auto")
    return step


def test_told_one_of_two_hosts_both_stop_at_the_same_step_and_resumed_end_with_the_same_bits(whole, hosts):
    run = hosts.start(patch=SLOWLY)
    run[0].says("step:3/")
    run[1].signal(signal.SIGTERM)
    step = stopped(hosts, run)
    resumed = hosts.start("--resume=auto")
    assert [host.ends() for host in resumed] == [(0, "")] * 2
    assert resumed[0].steps() == [*range(step + 1, STEPS + 1)]
    folder, = hosts.run_folders()
    assert weights_of(folder) == weights_of(whole[2][1])


def killed(hosts, victim, number, heartbeat):
    """The other host's (seconds until it ended, last words), once the victim got a signal in mid-training."""
    run = hosts.start(patch=SLOWLY + f"train.HEARTBEAT_S = {heartbeat}\n")
    run[0].says("step:3/")
    start = time.monotonic()
    run[victim].signal(number)
    code, words = run[1 - victim].ends(heartbeat + 10)
    assert code == 75
    return time.monotonic() - start, words


def test_without_the_first_host_the_other_ends_with_one_sentence(hosts):
    _, words = killed(hosts, 0, signal.SIGKILL, train.HEARTBEAT_S)
    assert words.startswith("error: ") and GONE in words


def test_a_host_that_never_comes_is_waited_for_only_so_long(hosts):
    lone = [hosts.start(patch="train.INIT_TIMEOUT_S = 2\n", only=i)[0] for i in (0, 1)]
    for i, host in enumerate(lone):
        code, words = host.ends(2 + 60)
        assert code == 75 and re.fullmatch(f"error: --multihost=127.0.0.1:\\d+,2,{i}: after 2 s not all hosts have come; "
                                           "start the same line on each", words)


def test_auto_where_there_are_no_other_hosts_ends_with_2_and_the_other_form(hosts):
    host, = hosts.start("--multihost=auto", count=1)
    code, words = host.ends()
    assert code == 2 and re.match(r"error: --multihost=auto: JAX finds no other hosts \(", words), words


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("address", ["127.0.0.1:ten", "127.0.0.1:70000", "127.0.0.1:0", "8476", ":8476"])
def test_what_is_no_address_ends_with_2_on_every_host(hosts, address, index):
    host, = hosts.start(f"--multihost={address},2,{index}", count=1)
    code, words = host.ends()
    assert code == 2 and words.startswith(f"error: --multihost={address},2,{index}: wanted auto, or HOST:PORT,COUNT,INDEX"), words


def test_a_port_that_is_taken_ends_with_2_and_says_so(hosts):
    """JAX's own server, asked for such a port, ends some of the time in a segmentation fault."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        host, = hosts.start(f"--multihost=127.0.0.1:{port},2,0", count=1)
        code, words = host.ends()
    assert code == 2 and f": host 0 cannot listen on port {port} (OSError: " in words, words


def test_where_the_coordinator_binds_elsewhere_the_port_is_not_asked_for(hosts):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = hosts.start(each={i: [f"--multihost=127.0.0.2:{port},2,{i}"] for i in (0, 1)},
                          patches={0: f"os.environ['JAX_COORDINATOR_BIND_ADDRESS'] = '127.0.0.2:{port}'\n"}, sizes=[*SMALL, "--steps=1"])
        assert [host.ends()[0] for host in run] == [0, 0]


def test_a_host_that_differs_ends_all_before_they_compile_with_what_differs(whole, hosts):
    here, there = hosts.folder / "here", hosts.folder / "there"
    for home, last in ((here, documents(2, 200)), (there, documents(3, 200))):
        make_folder(home / "data", train=(documents(1, 200), last))
    shutil.copytree(whole[2][1].parent, here / "whole")
    of_whole = [f"--{name}_files={whole[2][1].parents[1]}/data/{name}_*.bin" for name in ("train", "val")]
    other_source = hosts.folder / "train.py"
    other_source.write_text(Path(train.__file__).read_text() + "# tuned\n")
    moved = {i: f"os.chdir({str(home)!r})\n" for i, home in enumerate((here, there))}
    relative = ["--train_files=data/train_*.bin", "--val_files=data/val_*.bin"]
    cases = {
        "--muon_lr=0.5, but host 0 --muon_lr=0.023": dict(each={1: ["--muon_lr=0.5"]}),
        "--seed=7, but host 0 --seed=0": dict(each={1: ["--seed=7"]}),
        "train.py=[0-9a-f]{64}, but host 0 train.py=[0-9a-f]{64}": dict(patches={1: f"train.__file__ = {str(other_source)!r}\n"}),
        "data=[0-9a-f]{64}, but host 0 data=[0-9a-f]{64}": dict(flags=relative, patches=moved),
        f"numpy=1.0, but host 0 numpy={train.np.__version__}": dict(patches={1: "train.np.__version__ = '1.0'\n"}),
        "checkpoint=None, but host 0 checkpoint=.*/ckpt/step-000012":
            dict(flags=["--log_dir=whole", "--resume=auto", *of_whole], patches=moved),
    }
    no_compile = "def compile_all(*_): raise AssertionError\ntrain.compile_all = compile_all\n"
    started = {wanted: hosts.start(*case.pop("flags", []), patch=no_compile, **case) for wanted, case in cases.items()}
    for wanted, run in started.items():
        for code, words in [host.ends() for host in run]:
            assert code == 2 and re.fullmatch(f"error: host 1 has {wanted}: hosts must be alike", words), words
    assert not (hosts.folder / "logs").exists()


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_that_one_host_finds_ends_all_with_its_sentence(where, hosts):
    run = hosts.start(each={where: ["--train_files=nowhere/*.bin"]})
    (code, words), (other, same) = run[where].ends(), run[1 - where].ends()
    assert (code, other) == (3, 2) and words.startswith("error: no shards match nowhere/*.bin")
    assert same == f"error: host {where} cannot begin: {words.removeprefix('error: ')}"


# ---- Soak ------------------------------------------------------------------------------------------------------------
@pytest.mark.soak
def test_one_two_and_four_processes_train_the_tiny_preset_alike_for_fifty_steps(tmp_path):
    ran = {}
    for count in (1, 2, 4):
        hosts = Hosts(tmp_path / str(count))
        ran[count] = hosts.start("--preset=tiny", "--steps=50", "--max_epochs=9", count=count, sizes=[], patch=TELLS_ROWS, optimized=True)
        assert {host.ends(400)[0] for host in ran[count]} == {0}
        ran[count] = losses(hosts.run_folders()[0]), rows_of(ran[count])
        assert len(ran[count][0]) == 50 + 5
    for count in (2, 4):
        assert_close(ran[1][0], ran[count][0])
        assert ran[1][1] == ran[count][1]


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(6))
def test_sigterm_at_any_time_to_any_host_stops_both_after_the_same_step(trial, whole, hosts):
    run = hosts.start(patch=SLOWLY)
    run[0].says("step:1/")
    time.sleep(0.3 * trial)
    for i in ([0], [1], [0, 1])[trial % 3]:
        run[i].signal(signal.SIGTERM)
    (first, words), (second, same) = [host.ends() for host in run]
    assert first == second == 75 and words == same and "which is saved" in words
    assert [host.ends()[0] for host in hosts.start("--resume=auto")] == [0, 0]
    assert weights_of(hosts.run_folders()[0]) == weights_of(whole[2][1])


@pytest.mark.soak
def test_ctrl_c_in_a_terminal_saves_and_stops_both(hosts):
    run = hosts.start(patch=SLOWLY)
    run[0].says("step:3/")
    for host in run:
        host.signal(signal.SIGINT)
    stopped(hosts, run)


@pytest.mark.soak
def test_a_second_ctrl_c_ends_at_once(hosts):
    run = hosts.start(patch=SLOWLY)
    run[0].says("step:3/")
    for _ in range(2):
        run[0].signal(signal.SIGINT)
        time.sleep(0.1)
    assert run[0].ends(2)[0] == 128 + signal.SIGINT


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("heartbeat", [5, train.HEARTBEAT_S])
def test_a_killed_or_frozen_host_is_noticed_within_the_heartbeat(heartbeat, victim, number, hosts):
    seconds, words = killed(hosts, victim, number, heartbeat)
    print(f"noticed after {seconds:.1f} s of {heartbeat}")
    assert words.startswith("error: ") and GONE in words


@pytest.mark.soak
@pytest.mark.parametrize("where", [0, 1])
def test_a_bug_on_one_host_ends_the_other_too(where, hosts):
    run = hosts.start(patch="train.HEARTBEAT_S = 5\n", patches={where: "def warm_up(*_): raise RuntimeError('a bug')\ntrain.warm_up = warm_up\n"})
    run[where].process.join(200)
    assert run[where].process.exitcode == 1 and run[where].err.rstrip().endswith("RuntimeError: a bug")
    code, words = run[1 - where].ends(60)
    assert code == 75 and GONE in words


@pytest.mark.soak
def test_a_save_that_outlasts_the_heartbeat_is_waited_for(hosts):
    slow = "manifest_text = train.manifest_text\ntrain.manifest_text = lambda *x: (time.sleep(25), manifest_text(*x))[1]\n"
    run = hosts.start(patch=SLOWLY + slow + "train.HEARTBEAT_S = 10\n")
    run[0].says("step:3/")
    run[1].signal(signal.SIGTERM)
    stopped(hosts, run)


@pytest.mark.soak
def test_both_hosts_say_so_where_the_first_cannot_save(hosts):
    full = "def save_file(*_): raise OSError(28, 'No space left on device')\ntrain.safetensors.numpy.save_file = save_file\n"
    run = hosts.start(patch=SLOWLY, patches={0: full})
    run[0].says("step:3/")
    run[1].signal(signal.SIGTERM)
    for code, words in [host.ends() for host in run]:
        assert code == 75 and "COULD NOT BE SAVED" in words


@pytest.mark.soak
@pytest.mark.parametrize("dies", [0, 1])
def test_a_host_that_dies_after_the_last_step_costs_nothing(dies, whole, hosts):
    run = hosts.start(patches={dies: "train.report = lambda *_: os.kill(os.getpid(), 9)\n"})
    assert run[1 - dies].ends(train.HEARTBEAT_S + 60)[0] in (0, 75)
    assert weights_of(hosts.run_folders()[0]) == weights_of(whole[2][1])
