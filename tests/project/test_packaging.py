"""The installed files, the imports, and the metadata of the package."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import cli
import pytest
from models import tiny_config

from cyb_jax import configs, data

ROOT = cli.ROOT


def python(code, **options):
  return subprocess.run(
    [sys.executable, "-c", code],
    env=cli.environment(),
    cwd=ROOT,
    text=True,
    capture_output=True,
    check=False,
    **options,
  )


def test_all_packages_are_listed():
  listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
  found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "cyb_jax").rglob("__init__.py")}
  assert set(listed) == found | {"cyb_jax.experiments"}


def test_version_and_py_typed_marker():
  import cyb_jax

  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert cyb_jax.__version__ == project["version"]
  assert (ROOT / "cyb_jax" / "py.typed").exists()


def test_files_that_are_no_code_are_package_data():
  """A file that is not listed is missing from the wheel."""
  listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
  files = [path for path in (ROOT / "cyb_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
  assert {str(path.relative_to(ROOT / "cyb_jax")) for path in files if path.suffix != ".py"} == set(listed["cyb_jax"])


def test_classifiers_name_the_interpreters_from_the_oldest_on():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  prefix = "Programming Language :: Python :: 3."
  minors = [int(line.removeprefix(prefix)) for line in project["classifiers"] if line.startswith(prefix)]
  assert project["requires-python"] == f">=3.{minors[0]}"
  assert minors == list(range(minors[0], minors[-1] + 1))
  assert len(project["description"]) <= 120


def test_one_version_and_one_licence():
  yaml = pytest.importorskip("yaml")
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["version"] == project["version"]
  assert citation["license"] == project["license"]
  assert citation["references"][0]["url"] == project["urls"]["Paper"]
  assert [name for name in project["license-files"] if not (ROOT / name).is_file()] == []


def text_files():
  """The files that may name the project's address."""
  folders = ("docs", "experiments", "launch", "notebooks", "cyb_jax", ".github")
  suffixes = {".md", ".py", ".toml", ".yml", ".yaml", ".cff", ".ipynb", ".sh"}
  for path in [*ROOT.iterdir(), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]:
    if path.is_file() and path.suffix in suffixes:
      yield path


def test_one_address():
  """pyproject.toml has the project's address, in one marked place; other files have it from there."""
  yaml = pytest.importorskip("yaml")
  pyproject = (ROOT / "pyproject.toml").read_text()
  assert [line[:13] for line in pyproject.splitlines() if "REPOSITORY" in line] == ["# REPOSITORY:"]
  # '' while the project has none.
  address = tomllib.loads(pyproject)["project"]["urls"].get("Repository", "")
  assert yaml.safe_load((ROOT / "CITATION.cff").read_text()).get("repository-code", "") == address
  assert "repo_url" not in (ROOT / "mkdocs.yml").read_text(), "docs/_site/hooks.py sets it"
  for path in (ROOT / "notebooks").glob("*.ipynb"):
    text = "".join("".join(cell["source"]) + "\n" for cell in json.loads(path.read_text())["cells"])
    assert f'repository = "{address}"' in text, path
  examples = {"https://HOST/OWNER/cyb_jax", "https://.../cyb_jax"}
  for path in text_files():
    for found in re.findall(r"https?://[^\s\"'()<>\\]*/cyb_jax\b", path.read_text()):
      assert found in {address, *examples}, path


