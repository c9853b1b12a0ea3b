"""The user's own text: every format can be used with the options of the tutorial, and a mixture resumes bit-exactly."""

import gzip
import json
import shutil

import numpy as np
import pytest
from models import assert_trees_equal, tiny_config
from small_tokenizers import bpe

from cyb_jax import command_line, configs, training
from cyb_jax.checkpointing.workdir import checkpoints_in
from cyb_jax.data import HuggingFaceTokenizer, MixtureStore
from cyb_jax.data.tokenizers import SpecialTokens
from cyb_jax.errors import InputError
from cyb_jax.training.metrics import read_metrics
from cyb_jax.training.run_data import check_names

pyarrow = pytest.importorskip("pyarrow")

CHATML = "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<stop>\n' }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_texts(folder):
  """The files of the commands in docs/tutorials/own_text.md."""
  from pyarrow import parquet

  texts = [f"review number {i}: it was {'very ' * (i % 5)}good" for i in range(400)]
  (folder / "docs").mkdir()
  lines = [json.dumps({"body": text}) + "\n" for text in texts]
  (folder / "docs" / "a.jsonl").write_text("".join(lines))
  pairs = [json.dumps({"question": f"{i} + 1?", "answer": f" {i + 1}"}) + "\n" for i in range(400)]
  (folder / "qa.jsonl.gz").write_bytes(gzip.compress("".join(pairs).encode()))
  (folder / "table").mkdir()
  parquet.write_table(pyarrow.table({"text": texts}), folder / "table" / "a.parquet")
  roles = ("user", "assistant")
  chats = [[{"role": role, "content": f"{role} {i}"} for role in roles] for i in range(400)]
  (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
  (folder / "model").mkdir()
  names = SpecialTokens(chat_template=CHATML, names={})
  content = bpe([("i", "n")], bytes_=True, special=("<end>", "<start>", "<stop>")).content
  HuggingFaceTokenizer(content, separator_id=0, special_tokens=names).save(folder / "model")


FORMS = {
  "jsonl": ("jsonl", "pattern=docs/*.jsonl,text_key=body", "bytes"),
  "answers": ("jsonl", "pattern=qa.jsonl.gz,prompt_key=question,answer_key=answer", "bytes"),
  "parquet": ("parquet", "pattern=table/*.parquet", "bytes"),
  "chats": ("jsonl", "pattern=chats.jsonl,messages_key=messages", "model"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_of_text_trains(form, tmp_path, monkeypatch):
  write_texts(tmp_path)
  monkeypatch.chdir(tmp_path)
  task, options, tokenizer = FORMS[form]
  config = tiny_config(name="baseline")
  fields = f"data.task={task}", f"data.options={options}", f"data.tokenizer={tokenizer}", "train.steps=2"
  config = configs.freeze(command_line.override(config, fields))
  record = training.train(config, tmp_path / "run")
  store = training.open_store(config)
  assert record["tokens"] == store.num_targets("validation")
  partly = form in ("answers", "chats")
  assert store.has_prefixes("train") == partly
  weighted, tokens = read_metrics(tmp_path / "run")[0]["tokens"], 2 * 8 * 16
  assert (weighted < tokens / 2) if partly else weighted == tokens


def mixed(tmp_path, **train):
  config = tiny_config(name="baseline")
  mixture = f"synthetic_lookups(documents=64):3,jsonl(pattern={tmp_path}/docs/*.jsonl,text_key=body):1"
  config.data.update(mixture=mixture, options="")
  config.train.update(steps=10, log_every=5, checkpoint_every=5, eval_every=0, **train)
  return config


def test_a_mixture_trains_reports_its_sources_and_resumes_bit_exactly(tmp_path):
  write_texts(tmp_path)
  config = configs.freeze(mixed(tmp_path))
  record = training.train(config, tmp_path / "whole")
  store = training.open_store(config)
  assert isinstance(store, MixtureStore)
  assert record["tokens"] == store.num_targets("validation")
  rows = [row for row in read_metrics(tmp_path / "whole") if row["split"] == "train"]
  windows = {name: of["tokens"] / 16 for name, of in rows[-1]["sources"].items()}
  assert sum(windows.values()) == 80
  assert abs(windows["jsonl"] - 20) < 10  # one in four
  epochs = {source.name: windows[source.name] / source.store.num_windows("train", 16) for source in store.sources}
  assert {name: of["epochs"] for name, of in rows[-1]["sources"].items()} == epochs
  shutil.copytree(tmp_path / "whole", tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "10")
  again = training.train(config, tmp_path / "again")
  assert again == record

  def timeless(folder):
    return [{name: value for name, value in row.items() if name != "timing"} for row in read_metrics(folder)]

  assert timeless(tmp_path / "again") == timeless(tmp_path / "whole")
  folders = [tmp_path / name / "checkpoints" / "10" for name in ("whole", "again")]
  assert all(folder.is_dir() for folder in folders)
  metas = [checkpoints_in(tmp_path / name, read_only=True).meta(10) for name in ("whole", "again")]
  assert metas[0] == metas[1]
  import cyb_jax

  assert_trees_equal(*(cyb_jax.load(tmp_path / name).params for name in ("whole", "again")))


def test_evaluation_finds_the_mixture_from_another_folder_without_its_sources(tmp_path, monkeypatch):
  write_texts(tmp_path)
  config = configs.freeze(mixed(tmp_path))
  training.train(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "docs")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  from cyb_jax import runs
  from cyb_jax.checkpointing.workdir import newest_meta

  store = runs.open_recorded_store(newest_meta(tmp_path / "run"))
  assert [source.name for source in store.sources] == ["synthetic_lookups", "jsonl"]
  assert np.isfinite(store.num_bytes("validation"))


@pytest.mark.parametrize(
  ("fields", "part"),
  [
    (["data.mixture=imdb_review:1,synthetic_sums:1"], "data.task='imdb_review'"),
    (["data.mixture=/nowhere/store:1"], "there is no token store in '/nowhere/store'"),
    (["data.mixture=jsonl(text_keys=x)"], "no such option"),
    (["data.task=jsonl", "data.options=text_key=a,messages_key=b"], "text_key is also given"),
  ],
)
def test_sources_are_checked_before_data_is_read(fields, part):
  config = tiny_config()
  config.data.options = ""
  with pytest.raises(InputError, match=part):
    check_names(configs.freeze(command_line.override(config, fields)))


@pytest.mark.parametrize(
  ("fields", "part"),
  [
    (["data.mixture=a:0"], "data.mixture: the weight '0'"),
    (["data.mixture=synthetic_sums", "data.options=documents=3"], "data.options"),
    (["data.mixture=synthetic_sums", "data.store=/x"], "data.store"),
  ],
)
def test_a_mixture_that_contradicts_other_fields_is_rejected(fields, part):
  config = tiny_config()
  config.data.options = ""
  with pytest.raises(InputError, match=part):
    configs.freeze(command_line.override(config, fields))
