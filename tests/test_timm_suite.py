"""timm's own model tests, from the source of the installed timm, on our four names (see --timm-source)."""

from pathlib import Path

import pytest
import timm
from helpers import run_once

OFFLINE = (
    "test_model_forward", "test_model_backward", "test_model_default_cfgs_non_std", "test_model_forward_torchscript",
    "test_model_forward_intermediates_features", "test_model_forward_intermediates", "test_model_forward_fx",
    "test_model_backward_fx", "test_model_forward_fx_torchscript",
)  # fmt: skip


def _timm_tests(request) -> Path:
    given = request.config.getoption("--timm-source")
    for root in [given, Path(timm.__file__).parents[1]] if given else [Path(timm.__file__).parents[1]]:
        file = root / "tests" / "test_models.py"
        version = root / "timm" / "version.py"
        if file.is_file() and timm.__version__ in version.read_text("utf-8"):
            return file.resolve()
    pytest.skip(f"no source of timm {timm.__version__} with its tests; name it with --timm-source")


VARIANTS = ("ti", "s", "s_legacy", "b")
TRACED = ("ti", "s_legacy")  # by FX, which does not see sizes: of each code one, the other variants' are ti's
SCRIPT = """
import sys
from pathlib import Path

import pytest

source, *names = sys.argv[1:]
Path("conftest.py").write_text("import tnt_fast\\n")
# some of its lists name the modules that register the models; ours is tnt_fast.variants
Path("test_models.py").write_text(Path(source).read_text("utf-8").replace("'tnt',", "'tnt', 'variants',"), "utf-8")
markers = ["base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout"]
Path("pytest.ini").write_text("[pytest]\\nmarkers =\\n" + "".join(f"    {marker}\\n" for marker in markers))
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-rA", "--rootdir", "."]
every, traced = (" or ".join(f"{name}{end}" for name in models for end in "-].") for models in (MODELS, TRACED))
sys.exit(pytest.main([*options, *names, "-k", f"({every}) and (not fx or {traced})"]))
"""


@pytest.fixture(scope="session")
def ran(request, tmp_path_factory):
    """How its tests ended of all variants together: to collect them takes as long as to run some of them."""
    script = SCRIPT
    for kind, variants in (("MODELS", VARIANTS), ("TRACED", TRACED)):
        script = script.replace(kind, repr([f"tnt_fast_{variant}_patch16_224" for variant in variants]))
    names = [f"test_models.py::{test}" for test in OFFLINE]
    return run_once(tmp_path_factory, "timm", script, str(_timm_tests(request)), *names)[1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_timms_own_tests_pass_on_our_names(variant, ran):
    name = f"tnt_fast_{variant}_patch16_224"
    lines = [line for line in ran["out"].splitlines() if name in line]
    for test in OFFLINE if variant in TRACED else [name for name in OFFLINE if "fx" not in name]:
        assert any(line.startswith("PASSED") and f"::{test}[" in line for line in lines), f"{test}:\n{ran['out'][-3000:]}"
    assert not any(line.startswith(("FAILED", "ERROR")) for line in lines), ran["out"][-3000:]
    assert ran["status"] == 0, ran["out"][-3000:] + ran["err"][-1000:]
