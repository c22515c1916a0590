"""The note of what is written before its commit, what recovery makes of it, and fills in the log."""

import numpy as np
import pytest
from support.specs import SPEC

from shardemb.base.sizes import PAGE
from shardemb.commits import fills, log_reader, log_writer
from shardemb.errors import FormatError, LogDamagedError
from shardemb.format import store_paths
from shardemb.format.fill_records import Fill, Filled, Note
from shardemb.format.manifest import Commit, Manifest
from shardemb.format.table_files import TableLocation
from shardemb.storage import checksums, files, table_folder
