"""Methods that remove whole units of blocks, one file each: heads, channels, sub-blocks, layers."""
