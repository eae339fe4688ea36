"""What a format of packed tensors is made of: import from here to add one.

>>> from secateur.storage.formats import FORMATS
>>> FORMATS.names()
['armor', 'bitmask', 'low-bit', 'low-bit-stack', 'nm', 'nm-columns']
"""

from secateur.checkpoint.packing import FORMATS, VERSION, Format, Packed, refused

__all__ = ["FORMATS", "VERSION", "Format", "Packed", "refused"]
