"""Converts weights of other projects to a Hugging Face folder, or exports a run as one, or its adapters for peft.

`init_from` accepts such folders, and transformers and peft can load them.

cyb-convert --from=hf|gguf|llama2c --input=PATH --output=DIR [--dtype=bfloat16] [--tokenizer=PATH]
cyb-convert --to=hf --workdir=RUN --output=DIR [--checkpoint=best] [--dtype=bfloat16]
cyb-convert --to=peft --workdir=RUN --output=DIR [--checkpoint=best]
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax import command_line
from cyb_jax.cli import flag_values, launching
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from jaxtyping import PyTree

  from cyb_jax.decoder import DecoderConfig
  from cyb_jax.runs import Run

_KINDS = {"hf": "huggingface", "gguf": "gguf", "llama2c": "llama2c"}
# safetensors copies the arrays that it writes, so the weights are written in shards of this size.
_SHARD_BYTES = 128 << 20
_DTYPES = ("float32", "bfloat16")


def define_flags() -> None:
  flags.DEFINE_string("from", "", "The kind of --input: hf (a Hugging Face folder), gguf or llama2c.")
  flags.DEFINE_string(
    "to", "", "The format in which --workdir is exported: hf (a Hugging Face folder) or peft (its adapters alone)."
  )
  command_line.define_path("input", "", "The folder or file to convert.")
  command_line.define_path("workdir", "", "The run to export.")
  flags.DEFINE_string("checkpoint", "last", "The checkpoint of the run: last, best, or a step.")
  command_line.define_base()
  command_line.define_path("output", "", "The folder to write; it must be empty or not exist.")
  flags.DEFINE_string("dtype", "float32", "The number format of the written weights: float32 or bfloat16.")
  flags.DEFINE_string("tokenizer", "", "A tokenizer that replaces the tokenizer of --input; '': no replacement.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  source, target = args["from"].value, args.to
  if bool(source) == bool(target):
    raise InputError("--from, --to: give one of them, --from=hf|gguf|llama2c or --to=hf|peft")
  if source and source not in _KINDS:
    raise InputError(f"--from: {source!r} is unknown; give one of {', '.join(_KINDS)}")
  if target and target not in ("hf", "peft"):
    raise InputError(f"--to: {target!r} is unknown; give hf or peft")
  if args.dtype not in _DTYPES:
    raise InputError(f"--dtype: {args.dtype!r} is unknown; give one of {', '.join(_DTYPES)}")
  unused = (
    ("workdir", "checkpoint", "base") if source else ("input", "tokenizer", *(("dtype",) if target == "peft" else ()))
  )
  for name in unused:
    if args[name].present:
      raise InputError(f"--{name}: {args[name].value!r} has no effect with --{'from' if source else 'to'}; omit it")
  output = pathlib.Path(flag_values.required_flag("output", "give the folder to write")).absolute()
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise InputError(f"--output: {output} already exists; give another folder")
  if source:
    given = flag_values.required_flag("input", "give the folder or file to convert")
    return _convert(_KINDS[source], given, output)
  return _export(flag_values.required_flag("workdir", "give the run's folder"), output)


def _convert(kind: str, path: str, output: pathlib.Path) -> dict[str, Any]:
  from cyb_jax.interop import pretrained

  args = flags.FLAGS
  start = time.perf_counter()
  found = pretrained.open_pretrained(path, tokenizer=args.tokenizer)
  if found.kind != kind:
    raise InputError(f"--from: {args['from'].value!r}, but {path} is of kind {found.kind!r}; give that kind")
  run = pretrained.load(found, dtype=args.dtype)
  written = _written(run, run.params, run.method.decoder.config, output, args.dtype, found.context)
  logging.info("%s: %s parameters from %s", output, f"{written['parameters']:,}", path)
  decoder = {k: v for k, v in run.config.source["decoder"].items() if v is not None and k != "preset"}
  return written | {"decoder": decoder, "seconds": time.perf_counter() - start}


def _export(workdir: str, output: pathlib.Path) -> dict[str, Any]:
  from cyb_jax.decoder import merge_lora
  from cyb_jax.interop import pretrained
  from cyb_jax.methods import Exportable

  args = flags.FLAGS
  start = time.perf_counter()
  run = pretrained.load_run(workdir, flag_values.checkpoint_flag(), base=args.base, base_option="--base")
  if not isinstance(run.method, Exportable):
    raise InputError(
      f"--workdir: the method of {workdir} is {run.method.name!r}, which is not a plain decoder: programs that read a"
      " Hugging Face folder would run another model; export a run of baseline, tbys, cyb, constant_stop or mean_slots"
    )
  if args.to == "peft":
    return _export_adapters(run, output) | {"seconds": time.perf_counter() - start}
  decoder, config = merge_lora(run.params["decoder"], run.method.decoder.config)
  context = None
  if run.config.init_from:
    # The run's windows may be shorter than the context of the weights from which it started, if these still exist.
    with contextlib.suppress(InputError):
      context = pretrained.open_pretrained(run.config.init_from).context
  written = _written(run, run.params | {"decoder": decoder}, config, output, args.dtype, context)
  logging.info("%s: %s, step %d of %s", output, run.method.name, run.step, workdir)
  return written | {"seconds": time.perf_counter() - start}


def _export_adapters(run: Run, output: pathlib.Path) -> dict[str, Any]:
  from cyb_jax.interop import peft, peft_export, pretrained

  address = run.config.init_from
  found = pretrained.open_pretrained(address) if address else None
  if not isinstance(found, pretrained.FromSource) or found.kind != "huggingface" or found.method is not None:
    raise InputError(
      f"--to: peft, but the run's init_from is {address!r}, which is no plain Hugging Face folder; peft adapts only"
      " such models. Give hf, which merges the adapters"
    )
  source, config = found.source, run.method.decoder.config
  if isinstance(source, peft.AdaptedSource):
    if source.for_run(config.lora).merges:
      raise InputError(
        f"--to: peft, but the adapters of {address} were merged before the run's own were trained; give hf"
      )
    address = str(source.path)
  parameters = peft_export.write_adapters(
    output,
    config,
    run.params,
    source,
    address,
    method=run.config.method,
    vocab_size=run.method.vocab_size,
    step=run.step,
  )
  logging.info("%s: adapters of %s, step %d", output, address, run.step)
  return {
    "output": str(output),
    "method": run.method.name,
    "step": run.step,
    "parameters": parameters,
    "base": address,
  }


def _written(
  run: Run, params: PyTree, decoder: DecoderConfig, output: pathlib.Path, dtype: str, context: int | None
) -> dict[str, Any]:
  """Writes the folder; returns the fields of the JSON object that describe it."""
  import jax

  from cyb_jax import interop

  interop.write_huggingface(
    output,
    decoder,
    params,
    run.tokenizer,
    method=None if run.imported else run.config.method,
    step=run.step,
    dtype=dtype,
    max_positions=context or run.config.data.sequence_length,
    max_shard_bytes=_SHARD_BYTES,
  )
  return {
    "output": str(output),
    "method": run.method.name,
    "step": run.step,
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "dtype": dtype,
    # All entries, including those of pauses and <dont_know>.
    "vocab_size": json.loads((output / "config.json").read_text())["vocab_size"],
  }


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main, interrupted="ended; no folder was written, and the same command starts again")


if __name__ == "__main__":
  run()
