"""Programs of a job's processes: ``python worker_programs.py name args``, started by the tests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pathlib
import signal
import sys
import threading

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.benchmarks import network_calibration
from dvkernels.checkpoint.storage import file_system
from dvkernels.cli import main
from dvkernels.communicators.workers.mpi import network_model
from dvkernels.devices import array_memory
from dvkernels.testing import check_communicator, check_strategy


def make(num_local: int, timeout_seconds: float = 60.0, ops: str = "auto") -> dv.Strategy:
    hosts = next(
        (word for word in sys.argv if "," in word), ""
    )  # such as 2,2: two hosts of two workers
    os.environ["DVKERNELS_HOSTS"] = hosts
    is_simulated = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    devices = ["cuda:0" if is_simulated else f"cpu:{k}" for k in range(num_local)]
    return dv.MultiWorkerMirroredStrategy(
        devices=devices, cross_device_ops=ops, timeout_seconds=timeout_seconds
    )


def rank() -> int:
    return dv.cluster.default_resolver().worker_id


def communicator_laws(num_local: str, over: str, ops: str = "auto") -> None:
    with make(int(num_local), 60.0, ops) as strategy:
        count = strategy.num_replicas_in_sync
        ids = strategy.distribute_values_from_function(lambda c: c.replica_id_in_sync_group)
        placement = ids.owner
        for communicator in (placement.communicator, placement.async_communicator):
            check_communicator(lambda _, c=communicator: c, sizes=[count], local=ids.values)
            every = [np.random.default_rng(r).standard_normal(400_001) for r in range(count)]
            values = [every[r] for r in ids.values]
            found = communicator.all_reduce(values, dv.ReduceOp.SUM)[0]
            np.testing.assert_allclose(found, sum(every))
            bits = placement.workers.exchange(hashlib.sha256(found).hexdigest())
            assert len(set(bits)) == 1, "all workers have the same bits"
            for root in range(count):
                found = communicator.broadcast(values, root)[0]
                np.testing.assert_array_equal(found, every[root])
            uneven = [every[r][: 400_001 // (r + 1)] for r in range(count)]
            found = communicator.all_gather([uneven[r] for r in ids.values], 0)[0]
            np.testing.assert_array_equal(found, np.concatenate(uneven))


def mismatched_nccl(over: str) -> None:
    """NCCL without GPUs, or on one worker only, is an error on all, after which all go on."""
    for ops, text in (
        ("nccl", "on worker 0: cross_device_ops='nccl' needs a GPU of its own"),
        ("auto" if rank() else "nccl", r"workers \[0\] ask for it, and workers \[1\] do not"),
    ):
        with pytest.raises(dv.errors.AlgorithmError, match=text):
            make(1, 60.0, ops)
    end(over)


def mismatched_algorithms(over: str) -> None:
    """Different algorithms or networks are an error on all, after which all go on."""
    ops = "ring" if rank() else "direct"
    algorithms = r"chooses \['exchange', 'ring'\], in rank order"
    with pytest.raises(dv.errors.AlgorithmError, match=algorithms):
        make(1, 60.0, ops)
    for said, text in (
        (
            f"rate=1e{rank()}",
            r"must be the same for all workers, and is \['rate=1e0', 'rate=1e1'\]",
        ),
        ("incast=1.1", "expected settings such as rate=7e9.* got 'incast=1.1'"),
    ):
        os.environ["DVKERNELS_NETWORK"] = said
        with pytest.raises(dv.errors.ClusterError, match=text):
            make(1)
    del os.environ["DVKERNELS_NETWORK"]
    end(over)


def calibrate(over: str) -> None:
    """Calibration measures every algorithm; only the chief prints the variable to set."""
    os.environ["DVKERNELS_HOSTS"] = over
    network_calibration.SIZES = tuple(4 << k for k in (0, 8, 14, 18))
    network_calibration._SECONDS_PER_ROUND = 1e-3
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main.main(["bench", "--calibrate", "--rounds", "1"]) == 0
    lines = said.getvalue().splitlines()
    assert bool(lines) == (rank() == 0)
    if lines:
        name, _, value = lines[-1].partition("=")
        assert network_model.from_environ({name: value}).rate > 0
        table = [line.split() for line in lines[-7:-3]]
        assert [int(row[0]) for row in table] == [*network_calibration.SIZES]
        assert all(
            row[-1] in network_calibration.ALGORITHMS and row.count("us") == 3 for row in table
        )


def end(over: str) -> None:
    """A worker that has aborted votes in no round, however late the others learn of it."""
    from mpi4py import MPI

    with make(1) as strategy:
        workers = strategy.distribute_values_from_function(lambda _: 0).owner.workers
        assert workers.agree([rank(), 7], "of the test", 1) == [[0, 7], [1, 7]]
        with pytest.raises(dv.errors.CollectiveMismatchError, match=r"called of the test\(1\)"):
            workers.agree([], "of the test", rank())
        MPI.COMM_WORLD.Barrier()  # all workers have left that round
        if rank() == 0:
            workers.end(dv.errors.CollectiveTimeoutError("a GPU is late"))
        for call in (workers.barrier, lambda: workers.exchange("wrong")):
            with pytest.raises(dv.errors.CollectiveTimeoutError, match="a GPU is late"):
                call()
        assert workers.has_ended


class OldData:
    """Communicator whose persistent all-gather delivers the data of its first start for ever."""

    def __init__(self, comm):
        self._comm = comm

    def __getattr__(self, name: str):
        return getattr(self._comm, name)

    def Allgather_init(self, own, held):
        self._given, self._is_old = (own, held), False
        return self

    def Start(self):
        if not self._is_old:
            self._comm.Allgather(*self._given)
        self._is_old = True

    def Test(self):
        return True

    def Wait(self):
        pass

    Free = Wait


def broken_persistent_requests(over: str) -> None:
    """An MPI whose persistent operations deliver old data gets a new request each time."""
    from mpi4py import MPI

    from dvkernels.communicators.workers.mpi.mpi_point_to_point import MpiPointToPoint

    for comm, is_set_up in ((MPI.COMM_WORLD, True), (OldData(MPI.COMM_WORLD), False)):
        own, held = np.zeros(3, np.uint8), np.zeros((2, 3), np.uint8)
        gather = MpiPointToPoint(comm).all_gather(own, held)
        assert isinstance(gather, MPI.Request) == is_set_up
        for number in range(3):
            own[:] = 10 * number + rank()
            gather.Start()
            while not gather.Test():
                pass
            assert held.tolist() == [[10 * number] * 3, [10 * number + 1] * 3]


def large(over: str, num_bytes: str, ops: str = "auto") -> None:
    """More elements than 32 bits count, in place, and the same bits everywhere."""
    with make(1, 60.0, ops) as strategy:
        size = int(num_bytes)
        own = np.full(size, rank() + 1, np.uint8)
        own[-1] = 7 * rank()

        def step():
            dv.get_replica_context().all_reduce("sum", own, out=own)

        strategy.run(step)
        count = strategy.num_replicas_in_sync
        assert own[:-1].min() == own[:-1].max() == sum(range(1, count + 1))
        assert own[-1] == 7 * sum(range(count))


def own_memory(num_local: str, over: str) -> None:
    """Arrays of ``empty`` reduce like others, also slices of them, and after others are freed."""
    with make(int(num_local)) as strategy:
        ids = strategy.distribute_values_from_function(lambda c: c.replica_id_in_sync_group)
        count = strategy.num_replicas_in_sync
        for length in (3, 70_000, 300_001):
            for dtype in (np.float64, np.float32, np.int16):
                gradients = [strategy.empty(length, dtype) for _ in range(3)]
                every = [
                    [np.random.default_rng([r, k]).integers(-9, 9, length) for r in range(count)]
                    for k in range(3)
                ]

                def step(replica, held, every=every):
                    here = dv.get_replica_context()
                    for array, values in zip(held, every, strict=True):
                        array[:] = values[replica]
                    assert here.all_reduce("sum", held, out=held) is held
                    return here.all_reduce("max", held[0][1:-1], out=held[0][1:-1])

                middles = strategy.run(step, args=(ids, gradients))
                for k, array in enumerate(gradients):
                    for one in array.values:
                        np.testing.assert_array_equal(one, sum(every[k]))
                for one in middles.values:
                    np.testing.assert_array_equal(one, sum(every[0])[1:-1])


def strategy_laws(num_local: str, over: str) -> None:
    count = dv.cluster.default_resolver().num_workers * int(num_local)
    check_strategy(lambda _: make(int(num_local)), replicas=[count])


def train(num_local: str, over: str, path: str, ops: str = "auto") -> None:
    """Train on uneven data; the first worker saves the weights and the elements seen."""
    with make(int(num_local), 60.0, ops) as strategy:
        weights, seen = trained(strategy)
        if rank() == 0:
            np.savez(path, seen=seen, **weights)


def trained(strategy: dv.Strategy):
    """Return the weights after some epochs, and the elements in order."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((53, 6))
    targets = np.tanh(inputs @ rng.standard_normal((6, 2)))
    data = dv.Dataset.from_arrays((np.arange(53), inputs, targets)).shuffle(seed=1).batch(10)
    with strategy.scope():
        weight = dv.Variable(rng.standard_normal((6, 2)) + rank())  # initialized from worker 0's
        bias = dv.Variable(np.zeros(2))
        loss = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
        adam = dv.optimizers.Adam(0.05)

    def step(batch):
        numbers, x, y = batch
        here = dv.get_replica_context()
        error = np.tanh(x @ weight + bias) - y
        slope = 2 * error * (1 - np.tanh(x @ weight + bias) ** 2)
        share = max(1, len(x))
        gradients = {"weight": x.T @ slope / share, "bias": slope.sum(0) / share}
        mean = here.all_reduce("mean", gradients["bias"], weight=len(x))
        adam.apply_gradients([(mean, bias), (None, weight)])
        adam.apply_gradients([(None, bias), (gradients["weight"], weight)], weight=len(x))
        loss.assign_add(float((error**2).sum()))
        return numbers

    seen = []
    distributed = strategy.distribute_dataset(data)
    for _ in range(3):
        for batch in distributed:
            seen += strategy.gather(strategy.run(step, (batch,))).tolist()
    return {"weight": weight.numpy(), "bias": bias.numpy(), "loss": loss.numpy()}, seen


