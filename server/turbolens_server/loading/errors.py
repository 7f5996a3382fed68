"""What a start that fails says."""


class LoadError(RuntimeError):
    """A model or SAE cannot be served; the text is one line that says why and what to do."""
