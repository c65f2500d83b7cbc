"""The sub-command `priors` of `nnUNetv2_misfm`: a picture of how alike the learned priors of a universal model are."""

import argparse
from collections.abc import Callable
from pathlib import Path

from nnunetv2_misfm import installation


def add_priors_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the sub-command; `add` takes its name, function and description and returns its parser."""
    command = add(
        "priors", _priors, "Draw how alike the learned tasks and modalities of a universal model are, as a PNG."
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="of nnUNetTrainerHermes")
    command.add_argument("-o", "--output", type=Path, required=True, help="the PNG file")


def _priors(options: argparse.Namespace) -> int:
    installation.require_supported_nnunet()
    from nnunetv2_misfm.prior_picture import draw_priors

    print(draw_priors(options.checkpoint, options.output))
    return 0
