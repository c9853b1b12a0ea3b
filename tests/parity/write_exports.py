"""Exports of ours, and what our own code says of them, for transformers to be held against by `read_exports.py`.

One folder a model: the export, and ours.npz: `tokens` and `targets` i32[B, T], `logits` f32[B, T, V] of the model
without its pauses, and, where it abstains, `log_dont_know` and `log_target` f32[B, T, W] of `cyb_jax.readout`.

  python tests/parity/write_exports.py GOLDENS OUTPUT
"""

import dataclasses
import functools
import json
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cyb_jax import interop, methods
from cyb_jax.data import tokenizers
from cyb_jax.decoder import Decoder, DecoderConfig, LoraConfig, init_params
from cyb_jax.interop import peft_export
from cyb_jax.methods import configure

_SIZES = dict(vocab_size=80, num_layers=2, d_model=32, num_heads=4, head_size=8, mlp_size=48)
_GPT = dict(norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias="all", mlp_bias=True)
_TEXT = "A film that wasn't bad, wasn't good; it was a film. <pause_1> 12 times!"
_CYB = configure(name="cyb", pauses=2)
# Decoders of our own, or golden models that pauses are added to; and their methods.
_MODELS = {
  "baseline": (DecoderConfig(**_SIZES, num_kv_heads=2), configure(name="baseline")),
  "cyb": (DecoderConfig(**_SIZES | {"vocab_size": 384}, num_kv_heads=2), configure(name="cyb", pauses=3)),
  "cyb_gpt2_style": (DecoderConfig(**_SIZES, num_kv_heads=4, **_GPT), _CYB),
  "cyb_calibrated": (
    DecoderConfig(**_SIZES, num_kv_heads=4, **_GPT, tied_embeddings=False, parallel_residual=True),
    configure(name="cyb", pauses=2, calibration_batches=2),
  ),
  "cyb_unit": (DecoderConfig(**_SIZES, num_kv_heads=1), configure(name="cyb", pauses=2, dont_know="unit")),
  "tbys_qwen2_style": (
    DecoderConfig(**_SIZES, num_kv_heads=2, attention_bias="qkv"), configure(name="tbys", pauses=1)
  ),
  "gemma": ("gemma", _CYB),
  "llama_untied_biased": ("llama_untied_biased", _CYB),
  "pythia": ("pythia", _CYB),
  **{
    name: (name, _CYB)
    for name in (
      "llama_llama3", "llama_yarn", "mistral", "qwen3", "qwen3_window", "gemma2", "gemma3", "olmo2", "smollm3", "gpt2"
    )
  },
}  # fmt: skip
_ADAPTED = {"llama": ("query", "value", "down"), "gemma3": ("query", "out", "gate"), "gpt2": ("out", "up")}


def _random(init, seed: int):
  shapes = jax.eval_shape(lambda key: nn.unbox(init(key)), jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)


def _read(decoder: DecoderConfig, logits):
  return logits if decoder.soft_cap is None else decoder.soft_cap * jnp.tanh(logits / decoder.soft_cap)


def _write_adapters(goldens: pathlib.Path, output: pathlib.Path) -> None:
  """Adapters of golden models, each in a folder `NAME` next to a link to its model, for peft to load."""
  for number, (name, targets) in enumerate(_ADAPTED.items()):
    source = interop.open_source(goldens / name)
    decoder = dataclasses.replace(source.decoder, lora=LoraConfig(rank=2, alpha=3.0, targets=targets))
    method = methods.build(_CYB, decoder, vocab_size=decoder.vocab_size, weights="lora")
    params = _random(method.init, number)
    params["decoder"] = _with_source(source, params["decoder"])
    peft_export.write_adapters(
      output / name, decoder, params, source, str(goldens / name), method=_CYB, vocab_size=decoder.vocab_size
    )
    tokens = np.random.default_rng(number).integers(0, decoder.vocab_size, (2, 8)).astype(np.int32)
    variables = {"params": params["decoder"]}
    inputs = method.decoder.apply(variables, tokens, method="embed")
    hidden = method.decoder.apply(variables, inputs, jnp.arange(tokens.shape[1])[None])
    logits = _read(decoder, hidden @ method.decoder.apply(variables, method="unembedding").T)
    np.savez(output / name / "ours.npz", tokens=tokens, logits=logits)


def _with_source(source, decoder):
  """The decoder's parameters of a source, with the adapters of `decoder`."""

  def pick(path, leaf):
    names = [key.key for key in path]
    if "lora" in names[-1]:
      return leaf
    first, _, layer = names[0].partition("_")
    found = source.read(tuple(names[1:]), int(layer)) if first == "layers" else source.read(tuple(names))
    return jnp.asarray(found)

  return jax.tree_util.tree_map_with_path(pick, decoder)


def main(goldens: pathlib.Path, output: pathlib.Path) -> None:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for number, (name, (decoder, options)) in enumerate(_MODELS.items()):
    source = None
    if isinstance(decoder, str):
      source = interop.open_source(goldens / decoder)
      decoder = source.decoder
    # Of fewer entries than its model has rows; of the other models the vocabulary is too small for one.
    tokenizer = tokenizers.train_sentencepiece([_TEXT], 290) if name == "cyb" else None
    words = decoder.vocab_size if tokenizer is None else tokenizer.vocab_size
    method = methods.build(options, decoder, vocab_size=words)
    params = _random(method.init, number)
    if source is not None:
      boxed = jax.eval_shape(functools.partial(init_params, Decoder(decoder)), jax.random.key(0))
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nn.unbox(boxed))
      params["decoder"] = interop.load_decoder(source, abstract)
    interop.write_huggingface(output / name, decoder, params, tokenizer, method=options)
    if tokenizer is not None:
      said = {"text": _TEXT, "ids": tokenizer.encode(_TEXT)}
      (output / name / "text.json").write_text(json.dumps(said))
    rng = np.random.default_rng(number)
    stream = rng.integers(0, words, (2, 8)).astype(np.int32)
    tokens, targets = stream[:, :-1], stream[:, 1:]
    variables = {"params": params["decoder"]}
    inputs = method.decoder.apply(variables, tokens, method="embed")
    hidden = method.decoder.apply(variables, inputs, jnp.arange(tokens.shape[1])[None])
    said = {"logits": _read(decoder, hidden @ method.decoder.apply(variables, method="unembedding").T)}
    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(targets)}
    scores = method.evaluate(params, batch | {"weights": jnp.ones(tokens.shape)}).scores
    if "dont_know" in params:
      said["log_dont_know"] = scores.log_dont_know
    np.savez(output / name / "ours.npz", tokens=tokens, targets=targets, log_target=scores.log_target, **said)

  _write_adapters(goldens, output / "adapters")


if __name__ == "__main__":
  with jax.default_matmul_precision("highest"):
    main(*map(pathlib.Path, sys.argv[1:]))
