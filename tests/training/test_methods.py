"""Every method in the loop: resumed bit for bit, the same loss however a step is cut, and keys that belong together."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastlora.methods import METHODS
from fastlora.training import recipe as recipes
from fastlora.training import run as runs
from fastlora.training.loop import train
from tests.support.runs import QUIET, lines, losses, recipe

OPTIONS = {
    "lora": {"loraplus_lr_ratio": 4.0},
    "houlsby": {"bottleneck": 8, "quantize": "nf4"},
    "prefix": {"num_virtual_tokens": 4, "init_text": "w1 w2"},
    "prompt": {"num_virtual_tokens": 4, "quantize": "nf4"},
    "full": {},
}


def _recipe(base: Path, out: Path, method: str, **values):
    asked = {"method": method, "learning_rate": 1e-3, **OPTIONS[method], **values}
    if method != "lora":
        asked["r"] = 16  # the default, which says nothing
    return recipe(base, out, **asked)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(base: Path, tmp_path: Path, method: str) -> None:
    values = {"max_steps": 6, "lr_scheduler_type": "constant", "eval_file": str(base / "eval.jsonl"), "eval_steps": 3}
    train(_recipe(base, tmp_path / "whole", method, **values), console=QUIET)
    train(_recipe(base, tmp_path / "cut", method, save_steps=3, **{**values, "max_steps": 3}), console=QUIET)
    train(_recipe(base, tmp_path / "cut", method, save_steps=3, **values), resume=True, console=QUIET)
    for key in ("loss", "eval_loss"):
        found, wanted = ([(row["step"], row[key]) for row in lines(tmp_path / name, key)] for name in ("cut", "whole"))
        assert found == wanted
    name = METHODS[method].files[-1]
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("speed_up", [True, False])
def test_cutting_a_step_into_micro_batches_changes_nothing(
    base: Path, tmp_path: Path, method: str, speed_up: bool
) -> None:
    found = []
    for rows, parts in ((4, 1), (2, 2)):
        out = tmp_path / f"{rows}"
        made = _recipe(
            base,
            out,
            method,
            max_steps=3,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=parts,
            train_sampling_strategy="sequential",
            speed_up=speed_up,
        )
        train(made, console=QUIET)
        found.append([loss for _, loss in losses(out)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_loss_is_over_the_target_tokens_only(base: Path, tmp_path: Path, method: str) -> None:
    run = runs.prepare(_recipe(base, tmp_path, method), QUIET)
    from fastlora.training import loop

    batch = loop._batch(run, run.train_set, [0, 1, 2])
    found = loop.target_loss(run, run.model.train(), batch)
    front = run.method.virtual_tokens
    logits = run.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, front:-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(found, wanted)


def test_lora_plus_gives_b_a_rate_of_its_own(base: Path, tmp_path: Path) -> None:
    run = runs.prepare(_recipe(base, tmp_path, "lora"), QUIET)
    rest, of_b = run.optimizer.param_groups
    names = {id(p): name for name, p in run.model.named_parameters()}
    assert of_b["params"]
    assert all("lora_B" in names[id(p)].split(".") for p in of_b["params"])
    assert all("lora_A" in names[id(p)].split(".") for p in rest["params"])
    assert len(of_b["params"]) == len(rest["params"])
    assert of_b["lr_scale"] / rest["lr_scale"] == 4


def test_a_whole_model_is_trained_in_fp32(base: Path, tmp_path: Path) -> None:
    run = runs.prepare(_recipe(base, tmp_path, "full", bf16=True), QUIET)
    assert {p.dtype for p in run.trainable} == {torch.float32}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "ia3"}, r"method: must be lora \| houlsby"),
        ({"method": "houlsby", "lora_alpha": 8}, "lora_alpha means nothing with method houlsby, only with lora"),
        ({"bottleneck": 8}, "bottleneck means nothing with method lora, only with houlsby"),
        ({"method": "full", "quantize": "nf4"}, "one in 4 bits cannot be trained"),
        ({"method": "prompt", "padding_free": True}, "examples cannot share one"),
        ({"method": "prefix", "gradient_checkpointing": True}, "drops its prefix"),
        ({"method": "prefix", "encoder_hidden_size": 64}, "is of prefix_projection"),
        ({"method": "prompt", "num_virtual_tokens": 0}, "num_virtual_tokens: must be at least 1"),
        ({"optim": "lion"}, "optim: must be adamw_torch"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio: must be more than 0"),
    ],
)
def test_keys_that_do_not_belong_together_are_refused(base: Path, tmp_path: Path, values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(base, tmp_path, **{"r": 16, **values})


def test_qlora_is_lora_over_nf4(base: Path, tmp_path: Path) -> None:
    made = recipe(base, tmp_path, method="qlora")
    assert (made.method, made.quantize) == ("lora", "nf4")


def test_an_optimizer_that_cannot_be_had_is_refused_with_what_to_do(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim: adamw_8bit"):
        runs.prepare(recipe(base, tmp_path, optim="adamw_8bit"), QUIET)


def test_the_option_is_short_for_the_key(base: Path, tmp_path: Path) -> None:
    from fastlora.cli import app

    file = tmp_path / "recipe.yaml"
    values = {
        "model_name_or_path": str(base),
        "train_file": str(base / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
    }
    file.write_text(
        "".join(f"{key}: {str(value).lower() if isinstance(value, bool) else value}\n" for key, value in values.items())
    )
    found = CliRunner().invoke(app, ["train", str(file), "--method", "prompt", "--set", "num_virtual_tokens=3"])
    assert found.exit_code == 0, found.output
    assert recipes.load(tmp_path / "run" / "recipe.yaml").method == "prompt"
