"""timm's own model tests, from the source of the installed timm, on our four names (see --timm-source)."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ti", "s", "s_legacy", "b"])
def test_timms_own_tests_pass_on_our_names(variant, request, tmp_path):
    file = _timm_tests(request)
    (tmp_path / "conftest.py").write_text("import tnt_fast\n")
    # some of its lists name the modules that register the models; ours is tnt_fast.variants
    (tmp_path / "test_models.py").write_text(file.read_text("utf-8").replace("'tnt',", "'tnt', 'variants',"), "utf-8")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n"
        + "".join(f"    {m}\n" for m in ["base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout"])
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-rA",
        "--rootdir",
        str(tmp_path),
    ]
    name = f"tnt_fast_{variant}_patch16_224"
    names = [f"test_models.py::{test}" for test in OFFLINE]
    done = subprocess.run(
        [*command, *names, "-k", f"{name}- or {name}] or {name}."], cwd=tmp_path, capture_output=True, text=True, timeout=1200,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for test in OFFLINE:
        assert any(f"::{test}[" in line and name in line for line in passed), f"{test} did not run:\n{done.stdout[-3000:]}"
