"""Preference pairs out of scored candidates, in SQL that streams: who is chosen, who is rejected, and why not."""
