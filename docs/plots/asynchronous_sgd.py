# %%
# Digits that were not seen, and what the network trained in step takes them for.
import matplotlib.pyplot as plt

w1, b1, w2, b2 = weights
guesses = (np.maximum(unseen @ w1 + b1, 0) @ w2 + b2).argmax(axis=1)
figure, rows = plt.subplots(2, 8, figsize=(7, 2.4), layout="constrained")
for axes, picture, guess in zip(rows.flat, unseen, guesses, strict=False):
    axes.imshow(picture.reshape(8, 8), cmap="gray_r")
    axes.set_title(guess)
    axes.axis("off")