def go_on(num_local: str, over: str, folder: str, until: str) -> None:
    """Resume from the newest checkpoint, and save each step; the chief writes the result."""
    strategy = make(int(num_local)) if over != "alone" else dv.OneDeviceStrategy("cpu:0")
    with strategy:
        inputs = np.random.default_rng(2).standard_normal((53, 4))
        data = dv.Dataset.from_arrays((inputs, inputs @ np.ones(4))).shuffle(seed=3)
        batches = iter(strategy.distribute_dataset(data.repeat(5).batch(10)))
        with strategy.scope():
            weight = dv.Variable(np.zeros(4), name="weight")
            seen = dv.Variable(0, synchronization="on_read", aggregation="sum")
            own = dv.Variable(0.0, synchronization="none")
        adam, rng = dv.optimizers.Adam(0.05), np.random.default_rng(5)

        def step(batch, noise):
            x, y = batch
            gradient = x.T @ (x @ weight - y + noise) / max(1, len(x))
            gradient = dv.get_replica_context().all_reduce("mean", gradient, weight=len(x))
            adam.apply_gradients([(gradient, weight)])
            seen.assign_add(len(x))
            own.assign_add(1.0)

        done = {"steps": 0}
        checkpoint = dv.Checkpoint(
            weight=weight, seen=seen, own=own, adam=adam, batches=batches, done=done, rng=rng
        )
        with dv.CheckpointManager(checkpoint, folder, max_to_keep=2) as manager:
            manager.restore_latest()
            while done["steps"] < int(until):
                strategy.run(step, (next(batches), rng.normal()))
                done["steps"] += 1
                manager.save(done["steps"], background=done["steps"] % 2 == 0)
        assert {float(copy) for copy in own.values} == {float(until)}
        found = np.append(weight.numpy(), float(seen))
        if rank() == 0:
            np.save(f"{folder}/found.npy", found)


