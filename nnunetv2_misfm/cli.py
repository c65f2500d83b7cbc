"""The command `nnUNetv2_misfm`: thin over documented functions of the package.

Sub-commands import what they need when they run, so that `path` answers without loading PyTorch.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunetv2_misfm import __version__, installation
from nnunetv2_misfm.cli_priors import add_priors_command
from nnunetv2_misfm.cli_universal import add_universal_command
from nnunetv2_misfm.errors import MisfmError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command and returns the exit status: 0, 1 where `check` finds faults, 2 for a user's error, 130."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    options.command_line = shlex.join(["nnUNetv2_misfm", *given])
    try:
        return options.run(options)
    except (MisfmError, NotImplementedError) as error:
        print(f"nnUNetv2_misfm {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = (
            "; the same command goes on where it was"
            if options.command in ("import", "preprocess", "universal", "benchmark")
            else ""
        )
        print(f"nnUNetv2_misfm {options.command}: stopped{more}.", file=sys.stderr)
        return 130  # as shells report an end by Ctrl-C


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nnUNetv2_misfm", description="Pretraining and PCT-Net for nnU-Net v2.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("path", _path, 'Print the folder for nnU-Net: export nnUNet_extTrainer="$(nnUNetv2_misfm path)".')
    add("enable", _enable, "Let nnU-Net find the trainers in this environment for good, without the variable.")
    add("disable", _disable, "Undo enable.")
    add("check", _check, "Say in plain words what is missing or wrong.")

    _add_data_commands(add)

    command = add("configure", _configure, "Write a named configuration with other numbers into a plans file.")
    _add_configuration(command)
    command.add_argument("--name", required=True, help="name of the new configuration")
    command.add_argument(
        "settings", nargs="+", metavar="key=value", help="e.g. num_epochs=50 volume_fusion.num_levels=8"
    )

    command = add("plan", _plan, "Write plans for PCT-Net, with which nnU-Net's own trainers train and predict it.")
    command.add_argument("-d", "--datasets", nargs="+", required=True, metavar="ID", help="numbers or names")
    command.add_argument(
        "--gpu-memory-gb", type=float, default=8.0, metavar="N", help="memory of the GPU (default: 8, as nnU-Net's)"
    )
    command.add_argument(
        "--overwrite-plans-name", default="nnUNetPCTNetPlans", metavar="NAME", help="default: nnUNetPCTNetPlans"
    )

    add_universal_command(add)
    add_priors_command(add)
    _add_preview_command(add)

    command = add("convert", _convert, "Make released MIS-FM weights, or any fitted to a dataset, fit for nnU-Net.")
    command.add_argument("file", metavar="FILE", type=Path, help="pctnet_ct10k_volf.pt, fmunet_abk1k_volf.pt, say")
    command.add_argument("-o", "--output", type=Path, help="the file to write (default: beside FILE)")
    command.add_argument(
        "--resolution-mode", type=int, choices=(0, 1, 2), help="branch of a PCT-Net (default: the trained one)"
    )
    command.add_argument("-d", "--dataset", help="adapt to the network of this dataset, by number or name")
    command.add_argument("-c", "--configuration", help="configuration of its plans, e.g. 3d_fullres")
    command.add_argument("-p", "--plans", help="name of the plans (default: nnUNetPlans)")

    _add_benchmark_commands(add)

    command = add("demo", _demo, "Run the whole job on phantoms that the package makes itself.")
    command.add_argument("-o", "--output", type=Path, default=Path("demo_results"))
    command.add_argument("-device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser


def _add_preview_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add("preview", _preview, "Draw what a pretraining method shows the network, as a PNG.")
    _add_configuration(command)
    command.add_argument("-o", "--output", type=Path, required=True, help="the PNG file")
    command.add_argument("-n", "--num-samples", type=int, default=2, help="samples to draw (default: 2)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (default: 0)")
    command.add_argument(
        "-tr", "--trainer", default="nnUNetTrainerVFPretrain", metavar="TRAINER",
        help="the pretraining trainer (default: nnUNetTrainerVFPretrain)",
    )  # fmt: skip
    command.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="of this trainer, to draw what the network answers"
    )


def _add_data_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add("import", _import, "Make a pretraining dataset of any unlabelled scans below some folders.")
    command.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="DIR", help="searched with all folders below"
    )
    command.add_argument("-d", "--dataset", type=int, required=True, metavar="ID", help="1 to 999, e.g. 900")
    command.add_argument("--name", default="Unlabelled", help="of the dataset, e.g. CTPool (default: Unlabelled)")
    command.add_argument("--modality", choices=("CT", "MR", "auto"), default="auto", help="default: auto")
    _add_workers(command)
    command.add_argument("--link", action="store_true", help="refer to files that need no change, do not copy them")
    command.add_argument(
        "--split-by-modality", action="store_true", help="CT becomes dataset ID, MR becomes dataset ID + 1"
    )
    command.add_argument("--split-time-series", action="store_true", help="take time series apart, do not refuse them")
    command.add_argument("--resample-sheared", action="store_true", help="resample gantry tilt, do not refuse it")
    command.add_argument("--keep-duplicates", action="store_true", help="take scans of equal content too")
    command.add_argument(
        "--min-size", type=_positive, default=8, metavar="VOXELS", help="along every axis (default: 8)"
    )

    command = add("preprocess", _preprocess, "Do nnU-Net's preprocessing case by case, going on where it was.")
    command.add_argument("-d", "--datasets", nargs="+", required=True, metavar="ID", help="numbers or names")
    command.add_argument("-c", "--configurations", nargs="+", default=["3d_fullres"], help="default: 3d_fullres")
    command.add_argument("-p", "--plans", default="nnUNetPlans", help="name of the plans")
    _add_workers(command)


def _add_benchmark_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add(
        "benchmark", _benchmark, "Train and test a grid of runs, to see whether pretraining beats stock nnU-Net."
    )
    _add_configuration(command)
    command.add_argument(
        "--trainers", nargs="+", required=True, metavar="TRAINER", help="nnUNetTrainer is the stock one"
    )
    command.add_argument(
        "--folds", nargs="+", type=_number_or_all, default=[0], metavar="FOLD", help="numbers, or all (default: 0)"
    )
    command.add_argument(
        "--train-cases", nargs="+", type=_number_or_all, default=["all"], metavar="N",
        help="numbers of labelled cases, nested draws from the fold, or all (default: all)",
    )  # fmt: skip
    command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="runs of each (default: 0)")
    command.add_argument("--epochs", type=_positive, metavar="N", help="of every run (default: nnU-Net's 1000)")
    command.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", dest="settings",
        help="other numbers for every trainer, as `configure` takes them, e.g. batch_size=2",
    )  # fmt: skip
    command.add_argument(
        "--weights", nargs="+", default=[], metavar="TRAINER=FILE", help="pretrained weights of a trainer"
    )
    command.add_argument(
        "--test", type=Path, metavar="DIR",
        help="compare on the cases of DIR/imagesTs and DIR/labelsTs (default: on the folds' validation cases)",
    )  # fmt: skip
    command.add_argument("--tolerance", type=float, default=1.0, metavar="MM", help="of the surface Dice (default: 1)")
    command.add_argument("--gpus", type=_positive, metavar="N", help="one run per GPU at a time (default: 1)")
    command.add_argument("--device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: cuda")
    command.add_argument(
        "--jobs", type=_positive, metavar="N", help="runs at a time where there is no GPU (default: 1)"
    )
    command.add_argument("--disable-tta", action="store_true", help="predict the test cases without mirroring")
    command.add_argument(
        "--skip-validation",
        action="store_true",
        help="with --test: leave out the final validation (not the stock trainer's)",
    )
    command.add_argument("--dry-run", action="store_true", help="only print the exact commands")
    _add_benchmark_name(command)

    command = add("report", _report, "Write what a benchmark has come to, as HTML, Markdown and CSV.")
    command.add_argument("-d", "--dataset", required=True, help="number or name of the dataset")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    command.add_argument(
        "--on", choices=("test", "validation"), help="cases to compare (default: test, where there is a test folder)"
    )
    _add_benchmark_name(command)


def _add_benchmark_name(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", default="benchmark", help="of the benchmark, to keep several apart")


def _add_configuration(command: argparse.ArgumentParser) -> None:
    command.add_argument("-d", "--dataset", required=True, help="number or name of the dataset")
    command.add_argument("-c", "--configuration", required=True, help="configuration of its plans, e.g. 3d_fullres")
    command.add_argument("-p", "--plans", default="nnUNetPlans", help="name of the plans")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _number_or_all(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number or 'all', got {text!r}")
    return int(text)


def _add_workers(command: argparse.ArgumentParser) -> None:
    place = command.add_mutually_exclusive_group()
    place.add_argument(
        "--workers", type=_positive, metavar="N", help="processes on this machine (default: one per processor)"
    )
    place.add_argument(
        "--scheduler", metavar="ADDRESS", help="use the workers of this Dask cluster, e.g. tcp://host:8786"
    )


def _path(options: argparse.Namespace) -> int:
    print(installation.discovery_folder())
    return 0


def _enable(options: argparse.Namespace) -> int:
    print(f"nnU-Net now finds the trainers in this environment ({installation.enable()}); undo: nnUNetv2_misfm disable")
    return 0


def _disable(options: argparse.Namespace) -> int:
    removed = installation.disable()
    print("removed " + ", ".join(map(str, removed)) if removed else "nothing to remove: it was not enabled")
    return 0


def _check(options: argparse.Namespace) -> int:
    findings = installation.check()
    for finding in findings:
        print(
            f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}" + ("" if finding.ok else f"\n      {finding.remedy}")
        )
    return 0 if all(finding.ok for finding in findings) else 1


def _import(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.data.import_dataset import Workers, import_scans
    from nnunetv2_misfm.data.outcome import Settings

    settings = Settings(
        modality=options.modality,
        min_size=options.min_size,
        split_time_series=options.split_time_series,
        resample_sheared=options.resample_sheared,
        keep_duplicates=options.keep_duplicates,
        link=options.link,
    )
    workers = Workers(options.workers, options.scheduler)
    said = import_scans(
        options.input, options.dataset, options.name, settings, workers, split_by_modality=options.split_by_modality
    )
    print(said)
    return 0


def _preprocess(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.data.preprocess import preprocess

    for dataset in options.datasets:
        said = preprocess(dataset, options.configurations, options.plans, options.workers, options.scheduler)
        print(said, flush=True)
    return 0


def _configure(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.planning.configure import configure

    file = configure(options.dataset, options.configuration, options.name, options.settings, options.plans)
    print(f"wrote configuration {options.name} (inherits from {options.configuration}) into {file}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.planning.plan import plan

    for dataset in options.datasets:
        print(plan(dataset, options.gpu_memory_gb, options.overwrite_plans_name), flush=True)
    return 0


def _preview(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.preview import preview

    print(
        preview(
            options.dataset,
            options.configuration,
            options.output,
            options.plans,
            options.num_samples,
            options.seed,
            options.trainer,
            options.checkpoint,
        )
    )
    return 0


def _convert(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    if options.dataset is None:
        if options.configuration or options.plans:
            raise MisfmError("expected -c and -p together with --dataset, got them alone: add --dataset ID.")
        from nnunetv2_misfm.weights.convert import convert

        print(convert(options.file, options.output, options.resolution_mode))
        return 0
    if options.configuration is None:
        raise MisfmError("expected the configuration to adapt to with --dataset, got none: add -c 3d_fullres, say.")
    from nnunetv2_misfm.planning.adapt import adapt

    plans = options.plans or "nnUNetPlans"
    print(adapt(options.file, options.dataset, options.configuration, plans, options.output, options.resolution_mode))
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.benchmark.benchmark import benchmark
    from nnunetv2_misfm.benchmark.prepare import Request, weights_by_trainer
    from nnunetv2_misfm.benchmark.run import Options

    epochs = [] if options.epochs is None else [f"num_epochs={options.epochs}"]
    request = Request(
        dataset=options.dataset,
        configuration=options.configuration,
        trainers=options.trainers,
        plans=options.plans,
        folds=options.folds,
        train_cases=options.train_cases,
        seeds=options.seeds,
        settings=[*epochs, *options.settings],
        test=options.test,
        weights=weights_by_trainer(options.weights),
        name=options.name,
        tolerance_mm=options.tolerance,
        mirroring=not options.disable_tta,
        command=options.command_line,
    )
    how = Options(
        device=options.device,
        jobs=(options.gpus if options.device == "cuda" else options.jobs) or 1,
        skip_validation=options.skip_validation,
    )
    said, status = benchmark(request, how, options.dry_run)
    print(said)
    return status


def _report(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.benchmark.gather import gather
    from nnunetv2_misfm.benchmark.report import write_report

    print(f"wrote {write_report(gather(options.dataset, options.name, options.on), options.output)}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.demo import run_demo

    run_demo(options.output, options.device)
    return 0
