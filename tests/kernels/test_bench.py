"""The bench: it reads the compiler's text rightly, times nothing that is wrong, and says what it was asked wrongly."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hybridlm_kernels.bench import __main__ as bench
from hybridlm_kernels.bench import measure, oracles, record, static_gpu, static_tpu
from hybridlm_kernels.bench.__main__ import main
from hybridlm_kernels.bench.cases import BOTH, CASES, FORWARD, Floor, Workload
from hybridlm_kernels.bench.chips import CHIPS
from hybridlm_kernels.bench.hlo import Program
from hybridlm_kernels.bench.schedule import ScheduleError, read_schedule

# A grid of 3 steps (5 with the pipeline's 2 more) around a loop of 10 steps of 2 bundles. Bundles after a branch still
# belong to its loop, so the inner loop's are 1 to 6, the outer's 0 to 8 and the last bundle runs once.
BUNDLES = """\
LH: loop header
     0   :  { %s9_s1 = sphi 0, %s8_s1 /* iteration index, stage = 0 */ }
  0x1 LB: >> { %s3_s2 = sadd.s32 1, %s2_s2  ;;  %s2_s2 = sphi %s1_s2, %s3_s2 /* phi copy */ }
  0x2   : >> { %v1 = vld [vmem:[%s4_s0] sm:$0xff]  ;;  %p5_p0 = scmp.ge.s32.totalorder %s3_s2, 10 /* loop exit test */ \
 ;;  %10 = sbr.rel (!%p5_p0) target bundleno = 1 (0x1), region = 7 }
  0x3   : > { %s7_s7 = sadd.s32 4294967295, %s9_s1 /* iteration index, stage = 1 */ }
  0x4   : > { %s8_s1 = sadd.s32 1, %s9_s1  ;;  %20 = sbr.rel (!%p6_p1) target bundleno = 0 (0x0), region = 3 }
  0x5   :  { %p6_p1 = scmp.ge.s32.totalorder %s8_s1, 5 /* loop exit test */ }
  0x6   :  {}
  0x7   :  {}
  0x8   :  {}
  0x9   :  {}
"""
HEAD = """\
== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     2     2     1     1     2
== UTILIZATION:
"""
ALLOCATIONS = """\
 #allocation1 [shape = 's32[1]{0}', space=sflag, size = 0x4, offset = 0, scoped, tag = 'scoped memory']
 #allocation2 [shape = 'u8[8192]{0}', space=vmem, size = 0x2000, offset = 0x1000, scoped, tag = 'input window']
 #allocation3 [shape = 'u8[4096]{0}', space=vmem, size = 0x1000, offset = 0, scoped, tag = 'output window']
"""


def utilisation(spilling_bundle: int) -> str:
    rows = [[0] * 11 for _ in range(10)]
    rows[2][6] = 1  # one vector load in each inner step
    rows[spilling_bundle][9] = 1
    return HEAD + "\n".join(" ".join(map(str, row)) for row in rows) + "\n"


def test_bundles_count_as_often_as_their_loops_run() -> None:
    schedule = read_schedule(BUNDLES, utilisation(spilling_bundle=7), ALLOCATIONS)
    assert [(loop.first, loop.last, loop.trips) for loop in schedule.loops] == [(0, 8, 3), (1, 6, 10)]
    assert schedule.cycles == 3 * (10 * 6 + 3) + 1
    assert schedule.slots["VLOAD"] == pytest.approx(30 / (2 * schedule.cycles))
    assert schedule.spills == 3
    assert schedule.vmem_bytes == 0x3000
    assert schedule.unhidden_bytes == 0x3000 / 2  # each window has two buffers


def test_a_loop_of_unknown_length_counts_once() -> None:
    dynamic = BUNDLES.replace("%s3_s2, 10 /*", "%s3_s2, %s77_s5 /*")
    schedule = read_schedule(dynamic, utilisation(7), ALLOCATIONS)
    assert schedule.cycles == 3 * 9 + 1
    assert [loop.trips for loop in schedule.loops] == [3, None]


def test_a_changed_dump_is_refused() -> None:
    with pytest.raises(ScheduleError, match="libtpu's dump has changed"):
        read_schedule(BUNDLES, HEAD + "0 0 0 0 0 0 0 0 0 0 0\n", ALLOCATIONS)
    with pytest.raises(ScheduleError, match="libtpu's dump has changed"):
        read_schedule(BUNDLES, "", ALLOCATIONS)


HLO = """\
HloModule jit_f