def random_draws(num_local: str, over: str, folder: str) -> None:
    """Draw, save after the first step, and draw after a resume; the chief writes all numbers."""
    data = dv.Dataset.range(20).random_map(lambda x, rng: rng.integers(2**62), seed=1)

    def draw(rows):
        replica = dv.get_replica_context()
        return replica.all_gather((rows, replica.rng("a").integers(2**62)))

    drawn = {"rows": [], "own": []}
    with make(int(num_local)) as strategy, make(int(num_local)) as resumed:
        for each in (strategy, resumed):
            with iter(each.distribute_dataset(data.batch(6))) as batches:
                for batch in batches:
                    rows, own = each.local_results(each.run(draw, (batch,)))[0]
                    drawn["rows"].append(rows.tolist())
                    drawn["own"].append(own.tolist())
                    if len(drawn["own"]) == 1:
                        dv.Checkpoint(strategy=strategy).save(f"{folder}/one")
            dv.Checkpoint(strategy=resumed).restore(f"{folder}/one")
    if rank() == 0:
        pathlib.Path(folder, "drawn.json").write_text(json.dumps(drawn))


class HarmfulFiles:
    """Failure of this worker at the n-th file operation that changes something."""

    _harmless = ("names", "kind", "is_same", "open", "size", "open_folder", "enter")

    def __init__(self, harm: str, number: int) -> None:
        self._harm, self._left = harm, itertools.count(number, -1)

    def __getattr__(self, name: str):
        if name not in self._harmless and next(self._left) == 0:
            if self._harm == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self._harm])
        return getattr(file_system.FileSystem(), name)


