"""Chats as training data: exactly the tokens of the assistant's turns have weight 1."""

import hashlib
import json

import numpy as np
import pytest
from small_tokenizers import bpe

from cyb_jax.data import HuggingFaceTokenizer, open_task, prepare
from cyb_jax.data.chats import rendered
from cyb_jax.data.pieces import Encoder
from cyb_jax.data.tasks import Document
from cyb_jax.data.tasks.records import RecordForm
from cyb_jax.data.tokenizers import SpecialTokens
from cyb_jax.errors import InputError

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = (
  "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<stop>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
# A template without special entries around turns; it writes the start token itself.
PLAIN = (
  "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi\n"},
  {"role": "assistant", "content": "Yes, ñ?"},
  {"role": "user", "content": "in"},
  {"role": "assistant", "content": "out"},
]


def tokenizer(template=CHATML, **settings):
  names = SpecialTokens(chat_template=template, names={"bos_token": "<start>"})
  plain = bpe([("i", "n"), ("o", "u"), ("ou", "t")], bytes_=True, special=("<end>", "<start>", "<stop>"))
  return HuggingFaceTokenizer(plain.content, separator_id=0, special_tokens=names, **settings)


def weighted(tokenizer, chat, where="x, line 1"):
  """(text of every token, whether it has weight 1), without the start token and with the separator."""
  encoder = Encoder(tokenizer, ("messages",))
  encoded = encoder.encode([Document(json.dumps(chat), messages=tuple(chat), where=where)])
  names = [tokenizer.piece(token) for token in encoded.tokens.tolist()]
  assert len(encoded.tokens) == encoded.lengths.sum()
  return list(zip(names, encoded.annotations["weights"].tolist())), encoded


def test_the_assistants_turns_have_weight_token_by_token():
  rows, encoded = weighted(tokenizer(), CHAT)
  spelt = "".join(name for name, _ in rows)
  assert spelt.startswith("<start>system")
  runs = [""]
  for name, weight in rows:
    if weight:
      runs[-1] += name
    elif runs[-1]:
      runs.append("")
  # The entry that ends a turn has weight 1; the line end after it and the separator of documents have weight 0.
  byte_names = "".join(tokenizer().piece(token) for token in tokenizer().encode("Yes, ñ?"))
  assert [run for run in runs if run] == [f"{byte_names}<stop>", "out<stop>"]
  assert rows[-1] == ("<end>", 0)
  assert encoded.weighted_bytes.tolist() == [len("Yes, ñ?<stop>out<stop>".encode())]
  assert encoded.weighted_tokens.tolist() == [sum(weight for _, weight in rows)]


def test_a_template_without_special_entries_and_with_a_start():
  # Each document has a single start token, although the template also writes one.
  rows, _ = weighted(tokenizer(PLAIN, start_id=1, adds_start=True), CHAT[1:3])
  assert rows[0] == ("<start>", 0)
  assert [name for name, _ in rows].count("<start>") == 1
  # Only the line end marks the end of the turn, so it has weight 1, and so has the separator after it.
  assert rows[-1] == ("<end>", 1)
  assert rows[-2][1] == 1
  assert sum(weight for _, weight in rows) == len(tokenizer().encode("Yes, ñ?\n")) + 1


@pytest.mark.parametrize("line_end", ["", "\n"])
def test_the_separator_after_the_end_of_a_turn_has_no_weight(line_end):
  """Generation stops before it, whether or not the template writes a line end after the turn."""
  rows, _ = weighted(tokenizer(CHATML.replace("'\n' }}{% endfor", f"'{line_end}' }}}}{{% endfor")), CHAT[1:3])
  assert rows[-1] == ("<end>", 0)
  assert [name for name, weight in rows if weight][-1] == "<stop>"


def test_a_separator_from_the_template_is_not_doubled():
  """If the end of a turn is the separator, it is a target once, as the end of the document."""
  rows, _ = weighted(tokenizer(CHATML.replace("'<stop>' + '\n'", "'<end>'")), CHAT[1:3])
  assert [name for name, _ in rows].count("<end>") == 2  # at the end of the user's turn and of the assistant's turn
  assert rows[-1] == ("<end>", 1)
  assert rows[-2] == ("?", 1)