def test_pre_commit_runs_the_pinned_ruff():
  yaml = pytest.importorskip("yaml")
  (ruff,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ruff==")]
  (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
  assert [hook["additional_dependencies"] for hook in local["hooks"]] == [[ruff], [ruff]]


def test_the_hosted_workflow_runs_what_ci_runs():
  yaml = pytest.importorskip("yaml")
  jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
  steps = [step.get("run") for job in jobs.values() for step in job["steps"]]
  assert {".ci/run", "make docs"} <= set(steps)
  assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  for version in jobs["check"]["strategy"]["matrix"]["python"]:
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]


def test_the_core_needs_only_jax():
  """All other dependencies of the package are made unimportable."""
  code = (
    "import sys\n"
    "for name in ('flax', 'optax', 'orbax', 'ml_collections', 'absl', 'etils', 'jaxtyping', 'seqio', 'tensorflow'):\n"
    "  sys.modules[name] = None\n"
    "import cyb_jax.stopping, cyb_jax.losses, cyb_jax.pauses, cyb_jax.readout, cyb_jax\n"
    "print(cyb_jax.__version__)"
  )
  done = python(code)
  assert done.returncode == 0, done.stderr


def test_public_names_are_imported_on_use():
  code = (
    "import sys, cyb_jax\n"
    "assert 'jax' not in sys.modules\n"
    "assert cyb_jax.losses.cyb and cyb_jax.SlotScores.from_logits and callable(cyb_jax.load)\n"
    "from cyb_jax import *\n"
    "assert SlotScores is cyb_jax.stopping.SlotScores\n"
    "assert not hasattr(cyb_jax, 'other')\n"
  )
  done = python(code)
  assert done.returncode == 0, done.stderr


def test_training_from_a_store_needs_no_tensorflow(tmp_path):
  store = data.prepare("synthetic_sums", "bytes", tmp_path / "store", options={"documents": 64})
  config = tiny_config(pauses=1)
  config.data.update(task="synthetic_sums", options="", store=str(store.path))
  config.train.update(steps=2, eval_every=0, trackers="tensorboard")
  (tmp_path / "config.json").write_text(configs.to_json(configs.freeze(config)))
  code = (
    "import json, sys\n"
    "for name in ('tensorflow', 'seqio', 'tensorflow_datasets', 'tensorflow_text'):\n"
    "  sys.modules[name] = None\n"
    "import cyb_jax\n"
    "from cyb_jax import configs, training\n"
    f"source = json.load(open({str(tmp_path / 'config.json')!r}))\n"
    f"print(training.train(configs.freeze(source), {str(tmp_path / 'run')!r})['tokens'])\n"
    f"cyb_jax.load({str(tmp_path / 'run')!r})\n"
  )
  done = python(code)
  assert done.returncode == 0, done.stderr[-3000:]
  assert int(done.stdout) == store.num_tokens("validation") - 1


def test_imports_do_not_fetch_or_create_anything(tmp_path):
  """No module uses the network, the disk or a device when it is imported."""
  code = (
    "import socket, sys\n"
    "def no(*a, **k): raise OSError('network at import')\n"
    "socket.socket.connect = no\n"
    "import cyb_jax.cli.train, cyb_jax.cli.evaluate, cyb_jax.cli.prepare, cyb_jax.cli.benchmark\n"
    "import cyb_jax.training, cyb_jax.data\n"
    "from absl import flags; assert 'workdir' not in flags.FLAGS\n"
    "import jax\n"
    "assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules\n"
    "assert not jax._src.xla_bridge._backends, 'a backend was started'\n"
  )
  done = python(code)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path):
  """Built, installed into a folder of its own beside this venv's dependencies, and run from elsewhere."""
  # A copy: building writes build/ into the folder.
  for name in ("cyb_jax", "experiments", "tests"):
    shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
    shutil.copy(ROOT / name, tmp_path / "copy")
  command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "copy"]
  subprocess.run(command, check=True)
  (wheel,) = tmp_path.glob("*.whl")
  modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cyb_jax").rglob("*.py")}
  modules |= {f"cyb_jax/experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
  assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == {
    *modules, "cyb_jax/py.typed", *(f"cyb_jax/serving/page/{name}" for name in ("index.html", "page.js", "style.css")),
  }  # fmt: skip
  target = tmp_path / "site"
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel], check=True
  )
  assert not (target / "experiments").exists()
  env = cli.environment() | {"PYTHONPATH": str(target), "XDG_CACHE_HOME": str(tmp_path / "cache")}
  command = [
    sys.executable, "-m", "cyb_jax.cli.train", "--config=experiments/quickstart.py", f"--workdir={tmp_path}/run",
    "--config.data.task=synthetic_sums", "--config.data.tokenizer=bytes", "--config.data.options=documents=50",
    "--config.train.steps=2",
  ]  # fmt: skip
  done = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  assert str(target) in subprocess.run(
    [sys.executable, "-c", "import cyb_jax; print(cyb_jax.__file__)"],
    env=env, cwd=tmp_path, text=True, capture_output=True, check=True,
  ).stdout  # fmt: skip


def test_the_comparison_of_checkouts_writes_into_the_cache(tmp_path, monkeypatch, capsys):
  """Its working directory is usually a checkout, where a result would be committed by mistake."""
  path = ROOT / "tests" / "parity" / "compare_trees.py"
  spec = importlib.util.spec_from_file_location("compare_trees", path)
  compare_trees = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, spec.name, compare_trees)
  spec.loader.exec_module(compare_trees)
  (tmp_path / "checkout").mkdir()
  monkeypatch.chdir(tmp_path / "checkout")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(sys, "argv", [str(path), f"--before={ROOT}", "--list"])
  compare_trees.main()
  assert "baseline" in capsys.readouterr().out.splitlines()
  assert list((tmp_path / "checkout").iterdir()) == []
  assert (tmp_path / "cache" / "cyb_jax-compare-trees" / "corpus.txt").exists()


def test_no_figure_of_this_machine_in_the_files():
  """No absolute home or build folder slips into a document."""
  for path in [
    *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").glob("*"), *(ROOT / "launch").glob("*"),
  ]:  # fmt: skip
    if path.is_file():
      text = path.read_text()
      assert str(pathlib.Path(os.sep, "root", "")) + os.sep not in text, path
