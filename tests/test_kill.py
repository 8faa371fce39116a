"""Nothing lost: runs are killed and stopped at every point, started again with the same command, and end as one left alone."""
import dataclasses
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

import train
from shards import make_folder
from victim import EVERY, FLAGS, INT, KILL, STEPS, TERM, ended, metrics_of, runs_of, started, steps_written, struck


class Home:
    """A folder with data, programs that are compiled already, and what a run ends with that is left alone."""
    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.data = make_folder(folder / "data", tokenizer="bytes")
        self.alone, self.output = self.logs()
        assert ended(self.start(self.alone, self.output)) == 0, self.output.read_text()
        run, = runs_of(self.alone)
        self.final, self.rows = hashes(run / f"ckpt/step-{STEPS:06d}"), measured(run)
        self.again, output = self.logs()
        begun = time.monotonic()
        assert ended(self.start(self.again, output)) == 0
        self.seconds = time.monotonic() - begun  # with programs that are compiled already

    def logs(self):
        """(a log_dir for a run, a file for its console)"""
        self.count += 1
        return self.folder / f"logs{self.count}", self.folder / f"console{self.count}.txt"

    def start(self, logs, output, strikes=(), flags=()):
        return started([*FLAGS, *self.data, f"--log_dir={logs}", "--resume=auto", *flags], output, strikes)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home"))


def hashes(checkpoint):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}


