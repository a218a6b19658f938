"""bitlathe: a language model in, a quantized checkpoint out, reloaded and measured.

Importing the package imports neither torch nor transformers: each name is fetched when it is first used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitlathe.registry import load as _load
from bitlathe.version import VERSION as __version__

if TYPE_CHECKING:
    from bitlathe.converting import convert
    from bitlathe.evaluation.perplexity import evaluate
    from bitlathe.model.load import load
    from bitlathe.numerics.rotation import Rotation
    from bitlathe.numerics.scheme import Scheme
    from bitlathe.pipeline import quantize
    from bitlathe.plan import Plan
    from bitlathe.recipe import Recipe
    from bitlathe.report import inspect
    from bitlathe.searching import search
    from bitlathe.verifying import verify

__all__ = [
    "Plan",
    "Recipe",
    "Rotation",
    "Scheme",
    "__version__",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "search",
    "verify",
]

_PUBLIC: dict[str, str] = {
    "quantize": "bitlathe.pipeline:quantize",
    "search": "bitlathe.searching:search",
    "convert": "bitlathe.converting:convert",
    "verify": "bitlathe.verifying:verify",
    "load": "bitlathe.model.load:load",
    "evaluate": "bitlathe.evaluation.perplexity:evaluate",
    "inspect": "bitlathe.report:inspect",
    "Recipe": "bitlathe.recipe:Recipe",
    "Plan": "bitlathe.plan:Plan",
    "Scheme": "bitlathe.numerics.scheme:Scheme",
    "Rotation": "bitlathe.numerics.rotation:Rotation",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitlathe' has no attribute {name!r}")
    return _load(_PUBLIC[name])


def __dir__() -> list[str]:
    return sorted(__all__)
