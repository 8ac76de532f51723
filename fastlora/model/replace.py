"""From a model to a model whose linear layers run on fastlora: `replace_linear`.

A plain model gets `LoRALinear` in place of each targeted layer, and with `quantize="nf4"` an NF4 base in place of each
weight. Layers of bitsandbytes are adopted. A model that peft has already wrapped keeps its own layers, which learn the
fused forward (`fastlora.peft_layers.swap`).

The work goes in three steps. Look: every linear layer is found and the reason against replacing it, if any, noted.
Decide: names are matched and every argument checked; whatever is wrong raises here. Change: only then is the model
touched, so that a call that raises ValueError has changed nothing.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from fastlora.kernels.operands import BLOCKSIZES
from fastlora.layers.bases import check_adapter_dtype, is_linear4bit, kernels_of
from fastlora.layers.lora_experts import adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.layers.report import Report
from fastlora.model import new_layers, nf4_layers, stacks, trained_modules, trained_tokens
from fastlora.model.names import ALL_LINEAR, within
from fastlora.model.settings import LoRASettings, select, settings_from_config
from fastlora.model.sites import Site, find_sites, output_head, put, report_on
from fastlora.model.trainer_compat import admit_training, let_inputs_require_grad
from fastlora.ops.backend import backend


def replace_linear(
    model: nn.Module,
    config: Any = None,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    target_modules: Any = ALL_LINEAR,
    exclude_modules: Any = None,
    target_parameters: Any = None,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    layers_to_transform: Any = None,
    layers_pattern: Any = None,
    init_lora_weights: bool | str = True,
    modules_to_save: Any = None,
    trainable_token_indices: Any = None,
    eva_config: Any = None,
    loftq_config: Any = None,
    eva_dataloader: Any = None,
    quantize: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put fused LoRA layers in place of a model's linear layers; freeze everything but the adapters.

    On a model that carries peft's LoRA layers, these are sped up in place instead: same parameters, same checkpoint,
    peft's methods still work, nothing is frozen or thawed; such a call takes no options and may be repeated.

    Args:
        model: any module; changed in place.
        config: a peft `LoraConfig` instead of the options of LoRA; those from `eva_dataloader` on go with either.
        r, lora_alpha, lora_dropout, use_rslora: as in peft.
        target_modules: "all-linear" (all but the output head), a list of names or ends of names, or a regular
            expression for the whole name.
        exclude_modules: a list or a regular expression; these get no adapter and are not quantized.
        target_parameters: names or ends of names of stacks of experts, such as "mlp.experts.down_proj"; every expert
            gets an adapter. With `target_modules=[]` they alone do. Unlike peft, `exclude_modules` and
            `layers_to_transform` leave stacks out too.
        rank_pattern, alpha_pattern: r and lora_alpha for names that fit a pattern.
        layers_to_transform, layers_pattern: with a list of targets, only the layers with these numbers.
        init_lora_weights: a start by the names in `layers.starts`: True, False, "gaussian", "orthogonal", "pissa",
            "pissa_niter_<N>", "olora", "eva" or, with `quantize`, "loftq".
        modules_to_save: ends of the names of modules that are trained in full and saved with the adapter.
        trainable_token_indices: tokens of the input embedding whose rows are trained and saved with the adapter, or
            {name of an embedding or output head: tokens}; a tied head shares them.
        eva_config: for "eva", peft's `EvaConfig` or a mapping: rho, tau, use_label_mask, label_mask_value, whiten,
            adjust_scaling_factors.
        loftq_config: for "loftq", peft's `LoftQConfig` or a mapping: loftq_iter.
        eva_dataloader: for "eva", batches of your data, a DataLoader or a list: the model runs on them as it is given,
            before `quantize`. It decides the rank of every layer (`fastlora.model.eva`).
        quantize: "nf4" turns the weight of every linear layer into NF4, adapted or not, but that of the output head, of
            excluded layers and of those that share their weight; and the stacks of adapted experts. Layer by layer: the
            peak is the model and one layer.
        blocksize, double_quant: of the quantization.
        adapter_name: the key of the adapter in parameter names.
        adapter_dtype: dtype of A and B; fp32 where None, as in peft.
    Returns:
        The same model. `model.fastlora_report` says what became of every linear layer and why.
    Raises:
        ValueError: an option out of its range or not supported, a target that matches nothing, no layer that can be
            replaced, or a model that has fastlora's adapters already. The model is unchanged.
        RuntimeError: memory ran out while quantizing. The model is half quantized: load it again.
    """
    keywords = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "target_parameters": target_parameters,
        "use_rslora": use_rslora,
        "rank_pattern": rank_pattern or {},
        "alpha_pattern": alpha_pattern or {},
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
        "init_lora_weights": init_lora_weights,
        "modules_to_save": modules_to_save,
        "trainable_token_indices": trainable_token_indices,
        "eva_config": eva_config,
        "loftq_config": loftq_config,
    }
    if carries_peft(model):
        others = {"quantize": quantize, "adapter_dtype": adapter_dtype, "eva_dataloader": eva_dataloader}
        return _speed_up_peft(model, config, {**keywords, **others})
    if config is not None:
        _refuse_both(keywords)
        settings = settings_from_config(config)
    else:
        settings = LoRASettings(**keywords)
    by_architecture = settings.target_modules is None
    if by_architecture:
        settings = _with_default_targets(settings, model)
    check_free(model)
    sites = find_sites(model)
    excluded = decide(model, sites, settings, strict=not by_architecture)
    return carry_out(
        model,
        sites,
        settings,
        excluded,
        quantize=quantize,
        blocksize=blocksize,
        double_quant=double_quant,
        adapter_name=adapter_name,
        adapter_dtype=adapter_dtype,
        eva_dataloader=eva_dataloader,
    )


