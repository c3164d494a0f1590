"""Data parallelism for NumPy, Numba and CuPy.

``dvkernels.kernels`` has collectives on plain arrays. The strategies, variables and datasets of
this module have the programming model of ``tf.distribute``.

These names are imported when a program first uses one of them: the command line and the workers of
a job start without NumPy.
"""

import importlib as _importlib
import typing as _typing

from dvkernels._version import __version__ as __version__
from dvkernels.threads import shielded as _shielded

if _typing.TYPE_CHECKING:
    from dvkernels import cluster as cluster
    from dvkernels import errors as errors
    from dvkernels import kernels as kernels
    from dvkernels import optimizers as optimizers
    from dvkernels import profiler as profiler
    from dvkernels.checkpoint.checkpoint import Checkpoint as Checkpoint
    from dvkernels.checkpoint.manager import CheckpointManager as CheckpointManager
    from dvkernels.checkpoint.preemption import PreemptionHandler as PreemptionHandler
    from dvkernels.checkpoint.restoring.restore import Restored as Restored
    from dvkernels.communicators.base import Communicator as Communicator
    from dvkernels.context import get_strategy as get_strategy
    from dvkernels.context import has_strategy as has_strategy
    from dvkernels.context import in_cross_replica_context as in_cross_replica_context
    from dvkernels.coordinator.closure import RemoteValue as RemoteValue
    from dvkernels.coordinator.cluster_coordinator import ClusterCoordinator as ClusterCoordinator
    from dvkernels.custom_reduction import CustomReduction as CustomReduction
    from dvkernels.data.dataset import Dataset as Dataset
    from dvkernels.data.distributed.dataset import DistributedDataset as DistributedDataset
    from dvkernels.data.distributed.input_context import InputContext as InputContext
    from dvkernels.data.distributed.iterator import DistributedIterator as DistributedIterator
    from dvkernels.data.distributed.options import AutoShardPolicy as AutoShardPolicy
    from dvkernels.data.distributed.options import InputOptions as InputOptions
    from dvkernels.devices.device import Device as Device
    from dvkernels.devices.registry import list_devices as list_devices
    from dvkernels.launcher.function_job import launch as launch
    from dvkernels.profiler.debugging import debug as debug
    from dvkernels.reduce_op import ReduceOp as ReduceOp
    from dvkernels.replica_context import ReplicaContext as ReplicaContext
    from dvkernels.replica_context import get_replica_context as get_replica_context
    from dvkernels.strategies import partitioners as partitioners
    from dvkernels.strategies.base import Strategy as Strategy
    from dvkernels.strategies.central_storage import (
        CentralStorageStrategy as CentralStorageStrategy,
    )
    from dvkernels.strategies.global_strategy import set_strategy as set_strategy
    from dvkernels.strategies.mirrored import MirroredStrategy as MirroredStrategy
    from dvkernels.strategies.multi_worker_mirrored import (
        MultiWorkerMirroredStrategy as MultiWorkerMirroredStrategy,
    )
    from dvkernels.strategies.one_device import OneDeviceStrategy as OneDeviceStrategy
    from dvkernels.strategies.parameter_server import (
        ParameterServerStrategy as ParameterServerStrategy,
    )
    from dvkernels.strategies.per_replica_values import ValueContext as ValueContext
    from dvkernels.strategies.tpu import TPUStrategy as TPUStrategy
    from dvkernels.values.distributed import DistributedValues as DistributedValues
    from dvkernels.values.distributed import Mirrored as Mirrored
    from dvkernels.values.distributed import PerReplica as PerReplica
    from dvkernels.variables.modes import VariableAggregation as VariableAggregation
    from dvkernels.variables.modes import VariableSynchronization as VariableSynchronization
    from dvkernels.variables.variable import Variable as Variable
    from dvkernels.variables.writes import sync as sync

_ROOMS = ("cluster", "errors", "kernels", "optimizers", "profiler")

# Imported together, at the first use of one of them.
_TOGETHER = {
    "Communicator": "dvkernels.communicators.base",
    "get_strategy": "dvkernels.context",
    "has_strategy": "dvkernels.context",
    "in_cross_replica_context": "dvkernels.context",
    "CustomReduction": "dvkernels.custom_reduction",
    "Dataset": "dvkernels.data.dataset",
    "DistributedDataset": "dvkernels.data.distributed.dataset",
    "InputContext": "dvkernels.data.distributed.input_context",
    "DistributedIterator": "dvkernels.data.distributed.iterator",
    "AutoShardPolicy": "dvkernels.data.distributed.options",
    "InputOptions": "dvkernels.data.distributed.options",
    "Device": "dvkernels.devices.device",
    "list_devices": "dvkernels.devices.registry",
    "debug": "dvkernels.profiler.debugging",
    "ReduceOp": "dvkernels.reduce_op",
    "ReplicaContext": "dvkernels.replica_context",
    "get_replica_context": "dvkernels.replica_context",
    "Strategy": "dvkernels.strategies.base",
    "set_strategy": "dvkernels.strategies.global_strategy",
    "CentralStorageStrategy": "dvkernels.strategies.central_storage",
    "MirroredStrategy": "dvkernels.strategies.mirrored",
    "MultiWorkerMirroredStrategy": "dvkernels.strategies.multi_worker_mirrored",
    "OneDeviceStrategy": "dvkernels.strategies.one_device",
    "ValueContext": "dvkernels.strategies.per_replica_values",
    "DistributedValues": "dvkernels.values.distributed",
    "Mirrored": "dvkernels.values.distributed",
    "PerReplica": "dvkernels.values.distributed",
    "VariableAggregation": "dvkernels.variables.modes",
    "VariableSynchronization": "dvkernels.variables.modes",
    "Variable": "dvkernels.variables.variable",
    "sync": "dvkernels.variables.writes",
}

# Not every program needs these; checkpoints import xxhash.
_ALONE = {
    "ClusterCoordinator": "dvkernels.coordinator.cluster_coordinator",
    "ParameterServerStrategy": "dvkernels.strategies.parameter_server",
    "RemoteValue": "dvkernels.coordinator.closure",
    "TPUStrategy": "dvkernels.strategies.tpu",
    "partitioners": "dvkernels.strategies",
    "Checkpoint": "dvkernels.checkpoint.checkpoint",
    "CheckpointManager": "dvkernels.checkpoint.manager",
    "PreemptionHandler": "dvkernels.checkpoint.preemption",
    "Restored": "dvkernels.checkpoint.restoring.restore",
    "launch": "dvkernels.launcher.function_job",
}

if not _typing.TYPE_CHECKING:
    __all__ = sorted({*_ROOMS, *_TOGETHER, *_ALONE, "__version__"})


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return _shielded.beyond_interrupts(_importlib.import_module, f"dvkernels.{name}")
    if name in _TOGETHER:
        _shielded.beyond_interrupts(_import, _TOGETHER)
    elif name in _ALONE:
        _shielded.beyond_interrupts(_import, {**_TOGETHER, name: _ALONE[name]})
    else:
        raise AttributeError(f"module 'dvkernels' has no attribute {name!r}")
    return globals()[name]


def _import(places: dict[str, str]) -> None:
    globals().update({name: _imported(place, name) for name, place in places.items()})


def _imported(place: str, name: str) -> object:
    """Return what ``from place import name`` binds."""
    module = _importlib.import_module(place)
    if hasattr(module, name):
        return getattr(module, name)
    return _importlib.import_module(f"{place}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_TOGETHER, *_ALONE})
