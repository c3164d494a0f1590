"""Worker that all-reduces in place by PyTorch, a process per rank: Gloo over loopback, or NCCL."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import protocol
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def synchronize(device):
    """Wait for the work of a GPU; on the CPU, collectives are synchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(rank, size, backend, port, commands, results):
    """Run one rank, which gets its commands through a queue: waiting uses no core."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=size)
    checked = {}  # tensors and wrong elements of the current count and dtype
    while (command := commands.get()) is not None:
        count, dtype, iterations = command["count"], command["dtype"], command["iterations"]
        if (count, dtype) not in checked:
            every = protocol.inputs(count, size, dtype)
            tensor = torch.from_numpy(every[rank].copy()).to(device)
            dist.all_reduce(tensor)
            wrong = int((tensor.cpu().numpy() != np.sum(every, axis=0, dtype=dtype)).sum())
            steady = torch.from_numpy(protocol.steady(count, size, dtype)[rank]).to(device)
            checked = {(count, dtype): (tensor, steady, wrong)}
        tensor, steady, wrong = checked[count, dtype]
        elapsed = 0.0
        for portion in protocol.portions(iterations, size):
            tensor.copy_(steady)
            dist.all_reduce(tensor)
            dist.barrier()
            synchronize(device)
            started = time.perf_counter()
            for _ in range(portion):
                dist.all_reduce(tensor)
            synchronize(device)
            elapsed += time.perf_counter() - started
        results.put((elapsed / iterations, wrong))
    dist.destroy_process_group()


if __name__ == "__main__":
    size, backend, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    answer = protocol.claim_stdout()
    context = mp.get_context("spawn")
    queues = [context.Queue() for _ in range(size)]
    results = context.Queue()
    ranks = [
        context.Process(
            target=run, args=(rank, size, backend, port, queues[rank], results), daemon=True
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for command in protocol.commands():
        for queue in queues:
            queue.put(command)
        found = [results.get(timeout=120) for _ in range(size)]
        seconds, wrong = (column for column in zip(*found, strict=True))
        answer(seconds=max(seconds), wrong=sum(wrong), note="in place")
    for queue in queues:
        queue.put(None)
    for process in ranks:
        process.join(10)
