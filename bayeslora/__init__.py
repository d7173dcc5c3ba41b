"""bayeslora: fine-tune language models with LoRA and get a posterior instead of a point.

The public names are loaded on first use, so ``import bayeslora`` costs little and pulls in neither
peft nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "IVON",
    "CapturedTrainer",
    "CapturedTrainerMixin",
    "DiagnosticsCallback",
    "LightningCallback",
    "Posterior",
    "PosteriorCallback",
    "capture_step",
    "configure_monteclora",
    "diagnostics",
    "keep_gradients_local",
    "mbr",
    "metrics",
    "monteclora_loss",
    "patch",
    "samplers",
    "uncertainty",
    "unpatch",
]

_HOME = {
    "IVON": "ivon",
    "CapturedTrainer": "trainer_capture",
    "CapturedTrainerMixin": "trainer_capture",
    "DiagnosticsCallback": "trainer_callback",
    "LightningCallback": "lightning_callback",
    "Posterior": "posterior",
    "PosteriorCallback": "trainer_callback",
    "capture_step": "capture",
    "configure_monteclora": "monteclora",
    "keep_gradients_local": "ivon_distributed",
    "monteclora_loss": "monteclora",
    "patch": "patching",
    "unpatch": "patching",
}

if TYPE_CHECKING:
    from . import diagnostics, mbr, metrics, samplers, uncertainty
    from .capture import capture_step
    from .ivon import IVON
    from .ivon_distributed import keep_gradients_local
    from .lightning_callback import LightningCallback
    from .monteclora import configure_monteclora, monteclora_loss
    from .patching import patch, unpatch
    from .posterior import Posterior
    from .trainer_callback import DiagnosticsCallback, PosteriorCallback
    from .trainer_capture import CapturedTrainer, CapturedTrainerMixin


def __getattr__(name: str) -> Any:
    if name in ("diagnostics", "mbr", "metrics", "samplers", "uncertainty"):
        return import_module(f".{name}", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
