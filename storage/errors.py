"""Everything that storage refuses, each in one line that names the value and the fix.

StorageError
├── LakeError         the lake itself: a path that is a file, a damaged shard, a name that is not allowed
│   └── DiskFullError no space left
├── RefError          no such dataset or version
├── SchemaError       a table that does not fit its schema
├── QueryError        SQL that DuckDB refuses
└── ViewError         a trainer's layout that is unknown or cannot carry the rows
"""


class StorageError(Exception):
    """Base of all errors of this package."""


class LakeError(StorageError):
    """The lake cannot be read or written as asked."""


class DiskFullError(LakeError):
    """No space left where the lake lies."""


class RefError(StorageError):
    """A reference that names nothing."""


class SchemaError(StorageError):
    """A table that does not fit its schema."""


class QueryError(StorageError):
    """SQL that DuckDB refuses."""


class ViewError(StorageError):
    """A trainer's layout that is unknown or cannot carry the rows."""
