"""The restart of a program with huge pages."""

import os
import subprocess
import sys

import pytest

from cyb_jax.cli import huge_pages

ARGV = ["cyb-train", "--workdir=x"]


@pytest.fixture
def restarted(monkeypatch, tmp_path):
  """The calls of os.execv, with the variable at their time; the kernel gives huge pages on request."""
  calls = []
  kernel = tmp_path / "enabled"
  kernel.write_text("always [madvise] never\n")
  monkeypatch.setattr(huge_pages, "_KERNEL", kernel)
  monkeypatch.setattr(os, "execv", lambda path, argv: calls.append((path, argv, os.environ["GLIBC_TUNABLES"])))
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  return calls


def test_the_same_command_is_executed_with_the_variable(restarted, monkeypatch):
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
  huge_pages.restart_with_huge_pages(ARGV)
  (call,) = restarted
  assert call == (sys.executable, sys.orig_argv, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1")


def test_it_happens_once(restarted):
  huge_pages.restart_with_huge_pages(ARGV)
  huge_pages.restart_with_huge_pages(ARGV)
  assert len(restarted) == 1


@pytest.mark.parametrize("flag", ["--help", "--version", "--completion=bash"])
def test_programs_that_print_a_text_are_not_restarted(restarted, flag):
  huge_pages.restart_with_huge_pages([*ARGV, flag])
  assert not restarted


def test_a_user_can_refuse(restarted, monkeypatch):
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
  huge_pages.restart_with_huge_pages(ARGV)
  assert not restarted


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]", None])
def test_other_kernels_need_no_restart(restarted, monkeypatch, tmp_path, mode):
  kernel = tmp_path / "other"
  if mode:
    kernel.write_text(mode)
  monkeypatch.setattr(huge_pages, "_KERNEL", kernel)
  huge_pages.restart_with_huge_pages(ARGV)
  assert not restarted


def test_a_restarted_program_keeps_arguments_and_exit_code():
  program = [sys.executable, "-m", "cyb_jax.cli.prepare", "--task=a b"]
  done = subprocess.run(program, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "")
  assert "'a b'" in done.stderr
