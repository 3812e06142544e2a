"""The processes of a run: how those that torchrun started find each other, talk, and end together."""

import contextlib
import datetime
import inspect
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quick.errors import Ended, GroupError

LOST = re.compile(r"gloo|nccl|store|socket|connection|broken pipe|timed out", re.IGNORECASE)
LOCK_SECONDS = 6  # to wait for a lock: worker processes of a killed process notice within 5 seconds that it is gone
WRAPPED = []  # networks in groups are never freed: PyTorch 2.10 can wait for itself when it frees one
T = TypeVar("T")


@dataclass
class Group:
    """The processes that share a run; without torchrun it is this process alone.

    Inside of `with group:` they can talk to each other, and all but the first (rank 0) print nothing. When one of them
    fails, all end: the first to fail with its error, the others with Ended. `timeout` is how many seconds they wait for
    each other.
    """

    timeout: float = 600.0
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes on this machine
    local_size: int = 1

    def __enter__(self) -> "Group":
        """Raises GroupError when the processes do not find each other."""
        self.output, self.pending, self.store = (sys.stdout, sys.stderr), None, None
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
            return self
        if not (dist.is_available() and dist.is_gloo_available()):
            raise GroupError("this PyTorch was built without gloo, by which processes talk; start without torchrun")
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        timeout = datetime.timedelta(seconds=self.timeout)
        try:
            store, self.rank, self.size = next(dist.rendezvous("env://", timeout=timeout))
            self.store = dist.PrefixStore(self.rendezvous(store), store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=timeout)
        except (RuntimeError, ValueError) as error:  # all of torch's are, and what it says of missing variables
            raise GroupError(f"the {os.environ['WORLD_SIZE']} processes did not find each other: {error}") from error
        if torch.cuda.is_available() and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - closed at the exit
        return self

    def rendezvous(self, store: "dist.Store") -> str:
        """A name that all processes of this start agree on, and that no earlier start had.

        Processes that torchrun starts again get the same store, which still has the addresses of the dead ones. So the
        first process gives a name, the others answer with a word of their own, and go on when it has heard theirs.
        """
        word = uuid.uuid4().hex
        if self.rank == 0:
            store.set("name", word)
            store.set(f"{word}/heard", b" ".join(store.get(f"{word}/{rank}") for rank in range(1, self.size)))
            return word
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            name = store.get("name").decode()
            store.set(f"{name}/{self.rank}", word)
            if store.check([f"{name}/heard"]) and word in store.get(f"{name}/heard").decode().split():
                return name
            time.sleep(0.01)
        raise GroupError(f"waited {self.timeout:g} seconds (--timeout)")

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self.rank:
            sys.stdout.close()
        sys.stdout, sys.stderr = self.output
        if self.size == 1:
            return
        if error is None:
            if self.pending:
                self.pending[0].wait()
            dist.destroy_process_group()
            return
        if self.rank:
            time.sleep(0.3)  # of an error that all processes have, the first one knows most
        with contextlib.suppress(RuntimeError):  # the store is gone with the machine that had it
            if self.store.add("ended", 1) > 1:
                raise Ended from None
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            if "timed out" in str(error).lower():
                raise GroupError(f"waited {self.timeout:g} seconds (--timeout) for another process") from error
            if LOST.search(str(error)):
                raise GroupError("lost another process of the run") from error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by the sum of all processes' tensors, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def assemble(self, rows: Tensor, indices: Tensor, count: int) -> Tensor:
        """A tensor of `count` rows, of which each process has those at its `indices` (int64)."""
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[indices.to(rows.device)] = rows
        return self.all_reduce(whole)

    def from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all processes."""
        values = [make() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give these tensors the values that they have in the first process."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.contiguous()  # channels_last weights need not lie alike in all processes
            dist.broadcast(values, 0)
            tensor.copy_(values)

    def wait(self) -> None:
        """Wait until all processes have come here, however long that takes."""
        if self.size > 1:
            self.store.add("here", 1)
            while self.store.add("here", 0) < self.size:
                time.sleep(0.2)

    def delayed_max(self, *values: float) -> list[float]:
        """The largest of each value over all processes, as the values were at the last call (0 at the first one).

        So nobody has to wait. All processes must call it equally often.
        """
        if self.size == 1:
            return list(values)
        work, found = self.pending or (None, torch.zeros(len(values)))
        if work:
            work.wait()
        largest = torch.tensor(values)
        self.pending = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True), largest
        return found.tolist()

    def job(self) -> str:
        """A name for all processes that one torchrun ever starts, or one on each machine with the same --rdzv-id.

        Empty without torchrun.
        """
        name = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


ALONE = Group()  # this process, which never talks to others


def wrap_ddp(network: nn.Module, device: torch.device, accumulate: int = 1) -> nn.Module:
    """The network in DistributedDataParallel: its gradients become the mean over all processes in each backward pass.

    Buffers, which are the averages of batch normalisation, are not sent at each step: those of the first process count,
    and the others get them before they evaluate. `accumulate` is how many backward passes a step may have.
    """
    ddp = nn.parallel.DistributedDataParallel
    buffers = {"forward_sync_buffers", "broadcast_buffers"} & inspect.signature(ddp).parameters.keys()
    wrapped = ddp(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        **{max(buffers): False},  # the newer name, where PyTorch has it
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,  # a static graph must be learned in a step that synchronises
    )
    WRAPPED.append(wrapped)
    return wrapped
