"""A table larger than memory: Parquet row groups are read when their rows are needed.

The state of the source is two integers. A resumed iterator, here on three replicas instead of two,
starts at the row group of its position and reads none before.
"""

import json
import os
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import dvkernels as dv

ROWS, ROWS_PER_GROUP, BATCH = 1000, 128, 50


class ParquetSource:
    def __init__(self, path):
        self.path = path
        self.num_groups_read = 0

    def open(self, epoch, state):
        return ParquetReader(self, *(state or [0, 0]))


class ParquetReader:
    """Iterator over the rows as dicts; its position is a row group and a row in it."""

    def __init__(self, source, group, row):
        self.source, self.group, self.row = source, group, row
        self.file = pq.ParquetFile(source.path)
        self.columns = None

    def __next__(self):
        while self.columns is None or self.row == len(self.columns["x"]):
            if self.columns is not None:
                self.group, self.row, self.columns = self.group + 1, 0, None
            if self.group == self.file.num_row_groups:
                raise StopIteration
            table = self.file.read_row_group(self.group)
            self.columns = {name: table[name].to_numpy() for name in table.column_names}
            self.source.num_groups_read += 1
        self.row += 1
        return {name: column[self.row - 1] for name, column in self.columns.items()}

    def state(self):
        return [self.group, self.row]

    def close(self):
        self.file.close()


with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "table.parquet")
    x = np.arange(ROWS, dtype=np.float64)
    pq.write_table(pa.table({"x": x, "y": 2 * x}), path, row_group_size=ROWS_PER_GROUP)
    source = ParquetSource(path)
    dataset = dv.Dataset.from_source(source).shuffle(seed=0, window=100).batch(BATCH)

    def rows(batch):
        return [value for part in batch["x"].values for value in part.tolist()]

    strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
    with strategy, iter(strategy.distribute_dataset(dataset)) as batches:
        seen = [value for _ in range(16) for value in rows(next(batches))]
        saved = json.dumps(batches.state_dict())

    source.num_groups_read = 0
    strategy = dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:2"])
    with strategy, iter(strategy.distribute_dataset(dataset)) as batches:
        batches.load_state_dict(json.loads(saved))
        rest = [value for batch in batches for value in rows(batch)]

assert sorted(seen + rest) == x.tolist()
assert source.num_groups_read <= 3  # of 8; a window reaches back 100 rows
print(f"{len(seen)} rows, then {len(rest)} more out of {source.num_groups_read} of 8 row groups")