def report(model: nn.Module) -> Report:
    """What computes each linear layer of a model now, and why; `replace_linear` has been called on it.

    Args:
        model: plain, or with peft's layers; moved, merged or given further adapters since.
    Returns:
        a report made anew: `.rows`, `.summary()`, `.print()`, `.to_json()`.
    Raises:
        ValueError: `replace_linear` has not been called on this model.
    """
    if carries_peft(model):
        from fastlora.peft_layers import swap

        return swap.report(model)
    said: Report | None = getattr(model, "fastlora_report", None)
    if said is None:
        raise ValueError("nothing to report on: call fastlora.replace_linear(model) on this model first")
    rows, live, experts, modules = [], {}, adapted_experts(model), dict(model.named_modules())
    for row in said.rows:
        name = row.name.rpartition(".")[0]
        module: Any = modules.get(row.name)
        if row.replaced and name in experts:
            (row,) = (new for new in experts[name].rows(name) if new.name == row.name)
            live[row.path] = backend(next(experts[name].parameters()).device)
        elif row.replaced and isinstance(module, (LoRALinear, NF4Linear)):
            base: Any = module.base_layer if isinstance(module, LoRALinear) else module
            found = backend(base.weight.device)
            live[found.name] = found
            row = dataclasses.replace(row, path=found.name, kernels=kernels_of(base, row.shape, row.r))
        elif row.replaced:
            row = dataclasses.replace(row, replaced=False, path="unchanged", reason="taken out since", r=0)
        rows.append(row)
    first = next(iter(live.values()), None)
    return Report(rows, first.name if first else "", first.reason if first else "nothing", said.notes)


def restore(model: nn.Module) -> nn.Module:
    """Give a peft model its own layers back: plain peft again, same parameters, same adapters.

    Returns:
        the same model.
    Raises:
        ValueError: no layer of the model is one of peft's sped up in place. Nothing is changed.
    """
    if not carries_peft(model):
        raise ValueError(
            "restore(model) undoes replace_linear(model) on peft's models, and this one has no layer of peft's; "
            "adapters of fastlora's own are folded in by merge(model)"
        )
    from fastlora.peft_layers import swap

    return swap.restore(model)


