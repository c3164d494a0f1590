"""Other ways to the same all-reduce: each worker is a script for whoever has the peer."""
