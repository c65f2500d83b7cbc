"""Hermes: an encoder-decoder conditioned on learned priors of tasks and modalities, one network for many datasets.

Paper: Gao et al., Training Like a Medical Resident: Context-Prior Learning Toward Universal Medical Image
Segmentation, CVPR 2024, arXiv:2306.02416. Pools of task and modality tokens at each of five scales (encoder strides 4,
8, 16, decoder strides 8, 4) meet the features there in fusion blocks; the posterior task tokens of all scales make one
kernel per task, whose dot product with the finest features is the task's logit; the posterior modality tokens tell the
modality. Around a ResidualEncoderUNet this is Hermes-R.

Deliberately unlike the published code (which carries no licence; none of it is here):

- Features attend to the tasks that the sample's dataset labels, and to no others; what is asked is another matter. The
  published code lets padding and every task that is asked take part, so that an answer depends on its neighbours.
- No token stands for "no task", and no row of a pool is unused.

Shape letters: B batch, C channels, D H W voxels in array order, T tasks of a sample (padded), M modalities.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunetv2_misfm.architectures.encoder_decoder import last_features, require_known_stages, stage_widths
from nnunetv2_misfm.architectures.prior_attention import MLP, PriorAttentionBlock
from nnunetv2_misfm.errors import MisfmError

# Fusion blocks after the encoder's and the decoder's stage of each level: strides 4, 8, 16, then 8, 4 (the authors'
# configuration of Hermes-R)
ENCODER_BLOCKS = {2: 2, 3: 2, 4: 4}
DECODER_BLOCKS = {3: 2, 2: 2}
# Tokens of each modality (the same)
MODALITY_TOKENS = 10

Side = Literal["encoder", "decoder"]


class Context(NamedTuple):
    """What a sample's dataset labels, its modality, and what is asked.

    Attributes:
        labelled: int64 (B, L), numbers of the tasks that the sample's dataset labels, padded with any task's number.
        present: bool (B, L), which of them are no padding: these the features attend to.
        modality: int64 (B,), number of the sample's modality.
        asked: int64 (B, T), numbers of the tasks to answer; None asks what is labelled. It changes no answer which
            other tasks are asked.
    """

    labelled: Tensor
    present: Tensor
    modality: Tensor
    asked: Tensor | None = None


class Sample(NamedTuple):
    """A batch of images with what is asked of them; `to` moves it, as nnU-Net's training step wants.

    Attributes:
        image: float (B, channels, D, H, W).
        context: What is asked.
    """

    image: Tensor
    context: Context

    def to(self, device: torch.device, non_blocking: bool = False) -> "Sample":
        """Returns the same on a device."""
        labelled, present, modality, asked = self.context
        context = Context(
            labelled.to(device, non_blocking=non_blocking),
            present.to(device, non_blocking=non_blocking),
            modality.to(device, non_blocking=non_blocking),
            None if asked is None else asked.to(device, non_blocking=non_blocking),
        )
        return Sample(self.image.to(device, non_blocking=non_blocking), context)


class Answer(NamedTuple):
    """What the network says of a batch.

    Attributes:
        logits: (B, T, D, H, W), of each asked task by itself (sigmoid); structures may overlap.
        modality: Logits (B, M) of the modalities (softmax).
    """

    logits: Tensor
    modality: Tensor


class Fusion(nn.Module):
    """The priors of one scale and the blocks in which they meet its features."""

    def __init__(self, channels: int, num_blocks: int, num_tasks: int, num_modalities: int) -> None:
        super().__init__()
        self.task_tokens = nn.Parameter(torch.empty(num_tasks, channels))
        self.modality_tokens = nn.Parameter(torch.empty(num_modalities, MODALITY_TOKENS, channels))
        nn.init.xavier_uniform_(self.task_tokens)
        nn.init.xavier_uniform_(self.modality_tokens.view(-1, channels))
        self.blocks = nn.ModuleList(PriorAttentionBlock(channels) for _ in range(num_blocks))

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Fuses.

        Args:
            x: Features (B, C, D, H, W).
            context: What is asked of each sample.

        Returns:
            Features (B, C, D, H, W), posterior tokens of the asked tasks (B, T, C), mean posterior modality token
            (B, C).
        """
        tokens = [self.modality_tokens[context.modality], self.task_tokens[context.labelled]]
        visible = [context.present.new_ones((x.shape[0], MODALITY_TOKENS)), context.present]
        if context.asked is not None:
            tokens.append(self.task_tokens[context.asked])
            visible.append(torch.zeros_like(context.asked, dtype=torch.bool))
        priors, seen = torch.cat(tokens, 1), torch.cat(visible, 1)
        features = x.flatten(2).transpose(1, 2).contiguous()  # else every LayerNorm copies it
        for block in self.blocks:
            features, priors = block(features, priors, seen)
        tasks = priors[:, -tokens[-1].shape[1] :]
        return features.transpose(1, 2).reshape(x.shape).contiguous(), tasks, priors[:, :MODALITY_TOKENS].mean(1)


