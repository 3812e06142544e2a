"""The finished epochs of a run: which one is best, and whether the run has ended."""

import json
from dataclasses import dataclass, field
from operator import itemgetter

from quick.run.settings import Config


@dataclass
class History:
    """The metrics of each finished epoch, in order, as metrics.jsonl has them."""

    epochs: list[dict] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def split(self) -> str:
        """The pictures that choose the best epoch: val, where some were held out of training, else test."""
        return "val" if "val_accuracy" in self.epochs[-1] else "test"

    @property
    def best(self) -> dict:
        """The metrics of the best epoch: the first one of the highest accuracy."""
        return max(self.epochs, key=itemgetter(f"{self.split}_accuracy"))

    def ended_by(self, config: Config) -> str | None:
        """The setting that ends the run after its last epoch: epochs or patience; None while it goes on."""
        done = len(self.epochs)
        if done >= config.epochs:
            return "epochs"
        if self.epochs and 0 < config.patience <= done - self.best["epoch"]:
            return "patience"
        return None

    def as_jsonl(self) -> bytes:
        return "".join(json.dumps(metrics) + "\n" for metrics in self.epochs).encode()
