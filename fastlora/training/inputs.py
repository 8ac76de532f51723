"""Text files that a user hands over, read with clear errors."""

import gzip
import zlib
from pathlib import Path
from typing import Any

from fastlora.layers.quoted import clipped, reason


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; one named `.gz` is decompressed.

    Raises:
        ValueError: there is no such file, or it cannot be read; the message names it and says why.
    """
    name = clipped(str(path))
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 (byte {error.start}): save it as UTF-8 text") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{name}: cannot be read ({reason(error)})") from error
