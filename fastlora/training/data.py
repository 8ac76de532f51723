"""From files or `datasets` to the batches of a run.

Records are in TRL's formats, one format per file:

- `{"text": ...}`: loss on every token, including the end-of-text token;
- `{"prompt": ..., "completion": ...}`: loss on the completion and the end-of-text token;
- `{"messages": [{"role": ..., "content": ...}, ...]}`: the tokenizer's chat template, loss on what the
  assistant says. The template must mark that (`{% generation %}`); one without marks is refused. `tools` (a list of
  JSON schemas) and `chat_template_kwargs` (variables of the template) beside the messages reach the template.

A column that nothing reads is named when the run starts; so is a key of the messages that the template does not read.

All examples are stored end to end in two flat arrays (`TokenSet`). What a step trains on is a pure function
of (seed, step): `BatchPlan` has no state, so the number of the step is enough to resume.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlora.layers.quoted import clipped, reason, shown
from fastlora.training.inputs import read_text
from fastlora.training.recipe import Recipe

IGNORED = -100  # label of a token that is not a target: torch.nn.functional.cross_entropy's ignore_index
FORMATS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
PAD_MULTIPLE = 8  # batches are padded to a multiple of this length, so that M suits the kernels
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # read beside messages
GROUP_WINDOW = 50  # group_by_length sorts by length within this many micro-batches

Record = tuple[str, dict[str, Any]]  # where it is ("data.jsonl:7"), and its fields
Encoded = tuple[list[int], list[int]]  # input_ids, labels


@dataclass(eq=False, frozen=True)
class TokenSet:
    """Examples end to end: tokens and labels [T] int32, offsets [examples + 1] int64.

    `unread` are the columns of the records that nothing has read.
    """

    tokens: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    truncated: int = 0
    dropped: int = 0
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example: [examples] int64."""
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """A hash of tokens, labels and offsets: equal for the same data, wherever the file is."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.labels, self.offsets):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line for the user: how many examples and targets, and how many were cut or left out."""
        targets = int((self.labels != IGNORED).sum())
        line = f"{len(self):,} examples, {len(self.tokens):,} tokens, {targets:,} with loss"
        if self.truncated:
            line += f"; {self.truncated:,} cut at max_length"
        if self.dropped:
            line += f"; {self.dropped:,} left out, as they have nothing to learn"
        return line


def load(recipe: Recipe, tokenizer: Any, evaluation: bool = False) -> TokenSet | None:
    """The training (or evaluation) examples that `recipe` names, tokenized; None if it names no evaluation data.

    Raises:
        ValueError: a record that cannot be used; the message names its file and line, and says why.
    """
    if recipe.dataset_name is not None and not (evaluation and recipe.eval_file is not None):
        split = recipe.dataset_test_split if evaluation else recipe.dataset_train_split
        if split is None:
            return None
        records = read_dataset(recipe.dataset_name, recipe.dataset_config, split)
    else:
        path = recipe.eval_file if evaluation else recipe.train_file
        if path is None:
            return None
        records = read_file(path)
    return tokenize(records, tokenizer, recipe)


