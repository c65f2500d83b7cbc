"""What all fine-tuning shares: where the pretrained weights come from, and the account of what they gave.

nnU-Net initialises first and only then loads its `-pretrained_weights`, without telling the trainer. So everything
here happens at `on_train_start`: weights that changed since initialisation were loaded by nnU-Net's flag, and nothing
else is loaded; a resumed run loads nothing; all others take the first of three routes that leads to a file.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import distributed as dist

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.dimension import require_3d
from nnunetv2_misfm.trainers.recipe import known_methods
from nnunetv2_misfm.weights.checkpoint import file_sha256, network_weights, read_checkpoint, tensors_sha256
from nnunetv2_misfm.weights.nnssl import is_nnssl, transfer_from_nnssl
from nnunetv2_misfm.weights.transfer import HEAD_MARK, TransferReport, transfer_weights

WEIGHTS_VARIABLE = "nnUNet_misfm_weights"
REPORT_NAME = "pretrained_weights.json"


class FinetuneTrainer(MisfmTrainer):
    """Base of the trainers that start from pretrained weights and never from scratch in silence.

    Attributes:
        pretrain_trainer: Name of the matching `...Pretrain` trainer; empty where any weights will do.
        needs_weights: Whether it is an error that nobody names any.
    """

    pretrain_trainer: ClassVar[str]
    needs_weights: bool = True

    @classmethod
    def check_configuration(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises NotImplementedError for a 2D configuration: pretraining is 3D."""
        super().check_configuration(configuration_manager)
        require_3d(configuration_manager, cls.__name__)

    def initialize(self) -> None:
        """Initialises as usual and remembers the weights, to see whether nnU-Net's flag loads others."""
        super().initialize()
        self._initial_weights = self._body_sha256()

    def _body_sha256(self) -> str:
        body = {name: t for name, t in self.bare_network.state_dict().items() if HEAD_MARK not in name}
        return tensors_sha256(body)

    def on_train_start(self) -> None:
        """Loads pretrained weights where nothing was loaded yet, then starts as nnU-Net does.

        Raises:
            MisfmError: No weights found, or weights that do not fit; before the first epoch.
        """
        if not self.was_resumed:  # else the checkpoint held all weights and the account of where they came from
            account = self._take_weights()
            if account is not None:
                self._report(account)
        super().on_train_start()

    def _take_weights(self) -> dict[str, Any] | None:
        """Loads pretrained weights unless nnU-Net's flag already did, and returns the account of what was loaded."""
        if self.was_initialized and self._body_sha256() != self._initial_weights:
            return self._account_of_flag()
        if not (self.needs_weights or self._named_weights()):
            return None
        file, route = self.find_weights()  # before the network is built: fails early
        if not self.was_initialized:
            self.initialize()
        return self._load(file, route)

    # ------------------------------------------------------------------ the routes

    def find_weights(self) -> tuple[Path, str]:
        """Returns the file of pretrained weights and the route that led to it.

        Raises:
            MisfmError: No route leads to a file, or two finished pretraining runs could be meant.
        """
        if named := self._named_weights():
            return named
        for fold in dict.fromkeys(["all", self.fold]):
            found = [file for file in self._pretraining_results(fold) if file.is_file()]
            if len(found) > 1:
                files = ", ".join(map(str, found))
                raise MisfmError(
                    f"expected one finished run of {self.pretrain_trainer}, got {len(found)}: {files}; name one with "
                    f"-pretrained_weights, misfm.pretrained_weights in the plans, or the variable {WEIGHTS_VARIABLE}."
                )
            if found:
                return found[0], f"a finished run of {self.pretrain_trainer} on this dataset"
        dataset, plans = self.plans_manager.dataset_name, self.plans_manager.plans_name
        single_stage = next(
            name for name in self.lineage() if self.plans_manager.get_configuration(name).previous_stage_name is None
        )
        looked_in = self._pretraining_results("all")[0].parent.parent
        raise MisfmError(
            f"{type(self).__name__} expected pretrained weights and found none by any of its four routes: "
            f"1. -pretrained_weights FILE; 2. misfm.pretrained_weights in the plans ({plans}, configuration "
            f"{self.configuration_name}); 3. the variable {WEIGHTS_VARIABLE}; 4. a finished run of "
            f"{self.pretrain_trainer} in {looked_in}. To pretrain: nnUNetv2_train {dataset} "
            f"{single_stage} all -tr {self.pretrain_trainer} -p {plans}"
        )

    def _named_weights(self) -> tuple[Path, str] | None:
        """Returns the file that the plans or the variable name, and which of them does; None where neither does."""
        if self.recipe.pretrained_weights:
            return Path(self.recipe.pretrained_weights), "misfm.pretrained_weights in the plans"
        if os.environ.get(WEIGHTS_VARIABLE):
            return Path(os.environ[WEIGHTS_VARIABLE]), f"the variable {WEIGHTS_VARIABLE}"
        return None

    def _pretraining_results(self, fold: int | str) -> list[Path]:
        """Returns where runs on this configuration, and on those that it inherits from, keep their final weights."""
        dataset = Path(str(nnUNet_results)) / self.plans_manager.dataset_name
        run = f"{self.pretrain_trainer}__{self.plans_manager.plans_name}"
        return [dataset / f"{run}__{name}" / f"fold_{fold}" / "checkpoint_final.pth" for name in self.lineage()]

    # ------------------------------------------------------------------ loading and accounting

    def _load(self, file: Path, route: str) -> dict[str, Any]:
        try:
            checkpoint = read_checkpoint(file)
            method = self._require_method(checkpoint)
            weights, labels = network_weights(checkpoint, file), self.num_label_channels
            if is_nnssl(checkpoint):
                report = transfer_from_nnssl(checkpoint, weights, self.bare_network, labels)
                self.print_to_log_file(
                    f"{file} is a checkpoint of nnssl: its encoder and stem are taken, its decoder is not "
                    f"(transfer: encoder, where the recipe says {self.recipe.transfer})."
                )
            else:
                report = self._transfer(checkpoint, weights)
        except MisfmError as error:
            raise MisfmError(f"pretrained weights {file} (by {route}): {error}") from error
        self.print_to_log_file(f"Pretrained weights: {file}, by {route}: {report.summary()}")
        for name, how in report.adapted.items():
            self.print_to_log_file(f"  adapted {name}: {how}")
        for name, why in report.fresh.items():
            self.print_to_log_file(f"  left fresh {name}: {why}")
        return {"route": route, "file": str(file), "sha256": file_sha256(file), "method": method, **report.as_dict()}

    def _transfer(self, checkpoint: dict[str, Any], weights: dict[str, torch.Tensor]) -> TransferReport:
        """Moves the weights of a checkpoint of ours or nnU-Net's into the network."""
        given = checkpoint.get("misfm_meta", {}).get("network", {}).get("label_channels", 0)
        return transfer_weights(weights, self.bare_network, self.recipe.transfer, self.num_label_channels, given)

    def _require_method(self, checkpoint: dict[str, Any]) -> str | None:
        """Returns the method by which a checkpoint was trained, None where it does not say.

        Raises:
            MisfmError: Another pretraining method than this trainer's.
        """
        method = checkpoint.get("misfm_meta", {}).get("method")
        waiting: list[type[MisfmTrainer]] = [MisfmTrainer]
        for kind in waiting:  # grows while it is read
            waiting += kind.__subclasses__()
        mine = next((k.method.method for k in waiting if k.__name__ == self.pretrain_trainer and k.method), None)
        if mine and method in known_methods() and method != mine:
            raise MisfmError(
                f"expected weights that {mine} pretrained, got those of {method}: take the trainer that fine-tunes "
                f"from {method}, so that results bear its name; a trainer "
                "without a pretraining method in its name (nnUNetTrainer, nnUNetTrainerPCTNet) takes any that fit, "
                "with -pretrained_weights."
            )
        return method

    def _account_of_flag(self) -> dict[str, Any]:
        """Returns the account of what nnU-Net's own `-pretrained_weights` loaded (all but the heads, or it fails).

        Of a file that `nnUNetv2_misfm convert --dataset` fitted, the account of that fitting stands here.

        Raises:
            MisfmError: The file says that another method than this trainer's pretrained it.
        """
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("-pretrained_weights", nargs="?")
        parser.add_argument("-p", nargs="?")  # nnU-Net's own; else it would pass for an abbreviation
        file = parser.parse_known_args(sys.argv[1:])[0].pretrained_weights
        names = self.bare_network.state_dict()
        try:
            checkpoint = read_checkpoint(file) if file else {}
        except MisfmError:  # nnU-Net reads what is refused here, so there is no saying what it is
            checkpoint = {}
        account = {
            "route": "-pretrained_weights",
            "file": file,
            "sha256": file_sha256(file) if file and Path(file).is_file() else None,
            "tensors_sha256": self._body_sha256(),
            "method": self._require_method(checkpoint),
            "transfer": "all",
            "moved": [name for name in names if HEAD_MARK not in name],
            "adapted": {},
            "fresh": {name: "output head" for name in names if HEAD_MARK in name},
            "share": 1.0,
            **checkpoint.get("misfm_meta", {}).get("adapted_to", {}).get("transfer", {}),
        }
        self.print_to_log_file(
            f"Pretrained weights: {file or 'a file given to nnU-Net'}, by nnU-Net's -pretrained_weights; "
            "the other routes are not looked at."
        )
        return account

    def _report(self, account: dict[str, Any]) -> None:
        self.weights_report = account
        if self.local_rank == 0:
            path = Path(self.output_folder) / REPORT_NAME
            path.write_text(json.dumps(account, indent=1) + "\n")
        if self.is_ddp:
            dist.barrier()
