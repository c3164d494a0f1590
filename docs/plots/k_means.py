# %%
# The points by their nearest center.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.scatter(*points.T, c=nearest(points, alone), s=4, cmap="viridis")
axes.plot(*alone.T, "k+", markersize=16, label="centers")
axes.legend()
