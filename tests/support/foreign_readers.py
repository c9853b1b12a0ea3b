"""The table of readers of foreign bytes: how each gets valid files, and how it reads them. See `fuzzing`."""

import asyncio
import functools
import gzip
import hashlib
import json
import pathlib
import shutil
from unittest import mock

import imported_models
import mutations
import numpy as np
from file_formats import llama2c_bytes, write_gguf
from fuzzing import Reader
from models import tiny_config
from served import CONTEXT, untrained_run

from cyb_jax import configs, hub, interop
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.checkpointing.workdir import is_run, read_config
from cyb_jax.data import ByteTokenizer, open_task, open_token_store, prepare, tokenizers
from cyb_jax.data.store import DESCRIPTION, fingerprint
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.interop.tensors import each
from cyb_jax.training.metrics import read_metrics

_GOLDENS = pathlib.Path(__file__).parents[1] / "parity" / "goldens"
_MODEL = "llama2"
_TEXTS = ("", "The film isn't bad: 2025's best\n", "▁ naïve 日本 <s></s><|im_end|>", "\x00\x7f")
_CHAT = [{"role": "user", "content": "a </s> <|im_end|>"}, {"role": "assistant", "content": "b"}]


# Models.


def _read_model(path):
  """Opens the model of a file and reads all its tensors."""
  source = interop.open_source(path if path.suffix in (".gguf", ".bin") else path.parent)
  for tensor, layer, _ in each(source.table, source.decoder.num_layers):
    for leaf in tensor.leaves:
      source.read(leaf, layer)
  for own in {} if source.extras is None else source.extras.own:
    source.read_own(own)


def _write_model(folder, name=_MODEL):
  imported_models.write_folder(folder / "model", name, [2])


def _write_shards(folder):
  from safetensors.numpy import save_file

  _write_model(folder)
  tensors = imported_models.weights("llama")
  (folder / "model" / "model.safetensors").unlink()
  names, weight_map = sorted(tensors), {}
  for number, part in enumerate((names[:4], names[4:]), 1):
    file = f"model-0000{number}-of-00002.safetensors"
    save_file({name: tensors[name] for name in part}, folder / "model" / file)
    weight_map |= dict.fromkeys(part, file)
  content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
  (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(content))


def _write_configs(folder):
  for name in ("llama3.2", "gemma3", "qwen2", "pythia"):
    imported_models.write_folder(folder / name, name, [2])
    for path in (folder / name).glob("*token*"):
      path.unlink()


def _write_export(folder):
  from models import initial_params

  from cyb_jax import runs

  config = configs.freeze(tiny_config(name="cyb", pauses=2))
  tokenizer = _sentencepiece_tokenizer()
  method = config.build_method(tokenizer.vocab_size)
  run = runs.Run(config, method, initial_params(method), tokenizer, 3, {})
  interop.write_huggingface(
    folder / "model", method.decoder.config, run.params, tokenizer, method=config.method, step=run.step
  )


def _read_export(path):
  _use(tokenizers.open_tokenizer(_child(path, "model")))
  _read_model(_child(path, "model") / "config.json")


def _child(path, name):
  """The folder with this name that contains a file."""
  return next(parent for parent in path.parents if parent.name == name)


def _write_adapters(folder):
  shutil.copytree(_GOLDENS / "llama", folder / "base")
  for name in ("llama_lora", "llama_dora"):
    shutil.copytree(_GOLDENS / "adapters" / name, folder / name)
    path = folder / name / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../base"}))


@functools.cache
def _llama():
  """(decoder's config, tensors by Hugging Face's names) of the smallest model."""
  rows, inner, name = imported_models.ROWS, 64, "model.layers.0.mlp"
  config = DecoderConfig(
    vocab_size=rows, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=inner
  )
  # Quantised blocks have 32 numbers.
  wider = {f"{name}.gate_proj": (inner, 32), f"{name}.up_proj": (inner, 32), f"{name}.down_proj": (32, inner)}
  return config, imported_models.weights("llama") | {
    f"{module}.weight": np.linspace(-1, 1, 32 * inner, dtype=np.float32).reshape(shape)
    for module, shape in wider.items()
  }


def _write_gguf(folder):
  config, arrays = _llama()
  write_gguf(folder / "plain.gguf", arrays, config, "llama", tokenizer=_gguf_pieces)
  write_gguf(folder / "quantised.gguf", arrays, config, "llama", "Q8_0", tokenizer=_gguf_merges)