def decide(model: nn.Module, sites: dict[str, Site], settings: LoRASettings, strict: bool = True) -> set[str]:
    """Mark the sites that get an adapter.

    Returns:
        the names that the settings exclude.
    Raises:
        ValueError: nothing would be replaced, or an explicit target cannot be.
    """
    head = output_head(model)
    names = [name for name, _ in model.named_modules()]
    chosen, excluded = select(settings, names, sites.keys(), head, strict)
    chosen = _without_trained(model, settings, chosen)
    able = {name for name in chosen if not sites[name].obstacle}
    parameters = [name for name, _ in model.named_parameters() if settings.means_parameter(name)]
    if not chosen and not settings.target_parameters:
        raise ValueError("the model has no linear layers but its output head")
    if chosen and not able:
        reasons = Counter(sites[name].obstacle for name in chosen)
        told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        raise ValueError(f"none of the {len(chosen)} targeted linear layers can be replaced: {told}")
    _refuse_unable_targets(settings, sites, chosen, able)
    settings.check_patterns([*able, *parameters])
    for name in able:
        sites[name].adapt = True
        sites[name].r, sites[name].lora_alpha = settings.rank_and_alpha(name)
    return excluded


def _without_trained(model: nn.Module, settings: LoRASettings, chosen: set[str]) -> set[str]:
    """The targets without what is trained in full; "all-linear" means the others, any other target is an error."""
    trained = trained_modules.find(model, settings.modules_to_save)
    both = sorted(name for name in chosen if any(within(name, module) for module in trained))
    if both and settings.target_modules != ALL_LINEAR:
        raise ValueError(f"{both[0]!r} is in target_modules and in modules_to_save: leave it out of one of them")
    return chosen.difference(both)


def carry_out(
    model: nn.Module,
    sites: dict[str, Site],
    settings: LoRASettings,
    excluded: Collection[str] = (),
    *,
    quantize: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
    eva_dataloader: Any = None,
) -> nn.Module:
    """Replace the marked sites: check the last arguments, make the adapters, hang them in, quantize layer by layer.

    Raises:
        ValueError: as `replace_linear`; the model is unchanged.
    """
    _check_arguments(quantize, blocksize, adapter_name)
    trained = trained_modules.find(model, settings.modules_to_save)
    for name, site in sites.items():
        site.trained = any(within(name, module) for module in trained)
    tokens = trained_tokens.resolve(model, settings.trainable_token_indices)
    for name in trained_tokens.places(model, tokens):
        if name in trained or (name in sites and sites[name].adapt):
            raise ValueError(
                f"{name} has trained tokens, its own or of a tied weight: leave it out of the other options"
            )
    if quantize:
        nf4_layers.decide(model, sites, excluded, trained_tokens.places(model, tokens))
    adapted = {name: site for name, site in sites.items() if site.adapt}
    for site in adapted.values():
        if not site.quantize and not is_linear4bit(site.module):
            check_adapter_dtype(adapter_dtype, site.module.weight)
    new_layers.check(settings.init_lora_weights, adapted)
    found = stacks.find(model, settings)
    stacks.check(model, found, quantize is not None, blocksize, adapter_dtype)
    started = new_layers.from_data(model, adapted, settings, eva_dataloader)
    layers, taken_out = new_layers.make(adapted, settings, adapter_name, adapter_dtype, blocksize, double_quant)
    for name, a in started.items():
        layers[name].adapter()[0].data.copy_(a)
    experts = stacks.make(model, found, settings, adapter_name=adapter_name, adapter_dtype=adapter_dtype)
    packed = blocksize if quantize else 0
    report = report_on(model, sites, [row for name, each in experts.items() for row in each.rows(name, packed)])
    _hang(model, sites, layers, experts, trains=not settings.inference_mode)
    for module in trained.values():
        module.requires_grad_(not settings.inference_mode)
    trained_tokens.wrap(model, tokens, trains=not settings.inference_mode)
    nf4_layers.quantize(sites, layers, blocksize, double_quant, taken_out)
    for each in experts.values() if quantize else ():
        each.quantize(blocksize, double_quant)
    let_inputs_require_grad(model)
    admit_training(model)
    model.fastlora_report = report  # type: ignore[assignment]
    settings = dataclasses.replace(settings, modules_to_save=list(trained) or None)
    model.fastlora_settings = settings  # type: ignore[assignment]
    return model


