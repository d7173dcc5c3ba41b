"""Registration of functions as ``bayeslora`` operators, which ``torch.compile`` keeps whole."""

from collections.abc import Callable
from typing import Any

import torch


def operator(
    name: str, schema: str | None = None, tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes a function the operator ``bayeslora::name``, on every device.

    What `torch.library.custom_op` does but for its checks at every call that outputs share no memory, which
    cost host time (``bench/NOTES.md``): `torch.library.opcheck` makes them in the tests.

    Args:
        name: of the operator.
        schema: ``"(arguments) -> returns"``; None to read it off the annotations, which every supported
            torch does for tensors and numbers, not all for lists of them. Nothing may be mutated.
        tags: further ones for ``torch.compile``.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"bayeslora::{name}"
        signature = schema or torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, signature, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(qualified, "default", torch.compiler.disable(function))
        return getattr(torch.ops.bayeslora, name).default

    return register