def _gguf_pieces(writer):
  pieces = imported_models.sentencepiece_pieces("llama")
  names, scores, kinds = zip(*pieces)
  writer.add_tokenizer_model("llama")
  writer.add_token_list(list(names))
  writer.add_token_scores(list(scores))
  writer.add_token_types(list(kinds))
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_chat_template("{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}")


def _gguf_merges(writer):
  content = imported_models.MODELS["smollm2"][1]["model"]
  names = list(content["vocab"])
  names += [f"[unused{number}]" for number in range(imported_models.ROWS - len(names))]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(names)
  writer.add_token_types([3] * 3 + [1] * (len(names) - 3))
  writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
  writer.add_eos_token_id(2)


def _write_llama2c(folder):
  config, arrays = _llama()
  for form in ("legacy", "version1"):
    (folder / f"{form}.bin").write_bytes(llama2c_bytes(form, arrays, config))


def _read_adapters(path):
  """Reads adapters; a name of their model that is no folder is not requested from the hub."""
  with mock.patch.object(hub, "fetch", side_effect=InputError("hub: not in this test; give a folder")):
    _read_model(path)


# Tokenizers.


def _use(tokenizer):
  """Calls what programs call with a tokenizer."""
  for text in _TEXTS:
    ids = tokenizer.encode(text)
    tokenizer.decode(ids)
    tokenizer.unencodable(text)
    tokenizer.encode_with_special(text)
    tokenizer.encode_spans_with_special(text)
  tokenizer.encode_batch(_TEXTS)
  tokenizer.encode_spans(_TEXTS)
  for token in (*range(min(tokenizer.vocab_size, 16)), tokenizer.vocab_size - 1):
    tokenizer.piece(token)
    tokenizer.decode([token])
  tokenizer.describe()
  tokenizer.unused_ids()
  tokenizers.text_boundaries(tokenizer, imported=True)
  if tokenizer.chat_template is not None:
    tokenizers.turn_end_ids(tokenizer)
    tokenizers.encode_chat(tokenizer, _CHAT)


def _write_tokenizers(folder):
  for name in ("llama2", "smollm2", "qwen2"):
    imported_models.write_folder(folder / name, name, [2])
    (folder / name / "model.safetensors").unlink()
  (folder / "smollm2" / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
  _write_unigram(folder / "unigram")


def _write_unigram(folder):
  folder.mkdir()
  characters = sorted(set("".join(_TEXTS)) - {"\x00"})
  pieces = [["<unk>", 0.0], ["</s>", 0.0], ["▁", -1.0], *([c, -2.0] for c in characters if c != "▁"), ["▁film", -3.0]]
  content = imported_models._tokenizer(
    {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
    [imported_models._added(0, "<unk>"), imported_models._added(1, "</s>")],
    pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
  )
  (folder / "tokenizer.json").write_text(json.dumps(content))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))


def _read_tokenizer(path):
  _use(tokenizers.open_tokenizer(path.parent if path.suffix == ".json" else path))


@functools.cache
def _sentencepiece_tokenizer():
  from text_corpus import corpus

  return tokenizers.train_sentencepiece(corpus(), 300)


def _write_sentencepiece(folder):
  (folder / "own.model").write_bytes(_sentencepiece_tokenizer().model)


def _mutated_sentencepiece(content, source):
  """Damaged bytes, or a valid protocol buffer with changed fields."""
  if source.random() < 0.5:
    return mutations.mutated_bytes(content, source)
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(content)
  for _ in range(source.randint(1, 3)):
    piece = source.choice(proto.pieces)
    action = source.randrange(8)
    if action == 0:
      piece.score = source.choice((float("nan"), float("inf"), -1e38, 0.0))
    elif action == 1:
      piece.type = source.randint(1, 6)
    elif action == 2:
      piece.piece = source.choice(("", "a", "<0x00>", "▁", "\x00", "</s>", "a" * 1000))
    elif action == 3:
      name = source.choice(("eos_id", "bos_id", "unk_id", "pad_id", "model_type", "vocab_size", "byte_fallback"))
      value = source.choice((1, 2, 3, 4) if name == "model_type" else (-1, 0, 1, 2**31 - 1))
      setattr(proto.trainer_spec, name, value)
    elif action == 4:
      del proto.pieces[source.randrange(len(proto.pieces)) :]
      proto.pieces.add(piece="a", score=0.0)
    elif action == 5:
      proto.normalizer_spec.precompiled_charsmap = source.randbytes(source.choice((0, 3, 64)))
    elif action == 6:
      proto.normalizer_spec.escape_whitespaces = not proto.normalizer_spec.escape_whitespaces
    else:
      proto.pieces.add(piece=piece.piece, score=piece.score)
  return proto.SerializeToString()


