# %%
# What the module predicts, beside the targets.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
axes.scatter(targets, model(inputs).detach())
axes.set(xlabel="target", ylabel="prediction")
