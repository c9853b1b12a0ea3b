"""Small models in the format of other projects, with tokenizers, as Hugging Face folders; weights come from a formula.

The module depends on numpy and safetensors alone, so that tests/parity/write_texts.py can build the same folders next
to transformers.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

PROMPT = "The film isn't bad: 2025's best"
NEW_TOKENS = 16
ROWS = 304
_WIDTH, _HEADS, _SIZE, _INNER = 32, 4, 8, 48
_CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
  " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TURNS = (
  "{{ bos_token }}{% for message in messages %}{{ '<start>' + ('model' if message['role'] == 'assistant' else"
  " message['role']) + '\n' + message['content'] + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
_WORDS = ("he", "The", "is", "in", "bad", "best", "film", "25")
_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES_ONLY = _GPT2_SPLIT | {"use_regex": False}
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits):
  pattern = rf"{_WORD}|\p{{N}}{digits}|{_OTHER}"
  return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _alphabet():
  """The characters with which byte-level vocabularies spell the 256 bytes."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _merges(words):
  """(merges, resulting pieces) that merge each word into one piece, from the left."""
  merges, pieces = [], []
  for word in words:
    for end in range(1, len(word)):
      pair, piece = (word[:end], word[end]), word[: end + 1]
      if piece not in pieces:
        merges.append(list(pair))
        pieces.append(piece)
  return merges, pieces


def _added(number, name):
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  return {"id": number, "content": name} | flags | {"special": True}


def _start_template(name, number):
  return {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
  }


def _tokenizer(model, added, **components):
  empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
  return {"version": "1.0"} | empty | {"added_tokens": added, "model": model} | components


def _bpe(vocabulary, merges, **options):
  fields = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
  flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
  names = {name: number for number, name in enumerate(vocabulary)}
  return {"type": "BPE"} | fields | flags | {"vocab": names, "merges": merges} | options


def byte_level(special, steps, *, start=None, normalizer=None, ignore_merges=False):
  """A byte-level BPE: special entries, bytes, a few words."""
  merges, pieces = _merges([*_WORDS, "Ġbad", "Ġfilm"])
  vocabulary = [*special, *_alphabet(), *pieces]
  return _tokenizer(
    _bpe(vocabulary, merges, ignore_merges=ignore_merges),
    [_added(number, name) for number, name in enumerate(special)],
    normalizer=normalizer and {"type": normalizer},
    pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
    post_processor=None if start is None else _start_template(special[start], start),
    decoder=_BYTES_ONLY,
  )


SENTENCEPIECE_SPECIAL = {"llama": ["<unk>", "<s>", "</s>"], "gemma": ["<pad>", "<eos>", "<bos>", "<unk>"]}


def sentencepiece_pieces(style):
  """(piece, score, type) of a BPE with bytes; the types are those of SentencePiece."""
  special = SENTENCEPIECE_SPECIAL[style]
  kinds = [2 if name == "<unk>" else 3 for name in special]
  characters = sorted(set("".join(_WORDS)) | set("▁'t:s"))
  _, pieces = _merges([*_WORDS, "▁bad", "▁film"])
  pieces = [piece for piece in pieces if len(piece) > 1]
  table = [(name, 0.0, kind) for name, kind in zip(special, kinds)]
  table += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
  # SentencePiece merges the pair with the highest score first: the order of the merges.
  table += [(piece, -float(rank), 1) for rank, piece in enumerate(pieces)]
  table += [(character, -float(len(pieces) + rank), 1) for rank, character in enumerate(characters)]
  return table[:ROWS]


