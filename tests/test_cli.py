"""Flags, presets, what a Config must satisfy, and what importing train.py does not do."""

import ast
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

import train
from train import DEMO, SPEEDRUN, Config, Stage, UsageError, parse_flags, replace

SOURCE = Path(train.__file__)
REPO = Path(__file__).resolve().parent.parent
TINY = f"@{REPO}/scripts/presets/tiny.args"


def refusal(*flags):
    """What the flags, on top of tiny, are refused with: one line."""
    with pytest.raises(UsageError) as caught:
        parse_flags([TINY, *flags])
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


@pytest.mark.parametrize("word", ["--resume", "steps=3", "-step=4", ""])
def test_a_flag_without_its_value_or_its_dashes_is_refused_with_its_form(word):
    assert "wanted --" in refusal(word)


@pytest.mark.parametrize("typo,nearest", [
    ("--stps=5", "--steps"), ("--num-layers=5", "--num_layers"), ("--muonlr=0.1", "--muon_lr"),
    ("--stages.seqlen=64", "--stages.seq_len"), ("--val.shrot=64", "--val.short"),
    ("--seeds=1", "--seed"), ("--x=1", "--"),
])  # fmt: skip
def test_a_typo_names_the_nearest_flag(typo, nearest):
    assert re.search(rf"nearest is {nearest}" + r"\b" * (typo != "--x=1"), refusal(typo))


@pytest.mark.parametrize("flag", train.RETIRED)
def test_a_flag_of_an_earlier_version_says_what_became_of_it(flag):
    message = refusal(f"--{flag}=1")
    assert f"--{flag}" in message and train.RETIRED[flag] in message and "nearest" not in message
    names = set(train.flag_names(Config)) - {flag}
    assert set(re.findall(r"--([\w.]+)", train.RETIRED[flag])) <= names
    places = set(re.findall(r"\bin (\w+)|rows of (\w+)", train.RETIRED[flag]))
    assert all(hasattr(train, "".join(place)) for place in places)


@pytest.mark.parametrize("flag", [
    "--steps=ten", "--steps=1e3", "--steps=1.5", "--steps=", "--steps", "--seed=none",
    "--muon_lr=fast", "--muon_lr=1,5", "--smear=x", "--stages=1", "--skips=a>b", "--softcap=high",
    "--stages.lr=fast,1", "--stages.tied=yes", "--stages.end=half,1", "--val.short=x", "--val=1",
    "--stages.seq_len=32,64,64", "--skips=" + "(" * 999, "--steps=" + "9" * 5000,
])  # fmt: skip
def test_a_value_of_another_type_is_refused_with_its_flag(flag):
    assert flag.split("=")[0] in refusal(flag)


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


@pytest.mark.parametrize("order", [1, -1])
def test_stages_end_sets_the_number_of_rows_whatever_the_order_of_the_flags(order):
    flags = ["--steps=40", "--stages.lr=1,2,3,4", "--stages.end=0.2,0.5,0.9,1"][::order]
    cfg = parse_flags(flags, "demo")
    assert [(stage.end, stage.lr) for stage in cfg.stages] == [(0.2, 1), (0.5, 2), (0.9, 3), (1, 4)]
    assert cfg.stages[3] == replace(DEMO.stages[2], end=1.0, lr=4.0)  # the last one repeated
    assert cfg.bounds == [0, 8, 20, 36, 40]
    assert [span[1:] for span in cfg.spans] == [(0, 8), (8, 20), (20, 36), (36, 40)]
    assert train.tokens_before(25, cfg) == 8 * 1024 + 12 * 2048 + 5 * 3072
    assert parse_flags(["--stages.end=1"], "demo").stages == (replace(DEMO.stages[0], end=1.0),)


