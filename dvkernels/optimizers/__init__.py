"""Optimizers: recipes over fused kernels, which reduce gradients and update variables in one pass.

Imports: communicators, context, devices, errors, html_table, kernels, profiler, pytree, reduce_op,
replicas, user_errors, values, variables, verbs.
"""

from dvkernels.optimizers.adagrad import Adagrad as Adagrad
from dvkernels.optimizers.adam import Adam as Adam
from dvkernels.optimizers.adam import AdamW as AdamW
from dvkernels.optimizers.clipping import clip_by_global_norm as clip_by_global_norm
from dvkernels.optimizers.optimizer import Optimizer as Optimizer
from dvkernels.optimizers.sgd import SGD as SGD
