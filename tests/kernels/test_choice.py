"""The table of choices: what its rows mean, which of them apply, and what the environment changes."""

import math
import time

import pytest
import torch
from fastlora.kernels import choice, lora_plan, search
from fastlora.kernels.choice import ANY_M, TableRow, Tile

from fastlora.ops import backend as backends

CPU = torch.device("cpu")
FLOP_PER_BYTE = {"sm_80": 153, "sm_86": 76, "sm_89": 164, "sm_90": 181, "sm_100": 281, "sm_120": 117}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No environment variables, and nothing cached from another test."""
    for name in ("FASTLORA_BACKEND", "FASTLORA_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)
    remembered = (choice._table, choice._choices, choice._tiles)
    for cached in remembered:
        cached.cache_clear()
    monkeypatch.setattr(search, "_found", {})
    yield
    for cached in remembered:
        cached.cache_clear()


def row(op="linear", m=None, k=None, n=None, r=None, kernel="fused", gpu="NVIDIA H200", **rest) -> TableRow:
    config = rest.pop("config", None)
    return TableRow(gpu, op, m, k, n, r, rest.pop("dropout", None), kernel, config, None, "measured")


def kernels(rows: list[TableRow]) -> list[tuple[int | None, str]]:
    return [(rung.m, rung.kernel) for rung in rows]


@pytest.mark.parametrize("arch", FLOP_PER_BYTE)
def test_the_defaults_are_the_model_of_the_docstring_and_say_that_they_are_defaults(arch):
    _, rows = choice.rows_for("unknown", (int(arch[3:-1]), int(arch[-1])))
    assert {row.source for row in rows} == {"default"}
    crossover = 1.258 * FLOP_PER_BYTE[arch] / (1 / 0.6 - 1)
    largest = {op: max(row.m for row in rows if row.op == op and row.m) for op in choice.PRODUCTS}
    assert set(largest.values()) == {16 * round(crossover / 16)}
    for op in choice.PRODUCTS:
        assert choice.ladder([], rows, op, 4096, 4096, 16, False)[-1] == row(
            op, kernel="dequantize", gpu=arch
        )._replace(source="default")


def test_an_architecture_without_rows_takes_the_next_one_below():
    assert {row.gpu for row in choice.rows_for("a new one", (10, 3))[1]} == {"sm_100"}
    assert {row.gpu for row in choice.rows_for("a new one", (8, 7))[1]} == {"sm_86"}
    assert {row.gpu for row in choice.rows_for("an old one", (7, 5))[1]} == {"sm_80"}


def test_m_is_an_upper_bound():
    rungs = [choice.choose("linear_t", m, 4096, 4096, 16, False, CPU).kernel for m in (1, 288, 289, 100000)]
    assert rungs == ["fused", "fused", "dequantize", "dequantize"]


def test_few_tokens_decode_unless_dropout_forbids_it():
    assert choice.choose("linear", 16, 4096, 4096, 16, False, CPU).kernel == "decode"  # no compiled kernel on a CPU
    assert choice.choose("linear", 17, 4096, 4096, 16, False, CPU).kernel == "fused"
    assert choice.choose("linear", 1, 4096, 4096, 16, True, CPU).kernel == "fused"


def test_measured_rows_replace_the_defaults_between_neighbours_that_agree():
    defaults = choice.rows_for("NVIDIA H200", (9, 0))[1]
    measured = [row(m=64, k=64, n=64, r=16), row(m=512, k=64, n=64, r=16, kernel="fused")]
    found = choice.ladder(measured, defaults, "linear", 64, 64, 16, False)
    expected = [(16, "decode-cuda"), (63, "fused"), (64, "fused"), (512, "fused"), (None, "dequantize")]
    assert kernels(found) == expected
    measured[1] = row(m=256, k=64, n=64, r=16, kernel="dequantize")
    found = choice.ladder(measured, defaults, "linear", 64, 64, 16, False)
    assert kernels(found) == [(16, "decode-cuda"), (63, "fused"), (64, "fused"), (255, "fused"), (None, "dequantize")]


def test_a_table_measured_in_part_changes_nothing_elsewhere():
    """With rows for 1 and 256 tokens, 2 to 255 are computed as without a table."""
    defaults = choice.rows_for("NVIDIA H200", (9, 0))[1]
    measured = [row(m=1, k=64, n=64, r=16, kernel="decode"), row(m=256, k=64, n=64, r=16, kernel="dequantize")]
    for shape in ((64, 64), (4096, 14336)):
        found = choice.ladder(measured, defaults, "linear", *shape, 16, False)
        without = choice.ladder([], defaults, "linear", *shape, 16, False)
        for m in (2, 16, 17, 100, 255):
            assert at(found, m).kernel == at(without, m).kernel, m
        assert at(found, 1).kernel == "decode"
        assert {at(found, m).kernel for m in (256, 257, 10**6)} == {"dequantize"}


def at(rows: list[TableRow], m: int) -> TableRow:
    return next(row for row in rows if m <= choice._bound(row))


def test_a_tile_holds_for_ranks_that_are_padded_alike():
    tile = row("x", m=64, k=128, r=20, kernel="split", config=(64, 256, 0, 0, 8, 3, 0))
    for r, applies in ((16, False), (17, True), (32, True), (33, False), (64, False)):
        assert bool(choice.ladder([tile], [], "x", 128, None, r, False)) == applies, r


def test_the_nearest_shape_is_taken():
    rows = [row(m=9, k=1024, n=1024, r=16, kernel="a"), row(m=9, k=4096, n=14336, r=16, kernel="b")]
    rows += [row(m=9, k=4096, n=14336, r=128, kernel="c")]
    assert kernels(choice.ladder(rows, [], "linear", 1024, 2048, 8, False)) == [(9, "a")]
    assert kernels(choice.ladder(rows, [], "linear", 4096, 4096, 16, False)) == [(9, "b")]
    assert kernels(choice.ladder(rows, [], "linear", 4096, 14336, 64, False)) == [(9, "c")]
    assert kernels(choice.ladder(rows, [], "linear", 4096, 14336, 0, False)) == [(9, "b")]


def test_a_row_for_dropout_comes_before_one_for_either():
    rows = [row(m=9, kernel="either"), row(m=9, kernel="with", dropout=True)]
    assert kernels(choice.ladder(rows, [], "linear", 1, 1, 1, True)) == [(9, "with")]
    assert kernels(choice.ladder(rows, [], "linear", 1, 1, 1, False)) == [(9, "either")]


def test_rows_survive_writing_and_reading(tmp_path):
    rows = choice.read()
    rows.append(row(m=64, k=128, n=256, r=16, config=(64, 128, 64, 4, 8, 3, 1))._replace(us=12.5))
    rows.append(row("x", m=64, k=128, r=16, kernel="split", config=(64, 128, 0, 0, 4, 3, 0), dropout=True))
    choice.write(rows, tmp_path / "deep" / "choice.csv")
    assert choice.read(tmp_path / "deep" / "choice.csv") == rows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("gpu,op", "card,op"), "first line must be gpu,op,m"),
        (lambda text: text.replace("linear,16", "linear,sixteen"), r"line 2: .*sixteen"),
        (lambda text: text.replace(",no,", ",never,"), "line 2: .*never"),
    ],
)
def test_a_table_that_cannot_be_read_names_the_line(tmp_path, change, says):
    path = tmp_path / "choice.csv"
    path.write_text(change(choice.TABLE.read_text()))
    with pytest.raises(ValueError, match=says):
        choice.read(path)


def use(monkeypatch, rows: list[TableRow]) -> None:
    monkeypatch.setattr(choice, "_table", lambda: rows)


def test_a_configuration_reaches_the_kernel(monkeypatch):
    use(monkeypatch, [row(gpu="sm_80", config=(64, 128, 32, 4, 8, 3, 1))])
    assert choice.choose("linear", 5, 64, 64, 16, False, CPU).config == (64, 128, 32, 4, 8, 3, True)


def test_a_table_without_a_fitting_row_is_an_error(monkeypatch):
    use(monkeypatch, [row(gpu="sm_80", m=64)])
    with pytest.raises(ValueError, match="no row for linear with any M"):
        choice.choose("linear", 5, 64, 64, 16, False, CPU)


def test_tiles_of_the_low_rank_kernels(monkeypatch):
    assert choice.tile("shrink", 64, 4096, 16, "narrow", False, CPU) is None
    choice._tiles.cache_clear()
    tiles = [row("shrink", m, 4096, None, 16, "narrow", "sm_80", config=(m, 64, 0, 0, 4, 2, 0)) for m in (32, 128)]
    use(monkeypatch, [*tiles, row("dy", 64, None, 512, 16, "split", "sm_80", config=(16, 32, 0, 0, 8, 3, 0))])
    for m, rows in ((1, 32), (33, 128), (100000, 128)):
        assert choice.tile("shrink", m, 4096, 16, "narrow", False, CPU) == Tile(rows, 64, 4, 2)
    assert choice.tile("shrink", 1, 4096, 16, "split", False, CPU) is None
    assert choice.tile("dy", 1, 4096, 16, "split", False, CPU) == Tile(16, 32, 8, 3)


@pytest.mark.parametrize(("length", "stride"), [(4095, 4095), (4095, 4096), (4096, 4097), (4104, 4104)])
def test_rows_that_begin_anywhere_take_a_smaller_tile_than_the_tables(monkeypatch, length, stride):
    use(monkeypatch, [row("shrink", None, 4096, None, 16, "narrow", "sm_80", config=(128, 256, 0, 0, 8, 3, 0))])
    assert lora_plan.tile_for("shrink", 64, 4096, 16, "narrow", False, CPU, 4096) == Tile(128, 256, 8, 3)
    built_in = lora_plan.tile("shrink", 16, "narrow", False, 8)
    found = lora_plan.tile_for("shrink", 64, length, 16, "narrow", False, CPU, stride)
    assert found == built_in._replace(rows=built_in.rows // 2, columns=built_in.columns // 2)


def test_the_compiled_decode_kernel_is_taken_where_it_runs_unless_triton_is_forced(monkeypatch):
    def chosen(backend: str | None, m: int = 16, dropout: bool = False, op: str = "linear") -> str:
        if backend:
            monkeypatch.setenv("FASTLORA_BACKEND", backend)
        return choice.choose(op, m, 512, 512, 16, dropout, CPU, compiled=True).kernel

    assert chosen(None) == "decode-cuda"
    assert chosen("triton") == "decode"
    use(monkeypatch, [row(gpu="sm_80", kernel="dequantize"), row("linear_t", gpu="sm_80", kernel="dequantize")])
    assert chosen("cuda") == "decode-cuda"
    assert chosen("cuda", m=17) == "dequantize"
    assert chosen("cuda", dropout=True) == "dequantize"
    assert chosen("cuda", op="linear_t") == "dequantize"


@pytest.fixture
def a_gpu(monkeypatch):
    """The Triton kernels run on "cuda", as far as `backend` can tell."""
    monkeypatch.setattr(backends, "_no_triton", lambda *_: "")
    backends._backend.cache_clear()
    yield
    backends._backend.cache_clear()


def test_the_backend_says_which_decode_kernel_runs(monkeypatch, a_gpu):
    monkeypatch.setattr(backends, "compiled_decode", lambda device: (False, "not built: run make"))
    assert backends.backend("cuda") == ("triton", "Triton kernels, decode too: not built: run make")
    backends._backend.cache_clear()
    monkeypatch.setattr(backends, "compiled_decode", lambda device: (True, "/lib/decode.so"))
    assert backends.backend("cuda") == ("triton", "Triton kernels, compiled decode")


def test_a_missing_compiled_decode_kernel_cannot_be_forced(monkeypatch, a_gpu):
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"FASTLORA_BACKEND=cuda cannot run on cpu: .* needs a CUDA device"):
        backends.backend("cpu")
    monkeypatch.setattr(backends, "compiled_decode", lambda device: (False, "not built: run make"))
    with pytest.raises(ValueError, match="FASTLORA_BACKEND=cuda cannot run on cuda: not built: run make"):
        backends.backend("cuda")
    monkeypatch.setattr(backends, "compiled_decode", lambda device: (True, "/lib/decode.so"))
    name, reason = backends.backend("cuda")
    assert name == "triton"
    assert "forced by FASTLORA_BACKEND" in reason


def test_a_choice_takes_less_than_five_microseconds():
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(100):
            choice.choose("linear", 33, 4096, 14336, 16, False, CPU)
        best = min(best, (time.perf_counter() - began) / 100)
    assert best < 5e-6


def fastest(monkeypatch, milliseconds: dict[str, float], m: int = 33, fits=lambda other: True) -> str:
    """The kernel that a search finds if kernels take these times."""
    monkeypatch.setattr(search, "_milliseconds", lambda call, device: call() or milliseconds[ran[-1]])
    ran: list[str] = []
    found = search.search("linear", m, 64, 64, 16, False, CPU, False, lambda other: ran.append(other.kernel), fits)
    return found.kernel if ran else f"{found.kernel}, remembered"


def test_a_search_takes_the_fastest_and_remembers_it_up_to_the_next_power_of_two(monkeypatch):
    times = {"dequantize": 1.0, "decode": 3.0, "fused": 2.0}
    assert fastest(monkeypatch, times) == "dequantize"
    assert fastest(monkeypatch, times, m=64) == "dequantize, remembered"
    assert fastest(monkeypatch, {**times, "fused": 0.5}, m=65) == "fused"
    assert fastest(monkeypatch, {**times, "decode": 0.1}, m=3) == "decode"
    assert fastest(monkeypatch, {**times, "decode": 0.1}, m=7, fits=lambda other: other.kernel != "decode") != "decode"


def test_a_candidate_that_asks_too_much_of_the_gpu_is_dropped(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def run(other):
        if other.kernel == "fused":
            raise OutOfResources(1 << 20, 1 << 17, "shared memory")

    monkeypatch.setattr(search, "_milliseconds", lambda call, device: call() or 1.0)
    assert search.search("linear", 33, 64, 64, 16, False, CPU, False, run, lambda other: True).kernel == "dequantize"


def test_the_doctor_says_whether_rows_were_measured(monkeypatch):
    from fastlora.commands import diagnosis

    assert [f.found for f in diagnosis._cuda_kernels()] == ["idle: it needs an NVIDIA GPU"] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(choice, "gpu_of", lambda device: ("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(diagnosis, "compiled_decode", lambda device: (False, "not built: run make"))
    decode, rows = diagnosis._cuda_kernels()
    assert (decode.good, decode.advice) == (False, "not built: run make")
    assert not rows.good
    assert rows.found.startswith("defaults of sm_90, not measured on NVIDIA H200")
    use(monkeypatch, [*choice.read(), row(m=64, k=64, n=64, r=16), row("dy", m=64, n=64, r=16, kernel="narrow")])
    monkeypatch.setattr(diagnosis, "compiled_decode", lambda device: (True, "/lib/decode.so"))
    decode, rows = diagnosis._cuda_kernels()
    assert decode == diagnosis.Finding("compiled decode", "live: /lib/decode.so")
    assert rows == diagnosis.Finding("choice of kernels, cuda:0", "2 rows measured on NVIDIA H200, for 1 shapes")


def test_bounds_end_with_any_m():
    bounds, _ = choice._choices("linear", 512, 512, 16, False, CPU, False, None)
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == ANY_M