def _write_saved_tokenizers(folder):
  for name, tokenizer in (
    ("sentencepiece", _sentencepiece_tokenizer()),
    ("huggingface", _opened_tokenizer()),
    ("bytes", ByteTokenizer()),
  ):
    (folder / name).mkdir()
    tokenizer.save(folder / name)


@functools.cache
def _opened_tokenizer():
  import tempfile

  with tempfile.TemporaryDirectory() as scratch:
    path = imported_models.write_folder(pathlib.Path(scratch) / "model", "smollm2", [2])
    return tokenizers.open_tokenizer(path)


def _read_saved_tokenizer(path):
  _use(tokenizers.load(path.parent))
  tokenizers.open_tokenizer(path.parent)


def _write_llama2c_tokenizer(folder):
  import struct

  pieces = imported_models.sentencepiece_pieces("llama")
  texts = [(name.replace("▁", " ").encode(), score) for name, score, _ in pieces]
  body = b"".join(struct.pack("<fi", score, len(text)) + text for text, score in texts)
  (folder / "tokenizer.bin").write_bytes(struct.pack("<i", max(len(text) for text, _ in texts)) + body)


# Runs and stores.


def _write_store(folder):
  options = {"documents": 64}
  prepare("synthetic_lookups", "bytes", folder / "store", options=options, progress=False)


def _read_store(path):
  store = open_token_store(path.parent)
  for split in store.splits:
    store.windows(split, np.arange(2), 16)
    store.difficulty(split, np.arange(2), 16)
    store.document_starts(split)
    store.prefixes(split, 16)
    store.num_bytes(split)
    store.require(split, 1)


def _seal_store(folder, path):
  """A new fingerprint, so that the changed fields are read."""
  if path.name == DESCRIPTION:
    try:
      description = json.loads(path.read_bytes())
      path.write_text(json.dumps(description | {"fingerprint": fingerprint(description)}))
    except (ValueError, TypeError, RecursionError, AttributeError):
      pass


def _write_checkpoints(folder):
  state = {"params": {"a": np.arange(64, dtype=np.float32), "b": np.ones((2, 3), np.int32)}, "step": np.int32(1)}
  checkpoints = Checkpoints(folder / "checkpoints", keep=2)
  for step in (1, 2):
    checkpoints.save(step, state, {"tokens": step}, loss=float(step))
  checkpoints.close()


def _read_checkpoints(path):
  import jax

  checkpoints = Checkpoints(_child(path, "checkpoints"), read_only=True)
  for which in ("last", "best"):
    step = checkpoints.find(which)
    checkpoints.find(which, quick=True)
    checkpoints.meta(step)
    checkpoints.read(step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints.restore_params(step, {"a": jax.ShapeDtypeStruct((64,), np.float32, sharding=here)})


def _seal_checkpoint(folder, path):
  """New checksums, so that the changed file is read."""
  root = next(parent for parent in path.parents if parent.parent.name == "checkpoints")
  sums = root / "checksums.json"
  if path == sums:
    return
  try:
    listed = json.loads(sums.read_text())
    content = path.read_bytes()
    listed[str(path.relative_to(root))] = [len(content), hashlib.sha256(content).hexdigest()]
    sums.write_text(json.dumps(listed))
  except OSError:
    pass


def _write_run(folder):
  config = configs.freeze(tiny_config(pauses=2))
  (folder / "config.json").write_text(configs.to_json(config))
  rows = [{"step": step, "train": {"loss": 1.5}, "timing": {"seconds": 0.1}} for step in (1, 2, 3)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_run(path):
  is_run(path.parent)
  read_metrics(path.parent)
  configs.freeze(configs.migrated(read_config(path.parent))).build_method(300)


# Text.

_ROWS = [
  {
    "text": f"film {number} naïve",
    "question": f"{number} + 1?",
    "answer": f"{number + 1}",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{number}"}],
  }
  for number in range(12)
]
_FORMS = ({"text_key": "text"}, {"prompt_key": "question", "answer_key": "answer"}, {"messages_key": "messages"})


def _read_task(name, path, **options):
  task = open_task(name, {"pattern": str(path)} | options)
  for piece in task.pieces():
    for _ in task.read(piece):
      pass


def _write_lines(folder):
  content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _ROWS).encode()
  (folder / "a.jsonl").write_bytes(content)
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))


def _read_lines(path):
  for form in _FORMS:
    _read_task("jsonl", path, **form)


