"""Recipes: values and errors, overrides, what a resumed run may change, the learning rate of each step."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastlora.training import recipe as recipes
from fastlora.training.recipe import Recipe, check_resumable, from_mapping, learning_rate, load, parse_overrides

NEEDED = {"model_name_or_path": "model", "train_file": "train.jsonl"}


def make(**values: Any) -> Recipe:
    return from_mapping({**NEEDED, **values})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("lora_aplha", "lora_alpha"),
        ("max_step", "max_steps"),
        ("lr", "learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("load_in_4bit", "quantize"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{key}'; did you mean '{nearest}'"):
        make(**{key: 1})


@pytest.mark.parametrize("key", ["zzz", "a" * 10_000, "", 3, None, 2.5, pytest.param(16**9000, id="huge")])
def test_unknown_key_that_is_like_no_other(key: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown key .*; `fastlora keys` lists those that exist$") as error:
        from_mapping({**NEEDED, key: 1})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_steps", "many", "a whole number"),
        ("max_steps", 1.5, "a whole number"),
        ("max_steps", True, "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", 0, "more than 0"),
        ("learning_rate", "nan", "more than 0"),
        ("gradient_checkpointing", "maybe", "true, false, min, selective or auto"),
        ("bf16", 1, "true or false or null"),
        ("target_modules", 3, "a list of strings"),
        ("target_modules", [1], "a list of strings"),
        ("r", 0, "at least 1"),
        ("r", 257, "at most 256"),
        ("lora_dropout", 1.0, "below 1"),
        ("max_length", 1, "at least 2"),
        ("max_steps", 0, "at least 1, or -1"),
        ("save_total_limit", 0, "at least 1"),
        ("quantize", "int8", "nf4 or null"),
        ("lr_scheduler_type", "step", "linear"),
        ("train_sampling_strategy", "shuffle", "group_by_length"),
        ("output_dir", "", "a directory"),
        ("seed", None, "a whole number"),
        ("seed", 2**31, "0 to 2147483647"),
        ("seed", -1, "0 to 2147483647"),
        pytest.param("r", 16**9000, "at most 256, got a huge int", id="huge int"),
        pytest.param("learning_rate", 16**9000, "a number", id="huge float"),
        ("num_train_epochs", 1e300, "at most 1e9"),
        ("target_modules", "(q_proj", "a list of names or a regular expression"),
        ("exclude_modules", "*", "a list of names or a regular expression"),
        ("train_file", "a\0b", "without control characters"),
        ("output_dir", "runs/\ud800", "without control characters"),
    ],
)
def test_bad_value_names_the_key_and_what_was_expected(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: .*{expected}"):
        make(**{key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_name_or_path": ""}, "model_name_or_path: missing"),
        ({"train_file": None}, "exactly one"),
        ({"dataset_name": "d"}, "exactly one"),
        ({"eval_file": "e", "dataset_test_split": "t"}, "one of the two"),
        ({"dataset_test_split": "t"}, "needs dataset_name"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "one of the two"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1}, "constant_with_warmup"),
        ({"eval_steps": 5}, "nothing to evaluate on"),
        ({"eval_on_start": True}, "nothing to evaluate on"),
        ({"cuda_graphs": True, "padding_free": False}, "cuda_graphs: needs padding_free"),
        ({"keep_expanded": True, "gradient_accumulation_steps": 2}, "set quantize to nf4, or keep_expanded to false"),
        ({"keep_expanded": True, "quantize": "nf4"}, "with one micro-batch a step nothing is expanded twice"),
        (
            {"keep_expanded": True, "quantize": "nf4", "gradient_accumulation_steps": 2, "cuda_graphs": True},
            "keep_expanded, cuda_graphs: .* give one of the two",
        ),
        ({"activation_offloading": True}, "set gradient_checkpointing too"),
        (
            {"activation_offloading": True, "gradient_checkpointing": True, "cuda_graphs": True},
            "activation_offloading, cuda_graphs: .* give one of the two",
        ),
        ({"torch_compile": True, "speed_up": False}, "torch_compile: is a part of speed_up"),
        ({"torch_compile": True, "cuda_graphs": True}, "torch_compile, cuda_graphs: give one of the two"),
    ],
)
def test_keys_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_a_quoted_value_is_cut() -> None:
    aliases: list[Any] = ["x"]
    for _ in range(40):
        aliases = [aliases] * 9  # written out it would be longer than any memory
    for value in ("x" * 10**6, list(range(10**6)), aliases, {"a\n" * 500: "\x1b[31m"}):
        with pytest.raises(ValueError, match="max_steps: expected a whole number, got ") as error:
            make(max_steps=value)
        assert len(str(error.value)) < 300
        assert str(error.value).isprintable()


def test_a_large_whole_number_keeps_its_value() -> None:
    assert make(max_steps=2**62 + 1).max_steps == 2**62 + 1


def test_values_take_the_type_of_their_key() -> None:
    made = make(learning_rate="1e-3", max_steps=10.0, lora_alpha=32, target_modules=("q_proj", "v_proj"))
    assert (made.learning_rate, made.max_steps, made.lora_alpha) == (1e-3, 10, 32.0)
    assert type(made.max_steps) is int
    assert type(made.lora_alpha) is float
    assert made.target_modules == ["q_proj", "v_proj"]


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model_name_or_path: model\ntrain_file: a.jsonl\nlearning_rate: 2.0e-4\nmax_steps: 3\n")
    loaded = load(path, ["learning_rate=1e-3", "target_modules=[q_proj, v_proj]", "save_steps=null", "train_file=b=c"])
    assert loaded.learning_rate == 1e-3
    assert loaded.target_modules == ["q_proj", "v_proj"]
    assert loaded.save_steps is None
    assert loaded.train_file == "b=c"
    assert loaded.max_steps == 3


@pytest.mark.parametrize("override", ["learning_rate", "=3", "target_modules=[q_proj"])
def test_malformed_override(override: str) -> None:
    with pytest.raises(ValueError, match="--set"):
        parse_overrides([override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "key: value"),
        ("", "key: value"),
        ("a: [", r"not valid YAML \(expected the node content, but found '<stream end>', line 1, column 5\)"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("a: 2026-99-99", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: *b", "not valid YAML"),
        ("r: 8\nlora_alpha: 16\nr: 16", r"the key 'r' is given twice, line 3, column 1"),
        ("a: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_unusable_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
    if message != "key: value":
        with pytest.raises(ValueError, match=r"^--set .*: the value is not valid YAML") as error:
            parse_overrides([text.replace("a: ", "a=", 1) if text.startswith("a: ") else f"a={text}"])
        assert len(str(error.value).splitlines()) == 1


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    cases = {"a\0b": "cannot be read", "a" * 5000: "cannot be read", str(tmp_path / "folder"): "Is a directory"}
    for path, message in {**cases, str(tmp_path / "latin.yaml"): r"not UTF-8 \(byte 3\)"}.items():
        with pytest.raises(ValueError, match=message) as error:
            load(path)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 400


def test_a_recipe_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfmodel_name_or_path: m\r\ntrain_file: t\r\n")
    assert load(tmp_path / "r.yaml") == from_mapping({"model_name_or_path": "m", "train_file": "t"})


def test_missing_file_names_the_built_in_recipes() -> None:
    with pytest.raises(ValueError, match=r"no such recipe file.*demo"):
        load("nowhere.yaml")


def test_built_in_recipes_are_valid() -> None:
    paths = sorted(recipes.BUILT_IN.glob("*.yaml"))
    assert {"demo", "qlora"} <= {path.stem for path in paths}
    for path in paths:
        values = recipes.read(path.stem)
        filled = from_mapping({**NEEDED, "eval_file": "eval.jsonl", **values}, source=path.name)
        assert filled.quantize == "nf4"


def test_yaml_round_trip(tmp_path: Path) -> None:
    made = make(target_modules=["q_proj"], learning_rate=1e-5, save_steps=None, eval_file="e.jsonl", eval_steps=4)
    path = tmp_path / "r.yaml"
    path.write_text(made.to_yaml())
    assert load(path) == made


def test_every_key_is_described() -> None:
    described = recipes.describe()
    assert [row[0] for row in described] == [field.name for field in dataclasses.fields(Recipe)]
    assert all(isinstance(meaning, str) and meaning for _, _, meaning in described)
    assert ("max_steps", "-1") in [row[:2] for row in described]


def test_keys_are_those_of_transformers() -> None:
    of_run = (
        "output_dir max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
        "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm save_steps save_total_limit "
        "eval_steps logging_steps seed bf16 gradient_checkpointing use_cpu eval_on_start train_sampling_strategy"
    )
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    ours = {field.name for field in dataclasses.fields(Recipe)}
    assert set(of_run.split()) <= theirs & ours


@pytest.mark.parametrize(("key", "value"), [("learning_rate", 1e-3), ("seed", 1), ("max_steps", 20), ("r", 8)])
def test_resume_refuses_a_changed_recipe_by_key(key: str, value: Any) -> None:
    saved = dataclasses.asdict(make(max_steps=10))
    with pytest.raises(ValueError, match=f"changed recipe: {key} was .*, is now {value}"):
        check_resumable(saved, make(**{"max_steps": 10, key: value}))


def test_resume_allows_what_changes_no_loss() -> None:
    saved = dataclasses.asdict(make(save_steps=5))
    check_resumable(saved, make(save_steps=7, logging_steps=1, output_dir="elsewhere", gradient_checkpointing=True))
    saved = dataclasses.asdict(make(max_steps=10, lr_scheduler_type="constant"))
    check_resumable(saved, make(max_steps=20, lr_scheduler_type="constant"))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedule_is_that_of_transformers_from_the_peak_on(name: str, warmup: int) -> None:
    total = 40
    recipe = make(lr_scheduler_type=name, warmup_steps=warmup, learning_rate=1e-3)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate(recipe, step, total) for step in range(total)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    assert ours[:warmup] == pytest.approx([1e-3 * (step + 1) / (warmup + 1) for step in range(warmup)])
    assert min(ours) > 0


def test_warmup_ratio_is_a_share_of_all_steps() -> None:
    by_ratio, by_steps = make(warmup_ratio=0.1), make(warmup_steps=3)
    steps = range(30)
    assert [learning_rate(by_ratio, s, 30) for s in steps] == [learning_rate(by_steps, s, 30) for s in steps]


def test_constant_is_constant() -> None:
    recipe = make(lr_scheduler_type="constant")
    assert {learning_rate(recipe, step, 10) for step in range(10)} == {recipe.learning_rate}


def test_built_in_recipe_by_bare_name() -> None:
    assert load("qlora", ["max_steps=1"]).max_steps == 1
    assert recipes.read("demo")["output_dir"] == "runs/demo"
