"""Adagrad: steps scaled by the squares of all gradients so far."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels import html_table
from dvkernels.kernels import update_rules
from dvkernels.optimizers.optimizer import Columns, LearningRate, Optimizer
from dvkernels.values.scalar_checks import within

__all__ = ["Adagrad"]


class Adagrad(Optimizer):
    """Adagrad: ``s = s + g * g``, ``p = p - learning_rate g / (sqrt(s) + epsilon)`` [1]_.

    Parameters
    ----------
    learning_rate : float, or callable
        A callable takes the number of steps that a variable has taken, and returns the rate of
        its next step.
    epsilon : float
        Added to the square root of the sum of squares.
    weight_decay : float
        L2 penalty: ``weight_decay`` times the parameter is added to the gradient.

    Raises
    ------
    ValueError
        A setting out of range.

    Notes
    -----
    Rows that seldom have a gradient take large steps when they have one, which suits tables of
    rows: words, users, items.

    References
    ----------
    .. [1] J. Duchi, E. Hazan, Y. Singer, J. Mach. Learn. Res. 12, 2121-2159 (2011).

    Examples
    --------
    >>> import dvkernels as dv
    >>> weight = dv.Variable([1.0, 2.0])
    >>> dv.optimizers.Adagrad(0.5).apply_gradients([([10.0, -0.1], weight)])
    >>> weight.numpy().round(6)
    array([0.5, 2.5])
    """

    def __init__(
        self, learning_rate: LearningRate = 1e-2, epsilon: float = 1e-10, weight_decay: float = 0.0
    ) -> None:
        super().__init__(learning_rate)
        self.epsilon = within(epsilon, "epsilon", 0)
        self.weight_decay = within(weight_decay, "weight_decay", 0)

    __repr__, _repr_html_ = html_table.settings("learning_rate", "epsilon", "weight_decay")

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Name of the sum of squares."""
        return ("sum_of_squares",)

    def _rule(self, parameters: Columns, steps: Sequence[int]) -> update_rules.Rule:
        rates = self._rates(steps)
        return update_rules.ADAGRAD, [(rate, self.epsilon, self.weight_decay) for rate in rates]
