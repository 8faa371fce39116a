"""Writes scripts/notebook.ipynb, the tour for Colab and Kaggle: install, train, sample, evaluate, look.

    python -m scripts.notebook                        after a change of the cells below
    python -m scripts.notebook --repo=URL --out=FILE  with the address to clone filled in, for one's own copy
"""
import argparse, json, sys
from pathlib import Path

from train import ROOT, UsageError, command, errors_as

CELLS = [  # (kind, text); a line that begins with ! is the shell's, {name} in it a variable
    ("markdown", """# speedrun-jax: train a small GPT here
Pick a runtime with a GPU or TPU, or none, and run the cells from top to bottom. Opened within a clone, nothing is cloned."""),
    ("code", """REPO = ""  # @param {type:"string"}
import os, shutil, sys
from pathlib import Path
if not Path("train.py").exists() and Path("../train.py").exists():
    os.chdir("..")
if not Path("train.py").exists():
    assert REPO, "put the address of the repository into REPO, as git clone takes it"
    !git clone --quiet --depth=1 {REPO} speedrun-jax
    os.chdir("speedrun-jax")
GPU, TPU = shutil.which("nvidia-smi"), Path("/dev/vfio/0").exists() or Path("/dev/accel0").exists()
JAX = "jax[cuda12]" if GPU else "jax[tpu]" if TPU else "jax"
!{sys.executable} -m pip install --quiet --requirement requirements.txt tokenizers "{JAX}>=0.10,<0.13"
"""),
    ("markdown", """## Train
`demo`: bytes of Python's own library, 3.3 million parameters; two minutes of training on two idle CPU cores. `fineweb`: the speedrun's
model on a tenth of its tokens from one shard of FineWeb (200 MB each, and one to validate); it wants a TPU or a large GPU, and has not
been tried on the free ones. `python train.py --help` lists all flags. A cell that is run again goes on from the last checkpoint."""),
    ("code", """WHAT = "demo"  # @param ["demo", "fineweb"]
FLAGS, PROMPT = "--preset=demo", "def main("
if WHAT == "fineweb":
    FLAGS, PROMPT = "--preset=speedrun --steps=190 --val_tokens=1048576 --val_every=50", "The history of the city"
    !{sys.executable} cached_fineweb10B.py 1
!{sys.executable} train.py {FLAGS} --log_dir=logs/{WHAT} --save_every=50 --resume=auto
RUN = max(Path("logs", WHAT).glob("*Z-*"))
"""),
    ("markdown", "## Look at the loss"),
    ("code", """from IPython.display import SVG, display
display(SVG(filename=str(RUN / "loss.svg")))
"""),
    ("markdown", "## Let it write"),
    ("code", """!{sys.executable} -m scripts.sample --checkpoint={RUN} --prompt="{PROMPT}" --num_samples=2 --max_new_tokens=200 --temperature=0.7
"""),
    ("markdown", "## Judge it: validation loss and bits per byte"),
    ("code", """!{sys.executable} -m scripts.evaluate --checkpoint={RUN}
"""),
]

def notebook(repo=""):
    """The text of a notebook, format 4.5. repo: what to clone where there is no clone."""
    cells = []
    for i, (kind, text) in enumerate(CELLS):
        text = text.replace('REPO = ""', f"REPO = {json.dumps(repo)}").rstrip("\n")
        cells.append({"id": f"cell-{i}", "cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
                     | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"

def main(argv=None):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.notebook --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.notebook [--FLAG=VALUE ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("--repo", default="", metavar="URL", help="what the notebook clones (default: it asks)")
    flag("--out", type=Path, default=ROOT / "scripts/notebook.ipynb", metavar="FILE", help="(default: scripts/notebook.ipynb)")
    args = parser.parse_args(argv)
    with errors_as(UsageError, f"--out={args.out}: cannot be written"):
        args.out.write_text(notebook(args.repo), encoding="utf-8")
    print(f"wrote: {args.out}")

if __name__ == "__main__":
    sys.exit(command(main))
