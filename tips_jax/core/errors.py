"""The one error that a user can mend."""


class InputError(ValueError):
  """A flag, a config field or a file that does not fit. Programs print it as one line; exit code
  2.
  """