def _write_compressed(folder):
  import bz2
  import lzma

  import pyarrow

  content = "".join(f"{row['text']}\n" for row in _ROWS).encode() * 20
  (folder / "a.txt").write_bytes(content)
  (folder / "b.txt.gz").write_bytes(gzip.compress(content, mtime=0))
  (folder / "c.txt.bz2").write_bytes(bz2.compress(content))
  (folder / "d.txt.xz").write_bytes(lzma.compress(content))
  (folder / "e.txt.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def _read_compressed(path):
  _read_task("text_files", path, unit="line")


def _write_tables(folder):
  import pyarrow
  from pyarrow import parquet

  columns = {name: [row[name] for row in _ROWS] for name in _ROWS[0]}
  for codec in ("none", "snappy", "zstd"):
    parquet.write_table(pyarrow.table(columns), folder / f"{codec}.parquet", compression=codec, row_group_size=5)


def _read_table(path):
  for form in _FORMS:
    _read_task("parquet", path, **form)


# Requests.


@functools.cache
def _served_model():
  from cyb_jax.serving.protocol import Model

  return Model(untrained_run(), "tiny", CONTEXT, "self_paced", max_rows=8)


def _write_requests(folder):
  (folder / "completion.json").write_text(json.dumps({
    "prompt": ["a", "b"], "max_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9, "logprobs": 1, "stop": ["x"],
    "seed": 1, "mode": "self_paced", "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {},
  }))  # fmt: skip
  (folder / "chat.json").write_text(json.dumps({
    "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "max_completion_tokens": 2, "response_format": {"type": "text"}, "user": "me", "metadata": {"a": ["b"]},
  }))  # fmt: skip


def _read_request(path):
  from starlette.requests import Request

  from cyb_jax.serving.bodies import read_json
  from cyb_jax.serving.errors import ApiError
  from cyb_jax.serving.protocol import parse_chat, parse_completion

  async def receive():
    return {"type": "http.request", "body": path.read_bytes(), "more_body": False}

  http = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
  parse = parse_chat if path.name == "chat.json" else parse_completion
  try:
    parse(asyncio.run(read_json(http, most=1 << 20, seconds=5)), _served_model())
  except ApiError as error:
    if not 400 <= error.status < 500:
      raise ValueError(f"status {error.status}") from error
    json.dumps(error.body, ensure_ascii=False).encode()
    raise


def _request_errors():
  from cyb_jax.serving.errors import ApiError

  return (ApiError,)


def _readers():
  yield Reader("safetensors", _write_model, _read_model, ("model/*.safetensors",))
  yield Reader("safetensors_index", _write_shards, _read_model, ("model/*.index.json",))
  yield Reader("huggingface_config", _write_configs, _read_model, ("*/config.json",))
  yield Reader("export", _write_export, _read_export, ("model/**/*.json", "model/*.safetensors"))
  yield Reader("peft", _write_adapters, _read_adapters, ("llama_*/*.json", "llama_*/*.safetensors"))
  yield Reader("gguf", _write_gguf, _read_model, ("*.gguf",))
  yield Reader("gguf_tokenizer", _write_gguf, _read_tokenizer, ("*.gguf",))
  yield Reader("llama2c", _write_llama2c, _read_model, ("*.bin",))
  yield Reader("llama2c_tokenizer", _write_llama2c_tokenizer, _read_tokenizer, ("*.bin",))
  yield Reader("tokenizer_json", _write_tokenizers, _read_tokenizer, ("*/*.json",))
  yield Reader("sentencepiece", _write_sentencepiece, _read_tokenizer, ("*.model",), mutate=_mutated_sentencepiece)
  yield Reader("saved_tokenizer", _write_saved_tokenizers, _read_saved_tokenizer, ("*/*",))
  yield Reader("store", _write_store, _read_store, ("store/*",))
  yield Reader("sealed_store", _write_store, _read_store, (f"store/{DESCRIPTION}",), seal=_seal_store)
  yield Reader("checkpoint", _write_checkpoints, _read_checkpoints, ("checkpoints/**/*",))
  yield Reader("sealed_checkpoint", _write_checkpoints, _read_checkpoints, ("checkpoints/**/*",), seal=_seal_checkpoint)
  yield Reader("run", _write_run, _read_run, ("*.json", "*.jsonl"))
  yield Reader("jsonl", _write_lines, _read_lines, ("*.jsonl", "*.gz"))
  yield Reader("text_files", _write_compressed, _read_compressed, ("*",))
  yield Reader("parquet", _write_tables, _read_table, ("*.parquet",))
  yield Reader("request", _write_requests, _read_request, ("*.json",), errors=_request_errors())


READERS = {reader.name: reader for reader in _readers()}
