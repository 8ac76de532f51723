"""Whether each linear layer of a model was replaced, and why: the answer to "is this layer fast?"

`replace_linear` leaves a `Report` on the model as `model.fastlora_report`; `fastlora.report(model)` makes a new one.
Each linear layer has one row, whether it was replaced or not, so that no layer is slow in silence. peft's own layers
may step back to peft's forward at any call; their rows also count both kinds of call and keep the reason of the last
step back.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclass
class Calls:
    """How often fastlora computed one of peft's layers, and how often the layer stepped back to peft's forward.

    Calls inside a `torch.compile` graph are not counted: there the choice is made once, at compile time.
    """

    sped_up: int = 0
    stepped_back: int = 0
    last_reason: str = ""

    def __str__(self) -> str:
        back = f", {self.stepped_back} stepped back ({self.last_reason})" if self.stepped_back else ""
        return f"{self.sped_up} sped up{back}"


@dataclass
class LayerRow:
    """One linear layer.

    Args:
        name: its path in the model, as in `model.named_modules()`.
        kind: class of the layer when it was found.
        shape: (out_features, in_features).
        replaced: whether fastlora computes it from now on.
        reason: what was done and why, or why nothing was done.
        path: what computes it, named as its file in `ops/` ("linear_cuda"); "unchanged" if fastlora does not.
        r: rank of the adapter, 0 without one.
        quantized: whether the base weight is NF4.
        calls: counts for a layer of peft's, None for others.
        kernels: what computes it by the number of tokens, without dropout; empty if fastlora does not.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    replaced: bool
    reason: str
    path: str = "unchanged"
    r: int = 0
    quantized: bool = False
    calls: Calls | None = None
    kernels: str = ""


@dataclass
class PartRow:
    """One module between the linears.

    Args:
        name: its path in the model. part: "norm", "rotary", "mlp" or "loss". kind: its class.
        sped_up: whether fastlora computes it. reason: where, or why not.
    """

    name: str
    part: str
    kind: str
    sped_up: bool
    reason: str


