"""`python -m bench kernels`: what it writes, what it refuses, and that a wrong provider cannot pass for a fast one."""

import pytest
import torch

from bench.cli import main
from bench.compare import memory, providers
from bench.compare.layers import LoraLayer, Provider
from bench.compare.providers import find_providers
from bench.compare.shape import DeviceLostError, ShapeBench
from bench.measure.floors import share_of_floor
from bench.measure.operands import DEQUANTIZE, Operands
from tests.bench.support import CPU, run_kernels, scaled_provider


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
    rows = run_kernels(tmp_path / "new" / "kernels.csv", "--m", "16", "--no-memory")
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
    rows = run_kernels(
        tmp_path / "k.csv", "--m", "16", "--providers", "fastlora-fp32", "--kernels", "nf4_linear", DEQUANTIZE
    )
    held = {(r["kernel"], r["mode"], r["M"], r["R"]) for r in rows if r["metric"] == "peak_memory"}
    assert held == {
        ("nf4_linear", "forward", "16", "4"),
        ("nf4_linear", "both", "16", "4"),
        (DEQUANTIZE, "forward", "0", "4"),
    }


def test_share_of_floor_is_the_floors_time_over_ones_own(tmp_path):
    rows = run_kernels(
        tmp_path / "k.csv",
        "--m",
        "1",
        "5",
        "--no-memory",
        "--providers",
        "torch",
        "fastlora-fp32",
        "--kernels",
        "bf16_linear",
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
    rows = run_kernels(tmp_path / "k.csv", "--no-memory", "--kernels", "bf16_linear", "--m", "16")
    mine = [row for row in rows if row["provider"] == wrong.name]
    assert [row["metric"] for row in mine] == ["error"]
    assert float(mine[0]["p50"]) > 1
    shown = capsys.readouterr()
    assert f"WRONG, not timed: {wrong.name}" in shown.err
    assert says in shown.err
    assert f"missed: error over the error allowed, every provider: at most 1 ({wrong.name}" in shown.out


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
        run_kernels(path, *options)
    assert says in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_kernels(tmp_path / "k.csv", "--device", "cuda")
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_lost_device_ends_the_run_with_what_it_has(tmp_path, capsys, monkeypatch):
    def lose(self, m, dropout, mode):
        raise DeviceLostError("after unsloth the CUDA device no longer answers: illegal memory access")

    monkeypatch.setattr(ShapeBench, "time", lose)
    path = tmp_path / "k.csv"
    options = ["--shapes", "64x64", "--m", "16", "--r", "4", "--kernels", "bf16_linear", "--no-memory"]
    assert main(["kernels", "--out", str(path), *options, "--providers", "fastlora-fp32"]) == 1
    assert "no longer answers: illegal memory access; what was measured before it is kept" in capsys.readouterr().err
    assert ",error,limit,16," in path.read_text()
