"""scripts/notebook.ipynb: what its generator writes, and cells that run."""
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
from scripts import evaluate, notebook
from train import ROOT


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute(shell, change) runs the code cells as Jupyter would, change(source) first; lines of the shell go to shell(line).
    Returns their variables. The pictures that were displayed: execute.shown."""
    shown = []
    display = types.ModuleType("IPython.display")
    display.SVG, display.display = lambda filename: filename, shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    def run(shell, change=lambda source: source):
        names = {"shell": lambda line: shell(re.sub(r"\{([\w.]+)\}", lambda m: str(eval(m[1], names)), line))}
        for cell in json.loads((ROOT / "scripts/notebook.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                source = re.sub(r"^( *)!(.*)$", lambda m: f"{m[1]}shell({m[2]!r})", change("".join(cell["source"])), flags=re.M)
                exec(compile(source, cell["id"], "exec"), names)
        return names
    run.shown = shown
    return run


def test_the_committed_notebook_is_what_the_generator_writes(tmp_path):
    assert (ROOT / "scripts/notebook.ipynb").read_text() == notebook.notebook()
    notebook.main([f"--out={tmp_path / 'mine.ipynb'}", "--repo=https://host/me/it"])
    assert json.loads((tmp_path / "mine.ipynb").read_text())["cells"][1]["source"][0].startswith('REPO = "https://host/me/it"')


def test_it_is_a_notebook_of_format_4_5_without_outputs():
    book = json.loads(notebook.notebook())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and book["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"]) <= 12
    for cell in book["cells"]:
        assert re.fullmatch("[a-zA-Z0-9_-]{1,64}", cell["id"]) and all(line.endswith("\n") for line in cell["source"][:-1])
        wanted = {"id", "cell_type", "metadata", "source"} | ({"outputs", "execution_count"} if cell["cell_type"] == "code" else set())
        assert cell.keys() == wanted and not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("what", ["demo", "fineweb"])
def test_every_command_of_its_cells_is_one_that_the_programs_take(execute, tmp_path, what):
    lines = []
    def shell(line):
        lines.append(shlex.split(line))
        if "clone" in line:
            (tmp_path / "speedrun-jax").mkdir()
        if "train.py" in line:
            os.makedirs(f"logs/{what}/20260101T000000Z-abc")
    names = execute(shell, lambda source: source.replace('REPO = ""', 'REPO = "somewhere"').replace('WHAT = "demo"', f'WHAT = "{what}"'))
    assert lines[0] == ["git", "clone", "--quiet", "--depth=1", "somewhere", "speedrun-jax"] and os.getcwd() == str(tmp_path / "speedrun-jax")
    commands = [line[1:] for line in lines if line[0] == sys.executable]
    (install, *fetch, training, sampling, evaluation), run = commands, str(names["RUN"])
    assert install[:3] == ["-m", "pip", "install"] and install[-1].startswith("jax") and (ROOT / install[5]).exists()
    assert fetch == ([["cached_fineweb10B.py", "1"]] if what == "fineweb" else [])
    given = train.parse_flags(training[1:])
    cfg = train.Config(**train.PRESETS[given["preset"]] | given)
    train.validate(cfg)
    if fetch:  # of the whole speedrun's share of 8 shards no more than one
        trained, whole = (train.tokens_before(c.steps, train.stages(c)) for c in (cfg, train.Config()))
        assert trained < whole / train.SPEEDRUN_SHARDS
    assert evaluation[:2] == ["-m", "scripts.evaluate"] and evaluate.parse(evaluation[2:]).checkpoint == run
    assert sampling[:2] == ["-m", "scripts.sample"] and f"--checkpoint={run}" in sampling and f"--prompt={names['PROMPT']}" in sampling
    assert execute.shown == [f"{run}/loss.svg"]


def test_without_a_clone_and_an_address_it_says_what_is_missing(execute):
    with pytest.raises(AssertionError, match="address of the repository"):
        execute(lambda line: None)


@pytest.mark.soak
@pytest.mark.skipif(not importlib.util.find_spec("scripts.sample"), reason="needs scripts/sample.py")
def test_its_cells_train_draw_sample_and_evaluate(execute, tmp_path, monkeypatch):
    said = []
    def shell(line):
        if "pip install" not in line:
            done = subprocess.run(line.replace("--preset=demo", "--preset=tiny"), shell=True, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
    monkeypatch.chdir(ROOT)
    names = execute(shell, lambda source: source.replace("logs", str(tmp_path)))
    assert (names["RUN"] / "loss.svg").exists() and "bits per byte" in said[-1] and len(said) == 3 and len(said[1]) > 100
