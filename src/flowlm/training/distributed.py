"""Several processes on one run, made by torchrun: each takes its rows of every batch, and they step alike.

`Ranks` is one process by itself, and asks nothing of torch.distributed. `Replicas` each hold the whole model (DDP);
`Shards` hold a part of its weights, gradients, averages and moments each, and gather a block when it is needed (FSDP2).
Randomness is keyed by the rows of the whole batch, so what is learned does not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowlm.backbone import Block
from flowlm.device import describe, resolve_device
from flowlm.weights import whole

if TYPE_CHECKING:
    from flowlm.config import RunConfig, TrainConfig
    from flowlm.families import Objective

__all__ = ["ElsewhereError", "Forward", "Ranks", "joined", "launched", "rank_lost"]

T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """Another rank stopped the run, and says why."""


class Forward(nn.Module):
    """From passages to losses in one forward pass: where DDP and FSDP2 come in.

    An objective calls the network several times and its head afterwards; to them all of that must be one module.

    Args:
        model: what is trained.
        objective: of the losses.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, tokens: Tensor, noise: Tensor, draws: MappingProxyType[str, Tensor]) -> Tensor:
        """Losses (B, L), as of `Objective.losses`.

        Args:
            draws: no dictionary: DDP and FSDP2 would bring its tensors to the device, and draws stay on the CPU.
        """
        return self.objective.losses(self.model, tokens, noise, dict(draws))


