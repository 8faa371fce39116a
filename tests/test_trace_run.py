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


TRACE = """
planes {
  name: "/device:GPU:1"
  lines { name: "Stream #1" events { metadata_id: 1 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "elsewhere" } }
}
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 40000000 }
    events { metadata_id: 2 offset_ps: 50000000 duration_ps: 20000000 }
    events { metadata_id: 3 offset_ps: 70000000 duration_ps: 30000000 }
  }
  lines { name: "Stream #14" events { metadata_id: 4 offset_ps: 30000000 duration_ps: 10000000 } }
  lines { name: "XLA Modules" events { metadata_id: 5 offset_ps: 0 duration_ps: 100000000 } }
  event_metadata { key: 1 value { id: 1 name: "gemm_fusion_dot_12" } }
  event_metadata { key: 2 value { id: 2 name: "gemm_fusion_dot_3_1" } }
  event_metadata { key: 3 value { id: 3 name: "sm90_flash_64x128_kernel0_0" } }
  event_metadata { key: 4 value { id: 4 name: "copy" } }
  event_metadata { key: 5 value { id: 5 name: "jit_train_step" } }
}
"""


def test_a_trace_of_a_gpu_says_how_long_it_was_busy_and_with_which_kernels(tmp_path):
    blob = jax.profiler.ProfileData.text_proto_to_serialized_xspace(TRACE)
    (tmp_path / "host.xplane.pb").write_bytes(blob)
    first, *rows = trace_run.summary(tmp_path)
    assert first.startswith("0.1 ms, busy 90.0%; 4 kernels")
    assert [row.split() for row in rows] == [
        ["60.0%", "0.06", "2", "gemm_fusion_dot"],
        ["30.0%", "0.03", "1", "sm90_flash_64x128_kernel0"],
        ["10.0%", "0.01", "1", "copy"],
    ]


def test_what_runs_inside_of_a_loop_does_not_count_for_the_loop_too():
    events = [(0, 100, "while"), (10, 40, "a"), (20, 30, "b"), (50, 90, "a"), (100, 130, "c")]
    own = sorted(trace_run.own_times(events))
    assert own == [("a", 20), ("a", 40), ("b", 10), ("c", 30), ("while", 30)]


def test_a_range_that_holds_no_step_ends_with_exit_code_2(calls, capsys):
    for argv in ([], ["5"], ["7:7"], ["0:3"], ["--steps=3", "1:2"], ["7:9"]):
        assert train.command(lambda argv=argv: trace_run.main(argv)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
