"""The bench: what it writes, what it refuses, and that a wrong provider cannot pass for a fast one."""

import csv
import functools
import math
from pathlib import Path

import pytest
import torch

from bench.cli import COMMANDS, main
from bench.compare import linear, memory, providers
from bench.compare.accuracy import Judge, share_of_limit
from bench.compare.layers import BareProduct, Expansion, LoraLayer, Provider
from bench.compare.providers import find_providers
from bench.measure.floors import share_of_floor
from bench.measure.operands import DEQUANTIZE, SCALING, Operands, Problem, draw_inputs, make_operands
from bench.measure.record import HEADER, Point, Recorder
from bench.measure.timing import interleave, measure_machine, spread
from bench.report import goals
from fastlora import reference

CPU = torch.device("cpu")
TINY = ["--shapes", "256x192", "--m", "1", "5", "--r", "4", "--repeats", "2", "--budget", "0.01"]


@pytest.fixture(autouse=True)
def small_machine_check(monkeypatch):
    monkeypatch.setattr(linear, "measure_machine", functools.partial(measure_machine, size=64))


def run_bench(path: Path, *options: str) -> list[dict[str, str]]:
    assert main(["kernels", "--out", str(path), *TINY, *options]) == 0
    with path.open() as file:
        return list(csv.DictReader(file))


def scaled_provider(factor: float) -> Provider:
    """A LoRA linear whose scaling is off by a factor."""

    def build(operands: Operands) -> list[LoraLayer]:
        a, b = operands.lora_a.clone().requires_grad_(), operands.lora_b.clone().requires_grad_()
        scaling = SCALING * factor
        return [LoraLayer(lambda x, w=w: reference.lora_linear(x, w, a, b, scaling), a, b) for w in operands.dense]

    return Provider("scaled", build, torch.float32)


def raising_provider() -> Provider:
    def build(operands: Operands) -> list[LoraLayer]:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this shape")

        return [LoraLayer(call, operands.lora_a, operands.lora_b)]

    return Provider("raising", build, torch.float32)


