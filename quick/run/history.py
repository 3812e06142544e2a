"""The finished epochs of a run: which one is best, whether the run has ended, and how checkpoints store them."""

import json
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quick.run.settings import Config


@dataclass
class History:
    """The metrics of each finished epoch, in order, as metrics.jsonl has them."""

    epochs: list[dict] = field(default_factory=list)
    earlier: int = 0  # so many of them an earlier version trained, which took the first of equally accurate ones
    by: str = "accuracy"  # what chooses the best epoch, one of BEST

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def split(self) -> str:
        """The pictures that choose the best epoch: val, where some were held out of training, else test."""
        return "val" if "val_accuracy" in self.epochs[-1] else "test"

    def score(self, metrics: dict) -> tuple[float, float]:
        """How good an epoch is: by its accuracy or F1, and among equal ones, as few pictures give many, by its loss.

        By the loss: among equal ones by the accuracy.
        """
        loss = -metrics[f"{self.split}_loss"]
        if self.by == "loss":
            return loss, metrics[f"{self.split}_accuracy"]
        return metrics[f"{self.split}_{self.by}"], loss

    @property
    def best(self) -> dict:
        """The metrics of the best epoch, by its `score`; of equally good ones the last."""
        kept = max(self.epochs[: self.earlier], key=lambda metrics: self.score(metrics)[0], default=None)
        candidates = [kept, *self.epochs[self.earlier :]] if kept else self.epochs
        return max(reversed(candidates), key=self.score)

    def ended_by(self, config: Config) -> str | None:
        """The setting that ends the run after its last epoch: epochs or patience; None while it goes on.

        An epoch that only equals the best one, in both parts of its score, does not begin the patience anew.
        """
        done = len(self.epochs)
        if done >= config.epochs:
            return "epochs"
        if config.patience and self.epochs:
            improved = max(self.epochs, key=self.score)  # the first of equal ones
            if done - improved["epoch"] >= config.patience:
                return "patience"
        return None

    def as_jsonl(self) -> bytes:
        return "".join(json.dumps(metrics) + "\n" for metrics in self.epochs).encode()

    def state_dict(self) -> dict:
        """The history for a checkpoint: a tensor `(epochs,)` a metric, int64 or float64; NaN where an epoch has none.

        As numbers of their own, the metrics of some ten thousand epochs are more than `checkpoints.read` takes.
        """
        columns = {}
        for name in dict.fromkeys(name for metrics in self.epochs for name in metrics):
            values = [metrics.get(name, math.nan) for metrics in self.epochs]
            is_whole = all(type(value) is int for value in values)
            columns[name] = torch.tensor(values, dtype=torch.int64 if is_whole else torch.float64)
        return {"columns": columns, "earlier": self.earlier}

    @classmethod
    def load(cls, stored: object, by: str = "accuracy") -> "History":
        """The history that a checkpoint has; a list of metrics in one of an earlier version. `by` chooses the best.

        The file may be a stranger's: raises ValueError for what is no table of numbers.
        """
        if isinstance(stored, list):
            return cls(stored, len(stored), by)
        columns = stored.get("columns") if isinstance(stored, dict) else None
        if not isinstance(columns, dict) or type(stored.get("earlier")) is not int or len(columns) > 100:
            raise ValueError("no history")
        tensors = [*columns.values()]
        is_table = all(
            isinstance(values, Tensor)
            and values.layout == torch.strided
            and values.dtype in (torch.int64, torch.float64)
            and values.ndim == 1
            and len(values) == len(tensors[0])
            and values.nbytes <= values.untyped_storage().nbytes()
            for values in tensors
        )
        if not is_table or not all(isinstance(name, str) for name in columns):
            raise ValueError("no table of numbers")
        rows = zip(*(values.tolist() for values in tensors), strict=True)
        epochs = [
            {name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)} for row in rows
        ]
        return cls(epochs, max(0, min(stored["earlier"], len(epochs))), by)
