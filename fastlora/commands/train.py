"""`fastlora train`: fine-tune by a recipe, or run the demo."""

import os
import shlex
import signal
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="a YAML file or the name of a built-in recipe; without one, the demo")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key; may be repeated")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora | qlora | houlsby | prefix | prompt | full; as --set method=")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in output_dir")] = False,
) -> None:
    """Fine-tune a model by a recipe; without a recipe, run the demo on a small model that ships with fastlora.

    Ctrl-C saves a checkpoint and stops; the same command with --resume continues the run.
    """
    from fastlora.training import plots
    from fastlora.training import recipe as recipes

    console = plots.lasting_console()
    overrides = [*(overrides or []), *([f"method={method}"] if method else [])]
    try:
        if recipe is None:
            from fastlora.demo import demo

            result = demo.run(overrides, resume, console)
        else:
            loaded = recipes.load(recipe, overrides)
            from fastlora.training.loop import train as run

            result = run(loaded, resume, console=console)
    except (ValueError, FloatingPointError) as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(_out_of_memory(recipe, overrides, error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(_out_of_memory(recipe, overrides, error))
    except OSError as error:
        _fail(f"{error.filename or 'a file or connection'}: {error.strerror or error}. Mend that, then try again")
    if result.interrupted is not None:
        set_again = [word for override in overrides for word in ("--set", override)]
        words = ["fastlora", "train", *([recipe] if recipe else []), *set_again, "--resume"]
        if os.environ.get("RANK", "0") == "0":  # only one of several processes prints it
            console.print(f"continue with: {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(128 + signal.Signals[result.interrupted])


def _out_of_memory(recipe: str | None, overrides: list[str], error: BaseException) -> str:
    """What ran out, what was forecast, and what would need less."""
    from fastlora.planner.estimate import estimate_of
    from fastlora.planner.models import resolve
    from fastlora.training import recipe as recipes
    from fastlora.training.forecast_of import setup_of

    said = f"the device ran out of memory ({str(error).partition(chr(10))[0][:200]})"
    try:
        made = recipes.load(str(recipe), overrides)
        named = resolve(made.model_name_or_path)
        found = estimate_of(named, setup_of(made, named.shape), None)
    except ValueError:
        return f"{said}. Lower per_device_train_batch_size or max_length, or set gradient_checkpointing: true"
    less: list[tuple[str, dict[str, object]]] = [
        ("gradient_checkpointing: true", {"checkpointing": "full"}),
        ("gradient_checkpointing: min", {"checkpointing": "offload"}),
        ("per_device_train_batch_size: 1", {"batch": 1}),
        ("quantize: nf4", {"quantized": "nf4-nested"}),
    ]
    setup = found.forecast.setup
    if setup.method == "full":
        less.pop()
    sizes = [(name, estimate_of(named, setup.with_(**change), None, advise=False).expected) for name, change in less]
    ways = ", ".join(f"{name} ({size / 2**30:.1f} GiB)" for name, size in sizes if size < 0.98 * found.expected)
    forecast = f"{found.expected / 2**30:.1f} GiB"
    return f"{said}. The forecast was {forecast}; less would do with {ways or 'a shorter max_length'}"


def _fail(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    line = escape(" ".join(message.split()))
    Console(stderr=True).print(f"[bold red]error:[/] {line}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)
