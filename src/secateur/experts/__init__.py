"""Methods that remove, merge or narrow the routed experts of a mixture: one file each."""
