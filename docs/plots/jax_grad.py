# %%
# The probability that the weights give to rows of either label.
import matplotlib.pyplot as plt

odds = jax.nn.sigmoid(features @ expected["slope"] + expected["offset"])
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.hist([odds[labels == 0], odds[labels == 1]], bins=25, stacked=True, label=["0", "1"])
axes.set(xlabel="probability of label 1", ylabel="rows")
axes.legend(title="label")
