"""A decoder in float64 numpy (RMSNorm, gated SiLU, RoPE, grouped heads), one row at a time: a reference for methods."""

import jax
import numpy as np


class Float64Decoder:
  """The layers of a method's decoder, with the method's parameters."""

  def __init__(self, method, params):
    self.config = method.decoder.config
    self.vocab_size = method.vocab_size
    self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    self.decoder = self.params["decoder"]

  def embed(self, tokens):
    return self.decoder["embedding"][np.asarray(tokens)]

  def norm(self, x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_epsilon) * scale

  def finish(self, x):
    return self.norm(x, self.decoder["final_norm"]["scale"])

  def rope(self, heads):
    """RoPE of heads [T, N, H] at the positions 0 .. T-1."""
    half = self.config.head_size // 2
    angles = np.arange(len(heads))[:, None] * self.config.rope_base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = heads[..., :half], heads[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def keys_and_values(self, x, number):
    """The cache of layer `number` for inputs [T, D]: two arrays [T, G, H]."""
    layer = self.decoder[f"layers_{number}"]
    normed = self.norm(x, layer["attention_norm"]["scale"])
    kernels = layer["attention"]
    return self.rope(np.einsum("td,dgh->tgh", normed, kernels["key"]["kernel"])), np.einsum(
      "td,dgh->tgh", normed, kernels["value"]["kernel"]
    )

  def layer(self, x, number, seen, keys=None, values=None):
    """Layer `number` on [T, D]; `seen` bool[T, T]; `keys` and `values` replace those of the inputs."""
    config, layer = self.config, self.decoder[f"layers_{number}"]
    normed = self.norm(x, layer["attention_norm"]["scale"])
    query = self.rope(np.einsum("td,dnh->tnh", normed, layer["attention"]["query"]["kernel"]))
    if keys is None:
      keys, values = self.keys_and_values(x, number)
    heads = np.zeros_like(query)
    for head in range(config.num_heads):
      group = head // (config.num_heads // config.num_kv_heads)
      logits = np.where(seen, query[:, head] @ keys[:, group].T / np.sqrt(config.head_size), -np.inf)
      shares = np.exp(logits - logits.max(-1, keepdims=True))
      heads[:, head] = shares / shares.sum(-1, keepdims=True) @ values[:, group]
    x = x + np.einsum("tnh,nhd->td", heads, layer["attention"]["out"]["kernel"])
    normed, mlp = self.norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
    gate = normed @ mlp["gate"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * (normed @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]

  def layers(self, x, seen=None):
    """All layers on [T, D], without the final norm."""
    seen = np.tril(np.ones((len(x), len(x)), bool)) if seen is None else seen
    for number in range(self.config.num_layers):
      x = self.layer(x, number, seen)
    return x

  def probabilities(self, states):
    """softmax over the vocabulary of states [..., D] after the final norm."""
    logits = states @ self.decoder.get("unembedding", self.decoder["embedding"])[: self.vocab_size].T
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
