"""The model of a whole step: each term's bytes counted on tensors, and its sums beside what an H100 took."""

import csv
from typing import Any

import pytest
import torch
from fastlora.kernels import cross_entropy, gated, lora, lora_plan, nf4, rms_norm, rotary
from fastlora.kernels.lora_plan import Dropout
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlora
from bench.cli import main
from bench.compare import predict_step
from bench.compare.predict import GPUS
from bench.compare.predict_step import (
    EAGER,
    FLOOR,
    FUSED,
    LAUNCHES,
    PARTS,
    PRESENT,
    Case,
    Way,
    Work,
    dy_pass,
    shrink,
    step,
    total,
    ways,
    x_pass,
)  # fmt: skip
from bench.measure import rows
from bench.measure.floors import EXPAND_BYTES
from bench.measure.models import DECODERS
from bench.measure.record import HEADER, PREDICTED, RESULTS

H100 = GPUS["h100"]
MEASURED = RESULTS / "nvidia-h100-80gb-hbm3"
M, H = 256, 512


def case(model="qwen3-8b", tokens=4096, checkpointing="full", r=16, dropout=0.0):
    rates = H100.rates, lora_plan.PROGRAMS_PER_SM * H100.processors, H100.major
    return Case(DECODERS[model], tokens, min(tokens, 2048), r, dropout, checkpointing, *rates)


def column(asked, parts=PRESENT, by="fastlora", launch_ms=0.0):
    return step(asked, Way(by, by, frozenset(parts)), launch_ms)


class Counter(TorchDispatchMode):
    """Bytes that torch's operators read and write, an operator a kernel; uneven where layouts differ."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work(0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.is_view or function.overloadpacket.__name__ == "detach":
            return found
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
        if "nll_loss" in function.overloadpacket.__name__:  # it reads or writes a value a row, beside zeros
            tensors = [t for t in tensors if "backward" in function.overloadpacket.__name__][-1:]
        if tensors:
            moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
            uneven = len({(t.shape, t.stride()) for t in tensors if t.dim()}) > 1
            self.work = total([self.work, Work(0, moved, 1) if uneven else Work(moved, 0, 1)])
        return found


def counted(function, inputs, values):
    """(forward, backward) as torch's operators have it, bytes a value."""
    found = []
    for x in inputs:
        x.requires_grad_()
    with Counter() as counter:
        y = tree_leaves(function(*inputs))
    found.append(counter.work)
    dy = [torch.empty_like(each).contiguous() for each in y]
    with Counter() as counter:
        torch.autograd.grad(y, inputs, dy)
    found.append(counter.work)
    return [Work(even / values, uneven / values, launches) for even, uneven, launches in found]


def transformers_modules():
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    def empty(*shape):
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    norm = qwen3.Qwen3RMSNorm(H).to(device="meta", dtype=torch.bfloat16).requires_grad_(False)
    angles = empty(1, M, 128)
    labels = torch.empty(1, M, device="meta", dtype=torch.int64)

    def turn(q, k):
        return qwen3.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angles, angles)

    return {
        "norm": (norm, [empty(1, M, H)], M * H),
        "rotary": (turn, [empty(1, M, 32, 128), empty(1, M, 8, 128)], M * 40 * 128),
        "mlp": (lambda gate, up: nn.functional.silu(gate) * up, [empty(1, M, H), empty(1, M, H)], M * H),
        "loss": (lambda z: ForCausalLMLoss(z, labels, 5000), [empty(1, M, 5000)], M * 5000),
    }


@pytest.mark.parametrize("part", EAGER)
def test_the_bytes_of_transformers_modules(part):
    pytest.importorskip("transformers")
    found = counted(*transformers_modules()[part])
    for ours, theirs in zip(EAGER[part], found, strict=True):
        assert ours.even + ours.uneven == pytest.approx(theirs.even + theirs.uneven, rel=0.01)
        assert ours.uneven == pytest.approx(theirs.uneven, rel=0.01, abs=0.02)
        assert ours.launches == pytest.approx(theirs.launches, abs=1)  # the loss pads its labels


