"""Compilation for TPUs: the parsed text and messages of the compiler, and the compiler itself if installed."""

import importlib
import importlib.util
import json
import math
import os
import subprocess

import cli
import pytest
from models import tiny_config

from cyb_jax import command_line, configs
from cyb_jax.compilation import topologies
from cyb_jax.compilation.memory import refused_bytes
from cyb_jax.compilation.roofline import roofline
from cyb_jax.compilation.traffic import Collective, Traffic, traffic
from cyb_jax.costs import flops
from cyb_jax.errors import InputError
from cyb_jax.partitioning.mesh import check_batch

# A loop of 5 trips, counted by hand: it has an all-reduce of 8 f32 over pairs and an asynchronous one over all 4.
LOOP = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%body (carry: (s32[], f32[8], f32[4])) -> (s32[], f32[8], f32[4]) {
  %carry = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[4]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %copied = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%copied, %one)
  %a = f32[8]{0:T(128)} get-tuple-element(%carry), index=1
  %b = f32[4]{0:T(128)S(1)} get-tuple-element(%carry), index=2
  %reduced = f32[8]{0:T(128)} all-reduce(%a), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %start = f32[4]{0:T(128)S(1)} all-reduce-start(%b), channel_id=2, replica_groups={}, to_apply=%add
  %done = f32[4]{0:T(128)S(1)} all-reduce-done(%start)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[4]{0:T(128)S(1)}) tuple(%next, %reduced, %done)
}

