"""Terms of the forecast: bytes that are known exactly, and what each setting changes."""

import pytest
import torch

import fastlora
from fastlora.memory import adapters, optimizer
from fastlora.memory.forecast import Setup, forecast
from fastlora.memory.known import known_shape
from fastlora.memory.runtimes import RUNTIMES
from fastlora.memory.shape import shape_of
from fastlora.memory.weights import entries

LLAMA = known_shape("llama-3-8b")
SMALL = shape_of(
    {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
)


def _peak(**changes):
    return forecast(Setup(SMALL, **{"length": 128, "batch": 2, **changes})).allocated


@pytest.mark.parametrize(("quantized", "nested"), [("nf4", False), ("nf4-nested", True)])
def test_the_bytes_of_nf4_are_those_of_a_quantized_weight(quantized, nested):
    weight = fastlora.quantize(torch.zeros(512, 256, dtype=torch.bfloat16), double_quant=nested)
    held = sum(-(-t.numel() * t.element_size() // 512) * 512 for t in weight.tensors() if t is not None)
    one = shape_of(
        {
            "model_type": "gpt_bigcode",
            "n_embd": 256,
            "n_inner": 512,
            "n_layer": 1,
            "n_head": 4,
            "vocab_size": 8,
            "n_positions": 8,
        }
    )
    found = entries(one, quantized, 2, 2, 2)[0].size
    each = sum(linear.weights for linear in one.linears) / (512 * 256)
    assert found == pytest.approx(held * each, rel=0.02)


def test_counts_of_trained_values():
    assert adapters.lora(LLAMA, 16) == 41_943_040
    assert adapters.lora(LLAMA, 16, "q_proj,v_proj") == 6_815_744
    assert adapters.lora(LLAMA, 8) == 20_971_520
    assert adapters.houlsby_module(4096, 64) == 528_448
    assert adapters.prefix(known_shape("llama-2-7b"), 20) == 5_242_880
    assert adapters.prompt(LLAMA, 20) == 20 * 4096


def test_a_square_linear_trains_256_and_128_times_fewer_values():
    one = shape_of(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 1,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "vocab_size": 1,
        }
    )
    assert adapters.lora(one, 8, "q_proj") == 65_536 == 4096 * 4096 // 256
    assert adapters.lora(one, 16, "q_proj") == 131_072 == 4096 * 4096 // 128


def test_the_terms_add_up_to_the_peak():
    found = forecast(Setup(SMALL, length=128, batch=2))
    assert sum(found.terms.values()) == found.allocated
    assert sum(size for *_, size in found.largest) == found.allocated
    assert found.moment


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("method", adapters.METHODS)
def test_every_runtime_forecasts_every_method(name, method):
    assert _peak(runtime=name, method=method) > 0


def test_checkpointing_holds_less_the_more_it_recomputes():
    order = ("none", "selective", "full", "offload")
    peaks = [_peak(checkpointing=name, length=512, runtime="fastlora") for name in order]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(order)


def test_more_of_everything_holds_more():
    base = _peak()
    for change in (
        {"batch": 4},
        {"length": 256},
        {"r": 32},
        {"width": 4},
        {"optimizer": "adamw"},
        {"attention": "eager"},
    ):
        assert _peak(**change) >= base, change
    assert _peak(runtime="peft", quantized="nf4") > _peak(runtime="peft-lean", quantized="nf4") > _peak(quantized="nf4")
    assert _peak(runtime="peft-lean", dora=True, checkpointing="none") > _peak(
        runtime="peft-lean", checkpointing="none"
    )


def test_sharding_divides_what_it_shards():
    alone = forecast(Setup(LLAMA, "full", 128, optimizer="adamw-bf16"))
    for sharding, divided in (
        ("zero2", ("optimizer", "gradients")),
        ("fsdp", ("optimizer", "gradients")),
        ("zero3", ("optimizer",)),
    ):
        parts = forecast(Setup(LLAMA, "full", 128, optimizer="adamw-bf16", devices=4, sharding=sharding))
        for term in divided:
            assert parts.terms[term] == pytest.approx(alone.terms[term] / 4, rel=0.02), (sharding, term)
    whole, shared = (
        forecast(Setup(LLAMA, "full", 128, devices=4, sharding=name)).terms["weights"] for name in ("ddp", "fsdp")
    )
    assert shared < whole / 2


def test_the_state_of_optimizers():
    assert optimizer.state_bytes(1000, "adamw") == 8000
    assert optimizer.state_bytes(1024, "adamw-8bit") == 2 * 1024 + 2 * 4 * 4
    assert optimizer.state_bytes(1000, "sgd") == 0
    with pytest.raises(ValueError, match="optimizer must be one of adamw"):
        optimizer.state_bytes(1, "lion")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"method": "lorra"}, "method must be one of lora"),
        ({"targets": ("q_proj", "wqkv")}, "targets: wqkv not in this model, which has down_proj"),
        ({"quantized": "nf5"}, "quantized must be one of nf4"),
        ({"runtime": "megatron"}, "runtime must be one of peft"),
        ({"method": "full", "quantized": "nf4"}, "a quantized base cannot be trained"),
        ({"sharding": "tp"}, "sharding must be one of none"),
        ({"checkpointing": "some"}, "checkpointing must be one of"),
        ({"attention": "slow"}, "attention must be one of"),
    ],
)
def test_what_is_asked_wrongly_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        forecast(Setup(SMALL, **changes))


def test_inference_holds_weights_and_a_cache_of_keys_and_values():
    """13.52 GB were measured for Llama-2-7B in 16 bits and a short text (litgpt's resource tables)."""
    shape = known_shape("llama-2-7b")
    short, long = (forecast(Setup(shape, "inference", length)) for length in (100, 1100))
    assert short.allocated == pytest.approx(13.52e9, rel=0.01)
    caches = [size for each in (short, long) for _, name, size in each.largest if name.startswith("cache")]
    assert caches[1] - caches[0] == 1000 * 2 * 32 * 4096 * 2  # a key and a value a token, layer and feature
    assert long.allocated - short.allocated > caches[1] - caches[0]
    assert "gradients" not in short.terms
    assert "optimizer" not in short.terms