@pytest.fixture
def launched(monkeypatch):
    """Bytes of the tensors that fastlora's launchers were given, each once; nothing runs."""
    taken: list[list[Tensor]] = []

    def launch(key, grid, tensors, numbers):
        taken.append(tensors)

    names = {
        rms_norm: ("_launcher", "_backward_launcher"), gated: ("_launcher", "_backward_launcher"),
        rotary: ("_launcher",), cross_entropy: ("_launcher",), nf4: ("_launcher",),
        lora: ("_shrink_launcher", "_expand_launcher", "_dy_launcher", "_x_launcher", "_sum_launcher"),
    }  # fmt: skip
    for module, launchers in names.items():
        for name in launchers:
            monkeypatch.setattr(module, name, launch)
    monkeypatch.setattr(lora_plan, "programs_wanted", lambda index: lora_plan.PROGRAMS_PER_SM * H100.processors)
    lora_plan.plan.cache_clear()

    def moved() -> Work:
        once = [{t.untyped_storage().data_ptr(): t for t in tensors} for tensors in taken]
        number, found = len(taken), sum(t.numel() * t.element_size() for each in once for t in each.values())
        taken.clear()
        return Work(found, 0, number)

    yield moved
    lora_plan.plan.cache_clear()


def bf16(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16)


def check(ours, theirs, values=1, rel=0.01):
    assert ours.even * values == pytest.approx(theirs.even, rel=rel)
    assert ours.launches == theirs.launches


def test_the_bytes_of_fused_parts(launched):
    x, weight = bf16(M, H), bf16(H)
    _, rstd = rms_norm.forward(x, weight, 1e-6, 0.0, x.dtype)
    check(FUSED["norm"][0], launched(), M * H)
    rms_norm.backward(bf16(M, H), x, weight, rstd, 0.0)
    check(FUSED["norm"][1], launched(), M * H)
    gated.forward(x, bf16(M, H), "silu")
    check(FUSED["mlp"][0], launched(), M * H)
    gated.backward(bf16(M, H), x, bf16(M, H), "silu")
    check(FUSED["mlp"][1], launched(), M * H)
    q, k, angles = bf16(1, M, 32, 128), bf16(1, M, 8, 128), bf16(1, M, 64)
    for place, back in enumerate((False, True)):
        rotary.rotate(q, k, angles, angles, True, back)
        check(FUSED["rotary"][place], launched(), M * 40 * 128, rel=0.02)  # and the angles
    z, dz = torch.empty(M, 5000), bf16(M, 5000)
    cross_entropy.cross_entropy(z, torch.zeros(M, dtype=torch.int64), 1.0, 0.0, 0.0, -100, torch.ones(()), dz)
    found = launched()
    check(FUSED["loss"][0], found._replace(even=found.even + 4 * z.numel()), z.numel())  # z is read twice


@pytest.mark.parametrize(("k", "n", "r"), [(4096, 1024, 16), (4096, 12288, 16), (12288, 4096, 48)])
def test_the_bytes_of_low_rank_passes(k, n, r, launched):
    asked, m = case(r=r), 1024
    asked = asked._replace(tokens=m)
    x, dy, a, b = bf16(m, k), bf16(m, n), torch.empty(r, k), torch.empty(n, r)
    h, none = torch.empty(m, r), Dropout()
    cuts = {op: lora_plan.tile(op, lora_plan.block_r(r), "split", False, H100.major) for op in ("shrink", "dy", "x")}

    lora.shrink(x, a, none, cut=cuts["shrink"])
    check(shrink(asked, k, r), launched())
    lora.total(lora.x_parts(x, h, none, a.dtype, cut=cuts["x"]))
    check(x_pass(asked, k, r), launched())
    _, db = lora.dy_parts(dy, b, h, 1.0, True, True, cut=cuts["dy"])
    found = launched()
    lora.total(db)
    sums = launched()
    check(dy_pass(asked, n, r), found._replace(even=found.even + sums.even), rel=0.02)


def test_the_bytes_of_adding_an_update_and_of_expanding(launched):
    lora.expand(torch.empty(M, 16), torch.empty(H, 16), 1.0, torch.bfloat16, Dropout(), None, torch.empty(M, H))
    assert launched().even == pytest.approx(6 * M * H, rel=0.2)  # h and B too, which count for little in wide layers
    weight = fastlora.quantize(torch.randn(512, 1024))
    nf4.fill(weight, bf16(512, 1024), None, None, 0.0)
    assert launched().even == pytest.approx(EXPAND_BYTES * 512 * 1024, rel=0.01)


def test_the_bytes_of_dropout():
    x = torch.empty(M, H, device="meta", dtype=torch.bfloat16)
    with Counter() as forward:
        y, mask = torch.native_dropout(x, 0.05, True)
    with Counter() as backward:
        torch.ops.aten.native_dropout_backward(y, mask, 1.0)
    without, dropped = (predict_step.lora(case(dropout=p), Way("peft", "peft"), 0) for p in (0.0, 0.05))
    x_values = 4096 * sum(k for k, _ in DECODERS["qwen3-8b"].linears)
    for term, counter in (("LoRA: shrink", forward), ("LoRA: x pass", backward)):
        more = (dropped[term].even - without[term].even) / x_values
        assert more == sum(counter.work[:2]) / x.numel()


