"""The linear-recurrence engine: one state per kv head, decayed and written token by token."""

from foveate.ops.scan.api import scan

__all__ = ["scan"]