def save_in_harm(
    over: str, harm: str, victim: str, number: str, timeout_seconds: str, folder: str
) -> None:
    """Save again and again until a worker comes to harm; write what was told, and how far all is.

    With ``harm`` none: look, go on from there, and save once.
    """
    with make(1, float(timeout_seconds)) as strategy:
        with strategy.scope():
            weight = dv.Variable(np.zeros(70_000))
            own = dv.Variable(np.zeros(3), synchronization="none")
            total = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
        data = {"number": 0}
        checkpoint = dv.Checkpoint(weight=weight, own=own, total=total, data=data)
        manager = dv.CheckpointManager(checkpoint, folder, max_to_keep=2)
        manager.restore_latest()
        assert set(weight.numpy()) == {data["number"]} == {float(total)}
        assert {float(x) for copy in own.values for x in copy} == {data["number"]}
        if rank() == 0:
            pathlib.Path(folder, "found").write_text(str(data["number"]))
        if harm != "none" and rank() == int(victim):
            file_system.active = HarmfulFiles(harm, int(number))
        try:
            for number_saved in range(data["number"] + 1, 50):
                for variable in (weight, own, total):
                    variable.assign(np.full(variable.shape, float(number_saved)))
                data["number"] = number_saved
                manager.save(number_saved)
                if rank() == 0:
                    pathlib.Path(folder, "saved").write_text(str(number_saved))
                if harm == "none":
                    return
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            pathlib.Path(folder, f"told_{rank()}").write_text(text)
            raise


