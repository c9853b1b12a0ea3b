"""A token store in a command line determines the tokenizer, unless the user sets another tokenizer."""

import shutil

import cli
import pytest
from models import tiny_config
from text_corpus import corpus

from cyb_jax import command_line, configs, runs, training
from cyb_jax.data import prepare
from cyb_jax.data.tokenizers import train_sentencepiece
from cyb_jax.errors import InputError
from cyb_jax.studies.resolution import resolve

TASK = "synthetic_lookups"
OPTIONS = {"documents": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "own.model"
  train_sentencepiece(corpus(), 290).save(path.parent)
  (path.parent / "tokenizer.model").rename(path)
  return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory, model):
  folder = tmp_path_factory.mktemp("stores")
  for name, spec in (("trained", "sentencepiece:310"), ("bytes", "bytes"), ("file", str(model))):
    prepare(TASK, spec, folder / name, options=OPTIONS)
  return folder


def named(*fields, tokenizer="sentencepiece:320"):
  """The config of a command line; the experiment sets a tokenizer."""
  config = tiny_config(pauses=1)
  config.data.tokenizer = tokenizer
  return command_line.override(config, fields)


@pytest.mark.parametrize(("name", "spec"), [("trained", "sentencepiece:310"), ("bytes", "bytes"), ("file", None)])
def test_the_store_determines_the_tokenizer(stores, name, spec):
  path = str(stores / name)
  config = resolve(named(f"data.store={path}"))
  assert config.data.tokenizer == (spec or path)
  store = training.open_store(config)
  size = {"trained": 310, "bytes": 257, "file": 290}[name]
  assert store.vocab_size == training.vocabulary(config)[0] == training.vocabulary(config, store)[0] == size
  # The recorded config.json describes the same run, independently of the experiment's default.
  again = resolve(named(f"data.store={path}", tokenizer="sentencepiece:321"))
  assert runs.config_record(again).differences(dict(config.source)) == []


def test_a_tokenizer_that_the_user_sets_is_kept(stores, model):
  path = stores / "trained"
  given = resolve(named(f"data.store={path}", "data.tokenizer=sentencepiece:320"))
  assert given.data.tokenizer == "sentencepiece:320"
  with pytest.raises(InputError, match=r"data\.tokenizer: 'sentencepiece:320' .* was prepared with sentencepiece:310"):
    training.open_store(given)
  same = resolve(named(f"data.store={stores / 'file'}", f"data.tokenizer={model}"))
  assert same.data.tokenizer == str(model)
  assert training.open_store(same).vocab_size == 290


def test_without_a_store_the_experiments_tokenizer_is_used(stores, tmp_path):
  assert named(f"data.store={tmp_path / 'new'}").data.tokenizer == "sentencepiece:320"
  assert named().data.tokenizer == "sentencepiece:320"
  # '' means the tokenizer of init_from, or of the store if there is no init_from.
  store = f"data.store={stores / 'bytes'}"
  assert named(store, "init_from=/weights", tokenizer="").data.tokenizer == ""
  assert named(store, tokenizer="").data.tokenizer == "bytes"


def test_a_moved_store_is_the_same_run(stores, tmp_path):
  source = named(f"data.store={stores / 'file'}")
  fingerprint = training.open_store(resolve(source)).fingerprint
  shutil.copytree(stores / "file", tmp_path / "moved")
  moved = resolve(named(f"data.store={tmp_path / 'moved'}"))
  assert runs.config_record(moved).differences(configs.to_dict(source)) == []
  meta = {"store": fingerprint, "store_path": str(stores / "nowhere")}
  assert training.run_data.open_recorded_or_new_store(moved, meta).path == tmp_path / "moved"
  other = resolve(named(f"data.store={stores / 'bytes'}"))
  assert runs.config_record(other).differences(configs.to_dict(source)) == [
    "data.tokenizer: 'of data.store' -> 'bytes'"
  ]


def test_the_program(stores, tmp_path):
  path = tmp_path / "own.py"
  path.write_text(cli.CONFIG.format(tests=str(cli.ROOT / "tests" / "support")).replace(
    "  return config", "  config.data.tokenizer = 'sentencepiece:320'\n  return config"
  ))  # fmt: skip
  store = f"--config.data.store={stores / 'trained'}"
  flags = (f"--config={path}", store, f"--workdir={tmp_path / 'run'}")
  _, err = cli.run("train", *flags, "--profile=-1", expect=2)  # the program ends after the config was read
  assert (
    f"data.tokenizer: using 'sentencepiece:310', the tokenizer of {stores / 'trained'}, instead of 'sentencepiece:320'"
    in err
  )
  assert "was prepared with sentencepiece:310" in cli.complaint(
    "train", *flags, "--config.data.tokenizer=sentencepiece:320"
  )
  assert not (tmp_path / "run").exists()
