"""The floor model: its table of floors, what it writes, and that predicted rows cannot pass for measured ones."""

import csv

import pytest

from bench.cli import main
from bench.compare import predict
from bench.compare.predict import GPUS, Layer, fastlora_ms, peft_ms, torch_ms
from bench.measure.floors import PACKED_BYTES, Rates, dequantize_ms, floor_ms, packed_product_ms
from bench.measure.record import HEADER, PREDICTED

H200 = Rates(4.3e12, 780e12)

# Floors of a forward and backward, M=8192, r=16, on an H200, in microseconds: two bare products; merged without
# dropout; expand-first with dropout 0.1; peft eager with bf16 adapters and dropout 0.1.
FLOORS = {
    (4096, 4096): (705, 771, 805, 1052),
    (4096, 14336): (2467, 2622, 2693, 3253),
    (8192, 28672): (9867, 10314, 10456, 11578),
}


@pytest.mark.parametrize("shape", FLOORS)
def test_the_model_gives_the_table_of_floors(shape):
    plain = Layer("nf4_linear", 8192, *shape, 16, 0.0, GPUS["h200"].rates)
    dropped = plain._replace(dropout=0.1)
    found = (
        torch_ms(plain, "both"),
        fastlora_ms(plain, "both"),
        fastlora_ms(dropped, "both"),
        peft_ms(dropped, "both"),
    )
    assert [1e3 * ms for ms in found] == pytest.approx(FLOORS[shape], rel=0.02)


def test_the_model_gives_the_floors_of_expanding_and_decoding():
    assert GPUS["h200"].rates == pytest.approx(H200)
    expanding = [1e3 * dequantize_ms(*shape, H200) for shape in FLOORS]
    assert expanding == pytest.approx([9.8, 34, 137], rel=0.02)
    decode = Layer("nf4_linear", 1, 4096, 14336, 16, 0.0, H200)
    assert 1e3 * fastlora_ms(decode, "decode") == pytest.approx(7.1, rel=0.02)


def test_the_floor_of_a_case():
    assert pytest.approx(0.51587, rel=1e-4) == PACKED_BYTES
    assert H200.balance == pytest.approx(181, rel=0.01)
    packed = PACKED_BYTES * 4096 * 4096 / 4.3e12 * 1e3
    assert floor_ms("nf4_linear", "decode", 1, 4096, 4096, H200, 99.0) == pytest.approx(packed)
    assert floor_ms("nf4_linear", "both", 1, 4096, 4096, H200, 99.0) == pytest.approx(2 * packed)
    by_rate = 2 * 150 * 4096 * 4096 / 780e12 * 1e3
    assert floor_ms("nf4_linear", "forward", 150, 4096, 4096, H200, 99.0) == pytest.approx(by_rate)
    assert packed_product_ms(150, 4096, 4096, H200) == pytest.approx(by_rate)
    assert floor_ms("nf4_linear", "forward", 256, 4096, 4096, H200, 99.0) == 99.0
    assert floor_ms("bf16_linear", "forward", 1, 4096, 4096, H200, 99.0) == 99.0
    assert floor_ms("bf16_linear", "forward", 1, 4096, 4096, H200, None) is None
    expanded = 2.51587 * 4096 * 4096 / 4.3e12 * 1e3
    assert floor_ms("nf4_dequantize", "forward", 0, 4096, 4096, H200, None) == pytest.approx(expanded, rel=1e-4)


def test_small_products_are_fused_and_large_ones_expanded():
    for name, gpu in GPUS.items():
        layers = [Layer("nf4_linear", m, 4096, 14336, 16, 0.0, gpu.rates) for m in (32, 8192)]
        fused = [layer.fused_ms(predict.FUSED) < layer.expanded_ms for layer in layers]
        assert fused == [True, False], name


def test_every_row_is_marked_as_predicted(tmp_path, capsys):
    path = tmp_path / "new" / "predicted.csv"
    options = ["--gpu", "a100", "rtx5090", "--shapes", "4096x14336", "--m", "1", "8192", "--out", str(path)]
    assert main(["predict", *options]) == 0
    assert path.read_text().splitlines()[0] == HEADER
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["provider"].startswith(PREDICTED) for row in rows)
    assert {row["device"] for row in rows} == {"NVIDIA A100 SXM 80GB", "NVIDIA GeForce RTX 5090"}
    assert {row["mode"] for row in rows} == {"forward", "both", "decode"}
    assert {row["kernel"] for row in rows} == {"nf4_linear", "bf16_linear", "nf4_dequantize"}
    assert all(float(row["p50"]) > 0 for row in rows)
    assert all(0 < float(row["share_of_floor"]) <= 1.0001 for row in rows if "fastlora" in row["provider"])
    assert "predicted, not measured" in capsys.readouterr().out
    before = path.read_text()
    assert main(["predict", *options]) == 0
    assert len(path.read_text().splitlines()) == len(before.splitlines())


def test_measured_rows_are_never_overwritten(tmp_path, capsys):
    path = tmp_path / "kernels.csv"
    text = HEADER + "\nnf4_linear,torch,both,time,ms,1,2,3,4,bfloat16,0,1,1,1,1,cpu,x,x,x,2026-01-01T00:00:00Z\n"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "--out", str(path)])
    assert stopped.value.code == 2
    assert "were not predicted" in capsys.readouterr().err
    assert path.read_text() == text