class Ranks:
    """One process by itself. Of several, what these methods say together."""

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def check(self, config: RunConfig) -> None:
        """ValueError for a run that these ranks cannot train alike."""

    def device(self, name: str) -> torch.device:
        """This process's device. ValueError: as of `resolve_device`."""
        return resolve_device(name)

    def describe(self, device: torch.device) -> str:
        """The machines in words."""
        return describe(device)

    def rows(self, batch: int) -> range:
        """This process's rows of a batch."""
        return range(batch)

    def wrap(self, forward: Forward, averaged: nn.Module) -> nn.Module:
        """The forward pass with what keeps the ranks' gradients alike; parameters are made anew where parts are kept.

        Args:
            averaged: a network of the same parameters, without gradients.
        """
        return forward

    def opened(self, network: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Within it the parameters outside the blocks are whole."""
        return contextlib.nullcontext()

    def accumulating(self, forward: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: gradients meet in the last one alone."""
        return contextlib.nullcontext()

    def mean(self, loss: Tensor, stop: bool) -> Tensor:
        """The mean of a number; and whether one of the ranks wants to stop goes with it."""
        return loss

    def agree(self) -> None:
        """Learn what went with the first of the means for which this was not asked yet."""

    def stops(self, asked: bool) -> bool:
        """Whether all stop before the next step."""
        return asked

    def gather(self, items: list[T]) -> list[T]:
        """What all ranks have, in their order. What is on a device must be brought to the CPU before."""
        return items

    def same(self, value: T) -> T:
        """The first rank's."""
        return value

    def once(self, fn: Callable[[], T]) -> T:
        """What fn returns where it is called, on the first rank alone; the others wait.

        Raises:
            ElsewhereError: it failed there, with whatever error.
        """
        return fn()

    def collect(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole tensors, on the first rank, of what each rank holds."""
        return state


class Replicas(Ranks):
    """Processes that each hold the whole model; DDP takes the mean of their gradients.

    Args:
        device: this process's.
    """

    def __init__(self, device: torch.device):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._device, self._stops = device, False
        self._asked: deque[Tensor] = deque()

    def device(self, name: str) -> torch.device:
        return self._device

    def describe(self, device: torch.device) -> str:
        return f"{self.world} processes, each on {describe(device)}"

    def rows(self, batch: int) -> range:
        share = batch // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def wrap(self, forward: Forward, averaged: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            # torch 2.13 has another name for it, that 2.11 does not know.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                forward,
                broadcast_buffers=False,  # they are constants
                gradient_as_bucket_view=True,
            )

    @contextlib.contextmanager
    def accumulating(self, forward: nn.Module, last: bool) -> Iterator[None]:
        assert isinstance(forward, nn.parallel.DistributedDataParallel)
        with contextlib.nullcontext() if last else forward.no_sync():
            yield

    def mean(self, loss: Tensor, stop: bool) -> Tensor:
        both = torch.stack([loss, torch.full_like(loss, float(stop))])  # one exchange
        dist.all_reduce(both)
        self._asked.append(both[1])
        return both[0] / self.world

    def agree(self) -> None:
        # All ranks read the same step's at the same place: they stop together.
        self._stops = bool(self._asked.popleft() > 0)

    def stops(self, asked: bool) -> bool:
        return self._stops

    def gather(self, items: list[T]) -> list[T]:
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def same(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, device=self._device)
        return box[0]

    def once(self, fn: Callable[[], T]) -> T:
        value: Any = None
        error: Exception | None = None
        if self.first:
            try:
                value = fn()
            except Exception as raised:
                error = raised
        failed, value = self.same((error is not None, value))
        if error is not None:
            raise error
        if failed:
            raise ElsewhereError("the first rank stopped the run, and says why")
        return value

    def collect(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return state if self.first else {}


class Shards(Replicas):
    """Processes that each hold a part of every parameter, and of all that belongs to it.

    The blocks gather theirs for as long as they compute; what lies outside of them (embedding, head, times) is whole
    from the beginning of a step to its end, since an objective reads it outside of any forward pass. Ranks gather
    together, so where some rows take more network calls than others all weights are whole for a step.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._networks: tuple[nn.Module, ...] = ()
        self._steady = True

    def check(self, config: RunConfig) -> None:
        for wrong, what, fix in (
            (config.train.compile, "train.compile = true", "--train.no-compile"),
            (
                config.model.tied_head,
                "model.tied_head = true, two names of one parameter",
                "--model.no-tied-head in a new run",
            ),
            (
                config.objective == "flow-map" and config.flow_map.identity == "cfm",
                "flow_map.identity = 'cfm', whose gradients pass the network more often for some rows",
                "--flow-map.identity lsd",
            ),
        ):
            if wrong:
                raise ValueError(
                    f"train.shard = true does not go with {what}: leave out --train.shard, or use {fix}"
                )

    def wrap(self, forward: Forward, averaged: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # Nothing is done in place to the losses.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(self._device.type, (self.world,))
        self._networks, self._steady = (forward, averaged), forward.objective.steady
        for network in self._networks:
            for module in network.modules():
                if isinstance(module, Block):
                    fully_shard(module, mesh=mesh, reshard_after_forward=self._steady)
            fully_shard(network, mesh=mesh, reshard_after_forward=False)
        return forward

    def _parts(self, network: nn.Module) -> list[Any]:
        """What gathers by itself."""
        from torch.distributed.fsdp import FSDPModule

        return [module for module in network.modules() if isinstance(module, FSDPModule)]

    @contextlib.contextmanager
    def opened(self, network: nn.Module) -> Iterator[None]:
        for opened in (network,) if self._steady else self._networks:
            for part in (opened,) if self._steady else self._parts(opened):
                part.unshard()  # type: ignore[operator]
            # The same memory with other numbers: what is kept of the embedding must see that it is another.
            for parameter in opened.parameters():
                torch.autograd.graph.increment_version(parameter)
        try:
            yield
        finally:
            for part in (part for other in self._networks for part in self._parts(other)):
                part.reshard()

    @contextlib.contextmanager
    def accumulating(self, forward: nn.Module, last: bool) -> Iterator[None]:
        forward.set_requires_gradient_sync(last)  # type: ignore[operator]
        # What is shared by the micro-batches, the noise law, was made of the whole embedding.
        forward.set_reshard_after_backward(last, recurse=not self._steady)  # type: ignore[operator]
        yield

    def collect(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        out = {}
        for name, value in state.items():  # one at a time: together they may not fit
            full = whole(value)
            if self.first:
                out[name] = full.cpu()
        return out


def device_of(name: str, local: int) -> torch.device:
    """The device of a process, by its number on its machine.

    Raises:
        ValueError: as of `resolve_device`; one that several processes cannot share.
    """
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"train.device = {name!r} is one device, and torchrun started several processes: use --device cuda, and "
            "each takes its own, or --device cpu"
        )
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs, and torchrun started at least {local + 1} processes "
            f"on it: use torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local)


def launched() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine, as torchrun's environment says; (0, 1, 0) without it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, world, int(os.environ.get("LOCAL_RANK", rank))


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks that torchrun started, for as long as it is entered; one process by itself without it.

    Raises:
        ValueError: a batch that cannot be shared evenly, or a device that cannot be shared.
    """
    _, world, local = launched()
    if world == 1:
        yield Ranks()
        return
    if config.batch % world:
        below, above = config.batch // world * world, -(-config.batch // world) * world
        near = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"train.batch = {config.batch} cannot be shared evenly by {world} processes: use --train.batch {near}, or "
            "torchrun with a number of processes that divides it"
        )
    device = device_of(config.device, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield (Shards if config.shard else Replicas)(device)
    # Not after an error: others may be gone, and to wait for them would be to hang. Before it all meet once more, for
    # a thread of gloo's that still holds an object of an exchange when the interpreter ends would abort the process.
    dist.barrier()
    dist.destroy_process_group()


def rank_lost(error: BaseException) -> bool:
    """Whether an error says that another rank does not answer any more."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    )
