"""Flags, presets, what a Config must satisfy, and what importing train.py does not do."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from shards import TINY, make_folder

import cached_fineweb10B
import train
from train import DEMO, SPEEDRUN, Config, Stage, UsageError, parse_flags, replace

SOURCE = Path(train.__file__)
REPO = SOURCE.parent
PRESETS = {**train.PRESETS, "tiny": parse_flags([TINY])}


def refusal(*flags):
    """What the flags, on top of tiny, are refused with: one line."""
    try:
        parse_flags(flags, "tiny", PRESETS)
    except UsageError as error:
        assert "\n" not in str(error), flags
        return str(error)
    pytest.fail(f"{flags} were taken")


# ---- Flags ----


def test_help_is_the_docstring_and_the_config_and_starts_no_device(capsys, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("asked for devices"))
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the backend"))
    assert not train.command(lambda: train.main(["--steps=x", "--help"]))
    printed = capsys.readouterr().out
    assert train.__doc__ in printed
    for name in [*Stage.__annotations__, *Config.__annotations__]:
        comment = "" if name == "stages" else "  # .+"
        assert re.search(rf"^    {name}: .* = (\(\n +)?.*{comment}$", printed, re.M), name


def test_a_word_that_is_no_flag_says_what_was_meant():
    for word in ("--resume", "steps=3", "-step=4", ""):
        assert "wanted --" in refusal(word), word
    typos = {"stps": "steps", "muonlr": "muon_lr", "stages.seqlen": "stages.seq_len", "x": ""}
    typos |= {"lr": "muon_lr", "batch_tokens": "stages.batch_tokens", "seq_len": "val.seq_len"}
    for typo, nearest in typos.items():
        said = refusal(f"--{typo}=1")
        assert f"--{typo}=1: there is no such flag; the nearest are --" in said, typo
        assert f"--{nearest}" in said and "see --help" in said, typo


def test_a_value_has_its_fields_type():
    flags = ["--steps=7", "--muon_lr=1", "--adam_eps=1e-8", "--smear=false", "--deterministic=1"]
    flags += ["--num_kv_heads=1", "--vocab_size=none", "--residual_dtype=none", "--resume=3"]
    flags += ["--mlp_only=", "--long_layers=1", "--skips=((0,1),(1,2))", "--softcap=15,15,0"]
    cfg = parse_flags([*flags, "--steps=8"], "demo")
    assert (cfg.steps, cfg.adam_eps, cfg.resume) == (8, 1e-8, "3")  # the last of two counts
    assert (cfg.smear, cfg.deterministic, type(cfg.muon_lr)) == (False, True, float)
    assert (cfg.num_kv_heads, cfg.vocab_size, cfg.residual_dtype) == (1, None, None)
    assert (cfg.mlp_only, cfg.long_layers, cfg.skips) == ((), (1,), ((0, 1), (1, 2)))
    assert cfg.softcap == (15, 15, 0) and parse_flags(["--softcap="], "demo").softcap == ()


def test_a_flag_sets_a_column_of_the_stage_table_at_once_or_row_by_row():
    flags = ["--stages.lr=1,2,3", "--stages.short=9", "--stages.ahead=(0.5,),(),(0.1,0.2)"]
    cfg = parse_flags([*flags, "--stages.tied=1,0,0", "--val.seq_len=300"], "demo")
    one, two, three = DEMO.stages
    assert cfg.stages == (
        replace(one, lr=1.0, short=9, ahead=(0.5,), tied=True),
        replace(two, lr=2.0, short=9, ahead=()),
        replace(three, lr=3.0, short=9, ahead=(0.1, 0.2)),
    )
    assert cfg.val == replace(DEMO.val, seq_len=300)
    assert parse_flags(["--stages.ahead="]).stages[0].ahead == ()


def test_stages_end_sets_the_number_of_rows_whatever_the_order_of_the_flags():
    flags = ["--steps=40", "--stages.lr=1,2,3,4", "--stages.end=0.2,0.5,0.9,1"]
    cfg = parse_flags(flags, "demo")
    assert parse_flags(flags[::-1], "demo") == cfg
    assert [(stage.end, stage.lr) for stage in cfg.stages] == [(0.2, 1), (0.5, 2), (0.9, 3), (1, 4)]
    assert cfg.stages[3] == replace(DEMO.stages[2], end=1.0, lr=4.0)  # the last one repeated
    assert cfg.bounds == [0, 8, 20, 36, 40]
    assert [span[1:] for span in cfg.spans] == [(0, 8), (8, 20), (20, 36), (36, 40)]
    assert train.tokens_before(25, cfg) == 8 * 1024 + 12 * 2048 + 5 * 3072
    assert parse_flags(["--stages.end=1"], "demo").stages == (replace(DEMO.stages[0], end=1.0),)


def test_a_file_holds_flags_with_comments_and_several_on_a_line(tmp_path):
    path = tmp_path / "my.args"
    path.write_text("""# what I'd like
        --steps=7 --seed=3  # both
        --train_files='a b/*.bin'""")
    wanted = replace(DEMO, steps=7, seed=3, train_files="a b/*.bin")
    assert parse_flags([f"@{path}"], "demo") == wanted
    assert parse_flags(["--seed=5", f"@{path}", "--steps=9"], "demo") == replace(wanted, steps=9)
    path.write_text("\ufeff--preset=demo\r\n--steps=7 --seed=3\r\n")
    assert parse_flags([f"@{path}", "--train_files=a b/*.bin"]) == wanted
    path.write_text("--steps=7\n--ssed=2\n")
    assert "--seed" in refusal(f"@{path}")
    path.write_text("--resume='logs\n")
    assert "quot" in refusal(f"@{path}")


JUNK = [*"x -1 1.5 nan 1e999 none true 1,2 ((0,1),) [1] :".split(), "", "9" * 99]


def test_whatever_a_flag_is_set_to_it_is_accepted_or_refused_with_its_name():
    refused = 0
    for flag in train.flag_names(Config):
        for text in JUNK:
            try:
                parse_flags([f"--{flag}={text}"], "demo")
            except UsageError as error:
                refused += 1
                assert re.match(r"--[\w.]+=", str(error)), (flag, text, error)
    assert refused > 300


def test_a_value_of_another_type_or_one_that_cannot_run_is_refused_with_its_flag():
    cases = """--steps=ten --steps=1e3 --steps=1.5 --steps= --seed=none --muon_lr=fast --muon_lr=1,5
     --smear=x --smear=2 --stages=1 --skips=a>b --softcap=high --softcap=1,2 --stages.lr=fast,1
     --val=1 --stages.tied=yes --stages.end=half,1 --stages.seq_len=32,64,64
     --num_layers=0 --model_dim=0 --num_heads=0 --val_tokens=0 --max_epochs=0
     --cpu_devices=0 --steps=-5 --seed=-1 --head_block=0 --micro_tokens=0 --gate_dims=-1
     --val_every=-2 --muon_lr=-0.1 --muon_lr=nan --head_dim=6 --num_kv_heads=3
     --skips=((2,1),) --skips=((0,3),) --skips=1 --late_inputs=((1,1),) --late_inputs=((0,2),(1,2))
     --mlp_only=7 --mlp_only=[1] --backout=3 --offset_layers=-1 --long_layers=1.5
     --attention=flash --optimizer=sgd --compute_dtype=int8 --residual_dtype=big --val_context=64
     --stages.end=0.5,0.9 --stages.end=1,0.5 --stages.end=0,1 --stages.doc_len=0,32
     --stages.seq_len=48,64 --stages.seq_len=0 --stages.batch_tokens=500,1024
     --stages.batch_tokens=0 --gate_dims=33 --attn_scale=4 --softcap=0,15,5 --softcap=11,0,5
     --stages.ahead=('x',),() --stages.lr=1,2,3 --copy_dim=1025 --stages.candidates=-1"""
    capped = "--copy_dim=64 --softcap=", "--copy_dim=64 --softcap=41,15,5"
    yarn = "--attn_scale=0.9 --stages.short=4,64 --stages.long=4,64 --head_dim=64"
    for case in (*capped, yarn):
        assert refusal(*case.split()).startswith(case.split("=")[0] + "="), case
    for case in [*cases.split(), "--skips=" + "(" * 999, "--steps=" + "9" * 5000]:
        assert refusal(case).startswith(case.split("=")[0] + "="), case


# ---- Presets ----


def test_a_preset_is_named_by_a_flag_or_a_file():
    assert parse_flags([]) == parse_flags(["--preset=speedrun"], "demo") == SPEEDRUN == Config()
    assert parse_flags(["--seed=5", "--preset=demo"]) == replace(DEMO, seed=5)
    tiny = PRESETS["tiny"]
    assert (tiny.preset, tiny.model_dim, len(tiny.stages)) == ("demo", 32, 2)
    assert all(preset in refusal("--preset=dmeo") for preset in ("speedrun", "demo"))


def test_a_cpu_trains_the_demo_and_says_how_to_get_the_real_thing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg, why = train.configure([])
    assert cfg == replace(DEMO, attention="xla")
    assert "CPU" in why and "python cached_fineweb10B.py" in why
    assert train.configure(["--num_layers=5"])[0].num_layers == 5  # too few for the speedrun


def test_an_accelerator_trains_the_speedrun_or_says_how_to_get_its_shards(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda *_: [chip] * 4)
    monkeypatch.setattr(jax, "device_count", lambda *_: 4)
    assert train.command(lambda: train.main([])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"python cached_fineweb10B.py {train.SPEEDRUN_SHARDS}" in line
    assert "4 x TPU v5 lite" in line and "--preset=demo" in line
    assert train.configure(["--preset=demo"])[0] == replace(DEMO, attention="xla")
    Path("fineweb10B").mkdir()
    Path("fineweb10B/fineweb_train_000001.bin").touch()
    cfg, why = train.configure([])
    assert cfg == replace(SPEEDRUN, attention="band") and "4 x TPU v5 lite" in why


def test_attention_follows_platform_and_shapes_unless_it_is_asked_for():
    stages = Stage(0.5, 2048, seq_len=256), Stage(1.0, 2048, seq_len=512)
    fits = replace(SPEEDRUN, head_dim=128, stages=stages, val=Stage(seq_len=768))
    band, half_tile = {"attention": "band"}, {"stages": (Stage(1.0, 2048, seq_len=384),)}
    for changes, platform, chosen in [
        ({}, "tpu", "band"), (band, "tpu", "band"), ({"attention": "xla"}, "tpu", "xla"),
        ({}, "cpu", "xla"), ({}, "gpu", "xla"), ({"head_dim": 192}, "tpu", "xla"),
        (half_tile, "tpu", "xla"), ({"copy_dim": 64}, "tpu", "xla"),
        ({"compute_dtype": "float32"}, "tpu", "xla"), ({"val": Stage(seq_len=800)}, "tpu", "xla"),
    ]:  # fmt: skip
        cfg = replace(fits, **changes)
        found = train.choose_attention(cfg, platform)
        assert found == replace(cfg, attention=chosen), (changes, platform)
    for changes, platform in ((band, "gpu"), (band | {"head_dim": 64}, "tpu")):
        with pytest.raises(UsageError, match="--attention=band"):
            train.choose_attention(replace(fits, **changes), platform)


def test_an_nvidia_gpu_takes_cudnns_attention_where_it_has_the_gradient_of_such_heads(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    wide, odd = {"head_dim": 256}, {"val": Stage(seq_len=4095)}
    for changes, capability, chosen in [
        ({}, 7.5, "xla"), ({}, 8.0, "cudnn"), ({}, 9.0, "cudnn"), ({}, 10.0, "cudnn"),
        (wide, 8.9, "xla"), (wide, 9.0, "cudnn"), (wide, 12.0, "xla"), ({}, 0.0, "xla"),
        ({"head_dim": 124}, 9.0, "xla"), (odd, 9.0, "xla"), ({"deterministic": True}, 9.0, "xla"),
        ({"compute_dtype": "float32"}, 9.0, "xla"), ({"attention": "xla"}, 9.0, "xla"),
        ({"attention": "cudnn"}, 9.0, "cudnn"),
    ]:  # fmt: skip
        cfg = replace(SPEEDRUN, **{"head_dim": 128} | changes)
        found = train.choose_attention(cfg, "gpu", capability)
        assert found == replace(cfg, attention=chosen), (changes, capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))  # the mask's gradient costs memory
    assert train.choose_attention(SPEEDRUN, "gpu", 9.0).attention == "xla"
    with pytest.raises(
        UsageError, match="cudnn: wanted an NVIDIA GPU of .* capability 8.0 or more$"
    ):
        train.choose_attention(replace(SPEEDRUN, attention="cudnn"), "gpu")
    with pytest.raises(UsageError, match="--attention=cudnn: wanted JAX 0.11.2 or newer, heads of"):
        train.choose_attention(replace(SPEEDRUN, attention="cudnn"), "gpu", 8.0)


def test_the_log_says_which_attention_runs_and_what_the_platforms_own_lacks(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    of_128 = "heads of at most 128, such as --num_heads=6 --head_dim=128 --attn_scale=0.1"
    thin = {"copy_dim": 64}
    for platform, changes, said in (
        ("cpu", {}, "xla"),
        ("tpu", {"attention": "band"}, "band"),
        ("tpu", thin, "xla; band wants multiples of 128 as head_dim and copy_dim"),
        ("gpu", {}, f"xla; cudnn wants {of_128}"),
        ("gpu", {"num_kv_heads": 1}, "xla; cudnn wants heads of at most 128"),
    ):
        cfg = replace(SPEEDRUN, **{"attention": "xla"} | changes)
        assert train.attention_note(cfg, platform, 8.0) == f"attention: {said}"


def test_only_an_nvidia_gpu_has_a_compute_capability():
    for stated, number in (("9.0", 9.0), ("12.1", 12.1), ("gfx942", 0.0), (None, 0.0)):
        assert train.compute_capability(types.SimpleNamespace(compute_capability=stated)) == number
    assert train.compute_capability(types.SimpleNamespace()) == 0.0


@pytest.mark.parametrize(
    ("limit", "micro_tokens"),
    [(60, 49152), (40, 32768), (24, 16384), (9, 8192), (1, None), (0, None)],
)
@pytest.mark.parametrize(
    ("num_devices", "fullest"), [(1, {49152: "train_2"}), (8, {49152: "train_2", 32768: "train_1"})]
)
def test_on_a_gpu_micro_steps_are_as_large_as_memory_and_the_fullest_stage_allow(
    monkeypatch, limit, micro_tokens, num_devices, fullest
):
    """A program of n tokens at once needs n units here, memory has 1000 x limit.

    A stage's share of eight GPUs is 16384, 32768, 49152 or 40960 tokens, in equal micro-steps.
    """
    mesh = types.SimpleNamespace(size=num_devices)
    speedrun = replace(SPEEDRUN, vocab_size=50257)
    computed_twice = None
    saved = {"config": {"micro_tokens": 16384}}

    def list_programs(model, mesh, cfg):
        sizes = "argument_size_in_bytes alias_size_in_bytes temp_size_in_bytes output_size_in_bytes"
        use = types.SimpleNamespace(**dict.fromkeys(sizes.split(), 0))
        use.temp_size_in_bytes = cfg.micro_tokens
        twice = cfg.micro_tokens == computed_twice
        text = "%fusion.1.remat2 = f32[]" if twice else "%zeros.1.rematerialized = f32[]"
        program = types.SimpleNamespace(memory_analysis=lambda: use, as_text=lambda: text)

        def compile(compiler_options):
            if limit and cfg.micro_tokens > 1000 * limit:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: the autotuner allocates")
            return program

        lowered = types.SimpleNamespace(compile=compile)
        number = fullest.get(cfg.micro_tokens, "train_3")
        return {number: (types.SimpleNamespace(lower=lambda: lowered), ())}

    stats = {"bytes_limit": 1000 * limit} if limit else None  # of an allocator that states none
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(train, "compiler_options", lambda mesh, cfg: {})
    monkeypatch.setattr(train, "list_programs", list_programs)
    for platform, wanted in (("gpu", micro_tokens), ("tpu", None)):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert train.fit_memory(train.GPT, mesh, speedrun, {}).micro_tokens == wanted
        given = replace(speedrun, micro_tokens=8192)
        assert train.fit_memory(train.GPT, mesh, given, {}) == given
        resumed = train.fit_memory(train.GPT, mesh, speedrun, saved).micro_tokens
        assert resumed == (wanted and min(wanted, 16384))
        small = {"config": {"micro_tokens": 2048}}
        resumed = train.fit_memory(train.GPT, mesh, speedrun, small).micro_tokens
        assert resumed == (2048 if platform == "gpu" else None)
        computed_twice = 16384
        resumed = train.fit_memory(train.GPT, mesh, speedrun, saved).micro_tokens
        assert resumed == (wanted and 8192)
        computed_twice = None


def test_what_a_device_refuses_is_one_sentence_that_says_what_to_turn():
    cfg = replace(SPEEDRUN, attention="cudnn", micro_tokens=8192)
    for error, said in (
        ("RESOURCE_EXHAUSTED: Out of memory\nmore", r"Halve --micro_tokens=8192.*\(RESOURCE.*y\)$"),
        ("RESOURCE_EXHAUSTED: to instantiate command buffer\nmore", "XLA_CLIENT_MEM_FRACTION=0.7"),
        ("INTERNAL: first\nCUDNN_STATUS_NOT_SUPPORTED", r"NOT_SUPPORTED\); take --attention=xla"),
        ("cuDNN not found.", r"cuDNN refuses \(cuDNN not found"),
        ("INTERNAL: cuDNN reports no supported engine for the graph", "take --attention=xla"),
    ):
        with pytest.raises(UsageError, match=said), train.device_errors(cfg):
            raise jax.errors.JaxRuntimeError(error)
    for attention, error in (
        ("xla", "INTERNAL: CUDNN_STATUS_NOT_SUPPORTED"),
        ("cudnn", "INTERNAL: CUDNN_STATUS_NOT_INITIALIZED"),  # another process has the memory
        ("cudnn", "INTERNAL: something else"),
    ):
        cfg = replace(cfg, attention=attention)
        with pytest.raises(jax.errors.JaxRuntimeError, match=error), train.device_errors(cfg):
            raise jax.errors.JaxRuntimeError(error)


# ---- python train.py ----


def test_the_mfu_is_of_known_devices_and_whole_ones(monkeypatch):
    for kind, peak in (
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", 0),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA GH200 480GB", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
    ):
        device = types.SimpleNamespace(device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert train.peak_flops() == peak * jax.device_count(), kind


def test_where_jax_sees_only_a_cpu_shards_that_are_there_are_not_passed_over_for_the_demo(
    tmp_path, monkeypatch
):
    """As a loop would that starts a run again, on a machine whose driver no longer works."""
    monkeypatch.chdir(tmp_path)
    assert train.choose_preset(SPEEDRUN.train_files)[0] == "demo"
    assert train.choose_preset("own_*.bin")[0] == "demo"
    shard = tmp_path / "fineweb10B/fineweb_train_000001.bin"
    shard.parent.mkdir()
    shard.touch()
    with pytest.raises(UsageError, match="JAX sees only a CPU, but shards match fineweb10B/"):
        train.choose_preset(SPEEDRUN.train_files)


def test_files_that_are_not_there_end_with_2_the_ways_out_and_nothing_left(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ways = ["none/*.bin", "python cached_fineweb10B.py", "scripts.prepare", "--preset=demo"]
    for word, said in (("@none.args", ["@none.args"]), ("--train_files=none/*.bin", ways)):
        run = functools.partial(train.main, ["--preset=demo", "--val_files=none/*.bin", word])
        assert train.command(run) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and all(part in line for part in said), line
        assert list(tmp_path.iterdir()) == []


def test_each_kind_of_error_has_its_exit_code_and_a_bug_keeps_its_traceback(capsys):
    def fails():
        raise error("what came")

    for error, code in ((UsageError, 2), (OSError, 2), (train.NonFiniteLoss, 5)):
        assert train.command(fails) == code
        assert capsys.readouterr().err == "error: what came\n"
    error = KeyError
    with pytest.raises(KeyError):
        train.command(fails)


def test_importing_train_starts_nothing_and_a_typo_ends_python_train_py_with_2_and_one_sentence(
    tmp_path,
):
    program = """
