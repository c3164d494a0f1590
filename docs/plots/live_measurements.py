# %%
# All measurements, their mean, and one standard deviation around it.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.hist(measured, bins=40)
axes.axvline(mean, color="black")
axes.axvspan(mean - spread, mean + spread, alpha=0.2)
axes.set(xlabel="value", ylabel="measurements")
