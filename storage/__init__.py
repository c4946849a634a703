"""The lake: every path, schema, manifest and SQL statement of Winnow."""
