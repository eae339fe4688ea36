"""What computes from packed weights: a kernel in C++, compiled for this machine when it is first needed.

- `build`: compile, keep and load it; why it is not there.
- `kernel`: the products, on tensors.
"""