import os, runpy, sys, threading
import jax, numpy, einops, safetensors.numpy  # what these do is theirs
from jax.experimental import multihost_utils
from jax.experimental.pallas import tpu
environment, threads, opened = dict(os.environ), threading.active_count(), []
config = dict(jax.config.values)
def hear(event, a):
    if event == "open" and not str(a[0]).endswith((".py", ".pyc")):
        opened.append(a[0])
sys.addaudithook(hear)
import train
assert not [path for path in opened if not str(path).startswith(sys.prefix)], opened
assert threading.active_count() == threads and dict(os.environ) == environment
assert dict(jax.config.values) == config
jax.config.update("jax_num_cpu_devices", 3)  # an error once there is a backend
sys.argv = ["train.py", "--stpes=5"]
runpy.run_path(train.__file__, run_name="__main__")  # as python train.py --stpes=5
"""
    home = tmp_path / "home"
    home.mkdir()
    env = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": f"{home}/cache"}
    env |= {"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=home, env=env, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "--stpes" in line and list(home.iterdir()) == []


SMALL = """--preset=demo --steps=3 --num_layers=1 --model_dim=16 --num_heads=1 --head_dim=16
 --mlp_dim=16 --skips= --backout= --offset_layers=0 --stages.end=1 --stages.batch_tokens=64
 --stages.seq_len=32 --stages.lr=1 --val.seq_len=32 --val_context=0 --val_tokens=64
 --micro_tokens=64 --log_every=1""".split()


def python_train(folder, *flags, **env):
    """(exit code, lines of stderr, the metrics' losses) of python train.py with a small model."""
    logs = folder / os.fsdecode(b"caf\xe9 \xc3\xa9 [1]")  # no text, text, a pattern
    env = {"XDG_CACHE_HOME": str(folder), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | env
    command = [sys.executable, "train.py", *SMALL, *make_folder(folder / "data"), *flags]
    done = subprocess.run(
        [*command, f"--log_dir={logs}"], cwd=REPO, env=os.environ | env, capture_output=True
    )
    rows = [path.read_text().splitlines() for path in logs.glob("*/metrics.jsonl")]
    losses = [json.loads(row).get("train_loss") for row in (rows or [[]])[-1]]
    return done.returncode, done.stderr.decode().splitlines(), losses


@pytest.mark.system
def test_whatever_the_environment_says_the_losses_are_the_same(tmp_path):
    code, said, losses = python_train(tmp_path / "plain")
    assert (code, said, len(losses)) == (0, [], 4)
    odd = {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    odd |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_TRANSFER_GUARD": "disallow"}
    odd |= {"PYTHONIOENCODING": "ascii", "JAX_CHECK_TRACER_LEAKS": "1"}
    odd |= {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0"}
    assert python_train(tmp_path / "odd", **odd) == (0, [], losses)


def test_an_environment_that_cannot_train_is_one_sentence(tmp_path, monkeypatch):
    for env, part in ({"JAX_PLATFORMS": "abacus"}, "abacus"), ({"JAX_DISABLE_JIT": "1"}, "JIT"):
        code, (line,), losses = python_train(tmp_path / part, **env)
        assert code == 2 and line.startswith("error: ") and part in line and losses == []
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    for known in (OSError("read-only"), RuntimeError("no home")):
        monkeypatch.setattr(Path, "mkdir" if type(known) is OSError else "home", raises(known))
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
            train.cache_dir()


def raises(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("words", [1, 99_999])  # they stay in a buffer, or they do not
def test_a_pipe_that_nobody_reads_ends_it_with_one_sentence(words):
    program = f"import sys, train; sys.exit(train.command(lambda: print('word ' * {words})))"
    command = [sys.executable, "-c", program]
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=REPO, env=env, stdout=-1, stderr=-1, text=True) as process:
        process.stdout.close()
        assert len(process.stderr.read().splitlines()) <= 1
    assert process.returncode == 2


# ---- The file itself ----


def bounds(requirements):
    """{package: {operator: version}}."""
    found = map(Requirement, requirements)
    return {one.name: {part.operator: part.version for part in one.specifier} for one in found}


def test_the_script_header_wants_the_packages_of_requirements_txt_within_its_bounds():
    header = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", SOURCE.read_text())[1]
    header = tomllib.loads("".join(line[2:] + "\n" for line in header.splitlines()))
    mine = bounds(header["dependencies"])
    lines = (REPO / "requirements.txt").read_text().splitlines()
    listed = bounds(filter(None, (line.split("#")[0].strip() for line in lines)))
    assert mine.keys() == listed.keys()
    for name, wanted in listed.items():
        assert ">=" in mine[name] and mine[name].items() <= wanted.items(), name
    assert header["requires-python"] == ">=3.11"


def test_the_downloader_fetches_as_many_shards_as_the_speedrun_reads():
    assert train.SPEEDRUN_SHARDS == cached_fineweb10B.SPEEDRUN_SHARDS


def imports(path):
    """The packages that a file names."""
    found = set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_train_py_imports_jax_and_three_more_packages_no_pickle_and_the_downloader_no_jax():
    mine = imports(SOURCE)
    assert mine - sys.stdlib_module_names == {"jax", "numpy", "safetensors", "einops"}
    assert "pickle" not in mine
    assert imports(cached_fineweb10B.__file__) - sys.stdlib_module_names == {"huggingface_hub"}
