"""scripts/presets: each has the size that it tells, and takes a step on a CPU at reduced width."""

import importlib.util
import json
import math
import re
import subprocess
import sys

import jax
import pytest
from shards import make_folder

import train
from scripts import prepare
from train import ROOT, count_params, param_specs, parse_flags

SMALL = """--steps=1 --model_dim=48 --mlp_dim=64 --head_dim=8 --num_layers=2 --attention=xla
 --stages.seq_len=64 --stages.batch_tokens=512 --val.seq_len=64 --val_tokens=640""".split()
NARROW = {  # by preset: what else makes it small, its layers' features kept
    "gqa": ["--long_layers=1", "--stages.short=16", "--val.short=16"],
    "d24": [],
    "shakespeare_char": ["--skips=((0,1),)", "--backout=0", "--offset_layers=0,1"],
}


def flags_of(name):
    return [f"@{ROOT}/scripts/presets/{name}.args"]


@pytest.mark.system
@pytest.mark.parametrize("name", sorted(NARROW))
def test_a_preset_takes_a_step_at_reduced_width(name, tmp_path):
    if name == "shakespeare_char":
        (tmp_path / "play.txt").write_text("to be, or not to be: that is the question\n" * 200)
        out = f"--out={tmp_path}/data"
        prepare.main([f"{tmp_path}/play.txt", out, "--tokenizer=chars", "--val_tail=0.1"])
        data = [f"--{split}_files={tmp_path}/data/{split}_*.bin" for split in ("train", "val")]
    else:
        data = [*make_folder(tmp_path / "data"), "--vocab_size=300", "--bos_id=256"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        flags = [*flags_of(name), *SMALL, *NARROW[name], *data, f"--log_dir={tmp_path}/logs"]
        run = train.main(flags)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    saved = json.loads((run / "config.json").read_text())["config"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and 0 < last["val_loss"] < 1.01 * math.log(saved["vocab_size"])
    if name == "gqa":
        assert saved["num_heads"] == 2 * saved["num_kv_heads"]


def test_a_preset_has_the_size_it_tells():
    for name, least, most in (
        ("gqa", 170e6, 190e6),
        ("d24", 1.3e9, 1.45e9),
        ("shakespeare_char", 0.78e6, 0.83e6),
        ("shakespeare_free", 0.78e6, 1e6),
    ):
        alphabet = ["--vocab_size=66"] if "shakespeare" in name else []
        cfg = parse_flags([*flags_of(name), *alphabet])
        assert least <= count_params(param_specs(cfg)) <= most


def test_the_shakespeare_presets_score_the_whole_last_tenth_without_context():
    for name, window in (("shakespeare_char", 64), ("shakespeare_free", 256)):
        cfg = parse_flags(flags_of(name))
        assert cfg.val_tokens == 1_115_394 - int(1_115_394 * 0.9)
        assert (cfg.val.seq_len, cfg.val_context) == (window, 0)
    cfg = parse_flags(flags_of("shakespeare_char"))
    assert cfg.steps * cfg.stages[0].batch_tokens == 1_536_000
    assert (cfg.num_layers, cfg.model_dim, cfg.num_heads) == (4, 128, 4)


HAS_LIBTPU = importlib.util.find_spec("libtpu")


@pytest.mark.system
@pytest.mark.skipif(not HAS_LIBTPU, reason='no TPU compiler: pip install "jax[tpu]"')
@pytest.mark.parametrize("name, long_layers", [("gqa", "1"), ("d24", "")])
def test_two_narrow_blocks_of_a_preset_compile_for_a_v6e(name, long_layers):
    """Whether the whole fits takes an hour to compile: records/v6e."""
    small = ["--num_layers=2", f"--long_layers={long_layers}", "--vocab_size=1024", "--bos_id=0"]
    small += ["--model_dim=256", "--mlp_dim=512", "--stages.batch_tokens=32768", "--stage=0"]
    command = [sys.executable, "-m", "scripts.dry_run", "v6e:2x4", *flags_of(name), *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "of 31.25 GiB HBM per chip" in done.stdout, done.stderr
    assert re.search("kernels .* by their bundles", done.stdout), done.stdout
