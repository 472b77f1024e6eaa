"""tnt_fast: Transformer in Transformer (TNT), a drop-in for timm's.

Importing this package registers ``tnt_fast_{ti,s,s_legacy,b}_patch16_224`` with ``timm.create_model``.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent
if not (_root / "kernels").is_dir() and (_root.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_root.parent))  # a bare checkout: kernels/ lies beside tnt_fast/, installed it lies inside


def _is_command() -> bool:
    """Whether Python was started for ``tnt-fast`` itself, and nothing else will look for the names in timm's registry."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # as it says until the module is found
        return sys.orig_argv[1:3] in (["-m", "tnt_fast"], ["-m", "tnt_fast.cli"])
    return Path(started).name in ("tnt-fast", "tnt-fast.exe")


if TYPE_CHECKING or not _is_command():
    import tnt_fast.kernels  # type: ignore[import-not-found]  # noqa: F401  first: a broken Triton breaks timm else
    from tnt_fast.checkpoints import CheckpointError, from_timm, load_checkpoint, save_checkpoint
    from tnt_fast.dispatch import why_not_fused
    from tnt_fast.export import export_model
    from tnt_fast.optimize import optimize_for_inference
    from tnt_fast.tnt import TNT
    from tnt_fast.variants import (
        load_tnt,
        tnt_fast_b_patch16_224,
        tnt_fast_s_legacy_patch16_224,
        tnt_fast_s_patch16_224,
        tnt_fast_ti_patch16_224,
    )
    from tnt_fast.vit import from_vit
else:

    def __getattr__(name: str) -> Any:
        """The public names, when one is asked for: the command answers --help without waiting seconds for torch."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import tnt_fast.kernels  # noqa: F401
        from tnt_fast import checkpoints, dispatch, export, optimize, tnt, variants, vit

        modules = (checkpoints, dispatch, export, optimize, tnt, variants, vit)
        return next(getattr(module, name) for module in modules if hasattr(module, name))


__all__ = [
    "TNT",
    "CheckpointError",
    "export_model",
    "from_timm",
    "from_vit",
    "load_checkpoint",
    "load_tnt",
    "optimize_for_inference",
    "save_checkpoint",
    "tnt_fast_b_patch16_224",
    "tnt_fast_s_legacy_patch16_224",
    "tnt_fast_s_patch16_224",
    "tnt_fast_ti_patch16_224",
    "why_not_fused",
]
