"""The flags of ``rrhf baseline NAME``: one module a baseline."""