def variables(num_local: str, over: str) -> None:
    """Writes of every kind leave all workers alike, and follow replica 0 where it decides."""
    with make(int(num_local)) as strategy:
        count, mine = strategy.num_replicas_in_sync, float(rank())
        with strategy.scope():
            first = dv.Variable(10.0 + mine, aggregation="only_first_replica")
            table = dv.Variable(np.zeros(count), aggregation="sum")
            mean = dv.Variable(np.zeros(count), aggregation="mean")
            halves = dv.Variable(np.zeros((2, count), np.float16), aggregation="mean")
            total = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
            own = dv.Variable(0.0, synchronization="none")
        assert float(first) == 10.0, "the initial value is the chief's"
        first.assign(20.0 + mine)
        assert float(first) == 20.0, "a write across replicas is the chief's"

        def write():
            here = dv.get_replica_context().replica_id_in_sync_group
            first.assign(float(here))
            updates = np.full(here + 1, 1.0)  # replica r adds r + 1 times to row r
            table.scatter_add([here] * (here + 1), updates)
            mean.scatter_add([here] * (here + 1), updates)
            halves.scatter_sub([1] * here, np.full((here, count), 0.1, np.float16))
            own.assign(float(here))

        strategy.run(write)
        assert float(first) == 0.0, "ONLY_FIRST_REPLICA is global replica 0"
        np.testing.assert_array_equal(table, np.arange(1.0, count + 1))
        np.testing.assert_allclose(mean, np.arange(1.0, count + 1) / count)
        part = np.float32(np.float16(0.1)) / np.float32(count)  # rounded once, at the end
        summed = np.add.accumulate([np.float32(0)] + [-part] * (count * (count - 1) // 2))[-1]
        np.testing.assert_array_equal(halves, [[0] * count, [np.float16(summed)] * count])
        total.assign(6.0)
        assert float(total) == 6.0, "ON_READ, SUM: the copies of all workers hold the total"
        np.testing.assert_allclose([float(v) for v in total.values], 6.0 / count)
        own.assign(5.0 + mine)
        assert {float(v) for v in own.values} == {5.0}, "NONE: every copy gets the chief's value"
        if len(strategy.worker_devices) < count:
            outside = (own.first_replica + len(strategy.worker_devices)) % count
            with pytest.raises(IndexError, match=f"replica {outside} is one of worker"):
                own.on(outside)
        together = strategy.gather(strategy.run(lambda: table.read_value().copy()))
        together = array_memory.holding(together).to_host(together)
        assert (together.reshape(count, -1) == np.asarray(table)).all(), "all copies are equal"
        if strategy.worker_devices[0].kind == "cpu":
            named = strategy.distribute_values_from_function(
                lambda c: np.array(["replica " + "x" * c.replica_id_in_sync_group])
            )
            inside = strategy.run(lambda own: dv.get_replica_context().all_gather(own), (named,))
            for found in (strategy.gather(named), *inside.values):
                assert found.tolist() == ["replica " + "x" * r for r in range(count)]


def drift(over: str) -> None:
    """In debug mode a variable that drifts apart on one worker is an error on all."""
    with dv.debug(), make(1) as strategy:
        with strategy.scope():
            weight = dv.Variable(np.zeros(3), name="weight")
        strategy.run(lambda: None)
        strategy.update(weight, lambda copy: _add_apart(copy, rank() + 1.0))
        with pytest.raises(dv.errors.DriftError, match=r"worker 1 holds .* \['weight'\]"):
            strategy.run(lambda: None)


def _add_apart(copy, value: float) -> None:
    copy.assign_add(np.full(3, value))


def endure(
    over: str,
    harm: str,
    victim: str,
    seed: str,
    timeout_seconds: str,
    folder: str,
    ops: str = "auto",
) -> None:
    """Reduce until the victim fails, and write the error of this worker."""
    rng = np.random.default_rng(int(seed))  # the same on all workers
    step_of_harm, seconds = int(rng.integers(1, 60)), float(rng.uniform(0.0, 0.4))
    sizes = rng.choice([1, 100, 10_000, 300_000], 1000)
    is_victim = rank() == int(victim)
    with make(1, float(timeout_seconds), ops) as strategy:
        with strategy.scope():
            total = dv.Variable(0.0, aggregation="sum")
        held = strategy.empty(200_000)

        def step(number, own):
            here = dv.get_replica_context()
            if is_victim and number == step_of_harm and harm == "raise":
                raise RuntimeError("of the victim")
            if is_victim and number == step_of_harm and harm == "mismatch":
                here.all_gather(np.ones(3))
            pending = here.all_reduce_async("max", np.full(5, 1.0))
            here.all_reduce("sum", np.ones(sizes[number], np.float32))
            here.all_reduce("max", own, out=own)
            total.assign_add(1.0)
            return pending.wait()

        strategy.run(step, (0, held))
        if is_victim and harm in ("kill", "stop"):
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[harm]
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        try:
            for number in itertools.count(1):
                if is_victim and number == step_of_harm and harm == "exit":
                    return
                strategy.gather(strategy.run(step, (number % len(sizes), held)))
        except Exception as error:
            who = "victim" if is_victim else "survivor"
            pathlib.Path(folder, f"{who}_{rank()}").write_text(f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print(f"done: {rank()}", flush=True)
