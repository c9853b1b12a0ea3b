"""Mutates valid files: bytes, JSON documents, and the JSON header of safetensors.

Every mutation takes its decisions from a `random.Random`, so the seed of the generator identifies a damaged file, and
hypothesis can control the generator and reduce a failure.
"""

import json
import struct

# Values that readers of numbers, strings and containers tend to mishandle.
INTEGERS = (0, 1, -1, 2, 7, 127, 255, 65535, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (
  None, True, False, *INTEGERS, -(2**63), 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-300, 1e308, float("nan"),
  float("inf"), "", "a", "bytes", "0", "é", "\x00", "\n", "a" * 1000, "../../x", "/etc/passwd", "\ud800", [], {}, [[]],
  [None], [1, "a"], {"a": {}}, {"content": "a"}, {"id": 1}, ["a", "b"],
)  # fmt: skip
# Bytes that are not UTF-8, that end lines or strings, or that begin another format.
_PIECES = (
  b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"\n", b"\r\n", b'"', b"{", b"[", b"]", b"}", b",", b"\xef\xbb\xbf", b"NaN",
  b"1e999", b"-", b"\x1f\x8b", b"PAR1", b"GGUF", b"\x80" * 12, b"\xff" * 8,
)  # fmt: skip
_DEEP = 100_000


def mutated_bytes(content, random):
  """The content with one to three damages."""
  for _ in range(random.randint(1, 3)):
    content = random.choice(_DAMAGES)(content, random)
  return content


def mutated_json(content, random):
  """A JSON text with one to three changed values; sometimes the text itself is damaged."""
  chance = random.random()
  if chance < 0.15:
    return mutated_bytes(content, random)
  if chance < 0.2:
    return random.choice((b"", b"[]", b"null", b"0", b'"a"', b"{}", b"[" * _DEEP, b'{"a":' * _DEEP, b"{" * 9))
  value = json.loads(content)
  for _ in range(random.randint(1, 3)):
    value = _changed(value, random)
  # Escaped surrogates are valid JSON, and NaN is read by Python.
  text = json.dumps(value)
  if random.random() < 0.1:
    text = _with_duplicate_key(text, random)
  if random.random() < 0.1:
    text = _with_nesting(text, random)
  return text.encode()


def mutated_json_lines(content, random):
  """JSON lines with damages in one line or anywhere."""
  if random.random() < 0.3:
    return mutated_bytes(content, random)
  lines = content.splitlines(keepends=True)
  number = random.randrange(len(lines))
  lines[number] = mutated_json(lines[number], random) + b"\n"
  return b"".join(lines)


def mutated_safetensors(content, random):
  """A safetensors file with a changed header whose length is right, or with damaged bytes."""
  if random.random() < 0.4:
    return mutated_bytes(content, random)
  (size,) = struct.unpack_from("<Q", content)
  header = mutated_json(content[8 : 8 + size], random)
  return struct.pack("<Q", len(header)) + header + content[8 + size :]


def mutation_of(name):
  """The mutation of the format that a file's name indicates."""
  if name.endswith(".jsonl"):
    return mutated_json_lines
  if name.endswith(".safetensors"):
    return mutated_safetensors
  if name.endswith(".json") or name in ("metadata", "_METADATA", "_CHECKPOINT_METADATA", ".zarray"):
    return mutated_json
  return mutated_bytes


def _truncated(content, random):
  return content[: random.randint(0, len(content))]


def _flipped(content, random):
  if not content:
    return content
  changed = bytearray(content)
  for _ in range(random.randint(1, 8)):
    changed[_place(content, random)] ^= 1 << random.randrange(8)
  return bytes(changed)


def _with_integer(content, random):
  """One number of 1, 2, 4 or 8 bytes is replaced; a place that may hold a length or an offset is preferred."""
  form = random.choice("bBhHiIqQ")
  size = struct.calcsize(form)
  place = _place(content, random)
  if random.random() < 0.5:
    place = next((at for at in range(place, min(place + 200, len(content) - 8)) if _is_length(content, at)), place)
  low, high = (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1)) if form.islower() else (0, 2 ** (8 * size))
  value = random.choice([value for value in INTEGERS if low <= value < high])
  return content[:place] + struct.pack(f"<{form}", value) + content[place + size :]


def _is_length(content, at):
  (value,) = struct.unpack_from("<Q", content, at)
  return 0 < value <= len(content)


def _without_part(content, random):
  first, last = sorted((_place(content, random), _place(content, random)))
  return content[:first] + content[last:]


def _with_part_twice(content, random):
  first = _place(content, random)
  last = min(len(content), first + random.choice((1, 4, 8, 64, 1024)))
  return content[:last] + content[first:]


def _with_insertion(content, random):
  place = _place(content, random)
  return content[:place] + random.choice(_PIECES) + content[place:]


def _filled(content, random):
  first = _place(content, random)
  last = min(len(content), first + random.choice((1, 2, 4, 8, 16, 256)))
  return content[:first] + random.choice((b"\0", b"\xff", b"\x7f", b"0")) * (last - first) + content[last:]


def _place(content, random):
  """An index, more often near the beginning or the end, where headers and indices are."""
  if not content:
    return 0
  near = min(len(content), 256)
  chance = random.random()
  if chance < 0.35:
    return random.randrange(near)
  if chance < 0.55:
    return len(content) - 1 - random.randrange(near)
  return random.randrange(len(content))


_DAMAGES = (
  _truncated, _flipped, _flipped, _with_integer, _with_integer, _without_part, _with_part_twice, _with_insertion,
  _filled,
)  # fmt: skip


def _changed(value, random):
  """The value with one change at a random place; places near the root are as likely as deep ones."""
  if not isinstance(value, dict | list) or not value or random.random() < 0.1:
    return random.choice(VALUES) if random.random() < 0.9 else [value]
  keys = sorted(value) if isinstance(value, dict) else range(len(value))
  key = random.choice(keys)
  changed = dict(value) if isinstance(value, dict) else list(value)
  action = random.random()
  if action < 0.6:
    changed[key] = _changed(value[key], random)
  elif action < 0.7:
    del changed[key]
  elif action < 0.8 and isinstance(changed, dict):
    changed[random.choice(("a", "", "\ud800", "../x", key + key))] = changed.pop(key)
  elif action < 0.9:
    changed[key] = value[random.choice(keys)]
  elif isinstance(changed, dict):
    changed[random.choice(("a", "", "cyb_jax", "id", "version"))] = random.choice(VALUES)
  else:
    changed.insert(key, random.choice(VALUES))
  return changed


def _with_duplicate_key(text, random):
  if not text.startswith('{"'):
    return text
  end = text.index('"', 1) if '"' not in text[2:] else text.index('"', 2)
  return f"{{{text[1 : end + 1]}: {json.dumps(random.choice(VALUES))}, {text[1:]}"


def _with_nesting(text, random):
  """A value is replaced by one that is nested more deeply than Python's own recursion, or less than that."""
  depth = random.choice((50, 500, 900, 2000, _DEEP))
  place = text.rfind(": ", 0, random.randint(2, max(2, len(text)))) + 2
  nested = "[" * depth + "]" * depth if random.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
  if place < 2:
    return nested
  try:
    _, end = json.JSONDecoder().raw_decode(text, place)
  except ValueError:
    return nested
  return text[:place] + nested + text[end:]