def read_file(path: str | Path) -> list[Record]:
    """The records of a JSONL file (one object per line), or of a JSON file (one list of objects).

    Either may have a byte order mark, and be compressed: `.jsonl.gz`, `.json.gz`. Blank lines are skipped.

    Raises:
        ValueError: no such file, or a malformed line; the message names file and line.
    """
    path = Path(path)
    text, name = read_text(path), clipped(str(path))
    if path.name.removesuffix(".gz").endswith(".json"):
        rows = _parsed(text, name, 0)
        if not isinstance(rows, list):
            raise ValueError(f"{name}: expected a list of objects; name it .jsonl if it has one object per line")
        numbered = [(f"{name}: record {number}", row) for number, row in enumerate(rows, 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        numbered = [(f"{name}:{number}", _parsed(line, name, number)) for number, line in lines if line.strip()]
    if not numbered:
        raise ValueError(f"{name}: no records")
    for where, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # only as an escape can half a character be in UTF-8
        for where, row in numbered:
            _check_characters(where, row)
    return numbered


def _parsed(text: str, name: str, number: int) -> Any:
    """JSON of line `number` of a file, or of the whole file (0)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f", column {error.colno}" if number else ""
        raise ValueError(f"{name}:{number or error.lineno}: not valid JSON ({error.msg}{at})") from error
    except RecursionError as error:
        raise ValueError(f"{name}:{number or 1}: not valid JSON (nested too deeply)") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{name}:{number or 1}: not valid JSON ({reason(error)})") from error


def _check_characters(where: str, row: dict[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"{where}: holds {half!r}, half of a character, which is not text: write the whole pair, or remove it"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error


def read_dataset(name: str, config: str | None, split: str) -> list[Record]:
    """The records of one split of what `datasets.load_dataset` finds under `name`: a hub name or a local folder.

    Its format gives every object of a column all the keys that any of them has, with null for what is not there. So
    keys that hold null count as not there.

    Raises:
        ValueError: it cannot be loaded, or has no records.
    """
    try:
        import datasets

        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # any of the hub's, arrow's, pandas' and the file system's
        cause = error.__cause__ or error
        raise ValueError(
            f"dataset_name: cannot load {shown(name)}, split {shown(split)} ({reason(cause)}); a file of your own is a "
            "train_file"
        ) from error
    if not len(rows):
        raise ValueError(f"{name}[{split}]: no records")
    return [(f"{name}[{split}] row {number}", _without_nulls(dict(row))) for number, row in enumerate(rows)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def tokenize(records: Sequence[Record], tokenizer: Any, recipe: Recipe) -> TokenSet:
    """Records of one format as a `TokenSet`, cut at `recipe.max_length`.

    Raises:
        ValueError: a record of another format, an empty field or one of the wrong type, or nothing to learn.
    """
    keys = next((f for f in FORMATS if all(k in records[0][1] for k in f)), None)
    if keys is None:
        wanted = " | ".join(" + ".join(f) for f in FORMATS)
        raise ValueError(f"{records[0][0]}: expected {wanted}, found the keys {shown(sorted(records[0][1]))}")
    for where, row in records:
        for key in keys:
            _check_field(where, row, key)
    encode: Callable[..., Iterable[Encoded]] = {
        "text": _encode_text,
        "prompt": _encode_pairs,
        "messages": _encode_messages,
    }[keys[0]]
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    truncated = dropped = 0
    for input_ids, targets in encode(records, tokenizer, recipe):
        truncated += len(input_ids) > recipe.max_length
        kept = np.asarray(targets[: recipe.max_length], dtype=np.int32)
        if (kept[1:] == IGNORED).all():  # the first token is predicted from nothing
            dropped += 1
            continue
        labels.append(kept)
        tokens.append(np.asarray(input_ids[: recipe.max_length], dtype=np.int32))
    if not tokens:
        raise ValueError(
            f"{records[0][0]}: no example has a token to learn; is max_length={recipe.max_length} too short?"
        )
    offsets = np.cumsum([0, *(len(t) for t in tokens)], dtype=np.int64)
    unread = _unread(records, keys, tokenizer)
    return TokenSet(np.concatenate(tokens), np.concatenate(labels), offsets, truncated, dropped, unread)


def _unread(records: Sequence[Record], keys: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """The columns, keys of messages and variables that hold something which neither a format nor its template reads."""
    found: dict[str, None] = {}
    for _, row in records:
        columns = [key for key, value in row.items() if key not in keys and _holds(value)]
        if keys == ("messages",):
            variables = _from_json(row.get("chat_template_kwargs")) or {}
            offered = {"tools": "tools"} if _holds(_from_json(row.get("tools"))) else {}
            offered |= {f"chat_template_kwargs.{key}": key for key in variables}
            offered |= {f"messages.{key}": key for each in row["messages"] for key in each if _holds(each[key])}
            template = _template(tokenizer, row)
            found |= dict.fromkeys(name for name, key in offered.items() if not _mentions(template, key))
            columns = [key for key in columns if key not in TEMPLATE_COLUMNS]
        found |= dict.fromkeys(columns)
    return tuple(found)


def _holds(value: Any) -> bool:
    return not (value is None or value == "" or value == [] or value == {})


@lru_cache(maxsize=1024)
def _mentions(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _check_field(where: str, row: dict[str, Any], key: str) -> None:
    if key not in row:
        raise ValueError(f"{where}: {key!r} is missing; found the keys {shown(sorted(row))}")
    value = row[key]
    if key != "messages":
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key!r} must be a string, found {type(value).__name__}")
        if not value and key != "prompt":
            raise ValueError(f"{where}: {key!r} is empty")
        return
    well_formed = isinstance(value, list) and all(
        isinstance(m, dict) and "role" in m and {"content", "tool_calls"} & m.keys() for m in value
    )
    if not well_formed or not value:
        raise ValueError(f"{where}: 'messages' must be a list of objects with 'role' and 'content' (or 'tool_calls')")


def _encode_text(records: Sequence[Record], tokenizer: Any, recipe: Recipe) -> Iterable[Encoded]:
    for input_ids in tokenizer([row["text"] for _, row in records])["input_ids"]:
        ids = _ended(input_ids, tokenizer)
        yield ids, ids


def _encode_pairs(records: Sequence[Record], tokenizer: Any, recipe: Recipe) -> Iterable[Encoded]:
    """Each pair is tokenized as one text. A token across the border counts as completion."""
    prompts = tokenizer([row["prompt"] for _, row in records])["input_ids"]
    wholes = tokenizer([row["prompt"] + row["completion"] for _, row in records])["input_ids"]
    for prompt, whole in zip(prompts, wholes, strict=True):
        shared = sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(prompt, whole, strict=False)))
        masked = shared if recipe.completion_only_loss else 0
        ids = _ended(whole, tokenizer)
        yield ids, [IGNORED] * masked + ids[masked:]


def _encode_messages(records: Sequence[Record], tokenizer: Any, recipe: Recipe) -> Iterable[Encoded]:
    masked = recipe.assistant_only_loss
    if not tokenizer.chat_template:
        raise ValueError(f"{records[0][0]}: 'messages' need a chat template, and {tokenizer.name_or_path!r} has none")
    for where, row in records:
        variables = _template_variables(where, row, tokenizer)
        if masked and not re.search(r"\{%-?\s*generation\s*-?%\}", _template(tokenizer, row)):
            raise ValueError(
                f"assistant_only_loss: the chat template of {tokenizer.name_or_path!r} does not mark what the "
                "assistant says ({% generation %} ... {% endgeneration %}). Use a template that does, or set "
                "assistant_only_loss=false to learn every token, including the user's."
            )
        try:
            out = tokenizer.apply_chat_template(
                row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=masked, **variables
            )
        except Exception as error:  # a Jinja template may raise anything
            raise ValueError(f"{where}: the chat template refuses these messages ({reason(error)})") from error
        ids = list(out["input_ids"])
        mask = out["assistant_masks"] if masked else [1] * len(ids)
        yield ids, [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]


def _template(tokenizer: Any, row: dict[str, Any]) -> str:
    """The chat template for a record: a tokenizer may have another one for records with tools."""
    return tokenizer.get_chat_template(tools=_from_json(row.get("tools")))


def _template_variables(where: str, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What a record gives the chat template beside its messages.

    Raises:
        ValueError: a column of the wrong type, or a variable that is an option of `apply_chat_template`.
    """
    tools, options = (_from_json(row.get(column)) for column in TEMPLATE_COLUMNS)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: 'tools' must be a list of JSON schemas, or one as JSON text, found {shown(tools)}")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"{where}: 'chat_template_kwargs' must be an object, found {shown(options)}")
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents"} if options else set()
    for name in taken.intersection(options or ()):
        raise ValueError(
            f"{where}: 'chat_template_kwargs' sets {name!r}, which is no variable of a template; tools have a column "
            "of their own"
        )
    return {"tools": tools, **(options or {})}


def _from_json(value: Any) -> Any:
    """A value, or what its JSON text means: some data sets hold tools as text, to have one type in a column."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _ended(input_ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return input_ids if end is None or (input_ids and input_ids[-1] == end) else [*input_ids, end]


def collate(examples: TokenSet, rows: Sequence[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The examples `rows`, padded on the right: input_ids, attention_mask, labels, each [rows, longest] int64."""
    longest = max(int(examples.lengths[row]) for row in rows)
    shape = (len(rows), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
    batch = {
        "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "labels": np.full(shape, IGNORED, dtype=np.int64),
    }
    for line, row in enumerate(rows):
        start, end = examples.offsets[row], examples.offsets[row + 1]
        batch["input_ids"][line, : end - start] = examples.tokens[start:end]
        batch["attention_mask"][line, : end - start] = 1
        batch["labels"][line, : end - start] = examples.labels[start:end]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def before_targets(labels: torch.Tensor) -> torch.Tensor:
    """Where the tokens are from which one with loss is predicted, in the rows one after the other: [targets] int64.

    labels: [rows, length].
    """
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero().flatten()


def count_targets(batch: dict[str, torch.Tensor]) -> int:
    """The number of tokens of a collated batch that carry loss; a row's first token is predicted from nothing."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@dataclass(eq=False, frozen=True)
class BatchPlan:
    """Which examples each step trains on: a pure function of the step's number.

    An epoch's last step takes what is left, in fewer or smaller micro-batches. With several processes, each takes
    `batch` consecutive examples of a micro-batch of `batch * processes`.
    """

    lengths: np.ndarray
    batch: int
    accumulation: int
    seed: int
    strategy: str = "random"
    processes: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-len(self.lengths) // (self.batch * self.processes * self.accumulation))

    def micro_batches(self, step: int, process: int = 0) -> list[list[int]]:
        """The rows of each forward pass of one process in `step` (from 0); empty if too few rows were left."""
        epoch, position = divmod(step, self.steps_per_epoch)
        whole = self.batch * self.processes
        order = _epoch_order(self, epoch)[position * whole * self.accumulation :][: whole * self.accumulation]
        starts = range(0, len(order), whole)
        return [order[start : start + whole][process * self.batch :][: self.batch].tolist() for start in starts]


@lru_cache(maxsize=2)
def _epoch_order(plan: BatchPlan, epoch: int) -> np.ndarray:
    """[examples] int64: the rows of an epoch in the order of training."""
    count = len(plan.lengths)
    if plan.strategy == "sequential":
        return np.arange(count)
    generator = np.random.default_rng((plan.seed, epoch))
    order = generator.permutation(count)
    if plan.strategy == "random":
        return order
    chunk = plan.batch * plan.processes
    windows = [order[i : i + GROUP_WINDOW * chunk] for i in range(0, count, GROUP_WINDOW * chunk)]
    by_length = np.concatenate([window[np.argsort(plan.lengths[window], kind="stable")] for window in windows])
    full = count // chunk
    chunks = by_length[: full * chunk].reshape(full, chunk)[generator.permutation(full)]
    return np.concatenate([chunks.reshape(-1), by_length[full * chunk :]])
