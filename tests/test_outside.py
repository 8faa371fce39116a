"""Companions against what they do not choose: others' files, names of folders, consoles, pipes."""

import os
import shutil
import subprocess
import sys

import pytest
from users_files import fill

from train import ROOT

AWKWARD = "it's [1] * ? $HOME é日本"
HLO = "ENTRY %main (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} parameter(0)\n}\n"
ENVIRONMENT = {
    "PYTHONIOENCODING": "ascii",
    "PYTHONUNBUFFERED": "",
    "JAX_ENABLE_X64": "1",
    "JAX_DEBUG_NANS": "1",
}
HELP = (
    "report verify_record compare bench baselines trace_run dry_run dry_run.estimate".split()
)  # of scripts; and cached_fineweb10B.py


def run(argv, stdout=subprocess.PIPE):
    """(exit code, stdout, stderr) of a command in an odd environment, here without a home."""
    environment = os.environ | ENVIRONMENT
    environment.pop("HOME", None)
    argv = [sys.executable, *map(str, argv)]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, timeout=200
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, (done.stdout or b"").decode("ascii"), done.stderr.decode("ascii")


def run_unread(argv):
    """The exit code and the errors of a command whose reader is gone before it says a word."""
    reader, writer = os.pipe()
    os.close(reader)
    code, _, errors = run(argv, writer)
    os.close(writer)
    return code, errors


@pytest.fixture
def folder(tmp_path):
    return tmp_path / AWKWARD


def record(folder):
    """Of a name that is no text."""
    name = os.fsdecode(b"2026-11-21_caf\xe9 [x]")
    return shutil.copytree(ROOT / "records/cpu/2026-11-21_Demo", folder / "cpu" / name)


def report(folder):
    pytest.importorskip("matplotlib", reason="of scripts/requirements.txt")
    return ["-m", "scripts.report", record(folder), f"--out={folder}/all.html"], "all.html"


def verify_record(folder):
    return ["-m", "scripts.verify_record", record(folder)], ""


def compare(folder):
    for name in ("bytes.txt", "bytes.jsonl"):
        shutil.copy(ROOT / "records/ablations" / name, folder)
    shutil.copytree(ROOT / "records/ablations/patches", folder / "patches")
    return ["-m", "scripts.compare", folder / "bytes.txt", "--table"], ""


def estimate(folder):
    (folder / "step.hlo").write_text(HLO)
    return ["-m", "scripts.dry_run.estimate", folder / "step.hlo"], ""


@pytest.mark.parametrize("prepare", [report, verify_record, compare, estimate])
def test_a_folder_of_any_name_works_on_any_console_and_what_lies_there_stays(prepare, folder):
    is_as_it_was = fill(folder)
    argv, written = prepare(folder)
    code, _, errors = run(argv)
    assert code == 0, errors
    is_as_it_was()
    if written:
        (folder / written).unlink()
    code, errors = run_unread(argv)
    assert code == 2 and errors.count("\n") <= 1
    if written:  # before a word is said
        assert (folder / written).read_text().endswith("</html>\n")
    is_as_it_was()


@pytest.mark.parametrize("name", [*HELP, ""])
def test_help_whose_reader_is_gone_says_nothing_more(name):
    argv = ["-m", f"scripts.{name}"] if name else ["cached_fineweb10B.py"]
    code, errors = run_unread([*argv, "--help"])
    assert code in (0, 2) and errors.count("\n") <= 1