def verifies(checkpoint):
    """By the hashes that its manifest names, and its own."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    own = manifest.pop("manifest_sha256")
    return (manifest["sha256"] == hashes(checkpoint) and len(manifest["sha256"]) == 2
            and own == hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest())


def measured(run):
    return [(row["step"], row.get("train_loss"), row.get("val_loss"), row.get("lr"), row["tokens"]) for row in metrics_of(run)]


def sealed(run):
    above, _, line = (run / "log.txt").read_bytes().rstrip(b"\n").rpartition(b"\n")
    return line.decode() == "sha256:" + hashlib.sha256(above + b"\n").hexdigest()


def saved_step(run):
    found = [path for path in (run / "ckpt").glob("step-*") if verifies(path)]
    return max((int(path.name[5:]) for path in found), default=0)


def check_finished(logs, home):
    """The run in logs that ended did so as the one left alone, and nothing half done lies anywhere."""
    run, = (run for run in runs_of(logs) if (run / "loss.svg").exists())  # others were killed before their first checkpoint
    assert hashes(run / f"ckpt/step-{STEPS:06d}") == home.final
    assert measured(run) == home.rows
    log = (run / "log.txt").read_text()
    assert sealed(run) and len(re.findall(r"^final: ", log, re.MULTILINE)) >= 1 and len(re.findall(r"^sample: ", log, re.MULTILINE)) >= 2
    assert {path.name for path in run.iterdir()} == {"log.txt", "metrics.jsonl", "config.json", "loss.svg", "ckpt"}
    for other in runs_of(logs):
        half = [path for path in other.rglob("*") if path.name.startswith(".")]
        # a file being replaced when a run was killed before its first checkpoint, which nobody went on with
        assert not half or other != run and not list(other.glob("ckpt/*")) and {path.parent for path in half} == {other}
        checkpoints = sorted((other / "ckpt").glob("*"))
        assert all(map(verifies, checkpoints)) and len(checkpoints) <= 3, checkpoints


def lost(logs):
    """Most steps that a start went back behind what had been trained."""
    most = 0
    for log in Path(logs).glob("*/log.txt"):
        reached = 0
        for step, resumed in re.findall(r"^(?:step:(\d+)/|resumed: .* at step (\d+))", log.read_text(), re.MULTILINE):
            most = max(most, reached - int(resumed)) if resumed else most
            reached = int(step or resumed)
    return most


def test_two_processes_end_with_the_same_bits_one_of_which_compiled_and_one_of_which_found_its_programs(home):
    check_finished(home.alone, home)
    check_finished(home.again, home)


# ---- kill -9 ----

KILLED_AT = [
    [("tensors are half written", 1)],
    [("tensors are half written", 4)],   # the optimizer's, of the second checkpoint
    [("tensors are written", 4)],
    [("the manifest is half written", 2)],
    [("the manifest is written", 2)],
    [("files are flushed", 7)],
    [("the checkpoint gets its name", 2)],
    [("the checkpoint has its name", 2)],
    [("the checkpoint has its name", 4)],
    [("an old checkpoint is half deleted", 1)],
    [("an old checkpoint is half deleted", 2)],  # after the last step, when nothing is saved any more
    [("samples are drawn", 1), ("data are described", 1)],  # a line that ends with a hash is not yet the log's last
    [("validation", 2), ("metrics are half written", 1), ("the config is half written", 1), ("the picture is half written", 1),
     ("the log is sealed", 1)],
]


@pytest.mark.parametrize("strikes", KILLED_AT, ids=lambda strikes: " then ".join(f"{point} {count}" for point, count in strikes))
def test_killed_at_any_point_of_a_save_the_same_command_ends_with_the_same_bits(strikes, home):
    logs, output = home.logs()
    for point, count in strikes:
        assert ended(home.start(logs, output, [(point, count, [KILL])])) == -KILL, output.read_text()
    assert ended(home.start(logs, output)) == 0, output.read_text()
    assert "Traceback" not in output.read_text()
    assert lost(logs) <= EVERY and len(runs_of(logs)) <= 2
    check_finished(logs, home)


def storm(home, kills, seed):
    """Runs killed at random instants until so many kills are done, each started again until it ends. Returns the most steps lost."""
    rng, done, most, finished, span = random.Random(seed), 0, 0, 0, 1.1 * home.seconds
    while done < kills:
        logs, output = home.logs()
        while True:
            process = home.start(logs, output)
            process.join(rng.uniform(0, span) if done < kills else 120)
            code = process.exitcode
            span *= 1.1 if code is None else 0.8  # the machine may be busier or idler than it was
            if code is not None:
                break
            struck(process, KILL)
            assert ended(process) in (0, -KILL)
            done += process.exitcode == -KILL
        assert code == 0 and "Traceback" not in output.read_text(), output.read_text()
        most, finished = max(most, lost(logs)), finished + 1
        check_finished(logs, home)
    print(f"{done} kills, {finished} runs ended, at most {most} steps of {EVERY} lost")
    return most


def test_ten_kills_at_random_instants_lose_at_most_the_steps_between_two_saves(home):
    assert storm(home, 10, seed=0) <= EVERY


@pytest.mark.soak
def test_two_hundred_kills_at_random_instants_lose_at_most_the_steps_between_two_saves(home):
    assert storm(home, 200, seed=1) <= EVERY


# ---- SIGTERM and SIGINT ----

def told(code, output):
    """Exit code and console of a run that was told to stop: no traceback, one sentence at most that says error."""
    text = output.read_text()
    assert code == 75 and "Traceback" not in text, (code, text)
    assert len(re.findall(r"^error: ", text, re.MULTILINE)) <= 1
    return text


@pytest.mark.parametrize("point,count,number,step", [
    ("training", 1, TERM, 1), ("training in a later stage", 4, INT, 10), ("training in a later stage", 6, TERM, STEPS),
    ("validation", 1, INT, 5),  # of step 4, after which nothing is to be saved: a step more
    ("validation", 3, TERM, STEPS), ("tensors are written", 1, TERM, 3), ("the checkpoint has its name", 2, INT, 6),
    ("an old checkpoint is deleted", 2, TERM, STEPS)])
def test_a_signal_in_training_leaves_a_checkpoint_of_the_present_step_and_exit_code_75(point, count, number, step, home):
    logs, output = home.logs()
    text = told(ended(home.start(logs, output, [(point, count, [number])])), output)
    run, = runs_of(logs)
    assert saved_step(run) == step == steps_written(run)[-1]
    assert f"error: stopped after step {step}, which is saved; go on with the same command and --resume={run}, or auto" in text
    assert f"\n{number.name}: saves a checkpoint after this step and ends; again: ends at once\n" in text
    assert ended(home.start(logs, output)) == 0 and runs_of(logs) == [run]
    check_finished(logs, home)


@pytest.mark.parametrize("point,number", [("the data are read", TERM), ("programs are compiled", TERM), ("programs are compiled", INT),
                                          ("programs are warmed up", TERM), ("the first batch is made", TERM)])
def test_a_signal_before_the_first_step_ends_the_run_at_once_with_exit_code_75(point, number, home):
    logs, output = home.logs()
    text = told(ended(home.start(logs, output, [(point, 1, [number])])), output)
    assert text.endswith(f"\n{number.name}: ends at once\n")
    assert not logs.exists() or not list(logs.glob("*/ckpt"))


@pytest.mark.parametrize("point", ["the result is reported", "samples are drawn", "the log is sealed"])
def test_a_run_that_is_stopped_after_its_last_step_is_completed_by_the_same_command(point, home):
    logs, output = home.logs()
    told(ended(home.start(logs, output, [(point, 1, [TERM])])), output)
    run, = runs_of(logs)
    assert not sealed(run) and saved_step(run) == STEPS
    assert ended(home.start(logs, output)) == 0 and runs_of(logs) == [run]
    check_finished(logs, home)
    log, seconds = (run / "log.txt").read_text(), [row["train_time_s"] for row in metrics_of(run)]
    assert len(steps_written(run)) == STEPS and f"step-{STEPS:06d} at step {STEPS}" in log and log.splitlines()[-1].startswith("sha256:")
    assert seconds == sorted(seconds)
    before = (run / "log.txt").read_bytes()
    assert ended(home.start(logs, output)) == 0 and (run / "log.txt").read_bytes() == before  # and then there is nothing to do


@pytest.mark.parametrize("point,first,second", [("training", TERM, TERM), ("training", INT, INT), ("tensors are written", TERM, INT)])
def test_a_second_signal_ends_at_once_with_128_and_its_number(point, first, second, home):
    """Also while the checkpoint of the first is being written."""
    logs, output = home.logs()
    strikes = [("training", 5, [first]), ("tensors are written", 3, [second])] if point != "training" else [(point, 5, [first, second])]
    assert ended(home.start(logs, output, strikes)) == 128 + second
    assert output.read_text().endswith(f"\n{second.name}: ends at once\n")
    run, = runs_of(logs)
    assert saved_step(run) == 3
    assert ended(home.start(logs, output)) == 0
    check_finished(logs, home)


@pytest.mark.soak
def test_a_hundred_signals_at_random_instants_are_all_answered(home):
    """And in which time."""
    rng, times, codes, stopped, span = random.Random(2), [], [], 0, home.seconds
    logs, output = home.logs()
    while len(times) < 100:
        process = home.start(logs, output)
        while process.is_alive() and (not output.exists() or b"speedrun-jax" not in output.read_bytes()):
            time.sleep(0.01)  # Python starts: a signal has not been asked for yet
        process.join(rng.uniform(0, span))
        span *= 1.1 if process.exitcode is None else 0.8
        if process.exitcode is None:
            begun = time.monotonic()
            struck(process, rng.choice([TERM, INT]))
            code = ended(process)
            times.append(time.monotonic() - begun)
            codes.append(code)
            text = output.read_text()
            assert code in (0, 75) and "Traceback" not in text, (code, text)
            for step, run in re.findall(r"^error: stopped after step (\d+), which is saved; .*--resume=(\S+), or auto$", text, re.M):
                assert saved_step(Path(run)) == int(step) == steps_written(Path(run))[-1]
                stopped += 1
        if process.exitcode == 0:
            check_finished(logs, home)
            logs, output = home.logs()
        else:
            output.unlink()
    print(f"{len(times)} signals, {codes.count(75)} x 75, {stopped} of them with a checkpoint, {codes.count(0)} at the very end; "
          f"time to exit: median {sorted(times)[50]:.2f}s, longest {max(times):.2f}s")


# ---- What the README prints for spot machines ----

GCLOUD = r"""#!/usr/bin/env bash
# storage rsync [--recursive] [--exclude=REGEX] FROM TO, or storage cp FILE TO: one file after the other, each in two pieces. An object
# is in the bucket whole or not at all, a file on the disk may be half one. After $DIE pieces the machine is gone. Two at once: an overlap.
exec 9>lock; flock -n 9 || echo "$@" >> overlaps
recursive='-maxdepth 1' exclude='^$' paths=()
for word in "${@:3}"; do
  case $word in --recursive) recursive= ;; --exclude=*) exclude="^${word#*=}" ;; -*) echo "unknown flag $word"; exit 2 ;;
    *) paths+=("${word/#gs:\/\//$STUB/}") ;; esac
