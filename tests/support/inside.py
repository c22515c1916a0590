"""From what a user holds to what lies behind it: the one place where tests use private names of other objects."""


def session(store):
    """The opening of a `Store`."""
    return store._session


def runtime(store):
    """What all tables of a `Store` share."""
    return session(store).runtime


def journal(store):
    """The base, log and folds of a `Store` that is open for writing."""
    return session(store).journal


def state(table):
    """What is behind a `Table`."""
    return table._state


def shards(table):
    """A `Table`'s files in memory."""
    return state(table).shards


def key_rows(vocabulary):
    """What is behind a `Vocabulary`."""
    return vocabulary._rows
