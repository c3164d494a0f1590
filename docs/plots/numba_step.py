# %%
# The score that the weights give to rows of either label.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
scores = features @ together
axes.hist([scores[labels == 0], scores[labels == 1]], bins=60, stacked=True, label=["0", "1"])
axes.set(xlabel="score", ylabel="rows")
axes.legend(title="label")
