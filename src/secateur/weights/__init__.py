"""Methods that set single weights to zero, one file each."""
