"""Checkpoints of a run: written whole or not at all, verified when read, and enough to continue bit for bit.

    checkpoint-<step>/  adapter_model.safetensors, adapter_config.json   the adapter, in peft's format; or, if the whole
                        model is trained, model.safetensors and config.json
                        optimizer.pt, rng-<process>.pt                   moments; python, numpy, torch, CUDA generators
                        trainer_state.json                               step, recipe, and a hash of each other file

Data and learning rate are functions of the step, so they need no state.
"""

import hashlib
import io
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

from fastlora.files import atomic
from fastlora.layers.quoted import reason
from fastlora.methods import LoRA, Method

STATE_FILE = "trainer_state.json"
_KINDS = {"step": int, "processes": int, "train_data": str, "recipe": dict, "total_steps": int}


def steps(directory: Path) -> list[int]:
    """The steps of which `directory` holds a checkpoint, ascending."""
    names = (path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def path_of(directory: Path, step: int) -> Path:
    """The directory of the checkpoint of `step`."""
    return directory / f"checkpoint-{step}"


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    facts: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write `checkpoint-<step>` under another name, rename it, then delete all except the `keep` newest.

    Every process calls it. `facts` go into `trainer_state.json` as they are.

    Raises:
        OSError: it cannot be written. What had been written of it is deleted, and every older one is kept.
    """
    final, part = path_of(directory, step), directory / f".checkpoint-{step}.part"
    try:
        if accelerator.is_main_process:
            for left in directory.glob(".checkpoint-*.part"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)
            method.save(model, part)
            _save(optimizer.state_dict(), part / "optimizer.pt")
        accelerator.wait_for_everyone()
        _save(rng_state(), part / f"rng-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            hashes = {path.name: _sha256(path) for path in sorted(part.iterdir())}
            state = {
                "step": step,
                "processes": accelerator.num_processes,
                **facts,
                "files": method.files,
                "sha256": hashes,
            }
            atomic.write_text(part / STATE_FILE, json.dumps(state, indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            atomic.sync(directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if accelerator.is_main_process and keep is not None:
        # Checkpoints of later steps can only be damaged ones from before a resume: they do not count as newest.
        for old in [s for s in steps(directory) if s <= step][:-keep]:
            shutil.rmtree(path_of(directory, old))
    return final


def _save(value: Any, path: Path) -> None:
    """`torch.save` by way of memory: it does not say why a write to a file failed."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic.moved_into(path) as scratch:
        scratch.write_bytes(buffer.getbuffer())


def read(path: Path) -> dict[str, Any]:
    """The contents of `trainer_state.json`, once every file is found to be as it was written.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        hashes, needed = dict(state["sha256"]), {*state.get("files", LoRA.files), "optimizer.pt"}
        needed |= {f"rng-{process}.pt" for process in range(min(state["processes"], len(hashes)))}
        whole = needed <= hashes.keys() and all(isinstance(state[key], kind) for key, kind in _KINDS.items())
        whole = whole and state["processes"] > 0 and path.name == f"checkpoint-{state['step']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / STATE_FILE} is missing or damaged") from error
    if not whole:
        raise ValueError(f"{path / STATE_FILE} is damaged")
    for name, expected in hashes.items():
        try:
            found = _sha256(path / name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path / name} is missing, or cannot be read ({reason(error)})") from error
        if found != expected:
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


def restore(path: Path, model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, process: int) -> None:
    """Set what is trained, the moments and one process's random generators to what they were when `path` was saved."""
    method.load(model, path)
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


def metrics_until(path: Path, step: int) -> str:
    """The lines of `metrics.jsonl` up to this step, without those of steps that will be made again.

    Raises:
        ValueError: a line before the last of these is damaged; the message names it.
    """
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept: list[str] = []
    last = reached = damaged = 0
    for number, line in enumerate(lines, 1):
        try:
            made = json.loads(line)["step"]
            if made <= step:
                kept.append(line)
                last, reached = number, made
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged = damaged or number
    if damaged and (damaged < last or reached < step):
        raise ValueError(f"{path}:{damaged}: the line is damaged: repair or delete it, then resume")
    return "".join(kept)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
