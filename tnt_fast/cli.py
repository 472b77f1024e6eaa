"""The command ``tnt-fast``. Each of its commands is a function with the options and one that runs it.

What needs torch is imported where it runs: --help, --version and completion do not wait for it. All output goes through
``terminal``.
"""

import argparse
import ast
import dataclasses
import os
import platform
import re
import sys
import traceback
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, cast, get_args, get_origin

import tnt_fast
from tnt_fast import recipe
from tnt_fast.terminal import complain, guarded, nearest, one_line, say, say_json

# errors that carry a message for the user; anything else is a defect
FOR_USER = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError, MemoryError)
VARIANTS = ("tnt_fast_ti_patch16_224", "tnt_fast_s_patch16_224", "tnt_fast_s_legacy_patch16_224", "tnt_fast_b_patch16_224")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status.

    0 well, 1 some images unreadable, 2 bad input, 3 a defect of ours (with Python's traceback), 128 + n stopped by signal n.
    """
    with guarded():
        args = _parsed(argv)
        try:
            if args.command not in (_check, _completion):
                from tnt_fast import kernels  # noqa: F401  first, as wherever the package is imported: see there
            status = args.command(args)
            sys.stdout.flush()  # a full disk or a reader that has left shows here at the latest
            return status
        except BrokenPipeError:  # the reader of our output has left, as head does
            return 141
        except KeyboardInterrupt:
            say("interrupted", error=True)
            return 130
        except Exception as error:
            lines, status = _told(args, error)
            for line in lines:
                say(line, error=True)
            return status
        finally:
            try:
                sys.stdout.flush()
            except OSError:  # Python would try again at its end, and print a traceback
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told(args: argparse.Namespace, error: BaseException, who: str = "") -> tuple[list[str], int]:
    """What is said of an error, that of a rank (``who``) of several, and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted"], 130
    for_user = isinstance(error, FOR_USER)
    if args.traceback or not for_user:
        lines = "".join(traceback.format_exception(error)).rstrip().split("\n")
    else:
        lines = [one_line(f"tnt-fast: {who}{type(error).__name__}: {_explained(error, getattr(args, 'less_memory', ''))}")]
    return lines, 2 if for_user else 3


def _explained(error: BaseException, less_memory: str) -> str:
    """An error's text; where memory did not suffice, its first line and what takes less."""
    text = str(error)
    # PyTorch has a class of its own for a GPU's memory, and none for the CPU's
    if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory|_ALLOC_FAILED", text):
        return text
    first = (text or "out of memory").splitlines()[0]
    return f"{first:.300}; {less_memory}" if less_memory and less_memory not in text else text


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line: the usage of ``train`` would fill a screen."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: {message}; see {self.prog} --help")
        self.exit(2)


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and those of its commands."""
    parser = _Parser(
        prog="tnt-fast",
        description="Transformer in Transformer: train, classify, look.",
        epilog=_examples("train digits --out runs/digits", "classify photos/ --checkpoint runs/digits/best.pt", "info"),
    )
    parser.add_argument("--version", action="version", version=f"tnt_fast {tnt_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (
        _add_train,
        _add_plan,
        _add_check,
        _add_classify,
        _add_validate,
        _add_export,
        _add_visualize,
        _add_ablate,
        _add_bench,
        _add_info,
        _add_completion,
    ):
        add(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.add_argument("--traceback", action="store_true", help="show Python's traceback of an error")
    return parser, commands.choices


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    args, unknown = _parser()[0].parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        args.parser.error(f"unknown argument {unknown[0]!r}{nearest(name, _options(args.parser))}")
    return args


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" if "tnt-fast" in line else f"  tnt-fast {line}" for line in lines)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return ["--help", *re.findall(r"--[a-z][a-z-]*", parser.format_usage())]


# ---- train ----


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train on a folder of images, or on handwritten digits",
        description="Train a TNT. Options go over --config, that over --preset, that over the defaults.",
        epilog=_examples(
            "train images/ --out runs/mine                # images/train/CLASS/*.jpg, images/val/CLASS/*.jpg",
            "train images/ --out runs/mine --resume       # after Ctrl-C or a crash: exactly on",
            "train digits --out runs/digits               # scikit-learn's handwritten digits, by --preset small",
            "train imagenet/ --preset paper --out runs/tnt-s",
        )
        + "\n\npresets:\n"
        + "\n".join(f"  {name:13s} {text}" for name, text in recipe.presets().items()),
    )
    less = "to need less memory, lower --batch-size, or take --grad-checkpointing or --amp bfloat16"
    train.set_defaults(command=_train, less_memory=less)
    run = train.add_argument_group("run")
    run.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory of the run: last.pt, best.pt, recipe.yaml, history.csv, training.png",
    )
    run.add_argument(
        "--resume", action="store_true", help="continue the run in --out, if there is one, exactly where it stopped"
    )
    run.add_argument("--preset", metavar="NAME", help=f"a recipe: {', '.join(recipe.presets())} (below)")
    run.add_argument("--config", type=Path, metavar="FILE", help="settings, as the recipe.yaml of a run has them")
    _add_settings(train, nargs="?")


def _add_settings(command: argparse.ArgumentParser, **of_data: Any) -> None:
    """The options of a run; ``of_data``: of its positional argument."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(recipe.Config):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = command.add_argument_group(group)
        add, option, kind = groups[group].add_argument, "--" + field.name.replace("_", "-"), cast(type, field.type)
        text = field.metadata["help"].replace("%", "%%")
        if field.name == "data":
            add("data", metavar="DATA", **{"help": text, **of_data})
        elif field.name == "model_kwargs":
            add(option, nargs="+", metavar="KEY=VALUE", help=text)
        elif kind is bool:
            add(option, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif get_origin(kind) is tuple:
            default = " ".join(f"{x:g}" for x in cast(tuple, field.default))
            add(option, nargs=len(get_args(kind)), type=float, metavar="X", help=f"{text} (default {default})")
        else:
            default = "" if field.default == "" else f" (default {field.default})"
            add(option, type=kind, metavar={int: "N", float: "X"}.get(kind), help=text + default)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were asked for."""
    names = [f.name for f in dataclasses.fields(recipe.Config)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("scale", "ratio"):
        if name in given:
            given[name] = tuple(given[name])
    if "model_kwargs" in given:
        given["model_kwargs"] = _key_values(given["model_kwargs"])
    return given


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
        from tnt_fast import distributed, train  # noqa: F401  which _train_on takes
    except ImportError as error:
        raise ImportError(f'training needs more packages ({error}): pip install "tnt_fast[train]"') from error

    with distributed.joined(partial(_told, args)) as ranks:
        return _train_on(ranks, args)


def _train_on(ranks: Any, args: argparse.Namespace) -> int:
    from tnt_fast import distributed, train

    config, asked = recipe.resolved(_given(args), args.preset, args.config)
    run = train.Run(config, args.out, resume=args.resume or distributed.is_restarted(), given=asked, ranks=ranks)
    say(f"{run.config.model}: {sum(p.numel() for p in run.model.parameters()):,} parameters, {len(run.classes)} classes")
    say(f"images: {len(run.train_set)} to train on, {len(run.val_set)} held out; device {run.device}")
    say(f"weights: {run.built.said}")
    say(f"path: {_path(run.model.backend, run.why_not_fused, run.device)}")
    for line in run.config.remarks(len(run.train_set)):
        say(line)
    if run.epoch or run.step:
        say("already trained" if run.done() else f"continuing at epoch {run.epoch + 1}, step {run.step + 1}")
    try:
        run.train()
    except train.Interrupted as stop:
        complain(stop)
        return stop.exit_code
    for line in train.summary(run).split("\n"):
        say(line)
    return 0


def _path(backend: str, reasons: list[str], device: Any) -> str:
    if reasons and device.type == "cpu":
        return "reference, because the kernels need a GPU"
    if reasons:
        return f"reference, because {'; '.join(reasons)}"
    return "reference, as asked for" if backend == "reference" else "fused"


# ---- plan ----


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, hours and cost of a run on GPUs that are not here",
        description="Count the memory of a run on GPUs that need not be here, find the largest batch, and tell hours and cost.",
        epilog=_examples(
            "plan --preset paper --gpu h100 --count 8 --amp bfloat16 --compile --price 2.5",
            "plan photos/ --model tnt_b_patch16_224 --gpu rtx4090 --amp bfloat16",
            "plan --preset paper --memory 64 --tflops 383 --bandwidth 3200 --count 8   # any other GPU",
        ),
    )
    plan.set_defaults(command=_plan)
    machine = plan.add_argument_group("GPUs")
    machine.add_argument("--gpu", metavar="NAME", help="such as h100, a100, v100, rtx4090; an unknown name lists them")
    machine.add_argument("--count", type=int, default=1, metavar="N", help="how many (default 1)")
    machine.add_argument("--memory", type=float, metavar="GB", help="of a GPU that has no name here, or other than its own")
    machine.add_argument("--tflops", type=float, metavar="T", help="of its products, in the dtype of the run")
    machine.add_argument("--bandwidth", type=float, metavar="GB/s", help="of its memory")
    machine.add_argument("--link", type=float, metavar="GB/s", help="that an all-reduce between the GPUs reaches")
    machine.add_argument("--price", type=float, metavar="P", help="of an hour of one GPU, in any currency")
    machine.add_argument("--images", type=int, metavar="N", help="to train on (default: DATA's, else ImageNet's 1281167)")
    machine.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--preset", metavar="NAME", help=f"a recipe: {', '.join(recipe.presets())}")
    plan.add_argument("--config", type=Path, metavar="FILE", help="settings, as 'tnt-fast train' takes them")
    _add_settings(plan, nargs="?", help="a data set, whose images and classes are counted (default: ImageNet's numbers)")


def _plan(args: argparse.Namespace) -> int:
    from tnt_fast import plan

    on = plan.gpu(args.gpu, memory=args.memory, tflops=args.tflops, bandwidth=args.bandwidth, link=args.link)
    given = _given(args)
    named = recipe.read_settings(args.config) if args.config else {}
    config, _ = recipe.resolved({"data": named.get("data", ""), **given}, args.preset, args.config)
    images, classes = plan.counted(config)
    found = plan.plan(config, on, args.count, args.images or images, classes, args.price)
    if args.json:
        say_json(found)
        return 0
    for line in plan.table(found):
        say(line)
    return 0


# ---- check ----


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="list the files of a data set that cannot be trained on",
        description="Read all images of a data set, and list the files that cannot be trained on; status 1 if there are any.",
        epilog=_examples("check images/", "check labels.csv --json"),
    )
    check.set_defaults(command=_check)
    check.add_argument("data", metavar="DATA", help="a directory, a CSV file or shards, as 'tnt-fast train' takes them")
    check.add_argument("--json", action="store_true", help="print one JSON object")


def _check(args: argparse.Namespace) -> int:
    try:
        from tnt_fast.check import examine, find
    except ImportError as error:
        raise ImportError(f'checking needs more packages ({error}): pip install "tnt_fast[train]"') from error

    files = find(args.data)
    examine(files)
    counts = files.counts()
    if args.json:
        bad = [{"file": name, "reason": reason} for name, reason in files.bad.items()]
        say_json({"data": args.data, "images": len(files.pictures), "classes": counts, "bad": bad})
        return 1 if bad else 0
    for name, reason in files.bad.items():
        say(f"{name}: {reason}")
    sizes = [sum(count.values()) for count in counts.values()]
    say(f"{len(files.pictures):,} images in {len(sizes):,} classes of {min(sizes):,} to {max(sizes):,}")
    count = f"{len(files.bad):,} bad file{'' if len(files.bad) == 1 else 's'}"
    say(f"{count}; repair or remove, or train with --skip-bad" if files.bad else count)
    return 1 if files.bad else 0


# ---- classify ----


def _add_classify(commands: Any) -> None:
    classify = commands.add_parser(
        "classify",
        help="name what image files show",
        description="Name what image files show, most probable first.",
        epilog=_examples(
            "classify photos/ --checkpoint runs/mine/best.pt --topk 3 --json",
            "classify photo.jpg --model tnt_s_patch16_224.in1k    # weights that timm hosts",
            "classify 'photos/**/*.jpg' --checkpoint runs/mine/best.pt --out names.csv",
            "find photos -newer yesterday | tnt-fast classify - --checkpoint runs/mine/best.pt",
        ),
    )
    classify.set_defaults(command=_classify, less_memory="to need less memory, lower --batch-size")
    classify.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, directories, patterns, or - for a list on standard input"
    )
    _add_model(classify)
    output = classify.add_argument_group("output")
    output.add_argument("--topk", type=int, default=5, help="classes an image (default 5)")
    output.add_argument(
        "--threshold", type=float, default=0.0, metavar="P", help="leave out classes of a lower probability, 0 to 1 (default 0)"
    )
    output.add_argument("--out", type=Path, metavar="FILE", help="write FILE.csv or FILE.json, in place of printed lines")
    output.add_argument("--json", action="store_true", help="print one JSON list")
    output.add_argument("--page", type=Path, help="write a picture of the images and their predictions (.png, .svg, .pdf)")
    _add_machine(classify)


def _add_model(command: argparse.ArgumentParser) -> None:
    """The options that choose a model with its weights."""
    model = command.add_argument_group("model")
    model.add_argument("--checkpoint", help="file of 'tnt-fast train', or of timm, the authors or mmpretrain with --model")
    model.add_argument("--model", help="such as tnt_s_patch16_224.in1k or hf-hub:timm/tnt_s_patch16_224.in1k")
    model.add_argument("--model-kwargs", nargs="+", metavar="KEY=VALUE", help="arguments of --model, such as img_size=384")
    model.add_argument("--class-names", metavar="FILE", help="a text file with the names of the classes, one a line")


def _add_machine(command: argparse.ArgumentParser) -> Any:
    machine = command.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=64, help="images a step (default 64)")
    machine.add_argument("--device", help="such as cpu, cuda:0")
    machine.add_argument("--backend", default="auto", help="auto | fused | reference (default auto)")
    return machine


def _classify(args: argparse.Namespace) -> int:
    from tnt_fast.images import named_images

    if args.topk < 1 or args.batch_size < 1:
        raise ValueError(f"--topk {args.topk} and --batch-size {args.batch_size} must be at least 1")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} must be a probability, from 0 to 1")
    files, others = named_images(args.paths)
    for option, path, kinds in (("--page", args.page, (".png", ".svg", ".pdf")), ("--out", args.out, (".csv", ".json"))):
        if path and path.suffix not in kinds:
            raise ValueError(f"{option} {str(path)!r} must end in {', '.join(kinds[:-1])} or {kinds[-1]}")
        if path and not path.parent.is_dir():
            raise FileNotFoundError(f"{option} {str(path)!r}: there is no directory {str(path.parent)!r}; make it first")
    try:
        from tqdm import tqdm

        from tnt_fast import classify
    except ImportError as error:
        raise ImportError(f'classifying needs more packages ({error}): pip install "tnt_fast[train]"') from error

    names = None if args.class_names is None else classify.read_class_names(args.class_names)
    kwargs = _key_values(args.model_kwargs or [])
    classifier = classify.Classifier(args.checkpoint, args.model, args.device, args.backend, names, kwargs)
    say(f"weights: {classifier.weights}", error=True)
    repacked = "; weights repacked for the CPU" if classifier.repacked else ""
    say(f"path: {_path(args.backend, classifier.why_not_fused, classifier.device)}{repacked}", error=True)
    rows = []
    lines = not (args.json or args.out)
    results = classifier(files, args.topk, args.batch_size, args.threshold)
    hidden = True if lines and sys.stdout.isatty() else None  # the lines show how far it is; None: no bar but on a terminal
    for row in tqdm(results, total=len(files), unit="image", leave=False, disable=hidden):
        rows.append(row)
        if "error" in row:
            say(f"{row['file']}  {row['error']}", error=True)
        elif lines:
            shown = [f"{p['probability']:6.2%} {p['class']}" for p in row["predictions"]]
            say("  ".join([row["file"], *(shown or [f"no class reaches {args.threshold:.2%}"])]))
    if args.json:
        say_json(rows)
    if args.out:
        say(f"results: {classify.write(rows, args.out)}", error=True)
    for line in classify.summary(rows, others):
        say(line, error=True)
    if args.page:
        from tnt_fast import visualize

        say(f"picture: {visualize.prediction_page(rows, args.page)}", error=True)
    return 1 if any("error" in row for row in rows) else 0


# ---- validate ----


def _add_validate(commands: Any) -> None:
    validate = commands.add_parser(
        "validate",
        help="accuracy and calibration on labelled images",
        description="Top-1 and top-5 as timm's validate.py counts them, by class, and how well probabilities are calibrated.",
        epilog=_examples(
            "validate data/ --checkpoint runs/mine/best.pt --out report    # data/val/CLASS/*.jpg, or data/CLASS/*.jpg",
            "validate imagenet/ --model tnt_s_patch16_224.in1k             # imagenet/val/n01440764/*.JPEG",
            "validate ILSVRC/Data/CLS-LOC/val --ground-truth LOC_val_solution.csv --model tnt_b_patch16_224.in1k",
        ),
    )
    validate.set_defaults(command=_validate, less_memory="to need less memory, lower --batch-size")
    accepted = "[val/]CLASS/*.jpg, a CSV file, wds:PATH, hfds:PATH, or images and --ground-truth"
    validate.add_argument("data", metavar="DATA", help=accepted)
    validate.add_argument(
        "--ground-truth", metavar="FILE", help="NAME LABEL a line, as ImageNet's; or a label a line, in the order of names"
    )
    _add_model(validate)
    output = validate.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FOLDER", help="write tables of classes and predictions, and pictures")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--reference", action="store_true", help="compare the fused path with the reference, image by image")
    _add_machine(validate).add_argument("--amp", default="off", help=f"{' | '.join(recipe.AMP)} (default off)")


def _validate(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    if args.amp not in recipe.AMP:
        raise ValueError(f"--amp {args.amp!r} is unknown{nearest(args.amp, recipe.AMP)}; accepted: {', '.join(recipe.AMP)}")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"--out {str(args.out)!r} is a file; expected a folder, which is made where there is none")
    try:
        from tnt_fast import classify, validate
    except ImportError as error:
        raise ImportError(f'validating needs more packages ({error}): pip install "tnt_fast[train]"') from error

    found = validate.labelled(args.data, args.ground_truth)
    names = None if args.class_names is None else classify.read_class_names(args.class_names)
    kwargs = _key_values(args.model_kwargs or [])
    classifier = classify.Classifier(args.checkpoint, args.model, args.device, args.backend, names, kwargs)
    truth, kind = validate.indices(found, classifier)
    say(f"weights: {classifier.weights}", error=True)
    say(f"path: {_path(args.backend, classifier.why_not_fused, classifier.device)}", error=True)
    config = classifier.data_config
    how = f"{config['interpolation']}, crop {config['crop_pct']:g}, {config.get('crop_mode') or 'center'}"
    say(f"images: {len(truth):,}; labels: {kind}; {'×'.join(map(str, config['input_size'][1:]))}, {how}", error=True)
    run = {"batch_size": args.batch_size, "amp": args.amp, "reference": args.reference}
    result = validate.validate(classifier, found, truth, **run)
    for name, reason in result.errors.items():
        say(f"{name}  {reason}", error=True)
    if args.json:
        differences = [dataclasses.asdict(difference) for difference in result.differences or []]
        say_json({**result.figures(), "classes": result.per_class(), "bins": result.bins(), "differences": differences})
    else:
        for line in validate.summary(result):
            say(line)
    if args.out:
        for path in validate.save(result, args.out):
            say(f"written: {path}", error=True)
    return 1 if result.errors else 0


# ---- export ----


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a model for use without tnt_fast",
        description="Write a trained model as ONNX, torch.export, AOTInductor, int8 or a Hugging Face folder, and compare it.",
        epilog=_examples(
            "export --checkpoint runs/mine/best.pt --to onnx --out mine.onnx",
            "export --checkpoint runs/mine/best.pt --to huggingface --out mine/    # timm.create_model('local-dir:mine')",
            "export --checkpoint runs/mine/best.pt --to int8 --out mine.onnx --data photos/    # accuracy before and after",
        ),
    )
    export.set_defaults(command=_export, less_memory="to need less memory, lower --batch-size")
    output = export.add_argument_group("output")
    output.add_argument(
        "--to", required=True, help="onnx | pt2 (torch.export) | aoti (AOTInductor) | huggingface | int8 (ONNX)"
    )
    output.add_argument("--out", required=True, metavar="PATH", help="the .onnx or .pt2 file, or the folder")
    output.add_argument("--overwrite", action="store_true", help="replace what an export wrote to --out before")
    output.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="accepted difference from the model's largest logit (default 1e-5; int8 0.25)",
    )
    output.add_argument("--data", help="labelled images as for 'validate', on which int8 is compared with the model, too")
    output.add_argument(
        "--most-lost", type=float, default=1.0, metavar="X", help="points of top-1 that int8 may lose (default 1)"
    )
    _add_model(export)
    machine = export.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=64, help="images of --data a step (default 64)")
    machine.add_argument("--device", default="cpu", help="of the package: cpu, cuda (default cpu)")
    machine.add_argument(
        "--backend", default="reference", help="reference | fused (pt2, aoti: loads after import tnt_fast) (default reference)"
    )


def _export(args: argparse.Namespace) -> int:
    from tnt_fast import export

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    for option, value in (("--tolerance", args.tolerance), ("--most-lost", args.most_lost)):
        if value is not None and not 0 <= value < 1e6:
            raise ValueError(f"{option} {value} must be 0 or more")
    if args.data and args.to != "int8":
        raise ValueError(f"--data is for int8, whose accuracy may differ; {args.to} computes what the model computes")
    options = {"overwrite": args.overwrite, "backend": args.backend}
    export.check(args.to, args.out, device=args.device, **options)
    try:
        import tqdm  # noqa: F401

        from tnt_fast import classify, validate
    except ImportError as error:
        raise ImportError(f'exporting needs more packages ({error}): pip install "tnt_fast[train]"') from error

    names = None if args.class_names is None else classify.read_class_names(args.class_names)
    kwargs = _key_values(args.model_kwargs or [])
    classifier = classify.Classifier(args.checkpoint, args.model, args.device, args.backend, names, kwargs)
    say(f"weights: {classifier.weights}", error=True)
    examples = validate.examples(classifier, args.data, args.batch_size) if args.data else None
    model = {name: getattr(classifier, name) for name in ("classes", "data_config", "accuracy")}
    written = export.export_model(
        classifier.model, args.to, args.out, **model, **options, tolerance=args.tolerance, examples=examples,
        most_lost=args.most_lost,
    )  # fmt: skip
    within = f"within {written.difference:.1e} of the model's largest logit in batches of 1 and 7"
    say(f"{args.out}: {written.size / 1e6:,.1f} MB, {within}")
    for line in (*written.notes, f"load: {written.load}"):
        say(line)
    return 0


# ---- visualize ----


def _add_visualize(commands: Any) -> None:
    visualize = commands.add_parser(
        "visualize",
        help="show what a model makes of pictures, on a page",
        description="Write a page that shows a TNT's attention, rollouts, features and positions, with pictures and arrays.",
        epilog=_examples(
            "visualize cat.jpg dog.jpg --checkpoint runs/mine/best.pt --out seen",
            "visualize cat.jpg --model tnt_s_patch16_224.in1k --beside-model deit_small_patch16_224 --out seen",
        ),
    )
    visualize.set_defaults(command=_visualize, less_memory="name fewer images")
    visualize.add_argument("paths", nargs="+", metavar="IMAGE", help="image files, directories, patterns, or - for a list")
    visualize.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder to write: index.html, and a folder an image"
    )
    visualize.add_argument(
        "--blocks", type=int, nargs="+", metavar="N", help="whose feature maps are shown, from 1 (default: first, middle, last)"
    )
    _add_model(visualize)
    model = visualize.add_argument_group("a second model, whose features are shown beside")
    model.add_argument("--beside-checkpoint", metavar="FILE", help="file of its weights")
    model.add_argument("--beside-model", metavar="NAME", help="a TNT, or a ViT of timm such as deit_small_patch16_224")
    machine = visualize.add_argument_group("machine")
    machine.add_argument("--device", help="such as cpu, cuda:0")
    machine.add_argument("--backend", default="auto", help="auto | fused | reference (default auto)")


def _visualize(args: argparse.Namespace) -> int:
    from tnt_fast.images import named_images

    files, _ = named_images(args.paths)
    try:
        from tqdm import tqdm

        from tnt_fast import classify, page, seeing
    except ImportError as error:
        raise ImportError(f'the page needs more packages ({error}): pip install "tnt_fast[train]"') from error

    images = page.check(files, args.out)
    names = None if args.class_names is None else classify.read_class_names(args.class_names)
    sizes = _key_values(args.model_kwargs or [])
    subject = seeing.load(args.checkpoint, args.model, args.device, args.backend, sizes, names)
    page.chosen(args.blocks, len(subject.model.blocks))
    beside = None
    if args.beside_checkpoint or args.beside_model:
        beside = seeing.load_beside(args.beside_checkpoint, args.beside_model, args.device)
    for each in (subject, *([beside] if beside else [])):
        say(f"weights: {each.said}", error=True)
    say(f"path: {_path(args.backend, subject.why_not_fused, next(subject.model.parameters()).device)}", error=True)
    written = page.write_page(
        subject, files, images, args.out, args.blocks, beside, lambda each: tqdm(each, unit="image", leave=False, disable=None)
    )
    say(f"pictures and arrays: {len(written.others)} files in {args.out}", error=True)
    say(written.page)
    return 0


# ---- ablate ----


def _add_ablate(commands: Any) -> None:
    ablate = commands.add_parser(
        "ablate",
        help="train small TNTs over a grid, as the paper's ablations",
        description="Train a small TNT, and others that differ from it in one thing each, for several seeds, and compare them.",
        epilog=_examples(
            "ablate --out runs/ablation                      # the digits, every axis, 3 seeds",
            "ablate --out runs/ablation --resume             # after Ctrl-C or a crash; finished runs are kept",
            "ablate images/ --out runs/heads --grid heads=1,2,4 inner --seeds 5 --epochs 50",
        ),
    )
    ablate.set_defaults(command=_ablate, less_memory="to need less memory, lower --batch-size or --processes")
    run = ablate.add_argument_group("ablation")
    run.add_argument("--out", type=Path, required=True, help="directory: ablation.json, .csv, .png, and a folder for each run")
    run.add_argument("--resume", action="store_true", help="continue the ablation in --out, if there is one")
    run.add_argument(
        "--grid", nargs="+", default=[], metavar="AXIS[=V,V]", help="inner, positions, heads, stride, overlap, se (default all)"
    )
    run.add_argument("--seeds", type=int, metavar="N", help="runs of each model (default 3)")
    run.add_argument("--processes", type=int, metavar="N", help="runs at a time (default: cores that are free; with a GPU 1)")
    _add_settings(ablate, nargs="?", help="as for 'tnt-fast train' (default digits)")


def _ablate(args: argparse.Namespace) -> int:
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes {args.processes} must be at least 1")
    try:
        from tnt_fast import ablate, train
        from tnt_fast.dispatch import find_device
    except ImportError as error:
        raise ImportError(f'training needs more packages ({error}): pip install "tnt_fast[train]"') from error

    base = ablate.BASES["digits" if args.data in (None, recipe.DIGITS) else "images"]
    given = _given(args)
    config = recipe.Config(**recipe.over({"data": recipe.DIGITS, **base}, given))
    options = {"grid": args.grid, "seeds": args.seeds, "resume": args.resume, "given": given}
    ablation = ablate.Ablation(config, args.out, **options)
    on_gpu = find_device(ablation.config.device).type != "cpu"
    processes = args.processes or (1 if on_gpu else ablate.free_cores())
    say(f"{len(ablation.configs)} models, {ablation.seeds} seeds, {processes} at a time; {ablation.config.epochs} epochs each")
    stopped = None
    try:
        ablation.run(processes)
    except train.Interrupted as stop:
        stopped = stop
    for line in ablation.table():
        say(line)
    for name, reason in ablation.failed.items():
        complain(f"{name} failed: {reason}")
    if stopped:
        complain(f"interrupted; {str(args.out)!r} holds the ablation: continue it with --resume")
        return stopped.exit_code
    return 1 if ablation.failed else 0


# ---- bench ----


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time TNT against ViT on this machine, in about a minute",
        description="Time TNT against ViT on this machine, in about a minute.",
        epilog=_examples("bench", "bench --size b --dtype float16 --batch-size 64"),
    )
    bench.set_defaults(command=_bench, less_memory="take a smaller --batch-size")
    bench.add_argument("--size", default="s", help="ti | s | b (default s)")
    bench.add_argument("--device", help="such as cpu, cuda:0 (default: the GPU if there is one)")
    bench.add_argument("--dtype", help="float32 | bfloat16 | float16 (default: bfloat16 on a GPU, else float32)")
    bench.add_argument("--batch-size", type=int, help="images a call (default: 256 on a GPU, else 4)")
    bench.add_argument("--seconds", type=float, default=30.0, help="time to measure (default 30)")
    bench.add_argument("--compile", action="store_true", help="through torch.compile, which takes a minute more")
    bench.add_argument("--json", action="store_true", help="print one JSON list")


def _bench(args: argparse.Namespace) -> int:
    try:
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the benchmark needs more packages ({error}): pip install "tnt_fast[bench]"') from error
    import timm
    import torch

    from tnt_fast import bench
    from tnt_fast.dispatch import find_device

    device = find_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    batch = (256 if on_gpu else 4) if args.batch_size is None else args.batch_size
    for name, value, accepted in (("--size", args.size, bench.PAIRS), ("--dtype", dtype, bench.DTYPES)):
        if value not in accepted:
            raise ValueError(f"{name} {value!r} is unknown{nearest(value, accepted)}; accepted: {', '.join(accepted)}")
    if not 1 <= batch <= 100_000 or not 0 < args.seconds < 1e6:
        raise ValueError(f"--batch-size {batch} must be in [1, 100000], and --seconds {args.seconds} in (0, 1e6)")
    rows = bench.bench(args.size, str(device), dtype, batch, args.seconds, args.compile)
    if args.json:
        say_json(rows)
        return 0
    where = torch.cuda.get_device_name(device) if on_gpu else f"the CPU, {torch.get_num_threads()} threads"
    how = "compiled" if args.compile else "eager"
    say(f"inference, {dtype}, batch {batch}, {how}, on {where}; torch {torch.__version__}, timm {timm.__version__}")
    for line in bench.table(rows).split("\n"):
        say(line)
    say(f"medians of {rows[0]['rounds']} rounds in turns; random weights")
    if not on_gpu:
        say("not fused: the kernels need a GPU")
    else:
        for reason in rows[0]["why_not_fused"]:
            say(f"not fused: {reason}")
    return 0


# ---- info ----


def _add_info(commands: Any) -> None:
    info = commands.add_parser(
        "info",
        help="versions, device, and the path that a forward takes",
        description="Versions, devices, and the path that a forward takes here, with the reasons.",
        epilog=_examples("info", "info --model tnt_fast_s_patch16_224 --json"),
    )
    info.set_defaults(command=_info)
    info.add_argument("--model", action="append", help="a variant; again for more (default: all)")
    info.add_argument("--json", action="store_true", help="print one JSON object")


def installed_version(package: str) -> str | None:
    """None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    found = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return found


def describe(models: list[str]) -> dict[str, Any]:
    """What ``tnt-fast info`` prints."""
    import timm

    from tnt_fast import flops, variants
    from tnt_fast.dispatch import OPERATIONS, kernel, why_not_fused

    found: dict[str, Any] = {}
    known = sorted(variants.__all__)
    for name in models:
        if name not in known:
            raise ValueError(f"model {name!r} is unknown{nearest(name, known)}; accepted: {', '.join(known)}")
        model = timm.create_model(name, device="meta").eval()
        reasons = why_not_fused(model)
        found[name] = {
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
        "models": found,
    }


def _info(args: argparse.Namespace) -> int:
    report = describe(args.model or list(VARIANTS))
    if args.json:
        say_json(report)
        return 0
    for package, version in report["versions"].items():
        say(f"{package:12s} {version or 'not installed'}")
    for device in report["devices"]:
        say(device)
    say("kernels: " + ", ".join(f"{name}: {state}" for name, state in report["kernels"].items()))
    for name, model in report["models"].items():
        say()
        say(f"{name}: {model['parameters'] / 1e6:.2f} M parameters, {model['gmacs']:.3f} GMACs; path: {model['path']}")
        for reason in model["why_not_fused"]:
            say(f"  - {reason}")
        for reason in model["why_not_fused_gradients"]:
            say(f"  - gradients by PyTorch: {reason}")
    return 0


# ---- completion ----


def _add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script by which the shell completes commands and options",
        description="Print a script by which the shell completes commands and options.",
        epilog="in ~/.bashrc:\n  source <(tnt-fast completion bash)",
    )
    completion.set_defaults(command=_completion)
    completion.add_argument("shell", choices=["bash"])


def _completion(args: argparse.Namespace) -> int:
    parser, commands = _parser()
    options = [f"        {name}) words={' '.join(_options(command))!r} ;;" for name, command in commands.items()]
    script = f"""_tnt_fast() {{
    local words word="${{COMP_WORDS[COMP_CWORD]}}"
    case "${{COMP_WORDS[1]}}" in
{chr(10).join(options)}
    esac
    if [[ $COMP_CWORD -eq 1 ]]; then words={" ".join([*commands, *_options(parser)])!r}; elif [[ $word != -* ]]; then words=; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _tnt_fast tnt-fast"""  # default: what is no option is a file
    for line in script.split("\n"):
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
