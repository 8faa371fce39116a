"""python -m scripts.dry_run. A spawned process finds functions in modules, not in this file."""

import sys

from scripts.dry_run.command import main
from train import command

sys.exit(command(main))
