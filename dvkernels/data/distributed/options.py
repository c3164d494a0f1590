"""How a dataset is distributed and fetched."""

from __future__ import annotations

from dataclasses import dataclass

from dvkernels.data.checks import check_count, check_flag
from dvkernels.enumeration import NamedEnum
from dvkernels.errors import DatasetError
from dvkernels.user_errors import shown

__all__ = ["AutoShardPolicy", "InputOptions"]


class AutoShardPolicy(NamedEnum):
    """How several workers share a dataset; one worker takes all of it."""

    AUTO = "auto"  # by files where there are enough of them, else by elements
    FILE = "file"
    DATA = "data"
    OFF = "off"  # every worker reads everything


@dataclass(frozen=True)
class InputOptions:
    """Options of ``distribute_dataset`` and ``distribute_datasets_from_function``.

    Attributes
    ----------
    prefetch : int or None
        How many batches a thread holds ready; 0 for none. None: what the dataset's own
        ``prefetch`` says, else none.
    auto_shard_policy : AutoShardPolicy or str
        How several workers share the dataset; one worker takes all of it. ``"data"``: each takes
        its rows of each global batch. ``"file"``: each reads files of its own. ``"auto"``: by
        files where the dataset allows it, its files are sequential and no remainder is dropped,
        else by rows. ``"off"``: each worker reads everything. See
        :class:`dvkernels.data.distributed.dataset.DistributedDataset`.
    prefetch_to_device : bool
        Copy the parts of batches to the GPUs of their replicas, through page-locked memory, while
        these still compute; else they stay arrays of NumPy. Those of CPU replicas are there by
        themselves.
    on_error : {"raise", "skip"}
        What to do with an element whose source or transform raises: raise, with a note that
        names it, or leave it out and go on; ``iterator.stats()`` counts and lists those. What
        fails in a source that can only be gone through in order, or on a side of a ``zip`` with
        one, is raised in any case: nobody can tell what would come behind it.
    fingerprint : bool
        Compare the data too: between the workers before the first step, and with those of a state
        that is loaded, if it was saved with this option. Found are other values and another order,
        of which pipelines know nothing. It reads, once per dataset: all bytes of ``from_arrays``
        (about a second per GB); 4096 elements of ``from_sequence``, spread over its length, or all
        if there are no more; of each file its size and 16 blocks of 4 KiB; the first 256 elements
        of what can only be gone through in order. So a few single elements that differ in much
        data may be missed. Nothing is read of ``from_live``.

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

    def __post_init__(self) -> None:
        if self.prefetch is not None:
            check_count("InputOptions", "prefetch", self.prefetch, 0)
        policy = AutoShardPolicy.of(self.auto_shard_policy, DatasetError)
        object.__setattr__(self, "auto_shard_policy", policy)
        check_flag("InputOptions", "prefetch_to_device", self.prefetch_to_device)
        check_flag("InputOptions", "fingerprint", self.fingerprint)
        if self.on_error not in ("raise", "skip"):
            raise DatasetError(
                "InputOptions: expected on_error to be 'raise' or 'skip'; got "
                f"{shown(self.on_error)}"
            )
