"""Paths in flags and in configs: every program expands `~`, and a run may be read from any folder."""

import importlib
import json

import cli
import pytest
from absl import flags
from models import tiny_config

from cyb_jax import command_line, configs, runs, training
from cyb_jax.cli import benchmark
from cyb_jax.data import prepare
from cyb_jax.data.tasks import open_task
from cyb_jax.errors import InputError
from cyb_jax.studies.options import Options
from cyb_jax.studies.resolution import resolve

PROGRAMS = ("prepare", "train", "evaluate", "report", "generate", "convert", "compile", "study")
# Flags whose value is text and not a path. --tokenizer may also be a name, so the code that opens it expands the path.
# The study's --config is expanded like that of the other programs (`command_line.installed`).
NO_PATHS = {
  "activities", "batch_sizes", "checkpoint", "config_help", "context", "coordinator", "dtype", "equal", "fields",
  "from", "implementations", "kept_pauses", "like", "mode", "omega", "option", "parts", "plan", "prompt",
  "prompt_pauses", "rates", "read", "reference", "settings", "shard", "size", "sizes", "split", "steps", "stop",
  "system", "task", "tasks", "to", "tokenizer", "topology", "variant",
}  # fmt: skip


@pytest.mark.parametrize("program", [*PROGRAMS, *benchmark.BENCHMARKS])
def test_every_flag_for_a_path_expands_it(program):
  if program in benchmark.BENCHMARKS and program not in PROGRAMS:
    define = benchmark.BENCHMARKS[program][0]
  else:
    define = importlib.import_module(f"cyb_jax.cli.{program}").define_flags
  paths = (command_line.PathParser, command_line.PathListParser)
  texts = {
    name
    for name, flag in cli.flags_of(define).items()
    if type(flag.parser) in (flags.ArgumentParser, flags.ListParser) and not isinstance(flag.parser, paths)
  }
  assert texts - {"config"} <= NO_PATHS


