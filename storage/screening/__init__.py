"""Which prompts a dataset should not have: near duplicates, contamination, other languages."""
