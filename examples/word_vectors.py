"""Word vectors from co-occurrence: a table of rows, sparse Adagrad, and workers out of step.

Two threads; or processes, of which the last one serves the tables:
``python -m dvkernels launch -n 4 --engine local word_vectors.py 1``
"""

import re
import sys
from pathlib import Path

import numpy as np
import sklearn.datasets

import dvkernels as dv

WIDTH, WINDOW, ROUNDS, BATCH = 24, 4, 12, 512

# In a job of processes all but the first one end here, when that has closed the strategy.
how = {"num_servers": int(sys.argv[1])} if sys.argv[1:] else {"num_workers": 2}
several = dv.ParameterServerStrategy(**how)

# The descriptions of the data sets that come with scikit-learn: some thousand words.
folder = Path(sklearn.datasets.__file__).parent / "descr"
text = " ".join(path.read_text("utf-8") for path in sorted(folder.glob("*.rst")))
words = re.findall(r"[a-z]+", text.lower())
known, counts = np.unique(words, return_counts=True)
vocabulary = known[counts >= 3]
number = {word: k for k, word in enumerate(vocabulary)}
ids = np.array([number[word] for word in words if word in number])

# How often two words stand within a window, and the logarithm, which the products of rows predict
# (GloVe: Pennington, Socher, Manning, EMNLP 2014).
pairs: dict[tuple[int, int], float] = {}
for distance in range(1, WINDOW + 1):
    for left, right in zip(ids[:-distance].tolist(), ids[distance:].tolist(), strict=True):
        for pair in ((left, right), (right, left)):
            pairs[pair] = pairs.get(pair, 0.0) + 1 / distance
rows, columns = np.array(list(pairs)).T
seen = np.array(list(pairs.values()))
logarithms, importance = np.log(seen), np.minimum(1, (seen / 20) ** 0.75)


def trained(strategy):
    """Return the mean squared error of all pairs, weighted by their importance."""
    random = np.random.default_rng(0)
    with strategy:
        with strategy.scope():
            tables = [
                dv.Variable(random.normal(size=(len(vocabulary), WIDTH)) / WIDTH) for _ in range(2)
            ]
            offsets = [dv.Variable(np.zeros(len(vocabulary))) for _ in range(2)]
        adagrad = dv.optimizers.Adagrad(0.1)
        coordinator = dv.ClusterCoordinator(strategy)

        def errors(pair, logarithm):
            vectors = [table.gather_rows(own) for table, own in zip(tables, pair, strict=True)]
            shifts = sum(offset.gather_rows(own) for offset, own in zip(offsets, pair, strict=True))
            return vectors, (vectors[0] * vectors[1]).sum(axis=1) + shifts - logarithm

        def step(pair, logarithm, weight):
            vectors, error = errors(pair, logarithm)
            slopes = weight * error
            sparse = [
                ((own, slopes[:, None] * vectors[1 - k]), tables[k]) for k, own in enumerate(pair)
            ]
            sparse += [((own, slopes), offsets[k]) for k, own in enumerate(pair)]
            adagrad.apply_gradients(sparse)

        for _ in range(ROUNDS):
            for chosen in np.array_split(random.permutation(len(seen)), len(seen) // BATCH):
                pair = rows[chosen], columns[chosen]
                coordinator.schedule(step, (pair, logarithms[chosen], importance[chosen]))
            coordinator.join()
        return np.average(errors((rows, columns), logarithms)[1] ** 2, weights=importance)


alone, together = trained(dv.ParameterServerStrategy(num_workers=1)), trained(several)
assert together < 0.3 * np.average(logarithms**2, weights=importance)
assert abs(together - alone) < 0.01
print(f"{len(vocabulary)} words; squared error alone {alone:.3f}, together {together:.3f}")
