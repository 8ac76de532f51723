"""`fastlora keys`: the keys of a recipe."""


def keys() -> None:
    """List the keys of a recipe, with defaults and meaning."""
    from rich.console import Console
    from rich.table import Table

    from fastlora.training.recipe import describe

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("key", "default", "meaning"):
        table.add_column(heading, no_wrap=heading != "meaning")
    for name, default, meaning in describe():
        table.add_row(name, default, meaning)
    Console().print(table)
