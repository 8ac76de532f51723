"""Damaged inputs by seed: the same seed gives the same input on every machine, so a failure repeats.

`FASTLORA_FUZZ_CASES=10000` tries that many seeds of each kind instead of 500 (`make nightly`). A seed beyond 500 that
has failed goes into `KNOWN`, so that it is tried each time.
"""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

COUNT = int(os.environ.get("FASTLORA_FUZZ_CASES", "500"))
KNOWN: dict[str, Sequence[int]] = {"adapters": (1256, 1339, 2314, 3204, 2710, 3866, 5240, 5287, 7759, 9393)}

_BYTES = [bytes([byte]) for byte in b"\0\xff\n\r\t\"'[]{}:,\\#&*"]
_BYTES += [b"&a ", b"*a", b"- ", b"? ", b"<<: ", b"!!timestamp ", b"!!int ", b"!!python/name:os.system ", b"---\n"]
_BYTES += [b"\\ud800", b"\\u0000", b"null", b"true", b"NaN", b"1e999", b"-0", b"-1", b"9" * 5000, b"0x" + b"f" * 9000]
_BYTES += [b"[" * 3000, b'{"a":' * 3000, b"&a [*a, *a]", b" " * 300, b"\xef\xbb\xbf", "é\u2028".encode()]
_BYTES += [b"F32", b"BF16", b"I8", b"lora_A", b"lora_B", b"base_model."]

_VALUES: list[Any] = [None, True, False, 0, -1, 1, 4, 10**30, 16**9000, 1.5, -0.0, 1e308, float("nan"), float("inf")]
_VALUES += ["", "x", "\0", "\ud800", "(", "*", "nf4", "q", "x" * 5000, "é", "2026-99-99", "all-linear", "LORA"]
_VALUES += [[], {}, [None], [[]], ["x"], [1, 2], ["q", 1], [["x"] * 50] * 50]
_VALUES += [{"x": 1}, {"": None}, {"q": 4}, {"q": "4"}, {"(": 4}, {"a": {"a": {"a": {}}}}]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four wounds: bytes flipped, inserted, cut out or doubled, or the end missing."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 4, 40)))
        kind = rng.randrange(5)
        if kind == 0:
            middle = bytes(byte ^ (1 << rng.randrange(8)) for byte in content[start:end])
        elif kind == 1:
            middle = rng.choice(_BYTES) + content[start:end]
        elif kind == 2:
            middle = b""
        elif kind == 3:
            middle = 2 * content[start:end]
        else:
            middle, end = content[start:end], len(content)
        content = content[:start] + middle + content[end:]
    return content


def altered(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The mapping with one to three values, or values within them, replaced, or keys gone or renamed."""
    value = dict(value)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*value, "x"])
        kind = rng.randrange(6)
        if kind == 0:
            value.pop(key, None)
        elif kind == 1:
            value[rng.choice(["", "X", key.upper(), key[:-1], f"{key}s", "\0"])] = value.pop(key, None)
        elif kind == 2 and value.get(key) and isinstance(value[key], dict):
            value[key] = altered(value[key], rng)
        elif kind == 2 and value.get(key) and isinstance(value[key], list):
            inner = rng.choice(value[key])
            value[key] = [*value[key], altered(inner, rng) if isinstance(inner, dict) else rng.choice(_VALUES)]
        else:
            value[key] = rng.choice(_VALUES)
    return value


def check_each(kind: str, attempt: Callable[[random.Random], None], longest: int = 1000) -> None:
    """Run `attempt` with the generator of each seed. It may raise a ValueError of one line, and nothing else.

    longest: the characters of that line.

    Raises:
        AssertionError: it names the seeds that failed, and what the first raised.
    """
    failed: dict[int, BaseException] = {}
    for seed in [*range(COUNT), *(seed for seed in KNOWN.get(kind, ()) if seed >= COUNT)]:
        try:
            attempt(random.Random(f"{kind} {seed}"))
        except ValueError as error:
            text = str(error)
            if type(error) is not ValueError or len(text) > longest or len(text.splitlines()) != 1:
                failed[seed] = error
        except Exception as error:
            failed[seed] = error
    if failed:
        first = next(iter(failed.values()))
        listed = f"{len(failed)} seeds failed: {list(failed)[:20]}"
        raise AssertionError(f"{kind}: {listed}; the first: {repr(first)[:500]}") from first
