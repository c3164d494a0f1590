# %%
# The medians of all resamples, and the interval.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.hist(medians, bins=30)
axes.axvspan(low, high, alpha=0.2, label="95 %")
axes.set(xlabel="median of a resample", ylabel="resamples")
axes.legend()
