"""Lets the tests of this folder share the made-up models and batches of the folder above."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
