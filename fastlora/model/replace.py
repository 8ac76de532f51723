"""`replace_linear`: from a model to a model whose linear layers run on fastlora.

In a plain model each targeted layer becomes a `LoRALinear`, and with `quantize="nf4"` each weight becomes NF4. Layers
of bitsandbytes are adopted. In a model that peft has already wrapped, peft's layers stay and get fastlora's forward
(`fastlora.peft_layers.swap`).

The work has three steps. Look: find every linear layer, and the obstacle to replacing it, if any. Decide: match names
and check every argument; whatever is wrong raises here. Change: only now is the model touched, so a call that raises
ValueError has changed nothing.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from fastlora.layers import between
from fastlora.layers.bases import check_adapter_dtype, computed_over, is_linear4bit
from fastlora.layers.lora_experts import adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.layers.report import PartRow, Report
from fastlora.layers.sharded import clean_names
from fastlora.model import new_layers, nf4_layers, on_top, stacks, trained_modules, trained_tokens
from fastlora.model.names import ALL_LINEAR, means, within
from fastlora.model.settings import LayerOptions, LoRASettings, select, settings_from_config, with_head
from fastlora.model.sites import Site, find_sites, output_head, places_of, put, report_on, stacks_of_experts
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
    """Put `LoRALinear` in place of a model's linear layers and freeze everything except the adapters.

    On a model that carries peft's LoRA layers, these are sped up in place instead: same parameters, same checkpoint,
    peft's methods still work, and nothing is frozen or unfrozen. Such a call takes no options and may be repeated.

    peft goes first or not at all: once a model has fastlora's adapters, it refuses peft's (ValueError), which would
    freeze and hide them. Prompt methods of peft's are taken: they train their prompt over the adapted model, frozen.

    Args:
        model: any module; changed in place.
        config: a peft `LoraConfig` instead of the options of LoRA; the options from `eva_dataloader` on go with either.
        r, lora_alpha, lora_dropout, use_rslora: as in peft.
        target_modules: "all-linear" (all except the output head; stacks of experts and routers are no linear layers,
            and the report's first line names them), a list of names or ends of names, or a regular expression for the
            whole name.
        exclude_modules: a list or a regular expression; these get no adapter and are not quantized.
        target_parameters: names or ends of names of stacks of experts, such as "mlp.experts.down_proj"; every expert
            gets an adapter. With `target_modules=[]` only stacks are adapted. Unlike in peft, `exclude_modules` and
            `layers_to_transform` exclude stacks too.
        rank_pattern, alpha_pattern: r and lora_alpha for names that fit a pattern.
        layers_to_transform, layers_pattern: with a list of targets, only the layers with these numbers.
        init_lora_weights: how A and B start, as listed in `layers.starts`: True, False, "gaussian", "orthogonal",
            "pissa", "pissa_niter_<N>", "olora", "eva" or, with `quantize`, "loftq".
        modules_to_save: ends of the names of modules that are trained in full and saved with the adapter.
        trainable_token_indices: tokens of the input embedding whose rows are trained and saved with the adapter, or
            {name of an embedding or output head: tokens}; a tied head shares them.
        eva_config: for "eva", peft's `EvaConfig` or a mapping: rho, tau, use_label_mask, label_mask_value, whiten,
            adjust_scaling_factors.
        loftq_config: for "loftq", peft's `LoftQConfig` or a mapping: loftq_iter.
        eva_dataloader: for "eva", batches of your data, a DataLoader or a list. The model runs on them before
            `quantize` changes it; they decide the rank of every layer (`fastlora.model.eva`).
        quantize: "nf4" turns weights into NF4: of every linear layer, adapted or not, and of the stacks of adapted
            experts. The output head, excluded layers and layers that share their weight keep their dtype. It goes
            layer by layer: peak memory is the model and one layer.
        blocksize, double_quant: of the quantization.
        adapter_name: the key of the adapter in parameter names.
        adapter_dtype: dtype of A, B and all else that is trained; fp32 where None. Of modules_to_save, another dtype
            than fp32 means the model's own.
    Returns:
        The same model. `model.fastlora_report` says whether each linear layer was replaced, and why.
    Raises:
        ValueError: an option out of its range or not supported, a target that matches nothing, no layer that can be
            replaced, or a model that has fastlora's adapters already. The model is unchanged.
        RuntimeError: memory ran out while quantizing. The model is half quantized: load it again.
    """
    asked = {name: value for name, value in locals().items() if name not in ("model", "config")}
    with clean_names(model):
        return _replace(model, config, asked)


def _replace(model: nn.Module, config: Any, asked: dict[str, Any]) -> nn.Module:
    """As `replace_linear`; asked: its options."""
    if carries_peft(model):
        return _speed_up_peft(model, config, asked)
    of_lora = {option.name: asked.pop(option.name) for option in fields(LoRASettings) if option.name in asked}
    if config is not None:
        if both := _not_default(of_lora):
            raise ValueError(f"give either config or {both[0]}, not both: set {both[0]} in the config")
        settings = with_head(settings_from_config(config), [name for name, _ in model.named_modules()])
    else:
        settings = LoRASettings(**of_lora)
    options = LayerOptions(**asked)
    by_architecture = settings.target_modules is None
    if by_architecture:
        settings = _with_default_targets(settings, model)
    check_no_adapters(model)
    sites = find_sites(model)
    excluded = mark_targets(model, sites, settings, strict=not by_architecture)
    return replace_marked(model, sites, settings, options, excluded)


def report(model: nn.Module) -> Report:
    """What computes each linear layer of a model now, and why.

    Args:
        model: one that `replace_linear` or `speed_up` was called on; it may have been moved, merged or given more
            adapters since.
    Returns:
        a new report: `.rows`, `.parts`, `.summary()`, `.print()`, `.to_json()`.
    Raises:
        ValueError: neither has been called on this model.
    """
    with clean_names(model):
        found = _report(model)
        found.parts = _parts(model)
        return found


def _report(model: nn.Module) -> Report:
    if carries_peft(model):
        from fastlora.peft_layers import swap

        return swap.peft_report(model)
    known: Report | None = getattr(model, "fastlora_report", None)
    if known is None and hasattr(model, "fastlora_parts"):
        return Report([])
    if known is None:
        raise ValueError("nothing to report on: call fastlora.replace_linear(model) on this model first")
    rows, used, experts, modules = [], [], adapted_experts(model), dict(model.named_modules())
    for row in known.rows:
        name = row.name.rpartition(".")[0]
        module: Any = modules.get(row.name)
        if row.replaced and name in experts:
            (row,) = (new for new in experts[name].rows(name) if new.name == row.name)
            used.append(backend(next(experts[name].parameters()).device))
        elif row.replaced and isinstance(module, (LoRALinear, NF4Linear)):
            base: Any = module.base_layer if isinstance(module, LoRALinear) else module
            used.append(backend(base.weight.device))
            path, kernels = computed_over(base, row.shape, row.r)
            row = dataclasses.replace(row, path=path, kernels=kernels)
        elif row.replaced:
            row = dataclasses.replace(row, replaced=False, path="unchanged", reason="removed since", r=0)
        rows.append(row)
    name, reason = used[0] if used else ("", "nothing")
    return Report(rows, name, reason, [*known.notes, *_weight_reads(modules)], known.left_out)


def _parts(model: nn.Module) -> list[PartRow]:
    """What `speed_up` found, in its present state."""
    modules, rows = dict(model.named_modules()), []
    for row in getattr(model, "fastlora_parts", []):
        module: Any = modules.get(row.name)
        if row.sped_up and not (module is not None and _is(module, row.part)):
            row = dataclasses.replace(row, sped_up=False, reason="taken back since")
        elif row.sped_up and (reason := between.standing_reason(module, row.part)):
            row = dataclasses.replace(row, sped_up=False, reason=reason)
        rows.append(row)
    return rows


def _is(module: nn.Module, part: str) -> bool:
    return between.is_compiled(module) if part == "compile" else part in between.parts_of(module)


def _weight_reads(modules: dict[str, Any]) -> list[str]:
    """A note on layers whose weight was read by code that does not call them, or that only asks for its dtype."""
    read = {name: module.weight_reads for name, module in modules.items() if isinstance(module, LoRALinear)}
    read = {name: count for name, count in read.items() if count}
    if not read:
        return []
    return [
        f"the weight of {len(read)} layers was read {sum(read.values())} times, such as that of {next(iter(read))}: a "
        "read forms W + scaling · B A, which takes about as long as the layer itself"
    ]


def restore(model: nn.Module) -> nn.Module:
    """Undo `speed_up`, and `replace_linear` on a peft model: its own code again, same parameters, same adapters.

    Returns:
        the same model.
    Raises:
        ValueError: nothing to undo: the model has no parts that `speed_up` sped up, and none of peft's layers that
            `replace_linear` did, or a part has become an FSDP unit of its own. Nothing is changed.
    """
    parts = [m for m in model.modules() if between.parts_of(m) or between.is_compiled(m)]
    if not all(between.can_restore(module) for module in parts if between.parts_of(module)):
        raise ValueError(
            "a norm, attention or MLP is an FSDP unit of its own: call restore before the model is sharded"
        )
    if carries_peft(model):
        from fastlora.peft_layers import swap

        if swap.sped_up(model) or not parts:
            swap.restore(model)
    elif not parts:
        raise ValueError(
            "restore(model) undoes speed_up(model), and replace_linear(model) on peft's models; this one has no part "
            "that was sped up, and no layer of peft's. To fold in fastlora's adapters, call merge(model)"
        )
    for module in parts:
        between.restore(module)
    if hasattr(model, "fastlora_parts"):
        del model.fastlora_parts
    return model


def mark_targets(model: nn.Module, sites: dict[str, Site], settings: LoRASettings, strict: bool = True) -> set[str]:
    """Mark the sites that get an adapter; strict: as in `select`.

    Returns:
        the names that the settings exclude.
    Raises:
        ValueError: nothing would be replaced, or an explicit target cannot be.
    """
    head = output_head(model)
    names = [name for name, _ in model.named_modules()]
    chosen, excluded = select(settings, names, sites.keys(), head, strict, stacks_of_experts(model))
    chosen = _without_trained(model, settings, chosen)
    able = {name for name in chosen if not sites[name].obstacle}
    parameters = [name for name, _ in model.named_parameters() if settings.means_parameter(name)]
    if not chosen and not settings.target_parameters:
        raise ValueError("the model has no linear layers except its output head")
    if chosen and not able:
        obstacles = Counter(sites[name].obstacle for name in chosen)
        listed = "; ".join(f"{count} x {obstacle}" for obstacle, count in obstacles.most_common())
        raise ValueError(f"none of the {len(chosen)} targeted linear layers can be replaced: {listed}")
    _refuse_useless_targets(settings, sites, chosen, able)
    settings.check_patterns_fit([*able, *parameters])
    for name in able:
        sites[name].adapt = True
        sites[name].r, sites[name].lora_alpha = settings.rank_and_alpha(name)
    return excluded


def _without_trained(model: nn.Module, settings: LoRASettings, chosen: set[str]) -> set[str]:
    """The targets without what is trained in full; unless they are "all-linear", such a target is an error."""
    trained = trained_modules.find(model, settings.modules_to_save)
    both = sorted(name for name in chosen if any(within(name, module) for module in trained))
    if both and settings.target_modules != ALL_LINEAR:
        raise ValueError(f"{both[0]!r} is in target_modules and in modules_to_save: leave it out of one of them")
    return chosen.difference(both)


def replace_marked(
    model: nn.Module,
    sites: dict[str, Site],
    settings: LoRASettings,
    options: LayerOptions,
    excluded: Collection[str] = (),
) -> nn.Module:
    """Replace the marked sites: check what is left to check, make the adapters, put them in, quantize layer by layer.

    Raises:
        ValueError: as `replace_linear`; the model is unchanged.
    """
    trained = trained_modules.find(model, settings.modules_to_save)
    for name, site in sites.items():
        site.trained = any(within(name, module) for module in trained)
    tokens = trained_tokens.resolve(model, settings.trainable_token_indices)
    row_trained = trained_tokens.owners(model, tokens)
    for name in row_trained:
        if name in trained or (name in sites and sites[name].adapt):
            raise ValueError(
                f"{name} has trained tokens, its own or of a tied weight: leave it out of the other options"
            )
    if options.quantize:
        nf4_layers.mark(model, sites, excluded, row_trained)
    adapted = {name: site for name, site in sites.items() if site.adapt}
    for site in adapted.values():
        if not site.quantize and not is_linear4bit(site.module):
            check_adapter_dtype(options.adapter_dtype, site.module.weight)
    new_layers.check_start(settings.init_lora_weights, adapted)
    found = stacks.find(model, settings)
    stacks.check_options(model, found, options)
    started = new_layers.from_data(model, adapted, settings, options.eva_dataloader)
    layers, taken_out = new_layers.make(adapted, settings, options)
    for name, a in started.items():
        layers[name].adapter()[0].data.copy_(a)
    experts = stacks.make(model, found, settings, options)
    packed = options.blocksize if options.quantize else 0
    report = report_on(model, sites, [row for name, each in experts.items() for row in each.rows(name, packed)])
    _put_layers(model, sites, layers, experts, trains=not settings.inference_mode)
    trains = not settings.inference_mode
    trained_modules.prepare(model, list(trained.values()), trains, options.adapter_dtype)
    trained_tokens.wrap(model, tokens, trains, options.adapter_dtype)
    nf4_layers.quantize(sites, layers, options, taken_out)
    for each in experts.values() if options.quantize else ():
        each.quantize(options.blocksize, options.double_quant)
    let_inputs_require_grad(model)
    admit_training(model)
    on_top.refuse_peft(model)
    model.fastlora_report = report  # type: ignore[assignment]
    settings = dataclasses.replace(settings, modules_to_save=list(trained) or None)
    model.fastlora_settings = settings  # type: ignore[assignment]
    return model


def _put_layers(
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
        put(sites[name].places, layer)
    places = places_of(model, [layer.base_layer for layer in experts.values()])
    for layer in experts.values():
        put(places[id(layer.base_layer)], layer)


def carries_peft(model: nn.Module) -> bool:
    """Whether peft has wrapped this model or put layers into it: its own, or those of a class that a user derived."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return any(kind.__module__.split(".")[0] == "peft" for kind in kinds)


def _not_default(options: dict[str, Any]) -> list[str]:
    """The options of `replace_linear` that do not have their default value; an empty mapping is no value."""
    defaults: dict[str, Any] = replace_linear.__kwdefaults__ or {}
    return [name for name, value in options.items() if value not in (defaults[name], {})]


def _speed_up_peft(model: nn.Module, config: Any, options: dict[str, Any]) -> nn.Module:
    """Change the class of peft's layers, after checking that no option was given."""
    given = [] if config is None else ["config"]
    given += _not_default(options)
    if given:
        raise ValueError(
            "the model already carries peft's adapters, which got their options from peft: call "
            f"replace_linear(model) without {given[0]}"
        )
    from fastlora.peft_layers import swap

    model.fastlora_report = swap.speed_up(model)  # type: ignore[assignment]
    return model


def _with_default_targets(settings: LoRASettings, model: nn.Module) -> LoRASettings:
    """peft's default targets for the model's architecture."""
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    except ImportError as error:
        raise ValueError("target_modules=None means peft's defaults, but peft is not installed: name them") from error

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULTS and settings.target_parameters:
        return dataclasses.replace(settings, target_modules=[])
    if model_type not in DEFAULTS:
        raise ValueError(f"target_modules is None, and peft has no default for model_type={model_type!r}: name them")
    return dataclasses.replace(settings, target_modules=list(DEFAULTS[model_type]))


def check_no_adapters(model: nn.Module) -> None:
    """Raise ValueError if the model has fastlora's adapters already."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    adapted += adapted_experts(model)
    if adapted:
        raise ValueError(
            f"the model has fastlora's adapters already, in {len(adapted)} layers such as {adapted[0]!r}: merge(model) "
            "folds them in, or load the model again"
        )


def _refuse_useless_targets(settings: LoRASettings, sites: dict[str, Site], chosen: set[str], able: set[str]) -> None:
    """Each entry of a list of targets must lead to at least one replaced layer; the report covers the other layers."""
    targets = settings.target_modules
    if targets is None or isinstance(targets, str):
        return
    for entry in targets:
        meant = [name for name in chosen if means(entry, name)]
        if meant and not able.intersection(meant):
            raise ValueError(f"target_modules: {entry!r} cannot be replaced: {sites[meant[0]].obstacle}")
