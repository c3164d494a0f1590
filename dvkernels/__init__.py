"""Data parallelism for NumPy, Numba and CuPy.

``dvkernels.kernels`` has collectives on plain arrays. The strategies, variables and datasets of
this module have the programming model of ``tf.distribute``.
"""

import importlib as _importlib
import typing as _typing

from dvkernels import cluster as cluster
from dvkernels import errors as errors
from dvkernels import kernels as kernels
from dvkernels import optimizers as optimizers
from dvkernels import profiler as profiler
from dvkernels._version import __version__ as __version__
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
from dvkernels.profiler.debugging import debug as debug
from dvkernels.reduce_op import ReduceOp as ReduceOp
from dvkernels.replica_context import ReplicaContext as ReplicaContext
from dvkernels.replica_context import get_replica_context as get_replica_context
from dvkernels.strategies import partitioners as partitioners
from dvkernels.strategies.base import Strategy as Strategy
from dvkernels.strategies.base import set_strategy as set_strategy
from dvkernels.strategies.central_storage import (
    CentralStorageStrategy as CentralStorageStrategy,
)
from dvkernels.strategies.mirrored import MirroredStrategy as MirroredStrategy
from dvkernels.strategies.multi_worker_mirrored import (
    MultiWorkerMirroredStrategy as MultiWorkerMirroredStrategy,
)
from dvkernels.strategies.one_device import OneDeviceStrategy as OneDeviceStrategy
from dvkernels.strategies.parameter_server import (
    ParameterServerStrategy as ParameterServerStrategy,
)
from dvkernels.strategies.per_replica_values import ValueContext as ValueContext
from dvkernels.threads import shielded as _shielded
from dvkernels.values.distributed import DistributedValues as DistributedValues
from dvkernels.values.distributed import Mirrored as Mirrored
from dvkernels.values.distributed import PerReplica as PerReplica
from dvkernels.variables.modes import VariableAggregation as VariableAggregation
from dvkernels.variables.modes import VariableSynchronization as VariableSynchronization
from dvkernels.variables.variable import Variable as Variable
from dvkernels.variables.writes import sync as sync

if _typing.TYPE_CHECKING:
    from dvkernels.checkpoint.checkpoint import Checkpoint as Checkpoint
    from dvkernels.checkpoint.manager import CheckpointManager as CheckpointManager
    from dvkernels.checkpoint.preemption import PreemptionHandler as PreemptionHandler
    from dvkernels.checkpoint.restoring.restore import Restored as Restored
    from dvkernels.launcher.function_job import launch as launch

# Imported at first access: not every program needs them; checkpoints import xxhash.
_LAZY = {
    "Checkpoint": "dvkernels.checkpoint.checkpoint",
    "CheckpointManager": "dvkernels.checkpoint.manager",
    "PreemptionHandler": "dvkernels.checkpoint.preemption",
    "Restored": "dvkernels.checkpoint.restoring.restore",
    "launch": "dvkernels.launcher.function_job",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'dvkernels' has no attribute {name!r}")
    module = _shielded.beyond_interrupts(_importlib.import_module, _LAZY[name])
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
