"""`fastlora version`."""


def version() -> None:
    """Print the version."""
    from fastlora import __version__

    print(__version__)
