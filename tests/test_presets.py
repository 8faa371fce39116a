"""scripts/presets: each takes a step on a CPU at reduced width, and (system: minutes each) compiles for its chips and fits."""
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from scripts import prepare
from shards import make_folder
from train import ROOT, count_params, param_specs, parse_flags

WIDTH = ["--model_dim=48", "--mlp_dim=64", "--head_dim=8", "--attention=xla"]
NARROW = {  # by preset: what makes it small, its layers' features kept
    "gqa": ["--num_layers=2", "--long_layers=1", "--stages.short=16", "--val.short=16", "--stages.seq_len=64", "--stages.batch_tokens=512"],
    "d24": ["--num_layers=2", "--stages.seq_len=64", "--stages.batch_tokens=512"],
    "shakespeare_char": ["--num_layers=2", "--skips=((0,1),)", "--backout=0", "--offset_layers=0,1"]}


def flags_of(name): return [f"@{ROOT}/scripts/presets/{name}.args"]


@pytest.mark.parametrize("name", sorted(NARROW))
def test_a_preset_takes_a_step_at_reduced_width(name, tmp_path):
    small = [*WIDTH, *NARROW[name], "--steps=1", "--val.seq_len=64", "--val_tokens=640", "--head_block=65536", f"--log_dir={tmp_path}/logs"]
    if name in ("gqa", "d24"):
        data = [*make_folder(tmp_path / "data"), "--vocab_size=300", "--bos_id=256"]
    else:
        (tmp_path / "play.txt").write_text("to be, or not to be: that is the question\n" * 200)
        assert prepare.main([f"{tmp_path}/play.txt", f"--out={tmp_path}/data", "--tokenizer=chars", "--val_tail=0.1"]) == 0
        data = [f"--{split}_files={tmp_path}/data/{split}_*.bin" for split in ("train", "val")]
    subprocess.run([sys.executable, ROOT / "train.py", *flags_of(name), *small, *data], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"})  # compiles sooner
    run = next(tmp_path.glob("logs/*"))
    saved = json.loads((run / "config.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and 0 < last["val_loss"] < 1.01 * math.log(saved["config"]["vocab_size"])
    if name == "gqa":
        cfg = parse_flags(flags_of(name))
        assert cfg.num_heads == 2 * cfg.kv_heads == 2 * saved["config"]["num_kv_heads"]


@pytest.mark.parametrize("name, least, most", [("gqa", 170e6, 190e6), ("d24", 1.3e9, 1.45e9), ("shakespeare_char", 0.78e6, 0.83e6),
                                               ("shakespeare_free", 0.78e6, 1e6)])
def test_a_preset_has_the_size_it_tells(name, least, most):
    cfg = parse_flags([*flags_of(name), *(["--vocab_size=66"] if "shakespeare" in name else [])])
    assert least <= count_params(param_specs(cfg)) <= most


def test_the_shakespeare_presets_score_the_whole_last_tenth_without_context():
    for name, window in (("shakespeare_char", 64), ("shakespeare_free", 256)):
        cfg = parse_flags(flags_of(name))
        assert (cfg.val_tokens, cfg.val.seq_len, cfg.val_context) == (1_115_394 - int(1_115_394 * 0.9), window, 0)
    cfg = parse_flags(flags_of("shakespeare_char"))
    assert cfg.steps * cfg.stages[0].batch_tokens == 1_536_000 and (cfg.num_layers, cfg.model_dim, cfg.num_heads) == (4, 128, 4)


@pytest.mark.system
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='no TPU compiler: pip install "jax[tpu]"')
@pytest.mark.parametrize("name, topology", [("gqa", "v6e:2x4"), ("d24", "v6e:2x4"), ("shakespeare_char", "v6e:1x1"), ("shakespeare_free", "v6e:1x1")])
def test_a_preset_compiles_and_fits(name, topology):
    done = subprocess.run([sys.executable, "-m", "scripts.dry_run", topology, *flags_of(name), "--stage=0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "of 31.25 GiB HBM per chip" in done.stdout, done.stderr
