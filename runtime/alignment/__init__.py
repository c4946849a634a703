"""Training policies on preferences: losses as pure functions, collation, and the offline trainer."""
