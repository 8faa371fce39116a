"""A trained model for the companions: a run's folder or a checkpoint, verified, as weights.

Files are read as train.py reads them: hashes of the manifest first, safetensors only, names and
shapes held against the weight table of the config. The optimizer's state is not read.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax

from scripts.text import open_tokenizer, usage_errors
from train import (
    CHECKPOINT_FORMAT,
    GPT,
    Config,
    Stage,
    choose_attention,
    f32,
    find_shards,
    gather,
    load_tensors,
    make_mesh,
    read_manifest,
    replace,
    require,
    set_up_jax,
    state_shardings,
    unstack,
)


class Trained(NamedTuple):
    """cfg: the run's, its attention chosen for this machine. meta: tokenizer, vocab_size, bos_id of
    its shards. params: float32 by the weight table, on one device."""

    folder: Path  # .../RUN/ckpt/step-NNNNNN
    step: int
    cfg: Config
    meta: dict
    params: dict

    def weights(self):
        """Compute copies, layers unstacked, as forward takes them."""
        return unstack(gather(self.params, GPT.specs(self.cfg), 1, self.cfg))

    def tokenizer(self, folder=""):
        """The Tokenizer in a folder, by default in that of the run's training shards.

        Raises UsageError.
        """
        found = find_shards(self.cfg.train_files) or [Path(self.cfg.train_files)]
        return open_tokenizer(self.meta, folder or found[0].parent)


def checkpoint_folder(path):
    """A checkpoint's folder: path, or the newest of the run at path. Raises UsageError."""
    path = Path(path).resolve()
    folders = [path] if (path / "manifest.json").is_file() else sorted(path.glob("ckpt/step-*"))
    require(
        folders,
        f"--checkpoint={path}: no checkpoint there; wanted a run's folder, as "
        "logs/20260101T000000Z-abcdef, or its ckpt/step-NNNNNN",
    )
    return folders[-1]


def as_tuples(x):
    return tuple(map(as_tuples, x)) if isinstance(x, list) else x


def as_config(saved):
    """The Config that train.as_json wrote."""

    def row(kind, values):
        return kind(**{name: as_tuples(value) for name, value in values.items()})

    stages = tuple(row(Stage, stage) for stage in saved["stages"])
    return replace(row(Config, saved), stages=stages, val=row(Stage, saved["val"]))


def open_checkpoint(path, device=None):
    """The Trained at a run's folder or a checkpoint's.

    device: where the weights go, by default the first. Raises UsageError where there is none, where
    it is damaged or not of train.py's own model.
    """
    folder = checkpoint_folder(path)
    with usage_errors(f"{folder}: its config cannot be read"):
        manifest = json.loads((folder / "manifest.json").read_text())
        is_ours = manifest.get("format") == CHECKPOINT_FORMAT
        require(is_ours, f"{folder}: it is of an older train.py, which commit e79511b reads")
        cfg = as_config(manifest["config"])
    step = read_manifest(folder, cfg)["step"]
    about = folder.parent.parent / "config.json"
    with usage_errors(f"{about}: wanted config and meta of the run"):
        meta = json.loads(about.read_text())["meta"]
        meta = {name: meta[name] for name in ("tokenizer", "vocab_size", "bos_id")}
    cfg = choose_attention(replace(cfg, attention="auto"), jax.default_backend())
    set_up_jax(cfg)
    places = state_shardings(GPT, make_mesh([device or jax.devices()[0]]), cfg).params

    def wanted(spec, place):
        return jax.ShapeDtypeStruct(spec.shape, f32, sharding=place)

    like = jax.tree.map(wanted, GPT.specs(cfg), places)
    return Trained(folder, step, cfg, meta, load_tensors(folder / "params.safetensors", like))
