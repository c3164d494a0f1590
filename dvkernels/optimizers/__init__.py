"""Recipes over the fused kernels: gradients reduced and variables updated in one pass."""

from dvkernels.optimizers.adam import Adam as Adam
from dvkernels.optimizers.adam import AdamW as AdamW
from dvkernels.optimizers.clipping import clip_by_global_norm as clip_by_global_norm
from dvkernels.optimizers.optimizer import Optimizer as Optimizer
from dvkernels.optimizers.sgd import SGD as SGD
