"""The error a user sees when a model cannot be had."""


class ModelError(RuntimeError):
    """A model cannot be fetched or loaded; the message says what, where and what to do."""
