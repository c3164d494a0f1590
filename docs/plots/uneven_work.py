# %%
# The third replica takes eight times as long for a job.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
axes.barh([f"replica {k}" for k in range(3)], done.values)
axes.invert_yaxis()
axes.set(xlabel="jobs done")
