"""Flags, presets, what a config must satisfy, exit codes, and what importing train.py does not do."""
import ast
import dataclasses
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
import types
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

import train
from shards import make_folder

SOURCE = Path(train.__file__)
REPO = Path(__file__).resolve().parent.parent
FIELDS = dataclasses.fields(train.Config)


def usage_error(*flags):
    """The message of the UsageError that these flags, on top of the tiny preset, are refused with."""
    with pytest.raises(train.UsageError) as caught:
        train.configure(["--preset=tiny", *flags])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Flags ----

def written_comments():
    """{field: (group, comment)} of Config as tokenize sees them."""
    body = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Config")
    fields = {node.lineno: node.target.id for node in body.body if isinstance(node, ast.AnnAssign)}
    group, found = None, {}
    for token in tokenize.generate_tokens(io.StringIO(SOURCE.read_text()).readline):
        if token.type == tokenize.COMMENT and body.lineno < token.start[0] <= body.end_lineno:
            if token.start[0] in fields:
                found[fields[token.start[0]]] = group, token.string.lstrip("# ")
            elif token.string.startswith("# -- "):
                group = token.string[5:]
    return found


def test_every_field_is_a_flag_in_help_with_its_group_its_comment_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        train.parse_flags(["--help"])
    assert not caught.value.code
    groups, group = {}, None
    for line in capsys.readouterr().out.splitlines():
        if re.fullmatch(r"\S.*:", line):
            group = line[:-1]
        groups[group] = groups.get(group, "") + " " + " ".join(line.split())
    comments = written_comments()
    assert list(comments) == [field.name for field in FIELDS]
    for field in FIELDS:
        group, comment = comments[field.name]
        assert f" --{field.name} {field.type.__name__.upper()} {comment} (default: {field.default!r})" in groups[group], field.name


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_flag_may_be_given_with_an_equals_sign_or_a_space_and_has_its_fields_type(field):
    value = field.default if field.default != "" else "x"
    assert train.parse_flags([f"--{field.name}={value}"]) == {field.name: value}
    assert train.parse_flags([f"--{field.name}", str(value)]) == {field.name: value}
    assert type(train.parse_flags([f"--{field.name}={value}"])[field.name]) is field.type


@pytest.mark.parametrize("typo,nearest", [
    (["--stps=5"], "--steps"), (["--step=5"], "--steps"), (["--num-layers=5"], "--num_layers"), (["--headdim", "3"], "--head_dim"),
    (["--muonlr=0.1"], "--muon_lr"), (["--seq_length=64"], "--seq_len"), (["-steps=4"], "--steps"), (["steps=4"], "--steps"),
    (["--valtokens"], "--val_tokens"), (["--steps=5", "--seeds=1"], "--seed"), (["--zzz"], "--"), ([""], "--")])
def test_a_typo_is_answered_with_the_nearest_flag(typo, nearest):
    with pytest.raises(train.UsageError) as caught:
        train.parse_flags(typo)
    assert (next(word for word in typo if not word.startswith("--steps")) in str(caught.value))
    assert re.search(rf"nearest is {nearest}(\s|$)" if nearest != "--" else r"nearest is --\w", str(caught.value)), caught.value


@pytest.mark.parametrize("flag,value", [("steps", "ten"), ("steps", "1e3"), ("steps", "1.5"), ("steps", ""), ("seed", "0x10"),
                                        ("muon_lr", "fast"), ("rope_base", "1,5")])
def test_a_value_that_is_no_number_is_named_with_its_flag(flag, value):
    message = usage_error(f"--{flag}={value}")
    assert f"--{flag}" in message and repr(value) in message


def test_a_flag_without_a_value_is_an_error():
    assert "--steps" in usage_error("--steps")


def test_the_last_of_repeated_flags_counts():
    assert train.parse_flags(["--steps=3", "--seed=1", "--steps=4"]) == {"steps": 4, "seed": 1}


def test_a_file_of_flags_has_comments_and_several_flags_on_a_line(tmp_path):
    path = tmp_path / "my.args"
    path.write_text("# what I'd like\n--steps=7 --seed 3   # both\n\n--train_files='a b/*.bin'\n   --skips='0>1'\n--optimizer=adamw#1\n")
    wanted = {"steps": 7, "seed": 3, "train_files": "a b/*.bin", "skips": "0>1", "optimizer": "adamw"}
    assert train.parse_flags([f"@{path}"]) == wanted
    assert train.parse_flags([f"@{path}", "--steps=9"]) == wanted | {"steps": 9}
    assert train.parse_flags(["--steps=9", f"@{path}"]) == wanted


