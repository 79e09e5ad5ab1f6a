"""What outlasts the server: files, batches and responses, in one folder that servers may share."""

from rorqual.serve.store.batch_table import BatchRow, BatchTable, LostError
from rorqual.serve.store.database import Database, StorageError, ordered_id
from rorqual.serve.store.files import FileStore, NewFile
from rorqual.serve.store.folder import check_folder, default_folder, open_folder
from rorqual.serve.store.pages import Page
from rorqual.serve.store.responses import ResponseStore, StoredResponse
from rorqual.serve.store.store import Store

__all__ = [
    "BatchRow",
    "BatchTable",
    "Database",
    "FileStore",
    "LostError",
    "NewFile",
    "Page",
    "ResponseStore",
    "StorageError",
    "Store",
    "StoredResponse",
    "check_folder",
    "default_folder",
    "open_folder",
    "ordered_id",
]
