"""The one error that a user's input raises. A leaf."""


class InputError(ValueError):
    """What was handed in cannot be served; the message is one sentence that names the value and says what to do.

    The command line shows that sentence and ends with exit code 2. Any other exception is a bug of ours, and keeps
    its traceback.
    """