%condition (carry.1: (s32[], f32[8], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %carry.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[4]{0:T(128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[8], q: f32[4]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %q = f32[4]{0:T(128)S(1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %first = s32[]{:T(128)} copy(%zero)
  %begin = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[4]{0:T(128)S(1)}) tuple(%first, %p, %q)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[4]{0:T(128)S(1)}) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_instructions_in_a_loop_count_once_per_trip():
  found = traffic(LOOP)
  assert found.by_kind()["all-reduce"] == {
    "count": 10,
    "bytes": 5 * (8 * 4 + 4 * 4),
    # Over pairs 2 x 1/2, over four 2 x 3/4.
    "sent_bytes": 5 * (32 * 2 / 2 + 16 * 2 * 3 / 4),
  }
  assert found.sent == found.by_kind()["all-reduce"]["sent_bytes"]
  assert found.open_loops == 0
  # HBM: the first all-reduce is read and written, the second is in on-chip memory; the counter's copy reads and writes.
  assert found.hbm_bytes == 5 * (2 * 32 + 4 + 2 * 4) + 2 * 4


def test_attributes_may_span_several_lines():
  kernel = """  %kernel = f32[8]{0} custom-call(%a), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="attend"}
  %reduced ="""
  found = traffic(LOOP.replace("  %reduced =", kernel))
  assert found.by_kind() == traffic(LOOP).by_kind()
  assert found.hbm_bytes == traffic(LOOP).hbm_bytes + 5 * 2 * 32
  # The largest are first. The loop's instructions run five times, and only the kernel names its operation.
  assert [(move.instruction, move.operation, move.times, move.bytes) for move in found.moves] == [
    ("kernel", "attend", 5, 320), ("reduced", "", 5, 320), ("next", "", 5, 40), ("copied", "", 5, 20),
    ("first", "", 1, 8),
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("old", "new", "count"),
  [
    ("constant(5)", "constant(7)", 14),
    ("direction=LT", "direction=LE", 12),
    ("constant(1)", "constant(2)", 6),
    ("constant(0)", "constant(3)", 4),
    ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}', 18),
    # Only the device knows the limit: the body counts once, and a log line says so.
    ("%limit = s32[]{:T(128)} constant(5)", "%limit = s32[]{:T(128)} rng()", 2),
  ],
)
def test_trip_counts(old, new, count):
  found = traffic(LOOP.replace(old, new))
  assert found.by_kind()["all-reduce"]["count"] == count
  assert found.open_loops == (count == 2)


def test_what_one_iteration_of_an_open_loop_moves():
  found = traffic(LOOP.replace("%limit = s32[]{:T(128)} constant(5)", "%limit = s32[]{:T(128)} rng()"))
  # The counter's first copy runs before the loop.
  assert found.iteration().hbm_bytes == 2 * 32 + 4 + 2 * 4
  assert found.hbm_bytes == found.iteration().hbm_bytes + 2 * 4
  assert {move.instruction for move in found.moves} - {move.instruction for move in found.iteration().moves} == {
    "first"
  }
  assert found.iteration().collectives == found.collectives
  assert traffic(LOOP).iteration() == traffic(LOOP)  # all trips are counted


def test_the_largest_branch_of_a_conditional_counts():
  branches = """
%short (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %negated.1 = f32[8]{0} negate(%x.1)
}

%long (x.2: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
  %first.2 = f32[8]{0} negate(%x.2)
  ROOT %second.2 = f32[8]{0} negate(%first.2)
}

ENTRY %main (p: s32[], x: f32[8]) -> f32[8] {
  %p = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %chosen = f32[8]{0} conditional(%p, %x, %x, %x), branch_computations={%short, %long, %short}
}
"""
  found = traffic("HloModule jit_step\n" + branches)
  assert found.hbm_bytes == 2 * 2 * 32
  assert [move.instruction for move in found.moves] == ["first.2", "second.2"]


def test_loops_that_count_down_and_nested_loops():
  down = LOOP.replace("constant(0)", "constant(9)").replace("constant(1)", "constant(-2)")
  down = down.replace("direction=LT", "direction=GT")
  assert traffic(down).by_kind()["all-reduce"]["count"] == 2 * 2  # 9, 7
  # The same loop in the body of another one that runs 5 times.
  outer = LOOP.replace("ENTRY %main", "%inner")
  outer += """
%body.2 (carry.2: (s32[], f32[8], f32[4])) -> (s32[], f32[8], f32[4]) {
  %carry.2 = (s32[], f32[8]{0}, f32[4]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%carry.2), index=0
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one.2)
  %a.2 = f32[8]{0} get-tuple-element(%carry.2), index=1
  %b.2 = f32[4]{0} get-tuple-element(%carry.2), index=2
  %called = f32[8]{0} call(%a.2, %b.2), to_apply=%inner
  ROOT %out.2 = (s32[], f32[8]{0}, f32[4]{0}) tuple(%next.2, %called, %b.2)
}

ENTRY %main (p.3: f32[8], q.3: f32[4]) -> f32[8] {
  %p.3 = f32[8]{0} parameter(0)
  %q.3 = f32[4]{0} parameter(1)
  %zero.3 = s32[] constant(0)
  %begin.3 = (s32[], f32[8]{0}, f32[4]{0}) tuple(%zero.3, %p.3, %q.3)
  %loop.3 = (s32[], f32[8]{0}, f32[4]{0}) while(%begin.3), condition=%condition, body=%body.2
  ROOT %result.3 = f32[8]{0} get-tuple-element(%loop.3), index=1
}
"""
  assert traffic(outer).by_kind()["all-reduce"]["count"] == 5 * 10


KINDS = """\
HloModule jit_step, num_partitions=8

%all-reduce-scatter.1 (input: f32[64]) -> f32[32] {
  %input = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%input), channel_id=7, replica_groups=[4,2]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[32]{0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={32}
}

%begins (from: bf16[16]) -> (bf16[16], bf16[32]) {
  %from = bf16[16]{0} parameter(0)
  %gather.1 = bf16[32]{0} all-gather(%from), channel_id=9, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[16]{0}, bf16[32]{0}) tuple(%from, %gather.1)
}

%ends (from.1: bf16[16], to.1: bf16[32]) -> bf16[32] {
  %from.1 = bf16[16]{0} parameter(0)
  %to.1 = bf16[32]{0} parameter(1)
  ROOT %g = bf16[32]{0} all-gather(%from.1), channel_id=9, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
}

ENTRY %main (a: f32[64], b: bf16[16], c: s8[10]) -> f32[32] {
  %a = f32[64]{0} parameter(0)
  %b = bf16[16]{0} parameter(1)
  %c = s8[10]{0} parameter(2)
  %scattered = f32[32]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %mesh = f32[64]{0} all-reduce(%a), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %part = f32[64]{0} all-reduce(%a), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'x','y':(1)2}, to_apply=%add
  %begin = (bf16[16]{0}, bf16[32]{0}) fusion(%b), kind=kCustom, calls=%begins
  %from = bf16[16]{0} get-tuple-element(%begin), index=0
  %to = bf16[32]{0} get-tuple-element(%begin), index=1
  %end = bf16[32]{0} fusion(%from, %to), kind=kCustom, calls=%ends
  %gathered = (bf16[16]{0}, bf16[128]{0}) all-gather-start(%b), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %done = bf16[128]{0} all-gather-done(%gathered)
  %exchanged = s8[10]{0} all-to-all(%c), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %sent = (s8[10]{0}, s8[10]{0}) collective-permute-start(%c), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %there = s8[10]{0} collective-permute-done(%sent)
  %scatter = f32[8]{0} reduce-scatter(%a), channel_id=6, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  ROOT %out = f32[32]{0} copy(%scattered)
}
"""


def test_every_kind_of_collective_and_every_notation_of_groups():
  found = sorted((c.kind, c.bytes, c.group, c.times) for c in traffic(KINDS).collectives)
  assert found == [
    ("all-gather", 2 * 32, 2, 1),  # executed by two fusions
    ("all-gather", 8 * 32, 8, 1),
    ("all-reduce", 256, 4, 1),
    ("all-reduce", 256, 2 * 2, 1),
    ("all-to-all", 10, 4, 1),
    ("collective-permute", 10, 8, 1),
    ("reduce-scatter", 256, 2, 1),  # an all-reduce of which each device keeps its part
    ("reduce-scatter", 256, 8, 1),
  ]
  by_kind = traffic(KINDS).by_kind()
  assert by_kind["all-reduce"] == {"count": 2, "bytes": 512, "sent_bytes": 2 * 2 * 256 * 3 / 4}
  assert by_kind["all-gather"] == {"count": 2, "bytes": 64 + 256, "sent_bytes": 32 + 224}
  assert by_kind["collective-permute"]["sent_bytes"] == 10


MEMORY = """\
HloModule jit_step

%sliced (stack: f32[10,100], row: s32[]) -> f32[1,100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %row = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %slice.1 = f32[1,100]{1,0} dynamic-slice(%stack, %row, %zero.1), dynamic_slice_sizes={1,100}
}

%updated (stack.2: f32[10,100], row.2: s32[], new: f32[1,100]) -> f32[10,100] {
  %stack.2 = f32[10,100]{1,0} parameter(0)
  %row.2 = s32[] parameter(1)
  %new = f32[1,100]{1,0} parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %update.1 = f32[10,100]{1,0} dynamic-update-slice(%stack.2, %new, %row.2, %zero.2)
}

ENTRY %main (a: f32[10,100], i: s32[]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %chip = f32[1,100]{1,0:T(8,128)S(1)} fusion(%a, %i), kind=kLoop, calls=%sliced
  %stored = f32[1,100]{1,0} negate(%chip)
  %start = (f32[1,100]{1,0:S(1)}, f32[1,100]{1,0}, u32[]) copy-start(%stored)
  %done = f32[1,100]{1,0:S(1)} copy-done(%start)
  ROOT %out = f32[10,100]{1,0} fusion(%a, %i, %stored), kind=kLoop, calls=%updated
}
"""


def test_hbm_bytes_by_hand():
  # A row read; a row written; a row read for the copy to on-chip memory; a row read and written in place.
  assert traffic(MEMORY).hbm_bytes == 400 * 5


def test_roofline_by_hand():
  chip = flops.Chip(peak_flops=100.0, hbm_bytes=10, hbm_bandwidth=10.0, link_bandwidth=5.0)
  moved = Traffic((Collective("all-reduce", 20, 4, 2),), hbm_bytes=30, open_loops=0)
  bound = roofline(chip, 200.0, moved)
  # 2 x 20 bytes; each device sends 3/4 of them twice.
  assert (bound.compute, bound.hbm, bound.interconnect) == (2.0, 3.0, 60 / 5)
  assert (bound.seconds, bound.bound) == (12.0, "interconnect")
  assert roofline(chip, 2000.0, moved).bound == "compute"


@pytest.mark.parametrize(
  ("message", "expected"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.00G) exceeds"
      " available HBM (15.75G).",
      (18 * 2**30, 15.75 * 2**30),
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of"
      " 15.75G hbm. Exceeded hbm capacity by 4.75G.",
      (20.5 * 2**30, 15.75 * 2**30),
    ),
    ("RESOURCE_EXHAUSTED: Used 1.5T of 95.74G hbm.", (1.5 * 2**40, round(95.74 * 2**30))),
    ("RESOURCE_EXHAUSTED: Scoped allocation with size 20.00M exceeded the limit of scoped vmem.", (None, None)),
  ],
)
def test_the_compiler_message_when_memory_runs_out(message, expected):
  assert refused_bytes(message) == expected


def test_topologies():
  assert topologies.check_topology("v5e:4x4") == ("v5e", (4, 4))
  assert topologies.check_topology("v5p:8x8x12") == ("v5p", (8, 8, 12))
  for name in ("v5e:3x3", "v5e", "v5e:2x2x2", "v5p:2x2", "v4:0x4x4", "v4:6x6x6", "v9:2x2", "h100:8", "v5e:4x4;"):
    with pytest.raises(InputError, match=r"^--topology: .* is unknown; v5e and v6e have 1x1, .*v5p:2x2x2"):
      topologies.check_topology(name)


def test_auto_is_bfloat16_for_tpus_and_init_from_may_be_missing():
  from cyb_jax.compilation.steps import for_tpu

  config = tiny_config()
  config.init_from = "nowhere"
  assert configs.freeze(config).activation_dtype == "float32"
  assert for_tpu(config).activation_dtype == "bfloat16"
  config.precision.activations = "float32"
  assert for_tpu(config).activation_dtype == "float32"


def test_bad_input(tmp_path):
  config = f"--config={cli.write_config(tmp_path)}"
  assert cli.complaint("compile", config).startswith("--topology: not given")
  assert cli.complaint("compile", "--topology=v5e:2x2").startswith("--config: not given")
  assert "'v5e:5x5' is unknown" in cli.complaint("compile", config, "--topology=v5e:5x5")
  assert "must be some of train,evaluate,decode" in cli.complaint(
    "compile", config, "--topology=v5e:2x2", "--steps=train,fly"
  )
  assert "--decode_batch: -1" in cli.complaint("compile", config, "--topology=v5e:2x2", "--decode_batch=-1")


def test_without_libtpu_the_error_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "none.so"))
  with pytest.raises(InputError, match=r"^TPU_LIBRARY_PATH: .*none\.so does not exist"):
    topologies.check_libtpu()
  monkeypatch.delenv("TPU_LIBRARY_PATH")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'cyb_jax\[tpu-compile\]'"):
    topologies.open_topology("v5e:2x2")


