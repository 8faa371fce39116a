"""scripts/speedrun.sh: the chain of a fake that trains nothing, and one real smoke run."""

import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from users_files import fill

from train import ROOT

FAKE = """#!/usr/bin/env bash
here=HERE
if [ "$1" = -c ]; then
    case $2 in
        "import jax,"*) exit 0 ;;
        "import sys"*) exit "${LACKING:-0}" ;;  # and packages of companions
    esac
    exec PYTHON -S "$@"
fi
printf '%s\\n' "$*" >> "$here/calls.txt"
name=$1
[ "$1" != -m ] || name=$2
code=0
if [ -f "$here/$name.codes" ]; then  # of the next calls, one each
    read -r code rest < "$here/$name.codes"
    echo "$rest" > "$here/$name.codes"
fi
for word in "$@"; do
    case $word in
        --log_dir=*) run=${word#*=}/20260101T000000Z-abc ;;
        --seed=*) final="final: step:3 val_loss:3.2 of seed ${word#*=}" ;;
        --json=*) echo "{}" > "${word#*=}" ;;
    esac
done
if [ "$name" = train.py ]; then
    mkdir -p "$run"
    printf '%s\\n' "final: 1" ==== "devices: 8 x fake" "$final" > "$run/log.txt"
fi
exit "${code:-0}"
"""