@dataclass
class Report:
    """Rows for all linear layers of a model, in its order, and what the kernels run on.

    Args:
        rows: one for each linear layer.
        backend: "triton", "cpp" or "torch".
        backend_reason: why that backend.
        notes: what else the user should know.
        left_out: names of weights of experts and routers without adapters; they are no linear layers and have no row.
        parts: what `speed_up` found between the linears; empty where it has not been called.
    """

    rows: list[LayerRow]
    backend: str = ""
    backend_reason: str = ""
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    parts: list[PartRow] = field(default_factory=list)

    @property
    def replaced(self) -> list[LayerRow]:
        """The rows of layers that fastlora computes."""
        return [row for row in self.rows if row.replaced]

    @property
    def left(self) -> list[LayerRow]:
        """The rows of layers left as they were."""
        return [row for row in self.rows if not row.replaced]

    def summary(self) -> str:
        """One line: how many layers were replaced, how many hold NF4, what was left out, what they run on."""
        quantized = sum(row.quantized for row in self.replaced)
        adapted = sum(row.r > 0 for row in self.replaced)
        text = (
            f"{len(self.replaced)} of {len(self.rows)} linear layers replaced ({adapted} with adapters, "
            f"{quantized} in NF4){self._left_out()}, running on {self.backend}: {self.backend_reason}"
        )
        counted = [row.calls for row in self.rows if row.calls is not None]
        if counted:
            ours, back = sum(c.sped_up for c in counted), sum(c.stepped_back for c in counted)
            text += f"; {ours} calls sped up, {back} stepped back to peft"
        for part in dict.fromkeys(row.part for row in self.parts):
            done = [row.sped_up for row in self.parts if row.part == part]
            text += f"; {part} sped up in {sum(done)} of {len(done)} modules"
        return text

    def _left_out(self) -> str:
        if not self.left_out:
            return ""
        counted = Counter(_INDEX.sub("*", name) for name in self.left_out)
        named = ", ".join(f"{count} x {name}" for name, count in counted.items())
        return f"; left without adapters: {named} (not linear layers; experts are adapted by target_parameters)"

    def to_json(self) -> str:
        """The whole report as JSON: `backend`, `backend_reason`, `notes`, `left_out`, `parts`, `rows`."""
        return json.dumps(asdict(self), indent=2)

    def print(self, console: Any = None, every_layer: bool = False) -> None:
        """Print the report as a table.

        Args:
            console: a `rich.console.Console`; None for a new one on stdout.
            every_layer: a line for every layer; if False, layers that differ only in their number share a line.
        """
        lines = [(row.name, 1, row) for row in self.rows] if every_layer else list(_grouped(self.rows))
        try:
            from rich import box
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            print(self._plain(lines))
            return
        console = console or Console()
        console.print(escape(self.summary()))
        prefix = _shared_prefix([name for name, _, _ in lines])
        caption = f"… stands for {escape(prefix)}" if prefix else None
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
        for title in ("layer", "kind", "shape", "path", "why"):
            table.add_column(title, overflow="fold", no_wrap=title in ("kind", "shape", "path"))
        for name, count, row in lines:
            short = f"…{name.removeprefix(prefix)}" if prefix and name.startswith(prefix) else name
            table.add_row(*map(escape, _cells(short, count, row)), style=None if row.replaced else "dim")
        console.print(table)
        for note in [*self._kernels(), *self._parts(), *self.notes]:
            console.print(escape(note))

    def _plain(self, lines: Iterable[tuple[str, int, LayerRow]]) -> str:
        return "\n".join(
            [
                self.summary(),
                *("  ".join(_cells(*line)) for line in lines),
                *self._kernels(),
                *self._parts(),
                *self.notes,
            ]
        )

    def _parts(self) -> list[str]:
        """A line for each part and class, and for each reason why it is not sped up."""
        counted = Counter((row.part, row.kind, row.reason) for row in self.parts)
        return [f"{part}: {count} x {kind}: {reason}" for (part, kind, reason), count in counted.items()]

    def _kernels(self) -> list[str]:
        """A line for each way in which replaced layers are computed, with the shapes that are computed so."""
        shapes: dict[str, dict[str, None]] = {}
        for row in self.replaced:
            if row.kernels:
                what = f"{row.shape[0]}x{row.shape[1]}{' NF4' * row.quantized}"
                shapes.setdefault(row.kernels, {})[what] = None
        return [f"{', '.join(found)}: {kernels}" for kernels, found in shapes.items()]


def _shared_prefix(names: list[str]) -> str:
    """The shared beginning of the names of numbered layers, such as "model.layers.*"; empty if there is none."""
    beginnings = {name[: name.rfind("*") + 1] for name in names if "*" in name}
    return beginnings.pop() if len(beginnings) == 1 else ""


def _cells(name: str, count: int, row: LayerRow) -> tuple[str, ...]:
    why = row.reason if row.calls is None else f"{row.reason}; {row.calls}"
    times = f"{count} x " if count > 1 else ""
    return f"{times}{name}", row.kind, f"{row.shape[0]}x{row.shape[1]}", row.path, why


def _grouped(rows: list[LayerRow]) -> Iterable[tuple[str, int, LayerRow]]:
    """(name, count, row) for runs of rows that say the same and differ only in the numbers in their names."""
    groups: dict[tuple[object, ...], list[LayerRow]] = {}
    for row in rows:
        said = (row.kind, row.shape, row.replaced, row.reason, row.path, row.r, row.quantized)
        groups.setdefault((_INDEX.sub("*", row.name), *said), []).append(row)
    for members in groups.values():
        name = members[0].name if len(members) == 1 else _INDEX.sub("*", members[0].name)
        first = members[0]
        if len(members) > 1 and first.calls is not None:
            counted = [row.calls for row in members if row.calls is not None]
            last = next((calls.last_reason for calls in counted if calls.last_reason), "")
            total = Calls(sum(c.sped_up for c in counted), sum(c.stepped_back for c in counted), last)
            first = LayerRow(**{**vars(first), "calls": total})
        yield name, len(members), first
