"""The fewest trained parameters that reach a share of the best gain, by successive halving over ranks and layers.

Every candidate is trained for a part of the steps. Then those are dropped that another one beats with as few
parameters or fewer, and of the rest, if they are still more than half, those whose gain is smallest for the parameters
that they have. The others go on where they stopped, for twice the steps. The gain is the fall of the held-out loss.

Everything is in `search.json` in the folder of the search, so that a search that was stopped goes on; runs are those of
`fastlora train` and resume bit for bit. The learning rate is constant, so that a longer run begins as a shorter one.

Source: arXiv:1502.07943 (successive halving); the rule by dominance is this project's, because the smallest candidates,
which are what is looked for, would be dropped first by their gain alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.files import atomic
from fastlora.memory.adapters import targeted
from fastlora.memory.shape import ModelShape
from fastlora.training import recipe
from fastlora.training.loop import Hooks, train
from fastlora.training.run import Run, load_config

RANKS = (1, 2, 4, 8, 16, 32, 64)
STATE, PICTURE = "search.json", "search.png"
_MARGIN = 0.005  # of the best gain: what counts as beaten
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn")


@dataclass
class Candidate:
    """A rank and the layers that get it. losses: steps -> held-out loss; 0: before training."""

    name: str
    r: int
    target_modules: str
    trained: int
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How long it was trained."""
        return max(self.losses, default=0)

    @property
    def gain(self) -> float:
        """How far the held-out loss has fallen."""
        return self.losses[0] - self.losses[self.steps] if self.losses else 0.0


