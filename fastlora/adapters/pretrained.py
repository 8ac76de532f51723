"""transformers' own saving and loading, made right for models whose layers `replace_linear` has adapted.

transformers would write such a model whole, under the names that its layers have now, and `from_pretrained` would not
find them again. So an adapted model behaves as transformers' models do that carry an adapter of peft's:

    model.save_pretrained, push_to_hub          write the adapter, in peft's format; merge first for the whole model
    from_pretrained(folder)                     loads the base and the adapter: by peft, or over NF4 by fastlora
    Trainer: checkpoints, resuming, best model  hold the adapter
    model.resize_token_embeddings               resizes adapted heads and embeddings with trained tokens too

The methods are replaced once in transformers' classes, as soon as it is imported. Any other model passes through them.
"""

import functools
import importlib.abc
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.adapter import adapter_of, load_adapter
from fastlora.files.peft_files import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from fastlora.layers import kept_fp32, sharded
from fastlora.layers.lora_experts import LoRAExperts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model import replace, trained_tokens
from fastlora.model.trained_tokens import TrainedTokens

_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def install() -> None:
    """Replace the methods: now where transformers is imported, else when it is."""
    _when_imported("transformers.modeling_utils", _extend_models)
    _when_imported("transformers.trainer", _extend_trainer)


def adapter_name_of(model: Any) -> str | None:
    """The name of the adapter that fastlora has put into a plain model, or that peft has at `load_adapter`'s bidding.

    None without one, and for models whose adapters transformers or a `PeftModel` takes care of.
    """
    if replace.carries_peft(model):
        known = getattr(model, "peft_config", {})
        ours = hasattr(model, "fastlora_report") and not getattr(model, "_hf_peft_config_loaded", False)
        return next(iter(known)) if ours and len(known) == 1 and not hasattr(model, "get_base_model") else None
    found = {name for module in model.modules() if isinstance(module, LoRALinear) for name in module.lora_A}
    found |= {module.active_adapter for module in model.modules() if isinstance(module, LoRAExperts)}
    return min(found) if found else None


def _extend_models(module: ModuleType) -> None:
    kind = module.PreTrainedModel
    kind.save_pretrained = _saves_adapter(kind.save_pretrained)
    kind.load_adapter = _loads_over_nf4(kind.load_adapter)
    kind.resize_token_embeddings = _resizes_adapted(kind.resize_token_embeddings)


def _extend_trainer(module: ModuleType) -> None:
    kind = module.Trainer
    kind._load_from_checkpoint = _resumes(kind._load_from_checkpoint)
    kind._load_best_model = _takes_best(kind._load_best_model)


def _saves_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        name = adapter_name_of(self)
        if name is None:
            original(self, *args, **kwargs)
            _warn_of_both(signature.bind(self, *args, **kwargs).arguments["save_directory"], CONFIG_NAME)
            return
        given = signature.bind(self, *args, **kwargs).arguments
        for option, usual in (("distributed_checkpoint", False), ("save_peft_format", True)):
            if given.get(option, usual) is not usual:
                raise ValueError(
                    f"{option}={given[option]!r} is not for an adapter, which is what is saved of this model: leave it "
                    "out, or merge(model) for a whole model"
                )
        directory = Path(given["save_directory"])
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file: an adapter is saved in a directory")
        _save(self, name, directory, given.get("state_dict"), given.get("is_main_process", True))
        if given.get("push_to_hub") and given.get("is_main_process", True):
            hub = dict(given.get("kwargs", {}))
            self.push_to_hub(hub.pop("repo_id", directory.name), token=given.get("token"), **hub)

    return save_pretrained


def _warn_of_both(directory: Any, other: str) -> None:
    """Warn of a folder that holds a whole model and an adapter: `from_pretrained` puts the one over the other."""
    if not Path(directory, other).is_file():
        return
    what, besides = ("model", "an adapter") if other == CONFIG_NAME else ("adapter", "a whole model")
    warnings.warn(
        f"{os.fspath(directory)} holds {besides} as well as this {what}: from_pretrained puts the adapter over the "
        "model there; save to another folder unless that is what you mean",
        stacklevel=4,
    )


def _save(model: Any, name: str, directory: Path, state_dict: Mapping[str, Tensor] | None, writes: bool) -> None:
    """Write the adapter, and how the model generates, as transformers does."""
    together = state_dict is None and sharded.is_sharded(model)
    if not writes and not together:
        return
    if state_dict is not None and not state_dict:  # Trainer's word for weights that DeepSpeed saves by itself
        warnings.warn(
            "no adapter is written, as DeepSpeed keeps the weights in its own checkpoint: set "
            "stage3_gather_16bit_weights_on_model_save",
            stacklevel=4,
        )
        return
    sharded.settle(model)
    read = sharded.whole if state_dict is None else _read_from(model, state_dict)
    config, tensors = adapter_of(model, name, read)
    if not config["base_model_name_or_path"]:
        warnings.warn(
            f"the base model has no name or path, so from_pretrained({os.fspath(directory)!r}) cannot find it: "
            "fastlora.load_adapter puts the adapter into a base model that you have loaded",
            stacklevel=4,
        )

    elif Path(config["base_model_name_or_path"]).resolve() != directory.resolve():
        _warn_of_both(directory, "config.json")

    def write() -> None:
        write_adapter(directory, config, tensors)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)

    sharded.by_first(write, together)


