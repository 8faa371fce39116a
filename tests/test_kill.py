"""Nothing is lost: killed or stopped at any point, the same command ends as a run left alone."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shards import make_folder
from victim import (
    EVERY,
    INT,
    KILL,
    STEPS,
    TERM,
    ended,
    metrics_of,
    started,
    steps_logged,
    weights_of,
)

import train


class Home:
    """A folder with data and compiled programs, and what a run ends with that is left alone."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.data = make_folder(folder / "data", tokenizer="bytes")
        logs, output = self.logs()
        assert ended(self.start(logs, output)) == 0, output.read_text()
        (self.alone,) = logs.iterdir()

    def logs(self):
        """(a log_dir for a run, a file for its console)"""
        self.count += 1
        return self.folder / f"logs{self.count}", self.folder / f"console{self.count}.txt"

    def start(self, logs, output, *strikes):
        flags = [*self.data, f"--log_dir={logs}", "--resume=auto"]
        return started(flags, output, strikes, self.folder / "compiled")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home"))


def measured(run):
    names = ("step", "train_loss", "val_loss", "lr", "tokens")
    return [[row.get(name) for name in names] for row in metrics_of(run)]


def saved_step(logs):
    """Of the newest checkpoint; 0 where there is none."""
    return max((int(path.name[5:]) for path in logs.glob("*/ckpt/step-*")), default=0)


def assert_alike(run, home):
    """The run ended as the one left alone."""
    assert weights_of(run) == weights_of(home.alone) and measured(run) == measured(home.alone)


def check_finished(logs, home):
    """The run in logs ended as the one left alone, and nothing half done lies in it."""
    (run,) = {path.parent.parent for path in logs.glob("*/ckpt/step-*")}  # others never saved
    assert_alike(run, home)
    above, _, seal = (run / "log.txt").read_bytes().rstrip(b"\n").rpartition(b"\n")
    assert seal.decode() == "sha256:" + hashlib.sha256(above + b"\n").hexdigest()
    assert b"\nfinal: " in above and b"\nsample: " in above
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    parts = ("params.safetensors", "opt.safetensors", "manifest.json")
    checkpoints = {f"ckpt/step-0000{step}/{part}" for step in ("09", "12") for part in parts}
    assert found == {"log.txt", "metrics.jsonl", "config.json"} | checkpoints


def lost(logs):
    """Most steps that a start went back behind what had been trained."""
    most = 0
    for log in logs.glob("*/log.txt"):
        reached = 0
        for step, resumed in re.findall(
            r"^(?:step:(\d+)/|resumed: .* at step (\d+))", log.read_text(), re.M
        ):
            most = max(most, reached - int(resumed)) if resumed else most
            reached = int(step or resumed)
    return most


# ---- kill -9 ----


def test_killed_at_any_point_of_a_save_the_same_command_ends_with_the_same_bits(home):
    logs, output = home.logs()
    saved = []
    for point, count in [
        ("manifest half written", 1),  # twice before there is a checkpoint
        ("before the name", 1),
        ("after the name", 1),  # of step 3
        ("tensors half written", 4),  # the optimizer's of step 9
        ("half deleted", 2),  # step 3, after .writing; step 9 has no name yet
        ("samples", 1),  # after the last step
        ("seal", 1),
    ]:
        assert ended(home.start(logs, output, (point, count, [KILL]))) == -KILL, output.read_text()
        saved.append(saved_step(logs))
    assert saved == [0, 0, 3, 6, 6, STEPS, STEPS]
    assert ended(home.start(logs, output)) == 0, output.read_text()
    assert lost(logs) <= EVERY and "Traceback" not in output.read_text()
    check_finished(logs, home)


@pytest.mark.system
def test_two_hundred_kills_at_random_instants_lose_at_most_the_steps_between_two_saves(home):
    """Runs are killed, and each is started again until it ends."""
    rng, kills, span = random.Random(1), 0, 3.0
    while kills < 200:
        logs, output = home.logs()
        code = None
        while code != 0:
            process = home.start(logs, output)
            process.join(rng.uniform(0, span) if kills < 200 else 120)
            span *= 1.1 if process.exitcode is None else 0.8  # towards what a run takes
            process.kill()
            code = ended(process)
            assert code in (0, -KILL), output.read_text()
            kills += code == -KILL
        assert "Traceback" not in output.read_text()
        assert lost(logs) <= EVERY
        check_finished(logs, home)


# ---- SIGTERM and Ctrl-C ----


def test_a_signal_saves_the_present_step_and_leaves_with_75_and_a_second_one_ends_at_once(home):
    logs, output = home.logs()
    for point, count, numbers, code, step in [
        ("step", 2, [TERM], 75, 2),
        ("validation", 1, [INT], 75, 5),  # that of step 4, which is over: a step more
        ("step", 9, [TERM, TERM], -TERM, 6),
        ("step", 9, [INT, INT], -INT, 6),
        ("step", STEPS, [TERM], 0, STEPS),  # the last one: there is nothing to go on with
    ]:
        assert ended(home.start(logs, output, (point, count, numbers))) == code, output.read_text()
        (run,) = logs.iterdir()  # the first start has saved
        assert saved_step(logs) == step
        assert code != 75 or steps_logged(run)[-1] == step
        assert code != 75 or f"--resume={run}" in output.read_text().splitlines()[-1]
    assert "Traceback" not in output.read_text()
    check_finished(logs, home)


