"""From the files that the MIS-FM authors released to files that nnU-Net's `-pretrained_weights` takes.

Nothing in a file is executed: tensors, numbers, strings and plain containers are read, everything else is refused.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights import released_fmunet, released_pct_net
from nnunetv2_misfm.weights.checkpoint import file_sha256, read_checkpoint, without_wrappers, write_checkpoint
from nnunetv2_misfm.weights.released import Conversion, pools

RECORDED_PACKAGES = ("nnunetv2-misfm", "torch")
# Containers of a state dict: nnU-Net's and this package's; that of PyMIC, with which the authors train; none
NNUNET, PYMIC, BARE = "nnU-Net checkpoint", "PyMIC checkpoint", "bare state dict"
_KEYS = {NNUNET: "network_weights", PYMIC: "model_state_dict"}


@dataclass(frozen=True)
class Source:
    """A file that was read.

    Attributes:
        file: Its path.
        container: `NNUNET`, `PYMIC` or `BARE`.
        state: Its state dict, without the prefixes of DDP and torch.compile.
        rest: What else it holds.
    """

    file: Path
    container: str
    state: dict[str, torch.Tensor]
    rest: dict[str, Any]

    @property
    def iteration(self) -> Real | None:
        """The training step that a PyMIC checkpoint states, if it is a number."""
        iteration = self.rest.get("iteration")
        return iteration if isinstance(iteration, Real) and not isinstance(iteration, bool) else None


@dataclass(frozen=True)
class Account:
    """What a conversion found, took, left out and wrote; `str` gives it in sentences."""

    source: Source
    conversion: Conversion
    output: Path

    def __str__(self) -> str:
        trainer = self.conversion.trainer.removesuffix("Pretrain")
        mode, channels = self.conversion.resolution_mode, self.conversion.description["input_channels"]
        written = shlex.quote(str(self.output))
        return "\n".join(
            [
                *found_lines(self.source, self.conversion),
                f"wrote {self.output}",
                f"fine-tune on images of {channels} channel(s) under plans with the {pools(mode)}:",
                f"  nnUNetv2_train DATASET 3d_fullres FOLD -tr {trainer} -pretrained_weights {written}",
                "fine-tune anywhere else (channels and kernels are adapted):",
                f"  nnUNet_misfm_weights={written} nnUNetv2_train DATASET 3d_fullres FOLD -tr {trainer}",
            ]
        )


def found_lines(source: Source, conversion: Conversion) -> list[str]:
    """Returns the sentences on what a file holds and what of it was taken."""
    left_out = [f"{number} {kind}" for kind, number in conversion.left_out.items() if number]
    iteration = "" if source.iteration is None else f", iteration {source.iteration}"
    return [
        f"read {source.file} ({source.container}{iteration})",
        *conversion.found,
        conversion.taken,
        f"mapped {len(conversion.weights)} tensors; left out: {', '.join(left_out) or 'none'}",
        *(f"note: {note}" for note in conversion.notes),
    ]


def convert(file: str | Path, output: str | Path | None = None, resolution_mode: int | None = None) -> Account:
    """Writes a file that nnU-Net's `-pretrained_weights` and our fine-tuning trainers take.

    Args:
        file: A released checkpoint, or the state dict in it alone.
        output: The file to write; None is `<stem>_nnunet.pth` beside `file`.
        resolution_mode: Which branch of a PCT-Net to take; None takes the one that was trained.

    Raises:
        MisfmError: The file is missing, damaged, of another kind or needs no conversion, or the output cannot be
            written; nothing is written then.
    """
    file = Path(file)
    output = output_path(file, output, f"{file.stem}_nnunet.pth")
    source = read_source(file)
    if source.container == NNUNET:
        raise MisfmError(
            f"{file} is an nnU-Net checkpoint and needs no conversion: pass it to -pretrained_weights as it is, or add "
            "--dataset ID -c CONFIGURATION to adapt it to other channels and strides."
        )
    conversion = recognise(source, resolution_mode)
    write_checkpoint(
        {
            _KEYS[NNUNET]: conversion.weights,
            "trainer_name": conversion.trainer,
            "misfm_meta": metadata(source, conversion),
        },
        output,
    )
    return Account(source, conversion, output)


def output_path(file: Path, output: str | Path | None, default_name: str) -> Path:
    """Returns where to write: `output`, or a name beside the file.

    Raises:
        MisfmError: That would overwrite the file itself.
    """
    output = file.with_name(default_name) if output is None else Path(output)
    temporary = output.with_name(f"{output.name}.tmp")  # of `write_checkpoint`
    if any(path.exists() and path.samefile(file) for path in (output, temporary) if file.exists()):
        raise MisfmError(f"expected an output other than {file} itself, which stays as it is: choose another -o.")
    return output


def read_source(file: str | Path) -> Source:
    """Returns the state dict in a file, whatever container it is in.

    Raises:
        MisfmError: The file is missing, damaged or of another kind, or holds other objects than plain data.
    """
    file = Path(file)
    content = read_checkpoint(file)
    container = next((kind for kind, key in _KEYS.items() if key in content), BARE)
    state = content if container == BARE else content[_KEYS[container]]
    if not isinstance(state, Mapping) or not state or not all(torch.is_tensor(value) for value in state.values()):
        keys = ", ".join(map(str, list(content)[:5])) or "none"
        raise MisfmError(
            f"{file}: expected a state dict of tensors, alone or under {' or '.join(map(repr, _KEYS.values()))}, got "
            f"the keys {keys}; use the authors' file as it is."
        )
    state = without_wrappers(state)
    for key, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise MisfmError(f"{file}: expected dense tensors with values, got {key} without: save the weights again.")
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        if held < tensor.numel():
            raise MisfmError(
                f"{file}: expected tensors that hold each of their values, got {key} of shape {tuple(tensor.shape)} "
                f"with {held} for its {tensor.numel()}: save the weights again, expanded ones after .clone()."
            )
    return Source(file, container, state, content)


def recognise(
    source: Source, resolution_mode: int | None = None, strides: Sequence[Sequence[int]] | None = None
) -> Conversion:
    """Returns the released network in a file, converted; the arguments are those of `released_pct_net.convert`.

    Raises:
        MisfmError: The file holds another network, or not all of one.
    """
    for network in (released_pct_net, released_fmunet):
        if network.recognises(source.state):
            try:
                return network.convert(source.state, resolution_mode, strides)
            except MisfmError as error:
                raise MisfmError(f"{source.file}: {error}") from error
    raise MisfmError(
        f"{source.file}: expected the tensors of a released PCT-Net (embeddings, pyramid_ct, pred_heads) or FMUNet "
        f"(project, encoder, decoder, out_layers), got those of another network ({', '.join(list(source.state)[:5])}, "
        "...); for a network of nnU-Net's use its checkpoint."
    )


def metadata(source: Source, conversion: Conversion) -> dict[str, Any]:
    """Returns `misfm_meta` of a converted file: plain data, in the form of the trainers' checkpoints."""
    origin: dict[str, Any] = {
        "file": source.file.name,
        "sha256": file_sha256(source.file),
        "format": source.container,
        "network": conversion.name,
        "resolution_mode": conversion.resolution_mode,
        **conversion.facts,
    }
    if source.iteration is not None:
        origin["iteration"] = source.iteration
    return {
        "method": "volume_fusion",
        "network": conversion.description,
        "converted_from": {**origin, "notes": conversion.notes},
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
        "citations": conversion.citations,
    }