def _read_from(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """What gives a parameter's value from a state dict of the whole model; other tensors are what they are.

    Raises:
        ValueError: the state dict lacks something that is trained.
    """
    values = {sharded.clean(name): value for name, value in state_dict.items()}
    own = {sharded.clean(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    by_id = {id(tensor): values[name] for name, tensor in own.items() if name in values}
    for name, tensor in own.items():
        if tensor.requires_grad and id(tensor) not in by_id:
            raise ValueError(f"state_dict lacks {name}, which is trained: pass that of the whole model")
    return lambda tensor: by_id.get(id(tensor), tensor)


def _loads_over_nf4(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, NF4Linear) for module in self.modules()) or adapter_name_of(self):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("peft_model_id") is None:
            raise ValueError("over layers in fastlora's NF4 an adapter is loaded from a folder: give its path")
        options = {**vars(given["load_config"])["download_kwargs"]} if given.get("load_config") else {}
        options |= given.get("adapter_kwargs") or {}
        load_adapter(self, _folder(given["peft_model_id"], options), given.get("adapter_name") or "default")
        trains = bool(given.get("is_trainable", False))
        self.train(trains)
        if not trains:
            self.requires_grad_(False)
        from transformers.utils.loading_report import LoadStateDictInfo

        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    return load


def _folder(name: str, options: Mapping[str, Any]) -> Path:
    """The folder of an adapter by its path, or by its name on the hub."""
    if (local := Path(name, options.get("subfolder") or "")).is_dir():
        return local
    from transformers.utils import cached_file

    known = {key: options[key] for key in _HUB_OPTIONS if key in options}
    found = cached_file(name, CONFIG_NAME, **known)
    cached_file(name, WEIGHTS_NAME, **known)
    assert found is not None
    return Path(found).parent


def _resizes_adapted(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if adapter_name_of(self) is None:
            return original(self, new_num_tokens, *args, **kwargs)
        places = (
            (self.get_input_embeddings, self.set_input_embeddings),
            (self.get_output_embeddings, self.set_output_embeddings),
        )
        adapted = [(get, put, get()) for get, put in places]
        adapted = [each for each in adapted if isinstance(each[2], (LoRALinear, TrainedTokens))]
        for _, _, layer in adapted:
            _check_resizable(layer, new_num_tokens)
        before = [get() for get, _ in places]
        bases = {id(layer): layer.base_layer for _, _, layer in adapted}
        for _, put, layer in adapted:
            put(bases[id(layer)])
        trained_tokens.update_ties(self)
        try:
            result = original(self, new_num_tokens, *args, **kwargs)
        finally:
            for (get, _), old in zip(places, before, strict=True):
                if old is not None and id(old) not in bases:
                    kept_fp32.follow(get(), old)
            for get, put, layer in adapted:
                layer.set_base(get())
                put(layer)
            trained_tokens.update_ties(self)
        return result if not adapted else self.get_input_embeddings()

    return resize_token_embeddings


def _check_resizable(layer: LoRALinear | TrainedTokens, size: int | None) -> None:
    """Raise ValueError where a head or an embedding cannot have another number of tokens; None: as many as now."""
    if size is None:
        return
    if isinstance(layer, TrainedTokens):
        last = int(layer.indices.max())
        if size <= last:
            raise ValueError(f"token {last} is trained (trainable_token_indices): resize to more than {last} tokens")
    elif layer.taken_out and size != layer.out_features:
        raise ValueError("the base of the output head was changed by its start: resize it before replace_linear")


def _resumes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: Any, model: Any = None) -> None:
        if not _load_into(self, model or self.model, resume_from_checkpoint):
            original(self, resume_from_checkpoint, model)

    return _load_from_checkpoint


def _takes_best(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _load_best_model(self: Any) -> None:
        if not _load_into(self, self.model, self.state.best_model_checkpoint):
            original(self)

    return _load_best_model


def _load_into(trainer: Any, model: nn.Module, checkpoint: Any) -> bool:
    """Load a checkpoint's adapter into an adapted model; False where there is none, or FSDP or DeepSpeed keeps it."""
    name = adapter_name_of(sharded.unwrapped(model))
    if name is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    if not Path(checkpoint, WEIGHTS_NAME).is_file():
        return False
    load_adapter(model, checkpoint, name)
    return True


def _when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with a module as soon as it has been imported, or now."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, act))


class _Waiting(importlib.abc.MetaPathFinder):
    """Waits for one import; what finds the module is whatever else would have."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.act(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


install()
