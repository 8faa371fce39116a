"""scripts/trace_run.py: a trace of the steps that were asked for, and what is said of others."""

import jax
import pytest

import train
from scripts import trace_run


@pytest.fixture
def calls(monkeypatch):
    """What the profiler is told, between the steps of a run of six that trains nothing."""
    calls = []

    def run(argv, hook):
        for step in range(1, 7):
            calls.append(step)
            assert not hook(step)
        return argv

    monkeypatch.setattr(train, "main", run)
    monkeypatch.setattr(train.Stop, "listens", True)  # pytest keeps its signals
    for name in ("start_trace", "stop_trace"):
        real = getattr(jax.profiler, name)

        def told(*folder, name=name, real=real):
            calls.append(name)
            real(*folder)

        monkeypatch.setattr(jax.profiler, name, told)
    return calls


def test_a_trace_of_the_steps_that_were_asked_for_as_far_as_the_run_goes(calls, tmp_path):
    for steps, wanted in (
        ("2:4", [1, 2, "start_trace", 3, 4, 5, "stop_trace", 6]),
        ("5:90", [1, 2, 3, 4, 5, "start_trace", 6, "stop_trace"]),
    ):
        calls.clear()
        out = tmp_path / steps
        assert trace_run.main([steps, f"--out={out}", "--steps=6"]) == ["--steps=6"]
        assert calls == wanted
        assert list(out.rglob("*.xplane.pb"))


def test_a_range_that_holds_no_step_ends_with_exit_code_2(calls, capsys):
    for argv in ([], ["5"], ["7:7"], ["0:3"], ["--steps=3", "1:2"], ["7:9"]):
        assert train.command(lambda argv=argv: trace_run.main(argv)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
