import copy
import errno
import inspect
import pickle

import pytest

import shardemb
from shardemb import errors

TREE = {
    "ShardEmbError": Exception,
    "RowIdError": IndexError,
    "TableNotFoundError": KeyError,
    "TableExistsError": FileExistsError,
    "TagNotFoundError": KeyError,
    "TagExistsError": FileExistsError,
    "VocabularyNotFoundError": KeyError,
    "VocabularyExistsError": FileExistsError,
    "UnknownKeyError": KeyError,
    "StoreNotFoundError": FileNotFoundError,
    "StoreExistsError": FileExistsError,
    "StoreLockedError": BlockingIOError,
    "FrozenRowError": ValueError,
    "LearningRateError": ValueError,
    "SourceError": ValueError,
    "StoreClosedError": ValueError,
    "ReadOnlyError": PermissionError,
    "FormatError": ValueError,
    "LogDamagedError": None,
    "StaleReaderError": RuntimeError,
    "DiskFullError": OSError,
    "OwnerLostError": ConnectionError,
    "EraEndedError": RuntimeError,
    "PartitionError": RuntimeError,
    "PoisonedError": RuntimeError,
}

every_error = pytest.mark.parametrize("name", TREE)


def test_the_tree_is_pinned():
    classes = {name: each for name, each in vars(errors).items() if inspect.isclass(each)}
    assert set(classes) == set(TREE) == set(errors.__all__)


@every_error
def test_each_is_ours_and_the_builtin_that_a_caller_expects(name):
    cls = getattr(errors, name)
    expected = (Exception,) if name == "ShardEmbError" else (errors.ShardEmbError, TREE[name])
    if name == "LogDamagedError":
        expected = (errors.FormatError,)
    assert cls.__bases__ == expected


@every_error
def test_each_has_a_public_name(name):
    assert getattr(shardemb, name) is getattr(errors, name)
    assert name in shardemb.__all__


@every_error
@pytest.mark.parametrize("args", [("a message",), (), (errno.ENOSPC, "no room")], ids=str)
def test_each_survives_pickling_and_copying(name, args):
    error = getattr(errors, name)(*args)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert other.args == error.args
        assert str(other) == str(error)


@every_error
def test_each_prints_its_message_as_it_is(name):
    """KeyError alone would put it in quotes."""
    message = "the store has no table 'a'; its tables: 'b'"
    assert str(getattr(errors, name)(message)) == message


def test_an_empty_error_prints_nothing():
    assert str(errors.TableNotFoundError()) == ""


def test_disk_full_has_the_number_that_os_gives_it():
    error = errors.DiskFullError(errno.ENOSPC, "no room left")
    assert (error.errno, error.strerror) == (errno.ENOSPC, "no room left")


@every_error
def test_each_says_when_it_is_raised(name):
    assert getattr(errors, name).__doc__.endswith(".")
