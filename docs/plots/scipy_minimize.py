# %%
# What the weights that were found predict, beside the targets.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
axes.scatter(targets, np.tanh(features @ found.x), s=2, alpha=0.4)
axes.set(xlabel="target", ylabel="prediction")
