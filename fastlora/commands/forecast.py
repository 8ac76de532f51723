"""`fastlora forecast`: the memory of a run before it is started."""

import json as json_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.commands.usage import Bottleneck, Dora, Rank, Targets, VirtualTokens, refuse

if TYPE_CHECKING:
    from rich.console import Console

    from fastlora.planner.estimate import Estimate

GIB = 2**30


def forecast(
    model: Annotated[
        str, typer.Argument(help="a folder with config.json, a hub name, a name such as llama-3-8b, or a recipe")
    ] = "",
    params: Annotated[str | None, typer.Option(help="instead of a model: its size, as 7B")] = None,
    method: Annotated[str, typer.Option(help="lora | qlora | full | houlsby | prefix | prompt | inference")] = "qlora",
    gpu: Annotated[str | None, typer.Option(help="a card, as a100-80gb or rtx-4090, or its memory, as 24gb")] = None,
    gpus: Annotated[int, typer.Option(help="devices")] = 1,
    sharding: Annotated[
        str, typer.Option(help="none | ddp | fsdp | zero2 | zero3; by default what suits the method")
    ] = "",
    seq: Annotated[int, typer.Option(help="tokens of a sample")] = 2048,
    batch: Annotated[int, typer.Option(help="samples of one forward pass of one device")] = 1,
    accumulation: Annotated[int, typer.Option(help="forward passes before an optimizer step")] = 1,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    dora: Dora = False,
    dropout: Annotated[float, typer.Option(help="on the adapters' input")] = 0.0,
    bottleneck: Bottleneck = 64,
    virtual_tokens: VirtualTokens = 20,
    quantize: Annotated[
        str | None, typer.Option(help="none | nf4 | nf4-nested | int8 | gptq; by default by the method")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of what is not quantized: bf16 | fp16 | fp32")] = "",
    optimizer: Annotated[
        str, typer.Option(help="adamw | adamw-bf16 | adamw-8bit | paged-adamw-8bit | adafactor | sgd")
    ] = "",
    checkpointing: Annotated[
        str, typer.Option(help="none | selective | full | offload; by default what the runtime does")
    ] = "",
    attention: Annotated[str, typer.Option(help="flash | sdpa | eager")] = "flash",
    runtime: Annotated[
        str, typer.Option(help="fastlora | peft | peft-lean | fused | liger | unsloth | torchtune | hf-full")
    ] = "fastlora",
    tokens: Annotated[float | None, typer.Option(help="tokens to train on, as 1e7: says how long it takes")] = None,
    price: Annotated[float | None, typer.Option(help="of one device for one hour: says what it costs")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="each term with its formula, and the largest tensors")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    plot: Annotated[Path | None, typer.Option(help="write a chart: FILE.png or FILE.svg")] = None,
    calibrate: Annotated[
        list[Path] | None, typer.Option(help="folders of runs on a GPU: how right forecasts were")
    ] = None,
) -> None:
    """Say what a run will hold in memory, whether that fits, and how sure that is.

    Ends with 0 if it fits (or no card was named), 1 if it does not, 2 if it is uncertain, 3 if something was asked
    wrongly.
    """
    from rich.console import Console

    from fastlora.planner import forecast as estimate_of

    if calibrate:
        _calibrate(calibrate)
        raise typer.Exit
    try:
        if not model and not params:
            raise ValueError("name a model, or its size with --params")
        found = _of_recipe(model, gpu, gpus) if _is_recipe(model) else estimate_of(
            model, params=params, method=method, length=seq, batch=batch, r=rank, targets=targets, dora=dora,
            dropout=dropout, bottleneck=bottleneck, virtual_tokens=virtual_tokens, quantize=quantize, dtype=dtype,
            optimizer=optimizer, checkpointing=checkpointing, attention=attention, micro_batches=accumulation,
            runtime=runtime, gpu=gpu, gpus=gpus, sharding=sharding,
        )  # fmt: skip
        if plot:
            from fastlora.planner.chart import draw

            draw(found, plot)
    except ValueError as error:
        refuse(error)
    if json:
        typer.echo(json_of.dumps(found.to_dict(), indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        show(found, console)
        _show_time(found, console, tokens, price)
        if explain:
            _explain(found, console)
    raise typer.Exit({"fits": 0, "does not fit": 1, "uncertain": 2}.get(found.verdict, 0))


def _is_recipe(model: str) -> bool:
    return Path(model).suffix in (".yaml", ".yml")


def _of_recipe(path: str, gpu: str | None, gpus: int) -> "Estimate":
    """The forecast of a recipe; what it says counts, and other options do not."""
    from fastlora.planner.estimate import estimate_of
    from fastlora.planner.models import resolve
    from fastlora.training import recipe as recipes
    from fastlora.training.forecast_of import setup_of

    made = recipes.load(path)
    named = resolve(made.model_name_or_path)
    setup = setup_of(made, named.shape, devices=gpus, sharding="ddp" if gpus > 1 else "none")
    return estimate_of(named, setup, gpu)


def _calibrate(folders: list[Path]) -> None:
    from rich.console import Console

    from fastlora.training.forecast_of import compared

    console = Console(highlight=False, soft_wrap=True)
    try:
        found = compared(folders)
    except ValueError as error:
        refuse(error)
    for folder, facts, off in found:
        measured = facts["measured_allocated_bytes"] / GIB
        reserved = facts["measured_reserved_bytes"] / facts["measured_allocated_bytes"]
        said = f"{off:+7.1%}  {measured:.2f} GiB measured, {reserved:.2f} times that reserved  {folder}"
        console.print(said, markup=False)
    errors = [off for *_, off in found]
    console.print(f"{len(errors)} runs, mean {sum(errors) / len(errors):+.1%}, worst {max(errors, key=abs):+.1%}")


def show(found: "Estimate", console: "Console") -> None:
    """Print the terms, the range, the verdict, its evidence, and the rules of thumb."""
    from rich.table import Table

    from fastlora.planner.rules import rules_for

    setup, shape = found.forecast.setup, found.model.shape
    trained = setup.trained
    console.print(f"[bold]{found.model.name}[/] ({shape.parameters:,} parameters; {found.model.source})")
    each = "" if setup.devices == 1 else f" on each of {setup.devices} devices ({setup.sharding})"
    console.print(
        f"{setup.method}, {setup.runtime}, {setup.batch} x {setup.length} tokens{each}; "
        f"trained: {trained:,} ({trained / shape.parameters:.3%})"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("GiB, forecast", justify="right")
    table.add_column("")
    for name, size in sorted(found.terms.items(), key=lambda item: -item[1]):
        if size >= GIB / 1000:
            table.add_row(f"{size / GIB:.2f}", name)
    table.add_row(
        f"[bold]{found.expected / GIB:.2f}[/]",
        f"[bold]in all[/], between {found.low / GIB:.2f} and {found.high / GIB:.2f}",
    )
    console.print(table)
    console.print(f"peak during {found.forecast.moment}; {found.allocated / GIB:.2f} GiB of tensors")
    if found.card:
        colour = {"fits": "green", "does not fit": "red"}.get(found.verdict, "yellow")
        console.print(f"[bold {colour}]{found.verdict}[/] on {found.card.name} ({found.card.memory / GIB:.1f} GiB)")
    for change, size in found.ways:
        console.print(f"  would fit: {change} ({size / GIB:.2f} GiB)")
    if found.card and found.verdict == "does not fit" and not found.ways:
        console.print("  nothing that was tried makes it fit on this card")
    console.print(f"evidence: {found.evidence}")
    for rule in rules_for(setup):
        said = f"{rule.size / 1e9:,.1f} GB ({rule.size / GIB:,.1f} GiB)"
        console.print(f"[dim]rule of thumb: {said} by {rule.rule}; leaves out {rule.leaves_out}[/]")


def _show_time(found: "Estimate", console: "Console", tokens: float | None, price: float | None) -> None:
    if found.tokens_per_second is None:
        if tokens or price:
            console.print("time: unknown: name a card whose rate is known, and a runtime that was measured")
        return
    low, middle, high = found.tokens_per_second
    console.print(
        f"predicted: {middle:,.0f} tokens/s ({low:,.0f} to {high:,.0f}), from the rates of measured runs on an A100"
    )
    if tokens:
        hours = tokens / middle / 3600
        devices = found.forecast.setup.devices
        cost = f", {hours * price * devices:,.2f} at {price:g} an hour and device" if price else ""
        console.print(f"predicted: {hours:,.1f} hours for {tokens:,.0f} tokens{cost}")


def _explain(found: "Estimate", console: "Console") -> None:
    setup = found.forecast.setup
    console.print("\n[bold]weights[/]")
    for entry in found.forecast.entries:
        console.print(f"  {entry.size / GIB:8.3f} GiB  {entry.name}: {entry.how}")
    trained = setup.trained
    if setup.method != "full":
        console.print(f"[bold]adapters[/]\n  {trained:,} values x {setup.trained_width:g}")
    console.print(f"[bold]optimizer[/]\n  {setup.optimizer}: {trained:,} trained values (memory/optimizer.py)")
    console.print(f"[bold]held at the peak, during {found.forecast.moment}[/]")
    tokens = setup.batch * setup.length
    for term, name, size in found.forecast.largest[:20]:
        console.print(
            f"  {size / GIB:8.3f} GiB  {term}: {name} = {size / tokens:,.0f} bytes x {tokens:,} tokens", markup=False
        )
    reserved = (found.expected - found.forecast.context) / found.allocated
    console.print(f"[bold]slack[/]\n  tensors x {reserved:.2f} (planner/estimate.py, RESERVED)")