def test_a_file_holds_flags_with_comments_and_several_on_a_line(tmp_path):
    path = tmp_path / "my.args"
    lines = [
        "# what I'd like",
        "--steps=7 --seed=3  # both",
        "--train_files='a b/*.bin'",
        "  --mlp_only=",
    ]
    path.write_text("\n".join(lines))
    wanted = replace(DEMO, steps=7, seed=3, train_files="a b/*.bin")
    assert parse_flags([f"@{path}"], "demo") == wanted
    assert parse_flags(["--seed=5", f"@{path}", "--steps=9"], "demo") == replace(wanted, steps=9)
    path.write_text("--steps=7\n--ssed=2\n")
    assert "--seed" in refusal(f"@{path}")
    path.write_text("--resume='logs\n")
    assert "quot" in refusal(f"@{path}")


# ---- Presets ----


def test_a_preset_is_named_by_a_flag_or_a_file():
    assert parse_flags([]) == parse_flags(["--preset=speedrun"], "demo") == SPEEDRUN == Config()
    assert parse_flags(["--seed=5", "--preset=demo"]) == replace(DEMO, seed=5)
    tiny = parse_flags([TINY])
    assert (tiny.preset, tiny.model_dim, len(tiny.stages)) == ("demo", 32, 2)
    assert all(preset in refusal("--preset=dmeo") for preset in ("speedrun", "demo"))


def test_flags_are_held_to_the_rules_of_the_preset_that_runs():
    """The speedrun's skips would want more blocks than these, the demo's do not."""
    assert train.configure(["--num_layers=5"])[0].num_layers == 5


@pytest.fixture
def accelerator(monkeypatch, tmp_path):
    """JAX sees four chips of a TPU, and no shards lie about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda *_: [chip] * 4)
    monkeypatch.setattr(jax, "device_count", lambda *_: 4)
    return tmp_path


def test_a_cpu_trains_the_demo_and_says_how_to_get_the_real_thing():
    cfg, why = train.configure([])
    assert cfg == replace(DEMO, attention="xla")
    assert "CPU" in why and "python cached_fineweb10B.py" in why


def test_an_accelerator_with_shards_trains_the_speedrun(accelerator):
    (accelerator / "fineweb10B").mkdir()
    (accelerator / "fineweb10B/fineweb_train_000001.bin").touch()
    cfg, why = train.configure([])
    assert cfg == replace(SPEEDRUN, attention="band") and "4 x TPU v5 lite" in why


def test_an_accelerator_without_shards_ends_with_one_sentence_and_both_ways_out(
    accelerator, capsys
):
    assert train.command(lambda: train.main([])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"python cached_fineweb10B.py {train.SPEEDRUN_SHARDS}" in line and "--preset=demo" in line
    )
    assert train.configure(["--preset=demo"])[0] == replace(DEMO, attention="xla")


FITS = replace(
    SPEEDRUN,
    head_dim=128,
    stages=(Stage(0.5, 2048, seq_len=256), Stage(1.0, 2048, seq_len=512)),
    val=Stage(seq_len=768),
)


@pytest.mark.parametrize("changes,platform,chosen", [
    ({}, "tpu", "band"), ({"attention": "xla"}, "tpu", "xla"),
    ({"attention": "band"}, "tpu", "band"),
    ({}, "cpu", "xla"), ({}, "gpu", "xla"), ({"head_dim": 192}, "tpu", "xla"),
    ({"compute_dtype": "float32"}, "tpu", "xla"), ({"val": Stage(seq_len=800)}, "tpu", "xla"),
    ({"stages": (Stage(1.0, 2048, seq_len=384),)}, "tpu", "xla"),
    ({"attention": "band"}, "gpu", None), ({"attention": "band", "head_dim": 64}, "tpu", None),
])  # fmt: skip
def test_attention_follows_platform_and_shapes_unless_it_is_asked_for(changes, platform, chosen):
    cfg = replace(FITS, **changes)
    if chosen:
        assert train.choose_attention(cfg, platform) == replace(cfg, attention=chosen)
    else:
        with pytest.raises(UsageError, match="--attention=band"):
            train.choose_attention(cfg, platform)


# ---- What a Config must satisfy ----


@pytest.mark.parametrize("flags", [
    "--num_layers=0 --skips=", "--model_dim=0", "--num_heads=0", "--val_tokens=0", "--max_epochs=0",
    "--cpu_devices=0", "--steps=-5", "--seed=-1", "--head_block=0", "--micro_tokens=0",
    "--gate_dims=-1", "--val_every=-2", "--muon_lr=-0.1", "--head_dim=6",
    "--skips=((2,1),)", "--skips=((0,3),)", "--skips=1",
    "--late_inputs=((1,1),)", "--mlp_only=7", "--backout=3", "--offset_layers=-1",
    "--long_layers=1.5", "--muon_lr=nan", "--mlp_only=[1]",
    "--late_inputs=((0,2),(1,2))",
    "--attention=flash", "--optimizer=sgd", "--compute_dtype=int8", "--residual_dtype=big",
    "--val_context=64",
    "--stages.end=0.5,0.9", "--stages.end=1,0.5", "--stages.end=0,1", "--stages.doc_len=0,32",
    "--stages.seq_len=48,64", "--stages.seq_len=0",
    "--stages.batch_tokens=500,1024", "--stages.batch_tokens=0",
])  # fmt: skip
def test_a_config_that_cannot_run_is_refused_with_the_flag(flags):
    flag = flags.split("=")[0]
    assert refusal(*flags.split()).startswith(f"{flag}=")


# ---- python train.py ----


def python(*arguments, cwd, **env):
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=120)


def test_a_typo_ends_with_2_and_one_sentence_and_leaves_nothing(tmp_path):
    done = python(SOURCE, "--stpes=5", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "--stpes" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["@none.args"], ["--train_files=none/*.bin", "--val_files=none/*.bin"]]
)
def test_files_that_are_not_there_end_with_2_and_leave_nothing(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train.command(lambda: train.main(["--preset=demo", *words])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "none" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error,code", [(UsageError, 2), (OSError, 2), (train.NonFiniteLoss, 5)])
def test_each_kind_of_error_has_its_exit_code_and_one_sentence(error, code, capsys):
    def fails():
        raise error("what came")

    assert train.command(fails) == code
    assert capsys.readouterr().err == "error: what came\n"


def test_what_only_a_bug_can_break_keeps_its_traceback():
    with pytest.raises(KeyError):
        train.command(lambda: {}["bug"])


def test_importing_train_starts_no_backend_and_no_thread_and_writes_nothing(tmp_path):
    program = """
