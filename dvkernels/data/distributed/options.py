"""Input options of a distributed dataset: sharding, prefetching, error policy and balance."""

from __future__ import annotations

from dataclasses import dataclass

from dvkernels.data.checks import check_count, check_flag
from dvkernels.enumeration import NamedEnum
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__ = ["AutoShardPolicy", "InputOptions"]


class AutoShardPolicy(NamedEnum):
    """Policy by which several workers share a dataset; a single worker takes all of it.

    Examples
    --------
    >>> import dvkernels as dv
    >>> [policy.value for policy in dv.AutoShardPolicy]
    ['auto', 'file', 'data', 'off']
    >>> dv.InputOptions(auto_shard_policy="data").auto_shard_policy
    <AutoShardPolicy.DATA: 'data'>
    """

    AUTO = "auto"  # by files where the dataset allows it, else by rows
    FILE = "file"
    DATA = "data"
    OFF = "off"  # every worker reads everything


@dataclass(frozen=True)
class InputOptions:
    """Options of ``distribute_dataset`` and ``distribute_datasets_from_function``.

    Attributes
    ----------
    prefetch : int or None
        How many batches a thread keeps ready; 0 for none. None: as many as the dataset's own
        ``prefetch`` sets, else none.
    auto_shard_policy : AutoShardPolicy or str
        How several workers share the dataset; a single worker takes all of it. ``"data"``: each
        takes its rows of each global batch. ``"file"``: each reads files of its own. ``"auto"``:
        by files where the dataset allows it, its files are sequential and no remainder is dropped,
        else by rows. ``"off"``: each worker reads everything. See
        :class:`~dvkernels.data.distributed.dataset.DistributedDataset`.
    prefetch_to_device : bool
        Copy the parts of batches to the GPUs of their replicas, through page-locked memory, while
        the GPUs still compute; else the parts stay NumPy arrays. CPU replicas need no copy.
    on_error : {"raise", "skip"}
        Policy for an element whose source or transform raises: raise the error with a note that
        names the element, or skip the element; ``iterator.stats()`` counts and lists the skipped
        ones. An error in a sequential source, or in a ``zip`` with a sequential source, is always
        raised, since the elements behind it cannot be determined.
    fingerprint : bool
        Compare the data too: between the workers before the first step, and with those of a loaded
        state that was saved with this option. This detects differing values and orders, which the
        description of a pipeline does not contain. It reads, once per dataset: all bytes of
        ``from_arrays`` (about a second per GB); 4096 elements of ``from_sequence``, spread over
        its length, or all if there are fewer; of each file its size and 16 blocks of 4 KiB; the
        first 256 elements of a sequential source. So a few differing elements in a large dataset
        may be missed. Nothing is read of ``from_live``.
    balance : {"none", "measured"}
        Division of a batch among the local replicas. ``"none"``: as evenly as possible.
        ``"measured"``: in proportion to their measured speed, at least 1 element each where there
        are enough. Elements, order and states stay the same, and so do weighted means, up to
        rounding that differs from run to run. Each worker balances its own replicas; its rows of a
        global batch stay as many. Not for ``distribute_datasets_from_function``.
    pad : bool
        Give all parts one shape, as compiled steps of JAX need it: a batch becomes a pair of the
        batch, its parts filled up with zeros, and of the weights of the rows, float32, 0 for a row
        that was added. Parts become as long as the longest so far.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.InputOptions(prefetch=2).auto_shard_policy.name
    'AUTO'
    """

    prefetch: int | None = None
    auto_shard_policy: AutoShardPolicy | str = AutoShardPolicy.AUTO
    prefetch_to_device: bool = True
    on_error: str = "raise"
    fingerprint: bool = False
    balance: str = "none"
    pad: bool = False

    def __post_init__(self) -> None:
        if self.prefetch is not None:
            check_count("InputOptions", "prefetch", self.prefetch, 0)
        policy = AutoShardPolicy.of(self.auto_shard_policy, DatasetError)
        object.__setattr__(self, "auto_shard_policy", policy)
        check_flag("InputOptions", "prefetch_to_device", self.prefetch_to_device)
        check_flag("InputOptions", "fingerprint", self.fingerprint)
        check_flag("InputOptions", "pad", self.pad)
        _check_choice("on_error", self.on_error, "raise", "skip")
        _check_choice("balance", self.balance, "none", "measured")


def _check_choice(name: str, value: object, first: str, second: str) -> None:
    if not (isinstance(value, str) and value in (first, second)):
        raise DatasetError(
            f"InputOptions: expected {name} to be {first!r} or {second!r}; got {brief(value)}"
        )
