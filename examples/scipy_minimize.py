"""scipy.optimize.minimize over a data-parallel objective with its gradient.

SciPy sees an ordinary function; each call of it is one step of all replicas.
"""

import numpy as np
from scipy import optimize

import dvkernels as dv

rng = np.random.default_rng(0)
features = rng.standard_normal((5001, 10))
truth = rng.standard_normal(10)
targets = np.tanh(features @ truth) + 0.01 * rng.standard_normal(5001)


def squares(weights, x, y):
    """Return the sum of squared errors and its gradient."""
    guess = np.tanh(x @ weights)
    error = guess - y
    return error @ error, 2 * x.T @ (error * (1 - guess**2))


with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    dataset = dv.Dataset.from_arrays((features, targets)).batch(len(targets))
    (part,) = strategy.distribute_dataset(dataset)  # each replica has one half

    def objective(weights):
        sums = strategy.run(squares, args=(weights, *part))
        value, gradient = strategy.reduce("sum", sums)  # a pytree: the sums of both
        return float(value), gradient

    start = np.zeros(10)
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B")

alone = optimize.minimize(squares, start, (features, targets), jac=True, method="L-BFGS-B")
assert found.success
np.testing.assert_allclose(found.x, alone.x, rtol=1e-4)
np.testing.assert_allclose(found.x, truth, atol=0.01)
print(f"{found.nfev} evaluations on two replicas, {alone.nfev} on one; error {found.fun:.4f}")
