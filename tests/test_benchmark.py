"""The benchmarks run, say what they are asked for, and refuse what they don't know."""

import cli


def test_readout():
  result, _ = cli.run(
    "benchmark", "readout", "--slots=4096", "--width=16", "--vocabulary=1001", "--timed_slots=64", "--repeats=1"
  )
  assert result["temporary_bytes"] > 0
  assert result["dense_temporary_gib"] > 4096 * 1001 * 4 / 2**30
  assert result["timing"]["chunked_seconds"] > 0


def test_data():
  result, _ = cli.run("benchmark", "data", "--sequence_length=16", "--batch_size=4", "--repeats=1")
  assert result["timing"]["tokens_per_second"] > 0


def test_bad_input():
  assert "'speed' is none of readout, data, faults" in cli.complaint("benchmark", "speed")
  assert "--slots: 3 must be a positive multiple of 4" in cli.complaint("benchmark", "readout", "--slots=3")
  assert "--repeats: 0" in cli.complaint("benchmark", "data", "--repeats=0")