def candidates(shape: ModelShape, ranks: Sequence[int]) -> list[Candidate]:
    """All linears, those of attention, those of the MLP, and all of the second half of the layers, in each rank.

    Raises:
        ValueError: a rank that cannot be.
    """
    if not ranks or min(ranks) < 1 or max(ranks) > 256:
        raise ValueError(f"ranks must be 1 to 256, not {', '.join(map(str, ranks)) or 'none'}")
    linears = [linear for linear in targeted(shape, "all-linear") if linear.copies == 1]
    names = list(dict.fromkeys(linear.name for linear in linears))
    attention = [name for name in names if name in _ATTENTION]
    half = range(shape.layers // 2, shape.layers)
    sets = [("all", names, range(shape.layers)), ("second half", names, half)]
    if attention and len(attention) < len(names):
        rest = [name for name in names if name not in attention]
        sets += [("attention", attention, range(shape.layers)), ("MLP", rest, range(shape.layers))]
    found = []
    for said, members, layers in sets:
        where = "|".join(map(str, layers)) if len(layers) < shape.layers else r"\d+"
        pattern = rf"(.*\.)?({where})\.(.*\.)?({'|'.join(members)})"
        each = sum(linear.n + linear.k for linear in linears if linear.name in members)
        found += [Candidate(f"rank {r}, {said}", r, pattern, r * each * len(layers)) for r in sorted(set(ranks))]
    return found


def dropped(running: list[Candidate]) -> list[Candidate]:
    """Which candidates do not go on. The one with the largest gain always does."""
    best = max(running, key=lambda each: each.gain)
    margin = _MARGIN * max(0.0, best.gain)
    beaten = [
        one for one in running
        if any(other.trained <= one.trained and other.gain > one.gain + margin for other in running if other is not one)
    ]  # fmt: skip
    left = [each for each in running if each not in beaten and each is not best]
    excess = len(left) + 1 - -(-len(running) // 2)
    if excess > 0:  # the least gain first: what is far below the best cannot reach the target
        beaten += sorted(left, key=lambda each: each.gain)[:excess]
    return [each for each in running if each in beaten and each is not best]


def chosen(finalists: list[Candidate], target: float) -> Candidate:
    """The fewest parameters that reach `target` of the best gain."""
    best = max(each.gain for each in finalists)
    enough = [each for each in finalists if each.gain >= target * best]
    return min(enough, key=lambda each: (each.trained, -each.gain))


def frontier(found: list[Candidate]) -> list[Candidate]:
    """Those that no other one beats with as few parameters or fewer, by parameters."""
    kept: list[Candidate] = []
    for each in sorted(found, key=lambda each: (each.trained, -each.gain)):
        if not kept or each.gain > kept[-1].gain:
            kept.append(each)
    return kept


def search(
    values: dict[str, Any], shape: ModelShape, ranks: Sequence[int], target: float, out: Path, console: Console
) -> tuple[Candidate, list[Candidate], int]:
    """Search, or go on with a search in `out`.

    Args:
        values: a recipe's keys, with `max_steps` and data to evaluate on.
        target: share of the best gain, above 0 and up to 1.

    Returns:
        The chosen candidate, all candidates, and the steps of the finalists.

    Raises:
        ValueError: a recipe or an option that cannot be, or a search in `out` that was another one.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must be above 0 and at most 1, not {target}")
    base = _base(values, out)
    asked = {"recipe": base.to_yaml(), "ranks": sorted(set(ranks))}
    found = _read(out, asked, candidates(shape, ranks))
    running, steps = found, _rungs(base.max_steps, len(found))
    for rung in steps:
        for each in running:
            if each.steps < rung:
                _train(each, base, rung, out)
                _write(found, asked, out)
                console.print(
                    f"{each.name}: {each.trained:,} parameters, {rung} steps, gain {each.gain:.4f}", highlight=False
                )
        if rung != steps[-1]:
            gone = dropped([Candidate(e.name, e.r, e.target_modules, e.trained, _until(e, rung)) for e in running])
            names = {each.name for each in gone}
            running = [each for each in running if each.name not in names]
            console.print(f"{len(running)} of {len(running) + len(gone)} go on after {rung} steps", highlight=False)
    finalists = [each for each in running if each.steps >= steps[-1]]
    best = chosen(finalists, target)
    _plot(found, best, steps[-1], out / PICTURE)
    return best, found, steps[-1]


def _until(each: Candidate, rung: int) -> dict[int, float]:
    return {steps: loss for steps, loss in each.losses.items() if steps <= rung}


def _rungs(steps: int, count: int) -> list[int]:
    """Steps at which candidates are dropped, doubling, as many as halve the candidates to two, and the last."""
    found = [steps]
    while count > 2 and found[0] >= 8:
        found.insert(0, found[0] // 2)
        count = -(-count // 2)
    return found


def _base(values: dict[str, Any], out: Path) -> recipe.Recipe:
    own = ("r", "target_modules", "exclude_modules", "method", "save_steps", "save_total_limit", "eval_steps")
    shared = {key: value for key, value in values.items() if key not in own}
    made = recipe.from_mapping(
        {
            **shared,
            "eval_on_start": True,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "warmup_steps": 0,
            "save_steps": 10**9,
            "save_total_limit": 1,
            "output_dir": str(out),
        },
        source="search",
    )
    if made.max_steps < 1:
        raise ValueError("max_steps: a search needs a number of steps")
    return made


def _train(each: Candidate, base: recipe.Recipe, steps: int, out: Path) -> None:
    folder = out / each.name.replace(", ", "-").replace(" ", "-")
    made = base.replace(r=each.r, target_modules=each.target_modules, max_steps=steps, output_dir=str(folder))
    quiet, watched = Console(quiet=True), _Losses()
    resume = any(folder.glob("checkpoint-*"))
    if not resume and folder.exists():  # a run that was stopped before its first checkpoint
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    result = train(made, resume=resume, hooks=watched, console=quiet)
    if result.interrupted is not None:
        raise KeyboardInterrupt
    if watched.trained != each.trained:
        raise ValueError(f"{each.name}: {watched.trained:,} parameters are trained, and {each.trained:,} were counted")
    each.losses = {
        0: watched.losses.get(0, each.losses.get(0, 0.0)),
        **_until(each, steps),
        steps: watched.losses[steps],
    }


class _Losses(Hooks):
    def on_start(self, run: Run) -> None:
        self.trained = sum(p.numel() for p in run.trainable)

    def on_end(self, run: Run) -> None:
        self.losses = dict(run.eval_losses)


def shape_for(values: dict[str, Any]) -> ModelShape:
    """The shape of a recipe's model."""
    from fastlora.memory.shape import shape_of

    made = recipe.from_mapping(values, source="search")
    return shape_of(load_config(made).to_dict())


def _read(out: Path, asked: dict[str, Any], fresh: list[Candidate]) -> list[Candidate]:
    path = out / STATE
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} exists and holds no search: give another folder")
        return fresh
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        before, held = state["asked"], {each["name"]: each["losses"] for each in state["candidates"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): give another folder") from error
    if before != asked:
        raise ValueError(f"{out} holds a search with another recipe or other ranks: give another folder")
    for each in fresh:
        each.losses = {int(steps): loss for steps, loss in held.get(each.name, {}).items()}
    return fresh


def _write(found: list[Candidate], asked: dict[str, Any], out: Path) -> None:
    rows = [{"name": e.name, "r": e.r, "trained": e.trained, "losses": e.losses, "gain": e.gain} for e in found]
    atomic.write_text(out / STATE, json.dumps({"asked": asked, "candidates": rows}, indent=1) + "\n")


def _plot(found: list[Candidate], best: Candidate, steps: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    early = [each for each in found if each.steps < steps]
    ended = [each for each in found if each.steps >= steps]
    axes.plot([e.trained for e in early], [e.gain for e in early], "o", color="#c3c7cd", label="dropped on the way")
    axes.plot([e.trained for e in ended], [e.gain for e in ended], "o", color="#2f6fde", label=f"{steps} steps")
    line = frontier(ended)
    axes.step([e.trained for e in line], [e.gain for e in line], where="post", color="#2f6fde", lw=1)
    axes.plot([best.trained], [best.gain], "*", ms=15, color="#c0392b", label=best.name)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("fall of the held-out loss (nats a token)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with atomic.moved_into(path) as scratch:
        figure.savefig(scratch, format="png", dpi=140)