%fused (p0: f32[8,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[8,1024]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1024}
}

%cond (c: (s32[], f32[8,1024])) -> pred[] {
  %c = (s32[]{:T(128)S(6)}, f32[8,1024]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%c), index=0
  %eight = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %eight), direction=LT
}

%body (b: (s32[], f32[8,1024])) -> (s32[], f32[8,1024]) {
  %b = (s32[]{:T(128)S(6)}, f32[8,1024]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)S(6)} get-tuple-element(%b), index=0
  %x.2 = f32[8,1024]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %row = f32[1,1024]{1,0:T(1,128)S(1)} fusion(%x.2, %i.2), kind=kLoop, calls=%fused, metadata={op_name="row"}
  ROOT %t = (s32[]{:T(128)S(6)}, f32[8,1024]{1,0:T(8,128)}) tuple(%i.2, %x.2)
}

ENTRY %main (x: f32[8,1024], y: f32[8,1024]) -> f32[8,1024] {
  %x = f32[8,1024]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %y = f32[8,1024]{1,0:T(8,128)} parameter(1), metadata={op_name="y"}
  %copy.1 = f32[8,1024]{0,1:T(8,128)} copy(%x), metadata={op_name="x"}
  %copy.2 = f32[8,1024]{0,1:T(8,128)} copy(%y), metadata={op_name="y"}
  %near = f32[8,1024]{1,0:T(8,128)S(1)} copy(%x), metadata={op_name="x"}
  %k.1 = (f32[8,1024]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) custom-call(%copy.1, /*index=1*/%near), \
custom_call_target="tpu_custom_call", metadata={op_name="k"}
  %h = f32[8,1024]{1,0:T(8,128)} get-tuple-element(%k.1), index=0
  %loop = (s32[]{:T(128)S(6)}, f32[8,1024]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body
  ROOT %out = f32[8,1024]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_operations_of_a_program_and_what_they_move() -> None:
    operations = {op.name: op for op in Program(HLO).operations()}
    array, row = 8 * 1024 * 4, 1024 * 4
    assert list(operations) == ["copy.1", "copy.2", "near", "k.1", "row"]
    assert [op.runs for op in operations.values()] == [1, 1, 1, 1, 8]
    assert [op.is_pallas for op in operations.values()] == [False, False, False, True, False]
    # Both sides; both; one, as the other is VMEM; one operand and two results; the row that the fusion cuts out.
    assert [op.hbm_bytes for op in operations.values()] == [2 * array, 2 * array, array, 2 * array + 2048, row]


def test_like_operations_are_told_from_unlike_ones() -> None:
    operations = {op.name: op.likeness for op in Program(HLO).operations()}
    assert operations["copy.1"] == operations["copy.2"] != operations["near"]


def test_a_loop_of_unknown_length_is_counted_and_reported() -> None:
    program = Program(HLO.replace("constant(8)", "parameter(1)"))
    assert {op.name: op.runs for op in program.operations()}["row"] == 1
    assert program.unknown_loops == 1


SMALLEST = {"B,T,D": (2, 7, 3), "B,T,H,K,V": (2, 7, 2, 3, 5), "M,K,N,G": (7, 3, 2, 3), "T,K,N,V": (2, 3, 4, 128)}
ODD = {"B,T,D": (2, 37, 24), "B,T,H,K,V": (2, 70, 2, 8, 24), "M,K,N,G": (70, 24, 8, 5), "T,K,N,V": (37, 5, 70, 256)}


def slope(function: Callable[..., np.ndarray], operands: list[np.ndarray], n: int, along: np.ndarray) -> np.ndarray:
    """The derivative of function(*operands) when operand n moves along `along`."""
    step = 1e-5
    ahead, behind = ([*operands[:n], operands[n] + s * along, *operands[n + 1 :]] for s in (step, -step))
    return (function(*ahead) - function(*behind)) / (2 * step)


@pytest.mark.parametrize("op", CASES)
def test_oracle_gradients_are_slopes(op: str, rng: np.random.Generator) -> None:
    case = CASES[op]
    operands = [np.asarray(v, np.float64) for v in case.operands(jax.random.key(1), SMALLEST[case.dims], "float32")]
    cotangent = rng.normal(size=jax.eval_shape(case.function("chunked"), *operands).shape)
    gradients = case.oracle(*operands, cotangent)[1]
    for n, gradient in enumerate(gradients):
        along = rng.normal(size=operands[n].shape)
        expected = (cotangent * slope(lambda *v: case.oracle(*v, cotangent)[0], operands, n, along)).sum()
        np.testing.assert_allclose((gradient * along).sum(), expected, rtol=1e-6, atol=1e-8)


def test_scan_oracle_by_hand() -> None:
    a, x = np.full((1, 3, 1), 0.5), np.array([1.0, 2.0, 4.0])[None, :, None]
    h, (da, dx) = oracles.linear_scan(a, x, np.array([0.0, 0.0, 1.0])[None, :, None])
    assert h.ravel().tolist() == [1, 2.5, 5.25]
    assert dx.ravel().tolist() == [0.25, 0.5, 1]
    assert da.ravel().tolist() == [0, 0.5, 2.5]


@pytest.mark.parametrize("op", CASES)
def test_implementations_that_run_here_pass_the_check(op: str) -> None:
    case = CASES[op]
    elsewhere = ("recurrentgemma", "deltanet_tpu", "megablox", *case.yardsticks)
    peers = [name for name in case.peers if name not in elsewhere]
    for name in ("reference", "chunked", *peers):
        errors = measure.check(case, name, ODD[case.dims], "float32")
        assert errors.acceptable, f"{name}: {errors}"


def test_delta_rule_oracle_by_hand() -> None:
    """One key of unit norm, nothing decays: beta 1 replaces the value, beta 2 overshoots as far again."""
    ones, v = np.ones((1, 3, 1, 1)), np.array([1.0, 5.0, 0.0])[None, :, None, None]
    beta = np.array([1.0, 1.0, 2.0])[None, :, None]
    o, _ = oracles.gated_delta_rule(ones, ones, v, beta, np.zeros((1, 3, 1)), ones)
    assert o.ravel().tolist() == [1, 5, -5]
    o, _ = oracles.gated_linear_attention(ones, ones, v, np.log(np.full((1, 3, 1, 1), 0.5)), ones)
    assert o.ravel().tolist() == [1, 5.5, 2.75]


def test_floor_of_both_passes_is_the_sum() -> None:
    case, shape = CASES["linear_scan"], (2, 8, 16)
    assert case.floor(shape, "bfloat16", FORWARD) == Floor(hbm_bytes=3 * 2 * 256, flops=2 * 256)
    assert case.floor(shape, "float32", BOTH) == Floor(hbm_bytes=8 * 4 * 256, flops=5 * 256)


SMALL = ["linear_scan", "--device", "cpu", "--shape", "2,37,24", "--dtype", "float32"]


def test_rows_tell_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WINDOW_S", 1e-4)
    out = tmp_path / "results.jsonl"
    assert main([*SMALL, "--impl", "chunked", "associative_scan", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    named = [(row["impl"], row["pass"]) for row in rows]
    assert named == [(impl, which) for which in (FORWARD, BOTH) for impl in ("chunked", "associative_scan")]
    for row in rows:
        assert row["shape"] == [2, 37, 24] and row["dtype"] == "float32" and row["method"] == "measured"
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
        assert row["jax"] == jax.__version__ and row["date"]
    table = record.table(record.read(out))
    assert table.count("\n") == 5 and "| linear_scan | forward | 2x37x24 float32 |" in table


def test_a_wrong_kernel_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["linear_scan"]
    wrong = replace(case, ours=lambda a, x, impl: 1.001 * case.ours(a, x, impl))
    monkeypatch.setitem(CASES, "linear_scan", wrong)
    monkeypatch.setattr(measure, "time_all", lambda workloads: pytest.fail("timed"))
    assert main([*SMALL, "--impl", "chunked", "--out", str(tmp_path / "results.jsonl")]) == 1
    captured = capsys.readouterr()
    assert "linear_scan chunked float32: relative errors 1.0e-03" in captured.out
    assert captured.err == "bench: linear_scan chunked: wrong, see the errors above; nothing is timed\n"
    assert not (tmp_path / "results.jsonl").exists()


def test_nan_is_wrong() -> None:
    assert not measure.Errors(float("nan"), 0.0, (1e-5, 1e-4)).acceptable


@pytest.mark.parametrize(
    "words, message",
    [
        ("linear_scn", "OP: 'linear_scn' must be one of .*; did you mean linear_scan\\?"),
        ("linear_scan --device static-tpu:v5", "--device: 'static-tpu:v5' must be one of"),
        ("linear_scan --device tqu", "; did you mean tpu\\?"),
        ("linear_scan --shape 1,2", "--shape: '1,2' must be B,T,D for linear_scan"),
        ("linear_scan --shape 1,0,2", "--shape: '1,0,2' must be positive numbers"),
        ("linear_scan --dtype float16", "--dtype: 'float16' must be one of bfloat16, float32"),
        ("linear_scan --impl chunkd", "did you mean chunked\\?"),
        ("linear_scan --device cpu --impl pallas_tpu --shape 1,8,8", "pallas_tpu.* runs on TPU"),
        ("linear_scan --forward --backward", "not allowed with"),
        ("", "required: OP"),
    ],
)
def test_wrong_command_lines_get_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("bench: ")
    assert re.search(message, error)


def test_without_the_tpu_compiler_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(static_tpu.importlib.util, "find_spec", lambda name: None)
    assert main(["linear_scan", "--device", "static-tpu:v5e", "--impl", "chunked"]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'hybridlm[tpu]'")


def test_the_table_keeps_the_newest_row_and_shows_failures(tmp_path: Path) -> None:
    row = {"op": "linear_scan", "impl": "pallas_tpu", "pass": FORWARD, "shape": [1, 8, 8], "dtype": "float32"}
    row |= {"method": "static", "device": "v5e"}
    numbers = {"ratio": 1.5, "estimate_ratio": 1.5, "estimate_us": 9.0, "vmem_mib": 2.0, "spills": 0}
    record.append(tmp_path / "r.jsonl", [row | {"failure": "no"}, row | numbers, row | numbers | {"ratio": 1.25}])
    record.append(tmp_path / "r.jsonl", [row | {"impl": "chunked", "failure": "does not compile"}])
    lines = record.table(record.read(tmp_path / "r.jsonl")).splitlines()
    assert lines[2:] == [
        "| linear_scan | forward | 1x8x8 float32 | v5e | pallas_tpu | 1.25 | 1.50 | 9 | 2.0 | 0 |",
        "| linear_scan | forward | 1x8x8 float32 | v5e | chunked | - | - | - | - | - |",
    ]


def test_a_crash_of_the_compiler_is_reported_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--no_such_flag=1")
    workloads = [Workload(op, "chunked", FORWARD, (1, 16, 128), "float32") for op in ("linear_scan", "short_conv")]
    results = list(static_tpu.analyze(workloads, CHIPS["v5e"]))
    assert [result.workload for result in results] == list(map(str, workloads))
    for result in results:
        assert isinstance(result, static_tpu.Failure) and "no_such_flag" in result.reason


def test_what_runs_as_often_as_the_data_say_has_no_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loop of the program, and the grid of a kernel."""
    pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")
    words = "grouped_matmul --device static-tpu:v5e --forward --dtype bfloat16 --shape 512,128,256,4"
    words += " --impl pallas_tpu chunked megablox --out"
    assert main([*words.split(), str(tmp_path / "r.jsonl")]) == 0
    rows = record.read(tmp_path / "r.jsonl")
    assert {row["impl"]: "ratio" in row for row in rows} == {"pallas_tpu": True, "chunked": False, "megablox": False}
    assert capsys.readouterr().out.count("no estimate") == 2


def test_a_compiler_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")
    workload = Workload("linear_scan", "chunked", FORWARD, (1, 16, 128), "float32")
    assert list(static_tpu.analyze([workload], CHIPS["v5e"], timeout_s=0.2)) == [
        static_tpu.Failure(str(workload), "v5e", "took longer than 0 s")
    ]


def test_without_the_gpu_compiler_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(static_gpu.importlib.util, "find_spec", lambda name: None)
    assert main(["linear_scan", "--device", "static-gpu:h200"]) == 2
    assert capsys.readouterr().err == f"bench: --device: {static_gpu.INSTALL}\n"


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "text.jsonl"])
def test_what_is_no_results_file_is_one_line(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jsonl").write_text("hello\n")
    monkeypatch.setattr(sys, "argv", ["record", str(tmp_path / name)])
    assert record.main() == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("record: name one file of the bench's results") and err.count("\n") == 1


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupted)
    assert bench.main(["linear_scan"]) == 130
    assert "Traceback" not in capsys.readouterr().err