def test_the_bytes_of_peft_over_bitsandbytes():
    peft, bnb = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    k, n = 512, 2048
    base = nn.Sequential(bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")).to("cpu")
    base.is_loaded_in_4bit = True
    options = {"r": 2, "target_modules": ["0"], "lora_dropout": 0.0}
    model = peft.get_peft_model(base, peft.LoraConfig(**options), autocast_adapter_dtype=False)
    layer = model.base_model.model[0].to(torch.bfloat16)
    x, base_product = bf16(M, k).normal_().requires_grad_(), layer.base_layer
    adapters = [layer.lora_A.default.weight, layer.lora_B.default.weight]
    with Counter() as whole:
        y = layer(x)
    with Counter() as product:
        bare = base_product(x)
    dy = torch.empty_like(y)
    with Counter() as back:
        torch.autograd.grad(y, [x, *adapters], dy)
    with Counter() as bare_back:
        torch.autograd.grad(bare, [x], dy)
    asked = case()._replace(tokens=M, model=Linear(k, n))
    terms = predict_step.lora(asked, Way("peft", "peft"), 0)
    forward = terms["LoRA: shrink"].even + terms["LoRA: update"].even
    assert forward == pytest.approx(sum(whole.work[:2]) - sum(product.work[:2]), rel=0.02)
    backward = terms["LoRA: dy pass"].even + terms["LoRA: x pass"].even
    assert backward == pytest.approx(sum(back.work[:2]) - sum(bare_back.work[:2]), rel=0.02)


class Linear:
    """A model of one linear."""

    def __init__(self, k, n):
        self.linears = ((k, n),)


def measured(provider, model="qwen3-8b-4", tokens=4096):
    """Milliseconds of the device, the newest row."""
    for row in rows.read([MEASURED / "steps.csv"]):
        if (row.kernel, row.provider, row.mode, row.M) == (f"step_{model}_nf4", provider, "kernels", tokens):
            return row.p50
    raise AssertionError("no such row")


def test_the_rates_are_those_measured():
    found = {row.kernel: row for row in rows.read([MEASURED / "kernels.csv"]) if row.kernel in ("copy", "matmul")}
    copy, product = found["copy"], found["matmul"]
    assert 4 * copy.M * copy.K / copy.p50 * 1e3 == pytest.approx(H100.rates.bytes_per_s, rel=0.02)
    assert 2 * product.M * product.K * product.N / product.p50 * 1e3 == pytest.approx(H100.rates.flop_per_s, rel=0.02)
    shares = {"merged": ("fastlora-fp32", 16), "plain": ("fastlora-bf16", 0), "bitsandbytes": ("bitsandbytes", 0)}
    for row in rows.read([MEASURED / "kernels.csv"]):
        for how, kind in shares.items():
            if row.kernel == "nf4_dequantize" and (row.provider, row.R) == kind and (row.K, row.N) == (4096, 12288):
                assert row.metric != "time" or row.share_of_floor == pytest.approx(
                    predict_step.EXPANSION[how], abs=0.01
                )


STEPS = {  # provider: (by, parts, checkpointing)
    "peft": ("peft", (), "full"),
    "fastlora": ("fastlora", (), "full"),
    "speed-up": ("fastlora", predict_step.MEASURED, "full"),
    "speed-up-kept": ("fastlora", predict_step.MEASURED, "selective"),
}


@pytest.mark.parametrize(("model", "tokens"), [("qwen3-8b-4", 4096), ("qwen3-8b-4", 1024), ("qwen3-0.6b", 4096)])
@pytest.mark.parametrize("provider", STEPS)
def test_whole_steps_as_measured(model, tokens, provider):
    by, parts, checkpointing = STEPS[provider]
    found = sum(column(case(model, tokens, checkpointing), parts, by).values())
    assert found == pytest.approx(measured(provider, model, tokens), rel=0.15)


@pytest.mark.parametrize("provider", ["speed-up", "speed-up-kept"])
def test_a_small_model_with_few_tokens_is_predicted_too_short(provider):
    """Its kernels take microseconds, whatever they move. The rows are of a commit without the part "loss"."""
    by, parts, checkpointing = STEPS[provider]
    found = sum(column(case("qwen3-0.6b", 1024, checkpointing), parts[:3], by).values())
    assert found == pytest.approx(0.73 * measured(provider, "qwen3-0.6b", 1024), rel=0.05)


TERMS = {  # of the model: names of its kernels in the profile
    "base products": ("nvjet",),
    "attention": ("cudnn", "void cudnn"),
    "norms": ("_rms_norm",),
    "rotary": ("_rotary",),
    "SwiGLU": ("_gated",),
    "LoRA": ("_lora",),
    "expansion": ("_nf4",),
    "residuals": ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>",),
}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("provider", ["speed-up", "speed-up-kept"])
def test_terms_as_profiled(term, provider):
    with (MEASURED / "step-kernels.csv").open(newline="") as file:
        took = sum(
            float(row["us"]) / 1e3
            for row in csv.DictReader(file)
            if (row["model"], row["base"], row["tokens"], row["provider"]) == ("qwen3-8b-4", "nf4", "4096", provider)
            and row["name"].startswith(TERMS[term])
        )
    by, parts, checkpointing = STEPS[provider]
    terms = column(case("qwen3-8b-4", checkpointing=checkpointing), parts, by)
    found = sum(ms for name, ms in terms.items() if name.startswith(term))
    assert found == pytest.approx(took if term != "LoRA" else 0.76 * took, rel=0.15)  # which is predicted too short


SAVED = {
    "norm": {"norms", "norms of q and k"},
    "rotary": {"rotary"},
    "mlp": {"SwiGLU"},
    "loss": {"loss"},
    "groups": {"LoRA: shrink", "LoRA: x pass", "residuals and sums of dx"},
    "weights-kept": {"expansion and merge"},
    "weights-once": {"expansion and merge"},
    "attention-kept": set(),
}


def test_parts_and_checkpointing_save_what_they_are_for():
    asked = case()
    every, none = (column(asked, parts) for parts in (PARTS, ()))
    assert sum(every.values()) < sum(none.values())
    for part in PARTS:
        other = column(asked, [part])
        saved = {name for name in none if other[name] < none[name]}
        assert saved == SAVED[part], part
    selective = case(checkpointing="selective")
    kept = column(selective, ["attention-kept"])
    assert {name for name, ms in column(selective, []).items() if kept[name] < ms} == {"attention"}
    for by in ("peft", "fastlora"):
        times = [sum(column(case(checkpointing=c), PRESENT, by).values()) for c in ("none", "selective", "full")]
        assert times == sorted(times)
        assert (times[1] == times[2]) is (by == "peft")
        assert sum(column(case(dropout=0.05), PRESENT, by).values()) > times[2]
        assert sum(column(asked, PRESENT, by, launch_ms=1.0).values()) > 10 * times[2]
        assert column(asked, PRESENT, by, launch_ms=1e-3)[LAUNCHES] == 0
        floor = column(asked, (), FLOOR)
        assert sum(floor.values()) < times[0]
        assert floor["attention"] == column(case(checkpointing="none"))["attention"]
    assert [way.name for way in ways(PRESENT)] == ["peft", "fastlora", "fastlora-all", "floor"]
    assert ways([])[1].name == "fastlora-linears"
    assert len(ways(PARTS)) == 3
    assert column(case("llama-3-8b"))["norms of q and k"] == 0


def test_the_command_writes_rows_that_say_they_are_predicted(tmp_path, capsys):
    path = tmp_path / "new" / "steps.csv"
    options = ["--step", "--models", "qwen3-8b", "llama-3-8b", "--gpu", "h100", "a100", "--out", str(path)]
    assert main(["predict", *options]) == 0
    assert path.read_text().splitlines()[0] == HEADER
    found = rows.read([path])
    assert all(row.provider.startswith(PREDICTED) and row.mode.startswith("step-checkpointed-2048") for row in found)
    assert {row.kernel for row in found} == {"step_qwen3-8b_nf4", "step_llama-3-8b_nf4"}
    whole = {row.provider: row for row in found if row.metric == "time" and ":" not in row.mode}
    assert whole[PREDICTED + "floor"].share_of_floor == pytest.approx(1)
    assert 0 < whole[PREDICTED + "peft"].share_of_floor < whole[PREDICTED + "fastlora"].share_of_floor < 1
    output = capsys.readouterr().out
    assert "NVIDIA H100 SXM, predicted: 4096 tokens" in output
    assert "predicted, not measured" in output
    for wrong in (["--models", "gpt-2"], ["--tokens", "3000"], ["--dropout", "1"], ["--shapes", "64x64"]):
        with pytest.raises(SystemExit):
            main(["predict", "--step", "--out", str(path), *wrong])
