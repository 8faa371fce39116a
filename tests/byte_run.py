"""A run's folder as train.py leaves it: a byte-level model of random weights, nothing trained."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import safetensors.numpy
from shards import make_folder

import train

STEP = 7
FLAGS = """--preset=demo --num_layers=1 --model_dim=32 --num_heads=2 --head_dim=16 --mlp_dim=64
 --skips= --backout= --offset_layers=0 --compute_dtype=float32 --residual_dtype=none
 --stages.end=1 --stages.batch_tokens=512 --stages.seq_len=32 --stages.short=16
 --micro_tokens=65536 --val.seq_len=64 --val.short=24 --val_tokens=1000 --val_context=32
 --vocab_size=257 --bos_id=256""".split()


def make_run(folder):
    """Its shards lie in folder/data. Returns the folder."""
    cfg = train.parse_flags([*FLAGS, *make_folder(folder / "data", "bytes")])
    shapes = jax.tree.map(lambda spec: spec.shape, train.param_specs(cfg))
    params = jax.tree.map(jnp.asarray, numpy_gpt.random_weights(cfg, shapes))
    about = {"data": "", "meta": train.BYTES_META}
    train.save_checkpoint(folder, train.State(jnp.int32(STEP), params, {}), {}, about, cfg)
    return folder


def changed(run, folder, change=lambda tensors: None, **about):
    """A copy of the run whose weights went through change(tensors), its manifest with `about`."""
    shutil.copytree(run, folder)
    (checkpoint,) = folder.glob("ckpt/step-*")
    file = checkpoint / "params.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["params.safetensors"] = train.file_sha256(file)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | about))
    return folder


def flatten(tensors, value=0.0):
    """All tokens are likely alike; of a value that is not finite, no number is."""
    tensors["head"] = np.full_like(tensors["head"], value)


spoil = functools.partial(flatten, value=np.nan)
