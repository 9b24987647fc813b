"""The one error that a user can mend."""


class InputError(ValueError):
  """A flag, a config field or a file that does not fit. Programs print it as one line; exit code
  2.
  """

  def __init__(self, message: str):
    # Libraries write some of their reasons on several lines.
    super().__init__(' '.join(message.splitlines()))