def test_a_message_that_calls_tools_may_have_no_content():
  calls = [{"function": {"name": "f", "arguments": "{}"}}]
  template = "{% for m in messages %}<start>{{ m.role }} {{ m.content }}"
  template += "{% if m.tool_calls %}call {{ m.tool_calls[0].function.name }}{% endif %}<stop>{% endfor %}"
  template += "{% if add_generation_prompt %}<start>assistant {% endif %}"
  row = {"m": [CHAT[1], {"role": "assistant", "content": None, "tool_calls": calls}]}
  document = RecordForm(messages_key="m").document(row, "row 1")
  assert document.messages[1]["content"] == ""
  text = rendered(tokenizer(template), document)
  assert bytes(np.frombuffer(text.text.encode(), np.uint8)[text.weights > 0]) == b"call f<stop>"


def test_a_chat_that_begins_with_the_assistant_is_rejected():
  document = Document("", messages=tuple(CHAT[2:]), where="chats.jsonl, line 7")
  with pytest.raises(InputError, match=r"line 7: messages: the chat begins with a turn of the assistant"):
    rendered(tokenizer(), document)


def test_a_template_that_changes_earlier_turns_is_rejected():
  rewriting = "{% for m in messages %}{{ m.role if loop.last else 'old' }}: {{ m.content }}\n{% endfor %}"
  document = Document("", messages=tuple(CHAT), where="chats.jsonl, line 7")
  with pytest.raises(InputError, match=r"messages_key: chats.jsonl, line 7: .*renders turn 3 differently"):
    rendered(tokenizer(rewriting), document)
  refusing = "{{ raise_exception('roles must alternate') }}"
  with pytest.raises(InputError, match=r"chats.jsonl, line 7: .*roles must alternate"):
    rendered(tokenizer(refusing), document)


def test_the_text_does_not_depend_on_the_date():
  dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}"
  dated += "{% for m in messages %} {{ m.content }}{% endfor %}"
  assert rendered(tokenizer(dated), Document("", messages=tuple(CHAT[3:]))).text == "2024 in out"


def test_a_jsonl_of_chats_is_prepared(tmp_path):
  chats = [[CHAT[1] | {"content": f"{i} + 1"}, {"role": "assistant", "content": str(i + 1)}] for i in range(300)]
  (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
  model = tmp_path / "model"
  model.mkdir()
  tokenizer().save(model)
  options = {"pattern": f"{tmp_path}/chats.jsonl", "messages_key": "messages"}
  store = prepare("jsonl", str(model), tmp_path / "store", options=options)
  assert store.has_prefixes("train")
  tokens, weights = store.windows("train", np.array([0]), store.num_tokens("train") - 1)
  answers = "".join(store.tokenizer.piece(t) for t in tokens[0, 1:][weights[0] > 0]).split("<stop>")[:-1]
  kept = {json.dumps(chat, ensure_ascii=False, sort_keys=True) for chat in chats}
  assert {d.text for d in open_task("jsonl", options).documents("train")} <= kept
  assert len(answers) == store.description["splits"]["train"]["documents"]
  assert set(answers) <= {str(i + 1) for i in range(300)}
  assert store.description["chat_template"] == hashlib.sha256(CHATML.encode()).hexdigest()
  assert store.num_bytes("train") == sum(len(answer) + len("<stop>") for answer in answers)


@pytest.mark.parametrize("spec", ["sentencepiece:300", "bytes"])
def test_a_tokenizer_without_a_template_is_rejected_before_data_is_read(tmp_path, spec):
  (tmp_path / "chats.jsonl").write_text("this is not JSON, and is not read\n")
  options = {"pattern": f"{tmp_path}/chats.jsonl", "messages_key": "messages"}
  with pytest.raises(InputError, match="no chat template"):
    prepare("jsonl", spec, tmp_path / "store", options=options)
  assert not (tmp_path / "store").exists()
