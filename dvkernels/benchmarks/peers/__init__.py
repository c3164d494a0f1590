"""What others offer for the same cases, one file a peer.

Each but NumPy runs in processes of its own, and in an environment of its own if it is given one.
"""
