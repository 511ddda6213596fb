"""The one exception that means "the user can fix this": entry points print it as one line and exit with 2."""


class UserError(Exception):
    """A mistake in what was asked for; its message says what was wrong, what was expected and what to type next."""