def test_a_missing_file_of_flags_is_named(tmp_path):
    assert f"{tmp_path}/none.args" in usage_error(f"@{tmp_path}/none.args")


def test_a_typo_in_a_file_of_flags_is_named(tmp_path):
    (tmp_path / "my.args").write_text("--steps=7\n--ssed=2\n")
    message = usage_error(f"@{tmp_path}/my.args")
    assert "--ssed=2" in message and "--seed" in message


def test_an_open_quote_in_a_file_of_flags_is_a_usage_error(tmp_path):
    (tmp_path / "my.args").write_text("--skips='0>1\n")
    assert "quot" in usage_error(f"@{tmp_path}/my.args")


# ---- Presets ----

@pytest.fixture
def accelerator(monkeypatch, tmp_path):
    """JAX sees four chips of a TPU, and no shards lie about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(device_kind="TPU v5 lite")] * 4)
    monkeypatch.setattr(jax, "device_count", lambda *_: 4)
    return tmp_path


def test_a_cpu_trains_the_demo_whatever_shards_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "data")
    for flags in ([], [f"--train_files={tmp_path}/data/train_*.bin"], [f"--train_files={tmp_path}/none_*.bin"]):
        cfg, why = train.configure(flags)
        assert cfg.preset == "demo" and cfg.num_layers == train.PRESETS["demo"]["num_layers"]
        assert "CPU" in why and "python cached_fineweb10B.py" in why


def test_an_accelerator_with_shards_trains_the_speedrun(accelerator):
    make_folder(accelerator / "data")
    cfg, why = train.configure([f"--train_files={accelerator}/data/train_*.bin"])
    assert cfg == train.Config(preset="speedrun", attention="band", train_files=f"{accelerator}/data/train_*.bin")
    assert "4 x TPU v5 lite" in why


def test_the_default_shards_are_looked_for_here_and_beside_train_py(accelerator, tmp_path, monkeypatch):
    for folder in ("here", "there"):
        (accelerator / folder / "fineweb10B").mkdir(parents=True)
    (accelerator / "here/fineweb10B/fineweb_train_000001.bin").touch()
    monkeypatch.chdir(accelerator / "here")
    assert train.configure([])[0].preset == "speedrun"
    monkeypatch.chdir(accelerator / "there")
    with pytest.raises(train.DataError):
        train.configure([])
    monkeypatch.setattr(train, "ROOT", accelerator / "here")
    assert train.configure([])[0].preset == "speedrun"


def test_an_accelerator_without_shards_says_how_to_get_them_and_what_needs_none(accelerator):
    with pytest.raises(train.DataError) as caught:
        train.configure([])
    assert f"python cached_fineweb10B.py {train.SPEEDRUN_SHARDS}" in str(caught.value) and "--preset=demo" in str(caught.value)
    assert "TPU v5 lite" in str(caught.value) and "fineweb10B/fineweb_train_*.bin" in str(caught.value)
    assert train.configure(["--preset=demo"])[0].preset == "demo"


def test_an_unknown_preset_is_answered_with_those_there_are():
    message = usage_error("--preset=dmeo")
    assert "--preset=dmeo" in message and all(preset in message for preset in [*train.PRESETS, "auto"])


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_is_a_config_that_can_run_and_flags_override_it(preset):
    cfg, _ = train.configure([f"--preset={preset}"])
    assert dataclasses.asdict(cfg) == dataclasses.asdict(train.Config()) | train.PRESETS[preset] | {"preset": preset, "attention": "xla"}
    assert train.configure([f"--preset={preset}", "--steps=77", "--seed=5"])[0] == dataclasses.replace(cfg, steps=77, seed=5)


FITS = dict(head_dim=128, seq_len="256,256,512,512", val_seq_len=768, compute_dtype="bfloat16")

@pytest.mark.parametrize("changes, platform, chosen", [
    ({}, "tpu", "band"), ({"head_dim": 256}, "tpu", "band"), ({"head_dim": 64}, "tpu", "xla"), ({"head_dim": 192}, "tpu", "xla"),
    ({"seq_len": "385"}, "tpu", "xla"), ({"seq_len": "512,512,512,1152"}, "tpu", "xla"), ({"val_seq_len": 800}, "tpu", "xla"),
    ({"compute_dtype": "float32"}, "tpu", "xla"), ({}, "cpu", "xla"), ({}, "gpu", "xla"),
    ({"attention": "xla"}, "tpu", "xla"), ({"attention": "band"}, "tpu", "band")])
def test_attention_is_chosen_by_platform_and_shapes_unless_it_is_asked_for(changes, platform, chosen, capsys):
    cfg = train.Config(**FITS | changes)
    assert train.choose_attention(cfg, platform) == dataclasses.replace(cfg, attention=chosen)
    told = platform == "tpu" and chosen == "xla" and cfg.attention == "auto"
    assert ("--head_dim in 128s" in capsys.readouterr().out) == told


@pytest.mark.parametrize("changes, platform", [({}, "cpu"), ({}, "gpu"), ({"head_dim": 64}, "tpu"), ({"compute_dtype": "float32"}, "tpu")])
def test_the_kernels_are_refused_where_they_cannot_run(changes, platform):
    with pytest.raises(train.UsageError, match="--attention=band: wanted a TPU, --head_dim in 128s"):
        train.choose_attention(train.Config(**FITS | changes | {"attention": "band"}), platform)


@pytest.mark.parametrize("preset, chosen", [("speedrun", "band"), ("demo", "xla"), ("tiny", "xla")])
def test_on_a_tpu_the_speedrun_has_the_kernels_and_the_small_presets_have_not(preset, chosen, accelerator):
    assert train.configure([f"--preset={preset}"])[0].attention == chosen
    assert train.configure([f"--preset={preset}", "--attention=xla"])[0].attention == "xla"


# ---- What a config must satisfy ----

RULES = [  # flags on top of tiny, the first of which is at fault; a word of what is wanted
    ("--steps=0", "at least 1"), ("--steps=-5", "at least 1"), ("--num_layers=0 --skips=", "at least 1"), ("--num_layers=300000000", "at most 999999"), ("--model_dim=0", "at least 1"),
    ("--num_heads=0", "at least 1"), ("--mlp_dim=0", "at least 1"), ("--val_tokens=0", "at least 1"), ("--log_every=0", "at least 1"),
    ("--max_epochs=0", "at least 1"), ("--max_epochs=1000000", "at most 999999"), ("--vocab_size=65537", "at most 65536"), ("--head_dim=6", "multiple of 4"), ("--head_dim=0", "multiple of 4"),
    ("--num_kv_heads=4 --num_heads=6", "--num_heads=6"),
    ("--skips=2>1", "A < B"), ("--skips=1>1", "A < B"), ("--skips=0>3", "< 3"), ("--skips=1", "A>B"), ("--skips=0>1>2", "A>B"), ("--skips=-1>2", "A>B"),
    ("--attention=flash9", "xla"), ("--optimizer=sgd", "muon or adamw"),
    ("--stage_ends=0.5,0.9", "the last 1"), ("--stage_ends=1,0.5", "rising"), ("--stage_ends=0,1", "rising"),
    ("--val_context=64", "--val_seq_len=64"), ("--val_context=-1", "--val_seq_len"),
    ("--profile=5", "START:STOP"), ("--profile=7:7", "START:STOP"), ("--profile=1:2:3", "START:STOP"), ("--profile=-1:3", "START:STOP"),
    ("--mlp_only=7", "blocks from 0 to 2"), ("--mlp_only=1,1", "distinct"), ("--mlp_only=0,1,2", "a block with attention"),
    ("--offset_layers=3", "blocks from 0 to 2"), ("--long_layers=-1", "blocks"), ("--fsdp=2", "0 or 1"), ("--smear=-1", "0 or 1"),
    ("--late_inputs=2>1", "A < B"), ("--late_inputs=0>3", "< 3"), ("--late_inputs=1", "A>B"), ("--late_inputs=0>2,1>2", "once"),
    ("--late_inputs=0>1 --mlp_only=1", "with attention"), ("--backout=3", "blocks from 0 to 2"),
    ("--gate_dims=33", "at most --model_dim=32"), ("--gate_dims=-1", "at least 0"),
    ("--attn_scale=3.6", "at most 3.546"), ("--attn_scale=-0.1", "at least 0, at most 3.546"),
    ("--attention=flash", "xla or band"), ("--attention=band", "a TPU"),
    ("--max_doc_len=0,32", "all"), ("--seq_len=48,64", "divisors of the longest"), ("--seq_len=1 --batch_tokens=64", "wanted"),
    ("--batch_tokens=500,1024", "--seq_len=32,64"), ("--batch_tokens=0", "multiples"),
    ("--softcap=10,0,0", "A and B above 0"), ("--softcap=1,2", "A,B,C"), ("--softcap=nan", "at most"), ("--mtp=-1", "at least 0"), ("--mtp=nan", "at least 0"),
    ("--seed=9223372036854775808", "at most 2147483647"), ("--window_long=99999999999999999999", "at most 2147483647"), ("--stage_lr=1,nan", "at least 0"),
    ("--adam_beta1=1.0", "at most 0.99"), ("--adam_beta2=1.5", "at most 0.99"), ("--muon_beta2=-1.0", "at least 0"), ("--final_frac=2.0", "at most 1"),
    ("--cooldown_frac=-1.0", "at least 0"), ("--muon_lr=-0.1", "at least 0"), ("--rope_base=0.5", "at least 1"), ("--ns_steps=6", "at most 5"),
    ("--muon_momentum=0.85", "FROM,TO,STEPS,STEPS"), ("--muon_momentum=0.85,1,9,9", "the first two below 1"), ("--mtp=a", "numbers"), ("--mtp=" + ",".join(["0.1"] * 32), "fewer weights than a row has tokens"),
    ("--seq_len=²", "numbers with commas between"), ("--steps=1000000", "at most 999999"),
    ("--window_short=1.5", "ints"), ("--val_seq_len=0", "at least 1"),
    ("--window_short=1,2,3", "the 2 stages"), ("--batch_tokens=64,64 --stage_ends=0.2,0.3,1 --window_short=16 --window_long=0", "--stage_ends=0.2,0.3,1"),
]


@pytest.mark.parametrize("flags,word", RULES, ids=[flags for flags, _ in RULES])
def test_a_config_that_cannot_run_is_refused_with_the_flag_its_value_and_what_was_wanted(flags, word):
    came, _, wanted = usage_error(*flags.split()).partition(": wanted ")
    assert came == flags.split()[0] and word in f": wanted {wanted}"


@pytest.mark.parametrize("flag", ["--stage_ends=half,1", "--batch_tokens=", "--seq_len=32,x", "--skips=a>b", "--long_layers=x",
                                  "--compute_dtype=float12", "--residual_dtype=big", "--muon_momentum=0.9", "--profile=a:b",
                                  "--stage_lr=fast", "--window_long=1;2", "--softcap=high", "--softcap=1,2,3,4", "--mtp=some",
                                  "--late_inputs=a>b", "--backout=x"])
def test_a_list_or_name_that_cannot_be_read_is_a_usage_error(flag):
    usage_error(flag)


@pytest.mark.parametrize("flag", ["seed", "num_kv_heads", "max_doc_len", "window_short", "window_long", "val_window_short",
                                  "val_window_long", "attn_block", "tied_stages", "val_every"])
def test_a_number_that_cannot_be_negative_is_refused(flag):
    assert f"--{flag}=-2" in usage_error(f"--{flag}=-2")


def test_a_precision_that_is_no_float_is_refused():
    assert "int8" in usage_error("--compute_dtype=int8")


def test_a_multiple_stage_list_may_be_one_value_or_one_for_each_stage():
    cfg = train.configure(["--preset=tiny", "--stage_ends=0.2,0.5,1", "--batch_tokens=64,128,256", "--seq_len=32",
                           "--window_short=4,5,6", "--window_long=0", "--stage_lr=1"])[0]
    table = train.stages(cfg)
    assert [(s.index, s.first, s.last) for s in table] == [(0, 0, 6), (1, 6, 15), (2, 15, 30)]
    assert [(s.batch_tokens, s.seq_len, s.windows[0]) for s in table] == [(64, 32, 4), (128, 32, 5), (256, 32, 6)]
    assert train.tokens_before(20, table) == 6 * 64 + 9 * 128 + 5 * 256


# ---- python train.py ----

def python(*arguments, cwd, **env):
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, text=True, capture_output=True, timeout=120)


def refused(code, *flags, cwd, **env):
    """The one sentence on stderr of `python train.py FLAGS`, which ends with this exit code."""
    done = python(SOURCE, *flags, cwd=cwd, **env)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def test_a_typo_ends_with_exit_code_2_and_leaves_nothing(tmp_path):
    assert "--steps" in refused(2, "--preset=tiny", "--stpes=5", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_end_with_exit_code_3_and_leave_nothing(tmp_path):
    assert "nowhere/*.bin" in refused(3, "--preset=tiny", "--train_files=nowhere/*.bin", "--val_files=nowhere/*.bin", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_resume_path_ends_with_exit_code_4_and_leaves_nothing(tmp_path):
    flags = ["--preset=tiny", "--steps=2", *make_folder(tmp_path / "data"), "--resume=logs/none"]
    assert "logs/none" in refused(4, *flags, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_loss_that_is_not_finite_ends_with_exit_code_5_and_says_why_it_may_be(tmp_path):
    flags = ["--preset=tiny", "--steps=6", "--num_layers=1", "--skips=", "--late_inputs=", "--backout=", "--offset_layers=",
             "--long_layers=", "--model_dim=8", "--mlp_dim=8", "--head_dim=4", "--window_short=16", "--batch_tokens=64", "--seq_len=32", "--optimizer=adamw", "--adamw_lr=1", "--adam_wd=1e30",
             "--val_tokens=64",
             *make_folder(tmp_path / "data", val=range(66))]
    message = refused(5, *flags, cwd=tmp_path, JAX_NUM_CPU_DEVICES="1", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert re.search(r"step \d+ is (nan|inf|-inf)", message) and "_lr" in message
    run, = (tmp_path / "logs").iterdir()
    assert str(run.name) in message and (run / "log.txt").exists()


@pytest.mark.parametrize("error,code", [("UsageError", 2), ("DataError", 3), ("CheckpointError", 4), ("NonFiniteLoss", 5)])
def test_what_a_user_can_mend_is_one_sentence_and_an_exit_code(error, code, monkeypatch, capsys):
    def fails():
        raise getattr(train, error)("what came, what was wanted")
    monkeypatch.setattr(train, "main", fails)
    assert train.command() == code
    assert capsys.readouterr().err == "error: what came, what was wanted\n"


def test_what_only_a_bug_can_break_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train, "main", lambda: {}["bug"])
    with pytest.raises(KeyError):
        train.command()


def test_importing_train_starts_no_backend_and_no_thread_and_writes_nothing(tmp_path):
    program = """