class ContextPriorNetwork(nn.Module):
    """A U-Net of nnU-Net's or PCT-Net, with context priors. All arguments are plain data, fit for a checkpoint.

    Encoder and decoder keep the names that they have in the bare network, so that weights move either way. Its heads
    are left out: the kernels of the tasks take their place.

    Args:
        input_channels: Channels of the image.
        num_classes: Size of the task pool.
        num_modalities: Size of the modality pool.
        network: The bare network, as a checkpoint of ours describes it: `class`, `kwargs`, `kwargs_to_import`.
        deep_supervision: Must be false: Hermes-R has one output.

    Raises:
        MisfmError: A network of unknown stages or of less than three levels.
        ValueError: Deep supervision is asked for.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        num_modalities: int,
        network: Mapping[str, Any],
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise ValueError("expected deep_supervision=False: a network with context priors has one output.")
        bare = get_network_from_plans(
            network["class"], dict(network["kwargs"]), list(network["kwargs_to_import"]), input_channels, 1,
            allow_init=True, deep_supervision=False,
        )  # fmt: skip
        try:
            require_known_stages(bare)
        except TypeError as error:
            raise MisfmError(f"nnUNetTrainerHermes {error}") from error
        widths = stage_widths(bare)
        self.encoder: Any = bare.encoder
        self.decoder: Any = bare.decoder
        self.decoder.seg_layers = nn.ModuleList()
        for norm in getattr(self.decoder, "seg_norms", [None])[1:]:
            norm.requires_grad_(False)  # kept for the weights' sake; nothing reads what it puts out
        sites = [("encoder", level, blocks) for level, blocks in ENCODER_BLOCKS.items() if level < len(widths)]
        sites += [("decoder", level, blocks) for level, blocks in DECODER_BLOCKS.items() if level < len(widths) - 1]
        if not sites:
            raise MisfmError(
                f"nnUNetTrainerHermes expected a network of three levels at least (priors act from stride 4 on), got "
                f"{len(widths)}: plan with larger patches."
            )
        self.fusions = nn.ModuleDict(
            {
                f"{side}_{level}": Fusion(widths[level], blocks, num_classes, num_modalities)
                for side, level, blocks in sites
            }
        )
        total = sum(widths[level] for _, level, _ in sites)
        kernel = widths[0]
        self.kernel_head = nn.Sequential(nn.LayerNorm(total), MLP(total, total, kernel), MLP(kernel, kernel, kernel))
        self.modality_head = MLP(total, total, num_modalities)
        self._bound: tuple[tuple[int, ...], int, bool] | None = None

    def answer_for(self, tasks: Sequence[int] | None, modality: int = 0, *, background: bool = True) -> None:
        """Makes `forward` answer plain images in one dataset's convention from here on.

        Args:
            tasks: The dataset's tasks in the order of nnU-Net's classes or regions; None takes the convention back.
            modality: Number of the dataset's modality.
            background: Whether nnU-Net expects the background's logit first (classes that exclude each other).
        """
        self._bound = None if tasks is None else (tuple(tasks), modality, background)

    def forward(self, x: Sample | Tensor) -> Answer | Tensor:
        """Answers what is asked.

        Args:
            x: Images with what is asked of each, or after `answer_for` images (B, channels, D, H, W) alone.

        Returns:
            An `Answer`; for plain images logits (B, classes, D, H, W) as nnU-Net expects them of the dataset. The
            background's are 0, so that a voxel belongs to the most likely class of those above one half, if any.

        Raises:
            MisfmError: Plain images, and no dataset to answer for.
        """
        if isinstance(x, Sample):
            return self.answer(x)
        if self._bound is None:
            raise MisfmError(
                "a universal model answers in the convention of one of its source datasets: predict with -d and -p of "
                "that source (its model folder lies in nnUNet_results beside the dataset's others)."
            )
        tasks, modality, background = self._bound
        context = Context(
            torch.tensor([tasks], device=x.device).expand(x.shape[0], -1),
            torch.ones((x.shape[0], len(tasks)), dtype=torch.bool, device=x.device),
            torch.full((x.shape[0],), modality, device=x.device),
        )
        logits = self.answer(Sample(x, context)).logits
        return torch.cat((torch.zeros_like(logits[:, :1]), logits), 1) if background else logits

    def answer(self, sample: Sample) -> Answer:
        """Returns the logits of the asked tasks and of the modalities."""
        tasks, modalities = [], []

        def fuse(side: Side, level: int, x: Tensor) -> Tensor:
            if (name := f"{side}_{level}") not in self.fusions:
                return x
            x, task_tokens, modality_token = self.fusions[name](x, sample.context)
            tasks.append(task_tokens)
            modalities.append(modality_token)
            return x

        features = last_features(self.encoder, self.decoder, sample.image, fuse)
        kernels = self.kernel_head(torch.cat(tasks, 2))
        logits = torch.einsum("btc,bcdhw->btdhw", kernels, features)
        return Answer(logits, self.modality_head(torch.cat(modalities, 1)))