def test_a_signal_before_the_first_step_ends_the_run_at_once(home):
    for number in (TERM, INT):
        logs, output = home.logs()
        assert ended(home.start(logs, output, ("compiling", 1, [number]))) == -number
        assert "Traceback" not in output.read_text() and not logs.exists()


# ---- What the README prints ----


def printed(words):
    """The block of commands in the two READMEs that holds these words."""
    root = Path(train.__file__).parent
    text = (root / "README.md").read_text() + (root / "scripts/README.md").read_text()
    (block,) = (b for b in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) if words in b)
    return block


def start_script(folder, script, sleep="0.05", **programs):
    """Start a script in a folder of its own, with stand-ins for sleep and other programs."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name, text in (programs | {"sleep": f"exec /bin/sleep {sleep}"}).items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(INT, signal.SIG_DFL),
    )


LOOP = "until python train.py"


def test_the_printed_loop_starts_again_what_was_stopped_or_killed_and_nothing_else(tmp_path):
    python = 'echo "$@" >> starts; exit $(sed -n "$(wc -l < starts)p" codes)'
    for codes in ([75, 137, 143, 134, 139, 75, 0], [75, 2], [5], [1], [130]):
        folder = tmp_path / "-".join(map(str, codes))
        folder.mkdir()
        (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        start_script(folder, printed(LOOP), sleep="0", python=python).wait(60)
        starts = (folder / "starts").read_text().splitlines()
        assert starts == ["train.py --resume=auto --save_every=250"] * len(codes)


@pytest.mark.system
def test_the_printed_loop_ends_a_run_that_was_stopped_and_killed_as_one_left_alone(home, tmp_path):
    paths = [Path(train.__file__).parent, Path(__file__).parent]
    victim = f"{sys.executable} {Path(__file__).with_name('victim.py')} {home.folder}/compiled 0.1"
    python = f"""export PYTHONPATH={os.pathsep.join(map(str, paths))}
        echo $$ >> pids
        exec {victim} "${{@:2}}" {shlex.join(home.data)} > console"""
    loop = start_script(tmp_path, printed(LOOP), python=python)
    pids, console = tmp_path / "pids", tmp_path / "console"
    for starts, number in ((1, TERM), (2, KILL)):
        while len(read(pids).split()) < starts or "step:" not in read(console):
            assert loop.poll() is None
            time.sleep(0.02)
        console.unlink()
        os.kill(int(read(pids).split()[-1]), number)
    assert loop.wait(60) == 0 and len(read(pids).split()) == 3
    (run,) = (tmp_path / "logs").iterdir()
    assert_alike(run, home)


@pytest.mark.system
def test_ctrl_c_ends_the_printed_loop_once_the_run_has_saved(tmp_path):
    python = """trap "/bin/sleep 0.2; echo saved >> saved; exit 75" INT
        echo start >> starts; for i in $(seq 600); do /bin/sleep 0.1; done"""
    loop = start_script(tmp_path, printed(LOOP), python=python)
    while not (tmp_path / "starts").exists():
        time.sleep(0.02)
    os.killpg(loop.pid, INT)
    assert loop.wait(60) in (130, -INT)
    assert read(tmp_path / "starts") == "start\n" and read(tmp_path / "saved") == "saved\n"


GCLOUD = r"""
# storage rsync [--recursive] [--exclude=REGEX] FROM TO, or storage cp FILE TO. A file goes in two
# pieces. In the bucket it is there whole or not at all. After $DIE pieces the machine is gone.
depth='-maxdepth 1' exclude='^$' paths=()
for word in "${@:3}"; do
  case $word in --recursive) depth= ;; --exclude=*) exclude="^${word#*=}" ;; -*) exit 2 ;;
    *) paths+=("${word/#gs:\/\//$STUB/}") ;; esac
done
piece() { echo >> pieces; if [ "$(wc -l < pieces)" = "$DIE" ]; then kill -9 0; fi; }
send() {
  cmp -s "$1" "$2" && return
  mkdir -p "$(dirname "$2")"; piece; cp "$1" uploading; piece; mv uploading "$2"
}
if [ "$2" = cp ]; then send "${paths[@]}"; exit; fi
[ -d "${paths[0]}" ] || exit 1
for file in $(cd "${paths[0]}" && find . $depth -type f | sort -r); do
  [[ ${file#./} =~ $exclude ]] || send "${paths[0]}/${file#./}" "${paths[1]}/${file#./}"
done"""


@pytest.mark.system
def test_a_copy_in_a_bucket_is_good_whenever_the_machine_went_that_made_it(home, tmp_path):
    """After any piece of any file: what a new machine restores is whole, and grows."""
    lines = printed("export BUCKET")
    restore, copy = lines.split("copy() {")[0], lines.split("( trap")[0] + "copy\n"
    found, code = [], -KILL
    while code == -KILL:
        old, new = tmp_path / f"old{len(found)}", tmp_path / f"new{len(found)}"
        shutil.copytree(home.alone, old / "logs" / home.alone.name)
        places = f"export STUB={tmp_path}/bucket{len(found)} DIE="
        code = start_script(old, f"{places}{len(found) + 1}\n{copy}", gcloud=GCLOUD).wait(60)
        start_script(new, f"{places}0\n{restore}", gcloud=GCLOUD).wait(60)
        for checkpoint in new.glob("logs/*/ckpt/step-*"):
            hashes = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
            assert hashes == {name: train.file_sha256(checkpoint / name) for name in hashes}
        found.append(saved_step(new / "logs"))
    assert code == 0 and found == sorted(found) and {*found} == {0, STEPS - EVERY, STEPS}


def read(path):
    return path.read_text() if path.exists() else ""
