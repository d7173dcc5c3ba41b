"""Launches under Triton's interpreter (``TRITON_INTERPRET=1``) that leave ``triton.language`` as it was.

The interpreter puts its own functions into ``triton.language`` while a kernel runs. What it puts there for a
device function that the kernel calls it never takes out again (Triton 3.6 to 3.9), and a kernel that is
compiled later in the same process fails on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import triton.language as tl

_PLACES = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.condition, tl.core.tensor_descriptor_base)


@contextmanager
def language_kept() -> Iterator[None]:
    """Put everything in ``triton.language`` back at the end."""
    before = [(place, dict(vars(place))) for place in _PLACES]
    try:
        yield
    finally:
        for place, names in before:
            for name, value in list(vars(place).items()):
                if name not in names:
                    delattr(place, name)
                elif value is not names[name]:
                    setattr(place, name, names[name])
