"""scripts/trace_run.py: a trace of the steps that were asked for, and what is said of others."""

import os

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


ON_A_CPU = """
planes {
  name: "/host:CPU"
  lines {
    name: "tf_XLAEigen"
    events {
      metadata_id: 1
      duration_ps: 30000000
      stats { metadata_id: 1 str_value: "x" }
    }
    events { metadata_id: 2 offset_ps: 40000000 duration_ps: 60000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "tanh.3" } }
  event_metadata { key: 2 value { id: 2 name: "python" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
"""


def summary_of(folder, trace):
    blob = jax.profiler.ProfileData.text_proto_to_serialized_xspace(trace)
    (folder / "host.xplane.pb").write_bytes(blob)
    return trace_run.summary(folder)


def test_a_trace_of_a_gpu_says_how_long_it_was_busy_and_with_which_kernels(tmp_path):
    first, *rows = summary_of(tmp_path, TRACE)
    assert first.startswith("0.1 ms, busy 90.0%; 4 kernels")
    assert [row.split() for row in rows] == [
        ["60.0%", "0.06", "2", "gemm_fusion_dot"],
        ["30.0%", "0.03", "1", "sm90_flash_64x128_kernel0"],
        ["10.0%", "0.01", "1", "copy"],
    ]


def test_of_a_tpu_and_a_cpu_nothing_but_operations_counts(tmp_path):
    on_a_tpu = TRACE.replace("device:GPU", "device:TPU").replace("Stream #13(Compute)", "XLA Ops")
    first, *rows = summary_of(tmp_path, on_a_tpu.replace("Stream", "Steps"))
    assert "3 kernels" in first and "copy" not in str(rows)
    first, row = summary_of(tmp_path, ON_A_CPU)
    assert "busy 100.0%; 1 kernels" in first and row.split() == ["100.0%", "0.03", "1", "tanh"]


def test_the_newest_trace_of_a_folder_is_read_and_an_empty_one_has_a_sentence(tmp_path):
    assert trace_run.summary(tmp_path) == [f"{tmp_path}: the trace holds no kernel"]
    for name, age in (("b", 0), ("a", 100)):
        (tmp_path / name).mkdir()
        summary_of(tmp_path / name, TRACE.replace("copy", f"copy_{name}"))
        os.utime(tmp_path / name / "host.xplane.pb", (1e9 - age, 1e9 - age))
    assert "copy_b" in trace_run.summary(tmp_path)[-1]


def test_what_runs_inside_of_a_loop_does_not_count_for_the_loop_too():
    events = [(0, 40, "a"), (0, 100, "while"), (20, 30, "b"), (50, 90, "a"), (110, 130, "c")]
    own = sorted(trace_run.own_times(events))
    assert own == [("a", 30), ("a", 40), ("b", 10), ("c", 20), ("while", 20)]
    assert trace_run.busy_time(events) == 100 + 20


def test_a_range_that_holds_no_step_ends_with_exit_code_2(calls, capsys):
    for argv in ([], ["5"], ["7:7"], ["0:3"], ["--steps=3", "1:2"], ["6:7", "--steps=6"]):
        assert train.command(lambda argv=argv: trace_run.main(argv)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
    assert calls == []  # before the run begins
    assert train.command(lambda: trace_run.main(["7:9"])) == 2
    assert "7:9: the run had no such step" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_ends_with_exit_code_2(
    calls, capsys, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    assert train.command(lambda: trace_run.main(["2:4", f"--out={tmp_path}/file/trace"])) == 2
    assert "file is no folder to write into" in capsys.readouterr().err and calls == []
    stop = jax.profiler.stop_trace

    def full():
        stop()
        raise jax.errors.JaxRuntimeError("No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    assert train.command(lambda: trace_run.main(["2:4", f"--out={tmp_path}/full"])) == 2
    said = capsys.readouterr().err
    assert said.endswith("full: no trace is written: No space left on device\n")


def test_a_signal_stops_a_run_that_is_traced(tmp_path):
    trace = trace_run.Trace(7, 9, str(tmp_path))
    trace.stop = [False, True].__getitem__
    assert [trace(step) for step in (0, 1)] == [False, True]
