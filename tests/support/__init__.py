"""What several test modules use: models, references, simulators, and ways to the inside of the package.

Nothing here is a test. Assertions read as in a test module all the same.
"""

import pkgutil

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{each.name}" for each in pkgutil.iter_modules(__path__)))
