"""The Python code of Transformer Engine itself, on CPUs.

Only the compiled half of Transformer Engine is stood in for, by `shim`: names of modules, what they return, biases
beside outputs, sharding, sequence parallelism and grouped experts are those of the package that GPU users have. What
kernels compute, their types of less than 16 bits, context parallelism (which has no implementation without CUDA) and
time are not met here.
"""
