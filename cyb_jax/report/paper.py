"""The paper's results (arXiv 2510.13879), for comparison with a run: Gemma 2B, fine-tuned on C4.

Perplexities are read off its figures, +-0.003. The paper does not state the omega of the evaluations of 1:1:1:1 and
4:1:1:4.
"""

from __future__ import annotations

from cyb_jax.evaluation import words
from cyb_jax.report import page

NOTE = "The paper's results: Gemma 2B fine-tuned on C4, perplexity read off its figures (+-0.003). They are not ours."

REGIMES = ("1x1", "2 epochs", "2x data", "3x data")

# Perplexity by model and data regime.
PERPLEXITY: tuple[tuple[str, tuple[float | None, ...]], ...] = (
  ("pretrained", (13.018, None, None, None)),
  ("baseline", (12.173, 11.919, 11.854, 11.674)),
  ("TBYS-1", (12.098, 11.799, 11.750, 11.556)),
  ("TBYS-2", (12.024, 11.706, 11.663, 11.463)),
  ("TBYS-3", (11.983, 11.652, 11.612, 11.408)),
  ("CYB-AP 0:0:0:1, gamma 1", (11.657, 11.344, 11.311, 11.129)),
)

# Regime 1x1: perplexity, and the mean of s after 0, 1, 2 and 3 pauses, for self-stops only.
VARIANTS: tuple[tuple[str, float, tuple[float, ...]], ...] = (
  ("AP 0:0:0:1 gamma 1", 11.657, (0.578, 0.154, 0.127, 0.141)),
  ("AP 0:0:0:1 gamma .99", 11.704, (0.781, 0.127, 0.063, 0.029)),
  ("AP 1:1:1:1", 12.444, (0.507, 0.153, 0.040, 0.300)),
  ("AP 4:1:1:4", 12.418, (0.371, 0.078, 0.161, 0.390)),
  ("VA 1:1:1:1", 12.420, (0.257, 0.258, 0.249, 0.236)),
  ("VA 4:1:1:4", 12.372, (0.438, 0.106, 0.103, 0.353)),
  ("VA 11:3:3:3", 12.357, (0.573, 0.151, 0.144, 0.132)),
  ("DP 1:1:1:1 alpha .01", 11.682, (0.368, 0.207, 0.211, 0.214)),
  ("DP 4:1:1:4 alpha .01", 11.669, (0.452, 0.146, 0.111, 0.291)),
  ("DP 11:3:3:3 alpha .01", 11.674, (0.550, 0.149, 0.156, 0.145)),
  ("DP 1:1:1:1 alpha .1", 11.728, (0.298, 0.263, 0.235, 0.205)),
  ("DP 11:3:3:3 alpha .1", 11.717, (0.528, 0.150, 0.155, 0.167)),
  ("DP 4:1:1:4 alpha .1", 12.418, (0.372, 0.077, 0.161, 0.391)),
)

# The rank correlation of d_i with t_{i+1} - t_i for i = 1, 2, 3: the best model and the model with gamma .99.
SPEARMAN: tuple[tuple[str, tuple[float, ...]], ...] = (
  ("AP 0:0:0:1 gamma 1", (0.383, 0.157, 0.271)),
  ("AP 0:0:0:1 gamma .99", (0.381, 0.208, 0.309)),
)

# Table 3: words by the median and the variance of the number of pauses.
WORDS = {corner: " ".join(found) for corner, found in words.PAPER.items()}

DATA_EFFICIENCY = "In the paper CYB at 1x the data equals the baseline at 3x, and TBYS-3 at about 1.84x."


def perplexities() -> str:
  """The paper's table of perplexities, folded."""
  rows = [(name, *values) for name, values in PERPLEXITY]
  return (
    "<details><summary>The paper's perplexities</summary>"
    + page.paragraph(NOTE, "note")
    + page.table("The paper: perplexity (Gemma 2B, C4)", ("model", *REGIMES), rows)
    + "</details>"
  )


def variants() -> str:
  """The paper's table of variants, folded."""
  rows = [(name, value, *shares) for name, value, shares in VARIANTS]
  header = ("variant, 1x1", "perplexity", *(f"s, {i} pauses" for i in range(4)))
  return (
    "<details><summary>The paper's variants and latencies</summary>"
    + page.paragraph(NOTE + " Mean of s over self-stops only.", "note")
    + page.table("The paper: variants at 1x1 (Gemma 2B, C4)", header, rows)
    + "</details>"
  )
