"""Moving pretrained weights into a network with context priors: rows of its pools move by the names of what they mean.

A universal model that learns further datasets knows their tasks and modalities beside the old ones, perhaps in another
order. A row for which the file has no name stays fresh, so that the old tasks answer as before until they are trained.
An ordinary network, such as one that Volume Fusion pretrained, gives encoder and decoder alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.universe import Universe
from nnunetv2_misfm.weights.transfer import TransferReport, transfer_weights

# Tensors of architectures/context_prior.py with a row for each task or modality
_ROWS: dict[Literal["tasks", "modalities"], re.Pattern[str]] = {
    "tasks": re.compile(r"fusions\.\w+\.task_tokens"),
    "modalities": re.compile(r"fusions\.\w+\.modality_tokens|modality_head\.2\.(weight|bias)"),
}


def transfer_to_universal(
    source: Mapping[str, torch.Tensor],
    known: Universe | None,
    network: nn.Module,
    wanted: Universe,
    transfer: Literal["all", "encoder"] = "all",
    num_source_label_channels: int = 0,
) -> TransferReport:
    """Copies pretrained tensors into a network with context priors, in place, and returns the account.

    Args:
        source: State dict of the pretrained network, of a universal model or of an ordinary one.
        known: What the file's plans say of its tasks and modalities; None where they know of none.
        network: Bare `ContextPriorNetwork` (no DDP or compile wrapper).
        wanted: Its tasks and modalities.
        transfer: `encoder` takes only the network's part of that name.
        num_source_label_channels: As in `transfer_weights`.

    Returns:
        The account. Its share is that of all parameters where the file is of a universal model (a pool of which some
        rows moved counts whole), else that of encoder and decoder.

    Raises:
        MisfmError: Less than half of the parameters in question could be moved, or the file's priors are not those
            of `known`; the network is left as it was.
    """
    if not any(name.startswith("fusions.") for name in source):
        return _transfer_body(source, network, transfer, num_source_label_channels)
    if known is None:
        raise MisfmError(
            "expected plans that name the tasks of these context priors, got a file without: use the checkpoint that "
            "nnUNetTrainerHermes wrote."
        )
    given = dict(source)
    accounts: dict[str, str] = {}
    strangers: dict[str, str] = {}
    for name, target in network.state_dict().items():
        kind = next((kind for kind, pattern in _ROWS.items() if pattern.fullmatch(name)), None)
        if kind is None or name not in source:
            continue
        theirs, ours, rows = getattr(known, kind), getattr(wanted, kind), source[name]
        if len(rows) != len(theirs):
            raise MisfmError(
                f"expected as many rows of {name} as the file's plans have {kind} ({len(theirs)}), got {len(rows)}: "
                "weights and plans are not of one model; use a checkpoint as nnUNetTrainerHermes wrote it."
            )
        if theirs == ours or rows.shape[1:] != target.shape[1:]:
            continue
        if not set(theirs) & set(ours):
            strangers[name] = f"none of these {kind} is in the file (it knows {', '.join(theirs)})"
            del given[name]
            continue
        given[name] = _rows_by_name(rows, theirs, target, ours)
        accounts[name] = _account(kind, theirs, ours)
    report = transfer_weights(given, network, transfer, num_source_label_channels=num_source_label_channels)
    report.adapted |= {name: accounts[name] for name in report.moved if name in accounts}
    report.moved = [name for name in report.moved if name not in accounts]
    report.fresh |= {name: why for name, why in strangers.items() if report.fresh[name] == "not in the file"}
    return report


def _transfer_body(
    source: Mapping[str, torch.Tensor], network: nn.Module, transfer: Literal["all", "encoder"], num_labels: int
) -> TransferReport:
    """Copies an ordinary network's tensors into encoder and decoder."""
    body = nn.ModuleDict({part: network.get_submodule(part) for part in ("encoder", "decoder")})
    report = transfer_weights(source, body, transfer, num_source_label_channels=num_labels)
    why = "not in the file" if transfer == "all" else "outside the encoder"
    report.fresh |= {name: why for name in network.state_dict() if not name.startswith(("encoder.", "decoder."))}
    return report


def _rows_by_name(rows: torch.Tensor, theirs: Sequence[str], target: torch.Tensor, ours: Sequence[str]) -> torch.Tensor:
    """Returns `target` [ours, ...] with the rows of equal name taken from `rows` [theirs, ...]."""
    filled = target.detach().clone()
    for i, name in enumerate(ours):
        if name in theirs:
            filled[i] = rows[theirs.index(name)].to(filled)
    return filled


def _account(kind: str, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Returns which rows moved, which stay fresh and which are not taken."""
    fresh = [name for name in ours if name not in theirs]
    left = [name for name in theirs if name not in ours]
    moved = f"{len(ours) - len(fresh)} of {len(ours)} {kind} moved"
    if not fresh and not left:
        return f"{moved}, in another order"
    return (
        moved + (f", fresh: {', '.join(fresh)}" if fresh else "") + (f"; not taken: {', '.join(left)}" if left else "")
    )
