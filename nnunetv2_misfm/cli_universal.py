"""The sub-command `nnUNetv2_misfm universal`: its arguments, handed to `planning.universal.join`."""

import argparse
from collections.abc import Callable

from nnunetv2_misfm import installation
from nnunetv2_misfm.errors import MisfmError


def add_universal_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the sub-command.

    Args:
        add: Makes a sub-command of a name, a function that runs it, and a text.
    """
    command = add("universal", _universal, "Join labelled datasets into one, for one model that answers for each.")
    command.add_argument("-d", "--datasets", nargs="+", required=True, metavar="ID", help="numbers or names")
    command.add_argument(
        "--dataset", type=int, required=True, metavar="ID", dest="number", help="of the universal dataset, e.g. 950"
    )
    command.add_argument("--name", default="Universal", help="of the universal dataset (default: Universal)")
    command.add_argument(
        "--same", action="append", nargs="+", default=[], metavar="ID:CLASS=ID:CLASS",
        help="classes that are one and share a task, e.g. 4:liver=101:Liver",
    )  # fmt: skip
    command.add_argument(
        "--modality", nargs="+", default=[], metavar="ID=NAME", dest="modalities",
        help="of datasets whose channel_names do not tell, e.g. 101=CT (several channels: 101=T1+FLAIR)",
    )  # fmt: skip
    command.add_argument("-p", "--plans", default="nnUNetPlans", help="name of the plans (default: nnUNetPlans)")
    command.add_argument(
        "-pl", "--planner",
        help="nnU-Net's, or PCTNetPlanner (default: nnUNetPlannerResEncM)",
    )  # fmt: skip
    command.add_argument("--gpu-memory-gb", type=float, metavar="N", help="memory of the GPU (default: the planner's)")
    command.add_argument(
        "--spacing", nargs=3, type=float, metavar=("Z", "Y", "X"), help="shared, in mm (default: nnU-Net's choice)"
    )
    command.add_argument(
        "--patch-size", nargs=3, type=int, metavar=("D", "H", "W"), help="in voxels (default: as planned)"
    )
    command.add_argument("--batch-size", type=int, metavar="N", help="default: as planned")
    command.add_argument(
        "--features", nargs="+", type=int, metavar="N", help="channels of each stage (default: as planned)"
    )
    command.add_argument(
        "--no-mirroring", nargs="+", type=int, default=[], metavar="ID", help="datasets that are never mirrored"
    )
    command.add_argument(
        "--extend", type=int, metavar="ID", help="a universal dataset whose plans, tasks and sources are taken over"
    )
    command.add_argument("--alone", action="store_true", help="with --extend: without its sources")
    command.add_argument("-np", "--processes", type=int, metavar="N", help="default: nnU-Net's")
    command.add_argument(
        "--no-preprocessing", action="store_true", help="only write plans, and name the commands that are left"
    )


def _universal(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.planning.universal import Request, join

    request = Request(
        datasets=options.datasets,
        number=options.number,
        name=options.name,
        same=[declared for several in options.same for declared in several],
        modalities=_by_number(options.modalities),
        plans=options.plans,
        planner=options.planner,
        gpu_memory_gb=options.gpu_memory_gb,
        spacing_mm=options.spacing,
        patch_size=options.patch_size,
        batch_size=options.batch_size,
        features=options.features,
        no_mirroring=options.no_mirroring,
        processes=options.processes,
        preprocessing=not options.no_preprocessing,
        extend=options.extend,
        alone=options.alone,
    )
    print(join(request))
    return 0


def _by_number(given: list[str]) -> dict[int, str]:
    modalities = {}
    for text in given:
        number, separator, name = text.partition("=")
        if not (number.isdigit() and separator and name):
            raise MisfmError(f"expected --modality of the form 101=CT, got {text!r}.")
        modalities[int(number)] = name
    return modalities