def test_a_list_of_paths(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ann")
  values = flags.FlagValues()
  parser, serializer = command_line.PathListParser(), flags.CsvListSerializer(",")
  flags.DEFINE(parser, "compare", None, "", flag_values=values, serializer=serializer)
  values(["program", "--compare=~/a,/b,gs://c/d"])
  assert values.compare == ["/home/ann/a", "/b", "gs://c/d"]


def test_the_programs_in_the_home_folder(tmp_path):
  home, here = tmp_path / "home", tmp_path / "here"
  home.mkdir(), here.mkdir()
  cli.write_config(home)
  how = {"cwd": here, "env": {"HOME": str(home)}}
  prepared, _ = cli.run(
    "prepare", "--task=synthetic_lookups", "--option=documents=64", "--tokenizer=bytes", "--output=~/store", **how
  )
  assert prepared["output"] == str(home / "store")
  fields = ("--config.data.store=~/store", "--config.train.steps=1", "--config.train.last_eval_limit=1")
  cli.run("train", "--config=~/tiny.py", "--workdir=~/run", *fields, **how)
  assert json.loads((home / "run" / "config.json").read_text())["data"]["store"] == str(home / "store")
  cli.run("convert", "--to=hf", "--workdir=~/run", "--output=~/exported", **how)
  assert list(here.iterdir()) == []
  assert {"run", "store", "exported"} <= {path.name for path in home.iterdir()}
  assert "no user has the home folder ~nosuchuser" in cli.complaint("generate", "--workdir=~nosuchuser/x", **how)


def test_a_runs_recorded_paths_are_found_from_any_folder(tmp_path, monkeypatch):
  here, there = tmp_path / "here", tmp_path / "there"
  here.mkdir(), there.mkdir()
  monkeypatch.chdir(here)
  source = tiny_config(pauses=1)
  source.data.store = "stores/s"
  records = [runs.config_record(freeze(source)) for freeze in (resolve, configs.freeze)]
  for record in records:
    assert json.loads(record.text)["data"]["store"] == str(here / "stores" / "s")
  written = training.open_store(configs.freeze(source))
  assert written.path == here / "stores" / "s"
  meta = {"store": written.fingerprint, "store_path": str(written.path)}
  monkeypatch.chdir(there)
  config = configs.freeze(json.loads(records[0].text))
  assert training.run_data.open_recorded_or_new_store(config, meta).path == here / "stores" / "s"
  assert list(there.iterdir()) == []


def test_two_spellings_of_a_path_are_the_same_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  source = tiny_config(pauses=1)
  source.data.update(task="text_files", options="pattern=books/*.txt", tokenizer="my.model")
  relative = configs.to_dict(source)  # in the form that version 0.1 recorded
  source.data.update(options=f"pattern={tmp_path}/books/*.txt", tokenizer=f"{tmp_path}/my.model")
  assert runs.config_record(configs.freeze(source)).differences(relative) == []
  monkeypatch.chdir("/")
  assert len(runs.config_record(configs.freeze(source)).differences(relative)) == 2


def test_a_relative_store_of_version_0_1_is_not_prepared_again(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  source = tiny_config(pauses=1)
  source.data.store = "s"
  config = configs.freeze(source)
  store = prepare("synthetic_lookups", "bytes", "s", options={"documents": 64})
  meta = {"store": store.fingerprint, "store_path": "s"}
  assert training.run_data.open_recorded_or_new_store(config, meta).fingerprint == store.fingerprint
  (tmp_path / "there").mkdir()
  monkeypatch.chdir(tmp_path / "there")
  with pytest.raises(InputError, match=rf"records the relative path 's', and {tmp_path}/there/s is not a token store"):
    training.run_data.open_recorded_or_new_store(config, meta)
  assert list((tmp_path / "there").iterdir()) == []
  # The fingerprint identifies the store if the recorded path is still valid.
  found = training.run_data.open_recorded_or_new_store(config, meta | {"store_path": str(tmp_path / "s")})
  assert found.path == tmp_path / "s"


def test_every_path_of_a_config(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", "/home/ann")
  source = {
    "init_from": "weights",
    "data": {
      "store": "~/s", "tokenizer": "t.model", "options": "unit=line,pattern=books/*.txt, path=a.jsonl,data_dir=gs://b/c",
      "mixture": "imdb_reviews:2,stores/a,jsonl(pattern=x\\,y.jsonl):.5",
    },
  }  # fmt: skip
  assert runs.with_absolute_paths(source) == {
    "init_from": f"{tmp_path}/weights",
    "data": {
      "store": "/home/ann/s",
      "tokenizer": f"{tmp_path}/t.model",
      "options": f"unit=line,pattern={tmp_path}/books/*.txt,path={tmp_path}/a.jsonl,data_dir=gs://b/c",
      "mixture": f"imdb_reviews:2.0,{tmp_path}/stores/a:1.0,jsonl(pattern={tmp_path}/x\\,y.jsonl):0.5",
    },
  }
  for tokenizer in ("", "bytes", "sentencepiece:8192"):
    named = {"data": {"store": "", "tokenizer": tokenizer, "options": ""}, "init_from": ""}
    assert runs.with_absolute_paths(named) == named
  study = Options(config="my.py", settings=["ap"], rates=["1"], seeds=1, steps=1, jobs=1, fields=["data.store=s"])
  assert study.identity["config"] == f"{tmp_path}/my.py"
  assert study.identity["fields"] == [f"data.store={tmp_path}/s"]


def test_a_relative_and_an_absolute_pattern_are_the_same_task(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "books").mkdir()
  (tmp_path / "books" / "a.txt").write_text("one\ntwo\nthree\n" * 3)
  spellings = ("books/*.txt", "./books//*.txt", f"{tmp_path}/books/*.txt", "books/../books/*.txt")
  tasks = [open_task("text_files", {"pattern": pattern, "unit": "line"}) for pattern in spellings]
  assert all((task.options, task.identity) == (tasks[0].options, tasks[0].identity) for task in tasks)
  assert tasks[0].options["pattern"] == f"{tmp_path}/books/*.txt"


def test_a_store_of_version_0_1_with_a_relative_pattern_is_accepted(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(400)))
  options = {"pattern": "a.txt", "unit": "line"}
  with monkeypatch.context() as old:
    for module in ("cyb_jax.data.tasks.options", "cyb_jax.data.tasks"):
      old.setattr(f"{module}.with_absolute_paths", dict)
    store = prepare("text_files", "bytes", "s", options=options)
  assert store.description["options"]["pattern"] == "a.txt"
  assert prepare("text_files", "bytes", "s", options=options).fingerprint == store.fingerprint
  source = tiny_config(pauses=1)
  source.data.update(task="text_files", store="s", options="pattern=a.txt,unit=line")
  assert training.open_store(resolve(source)).fingerprint == store.fingerprint
