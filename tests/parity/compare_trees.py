"""Shows that two checkouts compute the same numbers: every setting, and variants of it, trained, evaluated and sampled.

    python tests/parity/compare_trees.py --before=DIR --after=DIR [--only=SETTING,...] [--workers=N] [--output=DIR]

Every run of `all_runs` is made in both trees, on one CPU device or on eight: it trains three steps, and is then read by
cyb-evaluate and cyb-generate. What is compared is public: metrics.jsonl and evaluation.json, every array of the last
checkpoint (Adam's moments hold the gradients), and what the programs print. The tree `after` must also go on from
folders that `before` has written: it reads a copy of one, and it continues a run that `before` has left after its first
step. The config is built by the tree's own experiments/quickstart.py and by flags, and nothing in Python is assumed.

One JSON line is printed for each run, and one for all of them. The exit code is 0 where everything is equal bit for
bit, or within 1e-6 of the largest number in its array. Results are kept in --output by a digest of the tree's sources,
so that a tree is run once. Without --after the results of `before` are made, and nothing is compared.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback

import numpy as np
import tensorstore

TOLERANCE = 1e-6
SECONDS = 1800  # A program that takes longer hangs.
# See tests/conftest.py. The number of threads is fixed, since it may decide in which order sums are taken.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
THREADS = {1: 2, 8: 32}

BASE = """
data.task=text_files data.tokenizer=bytes data.sequence_length=20 data.batch_size=8 precision.activations=float32
decoder.num_layers=2 decoder.d_model=32 decoder.num_heads=2 decoder.num_kv_heads=2 decoder.head_size=16
decoder.mlp_size=48 optimizer.learning_rate=0.01 optimizer.epsilon=0.001 train.log_every=1 train.eval_every=2
train.eval_limit=4 train.checkpoint_every=1 train.keep=3 train.tensorboard=False
"""
QUESTIONS = "data.task=synthetic_questions data.options=documents=64 data.sequence_length=64"
# What may stand behind a setting and a colon, several of them with plus signs between them.
VARIANTS = {
  "documents": "data.document_mask=True",
  "pmap": "parallelism.strategy=pmap",
  "mesh": "parallelism.data=2 parallelism.fsdp=2 parallelism.tensor=2",
  "chunk": "parallelism.chunk_size=16",
  "accumulate": "optimizer.accumulate=2",
  "scan": "decoder.scan_layers=True",
  "remat": "decoder.remat=full",
  "cap": "decoder.tied_embeddings=False decoder.soft_cap=4.0",
  "gpt": "decoder.norm=layernorm decoder.gated_mlp=False decoder.activation=gelu_tanh decoder.attention_bias=all"
  " decoder.mlp_bias=True decoder.parallel_residual=True decoder.rope_fraction=0.5 decoder.num_kv_heads=1",
  "layers4": "decoder.num_layers=4",
  "tuned": "decoder.preset= data.tokenizer=",
  "lora": "decoder.preset= data.tokenizer= tuning.weights=lora tuning.lora_rank=2 tuning.lora_targets=query,value,up",
  "new": "decoder.preset= data.tokenizer= tuning.weights=new tuning.new_rate=2.0",
  "calibrated": "method.calibration_batches=2 method.stopping_warmup=2",
  "noprior": "",  # See WITHOUT_PRIOR.
  "pause": "method.pause_input=pause",
  "hidden": "method.pause_visibility=hidden",
  "shifting": "method.pause_positions=shifting",
  "shared": "method.pause_shared=True",
  "offset": "method.pause_offset=True",
  "unit": "method.dont_know=unit",
  "gamma": "method.gamma=linear:0.8",
  "sampled": "method.recipe=sampled method.omega=1:1:1:1",
  "on_policy": "method.recipe=on_policy",
  "budget": "method.slot_budget=2.0",
  "floor": "method.policy_floor=0.4",
  "omega": "method.omega=4:1:1:4",
  "pauses0": "method.pauses=0",
  "pauses3": "method.pauses=3",
  "prefix": f"method.pause_places=prefix {QUESTIONS}",
  "none": "method.pause_places=none",
  "fraction": "method.pause_fraction=0.3",
  "jacobi": "method.jacobi=1:1",
  "unpruned": "method.prune_below=0.0",
  "pruned": "method.prune_below=0.2",
  "states": "method.combine=states",
  "forks": "method.fork_layers=2:3",
}
# A config file, since no flag can set what is a number to None.
WITHOUT_PRIOR = """
import os
import runpy