def _has_libtpu():
  try:
    topologies.check_libtpu()
  except InputError:
    return False
  return True


needs_libtpu = pytest.mark.skipif(not _has_libtpu(), reason="no libtpu: pip install libtpu, or set TPU_LIBRARY_PATH")


def compiled(folder, *options, expect=0):
  """The output of the program, and standard error."""
  command = cli.command("compile", f"--config={cli.write_config(folder)}", "--topology=v5e:2x2", *options)
  # The test covers neither the compiler's own threads nor the CPU settings of the tests.
  env = {name: value for name, value in cli.environment().items() if name != "XLA_FLAGS"}
  done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cli.ROOT)
  assert done.returncode == expect, done.stderr[-4000:]
  return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


@needs_libtpu
def test_pmap_on_several_hosts(tmp_path):
  """In the order of the mesh, which follows the links between chips, the chips of a host are not neighbours."""
  options = ("--topology=v5e:4x4", "--config.data.batch_size=16", "--config.parallelism.strategy=pmap")
  result, _ = compiled(tmp_path, *options, "--steps=train")
  assert (result["hosts"], result["devices"], result["fits"]) == (4, 16, True)


@needs_libtpu
def test_data_parallelism_sums_the_gradient_once(tmp_path):
  """In f32: 8,800 parameters; also tokens, loss, log-likelihood, three shares, slots, dropped tokens."""
  options = ("--config.precision.activations=float32", "--config.decoder.attention=xla")
  sums, table = 4 * 8800 + 4 * 8, 4 * 384 * 16
  result, err = compiled(tmp_path, *options, "--steps=train", "--config.parallelism.strategy=pmap")
  assert result["parameters"] == 8800
  assert result["train"]["collectives"]["all-reduce"]["bytes"] == sums
  assert result["train"]["sent_bytes"] == sums * 2 * 3 / 4
  assert len(err.splitlines()) == 1  # libtpu's messages are suppressed
  # Nor is there a warning that the program is in the cache of compiled programs, but can't be read.
  assert len(compiled(tmp_path, *options, "--steps=train", "--config.parallelism.strategy=pmap")[1].splitlines()) == 1
  result, _ = compiled(tmp_path, *options)
  # A tied table has an input and an output gradient, which XLA may sum separately.
  assert result["train"]["collectives"]["all-reduce"]["bytes"] in (sums, sums + table)
  assert (result["chip"], result["devices"], result["fits"]) == ("TPU v5 lite", 4, True)
  assert result["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
  for step in ("train", "evaluate", "decode"):
    memory = result[step]["memory"]
    kept = memory["arguments"] + memory["output"] - memory["aliased"]
    assert memory["peak"] == kept + memory["temporaries"] + memory["generated_code"] <= result["peak_bytes"]
    assert result[step]["step_seconds"] == max(result[step]["seconds"].values()) > 0
  # Two moments per parameter, and the parameters; the batch of 8 windows is split.
  arguments = 3 * 4 * 8800
  assert arguments < result["train"]["memory"]["arguments"] < 3 * arguments  # arrays are padded to tiles
  assert result["train"]["flops"] * 4 == result["flops_per_token"]["train"]["executed"] * 8 * 16
  model = result["flops_per_token"]["train"]["model"] * 8 * 16
  assert result["train"]["roofline_mfu"] == pytest.approx(model / (4 * result["train"]["step_seconds"] * 197e12))
  assert 0 < result["evaluate"]["roofline_mfu"] < 1
  # A step of decoding reads the parameters at least once.
  traffic = result["decode"]["hbm_traffic_bytes"]
  assert result["decode"]["traffic_over_parameters"] == pytest.approx(traffic / (4 * 8800))
  assert result["train"]["open_loops"] == result["evaluate"]["open_loops"] == 0
  assert result["decode"]["capacity"] == 16 * 3
  assert os.listdir(tmp_path) == ["tiny.py"]


@needs_libtpu
def test_sizes_that_do_not_divide_are_rejected_before_compilation(tmp_path):
  flags = (f"--config={cli.write_config(tmp_path)}", "--topology=v5e:2x2")
  assert "= 4, the number of devices" in cli.complaint("compile", *flags, "--config.parallelism.fsdp=3")
  message = cli.complaint("compile", *flags, "--config.optimizer.accumulate=8")
  assert message == "data.batch_size: 8 is not divisible by 32 devices; give 32"
  message = cli.complaint("compile", *flags, "--config.parallelism.fsdp=2", "--decode_batch=6")
  assert message == "--decode_batch: 6 rows don't divide over 4 devices; give a multiple of 4"


@needs_libtpu
def test_a_program_that_does_not_fit_reports_the_excess_and_a_remedy(tmp_path):
  result, err = compiled(tmp_path, "--steps=decode", "--decode_batch=12000000", "--verify", expect=1)
  assert result["fits"] is False
  # A cache of bf16 keys and values: 48 slots of 2 heads of 8.
  needed = 12_000_000 * 48 * 2 * 2 * 8 * 2
  assert result["decode"]["memory"]["peak"] >= needed
  assert result["decode"]["over_bytes"] >= needed - result["hbm_bytes"] > 0
  assert result["decode"]["refused"].startswith("RESOURCE_EXHAUSTED")
  assert "error: v5e:2x2 has 15.75 GiB per chip: decode needs" in err
  smaller, fsdp = result["advice"]
  assert smaller == {"change": "a smaller --decode_batch", "flags": None}
  assert fsdp["change"] == "parallelism.fsdp = 4"
  # Compiled with a quarter of the rows on each chip: much less, but still too much.
  assert fsdp["fits"] is False
  assert result["hbm_bytes"] < fsdp["peak_bytes"] < result["decode"]["memory"]["peak"] / 3


def _result(train, evaluate, fits=True):
  record = {"memory": {"peak": train}, "fits": fits, "arithmetic_intensity": 300.4, "sent_bytes": 2.5e9}
  return {
    "strategy": "jit",
    "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
    "accumulate": 4,
    "hbm_bytes": 16 * 2**30,
    "remat": "full",
    "flops_per_token": {"train": {"model": 67.4e9}},
    "train": record | {"step_seconds": 1.25, "roofline_mfu": 0.823, "bound": "hbm"},
    "evaluate": {"memory": {"peak": evaluate}, "fits": True},
  }


def test_the_table_continues_after_an_interruption(tmp_path, monkeypatch):
  from experiments import compile_table

  rows = [compile_table.Row("one", "a.py", "v5e:4x4"), compile_table.Row("two", "b.py:x", "v6e:4x4", ("a.b=1",))]
  results = {"one": _result(2**30, 2**29), "two": _result(20 * 2**30, 2**30, fits=False)}
  compiled = []

  def compile_row(row):
    compiled.append(row.name)
    return results[row.name]

  monkeypatch.setattr(compile_table, "_compiled", compile_row)
  path = tmp_path / "table.jsonl"
  found = compile_table.fill(path, rows[:1])
  assert compiled == ["one"]
  # The second line was cut off.
  path.write_text(path.read_text() + '{"config": "b.py:x", "topol')
  found = compile_table.fill(path, rows)
  assert compiled == ["one", "two"]
  assert compile_table.fill(path, rows) == found == [(rows[0], results["one"]), (rows[1], results["two"])]
  assert compiled == ["one", "two"]
  one, two = compile_table.table(found).splitlines()[2:]
  assert (
    one == "| one | v5e:4x4 | 1 x 16 x 1 | 4 | full | 16.00 | 1.00 | 0.50 |  | 67.4 | 300 | 2.5 | 1.25 | 82.3% | hbm |"
  )
  assert two == "| two | v6e:4x4 | 1 x 16 x 1 | 4 | full | 16.00 | **20.00** | 1.00 |  | 67.4 |  |  |  |  |  |"


def test_rows_of_the_table_divide_over_their_chips():
  from experiments import compile_table

  rows = compile_table.all_rows()
  wanted = ("124M, CYB-AP", "1B, CYB-AP", *(f"Gemma 2B, TBYS-{k}" for k in (1, 2, 3)))
  assert {*wanted, "Gemma 2B, baseline", "Gemma 2B, CYB-AP"} <= {row.name for row in rows}
  for row in rows:
    path, _, argument = row.config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = configs.freeze(command_line.override(module.get_config(argument), row.overrides))
    _, chips = topologies.check_topology(row.topology)
    check_batch(config.data.batch_size, math.prod(chips) * config.optimizer.accumulate)
    if row.name.startswith("Gemma"):
      assert (config.data.batch_size, config.data.sequence_length) == (256, 2048)
