"""One thing per replica."""