def _hang(
    model: nn.Module, sites: dict[str, Site], layers: dict[str, LoRALinear], experts: dict[str, Any], trains: bool
) -> None:
    """Put new layers in their places; of all the model's parameters only A and B are trained, where `trains`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in (*layers.values(), *experts.values()):
        layer.requires_grad_(False)
        for part in (layer.lora_A, layer.lora_B):
            part.requires_grad_(trains)
    for name, layer in layers.items():
        sites[name].hang(layer)
    for layer in experts.values():
        put(model, layer.base_layer, layer)


def carries_peft(model: nn.Module) -> bool:
    """Whether peft has wrapped this model or put layers of its own into it."""
    return any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()) or any(
        getattr(module, "fastlora_calls", None) is not None for module in model.modules()
    )


def _speed_up_peft(model: nn.Module, config: Any, options: dict[str, Any]) -> nn.Module:
    """Change the class of peft's layers, after making sure that no option was given."""
    defaults = {**vars(LoRASettings()), "quantize": None, "adapter_dtype": None, "eva_dataloader": None}
    given = [name for name, value in options.items() if value != defaults[name]]
    if config is not None or given:
        raise ValueError(
            f"the model already carries peft's adapters, whose options are peft's: call replace_linear(model) without "
            f"{'config' if config is not None else given[0]}"
        )
    from fastlora.peft_layers import swap

    model.fastlora_report = swap.speed_up(model)  # type: ignore[assignment]
    return model


def _refuse_both(keywords: dict[str, Any]) -> None:
    defaults = vars(LoRASettings())
    given = [name for name, value in keywords.items() if value != defaults[name]]
    if given:
        raise ValueError(f"give either config or {given[0]}, not both: set {given[0]} in the config")


def _with_default_targets(settings: LoRASettings, model: nn.Module) -> LoRASettings:
    """peft's default targets for the model's architecture."""
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    except ImportError as error:
        raise ValueError("target_modules=None means peft's defaults, and peft is not installed") from error

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULTS and settings.target_parameters:
        return dataclasses.replace(settings, target_modules=[])
    if model_type not in DEFAULTS:
        raise ValueError(f"target_modules is None, and peft has no default for model_type={model_type!r}: name them")
    return LoRASettings(**{**vars(settings), "target_modules": list(DEFAULTS[model_type])})


def check_free(model: nn.Module) -> None:
    """Raise ValueError where the model has fastlora's adapters already."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    adapted += adapted_experts(model)
    if adapted:
        raise ValueError(
            f"the model has fastlora's adapters already, in {len(adapted)} layers such as {adapted[0]!r}: merge(model) "
            "folds them in, or load the model again"
        )


def _check_arguments(quantize: str | None, blocksize: int, adapter_name: str) -> None:
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize must be None or 'nf4', not {quantize!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}; got {blocksize}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a name without dots, not {adapter_name!r}")


def _refuse_unable_targets(settings: LoRASettings, sites: dict[str, Site], chosen: set[str], able: set[str]) -> None:
    """An entry of a list of targets must lead to at least one replaced layer; the report tells of the others."""
    targets = settings.target_modules
    if targets is None or isinstance(targets, str):
        return
    for entry in targets:
        meant = [name for name in chosen if name == entry or name.endswith("." + entry)]
        if meant and not able.intersection(meant):
            raise ValueError(f"target_modules: {entry!r} cannot be replaced: {sites[meant[0]].obstacle}")
