"""Number formats as pure functions: integer and FP8 rounding, bit packing, and the layouts that engines read.

Importing this package does not import torch; `layout` needs none, every other module does.
"""
