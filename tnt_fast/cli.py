"""The command ``tnt-fast``: train, classify, bench, info."""

import argparse
import ast
import dataclasses
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_origin

import timm
import torch

import tnt_fast
from tnt_fast import flops
from tnt_fast.dispatch import BACKENDS, OPERATIONS, kernel, why_not_fused

VARIANTS = ("tnt_fast_ti_patch16_224", "tnt_fast_s_patch16_224", "tnt_fast_s_legacy_patch16_224", "tnt_fast_b_patch16_224")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status (0 well, 1 some images unreadable, 2 bad input, 128 + n stopped by signal n)."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except BrokenPipeError:  # the reader of our output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        # these carry a message for the user; anything else is a defect and keeps its traceback
        if args.traceback:
            raise
        print(f"tnt-fast: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tnt-fast", description="Transformer in Transformer: train, classify, look.")
    parser.add_argument("--version", action="version", version=f"tnt_fast {tnt_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="train | classify | bench | info")

    train = commands.add_parser("train", help="train on a folder of images, or on handwritten digits")
    train.set_defaults(command=_train)
    train.add_argument(
        "--out", type=Path, required=True, help="directory of the run: last.pt, best.pt, history.json, training.png"
    )
    train.add_argument(
        "--resume", action="store_true", help="continue the run in --out, if there is one, exactly where it stopped"
    )
    _add_config(train)

    classify = commands.add_parser("classify", help="name what image files show")
    classify.set_defaults(command=_classify)
    classify.add_argument("paths", nargs="+", metavar="PATH", help="image files, or directories of them")
    classify.add_argument("--checkpoint", help="file of 'tnt-fast train', or of timm, the authors or mmpretrain with --model")
    classify.add_argument("--model", help="such as tnt_s_patch16_224.in1k or hf-hub:timm/tnt_s_patch16_224.in1k")
    classify.add_argument("--topk", type=int, default=5, help="classes an image (default 5)")
    classify.add_argument("--batch-size", type=int, default=64)
    classify.add_argument("--device", help="such as cpu, cuda:0")
    classify.add_argument("--backend", default="auto", help=" | ".join(BACKENDS))
    classify.add_argument("--json", action="store_true", help="print one JSON list")
    classify.add_argument("--page", type=Path, help="write a picture of the images and their predictions (.png, .svg, .pdf)")

    bench = commands.add_parser("bench", help="time TNT against ViT on this machine, in about a minute")
    bench.set_defaults(command=_bench)
    bench.add_argument("--size", default="s", help="ti | s | b (default s)")
    bench.add_argument("--device", help="such as cpu, cuda:0 (default: the GPU if there is one)")
    bench.add_argument("--dtype", help="float32 | bfloat16 | float16 (default: bfloat16 on a GPU, else float32)")
    bench.add_argument("--batch-size", type=int, help="images a call (default: 256 on a GPU, else 4)")
    bench.add_argument("--seconds", type=float, default=30.0, help="time to measure (default 30)")
    bench.add_argument("--compile", action="store_true", help="through torch.compile, which takes a minute more")
    bench.add_argument("--json", action="store_true", help="print one JSON list")

    info = commands.add_parser("info", help="versions, device, and the path that a forward takes")
    info.set_defaults(command=_info)
    info.add_argument("--model", action="append", help="a variant; again for more (default: all)")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    for command in (train, classify, bench, info):
        command.add_argument("--traceback", action="store_true", help="show Python's traceback of an error")
    return parser


# ---- train ----


def _add_config(parser: argparse.ArgumentParser) -> None:
    """An option for each field of recipe.Config; what is not given comes from the data's recipe, then from the defaults."""
    from tnt_fast.recipe import Config

    for field in dataclasses.fields(Config):
        text = field.metadata["help"]
        if field.name == "data":
            parser.add_argument("data", metavar="DATA", help=text)
            continue
        option = "--" + field.name.replace("_", "-")
        if field.name == "model_kwargs":
            parser.add_argument(option, nargs="+", metavar="KEY=VALUE", help=text)
        elif get_origin(field.type) is tuple:
            kind = get_args(field.type)
            parser.add_argument(option, nargs=len(kind), type=kind[0], help=f"{text} (default {field.default})")
        else:
            shown = "" if field.default == "" else f" (default {field.default})"
            parser.add_argument(option, type=field.type, help=text + shown)


def _key_values(items: list[str]) -> dict[str, Any]:
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"--model-kwargs {item!r} is no KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _train(args: argparse.Namespace) -> int:
    try:
        from tnt_fast import recipe, train
    except ImportError as error:
        raise ImportError(f'training needs more packages ({error}): pip install "tnt_fast[train]"') from error

    names = [f.name for f in dataclasses.fields(recipe.Config)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("scale", "ratio"):
        if name in given:
            given[name] = tuple(given[name])
    defaults = recipe.DIGITS_RECIPE if args.data == recipe.DIGITS else {}
    if "model_kwargs" in given:
        given["model_kwargs"] = {**defaults.get("model_kwargs", {}), **_key_values(given["model_kwargs"])}
    config = recipe.Config(**{**defaults, **given})
    run = train.Run(config, args.out, resume=args.resume)
    changed = [n for n in given if n not in recipe.MAY_CHANGE and getattr(run.config, n) != getattr(config, n)]
    if changed:
        was = ", ".join(f"{n}={getattr(run.config, n)!r} (now {getattr(config, n)!r})" for n in changed)
        raise ValueError(
            f"the run in {str(args.out)!r} was begun with {was}; leave that out to continue it, or take another --out"
        )
    print(f"{run.config.model}: {sum(p.numel() for p in run.model.parameters()):,} parameters, {len(run.classes)} classes")
    print(f"images: {len(run.train_set)} to train on, {len(run.val_set)} held out; device {run.device}")
    print(f"path: {_path(run.model.backend, run.why_not_fused)}")
    if run.epoch or run.step:
        print(
            f"continuing at epoch {run.epoch + 1}, step {run.step + 1}" if run.epoch < run.config.epochs else "already trained"
        )
    try:
        run.train()
    except train.Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    print(train.summary(run))
    try:
        from tnt_fast import visualize

        title = f"{run.config.model} on {run.config.data}"
        print(f"picture: {visualize.training_curve(run.history, args.out / 'training.png', title)}")
    except ImportError as error:
        print(f"no picture: {error}")
    return 0


def _path(backend: str, reasons: list[str]) -> str:
    if reasons:
        return f"reference, because {'; '.join(reasons)}"
    return "reference, as asked for" if backend == "reference" else "fused"


# ---- classify ----


def _classify(args: argparse.Namespace) -> int:
    try:
        from tnt_fast.classify import Classifier, find_images
    except ImportError as error:
        raise ImportError(f'classifying needs more packages ({error}): pip install "tnt_fast[train]"') from error

    files = find_images(args.paths)
    if args.topk < 1 or args.batch_size < 1:
        raise ValueError(f"--topk {args.topk} and --batch-size {args.batch_size} must be at least 1")
    if args.page and args.page.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--page {str(args.page)!r} must end in .png, .svg or .pdf")
    classifier = Classifier(args.checkpoint, args.model, args.device, args.backend)
    print(f"path: {_path(args.backend, classifier.why_not_fused)}", file=sys.stderr)
    rows = []
    for row in classifier(files, args.topk, args.batch_size):
        rows.append(row)
        if args.json:
            continue
        if "error" in row:
            print(f"{row['file']}  {row['error']}", file=sys.stderr)
        else:
            print(row["file"], *(f"{p['probability']:6.2%} {p['class']}" for p in row["predictions"]), sep="  ")
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    judged = [row for row in rows if "truth" in row]
    if judged:
        right = sum(row["truth"] == row["predictions"][0]["class"] for row in judged)
        print(f"{right} of {len(judged)} as their folders say ({right / len(judged):.2%})", file=sys.stderr)
    if args.page:
        from tnt_fast import visualize

        print(f"picture: {visualize.prediction_page(rows, args.page)}", file=sys.stderr)
    return 1 if any("error" in row for row in rows) else 0


# ---- bench ----


def _bench(args: argparse.Namespace) -> int:
    try:
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the benchmark needs more packages ({error}): pip install "tnt_fast[bench]"') from error
    from tnt_fast import bench

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"--device {device!r}: torch sees no GPU; take --device cpu")
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    batch = (256 if on_gpu else 4) if args.batch_size is None else args.batch_size
    for name, value, accepted in (("--size", args.size, bench.PAIRS), ("--dtype", dtype, bench.DTYPES)):
        if value not in accepted:
            raise ValueError(f"{name} {value!r} is unknown; accepted: {', '.join(accepted)}")
    if batch < 1 or not 0 < args.seconds < 1e6:
        raise ValueError(f"--batch-size {batch} must be at least 1, and --seconds {args.seconds} above 0 and below 1e6")
    rows = bench.bench(args.size, device, dtype, batch, args.seconds, args.compile)
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return 0
    where = torch.cuda.get_device_name(device) if on_gpu else f"the CPU, {torch.get_num_threads()} threads"
    how = "compiled" if args.compile else "eager"
    print(f"inference, {dtype}, batch {batch}, {how}, on {where}; torch {torch.__version__}, timm {timm.__version__}")
    print(bench.table(rows))
    print(f"medians of {rows[0]['rounds']} rounds in turns; random weights")
    for reason in rows[0]["why_not_fused"]:
        print(f"not fused: {reason}")
    return 0


# ---- info ----


def installed_version(package: str) -> str | None:
    """None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return found


def describe(models: list[str]) -> dict[str, Any]:
    """What ``tnt-fast info`` prints."""
    variants = {}
    for name in models:
        if name not in timm.list_models("tnt_fast_*"):
            raise ValueError(f"model {name!r} is unknown; accepted: {', '.join(timm.list_models('tnt_fast_*'))}")
        model = timm.create_model(name, device="meta").eval()
        reasons = why_not_fused(model)
        variants[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "gmacs": flops.multiply_adds(model) / 1e9,
            "path": "reference" if reasons else "fused",
            "why_not_fused": reasons,
            "why_not_fused_gradients": [] if reasons else why_not_fused(model, gradients=True),
        }
    packages = ("torch", "triton", "timm", "torchvision", "xformers", "safetensors", "numpy")
    return {
        "versions": {
            "tnt_fast": tnt_fast.__version__,
            "python": platform.python_version(),
            **{p: installed_version(p) for p in packages},
        },
        "devices": _devices(),
        "kernels": {name: "fused" if kernel(name) else "none in this version" for name in OPERATIONS},
        "models": variants,
    }


def _info(args: argparse.Namespace) -> int:
    report = describe(args.model or list(VARIANTS))
    if args.json:
        json.dump(report, sys.stdout, indent=1)
        print()
        return 0
    for package, version in report["versions"].items():
        print(f"{package:12s} {version or 'not installed'}")
    print(*report["devices"], sep="\n")
    print("kernels: " + ", ".join(f"{name}: {state}" for name, state in report["kernels"].items()))
    for name, model in report["models"].items():
        print(f"\n{name}: {model['parameters'] / 1e6:.2f} M parameters, {model['gmacs']:.3f} GMACs; path: {model['path']}")
        for reason in model["why_not_fused"]:
            print(f"  - {reason}")
        for reason in model["why_not_fused_gradients"]:
            print(f"  - gradients by PyTorch: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