@pytest.fixture
def chain(tmp_path):
    """run(*flags, **environment) -> (exit code, what it said, the calls that it made).

    codes(name, ...): exit codes of the next calls.
    """
    (tmp_path / "scripts").mkdir()
    for name in ("train.py", "scripts/speedrun.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    fake = tmp_path / "fake"
    fake.write_text(FAKE.replace("HERE", str(tmp_path)).replace("PYTHON", sys.executable))
    fake.chmod(0o755)

    def run(*flags, **environment):
        (tmp_path / "calls.txt").write_text("")
        done = subprocess.run(
            ["bash", "scripts/speedrun.sh", *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"PYTHON": str(fake)} | environment,
        )
        calls = (tmp_path / "calls.txt").read_text().splitlines()
        return done.returncode, done.stdout + done.stderr, calls

    def set_codes(name, *codes):
        (tmp_path / f"{name}.codes").write_text(" ".join(map(str, codes)))

    run.codes = set_codes
    run.folder = tmp_path
    return run


def names(calls):
    return [call.removeprefix("-m ").split()[0] for call in calls]


def test_every_step_is_taken_once_in_order_and_a_second_invocation_trains_nothing(chain):
    flags = "--seeds=2 --name=Idea --tasks=evals --skip=dry_run -- --steps=7 --softcap=1,2".split()
    code, said, calls = chain(*flags)
    assert code == 0, said
    order = "cached_fineweb10B.py train.py train.py scripts.evaluate scripts.evaluate".split()
    assert names(calls) == [*order, "scripts.verify_record", "scripts.report"]
    own = "train.py --steps=7 --softcap=1,2 --seed=1 --log_dir=logs/speedrun/"
    assert calls[2].startswith(own) and "--resume=auto" in calls[2]
    assert calls[3].endswith("--tasks=evals --fetch") and "/seed0/2026" in calls[3]
    record = chain.folder / calls[5].split()[2]
    assert record.parent == chain.folder / "records/v6e-8" and record.name.endswith("_Idea")
    assert (record / "seed1.txt").read_text().endswith("of seed 1\n")
    assert "| 0 | step:3 val_loss:3.2 of seed 0 |" in (record / "README.md").read_text()
    (record / "README.md").write_text("mine")
    code, said, again = chain(*flags)
    assert code == 0 and names(again) == [name for name in names(calls) if name != "train.py"]
    assert (record / "README.md").read_text() == "mine"
    flags[0], flags[3] = "--seeds=3", "--skip=dry_run,evaluate,report"
    _, _, more = chain(*flags)
    assert names(more) == ["cached_fineweb10B.py", "train.py", "scripts.verify_record"]
    assert "--seed=2" in more[1]
    _, _, other = chain("--skip=dry_run,shards", "--", "--steps=8")
    assert names(other) == ["train.py", "scripts.evaluate", "scripts.report"]
    (chain.folder / "train.py").write_text("another program")
    assert "train.py" in names(chain("--skip=dry_run", "--", "--steps=8")[2])


def test_a_users_files_stay_the_record_tells_the_command_and_a_second_chain_is_refused(chain):
    out = chain.folder / "it's [1] * é"
    flags = ["--seeds=2", "--skip=dry_run", f"--out={out}", "--", "--softcap=(1, 2)", "@a b.args"]
    are_as_they_were = [fill(out)]
    (chain.folder / "a b.args").write_text("--steps=3")
    chain.codes("train.py", 5)
    assert chain(*flags)[0] == 5
    (state,) = (path for path in out.iterdir() if len(path.name) == 12 and path.is_dir())
    are_as_they_were += [fill(state), fill(state / "seed0")]
    code, said, calls = chain(*flags)
    assert code == 0, said
    for is_as_it_was in are_as_they_were:
        is_as_it_was()
    (record,) = (chain.folder / "records/v6e-8").iterdir()
    made = (record / "README.md").read_text().split("`")[1]
    own = ["--seeds=2", "--name=Speedrun", "--track=v6e-8"]
    assert shlex.split(made) == ["bash", "scripts/speedrun.sh", *own, *flags[3:]]
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    code, said, calls = chain(*flags)
    assert code == 2 and "it's [1] * é: another speedrun.sh" in said and not calls
    os.close(handle)
    for name, what in (("seed0.done", "../../20260101"), ("record", "/etc/passwd")):
        before = (state / name).read_text()
        (state / name).write_text(what)
        code, said, _ = chain(*flags)
        assert code == 2 and said.endswith(f"{name}: holds no name of ours; delete it\n")
        (state / name).write_text(before)


def test_a_stopped_run_is_started_again_and_a_failed_one_ends_the_chain_with_its_code(chain):
    chain.codes("train.py", 75, 134, 137, 139, 143, 0)
    code, said, calls = chain("--skip=dry_run")
    assert code == 0 and names(calls).count("train.py") == 6
    assert said.count(", on from the last checkpoint") == 5
    chain.codes("train.py", 5)
    code, said, calls = chain("--skip=dry_run", "--", "--steps=3")
    assert code == 5 and "seed 0 ended with exit code 5" in said and names(calls)[-1] == "train.py"
    chain.codes("scripts.evaluate", 2)
    assert chain("--skip=dry_run", "--", "--steps=3")[0] == 2
    _, _, calls = chain("--skip=dry_run", "--", "--steps=3")
    assert names(calls) == ["cached_fineweb10B.py", "scripts.evaluate", "scripts.report"]


def test_a_rejected_record_is_reported_and_one_that_cannot_be_verified_ends_the_chain(chain):
    chain.codes("scripts.verify_record", 1, 2)
    code, said, calls = chain("--seeds=2", "--skip=dry_run")
    assert code == 1 and names(calls)[-1] == "scripts.report"
    code, said, calls = chain("--seeds=2", "--skip=dry_run", "--name=Other", "--", "--steps=5")
    assert code == 2 and names(calls)[-1] == "scripts.verify_record"
    code, said, _ = chain("--seeds=2", "--skip=dry_run", "--", "--steps=4")
    assert code == 2 and "_Speedrun is there already: give another --name" in said


def test_the_dry_run_is_made_where_there_is_a_tpu_compiler_and_once(chain):
    (chain.folder / "libtpu.py").write_text("")
    first, second = (
        names(chain("--topology=v5e:2x4", PYTHONPATH=str(chain.folder))[2]) for _ in range(2)
    )
    assert "scripts.dry_run" in first and "scripts.dry_run" not in second
    chain.codes("scripts.dry_run", 2)
    code, _, calls = chain("--", "--steps=2", PYTHONPATH=str(chain.folder))
    assert code == 2 and names(calls)[-1] == "scripts.dry_run"
    assert "scripts.dry_run" in names(chain("--", "--steps=2", PYTHONPATH=str(chain.folder))[2])


def test_wrong_flags_and_missing_packages_are_one_sentence_with_exit_code_2_at_the_start(chain):
    unknown = "--seed=3: there is no such flag; flags of train.py come after --"
    for flags, words, environment in (
        (["--seed=3"], unknown, {}),
        (["--seeds=0"], "a whole number", {}),
        (["--name=a/b"], "as a folder is named", {}),
        (["--track=../x"], "as a folder is named", {}),
        (["--", "@nowhere.args"], "there is no file of flags nowhere.args", {}),
        (["--skip=report,train"], "no step train", {}),
        (["--seeds=2"], "pip install -r scripts/requirements.txt", {"LACKING": "1"}),
    ):
        code, said, calls = chain(*flags, **environment)
        assert code == 2 and said.startswith("error: ") and words in said
        assert said.count("\n") == 1 and not calls
    assert "the whole speedrun" in chain("--help")[1].lower()


def smoke(folder, *flags):
    if not importlib.util.find_spec("matplotlib"):
        flags = ("--skip=dry_run,report", *flags)
    return subprocess.run(
        ["bash", "scripts/speedrun.sh", "--smoke", f"--out={folder}", "--skip=dry_run", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
        env=os.environ | {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": "1"},
    )


@pytest.mark.system
def test_a_smoke_run_goes_through_the_real_chain(tmp_path):
    small = """--steps=2 --num_layers=1 --long_layers= --offset_layers= --skips= --late_inputs=
        --backout= --gate_dims=0 --smear=false --stages.batch_tokens=512 --stages.seq_len=32
        --stages.ahead= --val_every=0 --optimizer=adamw"""
    done = smoke(tmp_path, "--seeds=1", "--", *small.split())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    run = next(tmp_path.glob("*/seed0/*/"))
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert json.loads((run / "evaluate.jsonl").read_text())["val_loss"] == pytest.approx(
        final, abs=2e-6
    )
    assert done.stdout.rstrip().endswith(f"done: {run}")
    if importlib.util.find_spec("matplotlib"):
        assert next(tmp_path.glob("*/report.html")).stat().st_size > 5000


@pytest.mark.system
def test_a_whole_smoke_run_is_a_record_that_is_rejected_for_its_file_of_flags_alone(tmp_path):
    for again in range(2):
        done = smoke(tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        assert done.stdout.count("argv reads flags from a file") == 2
        assert done.stdout.count("compiling") == (0 if again else 2)
