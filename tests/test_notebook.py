"""scripts/notebook.ipynb: cells that run."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types

import pytest

import train
from scripts import evaluate
from train import ROOT

BOOK = json.loads((ROOT / "scripts/notebook.ipynb").read_text())
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute(shell, change) runs the code cells as Jupyter would, change(source) first.

    Lines of the shell go to shell(line). Returns the cells' variables. execute.shown: the pictures
    that were displayed.
    """
    shown = []
    display = types.ModuleType("IPython.display")
    display.SVG, display.display = lambda filename: filename, shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)

    def run(shell, change=lambda source: source):
        def filled_in(line):
            shell(re.sub(r"\{([\w.]+)\}", lambda match: str(eval(match[1], names)), line))

        def called(match):
            return f"{match[1]}shell({match[2]!r})"

        names = {"shell": filled_in}
        for cell in CODE:
            source = change("".join(cell["source"]))
            source = re.sub(r"^( *)!(.*)$", called, source, flags=re.M)
            exec(compile(source, cell["id"], "exec"), names)
        return names

    run.shown = shown
    return run


def test_it_is_a_notebook_of_format_4_5_without_outputs():
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CODE)


@pytest.mark.parametrize("what", ["demo", "fineweb"])
def test_every_command_of_its_cells_is_one_that_the_programs_take(execute, tmp_path, what):
    lines = []

    def shell(line):
        lines.append(shlex.split(line))
        if "clone" in line:
            (tmp_path / "speedrun-jax").mkdir()
        if "train.py" in line:
            os.makedirs(f"logs/{what}/20260101T000000Z-abc")

    def change(source):
        source = source.replace('REPO = ""', 'REPO = "somewhere"')
        return source.replace('WHAT = "demo"', f'WHAT = "{what}"')

    names = execute(shell, change)
    run = str(names["RUN"])
    assert lines[0] == ["git", "clone", "--quiet", "--depth=1", "somewhere", "speedrun-jax"]
    assert os.getcwd() == str(tmp_path / "speedrun-jax")
    commands = [line[1:] for line in lines if line[0] == sys.executable]
    install, *fetch, training, drawing, sampling, evaluation = commands
    assert install[:3] == ["-m", "pip", "install"] and install[-1].startswith("jax")
    assert (ROOT / install[5]).exists()
    assert fetch == ([["cached_fineweb10B.py", "1"]] if what == "fineweb" else [])
    cfg = train.parse_flags(training[1:])
    if fetch:  # of the whole speedrun's share of 8 shards no more than one
        trained, whole = (train.tokens_before(c.steps, c) for c in (cfg, train.SPEEDRUN))
        assert trained < whole / train.SPEEDRUN_SHARDS
    assert drawing == ["-m", "scripts.report", run, f"--out={run}/report.html"]
    assert evaluation[:2] == ["-m", "scripts.evaluate"]
    assert evaluate.parse(evaluation[2:]).checkpoint == run
    assert sampling[:2] == ["-m", "scripts.sample"]
    assert {f"--checkpoint={run}", f"--prompt={names['PROMPT']}"} < {*sampling}
    assert execute.shown == [f"{run}/report.svg"]


def test_without_a_clone_and_an_address_it_says_what_is_missing(execute):
    with pytest.raises(AssertionError, match="address of the repository"):
        execute(lambda line: None)


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib")
WANTED = "pip install -r scripts/requirements.txt"


@pytest.mark.system
@pytest.mark.skipif(not HAS_MATPLOTLIB, reason=WANTED)
def test_its_cells_train_draw_sample_and_evaluate(execute, tmp_path, monkeypatch):
    said = []

    def shell(line):
        if "pip install" not in line:
            line = line.replace("--preset=demo", "@scripts/presets/tiny.args")
            done = subprocess.run(line, shell=True, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)

    monkeypatch.chdir(ROOT)
    names = execute(shell, lambda source: source.replace("logs", str(tmp_path)))
    assert (names["RUN"] / "report.svg").exists() and "bits per byte" in said[-1]
    assert len(said) == 4 and len(said[2]) > 100
