"""Where data lives."""
