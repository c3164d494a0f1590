# %%
# The weights that were found, beside those of the data.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.bar(np.arange(6) - 0.2, truth, 0.4, label="data")
axes.bar(np.arange(6) + 0.2, weights.values[0], 0.4, label="found")
axes.set(xlabel="weight")
axes.legend()
