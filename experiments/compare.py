"""Compares methods under one budget or several: the program `cyb-study`, which documents its flags and outputs.

python experiments/compare.py --workdir=runs/compare --jobs=2
"""

from cyb_jax.cli import study

if __name__ == "__main__":
  study.run()