done
from=${paths[0]} to=${paths[1]}
piece() {
  echo >> pieces
  if [ "$(wc -l < pieces)" = "$DIE" ]; then kill -9 0; fi
}
send() {
  cmp -s "$1" "$2" && return
  mkdir -p "$(dirname "$2")"
  piece
  case $2 in $STUB/*) cp "$1" uploading; piece; mv uploading "$2" ;; *) head -c $(($(wc -c < "$1") / 2)) "$1" > "$2"; piece; cp "$1" "$2" ;; esac
}
if [ "$2" = cp ]; then send "$from" "$to"; exit; fi
[ -d "$from" ] || exit 1
for file in $(cd "$from" && find . $recursive -type f | sort -r); do
  [[ ${file#./} =~ $exclude ]] || send "$from/${file#./}" "$to/${file#./}" || exit 1
done
"""


def printed(start):
    """The fenced block of the README's section on spot machines that begins so."""
    section = (Path(__file__).parents[1] / "README.md").read_text().split("\n## Spot machines\n")[1].split("\n## ")[0]
    block, = (block for block in re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL) if block.startswith(start))
    return block


class Machine:
    """An empty folder with a script, and stand-ins for `python`, `gcloud` and `sleep` before the others on the PATH."""
    def __init__(self, folder, script, python="exit 1", sleep="0.05"):
        (folder / "bin").mkdir(parents=True)
        self.folder, self.console = folder, folder / "console.txt"
        for name, text in {"python": python, "gcloud": GCLOUD, "sleep": f"exec /bin/sleep {sleep}"}.items():
            (folder / "bin" / name).write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        (folder / "script").write_text(script)

    def start(self, bucket="", die=0):
        """die: pieces of files that gcloud copies until all of the machine's processes are killed; 0: none are."""
        (self.folder / "pieces").write_text("")
        env = os.environ | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "STUB": str(bucket), "DIE": str(die)}
        with open(self.console, "ab") as console:
            return subprocess.Popen(["bash", "script"], cwd=self.folder, env=env, start_new_session=True, stdout=console,
                                    stderr=console, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def run(self, bucket="", die=0):
        return self.start(bucket, die).wait(120)


@pytest.mark.parametrize("codes,ends", [([0], 0), ([75, 137, 143, 134, 139, 75, 0], 0), ([75, 2], 2), ([3], 3), ([137, 4], 4), ([5], 5), ([1], 1)])
def test_the_printed_loop_starts_again_what_was_stopped_or_killed_and_nothing_else(codes, ends, tmp_path):
    python = 'echo "$@" >> starts; exit $(sed -n "$(wc -l < starts)p" codes)'
    machine = Machine(tmp_path / "m", printed("( trap"), python)
    (machine.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    assert machine.run() == ends
    assert (machine.folder / "starts").read_text().splitlines() == ["train.py --resume=auto --save_every=250"] * len(codes)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_the_printed_loop_once_the_run_has_saved_and_a_second_one_at_once(presses, tmp_path):
    python = 'trap "trap \'exit 130\' INT; echo asked >> asked; /bin/sleep 0.3; echo saved >> saved; exit 75" INT\n' \
             'echo start >> starts; for i in $(seq 600); do /bin/sleep 0.1; done'
    machine = Machine(tmp_path / "m", printed("( trap"), python if presses == 1 else python.replace("/bin/sleep 0.3", "/bin/sleep 30"))
    process, marks = machine.start(), ["starts", "asked"]
    for mark in marks[:presses]:
        while not (machine.folder / mark).exists():
            time.sleep(0.01)
        os.killpg(process.pid, INT)
    assert process.wait(60) in (130, -INT)
    assert (machine.folder / "starts").read_text() == "start\n" and (machine.folder / "saved").exists() == (presses == 1)


RESTORE, COPY = printed("export BUCKET").split("copy() {")[0], printed("export BUCKET").split("( trap")[0] + "copy\n"


def resumed_from(logs, home):
    """The step of the checkpoint from which a run would go on, which verifies; None where all there is are refused."""
    cfg = train.Config(**json.loads(next(home.alone.glob("*/config.json")).read_text())["config"])
    try:
        folder, manifest = train.find_checkpoint(dataclasses.replace(cfg, log_dir=str(logs), resume="auto"))
    except train.CheckpointError:
        return None
    assert not folder or verifies(folder) and measured(folder.parent.parent)[:manifest["step"]] == home.rows[:manifest["step"]]
    return manifest["step"]


def test_a_copy_in_a_bucket_goes_on_from_a_checkpoint_that_verifies_whenever_the_machine_went(home, tmp_path):
    """A machine that copies a run goes after any piece of any file; a new one goes on from the newest checkpoint with a manifest."""
    found, code = [], -KILL
    while code == -KILL:
        bucket, old, new = (tmp_path / f"{name}{len(found)}" for name in ("bucket", "old", "new"))
        first = Machine(old, COPY)
        shutil.copytree(home.alone, old / "logs")
        code = first.run(bucket, die=len(found) + 1)
        Machine(new, RESTORE).run(bucket)
        found.append(resumed_from(new / "logs", home))
    assert code == 0 and found == sorted(found) and set(found) == {0, STEPS - EVERY, STEPS}, found
    assert all(map(verifies, (new / "logs").glob("*/ckpt/*"))) and len(list(new.glob("logs/*/log.txt"))) == 1


def test_a_copy_back_that_was_cut_off_is_refused_or_verifies_and_done_again_is_whole(home, tmp_path):
    bucket, old = tmp_path / "bucket", tmp_path / "old"
    first = Machine(old, COPY)
    shutil.copytree(home.alone, old / "logs")
    assert first.run(bucket) == 0
    found, code = [], -KILL
    while code == -KILL:
        new = Machine(tmp_path / f"new{len(found)}", RESTORE)
        code = new.run(bucket, die=len(found) + 1)
        found.append(resumed_from(new.folder / "logs", home))
        if len(found) % 5 == 0:
            assert new.run(bucket) == 0 and resumed_from(new.folder / "logs", home) == STEPS
    assert {*found} <= {None, 0, STEPS - EVERY, STEPS} and None in found and found[-1] == STEPS, found


def test_the_last_copy_waits_for_the_one_that_is_under_way(home, tmp_path):
    """Else an older log.txt may arrive after the newest one."""
    script = "".join(map(printed, ("export BUCKET", "( trap", "kill $copier")))
    machine = Machine(tmp_path / "m", script, "while [ ! -s pieces ]; do /bin/sleep 0.01; done")
    shutil.copytree(home.alone, machine.folder / "logs")
    assert machine.run(tmp_path / "bucket") == 0
    assert not (machine.folder / "overlaps").exists(), (machine.folder / "overlaps").read_text()
    assert len(list(filter(verifies, (tmp_path / "bucket/my-bucket/my-run").glob("*/ckpt/*")))) == len(list(home.alone.glob("*/ckpt/*")))


def test_all_that_is_printed_trains_on_from_the_bucket_when_a_machine_goes(home, tmp_path):
    """With the trainer itself: the second machine ends the first one's run as if it had been left alone."""
    script = "".join(map(printed, ("export BUCKET", "( trap", "kill $copier")))
    flags = shlex.join([*FLAGS, *home.data])
    python = f'exec {sys.executable} {Path(__file__).with_name("victim.py")} {home.folder}/compiled "${{@:2}}" {flags}'
    paths = os.pathsep.join([str(Path(train.__file__).parent), str(Path(__file__).parent)])
    python = f"export PYTHONPATH={paths}\n{python}"
    for attempt in range(9):  # on a busy machine the first copy may be of the last checkpoint already
        bucket = tmp_path / f"bucket{attempt}"
        process = Machine(tmp_path / f"first{attempt}", script, python).start(bucket)
        while process.poll() is None and not list(bucket.glob("my-bucket/my-run/*/ckpt/*/manifest.json")):
            time.sleep(0.01)
        os.killpg(process.pid, KILL)
        process.wait()
        if not list(bucket.glob(f"my-bucket/my-run/*/ckpt/step-{STEPS:06d}/manifest.json")):
            break
    second = Machine(tmp_path / "second", script, python)
    assert second.run(bucket) == 0, second.console.read_text()
    assert re.search(r"^resumed: .* at step \d+", second.console.read_text(), re.MULTILINE)
    check_finished(second.folder / "logs", home)
    run, = runs_of(second.folder / "logs")
    assert verifies(bucket / "my-bucket/my-run" / run.name / f"ckpt/step-{STEPS:06d}")
    assert (bucket / "my-bucket/my-run" / run.name / "log.txt").read_bytes() == (run / "log.txt").read_bytes()
    assert not (second.folder / "overlaps").exists()
