"""Everything that storage refuses, each in one line that names the value and the fix.

StorageError
├── LakeError         the lake itself: a path that is a file, a damaged shard, a name that is not allowed
│   ├── DiskFullError         no space left
│   └── LakeUnreachableError  a store that does not answer now
├── RefError          no such dataset or version
├── SchemaError       a table that does not fit its schema
├── AssemblyError     pairs that cannot be made as asked
├── QueryError        SQL that DuckDB refuses
├── HubError          a version that is not, or cannot be, pushed to the hub
├── ExtraError        an optional package that is not installed
└── ViewError         a trainer's layout that is unknown or cannot carry the rows
"""


class StorageError(Exception):
    """Base of all errors of this package."""


class LakeError(StorageError):
    """The lake cannot be read or written as asked."""


class DiskFullError(LakeError):
    """No space left where the lake lies."""


class LakeUnreachableError(LakeError):
    """The store does not answer; another attempt may succeed."""


class RefError(StorageError):
    """A reference that names nothing."""


class SchemaError(StorageError):
    """A table that does not fit its schema."""


class AssemblyError(StorageError):
    """Pairs that cannot be made as asked."""


class QueryError(StorageError):
    """SQL that DuckDB refuses."""


class HubError(StorageError):
    """A version that is not, or cannot be, pushed to the hub."""


class ExtraError(StorageError):
    """An optional package that is not installed."""


class ViewError(StorageError):
    """A trainer's layout that is unknown or cannot carry the rows."""
