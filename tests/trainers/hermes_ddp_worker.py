"""One rank of a universal training over two processes (see ddp_worker.py, whose hooks and account these are)."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ddp_worker import TIMEOUT, Rank
from torch import distributed as dist

from nnunetv2_misfm.trainers import hermes


class HermesRank(Rank):
    """Feeds this rank's share of given batches; mirrors nothing then."""

    def feed(self, loader: Any) -> Iterator[dict]:
        """Yields the loader's batches, or this rank's share of given ones."""
        if "batches" not in self.scenario:
            yield from super().feed(loader)
        hermes.mirrored = lambda image, segmentation, sources: (image, segmentation)
        for whole in torch.load(self.scenario["batches"]) * 2:
            share = slice(self.rank, self.rank + 1)
            yield {name: values[share] for name, values in whole.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    this = HermesRank(dist.get_rank(), dist.get_world_size())
    this.install()
    scenarios_file = Path(sys.argv[1])
    for one in json.loads(scenarios_file.read_text()):
        this.run(one, scenarios_file.parent)
    dist.destroy_process_group()