import os, sys, threading
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
assert jax.device_count() == 3
"""
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": str(home), "XDG_CACHE_HOME": f"{home}/cache", "PYTHONPATH": str(REPO)}
    done = python("-c", program, cwd=home, **places)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []


# ---- The file itself ----


def bounds(requirement):
    return {spec.operator: spec.version for spec in requirement.specifier}


def test_the_script_header_wants_the_packages_of_requirements_txt_within_its_bounds():
    header = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", SOURCE.read_text())[1]
    header = tomllib.loads("".join(line[2:] + "\n" for line in header.splitlines()))
    mine = {r.name: bounds(r) for r in map(Requirement, header["dependencies"])}
    lines = (REPO / "requirements.txt").read_text().splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    listed = {r.name: bounds(r) for r in map(Requirement, filter(None, lines))}
    assert mine.keys() == listed.keys()
    for name, wanted in listed.items():
        assert ">=" in mine[name] and mine[name].items() <= wanted.items(), name
    assert header["requires-python"] == ">=3.11"


def test_the_downloader_fetches_as_many_shards_as_the_speedrun_reads():
    import cached_fineweb10B

    assert train.SPEEDRUN_SHARDS == cached_fineweb10B.SPEEDRUN_SHARDS


def test_train_py_imports_jax_and_three_more_packages_no_pickle_and_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= {*sys.stdlib_module_names, "jax", "numpy", "safetensors", "einops"}
    assert "pickle" not in imported
