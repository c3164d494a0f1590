"""State that stays in step."""
