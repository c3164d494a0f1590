"""Stochastic gradient descent, plain or with momentum."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels import html_table
from dvkernels.kernels import update_rules
from dvkernels.optimizers.optimizer import Columns, LearningRate, Optimizer
from dvkernels.user_errors import brief
from dvkernels.values.scalar_checks import within

__all__ = ["SGD"]


class SGD(Optimizer):
    """Stochastic gradient descent: ``v = momentum v + g``, ``p = p - learning_rate v``.

    Parameters
    ----------
    learning_rate : float, or callable
        A callable takes the number of steps that a variable has taken, and returns the rate of
        its next step.
    momentum : float
        In [0, 1); 0 keeps no velocity.
    nesterov : bool
        Nesterov momentum: ``g + momentum v`` instead of ``v``; requires momentum.
    weight_decay : float
        L2 penalty: ``weight_decay`` times the parameter is added to the gradient.

    Raises
    ------
    ValueError
        A setting out of range.

    Examples
    --------
    >>> import dvkernels as dv
    >>> weight = dv.Variable([1.0, 2.0])
    >>> dv.optimizers.SGD(0.1).apply_gradients([([10.0, 10.0], weight)])
    >>> weight.numpy()
    array([0., 1.])
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate)
        self.momentum = within(momentum, "momentum", 0, 1)
        if not isinstance(nesterov, bool):
            raise TypeError(f"nesterov is True or False; got {brief(nesterov)}")
        self.nesterov = nesterov
        self.weight_decay = within(weight_decay, "weight_decay", 0)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; got momentum=0")

    __repr__, _repr_html_ = html_table.settings(
        "learning_rate", "momentum", "nesterov", "weight_decay"
    )

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Name of the velocity; empty without momentum."""
        return ("velocity",) if self.momentum else ()

    def _rule(self, parameters: Columns, steps: Sequence[int]) -> update_rules.Rule:
        return update_rules.sgd_rule(bool(self.momentum), self.nesterov), (
            update_rules.sgd_coefficients(
                parameters, self._rates(steps), self.momentum, self.weight_decay
            )
        )