@pytest.mark.slow
def test_every_provider_mode_and_metric_has_its_row(tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    rows = run_bench(tmp_path / "new" / "kernels.csv", "--m", "16", "--no-memory")
    found = {(r["kernel"], r["provider"], r["mode"], r["metric"], r["M"], r["R"]) for r in rows}
    expected = {("copy", "torch", "forward", "time", "256", "0"), ("matmul", "torch", "forward", "time", "16", "0")}
    linears, expansion = ("nf4_linear", "bf16_linear"), DEQUANTIZE
    for name in ("torch", "peft-fp32", "peft-bf16", "peft-eval", "fastlora-fp32", "fastlora-bf16"):
        modes = {"torch": ("forward", "both", "decode"), "peft-eval": ("forward", "decode")}.get(name)
        modes = modes or ("forward", "both", *(["decode"] if name.startswith("fastlora") else []))
        for kernel in linears:
            expected |= {(kernel, name, mode, "time", "16", "4") for mode in modes}
            if name != "torch":
                expected.add((kernel, name, "both" if "both" in modes else "forward", "error", "16", "4"))
    expected |= {("nf4_linear", "bitsandbytes", "decode", metric, "16", "4") for metric in ("time", "error")}
    for name, r in (("bitsandbytes", "0"), ("fastlora-bf16", "0"), ("fastlora-fp32", "4"), ("fastlora-bf16", "4")):
        expected |= {(expansion, name, "forward", metric, "0", r) for metric in ("time", "error")}
    assert found == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert float(row["p50"]) >= 0
        if row["metric"] == "error":
            assert float(row["p50"]) <= 1
        if row["metric"] == "time":
            assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
    shown = capsys.readouterr().out
    assert "GB/s" in shown
    assert "met: error over the error allowed, every provider: at most 1 (worst of" in shown
    assert "not measured: peft's time over ours, every case" not in shown


@pytest.mark.slow
def test_peak_memory_has_rows_where_a_call_may_hold_much(tmp_path):
    if reason := memory.unavailable(CPU):
        pytest.skip(reason)
    rows = run_bench(
        tmp_path / "k.csv", "--m", "16", "--providers", "fastlora-fp32", "--kernels", "nf4_linear", DEQUANTIZE
    )
    held = {(r["kernel"], r["mode"], r["M"], r["R"]) for r in rows if r["metric"] == "peak_memory"}
    assert held == {
        ("nf4_linear", "forward", "16", "4"),
        ("nf4_linear", "both", "16", "4"),
        (DEQUANTIZE, "forward", "0", "4"),
    }


def test_the_columns_are_those_of_the_house():
    assert HEADER == (
        "kernel,provider,mode,metric,unit,M,K,N,R,dtype,dropout,p50,p20,p80,share_of_floor,device,torch,triton,commit,"
        "timestamp"
    )


def test_share_of_floor_is_the_floors_time_over_ones_own(tmp_path):
    rows = run_bench(
        tmp_path / "k.csv", "--no-memory", "--providers", "torch", "fastlora-fp32", "--kernels", "bf16_linear"
    )
    timed = {
        (r["provider"], r["mode"], r["M"]): r for r in rows if r["metric"] == "time" and r["kernel"] == "bf16_linear"
    }
    assert len(timed) == 12
    for (provider, mode, m), row in timed.items():
        expected = float(timed["torch", mode, m]["p50"]) / float(row["p50"])
        assert float(row["share_of_floor"]) == pytest.approx(expected, rel=1e-4)
        assert provider != "torch" or expected == 1
    assert share_of_floor(3.0, 4.0) == 0.75
    assert share_of_floor(None, 4.0) is None


@pytest.mark.parametrize(
    ("make", "says"), [(lambda: scaled_provider(1.01), "rms error"), (raising_provider, "no kernel")]
)
def test_a_wrong_provider_is_reported_and_not_timed(tmp_path, capsys, monkeypatch, make, says):
    wrong = make()
    monkeypatch.setattr(providers, "PROVIDERS", (find_providers(["torch"])[0], wrong))
    rows = run_bench(tmp_path / "k.csv", "--no-memory", "--kernels", "bf16_linear", "--m", "16")
    mine = [row for row in rows if row["provider"] == wrong.name]
    assert [row["metric"] for row in mine] == ["error"]
    assert float(mine[0]["p50"]) > 1
    shown = capsys.readouterr()
    assert f"WRONG, not timed: {wrong.name}" in shown.err
    assert says in shown.err
    assert f"missed: error over the error allowed, every provider: at most 1 ({wrong.name}" in shown.out


def test_a_right_provider_passes_the_check_that_a_wrong_one_fails():
    operands = make_operands(Problem("nf4_linear", 128, 96, 8, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 16, grad=True))
    for factor, right in ((1.0, True), (1.01, False)):
        provider = scaled_provider(factor)
        share, wrong = judge.judge(provider, provider.build(operands)[0])
        assert (share <= 1) == right
        assert (wrong == "") == right


@pytest.mark.parametrize("r", [0, 8])
def test_an_expansion_must_be_rounded_once_from_the_exact_weight(r):
    operands = make_operands(Problem(DEQUANTIZE, 128, 96, r, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 0, grad=True))
    (ours,) = find_providers(["fastlora-bf16"])
    assert judge.judge(ours, ours.build(operands)[0])[1] == ""
    exact = operands.exact_weight.addmm(operands.lora_b.double(), operands.lora_a.double(), alpha=SCALING)
    for expand, right in (
        (lambda: exact.bfloat16(), True),
        (lambda: exact.bfloat16() * torch.tensor(1.01, dtype=torch.bfloat16), False),
        (lambda: exact.half().bfloat16().roll(1), False),
        (lambda: (exact.float() * (1 + 2**-9)).bfloat16(), False),
    ):
        worst, wrong = judge.judge(ours, Expansion(expand, operands.lora_a, operands.lora_b))
        assert (wrong == "") == right
        assert (worst <= 1) == right


def test_a_product_without_lora_is_judged_as_one():
    operands = make_operands(Problem("nf4_linear", 128, 96, 8, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 16, grad=True))
    plain = Provider("plain", lambda operands: [BareProduct(operands.dense[0])], None, modes=("decode",))
    assert judge.judge(plain, plain.build(operands)[0])[1] == ""
    a, b = operands.lora_a.bfloat16(), operands.lora_b.bfloat16()
    with_lora = LoraLayer(lambda x: reference.lora_linear(x, operands.dense[0], a, b, SCALING), a, b)
    assert "x W^T" in judge.judge(plain, with_lora)[1]


def test_what_decoding_computes_is_judged_too():
    operands = make_operands(Problem("bf16_linear", 128, 96, 8, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 16, grad=True))

    class WrongWhenDecoding(LoraLayer):
        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return super().decode(x) * 1.02

    provider = scaled_provider(1.0)
    layer = provider.build(operands)[0]
    assert judge.judge(provider, layer)[1] == ""
    layer.__class__ = WrongWhenDecoding
    worst, wrong = judge.judge(provider, layer)
    assert worst > 1
    assert wrong.startswith("decoded y")


def test_share_of_limit_is_infinite_for_what_has_no_error():
    oracle = torch.ones(2, 2, dtype=torch.float64)
    assert share_of_limit(torch.full((2, 2), math.nan), oracle, oracle) == math.inf
    assert share_of_limit(torch.ones(2, 3), oracle, oracle) == math.inf


def test_nf4_providers_share_one_set_of_codes():
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    operands = make_operands(Problem("nf4_linear", 64, 96, 4, CPU), packed_copies=2)
    peft, ours = (find_providers([name])[0].build(operands) for name in ("peft-fp32", "fastlora-fp32"))
    for packed, theirs, mine in zip(operands.packed, peft, ours, strict=True):
        assert theirs.call.base_layer.weight.data_ptr() == packed.codes.data_ptr()
        assert mine.call.base_layer.codes.data_ptr() == packed.codes.data_ptr()
    assert operands.packed[0].codes.data_ptr() != operands.packed[1].codes.data_ptr()


def test_an_existing_csv_is_appended_to_and_nothing_else_is_touched(tmp_path):
    path = tmp_path / "deep" / "k.csv"
    point = Point("nf4_linear", "torch", "both", "time", 16, 64, 96, 4, 1.25, 1.0, 2.0, 0.5)
    Recorder(path, "a, machine").write([point])
    first = path.read_text()
    Recorder(path, "a, machine").write([point, point])
    assert path.read_text().startswith(first)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert rows[2]["device"] == "a, machine"
    assert (rows[2]["unit"], rows[2]["p50"], rows[2]["share_of_floor"]) == ("ms", "1.25", "0.5")


@pytest.mark.parametrize(
    ("text", "says"),
    [("kernel,provider\nmine,1\n", "not this benchmark's header"), (HEADER + "\nnf4_lin", "middle of a row")],
)
def test_a_foreign_or_cut_csv_is_refused_and_left_alone(tmp_path, capsys, text, says):
    path = tmp_path / "k.csv"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run_bench(path)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert path.read_text() == text


def test_percentiles_are_interpolated():
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    assert (found.p50, found.p20, found.p80) == pytest.approx((3.5, 2.0, 5.0))
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_candidates_are_called_in_turn_each_on_the_next_copy():
    calls: list[tuple[str, int]] = []
    found = interleave(
        {name: functools.partial(lambda name, serial: calls.append((name, serial)), name) for name in "abc"},
        CPU,
        0.0,
        7,
    )
    assert set(found) == set("abc")
    assert [serial for _, serial in calls] == list(range(len(calls)))
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 2 + 7
    assert all({name for name, _ in calls} == set("abc") for calls in rounds)


def test_peak_memory_counts_what_a_call_holds():
    if reason := memory.unavailable(CPU):
        pytest.skip(reason)
    m, k, n = 512, 1024, 2048
    floor, ours = find_providers(["torch", "fastlora-fp32"])
    problem = Problem("bf16_linear", k, n, 64, CPU)  # gradients of A and B well above what a reading is off
    with memory.CpuMemory() as server:
        bare = server.peak(floor, problem, m, ("forward", "both"))
        again = server.peak(floor, problem, m, ("forward", "both"))
        lora = server.peak(ours, problem, m, ("both",))
    outputs = 2 * m * n + 2 * m * k
    assert bare["forward"] == pytest.approx(2 * m * n, abs=5e5)
    assert bare["both"] == pytest.approx(outputs, abs=5e5)
    assert again["both"] == pytest.approx(bare["both"], abs=memory.resolution())
    assert lora["both"] >= outputs


def test_peak_memory_counts_scratch_kept_between_calls():
    if reason := memory.unavailable(CPU):
        pytest.skip(reason)
    scratch: list[torch.Tensor] = []

    class Keeper(BareProduct):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scratch[:] = scratch or [torch.ones(3_000_000, dtype=torch.uint8)]
            return super().forward(x)

    keeper = Provider("keeper", lambda operands: [Keeper(operands.dense[0])], None)
    request = {"kernel": "bf16_linear", "K": 64, "N": 64, "R": 4, "M": 16, "dropout": 0.0, "modes": ["forward"]}
    assert memory._measure(keeper, request)["forward"] >= 3_000_000


def test_memory_that_cannot_be_measured_is_an_error():
    if reason := memory.unavailable(CPU):
        pytest.skip(reason)
    (floor,) = find_providers(["torch"])
    problem = Problem("bf16_linear", 64, -1, 4, CPU)
    with memory.CpuMemory() as server, pytest.raises(RuntimeError, match="measuring the memory of torch"):
        server.peak(floor, problem, 1, ("forward",))


def point(provider: str, p50: float, m: int = 1024, metric: str = "time", mode: str = "both") -> Point:
    return Point("nf4_linear", provider, mode, metric, m, 4096, 4096, 16, p50)


def verdict_of(points: list[Point], beginning: str) -> str:
    """The one verdict on a goal whose text begins so."""
    (found,) = [line for line in goals.verdict(points, "a CPU") if line.split(": ", 1)[1].startswith(beginning)]
    return found


def test_goals_for_every_case_name_those_that_miss_or_the_worst():
    slow = [point("peft-fp32", 10), point("fastlora-fp32", 9), point("peft-bf16", 10), point("fastlora-bf16", 20)]
    assert verdict_of(slow, "peft's time over ours, every case").startswith("missed")
    assert "nf4_linear 4096x4096 M=1024 r=16 both, bf16 adapters 0.50" in verdict_of(slow, "peft's time over ours, e")
    assert verdict_of(slow, "peft's time over ours, nf4_linear").startswith("missed")
    assert verdict_of(slow, "peft's time over ours, bf16_linear").startswith("not measured")
    assert verdict_of(slow, "MB of peak memory").startswith("not measured")
    assert verdict_of(slow, "error over").startswith("not measured")
    many = [*slow, *(point(name, 1, m=m) for m in (1, 16) for name in ("peft-fp32", "fastlora-fp32"))]
    assert "(1 of 4: 0.50 nf4_linear" in verdict_of(many, "peft's time over ours, every case")
    assert verdict_of(many[4:] + slow[:2], "peft's time over ours, every case").startswith("met")
    assert "worst of 4: 1.00" in verdict_of(
        [*many[4:], *slow[:2], point("peft-bf16", 3), point("fastlora-bf16", 2)], "peft's time over ours, every case"
    )

    fast = [point("peft-fp32", 13), point("fastlora-fp32", 10), point("peft-fp32", 50, metric="peak_memory")]
    met = [*fast, point("fastlora-fp32", 50.1, metric="peak_memory")]
    assert "both, fp32 adapters 1.30" in verdict_of(met, "peft's time over ours, nf4_linear")
    assert verdict_of(met, "MB of peak memory").startswith("met")
    above = verdict_of([*fast, point("fastlora-fp32", 60, metric="peak_memory")], "MB of peak memory")
    assert above.startswith("missed")
    assert "60.0 MB against 50.0" in above


def test_an_unknown_subcommand_lists_those_there_are(capsys):
    for arguments in ([], ["kernel"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert all(name in shown for name in COMMANDS)


def test_a_subcommand_that_cannot_be_imported_leaves_the_others_alone(capsys, monkeypatch):
    monkeypatch.setattr("bench.cli.COMMANDS", {"kernels": "bench.compare.linear", "absent": "bench.absent"})
    with pytest.raises(SystemExit) as stopped:
        main(["absent"])
    assert stopped.value.code == 2
    assert "absent cannot run here: No module named 'bench.absent'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert linear.SUMMARY.split(":")[0] in shown
    assert "not here" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--models", "llama"], "there are llama-3-8b"),
        (["--r", "8", "0"], "at least 1"),
        (["--dropout", "0", "-0.1"], "[0, 1)"),
        (["--shapes", "4096"], "such as 4096x14336"),
        (["--shapes", "0x64"], "such as 4096x14336"),
        (["--m", "0"], "at least 1"),
        (["--dropout", "1"], "[0, 1)"),
        (["--providers", "peft"], "there are torch, peft-fp32"),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path, capsys, options, says):
    path = tmp_path / "k.csv"
    with pytest.raises(SystemExit):
        run_bench(path, *options)
    assert says in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_bench(tmp_path / "k.csv", "--device", "cuda")
    assert "finds no CUDA device" in capsys.readouterr().err
