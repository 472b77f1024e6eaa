"""tnt_fast: Transformer in Transformer (TNT), a drop-in for timm's.

Importing this package registers ``tnt_fast_{ti,s,s_legacy,b}_patch16_224`` with ``timm.create_model``.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent
if not (_root / "kernels").is_dir() and (_root.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_root.parent))  # a bare checkout: kernels/ lies beside tnt_fast/, installed it lies inside

from tnt_fast.checkpoints import CheckpointError, from_timm, load_checkpoint, save_checkpoint  # noqa: E402
from tnt_fast.dispatch import why_not_fused  # noqa: E402
from tnt_fast.tnt import TNT  # noqa: E402
from tnt_fast.variants import (  # noqa: E402
    tnt_fast_b_patch16_224,
    tnt_fast_s_legacy_patch16_224,
    tnt_fast_s_patch16_224,
    tnt_fast_ti_patch16_224,
)

__all__ = [
    "TNT",
    "CheckpointError",
    "from_timm",
    "load_checkpoint",
    "save_checkpoint",
    "tnt_fast_b_patch16_224",
    "tnt_fast_s_legacy_patch16_224",
    "tnt_fast_s_patch16_224",
    "tnt_fast_ti_patch16_224",
    "why_not_fused",
]