import os, sys, threading
import jax, numpy, einops, safetensors.numpy                       # what these do is theirs
environment, threads, opened = dict(os.environ), threading.active_count(), []
config = dict(jax.config.values)
sys.addaudithook(lambda event, a: opened.append(a[0]) if event == "open" and not str(a[0]).endswith((".py", ".pyc")) else None)
import train
assert not [path for path in opened if not str(path).startswith(sys.prefix)], opened
assert threading.active_count() == threads and dict(os.environ) == environment and dict(jax.config.values) == config
jax.config.update("jax_num_cpu_devices", 3)                        # an error once there is a backend
assert jax.device_count() == 3
"""
    home = tmp_path / "home"
    home.mkdir()
    done = python("-c", program, cwd=home, HOME=home, XDG_CACHE_HOME=home / "cache", PYTHONPATH=SOURCE.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []


# ---- The file itself ----

def bounds(requirement):
    return {spec.operator: spec.version for spec in requirement.specifier}


def test_the_script_header_wants_the_packages_of_requirements_txt_within_its_bounds():
    header = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", SOURCE.read_text())[1]
    header = tomllib.loads("".join(line[2:] + "\n" for line in header.splitlines()))
    mine = {r.name: bounds(r) for r in map(Requirement, header["dependencies"])}
    lines = [line.split("#")[0].strip() for line in (REPO / "requirements.txt").read_text().splitlines()]
    listed = {r.name: bounds(r) for r in map(Requirement, filter(None, lines))}
    assert mine.keys() == listed.keys()
    for name, wanted in listed.items():
        assert mine[name] == {operator: wanted[operator] for operator in mine[name]} and ">=" in mine[name], name
    assert header["requires-python"] == ">=3.11"


def test_the_downloader_fetches_as_many_shards_as_the_speedrun_reads():
    import cached_fineweb10B
    assert train.SPEEDRUN_SHARDS == cached_fineweb10B.SPEEDRUN_SHARDS


def test_train_py_stays_one_reading():
    """The end is 1,200 lines with everything the project asks; what comes in from here on must push something out."""
    assert len(SOURCE.read_text().splitlines()) <= 1746


def test_no_function_is_longer_than_80_lines():
    functions = [node for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 50
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 80] == []


def test_train_py_imports_no_other_deep_learning_library_no_pickle_and_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = {path.stem for path in [*REPO.glob("*.py"), *REPO.glob("scripts/*.py"), *REPO.glob("tests/*.py")]}
    assert imported.isdisjoint({"flax", "optax", "orbax", "torch", "tensorflow", "pickle", "haiku", "equinox", *ours})
    assert imported <= {*sys.stdlib_module_names, "jax", "numpy", "safetensors", "einops"}
