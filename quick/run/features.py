"""Features: what the frozen part of a network makes of pictures, computed once instead of again in every epoch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from quick.cli import log, progress_bar
from quick.data.augment import augments
from quick.data.pictures import Pictures
from quick.data.streaming import free_memory
from quick.nets.transfer import HeadOnly
from quick.processes import Group
from quick.run.settings import Config


@dataclass
class Features:
    """A store of features, float `(N, ...)`, in the place of the pictures that they were computed from."""

    values: Tensor
    side = 1  # pixels: as many features are evaluated at a time as of the smallest pictures
    ahead = 0
    pixels = False  # they are not normalised

    def read(self, indices: Sequence[Tensor], squares_at: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        for rows in indices:
            yield self.values[rows.to(self.values.device)]


def train_head_alone(
    network: nn.Module, head: list[str], sets: list[Pictures], config: Config, group: Group
) -> tuple[nn.Module, list[Pictures]]:
    """What trains of a network whose layers before the head are frozen, and the sets that it trains on.

    That is its head on features that are computed once, if pictures are never changed and the features fit into memory,
    else its head behind the frozen layers, on the pictures.
    """
    head_only = HeadOnly(network, head, config.image_size)
    if augments(config):
        return head_only, sets
    if config.tta != "none":
        log.info("features are computed again in every epoch; --tta none would compute them once")
        return head_only, sets
    features = compute_features(sets, head_only, config.memory_share, group)
    return (head_only.tail, features) if features else (head_only, sets)


def compute_features(
    sets: list[Pictures], frozen: HeadOnly, memory_share: float, group: Group
) -> list[Pictures] | None:
    """The sets with features in place of their pictures; None where these do not fit into memory.

    Each process of a group computes a shard.
    """
    start, found, total = time.perf_counter(), [], sum(map(len, sets))
    device = sets[0].labels.device
    copies = group.local_size if device.type == "cpu" else 1
    with progress_bar("features", total, "pictures") as progress:
        for pictures in sets:
            values = None
            for batch in pictures.evaluation_batches(group):
                features = frozen.features(batch.images).float()
                if values is None:
                    size = copies * features[:1].nbytes * total
                    fits = size <= memory_share * free_memory(device)
                    if not found and not all(group.all_gather(fits)):
                        log.info(f"features would take {size / 1e6:,.1f} MB: computed again in every epoch")
                        return None
                    values = features.new_zeros(len(pictures), *features.shape[1:])
                values[batch.indices] = features
                progress.update(len(batch.labels) * group.size)
            store = Features(group.all_reduce(values))
            found.append(replace(pictures, store=store, rows=None))
    log.info(f"features computed once, in {time.perf_counter() - start:.1f} s")
    return found
