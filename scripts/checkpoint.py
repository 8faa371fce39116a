"""A trained model for the companions: a run's folder or one of its checkpoints, verified, as weights to compute with.

Files are read as train.py reads them: hashes of the manifest first, safetensors only, names and shapes held against the weight
table of the config. The optimizer's state is not read.
"""
import dataclasses, json
from pathlib import Path
from typing import NamedTuple

import jax

from train import (CheckpointError, Config, Model, UsageError, choose_attention, errors_as, gather, init_params, load_tensors, make_mesh,
                   param_specs, read_manifest, set_up_jax, state_shardings, unstack, validate)

class Trained(NamedTuple):
    """cfg: the run's, its attention chosen for this machine. meta: tokenizer, vocab_size, bos_id of its shards. params: float32 by
    the weight table, on one device."""
    folder: Path  # .../RUN/ckpt/step-NNNNNN
    step: int
    cfg: Config
    meta: dict
    params: dict

    def weights(self):
        """Compute copies, layers unstacked, as forward takes them."""
        return unstack(gather(self.params, param_specs(self.cfg), 1, self.cfg))

def checkpoint_folder(path):
    """The folder of a checkpoint: path itself, or the newest of the run's folder at path. Raises UsageError."""
    path = Path(path).resolve()
    folders = [path] if (path / "manifest.json").is_file() else sorted(path.glob("ckpt/step-*"))
    if not folders:
        raise UsageError(f"--checkpoint={path}: no checkpoint there; wanted a run's folder, as logs/20260101T000000Z-abcdef, "
                         "or its ckpt/step-NNNNNN")
    return folders[-1]

def open_checkpoint(path, device=None):
    """The Trained at a run's folder or a checkpoint's. device: where the weights go, by default the first. Raises UsageError where
    there is none, CheckpointError where it is damaged or its weights are not those of train.py's own model."""
    folder = checkpoint_folder(path)
    with errors_as(CheckpointError, f"{folder}: its config cannot be read; was it saved by another version of train.py?"):
        saved = json.loads((folder / "manifest.json").read_text())["config"]
        cfg = choose_attention(Config(**saved | {"attention": "auto"}), jax.default_backend())
        validate(cfg)
    step = read_manifest(folder, dataclasses.replace(cfg, attention=saved["attention"]))["step"]
    with errors_as(CheckpointError, f"{folder.parent.parent / 'config.json'}: wanted config and meta of the run"):
        meta = json.loads((folder.parent.parent / "config.json").read_text())["meta"]
        meta = {"tokenizer": str(meta["tokenizer"]), "vocab_size": int(meta["vocab_size"]), "bos_id": int(meta["bos_id"])}
    set_up_jax(cfg)
    mesh = make_mesh([device or jax.devices()[0]])
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), param_specs(cfg), cfg))
    wanted = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                          shapes, state_shardings(Model(), mesh, cfg).params)
    return Trained(folder, step, cfg, meta, load_tensors(folder / "params.safetensors", wanted))
