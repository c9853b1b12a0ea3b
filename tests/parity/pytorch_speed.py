"""The speed of a training step of the quickstart's model, written plainly in PyTorch.

A user who doesn't choose cyb_jax writes this program; the benchmark guide compares it with `cyb-benchmark train`. It
runs where torch is, not jax, and prints one JSON line per program, eager and compiled:

  .venv-parity/bin/python tests/parity/pytorch_speed.py [--steps=12] [--compile]

The model is that of experiments/quickstart.py:ap: the Llama architecture with untied output, 3 visible pauses after
every token whose input is the token's embedding plus their own, positions of the token, dense logits, CYB-AP with
omega = 0:0:0:1, AdamW and clipping at norm 1, in f32.

Dimensions: B batch, T tokens, W slots, S = T*W, D model, N heads, H head size, V vocabulary, F mlp.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

B, T, W = 32, 64, 4
V, D, N, H, MLP, LAYERS = 1024, 64, 2, 32, 128, 3
PRIOR_SHIFT = 0.0  # of the prior 0.5 up to a constant, which costs nothing


class Layer(nn.Module):
  def __init__(self):
    super().__init__()
    self.norms = nn.ModuleList(nn.RMSNorm(D, eps=1e-5) for _ in range(2))
    self.query, self.key, self.value = (nn.Linear(D, N * H, bias=False) for _ in range(3))
    self.out = nn.Linear(N * H, D, bias=False)
    self.gate, self.up = (nn.Linear(D, MLP, bias=False) for _ in range(2))
    self.down = nn.Linear(MLP, D, bias=False)

  def forward(self, x, cos, sin):
    h = self.norms[0](x)
    query, key, value = (p(h).view(B, T * W, N, H).transpose(1, 2) for p in (self.query, self.key, self.value))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x + self.out(attended.transpose(1, 2).reshape(B, T * W, N * H))
    h = self.norms[1](x)
    return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, cos, sin):
  a, b = x.chunk(2, -1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model(nn.Module):
  def __init__(self):
    super().__init__()
    self.embedding, self.pauses = nn.Embedding(V, D), nn.Parameter(0.02 * torch.randn(W - 1, D))
    self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    self.norm, self.readout = nn.RMSNorm(D, eps=1e-5), nn.Linear(D, V + 1, bias=False)
    position = torch.arange(T).repeat_interleave(W)[:, None]
    angles = position * 10000.0 ** (-torch.arange(H // 2) / (H // 2))
    self.register_buffer("cos", angles.cos())
    self.register_buffer("sin", angles.sin())

  def forward(self, tokens, targets):
    """CYB-AP in nats per token: -log sum_i s_i t_i with s_i = a_i prod_{j<i} d_j and a forced answer at the end."""
    x = self.embedding(tokens)[:, :, None]
    x = torch.cat([x, x + self.pauses], 2).view(B, T * W, D)
    for layer in self.layers:
      x = layer(x, self.cos, self.sin)
    logits = self.readout(self.norm(x)).view(B, T, W, V + 1)
    log_normalizer = logits[..., :-1].logsumexp(-1)
    log_target = logits.gather(-1, targets[..., None, None].expand(B, T, W, 1))[..., 0] - log_normalizer
    odds = logits[..., -1] + PRIOR_SHIFT - log_normalizer
    log_abstain, log_answer = F.logsigmoid(odds)[..., :-1], F.logsigmoid(-odds)[..., :-1]
    reached = F.pad(log_abstain.cumsum(-1), (1, 0))
    log_stopping = reached + F.pad(log_answer, (0, 1))
    return -(log_stopping + log_target).logsumexp(-1).mean()


def measure(compiled: bool, steps: int) -> dict:
  torch.manual_seed(0)
  model = Model()
  run = torch.compile(model) if compiled else model
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  seconds = []
  for step in range(steps + 3):  # the first three are warm-up
    stream = torch.randint(0, V, (B, T + 1))
    begin = time.perf_counter()
    loss = run(stream[:, :-1], stream[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step >= 3:
      seconds.append(time.perf_counter() - begin)
  median = statistics.median(seconds)
  return {
    "program": "pytorch, torch.compile" if compiled else "pytorch, eager",
    "torch": torch.__version__, "threads": torch.get_num_threads(), "steps": steps,
    "step_seconds": median, "tokens_per_second": B * T / median, "loss": loss.item(),
  }  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--compile", action="store_true")
  arguments = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  print(json.dumps(measure(arguments.compile, arguments.steps)))


if __name__ == "__main__":
  main()
