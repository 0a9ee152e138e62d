"""The same numbers faster, by device.

``choice.kernels_for`` gives a device's kernels: a module with the functions of ``choice.Kernels``. ``reference`` has
them in plain torch for every device; ``cpu`` has what a CPU does faster, ``cuda`` FlexAttention for GPUs.
"""
