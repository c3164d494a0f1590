"""The same verbs across ranks."""