def get_config(argument=""):
  config = runpy.run_path(os.environ["QUICKSTART"])["get_config"](argument)
  config.method.dont_know_prior = None
  return config
"""
ON_EIGHT = {"pmap", "mesh"}
STARTED = {"tuned", "lora", "new"}
# The variants of each setting that are run, beside the setting as it is.
GRID = {
  "pretrained": "tuned",
  "baseline": "documents pmap mesh lora scan accumulate cap gpt",
  "tbys3": "documents pause hidden shifting shared+shifting offset hidden+shifting pmap mesh lora new scan accumulate",
  "ap": "documents pause pause+hidden shifting offset hidden+documents noprior gamma gamma+unit pmap mesh chunk lora"
  " new tuned+calibrated scan remat accumulate cap cap+mesh gpt",
  "ap_unit": "pause hidden noprior mesh cap new tuned+calibrated sampled on_policy+budget",
  "ap_hidden": "shifting mesh scan",
  "ap_shared": "mesh new",
  "ap_uniform": "gamma+unit mesh",
  "va_early": "pause unit mesh",
  "dp_early_strong": "pause unit mesh accumulate",
  "ap_sampled": "documents hidden offset unit budget omega gamma pmap mesh lora scan accumulate",
  "ap_on_policy": "documents hidden unit budget floor pmap mesh scan accumulate",
  "constant_stop": "documents hidden noprior mesh new accumulate",
  "mean_slots": "documents hidden+shifting mesh new accumulate",
  "looped": "documents pmap mesh lora scan accumulate cap",
  "pause_training": "documents pmap mesh lora new scan accumulate fraction pauses0 prefix prefix+documents prefix+mesh"
  " none none+pauses0",
  "ponderlm2": "documents pmap mesh lora scan accumulate pauses3 jacobi",
  "ponderlm3": "documents pmap mesh lora new scan accumulate jacobi unpruned pruned",
  "thoughtbubbles": "documents pmap mesh lora accumulate cap states states+mesh states+documents layers4+forks",
  "thoughtbubbles4": "layers4",
  "copy_k": "documents pmap mesh lora scan accumulate",
}
MATCHED = ("deeper@ap", "wider@ap/training", "deeper@ponderlm2")
# What changes how a run is trained, and not how it is read.
IN_TRAINING = {"pmap", "mesh", "chunk", "remat", "accumulate", "tuned", "lora", "new", "calibrated"}
# How a trained run is read: {omega} is a uniform world of as many slots as the evaluation has. Refusals count too.
READ = {
  "evaluate": "evaluate --split=test",
  "evaluate_omega": "evaluate --omega={omega}",
  "evaluate_self_paced": "evaluate --context=self_paced",
  "generate": "generate --seed=1",
  "generate_self_paced_greedy": "generate --mode=self_paced --temperature=0 --read=threshold",
  "generate_self_paced": "generate --mode=self_paced --seed=2 --top_k=60 --top_p=0.9",
  "generate_denied": "generate --mode=self_paced --seed=3 --omega={omega} --pause_budget=6 --prompt_pauses=all",
  "generate_constant_greedy": "generate --mode=constant --temperature=0 --read=threshold",
  "generate_constant": "generate --mode=constant --seed=4 --read=mixture",
  "generate_none_greedy": "generate --mode=none --temperature=0",
  "generate_none": "generate --mode=none --seed=5",
  "generate_pauses": "generate --pauses=3 --seed=6",
}
# Of runs whose variants are all IN_TRAINING, and of copied folders.
BRIEF = ("evaluate", "evaluate_self_paced", "generate")
PROMPTS = ("--prompt=the film", "--prompt=so good and", "--nostream")
CLOCK = ("timing", "tokens_per_second", "slots_per_second", "seconds")


@dataclasses.dataclass(frozen=True)
class Run:
  """A setting with its variants, such as 'ap:hidden+mesh'."""

  name: str

  @property
  def variants(self) -> list[str]:
    return [name for name in self.name.partition(":")[2].split("+") if name]

  @property
  def setting(self) -> str:
    return self.name.partition(":")[0]

  @property
  def source(self) -> "Run | None":
    """The run that it starts from."""
    plain = "baseline_small" if self.setting.startswith("ponder") else "baseline"
    return Run(plain) if STARTED & set(self.variants) else None

  @property
  def devices(self) -> int:
    return 8 if ON_EIGHT & set(self.variants) else 1

  @property
  def names(self) -> set[str]:
    """What --only may call it."""
    return {self.setting, self.name if self.variants else f"{self.name}:"}

  @property
  def folder(self) -> str:
    return self.name.replace("/", "-")

  @property
  def readings(self) -> list[str]:
    """Which of READ it is read by."""
    if self.variants and set(self.variants) <= IN_TRAINING:
      return list(BRIEF)
    return [name for name in READ if name != "generate_pauses" or self.setting == "pause_training"]

  @property
  def fields(self) -> list[str]:
    """What is set of the config, but for places."""
    steps = [] if self.setting == "pretrained" else ["train.steps=3"]
    return [*BASE.split(), *steps, *(field for name in self.variants for field in VARIANTS[name].split())]


def all_runs(settings: list[str]) -> list[Run]:
  """Every setting, and behind it its variants."""
  names = [(setting, "") for setting in (*settings, *MATCHED)]
  names += [(setting, f":{variants}") for setting, row in GRID.items() for variants in row.split()]
  return [Run(setting + variants) for setting, variants in sorted(names, key=lambda name: bool(name[1]))]


def serve(prefix: str) -> None:
  """Runs programs, each in a fork of this process, which has made the imports; one JSON object a line, in and out."""
  for name in ("jax", "flax.linen", "optax", "orbax.checkpoint", "ml_collections.config_flags"):
    importlib.import_module(name)
  for name in ("training", "evaluation", "generation", "pretrained", "interop"):
    with contextlib.suppress(ImportError):
      importlib.import_module(f"cyb_jax.{name}")
  programs = {name: importlib.import_module(prefix + name) for name in ("train", "evaluate", "generate")}
  print(json.dumps(programs["train"].__file__), flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
      _become(programs[asked["program"]], asked)
    until = time.monotonic() + SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
      time.sleep(0.02)
    if not ended[0]:
      os.kill(child, signal.SIGKILL)
      ended = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(ended[1])), flush=True)


def _become(program, asked: dict) -> None:
  """Ends this process with a program's exit code."""
  for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
  os.environ.update(asked["env"])
  sys.argv = [asked["program"], *asked["flags"]]
  code = 1
  try:
    program.run()
  except SystemExit as error:
    code = error.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Tree:
  """A checkout, and the folder in which its results are kept.

  Args:
    path: the checkout.
    role: 'before' or 'after'.
    output: what holds the results of all trees.
  """

  def __init__(self, path: str, role: str, output: pathlib.Path):
    self.path, self.role, self.output = pathlib.Path(path).resolve(), role, output
    self.sources = self.digest()
    self.folder = output / f"{role}-{self.sources}"
    self.prefix = "cyb_jax.cli." if (self.path / "cyb_jax" / "cli" / "train.py").exists() else "cyb_jax."
    self.quickstart = self.path / "experiments" / "quickstart.py"
    self._servers: queue.Queue = queue.Queue()

  def digest(self) -> str:
    """Of all sources, and of the version of jax."""
    found = hashlib.sha256(importlib.metadata.version("jax").encode())
    for path in sorted(path for part in ("cyb_jax", "experiments") for path in (self.path / part).rglob("*.py")):
      found.update(f"{path.relative_to(self.path)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]

  @functools.cached_property
  def environment(self) -> dict[str, str]:
    own = {"PYTHONPATH": str(self.path), "XDG_CACHE_HOME": str(self.folder / "cache"), "JAX_PLATFORMS": "cpu"}
    own |= {"JAX_COMPILATION_CACHE_DIR": str(self.output / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "QUICKSTART": str(self.quickstart)}
    return os.environ | own

  def settings(self) -> list[str]:
    """The names of its settings."""
    find = "try: from cyb_jax.studies import settings\nexcept ImportError: from cyb_jax import settings\n"
    find += "import json; print(json.dumps(list(settings.SETTINGS)))"
    found = subprocess.run([sys.executable, "-c", find], env=self.environment, cwd="/", capture_output=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])

  def call(self, program: str, flags: list[str], devices: int, log: pathlib.Path) -> dict:
    """Runs a program: its exit code, and the JSON object of its last line where it has one."""
    count = f" --xla_force_host_platform_device_count={devices}"
    log.parent.mkdir(parents=True, exist_ok=True)
    asked = {"program": program, "flags": flags, "out": f"{log}.out", "err": f"{log}.err"}
    asked["env"] = {"XLA_FLAGS": XLA_FLAGS + count, "NPROC": str(THREADS[devices])}
    try:
      server = self._servers.get_nowait()
    except queue.Empty:
      command = [sys.executable, "-P", __file__, f"--serve={self.prefix}"]
      pipe = subprocess.PIPE
      server = subprocess.Popen(command, env=self.environment, cwd="/", stdin=pipe, stdout=pipe, text=True)
      imported = json.loads(server.stdout.readline())
      if not pathlib.Path(imported).is_relative_to(self.path):
        sys.exit(f"error: {imported} was imported, which is not of {self.path}")
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    code = json.loads(server.stdout.readline())
    self._servers.put(server)
    lines = pathlib.Path(asked["out"]).read_text(errors="replace").strip().splitlines()
    return {"exit": code, "result": timeless(json.loads(lines[-1])) if lines and not code else None}

  def train(self, run: Run, workdir: pathlib.Path, source: pathlib.Path | None, log: pathlib.Path) -> dict[str, dict]:
    """Trains a run, or continues it, and gives what its folder then holds, by kind."""
    config = self.output / "without_prior.py" if "noprior" in run.variants else self.quickstart
    flags = [f"--config={config}:{run.setting}", f"--workdir={workdir}"]
    flags.append(f"--config.data.options=pattern={self.output}/corpus.txt,unit=line")
    flags += [f"--config.{field}" for field in run.fields]
    if source:
      flags.append(f"--config.init_from={source}")
    found = {"train": self.call("train", flags, run.devices, log)}
    if not found["train"]["exit"]:
      found["metrics"] = [timeless(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
      found["evaluation"] = timeless(json.loads((workdir / "evaluation.json").read_text()))
      checkpoint = workdir / "checkpoints" / str(max(_steps(workdir)))
      found["meta"] = json.loads((checkpoint / "meta" / "metadata").read_text())
      found["meta"] = {k: v for k, v in found["meta"].items() if k not in ("store_path", "version")}
      found |= read_arrays(checkpoint / "state")
    return found

  def read(self, run: Run, workdir: pathlib.Path, slots: int, names: list[str], log: pathlib.Path) -> dict[str, dict]:
    """What evaluations and samples of a trained run come to, by kind."""
    found = {}
    for name in names:
      program, *flags = READ[name].format(omega=":".join("1" * slots)).split()
      flags += [f"--workdir={workdir}", *(PROMPTS if program == "generate" else ())]
      found[name] = self.call(program, flags, run.devices, log / name)
    return found

  def results(self, run: Run, before: "Tree | None" = None) -> dict:
    """Everything of a run, by kind; it is made where it isn't there yet, by one process at a time.

    Args:
      run: one of `all_runs`.
      before: the tree whose folders are gone on from, and whose runs others start from.
    """
    self.folder.mkdir(exist_ok=True)
    with (self.folder / f".{run.folder}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      return self._results(run, before)

  def _results(self, run: Run, before: "Tree | None") -> dict:
    folder = self.folder / run.folder
    record, arrays, workdir = folder / "record.json", folder / "arrays.npz", folder / "run"
    identity = [run.fields, {name: READ[name] for name in run.readings}, list(PROMPTS), run.devices]
    kept = json.loads(record.read_text()) if record.exists() else {}
    if kept.get("identity") != identity or kept["failed"]:
      # The same path in both trees, so that their configs are the same.
      source = (before or self).folder / run.source.folder / "run" if run.source else None
      shutil.rmtree(folder, ignore_errors=True)
      start = time.monotonic()
      found = self.train(run, workdir, source, folder / "log" / "train")
      if not found["train"]["exit"]:
        slots = len(found["evaluation"]["latency"])
        names = [name for name in run.readings if slots > 1 or "{omega}" not in READ[name]]
        found |= self.read(run, workdir, slots, names, folder / "log")
        found["config"] = json.loads((workdir / "config.json").read_text())
        if before:
          found |= self._gone_on(run, before.folder / run.folder / "run", source, slots, folder)
          shutil.rmtree(workdir)
      failed = any("exit" in value and _failed(kind, value["exit"]) for kind, value in found.items())
      packed = {f"{kind}/{name}": a for kind, value in found.items() if _is_arrays(value) for name, a in value.items()}
      np.savez(arrays, **packed)
      kept = {"identity": identity, "failed": failed, "seconds": time.monotonic() - start}
      kept["found"] = {kind: value for kind, value in found.items() if not _is_arrays(value)}
      record.with_suffix(".partial").write_text(json.dumps(kept))
      record.with_suffix(".partial").rename(record)
    found = kept["found"]
    with np.load(arrays) as packed:
      for name in packed:
        kind, _, path = name.partition("/")
        found.setdefault(kind, {})[path] = packed[name]
    return found

  def _gone_on(self, run: Run, old: pathlib.Path, source, slots: int, folder: pathlib.Path) -> dict:
    """What this tree makes of a folder that another has written: it is read, and then continued from its first step."""
    copy = folder / "copy"
    if not old.exists():
      return {}
    shutil.copytree(old, copy)
    read = self.read(run, copy, slots, list(BRIEF), folder / "log" / "copy")
    found = {f"copied_{name}": value for name, value in read.items()}
    first, *later = sorted(_steps(copy))
    if later:
      for step in later:
        shutil.rmtree(copy / "checkpoints" / str(step))
      (copy / "evaluation.json").unlink()
      lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
      (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= first))
      continued = self.train(run, copy, source, folder / "log" / "continued")
      found |= {f"continued_{name}": value for name, value in continued.items()}
    shutil.rmtree(copy)
    return found

  def close(self) -> None:
    """Ends the processes that programs were forked from."""
    while not self._servers.empty():
      server = self._servers.get()
      server.stdin.close()
      server.wait()


def _steps(workdir: pathlib.Path) -> list[int]:
  return [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()]


def _failed(kind: str, code: int) -> bool:
  """Whether a program has ended as it should never do; refusing what a method hasn't got is a result."""
  return code not in (0, 2) or (bool(code) and kind in ("train", "continued_train"))


def _is_arrays(value) -> bool:
  return isinstance(value, dict) and bool(value) and all(isinstance(leaf, np.ndarray) for leaf in value.values())


def read_arrays(state: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """The arrays of a checkpoint in three groups: parameters, the optimizer's moments, and the rest."""
  store = {"driver": "ocdbt", "base": f"file://{state}/"}
  keys = tensorstore.KvStore.open(store).result().list().result()
  found: dict[str, dict] = {"parameters": {}, "optimizer": {}, "state": {}}
  for name in sorted({key.decode().rpartition("/")[0] for key in keys}):
    array = tensorstore.open({"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}, open=True).result()
    kind = {"params": "parameters", "opt_state": "optimizer"}.get(name.partition(".")[0], "state")
    found[kind][name] = array.read().result()
  return found


def timeless(value):
  """A JSON value without what depends on the clock."""
  if isinstance(value, dict):
    return {name: timeless(inner) for name, inner in value.items() if name not in CLOCK}
  return [timeless(inner) for inner in value] if isinstance(value, list) else value


def leaves(value, path: str = "") -> dict:
  """The leaves of a nested value by path: numbers and lists of numbers as arrays, everything else as JSON."""
  if isinstance(value, np.ndarray):
    return {path: value}
  if not isinstance(value, dict):
    numbers = value if isinstance(value, list) else [value]
    if numbers and all(type(number) in (int, float) for number in numbers):
      return {path: np.asarray(value, np.float64)}
  if not isinstance(value, dict | list) or not value:
    return {path: json.dumps(value)}
  items = value.items() if isinstance(value, dict) else enumerate(value)
  return {name: leaf for key, inner in items for name, leaf in leaves(inner, f"{path}.{key}".strip(".")).items()}


def difference(old, new) -> dict | None:
  """How two values differ; None: not at all.

  `absolute` and `relative` are the largest differences, the latter of the largest number in an array, each with where
  it is; `other` names what is missing, or of another shape, or is no number and differs. A field that is new is no
  difference, but an array of a checkpoint is.
  """
  strict = _is_arrays(new)
  old, new, found = leaves(old), leaves(new), {}
  other = [f"{path}: is new" for path in sorted(new.keys() - old.keys())] if strict else []
  for path, a in old.items():
    b = new.get(path)
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
      other += [] if type(a) is type(b) and a == b else [f"{path}: {str(a)[:80]} -> {str(b)[:80]}"]
    elif a.shape != b.shape or a.dtype != b.dtype:
      other.append(f"{path}: {a.dtype}{list(a.shape)} -> {b.dtype}{list(b.shape)}")
    elif a.tobytes() != b.tobytes():
      a, b = a.astype(np.float64), b.astype(np.float64)
      apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
      scale = max(np.nanmax(np.abs(a)), np.nanmax(np.abs(b)))
      for kind, size in (("absolute", apart.max()), ("relative", apart.max() / scale if apart.any() else 0.0)):
        size = float(np.nan_to_num(size, nan=np.inf))
        if kind not in found or size > found[kind][0]:
          found[kind] = size, path
  return (found | ({"other": other[:5]} if other else {})) or None


def compare(run: Run, old: dict, new: dict) -> dict:
  """The line of a run."""
  identical, apart, added = [], {}, set()
  for kind in sorted({*old, *new} - {"config"}):
    base = kind.removeprefix("copied_").removeprefix("continued_")
    found = difference(old[base], new[kind]) if base in old and kind in new else {"other": ["missing"]}
    if base in old and kind in new:
      added |= leaves(new[kind]).keys() - leaves(old[base]).keys()
    codes = [tree[name]["exit"] for tree, name in ((old, base), (new, kind)) if "exit" in tree.get(name, ())]
    if any(_failed(kind, code) for code in codes):
      found = (found or {}) | {"other": [f"exit codes {codes}", *(found or {}).get("other", [])]}
    if found is None:
      identical.append(kind)
    else:
      apart[kind] = found
  verdict = "within" if apart else "identical"
  if any("other" in found or found["relative"][0] > TOLERANCE for found in apart.values()):
    verdict = "different"
  a, b = (leaves(found.get("config", {})) for found in (old, new))
  config = [f"{name}: {a.get(name)} -> {b.get(name)}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
  line = {"run": run.name, "setting": run.setting, "verdict": verdict, "kinds": len(identical) + len(apart)}
  return line | {"identical": identical if apart else "all", "apart": apart, "added": sorted(added), "config": config}


def _default_output() -> str:
  """A folder in the user's cache, so that nothing is written into a checkout, which is the working directory."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
  return os.path.join(cache, "cyb_jax-compare-trees")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--before", help="the checkout whose numbers are right")
  parser.add_argument("--after", help="the checkout that is to have the same; not given: nothing is compared")
  parser.add_argument(
    "--only", default="", help="with commas: SETTING, with all its variants; SETTING:VARIANT; SETTING: alone"
  )
  parser.add_argument("--workers", type=int, default=1, help="runs at a time")
  parser.add_argument("--output", default=_default_output(), help="where results are kept (default: %(default)s)")
  parser.add_argument("--list", action="store_true", help="print the names of the runs, and end")
  parser.add_argument("--serve", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    return serve(args.serve)
  output = pathlib.Path(args.output).resolve()
  output.mkdir(parents=True, exist_ok=True)
  draw = random.Random(0)
  words = ["the", "a", "film", "was", "so", "good", "bad", "old", "and", "of", "long", "in", "it", "we", "saw", "one"]
  lines = [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(900)]
  for name, text in (("corpus.txt", "\n".join(lines) + "\n"), ("without_prior.py", WITHOUT_PRIOR)):
    path = output / name
    if not path.exists() or path.read_text() != text:  # Another comparison may be reading it.
      path.write_text(text)
  before = Tree(args.before, "before", output)
  after = Tree(args.after, "after", output) if args.after else None
  settings = before.settings()
  new = sorted(set(after.settings()) - set(settings)) if after else []
  runs, only = all_runs(settings), set(filter(None, args.only.split(",")))
  unknown = only - {name for run in runs for name in run.names}
  if unknown:
    sys.exit(f"error: --only: there is no {', '.join(sorted(unknown))}; see --list")
  runs = [run for run in runs if not only or run.names & only]
  if args.list:
    return print("\n".join(run.name for run in runs))

  def one(run: Run) -> dict:
    start = time.monotonic()
    old = before.results(run)
    line = compare(run, old, after.results(run, before) if after else old)
    if not after:
      line = {"run": run.name, "verdict": "recorded"} if line["verdict"] == "identical" else line
    return line | {"seconds": round(time.monotonic() - start, 1)}

  verdicts: dict[str, list[str]] = {"identical": [], "within": [], "different": [], "recorded": []}
  for source in dict.fromkeys(run.source for run in runs if run.source):
    before.results(source)
  with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
    for line in pool.map(one, runs):
      print(json.dumps(line), flush=True)
      verdicts[line["verdict"]].append(line["run"])
  changed = [tree.role for tree in (before, after) if tree and tree.digest() != tree.sources]
  counts = {"identical": len(verdicts["identical"]), "within_1e-6": len(verdicts["within"])}
  counts = {"runs": len(runs)} | (counts if after else {"recorded": len(verdicts["recorded"])})
  print(json.dumps(counts | {"different": verdicts["different"], "new_settings": new, "changed_meanwhile": changed}))
  for tree in (before, after):
    if tree:
      tree.close()
  sys.exit(bool(verdicts["different"] or changed))


if __name__ == "__main__":
  main()
