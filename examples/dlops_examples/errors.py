"""The one exception that a user's mistake raises."""


class UsageError(Exception):
    """One line for the user: what was given, what is needed and how to get it."""