def byte_fallback(style):
  """The same BPE in the format of the package tokenizers, like Llama 2 and Gemma."""
  names = [name for name, _, _ in sentencepiece_pieces(style)]
  special = SENTENCEPIECE_SPECIAL[style]
  # SentencePiece can build a piece from any two others; the merges contain all such pairs.
  pieces = [name for name, _, kind in sentencepiece_pieces(style) if kind == 1]
  pairs = ([piece[:at], piece[at:]] for piece in pieces for at in range(1, len(piece)))
  merges = [pair for pair in pairs if set(pair) <= set(pieces)]
  bos = "<s>" if style == "llama" else "<bos>"
  prepend = [{"type": "Prepend", "prepend": "▁"}] if style == "llama" else []
  replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
  back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
  strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []
  return _tokenizer(
    _bpe(names, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
    [_added(names.index(name), name) for name in special],
    normalizer={"type": "Sequence", "normalizers": [*prepend, replace]},
    post_processor=_start_template(bos, names.index(bos)),
    decoder={"type": "Sequence", "decoders": [*back, *strip]},
  )


_CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
# Name -> (family, tokenizer.json, tokenizer_config.json). The classes are those in the folders of the families, except
# that transformers 5 splits text for a class GPT2Tokenizer like GPT-2, regardless of tokenizer.json.
MODELS = {
  "llama2": (
    "llama", byte_fallback("llama"),
    {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
  ),
  "smollm2": (
    "llama", byte_level(_CHAT, [_DIGITS, _GPT2_SPLIT]),
    {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "chat_template": _CHATML} | _NAMED,
  ),
  "llama3": (
    "llama", byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], [_split("{1,3}"), _BYTES_ONLY],
                        start=0, ignore_merges=True),
    {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
  ),
  "qwen2": (
    "qwen2", byte_level(_CHAT, [_split(""), _BYTES_ONLY], normalizer="NFC"),
    {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>",
     "pad_token": "<|endoftext|>", "chat_template": _CHATML},
  ),
  "gemma": (
    "gemma", byte_fallback("gemma"),
    {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>",
     "pad_token": "<pad>", "unk_token": "<unk>"},
  ),
  "llama3.2": (
    "llama3", byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], [_split("{1,3}"), _BYTES_ONLY],
                         start=0, ignore_merges=True),
    {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
  ),
  "qwen3": (
    "qwen3", byte_level(_CHAT, [_split(""), _BYTES_ONLY], normalizer="NFC"),
    {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>",
     "pad_token": "<|endoftext|>", "chat_template": _CHATML},
  ),
  "gemma3": (
    "gemma3_text", byte_fallback("gemma"),
    {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>",
     "pad_token": "<pad>", "unk_token": "<unk>", "chat_template": _TURNS},
  ),
  "pythia": (
    "gpt_neox", byte_level(["<|endoftext|>"], [_GPT2_SPLIT]),
    {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
  ),
}  # fmt: skip
_CLASSES = {
  "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma": "GemmaForCausalLM",
  "gpt_neox": "GPTNeoXForCausalLM", "llama3": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}  # fmt: skip
# Fields and the number of layers of families that differ from Llama 2 in more than the names above. The prompt is
# longer than the window and than the context of RoPE.
_FIELDS = {
  "llama3": {"model_type": "llama", "rope_scaling": {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  }},
  "gemma3_text": {
    "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12, "rope_local_base_freq": 100.0,
  },
}  # fmt: skip
_LAYERS = {"gemma3_text": 2}


def config_of(family):
  """config.json, without the ids of special tokens."""
  config = {
    "architectures": [_CLASSES[family]],
    "model_type": family,
    "vocab_size": ROWS,
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS.get(family, 1),
    "num_attention_heads": _HEADS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": family != "gpt_neox",
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
  }
  if family == "gpt_neox":
    return config | {"rotary_pct": 0.25, "rotary_emb_base": 10000, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
  activation = {"hidden_activation": "gelu_pytorch_tanh"} if family.startswith("gemma") else {"hidden_act": "silu"}
  return config | activation | {
    "num_key_value_heads": 2, "head_dim": _SIZE, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
  } | _FIELDS.get(family, {})  # fmt: skip


def _shapes(family):
  d, f = _WIDTH, _INNER
  if family == "gpt_neox":
    layer = "gpt_neox.layers.0."
    shapes = {
      "gpt_neox.embed_in.weight": (ROWS, d), "embed_out.weight": (ROWS, d),
      f"{layer}attention.query_key_value.weight": (3 * d, d), f"{layer}attention.dense.weight": (d, d),
      f"{layer}mlp.dense_h_to_4h.weight": (f, d), f"{layer}mlp.dense_4h_to_h.weight": (d, f),
    }  # fmt: skip
    norms = ("gpt_neox.final_layer_norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items() if layer in name}
    return shapes | {f"{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}
  shapes = {"model.embed_tokens.weight": (ROWS, d), "model.norm.weight": (d,)}
  for number in range(_LAYERS.get(family, 1)):
    shapes |= _layer_shapes(family, f"model.layers.{number}.")
  return shapes


def _layer_shapes(family, layer):
  d, n, f = _WIDTH, _HEADS * _SIZE, _INNER
  shapes = {
    f"{layer}input_layernorm.weight": (d,), f"{layer}post_attention_layernorm.weight": (d,),
    f"{layer}self_attn.q_proj.weight": (n, d), f"{layer}self_attn.o_proj.weight": (d, n),
    f"{layer}self_attn.k_proj.weight": (n // 2, d), f"{layer}self_attn.v_proj.weight": (n // 2, d),
    f"{layer}mlp.gate_proj.weight": (f, d), f"{layer}mlp.up_proj.weight": (f, d),
    f"{layer}mlp.down_proj.weight": (d, f),
  }  # fmt: skip
  if family == "qwen2":
    shapes |= {
      f"{layer}self_attn.{part}_proj.bias": shapes[f"{layer}self_attn.{part}_proj.weight"][:1] for part in "qkv"
    }
  if family in ("qwen3", "gemma3_text"):
    shapes |= {f"{layer}self_attn.{part}_norm.weight": (_SIZE,) for part in "qk"}
  if family == "gemma3_text":
    shapes |= {f"{layer}{part}_feedforward_layernorm.weight": (d,) for part in ("pre", "post")}
  return shapes


def weights(family):
  """The tensors by name: sines of unique numbers, which look random and depend on no random generator."""
  tensors, first = {}, 1
  for name, shape in sorted(_shapes(family).items()):
    size = int(np.prod(shape))
    values = np.sin(np.arange(first, first + size, dtype=np.float64) ** 2 * 0.7310585)
    scale = 0.5 if len(shape) == 2 else 0.1 if name.endswith("bias") else 1.0
    tensors[name] = (scale * values).reshape(shape).astype(np.float32)
    first += size
  return tensors


def write_folder(path, name, end_ids):
  """Writes the model `name` as a Hugging Face folder; its generation_config.json has these end tokens."""
  family, tokenizer, settings = MODELS[name]
  path = pathlib.Path(path)
  path.mkdir(parents=True)
  save_file(weights(family), path / "model.safetensors", metadata={"format": "pt"})
  for file, content in (
    ("config.json", config_of(family)),
    ("generation_config.json", {"eos_token_id": list(end_ids)}),
    ("tokenizer.json", tokenizer),
    ("tokenizer_config.json", settings),
  ):
    (path / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
  return path
