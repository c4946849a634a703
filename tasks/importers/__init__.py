"""Preference data that is there already: its sources, its layouts, and its votes."""
