"""Data: formats and where the loss falls, refusals with file and line, the order of training, padding."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastlora.training import data
from fastlora.training.data import IGNORED, BatchPlan, before_targets, collate, count_targets
from fastlora.training.recipe import Recipe, from_mapping

MARKED = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' .' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ ' ' }}{% endfor %}"
)
UNMARKED = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = ["<end>", "<unk>", "a", "b", "c", "d", "e", "f", "user", "assistant", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


def recipe(path: Path, **values: Any) -> Recipe:
    return from_mapping({"model_name_or_path": "m", "train_file": str(path), **values})


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def example(examples: data.TokenSet, row: int) -> tuple[list[int], list[int]]:
    bounds = slice(examples.offsets[row], examples.offsets[row + 1])
    return examples.tokens[bounds].tolist(), examples.labels[bounds].tolist()


def test_text_has_loss_everywhere_and_ends(tmp_path: Path, tokenizer: Any) -> None:
    loaded = data.load(recipe(write(tmp_path / "t.jsonl", {"text": "a b"}, {"text": "c <end>"})), tokenizer)
    assert loaded is not None
    assert example(loaded, 0) == ([2, 3, 0], [2, 3, 0])
    assert example(loaded, 1) == ([4, 0], [4, 0])


def test_only_the_completion_has_loss(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "a b", "completion": " c d"})
    loaded = data.load(recipe(path), tokenizer)
    assert loaded is not None
    assert example(loaded, 0) == ([2, 3, 4, 5, 0], [IGNORED, IGNORED, 4, 5, 0])
    everything = data.load(recipe(path, completion_only_loss=False), tokenizer)
    assert everything is not None
    assert example(everything, 0) == ([2, 3, 4, 5, 0], [2, 3, 4, 5, 0])


def test_token_across_the_border_is_completion(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "a assi", "completion": "stant c"})
    loaded = data.load(recipe(path), tokenizer)
    assert loaded is not None
    assert example(loaded, 0) == ([2, 9, 4, 0], [IGNORED, 9, 4, 0])


def test_only_the_assistant_has_loss(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    path = write(tmp_path / "t.jsonl", {"messages": messages})
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    loaded = data.load(recipe(path), tokenizer)
    assert loaded is not None
    assert example(loaded, 0) == (
        [8, 2, 9, 3, 4, 10, 8, 5, 9, 6, 10],
        [IGNORED, IGNORED, IGNORED, 3, 4, 10, IGNORED, IGNORED, IGNORED, 6, 10],
    )


def test_unmarked_template_is_refused_unless_everything_is_wanted(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(ValueError, match="has none"):
        data.load(recipe(path), tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", UNMARKED)
    with pytest.raises(ValueError, match=r"assistant_only_loss: .*does not mark.*assistant_only_loss=false"):
        data.load(recipe(path), tokenizer)
    loaded = data.load(recipe(path, assistant_only_loss=False), tokenizer)
    assert loaded is not None
    assert example(loaded, 0) == ([8, 2], [8, 2])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"text": "a"}\n\n["b"]\n', 3, "expected an object"),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', 2, "half of a character"),
        ('{"text": "a"}\n{"text": "b", "\\uDE00": 1}\n', 2, "half of a character"),
        ('{"text": "a"}\n{"text": ' + "[" * 100_000 + "\n", 2, "nested too deeply"),
        ('{"text": "a"}\n{"text": ' + "9" * 5000 + "}\n", 2, "not valid JSON"),
        ('{"text": "a"}\n{"text": \n', 2, "not valid JSON"),
        ('{"text": "a"}\n["b"]\n', 2, "expected an object"),
        ('{"text": "a"}\n{"txt": "b"}\n', 2, "'text' is missing"),
        ('{"text": "a"}\n{"text": 3}\n', 2, "must be a string, found int"),
        ('{"text": ""}\n', 1, "'text' is empty"),
        ('{"prompt": "a", "completion": ""}\n', 1, "'completion' is empty"),
        ('{"question": "a"}\n', 1, r"expected messages \| prompt"),
        ('{"messages": []}\n', 1, "list of objects"),
        ('{"messages": [{"role": "user"}]}\n', 1, "list of objects"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, tokenizer: Any, text: str, line: int, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        data.load(recipe(path), tokenizer)
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_marks_blank_lines_and_compression_change_nothing(tmp_path: Path, tokenizer: Any) -> None:
    rows = '{"text": "a b \\ud83d\\ude00"}\n{"text": "c"}\n'
    plain = data.load(recipe(write(tmp_path / "t.jsonl", *map(json.loads, rows.splitlines()))), tokenizer)
    forms = {
        "mark.jsonl": b"\xef\xbb\xbf" + rows.encode(),
        "blank.jsonl": b"\n" + rows.replace("\n", "\r\n \t\r\n").encode(),
        "packed.jsonl.gz": gzip.compress(rows.encode()),
        "list.json.gz": gzip.compress(f"[{','.join(rows.splitlines())}]".encode("utf-8-sig")),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        loaded = data.load(recipe(tmp_path / name), tokenizer)
        assert loaded is not None
        assert plain is not None
        assert loaded.fingerprint() == plain.fingerprint(), name


def test_unusable_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe4"}\n')
    (tmp_path / "object.json").write_text('{"text": "a"}')
    (tmp_path / "broken.json").write_text('[\n{"text": "a"},\n]')
    cases = {"none": "no such file", "empty": "no records", "latin": "not UTF-8"}
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            data.load(recipe(tmp_path / f"{name}.jsonl"), tokenizer)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12])
    (tmp_path / "not.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("cut.jsonl.gz", "not.jsonl.gz", "folder.jsonl", "a" * 5000):
        with pytest.raises(ValueError, match=f"{name[:99]}.*: cannot be read"):
            data.load(recipe(tmp_path / name), tokenizer)
    with pytest.raises(ValueError, match="expected a list of objects"):
        data.load(recipe(tmp_path / "object.json"), tokenizer)
    with pytest.raises(ValueError, match=r"broken.json:[23]: not valid JSON"):
        data.load(recipe(tmp_path / "broken.json"), tokenizer)


def test_json_list_gives_the_same_as_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "a b"}, {"text": "c"}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    from_json = data.load(recipe(tmp_path / "t.json"), tokenizer)
    from_lines = data.load(recipe(write(tmp_path / "t.jsonl", *rows)), tokenizer)
    assert from_json is not None
    assert from_lines is not None
    assert from_json.fingerprint() == from_lines.fingerprint()


def test_local_dataset_gives_the_same_as_its_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": "a b"}, {"text": "c"}]
    path = write(tmp_path / "train.jsonl", *rows)
    named = Recipe(model_name_or_path="m", dataset_name=str(tmp_path))
    from_dataset, from_file = data.load(named, tokenizer), data.load(recipe(path), tokenizer)
    assert from_dataset is not None
    assert from_file is not None
    assert from_dataset.fingerprint() == from_file.fingerprint()
    assert data.load(named, tokenizer, evaluation=True) is None


@pytest.mark.parametrize(
    ("name", "message"), [("{}/none", "no.*data file"), ("{}/broken", "dataset_name: cannot load"), ("a//b", "a//b")]
)
def test_a_dataset_that_cannot_be_loaded(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": \n')
    with pytest.raises(ValueError, match=f"(?i){message}") as error:
        data.load(Recipe(model_name_or_path="m", dataset_name=name.format(tmp_path)), tokenizer)
    assert str(error.value).startswith("dataset_name: cannot load")
    assert len(str(error.value).splitlines()) == 1


def test_a_split_that_does_not_exist(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "train.jsonl", {"text": "a"})
    named = Recipe(model_name_or_path="m", dataset_name=str(tmp_path), dataset_train_split="dev")
    with pytest.raises(ValueError, match=r"dataset_name: cannot load .*split 'dev' \(.*train"):
        data.load(named, tokenizer)


TOOLS = [{"type": "function", "function": {"name": "a"}}, {"type": "function", "function": {"name": "b", "x": 1}}]
CALLS = MARKED.replace("m['content'] + ' .'", "m.get('content', '') + ' .'")
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] + ' ' }}"
    "{% if tool['function']['x'] is defined %}f {% endif %}{% endfor %}{% if think %}e {% endif %}" + CALLS
)


def said(words: str, tokenizer: Any) -> list[int]:
    return tokenizer(words)["input_ids"]


@pytest.mark.parametrize("form", ["objects", "text"])
def test_tools_and_variables_reach_the_template(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    messages = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    columns: dict[str, Any] = {"tools": TOOLS, "chat_template_kwargs": {"think": True}}
    if form == "text":
        columns = {key: json.dumps(value) for key, value in columns.items()}
    path = write(tmp_path / "t.jsonl", {"messages": messages, **columns}, {"messages": messages, "tools": None})
    loaded = data.load(recipe(path), tokenizer)
    assert loaded is not None
    assert example(loaded, 0)[0] == said("a b f e user c assistant d .", tokenizer)
    assert example(loaded, 1)[0] == said("user c assistant d .", tokenizer)
    assert loaded.unread == ()


def test_tools_of_a_dataset_are_those_of_its_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow gives the first tool an `x` too, null, and messages without tool calls a null for them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    messages = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    calling = [messages[0], {"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}, messages[1]]
    rows = [{"messages": messages, "tools": TOOLS}, {"messages": messages}, {"messages": calling, "tools": TOOLS[:1]}]
    path = write(tmp_path / "train.jsonl", *rows)
    from_dataset = data.load(Recipe(model_name_or_path="m", dataset_name=str(tmp_path)), tokenizer)
    from_file = data.load(recipe(path), tokenizer)
    assert from_dataset is not None
    assert from_file is not None
    assert from_dataset.fingerprint() == from_file.fingerprint()
    assert example(from_file, 2)[0] == said("a user c assistant . assistant d .", tokenizer)


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_a_template_for_tools_must_mark_the_assistant_too(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    templates = {"default": WITH_TOOLS, "tool_use": WITH_TOOLS}
    monkeypatch.setattr(tokenizer, "chat_template", {**templates, name: UNMARKED})
    messages = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    path = write(tmp_path / "t.jsonl", {"messages": messages, **({"tools": TOOLS} if name == "tool_use" else {})})
    with pytest.raises(ValueError, match=r"assistant_only_loss: .*does not mark"):
        data.load(recipe(path), tokenizer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "get_weather"}, "'tools' must be a list of JSON schemas.*'get_weather'"),
        ({"tools": ["a"]}, "'tools' must be a list"),
        ({"tools": {"name": "a"}}, "'tools' must be a list"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "sets 'tokenize', which is no variable"),
        ({"chat_template_kwargs": {"tools": []}}, "sets 'tools', which is no variable"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "sets 'chat_template', which is no variable"),
    ],
)
def test_columns_that_the_template_cannot_take(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    path = write(tmp_path / "t.jsonl", {"messages": [{"role": "assistant", "content": "d"}], **columns})
    with pytest.raises(ValueError, match=message) as error:
        data.load(recipe(path), tokenizer)
    assert str(error.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"text": "a", "tools": TOOLS, "id": 1, "none": None}, ("tools", "id")),
        ({"messages": [{"role": "assistant", "content": "d"}], "tools": "null", "chat_template_kwargs": "null"}, ()),
        ({"prompt": "a", "completion": "b", "text": "c"}, ("text",)),
        ({"messages": [{"role": "assistant", "content": "d"}], "text": "c"}, ("text",)),
        (
            {"messages": [{"role": "assistant", "content": "d", "tool_calls": [1], "name": None, "weight": 0}]},
            ("messages.tool_calls", "messages.weight"),
        ),
        (
            {"messages": [{"role": "assistant", "content": "d"}], "tools": TOOLS, "chat_template_kwargs": {"deep": 1}},
            ("tools", "chat_template_kwargs.deep"),
        ),
    ],
)
def test_what_nothing_reads_is_known(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], unread: tuple[str, ...]
) -> None:
    """A template that has no tools in it does not read them either."""
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    loaded = data.load(recipe(write(tmp_path / "t.jsonl", row)), tokenizer)
    assert loaded is not None
    assert loaded.unread == unread


def test_cuts_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "a", "completion": " b"},
        {"prompt": "a", "completion": " b c d e"},
        {"prompt": "a b c d", "completion": " e"},
    ]
    path = write(tmp_path / "t.jsonl", *rows)
    loaded = data.load(recipe(path, max_length=4), tokenizer)
    assert loaded is not None
    assert (len(loaded), loaded.truncated, loaded.dropped) == (2, 2, 1)
    assert example(loaded, 1) == ([2, 3, 4, 5], [IGNORED, 3, 4, 5])
    assert "2 cut at max_length; 1 left out" in loaded.summary()
    with pytest.raises(ValueError, match="max_length=2 too short"):
        data.load(recipe(write(tmp_path / "u.jsonl", rows[2]), max_length=2), tokenizer)


def plan(count: int, batch: int, **options: Any) -> BatchPlan:
    lengths = np.random.default_rng(0).integers(1, 100, count)
    return BatchPlan(lengths, batch, **{"accumulation": 1, "seed": 0, **options})


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_an_epoch_visits_each_example_once(strategy: str, processes: int, accumulation: int) -> None:
    made = plan(107, 4, strategy=strategy, processes=processes, accumulation=accumulation)
    for epoch in range(2):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        dealt = [[made.micro_batches(step, p) for p in range(processes)] for step in steps]
        assert all(len({len(micros) for micros in step}) == 1 for step in dealt)  # all processes stay in step
        assert all(len(micros) <= accumulation for step in dealt for micros in step)
        rows = [row for step in dealt for micros in step for micro in micros for row in micro]
        assert sorted(rows) == list(range(107))


def test_order_depends_only_on_seed_and_epoch() -> None:
    def epoch(made: BatchPlan, number: int) -> list[list[list[int]]]:
        return [made.micro_batches(number * made.steps_per_epoch + s) for s in range(made.steps_per_epoch)]

    assert epoch(plan(50, 4), 0) == epoch(plan(50, 4), 0)
    assert epoch(plan(50, 4), 0) != epoch(plan(50, 4), 1)
    assert epoch(plan(50, 4), 0) != epoch(plan(50, 4, seed=1), 0)
    jumped = plan(50, 4)
    assert jumped.micro_batches(17) == epoch(plan(50, 4), 1)[17 - jumped.steps_per_epoch]


def test_grouping_by_length_saves_padding() -> None:
    def padded(made: BatchPlan) -> int:
        batches = [micro for s in range(made.steps_per_epoch) for micro in made.micro_batches(s)]
        return sum(len(rows) * int(made.lengths[rows].max()) for rows in batches)

    grouped, shuffled = plan(1000, 8, strategy="group_by_length"), plan(1000, 8)
    assert padded(grouped) < 1.1 * grouped.lengths.sum() < padded(shuffled)
    lengths = [grouped.lengths[grouped.micro_batches(s)[0]].mean() for s in range(50)]
    assert lengths != sorted(lengths)  # the batches of a window come in random order


def test_collate_pads_on_the_right() -> None:
    examples = data.TokenSet(
        tokens=np.array([5, 6, 7, 8], np.int32),
        labels=np.array([IGNORED, 6, IGNORED, IGNORED], np.int32),
        offsets=np.array([0, 3, 4]),
    )
    batch = collate(examples, [1, 0], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[8, 9, 9, 9, 9, 9, 9, 9], [5, 6, 7, 9, 9, 9, 9, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [1, 3]
    assert batch["labels"].tolist() == [[IGNORED] * 8, [IGNORED, 6, *[IGNORED] * 6]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert count_targets(batch) == 1
    assert before_targets(batch["labels"]).tolist() == [8]


def test_first_token_is_no_target() -> None:
    whole = np.array([1, 2, 3], np.int32)
    batch = collate(data.TokenSet(whole, whole, np.array([0, 3])), [0], 0)
    assert count_targets(batch) == 2
