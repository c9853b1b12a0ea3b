"""cyb-generate with chats: the prompt is the rendering of a message by the tokenizer's template."""

import json

import cli
import imported_models
import pytest
from models import tiny_config
from small_tokenizers import bpe

from cyb_jax import configs, training
from cyb_jax.data import HuggingFaceTokenizer
from cyb_jax.data.tokenizers import SpecialTokens
from cyb_jax.generation import Sampler, SamplingOptions
from cyb_jax.interop import pretrained

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

FLAGS = ("--mode=none", "--temperature=0", "--max_new_tokens=6", "--stream=False")
TEMPLATE = (
  "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<stop>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """Imported models: one with ChatML, and one whose template writes the start token that its tokenizer also adds."""
  folder = tmp_path_factory.mktemp("models")
  for name in ("smollm2", "llama2"):
    imported_models.write_folder(folder / name, name, [2])
  settings = json.loads((folder / "llama2" / "tokenizer_config.json").read_text())
  template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
  (folder / "llama2" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
  return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run that was trained on chats; its tokenizer does not list the entry that ends a turn among the end tokens."""
  folder = tmp_path_factory.mktemp("trained")
  rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "in"}] for i in range(300)]
  (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
  plain = bpe([("i", "n")], bytes_=True, special=("<end>", "<start>", "<stop>"))
  (folder / "tokenizer").mkdir()
  special = SpecialTokens(chat_template=TEMPLATE)
  HuggingFaceTokenizer(plain.content, separator_id=0, special_tokens=special).save(folder / "tokenizer")
  source = tiny_config(name="baseline")
  source.data.update(task="jsonl", tokenizer=str(folder / "tokenizer"), sequence_length=48)
  source.data.options = f"pattern={folder}/chats.jsonl,messages_key=messages"
  source.train.update(steps=60, log_every=30, eval_every=60, checkpoint_every=60)
  source.optimizer.learning_rate = 0.03
  training.train(configs.freeze(source), folder / "run")
  return folder / "run"


def said(run, ids, new=6):
  sampler = Sampler(run.method, SamplingOptions(mode="none", temperature=0))
  generated = sampler.generate(run.params, [ids], max_new_tokens=new, end_id=run.boundaries.end_ids)
  return run.tokenizer.decode(generated.tokens[0])


def test_a_chat_with_an_imported_model(imported):
  path = f"--init_from={imported}/smollm2"
  rendered = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nThe film<|im_end|>\n<|im_start|>assistant\n"
  chat, _ = cli.run("generate", path, "--chat", "--system=be", "--prompt=The film", *FLAGS)
  spelled, _ = cli.run("generate", path, f"--prompt={rendered}", *FLAGS)
  run = pretrained.load(str(imported / "smollm2"))
  ids = run.tokenizer.encode_with_special(rendered)
  assert len(ids) < len(run.tokenizer.encode(rendered))
  assert chat["text"] == spelled["text"] == [said(run, ids)] != [said(run, run.tokenizer.encode(rendered))]


def test_a_start_token_is_not_doubled(imported):
  path = f"--init_from={imported}/llama2"
  run = pretrained.load(str(imported / "llama2"))
  ids = run.tokenizer.encode_with_special("<s>[INST] The film [/INST]")
  assert (ids[0], run.boundaries.start) == (run.tokenizer.start_id, (run.tokenizer.start_id,))
  for flags in (["--chat", "--prompt=The film"], ["--prompt=<s>[INST] The film [/INST]"]):
    record, _ = cli.run("generate", path, *flags, *FLAGS)
    assert record["text"] == [said(run, ids)]
  assert said(run, ids) != said(run, [run.tokenizer.start_id, *ids])


def test_a_run_that_was_trained_on_chats(trained):
  """The run stores the template, and a reply ends at the end of its turn, although no file lists this entry."""
  run = pretrained.load_run(trained)
  assert run.tokenizer.chat_template == TEMPLATE
  assert run.boundaries.end_ids == (0,)
  record, _ = cli.run("generate", f"--workdir={trained}", "--chat", "--prompt=7?", *FLAGS)
  assert record["text"] == ["in"]
  assert record["tokens"] == 2  # with <stop>
  # In a prompt of a model that was trained by this project, the names of special entries are encoded as text.
  spelled = "<start>user\n7?<stop>"
  record, _ = cli.run("generate", f"--workdir={trained}", f"--prompt={spelled}", *FLAGS)
  assert record["text"] == [said(run, [0, *run.tokenizer.encode(spelled)])]


def test_the_shown_message_is_a_line(trained):
  code, out, err = cli.forked("generate", f"--workdir={trained}", "--chat", "--prompt=7?", *FLAGS[:-1])
  assert code == 0, err
  assert out.splitlines()[:-1] == ["7?", "in"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--chat"], "--prompt: not given"),
    (["--chat", "--prompt="], "--prompt: '' is empty"),
    (["--prompt=a", "--system=b"], "--system: 'b' is the system message of a chat; give --chat too"),
    (["--prompt=a", "--chat", "--system=\udcff"], "--system: the vocabulary can't encode '\\udcff'"),
    (["--prompt=\udcff", "--chat"], "--prompt: the vocabulary can't encode '\\udcff'"),
    ([f"--prompt={'a' * 40}", "--chat"], "tokens, including the tokens of the chat template"),
  ],
)
def test_bad_input(trained, flags, words):
  assert words in cli.complaint("generate", f"--workdir={trained}", *flags)


def test_a_model_without_a_template(imported, tmp_path):
  imported_models.write_folder(tmp_path / "gpt", "llama2", [2])
  message = cli.complaint("generate", f"--init_from={tmp_path}/gpt", "--chat", "--prompt=a")
  assert "--chat: the model's tokenizer has no chat template; omit --chat, or give an instruct model" in message
