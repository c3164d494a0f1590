"""Sharding of a dataset: the pipeline of one worker, by rows, by files, or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.data.batch import Batch
from dvkernels.data.distributed.options import AutoShardPolicy
from dvkernels.data.distributed.worker_shards import FileShards, RowShard
from dvkernels.data.file_source import FileList
from dvkernels.data.filter import Filter
from dvkernels.data.map import Map
from dvkernels.data.node import Node
from dvkernels.data.prefetch import Prefetch
from dvkernels.data.shuffle import WindowedShuffle
from dvkernels.errors import DatasetError

__all__: list[str] = []

_MEMBER = "distribute_dataset"


class Sharding(NamedTuple):
    """The pipeline of one worker, and whether the workers must agree at each step."""

    policy: AutoShardPolicy  # never AUTO
    node: Node
    needs_agreement: bool
    reason: str
    own_lanes: range = range(0)  # the lanes of files that the worker reads
    ends_with_first: bool = False  # whether all workers end as soon as one does


class _FileChain(NamedTuple):
    """Chain that can be sharded by files: files, transforms, a batch, transforms of batches."""

    whole: Node
    batch: Batch
    elements: Node
    files: FileList


def shard(node: Node, share: WorkerShare, policy: AutoShardPolicy) -> Sharding:
    """Return the sharding of a dataset for the worker of ``share``.

    Raises
    ------
    DatasetError
        The policy does not fit the dataset; the message says why and which policy does.
    """
    if share.num_workers == 1:
        return Sharding(AutoShardPolicy.OFF, node, False, "there is one worker")
    if policy is AutoShardPolicy.OFF:
        return _read_everything(node, share)
    if node.why_not_resumable is not None:
        raise DatasetError(
            f"{_MEMBER}: expected a dataset that every worker can read alike; got {node!r}, of "
            f"which each worker would see and drop other elements; pass auto_shard_policy='off', "
            f"so that each worker delivers the elements of its own source"
        )
    if policy is AutoShardPolicy.DATA:
        return by_elements(node, share, "asked for")
    fault = _why_not_by_files(node, share)
    if policy is AutoShardPolicy.FILE:
        if fault is not None:
            raise DatasetError(
                f"{_MEMBER}: auto_shard_policy='file' cannot be applied to {node!r}: {fault}; use "
                f"'auto' or 'data', which let every worker take its rows of each batch"
            )
        return by_files(node, share, [0] * share.num_workers, "asked for")
    if fault is not None:
        return by_elements(node, share, fault)
    chain = _file_chain(node)
    assert isinstance(chain, _FileChain)
    if chain.files.random_access:
        return by_elements(node, share, "only the own rows are read where files have random access")
    if chain.batch.drops_remainder:
        return by_elements(node, share, "one remainder is left out, not one of every worker")
    return by_files(node, share, [0] * share.num_workers, "every worker has files of its own")


def by_elements(node: Node, share: WorkerShare, reason: str) -> Sharding:
    """Return the sharding by rows: the worker's rows of every global batch."""
    return Sharding(AutoShardPolicy.DATA, RowShard(node, share), False, reason)


def by_files(node: Node, share: WorkerShare, positions: Sequence[int], reason: str) -> Sharding:
    """Return the sharding by files: the worker's lanes.

    ``positions`` holds the number of elements of each lane that have been delivered, by any
    worker; there are as many lanes as there were workers when the epoch began.
    """
    chain = _file_chain(node)
    if isinstance(chain, str):
        raise DatasetError(
            f"load_state_dict: expected a dataset that can be read by files, as when the state was "
            f"saved; got {node!r}: {chain}; build the dataset as it was"
        )
    num_rows = share.num_rows(chain.batch.size)
    own = range(0)
    if num_rows[share.worker]:  # of a batch smaller than the replicas, some workers have none
        readers = [worker for worker, count in enumerate(num_rows) if count]
        own = range(readers.index(share.worker), len(positions), len(readers))
    lanes = FileShards(
        [
            chain.elements.replace_link(chain.files, chain.files.strided(lane, len(positions)))
            for lane in own
        ],
        [positions[lane] for lane in own],
        num_rows[share.worker],
        chain.batch.drops_remainder,
    )
    local = chain.whole.replace_link(chain.batch, lanes)
    drops = chain.batch.drops_remainder
    return Sharding(AutoShardPolicy.FILE, local, True, reason, own, ends_with_first=drops)


def longest_part(node: Node, share: WorkerShare) -> int:
    """Return the length of the longest part of a full global batch, which some worker has.

    Raises
    ------
    DatasetError
        The size of the global batch is not known.
    """
    batch = _batch_of(node)
    if isinstance(batch, str):
        raise DatasetError(
            f"{_MEMBER}: pad=True over several workers needs to know the global batch; {node!r} "
            f"{batch}; put batch() last"
        )
    return -(-batch.size // share.num_replicas)


def _read_everything(node: Node, share: WorkerShare) -> Sharding:
    """Return the sharding of a worker that reads everything, in batches of its share."""
    reason = "asked for"
    batch = _batch_of(node)
    if isinstance(batch, str):
        if node.why_not_resumable is None:
            raise DatasetError(
                f"{_MEMBER}: auto_shard_policy='off' needs to know the global batch, of which each "
                f"worker takes its share; {node!r} {batch}; use 'data'"
            )
        return Sharding(
            AutoShardPolicy.OFF, node, True, reason
        )  # a live source makes its own batches
    num_rows = share.num_rows(batch.size)
    if len(set(num_rows)) > 1:
        raise DatasetError(
            f"{_MEMBER}: auto_shard_policy='off' needs a global batch of which every worker gets "
            f"as much, or they would take different numbers of steps; got batch({batch.size}) for "
            f"{share.num_replicas} replicas of {share.num_workers} workers; give all workers the "
            f"same number of replicas and choose a multiple of {share.num_replicas}, or use 'data'"
        )
    local = node.replace_link(batch, Batch(batch.source, num_rows[0], batch.drops_remainder))
    return Sharding(AutoShardPolicy.OFF, local, node.why_not_resumable is not None, reason)


def _batch_of(node: Node) -> Batch | str:
    """Return the last batch() of a chain, or a text that says what follows it."""
    while not isinstance(node, Batch):
        if not isinstance(node, Map | Prefetch):
            return f"has {node.describe()} where batch() is needed"
        assert node.source is not None
        node = node.source
    return node


def _file_chain(node: Node) -> _FileChain | str:
    batch = _batch_of(node)
    if isinstance(batch, str):
        return f"it {batch}"
    files: Node = batch.source
    while not isinstance(files, FileList):
        if not isinstance(files, Map | Filter | WindowedShuffle | Prefetch):
            return (
                f"{files.describe()} counts elements of all files together"
                if files.source is not None
                else f"its source is {files.describe()}, not from_files(...)"
            )
        assert files.source is not None
        files = files.source
    return _FileChain(node, batch, batch.source, files)


def _why_not_by_files(node: Node, share: WorkerShare) -> str | None:
    chain = _file_chain(node)
    if isinstance(chain, str):
        return chain
    if len(chain.files.files) < share.num_workers:
        return f"there are {len(chain.files.files)} files for {share.num_workers} workers"
    if chain.batch.size < share.num_replicas:
        return (
            f"a global batch of {chain.batch.size} has no row for some of the "
            f"{share.num_replicas} replicas, so nobody would read their files"
        )
    return None
