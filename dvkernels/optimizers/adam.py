"""Adam, and AdamW with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels import html_table
from dvkernels.kernels import update_rules
from dvkernels.optimizers.optimizer import Columns, LearningRate, Optimizer
from dvkernels.values.scalar_checks import within

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """Adam: steps scaled by running means of the gradient and of its square [1]_.

    Parameters
    ----------
    learning_rate : float, or callable
        A callable takes the number of steps that a variable has taken, and returns the rate of
        its next step.
    beta_1, beta_2 : float
        Decay rates of the first and second moment, in [0, 1).
    epsilon : float
        Added to the square root of the second moment.
    weight_decay : float
        L2 penalty: ``weight_decay`` times the parameter is added to the gradient.

    Raises
    ------
    ValueError
        A setting out of range.

    References
    ----------
    .. [1] D. P. Kingma, J. Ba, ICLR 2015, doi:10.48550/arXiv.1412.6980.

    Examples
    --------
    >>> import dvkernels as dv
    >>> weight = dv.Variable([1.0, 2.0])
    >>> dv.optimizers.Adam(0.25).apply_gradients([([10.0, -10.0], weight)])
    >>> weight.numpy().round(6)
    array([0.75, 2.25])
    """

    _is_decoupled = False

    def __init__(
        self,
        learning_rate: LearningRate = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate)
        self.beta_1 = within(beta_1, "beta_1", 0, 1)
        self.beta_2 = within(beta_2, "beta_2", 0, 1)
        self.epsilon = within(epsilon, "epsilon", 0)
        self.weight_decay = within(weight_decay, "weight_decay", 0)

    __repr__, _repr_html_ = html_table.settings(
        "learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay"
    )

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Names of the two running means."""
        return ("first_moment", "second_moment")

    def _rule(self, parameters: Columns, steps: Sequence[int]) -> update_rules.Rule:
        return update_rules.ADAM, update_rules.adam_coefficients(
            parameters,
            [count + 1 for count in steps],
            self._rates(steps),
            self.beta_1,
            self.beta_2,
            self.epsilon,
            self.weight_decay,
            self._is_decoupled,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay, which does not pass through the moments [1]_.

    Parameters
    ----------
    learning_rate, beta_1, beta_2, epsilon
        As in :class:`Adam`.
    weight_decay : float
        ``learning_rate * weight_decay`` times the parameter is subtracted from the parameter.

    Raises
    ------
    ValueError
        A setting out of range.

    References
    ----------
    .. [1] I. Loshchilov, F. Hutter, ICLR 2019, doi:10.48550/arXiv.1711.05101.

    Examples
    --------
    >>> import dvkernels as dv
    >>> weight = dv.Variable([1.0, 2.0])
    >>> dv.optimizers.AdamW(0.5, weight_decay=0.5).apply_gradients([([0.0, 0.0], weight)])
    >>> weight.numpy()
    array([0.75, 1.5 ])
    """

    _is_decoupled = True

    def __init__(
        self,
        learning_rate: LearningRate = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay)
