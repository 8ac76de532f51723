"""Checkpoints of a run: written whole or not at all, verified when read, and enough to continue bit for bit.

    checkpoint-<step>/  adapter_model.safetensors, adapter_config.json   the adapter, in peft's format
                        optimizer.pt, rng-<process>.pt                   moments; python, numpy, torch, CUDA generators
                        trainer_state.json                               step, recipe, and a hash of each other file

Data and learning rate are functions of the step, so they need no state.
"""

import hashlib
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.files import atomic

STATE_FILE = "trainer_state.json"


def steps(directory: Path) -> list[int]:
    """The steps of which `directory` holds a checkpoint, ascending."""
    names = (path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdigit())


def path_of(directory: Path, step: int) -> Path:
    """The directory of the checkpoint of `step`."""
    return directory / f"checkpoint-{step}"


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    facts: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write `checkpoint-<step>` under another name, rename it, then delete all except the `keep` newest.

    Every process calls it. `facts` go into `trainer_state.json` as they are.
    """
    final, part = path_of(directory, step), directory / f".checkpoint-{step}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_adapter(model, part)
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
    accelerator.wait_for_everyone()
    torch.save(rng_state(), part / f"rng-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        hashes = {path.name: _sha256(path) for path in sorted(part.iterdir())}
        state = {"step": step, "processes": accelerator.num_processes, **facts, "sha256": hashes}
        (part / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        if keep is not None:
            # Checkpoints of later steps can only be damaged ones from before a resume: they do not count as newest.
            for old in [s for s in steps(directory) if s <= step][:-keep]:
                shutil.rmtree(path_of(directory, old))
    return final


def read(path: Path) -> dict[str, Any]:
    """The contents of `trainer_state.json`, once every file is found to be as it was written.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        hashes = dict(state["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE_FILE} is missing or damaged") from error
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing")
        if _sha256(path / name) != expected:
            raise ValueError(f"{path / name} is damaged: its hash is not the one in {STATE_FILE}")
    return state


def newest(directory: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its state, and what is wrong with each newer one.

    Raises:
        ValueError: there is none; the message names each damaged one.
    """
    damaged: list[str] = []
    for step in reversed(steps(directory)):
        path = path_of(directory, step)
        try:
            return path, read(path), damaged
        except ValueError as error:
            damaged.append(str(error))
    raise ValueError(f"{directory}: nothing to resume from: {'; '.join(damaged) or 'it holds no checkpoint'}")


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, process: int) -> None:
    """Set the adapter, the moments and one process's random generators to what they were when `path` was saved."""
    load_adapter(model, path)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    set_rng_state(torch.load(path / f"rng-{process}.pt", map_location="cpu", weights_only=True))


def rng_state() -> dict[str, Any]:
    """The states of the four generators, in types that `torch.load(weights_only=True)` reads."""
    kind, keys, *rest = np.random.get_state()
    numpy_state = [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        saved, here = len(state["cuda"]), torch.cuda.device_count()
        warnings.warn(
            f"the checkpoint has the random generators of {saved} GPUs, this machine has {here}: "
            "the run continues with other random numbers than an uninterrupted one",
            stacklevel=2,
        )


def cut_metrics(path: Path, step: int) -> None:
    """Delete the lines of steps that will be made again, and an unfinished last line."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        try:
            made = json.loads(line)["step"]
        except ValueError:
            break
        if made <= step:
            kept.append(line)
    atomic.write_text(path, "".join(kept))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
