"""A PyTorch module trained by two replicas: their gradients are all-reduced in place.

The result is that of one process: the mean over uneven batches is weighted by their rows.
"""

import copy

import torch

import dvkernels as dv

NUM_REPLICAS, STEPS = 2, 20

torch.set_num_threads(1)  # each replica computes on a thread of its own
torch.manual_seed(0)
inputs = torch.randn(37, 8, dtype=torch.float64)
targets = torch.sin(inputs.sum(axis=1, keepdims=True))
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
model = model.double()

# A module of its own for each replica: autograd writes into the parameters' .grad.
replicas = [copy.deepcopy(model) for _ in range(NUM_REPLICAS)]
optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in replicas]


def step(rows):
    context = dv.get_replica_context()
    module = replicas[context.replica_id_in_sync_group]
    optimizer = optimizers[context.replica_id_in_sync_group]
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(module(inputs[rows]), targets[rows])
    loss.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    context.all_reduce("mean", gradients, weight=len(rows), out=gradients)
    optimizer.step()
    return loss.item()


with dv.MirroredStrategy([f"cpu:{k}" for k in range(NUM_REPLICAS)]) as strategy:
    dataset = dv.Dataset.range(37).batch(37)  # 19 rows for one replica, 18 for the other
    distributed = strategy.distribute_dataset(dataset)
    for _ in range(STEPS):
        for rows in distributed:
            losses = strategy.run(step, args=(rows,))

# The same in one process, without dvkernels.
alone = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(STEPS):
    alone.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    alone.step()

for expected, first, second in zip(*(m.parameters() for m in (model, *replicas)), strict=True):
    assert torch.equal(first, second), "the replicas have the same bits"
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
print(f"loss after {STEPS} steps: {loss.item():.4f}; replicas saw {losses.values}")
print("two replicas have the parameters of one process")
