"""Worker that reads batches by PyTorch's DataLoader, in one process or with two workers."""

from __future__ import annotations

import itertools
import time

import input_data
import protocol
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Decoding(Dataset):
    """Map-style data set of blobs, decoded on access."""

    def __init__(self):
        self.blobs = input_data.Blobs()

    def __len__(self):
        return len(self.blobs)

    def __getitem__(self, index):
        return torch.from_numpy(input_data.decoded(self.blobs[index]).copy())


def loader(case, folder):
    """Return the loader of a case."""
    if case.startswith("decode"):
        count = 2 if case.endswith("2") else 0
        return DataLoader(
            Decoding(),
            batch_size=input_data.BATCH,
            shuffle=True,
            num_workers=count,
            persistent_workers=count > 0,
        )
    features, labels = input_data.labelled(case, folder)
    if case == "arrays":
        data = TensorDataset(torch.from_numpy(features), torch.from_numpy(labels))
    else:
        data = input_data.Rows(features, labels)
    return DataLoader(data, batch_size=input_data.BATCH, shuffle=True)


if __name__ == "__main__":
    answer = protocol.claim_stdout()
    loaders: dict = {}  # of the current case
    for command in protocol.commands():
        case, count = command["case"], command["batches"]
        if case not in loaders:
            loaders = {case: loader(case, command["folder"])}
        batches = iter(loaders[case])
        seen = [next(batches)]
        started = time.perf_counter()
        seen += itertools.islice(batches, count)
        seconds = (time.perf_counter() - started) / count
        labels = torch.cat([b[:, 0] if case.startswith("decode") else b[1] for b in seen])
        answer(seconds=seconds, wrong=len(labels) - len(set(labels.tolist())), note="")
