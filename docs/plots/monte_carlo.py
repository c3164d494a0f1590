# %%
# Both estimates with three standard errors.
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
errors = [3 * error_of_one, 3 * error_of_two]
axes.errorbar([one, two], ["1 replica", "2 replicas"], xerr=errors, fmt="o", capsize=4)
axes.axvline(math.pi, linestyle="--", label="pi")
axes.margins(y=0.5)
axes.legend()
