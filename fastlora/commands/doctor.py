"""`fastlora doctor`: what runs on this machine, what does not, and why."""


def doctor() -> None:
    """Show versions, devices, which backends are live, why the others are not, and what would help."""
    from rich.console import Console

    from fastlora.commands import diagnosis

    diagnosis.show(diagnosis.diagnose(), Console())
